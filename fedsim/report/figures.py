"""All figures of a run, from its frames (rounds, clients, partition, ...), as PNG files.

C classes, D features.

Matplotlib's objects are used directly: no pyplot, no change of anyone's settings.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from fedsim.report import _counts, _style
from fedsim.report.heads import class_norms, etf_angles
from fedsim.report.pseudo_labels import by_round, pseudo_labels
from fedsim.report.views import (
    accuracy_over_rounds,
    client_accuracy,
    gains,
    group_accuracy,
    personal_gain,
)
from fedsim.run import frames
from fedsim.run.directory import write_whole

__all__ = ["class_counts", "save", "save_figures"]


def class_counts(
    partition: pd.DataFrame,
    num_clients: int,
    num_classes: int,
    title: str,
    names: pd.DataFrame | None = None,
) -> Figure:
    """Draw how many labelled and unlabelled training examples of each class the clients hold.

    Up to 60 clients and 40 classes: a circle for each client and class with area proportional to
    the count, the dark part labelled. Above that: heat maps of the clients grouped by their most
    frequent class, and histograms of how much and how many classes a client holds. Both come
    with the totals of the classes, the long tail.

    Parameters
    ----------
    partition : DataFrame
        The frame of partition.csv; pairs of client and class that don't occur may be missing.
        Examples of class -1, which nobody knows, get a row of their own.
    num_clients, num_classes : int
        K and C; clients and classes are numbered from 0.
    title : str
        Written above the picture as it is.
    names : DataFrame, optional
        The frame of names.csv; what has no name is called by its number.

    Raises
    ------
    DataError
        A column is missing, a client or class is out of range, or nobody holds anything.
    """
    counts = _counts.Counts.read(partition, num_clients, num_classes, names)
    with mpl.rc_context(_style.STYLE):
        most_clients, most_classes = _counts.MOST_BUBBLES
        if num_clients <= most_clients and num_classes <= most_classes:
            return _counts.bubbles(counts, title)
        return _counts.heat_maps(counts, title)


def save_figures(
    folder: str | Path,
    *,
    rounds: pd.DataFrame,
    clients: pd.DataFrame,
    partition: pd.DataFrame,
    training: pd.DataFrame | None = None,
    norms: pd.DataFrame | None = None,
    etf: npt.NDArray[np.floating] | None = None,
    names: pd.DataFrame | None = None,
    num_clients: int,
    num_classes: int,
    title: str,
) -> list[Path]:
    """Write all figures of a run as PNG files and return their paths.

    A figure that needs an evaluated round is skipped, with a warning, where there is none. Those
    of pseudo-labels, of personal models and of heads are drawn only for methods that have them.

    Parameters
    ----------
    folder : path
        Made if it isn't there; files of the same names are replaced.
    rounds, clients, partition, names, num_clients, num_classes, title
        As for the single figures.
    training : DataFrame, optional
        The frame of training.csv, for `pseudo_labels.pseudo_labels`.
    norms : DataFrame, optional
        The norms of the heads' class vectors, for `heads.class_norms`.
    etf : float [C, D], optional
        The weight of a fixed classifier, for `heads.etf_angles`.

    Returns
    -------
    list of Path
        ``accuracy_over_rounds.png``, ``client_accuracy.png``, ``class_counts.png``,
        ``group_accuracy.png``, ``personal_gain.png``, ``pseudo_labels.png``,
        ``class_norms.png`` and ``etf.png`` in ``folder``, without the skipped ones.

    Raises
    ------
    DataError
        A column is missing, partition.csv doesn't fit the numbers of clients and classes, or
        ``norms`` or ``etf`` can't be drawn.
    """
    overall = frames.overall_columns(rounds).values()
    has_overall = not frames.evaluated(rounds, overall).empty
    has_clients = not frames.last_round(clients).empty
    has_groups = not frames.grouped(rounds).empty
    figures: dict[str, tuple[bool, Callable[[], Figure]]] = {
        "accuracy_over_rounds": (has_overall, lambda: accuracy_over_rounds(rounds, title)),
        "client_accuracy": (has_clients, lambda: client_accuracy(clients, title, names)),
        "class_counts": (
            True,
            lambda: class_counts(partition, num_clients, num_classes, title, names),
        ),
        "group_accuracy": (has_groups, lambda: group_accuracy(rounds, title)),
    }
    if not gains(clients).empty:
        figures["personal_gain"] = (True, lambda: personal_gain(clients, title, names))
    if training is not None and not by_round(training).empty:
        figures["pseudo_labels"] = (True, lambda: pseudo_labels(training, title))
    if norms is not None and not norms.empty and norms["norm"].notna().any():
        figures["class_norms"] = (True, lambda: class_norms(norms, title, names))
    if etf is not None:
        figures["etf"] = (True, lambda: etf_angles(etf, title, names))
    paths = []
    for name, (possible, draw) in figures.items():
        if not possible:
            why = "no evaluated round to draw"
            if name == "client_accuracy":
                why = "no client was tested on examples of its own"
            warnings.warn(f"{name}.png: skipped, {why}", stacklevel=2)
            continue
        path = Path(folder) / f"{name}.png"
        save(draw(), path)
        paths.append(path)
    return paths


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file as the style says, whatever the user's own Matplotlib settings are."""
    picture = io.BytesIO()
    with mpl.rc_context(_style.STYLE):
        figure.savefig(picture, dpi=_style.DPI, format="png")
    write_whole(path, picture.getvalue())

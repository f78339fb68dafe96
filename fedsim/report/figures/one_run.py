"""All figures of a run, from its frames (rounds, clients, partition, ...), as PNG files.

C classes, D features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from fedsim.report.figures.accuracy import (
    accuracy_over_rounds,
    client_accuracy,
    gains,
    group_accuracy,
    personal_gain,
)
from fedsim.report.figures.class_counts import class_counts
from fedsim.report.figures.heads import etf_angles, norms_by_frequency
from fedsim.report.figures.pseudo_labels import by_round, pseudo_labels
from fedsim.report.figures.style import save
from fedsim.run import frames


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
        The norms of the heads' class vectors, for `heads.norms_by_frequency`.
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
        figures["class_norms"] = (True, lambda: norms_by_frequency(norms, title, names))
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

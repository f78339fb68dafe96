"""Figures of a run, from its frames (rounds, clients, partition, training), as PNG files.

Matplotlib's objects are used directly: no pyplot, no change of anyone's settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedsim.errors import DataError
from fedsim.metrics import GROUPS, spread, worst_tenth
from fedsim.report import _counts, _frames, _style
from fedsim.report.pseudo_labels import by_round, pseudo_labels

__all__ = [
    "accuracy_over_rounds",
    "class_counts",
    "client_accuracy",
    "group_accuracy",
    "save_figures",
]

_OVERALL = {"generic_accuracy": "generic", "personal_accuracy": "personal"}
_BY_GROUP = {f"{name}_accuracy": name for name in GROUPS}
_MARKED_ROUNDS = 40  # up to so many evaluated rounds each one is marked
_NAMED_CLIENTS = 40  # up to so many clients each one's number stands below it


def accuracy_over_rounds(rounds: pd.DataFrame, title: str) -> Figure:
    """Draw the accuracy of the generic model and the clients' mean accuracy, over the rounds.

    Parameters
    ----------
    rounds : DataFrame
        The frame of rounds.csv; rounds without evaluation (NaN) are skipped.
    title : str
        Written above the picture as it is.

    Raises
    ------
    DataError
        No round was evaluated, or a column is missing.
    """
    done = _frames.evaluated(rounds, list(_OVERALL))
    if done.empty:
        raise DataError("rounds.csv: no evaluated round; set evaluation.every to draw accuracies")
    with mpl.rc_context(_style.STYLE):
        note = "Generic: global test set. Personal: mean over the clients' own test sets."
        fig = _style.new_figure(7.0, 3.7, title, note)
        ax = fig.add_subplot()
        labels = []
        for column, name in _OVERALL.items():
            line = done.dropna(subset=[column])
            if line.empty:
                continue
            y = 100 * _frames.floats(line, column)
            colour = _style.VIEW_COLOURS[name]
            few = len(line) <= _MARKED_ROUNDS
            ax.plot(
                _frames.floats(line, "round"),
                y,
                color=colour,
                linewidth=1.8 if few else 1.3,
                marker="o" if few else "",
                markersize=4.5,
                label=name,
                clip_on=False,
                zorder=3,
            )
            labels.append((float(y[-1]), f"{name} {y[-1]:.1f} %", colour))
        _style.percent_axis(ax, 100 * done[list(_OVERALL)].to_numpy(dtype=np.float64))
        _style.round_axis(ax, _frames.floats(done, "round"))
        _style.label_ends(ax, labels)
    return fig


def client_accuracy(clients: pd.DataFrame, title: str) -> Figure:
    """Draw the accuracy of every client in the last evaluated round, from worst to best.

    Parameters
    ----------
    clients : DataFrame
        The frame of clients.csv; each view has its own colour and its own order. Clients
        without test examples (NaN) are left out, and the picture says how many.
    title : str
        Written above the picture as it is.

    Raises
    ------
    DataError
        No round has a client accuracy, or a column is missing.
    """
    rows = _frames.last_round(clients)
    if rows.empty:
        raise DataError(_frames.NO_CLIENT_EVALUATED)
    scored = rows.dropna(subset=["accuracy"]).sort_values("accuracy", kind="stable")
    views = sorted(scored["view"].unique())
    spare = [c for c in _style.PALETTE if c not in _style.VIEW_COLOURS.values()]
    colours = {v: spare[i % len(spare)] for i, v in enumerate(views)} | _style.VIEW_COLOURS
    with mpl.rc_context(_style.STYLE):
        most = int(scored["view"].value_counts().max())
        note = f"Round {int(rows['round'].iloc[0])}, {most:,} clients; shaded: the worst 10 %"
        untested = rows.loc[rows["accuracy"].isna(), "client"].nunique()
        if untested:
            note += f"; without test examples, left out: {untested:,}"
        fig = _style.new_figure(7.5, 3.7, title, note)
        ax = fig.add_subplot()
        # One neutral band for all views: coloured ones would mix to a colour of no view.
        ax.axvspan(0.5, worst_tenth(most) + 0.5, color=_style.SHADE, linewidth=0)
        labels = []
        for view in views:
            of_view = scored[scored["view"] == view]
            y = 100 * _frames.floats(of_view, "accuracy")
            count, colour, over = len(y), colours[view], spread(y)
            few = count <= 3 * _NAMED_CLIENTS
            ax.plot(
                np.arange(1, count + 1),
                y,
                color=colour,
                linewidth=0.8 if few else 1.6,
                marker="o" if few else "",
                markersize=5 if count <= _NAMED_CLIENTS else 3,
                label=view,
                zorder=3,
            )
            ax.axhline(over["mean"], color=colour, linewidth=1.0, linestyle=(0, (5, 3)))
            ax.axhline(over["worst10"], color=colour, linewidth=1.0, linestyle=(0, (1, 2)))
            prefix = f"{view}: " if len(views) > 1 else ""
            labels.append((over["worst10"], f"{prefix}worst 10 %: {over['worst10']:.1f} %", colour))
            labels.append((over["mean"], f"{prefix}mean {over['mean']:.1f} %", colour))
        _style.percent_axis(ax, 100 * _frames.floats(scored, "accuracy"))
        ax.set_xlim(0.5, most + 0.5)
        if len(views) == 1 and most <= _NAMED_CLIENTS:
            ax.set_xticks(np.arange(1, most + 1), [f"{k:.0f}" for k in scored["client"]])
            ax.tick_params(axis="x", length=0, rotation=0 if most <= 20 else 90)
            ax.set_xlabel("Client, from worst to best")
        else:
            ax.xaxis.set_major_locator(_style.whole_numbers(8))
            ax.xaxis.set_major_formatter(_style.THOUSANDS)
            ax.set_xlabel("Clients, from worst to best")
        _style.label_ends(ax, labels)
    return fig


def class_counts(partition: pd.DataFrame, num_clients: int, num_classes: int, title: str) -> Figure:
    """Draw how many labelled and unlabelled training examples of each class the clients hold.

    Up to 60 clients and 40 classes: a circle for each client and class with area proportional to
    the count, the dark part labelled. Above that: heat maps of the clients grouped by their most
    frequent class, and histograms of how much and how many classes a client holds. Both come
    with the totals of the classes, the long tail.

    Parameters
    ----------
    partition : DataFrame
        The frame of partition.csv; pairs of client and class that don't occur may be missing.
    num_clients, num_classes : int
        K and C; clients and classes are numbered from 0.
    title : str
        Written above the picture as it is.

    Raises
    ------
    DataError
        A column is missing, a client or class is out of range, or nobody holds anything.
    """
    counts = _counts.Counts.read(partition, num_clients, num_classes)
    with mpl.rc_context(_style.STYLE):
        most_clients, most_classes = _counts.MOST_BUBBLES
        if num_clients <= most_clients and num_classes <= most_classes:
            return _counts.bubbles(counts, title)
        return _counts.heat_maps(counts, title)


def group_accuracy(rounds: pd.DataFrame, title: str) -> Figure:
    """Draw the generic model's accuracy on head, medium and tail classes in the last evaluation.

    Parameters
    ----------
    rounds : DataFrame
        The frame of rounds.csv. A group that is NaN (no class belongs to it) has no bar, and
        the picture says so.
    title : str
        Written above the picture as it is.

    Raises
    ------
    DataError
        No round has a head, medium or tail accuracy, or a column is missing.
    """
    done = _frames.evaluated(rounds, list(_BY_GROUP))
    if done.empty:
        raise DataError(
            "rounds.csv: no round has a head, medium or tail accuracy; set evaluation.every"
        )
    last = done.iloc[-1]
    shown = {name: 100 * last[c] for c, name in _BY_GROUP.items() if pd.notna(last[c])}
    absent = [name for name in GROUPS if name not in shown]
    note = f"Round {int(last['round'])}, generic model, global test set"
    if absent:
        note += f"; no classes in: {', '.join(absent)}"
    with mpl.rc_context(_style.STYLE):
        fig = _style.new_figure(5.5, 3.7, title, note)
        ax = fig.add_subplot()
        ax.grid(axis="y")
        bars = ax.bar(
            list(shown),
            list(shown.values()),
            width=0.62,
            color=[_style.GROUP_COLOURS[name] for name in shown],
        )
        ax.bar_label(bars, [f"{value:.1f} %" for value in shown.values()], padding=3)
        # Room for a value above a bar of 100 %; as wide as with three bars.
        ax.set_ylim(0, 108)
        middle = (len(shown) - 1) / 2
        ax.set_xlim(middle - 1.6, middle + 1.6)
        ax.set_yticks(range(0, 101, 20))
        ax.set_ylabel("Accuracy (%)")
        ax.tick_params(axis="x", length=0, labelsize=9)
        ax.set_xlabel("Classes, by how frequent they are in training")
    return fig


def save_figures(
    folder: str | Path,
    *,
    rounds: pd.DataFrame,
    clients: pd.DataFrame,
    partition: pd.DataFrame,
    training: pd.DataFrame | None = None,
    num_clients: int,
    num_classes: int,
    title: str,
) -> list[Path]:
    """Write all figures of a run as PNG files and return their paths.

    A figure that needs an evaluated round is skipped, with a warning, where there is none. The
    one of pseudo-labels is drawn only for methods that have them.

    Parameters
    ----------
    folder : path
        Made if it isn't there; files of the same names are replaced.
    rounds, clients, partition, num_clients, num_classes, title
        As for the single figures.
    training : DataFrame, optional
        The frame of training.csv, for `pseudo_labels.pseudo_labels`.

    Returns
    -------
    list of Path
        ``accuracy_over_rounds.png``, ``client_accuracy.png``, ``class_counts.png``,
        ``group_accuracy.png`` and ``pseudo_labels.png`` in ``folder``, without the skipped ones.

    Raises
    ------
    DataError
        A column is missing, or partition.csv doesn't fit the numbers of clients and classes.
    """
    has_overall = not _frames.evaluated(rounds, list(_OVERALL)).empty
    has_clients = not _frames.last_round(clients).empty
    has_groups = not _frames.evaluated(rounds, list(_BY_GROUP)).empty
    figures: dict[str, tuple[bool, Callable[[], Figure]]] = {
        "accuracy_over_rounds": (has_overall, lambda: accuracy_over_rounds(rounds, title)),
        "client_accuracy": (has_clients, lambda: client_accuracy(clients, title)),
        "class_counts": (True, lambda: class_counts(partition, num_clients, num_classes, title)),
        "group_accuracy": (has_groups, lambda: group_accuracy(rounds, title)),
    }
    if training is not None and not by_round(training).empty:
        figures["pseudo_labels"] = (True, lambda: pseudo_labels(training, title))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (possible, draw) in figures.items():
        if not possible:
            warnings.warn(f"{name}.png: skipped, no evaluated round to draw", stacklevel=2)
            continue
        path = folder / f"{name}.png"
        save(draw(), path)
        paths.append(path)
    return paths


def save(figure: Figure, path: Path) -> None:
    """Write a figure as the style says, whatever the user's own Matplotlib settings are."""
    with mpl.rc_context(_style.STYLE):
        figure.savefig(path, dpi=_style.DPI)

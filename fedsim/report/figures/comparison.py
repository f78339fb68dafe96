"""Figures of several runs side by side: over the rounds, over the clients, by class group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from fedsim.data.class_groups import GROUPS
from fedsim.metrics import accuracy_column
from fedsim.report.comparison import SeedGroup
from fedsim.report.figures import style
from fedsim.report.figures.style import save
from fedsim.run import frames

CAPTIONS = {
    "accuracy_over_rounds": "Accuracy after each tested round.",
    "client_accuracy": "The accuracy of the clients, from the worst to the best.",
    "group_accuracy": "Accuracy on frequent (head), medium and rare (tail) classes.",
}
_LINE = 0.21  # inches of height that a label beside the data takes
_DASHES: Sequence[Any] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_MARKED_ROUNDS = 40  # up to so many evaluated rounds each one is marked
_PLACES = np.linspace(0, 1, 201)  # of a client between the worst and the best


def save_comparison(folder: Path, seed_groups: Sequence[SeedGroup], title: str) -> list[Path]:
    """Write the figures of a comparison as PNG files and return their paths.

    ``accuracy_over_rounds.png``, ``client_accuracy.png`` and ``group_accuracy.png``, without
    those for which no run has numbers.
    """
    drawn: dict[str, Callable[[], Figure | None]] = {
        "accuracy_over_rounds": lambda: accuracy_over_rounds(seed_groups, title),
        "client_accuracy": lambda: client_accuracy(seed_groups, title),
        "group_accuracy": lambda: group_accuracy(seed_groups, title),
    }
    paths = []
    for name, draw in drawn.items():
        figure = draw()
        if figure is not None:
            paths.append(folder / f"{name}.png")
            save(figure, paths[-1])
    return paths


def accuracy_over_rounds(seed_groups: Sequence[SeedGroup], title: str) -> Figure | None:
    """Draw generic and personal accuracy over the rounds: means, shaded from least to most."""
    panels = {}
    for view, tested in (
        ("generic", "on the global test set"),
        ("personal", "mean over the clients' own test sets"),
    ):
        curves = [_over_rounds(one, accuracy_column(view)) for one in seed_groups]
        if any(len(curve) for curve in curves):
            panels[f"{view} accuracy, {tested}"] = curves
    if not panels:
        return None
    with mpl.rc_context(style.STYLE):
        height = max(3.4, _LINE * len(seed_groups))
        note = "Mean over the seeds; shaded: from the lowest to the highest"
        fig = style.new_figure(6.6 * len(panels), height, title, note)
        for i, (name, curves) in enumerate(panels.items()):
            ax = fig.add_subplot(1, len(panels), i + 1)
            style.set_note(ax, name.capitalize())
            labels = []
            for one, curve, look in zip(seed_groups, curves, _looks(len(seed_groups)), strict=True):
                if not len(curve):
                    continue
                x, mean = curve.index.to_numpy(dtype=np.float64), curve.mean(axis=1).to_numpy()
                marker = "o" if len(x) <= _MARKED_ROUNDS else ""
                ax.plot(x, mean, marker=marker, markersize=3.5, linewidth=1.5, zorder=3, **look)
                low, high = curve.min(axis=1).to_numpy(), curve.max(axis=1).to_numpy()
                ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
                labels.append((mean[-1], f"{one.label} {mean[-1]:.1f} %", look["color"]))
            style.percent_axis(ax, np.concatenate([curve.to_numpy().ravel() for curve in curves]))
            rounds = np.unique(np.concatenate([curve.index.to_numpy() for curve in curves]))
            style.round_axis(ax, rounds.astype(np.float64))
            style.label_ends(ax, labels, inches=height - 0.4)
    return fig


def client_accuracy(seed_groups: Sequence[SeedGroup], title: str) -> Figure | None:
    """Draw the accuracy of the clients, from worst to best, a line for each group of seeds."""
    curves = [_over_clients(one) for one in seed_groups]
    if not any(len(curve) for curve in curves):
        return None
    with mpl.rc_context(style.STYLE):
        height = max(3.4, _LINE * len(seed_groups))
        note = (
            "Last evaluated round; each client's personal model where there is one, else the "
            "generic one; mean over the seeds; shaded: the worst 10 %"
        )
        fig = style.new_figure(7.5, height, title, note)
        ax = fig.add_subplot()
        ax.axvspan(0, 10, color=style.SHADE, linewidth=0)
        labels = []
        for one, curve, look in zip(seed_groups, curves, _looks(len(seed_groups)), strict=True):
            if len(curve):
                ax.plot(100 * _PLACES, curve, linewidth=1.5, zorder=3, **look)
                labels.append((float(curve[-1]), one.label, look["color"]))
        style.percent_axis(ax, np.concatenate(curves))
        ax.set_xlim(0, 100)
        ax.set_xlabel("Clients, from worst to best (%)")
        style.label_ends(ax, labels, inches=height - 0.4)
    return fig


def group_accuracy(seed_groups: Sequence[SeedGroup], title: str) -> Figure | None:
    """Draw the accuracy of each group of seeds on head, medium and tail classes."""
    means = pd.DataFrame([one.furthest[list(GROUPS)].mean() for one in seed_groups])
    if means.isna().all(axis=None):
        return None
    with mpl.rc_context(style.STYLE):
        note = (
            "Last evaluated round; the generic model on the global test set or, where there is "
            "none, personal ones on the clients' own; mean over the seeds"
        )
        fig = style.new_figure(7.5, 0.9 + 0.32 * len(seed_groups), title, note)
        ax = fig.add_subplot()
        places = np.arange(len(seed_groups))
        for group in GROUPS:
            colour = style.GROUP_COLOURS[group]
            ax.plot(
                100 * means[group], places, "o", markersize=7, color=colour, label=group, zorder=3
            )
        low, high = 100 * means.min(axis=1), 100 * means.max(axis=1)
        ax.hlines(places, low, high, color=style.GRID, linewidth=2)
        ax.set_yticks(places, [one.label for one in seed_groups], parse_math=False)
        ax.set_ylim(len(seed_groups) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
        ax.set_xlim(-2, 102)
        ax.set_xlabel("Accuracy (%)")
        ax.grid(axis="x")
        style.class_legend(ax)
    return fig


def _over_rounds(one: SeedGroup, name: str) -> pd.DataFrame:
    """Return an accuracy in %: a row for each round that any run tested, a column a run."""
    columns = []
    for run in one.runs:
        done = frames.evaluated(run.rounds, [name]) if name in run.rounds else pd.DataFrame()
        if len(done):
            columns.append(100 * done.set_index("round")[name].astype(np.float64))
    return pd.concat(columns, axis=1).sort_index() if columns else pd.DataFrame()


def _over_clients(one: SeedGroup) -> npt.NDArray[np.float64]:
    """Return the accuracy in % at `_PLACES` between the worst and the best client."""
    curves = []
    compared = set(one.furthest["run"])
    for run in one.runs:
        if run.client_scores is None or str(run.path) not in compared:
            continue
        scores = run.client_scores.ranking.dropna().to_numpy()
        if len(scores):
            curves.append(100 * np.quantile(scores, _PLACES))
    return np.mean(curves, axis=0) if curves else np.empty(0)


def _looks(count: int) -> list[dict[str, Any]]:
    """Return a colour and dashes for each line; other dashes wherever colours come closer."""
    colours = style.SERIES_COLOURS
    each = len(style.PALETTE)
    return [
        {"color": colours[i % len(colours)], "linestyle": _DASHES[i // each % len(_DASHES)]}
        for i in range(count)
    ]

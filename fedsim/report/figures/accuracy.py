"""Figures of what the views of a model reach: over the rounds, by client, by class group.

A view is one way to predict with a trained model: ``generic`` (the global model), ``personal``
(a client's own), and each of them with a realigned head. A method has some of the four.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedsim.data.class_groups import GROUPS
from fedsim.errors import DataError
from fedsim.metrics import spread, worst_tenth
from fedsim.report.figures import style
from fedsim.report.text import counted
from fedsim.run import frames

__all__ = ["accuracy_over_rounds", "client_accuracy", "gains", "group_accuracy", "personal_gain"]

_MARKED_ROUNDS = 40  # up to so many evaluated rounds each one is marked
_NAMED_CLIENTS = 40  # up to so many clients each one's number stands below it
_ROW = 5.0  # inches, at least, that these have side by side
_MOST_BARS = 120  # up to so many clients each one has a bar or a mark of its own
_ON_GLOBAL, _ON_LOCAL = "global test set", "mean over the clients' own test sets"


def accuracy_over_rounds(rounds: pd.DataFrame, title: str) -> Figure:
    """Draw the accuracy of each view over the rounds.

    Parameters
    ----------
    rounds : DataFrame
        The frame of rounds.csv; rounds without evaluation (NaN) are skipped, and so is a view
        that the method doesn't have (no column, or all NaN).
    title : str
        Written above the picture as it is.

    Raises
    ------
    DataError
        No round was evaluated, or a column is missing.
    """
    columns = frames.overall_columns(rounds)
    done = frames.evaluated(rounds, columns.values())
    if done.empty:
        raise DataError("rounds.csv: no evaluated round; set evaluation.every to draw accuracies")
    shown = {view: column for view, column in columns.items() if done[column].notna().any()}
    with mpl.rc_context(style.STYLE):
        kinds = {"generic": _ON_GLOBAL, "personal": _ON_LOCAL}
        note = " ".join(
            f"{kind.capitalize()}: {tested}."
            for kind, tested in kinds.items()
            if any(view.startswith(kind) for view in shown)
        )
        fig = style.new_figure(7.0, 3.7, title, note)
        ax = fig.add_subplot()
        colours, labels = style.view_colours(shown), []
        for view, column in shown.items():
            line = done.dropna(subset=[column])
            y = 100 * frames.floats(line, column)
            colour = colours[view]
            few = len(line) <= _MARKED_ROUNDS
            ax.plot(
                frames.floats(line, "round"),
                y,
                color=colour,
                linewidth=1.8 if few else 1.3,
                linestyle=style.VIEW_DASHES.get(view, "-"),
                marker="o" if few else "",
                markersize=4.5,
                label=view,
                clip_on=False,
                zorder=3,
            )
            labels.append((float(y[-1]), f"{view} {y[-1]:.1f} %", colour))
        style.percent_axis(ax, 100 * done[list(shown.values())].to_numpy(dtype=np.float64))
        style.round_axis(ax, frames.floats(done, "round"))
        style.label_ends(ax, labels)
    return fig


def client_accuracy(clients: pd.DataFrame, title: str, names: pd.DataFrame | None = None) -> Figure:
    """Draw the accuracy of every client in the last evaluated round, from worst to best.

    Parameters
    ----------
    clients : DataFrame
        The frame of clients.csv; each view has its own colour and its own order. Clients
        without test examples (NaN) are left out, and the picture says how many.
    title : str
        Written above the picture as it is.
    names : DataFrame, optional
        The frame of names.csv; what has no name is called by its number.

    Raises
    ------
    DataError
        No round has a client accuracy, or a column is missing.
    """
    rows = frames.last_round(clients)
    if rows.empty:
        raise DataError(frames.NO_CLIENT_EVALUATED)
    scored = rows.dropna(subset=["accuracy"]).sort_values("accuracy", kind="stable")
    views = sorted(scored["view"].unique())
    colours = style.view_colours(views)
    with mpl.rc_context(style.STYLE):
        most = int(scored["view"].value_counts().max())
        note = (
            f"Round {int(rows['round'].iloc[0])}, {counted(most, 'client')}; shaded: the worst 10 %"
        )
        note += _untested(rows)
        ticks = _client_ticks(scored["client"], most, names)
        fig = style.new_figure(7.5, 3.7 + (ticks.height if ticks else 0.0), title, note)
        ax = fig.add_subplot()
        # One neutral band for all views: coloured ones would mix to a colour of no view.
        ax.axvspan(0.5, worst_tenth(most) + 0.5, color=style.SHADE, linewidth=0)
        # Across the picture, more than four levels hide the clients: then only beside their labels.
        start = 0.0 if len(views) <= 2 else 0.94
        labels = []
        for view in views:
            of_view = scored[scored["view"] == view]
            y = 100 * frames.floats(of_view, "accuracy")
            count, colour, over = len(y), colours[view], spread(y)
            few = count <= _MOST_BARS
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
            for key, dashes in (("mean", (0, (5, 3))), ("worst10", (0, (1, 2)))):
                ax.axhline(over[key], xmin=start, color=colour, linewidth=1.0, linestyle=dashes)
            prefix = f"{view}: " if len(views) > 1 else ""
            labels.append((over["worst10"], f"{prefix}worst 10 %: {over['worst10']:.1f} %", colour))
            labels.append((over["mean"], f"{prefix}mean {over['mean']:.1f} %", colour))
        style.percent_axis(ax, 100 * frames.floats(scored, "accuracy"))
        _client_axis(ax, ticks, most, ordered="from worst to best")
        style.label_ends(ax, labels)
    return fig


def gains(clients: pd.DataFrame) -> pd.Series[float]:
    """Return what each client gains by its personal model, in the last evaluated round.

    Parameters
    ----------
    clients : DataFrame
        The frame of clients.csv.

    Returns
    -------
    Series
        Client -> accuracy of the view ``personal`` minus that of ``generic``, in percentage
        points, from the least to the most (lower client first in a tie). Clients without both
        (no test example, or the method lacks one of the views) are left out.

    Raises
    ------
    DataError
        A column is missing.

    Examples
    --------
    >>> clients = pd.DataFrame({
    ...     "round": 9, "client": [0, 0, 1, 1], "view": ["generic", "personal"] * 2,
    ...     "accuracy": [0.5, 0.75, 0.5, 0.25],
    ... })
    >>> gains(clients).to_dict()
    {1: -25.0, 0: 25.0}
    """
    rows = frames.last_round(clients)
    if rows.empty:
        return pd.Series(dtype=np.float64)
    accuracy = {
        view: of_view.set_index("client")["accuracy"].astype(np.float64)
        for view, of_view in rows.groupby("view")
    }
    nobody = pd.Series(dtype=np.float64)
    # A difference of equal shares, a/n - b/n, can miss 0 by a rounding error.
    gain = (100 * (accuracy.get("personal", nobody) - accuracy.get("generic", nobody))).round(9)
    return gain.dropna().sort_index().sort_values(kind="stable")


def personal_gain(clients: pd.DataFrame, title: str, names: pd.DataFrame | None = None) -> Figure:
    """Draw how much better or worse each client's personal model is than the generic one.

    Parameters
    ----------
    clients : DataFrame
        The frame of clients.csv, see `gains`; the picture says how many clients are left out.
    title : str
        Written above the picture as it is.
    names : DataFrame, optional
        The frame of names.csv; what has no name is called by its number.

    Raises
    ------
    DataError
        No client has an accuracy of both views in the last evaluated round, or a column is
        missing.
    """
    gain = gains(clients)
    rows = frames.last_round(clients)
    if rows.empty:
        raise DataError(frames.NO_CLIENT_EVALUATED)
    if gain.empty:
        scored = rows.loc[rows["accuracy"].notna(), "view"].unique()
        raise DataError(
            "clients.csv: no client has an accuracy of both views, 'generic' and 'personal', in "
            f"round {int(rows['round'].iloc[0])}, only of: {', '.join(map(str, scored))}; "
            "choose a method that has both"
        )
    y, count, mean = gain.to_numpy(), len(gain), float(gain.mean())
    up, down = y > 0, y < 0
    better, worse = style.VIEW_COLOURS["personal"], style.VIEW_COLOURS["generic"]
    with mpl.rc_context(style.STYLE):
        note = (
            f"Round {int(rows['round'].iloc[0])}, {counted(count, 'client')}: "
            f"{up.sum():,} gain, "
            f"{down.sum():,} lose, {count - up.sum() - down.sum():,} level"
        )
        note += _untested(rows)
        one_view = rows.loc[rows["accuracy"].notna(), "client"].nunique() - count
        if one_view:
            note += f"; with one of the two views only, left out: {one_view:,}"
        ticks = _client_ticks(gain.index.to_series(), count, names)
        fig = style.new_figure(7.5, 3.7 + (ticks.height if ticks else 0.0), title, note)
        ax = fig.add_subplot()
        for part, colour in ((up, better), (down, worse)):
            if count <= _MOST_BARS:
                ax.bar(np.arange(1, count + 1)[part], y[part], width=0.72, color=colour)
            else:
                edges = np.arange(count + 1) + 0.5
                ax.stairs(np.where(part, y, 0.0), edges, color=colour, fill=True)
        ax.axhline(0, color=style.MUTED, linewidth=0.8)
        ax.axhline(mean, color=style.INK, linewidth=1.0, linestyle=(0, (5, 3)))
        # A point of room where all are level: nothing else says how far the axis should go.
        low, high = min(0.0, float(y[0])), max(0.0, float(y[-1]))
        pad = 0.04 * (high - low) or 1.0
        ax.set_ylim(low - pad, high + pad)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _signed(value, "g")))
        ax.set_ylabel("Personal minus generic (points)")
        ax.grid(axis="y")
        _client_axis(ax, ticks, count, ordered="from least to most gained")
        style.label_ends(ax, [(mean, f"mean {_signed(mean, '.1f')} points", style.INK)])
    return fig


def group_accuracy(rounds: pd.DataFrame, title: str) -> Figure:
    """Draw the accuracy on head, medium and tail classes in the last evaluation.

    Parameters
    ----------
    rounds : DataFrame
        The frame of rounds.csv. A view that is all NaN is left out. A group that is NaN (no
        class belongs to it) has no bar, and the picture says so.
    title : str
        Written above the picture as it is.

    Raises
    ------
    DataError
        No round has a head, medium or tail accuracy, or a column is missing.
    """
    done = frames.grouped(rounds)
    if done.empty:
        raise DataError(
            "rounds.csv: no round has a head, medium or tail accuracy; set evaluation.every"
        )
    last = done.iloc[-1]
    values = {
        view: {name: 100 * last[c] for name, c in by_group.items() if pd.notna(last[c])}
        for view, by_group in frames.group_columns(rounds).items()
    }
    values = {view: by_group for view, by_group in values.items() if by_group}
    groups = [name for name in GROUPS if any(name in shown for shown in values.values())]
    note = f"Round {int(last['round'])}"
    if len(values) > 1:
        note += f"; generic: {_ON_GLOBAL}; personal: {_ON_LOCAL}"
    else:
        view = next(iter(values))
        note += f", {view} model, {_ON_GLOBAL if view.startswith('generic') else _ON_LOCAL}"
    if len(groups) < len(GROUPS):
        note += f"; no classes in: {', '.join(name for name in GROUPS if name not in groups)}"
    with mpl.rc_context(style.STYLE):
        fig = style.new_figure(5.5 if len(values) == 1 else 7.5, 3.7, title, note)
        ax = fig.add_subplot()
        ax.grid(axis="y")
        if len(values) == 1:
            _group_bars(ax, next(iter(values.values())))
        else:
            _view_bars(ax, values, groups)
        # Room for a value above a bar of 100 %.
        ax.set_ylim(0, 108)
        ax.set_yticks(range(0, 101, 20))
        ax.set_ylabel("Accuracy (%)")
        ax.tick_params(axis="x", length=0, labelsize=9)
    return fig


def _group_bars(ax: Axes, values: Mapping[str, float]) -> None:
    """Draw the groups of a single view."""
    bars = ax.bar(
        list(values),
        list(values.values()),
        width=0.62,
        color=[style.GROUP_COLOURS[name] for name in values],
    )
    ax.bar_label(bars, [f"{value:.1f} %" for value in values.values()], padding=3)
    # As wide as with three bars.
    middle = (len(values) - 1) / 2
    ax.set_xlim(middle - 1.6, middle + 1.6)
    ax.set_xlabel("Classes, by how frequent they are in training")


def _view_bars(ax: Axes, values: Mapping[str, Mapping[str, float]], groups: list[str]) -> None:
    """Draw the groups of several views, a cluster of bars for each view."""
    step = 0.84 / len(groups)
    for i, name in enumerate(groups):
        found = [(x, shown[name]) for x, shown in enumerate(values.values()) if name in shown]
        bars = ax.bar(
            [x + (i - (len(groups) - 1) / 2) * step for x, _ in found],
            [value for _, value in found],
            width=0.9 * step,
            color=style.GROUP_COLOURS[name],
            label=name,
        )
        ax.bar_label(bars, [f"{value:.1f}" for _, value in found], padding=2, fontsize=8)
    ax.set_xticks(range(len(values)), list(values))
    style.class_legend(ax)


def _untested(rows: pd.DataFrame) -> str:
    """Say how many clients have no accuracy in any view."""
    untested = int(rows.groupby("client")["accuracy"].count().eq(0).sum())
    return f"; without test examples, left out: {untested:,}" if untested else ""


def _client_ticks(clients: pd.Series, count: int, names: pd.DataFrame | None) -> style.Ticks | None:
    """Return the labels of the clients where they are few and of one row."""
    if not len(clients) == count <= _NAMED_CLIENTS:
        return None
    return style.ticks(clients.astype(int).tolist(), frames.names_of(names, "client"), _ROW)


def _client_axis(ax: Axes, ticks: style.Ticks | None, count: int, *, ordered: str) -> None:
    """Label the clients, or number their places where they have no labels."""
    ax.set_xlim(0.5, count + 0.5)
    if ticks is not None:
        ticks.place(ax, np.arange(1, count + 1))
        ax.set_xlabel(f"Client, {ordered}")
    else:
        ax.xaxis.set_major_locator(style.whole_numbers(8))
        ax.xaxis.set_major_formatter(style.THOUSANDS)
        ax.set_xlabel(f"Clients, {ordered}")


def _signed(value: float, how: str) -> str:
    """Write a number with its sign, 0 without.

    >>> _signed(2.04, ".1f"), _signed(-3.0, "g"), _signed(-0.01, ".1f")
    ('+2.0', '−3', '0.0')
    """
    text = f"{value:+{how}}"
    return text.replace("-", "−") if float(text) else text[1:]

"""The tables of a run and of a partition, and a run's result in one line."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.errors import DataError
from fedsim.metrics import GROUPS, spread
from fedsim.report import _frames

_COUNTS = {"num_train": "train", "num_labelled": "labels", "num_test": "test"}
_SHARES = {
    "accuracy": "acc.",
    "head_accuracy": "head",
    "medium_accuracy": "medium",
    "tail_accuracy": "tail",
}
_SCORES = {"f1_macro": "F1"}
_FOOTER = {"mean": "mean", "std": "std", "worst10": "worst 10%"}


def client_table(clients: pd.DataFrame, *, limit: int = 40) -> Table:
    """Lay out the last evaluated round, one row for each client (and view, if several).

    Parameters
    ----------
    clients : DataFrame
        The frame of clients.csv.
    limit : int
        With more rows than this, only the best and the worst clients are shown, ``limit`` rows
        in all, and the caption says so; >= 2.

    Returns
    -------
    rich.table.Table
        Clients in order of their number, or from best to worst where only some are shown. The
        closing rows are over all clients; each of their columns is summarised on its own, so
        the worst 10 % of two columns may be different clients. NaN is shown as "–".

    Raises
    ------
    DataError
        No round has a client accuracy, a column is missing, or ``limit`` is below 2.
    """
    if limit < 2:
        raise DataError(f"client table: limit is {limit}; give 2 or more")
    rows = _frames.last_round(clients)
    if rows.empty:
        raise DataError(_frames.NO_CLIENT_EVALUATED)
    _frames.require(rows, [*_COUNTS, *_SHARES, *_SCORES], "clients.csv")
    views = list(pd.unique(rows["view"]))
    several = len(views) > 1

    table = Table(
        title=Text(f"Clients after round {int(rows['round'].iloc[0])}, accuracies in %"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    headers = [*_COUNTS.values(), *_SHARES.values(), *_SCORES.values()]
    for header in ["client", *(["view"] if several else []), *headers]:
        table.add_column(Text(header), justify="left" if header == "view" else "right")

    def add(first: str, view: str, cells: list[str]) -> None:
        # Text, not str: a name from the user's files must not be read as markup.
        table.add_row(*map(Text, [first, *([view] if several else []), *cells]))

    shown: list[dict[Hashable, Any] | None] = []
    if len(rows) > limit:
        best, worst = _extremes(rows, limit)
        shown += [*best.to_dict("records"), None, *worst.to_dict("records")]
        table.caption = Text(_caption(rows, len(best), len(worst), several))
    else:
        shown += rows.to_dict("records")
    for row in shown:
        if row is None:
            add("⋯", "⋯", ["⋯"] * len(headers))
        else:
            counts = [f"{int(row[name]):,}" for name in _COUNTS]
            add(f"{int(row['client'])}", str(row["view"]), counts + _cells(row))
    for view in views:
        table.add_section()
        of_view = rows[rows["view"] == view]
        spreads = {name: spread(_frames.floats(of_view, name)) for name in (*_SHARES, *_SCORES)}
        for key, label in _FOOTER.items():
            counts = [_mean(of_view[name]) if key == "mean" else "" for name in _COUNTS]
            add(label, str(view), counts + _cells({n: s[key] for n, s in spreads.items()}))
    return table


def partition_table(partition: pd.DataFrame, num_clients: int, *, limit: int = 40) -> Table:
    """Lay out how much each client holds, one row for each client.

    Parameters
    ----------
    partition : DataFrame
        The frame of partition.csv.
    num_clients : int
        K; clients that don't occur in the frame hold nothing.
    limit : int
        With more clients than this, only the largest and the smallest are shown, ``limit`` in
        all, and the caption says so; >= 2.

    Returns
    -------
    rich.table.Table
        Clients in order of their number, or from most to fewest training examples where only
        some are shown; the classes are those of the training examples. The closing rows are
        over all clients.

    Raises
    ------
    DataError
        A column is missing, a client is out of range, or ``limit`` is below 2.
    """
    if limit < 2:
        raise DataError(f"partition table: limit is {limit}; give 2 or more")
    _frames.require(partition, ["client", "labelled", "unlabelled", "test"], "partition.csv")
    outside = partition.loc[~partition["client"].between(0, num_clients - 1), "client"]
    if len(outside):
        raise DataError(
            f"partition.csv: client {outside.iloc[0]} is out of range; "
            f"must be in [0, {num_clients})"
        )
    train = partition["labelled"] + partition["unlabelled"]
    columns = partition.assign(train=train, classes=train > 0)
    rows = (
        columns.groupby("client")[["train", "labelled", "classes", "test"]]
        .sum()
        .reindex(range(num_clients), fill_value=0)
    )
    table = Table(
        title=Text("Examples of each client"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    for header in ("client", *map(str, rows.columns)):
        table.add_column(Text(header), justify="right")
    shown, most = rows, len(rows)
    if num_clients > limit:
        by_size = rows.sort_values("train", ascending=False, kind="stable")
        most = limit - limit // 2
        shown = pd.concat([by_size.iloc[:most], by_size.iloc[-(limit // 2) :]])
        table.caption = Text(
            f"The {most} largest and {limit // 2} smallest of {num_clients:,} clients; "
            f"{num_clients - limit:,} not shown: see partition.csv"
        )
    for i, (client, row) in enumerate(shown.iterrows()):
        if i == most:
            table.add_row(*["⋯"] * (1 + len(rows.columns)))
        table.add_row(str(client), *(f"{value:,}" for value in row))
    table.add_section()
    table.add_row("mean", *(_mean(rows[name]) for name in rows.columns))
    # Classes of different clients overlap: their sum means nothing.
    totals = {name: f"{value:,}" for name, value in rows.sum().items() if name != "classes"}
    table.add_row("total", *(totals.get(name, "") for name in rows.columns))
    return table


def _mean(counts: pd.Series[Any]) -> str:
    mean = float(counts.mean())
    return f"{mean:,.1f}" if mean < 100 else f"{mean:,.0f}"


def summary_line(rounds: pd.DataFrame, clients: pd.DataFrame) -> str:
    """Say in one line how the run ended.

    Parameters
    ----------
    rounds, clients : DataFrame
        The frames of rounds.csv and clients.csv.

    Returns
    -------
    str
        The last evaluated round (never the best one). The spread over clients is of the view
        ``personal``, or of ``generic`` where a run has only that. NaN is shown as "–".

    Raises
    ------
    DataError
        A column is missing.

    Examples
    --------
    >>> rounds = pd.DataFrame({
    ...     "round": [1, 2], "generic_accuracy": [0.5, 0.931], "personal_accuracy": [0.4, 0.91],
    ...     "head_accuracy": [0.6, 0.95], "medium_accuracy": [0.5, 0.92],
    ...     "tail_accuracy": [0.1, float("nan")],
    ... })
    >>> clients = pd.DataFrame({
    ...     "round": [2, 2], "client": [0, 1], "view": "generic", "accuracy": [0.87, 0.95],
    ... })
    >>> summary_line(rounds, clients)[:60]
    'round 2: generic 93.1 %, personal 91.0 % (std 4.0, worst 10 '
    >>> summary_line(rounds, clients)[60:]
    '% 87.0), head/medium/tail 95.0/92.0/– %'
    """
    groups = [f"{name}_accuracy" for name in GROUPS]
    done = _frames.evaluated(rounds, ["generic_accuracy", "personal_accuracy", *groups])
    if done.empty:
        return f"{len(rounds)} rounds, none evaluated"
    last = done.iloc[-1]
    over = spread([])
    if not clients.empty:
        _frames.require(clients, ["round", "view", "accuracy"], "clients.csv")
        rows = clients[clients["round"] == last["round"]]
        view = "personal" if (rows["view"] == "personal").any() else "generic"
        over = spread(_frames.floats(rows[rows["view"] == view], "accuracy"))
    by_group = "/".join(_percent(last[name]) for name in groups)
    return (
        f"round {int(last['round'])}: generic {_percent(last['generic_accuracy'])} %, "
        f"personal {_percent(last['personal_accuracy'])} % "
        f"(std {_percent(over['std'])}, worst 10 % {_percent(over['worst10'])}), "
        f"head/medium/tail {by_group} %"
    )


def _extremes(rows: pd.DataFrame, limit: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the best and the worst rows by accuracy, both from high to low, ``limit`` in all."""
    ranked = rows.dropna(subset=["accuracy"]).sort_values(
        "accuracy", ascending=False, kind="stable"
    )
    shown = min(limit, len(ranked))
    best = shown - shown // 2
    return ranked.iloc[:best], ranked.iloc[len(ranked) - shown // 2 :]


def _caption(rows: pd.DataFrame, best: int, worst: int, several: bool) -> str:
    untested = int(rows["accuracy"].isna().sum())
    hidden = len(rows) - best - worst
    note = f", {untested:,} of them without test examples" if untested else ""
    return (
        f"The {best} best and {worst} worst of {len(rows):,} "
        f"{'rows (client and view)' if several else 'clients'} by accuracy; "
        f"{hidden:,} not shown{note}: see clients.csv"
    )


def _cells(scores: Mapping[Any, float]) -> list[str]:
    f1 = [f"{scores[name]:.3f}" if math.isfinite(scores[name]) else "–" for name in _SCORES]
    return [_percent(scores[name]) for name in _SHARES] + f1


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if np.isfinite(share) else "–"

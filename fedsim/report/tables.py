"""The tables of a run and of a partition, and a run's result in one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from fedsim.data.class_groups import GROUPS
from fedsim.errors import DataError
from fedsim.metrics import accuracy_column, spread
from fedsim.report.client_rows import CLOSING, client_rows
from fedsim.report.text import percent
from fedsim.run import frames
from fedsim.run.client_scores import COUNTS, GROUP_SCORES, ClientScores

MOST_CLIENTS = 40
"""Of more clients the tables have the first and the last."""
_STEP = 6  # characters from one accuracy to the next in a column of several: " 100.0"


def client_table(clients: pd.DataFrame, names: pd.DataFrame | None = None) -> Table:
    """Lay out the last evaluated round, one row for each client.

    Parameters
    ----------
    clients : DataFrame
        The frame of clients.csv.
    names : DataFrame, optional
        The frame of names.csv; a client without a name is called by its number.

    Returns
    -------
    rich.table.Table
        Clients in order of their number; of more than `MOST_CLIENTS` the best and the worst, from
        high to low, and the caption says so. With several views there is an accuracy of each, in
        the order in which the frame has them; the ranking, head, medium, tail and F1 are of the
        view ``personal``, or of the first where there is none, and the title says which. The
        closing rows are over all clients; each of their columns is summarised on its own, so the
        worst 10 % of two columns may be different clients. NaN, and a view that a client has no
        row of, is shown as "–".

        The views generic, generic-realigned, personal and personal-realigned fit together into
        80 characters, for clients below 1,000,000 and counts below 100,000. Where there isn't the
        width for a name its end is left out.

    Raises
    ------
    DataError
        No round has a client accuracy, a column is missing, or a client has two rows of a view in
        that round.
    """
    scores = ClientScores.of(clients)
    written = client_rows(scores, MOST_CLIENTS, _mean)
    several = len(scores.views) > 1
    blocks = _blocks(scores.views)
    called = frames.names_of(names, "client")
    # Then only names give way where the width isn't enough.
    whole = several or bool(called)

    title = f"Clients after round {scores.round}, accuracies in %"
    if several:
        title += f"\nhead, medium, tail and F1: {scores.ranking_view}"
    # Without edges and padding a space is left between columns: else four views, or names, don't
    # fit.
    table = Table(
        title=Text(title),
        caption=Text(written.caption) if written.caption else None,
        box=box.SIMPLE_HEAD,
        show_edge=not whole,
        pad_edge=False,
        padding=0 if whole else (0, 1),
        title_justify="left",
        caption_justify="left",
    )
    # Text, not str: a name from the user's files must not be read as markup.
    _add_clients(table, called, no_wrap=several)
    views = [Text(_stacked(block), justify="left") if several else Text("acc.") for block in blocks]
    for header in (*map(Text, COUNTS.values()), *views, *map(Text, (*GROUPS, "F1"))):
        table.add_column(header, justify="right", no_wrap=whole)

    def add(first: Text, cells: Iterable[str]) -> None:
        """Add a row, in which the views of a block share a column."""
        left = iter(cells)
        counts = [*islice(left, len(COUNTS))]
        accuracies = [_side_by_side(islice(left, len(block))) for block in blocks]
        table.add_row(first, *map(Text, (*counts, *accuracies, *left)))

    for i, part in enumerate(written.parts):
        if i > 0:
            add(Text("⋯"), ["⋯"] * len(written.heads))
        for client, cells in part.items():
            add(_called(client, called), cells)
    table.add_section()
    for label, cells in written.closing.items():
        add(Text(_closing(label)), cells)
    return table


def _closing(label: str) -> str:
    """Return what a closing row is called, in the few characters that there are."""
    return label.replace(" %", "%")


def _add_clients(table: Table, names: Mapping[int, str], no_wrap: bool = False) -> None:
    """Add the column of the clients; their names may be cut down to the width of the last row."""
    if names:
        table.add_column(Text("client"), min_width=len(_closing(CLOSING["worst10"])))
    else:
        table.add_column(Text("client"), justify="right", no_wrap=no_wrap)


def _called(client: int, names: Mapping[int, str]) -> Text:
    """Return a client's name, in one line, or the number where it has none."""
    name = names.get(client)
    return Text(name, no_wrap=True, overflow="ellipsis") if name else Text(f"{client}")


def partition_table(
    partition: pd.DataFrame, num_clients: int, names: pd.DataFrame | None = None
) -> Table:
    """Lay out how much each client holds, one row for each client.

    Parameters
    ----------
    partition : DataFrame
        The frame of partition.csv.
    num_clients : int
        K; clients that don't occur in the frame hold nothing.
    names : DataFrame, optional
        The frame of names.csv; a client without a name is called by its number.

    Returns
    -------
    rich.table.Table
        Clients in order of their number; of more than `MOST_CLIENTS` the largest and the smallest,
        from most to fewest training examples, and the caption says so. The classes are those of the
        training examples, as far as known. The closing rows are over all clients.

    Raises
    ------
    DataError
        A column is missing, or a client is out of range.
    """
    needed = ["client", "class", "labelled", "unlabelled", "test"]
    frames.require(partition, needed, "partition.csv")
    outside = partition.loc[~partition["client"].between(0, num_clients - 1), "client"]
    if len(outside):
        raise DataError(
            f"partition.csv: client {outside.iloc[0]} is out of range; "
            f"must be in [0, {num_clients})"
        )
    train = partition["labelled"] + partition["unlabelled"]
    columns = partition.assign(train=train, classes=(train > 0) & (partition["class"] >= 0))
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
    called = frames.names_of(names, "client")
    _add_clients(table, called)
    for header in map(str, rows.columns):
        table.add_column(Text(header), justify="right", no_wrap=bool(called))
    shown, most = rows, len(rows)
    if num_clients > MOST_CLIENTS:
        by_size = rows.sort_values("train", ascending=False, kind="stable")
        least = MOST_CLIENTS // 2
        most = MOST_CLIENTS - least
        shown = pd.concat([by_size.iloc[:most], by_size.iloc[-least:]])
        table.caption = Text(
            f"The {most} largest and {least} smallest of {num_clients:,} clients; "
            f"{num_clients - MOST_CLIENTS:,} not shown: see partition.csv"
        )
    for i, (client, row) in enumerate(zip(shown.index, shown.to_numpy(), strict=True)):
        if i == most:
            table.add_row(*["⋯"] * (1 + len(rows.columns)))
        table.add_row(_called(client, called), *(f"{value:,}" for value in row))
    table.add_section()
    table.add_row("mean", *(_mean(rows[name].mean()) for name in rows.columns))
    # Classes of different clients overlap: their sum means nothing.
    totals = {name: f"{value:,}" for name, value in rows.sum().items() if name != "classes"}
    table.add_row("total", *(totals.get(name, "") for name in rows.columns))
    return table


def _mean(mean: float) -> str:
    """Write a mean number of examples."""
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
        ``personal``, or of ``generic`` where a run has only that. Head, medium and tail are of
        the generic model; of the personal ones where the method has no generic model (its
        accuracy is NaN), which is then left out. What a realigned head reaches is added where
        the method has one. NaN is shown as "–".

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
    >>> summary_line(rounds.assign(generic_realigned_accuracy=0.95), clients)[:44]
    'round 2: generic 93.1 % (realigned 95.0 %), '
    """
    groups = list(GROUP_SCORES)
    done = frames.evaluated(rounds, ["generic_accuracy", "personal_accuracy", *groups])
    if done.empty:
        return f"{len(rounds)} rounds, none evaluated"
    last = done.iloc[-1]
    over = spread([])
    if not clients.empty:
        frames.require(clients, ["round", "view", "accuracy"], "clients.csv")
        rows = clients[clients["round"] == last["round"]]
        view = "personal" if (rows["view"] == "personal").any() else "generic"
        over = spread(frames.floats(rows[rows["view"] == view], "accuracy"))
    parts = []
    if pd.notna(last["generic_accuracy"]):
        realigned = _realigned(last, "generic")
        note = f" ({realigned})" if realigned else ""
        parts.append(f"generic {percent(last['generic_accuracy'])} %{note}")
    else:
        groups = [accuracy_column("personal", name) for name in GROUPS]
        frames.require(rounds, groups, "rounds.csv")
    notes = [f"std {percent(over['std'])}, worst 10 % {percent(over['worst10'])}"]
    notes += filter(None, [_realigned(last, "personal")])
    parts.append(f"personal {percent(last['personal_accuracy'])} % ({'; '.join(notes)})")
    parts.append(f"head/medium/tail {'/'.join(percent(last[name]) for name in groups)} %")
    return f"round {int(last['round'])}: {', '.join(parts)}"


def _realigned(row: pd.Series[Any], view: str) -> str:
    """Say what a view reaches with a realigned head; nothing where the method has none."""
    share = row.get(accuracy_column(f"{view}-realigned"), math.nan)
    return f"realigned {percent(share)} %" if pd.notna(share) else ""


def _blocks(views: Sequence[str]) -> list[list[str]]:
    """Put each view and those derived from it together.

    >>> _blocks(["generic", "generic-realigned", "personal"])
    [['generic', 'generic-realigned'], ['personal']]
    """
    blocks: list[list[str]] = []
    for view in views:
        if blocks and view.startswith(f"{blocks[-1][0]}-"):
            blocks[-1].append(view)
        else:
            blocks.append([view])
    return blocks


def _stacked(block: Sequence[str]) -> str:
    """Write the views of a block on a line each, above their accuracies in `_side_by_side`.

    >>> print(_stacked(["generic", "generic-realigned"]))
    generic
      realigned
    >>> _side_by_side(["100.0", "53.7"])
    '100.0  53.7'
    """
    names = [block[0], *(view.removeprefix(f"{block[0]}-") for view in block[1:])]
    width = max(_STEP * len(names) - 1, *map(len, names))
    ends = [width - _STEP * after for after in reversed(range(len(names)))]
    # A name too long to end above its numbers starts at the left and reaches over the next ones.
    return "\n".join(name.rjust(end) for name, end in zip(names, ends, strict=True))


def _side_by_side(cells: Iterable[str]) -> str:
    return "".join(cell.rjust(_STEP) for cell in cells).lstrip()

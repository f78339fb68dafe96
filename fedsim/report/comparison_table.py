"""The table of a comparison: as text, and laid out for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pandas as pd
from rich import box
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedsim.data.class_groups import GROUPS
from fedsim.report.comparison import ROUNDS_TO, SeedGroup
from fedsim.report.text import percent
from fedsim.run import frames

NOTE = (
    "Worst 10 %: of the clients, by their personal models where there are some; head, medium and "
    "tail: of the generic model where there is one."
)


def comparison_rows(seed_groups: Sequence[SeedGroup]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the comparison, as text."""
    shown = pd.concat([one.results for one in seed_groups], ignore_index=True)
    names = [name for one in seed_groups for run in one.runs for name in run.rounds.columns]
    views = frames.views_of(pd.DataFrame(columns=list(dict.fromkeys(names))))
    views = [view for view in views if shown[view].notna().any()]
    to_target = [n for n in map(str, shown) if n.startswith(ROUNDS_TO) and shown[n].notna().any()]
    heads = ["run", "seeds", "round", *views, "worst 10 %", *GROUPS]
    heads += [_heading(name) for name in to_target] + ["s a round"]
    rows = []
    for one in seed_groups:
        results = one.furthest
        scores = [
            mean_std(results[name]) if name in results else "–"
            for name in (*views, "worst10", *GROUPS)
        ]
        seconds = f"{results['seconds'].mean():.3g}"
        last = results["round"].max()
        rows.append(
            [
                one.label,
                f"{len(results)} of {len(one.runs)}"
                if len(results) < len(one.runs)
                else f"{len(results)}",
                f"{last:.0f}" if pd.notna(last) else "–",
                *scores,
                *(_rounds_needed(results[name]) for name in to_target),
                seconds,
            ]
        )
    return heads, rows


def _heading(name: str) -> str:
    """Name a column of rounds to a target.

    >>> _heading("rounds_to_80_generic")
    'rounds to 80 % generic'
    """
    target, view = name.removeprefix(ROUNDS_TO).rsplit("_", 1)
    return f"rounds to {target} % {view}"


def _rounds_needed(rounds: pd.Series[float]) -> str:
    """Return the mean number of rounds, and how many runs it is of where others never got there.

    >>> _rounds_needed(pd.Series([20.0, 25.0])), _rounds_needed(pd.Series([20.0, None]))
    ('22.5', '20 (1 of 2)')
    """
    reached = rounds.dropna()
    if reached.empty:
        return "–"
    of = f" ({len(reached)} of {len(rounds)})" if len(reached) < len(rounds) else ""
    return f"{reached.mean():.3g}{of}"


def mean_std(shares: pd.Series[float]) -> str:
    """Return a mean in %, with the standard deviation (n - 1) where there are several values.

    >>> mean_std(pd.Series([0.9])), mean_std(pd.Series([0.9, 0.94, None]))
    ('90.0', '92.0 ± 2.8')
    >>> mean_std(pd.Series(dtype=float))
    '–'
    """
    known = shares.dropna()
    if len(known) < 2:
        return percent(known.mean())
    return f"{percent(known.mean())} ± {percent(known.std())}"


def comparison_table(seed_groups: Sequence[SeedGroup]) -> Table:
    """Lay out a row for each group of seeds, for a terminal of 80 characters.

    The standard deviation over the seeds stands below the mean; head, medium and tail accuracy
    share a column, in whole %.
    """
    heads, rows = comparison_rows(seed_groups)
    last = sorted({row[heads.index("round")] for row in rows})
    after = f"After round {last[0]}" if len(last) == 1 else "After the last evaluated round"
    table = Table(
        title=Text(f"{after}, accuracies in %"),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
        title_justify="left",
        caption_justify="left",
        caption=Text(f"Mean and standard deviation over the seeds. {NOTE}"),
    )
    hidden = {*GROUPS, *(["round"] if len(last) == 1 else [])}
    kept = [i for i, head in enumerate(heads) if head not in hidden]
    for i in kept:
        stacked = heads[i].replace("-", "\n").replace(" % ", " %\n").replace(" ", "\n", 1)
        table.add_column(Text(stacked), justify="right" if i else "left", no_wrap=i > 0)
    table.add_column(Text("head/\nmedium/\ntail"), justify="right", no_wrap=True)
    for row, one in zip(rows, seed_groups, strict=True):
        means = one.furthest[list(GROUPS)].mean()
        groups = "/".join(f"{100 * mean:.0f}" if pd.notna(mean) else "–" for mean in means)
        cells = [Text(row[i].replace(" ±", "\n±")) for i in kept[1:]]
        table.add_row(_Name(row[0]), *cells, Text(groups))
    return table


class _Name:
    """A run's name, which goes on in the next line after a comma or colon, or between words."""

    _SETTINGS = re.compile(r"(?<=[\s,:])")
    _WORDS = re.compile(r"(?<=[=/_-])|(?<=\.)(?=[A-Za-z])|(?<=[a-z])(?=[A-Z])")

    def __init__(self, name: str) -> None:
        self._parts = [self._WORDS.split(part) for part in self._SETTINGS.split(name)]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        words = [word for part in self._parts for word in part]
        measured = Measurement(max(map(len, words)), sum(map(len, words)))
        return measured.with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        lines = [""]
        for words in self._parts:
            whole = "".join(words)
            for piece in [whole] if len(whole.rstrip()) <= options.max_width else words:
                if len(lines[-1]) + len(piece.rstrip()) > options.max_width:
                    lines.append("")
                lines[-1] += piece
        # Where a word alone is too long, its end follows in the next line.
        yield Text("\n".join(line.strip() for line in lines if line), overflow="fold")

"""Runs side by side: what they differ in, and what they reached, over their seeds."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedsim.data.class_groups import GROUPS
from fedsim.errors import ConfigError, DataError
from fedsim.metrics import accuracy_column, spread
from fedsim.report.text import percent
from fedsim.run import frames
from fedsim.run.saved import SavedRun
from fedsim.settings import COMPONENTS, flat, named

# What runs of one kind may differ in: chance, their name, how often they were tested and on what
# they ran.
_SAME_KIND = ("seed", "name", "evaluation.every", "engine.")
_ROUNDS_TO = "rounds_to_"


@dataclass(frozen=True)
class Series:
    """Runs that differ in nothing but the seed.

    Attributes
    ----------
    label : str
        What tells them from the other runs of the comparison.
    runs : list of SavedRun
        One a seed.
    figures : DataFrame
        A row a run, see `figures_of`.
    """

    label: str
    runs: list[SavedRun]
    figures: pd.DataFrame

    @property
    def furthest(self) -> pd.DataFrame:
        """The figures of the runs that were tested latest: what is compared.

        One that stopped early would be averaged with what the others reached later.
        """
        rounds = self.figures["round"]
        return self.figures[rounds == rounds.max()] if rounds.notna().any() else self.figures


def read_runs(folders: Iterable[Path | str]) -> list[SavedRun]:
    """Read run directories; a folder with some in it, as of a sweep, stands for all of them.

    Of each run only the clients' last evaluated round is kept.

    Raises
    ------
    DataError
        If a folder is neither, or a file of a run that was named can't be read.
    """
    runs: list[SavedRun] = []
    for folder in map(Path, folders):
        inner: list[Path] = []
        if not (folder / "experiment.toml").exists():
            inner = sorted((file.parent for file in folder.rglob("experiment.toml")), key=_natural)
        if not inner:
            runs.append(_read(folder))
        for found in inner:
            try:
                runs.append(_read(found))
            except DataError as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
    return runs


def _read(folder: Path) -> SavedRun:
    run = SavedRun.read(folder)
    run = replace(run, clients=frames.last_round(run.clients))
    _ = run.client_scores  # what is wrong with it is said now
    return run


def _natural(path: Path) -> list[tuple[float, str]]:
    """Return a key that sorts numbers in names by value.

    >>> sorted([Path("lr=0.1,seed=10"), Path("lr=0.1,seed=2")], key=_natural)[0].name
    'lr=0.1,seed=2'
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", str(path))
    return [(float(part), "") if i % 2 else (math.inf, part) for i, part in enumerate(parts)]


def compare(runs: Sequence[SavedRun], targets: Sequence[float] = ()) -> list[Series]:
    """Put runs that differ in nothing but the seed together, in the order in which they come.

    Where two runs have all else and the seed in common, what they ran on and their names tell them
    apart, too. A run of which another has every setting is left out, with a warning.

    Parameters
    ----------
    runs : sequence of SavedRun
        At least one.
    targets : sequence of float
        Accuracies in %, above 1 and up to 100: in how many rounds a run reaches each is compared.

    Raises
    ------
    DataError
        If there is no run, or a table lacks a column.
    ConfigError
        If a target is out of its range.
    """
    for target in targets:
        if not 1 < target <= 100:
            raise ConfigError(f"target = {target:g}: must be in %, above 1 and at most 100")
    if not runs:
        raise DataError("no run to compare")
    runs = _without_doubles(runs)
    settings = [flat(run.settings) for run in runs]
    apart = ["seed", *_telling(settings, but=_SAME_KIND)]
    twice = len({_values(one, apart) for one in settings}) < len(runs)
    keys = _telling(settings, but=("seed",) if twice else _SAME_KIND)
    together: dict[tuple[str, ...], dict[int, SavedRun]] = {}
    for run, values in zip(runs, settings, strict=True):
        by_seed = together.setdefault(_values(values, keys), {})
        by_seed[int(run.settings["seed"])] = run
        if len(run.rounds) < run.rounds_asked:
            warnings.warn(f"{run.path}: {_progress(run)} have finished", stacklevel=2)
    series = []
    for told, by_seed in together.items():
        of_one = [by_seed[seed] for seed in sorted(by_seed)]
        first = of_one[0]
        # Without a client update of one's own it is the method's.
        told_of = [(key, value) for key, value in zip(keys, told, strict=True) if value]
        label = ", ".join(named(key, value) for key, value in told_of)
        if not label:
            label = first.settings["method"]["name"] if "method.client" in keys else first.name
        rows = pd.DataFrame([figures_of(run, targets) for run in of_one])
        series.append(Series(label, of_one, rows))
    return series


def _without_doubles(runs: Sequence[SavedRun]) -> list[SavedRun]:
    """Leave out runs of which another has every setting, with a warning."""
    first: dict[str, SavedRun] = {}
    for run in runs:
        kept = first.setdefault(str(sorted(flat(run.settings).items())), run)
        if kept is not run:
            warnings.warn(
                f"left out: {run.path} has all settings of {kept.path}, and its seed", stacklevel=3
            )
    return list(first.values())


def _progress(run: SavedRun) -> str:
    return f"{len(run.rounds):,} of {run.rounds_asked:,} rounds"


def runs_of(series: Sequence[Series]) -> list[tuple[str, int, str, str]]:
    """Return each run's label, seed, rounds ("190 of 300 rounds" where it stopped) and folder."""
    return [
        (
            one.label,
            int(run.settings["seed"]),
            _progress(run) if len(run.rounds) < run.rounds_asked else f"{len(run.rounds):,}",
            str(run.path),
        )
        for one in series
        for run in one.runs
    ]


def all_figures(series: Sequence[Series]) -> pd.DataFrame:
    """Return a row a run: its label, every setting in which some runs differ, and its figures."""
    settings = [flat(run.settings) for one in series for run in one.runs]
    table = pd.concat([one.figures for one in series], ignore_index=True)
    for key in reversed(list(dict.fromkeys(key for one in settings for key in one))):
        values = [one.get(key) for one in settings]
        if key != "seed" and len({str(value) for value in values}) > 1:
            table.insert(0, key, values)
    table.insert(0, "label", [one.label for one in series for _ in one.runs])
    return table


def figures_of(run: SavedRun, targets: Sequence[float] = ()) -> dict[str, Any]:
    """Return what a run reached in its last evaluated round, and when it reached the targets.

    Returns
    -------
    dict
        ``run`` (its folder), ``seed``, ``round``; the accuracy of each view, as in rounds.csv;
        ``std`` and ``worst10`` over the clients, of their personal models or, where there are none,
        of the generic one; ``head``, ``medium`` and ``tail`` accuracy of the generic model or,
        where there is none, of the personal ones; ``seconds`` (median: the first round warms up)
        and ``bytes`` a round; ``rounds_to_80_generic`` and ``rounds_to_80_personal``, the first
        evaluated round with 80 % or more, for a target of 80. Shares, not %; NaN where there is no
        such number.
    """
    last = pd.Series(dtype=np.float64) if run.last_evaluated is None else run.last_evaluated
    over = spread([])
    if run.client_scores is not None:
        over = spread(run.client_scores.ranking)
    _, by_group = frames.group_shares(last)
    rounds = run.rounds
    return {
        "run": str(run.path),
        "seed": run.settings["seed"],
        "round": int(last["round"]) if len(last) else None,
        **{
            view: last.get(name, math.nan)
            for view, name in frames.overall_columns(run.rounds).items()
        },
        "std": over["std"],
        "worst10": over["worst10"],
        **by_group,
        "seconds": rounds["seconds"].median(),
        "bytes": (rounds["bytes_up"] + rounds["bytes_down"]).mean(),
        **{
            f"{_ROUNDS_TO}{target:g}_{view}": _first_round(rounds, view, target / 100)
            for target in targets
            for view in ("generic", "personal")
        },
    }


def _first_round(rounds: pd.DataFrame, view: str, share: float) -> float:
    """Return the first round in which a view's accuracy is ``share`` or more; NaN where none is."""
    name = accuracy_column(view)
    if name not in rounds:
        return math.nan
    reached = rounds.loc[rounds[name] >= share, "round"]
    return float(reached.min())


def comparison_table(series: Sequence[Series]) -> Table:
    """Lay out a row for each series of runs, for a terminal of 80 characters.

    The standard deviation over the seeds stands below the mean; head, medium and tail accuracy
    share a column, in whole %.
    """
    heads, rows = comparison_rows(series)
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
    for row, one in zip(rows, series, strict=True):
        means = one.furthest[list(GROUPS)].mean()
        groups = "/".join(f"{100 * mean:.0f}" if pd.notna(mean) else "–" for mean in means)
        figures = [Text(row[i].replace(" ±", "\n±")) for i in kept[1:]]
        table.add_row(_Name(row[0]), *figures, Text(groups))
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


NOTE = (
    "Worst 10 %: of the clients, by their personal models where there are some; head, medium and "
    "tail: of the generic model where there is one."
)


def comparison_rows(series: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the comparison, as text."""
    shown = pd.concat([one.figures for one in series], ignore_index=True)
    names = [name for one in series for run in one.runs for name in run.rounds.columns]
    views = frames.views_of(pd.DataFrame(columns=list(dict.fromkeys(names))))
    views = [view for view in views if shown[view].notna().any()]
    to_target = [n for n in map(str, shown) if n.startswith(_ROUNDS_TO) and shown[n].notna().any()]
    heads = ["run", "seeds", "round", *views, "worst 10 %", *GROUPS]
    heads += [_heading(name) for name in to_target] + ["s a round"]
    rows = []
    for one in series:
        figures = one.furthest
        scores = [
            mean_std(figures[name]) if name in figures else "–"
            for name in (*views, "worst10", *GROUPS)
        ]
        seconds = f"{figures['seconds'].mean():.3g}"
        last = figures["round"].max()
        rows.append(
            [
                one.label,
                f"{len(figures)} of {len(one.runs)}"
                if len(figures) < len(one.runs)
                else f"{len(figures)}",
                f"{last:.0f}" if pd.notna(last) else "–",
                *scores,
                *(_rounds_needed(figures[name]) for name in to_target),
                seconds,
            ]
        )
    return heads, rows


def _heading(name: str) -> str:
    """Name a column of rounds to a target.

    >>> _heading("rounds_to_80_generic")
    'rounds to 80 % generic'
    """
    target, view = name.removeprefix(_ROUNDS_TO).rsplit("_", 1)
    return f"rounds to {target} % {view}"


def _rounds_needed(rounds: pd.Series[float]) -> str:
    """Return the mean number of rounds, and how many runs it is of where others never got there.

    >>> _rounds_needed(pd.Series([20.0, 25.0])), _rounds_needed(pd.Series([20.0, np.nan]))
    ('22.5', '20 (1 of 2)')
    """
    reached = rounds.dropna()
    if reached.empty:
        return "–"
    of = f" ({len(reached)} of {len(rounds)})" if len(reached) < len(rounds) else ""
    return f"{reached.mean():.3g}{of}"


def mean_std(shares: pd.Series[float]) -> str:
    """Return a mean in %, with the standard deviation (n - 1) where there are several values.

    >>> mean_std(pd.Series([0.9])), mean_std(pd.Series([0.9, 0.94])), mean_std(pd.Series([np.nan]))
    ('90.0', '92.0 ± 2.8', '–')
    """
    known = shares.dropna()
    if len(known) < 2:
        return percent(known.mean())
    return f"{percent(known.mean())} ± {percent(known.std())}"


def _telling(settings: Sequence[Mapping[str, Any]], *, but: tuple[str, ...]) -> list[str]:
    """Return the keys, ``but`` some, that tell the runs apart: none that follows from others.

    >>> runs = [{"method.name": "fedavg"}, {"method.name": "fedprox", "method.mu": 0.1}]
    >>> _telling(runs, but=("seed",))
    ['method.name']
    """
    keys = list(dict.fromkeys(key for one in settings for key in one))
    places = {key: place for place, key in enumerate(COMPONENTS)}
    keys.sort(key=lambda key: places.get(key, len(places)))
    telling: list[str] = []
    apart = 1
    for key in keys:
        if not key.startswith(but):
            now = len({_values(one, [*telling, key]) for one in settings})
            if now > apart:
                telling.append(key)
                apart = now
    return telling


def _values(settings: Mapping[str, Any], keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(_text(settings.get(key, "–")) for key in keys)


def _text(value: Any) -> str:
    """Write a value as an experiment file does, strings without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)

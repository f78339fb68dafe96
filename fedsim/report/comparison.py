"""Runs side by side: what they differ in, and what they reached, over their seeds."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.errors import ConfigError, DataError
from fedsim.metrics import accuracy_column, spread
from fedsim.run import frames
from fedsim.run.saved import SavedRun
from fedsim.settings import COMPONENTS, flat, named

# What runs of one kind may differ in: chance, their name, how often they were tested and on what
# they ran.
_SAME_KIND = ("seed", "name", "evaluation.every", "engine.")
ROUNDS_TO = "rounds_to_"
"""How the name of a column begins that says when a run reached a target."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but the seed.

    Attributes
    ----------
    label : str
        What tells them from the other runs of the comparison.
    runs : list of SavedRun
        One a seed.
    results : DataFrame
        A row a run, see `results_of`.
    """

    label: str
    runs: list[SavedRun]
    results: pd.DataFrame

    @property
    def furthest(self) -> pd.DataFrame:
        """The results of the runs that were tested latest: what is compared.

        One that stopped early would be averaged with what the others reached later.
        """
        rounds = self.results["round"]
        return self.results[rounds == rounds.max()] if rounds.notna().any() else self.results


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


def compare(runs: Sequence[SavedRun], targets: Sequence[float] = ()) -> list[SeedGroup]:
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
    seed_groups = []
    for told, by_seed in together.items():
        of_one = [by_seed[seed] for seed in sorted(by_seed)]
        first = of_one[0]
        # Without a client update of one's own it is the method's.
        told_of = [(key, value) for key, value in zip(keys, told, strict=True) if value]
        label = ", ".join(named(key, value) for key, value in told_of)
        if not label:
            label = first.settings["method"]["name"] if "method.client" in keys else first.name
        rows = pd.DataFrame([results_of(run, targets) for run in of_one])
        seed_groups.append(SeedGroup(label, of_one, rows))
    return seed_groups


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


def runs_of(seed_groups: Sequence[SeedGroup]) -> list[tuple[str, int, str, str]]:
    """Return each run's label, seed, rounds ("190 of 300 rounds" where it stopped) and folder."""
    return [
        (
            one.label,
            int(run.settings["seed"]),
            _progress(run) if len(run.rounds) < run.rounds_asked else f"{len(run.rounds):,}",
            str(run.path),
        )
        for one in seed_groups
        for run in one.runs
    ]


def all_results(seed_groups: Sequence[SeedGroup]) -> pd.DataFrame:
    """Return a row a run: its label, every setting in which some runs differ, and its results."""
    settings = [flat(run.settings) for one in seed_groups for run in one.runs]
    table = pd.concat([one.results for one in seed_groups], ignore_index=True)
    for key in reversed(list(dict.fromkeys(key for one in settings for key in one))):
        values = [one.get(key) for one in settings]
        if key != "seed" and len({str(value) for value in values}) > 1:
            table.insert(0, key, values)
    table.insert(0, "label", [one.label for one in seed_groups for _ in one.runs])
    return table


def results_of(run: SavedRun, targets: Sequence[float] = ()) -> dict[str, Any]:
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
            f"{ROUNDS_TO}{target:g}_{view}": _first_round(rounds, view, target / 100)
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

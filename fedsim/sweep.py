"""Runs an experiment for each combination of some settings, and for several seeds."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedsim.config import Experiment
from fedsim.errors import ConfigError
from fedsim.experiment_file import load
from fedsim.resume import last_checkpoint
from fedsim.settings import named

_PLAIN = re.compile(r"[^A-Za-z0-9_.=,+-]")  # what a folder's name does without
_LONGEST = 150  # characters of a folder's name


@dataclass(frozen=True)
class Planned:
    """A run of a sweep.

    Attributes
    ----------
    name : str
        What it is called, and its folder in the sweep's.
    experiment : Experiment
        What is run.
    """

    name: str
    experiment: Experiment


def plan(
    file: Path, grid: Sequence[str], seeds: int, overrides: Sequence[str] = ()
) -> list[Planned]:
    """Return the runs of a sweep: every combination, each with every seed.

    Parameters
    ----------
    file : Path
        The experiment file.
    grid : sequence of str
        ``table.key=V1,V2`` each, or ``table.key=[V1, V2]`` in TOML, for values with commas.
    seeds : int
        How many seeds, from the experiment's own on; >= 1.
    overrides : sequence of str
        ``--set`` overrides for all runs.

    Raises
    ------
    ConfigError
        If a combination can't be run: a line for each mistake, with the combination's name. No run
        has begun then.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: must be at least 1")
    axes = [_axis(axis) for axis in grid]
    keys = [key for key, _ in axes]
    for key in keys:
        if key == "seed":
            raise ConfigError("--grid seed=...: give --seeds, the number of seeds")
        if keys.count(key) > 1:
            raise ConfigError(f"--grid {key}: is there twice; give all its values at once")
    planned: list[Planned] = []
    mistakes: list[str] = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        name = ",".join(named(key, value) for key, value in zip(keys, values, strict=True))
        try:
            first = load(file, [*overrides, *chosen])
            others = range(first.seed + 1, first.seed + seeds)
            of_name = [first, *(load(file, [*overrides, *chosen, f"seed={s}"]) for s in others)]
        except ConfigError as error:
            mistakes += [f"{name}: {line}" if name else line for line in str(error).split("\n")]
        else:
            planned += [Planned(_folder(name, one.seed), one) for one in of_name]
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    _check_apart(planned)
    return planned


def _check_apart(planned: Sequence[Planned]) -> None:
    """Raise `ConfigError` if two runs are the same, or would have the same folder."""
    experiments: dict[str, str] = {}
    names: set[str] = set()
    for one in planned:
        text = one.experiment.to_toml()
        if text in experiments:
            raise ConfigError(
                f"--grid: {experiments[text]} and {one.name} are the same experiment; give each "
                "value once"
            )
        if one.name in names:
            raise ConfigError(
                f"--grid: two runs would have the folder {one.name}; sweep them apart"
            )
        experiments[text] = one.name
        names.add(one.name)


def run_planned(
    planned: Sequence[Planned],
    folder: Path,
    begin: Callable[[int, Planned], Callable[[dict[str, Any]], None]],
) -> Iterator[tuple[Planned, BaseException | None]]:
    """Run what of a sweep hasn't finished in its folder, one run after the other.

    A run that was stopped goes on where it stopped. One that can't be run, or breaks, leaves the
    others alone.

    Parameters
    ----------
    planned : sequence of Planned
        The runs.
    folder : Path
        The sweep's folder; each run gets one of its own in it.
    begin : callable
        Called with the number of each run that begins or goes on, from 0; returns its observer, see
        `fedsim.simulate`.

    Yields
    ------
    Planned, exception or None
        Each run as it ends, those that had finished before too, and what stopped it.
    """
    from fedsim.simulation import simulate

    for i, one in enumerate(planned):
        path = folder / one.name
        try:
            begun = last_checkpoint(one.experiment, path)
            done = begun is not None and begun.round == one.experiment.training.rounds
            # The report is what a run writes last.
            if not done or not (path / "report.html").exists():
                simulate(one.experiment, out=path, resume=True, observer=begin(i, one))
            yield one, None
        except (Exception, SystemExit) as error:  # a strategy of the user's own may raise all kinds
            yield one, error


def _axis(text: str) -> tuple[str, list[str]]:
    """Return the key and the values, each as ``--set`` takes it.

    >>> _axis("training.lr=0.1, 0.01"), _axis("model.channels=[[4, 8], [16]]")
    (('training.lr', ['0.1', '0.01']), ('model.channels', ['[4, 8]', '[16]']))
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    found = [value.strip() for value in values.split(",")]
    if values.startswith("["):
        try:
            listed = tomllib.loads(f"values = {values}")["values"]
            found = [_toml(value) for value in listed] if isinstance(listed, list) else []
        except ValueError:
            found = []
    if not equals or not key or not found or not all(found):
        raise ConfigError(
            f"--grid {text!r}: write --grid table.key=V1,V2, or table.key=[V1, V2] in TOML"
        )
    return key, found


def _toml(value: Any) -> str:
    """Write a value in one line of TOML; `ValueError` for those that no setting has."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int | float):
        return repr(value)
    raise ValueError(f"{value!r} is no setting")


def _folder(name: str, seed: int) -> str:
    """Return what the folder of a run is called.

    >>> _folder("npz:a/b.npz,hidden=[4, 8]", 1), len(_folder("x" * 999, 2))
    ('npz-a-b.npz,hidden=4,8,seed=1', 166)
    """
    plain = _PLAIN.sub("-", re.sub(r"[\[\]\"' ]", "", name))
    if len(plain) > _LONGEST:
        plain = f"{plain[:_LONGEST]}-{sha256(name.encode()).hexdigest()[:8]}"
    return f"{plain},seed={seed}".lstrip(",")

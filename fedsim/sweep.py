"""Runs an experiment for each combination of some settings, and for several seeds."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.config import Experiment
from fedsim.errors import ConfigError, UserError
from fedsim.experiment_file import load
from fedsim.resume import last_checkpoint

_PLAIN = re.compile(r"[^\w.=,+-]")  # what a folder's name does without
_COMPONENTS = ("method.name", "method.client", "data.source", "model.name", "clients.partition")


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
        name = ",".join(_named(key, value) for key, value in zip(keys, values, strict=True))
        try:
            experiment = load(file, [*overrides, *chosen])
            for seed in range(experiment.seed, experiment.seed + seeds):
                one = load(file, [*overrides, *chosen, f"seed={seed}"])
                planned.append(Planned(f"{name},seed={seed}".lstrip(","), one))
        except ConfigError as error:
            mistakes += [f"{name}: {line}" if name else line for line in str(error).split("\n")]
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))
    names = [one.name for one in planned]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"--grid: two runs would be called {twice[0]}; give each value once")
    return planned


def run_planned(
    planned: Sequence[Planned],
    folder: Path,
    begin: Callable[[int, Planned], Callable[[dict[str, Any]], None]],
) -> Iterator[tuple[Planned, UserError | None]]:
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
    Planned, UserError or None
        Each run as it ends, those that had finished before too, and why it couldn't be run.
    """
    from fedsim.simulation import simulate

    for i, one in enumerate(planned):
        path = folder / one.name
        try:
            begun = last_checkpoint(one.experiment, path)
            done = begun is not None and begun.round == one.experiment.training.rounds
            if not done or not (path / "report.html").exists():
                simulate(one.experiment, out=path, resume=True, observer=begin(i, one))
            yield one, None
        except UserError as error:
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
        except ValueError:
            listed = None
        found = [json.dumps(value) for value in listed] if isinstance(listed, list) else []
    if not equals or not key or not found or not all(found):
        raise ConfigError(
            f"--grid {text!r}: write --grid table.key=V1,V2, or table.key=[V1, V2] in TOML"
        )
    return key, found


def _named(key: str, value: str) -> str:
    """Name a setting such that a folder can be called so.

    >>> _named("method.name", "fedavg"), _named("training.lr", "0.1"), _named("data.source", "a:b")
    ('fedavg', 'lr=0.1', 'a-b')
    """
    text = value if key in _COMPONENTS else f"{key.rpartition('.')[2]}={value}"
    return _PLAIN.sub("-", text.replace('"', ""))

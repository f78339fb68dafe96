"""Runs an experiment for each combination of some settings, and for several seeds."""

from __future__ import annotations

import itertools
import json
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedsim.config import Experiment, cohort_size
from fedsim.errors import ConfigError
from fedsim.experiment_file import check_key, load
from fedsim.hardware import device, num_cores
from fedsim.settings import named

_PLAIN = re.compile(r"[^A-Za-z0-9_.=,+-]")  # what a folder's name does without
_LONGEST = 150  # characters of a folder's name
MOST_RUNS = 10_000
"""Of a sweep; a number of more is a slip."""


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
        How many seeds, from the experiment's own on; >= 1, and at most `MOST_RUNS` runs in all.
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
    combinations = math.prod(len(values) for _, values in axes)
    if combinations * seeds > MOST_RUNS:
        each = f" of each of {combinations:,} combinations" if combinations > 1 else ""
        raise ConfigError(
            f"--seeds {seeds}{each}: makes {combinations * seeds:,} runs; must be at most "
            f"{MOST_RUNS:,}"
        )
    planned: list[Planned] = []
    mistakes: list[str] = []
    for values in itertools.product(*(values for _, values in axes)):
        chosen = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        # A client update that is none of one's own has no name.
        told = [(key, value) for key, value in zip(keys, values, strict=True) if value]
        name = ",".join(named(key, value) for key, value in told)
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


def jobs_at_a_time(planned: Sequence[Planned], jobs: int | None) -> int:
    """Return how many runs go on at a time, asked for or not.

    By default as many as there are cores for, since a run gets most out of a core that it has for
    itself; one where they train on a GPU, whose memory a run takes as if it were alone.

    Raises
    ------
    ConfigError
        If less than one is asked for.
    """
    if jobs is not None:
        if jobs < 1:
            raise ConfigError(f"--jobs {jobs}: must be at least 1")
        return min(jobs, len(planned))
    if any(device(one.experiment) == "cuda" for one in planned):
        return 1
    widest = max(_own_workers(one.experiment) or 1 for one in planned)
    return max(1, min(num_cores() // widest, len(planned)))


def on_its_cores(experiment: Experiment, jobs: int) -> Experiment:
    """Return an experiment with the cores that one of several runs at a time gets.

    What an experiment says of its workers itself stays, and so does what runs on a GPU.
    """
    if jobs == 1 or _own_workers(experiment) or device(experiment) == "cuda":
        return experiment
    cohort = cohort_size(experiment.training.participation, experiment.clients.count)
    workers = min(max(1, num_cores() // jobs), cohort)
    share = {"backend": "inline"} if workers == 1 else {"workers": workers}
    engine = experiment.engine.model_copy(update=share)
    return experiment.model_copy(update={"engine": engine})


def _own_workers(experiment: Experiment) -> int | None:
    """Return how many workers an experiment asks for; None if it leaves that open."""
    if experiment.engine.backend == "inline":
        return 1
    return experiment.engine.workers if isinstance(experiment.engine.workers, int) else None


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
    check_key(key, f"--grid {text!r}")
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

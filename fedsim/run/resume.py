"""Goes on with a run that was interrupted, or that shall have more rounds."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.util import resolve_name
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedsim import registry
from fedsim.config import Experiment
from fedsim.errors import ConfigError, EngineError
from fedsim.experiment_file import load
from fedsim.run.directory import CHECKPOINT, is_new, lacks_checkpoint
from fedsim.settings import flat

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

    from fedsim.engine.checkpoint import Checkpoint

MAY_CHANGE = ("training.rounds", "evaluation.every", "engine.")
"""Settings that a resumed run may have anew: they say how long, how often and on what, not what."""


def last_checkpoint(experiment: Experiment, folder: Path) -> Checkpoint | None:
    """Return where the run in a folder stands; None if no run has begun there.

    Raises
    ------
    ConfigError
        If the folder's run is that of another experiment, or has gone on for longer than asked.
    EngineError
        If the folder holds no usable checkpoint.
    """
    from fedsim.engine.checkpoint import Checkpoint

    if is_new(folder) or lacks_checkpoint(folder):
        return None
    if not (folder / CHECKPOINT).exists():
        raise EngineError(
            f"{folder} holds no run that could go on: {folder / CHECKPOINT} is missing; choose "
            "another --out"
        )
    checkpoint = Checkpoint.read(folder / CHECKPOINT)
    before = flat(load(folder / "experiment.toml").model_dump(mode="json"))
    now = flat(experiment.model_dump(mode="json"))
    may_change: tuple[str, ...] = MAY_CHANGE
    if experiment.training.lr_schedule == "cosine":  # the rounds say where it ends
        may_change = tuple(key for key in MAY_CHANGE if key != "training.rounds")
    changed = [
        f"{key} was {before.get(key)!r} in {folder}, but is {now.get(key)!r} now"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key) and not key.startswith(may_change)
    ]
    if changed:
        allowed = ", ".join(key + "*" * key.endswith(".") for key in may_change)
        raise ConfigError(
            "\n".join(f"{line}; a resumed run can only change {allowed}" for line in changed)
        )
    if checkpoint.round > experiment.training.rounds:
        raise ConfigError(
            f"training.rounds = {experiment.training.rounds}: the run in {folder} has finished "
            f"{checkpoint.round} already"
        )
    return checkpoint


def has_ended(folder: Path) -> bool:
    """Tell whether the run in a folder has come to its end, the report included.

    A report that is older than the end is one of the time before.
    """
    description, report = folder / "run.json", folder / "report.html"
    try:
        finished = json.loads(description.read_bytes())["finished"] is not None
        return finished and report.stat().st_mtime_ns >= description.stat().st_mtime_ns
    except (OSError, ValueError, TypeError, KeyError):
        return False


def warn_of_changes(experiment: Experiment, checkpoint: Checkpoint, folder: Path) -> None:
    """Warn of modules of the user's own that have changed since a checkpoint was written.

    One that was mended after it failed in the first round has made nothing yet.
    """
    if not checkpoint.round:
        return
    was, now = checkpoint.record.get("own_parts", {}), user_module_digests(experiment)
    if changed := changed_modules(was, now):
        warnings.warn(
            f"{', '.join(changed)}: changed since the run in {folder} was made, whose "
            f"{checkpoint.round} rounds are those of the code before; another --out begins anew",
            stacklevel=3,
        )


def changed_modules(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the modules of which both know a digest, and not the same."""
    return [module for module in now if module in was and now[module] != was[module]]


def check_model(checkpoint: Checkpoint, initial: ArrayRecord) -> None:
    """Raise `ConfigError` if a checkpoint's model has other arrays than the experiment's."""
    was, now = (
        {name: array.shape for name, array in arrays.items()}
        for arrays in (checkpoint.arrays, initial)
    )
    for name in dict.fromkeys((*was, *now)):
        if was.get(name) != now.get(name):
            raise ConfigError(
                f"the checkpoint's model has {_described(name, was)}, this experiment's "
                f"{_described(name, now)}: has the code of the model changed?"
            )


def _described(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{name} {list(shapes[name])}" if name in shapes else f"no {name}"


def user_module_digests(experiment: Experiment) -> dict[str, str]:
    """Return the SHA-256 of the file of each module of the user's own that the experiment needs.

    Those that it names, and those that these have imported from beside them.
    """
    named: list[tuple[registry.Kind, str]] = [
        ("method", experiment.method.name),
        ("client", experiment.method.client),
        ("model", experiment.model.name),
        ("dataset", experiment.data.source),
        ("partition", experiment.clients.partition),
    ]
    update = registry.find_update(experiment.method.name, experiment.method.client)
    if inspect.isclass(update) and ":" in experiment.method.name:
        named.append(("client", f"{update.__module__}:"))
    pending = []
    for kind, name in named:
        module, colon, _ = name.partition(":")
        if colon and not registry.has(kind, module):
            pending.append(module)
    files = {module: file for module in pending if (file := _file_of(module)) is not None}
    homes = {_home(module, file) for module, file in files.items()}
    found: dict[str, str] = {}
    while pending:
        module = pending.pop()
        file = _file_of(module)
        if module in found or file is None:
            continue
        if module not in files and (
            _is_installed(module, file) or _home(module, file) not in homes
        ):
            continue
        with suppress(OSError):
            source = file.read_bytes()
            found[module] = sha256(source).hexdigest()
            pending += _imported(module, file, source)
    return dict(sorted(found.items()))


def _imported(module: str, file: Path, source: bytes) -> Iterator[str]:
    """Yield the names of what a module imports, some of which may be no modules."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    with suppress(SyntaxError, ValueError, ImportError):  # changed since it was imported
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                whence = resolve_name("." * node.level + (node.module or ""), package)
                names = [whence, *(f"{whence}.{alias.name}" for alias in node.names)]
            for name in names:
                yield from accumulate(name.split("."), "{}.{}".format)  # packages around it, too


def _file_of(module: str) -> Path | None:
    found: Any = sys.modules.get(module)
    file = vars(found).get("__file__") if isinstance(found, ModuleType) else None
    return Path(file) if file is not None else None


def _is_installed(module: str, file: Path) -> bool:
    """Tell whether a module is ours, or another package's that is only used."""
    return (
        module.partition(".")[0] in ("fedsim", "strategies", "clients")
        or "site-packages" in file.parts
    )


def _home(module: str, file: Path) -> Path:
    """Return the folder from which a module was imported."""
    depth = module.count(".") + (file.name == "__init__.py")
    return file.parents[min(depth, len(file.parents) - 1)]

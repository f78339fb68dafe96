"""Every process of a run imports the same files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fedsim.errors import EngineError


class Origin(NamedTuple):
    """Where a top-level package or module comes from, and what it contains."""

    file: str
    digest: str

    def __str__(self) -> str:
        return f"{self.file} ({self.digest})" if self.digest else self.file


NOWHERE = Origin("nowhere", "")


def origins(packages: Iterable[str]) -> dict[str, Origin]:
    """Return where each package would be imported from, without importing it.

    Processes in which they are equal run the same code.
    """
    return {name: _origin(name) for name in packages}


def _origin(package: str) -> Origin:
    spec = find_spec(package)
    file = Path(spec.origin) if spec is not None and spec.origin else None
    if file is None:
        return NOWHERE
    digest = hashlib.sha256()
    for source in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
        digest.update(source.read_bytes())
    return Origin(str(file), digest.hexdigest()[:12])


def check_origins(found: Mapping[str, Origin], expected: Mapping[str, Origin]) -> None:
    """Raise `EngineError` if a worker would import something from elsewhere than this process."""
    for name, here in expected.items():
        there = found[name]
        if there == here:
            continue
        reason = (
            "its files have changed since the run began"
            if there.file == here.file
            else "a folder of that name in the working directory hides it; rename that folder "
            "or start from another directory"
        )
        raise EngineError(
            f"a Ray worker would import {name!r} from {there}, this process from {here}: {reason}"
        )


def extend_path(folders: Iterable[str]) -> None:
    """Search ``folders`` for modules, after everything else."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)

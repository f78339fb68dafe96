"""What the sources that read files share.

The names of splits and columns, and how to find a file, to say what is wrong, to number names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.source import UNKNOWN
from fedsim.errors import DataError

SPLITS = ("train", "test")

# Of several columns the first of these is taken: CIFAR-100 has fine_label and coarse_label.
USUAL_IMAGE_COLUMNS = ("image", "img")
USUAL_LABEL_COLUMNS = ("fine_label", "label")


def find_file(name: str, path: Path) -> Path | None:
    """Return the file with ``~`` written out, or None if there is none.

    Raises
    ------
    DataError
        If that can't be told; the line begins with `name`, the source.
    """
    return _find(name, path, lambda found: found.is_file())


def find_folder(name: str, path: Path) -> Path | None:
    """Return the folder with ``~`` written out, or None if there is none; else as `find_file`."""
    return _find(name, path, lambda found: found.is_dir())


def _find(name: str, path: Path, is_there: Callable[[Path], bool]) -> Path | None:
    try:
        path = path.expanduser()
        return path if is_there(path) else None
    except (OSError, RuntimeError) as error:  # too long, in a closed folder, of an unknown user
        raise DataError(f"{name}: can't read {path}: {first_line(error)}") from error


def check_file(what: str, path: Path) -> None:
    """Raise DataError if something there is no file: to open a pipe waits for who writes to it."""
    if not path.is_file() and path.exists():
        kind = "folder" if path.is_dir() else "pipe, socket or device"
        raise DataError(f"{what} is a {kind}; must be a file")


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def numbered(names: Iterable[Any], among: Sequence[Any]) -> NDArray[np.int64]:
    """Return each name's place among others.

    Parameters
    ----------
    names : iterable of hashable [N]
        What to number; None is unknown.
    among : sequence [K]
        The distinct names in the order of their numbers.

    Returns
    -------
    int64 [N]
        Numbers 0..K-1, or `UNKNOWN`.

    Examples
    --------
    >>> numbered(["bo", "al", None, "bo"], sorted({"al", "bo", "cy"})).tolist()
    [1, 0, -1, 1]
    """
    places: dict[Any, int] = {name: place for place, name in enumerate(among)}
    places[None] = UNKNOWN
    return np.array([places[name] for name in names], np.int64)

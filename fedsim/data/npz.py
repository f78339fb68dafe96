"""Arrays in an .npz file, CIFAR's among them.

Shapes: N training examples, M test examples, C classes, D features.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.files import find_file, first_line
from fedsim.data.source import ExampleArray, Source, display_names, warn_of_large_integers
from fedsim.errors import DataError

_NEEDED = ("x_train", "y_train", "x_test", "y_test")
# All that is read of a file, and what each may hold.
_ARRAYS = {
    "x_train": "real numbers",
    "x_test": "real numbers",
    "y_train": "integers",
    "y_test": "integers",
    "num_classes": "one integer",
    "group_train": "integers or strings",
    "group_test": "integers or strings",
}


def npz(location: str, *, flip: bool = False, normalise: bool = True) -> Source:
    """Return the arrays of an .npz file, as written by `numpy.savez`.

    Parameters
    ----------
    location : str
        A file with

        - ``x_train``, ``x_test``: images [N, H, W], [N, channels, H, W] or [N, H, W, channels],
          or vectors [N, D]. Four axes have the channels last if the last axis has length 1 or 3
          and the second one has neither. uint8 images stay as they are, any other numbers become
          float32.
        - ``y_train``, ``y_test``: integer labels [N], from 0; in ``y_train`` -1 where unknown.
        - optional ``num_classes``: C; else it is the largest label of both splits + 1.
        - optional ``group_train``, ``group_test``: natural group of each example [N], integers or
          strings; they are numbered from 0 in sorted order, and keep their names.
    flip : bool
        Whether a flip left to right keeps an image's meaning.
    normalise : bool
        See `Source`.

    Returns
    -------
    Source
        The data; images [N, channels, H, W], vectors float32 [N, D].

    Raises
    ------
    DataError
        If the file is missing or damaged, an array is missing, or has another shape or type.
    """
    return _source(f"npz:{location}", Path(location), flip=flip, normalise=normalise)


def cifar10(location: str) -> Source:
    """Return CIFAR-10 from an .npz file.

    Parameters
    ----------
    location : str
        A file with the arrays of `npz`: images uint8 [N, 32, 32, 3] or [N, 3, 32, 32], 10 classes.

    Returns
    -------
    Source
        Images uint8 [N, 3, 32, 32], C = 10; a flip keeps their meaning.

    Raises
    ------
    DataError
        If the file can't be read as `npz` does, or has other images or another number of classes.

    References
    ----------
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, 2009.
    """
    return _cifar(f"cifar10:{location}", Path(location), 10)


def cifar100(location: str) -> Source:
    """Return CIFAR-100 with its 100 fine classes from an .npz file; else as `cifar10`."""
    return _cifar(f"cifar100:{location}", Path(location), 100)


def _cifar(name: str, path: Path, num_classes: int) -> Source:
    source = _source(name, path, flip=True)
    x = source.x_train
    if x.dtype != np.uint8 or x.shape[1:] != (3, 32, 32):
        raise DataError(
            f"{name}: x_train is {x.dtype} {list(x.shape)}; CIFAR's images are uint8"
            ' [N, 32, 32, 3] or [N, 3, 32, 32]; for others set data.source = "npz:FILE"'
        )
    if source.num_classes != num_classes:
        raise DataError(
            f"{name}: has {source.num_classes} classes; must be {num_classes}; for another number"
            ' set data.source = "npz:FILE"'
        )
    return source


def _source(name: str, path: Path, *, flip: bool, normalise: bool = True) -> Source:
    arrays = _read(name, path)
    x_train, x_test = arrays["x_train"], arrays["x_test"]
    last = x_train.ndim == 4 and x_train.shape[3] in (1, 3) and x_train.shape[1] not in (1, 3)
    group_train, group_test, client_names = _number_groups(name, arrays)
    return Source(
        name=name,
        x_train=_to_examples(f"{name}: x_train", x_train, last),
        y_train=arrays["y_train"],
        x_test=_to_examples(f"{name}: x_test", x_test, last),
        y_test=arrays["y_test"],
        num_classes=_num_classes(name, arrays),
        flip=flip,
        normalise=normalise,
        group_train=group_train,
        group_test=group_test,
        client_names=client_names,
    )


def _read(name: str, path: Path) -> dict[str, NDArray[Any]]:
    found = find_file(name, path)
    if found is None:
        raise DataError(f"{name}: no file {path}")
    if not _is_npz(name, found):
        raise DataError(f"{name}: {path} is no .npz file (numpy.savez), or was cut short")
    arrays = {}
    key = ""
    try:
        # Opened here, because NumPy leaves a file open whose archive is damaged.
        with found.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            have = sorted(file.files)
            for key in have:
                if key in _ARRAYS:
                    arrays[key] = file[key]
    except Exception as error:  # the parsers of damaged headers let all kinds through
        # Of objects NumPy says how to load them, which would run whatever the file says.
        if "allow_pickle" in str(error):
            raise DataError(
                f"{name}: {key} is an array of Python objects; must be {_ARRAYS[key]}"
            ) from error
        raise DataError(f"{name}: can't read array {key!r}: {first_line(error)}") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # but bytes, where it isn't in NumPy's format
            raise DataError(
                f"{name}: {key} is {len(array)} bytes that aren't in NumPy's format; must be an"
                " array as numpy.savez writes it"
            )
    if unused := [key for key in have if key not in _ARRAYS]:
        warnings.warn(
            f"{name}: the arrays {', '.join(unused)} aren't used; those that are: "
            f"{', '.join(_ARRAYS)}",
            stacklevel=2,
        )
    missing = [key for key in _NEEDED if key not in arrays]
    if missing:
        raise DataError(
            f"{name}: lacks {', '.join(missing)}; it has {', '.join(have) or 'no arrays'}"
        )
    return arrays


def _is_npz(name: str, path: Path) -> bool:
    """Tell whether a file is an archive from its first byte on; NumPy unpickles others."""
    try:
        with path.open("rb") as opened:
            begins = opened.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
        return begins and zipfile.is_zipfile(path)
    except OSError as error:
        raise DataError(f"{name}: can't read {path}: {first_line(error)}") from error


def _to_examples(what: str, x: NDArray[Any], channels_last: bool) -> ExampleArray:
    if x.dtype.kind not in "biuf" or not 2 <= x.ndim <= 4:
        raise DataError(
            f"{what} is {x.dtype} {list(x.shape)}; must be real numbers: images [N, H, W],"
            " [N, channels, H, W] or [N, H, W, channels], or vectors [N, D]"
        )
    if x.ndim == 3:
        x = x[:, None]
    elif channels_last and x.ndim == 4:
        x = np.ascontiguousarray(np.moveaxis(x, 3, 1))
    if x.dtype == np.uint8 and x.ndim == 4:
        return x
    warn_of_large_integers(what, x)
    with np.errstate(over="ignore"):  # what becomes infinite in float32 is an error of Source
        return x.astype(np.float32, copy=False)


def _num_classes(name: str, arrays: dict[str, NDArray[Any]]) -> int:
    if "num_classes" in arrays:
        stated = arrays["num_classes"]
        if stated.size != 1 or stated.dtype.kind not in "iu":
            raise DataError(
                f"{name}: num_classes is {stated.dtype} {list(stated.shape)}; must be one integer"
            )
        return int(stated.item())
    for key in ("y_train", "y_test"):
        if arrays[key].dtype.kind not in "iu":
            raise DataError(f"{name}: {key} is {arrays[key].dtype}; labels must be integers")
    return 1 + int(max(arrays["y_train"].max(initial=0), arrays["y_test"].max(initial=0)))


def _number_groups(
    name: str, arrays: dict[str, NDArray[Any]]
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None, tuple[str, ...]]:
    """Number the groups of both splits together, so that a writer has one number; and name them."""
    present = [key for key in ("group_train", "group_test") if key in arrays]
    for key in present:
        if arrays[key].ndim != 1 or arrays[key].dtype.kind not in "iuUS":
            raise DataError(
                f"{name}: {key} is {arrays[key].dtype} {list(arrays[key].shape)}; must be integers"
                " or strings [N]"
            )
    if not present:
        return None, None, ()
    dtypes = [arrays[key].dtype for key in present]
    # NumPy compares int64 and uint64 as floats, which merges large numbers.
    kinds = {"integer" if dtype.kind in "iu" else dtype.kind for dtype in dtypes}
    if len(kinds) > 1 or np.result_type(*dtypes).kind == "f":
        raise DataError(
            f"{name}: group_train is {dtypes[0]} but group_test is {dtypes[1]}; must be integers or"
            " strings of one kind"
        )
    together = np.concatenate([arrays[key] for key in present])
    groups, number = np.unique(together, return_inverse=True)
    if groups.dtype.kind == "S":
        groups = np.char.decode(groups, "utf-8", "backslashreplace")
    parts = np.split(number.astype(np.int64), np.cumsum([len(arrays[key]) for key in present])[:-1])
    numbers = dict(zip(present, parts, strict=True))
    return numbers.get("group_train"), numbers.get("group_test"), display_names(groups)

"""The data sources that come with fedsim: ``data.source = "NAME"`` or ``"NAME:LOCATION"``.

Shapes: N training examples, M test examples, C classes, D features.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.files import find_file, first_line
from fedsim.data.source import Examples, Source, names_of
from fedsim.errors import DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""

_DIGITS_TEST = 36
_SPLITS = {"train": "train", "test": "t10k"}

_NPZ_NEEDED = ("x_train", "y_train", "x_test", "y_test")
# All that is read of a file, and what each may hold.
_NPZ_ARRAYS = {
    "x_train": "real numbers",
    "x_test": "real numbers",
    "y_train": "integers",
    "y_test": "integers",
    "num_classes": "one integer",
    "group_train": "integers or strings",
    "group_test": "integers or strings",
}


def digits() -> Source:
    """Return scikit-learn's handwritten digits: 1,797 images of 8 x 8 with values 0..16.

    The test set has 36 examples of each class, 360 in all; 1,437 are left for training, 138 to 147
    a class. The split is fixed, whatever the experiment's seed: of a class's n examples those in
    places floor(i * n / 36), i = 0..35, are for testing, so that they are spread over the file
    and its writers.

    Returns
    -------
    Source
        Images uint8 [N, 1, 8, 8], C = 10.

    References
    ----------
    Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
    1998 (its test set).

    Examples
    --------
    >>> source = digits()
    >>> source.x_train.shape, source.x_test.shape
    ((1437, 1, 8, 8), (360, 1, 8, 8))
    """
    # The file that load_digits() reads; to import scikit-learn for it takes a second.
    package = find_spec("sklearn")
    assert package is not None, "scikit-learn is required"
    folder = Path(str(package.origin)).parent / "datasets" / "data"
    with gzip.open(folder / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    x = table[:, :-1].astype(np.uint8).reshape(-1, 1, 8, 8)
    y = table[:, -1]
    test = np.zeros(len(y), bool)
    for c in range(10):
        members = np.flatnonzero(y == c)
        test[members[np.arange(_DIGITS_TEST) * len(members) // _DIGITS_TEST]] = True
    return Source(
        name="digits",
        x_train=x[~test],
        y_train=y[~test],
        x_test=x[test],
        y_test=y[test],
        num_classes=10,
    )


def fashion_mnist() -> Source:
    """Return Fashion-MNIST from the Debian package dataset-fashion-mnist.

    Returns
    -------
    Source
        60,000 and 10,000 images uint8 [N, 1, 28, 28], C = 10; a flip keeps their meaning.

    Raises
    ------
    DataError
        If the package isn't installed, or its files are damaged.

    References
    ----------
    Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", arXiv:1708.07747, 2017.
    """
    if not FASHION_MNIST.is_dir():
        raise DataError(
            f"fashion-mnist: no folder {FASHION_MNIST}; install the Debian package"
            ' dataset-fashion-mnist, or set data.source = "idx:DIR" to a folder with the files'
        )
    return _idx_source("fashion-mnist", FASHION_MNIST, flip=True)


def idx(location: str, *, flip: bool = False) -> Source:
    """Return the images of a folder with four IDX files named as MNIST's.

    Parameters
    ----------
    location : str
        Folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
        t10k-labels-idx1-ubyte, each plain or with .gz (the plain one is taken if both exist).
    flip : bool
        Whether a flip left to right keeps an image's meaning.

    Returns
    -------
    Source
        Images uint8 [N, 1, H, W]; C is the largest label of both splits + 1.

    Raises
    ------
    DataError
        If a file is missing, cut short, too long or of another kind.

    References
    ----------
    LeCun, Cortes, Burges, "The MNIST database of handwritten digits", file formats.
    """
    return _idx_source(f"idx:{location}", Path(location), flip=flip)


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
    return _npz_source(f"npz:{location}", Path(location), flip=flip, normalise=normalise)


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
    source = _npz_source(name, path, flip=True)
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


def _npz_source(name: str, path: Path, *, flip: bool, normalise: bool = True) -> Source:
    arrays = _read_npz(name, path)
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


def _idx_source(name: str, folder: Path, *, flip: bool) -> Source:
    images: dict[str, NDArray[np.uint8]] = {}
    labels: dict[str, NDArray[np.int64]] = {}
    for split, prefix in _SPLITS.items():
        images[split] = _read_idx(name, folder / f"{prefix}-images-idx3-ubyte", 3)[:, None]
        labels[split] = _read_idx(name, folder / f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)
    return Source(
        name=name,
        x_train=images["train"],
        y_train=labels["train"],
        x_test=images["test"],
        y_test=labels["test"],
        num_classes=1 + int(max(part.max(initial=0) for part in labels.values())),
        flip=flip,
    )


def _read_idx(name: str, path: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: 4 bytes magic, 4 bytes for each axis, the values."""
    found = find_file(name, path) or find_file(name, path.with_name(f"{path.name}.gz"))
    if found is None:
        raise DataError(f"{name}: no file {path}, nor with .gz")
    path = found
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: can't read {path}: {first_line(error)}") from error
    header = 4 * (1 + ndim)
    magic, expected = data[:4], (0x0800 | ndim).to_bytes(4, "big")
    if magic != expected[: len(magic)]:
        raise DataError(
            f"{name}: {path} is no IDX file of bytes with {ndim} axes: it begins with"
            f" 0x{magic.hex()}, not 0x{expected.hex()}"
        )
    if len(data) < header:
        raise DataError(
            f"{name}: {path} was cut short: it has {len(data)} bytes, but an IDX file's header of"
            f" {ndim} axes has {header}"
        )
    shape = [int(size) for size in np.frombuffer(data, ">u4", ndim, 4)]
    if not prod(shape):
        raise DataError(f"{name}: {path} is empty, its shape is {shape}")
    if len(data) - header != prod(shape):
        raise DataError(
            f"{name}: {path} has {len(data) - header} bytes of values, but its header says"
            f" {' x '.join(map(str, shape))} = {prod(shape)}"
        )
    # Copied, because an array over `bytes` can't be written to, which torch warns about.
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _read_npz(name: str, path: Path) -> dict[str, NDArray[Any]]:
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
                if key in _NPZ_ARRAYS:
                    arrays[key] = file[key]
    except Exception as error:  # the parsers of damaged headers let all kinds through
        # Of objects NumPy says how to load them, which would run whatever the file says.
        if "allow_pickle" in str(error):
            raise DataError(
                f"{name}: {key} is an array of Python objects; must be {_NPZ_ARRAYS[key]}"
            ) from error
        raise DataError(f"{name}: can't read array {key!r}: {first_line(error)}") from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # but bytes, where it isn't in NumPy's format
            raise DataError(
                f"{name}: {key} is {len(array)} bytes that aren't in NumPy's format; must be an"
                " array as numpy.savez writes it"
            )
    missing = [key for key in _NPZ_NEEDED if key not in arrays]
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


def _to_examples(what: str, x: NDArray[Any], channels_last: bool) -> Examples:
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
    return numbers.get("group_train"), numbers.get("group_test"), names_of(groups)

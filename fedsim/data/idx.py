"""Folders with the IDX files of MNIST and its relatives, Fashion-MNIST among them.

Shapes: N examples of a split, H x W pixels, C classes.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.data.files import find_file, first_line
from fedsim.data.source import Source
from fedsim.errors import DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""

_SPLITS = {"train": "train", "test": "t10k"}  # split -> how its files' names begin


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
    return _source(f"idx:{location}", Path(location), flip=flip)


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
    return _source("fashion-mnist", FASHION_MNIST, flip=True)


def _source(name: str, folder: Path, *, flip: bool) -> Source:
    images: dict[str, NDArray[np.uint8]] = {}
    labels: dict[str, NDArray[np.int64]] = {}
    for split, prefix in _SPLITS.items():
        images[split] = _read(name, folder / f"{prefix}-images-idx3-ubyte", 3)[:, None]
        labels[split] = _read(name, folder / f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)
    return Source(
        name=name,
        x_train=images["train"],
        y_train=labels["train"],
        x_test=images["test"],
        y_test=labels["test"],
        num_classes=1 + int(max(part.max(initial=0) for part in labels.values())),
        flip=flip,
    )


def _read(name: str, path: Path, ndim: int) -> NDArray[np.uint8]:
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

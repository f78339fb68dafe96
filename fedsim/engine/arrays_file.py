"""Arrays by name in a safetensors file that says what they add up to, so that damage is noticed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

_CHECKSUM = "crc32"
"""Key of the metadata. CRC-32 takes half as long as the fastest cryptographic digest, and a disk
isn't malicious."""


def to_bytes(
    arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the content of a file of arrays, and of texts besides."""
    # Of an array in another order safetensors would write the numbers in that order, and it would
    # swap bytes of which the checksum is.
    in_order = {
        name: np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
        for name, array in arrays.items()
    }
    texts = dict(metadata or {})
    return save(in_order, {**texts, _CHECKSUM: _checksum(in_order, texts)})


def read(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the arrays and texts that `to_bytes` was given.

    A file without a checksum, as an older fedsim wrote it, is taken as it is.

    Raises
    ------
    OSError, safetensors.SafetensorError, ValueError
        If the file can't be read, is cut short, or holds other numbers than were written.
    """
    # Not by path: safetensors says of any file it can't open that there is none.
    file.open("rb").close()
    with safe_open(file, framework="np") as content:
        texts = dict(content.metadata() or {})
        arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    written = texts.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(arrays, texts):
        raise ValueError("what it holds isn't what was written (its checksum differs)")
    return arrays, texts


def _checksum(arrays: Mapping[str, NDArray[Any]], texts: Mapping[str, str]) -> str:
    found = zlib.crc32(repr(sorted(texts.items())).encode())
    for name, array in sorted(arrays.items()):
        found = zlib.crc32(f"{name} {array.dtype.name} {array.shape}".encode(), found)
        found = zlib.crc32(array.reshape(-1).view(np.uint8).data, found)
    return f"{found:08x}"

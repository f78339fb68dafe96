"""What a run needs to go on after a round, in one file without any code in it.

A safetensors file: arrays, and as its metadata a description in JSON that refers to them. It holds
the round, the global model, what the strategy carries from round to round, and which of their
states the clients go on from; those stay where they are (`fedsim.engine.state`).
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, from_numpy

from fedsim.data.federation import Federation
from fedsim.engine import arrays_file, flower
from fedsim.engine.state import DTYPES, are_versions
from fedsim.errors import EngineError

FORMAT = "1"
"""Of the file; another one can't be read."""

_DIGEST = "2:"
"""What begins a digest; those of an older fedsim, of the first 100 examples only, have no mark."""
_HASHED_BYTES = 2**28
"""Of an array of more bytes, evenly spaced examples of at most so many are hashed."""
_BLOCK = 1024  # examples that are hashed at once

_SAME_IN_JSON = (type(None), bool, int, float, str)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial, type)

Parts = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a run stands after a round.

    Attributes
    ----------
    round : int
        The last finished round; 0 before the first.
    arrays : ArrayRecord
        The global model.
    strategy : dict
        What the strategy carries on: `attributes`.
    versions : ndarray of int8 [K]
        `fedsim.engine.state.ClientStates.versions`.
    data : str
        `digest` of the federation.
    record : dict
        What the recorder has added up; of numbers, texts, lists and dicts.
    """

    round: int
    arrays: ArrayRecord
    strategy: dict[str, Any]
    versions: NDArray[np.int8]
    data: str
    record: dict[str, Any]

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        parts: Parts = {}
        description = {name: _pack(value, name, parts) for name, value in vars(self).items()}
        metadata = {"format": FORMAT, "description": json.dumps(description)}
        return arrays_file.to_bytes(parts, metadata)

    @classmethod
    def read(cls, file: Path) -> Checkpoint:
        """Return what `to_bytes` gave.

        Raises
        ------
        EngineError
            If the file is missing, can't be read, is cut short, damaged or of another format.
        """
        try:
            parts, metadata = arrays_file.read(file)
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format isn't {FORMAT}")
            description = json.loads(metadata["description"])
            checkpoint = cls(**{name: _unpack(node, parts) for name, node in description.items()})
            if not are_versions(checkpoint.versions):
                raise ValueError("its versions are no slots")
        except OSError as error:
            raise EngineError(f"{file}: can't be read: {error.strerror or error}") from None
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EngineError(f"{file} is broken, or no checkpoint: {error}") from None
        return checkpoint


def digest(federation: Federation) -> str:
    """Return what tells two federations apart: who holds what, the labels, and the examples."""
    source = federation.source
    examples = source.x_train, source.x_test
    spaced = [x[:: math.ceil(x.nbytes / _HASHED_BYTES) or 1] for x in examples]
    return _DIGEST + _hashed(federation, *spaced)


def has_data(checkpoint: Checkpoint, federation: Federation, digest: str) -> bool:
    """Tell whether a checkpoint is of a federation, whose digest is given."""
    if not checkpoint.data.startswith(_DIGEST):  # of an older fedsim
        source = federation.source
        first = source.x_train[federation.train_index[:100]], source.x_test[:100]
        digest = _hashed(federation, *first)
    return checkpoint.data == digest


def _hashed(federation: Federation, x_train: NDArray[Any], x_test: NDArray[Any]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for array in (
        federation.train_offsets,
        federation.train_index,
        federation.num_labelled,
        federation.test_offsets,
        federation.test_index,
        federation.source.y_train,
        federation.source.y_test,
        x_train,
        x_test,
    ):
        found.update(f"{array.dtype} {array.shape}".encode())
        for start in range(0, len(array), _BLOCK):  # what is spaced is copied
            found.update(np.ascontiguousarray(array[start : start + _BLOCK]).data)
    return found.hexdigest()


def attributes(strategy: Strategy) -> dict[str, Any]:
    """Return a strategy's attributes, those of strategies inside it as a dict.

    Without functions, of which a new strategy has the same, and, with a warning, without what a
    checkpoint can't hold.
    """
    found: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):
            found[name] = attributes(value)
        elif not isinstance(value, _FUNCTIONS):
            try:
                _pack(value, name, {})
            except TypeError as error:
                warnings.warn(
                    f"checkpoints don't hold {type(strategy).__name__}.{name} ({error}): a "
                    "resumed run has that of a new strategy",
                    stacklevel=2,
                )
            else:
                found[name] = value
    return found


def restore(strategy: Strategy, saved: Mapping[str, Any]) -> None:
    """Give a new strategy the attributes of one before."""
    for name, value in saved.items():
        own = getattr(strategy, name, None)
        if isinstance(own, Strategy):
            restore(own, value)
        else:
            setattr(strategy, name, value)


def _pack(value: Any, where: str, parts: Parts) -> Any:
    """Return a value as JSON, its arrays put into ``parts``; `TypeError` if that can't be."""

    def put(array: NDArray[Any], name: str = where) -> str:
        if array.dtype.name not in DTYPES:
            raise TypeError(f"an array of {array.dtype}")
        key = f"{len(parts)}:{name}"
        parts[key] = array
        return key

    if type(value) in _SAME_IN_JSON:
        return value
    if isinstance(value, ArrayRecord):
        arrays = flower.arrays_of(value).items()
        return {"record": [[name, put(array, f"{where}/{name}")] for name, array in arrays]}
    if type(value) in (dict, MappingProxyType):  # not a Counter, which would come back as a dict
        if not all(type(key) in _SAME_IN_JSON for key in value):
            raise TypeError("a dict with keys that aren't numbers or texts")
        return {"dict": [[k, _pack(item, f"{where}/{k}", parts)] for k, item in value.items()]}
    if type(value) in (list, tuple):
        items = [_pack(item, f"{where}/{i}", parts) for i, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, np.ndarray):
        return {"array": put(value)}
    if isinstance(value, np.generic):
        return {"scalar": put(np.asarray(value))}
    if isinstance(value, Tensor) and not value.requires_grad and not value.is_sparse:
        return {"tensor": put(value.cpu().numpy())}
    raise TypeError(f"a {type(value).__name__}")


def _unpack(node: Any, parts: Parts) -> Any:
    """Return the value that `_pack` has turned into ``node``."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "record":
        return flower.to_record({name: parts[key] for name, key in content})
    if kind == "dict":
        return {key: _unpack(item, parts) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, parts) for item in content]
        return items if kind == "list" else tuple(items)
    array = parts[content]
    if kind == "tensor":
        return from_numpy(array)
    return array[()] if kind == "scalar" else array

"""What the clients' updates give: replies, what they keep, and sums of what they upload."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.engine.clock import Clock
from fedsim.engine.reduction import Flat, Sum, climb, flatten
from fedsim.engine.replies import Replies, columns
from fedsim.engine.state import DTYPES
from fedsim.engine.update import Upload
from fedsim.errors import EngineError, described
from fedsim.models.net import Arrays, Weights, num_bytes

FLUSH_BYTES = 1 << 20
"""Bytes of uploads and states that are looked at and added up together: of small ones, each alone
takes longer to begin with than to do."""


class _Waiting(NamedTuple):
    node: int
    client: int
    slot: int
    upload: Upload
    audit: dict[str, float]
    num_bytes: int


class Intake:
    """Takes in what client updates give, in order.

    Parameters
    ----------
    keep : callable
        Is told what a client keeps: ``keep(client, slot, arrays)``.
    weighted_by : mapping or None
        Array group -> the number by which a client's is weighted, if only sums are wanted.
    clock : Clock
        Is told what goes into uploads and into what is kept.
    """

    def __init__(
        self,
        keep: Callable[[int, int, Arrays], None],
        weighted_by: Mapping[str, str] | None,
        clock: Clock,
    ) -> None:
        self._keep = keep
        self._weighted_by = weighted_by
        self._clock = clock
        self._replies = Replies()
        self._metrics: list[dict[str, float]] = []
        self._audits: list[dict[str, float]] = []
        self._nodes: dict[int, Sum] = {}
        self._leaf = 0
        """Whose sum is under way; those before it are added up."""
        self._waiting: list[_Waiting] = []
        self._num_bytes = 0

    def take(
        self,
        node: int,
        client: int,
        slot: int,
        found: tuple[Upload, dict[str, float]] | Exception,
    ) -> None:
        """Take a client's result: what `fedsim.engine.local.LocalTrainer.update_all` returns.

        ``node`` is the client's leaf, ``slot`` the one for its next state.
        """
        if not isinstance(found, Exception):
            found = _checked(*found)
        if isinstance(found, Exception):
            self._replies.failures[client] = described(found)
            found = Upload({}, 0), {}  # it has its place in its leaf all the same
        upload, audit = found
        size = sum(map(num_bytes, upload.arrays.values()))
        self._waiting.append(_Waiting(node, client, slot, upload, audit, size))
        self._num_bytes += size + num_bytes(upload.state)
        if self._num_bytes >= FLUSH_BYTES:
            self._work_off()

    def end(self) -> tuple[Replies, dict[int, Sum]]:
        """Return the clients' replies, and the sums at the topmost nodes of their leaves.

        A client whose arrays aren't finite has failed, too. Where sums are wanted the replies have
        no arrays, and otherwise there are no sums.
        """
        self._work_off()
        climb(self._nodes, self._leaf)
        self._replies.metrics = columns(self._metrics)
        self._replies.audit = columns(self._audits)
        self._clock.lap("reduce")
        return self._replies, self._nodes if self._weighted_by is not None else {}

    def _work_off(self) -> None:
        waiting, self._waiting, self._num_bytes = self._waiting, [], 0
        replies = self._replies
        laid_out = _lay_out([one.upload for one in waiting])
        for (node, client, slot, upload, audit, size), flats in zip(waiting, laid_out, strict=True):
            if node != self._leaf:
                climb(self._nodes, self._leaf)
                self._leaf = node
                self._nodes[node] = Sum()  # a leaf whose clients all fail has one, too
            if broken := _not_finite(upload, flats):
                replies.failures[client] = f"{broken} is not finite (NaN or inf)"
            if client in replies.failures:
                continue
            numbers = {"num_examples": upload.num_examples, **upload.metrics}
            if self._weighted_by is not None:
                weights = _weights_of(numbers, flats, self._weighted_by)
                for group, weight in weights.items():
                    if not 0 <= weight < inf:
                        replies.failures[client] = (
                            f"{self._weighted_by[group]} = {weight}, by which {group!r} is "
                            "weighted: must be finite and at least 0"
                        )
                if client in replies.failures:
                    continue
                self._nodes[node].add_upload(flats, weights)
                replies.arrays.append({})
            else:
                replies.arrays.append({g: as_arrays(w) for g, w in upload.arrays.items()})
            self._metrics.append(numbers)
            self._audits.append(audit)
            replies.clients.append(client)
            replies.num_bytes.append(size)
            replies.keeps.append(bool(upload.state))
            if upload.state:
                self._clock.lap("reduce")
                self._keep(client, slot, as_arrays(upload.state))
                self._clock.lap("state")


def _checked(
    upload: Upload, audit: dict[str, float]
) -> tuple[Upload, dict[str, float]] | Exception:
    """Return a client's result with numbers as metrics; or what is wrong with it."""
    if not isinstance(upload, Upload):
        return TypeError(f"the client update returned {type(upload).__name__}, not an Upload")
    arrays: Any = upload.arrays
    if not isinstance(arrays, dict) or not all(isinstance(w, dict) for w in arrays.values()):
        return TypeError('an Upload\'s arrays come in groups: Upload({"arrays": w_k}, ...)')
    state: Any = upload.state
    metrics: Any = upload.metrics
    if not isinstance(state, dict) or not isinstance(metrics, Mapping):
        return TypeError("an Upload's state and metrics must be dicts")
    for w in (*arrays.values(), upload.state):
        for name, tensor in w.items():
            if not isinstance(tensor, Tensor):
                return TypeError(f"the array {name} is no tensor but {type(tensor).__name__}")
            if tensor.requires_grad:
                return TypeError(f"the array {name} has a gradient: upload {name}.detach()")
            if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
                kinds: tuple[Any, ...] = (tensor.dtype, tensor.layout, tensor.device)
                what = kinds[0] if tensor.dtype not in _DTYPES else kinds[1 + tensor.is_meta]
                return TypeError(f"the array {name} is {what}: upload a dense float32 tensor")
    if taken := (_RESERVED | audit.keys()) & upload.metrics.keys():
        return ValueError(f"a metric can't be called {min(taken)!r}: the records have one already")
    try:
        count: Any = upload.num_examples
        if isinstance(count, str | bytes):
            raise TypeError(f"num_examples is {count!r}")
        num_examples = float(count)
        names: list[Any] = [*upload.metrics]
        for name in names:
            if not isinstance(name, str) or len(name.splitlines()) != 1:
                raise TypeError(f"{name!r} is no name, which is a line of text")
        if any(
            type(value) not in (int, float) or abs(value) > 2**53  # larger than tables hold
            for value in (count, *upload.metrics.values())
        ):
            if type(count) not in (int, float):
                count = int(num_examples) if num_examples.is_integer() else num_examples
            metrics = {name: float(value) for name, value in upload.metrics.items()}
            upload = replace(upload, num_examples=count, metrics=metrics)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        return TypeError(f"num_examples and the metrics must be numbers: {error}")
    if not 0 <= num_examples < inf:
        return ValueError(f"num_examples = {num_examples}: must be finite and at least 0")
    return upload, audit


_DTYPES = {getattr(torch, name) for name in DTYPES} - {torch.uint16, torch.uint32, torch.uint64}
"""PyTorch hardly computes with the others, so that there are no averages of them."""

_RESERVED = {"num_examples", "num-examples", "round", "client"}

STATE = "(state)"
"""Stands for what a client keeps, among its groups of arrays."""


def _lay_out(uploads: Sequence[Upload]) -> list[dict[str, Flat]]:
    """Return for each upload its groups, and its state, as vectors."""
    vectors: list[dict[str, Flat]] = [{} for _ in uploads]
    by_group: dict[str, list[tuple[dict[str, Flat], Weights]]] = {}
    for mine, upload in zip(vectors, uploads, strict=True):
        for group, w in upload.arrays.items():
            by_group.setdefault(group, []).append((mine, w))
        if upload.state:
            by_group.setdefault(STATE, []).append((mine, upload.state))
    for group, found in by_group.items():
        flats = flatten([w for _, w in found])
        for (mine, _), flat in zip(found, flats, strict=True):
            mine[group] = flat
    return vectors


def _not_finite(upload: Upload, flats: Mapping[str, Flat]) -> str:
    """Return the name of an array with a NaN or an infinity, or nothing."""
    for group, flat in flats.items():
        if not flat.finite:
            w = upload.state if group == STATE else upload.arrays[group]
            for name, tensor in w.items():
                if not bool(tensor.isfinite().all()):
                    return name
    return ""


def _weights_of(
    numbers: Mapping[str, float], groups: Mapping[str, Flat], weights: Mapping[str, str]
) -> dict[str, float]:
    """Return the weight of each group that a strategy averages."""
    found = {}
    for group, name in weights.items():
        if group not in groups:
            raise EngineError(
                f"the strategy averages the arrays {group!r}, but the clients upload "
                f"{', '.join(repr(g) for g in groups if g != STATE)}; do method.name and "
                "method.client belong together?"
            )
        if name not in numbers:
            raise EngineError(
                f"the strategy weights by {name!r}, but the clients report {', '.join(numbers)}; "
                "do method.name and method.client belong together?"
            )
        found[group] = float(numbers[name])
    if unused := groups.keys() - weights.keys() - {STATE}:
        warnings.warn(
            f"the clients upload the arrays {min(unused)!r}, which the strategy doesn't average; "
            "do method.name and method.client belong together?",
            stacklevel=2,
        )
    return found


def as_arrays(w: Weights) -> Arrays:
    """Return tensors as NumPy arrays, which share their memory on the processor."""
    return {name: tensor.cpu().numpy() for name, tensor in w.items()}

"""What the clients' updates give: a reply each, what they keep, and sums of what they upload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fedsim.engine.clock import Clock
from fedsim.engine.reduction import Flat, Sum, climb, flatten
from fedsim.engine.update import Upload
from fedsim.errors import EngineError
from fedsim.models.net import Arrays, Weights, num_bytes

TOGETHER = 1 << 20
"""Bytes of uploads and states that are looked at and added up together: of small ones, each alone
takes longer to begin with than to do."""


@dataclass  # without slots, which would double the time to unpack one
class ClientReply:
    """What training one client gave: an upload, or why there is none.

    Attributes
    ----------
    client : int
        The client.
    arrays : dict
        Uploaded groups of arrays; empty after a failure, or where they are in a sum.
    num_bytes : int
        What they would take on a real network.
    num_examples : int
        The client's weight in averages.
    metrics : dict
        Numbers about its training.
    audit : dict
        What only the simulator knows about it; recorded, never sent to the strategy.
    keeps : bool
        Whether the client keeps anything.
    error : str
        Why the client is left out of the round; empty where all went well.
    """

    client: int
    arrays: dict[str, Arrays] = field(default_factory=dict)
    num_bytes: int = 0
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    audit: dict[str, float] = field(default_factory=dict)
    keeps: bool = False
    error: str = ""


class _Waiting(NamedTuple):
    node: int
    version: int
    reply: ClientReply
    upload: Upload | None


class Intake:
    """Takes in what client updates give, in order.

    Parameters
    ----------
    keep : callable
        Is told what a client keeps: ``keep(client, version, arrays)``.
    weights : mapping or None
        Array group -> the number by which a client's is weighted, if only sums are wanted.
    clock : Clock
        Is told what goes into uploads and into what is kept.
    """

    def __init__(
        self,
        keep: Callable[[int, int, Arrays], None],
        weights: Mapping[str, str] | None,
        clock: Clock,
    ) -> None:
        self._keep = keep
        self._weights = weights
        if weights is not None:  # Flower's names have hyphens, ours are Python's
            self._weights = {group: name.replace("-", "_") for group, name in weights.items()}
        self._clock = clock
        self._replies: list[ClientReply] = []
        self._nodes: dict[int, Sum] = {}
        self._leaf = 0
        self._waiting: list[_Waiting] = []
        self._num_bytes = 0

    def take(
        self,
        node: int,
        client: int,
        version: int,
        found: tuple[Upload, dict[str, float]] | Exception,
    ) -> None:
        """Take a client's result: what `fedsim.engine.local.LocalTrainer.update_all` returns.

        ``node`` is the client's leaf, ``version`` that of the state it started from.
        """
        upload = None
        if isinstance(found, Exception):
            reply = ClientReply(client, error=f"{type(found).__name__}: {found}")
        else:
            upload, audit = found
            reply = ClientReply(
                client,
                num_bytes=sum(map(num_bytes, upload.arrays.values())),
                num_examples=upload.num_examples,
                metrics=dict(upload.metrics),
                audit=audit,
                keeps=bool(upload.state),
            )
            self._num_bytes += reply.num_bytes + num_bytes(upload.state)
        self._replies.append(reply)
        self._waiting.append(_Waiting(node, version, reply, upload))
        if self._num_bytes >= TOGETHER:
            self._work_off()

    def end(self) -> tuple[list[ClientReply], dict[int, Sum]]:
        """Return a reply for each client, and the sums at the topmost nodes of their leaves.

        A client that failed, or whose arrays aren't finite, has an error. Where sums are wanted the
        replies have no arrays, and otherwise there are no sums.
        """
        self._work_off()
        climb(self._nodes, self._leaf)
        sums = {node: total.to_host() for node, total in self._nodes.items()}
        self._clock.lap("reduce")
        return self._replies, sums if self._weights is not None else {}

    def _work_off(self) -> None:
        waiting, self._waiting, self._num_bytes = self._waiting, [], 0
        laid_out = _lay_out([one.upload for one in waiting if one.upload is not None])
        for one in waiting:
            if one.node != self._leaf:
                climb(self._nodes, self._leaf)
                self._leaf = one.node
                self._nodes[one.node] = Sum()
            if one.upload is None:
                continue
            flats = next(laid_out)
            if broken := _not_finite(one.upload, flats):
                one.reply.error = f"{broken} is not finite (NaN or inf)"
                one.reply.keeps = False
                continue
            if self._weights is not None:
                weights = _weights_of(one.reply, flats, self._weights)
                self._nodes[one.node].add_upload(flats, weights)
            else:
                one.reply.arrays = {g: as_arrays(w) for g, w in one.upload.arrays.items()}
            if one.upload.state:
                self._clock.lap("reduce")
                self._keep(one.reply.client, one.version, as_arrays(one.upload.state))
                self._clock.lap("state")


STATE = "(state)"
"""Stands for what a client keeps, among its groups of arrays."""


def _lay_out(uploads: Sequence[Upload]) -> Iterator[dict[str, Flat]]:
    """Yield for each upload its groups, and its state, as vectors."""
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
    return iter(vectors)


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
    reply: ClientReply, groups: Mapping[str, Flat], weights: Mapping[str, str]
) -> dict[str, float]:
    """Return the weight of each group that a strategy averages."""
    numbers = {"num_examples": reply.num_examples, **reply.metrics}
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
                f"the strategy weights by {name!r}, but the clients report {', '.join(numbers)}"
            )
        found[group] = float(numbers[name])
    return found


def as_arrays(w: Weights) -> Arrays:
    """Return tensors as NumPy arrays, which share their memory on the processor."""
    return {name: tensor.cpu().numpy() for name, tensor in w.items()}

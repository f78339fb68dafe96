"""Sums of the clients' uploads, in an order that doesn't depend on the number of workers.

Most strategies need no single upload, only weighted means. Then each worker adds its clients'
arrays up and sends one sum instead of many models. Floating-point sums depend on their order, so
the order is fixed beforehand: the cohort is cut into a binary tree of balanced halves, each leaf is
summed in the order of its clients, and then two children at a time. A worker takes neighbouring
leaves and adds up as much of the tree as it has; the driver does the rest. Any number of workers
gives the same bits.

Nodes are numbered as in a heap: the root is 1, the children of i are 2 i and 2 i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.errors import EngineError
from fedsim.models.net import Arrays, Weights

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of arrays that stand one after the other in a vector."""


class Flat(NamedTuple):
    """A group of a client's arrays in one vector: looked at and added up at once.

    Those of four dimensions stand there with their channels innermost, as they lie in memory
    (`fedsim.models.layers.channels_last`).
    """

    shapes: Shapes
    vector: Tensor
    """Float64 [P]; may be a view of many clients'."""
    finite: bool
    """False if any number is NaN or infinite."""


def flatten(ws: Sequence[Weights]) -> list[Flat]:
    """Return the same group of several clients as vectors, all worked out at once."""
    shapes: Shapes = tuple((name, t.shape) for name, t in ws[0].items())
    if any(tuple((name, t.shape) for name, t in w.items()) != shapes for w in ws[1:]):
        return [flat for w in ws for flat in flatten([w])]
    joined = _join(tensor for w in ws for tensor in w.values())
    all_finite = isfinite(joined.sum().item())
    rows = joined.double().view(len(ws), len(joined) // len(ws))
    # Whose it is, if any: the sum of many may be infinite where no number is.
    finite = [True] * len(ws) if all_finite else rows.sum(1).isfinite().tolist()
    return [Flat(shapes, row, ok) for row, ok in zip(rows.unbind(), finite, strict=True)]


@dataclass(slots=True)
class Sum:
    """The weighted sum of some clients' uploads.

    Attributes
    ----------
    vectors : dict
        For each group the sums of its arrays, one after the other, float64, where they were added
        up; empty where nobody has a weight.
    weights : dict
        For each group the sum of the weights.
    shapes : dict
        For each group the names and shapes of the arrays.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, Shapes] = field(default_factory=dict)

    def add_upload(self, groups: Mapping[str, Flat], weights: Mapping[str, float]) -> None:
        """Add one client's arrays, each group with its weight."""
        for group, weight in weights.items():
            if not weight:
                continue
            vector = self._in_order(group, groups[group].vector, groups[group].shapes)
            if group in self.vectors:
                self.vectors[group].add_(vector, alpha=weight)
            else:
                # Not in place: a view would keep its whole chunk's memory from being used anew.
                self.vectors[group] = vector * weight
            self.weights[group] = self.weights.get(group, 0.0) + weight

    def add(self, other: Sum) -> None:
        """Add another sum."""
        for group, weight in other.weights.items():
            vector = self._in_order(group, other.vectors[group], other.shapes[group])
            if group in self.vectors:
                self.vectors[group].add_(vector)
            else:
                self.vectors[group] = vector
            self.weights[group] = self.weights.get(group, 0.0) + weight

    def _in_order(self, group: str, vector: Tensor, shapes: Shapes) -> Tensor:
        """Return a vector in the group's order; all clients must upload the same arrays."""
        known = self.shapes.setdefault(group, shapes)
        if shapes == known:
            return vector
        if dict(shapes) != dict(known):
            raise EngineError(_differ(group, known, shapes))
        parts = _split(vector, shapes)
        return _join(parts[name] for name, _ in known)

    def means(self) -> dict[str, Arrays]:
        """Return the weighted means, float32, of the groups in which anybody has a weight."""
        means = {}
        for group, vector in self.vectors.items():
            parts = _split((vector / self.weights[group]).float(), self.shapes[group])
            # A GPU brings them into C order sooner.
            means[group] = {n: part.contiguous().cpu().numpy() for n, part in parts.items()}
        return means

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as NumPy arrays, which are packed a hundred times faster than tensors."""
        vectors = {group: vector.cpu().numpy() for group, vector in self.vectors.items()}
        shapes = {g: tuple((n, tuple(shape)) for n, shape in f) for g, f in self.shapes.items()}
        return _arrived, (vectors, self.weights, shapes)


def _arrived(
    vectors: dict[str, NDArray[np.float64]], weights: dict[str, float], shapes: dict[str, Shapes]
) -> Sum:
    return Sum({g: torch.from_numpy(vector) for g, vector in vectors.items()}, weights, shapes)


def _join(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors one after the other in one vector."""
    parts = [
        t if t.dim() == 1 else (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).reshape(-1)
        for t in tensors
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _split(vector: Tensor, shapes: Shapes) -> Weights:
    """Return the tensors that stand in a vector (views)."""
    w, begin = {}, 0
    for name, shape in shapes:
        part = vector[begin : begin + prod(shape)]
        begin += len(part)
        if len(shape) == 4:
            one, channels, height, width = shape
            w[name] = part.view(one, height, width, channels).permute(0, 3, 1, 2)
        else:
            w[name] = part.view(shape)
    return w


def _differ(group: str, one: Shapes, other: Shapes) -> str:
    """Say how two clients' uploads of a group differ."""
    both = dict(one), dict(other)
    for name in sorted(both[0].keys() | both[1].keys()):
        found = [tuple(shapes[name]) if name in shapes else None for shapes in both]
        if found[0] != found[1]:
            break
    return (
        f"the clients' uploads can't be averaged: {name!r} in {group!r} has the shape {found[0]} "
        f"from some and {found[1]} from others (None: absent)"
    )


def merge(nodes: dict[int, Sum]) -> dict[int, Sum]:
    """Add up what can be: wherever both children are there, they become their parent."""
    for node in list(nodes):
        climb(nodes, node)
    return nodes


def climb(nodes: dict[int, Sum], node: int) -> None:
    """Add up from a node upwards, as long as the other child of its parent is there, too.

    After each leaf, it leaves a worker no more sums to keep than the tree has levels.
    """
    while node in nodes and (node ^ 1) in nodes:
        left, right = nodes.pop(node & ~1), nodes.pop(node | 1)
        left.add(right)
        node //= 2
        nodes[node] = left

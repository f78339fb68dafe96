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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import EngineError
from fedsim.models.net import Arrays

DEPTH = 6
"""Most levels below the root: up to 64 leaves, fine enough to share out among as many workers."""


@dataclass(slots=True)
class Sum:
    """The weighted sum of some clients' uploads.

    Attributes
    ----------
    arrays : dict
        For each group the sums of its arrays, float64; empty where nobody has a weight.
    weights : dict
        For each group the sum of the weights.
    """

    arrays: dict[str, Arrays] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add_upload(self, groups: Mapping[str, Arrays], weights: Mapping[str, float]) -> None:
        """Add one client's arrays, each group with its weight."""
        for group, weight in weights.items():
            if not weight:
                continue
            mine = self._grow(group, groups[group], weight)
            for name, array in groups[group].items():
                weighted = np.multiply(array, weight, dtype=np.float64)
                if name in mine:
                    mine[name] += weighted
                else:
                    mine[name] = weighted

    def add(self, other: Sum) -> None:
        """Add another sum."""
        for group, weight in other.weights.items():
            mine = self._grow(group, other.arrays[group], weight)
            for name, array in other.arrays[group].items():
                if name not in mine:
                    mine[name] = array
                elif mine[name].flags.writeable:
                    mine[name] += array
                else:  # it came from another process
                    mine[name] = mine[name] + array

    def _grow(self, group: str, arrays: Arrays, weight: float) -> Arrays:
        """Add a weight, and return the group's sums; all clients must upload the same arrays."""
        mine = self.arrays.setdefault(group, {})
        if group in self.weights:
            for name in sorted(mine.keys() | arrays.keys()):
                shapes = [a[name].shape if name in a else None for a in (mine, arrays)]
                if shapes[0] != shapes[1]:
                    raise EngineError(
                        f"the clients' uploads can't be averaged: {name!r} in {group!r} has the "
                        f"shape {shapes[0]} from some and {shapes[1]} from others (None: absent)"
                    )
        self.weights[group] = self.weights.get(group, 0.0) + weight
        return mine

    def means(self) -> dict[str, Arrays]:
        """Return the weighted means, float32, of the groups in which anybody has a weight."""
        return {
            group: {
                name: np.asarray(array / self.weights[group], dtype=np.float32)
                for name, array in arrays.items()
            }
            for group, arrays in self.arrays.items()
        }


def tree(work: NDArray[np.int64], leaf_size: int = 1) -> list[tuple[int, list[int]]]:
    """Cut a cohort into a tree whose halves have about the same work.

    Where leaves hold several clients, which then train side by side, those with the most work go
    together: a leaf takes as many steps as its longest client.

    Parameters
    ----------
    work : ndarray [K]
        Expected work of each client of the cohort, K >= 1.
    leaf_size : int
        Most clients of a leaf, >= 1, if that takes no more than `DEPTH` levels.

    Returns
    -------
    list of (int, list of int)
        The leaves from left to right: node, and its clients' positions in rising order.

    Examples
    --------
    >>> tree(np.array([1, 5, 3, 2]))
    [(4, [1]), (5, [0]), (6, [2]), (7, [3])]
    >>> tree(np.array([1, 9, 3, 2, 2, 1]), leaf_size=3)
    [(2, [1]), (6, [2, 3]), (7, [0, 4, 5])]
    """

    def cut(node: int, clients: list[int], depth: int) -> list[tuple[int, list[int]]]:
        if depth == DEPTH or len(clients) <= leaf_size:
            return [(node, sorted(clients))]
        if leaf_size == 1:
            left, right = ([clients[i] for i in half] for half in balance(work[clients], 2))
        else:
            # A job without examples still costs a moment.
            done = np.cumsum(work[clients] + 1)
            middle = int(np.abs(2 * done[:-1] - done[-1]).argmin()) + 1
            left, right = clients[:middle], clients[middle:]
        return cut(2 * node, left, depth + 1) + cut(2 * node + 1, right, depth + 1)

    return cut(1, np.argsort(-work, kind="stable").tolist(), 0)


def share_out(
    leaves: Sequence[tuple[int, list[int]]], work: NDArray[np.int64], workers: int
) -> list[list[tuple[int, list[int]]]]:
    """Give each worker neighbouring leaves of about the same work; some may get none.

    Examples
    --------
    >>> work = np.array([1, 5, 3, 2])
    >>> share_out(tree(work), work, 2)
    [[(4, [1]), (5, [0])], [(6, [2]), (7, [3])]]
    """
    # A job without examples still costs a moment.
    costs = np.array([(work[clients] + 1).sum() for _, clients in leaves])
    middles = np.cumsum(costs) - costs / 2
    owners = (middles * workers / costs.sum()).astype(np.int64)
    shares: list[list[tuple[int, list[int]]]] = [[] for _ in range(workers)]
    for leaf, owner in zip(leaves, owners, strict=True):
        shares[owner].append(leaf)
    return shares


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


def balance(work: NDArray[np.int64], workers: int) -> list[list[int]]:
    """Share jobs out so that the workers finish at about the same time.

    Parameters
    ----------
    work : ndarray [K]
        Expected work of each job.
    workers : int
        Number of workers.

    Returns
    -------
    list of list of int
        For each worker the jobs it gets: the longest job first, always to the least busy.

    Examples
    --------
    >>> balance(np.array([1, 5, 3, 2]), 2)
    [[1, 0], [2, 3]]
    """
    parts: list[list[int]] = [[] for _ in range(workers)]
    load = [0] * workers
    # Plain numbers: NumPy would take longer to look at one than to add it.
    costs = work.tolist()
    for job in np.argsort(-work, kind="stable").tolist():
        worker = load.index(min(load))
        parts[worker].append(job)
        # A job without examples still costs a moment.
        load[worker] += costs[job] + 1
    return parts

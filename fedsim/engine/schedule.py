"""Who trains where: a cohort is cut into leaves of about the same work, which workers share out.

What the clients of a round upload is added up along a binary tree of the cohort, see
`fedsim.engine.reduction`. It depends on the clients only, never on the number of workers, so that
any number of them gives the same bits.

Shapes: K clients in the cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from fedsim.engine.training import LocalTraining

DEPTH = 6
"""Most levels below the root: up to 64 leaves, fine enough to share out among as many workers."""

MAX_STACKED_CLIENTS = 40
"""Most clients that train side by side: enough to hide the overhead of a step, few enough for
their weights to stay near the processor."""

STEP_OVERHEAD_FLOPS = 3e6
"""What a step of clients side by side costs on a CPU besides their arithmetic, in floating-point
operations of theirs: as much as the step of seven clients with logistic regression, or of half a
client with a perceptron."""


def leaf_size(stacked: bool, cohort: int) -> int:
    """Return how many clients a leaf of the cohort's tree has at most.

    One by one it is a client. Side by side it depends on the cohort only, so that the numbers don't
    depend on the workers: two fifths of it, from 8 to `MAX_STACKED_CLIENTS`. Halving cuts a cohort
    of equal clients into quarters, for there are at least some workers; the few long ones of a
    skewed cohort stay together, since each leaf takes as many steps as its longest client.

    Examples
    --------
    >>> leaf_size(False, 100), leaf_size(True, 20), leaf_size(True, 100), leaf_size(True, 1000)
    (1, 8, 40, 40)
    """
    return min(max(8, ceil(0.4 * cohort)), MAX_STACKED_CLIENTS) if stacked else 1


def expected_work(
    num_train: NDArray[np.int64], training: LocalTraining, stacked: bool
) -> NDArray[np.int64]:
    """Return what clients are expected to cost: in examples, or side by side in steps.

    Side by side, what a client costs before and after its steps is as much as two of them.

    Parameters
    ----------
    num_train : ndarray of int [K]
        Training examples of each client.
    training : LocalTraining
        How they train.
    stacked : bool
        Whether side by side.

    Examples
    --------
    >>> training = LocalTraining(epochs=2, batch_size=10, lr=0.1)
    >>> expected_work(np.array([0, 5, 60]), training, stacked=False)
    array([  0,  10, 120])
    >>> expected_work(np.array([0, 5, 60]), training, stacked=True)
    array([ 2,  4, 14])
    """
    if stacked:
        in_an_epoch = -(-num_train // training.batch_size)
        steps = np.minimum(in_an_epoch, 1) * training.steps
        return 2 + (steps if training.steps else training.epochs * in_an_epoch)
    if training.steps:
        return np.minimum(num_train, training.batch_size) * training.steps
    return training.epochs * num_train


def tree(
    work: NDArray[np.int64], leaf_size: int = 1, step_overhead: float = 0.0
) -> list[tuple[int, list[int]]]:
    """Cut a cohort into a tree whose halves have about the same work.

    Where leaves hold several clients, which then train side by side, those with the most work go
    together: a leaf takes as many steps as its longest client, and each of them costs something
    besides the clients' arithmetic.

    Parameters
    ----------
    work : ndarray [K]
        Expected work of each client of the cohort, K >= 1.
    leaf_size : int
        Most clients of a leaf, >= 1, if that takes no more than `DEPTH` levels.
    step_overhead : float
        What a step of a leaf costs besides, in units of ``work``, >= 0.

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
    costs = _costs(work)

    def cut(node: int, clients: list[int], depth: int) -> list[tuple[int, list[int]]]:
        if depth == DEPTH or len(clients) <= leaf_size:
            return [(node, sorted(clients))]
        if leaf_size == 1:
            left, right = _halves(clients, costs)
        else:
            middle = _middle([costs[client] for client in clients], leaf_size, step_overhead)
            left, right = clients[:middle], clients[middle:]
        return cut(2 * node, left, depth + 1) + cut(2 * node + 1, right, depth + 1)

    return cut(1, _longest_first(work), 0)


def share_out(
    leaves: Sequence[tuple[int, list[int]]],
    work: NDArray[np.int64],
    workers: int,
    step_overhead: float = 0.0,
) -> list[list[tuple[int, list[int]]]]:
    """Give each worker neighbouring leaves of a `tree` of about the same work; some may get none.

    Examples
    --------
    >>> work = np.array([1, 5, 3, 2])
    >>> share_out(tree(work), work, 2)
    [[(4, [1]), (5, [0])], [(6, [2]), (7, [3])]]
    """
    of_client = _costs(work)
    of_leaves = [[of_client[client] for client in clients] for _, clients in leaves]
    costs = np.array([sum(of_leaf) + step_overhead * max(of_leaf) for of_leaf in of_leaves])
    middles = np.cumsum(costs) - costs / 2
    owners = (middles * workers / costs.sum()).astype(np.int64)
    shares: list[list[tuple[int, list[int]]]] = [[] for _ in range(workers)]
    for leaf, owner in zip(leaves, owners, strict=True):
        shares[owner].append(leaf)
    return shares


def _costs(work: NDArray[np.int64]) -> list[int]:
    """Return plain numbers: NumPy would take longer to look at one than to add it."""
    costs: list[int] = (work + 1).tolist()  # a job without examples still costs a moment
    return costs


def _longest_first(work: NDArray[np.int64]) -> list[int]:
    order: list[int] = np.argsort(-work, kind="stable").tolist()
    return order


def _middle(costs: Sequence[int], leaf_size: int, step_overhead: float) -> int:
    """Return where to cut clients, the longest first, so that both parts cost about the same.

    They count as if they were cut on into full leaves.
    """
    own = np.array(costs)
    firsts = np.where(np.arange(len(own)) % leaf_size, 0, own)
    after = [0] * (len(own) + leaf_size)  # of the leaves that begin at a client, the longest ones
    for place in reversed(range(len(own))):
        after[place] = after[place + leaf_size] + costs[place]
    left = np.cumsum(own + step_overhead * firsts)
    right = own.sum() - np.cumsum(own) + step_overhead * np.array(after[1 : len(own) + 1])
    return int(np.abs(left - right)[:-1].argmin()) + 1


def _halves(jobs: Sequence[int], costs: Sequence[int]) -> tuple[list[int], list[int]]:
    """Give each job, the longest first, to the less busy half."""
    left: list[int] = []
    right: list[int] = []
    ahead = 0
    for job in jobs:
        if ahead <= 0:
            left.append(job)
            ahead += costs[job]
        else:
            right.append(job)
            ahead -= costs[job]
    return left, right

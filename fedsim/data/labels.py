"""Partial labels: which of a client's training examples keep their label.

Shapes: K clients, n examples in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import check, is_number
from fedsim.data.segments import Ints, shuffle_by


def labelled_counts(
    sizes: Ints,
    labelled: float | Sequence[float],
    unlabelled_clients: float,
    rng: np.random.Generator,
) -> Ints:
    """Say how many examples of each client keep their label.

    Parameters
    ----------
    sizes : int64 [K]
        Training examples of each client whose label is known.
    labelled : float or pair of float
        Share of these examples, 0..1; from a pair [low, high] each client's share is drawn
        uniformly.
    unlabelled_clients : float
        Share of the clients, 0..1, that keep no label at all; rounded to the nearest count,
        chosen at random among all, those included that know none anyway.
    rng : numpy.random.Generator
        Draws the shares and chooses the clients without labels.

    Returns
    -------
    int64 [K]
        share * size rounded to nearest (halves up), at least 1 where the share is above 0 and
        the client has such examples.

    Raises
    ------
    DataError
        If a share isn't in 0..1, or low is above high.

    Examples
    --------
    >>> labelled_counts(np.array([10, 4, 1]), 0.2, 0.0, np.random.default_rng(0)).tolist()
    [2, 1, 1]
    """
    check(
        _is_share(unlabelled_clients),
        "clients.unlabelled_clients",
        unlabelled_clients,
        "a share from 0 to 1",
    )
    pair = tuple(labelled) if isinstance(labelled, Sequence) else (labelled, labelled)
    check(
        len(pair) == 2 and all(_is_share(share) for share in pair) and pair[0] <= pair[1],
        "clients.labelled",
        labelled,
        "a share from 0 to 1, or a pair [low, high] of them",
    )
    shares = rng.uniform(pair[0], pair[1], len(sizes))
    without = int(_round(np.array(unlabelled_clients * len(sizes))))
    shares[rng.choice(len(sizes), without, replace=False)] = 0.0
    return np.minimum(np.maximum(_round(shares * sizes), shares > 0), sizes)


def labelled_first(
    owner: Ints, y: Ints, num_clients: int, label_each_class: bool, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Order the examples by client, so that each client's labelled ones are its first ones.

    However many labels a client gets, they go to its first examples in this order. Those whose
    label nobody knows come last.

    Parameters
    ----------
    owner : int64 [n]
        Client of each example.
    y : int64 [n]
        Class of each example, -1 where unknown.
    num_clients : int
        K.
    label_each_class : bool
        If true, one example of each class that a client has comes before the others, the classes
        in random order; else a client's examples are in random order.
    rng : numpy.random.Generator
        Draws the order.

    Returns
    -------
    order : int64 [n]
        The examples of client 0, then those of client 1, ...
    offsets : int64 [K+1]
        Where each client begins in `order`.
    """
    turn = np.where(y >= 0, 1, 2)
    if label_each_class:
        pair = owner * (int(y.max()) + 1) + y
        shuffled = rng.permutation(len(y))
        shuffled = shuffled[y[shuffled] >= 0]
        by_pair = shuffled[np.argsort(pair[shuffled], kind="stable")]
        turn[by_pair[np.diff(pair[by_pair], prepend=-1) > 0]] = 0
    # Shuffled anew: in the first shuffle a frequent class tends to come before a rare one.
    order, offsets = shuffle_by(3 * owner + turn, 3 * num_clients, rng)
    return order, offsets[::3]


def _is_share(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1


def _round(values: NDArray[np.float64]) -> Ints:
    # The 1e-9 keeps 0.29 * 50, which is 14.499999999999998, from being rounded down.
    rounded: Ints = np.floor(values + (0.5 + 1e-9)).astype(np.int64)
    return rounded

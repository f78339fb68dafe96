"""Partitions: which client owns each training example.

Shapes: K clients, N examples, C classes.

A partition is a function ``f(y, group, num_clients, rng, *, options)`` that returns the owner
[N] of each example, -1 where nobody gets it; its keyword-only parameters are the options of the
``[clients]`` table. It may leave clients empty: `fedsim.data.federate.federate` fills them. All
are vectorised over clients, and none holds K x C numbers. ``y`` is -1 where nobody knows the label:
those that go by classes deal such examples out at random, to each client in proportion to its
others.

==================== ====================================== ==============================
partition            class mix of a client                  size of a client
==================== ====================================== ==============================
`iid`                that of the whole                      equal
`dirichlet`          skewed, drawn for each class           skewed
`client_dirichlet`   skewed, drawn for each client          skewed, often less
`shards`             a few classes                          equal
`quantity`           that of the whole                      log-normal
`group`              as it comes                            as it comes
==================== ====================================== ==============================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import check, is_number, is_whole
from fedsim.data.segments import Ints, sort_by
from fedsim.errors import DataError


def by_class(partition: Callable[..., Ints]) -> Callable[..., Ints]:
    """Let a partition deal out the examples of known label; the others follow in proportion."""

    @wraps(partition)
    def deal(
        y: Ints, group: Ints | None, num_clients: int, rng: np.random.Generator, **options: Any
    ) -> Ints:
        known = y >= 0
        of_known = None if group is None else group[known]
        owner = np.empty(len(y), np.int64)
        owner[known] = partition(y[known], of_known, num_clients, rng, **options)
        if not known.all():
            given = owner[known]
            held = np.bincount(given[given >= 0], minlength=num_clients).astype(np.float64)
            owner[~known] = _deal(int((~known).sum()), held, rng) if held.any() else -1
        return owner

    return deal


def iid(y: Ints, group: Ints | None, num_clients: int, rng: np.random.Generator) -> Ints:
    """Deal the examples out at random; sizes differ by at most 1.

    Parameters
    ----------
    y : int64 [N]
        Labels of the training examples, -1 where unknown.
    group : int64 [N] or None
        Their natural groups, where the source has them.
    num_clients : int
        K.
    rng : numpy.random.Generator
        The partition's own.

    Returns
    -------
    int64 [N]
        The client, 0..K-1, that owns each example.

    Examples
    --------
    >>> owner = iid(np.zeros(7, int), None, 3, np.random.default_rng(0))
    >>> np.bincount(owner).tolist()
    [3, 2, 2]
    """
    return rng.permutation(np.arange(len(y)) % num_clients)


@by_class
def dirichlet(
    y: Ints,
    group: Ints | None,
    num_clients: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
) -> Ints:
    """Deal each class out by a Dirichlet(alpha) draw over the clients.

    Parameters
    ----------
    y, group, num_clients, rng
        As in `iid`.
    alpha : float
        Concentration, above 0: near 0 a class sits on one client, large values come close to
        IID. Values are taken to the range 1e-9..1e9, beyond which nothing changes.

    Returns
    -------
    int64 [N]
        The client that owns each example. Each class's counts are the drawn shares times the
        class's size, off by less than 1.

    Raises
    ------
    DataError
        If `alpha` is not a number above 0.

    References
    ----------
    Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", arXiv:1909.06335, 2019; the draw over clients for each class is that of
    Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019,
    Sec. 4.
    """
    concentration = np.full(num_clients, _check_alpha(alpha))
    owner = np.empty(len(y), np.int64)
    order, offsets = sort_by(y, int(y.max()) + 1)
    for start, end in pairwise(offsets):
        if start < end:
            owner[order[start:end]] = _deal(end - start, rng.dirichlet(concentration), rng)
    return owner


@by_class
def client_dirichlet(
    y: Ints,
    group: Ints | None,
    num_clients: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
) -> Ints:
    """Draw each client's class mix from Dirichlet(alpha) and deal the classes out by it.

    With p_k the draw of client k over the classes, class c is dealt out in proportion to
    p_1[c], ..., p_K[c]. This is the split of FedLabel's authors.

    Parameters
    ----------
    y, group, num_clients, rng
        As in `iid`.
    alpha : float
        Concentration, above 0: near 0 a client has one class, large values come close to IID.
        Values are taken to the range 1e-9..1e9, beyond which nothing changes.

    Returns
    -------
    int64 [N]
        The client that owns each example.

    Raises
    ------
    DataError
        If `alpha` is not a number above 0.
    """
    alpha = _check_alpha(alpha)
    owner = np.empty(len(y), np.int64)
    order, offsets = sort_by(y, int(y.max()) + 1)
    num_classes = len(offsets) - 1
    # Breaking a stick gives all clients' p_k[c] class by class, so that K x C is never held:
    # p[c] = v * (1 - p[0] - ... - p[c-1]), v ~ Beta(alpha, alpha * (C-1-c)).
    left = np.ones(num_clients)
    for c in range(num_classes):
        share = left
        if c < num_classes - 1:
            share = left * rng.beta(alpha, alpha * (num_classes - 1 - c), size=num_clients)
            left = left - share
        start, end = offsets[c], offsets[c + 1]
        if start < end:
            if not share.any():  # few clients, tiny alpha: nobody drew the class, so anyone may
                share[rng.integers(num_clients)] = 1.0
            owner[order[start:end]] = _deal(end - start, share, rng)
    return owner


@by_class
def shards(
    y: Ints,
    group: Ints | None,
    num_clients: int,
    rng: np.random.Generator,
    *,
    shards_per_client: int = 2,
) -> Ints:
    """Sort by label, cut into K * shards_per_client shards and deal these out at random.

    Parameters
    ----------
    y, group, num_clients, rng
        As in `iid`.
    shards_per_client : int
        At least 1. Shards' sizes differ by at most 1; a shard has one class, or two or more where
        it lies across a border.

    Returns
    -------
    int64 [N]
        The client that owns each example.

    Raises
    ------
    DataError
        If `shards_per_client` isn't a positive integer, or there are more shards than examples.

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, Sec. 3.
    """
    check(
        is_whole(shards_per_client) and shards_per_client >= 1,
        "clients.shards_per_client",
        shards_per_client,
        "a whole number of at least 1",
    )
    num_examples, num_shards = len(y), num_clients * shards_per_client
    if num_shards > num_examples:
        raise DataError(
            f"clients.shards_per_client = {shards_per_client}: {num_clients} clients would need"
            f" {num_shards} shards, but {num_examples} examples have a label; lower it or"
            " clients.count"
        )
    shuffled = rng.permutation(num_examples)
    order, _ = sort_by(y[shuffled], int(y.max()) + 1)
    shard_of_place = np.arange(num_examples) * num_shards // num_examples
    client_of_shard = rng.permutation(num_shards) // shards_per_client
    owner = np.empty(num_examples, np.int64)
    owner[shuffled[order]] = client_of_shard[shard_of_place]
    return owner


def quantity(
    y: Ints,
    group: Ints | None,
    num_clients: int,
    rng: np.random.Generator,
    *,
    sigma: float = 1.0,
) -> Ints:
    """Deal the examples out at random to clients of log-normal sizes.

    Parameters
    ----------
    y, group, num_clients, rng
        As in `iid`.
    sigma : float
        Standard deviation of the logarithm of a client's size, from 0 (equal sizes) to 10 (a few
        clients have nearly everything).

    Returns
    -------
    int64 [N]
        The client that owns each example.

    Raises
    ------
    DataError
        If `sigma` is not a number from 0 to 10.
    """
    check(is_number(sigma) and 0 <= sigma <= 10, "clients.sigma", sigma, "from 0 to 10")
    return _deal(len(y), rng.lognormal(0.0, sigma, num_clients), rng)


def group(y: Ints, group: Ints | None, num_clients: int, rng: np.random.Generator) -> Ints:
    """Make one client of each natural group, in ascending order of the groups' numbers.

    Parameters
    ----------
    y, group, num_clients, rng
        As in `iid`; `num_clients` must be the number of groups.

    Returns
    -------
    int64 [N]
        The client that owns each example.

    Raises
    ------
    DataError
        If the source has no groups, or their number isn't `num_clients`.

    Examples
    --------
    >>> writer = np.array([7, 7, 3, 9])
    >>> group(np.zeros(4, int), writer, 3, np.random.default_rng(0)).tolist()
    [1, 1, 0, 2]
    """
    if group is None:
        raise DataError(
            'clients.partition = "group": the source has no groups of examples;'
            " choose another partition"
        )
    names, owner = np.unique(group, return_inverse=True)
    if len(names) != num_clients:
        raise DataError(
            f'clients.count = {num_clients}, but clients.partition = "group" makes one client of'
            f" each of the {len(names)} groups; set clients.count = {len(names)}"
        )
    return owner.astype(np.int64, copy=False)


def _check_alpha(alpha: float) -> float:
    check(is_number(alpha) and alpha > 0, "clients.alpha", alpha, "a number above 0")
    return min(max(float(alpha), 1e-9), 1e9)


def _deal(num_examples: int, weights: NDArray[np.float64], rng: np.random.Generator) -> Ints:
    """Return owners [num_examples], in random order, as near to the weights [K] as can be.

    A client's count is off from its exact share by less than 1. The shares are rounded along a
    random order of the clients: in a fixed order, equal shares below 1 would give the same
    clients an example of every class and the others none.
    """
    clients = rng.permutation(len(weights))
    ends = np.cumsum(weights[clients])
    # The factor keeps 29 / 100 * 100, which is 28.999999999999996, from being rounded down to 28.
    cuts = np.minimum(ends / ends[-1] * num_examples * (1 + 1e-12), num_examples).astype(np.int64)
    return rng.permutation(np.repeat(clients, np.diff(cuts, prepend=0)))

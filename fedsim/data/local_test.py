"""Local test sets: what a client's personal model is tested on.

Shapes: K clients, n training examples, M global test examples, C classes; a pair is a client and
a class it has training examples of.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedsim.data.segments import Ints, offsets_of, ranks, sort_by

MIN_TEST = 10
"""Size that a local test set is meant to have at least, however small the client."""

# Test examples drawn at once: bounds the memory for temporary arrays.
_CHUNK = 1 << 20


def draw_local_tests(
    owner: Ints,
    y: Ints,
    y_test: Ints,
    num_clients: int,
    rng: np.random.Generator,
    floor: bool = False,
) -> tuple[Ints, NDArray[np.int32]]:
    """Draw each client a test set with the class distribution of its training set.

    With n_k training examples, client k is meant to have
    m_k = max(round(M * n_k / n), min(`MIN_TEST`, M)) test examples. They are allotted to its
    classes by largest remainder (ties at random); where the global test set has fewer of a class,
    the excess is dropped. They are drawn without replacement, so a client has no test example
    twice; two clients may share some.

    Parameters
    ----------
    owner : int64 [n]
        Client of each training example whose label is known; a client without any has no test set.
    y : int64 [n]
        Their classes.
    y_test : int64 [M]
        Class of each test example.
    num_clients : int
        K.
    rng : numpy.random.Generator
        Draws the sets.
    floor : bool
        If true, client k has instead floor(M * n_k,c / n) test examples of class c, with n_k,c
        training examples of it, so perhaps none at all: the protocol of FedLoGe's authors.

    Returns
    -------
    offsets : int64 [K+1]
        Where each client begins in `index`.
    index : int32 [m]
        Test examples of client 0, then those of client 1, ...
    """
    num_classes = 1 + max(int(y.max()), int(y_test.max()))
    pairs, train_count = np.unique(owner * num_classes + y, return_counts=True)
    client, label = np.divmod(pairs, num_classes)
    test_order, class_start = sort_by(y_test, num_classes)
    # One random order of each class's test examples; a client takes a run of it that begins at a
    # random place and goes on from the start when it reaches the end.
    for start, end in pairwise(class_start):
        rng.shuffle(test_order[start:end])
    available = np.diff(class_start)

    train_size = np.bincount(owner, minlength=num_clients)
    if floor:
        quota = len(y_test) * train_count // len(y)
    else:
        size = (2 * len(y_test) * train_size + len(y)) // (2 * len(y))
        size = np.maximum(size, min(MIN_TEST, len(y_test)))
        quota = _allot(size, client, train_count, rng)
    quota = np.minimum(quota, available[label])

    begin = (rng.random(len(pairs)) * available[label]).astype(np.int64)
    ends = np.cumsum(quota)
    index = np.empty(ends[-1], np.int32)
    # The pairs are cut where the running total passes a multiple of the chunk's size.
    cuts = np.flatnonzero(np.diff(ends // _CHUNK, prepend=0))
    for start, end in pairwise(np.unique([0, *cuts, len(pairs)])):
        counts = quota[start:end]
        which = np.repeat(label[start:end], counts)
        place = ranks(counts) + np.repeat(begin[start:end], counts)
        drawn = test_order[class_start[which] + place % available[which]]
        index[ends[start] - quota[start] : ends[end - 1]] = drawn
    sizes = np.bincount(client, weights=quota, minlength=num_clients).astype(np.int64)
    return offsets_of(sizes), index


def _allot(size: Ints, client: Ints, train_count: Ints, rng: np.random.Generator) -> Ints:
    """Allot each client's `size` [K] to its pairs by largest remainder, ties at random.

    `client` is sorted; integers throughout, so that equal remainders are equal.
    """
    pairs_of = np.bincount(client, minlength=len(size))
    train_size = offsets_of(train_count)[offsets_of(pairs_of)]
    quota, remainder = np.divmod(size[client] * train_count, np.diff(train_size)[client])
    left = size - np.diff(offsets_of(quota)[offsets_of(pairs_of)])
    order = np.lexsort((rng.random(len(client)), -remainder, client))
    quota[order] += ranks(pairs_of) < left[client]
    return quota

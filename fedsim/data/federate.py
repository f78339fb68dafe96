"""Deals a data set out to clients, with long tail, partial labels and local tests.

It runs once, in the driver; workers know only the `Federation` that it returns. K clients.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import check, is_whole
from fedsim.data import partition as partitions
from fedsim.data.federation import Federation, Index
from fedsim.data.labels import labelled_counts, labelled_first
from fedsim.data.local_test import draw_local_tests
from fedsim.data.longtail import long_tail
from fedsim.data.segments import Ints, ranks, shuffle_by, sort_by
from fedsim.data.source import UNKNOWN, Source, display_names
from fedsim.errors import DataError, user_code
from fedsim.rng import generator

Partition = Callable[..., Ints]


def federate(
    source: Source,
    *,
    num_clients: int,
    partition: Partition,
    options: Mapping[str, Any] = {},
    imbalance: float = 1.0,
    profile: str = "exponential",
    labelled: float | Sequence[float] = 1.0,
    unlabelled_clients: float = 0.0,
    label_each_class: bool = False,
    min_examples: int = 1,
    local_test: Literal["proportional", "floor"] = "proportional",
    seed: int = 0,
) -> Federation:
    """Deal a source out to clients.

    Parameters
    ----------
    source : Source
        The data.
    num_clients : int
        K, at least 1.
    partition : callable
        A function of `fedsim.data.partition`, or one's own of the same signature.
    options : mapping
        The partition's keyword-only arguments.
    imbalance, profile
        The long tail, see `fedsim.data.longtail.long_tail`.
    labelled, unlabelled_clients
        How many of the labels that the source has are kept, see
        `fedsim.data.labels.labelled_counts`.
    label_each_class : bool
        If true, a client's labels go first to one example of each class it has, as far as they
        go round (classes at random where they don't); else they go to examples at random.
    min_examples : int
        Training examples that each client has at least, 1 or more. Clients that the partition
        gave fewer get random examples of the largest clients, which are levelled no further than
        needed. With `group`, whose clients are as they are, too small a client is an error.
    local_test : {"proportional", "floor"}
        How local test sets are sized, see `fedsim.data.local_test.draw_local_tests`.
    seed : int
        The experiment's seed. The same arguments and seed give the same federation.

    Returns
    -------
    Federation
        Its local test sets follow the clients' class distributions, see
        `fedsim.data.local_test.draw_local_tests`; with `group` and a source that has
        `group_test`, a client's are the test examples of its own group.

    Raises
    ------
    DataError
        If a setting is out of range, the clients are too many for the examples, or the partition
        returns something else than one client for each example.

    Warns
    -----
    UserWarning
        Once if clients had to be filled up, once if any has no local test example, once if
        examples are given to nobody, and once if some labels are unknown and a class has no other.

    Examples
    --------
    >>> from fedsim.data.digits import digits
    >>> federation = federate(digits(), num_clients=10, partition=partitions.iid, labelled=0.25)
    >>> len(federation.train(3)), len(federation.labelled(3)), len(federation.test(3))
    (144, 36, 36)
    """
    check(
        is_whole(num_clients) and num_clients >= 1,
        "clients.count",
        num_clients,
        "a whole number of at least 1",
    )
    check(
        is_whole(min_examples) and min_examples >= 1,
        "clients.min_examples",
        min_examples,
        "a whole number of at least 1",
    )
    kept = long_tail(
        source.y_train, source.num_classes, imbalance, profile, generator(seed, "long tail")
    )
    y = source.y_train[kept]
    group = None if source.group_train is None else source.group_train[kept]
    by_group = partition is partitions.group
    client_names: tuple[str, ...] = ()
    if by_group and group is not None:
        # Those of whom the long tail leaves nothing are no clients.
        groups = np.unique(group).tolist()
        client_names = display_names(
            (source.client_names[g] for g in groups) if source.client_names else groups
        )
    if not by_group:
        held_by = f"{source.name} has {len(kept)} training examples after the long tail"
        _check_enough(num_clients, min_examples, len(kept), held_by)
    rng = generator(seed, "partition")
    _check_signature(partition, options)
    with user_code(f"partition {_name_of(partition)}"):
        # The labels are needed afterwards, and a partition may work in what it is given.
        dealt = partition(y.copy(), group, num_clients, rng, **options)
    owner = _check_owner(partition, dealt, y, num_clients)
    held = owner >= 0
    if not held.all():
        name = _name_of(partition)
        warnings.warn(
            f"partition {name} gives {len(y) - held.sum()} of {len(y)} training examples to nobody",
            UserWarning,
            stacklevel=2,
        )
        kept, y, owner = kept[held], y[held], owner[held]
        held_by = f"partition {name} deals out {len(kept)} training examples"
        _check_enough(num_clients, min_examples, len(kept), held_by)
    if by_group:
        _check_group_sizes(owner, client_names, min_examples)
    else:
        owner = _fill(owner, num_clients, min_examples, rng)

    known = y != UNKNOWN
    if not known.any():
        raise DataError(
            f"partition {_name_of(partition)} deals out no example whose label is known"
        )
    lacking = np.flatnonzero(np.bincount(y[known], minlength=source.num_classes) == 0)
    if len(lacking) and not known.all():
        first = lacking[0]
        called = f" ({source.class_names[first]})" if source.class_names else ""
        warnings.warn(
            f"{source.name} has no training example that is known to be of class {first}{called};"
            f" {(~known).sum()} of {len(y)} training examples have {UNKNOWN} for a label, which"
            " means that nobody knows it",
            UserWarning,
            stacklevel=2,
        )
    rng = generator(seed, "labels")
    order, train_offsets = labelled_first(owner, y, num_clients, label_each_class, rng)
    of_known = owner[known]
    sizes = np.bincount(of_known, minlength=num_clients)
    num_labelled = labelled_counts(sizes, labelled, unlabelled_clients, rng)

    test_index: Index
    if by_group and group is not None and source.group_test is not None:
        test_offsets, test_index = _group_tests(np.unique(group), source.group_test)
    else:
        test_offsets, test_index = draw_local_tests(
            of_known,
            y[known],
            source.y_test,
            num_clients,
            generator(seed, "local test"),
            floor=local_test == "floor",
        )
    without_test = int((np.diff(test_offsets) == 0).sum())
    if without_test:
        reasons = ["the test set has none of their classes or group"]
        if local_test == "floor":
            reasons.append("clients.local_test = 'floor' rounds their numbers down to none")
        if not known.all():
            reasons.append("nobody knows their classes")
        warnings.warn(
            f"{without_test} of {num_clients} clients have no local test example of {source.name}:"
            f" {', or '.join(reasons)}",
            UserWarning,
            stacklevel=2,
        )
    return Federation(
        source=source,
        train_offsets=train_offsets,
        train_index=_narrow(kept[order]),
        num_labelled=num_labelled,
        test_offsets=test_offsets,
        test_index=_narrow(test_index),
        client_names=client_names,
    )


def _check_enough(num_clients: int, min_examples: int, num_examples: int, held_by: str) -> None:
    if num_clients * min_examples > num_examples:
        raise DataError(
            f"clients.count = {num_clients}, but {held_by} and clients.min_examples ="
            f" {min_examples}; at most {num_examples // min_examples} clients"
        )


def _check_signature(partition: Partition, options: Mapping[str, Any]) -> None:
    signature = inspect.signature(partition)
    parameters = signature.parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    name = _name_of(partition)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in options:
            if key not in known:
                raise DataError(
                    f"clients.{key}: partition {name} has no such option;"
                    f" it has {', '.join(known) or 'none'}"
                )
    for key, default in known.items():
        if default is inspect.Parameter.empty and key not in options:
            raise DataError(f"clients.{key}: partition {name} needs this option")
    try:
        signature.bind("y", "group", "num_clients", "rng", **options)
    except TypeError as error:
        raise DataError(
            f"partition {name}: {error}; it is called as f(y, group, num_clients, rng, *, options)"
        ) from None


def _check_owner(partition: Partition, owner: NDArray[Any], y: Ints, num_clients: int) -> Ints:
    owner = np.asarray(owner)
    name = _name_of(partition)
    if owner.shape != y.shape or owner.dtype.kind not in "iu":
        raise DataError(
            f"partition {name}: returned {owner.dtype} {list(owner.shape)}; must be a client for"
            f" each example, integers [{len(y)}]"
        )
    bad = (owner < -1) | (owner >= num_clients)
    if bad.any():
        index = int(bad.argmax())
        raise DataError(
            f"partition {name}: gives example {index} to client {owner[index]}; clients are"
            f" 0..{num_clients - 1}, and -1 is nobody"
        )
    return owner.astype(np.int64, copy=False)


def _check_group_sizes(owner: Ints, client_names: Sequence[str], min_examples: int) -> None:
    sizes = np.bincount(owner)
    if sizes.min() < min_examples:
        smallest = int(sizes.argmin())
        called = client_names[smallest] if client_names else smallest
        raise DataError(
            f"clients.min_examples = {min_examples}, but group {called} (client {smallest}) has"
            f" {sizes[smallest]} training examples; at most {sizes[smallest]} with"
            ' clients.partition = "group"'
        )


def _fill(owner: Ints, num_clients: int, min_examples: int, rng: np.random.Generator) -> Ints:
    """Move random examples of the largest clients to those with fewer than `min_examples`."""
    sizes = np.bincount(owner, minlength=num_clients)
    missing = np.maximum(min_examples - sizes, 0)
    moved = int(missing.sum())
    if moved == 0:
        return owner
    # surplus[s]: examples that come free when all clients are cut down to size s. The level is
    # the largest s that frees enough; of the clients above it some keep one example more.
    clients_above = num_clients - np.cumsum(np.bincount(sizes))
    surplus = np.cumsum(clients_above[::-1])[::-1]
    level = int(np.flatnonzero(surplus >= moved)[-1])
    assert level >= min_examples, "federate() checks that there are enough examples"
    given = np.maximum(sizes - level, 0)
    given[rng.choice(np.flatnonzero(given), surplus[level] - moved, replace=False)] -= 1

    offered = np.flatnonzero(given[owner])
    order, offsets = shuffle_by(owner[offered], num_clients, rng)
    from_client = np.diff(offsets)
    leaving = offered[order[ranks(from_client) < np.repeat(given, from_client)]]
    owner = owner.copy()
    owner[leaving] = rng.permutation(np.repeat(np.arange(num_clients), missing))
    warnings.warn(
        f"{np.count_nonzero(missing)} of {num_clients} clients had fewer than"
        f" clients.min_examples = {min_examples} training examples; {moved} examples were moved to"
        " them from the largest clients",
        UserWarning,
        stacklevel=3,
    )
    return owner


def _group_tests(groups: Ints, group_test: Ints) -> tuple[Ints, Ints]:
    """Give client k the test examples of group ``groups[k]``; other groups' are left out."""
    client = np.minimum(np.searchsorted(groups, group_test), len(groups) - 1)
    known = np.flatnonzero(groups[client] == group_test)
    order, offsets = sort_by(client[known], len(groups))
    return offsets, known[order]


def _narrow(index: Index) -> Index:
    """Halve the memory of an index array where 32 bits hold it."""
    if index.size == 0 or index.max() <= np.iinfo(np.int32).max:
        return index.astype(np.int32, copy=False)
    return index


def _name_of(partition: Partition) -> str:
    return getattr(partition, "__name__", repr(partition))

"""A federation: a data set dealt out to clients, with long tail, partial labels and local tests.

Shapes: K clients, N examples of the source, n <= N of them in training, M global test examples,
m local test examples, C classes.

Everything per client is an index array in CSR form, so 1,000,000 clients cost a few arrays.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.checks import check, is_whole
from fedsim.data import partition as partitions
from fedsim.data.labels import labelled_counts, labelled_first
from fedsim.data.local_test import draw_local_tests
from fedsim.data.longtail import long_tail
from fedsim.data.segments import Ints, ranks, shuffle_by, sort_by
from fedsim.data.source import UNKNOWN, Source, display_names
from fedsim.errors import DataError, user_code
from fedsim.rng import generator

if TYPE_CHECKING:
    import pandas as pd

Partition = Callable[..., Ints]
Index = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """Who holds what.

    Attributes
    ----------
    source : Source
        The data that the indices point into.
    train_offsets : int64 [K+1]
        Client k trains on ``train_index[train_offsets[k]:train_offsets[k+1]]``.
    train_index : int32 or int64 [n]
        Indices into ``source.x_train``; of each client first the labelled ones, both parts in
        random order, then those whose label nobody knows. No example occurs twice.
    num_labelled : int64 [K]
        Training examples of each client that keep their label.
    test_offsets : int64 [K+1]
        Client k is tested on ``test_index[test_offsets[k]:test_offsets[k+1]]``.
    test_index : int32 or int64 [m]
        Indices into ``source.x_test``; no example occurs twice in a client, but two clients may
        share some.
    client_names : tuple of str [K]
        The names of the source's groups where the clients are these groups; empty where a client's
        number says as much.
    """

    source: Source
    train_offsets: Ints
    train_index: Index
    num_labelled: Ints
    test_offsets: Ints
    test_index: Index
    client_names: tuple[str, ...] = ()

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.num_labelled)

    @cached_property
    def class_counts(self) -> Ints:
        """Training examples of each class over all clients, labelled or hidden: int64 [C]."""
        y = self.source.y_train[self.train_index]
        return np.bincount(y[y >= 0], minlength=self.source.num_classes)

    def train(self, client: int) -> Index:
        """Return all training examples of a client, labelled ones first (a view)."""
        return self.train_index[self._span(self.train_offsets, client)]

    def num_train(self, clients: NDArray[np.integer[Any]]) -> Ints:
        """Return the number of training examples of each of some clients, int64 [len(clients)].

        The cost follows these clients, not all there are.
        """
        sizes: Ints = self.train_offsets[clients + 1] - self.train_offsets[clients]
        return sizes

    def labelled(self, client: int) -> Index:
        """Return the training examples of a client that keep their label (a view)."""
        return self.train(client)[: self.num_labelled[client]]

    def split(self, clients: Sequence[int]) -> list[tuple[Index, Index]]:
        """Return the labelled and the unlabelled training examples of each client (views).

        For many clients faster than looking each up alone.
        """
        ids = np.asarray(clients, dtype=np.int64)
        for client in ids[(ids < 0) | (ids >= self.num_clients)].tolist():
            raise self._unknown(client)
        begin, end = self.train_offsets[ids], self.train_offsets[ids + 1]
        ends = (begin + self.num_labelled[ids]).tolist()
        spans = zip(begin.tolist(), ends, end.tolist(), strict=True)
        index = self.train_index
        return [(index[first:middle], index[middle:last]) for first, middle, last in spans]

    def labelled_class_counts(self, clients: Sequence[int]) -> Ints:
        """Count the labelled examples of each class of some clients, int64 [len(clients), C]."""
        parts = [labelled for labelled, _ in self.split(clients)]
        classes = self.source.num_classes
        row = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        cells = row * classes + self.source.y_train[np.concatenate([*parts, row[:0]])]
        counts: Ints = np.bincount(cells, minlength=len(parts) * classes).reshape(-1, classes)
        return counts

    def unlabelled(self, client: int) -> Index:
        """Return the training examples of a client whose label is hidden or unknown (a view)."""
        return self.train(client)[self.num_labelled[client] :]

    def test(self, client: int) -> Index:
        """Return the local test set of a client (a view)."""
        return self.test_index[self._span(self.test_offsets, client)]

    def table(self) -> pd.DataFrame:
        """Count each client's examples by class.

        Returns
        -------
        pandas.DataFrame
            Columns client, class, labelled, unlabelled, test (int64); a row for each pair of a
            client and a class with any example, sorted by client, then class. Class -1 are the
            examples whose label nobody knows.
        """
        import pandas as pd

        # A pair's number is client * (C + 1) + class, from a class of -1 on.
        num_classes = self.source.num_classes + 1
        sizes = np.diff(self.train_offsets)
        clients = np.arange(self.num_clients)
        train = np.repeat(clients, sizes) * num_classes + self.source.y_train[self.train_index]
        has_label = ranks(sizes) < np.repeat(self.num_labelled, sizes)
        test = np.repeat(clients, np.diff(self.test_offsets)) * num_classes
        test += self.source.y_test[self.test_index]
        counted = {
            "labelled": np.unique(train[has_label], return_counts=True),
            "unlabelled": np.unique(train[~has_label], return_counts=True),
            "test": np.unique(test, return_counts=True),
        }
        pairs = np.unique(np.concatenate([present for present, _ in counted.values()]))
        client, y = np.divmod(pairs - UNKNOWN, num_classes)
        frame = pd.DataFrame({"client": client, "class": y + UNKNOWN})
        for column, (present, counts) in counted.items():
            values = np.zeros(len(pairs), np.int64)
            values[np.searchsorted(pairs, present)] = counts
            frame[column] = values
        return frame

    def names(self) -> pd.DataFrame:
        """Tell what the classes and clients are called.

        Returns
        -------
        pandas.DataFrame
            Columns kind (``class`` or ``client``), number and name; a row for each class, then for
            each client, but none of a kind whose numbers are its names.
        """
        import pandas as pd

        kinds = {"class": display_names(self.source.class_names), "client": self.client_names}
        rows = [(kind, *pair) for kind, names in kinds.items() for pair in enumerate(names)]
        return pd.DataFrame(rows, columns=["kind", "number", "name"])

    def _span(self, offsets: Ints, client: int) -> slice:
        if not 0 <= client < self.num_clients:
            raise self._unknown(client)
        return slice(offsets[client], offsets[client + 1])

    def _unknown(self, client: int) -> IndexError:
        return IndexError(f"client {client}: clients are 0..{self.num_clients - 1}")


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
        unless = "" if known.all() else ", or nobody knows their classes"
        warnings.warn(
            f"{without_test} of {num_clients} clients have no local test example: {source.name}'s"
            f" test set has none of their classes or group{unless}",
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

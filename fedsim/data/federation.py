"""A federation: which client holds which examples of a data set; `fedsim.data.federate` makes it.

Shapes: K clients, n examples in training, m local test examples, C classes.

Everything per client is an index array in CSR form, so 1,000,000 clients cost a few arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.segments import Ints, ranks
from fedsim.data.source import UNKNOWN, Source, display_names

if TYPE_CHECKING:
    import pandas as pd

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
        Indices into ``source.x_train``. Those of a client are three parts: first the examples that
        are labelled, then those whose label is hidden, both in random order, then those whose label
        nobody knows. No example occurs twice.
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

    def labelled_and_unlabelled(self, clients: Sequence[int]) -> list[tuple[Index, Index]]:
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
        parts = [labelled for labelled, _ in self.labelled_and_unlabelled(clients)]
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

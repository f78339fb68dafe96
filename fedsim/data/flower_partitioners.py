"""Partitioners of Flower's library flwr-datasets, used as partitions.

K clients, N examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from fedsim import registry
from fedsim.data.partition import by_class
from fedsim.data.segments import Ints
from fedsim.errors import DataError, user_code


def as_partition(partitioner: Any) -> Callable[..., Ints]:
    """Return a partition that deals the examples out as one of Flower's partitioners does.

    It gets columns ``label`` and, where the source has groups, ``group``, of the examples of known
    label only, unless it goes by natural ids (the others follow in proportion); ``partition_by``
    is ``group`` for partitioners by a natural id, else ``label``. ``num_partitions`` is the number
    of clients, the seed comes from the experiment's; all else are settings.

    Parameters
    ----------
    partitioner : class
        A ``flwr_datasets.partitioner.Partitioner``.

    Returns
    -------
    function
        See `fedsim.data.partition`. It raises `ConfigError` if the partitioner refuses its
        settings, `DataError` if it makes another number of partitions, or doesn't deal out
        examples.
    """
    name = partitioner.__name__
    natural = any("NaturalId" in base.__name__ for base in inspect.getmro(partitioner))

    def partition(
        y: Ints, group: Ints | None, num_clients: int, rng: np.random.Generator, **options: Any
    ) -> Ints:
        from datasets import Dataset

        if natural and group is None:
            raise DataError(
                f"clients.partition {name}: the source has no groups of examples; choose another"
                " partition"
            )
        columns = {"label": y} if group is None else {"label": y, "group": group}
        given = {
            "num_partitions": num_clients,
            "partition_by": "group" if natural else "label",
            "seed": int(rng.integers(2**31)),
        }
        given = {key: value for key, value in given.items() if registry.accepts(partitioner, key)}
        with user_code(f"clients.partition {name}"):
            made = partitioner(**options, **given)
            made.dataset = Dataset.from_dict({**columns, "index": np.arange(len(y))})
            if made.num_partitions != num_clients:
                raise DataError(
                    f"clients.count = {num_clients}, but clients.partition {name} makes"
                    f" {made.num_partitions} clients; set clients.count = {made.num_partitions}"
                )
            parts = [made.load_partition(k) for k in range(num_clients)]
        if not all("index" in part.column_names for part in parts):
            raise DataError(
                f"clients.partition {name} deals out columns, not examples; choose another"
            )
        parts = [np.asarray(part["index"], np.int64) for part in parts]
        held = sum(map(len, parts))
        owner = np.full(len(y), -1, np.int64)
        for client, part in enumerate(parts):
            owner[part] = client
        if held > (owner >= 0).sum():
            raise DataError(
                f"clients.partition {name} gives some examples to several clients; choose another"
            )
        return owner

    partition.__name__ = name
    return partition if natural else by_class(partition)

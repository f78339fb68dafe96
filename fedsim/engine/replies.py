"""What the clients of a round answer, in columns: a cohort's is a few lists, not many objects."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

from fedsim.models.net import Arrays

Column = list[Any]
"""A number of each client; None where one has none of that name."""


@dataclass  # without slots, which would double the time to unpack one
class Replies:
    """What training some clients gave: an entry of each list for every client that didn't fail.

    Attributes
    ----------
    clients : list of int
        The clients.
    metrics : dict of list
        Numbers about their training, which are sent to the strategy: ``num_examples``, a client's
        weight in averages, and those of its upload.
    audit : dict of list
        What only the simulator knows about it; recorded, never sent.
    arrays : list of dict
        Uploaded groups of arrays; empty where they are in a sum.
    num_bytes : list of int
        What the arrays would take on a real network.
    keeps : list of bool
        Whether a client keeps anything.
    failures : dict
        Client -> why it is left out of the round.
    read : set of str
        What the clients have read of `fedsim.engine.update.Config`.
    """

    clients: list[int] = field(default_factory=list)
    metrics: dict[str, Column] = field(default_factory=dict)
    audit: dict[str, Column] = field(default_factory=dict)
    arrays: list[dict[str, Arrays]] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    keeps: list[bool] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)

    @classmethod
    def joined(cls, parts: Sequence[Replies], clients: Sequence[int]) -> Replies:
        """Return the replies of several workers as one, in the order of ``clients``."""
        found = [client for part in parts for client in part.clients]
        places = {client: place for place, client in enumerate(found)}
        order = [places[client] for client in clients if client in places]

        def ordered(columns: Sequence[Column]) -> Column:
            whole = [value for column in columns for value in column]
            return [whole[place] for place in order]

        def in_columns(tables: Sequence[dict[str, Column]]) -> dict[str, Column]:
            names = dict.fromkeys(name for table in tables for name in table)
            return {
                name: ordered(
                    [
                        table.get(name) or [None] * len(part.clients)
                        for table, part in zip(tables, parts, strict=True)
                    ]
                )
                for name in names
            }

        failures = {client: why for part in parts for client, why in part.failures.items()}
        return cls(
            clients=[found[place] for place in order],
            metrics=in_columns([part.metrics for part in parts]),
            audit=in_columns([part.audit for part in parts]),
            arrays=ordered([part.arrays for part in parts]),
            num_bytes=ordered([part.num_bytes for part in parts]),
            keeps=ordered([part.keeps for part in parts]),
            failures={client: failures[client] for client in clients if client in failures},
            read=set().union(*(part.read for part in parts)),
        )


@dataclass(slots=True)
class TrainReport:
    """What the clients of the last round of training did.

    Attributes
    ----------
    clients : list of int
        The clients that were asked, in the order of their messages.
    failures : dict
        Client -> why it was left out.
    metrics : dict of list
        Columns with a value for each client that answered: ``round``, ``client``,
        ``num_examples``, its metrics and what the simulator found out about it; NaN where a
        client has none of that name.
    bytes_down, bytes_up : int
        What the arrays would take on a real network, all clients together.
    seconds : dict
        Where the time of the training went, by part: of what the workers do the mean over them,
        and ``wait`` for the rest, until the slowest one's answer is there.
    """

    clients: list[int] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, round: int, clients: Sequence[int], replies: Replies) -> None:
        """Add what some clients answered who were asked together."""
        before, more = len(self.metrics.get("client", ())), len(replies.clients)
        self.clients += clients
        self.failures |= replies.failures
        self.bytes_up += sum(replies.num_bytes)
        columns: dict[str, Column] = {
            "round": [round] * more,
            "client": replies.clients,
            **replies.metrics,
            **replies.audit,
        }
        for name in dict.fromkeys((*self.metrics, *columns)):
            column = columns.get(name, [None] * more)
            whole = self.metrics.setdefault(name, [nan] * before)
            whole += [nan if value is None else value for value in column]


def warn_of_unread(sent: Iterable[str], replies: Replies) -> None:
    """Warn of what a strategy sends to clients of which none that trained has read it."""
    for name in sorted({*sent} - replies.read) if replies.clients else ():
        warnings.warn(
            f"the strategy sends its clients {name!r}, which the client update doesn't read "
            f"(client.config[{name!r}])",
            stacklevel=2,
        )


def warn_of_untold(sent: Iterable[str]) -> None:
    """Warn of what a strategy sends with a model to test."""
    for name in sorted({*sent}):
        warnings.warn(
            f"the strategy sends {name!r} with the model to test, of which nobody is told",
            stacklevel=2,
        )


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the columns of a table that is given by rows.

    Examples
    --------
    >>> columns([{"a": 1}, {"a": 2, "b": 3}])
    {'a': [1, 2], 'b': [None, 3]}
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}

"""FedAvg: the weighted mean of the clients' models.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep
Networks from Decentralized Data, AISTATS 2017, algorithm 1.

======  =====================================================================
paper   here
======  =====================================================================
K       ``grid.get_node_ids()``, all clients
C       ``fraction_train``, the share of the clients that take part in a round
S_t     the clients of the messages that ``configure_train`` returns
w_t     ``arrays``
n_k     ``num-examples`` in the metrics of client k's reply, or what a subclass's
        ``weights`` name
E, B    ``training.local_epochs`` and ``training.batch_size`` of the experiment
======  =====================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from logging import INFO
from math import nan
from time import sleep
from types import MappingProxyType
from typing import TypedDict

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedsim.engine.broadcast import Broadcast
from fedsim.metrics import client_mean
from fedsim.rng import generator

NUM_EXAMPLES = "num-examples"
"""Flower's key of a client's weight."""


class Sampling(TypedDict, total=False):
    """How `FedAvg` chooses clients: what a strategy made from it passes on."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    seed: int


class FedAvg(Strategy):
    """Federated averaging.

    BatchNorm's running statistics are averaged like weights. Sums run in float64, in the order
    of the messages, and the result has the arrays' own dtype.

    Parameters
    ----------
    fraction_train : float
        Share of the clients that train in a round, in [0, 1], rounded down.
    fraction_evaluate : float
        Share of the clients that test the model when it is evaluated, in [0, 1], rounded down.
    min_train_nodes : int
        Clients that train at least, >= 0.
    min_evaluate_nodes : int
        Clients that test at least, >= 0.
    min_available_nodes : int
        Clients that must be connected before a round starts; it waits for them.
    seed : int
        Seed of the choice of clients, which depends on the round and on nothing else.

    Examples
    --------
    >>> strategy = FedAvg(fraction_train=0.1)
    >>> cohort = strategy.cohort(range(100), 0.1, 2, "train", 1)
    >>> len(cohort), cohort == strategy.cohort(range(100), 0.1, 2, "train", 1)
    (10, True)
    """

    weights: Mapping[str, str] = MappingProxyType({"arrays": NUM_EXAMPLES})
    """Array group of the replies -> the number in their metrics that weights it.

    That a strategy has this says that weighted means are all it needs. The simulator then adds the
    clients' arrays up where they are trained, and hands over one reply for all of them: the means,
    the sums of the weights and of the examples, and of the other metrics means weighted by
    examples. Flower's own runtimes hand over every reply. A subclass with an `aggregate_train` of
    its own must say it anew, or gets every reply in the simulator, too.
    """

    only_mean_of_tests: bool = True
    """That `aggregate_evaluate` needs nothing but the mean of the tests: one reply stands for all
    of them. A subclass with an `aggregate_evaluate` of its own gets every reply."""

    def __init__(
        self,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 1,
        min_evaluate_nodes: int = 0,
        min_available_nodes: int = 1,
        seed: int = 0,
    ) -> None:
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self.min_train_nodes = min_train_nodes
        self.min_evaluate_nodes = min_evaluate_nodes
        self.min_available_nodes = min_available_nodes
        self.seed = seed
        self.sent = ArrayRecord()
        """w_t, the arrays that the clients of this round were sent, until `aggregate_train`, or
        rather `complete`, forgets them: a subclass reads them before."""

    def summary(self) -> None:
        """Log the strategy's settings."""
        log(INFO, "\t├──> Share of clients that train: %g", self.fraction_train)
        log(INFO, "\t└──> Share of clients that test: %g", self.fraction_evaluate)

    # ----- a round, in order ---------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Choose S_t at random and send it w_t."""
        self.sent = arrays
        clients = self.cohort(
            self._population(grid),
            self.fraction_train,
            self.min_train_nodes,
            "train",
            server_round,
        )
        return _messages(clients, MessageType.TRAIN, server_round, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Set w_{t+1} to the sum over k of n_k / n * w_k; None if nobody has examples.

        n_k is what the first of `weights` says. Arrays that the clients don't upload stay as they
        are.
        """
        contents = [reply.content for reply in replies if reply.has_content()]
        examples = [number(content, NUM_EXAMPLES) for content in contents]
        group, weight = next(iter((self.weights or FedAvg.weights).items()))
        n = [number(content, weight) for content in contents]
        if not sum(examples) or not sum(n):
            return None, None
        mean = weighted_mean([_arrays(content, group) for content in contents], n)
        return self.complete(mean), mean_metrics(contents, examples)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Choose the clients that test the model."""
        clients = self.cohort(
            self._population(grid),
            self.fraction_evaluate,
            self.min_evaluate_nodes,
            "evaluate",
            server_round,
        )
        return _messages(clients, MessageType.EVALUATE, server_round, arrays, config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the mean of the clients' figures, weighted by their test examples."""
        contents = [reply.content for reply in replies if reply.has_content()]
        weights = [number(content, NUM_EXAMPLES) for content in contents]
        return mean_metrics(contents, weights) if sum(weights) else None

    # ----- its parts -----------------------------------------------------------------------

    def complete(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return new arrays with, in their old places, those of w_t that nobody uploads.

        That is the last use of ``sent``, which is then forgotten.
        """
        w, self.sent = self.sent, ArrayRecord()
        return ArrayRecord({**w, **arrays})

    def _population(self, grid: Grid) -> Sequence[int]:
        """Return all clients; a range, as of simulated ones, isn't copied."""
        while True:
            found = grid.get_node_ids()
            clients = found if isinstance(found, range) else sorted(found)
            if len(clients) >= self.min_available_nodes:
                return clients
            log(INFO, "Waiting for clients: %d of %d", len(clients), self.min_available_nodes)
            sleep(1)

    def cohort(
        self,
        clients: Sequence[int],
        fraction: float,
        at_least: int,
        purpose: str,
        server_round: int,
    ) -> list[int]:
        """Return the clients of a round, sorted; the cost follows the cohort, not the population.

        Parameters
        ----------
        clients : sequence of int
            All clients.
        fraction : float
            Share to choose.
        at_least : int
            How many to choose at least, if there are as many.
        purpose : str
            ``"train"`` or ``"evaluate"``.
        server_round : int
            Round, from 1.
        """
        # A share such as 0.29 of 100 must not lose a client to rounding.
        wanted = int(len(clients) * fraction + 1e-9)
        size = min(max(wanted, at_least), len(clients))
        if size == len(clients):
            return list(clients)
        rng = generator(self.seed, f"cohort {purpose}", round=server_round)
        chosen = np.sort(rng.choice(len(clients), size=size, replace=False, shuffle=False))
        return [clients[i] for i in chosen.tolist()]


def weighted_mean(records: Sequence[ArrayRecord], weights: Sequence[float]) -> ArrayRecord:
    """Return the weighted mean of records with the same arrays.

    Parameters
    ----------
    records : sequence of ArrayRecord
        One a client.
    weights : sequence of float
        Their weights, >= 0, not all 0.
    """
    if len(records) == 1:
        return records[0]
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
    mean: dict[str, Array] = {}
    for name in records[0]:
        total: NDArray[np.float64] | None = None
        for record, share in zip(records, shares, strict=True):
            array = record[name].numpy()
            total = array * share if total is None else total + array * share
        assert total is not None, "a mean of no records"
        # asarray: the sum of arrays without dimensions is a NumPy scalar.
        mean[name] = Array(np.asarray(total, dtype=array.dtype))
    return ArrayRecord(mean)


def mean_metrics(contents: Sequence[RecordDict], weights: Sequence[float]) -> MetricRecord:
    """Return the weighted mean of each number that replies have, over those where it isn't NaN."""
    metrics = [next(iter(content.metric_records.values())) for content in contents]
    names = dict.fromkeys(name for record in metrics for name in record if name != NUM_EXAMPLES)
    return MetricRecord(
        {n: client_mean([record.get(n, nan) for record in metrics], weights) for n in names}
    )


def number(content: RecordDict, name: str) -> float:
    """Return a number from a reply's metrics, with hyphens or underscores in its name."""
    metrics = next(iter(content.metric_records.values()))
    value = {key.replace("-", "_"): metrics[key] for key in metrics}[name.replace("-", "_")]
    assert isinstance(value, int | float), f"{name} must be a number"
    return value


def _arrays(content: RecordDict, group: str) -> ArrayRecord:
    """Return a group of a reply's arrays; where it has others only, the first of them."""
    records = content.array_records
    return records[group] if group in records else next(iter(records.values()))


def _messages(
    clients: Sequence[int],
    message_type: str,
    server_round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
) -> Broadcast:
    """Write one message a client; all share one content."""
    config["server-round"] = server_round
    content = RecordDict({"arrays": arrays, "config": config})
    return Broadcast(content, clients, message_type)

"""FedLoGe's authors' own clients on CIFAR-10-LT, and how their run averaged: for their curve.

Neither is a method. The logs that the authors publish say what every client holds, and that is what
`clients` deals out again. In the runs with all 40 clients in every round the clients' models stand
in the order of the clients, the numbers of examples that weight them in a random one, drawn anew
each round: `ShuffledWeights` does so too. A run on their clients, with their weights and the fixed
classifier as their code makes it:

``--set clients.partition=experiments.studies.fedloge_authors:clients --set
method.name=experiments.studies.fedloge_authors:ShuffledWeights --set method.client=fedloge --set
method.etf_recipe=angles``
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from fedsim.rng import generator
from strategies.fedavg import NUM_EXAMPLES, FedAvg, number


def clients(
    y: NDArray[np.int64],
    group: NDArray[np.int64] | None,
    num_clients: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
    numpy_seed: int = 3407,
) -> NDArray[np.int64]:
    """Deal each class out as the authors' code does, example by example, from their seed.

    Which examples of a class a client gets depends on their order, how many doesn't.

    >>> sizes = [int(5000 * 0.01 ** (c / 9)) for c in range(10)]
    >>> owner = clients(np.repeat(np.arange(10), sizes), None, 40, np.random.default_rng())
    >>> np.bincount(owner)[:8].tolist()
    [215, 141, 207, 171, 243, 132, 178, 751]
    """
    legacy = np.random.RandomState(numpy_seed)
    legacy.binomial(1, 1, size=(num_clients, int(y.max()) + 1))  # they ask it who may have what
    owner = np.empty(len(y), np.int64)
    for c in range(int(y.max()) + 1):
        members = np.flatnonzero(y == c)
        shares = legacy.dirichlet([alpha] * num_clients)
        owner[members] = legacy.choice(num_clients, size=len(members), p=shares)
    return owner


class ShuffledWeights(FedAvg):
    """FedAvg that weights each client's model with the examples of a client drawn at random."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Deal the replies' numbers of examples out anew, and average."""
        usable = [reply for reply in replies if reply.has_content()]
        examples = [int(number(reply.content, NUM_EXAMPLES)) for reply in usable]
        order = generator(self.seed, "shuffled weights", round=server_round).permutation(
            len(examples)
        )
        for reply, other in zip(usable, order.tolist(), strict=True):
            next(iter(reply.content.metric_records.values()))[NUM_EXAMPLES] = examples[other]
        return super().aggregate_train(server_round, usable)

"""FedLoGe's authors' own clients on CIFAR-10-LT, and how their run averaged: for their curve.

They are no methods. The logs that the authors publish say what every client holds, and that is
what `clients` deals out again. In the runs with all 40 clients in every round the clients' models
stand in the order of the clients, the numbers of examples that weight them in a random one, drawn
anew each round: `ShuffledWeights` does so too. A run on their clients, with their weights and the
fixed classifier as their code makes it:

``--set clients.partition=experiments.studies.fedloge_authors:clients --set
method.name=experiments.studies.fedloge_authors:ShuffledWeights --set
method.client=experiments.studies.fedloge_authors:Weighted --set method.etf_recipe=angles``
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from clients import FedLoGe
from fedsim.engine.update import Client, Steps
from fedsim.models import Weights
from fedsim.rng import generator
from strategies.fedavg import FedAvg


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
    """FedAvg that weights each client's model with the examples of a client drawn at random.

    It says them beforehand, so that the models can be added up where they are trained. The clients
    must be the authors' 40 of CIFAR-10-LT, and answer as `Weighted` do.
    """

    weights = MappingProxyType({"arrays": "others_examples"})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Deal the clients' numbers of examples out anew."""
        sent = super().configure_train(server_round, arrays, config, grid)
        y = np.repeat(np.arange(10), [int(5000 * 0.01 ** (c / 9)) for c in range(10)])
        sizes = np.bincount(clients(y, None, 40, np.random.default_rng()))
        dealt = generator(self.seed, "shuffled weights", round=server_round).permutation(sizes)
        return [
            Message(
                RecordDict({
                    "arrays": arrays,
                    "config": ConfigRecord({**config, "others_examples": int(weight)}),
                }),
                message.metadata.dst_node_id,
                message.metadata.message_type,
            )
            for message, weight in zip(sent, dealt, strict=True)
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Weighted(FedLoGe):
    """FedLoGe's client that reports the weight it was told."""

    def update(self, w: Weights, client: Client) -> Steps:
        """Train as ever."""
        upload = yield from super().update(w, client)
        weight = {"others_examples": client.config["others_examples"]}
        return replace(upload, metrics={**upload.metrics, **weight})

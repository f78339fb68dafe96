"""FedLoGe's authors' own run on CIFAR-10-LT, from their random numbers: for their curve.

None of this is a method. The authors publish their code, its seed, and the log of a run with all 40
clients in every round. What NumPy and PyTorch drew for it can be drawn again, and this module does:
who holds how many examples of each class, the fixed classifier (the log prints the loss that it
starts from) with a bias that is never trained, the first weights of the model and of all heads, and
how the clients were averaged. Their models stood in the order of the clients, the numbers of
examples that weight them in a random one, drawn anew each round. The order of the examples and
their augmentation are other ones. A run as theirs:

``fedsim run experiments/fedloge_cifar10.toml --set data.source=cifar10:cifar10.npz --set
data.imbalance=0.01 --set clients.partition=experiments.studies.fedloge_authors:clients --set
method.name=experiments.studies.fedloge_authors:ShuffledWeights --set
method.client=experiments.studies.fedloge_authors:Authors``
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor, nn

from clients import FedLoGe
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Client, Steps
from fedsim.errors import ConfigError
from fedsim.models import Net, Weights
from fedsim.models.etf import ANGLES_STEPS, fit_angles, simplex
from fedsim.models.resnet import resnet18
from fedsim.processor import one_thread
from strategies.fedavg import FedAvg

SEED = 3407
ROUNDS = 500
CLIENTS, CLASSES, FEATURES = 40, 10, 512
COUNTS = [int(5000 * 0.01 ** (c / 9)) for c in range(CLASSES)]
TEST = 10_000


class Draws(NamedTuple):
    """What NumPy drew."""

    owner: NDArray[np.int64]
    """The client of each example, sorted by class."""
    sizes: NDArray[np.int64]
    """Examples of each client."""
    start: Tensor
    """The fixed classifier before it is optimised, float32 [C, D], with its zeros."""
    orders: NDArray[np.int64]
    """Whose number of examples weights each client, [rounds, clients]."""


@cache
def draws() -> Draws:
    """Draw again what the authors' run drew, in its order."""
    legacy = np.random.RandomState(SEED)
    legacy.binomial(1, 1, size=(CLIENTS, CLASSES))  # they ask it who may have what
    held = np.zeros((CLIENTS, CLASSES), np.int64)
    owners = []
    for c, count in enumerate(COUNTS):
        shares = legacy.dirichlet([0.5] * CLIENTS)
        owners.append(legacy.choice(CLIENTS, size=count, p=shares))
        held[:, c] = np.bincount(owners[-1], minlength=CLIENTS)
    for n in (held / held.sum() * TEST).astype(int).flat:
        legacy.choice(TEST // CLASSES, n, replace=False)  # a client's test examples of a class

    p, _ = np.linalg.qr(legacy.random_sample((FEATURES, CLASSES)))
    etf = simplex(p).float().T.contiguous()  # they lay it out [D, C]
    etf.view(-1)[legacy.choice(etf.numel(), int(0.6 * etf.numel()), replace=False)] = 0
    equal = [1 / CLIENTS] * CLIENTS
    orders = [legacy.choice(CLIENTS, CLIENTS, replace=False, p=equal) for _ in range(ROUNDS)]
    return Draws(np.concatenate(owners), held.sum(axis=1), etf.T.contiguous(), np.array(orders))


@cache
def first_weights() -> tuple[Weights, list[Weights]]:
    """Return the first weights of the model, and each client's of its personal head.

    They lack ``etf.weight``, which `fit_angles` makes.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        w = Net(resnet18((3, 32, 32), CLASSES)).initial_weights()
        fixed, aux, *personal = (nn.Linear(FEATURES, CLASSES) for _ in range(2 + CLIENTS))
    w = {**w, **_head("head", aux), "etf.bias": fixed.bias.detach()}
    return w, [_head("personal", linear) for linear in personal]


def _head(name: str, linear: nn.Linear) -> Weights:
    return {f"{name}.weight": linear.weight.detach(), f"{name}.bias": linear.bias.detach()}


def clients(
    y: NDArray[np.int64],
    group: NDArray[np.int64] | None,
    num_clients: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Deal the 12,406 examples of CIFAR-10-LT out to the authors' 40 clients.

    How many examples of a class a client gets is theirs; which, depends on the order of `y`.

    >>> y = np.repeat(np.arange(10), COUNTS)
    >>> np.bincount(clients(y, None, 40, np.random.default_rng()))[:8].tolist()
    [215, 141, 207, 171, 243, 132, 178, 751]
    """
    if num_clients != CLIENTS or np.bincount(y).tolist() != COUNTS:
        raise ConfigError(
            f"clients.partition: the authors deal {COUNTS} examples of their classes out to "
            f"{CLIENTS} clients, not {np.bincount(y).tolist()} to {num_clients}"
        )
    owner = np.empty(len(y), np.int64)
    owner[np.argsort(y, kind="stable")] = draws().owner
    return owner


class ShuffledWeights(FedAvg):
    """FedAvg that weights each client's model with another's number of examples, as they did.

    It says them beforehand, so that the models can be added up where they are trained. All of the
    40 clients must take part, and answer as `Authors` do.
    """

    weights = MappingProxyType({"arrays": "others_examples"})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Tell each client the number that its model is weighted with."""
        sent = super().configure_train(server_round, arrays, config, grid)
        dealt = draws().sizes[draws().orders[server_round - 1]]
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
class Authors(FedLoGe):
    """FedLoGe's client with the authors' first weights, which reports the weight it was told.

    The model must be ResNet-18 on images of 3 x 32 x 32 pixels, and there are at most 500 rounds.
    """

    def warn_of(self, training: LocalTraining) -> None:
        """Refuse more rounds than the authors drew weights for."""
        if training.rounds > ROUNDS:
            raise ConfigError(
                f"training.rounds = {training.rounds}: must be at most {ROUNDS}, for which the "
                "authors' run has drawn how clients are weighted"
            )
        super().warn_of(training)

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Return the authors' first weights and their fixed classifier."""
        start = draws().start
        with one_thread():
            psi = fit_angles(start, start != 0, self.etf_norm, ANGLES_STEPS)
        return {**first_weights()[0], "etf.weight": psi}

    def begin(self, w: Weights, client: Client) -> Weights:
        """Add the client's personal head, which begins as drawn for it."""
        device = w["head.weight"].device
        first = {name: t.to(device) for name, t in first_weights()[1][client.id].items()}
        return {**w, **first, **client.state}

    def update(self, w: Weights, client: Client) -> Steps:
        """Train as ever."""
        upload = yield from super().update(w, client)
        weight = {"others_examples": client.config["others_examples"]}
        return replace(upload, metrics={**upload.metrics, **weight})

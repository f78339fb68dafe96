"""Ditto: beside the global model each client trains one of its own, held near the global one.

Li, Hu, Beirami, Smith: Ditto: Fair and Robust Federated Learning Through Personalization,
ICML 2021, algorithm 1.

======  ====================================================================
paper   here
======  ====================================================================
w^t     ``w``, the global model of the round
w_k     what the client trains from w^t and uploads, as in FedAvg
v_k     the client's personal model, a whole one: its state
F_k     mean cross-entropy on the client's labelled examples
lambda  ``lam``
h_k     ``personal_loss``
s       the steps of ``training.local_epochs`` epochs, for both models
eta     ``training.lr`` of the experiment, for both models
======  ====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clients.fedprox import FedProx
from fedsim.checks import check_at_least
from fedsim.engine.update import Batch, Client, LocalSGD, Steps, Upload, sgd
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class Ditto(LocalSGD):
    """Ditto's client, with FedAvg as the solver of the global problem.

    v_k begins as the global model of the first round in which the client trains; until then, and
    for ever on a client without labelled examples, it is the current global model. It is as large
    as the model itself, and so is what the client keeps on the disk.

    Parameters
    ----------
    lam : float
        lambda, the pull of the personal model towards the global one, >= 0; 0 means purely local
        models, and the larger it is the nearer they stay to the global one. The paper chooses
        among 0.05, 0.1, 0.2, 0.5, 1 and 2.
    """

    views: ClassVar[tuple[str, ...]] = ("generic", "personal")

    lam: float = 0.1

    def __post_init__(self) -> None:
        check_at_least("lam", self.lam, 0)

    def update(self, w: Weights, client: Client) -> Steps:
        """Train w_k from w^t, then v_k from its last value; only w_k is sent."""
        w_k, log = yield from sgd(self.loss, w, client.labelled)
        v_k, personal_log = yield from sgd(
            self.personal_loss, self.begin(w, client), client.labelled, given=(w,)
        )
        metrics = {**log, "personal_loss": personal_log["train_loss"]}
        # An untrained v_k isn't kept: it would stay the global model of an early round.
        own = v_k if len(client.labelled) else {}
        return Upload({"arrays": w_k}, len(client.labelled), metrics, own)

    def personal_loss(
        self, net: Net, v_k: Weights, batch: Batch, w: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return h_k = F_k(v_k) + lambda/2 * ||v_k - w^t||^2: FedProx's loss with mu = lambda."""
        return FedProx(mu=self.lam).loss(net, v_k, batch, w)

"""FedProx: a proximal term holds the clients near the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks,
MLSys 2020, algorithm 2.

======  ==================================================
paper   here
======  ==================================================
w^t     ``w``, the global model of the round
w_k     the client's model
F_k     mean cross-entropy on the client's labelled examples
mu      ``mu``
h_k     ``loss``
======  ==================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.checks import check_at_least
from fedsim.engine.update import Batch, Client, ClientUpdate, Steps, Upload, cross_entropy, sgd
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FedProx(ClientUpdate):
    """FedProx's client.

    Parameters
    ----------
    mu : float
        Weight of the proximal term, >= 0; 0 means that the term has no effect and this is FedAvg.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        check_at_least("mu", self.mu, 0)

    def update(self, w: Weights, client: Client) -> Steps:
        """Minimise h_k(.; w^t) by ``local_epochs`` epochs of SGD."""
        w_k, log = yield from sgd(self.loss, w, client.labelled, given=(w,))
        return Upload({"arrays": w_k}, num_examples=len(client.labelled), metrics=log)

    def loss(
        self, net: Net, w_k: Weights, batch: Batch, w: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return h_k = F_k(w_k) + mu/2 * ||w_k - w^t||^2 (eq. 2), over the parameters."""
        distance = sum((w_k[name] - w[name]).square().sum() for name in sorted(net.trainable))
        return cross_entropy(net(w_k, batch.x), batch) + 0.5 * self.mu * distance, {}

"""FedRep: many epochs on the client's own head, then some on the shared representation.

Collins, Hassani, Mokhtari, Shakkottai: Exploiting Shared Representations for Personalized
Federated Learning, ICML 2021, algorithm 1.

==========  ==========================================================
paper       here
==========  ==========================================================
phi         the representation: the arrays ``backbone.*`` of ``w``
h_i         the head of client i: ``head.*`` of its state
tau         the steps of ``head_epochs`` epochs on the head
alpha, eta  ``training.lr`` of the experiment, the same for both parts
==========  ==========================================================

Where the algorithm makes a single step on phi, the paper's experiments make one or five epochs:
``training.local_epochs``.
"""

from __future__ import annotations

from dataclasses import dataclass

from clients.fedper import FedPer
from fedsim.checks import check_at_least
from fedsim.engine.update import Client, Steps, Upload, sgd
from fedsim.models import Weights


@dataclass(frozen=True, kw_only=True)
class FedRep(FedPer):
    """FedRep's client: FedPer's model, trained one part after the other.

    BatchNorm's running statistics belong to the representation and are sent with it. They follow
    the inputs in both passes, so also while the representation's weights are frozen.

    Parameters
    ----------
    head_epochs : int
        Epochs on the head, with the representation frozen, >= 1 (the paper: 10).
    """

    head_epochs: int = 10

    def __post_init__(self) -> None:
        check_at_least("head_epochs", self.head_epochs, 1)

    def update(self, w: Weights, client: Client) -> Steps:
        """Train h_i from its last value with phi frozen, then phi with the new h_i frozen."""
        w_i, head_log = yield from sgd(
            self.loss,
            self.begin(w, client),
            client.labelled,
            train=("head",),
            epochs=self.head_epochs,
        )
        w_i, log = yield from sgd(self.loss, w_i, client.labelled, train=("backbone",))
        metrics = {**log, "head_loss": head_log["train_loss"]}
        own = self.own(w_i, client)
        return Upload({"arrays": self.shared(w_i)}, len(client.labelled), metrics, own)

"""FedLoGe whose fixed classifier knows the clients' class counts: why FedRoD and FedETF do better.

Not a method of the paper. With
``--set method.client=experiments.studies.balanced_fedloge:Balanced`` the backbone's loss is the
balanced softmax (Ren et al., NeurIPS 2020) that FedRoD's and FedETF's losses are made of; all else
stays FedLoGe's. What that changes is what the balance does, and what remains between the methods
is the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients import FedLoGe
from fedsim.engine.update import Batch, Client, cross_entropy
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class Balanced(FedLoGe):
    """FedLoGe's client with BSM(psi(f), y) instead of CE(psi(f), y)."""

    def given(self, w: Weights, client: Client) -> tuple[Weights, ...]:
        """Return the class counts."""
        return ({"class_counts": client.class_counts},)

    def loss(
        self, net: Net, w_k: Weights, batch: Batch, *given: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the three heads' losses."""
        fixed, auxiliary, personal = self.logits(net, w_k, batch.x)
        log_counts = given[0]["class_counts"].log().clamp(min=-1e9)
        loss = cross_entropy(fixed + log_counts, batch)
        return loss + cross_entropy(auxiliary, batch) + cross_entropy(personal, batch), {}

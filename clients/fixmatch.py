"""FixMatch on the clients of FedAvg, with one of two teachers.

Sohn, Berthelot, Li, Zhang, Carlini, Cubuk, Kurakin, Zhang, Raffel: FixMatch: Simplifying
Semi-Supervised Learning with Consistency and Confidence, NeurIPS 2020.

==========  ======================================================
paper       here
==========  ======================================================
alpha(u)    ``batch.x``, the weakly augmented inputs
A(u)        ``batch.strong``, the strongly augmented inputs
q_b         the teacher's probabilities
tau         ``threshold``
lambda_u    ``unlabelled_weight``
mu * B      the unlabelled batch; here as large as the labelled one
==========  ======================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.pseudo_label import JointUpdate
from fedsim.engine.update import Batch, Client, Steps, Targets
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FixMatch(JointUpdate):
    """What the two variants share."""

    def label(self, net: Net, w: Weights, batch: Batch) -> Targets:
        """Take the teacher's most probable class where its probability is at least tau."""
        q, pseudo_label = self.teacher(net, w, batch.x).softmax(dim=1).max(dim=1)
        return {"pseudo_label": pseudo_label, "kept": (q >= self.threshold).float() * batch.mask}

    def unlabelled_loss(
        self, net: Net, w_k: Weights, batch: Batch, targets: Targets, *given: Weights
    ) -> Tensor:
        """Return l_u (eq. 4): a mean over all examples of the batch, those not kept giving 0."""
        return self.pseudo_cross_entropy(net, w_k, batch, targets, batch.mask)


@dataclass(frozen=True, kw_only=True)
class FixMatchLocal(FixMatch):
    """The teacher is the client's own model as it trains, in evaluation mode."""

    def update(self, w: Weights, client: Client) -> Steps:
        """Train jointly, the model being its own teacher."""
        return (yield from self.update_jointly(w, client))

    def teach(self, net: Net, w_k: Weights, batch: Batch, *given: Weights) -> Targets:
        """Label the batch with the current model."""
        return self.label(net, w_k, batch)


@dataclass(frozen=True, kw_only=True)
class FixMatchGlobal(FixMatch):
    """The teacher is the global model that the client received, frozen during the round."""

    def update(self, w: Weights, client: Client) -> Steps:
        """Train jointly, taught by the global model."""
        return (yield from self.update_jointly(w, client, given=(w,)))

    def teach(self, net: Net, w_k: Weights, batch: Batch, *given: Weights) -> Targets:
        """Label the batch with the global model."""
        return self.label(net, given[0], batch)

"""What the pseudo-labelling methods share.

Shapes: B examples in a batch, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim.checks import check_at_least, check_share
from fedsim.engine.update import (
    Batch,
    Client,
    ClientUpdate,
    Steps,
    Targets,
    Upload,
    heads_cross_entropy,
    label_losses,
    sgd,
)
from fedsim.models import Net, Weights

Expertise = Literal["variance", "entropy", "max"]

EPS = 1e-12
"""Keeps the ratio of two expertises finite where a teacher is quite undecided, or quite sure."""


def expertise(p: Tensor, kind: Expertise) -> Tensor:
    """Return how much of an expert a model is for each example.

    Parameters
    ----------
    p : torch.Tensor
        Class probabilities [B, C].
    kind : {"variance", "entropy", "max"}
        Variance of the probabilities, 1 / their entropy, or the largest of them.

    Returns
    -------
    torch.Tensor
        [B], > 0, larger for a more decided model.

    Examples
    --------
    >>> p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    >>> expertise(p, "variance")
    tensor([1.0000e-12, 2.5000e-01])
    >>> expertise(p, "max")
    tensor([0.5000, 1.0000])
    """
    if kind == "variance":
        variance: Tensor = p.var(dim=1, unbiased=False)
        return variance + EPS
    if kind == "entropy":
        entropy: Tensor = torch.special.entr(p).sum(dim=1)
        return 1.0 / (entropy + EPS)
    return p.amax(dim=1)


def masked_mean(values: Tensor, mask: Tensor, over: Tensor) -> Tensor:
    """Return the sum of the values [B] in ``mask`` [B] over the size of ``over`` [B], at least 1.

    ``masked_mean(values, kept, kept)`` is the mean over the kept examples, 0 where none is kept;
    ``masked_mean(values, kept, batch.mask)`` FixMatch's mean over the batch.
    """
    return (values * mask).sum() / over.sum().clamp(min=1.0)


@dataclass(frozen=True, kw_only=True)
class JointUpdate(ClientUpdate):
    """Trains one model on labelled and unlabelled examples, a batch of both in each step.

    The loss is CE(labelled) + lambda_u * unlabelled_loss. A client without labelled examples
    makes its steps on unlabelled ones only, one without unlabelled examples on labelled ones only.

    Parameters
    ----------
    unlabelled_weight : float
        lambda_u, >= 0; 0 means that unlabelled examples have no effect on the gradient.
    threshold : float
        beta (or tau), in [0, 1]: probability from which on a pseudo-label is kept; in FedLabel it
        must be larger.
    """

    needs_images: ClassVar[bool] = True

    unlabelled_weight: float = 1.0
    threshold: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("unlabelled_weight", self.unlabelled_weight, 0)
        check_share("threshold", self.threshold)

    @abstractmethod
    def teach(self, net: Net, w_k: Weights, batch: Batch, *given: Weights) -> Targets:
        """Pseudo-label a batch of unlabelled examples."""

    @abstractmethod
    def unlabelled_loss(
        self, net: Net, w_k: Weights, batch: Batch, targets: Targets, *given: Weights
    ) -> Tensor:
        """Return the loss of a batch of unlabelled examples, before its weight."""

    def update_jointly(self, w: Weights, client: Client, given: tuple[Weights, ...] = ()) -> Steps:
        """Train one model from what `begin` makes of the global weights; see `train_jointly`."""
        return (yield from self.train_jointly(self.begin(w, client), client, given))

    def train_jointly(self, w: Weights, client: Client, given: tuple[Weights, ...] = ()) -> Steps:
        """Train one model; its weight in the server's mean is all the client's examples."""
        labelled, unlabelled = client.labelled, client.unlabelled
        if len(labelled) and len(unlabelled):
            w_k, log = yield from sgd(
                self._joint_loss,
                w,
                (labelled, unlabelled),
                train=self.trained,
                given=given,
                teach=self._joint_teach,
                strong=True,
            )
        elif len(unlabelled):
            w_k, log = yield from sgd(
                self._only_unlabelled_loss,
                w,
                unlabelled,
                train=self.trained,
                given=given,
                teach=self.teach,
                strong=True,
            )
        else:
            w_k, log = yield from sgd(self.labelled_loss, w, labelled, train=self.trained)
        num_examples = len(labelled) + len(unlabelled)
        return Upload({"arrays": self.shared(w_k)}, num_examples, log, self.own(w_k, client))

    def labelled_loss(
        self, net: Net, w_k: Weights, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of labelled examples: cross-entropy, as in FedAvg."""
        return heads_cross_entropy(self.logits(net, w_k, batch.x), batch), {}

    def pseudo_cross_entropy(
        self, net: Net, w_k: Weights, batch: Batch, targets: Targets, over: Tensor
    ) -> Tensor:
        """Return the cross-entropy of the strongly augmented inputs on the kept pseudo-labels.

        A sum over the model's heads; a mean over the examples of the mask ``over`` [B].
        """
        assert batch.strong is not None, "the pass must ask for strong views"
        losses = [
            label_losses(logits, targets["pseudo_label"])
            for logits in self.pseudo_logits(net, w_k, batch.strong)
        ]
        return masked_mean(torch.stack(losses).sum(dim=0), targets["kept"], over)

    def pseudo_logits(self, net: Net, w_k: Weights, x: Tensor) -> tuple[Tensor, ...]:
        """Return the logits [B, C] that pseudo-labels train: those of all the model's heads."""
        return self.logits(net, w_k, x)

    def _joint_teach(
        self, net: Net, w_k: Weights, batch: tuple[Batch, Batch], *given: Weights
    ) -> Targets:
        targets = self.teach(net, w_k, batch[1], *given)
        # The labelled half makes its step even where no pseudo-label is kept.
        return {name: value for name, value in targets.items() if name != "step"}

    def _joint_loss(
        self,
        net: Net,
        w_k: Weights,
        batch: tuple[Batch, Batch],
        targets: Targets,
        *given: Weights,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labelled, unlabelled = batch
        supervised, _ = self.labelled_loss(net, w_k, labelled)
        unsupervised = self.unlabelled_loss(net, w_k, unlabelled, targets, *given)
        return supervised + self.unlabelled_weight * unsupervised, {}

    def _only_unlabelled_loss(
        self, net: Net, w_k: Weights, batch: Batch, targets: Targets, *given: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.unlabelled_weight * self.unlabelled_loss(net, w_k, batch, targets, *given), {}

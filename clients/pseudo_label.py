"""What the pseudo-labelling methods share.

Shapes: B examples in a batch, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim.engine.update import (
    Batch,
    Client,
    ClientUpdate,
    LocalSGD,
    Steps,
    Targets,
    Upload,
    cross_entropy,
    sgd,
)
from fedsim.errors import ConfigError
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


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise a ConfigError unless a hyperparameter is finite and at least ``least``."""
    if not (value >= least and isfinite(value)):
        raise ConfigError(f"method.{name} = {value}: must be at least {least:g}")


def check_share(name: str, value: float) -> None:
    """Raise a ConfigError unless a hyperparameter lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"method.{name} = {value}: must be in [0, 1]")


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
        beta (or tau), in [0, 1]: probability above which a pseudo-label is kept.
    """

    needs_images: ClassVar[bool] = True

    unlabelled_weight: float = 1.0
    threshold: float = 0.95

    def __post_init__(self) -> None:
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
        """Train one model; its weight in the server's mean is all the client's examples."""
        labelled, unlabelled = client.labelled, client.unlabelled
        if len(labelled) and len(unlabelled):
            w_k, log = yield from sgd(
                self._joint_loss,
                w,
                (labelled, unlabelled),
                given=given,
                teach=self._joint_teach,
                strong=True,
            )
        elif len(unlabelled):
            w_k, log = yield from sgd(
                self._only_unlabelled_loss,
                w,
                unlabelled,
                given=given,
                teach=self.teach,
                strong=True,
            )
        else:
            w_k, log = yield from sgd(self.labelled_loss, w, labelled)
        return Upload({"arrays": w_k}, len(labelled) + len(unlabelled), log)

    # The labelled part trains as FedAvg does.
    labelled_loss = staticmethod(LocalSGD.loss)

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
        supervised = cross_entropy(net(w_k, labelled.x), labelled)
        unsupervised = self.unlabelled_loss(net, w_k, unlabelled, targets, *given)
        return supervised + self.unlabelled_weight * unsupervised, {}

    def _only_unlabelled_loss(
        self, net: Net, w_k: Weights, batch: Batch, targets: Targets, *given: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.unlabelled_weight * self.unlabelled_loss(net, w_k, batch, targets, *given), {}


def strong_logits(net: Net, w: Weights, batch: Batch) -> Tensor:
    """Return the logits [B, C] of the strongly augmented inputs, in training mode."""
    assert batch.strong is not None, "the pass must ask for strong views"
    return net(w, batch.strong)

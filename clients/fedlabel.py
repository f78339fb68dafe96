"""FedLabel: the better expert of the local and the global model labels the unlabelled data.

Cho, Joshi, Dimitriadis: Local or Global: Selective Knowledge Assimilation for Federated Learning
with Limited Labels, ICCV 2023, arXiv 2307.08809. Where the paper and the authors' code (the
strategy FedLabels of FLUTE) differ, the code's behaviour is the default.

==============  ============================================================================
paper           here
==============  ============================================================================
w               ``w``, the global model at the start of the round
w_l, w_u        ``w_l``, ``w_u``: the client's labelled and unlabelled models
tau, tau'       ``labelled_steps``, ``unlabelled_steps``
T               ``temperature``
h               ``expertise``
beta            ``threshold`` (eq. 4)
rho             ``rho``: how near the other model's expertise comes to the expert's
n_k             the pseudo-labels kept in the round, 1 where there are none; of a single
                upload the labelled examples and as many unlabelled ones as are pseudo-labelled
==============  ============================================================================
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import nan
from typing import Literal

import torch
from torch import Tensor

from clients.pseudo_label import (
    Expertise,
    JointUpdate,
    expertise,
    masked_mean,
)
from fedsim.checks import check_above, check_at_least
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Batch, Client, Steps, Targets, Upload, sgd
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FedLabel(JointUpdate):
    """FedLabel's client.

    A client without labelled examples uploads w as its labelled model, with no say in the
    disjoint mean of the labelled models; its local teacher is then w itself. A client without
    unlabelled examples uploads w as its unlabelled model, with n_k = 1.

    The labelled pass is the anchor: give it steps (the authors take 30, and 10 on the unlabelled
    examples), where an epoch over a client's few labels is hardly any training. And half of the
    disjoint average is w as long as no pseudo-labels are kept, so that FedLabel needs about twice
    as many rounds as FedAvg to get anywhere; the authors' 50 rounds of warm-up are for 2000.

    The strong view is kornia's RandAugment(1, 10), see `fedsim.data.augment.StrongAugmentation`; in
    the authors' code brightness, contrast, posterisation and shear have other strengths.

    BatchNorm's statistics are those of a whole unlabelled batch; the authors' code passes only
    the examples that are kept through the model that is trained.

    Parameters
    ----------
    labelled_steps : int
        tau, steps of the labelled pass, >= 0; 0 means those of ``[training]``. Joint: of the
        warm-up rounds.
    unlabelled_steps : int
        tau', steps of the unlabelled pass, >= 0; 0 means those of ``[training]``. Sequential only.
    warmup_rounds : int
        Rounds at the start that use labelled examples only, >= 0; with at least as many as
        ``training.rounds``, unlabelled data are never used and w_u stays w.
    threshold : float
        beta, in [0, 1]; 1 keeps nothing, so that w_u stays w. The default is from papers that
        restate FedLabel; the authors take 0.3 for the 100 classes of CIFAR-100.
    temperature : float
        T of both teachers and of the consistency term, > 0.
    expertise : {"variance", "entropy", "max"}
        h: variance of the probabilities (the authors' code), 1 / entropy, or the maximum.
    unlabelled_weight : float
        Weight of the pseudo-labels' cross-entropy, >= 0. With ``schedule = "joint"`` it is
        lambda_u, the weight of the whole unlabelled part.
    consistency_weight : float
        Weight of the agreement term (eq. 7), >= 0. The default is the authors' for the sequential
        schedule; the papers that restate FedLabel jointly have 1.
    consistency_target : {"local", "other"}
        Towards which teacher: the local one (the authors' code) or the one that wasn't chosen.
        Sequential only.
    proximal_weight : float
        Weight of the mean squared distance of w_u from w, summed over the arrays, >= 0.
        Sequential only.
    schedule : {"sequential", "joint"}
        ``"sequential"``, the authors' code: a labelled pass, then an unlabelled one with both
        teachers frozen. ``"joint"``, how later papers restate FedLabel: one model, a labelled
        and an unlabelled batch in each step, the local teacher is the model being trained, the
        consistency goes to the teacher that wasn't chosen, and the server averages as FedAvg.
    aggregation : {"disjoint", "single"}
        ``"disjoint"`` uploads w_l and w_u; ``"single"`` uploads (w_l + w_u) / 2, the paper's
        claim of no extra communication. Sequential only.
    """

    labelled_steps: int = 0
    unlabelled_steps: int = 0
    warmup_rounds: int = 50
    threshold: float = 0.95
    temperature: float = 1.0
    expertise: Expertise = "variance"
    unlabelled_weight: float = 1.0
    consistency_weight: float = 0.05
    consistency_target: Literal["local", "other"] = "local"
    proximal_weight: float = 10.0
    schedule: Literal["sequential", "joint"] = "sequential"
    aggregation: Literal["disjoint", "single"] = "disjoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("labelled_steps", "unlabelled_steps", "warmup_rounds"):
            check_at_least(name, getattr(self, name), 0)
        for name in ("consistency_weight", "proximal_weight"):
            check_at_least(name, getattr(self, name), 0)
        check_above("temperature", self.temperature, 0)

    def warn_of(self, training: LocalTraining) -> None:
        """Warn where no round comes after the warm-up."""
        if self.warmup_rounds >= training.rounds:
            warnings.warn(
                f"method.warmup_rounds = {self.warmup_rounds}, but training.rounds = "
                f"{training.rounds}: unlabelled examples are never used",
                stacklevel=3,
            )

    def update(self, w: Weights, client: Client) -> Steps:
        """Run the labelled and the unlabelled pass."""
        w = self.begin(w, client)
        if self.schedule == "joint" and client.round > self.warmup_rounds:
            return (yield from self.train_jointly(w, client, given=(w,)))
        w_l, log = yield from sgd(
            self.labelled_loss,
            w,
            client.labelled,
            train=self.trained,
            steps=self.labelled_steps or None,
        )
        own = self.own(w_l, client)
        if self.schedule == "joint":
            return Upload({"arrays": self.shared(w_l)}, len(client.labelled), log, own)
        w_u, num_kept, log["unlabelled_loss"] = w, 0.0, nan
        if client.round > self.warmup_rounds:
            w_u, unlabelled_log = yield from sgd(
                self.sequential_loss,
                w,
                client.unlabelled,
                train=self.trained,
                steps=self.unlabelled_steps or None,
                teach=self.teach,
                fixed_teacher=True,
                strong=True,
                given=(w_l, w),
            )
            num_kept = unlabelled_log.get("kept", 0.0)
            log["unlabelled_loss"] = unlabelled_log["train_loss"]
            # What stays on the client is halved as the server halves what leaves it.
            own = _mean(own, self.own(w_u, client))
        metrics = {
            **log,
            "num_labelled": len(client.labelled),
            "has_labels": float(len(client.labelled) > 0),
            "num_pseudo": max(num_kept, 1.0),
        }
        num_examples = len(client.labelled) + len(client.unlabelled)
        if self.aggregation == "single":
            single = _mean(self.shared(w_l), self.shared(w_u))
            # An example may have been kept in each of several epochs, and counts once.
            steps = self.unlabelled_steps or None
            draws = client.training.num_draws(client.unlabelled, steps=steps)
            epochs = max(draws / max(len(client.unlabelled), 1), 1)
            pseudo = round(num_kept / epochs)
            return Upload({"arrays": single}, len(client.labelled) + pseudo, metrics, own)
        groups = {"labelled": self.shared(w_l), "unlabelled": self.shared(w_u)}
        return Upload(groups, num_examples, metrics, own)

    # ----- the two teachers (sec. 3) -------------------------------------------------------

    def teach(self, net: Net, w_k: Weights, batch: Batch, *given: Weights) -> Targets:
        """Let the better expert label each weakly augmented example."""
        # The frozen labelled model, or (jointly) the model being trained.
        local, global_ = given if self.schedule == "sequential" else (w_k, *given)
        p_l = (self.teacher(net, local, batch.x) / self.temperature).softmax(dim=1)
        p_g = (self.teacher(net, global_, batch.x) / self.temperature).softmax(dim=1)
        h_l, h_g = expertise(p_l, self.expertise), expertise(p_g, self.expertise)
        is_local = h_l >= h_g
        p_expert = torch.where(is_local[:, None], p_l, p_g)
        p_other = torch.where(is_local[:, None], p_g, p_l)
        confidence, pseudo_label = p_expert.max(dim=1)
        # eq. 4: keep what the expert is sure of.
        kept = (confidence > self.threshold).float() * batch.mask
        return {
            "pseudo_label": pseudo_label,
            "kept": kept,
            "local": is_local.float(),
            "agreed": kept * (p_l.argmax(dim=1) == p_g.argmax(dim=1)),
            "rho": torch.minimum(h_l, h_g) / torch.maximum(h_l, h_g),
            "p_target": p_other if self._towards_other else p_l,
            "step": kept,
        }

    @property
    def _towards_other(self) -> bool:
        return self.consistency_target == "other" or self.schedule == "joint"

    # ----- the unlabelled loss -------------------------------------------------------------

    def unlabelled_loss(
        self, net: Net, w_k: Weights, batch: Batch, targets: Targets, *given: Weights
    ) -> Tensor:
        """Return cross-entropy on the pseudo-labels plus agreement-only consistency (eq. 7)."""
        return self._terms(net, w_k, batch, targets, 1.0)

    def _terms(
        self, net: Net, w_u: Weights, batch: Batch, targets: Targets, pseudo_weight: float
    ) -> Tensor:
        loss = pseudo_weight * self.pseudo_cross_entropy(net, w_u, batch, targets, targets["kept"])
        if self.consistency_weight:
            # Of several heads the first, which trains the backbone.
            log_q = (self.logits(net, w_u, batch.x)[0] / self.temperature).log_softmax(dim=1)
            p = targets["p_target"]
            # KL(p || q), with 0 log 0 = 0.
            divergence = (torch.special.xlogy(p, p) - p * log_q).sum(dim=1)
            consistency = masked_mean(
                targets["rho"] * divergence, targets["agreed"], targets["agreed"]
            )
            loss = loss + self.consistency_weight * consistency
        return loss

    def sequential_loss(
        self, net: Net, w_u: Weights, batch: Batch, targets: Targets, w_l: Weights, w: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the unlabelled pass: the two terms and the proximal term."""
        loss = self._terms(net, w_u, batch, targets, self.unlabelled_weight)
        if self.proximal_weight:
            distance = sum((w_u[name] - w[name]).square().mean() for name in sorted(net.trainable))
            loss = loss + self.proximal_weight * distance
        return loss, {"kept": targets["kept"].sum()}


def _mean(a: Weights, b: Weights) -> Weights:
    return {name: (a[name] + b[name]) / 2 for name in a}

"""Carries client updates out: the one SGD loop of the project.

Shapes: B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.federation import Federation
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader, epoch_steps
from fedsim.engine.update import (
    SGD,
    Batch,
    Client,
    ClientUpdate,
    Examples,
    Predict,
    Request,
    Targets,
    Trained,
    Upload,
)
from fedsim.models.net import Net, Weights
from fedsim.rng import generator

PREDICT_BLOCK = 500
"""Examples in a forward pass of evaluation. Fixed, so that rounding doesn't depend on how the
blocks are shared out among the workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalTraining:
    """How every pass of SGD on a client is done.

    Attributes
    ----------
    epochs : int
        Passes over the client's examples where a method doesn't set the steps, >= 1.
    steps : int
        Steps of a pass instead of ``epochs``, >= 0; 0 means ``epochs``.
    batch_size : int
        Examples in a step, >= 1.
    lr : float
        Learning rate, > 0.
    momentum : float
        In [0, 1), as in ``torch.optim.SGD`` without dampening; buffers start at zero each pass.
    weight_decay : float
        Factor of the weights added to the gradient, >= 0.
    augmentation : {"none", "weak"}
        ``"weak"``: random crop, and flip where the source allows it, drawn anew at each step.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    augmentation: Literal["none", "weak"] = "none"
    steps: int = 0


class Audit:
    """Counts how often pseudo-labels are kept and how often they are true.

    Parameters
    ----------
    groups : torch.Tensor
        [C], whether a class is head, medium or tail.
    """

    def __init__(self, groups: Tensor) -> None:
        self._groups = groups
        self._counts: dict[str, Tensor] = {}

    def add(self, targets: Targets, truth: Tensor) -> None:
        """Compare a batch's targets with its true labels [B]."""
        kept = targets["kept"]
        correct = kept * (targets["pseudo_label"] == truth)
        counts = {"seen": kept.new_tensor(len(kept)), "kept": kept.sum(), "correct": correct.sum()}
        if "local" in targets:
            counts["local"] = (kept * targets["local"]).sum()
        group = self._groups[truth]
        for g, name in enumerate(("head", "medium", "tail")):
            counts[f"kept_{name}"] = (kept * (group == g)).sum()
            counts[f"correct_{name}"] = (correct * (group == g)).sum()
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count

    def counts(self) -> dict[str, float]:
        """Return the counts, ``pseudo_seen`` and so on; empty if nothing was pseudo-labelled."""
        return {f"pseudo_{name}": float(count) for name, count in self._counts.items()}


class LocalTrainer:
    """Runs the client updates of one process, a client at a time.

    Parameters
    ----------
    net : Net
        The model.
    federation : Federation
        The data; may be backed by read-only shared memory.
    statistics : Statistics
        Of its training data.
    training : LocalTraining
        How to train.
    seed : int
        The experiment's seed.
    """

    def __init__(
        self,
        net: Net,
        federation: Federation,
        statistics: Statistics,
        training: LocalTraining,
        seed: int,
    ) -> None:
        self.net = net
        self.federation = federation
        self.training = training
        self.seed = seed
        self._groups = torch.tensor(statistics.groups)
        self._loader = Loader(federation, statistics, training.batch_size, training.augmentation)

    def update(
        self, method: ClientUpdate, w: Weights, client: int, round: int
    ) -> tuple[Upload, dict[str, float]]:
        """Run ``method``'s update of one client from the global weights ``w``.

        Returns
        -------
        upload : Upload
            What the client sends.
        audit : dict
            How good its pseudo-labels were, which neither client nor server can know; see
            `Audit.counts`.
        """
        labelled = Examples(self.federation.labelled(client), True)
        unlabelled = Examples(self.federation.unlabelled(client), False)
        update = method.update(w, Client(client, round, labelled, unlabelled))
        audit = Audit(self._groups)
        passes = 0
        answer: Any = None
        while True:
            try:
                request: Request = update.send(answer)
            except StopIteration as finished:
                upload: Upload = finished.value
                return upload, audit.counts()
            if isinstance(request, SGD):
                # Each kind of examples in a pass has numbers of its own.
                rngs = [
                    generator(self.seed, f"pass {passes}.{part}", round=round, client=client)
                    for part in range(len(request.parts))
                ]
                answer = self._sgd(request, rngs, audit)
                passes += 1
            else:
                answer = self._predict(request)

    def _sgd(self, request: SGD, rngs: list[np.random.Generator], audit: Audit) -> Trained:
        settings = self.training
        w = {name: tensor.detach().clone() for name, tensor in request.w.items()}
        leaves = [w[name].requires_grad_() for name in w if name in self.net.trainable]
        velocity: list[Tensor] = []
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for batch, truth in self._batches(request, rngs):
            given = request.given
            if request.teach is not None:
                with torch.no_grad():
                    targets = request.teach(self.net, w, batch, *given)
                audit.add(targets, truth)
                if "step" in targets and not targets["step"]:
                    continue
                loss, counts = request.loss(self.net, w, batch, targets, *given)
            else:
                loss, counts = request.loss(self.net, w, batch, *given)
            gradient = list(torch.autograd.grad(loss, leaves, materialize_grads=True))
            with torch.no_grad():
                if settings.weight_decay:
                    torch._foreach_add_(gradient, leaves, alpha=settings.weight_decay)
                if settings.momentum and velocity:
                    torch._foreach_mul_(velocity, settings.momentum)
                    torch._foreach_add_(velocity, gradient)
                else:
                    velocity = gradient
                torch._foreach_add_(leaves, velocity, alpha=-settings.lr)
            losses.append(loss.detach())
            for name, value in counts.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        log = {name: float(value) for name, value in sums.items()}
        log["train_loss"] = float(torch.stack(losses).mean()) if losses else float("nan")
        return Trained({name: tensor.detach() for name, tensor in w.items()}, log)

    def _batches(
        self, request: SGD, rngs: list[np.random.Generator]
    ) -> Iterator[tuple[Batch | tuple[Batch, ...], Tensor]]:
        """Yield each step's batch, or one for each kind of examples, and the last one's truth."""
        in_an_epoch = epoch_steps([len(part) for part in request.parts], self.training.batch_size)
        settings = self.training
        steps = request.steps or settings.steps or settings.epochs * in_an_epoch
        steps = steps if in_an_epoch else 0
        streams = [
            self._loader.batches(part, rng, steps, request.strong and not part.labelled)
            for part, rng in zip(request.parts, rngs, strict=True)
        ]
        for found in zip(*streams, strict=True):
            parts = tuple(batch for batch, _ in found)
            yield parts if len(parts) > 1 else parts[0], found[-1][1]

    @torch.no_grad()
    def _predict(self, request: Predict) -> Tensor:
        return torch.cat(
            [
                request.function(self.net, request.w, block, *request.given)
                for block in torch.split(self._loader.inputs(request.examples), PREDICT_BLOCK)
            ]
        )

    @torch.no_grad()
    def test(
        self, w: Weights, index: NDArray[Any] | slice
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Predict examples of the global test set with weights ``w``.

        Parameters
        ----------
        w : Weights
            The model.
        index : ndarray of integers or slice
            B examples.

        Returns
        -------
        predicted : ndarray of int64 [B]
            The most probable class of each example.
        loss : ndarray of float32 [B]
            The cross-entropy of each example.
        """
        source = self.federation.source
        # A copy: shared memory is read-only, and PyTorch wants to be able to write.
        x = self._loader.normalise(torch.from_numpy(source.x_test[index].copy()))
        y = torch.from_numpy(source.y_test[index].copy())
        logits = self.net.predict(w, x)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return logits.argmax(1).numpy(), loss.numpy()

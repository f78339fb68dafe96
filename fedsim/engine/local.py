"""Carries client updates out: the one SGD loop of the project.

Shapes: B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.augment import WeakAugmentation
from fedsim.data.federation import Federation
from fedsim.engine.update import (
    SGD,
    Batch,
    Client,
    ClientUpdate,
    Examples,
    Predict,
    Request,
    Trained,
    Upload,
)
from fedsim.models.net import Net, Weights
from fedsim.rng import generator

PREDICT_BLOCK = 500
"""Examples in a forward pass of evaluation. Fixed, so that rounding doesn't depend on how the
examples are shared out among the workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalTraining:
    """How every pass of SGD on a client is done.

    Attributes
    ----------
    epochs : int
        Passes over the client's examples where a method doesn't set the steps, >= 1.
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


def batches(
    rng: np.random.Generator, count: int, batch_size: int, *, epochs: int, steps: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Yield the positions (0 <= position < count) of the examples of each step.

    Every epoch is a fresh permutation; its last batch may be smaller. ``steps`` replaces
    ``epochs``.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> [len(batch) for batch in batches(rng, 5, 2, epochs=1)]
    [2, 2, 1]
    >>> [len(batch) for batch in batches(rng, 5, 2, epochs=1, steps=4)]
    [2, 2, 1, 2]
    """
    if count == 0:
        return
    steps = epochs * ceil(count / batch_size) if steps is None else steps
    while steps > 0:
        order = rng.permutation(count)
        for start in range(0, count, batch_size)[:steps]:
            yield order[start : start + batch_size]
            steps -= 1


class LocalTrainer:
    """Runs the client updates of one process, a client at a time.

    Parameters
    ----------
    net : Net
        The model.
    federation : Federation
        The data; may be backed by read-only shared memory.
    normalisation : tuple of ndarray
        Mean and standard deviation of the inputs, see `Source.normalisation`.
    training : LocalTraining
        How to train.
    seed : int
        The experiment's seed.
    """

    def __init__(
        self,
        net: Net,
        federation: Federation,
        normalisation: tuple[NDArray[np.float32], NDArray[np.float32]],
        training: LocalTraining,
        seed: int,
    ) -> None:
        self.net = net
        self.federation = federation
        self.training = training
        self.seed = seed
        source = federation.source
        # [channels] of images, [D] of vectors.
        trailing = (1,) * (source.x_train.ndim - 2)
        self._mean, self._std = (
            torch.tensor(values).view(-1, *trailing) for values in normalisation
        )
        self._augmentation = (
            WeakAugmentation(min(source.x_train.shape[2:]), source.flip)
            if training.augmentation == "weak"
            else None
        )

    def update(self, method: ClientUpdate, w: Weights, client: int, round: int) -> Upload:
        """Run ``method``'s update of one client from the global weights ``w``."""
        labelled = Examples(self.federation.labelled(client), True)
        unlabelled = Examples(self.federation.unlabelled(client), False)
        update = method.update(w, Client(client, round, labelled, unlabelled))
        passes = 0
        answer: Any = None
        while True:
            try:
                request: Request = update.send(answer)
            except StopIteration as finished:
                upload: Upload = finished.value
                return upload
            rng = generator(self.seed, f"pass {passes}", round=round, client=client)
            answer = self._sgd(request, rng) if isinstance(request, SGD) else self._predict(request)
            passes += 1

    def _sgd(self, request: SGD, rng: np.random.Generator) -> Trained:
        settings = self.training
        w = {name: tensor.detach().clone() for name, tensor in request.w.items()}
        leaves = [w[name].requires_grad_() for name in w if name in self.net.trainable]
        velocity: list[Tensor] = []
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for batch in self._batches(request, rng):
            loss, counts = request.loss(self.net, w, batch, *request.given)
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

    def _batches(self, request: SGD, rng: np.random.Generator) -> Iterator[Batch]:
        settings = self.training
        examples = request.examples
        x, y = self._look_up(examples)
        if self._augmentation is None:
            x = self._normalise(x)
        plan = batches(
            rng, len(examples), settings.batch_size, epochs=settings.epochs, steps=request.steps
        )
        for positions in plan:
            chosen = torch.from_numpy(positions)
            x_batch = x[chosen]
            if self._augmentation is not None:
                draws = self._augmentation.draw(rng, len(positions))
                x_batch = self._normalise(self._augmentation(x_batch, draws))
            yield Batch(x_batch, y[chosen], torch.ones(len(positions)))

    def _look_up(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Return inputs as stored, and labels: -1 for those the client doesn't have."""
        source = self.federation.source
        x = torch.from_numpy(source.x_train[examples.index])
        if examples.labelled:
            return x, torch.from_numpy(source.y_train[examples.index])
        return x, torch.full((len(examples),), -1)

    def _normalise(self, x: Tensor) -> Tensor:
        return (x.float() - self._mean) / self._std

    @torch.no_grad()
    def _predict(self, request: Predict) -> Tensor:
        x = self._normalise(self._look_up(request.examples)[0])
        return torch.cat(
            [
                request.function(self.net, request.w, block, *request.given)
                for block in torch.split(x, PREDICT_BLOCK)
            ]
        )

    @torch.no_grad()
    def test(self, w: Weights, block: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Predict one block of the global test set with weights ``w``.

        Parameters
        ----------
        w : Weights
            The model.
        block : int
            Block b holds the examples from b * PREDICT_BLOCK on.

        Returns
        -------
        predicted : ndarray of int64 [B]
            The most probable class of each example.
        loss : ndarray of float32 [B]
            The cross-entropy of each example.
        """
        source = self.federation.source
        part = slice(block * PREDICT_BLOCK, (block + 1) * PREDICT_BLOCK)
        # A copy: shared memory is read-only, and PyTorch wants to be able to write.
        x = self._normalise(torch.from_numpy(source.x_test[part].copy()))
        y = torch.from_numpy(source.y_test[part].copy())
        logits = self.net.predict(w, x)
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return logits.argmax(1).numpy(), loss.numpy()

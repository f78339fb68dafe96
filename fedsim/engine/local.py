"""Carries client updates out: the one SGD loop of the project.

Shapes: B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

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
    Inputs,
    Predict,
    Request,
    Targets,
    Trained,
    Upload,
)
from fedsim.models.net import Net, Weights, parts
from fedsim.rng import generator

PREDICT_BLOCK = 500
"""Examples in a forward pass of evaluation. Fixed, so that rounding doesn't depend on how the
blocks are shared out among the workers."""

Result = TypeVar("Result")

Scores = dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]
"""For each view the most probable class and the cross-entropy of each test example, [B]."""


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
        self,
        method: ClientUpdate,
        w: Weights,
        client: int,
        round: int,
        state: Weights | None = None,
    ) -> tuple[Upload, dict[str, float]]:
        """Run ``method``'s update of one client from the global weights ``w``.

        Parameters
        ----------
        method : ClientUpdate
            What to do.
        w : Weights
            The round's global weights; not changed.
        client, round : int
            Who, and when.
        state : Weights, optional
            What the client kept from its last round; not changed.

        Returns
        -------
        upload : Upload
            What the client sends, and keeps.
        audit : dict
            How good its pseudo-labels were, which neither client nor server can know; see
            `Audit.counts`.
        """
        audit = Audit(self._groups)
        steps = method.update(w, self._client(client, round, state or {}))
        upload = self._run(steps, "pass", client, round, audit)
        return upload, audit.counts()

    def _client(self, client: int, round: int, state: Weights) -> Client:
        labelled = self.federation.labelled(client)
        classes = torch.from_numpy(self.federation.source.y_train[labelled])
        return Client(
            client,
            round,
            Examples(labelled, True),
            Examples(self.federation.unlabelled(client), False),
            torch.bincount(classes, minlength=self.net.num_classes).float(),
            state,
        )

    def _run(
        self,
        requests: Generator[Request, Any, Result],
        purpose: str,
        client: int,
        round: int,
        audit: Audit,
    ) -> Result:
        """Carry out what a client update asks for, and return what it returns."""
        passes = 0
        answer: Any = None
        while True:
            try:
                request: Request = requests.send(answer)
            except StopIteration as finished:
                result: Result = finished.value
                return result
            if isinstance(request, SGD):
                # Each kind of examples in a pass has numbers of its own.
                rngs = [
                    generator(self.seed, f"{purpose} {passes}.{kind}", round=round, client=client)
                    for kind in range(len(request.kinds))
                ]
                answer = self._sgd(request, rngs, audit)
                passes += 1
            else:
                answer = self._predict(request)

    def _sgd(self, request: SGD, rngs: list[np.random.Generator], audit: Audit) -> Trained:
        settings = self.training
        w = {name: tensor.detach().clone() for name, tensor in request.w.items()}
        leaves = [
            tensor.requires_grad_()
            for name, tensor in parts(w, request.train).items()
            if name not in self.net.buffers
        ]
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
        settings = self.training
        in_an_epoch = epoch_steps([len(kind) for kind in request.kinds], settings.batch_size)
        if request.epochs is not None:
            steps = request.epochs * in_an_epoch
        else:
            steps = request.steps or settings.steps or settings.epochs * in_an_epoch
        steps = steps if in_an_epoch else 0
        streams = [
            self._loader.batches(kind, rng, steps, request.strong and not kind.labelled)
            for kind, rng in zip(request.kinds, rngs, strict=True)
        ]
        for found in zip(*streams, strict=True):
            batches = tuple(batch for batch, _ in found)
            yield batches if len(batches) > 1 else batches[0], found[-1][1]

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
        self, method: ClientUpdate, w: Weights, index: NDArray[Any] | slice
    ) -> tuple[Scores, Tensor]:
        """Test the generic views on examples of the global test set.

        Parameters
        ----------
        method : ClientUpdate
            Says what the views are.
        w : Weights
            The global weights.
        index : ndarray of integers or slice
            B examples.

        Returns
        -------
        scores : Scores
            Of each generic view.
        features : torch.Tensor
            The examples' features under the global backbone, [B, D].
        """
        x = self._test_inputs(index)
        features = self.net.predict_features(w, x)
        views = method.generic(self.net, w, Inputs(features, lambda: x))
        # A method may have no generic model to test.
        tested = {view: logits for view, logits in views.items() if view in method.views}
        return self._scores(tested, index), features

    def test_personal(
        self,
        method: ClientUpdate,
        w: Weights,
        features: Tensor,
        client: int,
        round: int,
        state: Weights,
    ) -> Scores:
        """Test the personal views of one client on its own test set of m examples.

        Parameters
        ----------
        method, w, client, round, state
            As for `update`; ``w`` are the new global weights.
        features : torch.Tensor
            Of the client's test examples under the global backbone, [m, D].

        Returns
        -------
        Scores
            Of each personal view.
        """
        index = self.federation.test(client)
        me = self._client(client, round, state)
        w_k = self._run(
            method.personalise(w, me), "personalise", client, round, Audit(self._groups)
        )
        with torch.no_grad():
            inputs = Inputs(features, lambda: self._test_inputs(index))
            return self._scores(method.personal(self.net, w_k, me, inputs), index)

    def _test_inputs(self, index: NDArray[Any] | slice) -> Tensor:
        # A copy: shared memory is read-only, and PyTorch wants to be able to write.
        return self._loader.normalise(torch.from_numpy(self.federation.source.x_test[index].copy()))

    def _scores(self, views: dict[str, Tensor], index: NDArray[Any] | slice) -> Scores:
        y = torch.from_numpy(self.federation.source.y_test[index].copy())
        scores = {}
        for view, logits in views.items():
            loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
            scores[view] = logits.argmax(1).numpy(), loss.numpy()
        return scores

"""CReFF: the server makes features whose gradients match the clients', and re-trains on them.

Shang, Lu, Huang, Wang: Federated Learning on Heterogeneous and Long-Tailed Data via Classifier
Re-Training with Federated Features, IJCAI 2022, arXiv 2204.13399; details as in the authors' code,
github.com/shangxinyi/CReFF-FL. The clients are in ``clients/creff.py``.

=========================  ================================================================
paper                      here
=========================  ================================================================
federated features         ``CReFF.features``, kept from round to round
real feature gradients     `Gradients`: the mean over the clients that have the class
re-trained classifier      the arrays ``retrained.weight`` and ``retrained.bias``
=========================  ================================================================

Shapes: K clients, C classes (A of them with a gradient this round), m features a class, D their
width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple, Unpack

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedsim.checks import check_above, check_at_least
from fedsim.processor import one_thread
from fedsim.rng import generator
from strategies.fedavg import (
    NUM_EXAMPLES,
    FedAvg,
    Sampling,
    mean_metrics,
    number,
    weighted_mean,
)

_EPSILON = 1e-6  # the authors', in the cosine's denominator


class Gradients(NamedTuple):
    """Of the cross-entropy in a classifier's arrays, for the examples of one class each."""

    classes: Tensor
    """The classes that any client has, int64 [A], ascending."""
    weight: Tensor
    """[A, C, D]."""
    bias: Tensor
    """[A, C]."""


class CReFF(FedAvg):
    """CReFF's server.

    Parameters
    ----------
    num_of_feature : int
        Federated features of each class, m, >= 1.
    match_epochs : int
        Steps of gradient matching in a round, >= 1.
    lr_feature : float
        Their learning rate, > 0.
    crt_epochs : int
        Epochs of re-training over the federated features in a round, >= 1.
    crt_batch_size : int
        Features in a step of re-training, >= 1. (The authors use that of local training.)
    lr_net : float
        Learning rate of re-training, > 0.
    **sampling
        See `FedAvg`.

    Attributes
    ----------
    features : torch.Tensor or None
        The federated features, float32 [C, m, D]; None before the first round.
    """

    def __init__(
        self,
        *,
        num_of_feature: int = 100,
        match_epochs: int = 100,
        lr_feature: float = 0.1,
        crt_epochs: int = 300,
        crt_batch_size: int = 32,
        lr_net: float = 0.01,
        **sampling: Unpack[Sampling],
    ) -> None:
        super().__init__(**sampling)
        counts = {
            "num_of_feature": num_of_feature,
            "match_epochs": match_epochs,
            "crt_epochs": crt_epochs,
            "crt_batch_size": crt_batch_size,
        }
        for name, count in counts.items():
            check_at_least(name, count, 1)
        check_above("lr_feature", lr_feature, 0)
        check_above("lr_net", lr_net, 0)
        self.num_of_feature = num_of_feature
        self.match_epochs = match_epochs
        self.lr_feature = lr_feature
        self.crt_epochs = crt_epochs
        self.crt_batch_size = crt_batch_size
        self.lr_net = lr_net
        self.features: Tensor | None = None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the model as FedAvg does, match the features, and re-train the classifier."""
        contents = [reply.content for reply in replies if reply.has_content()]
        contents = [content for content in contents if number(content, NUM_EXAMPLES)]
        if not contents:
            return None, None
        n = [number(content, NUM_EXAMPLES) for content in contents]
        mean = weighted_mean([content.array_records["arrays"] for content in contents], n)
        real = mean_gradients([content.array_records["gradients"] for content in contents])
        if self.features is None:
            _, c, d = real.weight.shape
            rng = generator(self.seed, "federated features")
            drawn = rng.standard_normal((c, self.num_of_feature, d), dtype=np.float32)
            self.features = torch.from_numpy(drawn)
        # The clients' gradients are those of the classifier that they were sent.
        weight, bias = (
            torch.from_numpy(self.sent[f"retrained.{part}"].numpy().copy())
            for part in ("weight", "bias")
        )
        with one_thread():
            self.features = match(
                self.features, real, weight, bias, steps=self.match_epochs, lr=self.lr_feature
            )
            weight, bias = retrain(
                self.features,
                generator(self.seed, "re-training", round=server_round),
                epochs=self.crt_epochs,
                batch_size=self.crt_batch_size,
                lr=self.lr_net,
            )
        new = {"retrained.weight": Array(weight.numpy()), "retrained.bias": Array(bias.numpy())}
        return self.complete(ArrayRecord({**mean, **new})), mean_metrics(contents, n)


def mean_gradients(records: Sequence[ArrayRecord]) -> Gradients:
    """Return the mean gradients of each class over the clients that have it, all counting alike.

    Parameters
    ----------
    records : sequence of ArrayRecord
        One a client, see ``clients.creff.CReFF.class_gradients``.

    Returns
    -------
    Gradients
        float32.
    """
    has = np.stack([record["gradients.has"].numpy() for record in records])  # [K, C]
    classes = np.flatnonzero(has.any(axis=0))
    shares = has[:, classes] / has[:, classes].sum(axis=0)

    def mean(name: str) -> Tensor:
        total: NDArray[np.float64] | None = None
        for record, share in zip(records, shares, strict=True):
            array = record[name].numpy()[classes]
            weighted = array * share.reshape(-1, *(1,) * (array.ndim - 1)).astype(np.float64)
            total = weighted if total is None else total + weighted
        assert total is not None, "a mean of no gradients"
        return torch.from_numpy(total.astype(np.float32))

    return Gradients(torch.from_numpy(classes), mean("gradients.weight"), mean("gradients.bias"))


def distances(features: Tensor, real: Gradients, weight: Tensor, bias: Tensor) -> Tensor:
    """Return for each class how far the gradients of its features are from the real ones.

    The distance of two gradients of a layer is the sum over its outputs of 1 - cosine; the bias
    counts as one more output. A row without length has the cosine 0.

    Parameters
    ----------
    features : Tensor
        [A, m, D], of the classes of ``real``.
    real : Gradients
        The clients' mean gradients.
    weight, bias : Tensor
        The classifier, [C, D] and [C].

    Returns
    -------
    Tensor
        [A], each from 0 to 2 (C + 1).
    """
    y = F.one_hot(real.classes, len(weight))[:, None, :]
    # The gradient of the mean cross-entropy over a class's m features, written out.
    error = ((features @ weight.T + bias).softmax(dim=2) - y) / features.shape[1]
    by_row = 1 - _cosine(error.transpose(1, 2) @ features, real.weight)
    return by_row.sum(dim=1) + 1 - _cosine(error.sum(dim=1), real.bias)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    cosine: Tensor = (a * b).sum(dim=-1) / (lengths + _EPSILON)
    return cosine


def match(
    features: Tensor, real: Gradients, weight: Tensor, bias: Tensor, *, steps: int, lr: float
) -> Tensor:
    """Return features whose gradients are nearer to the real ones.

    ``steps`` steps of gradient descent on the sum of `distances`, all classes at once; the
    features of classes that nobody has stay as they are.

    Parameters
    ----------
    features : Tensor
        [C, m, D]; not changed.
    real, weight, bias
        See `distances`.
    steps : int
        Steps, >= 0.
    lr : float
        Learning rate.
    """
    moved = features[real.classes].requires_grad_()
    for _ in range(steps):
        (slope,) = torch.autograd.grad(distances(moved, real, weight, bias).sum(), moved)
        with torch.no_grad():
            moved -= lr * slope
    matched = features.clone()
    matched[real.classes] = moved.detach()
    return matched


def retrain(
    features: Tensor, rng: np.random.Generator, *, epochs: int, batch_size: int, lr: float
) -> tuple[Tensor, Tensor]:
    """Return a new linear classifier of the federated features, which are balanced.

    It starts anew, as a `torch.nn.Linear` does, uniform in +-1/sqrt(D), and takes SGD steps on the
    mean cross-entropy of shuffled batches.

    Parameters
    ----------
    features : Tensor
        [C, m, D].
    rng : numpy.random.Generator
        Draws the start and the order.
    epochs, batch_size : int
        How often over all features, and how many in a step.
    lr : float
        Learning rate.

    Returns
    -------
    weight, bias : Tensor
        [C, D] and [C].
    """
    c, m, d = features.shape
    # The bias is the weight of a feature that is always 1; the gradient (p - y) x^T written out
    # makes a step several times cheaper than automatic differentiation.
    x = torch.cat([features, features.new_ones(c, m, 1)], dim=2).reshape(c * m, d + 1)
    y = torch.eye(c).repeat_interleave(m, dim=0)
    bound = 1 / sqrt(d)
    layer = torch.from_numpy(rng.uniform(-bound, bound, (c, d + 1)).astype(np.float32))
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(c * m))
        for chosen in torch.split(order, batch_size):
            of_x = x.index_select(0, chosen)
            error = (of_x @ layer.T).softmax(dim=1) - y.index_select(0, chosen)
            layer.addmm_(error.T, of_x, alpha=-lr / len(of_x))
    return layer[:, :-1].contiguous(), layer[:, -1].contiguous()

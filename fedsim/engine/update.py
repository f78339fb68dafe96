"""What a client does in a round, written for one client.

A client update is a generator that reads like the paper's ClientUpdate: it asks the engine for
passes of SGD and for predictions, and returns what the client uploads::

    @dataclass(frozen=True, kw_only=True)
    class FedProx(ClientUpdate):
        mu: float = 0.01

        def update(self, w, client):
            w_k, log = yield from sgd(self.loss, w, client.labelled, given=(w,))
            return Upload({"arrays": w_k}, num_examples=len(client.labelled), metrics=log)

The engine carries the requests out, for one client alone or for many clients at once: a loss is
a pure function of one client's weights and one batch, so the same method serves both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedsim.models.net import Net, Weights


class Batch(NamedTuple):
    """One mini-batch of one client; B examples."""

    x: Tensor
    """Inputs [B, ...], float32, normalised and (weakly) augmented."""
    y: Tensor
    """Labels [B], int64; -1 throughout for unlabelled examples."""
    mask: Tensor
    """[B], float32: 1 for an example, 0 for padding that must not count."""
    strong: Tensor | None = None
    """The same inputs under the strong augmentation, where the pass asks for them."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Some of a client's training examples, as a client update sees them: only their number.

    The engine looks the inputs up, and the labels where the client has them.
    """

    index: NDArray[np.integer[Any]] = field(repr=False)
    labelled: bool

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, slots=True)
class Client:
    """A client in a round.

    Attributes
    ----------
    id : int
        From 0.
    round : int
        From 1.
    labelled, unlabelled : Examples
        The client's training examples with and without a label.
    """

    id: int
    round: int
    labelled: Examples
    unlabelled: Examples


@dataclass(frozen=True, slots=True)
class Upload:
    """What a client sends back.

    Attributes
    ----------
    arrays : dict
        Groups of arrays by name, each becoming an ArrayRecord of the reply; ``"arrays"`` is the
        one that Flower's own strategies average.
    num_examples : int
        The client's weight in averages; 0 where it had nothing to train on.
    metrics : mapping
        Numbers about the client's training, recorded and sent to the strategy.
    """

    arrays: dict[str, Weights]
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


Loss: TypeAlias = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""``loss(net, w, batch, *given)`` returns the scalar to minimise and scalars to sum over steps.

In a pass with a teacher, ``loss(net, w, batch, targets, *given)``; in a pass over two kinds of
examples, ``batch`` is a pair of batches.
"""

Targets = dict[str, Tensor]
"""What a teacher says about a batch of unlabelled examples.

``pseudo_label`` [B], int64, and ``kept`` [B], float32 (1 where the pseudo-label is trusted) are
required; ``local`` [B], float32, is 1 where the client's own model chose it. ``step``, a scalar,
is 0 where no step is to be made. Anything else is between the teacher and the loss.
"""

Teacher: TypeAlias = Callable[..., Targets]
"""``teach(net, w, batch, *given)`` labels a batch, without gradients, before the step."""


class Trained(NamedTuple):
    """What a pass of SGD gives."""

    w: Weights
    """The trained weights; the given ones where there was nothing to train on."""
    log: dict[str, float]
    """``train_loss``: the mean loss over the steps (NaN without any), and the loss's sums."""


@dataclass(frozen=True, slots=True)
class SGD:
    """Request of a pass of SGD: see `sgd`."""

    loss: Loss
    w: Weights
    parts: tuple[Examples, ...]
    given: tuple[Weights, ...]
    steps: int | None
    teach: Teacher | None
    strong: bool


@dataclass(frozen=True, slots=True)
class Predict:
    """Request of a prediction: see `predict`."""

    function: Callable[..., Tensor]
    w: Weights
    examples: Examples
    given: tuple[Weights, ...]


Request: TypeAlias = SGD | Predict
Steps: TypeAlias = Generator[Request, Any, Upload]


def sgd(
    loss: Loss,
    w: Weights,
    examples: Examples | tuple[Examples, Examples],
    *,
    given: tuple[Weights, ...] = (),
    steps: int | None = None,
    teach: Teacher | None = None,
    strong: bool = False,
) -> Generator[SGD, Trained, Trained]:
    """Train from ``w`` on mini-batches of ``examples``, with the experiment's optimiser.

    Learning rate, momentum (its buffers start at zero), weight decay, batch size and
    augmentation are those of the experiment's ``[training]`` table.

    Parameters
    ----------
    loss : callable
        See `Loss`. Must be pure: no state, no data-dependent branches; masks instead.
    w : Weights
        Starting point; not changed.
    examples : Examples, or a pair of them
        Shuffled anew at each epoch, the last batch of an epoch may be smaller. Of a pair
        (labelled and unlabelled ones) each step takes a batch of both; an epoch goes once over
        the larger one. Without examples, in either, no step is made.
    given : tuple of Weights
        More weights that the loss takes, constant during the pass (a frozen teacher, say).
    steps : int, optional
        Number of steps, over as many epochs as that takes. By default ``local_steps`` or
        ``local_epochs`` of the experiment.
    teach : callable, optional
        Labels the unlabelled batch before each step, see `Teacher` and `Targets`. The simulator
        compares the pseudo-labels with the hidden truth, for the records only.
    strong : bool
        Whether batches also hold strongly augmented inputs.

    Returns
    -------
    Trained
        With ``yield from``: ``w_k, log = yield from sgd(...)``.
    """
    parts = examples if isinstance(examples, tuple) else (examples,)
    return (yield SGD(loss, w, parts, given, steps, teach, strong))


def predict(
    function: Callable[..., Tensor],
    w: Weights,
    examples: Examples,
    *,
    given: tuple[Weights, ...] = (),
) -> Generator[Predict, Tensor, Tensor]:
    """Evaluate ``function(net, w, x, *given)`` on examples, without augmentation or gradients.

    Returns
    -------
    torch.Tensor
        The function's results [len(examples), ...] in the order of ``examples``.
    """
    return (yield Predict(function, w, examples, given))


class ClientUpdate(ABC):
    """A client's part of a method.

    Subclasses are frozen dataclasses whose fields are the method's hyperparameters, each with a
    default; an experiment file sets them under ``[method]``. ``__post_init__`` checks them and
    raises `fedsim.errors.ConfigError`.
    """

    needs_images: ClassVar[bool] = False
    """Whether the method asks for strongly augmented inputs, which must then be images."""

    @abstractmethod
    def update(self, w: Weights, client: Client) -> Steps:
        """Train from the round's global weights ``w`` and return the upload."""


@dataclass(frozen=True, kw_only=True)
class LocalSGD(ClientUpdate):
    """Plain SGD with cross-entropy on the labelled examples: FedAvg's ClientUpdate.

    McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep
    Networks from Decentralized Data, AISTATS 2017, algorithm 1. Used by every method that has
    no client update of its own.
    """

    def update(self, w: Weights, client: Client) -> Steps:
        """Run ``local_epochs`` epochs of SGD."""
        w_k, log = yield from sgd(self.loss, w, client.labelled)
        return Upload({"arrays": w_k}, num_examples=len(client.labelled), metrics=log)

    @staticmethod
    def loss(net: Net, w: Weights, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch's mean cross-entropy."""
        return cross_entropy(net(w, batch.x), batch), {}


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of logits [B, C] over the batch's examples, a scalar."""
    losses = F.cross_entropy(logits, batch.y, reduction="none")
    return (losses * batch.mask).sum() / batch.mask.sum().clamp(min=1.0)

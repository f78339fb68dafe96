"""What a client update asks the engine for: passes of SGD, predictions, and sums over examples.

The engine carries a request out for one client alone, or for many clients side by side.

Shapes: B examples in a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import starmap
from math import inf
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.models.net import Weights


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
    padded: bool = True
    """False where the mask is known to be 1 throughout: in the batches of a client alone."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return a batch with each tensor changed."""
        strong = None if self.strong is None else change(self.strong)
        return Batch(change(self.x), change(self.y), change(self.mask), strong, self.padded)

    def split(self, sizes: list[int]) -> Iterator[Batch]:
        """Yield the examples in batches of these sizes, views of this one."""
        strong = [None] * len(sizes) if self.strong is None else torch.split(self.strong, sizes)
        fields = (torch.split(tensor, sizes) for tensor in (self.x, self.y, self.mask))
        return starmap(Batch, zip(*fields, strong, [self.padded] * len(sizes), strict=True))


@dataclass(frozen=True, slots=True)
class Examples:
    """Some of a client's training examples, as a client update sees them: only their number.

    The engine looks the inputs up, and the labels where the client has them.
    """

    index: NDArray[np.integer[Any]] = field(repr=False)
    labelled: bool

    def __len__(self) -> int:
        return len(self.index)

    def in_blocks(self, size: int) -> list[Examples]:
        """Return them in order, so many at a time, the last ones fewer; of none a block of none."""
        starts = range(0, max(1, len(self)), size)
        return [Examples(self.index[start : start + size], self.labelled) for start in starts]


Loss: TypeAlias = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""``loss(net, w, batch, *given)`` returns the scalar to minimise and scalars to sum over steps.

In a pass with a teacher, ``loss(net, w, batch, targets, *given)``; in a pass over two kinds of
examples, ``batch`` is a pair of batches.

Batches of clients side by side are padded: what is computed from an example counts only where
``batch.mask`` is 1, as in `cross_entropy`.

A model with BatchNorm must be called with ``batch.x`` or ``batch.strong`` as they are: by them it
knows which examples are padding.

It is called for the first steps only. What it did is then done again with other numbers (see
`fedsim.engine.tape`), so whatever else it does, such as printing, happens a few times.
"""

Targets = dict[str, Tensor]
"""What a teacher says about a batch of unlabelled examples.

``pseudo_label`` [B], int64, and ``kept`` [B], float32 (1 where the pseudo-label is trusted) are
required; ``local`` [B], float32, is 1 where the client's own model chose it. Where ``step`` [B] is
0 throughout, no step is made. Anything else [B, ...] is between the teacher and the loss.
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
    kinds: tuple[Examples, ...]
    given: tuple[Weights, ...]
    correction: Weights
    """Empty: none."""
    steps: int | None
    epochs: int | None
    train: tuple[str, ...]
    teach: Teacher | None
    fixed_teacher: bool
    strong: bool
    lr: float | None
    """None: the experiment's."""


@dataclass(frozen=True, slots=True)
class Predict:
    """Request of a prediction: see `predict`."""

    function: Callable[..., Tensor]
    w: Weights
    examples: Examples
    given: tuple[Weights, ...]


@dataclass(frozen=True, slots=True)
class AddUp:
    """Request of sums over examples: see `add_up`."""

    function: Callable[..., dict[str, Tensor]]
    w: Weights
    examples: Examples
    given: tuple[Weights, ...]


Request: TypeAlias = SGD | Predict | AddUp


def sgd(
    loss: Loss,
    w: Weights,
    examples: Examples | tuple[Examples, Examples],
    *,
    train: tuple[str, ...] = ("backbone", "head"),
    given: tuple[Weights, ...] = (),
    correction: Weights | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    teach: Teacher | None = None,
    fixed_teacher: bool = False,
    strong: bool = False,
) -> Generator[SGD, Trained, Trained]:
    """Train from ``w`` on mini-batches of ``examples``, with the experiment's optimiser.

    Momentum (its buffers start at zero), weight decay, batch size and augmentation are those of
    the experiment's ``[training]`` table.

    Parameters
    ----------
    loss : callable
        See `Loss`. Must be pure: no state, no data-dependent branches; masks instead. All tensors
        that it takes come in its arguments. The same function for all clients, such as a method of
        the client update: those with functions of their own can't train side by side.
    w : Weights
        Starting point; not changed. Neither are the arrays in ``given``.
    examples : Examples, or a pair of them
        Shuffled anew at each epoch, the last batch of an epoch may be smaller. Of a pair
        (labelled and unlabelled ones) each step takes a batch of both; an epoch goes once over
        the larger one. Without examples, in either, no step is made.
    train : tuple of str
        The parts of ``w`` (see `fedsim.models.parts`) that are trained; the others stay as they
        are, but for the buffers of BatchNorm layers, which follow the inputs.
    given : tuple of Weights
        More arrays that the loss takes, constant during the pass (a frozen teacher, say).
    correction : Weights, optional
        What is added to the loss's gradient in each step, constant during the pass: one array for
        each that is trained, of its name and shape. Steps go down g + correction (SCAFFOLD's
        c - c_i), for less than a linear term in the loss would take.
    steps, epochs : int, optional
        Number of steps, over as many epochs as that takes, or number of epochs. By default
        ``local_steps`` or ``local_epochs`` of the experiment.
    lr : float, optional
        Learning rate of this pass, at least 0. By default the experiment's in this round, which is
        ``client.training.lr``. Clients train side by side with those that have the same.
    teach : callable, optional
        Labels the unlabelled batch before each step, see `Teacher` and `Targets`. The simulator
        compares the pseudo-labels with the hidden truth, for the records only.
    fixed_teacher : bool
        Whether the teacher says the same whatever the weights that are being trained: it may then
        label the batches of several steps together, which takes less time.
    strong : bool
        Whether batches of unlabelled examples also hold strongly augmented inputs.

    Returns
    -------
    Trained
        With ``yield from``: ``w_k, log = yield from sgd(...)``.
    """
    kinds = examples if isinstance(examples, tuple) else (examples,)
    _check_given(given)
    correction = correction or {}
    _check_tensors("correction", correction)
    lr = lr if lr is None else float(lr)
    if lr is not None and not 0 <= lr < inf:
        raise ValueError(f"lr = {lr}: must be at least 0")
    if isinstance(train, str):
        raise TypeError(f"train must be a tuple of parts, such as ({train!r},)")
    check_parts("train", train, w)
    how = (steps, epochs, train, teach, fixed_teacher, strong, lr)
    return (yield SGD(loss, w, kinds, given, correction, *how))


def _check_given(given: Any) -> None:
    if not isinstance(given, tuple) or not all(isinstance(one, dict) for one in given):
        raise TypeError("given must be a tuple of dicts of tensors, such as given=(w,)")
    for place, one in enumerate(given):
        _check_tensors(f"given[{place}]", one)


def _check_tensors(what: str, arrays: Weights) -> None:
    for name, value in arrays.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{what}[{name!r}] must be a tensor, not {type(value).__name__}: "
                "torch.tensor(...) makes one"
            )


def check_parts(what: str, names: tuple[str, ...], w: Weights) -> None:
    """Raise `ValueError` if some arrays have no part of a name; a model may lack a backbone."""
    if {"backbone", "head"}.issuperset(names):
        return
    known = {name.partition(".")[0] for name in w} | {"backbone", "head"}
    for name in names:
        if name not in known:
            raise ValueError(f"{what} = {names}: no part {name!r}; there are {sorted(known)}")


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
    _check_given(given)
    return (yield Predict(function, w, examples, given))


def add_up(
    function: Callable[..., dict[str, Tensor]],
    w: Weights,
    examples: Examples,
    *,
    given: tuple[Weights, ...] = (),
) -> Generator[AddUp, dict[str, Tensor], dict[str, Tensor]]:
    """Return what ``function(net, w, batch, *given)`` gives over all examples, added up.

    For what a method needs to know about a client's examples and their labels: the mean features
    of its classes, say, or the gradient over all of them (with ``torch.func.grad``; there are no
    gradients else). Nothing is augmented or padded; ``batch.y`` is -1 for unlabelled examples.

    Returns
    -------
    dict of torch.Tensor
        The sum over the batches of each tensor that the function returns by name; zeros without
        examples, for which it is called with a batch of none.

    Examples
    --------
    The mean features of each class, as prototype methods have them::

        def update(self, w, client):
            ...
            found = yield from add_up(self.by_class, w_k, client.labelled)
            prototypes = found["features"] / client.class_counts.clamp(min=1)[:, None]

        def by_class(self, net, w, batch):
            has = F.one_hot(batch.y, net.num_classes).float()  # [B, C]
            return {"features": has.T @ net.predict_features(w, batch.x)}  # [C, D]
    """
    _check_given(given)
    return (yield AddUp(function, w, examples, given))

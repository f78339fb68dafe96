"""What a step of SGD computes: a loss, its gradient and the step down it, or a teacher's targets.

All of it is a function of flat tensors: the weights, what is given, the velocity, what corrects the
gradient, a learning rate, a teacher's targets and the batches, one after the other. ``vmap`` takes
no None, which a batch without strong views has, and looking through nested ones would take longer
than a step of a small model.

Shapes: K clients side by side, B examples in a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.engine.graph import Outputs
from fedsim.engine.requests import Batch, Targets
from fedsim.engine.training import LocalTraining
from fedsim.models.net import Net


class How(NamedTuple):
    """What a loss or a teacher is called with, besides numbers."""

    targets: tuple[str, ...]
    """The names of what a teacher has said."""
    widths: tuple[int, ...]
    """The numbers of tensors of the batches."""
    padded: bool
    descends: bool
    """Whether it is a loss, and a step down its gradient follows."""
    partly: bool = False
    """Whether only those rows take the step whose target ``step`` isn't 0."""


def laid_out(
    batches: list[Batch], targets: Targets, descends: bool, partly: bool = False
) -> tuple[How, list[Tensor]]:
    """Return how a call is laid out, and the tensors of its batches, one after the other."""
    fields = [one for batch in batches for one in batch[:4] if isinstance(one, Tensor)]
    widths = tuple(3 + (one.strong is not None) for one in batches)
    return How(tuple(targets), widths, batches[0].padded, descends, partly), fields


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let a GPU round the inputs of float32 products to TF32 for a while, or not."""
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    were = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = on
    try:
        yield
    finally:
        for switch, was in zip(switches, were, strict=True):
            switch.allow_tf32 = was


@dataclass(frozen=True, kw_only=True, slots=True)
class Computation:
    """The arithmetic of a pass's steps.

    Attributes
    ----------
    net : Net
        The model; of a stack the one that is made for clients side by side.
    loss, teach : callable
        The pass's, see `fedsim.engine.requests.sgd`.
    training : LocalTraining
        How to train.
    names : tuple of tuple of str
        Those of the weights, and of each thing that is given.
    trained, moving : tuple of int
        Places of the weights that are trained, and of all that a step changes.
    velocities : int
        How many arrays the velocity has.
    corrections : int
        How many arrays are added to the gradient: one for each that is trained, or none.
    has_rate : bool
        Whether the pass has a learning rate of its own.
    stacked : bool
        Whether tensors are those of clients side by side.
    device : torch.device
        Where they are.
    """

    net: Net
    loss: Callable[..., Any]
    teach: Callable[..., Any] | None
    training: LocalTraining
    names: tuple[tuple[str, ...], ...]
    trained: tuple[int, ...]
    moving: tuple[int, ...]
    velocities: int
    corrections: int
    has_rate: bool
    stacked: bool
    device: torch.device

    @property
    def num_arrays(self) -> int:
        """How many of the flat tensors are weights or given."""
        return sum(map(len, self.names))

    @property
    def _precision(self) -> AbstractContextManager[Any]:
        if self.training.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def compute(self, how: How, *tensors: Tensor) -> Outputs:
        """Return a teacher's targets; or a loss and its counts, after a step down its gradient."""
        found = iter(tensors)
        sizes = (self.num_arrays, self.velocities, self.corrections, self.has_rate, len(tensors))
        arrays, velocity, correction, rate, rest = (tuple(islice(found, n)) for n in sizes)
        if not how.descends:
            return self.targets(how, arrays, rest)
        moving = [arrays[place] for place in self.moving]
        before = [tensor.clone() for tensor in (*moving, *velocity)] if how.partly else []
        loss, counts, gradient = self.gradient(how, arrays, rest)
        # A count may be a weight itself, which is going to change.
        places = {tensor.untyped_storage().data_ptr() for tensor in arrays} if counts else set()
        made = {"loss of": loss.detach()}
        for name, count in counts.items():
            is_weight = count.untyped_storage().data_ptr() in places
            made[name] = count.detach().clone() if is_weight else count.detach()
        with torch.no_grad():
            leaves = [arrays[place] for place in self.trained]
            lr = rate[0] if rate else self.training.lr
            descend(self.training, leaves, list(gradient), list(correction), list(velocity), lr)
            if how.partly:
                go = goes(rest[how.targets.index("step")])
                for tensor, was in zip((*moving, *velocity), before, strict=True):
                    tensor.copy_(torch.where(go.view(-1, *(1,) * (was.dim() - 1)), tensor, was))
        return made

    def targets(self, how: How, arrays: Sequence[Tensor], fields: Sequence[Tensor]) -> Outputs:
        """Return what the teacher says."""
        with torch.no_grad(), self._precision, self._given_unchanged(arrays):
            found: Outputs = self._of_all(how)(*arrays, *fields)
        return found

    def gradient(
        self, how: How, arrays: Sequence[Tensor], rest: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """Return the loss, its counts, and its gradient in what is trained of ``arrays``."""
        free = list(arrays)
        for place in self.trained:
            free[place] = arrays[place].detach().requires_grad_()
        leaves = [free[place] for place in self.trained]
        with self._precision, self._given_unchanged(arrays):
            loss, counts = self._of_all(how)(*free, *rest)
            # The clients' losses don't touch each other: their gradients come in one go. In this
            # thread, in which a tape will do the same: the libraries' plans are a thread's own.
            with torch.autograd.set_multithreading_enabled(False):
                gradient = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        return loss, counts, gradient

    def _of_all(self, how: How) -> Callable[..., Any]:
        """Return the loss or the teacher as a function of flat tensors, of all rows of a stack."""
        function = self.loss if how.descends else self.teach
        assert function is not None, "there are targets only where there is a teacher"

        def of_one(*tensors: Tensor) -> Any:
            found = iter(tensors)
            names = (*self.names, how.targets)
            w, *given, of_teacher = ({name: next(found) for name in one} for one in names)
            kinds = tuple(_batch(how.padded, *islice(found, width)) for width in how.widths)
            batch = kinds if len(kinds) > 1 else kinds[0]
            were = list(w.values())
            with self.net.padding.of(_masks(kinds)):
                of_teachers = (of_teacher,) if how.targets else ()
                made = function(self.net, w, batch, *of_teachers, *given)
            self._warn_of_lost(function, w, were)
            return _checked_loss(made) if how.descends else _checked_targets(made)

        return vmap(of_one) if self.stacked else of_one

    def _warn_of_lost(
        self, function: Callable[..., Any], w: Mapping[str, Tensor], were: Sequence[Tensor]
    ) -> None:
        """Warn of untrained arrays that a loss has put others in place of: the step has its own."""
        for place, (name, was) in enumerate(zip(self.names[0], were, strict=True)):
            if place not in self.trained and w.get(name) is not was:
                warnings.warn(
                    f"{getattr(function, '__qualname__', 'a loss')} sets {name!r} of the weights, "
                    "which lasts for this step only; to change it for the next steps, too, change "
                    f"it in place, as w[{name!r}].copy_(...) does; else put it into another dict",
                    stacklevel=2,
                )

    @contextmanager
    def _given_unchanged(self, arrays: Sequence[Tensor]) -> Iterator[None]:
        """Refuse a loss that changes in place what it is given: other clients may be given that."""
        first = len(self.names[0])
        names = [name for names in self.names[1:] for name in names]
        # BatchNorm's statistics are the pass's own.
        given = [
            (name, tensor)
            for name, tensor in zip(names, arrays[first:], strict=True)
            # PyTorch itself keeps inference tensors from being changed.
            if name not in self.net.buffers and not tensor.is_inference()
        ]
        before = [tensor._version for _, tensor in given]
        yield
        for (name, tensor), was in zip(given, before, strict=True):
            if tensor._version != was:
                whose = getattr(self.loss, "__qualname__", "the loss")
                raise TypeError(f"{whose} changes {name!r} in place, which it is given: clone it")


def descend(
    training: LocalTraining,
    w: list[Tensor],
    gradient: list[Tensor],
    correction: list[Tensor],
    velocity: list[Tensor],
    lr: float | Tensor,
) -> None:
    """Take a step of SGD down a gradient and what is added to it, in place.

    There is a velocity with momentum only, and mostly no correction.
    """
    if w[0].is_cuda:
        if correction:
            gradient = list(torch._foreach_add(gradient, correction))
        # In one go, which reads and writes each array once; it takes all in the same layout.
        torch._fused_sgd_(
            w,
            [
                of_w if of_w.stride() == one.stride() else torch.empty_like(one).copy_(of_w)
                for one, of_w in zip(w, gradient, strict=True)
            ],
            velocity,
            lr=lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        return
    if training.weight_decay:
        # Not in place: weights that the loss only adds up have one gradient in common.
        gradient = list(torch._foreach_add(gradient, w, alpha=training.weight_decay))
    # One after the other: their sum would take memory of its own, which is dear here.
    terms = [gradient, correction] if correction else [gradient]
    if training.momentum:
        torch._foreach_mul_(velocity, training.momentum)
        for term in terms:
            torch._foreach_add_(velocity, term)
        terms = [velocity]
    for term in terms:
        if isinstance(lr, Tensor):
            torch._foreach_sub_(w, torch._foreach_mul(term, lr))
        else:
            torch._foreach_add_(w, term, alpha=-lr)


def goes(step: Tensor) -> Tensor:
    """Tell which rows take a step, from a teacher's target ``step`` [..., B]."""
    return (step != 0).any(-1)


def _checked_loss(found: Any) -> Any:
    """Return what a loss has returned, if it is what it should be."""
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise TypeError("a loss must return (loss, counts): a scalar, and a dict of scalars")
    for name, value in (("the loss", found[0]), *found[1].items()):
        if not (isinstance(value, Tensor) and value.dim() == 0):
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"a loss must return scalar tensors, but {name} is {what}")
    return found


def _checked_targets(found: Any) -> Any:
    """Return what a teacher has returned, if it is what it should be."""
    if not (isinstance(found, dict) and {"pseudo_label", "kept"} <= found.keys()):
        what = f"a dict of {', '.join(found)}" if isinstance(found, dict) else type(found).__name__
        raise TypeError(
            f"a teacher must return a dict with the tensors pseudo_label and kept, not {what}"
        )
    return found


def _batch(padded: bool, x: Tensor, y: Tensor, mask: Tensor, strong: Tensor | None = None) -> Batch:
    return Batch(x, y, mask, strong, padded)


def _masks(batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Return the inputs of batches, each with the mask of its examples."""
    views = ((one.mask, view) for one in batches for view in (one.x, one.strong))
    return [(view, mask) for mask, view in views if view is not None]

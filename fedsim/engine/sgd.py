"""A pass of SGD, for one client or for many side by side: the one training loop of the project.

Many clients' weights are stacked, and a step is one call for all of them: ``vmap`` turns the loss
of one client into that of many. Small models gain most, since a step on a few examples costs
little arithmetic and much overhead.

Shapes: K clients side by side, B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.clock import Clock
from fedsim.engine.graph import Outputs
from fedsim.engine.loader import Loader
from fedsim.engine.loss_check import check_loss
from fedsim.engine.requests import SGD, Batch, Targets, Trained
from fedsim.engine.stacks import Stacks
from fedsim.engine.step import Computation, goes, laid_out
from fedsim.engine.tally import Counts, Rows, Tally, audit
from fedsim.engine.tape import Tapes, layout
from fedsim.engine.training import LocalTraining
from fedsim.models.net import Net, Weights, parts

Pass = tuple[SGD, Sequence[np.random.Generator]]
"""A request, and the random numbers of each kind of its examples."""

Step = tuple[list[Batch], Tensor]
"""A batch for each kind of examples, and the last one's true labels. Of several clients, the first
ones of a stack, tensors have a leading dimension K."""


@dataclass(frozen=True, slots=True)
class PassContext:
    """What all passes of a process have in common.

    Attributes
    ----------
    net : Net
        The model.
    loader : Loader
        Makes the batches.
    training : LocalTraining
        How to train.
    groups : torch.Tensor
        [C], whether a class is head, medium or tail.
    clock : Clock
        Is told what goes into looking batches up and into training.
    rate : torch.Tensor
        Where a pass's learning rate lies if it has one of its own, a scalar.
    tapes : Tapes
        The operations of the steps that were taken so far.
    stacks : Stacks
        Memory for the arrays of clients side by side.
    checked : dict
        Pass -> the round in which `check_loss` last looked at its loss and teacher: when the pass
        is new, and side by side, where padding may count, again in rounds 1, 2, 4, 8 ..., since a
        loss may gain terms.
    """

    net: Net
    loader: Loader
    training: LocalTraining
    groups: Tensor
    clock: Clock
    rate: Tensor
    tapes: Tapes = field(default_factory=Tapes)
    stacks: Stacks = field(default_factory=Stacks)
    checked: dict[Hashable, int] = field(default_factory=dict)


def run_alone(context: PassContext, one: Pass) -> tuple[Trained, Counts]:
    """Carry out one client's pass.

    Returns
    -------
    trained : Trained
        See `fedsim.engine.requests.sgd`.
    counts : dict
        Pseudo-labels against the hidden truth, see `audit`; empty without a teacher.
    """
    request, rngs = one
    steps = _num_steps(context, request)
    streams = [
        context.loader.blocks(kind, rng, steps, request.strong and not kind.labelled)
        for kind, rng in zip(request.kinds, rngs, strict=True)
    ]
    w = {name: tensor.detach().clone() for name, tensor in request.w.items()}
    given = tuple(context.net.with_own_buffers(arrays) for arrays in request.given)
    loop = _Loop(context, request, w, given, request.correction, ())
    known = code_of(request.loss), code_of(request.teach)
    for found in zip(*streams, strict=True):
        context.clock.lap("gather")
        blocks, sizes = [block for block, _, _ in found], [s for _, _, s in found]
        if known not in context.checked:
            loop.check([next(b.split(s)) for b, s in zip(blocks, sizes, strict=True)])
            context.checked[known] = 0
        loop.take_block(blocks, found[-1][1], sizes)
        context.clock.lap("train")
    loop.end()
    return loop.result(())


def run_stacked(
    context: PassContext, passes: Sequence[Pass], round: int = 1, number: int = 0
) -> list[tuple[Trained, Counts]]:
    """Carry out the passes of several clients side by side; results in their order.

    Their requests must be `alike`; they are the ``number``-th of their clients' in a round. Clients
    that finish first leave the stack. Batches are padded to one size, which losses and BatchNorm
    leave out by their masks.
    """
    steps = np.array([_num_steps(context, request) for request, _ in passes])
    # Longest first: those still at it are always the first rows, which needs no copies.
    order = np.argsort(-steps, kind="stable")
    chosen = [passes[i] for i in order]
    requests = [request for request, _ in chosen]
    w = context.stacks.stack("w", [request.w for request in requests])
    given = tuple(
        context.stacks.stack(f"given {i}", [request.given[i] for request in requests])
        for i in range(len(requests[0].given))
    )
    correction = context.stacks.stack("correction", [request.correction for request in requests])
    loop = _Loop(context, requests[0], w, given, correction, (len(requests),))
    known = (_known(requests[0].loss), _known(requests[0].teach), number)
    last = context.checked.get(known)
    is_due = last is None or (last != round and round.bit_count() == 1)
    for step in context.loader.stacked(chosen, steps[order], requests[0].strong):
        context.clock.lap("gather")
        if is_due:
            loop.check(step[0])
            context.checked[known], is_due = round, False
        loop.take(step)
        context.clock.lap("train")
    loop.end()
    return [loop.result(int(place)) for place in np.argsort(order)]


def alike(request: SGD) -> tuple[Any, ...]:
    """Return what passes must have in common to run side by side."""
    arrays = (request.w, *request.given, request.correction)
    return (
        request.loss,
        request.teach,
        request.train,
        request.strong,
        request.lr,
        tuple(kind.labelled for kind in request.kinds),
        # In any order: what a client kept may have come back in another.
        *(frozenset((n, t.shape) for n, t in one.items()) for one in arrays),
    )


@dataclass(frozen=True, slots=True)
class _Own:
    """The arrays of those who take a step."""

    rows: Rows
    w: Weights
    velocity: Weights
    flat: list[Tensor]
    """The weights, what is given, the velocity, what corrects the gradient and a learning rate, one
    after the other."""
    num_static: int
    """How many of them, the first ones, lie at fixed addresses: a CUDA graph's static inputs."""
    form: int
    """Stands for which these are and for their layout."""


class _Loop:
    """The training loop. ``lead`` is (K,) for a stack and () for a client alone."""

    def __init__(
        self,
        context: PassContext,
        request: SGD,
        w: Weights,
        given: tuple[Weights, ...],
        correction: Weights,
        lead: tuple[int, ...],
    ) -> None:
        self._groups = context.groups
        self._tapes = context.tapes
        self._stacks = context.stacks
        self._fixed_teacher = request.fixed_teacher
        self._lead = lead
        self._w = w
        self._given = given
        net = context.net.side_by_side if lead else context.net
        trained = parts(w, request.train).keys() - net.buffers - net.frozen
        if not trained:
            known = ", ".join(sorted({name.partition(".")[0] for name in w}))
            raise ValueError(f"train = {request.train}: nothing to train; the parts are {known}")
        changed = trained | net.buffers
        moved = {name: tensor for name, tensor in w.items() if name in trained}
        self._correction = _like(moved, correction) if correction else {}
        self._velocity: Weights = {}
        if context.training.momentum:
            if lead:
                self._velocity = self._stacks.zeros("velocity", moved)
            else:
                self._velocity = {name: torch.zeros_like(tensor) for name, tensor in moved.items()}
        # A usual learning rate is part of the operations, others mustn't make new ones of them.
        self._rate = [] if request.lr is None else [context.rate.fill_(request.lr)]
        self._computation = Computation(
            net=net,
            loss=request.loss,
            teach=request.teach,
            training=context.training,
            names=tuple(tuple(arrays) for arrays in (w, *given)),
            trained=tuple(place for place, name in enumerate(w) if name in trained),
            moving=tuple(place for place, name in enumerate(w) if name in changed),
            velocities=len(self._velocity),
            corrections=len(self._correction),
            has_rate=bool(self._rate),
            stacked=bool(lead),
            device=next(iter(w.values())).device,
        )
        self._last = self._some(slice(0, *lead) if lead else None)
        self._sums = Tally(lead)
        self._counts = Tally(lead)

    def take(self, step: Step) -> None:
        """Take a step of SGD."""
        batches, truth = step
        own = self._first(len(truth)) if self._lead else self._last
        if self._computation.teach is None:
            self._descend(own, batches, {})
        else:
            self._follow(own, batches, self._label(own, batches, truth))

    def take_block(self, blocks: list[Batch], truth: Tensor, sizes: list[list[int]]) -> None:
        """Take several steps of a client alone, on the parts of ``blocks`` of these sizes."""
        batches = zip(*(b.split(s) for b, s in zip(blocks, sizes, strict=True)), strict=True)
        truths = torch.split(truth, sizes[-1])
        if self._computation.teach is None or not self._fixed_teacher:
            for step in zip(batches, truths, strict=True):
                self.take((list(step[0]), step[1]))
            return
        targets = self._label(self._last, blocks, truth)
        split = [torch.split(target, sizes[-1]) for target in targets.values()]
        for of_step, batch in zip(zip(*split, strict=True), batches, strict=True):
            self._follow(self._last, list(batch), dict(zip(targets, of_step, strict=True)))

    def _first(self, count: int) -> _Own:
        """Return the arrays of the first rows, which are mostly those of the step before."""
        rows = slice(0, count)
        if rows != self._last.rows:
            self._last = self._some(rows)
        return self._last

    def _some(self, rows: Rows) -> _Own:
        """Return the arrays of some rows: views of the first ones, copies of chosen ones."""
        w, *given, velocity, correction = (
            arrays if rows is None else {name: tensor[rows] for name, tensor in arrays.items()}
            for arrays in (self._w, *self._given, self._velocity, self._correction)
        )
        flat = [one for arrays in (w, *given, velocity, correction) for one in arrays.values()]
        flat += self._rate
        of = self._computation
        is_static = isinstance(rows, slice) and self._stacks.are_static(of.device)
        places = tuple(tensor.data_ptr() for tensor in flat) if is_static else ()
        form = self._tapes.number((of.names, of.trained, of.corrections, layout(flat), places))
        return _Own(rows, w, velocity, flat, len(places), form)

    def _label(self, own: _Own, batches: list[Batch], truth: Tensor) -> Targets:
        """Return what the teacher says, and count how much of it is true."""
        targets = self._call(own, batches, {}, descends=False)
        tensors = [self._groups, *targets.values(), truth, batches[-1].mask]
        form = ("audit", *targets, *layout(tensors))
        compute = partial(_audit, tuple(targets))
        counts = self._tapes.call(form, compute, tensors, min(1, own.num_static))
        self._counts.note(own.rows, counts)
        return targets

    def _follow(self, own: _Own, batches: list[Batch], targets: Targets) -> None:
        """Take a step with a teacher's targets, where they are reason enough for one."""
        go = goes(targets["step"]) if "step" in targets else None
        if go is None or bool(go.all()):
            self._descend(own, batches, targets)
            return
        some = go.nonzero().squeeze(-1)
        if not some.numel():
            return
        if own.num_static:  # a graph takes the step for all, and others back again
            counts = self._call(own, batches, targets, descends=True, partly=True)
            self._sums.note(some, {name: count[some] for name, count in counts.items()})
            return
        batches = [batch.each(lambda tensor: tensor[some]) for batch in batches]
        targets = {name: tensor[some] for name, tensor in targets.items()}
        mine = self._some(some)
        self._descend(mine, batches, targets)
        of = self._computation
        for place in of.moving:  # these were copies
            name = of.names[0][place]
            self._w[name][some] = mine.w[name]
        for name, tensor in mine.velocity.items():
            self._velocity[name][some] = tensor

    def _descend(self, own: _Own, batches: list[Batch], targets: Targets) -> None:
        counts = self._call(own, batches, targets, descends=True)
        self._sums.note(own.rows, counts)

    def _call(
        self,
        own: _Own,
        batches: list[Batch],
        targets: Targets,
        *,
        descends: bool,
        partly: bool = False,
    ) -> Outputs:
        """Call the loss or the teacher, for a client alone or for each row of a stack.

        Returns what `Computation.compute` does.
        """
        of = self._computation
        how, fields = laid_out(batches, targets, descends, partly)
        rest = [*targets.values(), *fields]
        form = (_known(of.loss if descends else of.teach), how, own.form, layout(rest))
        compute = partial(of.compute, how)
        return self._tapes.call(form, compute, [*own.flat, *rest], own.num_static)

    def check(self, batches: list[Batch]) -> None:
        """Raise `TypeError` if a step on them depends on what it mustn't."""
        arrays = self._last.flat[: self._computation.num_arrays]
        if self._lead:
            arrays = [one[:1] for one in arrays]
        check_loss(self._computation, arrays, batches)

    def end(self) -> None:
        """Add up what was noted, once for all rows."""
        self._log, self._steps = self._sums.totals()
        self._audited, _ = self._counts.totals()
        if self._last.num_static:  # the next pass takes the same memory
            self._w = {name: tensor.clone() for name, tensor in self._w.items()}

    def result(self, row: Any) -> tuple[Trained, Counts]:
        """Return what came out, after `end`, for a row of the stack; ``()`` for a client alone."""
        log = {name: float(total[row]) for name, total in self._log.items()}
        loss, steps = log.pop("loss of", 0.0), int(self._steps[row])
        log["train_loss"] = loss / steps if steps else float("nan")
        counts = {f"pseudo_{name}": float(total[row]) for name, total in self._audited.items()}
        w = {name: tensor[row] for name, tensor in self._w.items()} if self._lead else self._w
        return Trained(w, log), counts


def _like(trained: Weights, correction: Weights) -> Weights:
    """Return what corrects the gradient in the order of what is trained, if it is as that."""
    for name in sorted(trained.keys() | correction.keys()):
        if name not in trained:
            raise ValueError(
                f"correction has {name!r}, which this pass doesn't train; the model's parameters "
                "are client.trainable, to which statistics of BatchNorm don't belong"
            )
        if name not in correction:
            raise ValueError(f"correction lacks {name!r}, which this pass trains")
        if correction[name].shape != trained[name].shape:
            shapes = [list(of[name].shape) for of in (correction, trained)]
            raise ValueError(
                f"correction: {name!r} has the shape {shapes[0]}, what is trained {shapes[1]}"
            )
    return {name: correction[name].to(tensor.dtype) for name, tensor in trained.items()}


def _num_steps(context: PassContext, request: SGD) -> int:
    return context.training.num_steps(*request.kinds, steps=request.steps, epochs=request.epochs)


def code_of(function: Callable[..., Any] | None) -> Hashable:
    """Return what functions have in common that are one text, made anew for each client."""
    while isinstance(function, partial):
        function = function.func
    return function.__code__ if isinstance(function, FunctionType) else function


def _known(function: Callable[..., Any] | None) -> Hashable:
    """Return what stands for a function among the forms, without keeping alive what it holds."""
    # A bound method is made anew each time it is looked up: it is known by what it is bound to.
    return ref(function) if isinstance(function, FunctionType | partial) else function


def _audit(names: tuple[str, ...], groups: Tensor, *tensors: Tensor) -> Outputs:
    """Call `audit` with targets of these names."""
    *targets, truth, mask = tensors
    return audit(groups, dict(zip(names, targets, strict=True)), truth, mask)

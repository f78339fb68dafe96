"""Mini-batches of a client's examples, drawn from the one copy of the data.

Shapes: B examples in a batch, K clients side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.augment import StrongAugmentation, WeakAugmentation
from fedsim.data.federation import Federation
from fedsim.data.statistics import Statistics
from fedsim.data.transfer import to_device
from fedsim.engine.requests import SGD, Batch, Examples
from fedsim.models.layers import channels_last

PREDICT_BLOCK = 250
"""Examples in a forward pass of evaluation. Fixed, so that rounding doesn't depend on how the
blocks are shared out among the workers."""

LOOK_AHEAD_EXAMPLES = 256
"""Examples that are looked up and augmented at a time: many steps' where batches are small, so
that a step costs little more than its arithmetic."""
GPU_LOOK_AHEAD_BYTES = 2**27
"""As many inputs are looked up at a time for clients side by side on a GPU, which takes long to
begin; strong augmentation works with some ten times as much."""


def epochs(
    rng: np.random.Generator, count: int, batch_size: int, steps: int
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Yield the positions (0 <= position < count) of the examples of each epoch, and its steps.

    Every epoch is a fresh permutation; the last one may be cut short.
    """
    while steps > 0 and count > 0:
        taken = min(ceil(count / batch_size), steps)
        yield rng.permutation(count)[: taken * batch_size], taken
        steps -= taken


def plan(
    rng: np.random.Generator, count: int, batch_size: int, steps: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the positions of the examples of each step; see `epochs`.

    The last batch of an epoch may be smaller.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> [len(batch) for batch in plan(rng, 5, 2, steps=4)]
    [2, 2, 1, 2]
    """
    for order, _ in epochs(rng, count, batch_size, steps):
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


class Split:
    """The training or the test examples, by their index.

    For the processor they are looked up where they are, maybe in read-only shared memory; any
    other device gets a copy of its own, once, as bytes where the source has bytes.
    """

    def __init__(self, x: NDArray[Any], y: NDArray[np.int64], device: torch.device) -> None:
        self._x, self._y = x, y
        self._device = device
        self._copy: tuple[Tensor, Tensor] | None = None
        if device.type != "cpu":
            self._copy = torch.tensor(x, device=device), torch.tensor(y, device=device)

    def inputs(self, index: NDArray[np.integer[Any]]) -> Tensor:
        """Return the raw inputs [..., ...] of an index of any shape."""
        if self._copy is None:
            return torch.from_numpy(self._x[index])
        return self._copy[0][to_device(index, self._device)]

    def labels(self, index: NDArray[np.integer[Any]]) -> Tensor:
        """Return the labels of an index of any shape, int64."""
        if self._copy is None:
            return torch.from_numpy(self._y[index])
        return self._copy[1][to_device(index, self._device)]


class Drawn(NamedTuple):
    """Examples that were drawn, and how their views are made."""

    examples: NDArray[np.int64]
    """Their index in the training data, [...]."""
    weak: NDArray[np.int64] | None
    """What `WeakAugmentation` draws, [..., 3]."""
    strong: NDArray[np.float64] | None
    """What `StrongAugmentation` draws, [..., 7]."""

    def each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Drawn:
        """Return them with each array changed."""
        return Drawn(
            change(self.examples),
            None if self.weak is None else change(self.weak),
            None if self.strong is None else change(self.strong),
        )

    def part(self, begin: int, end: int) -> Drawn:
        """Return some of them."""
        return self.each(lambda of: of[begin:end])


class Loader:
    """Looks examples up, augments and normalises them.

    Parameters
    ----------
    federation : Federation
        The data; may be backed by read-only shared memory.
    statistics : Statistics
        Of its training data.
    batch_size : int
        Examples in a batch.
    augmentation : {"none", "weak"}
        What the inputs of a batch go through; the strong view is made where a pass asks for it.
    device : str or torch.device
        Where the batches are made.
    """

    def __init__(
        self,
        federation: Federation,
        statistics: Statistics,
        batch_size: int,
        augmentation: Literal["none", "weak"],
        device: str | torch.device = "cpu",
    ) -> None:
        self._federation = federation
        self._statistics = statistics
        self._batch_size = batch_size
        # [channels] of images, [D] of vectors.
        trailing = (1,) * (federation.source.x_train.ndim - 2)
        self._device = torch.device(device)
        self._look_ahead = LOOK_AHEAD_EXAMPLES
        if self._device.type != "cpu":
            of_one = 4 * prod(federation.source.x_train.shape[1:])
            self._look_ahead = GPU_LOOK_AHEAD_BYTES // of_one
        self._mean = torch.tensor(statistics.mean, device=device).view(-1, *trailing)
        self._std = torch.tensor(statistics.std, device=device).view(-1, *trailing)
        source = federation.source
        self.train = Split(source.x_train, source.y_train, self._device)
        self.test = Split(source.x_test, source.y_test, self._device)
        self._weak: WeakAugmentation | None = None
        if augmentation == "weak":
            self._weak = WeakAugmentation(self._side, federation.source.flip)

    @cached_property
    def widest(self) -> int:
        """The most examples that a batch can have; only a GPU asks."""
        return min(self._batch_size, int(np.diff(self._federation.train_offsets).max()))

    @property
    def _side(self) -> int:
        height, width = self._federation.source.x_train.shape[2:]
        return min(int(height), int(width))

    def batches(
        self, examples: Examples, rng: np.random.Generator, steps: int, strong: bool
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches of a pass, each with its true labels.

        The true labels [B] are for the simulator's records; the batch has those the client has.
        """
        for block, truth, sizes in self.blocks(examples, rng, steps, strong):
            yield from zip(block.split(sizes), torch.split(truth, sizes), strict=True)

    def blocks(
        self, examples: Examples, rng: np.random.Generator, steps: int, strong: bool
    ) -> Iterator[tuple[Batch, Tensor, list[int]]]:
        """Yield the batches of several steps as one, with their true labels and their sizes.

        Two passes of equally many steps are cut into blocks at the same steps.
        """
        for drawn, sizes in self._drawn(examples, rng, steps, strong):
            x, strong_x = self._augmented(drawn)
            truth = self.train.labels(drawn.examples)
            y = truth if examples.labelled else torch.full_like(truth, -1)
            mask = torch.ones(len(truth), device=self._device)
            yield Batch(x, y, mask, strong_x, padded=False), truth, sizes

    def _drawn(
        self, examples: Examples, rng: np.random.Generator, steps: int, strong: bool
    ) -> Iterator[tuple[Drawn, list[int]]]:
        """Yield the examples of several steps at a time, and how many each step has."""
        index = np.asarray(examples.index)
        planned = plan(rng, len(index), self._batch_size, steps)
        while ahead := list(islice(planned, max(1, LOOK_AHEAD_EXAMPLES // self._batch_size))):
            sizes = [len(positions) for positions in ahead]
            weak = self._weak.draw(rng, sum(sizes)) if self._weak is not None else None
            hard = self._strong.draw(rng, sum(sizes)) if strong else None
            yield Drawn(index[np.concatenate(ahead)], weak, hard), sizes

    def _augmented(self, drawn: Drawn) -> tuple[Tensor, Tensor | None]:
        """Return the inputs [B, ...] and, where they were drawn for it, their strong view."""
        # As bytes, as long as it goes: normalised inputs are four times as much to move.
        raw = x = self.train.inputs(drawn.examples)
        if drawn.weak is not None:
            assert self._weak is not None, "it made the draws"
            x = self._weak(raw, drawn.weak)
        if drawn.strong is None:
            return self.normalise(x), None
        return self.normalise(x), self.normalise(self._strong(raw.float(), drawn.strong))

    def inputs(self, examples: Examples) -> Tensor:
        """Return all inputs, normalised, in order."""
        return self.normalise(self.train.inputs(np.asarray(examples.index)))

    def normalise(self, x: Tensor) -> Tensor:
        """Return raw inputs such that all of the source's would have mean 0 and deviation 1."""
        # In place on a copy: memory is dear where a step is short.
        copy = x.to(torch.float32, copy=True)
        return channels_last(copy.sub_(self._mean).div_(self._std))

    @cached_property
    def _strong(self) -> StrongAugmentation:
        flip = self._federation.source.flip
        return StrongAugmentation(self._side, flip, self._statistics.low, self._statistics.high)

    # ----- many clients side by side -------------------------------------------------------

    def stacked(
        self,
        passes: Sequence[tuple[SGD, Sequence[np.random.Generator]]],
        steps: NDArray[np.int64],
        strong: bool,
    ) -> Iterator[tuple[list[Batch], Tensor]]:
        """Yield the steps of the passes of K clients, of which the first ones take each.

        Parameters
        ----------
        passes : sequence of (SGD, generators)
            Requests of the same form, the longest pass first.
        steps : ndarray of int [K]
            Their steps.
        strong : bool
            Whether unlabelled batches also hold strongly augmented inputs.

        Yields
        ------
        batches, truth
            As `fedsim.engine.sgd.Step` says.
        """
        kinds = passes[0][0].kinds
        sources = [
            self._side_by_side(
                [(request.kinds[i], rngs[i]) for request, rngs in passes],
                steps,
                strong and not kind.labelled,
            )
            for i, kind in enumerate(kinds)
        ]
        for found in zip(*sources, strict=True):
            yield [batch for batch, _ in found], found[-1][1]

    def _side_by_side(
        self,
        parts: Sequence[tuple[Examples, np.random.Generator]],
        steps: NDArray[np.int64],
        strong: bool,
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches [K, B] of each step and their true labels."""
        planned = self._plan(parts, steps, strong)
        is_real = planned.examples >= 0
        active = (steps[:, None] > np.arange(planned.examples.shape[1])).sum(axis=0).tolist()
        if self._device.type == "cpu":
            widths = is_real.sum(axis=2).max(axis=0, initial=0).tolist()
        else:
            # Padding costs a GPU little, and a step of another shape a graph of its own.
            widths = [self.widest] * len(active)
        shapes = list(zip(active, widths, strict=True))
        lengths = [k * b for k, b in shapes]

        def in_turn(of: NDArray[Any]) -> NDArray[Any]:
            """Return what is there for each step, one step after the other."""
            rest = of.shape[3:]
            by_step = [of[:k, i, :b].reshape(-1, *rest) for i, (k, b) in enumerate(shapes)]
            return np.concatenate([*by_step, np.empty((0, *rest), of.dtype)])

        masks = to_device(in_turn(is_real).astype(np.float32), self._device)
        # A client's own: a label that it lacks may be one for which its loss has no number.
        first = planned.examples[:, :1, :1]
        np.copyto(planned.examples, first, where=~is_real)
        drawn = planned.each(in_turn)
        truth = self.train.labels(drawn.examples)
        y = truth if parts[0][0].labelled else torch.full_like(truth, -1)
        steps_of = (torch.split(one, lengths) for one in (y, masks, truth))
        inputs = self._ahead(drawn, lengths)
        for shape, (weak, strong_x), *of_step in zip(shapes, inputs, *steps_of, strict=True):
            labels, mask, own_truth = (one.view(shape) for one in of_step)
            x = weak.view(*shape, *weak.shape[1:])
            strong_x = None if strong_x is None else strong_x.view(x.shape)
            yield Batch(x, labels, mask, strong_x), own_truth

    def _plan(
        self,
        parts: Sequence[tuple[Examples, np.random.Generator]],
        steps: NDArray[np.int64],
        strong: bool,
    ) -> Drawn:
        """Return the examples [K, steps, batch size] of clients, -1 where there is none."""
        width = self._batch_size
        shape = len(parts), int(steps.max(initial=0)), width
        planned = Drawn(
            np.full(shape, -1),
            None if self._weak is None else np.zeros((*shape, 3), np.int64),
            np.zeros((*shape, 7)) if strong else None,
        )
        for row, ((own, rng), count) in enumerate(zip(parts, steps.tolist(), strict=True)):
            begin = 0
            if self._weak is None and not strong:
                index, mine = np.asarray(own.index), planned.examples[row].reshape(-1)
                for order, taken in epochs(rng, len(index), width, count):
                    mine[begin : begin + len(order)] = index[order]
                    begin += taken * width
                continue
            for drawn, sizes in self._drawn(own, rng, count, strong):
                # Only the last batch of an epoch may be smaller.
                places = (
                    np.repeat(np.arange(begin, begin + len(sizes)), sizes),
                    np.concatenate([np.arange(size) for size in sizes]),
                )
                for to, of in zip(planned, drawn, strict=True):
                    if to is not None:
                        to[row][places] = of
                begin += len(sizes)
        return planned

    def _ahead(self, drawn: Drawn, lengths: list[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the inputs of steps of these lengths, looked up for some steps at a time."""
        begin = done = 0
        while done < len(lengths):
            # The number of examples falls: to the end, clients leave.
            end = done + max(1, self._look_ahead // lengths[done])
            some = lengths[done:end]
            stop = begin + sum(some)
            x, strong_x = self._augmented(drawn.part(begin, stop))
            strong = [None] * len(some) if strong_x is None else torch.split(strong_x, some)
            yield from zip(torch.split(x, some), strong, strict=True)
            begin, done = stop, end

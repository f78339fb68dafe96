"""Mini-batches of a client's examples, drawn from the one copy of the data.

Shapes: B examples in a batch, K clients side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.augment import StrongAugmentation, WeakAugmentation
from fedsim.data.federation import Federation
from fedsim.data.statistics import Statistics
from fedsim.engine.update import SGD, Batch, Examples
from fedsim.models.layers import channels_last

LOOK_AHEAD = 256
"""Examples that are looked up and augmented at a time: many steps' where batches are small, so
that a step costs little more than its arithmetic."""


def epoch_steps(counts: list[int], batch_size: int) -> int:
    """Return the steps of an epoch over one or several kinds of examples.

    The largest kind is gone through once; without examples of any one kind there is no step.

    Examples
    --------
    >>> epoch_steps([5], 2), epoch_steps([5, 12], 2), epoch_steps([0, 12], 2)
    (3, 6, 0)
    """
    return ceil(max(counts) / batch_size) if min(counts) else 0


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
        return self._copy[0][torch.from_numpy(index).to(self._device)]

    def labels(self, index: NDArray[np.integer[Any]]) -> Tensor:
        """Return the labels of an index of any shape, int64."""
        if self._copy is None:
            return torch.from_numpy(self._y[index])
        return self._copy[1][torch.from_numpy(index).to(self._device)]


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
        self._mean = torch.tensor(statistics.mean, device=device).view(-1, *trailing)
        self._std = torch.tensor(statistics.std, device=device).view(-1, *trailing)
        source = federation.source
        self.train = Split(source.x_train, source.y_train, self._device)
        self.test = Split(source.x_test, source.y_test, self._device)
        self._weak: WeakAugmentation | None = None
        if augmentation == "weak":
            self._weak = WeakAugmentation(self._side, federation.source.flip)
        self._strong: StrongAugmentation | None = None

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

        The blocks of two passes of as many steps go over as many of them each.
        """
        index = np.asarray(examples.index)
        planned = plan(rng, len(index), self._batch_size, steps)
        while ahead := list(islice(planned, max(1, LOOK_AHEAD // self._batch_size))):
            sizes = [len(positions) for positions in ahead]
            chosen = index[np.concatenate(ahead)]
            # As bytes, as long as it goes: normalised inputs are four times as much to move.
            raw, truth = self.train.inputs(chosen), self.train.labels(chosen)
            weak = raw
            if self._weak is not None:
                weak = self._weak(raw, self._weak.draw(rng, len(chosen)))
            batch = Batch(
                self.normalise(weak),
                truth if examples.labelled else torch.full_like(truth, -1),
                torch.ones(len(chosen), device=self._device),
                self._strong_view(raw, rng) if strong else None,
                padded=False,
            )
            yield batch, truth, sizes

    def inputs(self, examples: Examples) -> Tensor:
        """Return all inputs, normalised, in order."""
        return self.normalise(self.train.inputs(np.asarray(examples.index)))

    def normalise(self, x: Tensor) -> Tensor:
        """Return raw inputs with the training data's mean 0 and standard deviation 1."""
        # In place on a copy: memory is dear where a step is short.
        copy = x.to(torch.float32, copy=True)
        return channels_last(copy.sub_(self._mean).div_(self._std))

    def _strong_view(self, raw: Tensor, rng: np.random.Generator) -> Tensor:
        if self._strong is None:
            flip = self._federation.source.flip
            self._strong = StrongAugmentation(
                self._side, flip, self._statistics.low, self._statistics.high
            )
        draws = self._strong.draw(rng, len(raw))
        return self.normalise(self._strong(raw.float(), draws))

    # ----- many clients side by side -------------------------------------------------------

    def stacked(
        self,
        passes: Sequence[tuple[SGD, Sequence[np.random.Generator]]],
        steps: NDArray[np.int64],
        strong: bool,
        pad: bool,
    ) -> Iterator[tuple[slice | Tensor, list[Batch], Tensor]]:
        """Yield the steps of the passes of K clients, each with the rows that take it.

        Parameters
        ----------
        passes : sequence of (SGD, generators)
            Requests of the same form, the longest pass first.
        steps : ndarray of int [K]
            Their steps.
        strong : bool
            Whether unlabelled batches also hold strongly augmented inputs.
        pad : bool
            Whether the batches of a step are padded to one size; otherwise there is a step for
            each size.

        Yields
        ------
        rows, batches, truth
            As `fedsim.engine.sgd.Step` says.
        """
        kinds = range(len(passes[0][0].kinds))
        sources = [
            self._indexed([(r.kinds[i], rngs[i]) for r, rngs in passes], steps)
            if self._weak is None and not (strong and not passes[0][0].kinds[i].labelled)
            else self._streamed([(r.kinds[i], rngs[i]) for r, rngs in passes], steps, strong)
            for i in kinds
        ]
        for found in zip(*sources, strict=True):
            batches = [batch for batch, _, _ in found]
            truth = found[-1][1]
            if pad:
                yield slice(0, len(truth)), batches, truth
                continue
            sizes = np.stack([counts for _, _, counts in found], axis=1)
            for size in np.unique(sizes, axis=0):
                same = np.flatnonzero((sizes == size).all(axis=1))
                if len(same) == len(sizes):
                    yield slice(0, len(sizes)), batches, truth
                    break
                rows = torch.from_numpy(same).to(self._device)
                some = [
                    _chosen(batch, rows, width)
                    for batch, width in zip(batches, size.tolist(), strict=True)
                ]
                yield rows, some, truth[rows, : int(size[-1])]

    def _indexed(
        self,
        parts: Sequence[tuple[Examples, np.random.Generator]],
        steps: NDArray[np.int64],
    ) -> Iterator[tuple[Batch, Tensor, NDArray[np.int64]]]:
        """Yield the batches [K, B] of each step, looked up in the one copy of the data.

        With the true labels and the number of each client's examples [K]. B is the largest of
        these numbers.
        """
        total, width = int(steps.max(initial=0)), self._batch_size
        planned = np.full((len(parts), total * width), -1)
        for row, (own, rng) in enumerate(parts):
            own_index, begin = np.asarray(own.index), 0
            for order, taken in epochs(rng, len(own_index), width, int(steps[row])):
                planned[row, begin : begin + len(order)] = own_index[order]
                begin += taken * width
        examples = planned.reshape(len(parts), total, width)
        sizes = (examples >= 0).sum(axis=2)
        active = (steps[:, None] > np.arange(total)).sum(axis=0).tolist()
        shapes = list(zip(active, sizes.max(axis=0, initial=0).tolist(), strict=True))
        by_step = [examples[:k, step, :b].ravel() for step, (k, b) in enumerate(shapes)]
        lengths = [len(of_step) for of_step in by_step]
        index = np.concatenate([*by_step, np.empty(0, np.int64)])
        masks = torch.from_numpy((index >= 0).astype(np.float32)).to(self._device)
        index = index.clip(min=0)
        truth = self.train.labels(index)
        y = truth if parts[0][0].labelled else torch.full_like(truth, -1)
        small = zip(*(torch.split(one, lengths) for one in (y, masks, truth)), strict=True)
        x = self._ahead(index, lengths)
        for shape, of_step, inputs, size in zip(shapes, small, x, sizes.T, strict=True):
            labels, mask, own_truth = (one.view(shape) for one in of_step)
            batch = Batch(inputs.view(*shape, *inputs.shape[1:]), labels, mask)
            yield batch, own_truth, size[: shape[0]]

    def _ahead(self, index: NDArray[np.int64], lengths: list[int]) -> Iterator[Tensor]:
        """Yield the inputs of steps of these lengths, looked up for some steps at a time."""
        begin = done = 0
        while done < len(lengths):
            # The number of examples falls: to the end, clients leave.
            end = done + max(1, LOOK_AHEAD // lengths[done])
            some = lengths[done:end]
            yield from torch.split(
                self.normalise(self.train.inputs(index[begin : begin + sum(some)])), some
            )
            begin, done = begin + sum(some), end

    def _streamed(
        self,
        parts: Sequence[tuple[Examples, np.random.Generator]],
        steps: NDArray[np.int64],
        strong: bool,
    ) -> Iterator[tuple[Batch, Tensor, NDArray[np.int64]]]:
        """Yield the same, put together from the batches of each client."""
        streams = [
            self.batches(examples, rng, int(count), strong and not examples.labelled)
            for (examples, rng), count in zip(parts, steps, strict=True)
        ]
        for step in range(int(steps.max(initial=0))):
            found = [next(stream) for stream in streams[: int((steps > step).sum())]]
            batches = [batch for batch, _ in found]
            views = [batch.strong for batch in batches if batch.strong is not None]
            yield (
                Batch(
                    _padded([batch.x for batch in batches]),
                    _padded([batch.y for batch in batches]),
                    _padded([batch.mask for batch in batches]),
                    _padded(views) if views else None,
                ),
                _padded([truth for _, truth in found]),
                np.array([len(batch.y) for batch in batches]),
            )


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors [b, ...] to [K, B, ...], B the largest b, with zeros after the end."""
    width = max(map(len, tensors))
    stacked = tensors[0].new_zeros(len(tensors), width, *tensors[0].shape[1:])
    for row, tensor in zip(stacked, tensors, strict=True):
        row[: len(tensor)] = tensor
    return stacked


def _chosen(batch: Batch, rows: Tensor, width: int) -> Batch:
    """Return some rows of a batch [K, B], which have ``width`` examples each."""
    return batch.each(lambda tensor: tensor[rows, :width])

"""Mini-batches of a client's examples, drawn from the one copy of the data.

Shapes: B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.augment import StrongAugmentation, WeakAugmentation
from fedsim.data.federation import Federation
from fedsim.data.statistics import Statistics
from fedsim.engine.update import Batch, Examples
from fedsim.models.layers import channels_last


def epoch_steps(counts: list[int], batch_size: int) -> int:
    """Return the steps of an epoch over one or several kinds of examples.

    The largest kind is gone through once; without examples of any one kind there is no step.

    Examples
    --------
    >>> epoch_steps([5], 2), epoch_steps([5, 12], 2), epoch_steps([0, 12], 2)
    (3, 6, 0)
    """
    return ceil(max(counts) / batch_size) if min(counts) else 0


def plan(
    rng: np.random.Generator, count: int, batch_size: int, steps: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the positions (0 <= position < count) of the examples of each step.

    Every epoch is a fresh permutation; its last batch may be smaller.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> [len(batch) for batch in plan(rng, 5, 2, steps=4)]
    [2, 2, 1, 2]
    """
    while steps > 0 and count > 0:
        order = rng.permutation(count)
        for start in range(0, count, batch_size)[:steps]:
            yield order[start : start + batch_size]
            steps -= 1


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
    """

    def __init__(
        self,
        federation: Federation,
        statistics: Statistics,
        batch_size: int,
        augmentation: Literal["none", "weak"],
    ) -> None:
        self._federation = federation
        self._statistics = statistics
        self._batch_size = batch_size
        # [channels] of images, [D] of vectors.
        trailing = (1,) * (federation.source.x_train.ndim - 2)
        self._mean = torch.tensor(statistics.mean).view(-1, *trailing)
        self._std = torch.tensor(statistics.std).view(-1, *trailing)
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
        index = np.asarray(examples.index)
        raw = torch.from_numpy(self._federation.source.x_train[index])
        truth = torch.from_numpy(self._federation.source.y_train[index])
        y = truth if examples.labelled else torch.full_like(truth, -1)
        # Without augmentation the inputs of all epochs are the same: normalise them once.
        x = self.normalise(raw) if self._weak is None else None
        for positions in plan(rng, len(index), self._batch_size, steps):
            chosen = torch.from_numpy(positions)
            if x is not None:
                view = channels_last(x[chosen])
            else:
                assert self._weak is not None, "no augmentation means normalised inputs"
                view = self.normalise(self._weak(raw[chosen], self._weak.draw(rng, len(chosen))))
            strong_view = self._strong_view(raw[chosen], rng) if strong else None
            yield Batch(view, y[chosen], torch.ones(len(chosen)), strong_view), truth[chosen]

    def inputs(self, examples: Examples) -> Tensor:
        """Return all inputs, normalised, in order."""
        index = np.asarray(examples.index)
        return self.normalise(torch.from_numpy(self._federation.source.x_train[index]))

    def normalise(self, x: Tensor) -> Tensor:
        """Return raw inputs with the training data's mean 0 and standard deviation 1."""
        return channels_last((x.float() - self._mean) / self._std)

    def _strong_view(self, raw: Tensor, rng: np.random.Generator) -> Tensor:
        if self._strong is None:
            flip = self._federation.source.flip
            self._strong = StrongAugmentation(
                self._side, flip, self._statistics.low, self._statistics.high
            )
        draws = self._strong.draw(rng, len(raw))
        return self.normalise(self._strong(raw.float(), draws))

"""Augmentation of batches of images, from numbers drawn beforehand.

Drawing is apart from applying, so that the numbers depend only on (seed, round, client) and the
same draws give the same images on any device, for one client or for many.

Shapes: B images in a batch of c channels, H x W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

CROP = 8
"""Random crops shift an image by up to 1/8 of its side: 4 of 32 pixels, as usual for CIFAR."""


class WeakAugmentation:
    """A random crop of the zero-padded image and, where it keeps the meaning, a random flip.

    Parameters
    ----------
    side : int
        The smaller side of an image, pixels.
    flip : bool
        Whether to flip half of the images left to right.

    Examples
    --------
    >>> weak = WeakAugmentation(side=8, flip=False)
    >>> x = torch.arange(64.0).reshape(1, 1, 8, 8)
    >>> left_by_one = np.array([[1, 2, 0]])
    >>> weak(x, left_by_one)[0, 0, 0]
    tensor([1., 2., 3., 4., 5., 6., 7., 0.])
    """

    def __init__(self, side: int, flip: bool) -> None:
        self.padding = max(1, side // CROP)
        self.flip = flip

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return [count, 3] draws: offsets down and right in 0..2*padding, and 1 for a flip."""
        draws: NDArray[Any] = rng.integers(0, 2 * self.padding + 1, size=(count, 3))
        draws[:, 2] = rng.integers(0, 2, size=count) if self.flip else 0
        return draws

    def __call__(self, x: Tensor, draws: NDArray[np.int64]) -> Tensor:
        """Return the images [B, c, H, W] cropped and flipped as ``draws`` [B, 3] say."""
        height, width = x.shape[-2:]
        d = torch.from_numpy(draws).to(x.device)
        rows = d[:, 0, None] + torch.arange(height, device=x.device)
        columns = d[:, 1, None] + torch.arange(width, device=x.device)
        columns = torch.where(d[:, 2, None] == 1, columns.flip(1), columns)
        padded = F.pad(x, (self.padding,) * 4)
        image = torch.arange(len(x), device=x.device)[:, None, None]
        # Advanced indices on both sides of the channel axis put it last.
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

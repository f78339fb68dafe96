"""Augmentation of batches of images, from numbers drawn beforehand.

Drawing is apart from applying, so that the numbers depend only on (seed, round, client) and the
same draws give the same images on any device, for one client or for many.

Shapes: B images in a batch of c channels, H x W pixels.
"""

from __future__ import annotations

from math import radians, tan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedsim.data.transfer import to_device

CROP_DIVISOR = 8
"""Random crops shift an image by up to 1/8 of its side: 4 of 32 pixels, as usual for CIFAR."""

ROTATION = 15.0
"""Strong augmentation without RandAugment turns an image by up to so many degrees."""

HOLE_DIVISOR = 4
"""Strong augmentation without RandAugment erases a square of up to 1/4 of the side."""

OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""What RandAugment chooses from, see `StrongAugmentation`."""

_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


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
        self.padding = max(1, side // CROP_DIVISOR)
        self.flip = flip

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return [count, 3] draws: offsets down and right in 0..2*padding, and 1 for a flip."""
        draws: NDArray[Any] = rng.integers(0, 2 * self.padding + 1, size=(count, 3))
        draws[:, 2] = rng.integers(0, 2, size=count) if self.flip else 0
        return draws

    def __call__(self, x: Tensor, draws: NDArray[np.int64]) -> Tensor:
        """Return the images [B, c, H, W] cropped and flipped as ``draws`` [B, 3] say."""
        height, width = x.shape[-2:]
        d = to_device(draws, x.device)
        rows = d[:, 0, None] + torch.arange(height, device=x.device)
        columns = d[:, 1, None] + torch.arange(width, device=x.device)
        columns = torch.where(d[:, 2, None] == 1, columns.flip(1), columns)
        padded = F.pad(x, (self.padding,) * 4)
        image = torch.arange(len(x), device=x.device)[:, None, None]
        # Advanced indices on both sides of the channel axis put it last.
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class StrongAugmentation:
    """Changes an image as much as it can bear while a person still recognises it.

    **Where a flip keeps the meaning** (photographs, clothes): RandAugment(n=1, m=10), then the
    weak augmentation. Each image draws one of 15 operations; the values, for pixels in 0..1, are
    those that kornia's RandAugment uses for m = 10 of 30. Signs are drawn.

    ============================  ================================================================
    auto_contrast, equalize       stretches, or evens out, the values of each channel
    invert                        1 - x
    posterize                     6 of 8 bits are kept
    solarize                      values >= 1/3 are inverted
    solarize_add                  0.143 is added, then values >= a threshold drawn from 0..1 are
                                  inverted
    color                         saturation x 0.7; images that don't have 3 channels stay
    contrast, brightness          x * 0.7; x - 0.3
    sharpness                     30 % of the way to the smoothed image; its border stays
    rotate, shear_x, shear_y      by 10 degrees; by 18 degrees
    translate_x, translate_y      by 1/30 of the width; of the height
    ============================  ================================================================

    kornia's own class draws one operation for a whole batch. Here each image has its own: the
    functions of kornia.enhance run once for the images that drew them, and all geometric
    operations are one resampling.

    **Elsewhere** (digits): rotation by up to `ROTATION` degrees; a shift by up to 1/4 of the side,
    1/8 more than the weak augmentation, small shifts more often than large ones; a square of 0 to
    1/4 of the side erased anywhere.

    What comes in from outside of the image, and what is erased, has the value ``low``.

    Parameters
    ----------
    side : int
        The smaller side of an image, pixels.
    flip : bool
        Whether a flip keeps an image's meaning.
    low, high : float
        The smallest and the largest raw pixel value of the training images.

    References
    ----------
    Cubuk, Zoph, Shlens, Le, "RandAugment: Practical Automated Data Augmentation with a Reduced
    Search Space", CVPR Workshops 2020.

    Examples
    --------
    >>> strong = StrongAugmentation(side=8, flip=False, low=0, high=16)
    >>> x = torch.full((2, 1, 8, 8), 16.0)
    >>> strong(x, strong.draw(np.random.default_rng(0), 2)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, side: int, flip: bool, low: float, high: float) -> None:
        self.flip = flip
        self.low = float(low)
        self.high = float(high)
        self.hole = side // HOLE_DIVISOR
        self._crop = WeakAugmentation(side if flip else 2 * side, flip)

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Return draws [count, 7]: three as `WeakAugmentation.draw` has them, then four others.

        With flips: the operation's place in `OPERATIONS`, a sign, a threshold in [0, 1), and 0.
        Without: the angle in degrees, the side of the erased square in pixels, and two numbers in
        [0, 1) for its place down and to the right.
        """
        crop = self._crop.draw(rng, count)
        if self.flip:
            operation = rng.integers(0, len(OPERATIONS), size=count)
            sign = rng.choice((-1.0, 1.0), size=count)
            other = np.stack([operation, sign, rng.random(count), np.zeros(count)], axis=1)
        else:
            # Small shifts more often than large ones, which cut off a part of what fills the image.
            crop[:, :2] = rng.integers(0, self._crop.padding + 1, size=(2, count, 2)).sum(axis=0)
            angle = rng.uniform(-ROTATION, ROTATION, size=count)
            hole = rng.integers(0, self.hole + 1, size=count)
            other = np.concatenate(
                [np.stack([angle, hole], axis=1), rng.random((count, 2))], axis=1
            )
        return np.concatenate([crop, other], axis=1)

    @torch.no_grad()
    def __call__(self, x: Tensor, draws: NDArray[np.float64]) -> Tensor:
        """Return the images changed as ``draws`` [B, 7] say.

        Parameters
        ----------
        x : float32 or uint8 [B, c, H, W]
            Images in raw units, from ``low`` to ``high``.
        draws : float64 [B, 7]
            From `draw`.

        Returns
        -------
        float32 [B, c, H, W]
            In raw units, from ``low`` to ``high``.
        """
        span = (self.high - self.low) or 1.0
        unit = ((x - self.low) / span).clamp(0.0, 1.0)
        if self.flip:
            unit = _rand_augment(unit, draws[:, 3:])
        else:
            unit = _warp(unit, _rotations(draws[:, 3]))
        unit = self._crop(unit, draws[:, :3].astype(np.int64))
        if not self.flip:
            unit = _erase(unit, draws[:, 4:])
        return (self.low + span * unit).clamp(self.low, self.high)


def _rand_augment(x: Tensor, draws: NDArray[np.float64]) -> Tensor:
    """Apply to each image [B, c, H, W] in 0..1 the operation that its row of ``draws`` names."""
    result = x.clone()
    names = np.array(OPERATIONS)[draws[:, 0].astype(np.int64)]
    moved = np.flatnonzero(np.isin(names, _GEOMETRIC))
    if moved.size:
        matrices = _matrices(names[moved], draws[moved, 1], *x.shape[-2:])
        chosen = to_device(moved, x.device)
        result[chosen] = _warp(x[chosen], matrices)
    for name in OPERATIONS:
        members = np.flatnonzero(names == name)
        if members.size and name not in _GEOMETRIC:
            chosen = to_device(members, x.device)
            threshold = to_device(draws[members, 2], x.device).to(x)
            result[chosen] = _change_values(name, x[chosen], threshold)
    return result


def _change_values(name: str, x: Tensor, threshold: Tensor) -> Tensor:
    # Imported only where it is used: half a second that other experiments needn't wait.
    from kornia import enhance

    changed: Tensor
    match name:
        case "auto_contrast":
            changed = enhance.normalize_min_max(x)
        case "equalize":
            changed = enhance.equalize(x)
        case "invert":
            changed = 1.0 - x
        case "posterize":
            changed = enhance.posterize(x, 6)
        case "solarize":
            changed = enhance.solarize(x, 1 / 3)
        case "solarize_add":
            changed = enhance.solarize(x, threshold, 0.43 / 3)
        case "color":
            changed = enhance.adjust_saturation(x, 0.7) if x.shape[1] == 3 else x
        case "contrast":
            changed = enhance.adjust_contrast(x, 0.7)
        case "brightness":
            changed = enhance.adjust_brightness(x, -0.3)
        case "sharpness":
            # What lies on the border stays, so an image that is all border stays, too.
            changed = enhance.sharpness(x, 0.7) if min(x.shape[-2:]) >= 3 else x
        case _:
            raise AssertionError(name)
    return changed.clamp(0.0, 1.0)


def _matrices(
    names: NDArray[np.str_], sign: NDArray[np.float64], height: int, width: int
) -> NDArray[np.float64]:
    """Return the matrices [B, 2, 3] that `_warp` needs for geometric operations."""
    matrices = _rotations(np.where(names == "rotate", 10.0 * sign, 0.0))
    shear = tan(radians(18.0)) * sign
    matrices[:, 0, 1] += np.where(names == "shear_x", shear, 0.0)
    matrices[:, 1, 0] += np.where(names == "shear_y", shear, 0.0)
    matrices[:, 0, 2] = np.where(names == "translate_x", -sign * width / 30, 0.0)
    matrices[:, 1, 2] = np.where(names == "translate_y", -sign * height / 30, 0.0)
    return matrices


def _rotations(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    cos, sin, zero = np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), 0.0 * degrees
    return np.stack([cos, -sin, zero, sin, cos, zero], axis=1).reshape(-1, 2, 3)


def _warp(x: Tensor, matrices: NDArray[np.float64]) -> Tensor:
    """Resample images bilinearly, with 0 outside.

    ``matrices`` [B, 2, 3] lead from a pixel of the result to where it is read, both (right, down)
    from the centre, in pixels.
    """
    height, width = x.shape[-2:]
    # PyTorch measures both axes in halves of the image's sides.
    scale = np.array([[1.0, height / width, 2 / width], [width / height, 1.0, 2 / height]])
    theta = to_device(matrices * scale, x.device).to(x)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _erase(x: Tensor, draws: NDArray[np.float64]) -> Tensor:
    """Set to 0 a square of side ``draws[:, 0]``, placed by the other two columns."""
    inside = []
    for axis, size in enumerate(x.shape[-2:], start=1):
        start = np.floor(draws[:, axis] * (size - draws[:, 0] + 1))[:, None]
        place = np.arange(size)
        inside.append((place >= start) & (place < start + draws[:, :1]))
    square = inside[0][:, :, None] & inside[1][:, None, :]
    return x.masked_fill(to_device(square[:, None], x.device), 0.0)

"""Whether a loss is what the engine takes it for: a function of its arguments, without padding.

Shapes: B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.engine.requests import Batch, Targets
from fedsim.engine.step import Computation, laid_out, tf32


class _Found(NamedTuple):
    """What a loss gives."""

    gradient: Tensor
    """Flat."""
    moved: Tensor
    """What it adds, in place, to arrays that aren't trained, flat."""
    numbers: dict[str, Tensor]


@tf32(False)
def check_loss(
    computation: Computation, arrays: Sequence[Tensor], batches: Sequence[Batch]
) -> None:
    """Raise `TypeError` if a client's step depends on anything but what the loss may see.

    It may see its arguments and, of batches of clients side by side, the examples that the mask
    doesn't leave out. One that draws numbers from PyTorch may do so for a client alone.

    Parameters
    ----------
    computation : Computation
        The pass's.
    arrays : sequence of torch.Tensor
        The weights, and what is given; of clients side by side those of the first one, [1, ...].
    batches : sequence of Batch
        A step's; of clients side by side those of several.
    """
    name = getattr(computation.loss, "__qualname__", "the loss")
    # In float32: through many layers other rounding is most of the gradient, and hides the rest.
    in_float32 = replace(computation.training, precision="float32")
    computation = replace(computation, training=in_float32)
    first = [one.each(lambda tensor: tensor[:1]) if computation.stacked else one for one in batches]
    w = [tensor.clone() for tensor in arrays]
    if not _is_near(_try(computation, w, first), _try(computation, w, first), 1e-3, least=1e-5):
        raise TypeError(
            f"{name} gives other numbers for the same arguments: it must draw from torch.rand and "
            "its like, or get random numbers of client.generator() by given=, and keep nothing "
            "from one step to the next"
        )
    if not computation.stacked:
        return
    # By chance a ReLU may lie so near 0 that another order of sums switches it.
    for seed in range(2):
        if not _sees_padding(computation, arrays, batches, seed):
            return
    raise TypeError(
        f"{name} counts examples that are padding; leave out "
        "those whose batch.mask is 0, as fedsim.engine.update.cross_entropy does, also in layers "
        "that look at a whole batch"
    )


def _sees_padding(
    computation: Computation, arrays: Sequence[Tensor], batches: Sequence[Batch], seed: int
) -> bool:
    """Tell whether the first client's step changes with padding, or with what the padding is.

    Rounding differs between batches of other widths, but not where only the padding does.
    """
    chance = torch.Generator().manual_seed(seed)
    w = [tensor.clone() for tensor in arrays]
    # Where training begins, what compares with the global model is 0 for any example.
    for place in computation.trained:
        one = w[place]
        fan_in = one[0, 0].numel() if one.dim() > 2 else 1
        one += 0.1 / fan_in**0.5 * torch.randn(one.shape, generator=chance).to(one.device)
    first = [one.each(lambda tensor: tensor[:1]) for one in batches]
    others = [one.each(lambda tensor: tensor.roll(1, 1)[-1:]) for one in batches]
    bare = _try(computation, w, first)
    padded, otherwise = (
        _try(computation, w, list(map(_longer, first, more))) for more in (first, others)
    )
    return not (_is_near(padded, otherwise, 1e-4) and _is_near(bare, padded, 3e-2, least=1e-5))


def _try(computation: Computation, w: Sequence[Tensor], batches: list[Batch]) -> _Found:
    """Return what a step would do, without taking it."""
    own = [tensor.clone() for tensor in w]
    targets: Targets = {}
    device = computation.device
    # Layers such as Dropout draw from PyTorch's own random numbers, which go on as if unused.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if computation.teach is not None:
            how, fields = laid_out(batches, {}, descends=False)
            targets = computation.targets(how, own, fields)
        how, fields = laid_out(batches, targets, descends=True)
        found, counts, gradient = computation.gradient(how, own, [*targets.values(), *fields])
    moved = [
        (after - before).flatten()
        for place, (after, before) in enumerate(zip(own, w, strict=True))
        if place not in computation.trained and after.is_floating_point()
    ]
    numbers = {name: count.detach() for name, count in counts.items()}
    return _Found(
        torch.cat([one.flatten() for one in gradient]),
        torch.cat([own[0].new_zeros(0), *moved]),
        {**numbers, "": found.detach()},
    )


def _longer(batch: Batch, padding: Batch) -> Batch:
    """Return a batch [1, B] twice as long, by inputs that its mask leaves out."""
    strong = None
    if batch.strong is not None and padding.strong is not None:
        strong = torch.cat([batch.strong, padding.strong], 1)
    return Batch(
        torch.cat([batch.x, padding.x], 1),
        torch.cat([batch.y, batch.y], 1),  # a client may have no number for other labels
        torch.cat([batch.mask, torch.zeros_like(batch.mask)], 1),
        strong,
    )


def _is_near(one: _Found, other: _Found, share: float, least: float = 0.0) -> bool:
    """Tell whether two findings are the same but for a share; what is below `least` is noise."""
    for mine, others in ((one.gradient, other.gradient), (one.moved, other.moved)):
        length = mine.norm()
        if length.isfinite() and not (mine - others).norm() <= share * length + least:
            return False
    return all(
        torch.allclose(number, other.numbers[name], rtol=share, atol=1e-6, equal_nan=True)
        for name, number in one.numbers.items()
    )

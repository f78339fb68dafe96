"""Whether a loss leaves padding out, as it must where clients train side by side.

Shapes: B examples in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.engine.step import Computation, laid_out
from fedsim.engine.update import Batch, Targets

Slope = tuple[Tensor, dict[str, Tensor]]
"""A loss's gradient, flat, and the numbers that come with it."""


def check_padding(
    computation: Computation, arrays: Sequence[Tensor], batches: Sequence[Batch]
) -> None:
    """Raise `TypeError` if a client's step depends on examples that its mask leaves out.

    Parameters
    ----------
    computation : Computation
        The pass's, of clients side by side.
    arrays : sequence of torch.Tensor
        The first client's weights, and what it is given, [1, ...].
    batches : sequence of Batch
        A step's, of several clients.
    """
    # By chance a ReLU may lie so near 0 that another order of sums switches it.
    for seed in range(2):
        if not _sees_padding(computation, arrays, batches, seed):
            return
    name = getattr(computation.loss, "__qualname__", "the loss")
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

    def slope(batches: list[Batch]) -> Slope:
        own = [tensor.clone() for tensor in w]  # BatchNorm changes its statistics
        targets: Targets = {}
        if computation.teach is not None:
            how, fields = laid_out(batches, {}, descends=False)
            targets = computation.targets(how, own, fields)
        how, fields = laid_out(batches, targets, descends=True)
        found, counts, gradient = computation.slope(how, own, [*targets.values(), *fields])
        numbers = {name: count.detach() for name, count in counts.items()}
        return torch.cat([one.flatten() for one in gradient]), {**numbers, "": found.detach()}

    bare = slope(first)
    padded, otherwise = (slope(list(map(_longer, first, more))) for more in (first, others))
    is_exact = computation.training.precision == "float32"
    return not (
        _is_near(padded, otherwise, 1e-4 if is_exact else 1e-2)
        and _is_near(bare, padded, 3e-2 if is_exact else 0.2, least=1e-5)
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


def _is_near(one: Slope, other: Slope, share: float, least: float = 0.0) -> bool:
    """Tell whether two slopes are the same but for a share; gradients below `least` are noise."""
    (gradient, numbers), (of_other, others) = one, other
    length = gradient.norm()
    if length.isfinite() and not (gradient - of_other).norm() <= share * length + least:
        return False
    return all(
        torch.allclose(number, others[name], rtol=share, atol=1e-6, equal_nan=True)
        for name, number in numbers.items()
    )

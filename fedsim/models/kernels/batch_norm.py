"""BatchNorm of many clients over the examples that aren't padding, and its gradients.

The pixels of a client are dealt out to several programs, in spans: one kernel adds up over each
span, and the next one adds the spans up, each program anew, before it goes through its own.

Shapes: K clients, B images a client of C channels and H x W pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim.models.kernels.blocks import block, innermost, new_images, shares


@triton.jit
def _part(rows, channels, span, c_block: tl.constexpr):
    """Return a program's client, its channels, which of them there are, and its span's two ends."""
    k = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * c_block + tl.arange(0, c_block)
    begin = tl.program_id(1) * span
    return k, c, c < channels, begin, tl.minimum(begin + span, rows)


@triton.jit
def _rectangle(at, end, channels, c, real, m_block: tl.constexpr):
    """Return some pixels from ``at`` on, where their channels lie, and which of these there are."""
    m = at + tl.arange(0, m_block)
    return m, m[:, None] * channels + c[None, :], (m < end)[:, None] & real[None, :]


@triton.jit
def _note(sums, channels, k, c, real, one, other):
    """Write down the two sums over a span, for `_add_up`."""
    sums += (k * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + c
    tl.store(sums, tl.sum(one, axis=0), mask=real)
    tl.store(sums + channels, tl.sum(other, axis=0), mask=real)


@triton.jit
def _add_up(
    mask, sums, rows, pixels, channels, k, c, real, b_block: tl.constexpr, c_block: tl.constexpr
):  # fmt: skip
    """Return how many pixels count, and the two sums over all spans."""
    b = tl.arange(0, b_block)
    images = rows // pixels
    n = tl.sum(tl.load(mask + k * images + b, mask=b < images, other=0.0), axis=0) * pixels
    one = tl.zeros((c_block,), dtype=tl.float32)
    other = tl.zeros((c_block,), dtype=tl.float32)
    sums += k * tl.num_programs(1) * 2 * channels + c
    for _ in range(tl.num_programs(1)):
        one += tl.load(sums, mask=real, other=0.0)
        other += tl.load(sums + channels, mask=real, other=0.0)
        sums += 2 * channels
    return n, one, other


@triton.jit(do_not_specialize=["rows", "pixels", "span"], do_not_specialize_on_alignment=["mask"])
def _sum(
    x, mask, sums, rows, pixels, channels, span,
    m_block: tl.constexpr, c_block: tl.constexpr,
):  # fmt: skip
    """Add up, for some channels of a client, a span of pixels that aren't padding.

    Of differences from the client's first pixel, since the squares of a large mean would drown the
    rest.
    """
    k, c, real, begin, end = _part(rows, channels, span, c_block)
    x += k * rows * channels
    mask += k * (rows // pixels)
    first = tl.load(x + c, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros((m_block, c_block), dtype=tl.float32)
    squares = tl.zeros((m_block, c_block), dtype=tl.float32)
    for at in range(begin, end, m_block):
        m, spot, inside = _rectangle(at, end, channels, c, real, m_block)
        counts = tl.load(mask + m // pixels, mask=m < end, other=0.0)
        tile = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32)
        apart = (tile - first[None, :]) * counts[:, None]
        total += apart
        squares += apart * apart
    _note(sums, channels, k, c, real, total, squares)


@triton.jit(do_not_specialize=["rows", "pixels", "span"], do_not_specialize_on_alignment=["mask"])
def _normalise(
    x, mask, sums, weight, bias, running_mean, running_var, y, mean, scale, rows, pixels, channels,
    span, momentum, eps, m_block: tl.constexpr, c_block: tl.constexpr, b_block: tl.constexpr,
):  # fmt: skip
    """Normalise a span of some channels of a client."""
    k, c, real, begin, end = _part(rows, channels, span, c_block)
    x += k * rows * channels
    y += k * rows * channels
    n, total, squares = _add_up(mask, sums, rows, pixels, channels, k, c, real, b_block, c_block)
    first = tl.load(x + c, mask=real, other=0.0).to(tl.float32)
    apart = total / n
    var = tl.maximum(squares / n - apart * apart, 0.0)
    middle = first + apart
    factor = 1.0 / tl.sqrt(var + eps)
    place = k * channels + c
    if tl.program_id(1) == 0:
        tl.store(mean + place, middle, mask=real)
        tl.store(scale + place, factor, mask=real)
        was = tl.load(running_mean + place, mask=real)
        tl.store(running_mean + place, was + momentum * (middle - was), mask=real)
        was = tl.load(running_var + place, mask=real)
        unbiased = var * n / tl.maximum(n - 1.0, 1.0)
        tl.store(running_var + place, was + momentum * (unbiased - was), mask=real)
    gamma = tl.load(weight + place, mask=real) * factor
    beta = tl.load(bias + place, mask=real)
    for at in range(begin, end, m_block):
        _, spot, inside = _rectangle(at, end, channels, c, real, m_block)
        tile = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32)
        out = (tile - middle[None, :]) * gamma[None, :] + beta[None, :]
        tl.store(y + spot, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "span"])
def _sum_back(
    g, x, mean, sums, rows, channels, span, m_block: tl.constexpr, c_block: tl.constexpr
):  # fmt: skip
    """Add gradients up over a span, and gradients times the distance of the input from the mean."""
    k, c, real, begin, end = _part(rows, channels, span, c_block)
    x += k * rows * channels
    g += k * rows * channels
    middle = tl.load(mean + k * channels + c, mask=real, other=0.0)
    total = tl.zeros((m_block, c_block), dtype=tl.float32)
    along = tl.zeros((m_block, c_block), dtype=tl.float32)
    for at in range(begin, end, m_block):
        _, spot, inside = _rectangle(at, end, channels, c, real, m_block)
        gradient = tl.load(g + spot, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32)
        total += gradient
        along += gradient * (tile - middle[None, :])
    _note(sums, channels, k, c, real, total, along)


@triton.jit(do_not_specialize=["rows", "pixels", "span"], do_not_specialize_on_alignment=["mask"])
def _normalise_back(
    g, x, mask, sums, weight, mean, scale, of_x, of_weight, of_bias, rows, pixels, channels, span,
    m_block: tl.constexpr, c_block: tl.constexpr, b_block: tl.constexpr,
):  # fmt: skip
    """Work out the gradients of `_normalise`."""
    k, c, real, begin, end = _part(rows, channels, span, c_block)
    x += k * rows * channels
    g += k * rows * channels
    of_x += k * rows * channels
    n, total, along = _add_up(mask, sums, rows, pixels, channels, k, c, real, b_block, c_block)
    mask += k * (rows // pixels)
    place = k * channels + c
    middle = tl.load(mean + place, mask=real, other=0.0)
    factor = tl.load(scale + place, mask=real, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(of_bias + place, total, mask=real)
        tl.store(of_weight + place, along * factor, mask=real)
    gamma = tl.load(weight + place, mask=real, other=0.0) * factor
    total = total / n
    along = along / n * factor * factor
    for at in range(begin, end, m_block):
        m, spot, inside = _rectangle(at, end, channels, c, real, m_block)
        counts = tl.load(mask + m // pixels, mask=m < end, other=0.0)
        gradient = tl.load(g + spot, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32)
        common = total[None, :] + (tile - middle[None, :]) * along[None, :]
        out = (gradient - common * counts[:, None]) * gamma[None, :]
        tl.store(of_x + spot, out.to(of_x.dtype.element_ty), mask=inside)


@torch.library.custom_op("fedsim::normalise", mutates_args=("running_mean", "running_var"))
def normalise(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [K, B, C, H, W] by each client's BatchNorm, and what `normalise_back` needs.

    The examples that ``mask`` [K, B] has at 0 don't count; the other tensors are [K, C], and the
    running ones follow.
    """
    x = innermost(x)
    k, b, channels, height, width = x.shape
    y = new_images(x, (k, b, channels, height, width))
    mean, scale = (weight.new_empty(k, channels) for _ in range(2))
    assert running_mean.is_contiguous(), "it is changed in place"
    assert running_var.is_contiguous(), "it is changed in place"
    mask = mask.contiguous()
    rows, pixels = b * height * width, height * width
    grid, span, blocks = _spans(rows, channels, k)
    sums = weight.new_empty(k, grid[1], 2, channels)
    _sum[grid](x, mask, sums, rows, pixels, channels, span, **blocks)
    _normalise[grid](
        x, mask, sums, weight.contiguous(), bias.contiguous(), running_mean, running_var, y, mean,
        scale, rows, pixels, channels, span, momentum, eps,
        b_block=triton.next_power_of_2(b), **blocks,
    )  # fmt: skip
    return y, mean, scale


@torch.library.custom_op("fedsim::normalise_back", mutates_args=())
def normalise_back(
    g: Tensor, x: Tensor, mask: Tensor, weight: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in x, weight and bias, given those in the output."""
    g, x = innermost(g), innermost(x)
    k, b, channels, height, width = x.shape
    of_x = new_images(x, (k, b, channels, height, width))
    of_weight, of_bias = (weight.new_empty(k, channels) for _ in range(2))
    rows, pixels = b * height * width, height * width
    grid, span, blocks = _spans(rows, channels, k)
    sums = weight.new_empty(k, grid[1], 2, channels)
    _sum_back[grid](g, x, mean, sums, rows, channels, span, **blocks)
    _normalise_back[grid](
        g, x, mask.contiguous(), sums, weight.contiguous(), mean, scale, of_x, of_weight, of_bias,
        rows, pixels, channels, span, b_block=triton.next_power_of_2(b), **blocks,
    )  # fmt: skip
    return of_x, of_weight, of_bias


def _spans(rows: int, channels: int, k: int) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Return the grid of BatchNorm's kernels, the pixels of a span and the sizes of blocks."""
    c_block = block(channels, 64)
    m_block = 4096 // c_block
    strips = triton.cdiv(channels, c_block)
    span = m_block * triton.cdiv(rows, m_block * shares(k * strips, rows // m_block))
    grid = (strips, triton.cdiv(rows, span), k)
    return grid, span, {"m_block": m_block, "c_block": c_block, "num_warps": 8}

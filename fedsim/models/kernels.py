"""Convolutions and BatchNorm of many clients at once, on a GPU, in Triton.

The libraries' grouped convolutions, which ``vmap`` makes of convolutions with weights of their own
for each client, and their BatchNorm, which knows no padding, are slow or wrong where clients train
side by side. These kernels take the stack as it is.

Shapes: K clients, B images a client of I channels and H x W pixels, O output channels; U x V
output pixels; R x S taps of a convolution's weights. Images and weights have their channels
innermost in memory. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""From so many on, all of a large GPU is busy: four on each of its 132 multiprocessors."""

# Triton compiles a kernel anew for arguments that are 1 or multiples of 16, which pays for channels
# and strides only.
_SIZES = [
    "b_in_k", "h_in", "w_in", "u_out", "v_out", "rows", "pixels", "scale", "from_h", "from_w",
    "step", "taps_h", "taps_w", "tap_h", "tap_w", "tap_step", "y_h", "y_w", "y_scale", "y_from_h",
    "y_from_w",
]  # fmt: skip

# ----- convolutions ----------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def _convolve(
    x, w, y, b_in_k, h_in, w_in, channels, u_out, v_out, filters, rows, pixels,
    scale, from_h, from_w, step, taps_h, taps_w, tap_h, tap_w, tap_step,
    y_h, y_w, y_scale, y_from_h, y_from_w,
    w_k, w_n, w_h, w_w, w_i,
    precision: tl.constexpr, m_block: tl.constexpr, n_block: tl.constexpr, i_block: tl.constexpr,
):  # fmt: skip
    """Add up, for some pixels and filters of a client, the products of taps and input pixels.

    Output pixel (u, v) meets, at tap t of ``taps_h`` and likewise of ``taps_w``, the input row
    u * scale + from_h + t * step, with the weights' tap tap_h + t * tap_step; it lies at row
    u * y_scale + y_from_h of the output.
    """
    k = tl.program_id(1).to(tl.int64)
    blocks_n = tl.cdiv(filters, n_block)
    m = tl.program_id(0) // blocks_n * m_block + tl.arange(0, m_block)
    n = tl.program_id(0) % blocks_n * n_block + tl.arange(0, n_block)
    b = m // pixels
    u = m % pixels // v_out
    v = m % v_out
    x += k * b_in_k * h_in * w_in * channels
    w += k * w_k
    y += k * b_in_k * y_h * y_w * filters
    blocks_i = tl.cdiv(channels, i_block)
    total = tl.zeros((m_block, n_block), dtype=tl.float32)
    for turn in range(taps_h * taps_w * blocks_i):
        tap = turn // blocks_i
        i = turn % blocks_i * i_block + tl.arange(0, i_block)
        down = tap // taps_w
        right = tap % taps_w
        row = u * scale + from_h + down * step
        column = v * scale + from_w + right * step
        inside = (m < rows) & (row >= 0) & (row < h_in) & (column >= 0) & (column < w_in)
        place = ((b * h_in + row) * w_in + column) * channels
        images = tl.load(
            x + place[:, None] + i[None, :],
            mask=inside[:, None] & (i < channels)[None, :],
            other=0.0,
        )
        weights = tl.load(
            w + (tap_h + down * tap_step) * w_h + (tap_w + right * tap_step) * w_w
            + n[None, :] * w_n + i[:, None] * w_i,
            mask=(n < filters)[None, :] & (i < channels)[:, None],
            other=0.0,
        )  # fmt: skip
        total = tl.dot(images, weights, total, input_precision=precision)
    place = ((b * y_h + u * y_scale + y_from_h) * y_w + v * y_scale + y_from_w) * filters
    tl.store(
        y + place[:, None] + n[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < rows)[:, None] & (n < filters)[None, :],
    )


@triton.jit(do_not_specialize=[*_SIZES[:7], "span", "stride", "padding", "taps_w"])
def _weigh(
    x, g, w, b_in_k, h_in, w_in, channels, u_out, v_out, filters, rows, pixels, span,
    stride, padding, taps_w, w_share, w_k, w_o, w_h, w_w, w_i,
    precision: tl.constexpr, m_block: tl.constexpr, o_block: tl.constexpr, i_block: tl.constexpr,
):  # fmt: skip
    """Add up, for some weights of a client at one tap, a span of products of gradient and input."""
    k = tl.program_id(1).to(tl.int64)
    blocks_o = tl.cdiv(filters, o_block)
    blocks_i = tl.cdiv(channels, i_block)
    o = tl.program_id(0) % blocks_o * o_block + tl.arange(0, o_block)
    i = tl.program_id(0) // blocks_o % blocks_i * i_block + tl.arange(0, i_block)
    tap = tl.program_id(0) // (blocks_o * blocks_i)
    down = tap // taps_w
    right = tap % taps_w
    x += k * b_in_k * h_in * w_in * channels
    g += k * rows * filters
    total = tl.zeros((o_block, i_block), dtype=tl.float32)
    begin = tl.program_id(2) * span
    end = tl.minimum(begin + span, rows)
    for at in range(begin, end, m_block):
        m = at + tl.arange(0, m_block)
        row = m % pixels // v_out * stride - padding + down
        column = m % v_out * stride - padding + right
        inside = (m < end) & (row >= 0) & (row < h_in) & (column >= 0) & (column < w_in)
        place = ((m // pixels * h_in + row) * w_in + column) * channels
        images = tl.load(
            x + place[:, None] + i[None, :],
            mask=inside[:, None] & (i < channels)[None, :],
            other=0.0,
        )
        gradients = tl.load(
            g + m[:, None] * filters + o[None, :],
            mask=(m < end)[:, None] & (o < filters)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(gradients), images, total, input_precision=precision)
    w += tl.program_id(2).to(tl.int64) * w_share
    tl.store(
        w + k * w_k + down * w_h + right * w_w + o[:, None] * w_o + i[None, :] * w_i,
        total.to(w.dtype.element_ty),
        mask=(o < filters)[:, None] & (i < channels)[None, :],
    )


@torch.library.custom_op("fedsim::convolve", mutates_args=())
def convolve(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """Return each client's convolution [K, B, O, U, V] of x [K, B, I, H, W], w [K, O, I, R, S]."""
    x = _innermost(x)
    k, b, channels, height, width = x.shape
    filters, taps_h, taps_w = w.shape[1], *w.shape[3:]
    u, v = (
        (side + 2 * padding - taps) // stride + 1
        for side, taps in ((height, taps_h), (width, taps_w))
    )
    y = _images(x, (k, b, filters, u, v))
    w_k, w_o, w_i, w_h, w_w = w.stride()
    grid, blocks = _tiles(b * u * v, filters, channels, k)
    _convolve[grid](
        x, w, y, b, height, width, channels, u, v, filters, b * u * v, u * v,
        stride, -padding, -padding, 1, taps_h, taps_w, 0, 0, 1,
        u, v, 1, 0, 0,
        w_k, w_o, w_h, w_w, w_i,
        _precision(), **blocks,
    )  # fmt: skip
    return y


@torch.library.custom_op("fedsim::convolve_back", mutates_args=())
def convolve_back(
    g: Tensor, w: Tensor, height: int, width: int, stride: int, padding: int
) -> Tensor:
    """Return the gradients in x [K, B, I, H, W], given those in the output [K, B, O, U, V]."""
    g = _innermost(g)
    k, b, filters, u, v = g.shape
    channels, taps_h, taps_w = w.shape[2:]
    of_x = _images(g, (k, b, channels, height, width))
    w_k, w_o, w_i, w_h, w_w = w.stride()
    # Input pixels that lie alike between the strides meet the same taps.
    for at_h in range(stride):
        for at_w in range(stride):
            first_h, first_w = (at_h + padding) % stride, (at_w + padding) % stride
            of_h, of_w = len(range(at_h, height, stride)), len(range(at_w, width, stride))
            grid, blocks = _tiles(b * of_h * of_w, channels, filters, k)
            _convolve[grid](
                g, w, of_x, b, u, v, filters, of_h, of_w, channels, b * of_h * of_w, of_h * of_w,
                1, (at_h + padding - first_h) // stride, (at_w + padding - first_w) // stride, -1,
                len(range(first_h, taps_h, stride)), len(range(first_w, taps_w, stride)),
                first_h, first_w, stride,
                height, width, stride, at_h, at_w,
                w_k, w_i, w_h, w_w, w_o,
                _precision(), **blocks,
            )  # fmt: skip
    return of_x


@torch.library.custom_op("fedsim::weigh", mutates_args=())
def weigh(x: Tensor, g: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """Return the gradients in w [K, O, I, R, S], in its memory layout and dtype."""
    x, g = _innermost(x), _innermost(g)
    k, b, channels, height, width = x.shape
    filters, u, v = g.shape[2:]
    taps_h, taps_w = w.shape[3:]
    rows = b * u * v
    grid, span, blocks = _squares(rows, taps_h * taps_w, filters, channels, k)
    parts = w.new_empty(grid[2], *w.shape).as_strided((grid[2], *w.shape), (w.numel(), *w.stride()))
    w_k, w_o, w_i, w_h, w_w = w.stride()
    _weigh[grid](
        x, g, parts, b, height, width, channels, u, v, filters, rows, u * v, span,
        stride, padding, taps_w, w.numel(), w_k, w_o, w_h, w_w, w_i,
        _precision(), **blocks,
    )  # fmt: skip
    return parts[0] if grid[2] == 1 else torch.sum(parts, 0, out=torch.empty_like(w))


# ----- BatchNorm -------------------------------------------------------------------------------
#
# The pixels of a client are dealt out to several programs, in spans: one kernel adds up over each
# span, and the next one adds the spans up, each program anew, before it goes through its own.


@triton.jit(do_not_specialize=["rows", "pixels", "span"], do_not_specialize_on_alignment=["mask"])
def _sum(
    x, mask, sums, rows, pixels, channels, span,
    m_block: tl.constexpr, c_block: tl.constexpr,
):  # fmt: skip
    """Add up, for some channels of a client, a span of pixels that aren't padding.

    Of differences from the client's first pixel, since the squares of a large mean would drown the
    rest.
    """
    k = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * c_block + tl.arange(0, c_block)
    real = c < channels
    x += k * rows * channels
    mask += k * (rows // pixels)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, rows)
    first = tl.load(x + c, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros((m_block, c_block), dtype=tl.float32)
    squares = tl.zeros((m_block, c_block), dtype=tl.float32)
    for at in range(begin, end, m_block):
        m = at + tl.arange(0, m_block)
        counts = tl.load(mask + m // pixels, mask=m < end, other=0.0)
        tile = tl.load(
            x + m[:, None] * channels + c[None, :],
            mask=(m < end)[:, None] & real[None, :],
            other=0.0,
        )
        apart = (tile.to(tl.float32) - first[None, :]) * counts[:, None]
        total += apart
        squares += apart * apart
    sums += (k * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + c
    tl.store(sums, tl.sum(total, axis=0), mask=real)
    tl.store(sums + channels, tl.sum(squares, axis=0), mask=real)


@triton.jit(do_not_specialize=["rows", "pixels", "span"], do_not_specialize_on_alignment=["mask"])
def _normalise(
    x, mask, sums, weight, bias, running_mean, running_var, y, mean, scale, rows, pixels, channels,
    span, momentum, eps, m_block: tl.constexpr, c_block: tl.constexpr, b_block: tl.constexpr,
):  # fmt: skip
    """Normalise a span of some channels of a client."""
    k = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * c_block + tl.arange(0, c_block)
    real = c < channels
    x += k * rows * channels
    y += k * rows * channels
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, rows)
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
        m = at + tl.arange(0, m_block)
        spot = m[:, None] * channels + c[None, :]
        inside = (m < end)[:, None] & real[None, :]
        tile = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32)
        out = (tile - middle[None, :]) * gamma[None, :] + beta[None, :]
        tl.store(y + spot, out.to(y.dtype.element_ty), mask=inside)


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


@triton.jit(do_not_specialize=["rows", "span"])
def _sum_back(
    g, x, mean, sums, rows, channels, span, m_block: tl.constexpr, c_block: tl.constexpr
):  # fmt: skip
    """Add gradients up over a span, and gradients times the distance of the input from the mean."""
    k = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * c_block + tl.arange(0, c_block)
    real = c < channels
    x += k * rows * channels
    g += k * rows * channels
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, rows)
    middle = tl.load(mean + k * channels + c, mask=real, other=0.0)
    total = tl.zeros((m_block, c_block), dtype=tl.float32)
    along = tl.zeros((m_block, c_block), dtype=tl.float32)
    for at in range(begin, end, m_block):
        m = at + tl.arange(0, m_block)
        spot = m[:, None] * channels + c[None, :]
        inside = (m < end)[:, None] & real[None, :]
        gradient = tl.load(g + spot, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(x + spot, mask=inside, other=0.0).to(tl.float32)
        total += gradient
        along += gradient * (tile - middle[None, :])
    sums += (k * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + c
    tl.store(sums, tl.sum(total, axis=0), mask=real)
    tl.store(sums + channels, tl.sum(along, axis=0), mask=real)


@triton.jit(do_not_specialize=["rows", "pixels", "span"], do_not_specialize_on_alignment=["mask"])
def _normalise_back(
    g, x, mask, sums, weight, mean, scale, of_x, of_weight, of_bias, rows, pixels, channels, span,
    m_block: tl.constexpr, c_block: tl.constexpr, b_block: tl.constexpr,
):  # fmt: skip
    """Work out the gradients of `_normalise`."""
    k = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * c_block + tl.arange(0, c_block)
    real = c < channels
    x += k * rows * channels
    g += k * rows * channels
    of_x += k * rows * channels
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, rows)
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
        m = at + tl.arange(0, m_block)
        spot = m[:, None] * channels + c[None, :]
        inside = (m < end)[:, None] & real[None, :]
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
    x = _innermost(x)
    k, b, channels, height, width = x.shape
    y = _images(x, (k, b, channels, height, width))
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
    g, x = _innermost(g), _innermost(x)
    k, b, channels, height, width = x.shape
    of_x = _images(x, (k, b, channels, height, width))
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


# ----- sizes and layouts -----------------------------------------------------------------------


def _squares(
    rows: int, taps: int, filters: int, channels: int, k: int
) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Return the grid of `_weigh`, the pixels of a span and the sizes of blocks."""
    m_block, o_block, i_block = 64, _block(filters, 128), _block(channels, 128)
    squares = taps * triton.cdiv(filters, o_block) * triton.cdiv(channels, i_block)
    span = m_block * triton.cdiv(rows, m_block * _shares(k * squares, rows // (16 * m_block)))
    return (
        (squares, k, triton.cdiv(rows, span)),
        span,
        {
            "m_block": m_block,
            "o_block": o_block,
            "i_block": i_block,
            "num_warps": 8 if o_block * i_block > 64 * 64 else 4,
            "num_stages": 3,
        },
    )


def _spans(rows: int, channels: int, k: int) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Return the grid of BatchNorm's kernels, the pixels of a span and the sizes of blocks."""
    c_block = _block(channels, 64)
    m_block = 4096 // c_block
    strips = triton.cdiv(channels, c_block)
    span = m_block * triton.cdiv(rows, m_block * _shares(k * strips, rows // m_block))
    grid = (strips, triton.cdiv(rows, span), k)
    return grid, span, {"m_block": m_block, "c_block": c_block, "num_warps": 8}


def _shares(programs: int, most: int) -> int:
    """Return among how many programs the work of each should be shared, for the GPU to be busy."""
    return max(1, min(most, int(triton.cdiv(PROGRAMS, programs))))


def _tiles(
    rows: int, filters: int, channels: int, k: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of `_convolve` and the sizes of its blocks."""
    # Of few pixels many small blocks keep more of the GPU busy.
    m_block, n_block = 128 if rows >= 1024 else 64, _block(filters, 128)
    grid = (triton.cdiv(rows, m_block) * triton.cdiv(filters, n_block), k)
    return grid, {
        "m_block": m_block,
        "n_block": n_block,
        "i_block": _block(channels, 64),
        "num_warps": 4,
        "num_stages": 3,
    }


def _block(size: int, most: int) -> int:
    """Return the smallest power of two >= size, from 16, which matrix units need, to ``most``."""
    return min(most, max(16, int(triton.next_power_of_2(size))))


def _precision() -> str:
    """Return how products of float32 are made; it means nothing for others."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def _innermost(x: Tensor) -> Tensor:
    """Return images [K, B, channels, height, width], the channels innermost in memory."""
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _images(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return new images of a shape [K, B, channels, height, width], the channels innermost."""
    k, b, channels, height, width = shape
    return like.new_empty(k, b, height, width, channels).permute(0, 1, 4, 2, 3)

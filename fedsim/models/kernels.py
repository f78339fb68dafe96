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

PROGRAMS = 128
"""From so many blocks of work on, a GPU is busy."""

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


@triton.jit(do_not_specialize=[*_SIZES[:7], "stride", "padding", "taps_w"])
def _weigh(
    x, g, w, b_in_k, h_in, w_in, channels, u_out, v_out, filters, rows, pixels,
    stride, padding, taps_w, w_k, w_o, w_h, w_w, w_i,
    precision: tl.constexpr, m_block: tl.constexpr, o_block: tl.constexpr, i_block: tl.constexpr,
):  # fmt: skip
    """Add up, for some weights of a client at one tap, the products of gradients and inputs."""
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
    for begin in range(0, rows, m_block):
        m = begin + tl.arange(0, m_block)
        row = m % pixels // v_out * stride - padding + down
        column = m % v_out * stride - padding + right
        inside = (m < rows) & (row >= 0) & (row < h_in) & (column >= 0) & (column < w_in)
        place = ((m // pixels * h_in + row) * w_in + column) * channels
        images = tl.load(
            x + place[:, None] + i[None, :],
            mask=inside[:, None] & (i < channels)[None, :],
            other=0.0,
        )
        gradients = tl.load(
            g + m[:, None] * filters + o[None, :],
            mask=(m < rows)[:, None] & (o < filters)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(gradients), images, total, input_precision=precision)
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
    of_w = torch.empty_like(w)
    w_k, w_o, w_i, w_h, w_w = of_w.stride()
    grid, blocks = _squares(taps_h * taps_w, filters, channels, k)
    _weigh[grid](
        x, g, of_w, b, height, width, channels, u, v, filters, b * u * v, u * v,
        stride, padding, taps_w, w_k, w_o, w_h, w_w, w_i,
        _precision(), **blocks,
    )  # fmt: skip
    return of_w


# ----- BatchNorm -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "pixels"], do_not_specialize_on_alignment=["mask"])
def _normalise(
    x, mask, weight, bias, running_mean, running_var, y, mean, scale, rows, pixels, channels,
    momentum, eps, m_block: tl.constexpr, c_block: tl.constexpr,
):  # fmt: skip
    """Normalise some channels of a client, from the examples that aren't padding."""
    k = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * c_block + tl.arange(0, c_block)
    real = c < channels
    x += k * rows * channels
    y += k * rows * channels
    mask += k * (rows // pixels)
    # Sums of differences from the first pixel: the squares of a large mean would drown the rest.
    first = tl.load(x + c, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros((m_block, c_block), dtype=tl.float32)
    squares = tl.zeros((m_block, c_block), dtype=tl.float32)
    count = tl.zeros((m_block,), dtype=tl.float32)
    for begin in range(0, rows, m_block):
        m = begin + tl.arange(0, m_block)
        counts = tl.load(mask + m // pixels, mask=m < rows, other=0.0)
        tile = tl.load(
            x + m[:, None] * channels + c[None, :],
            mask=(m < rows)[:, None] & real[None, :],
            other=0.0,
        )
        apart = (tile.to(tl.float32) - first[None, :]) * counts[:, None]
        total += apart
        squares += apart * apart
        count += counts
    n = tl.sum(count, axis=0)
    apart_mean = tl.sum(total, axis=0) / n
    var = tl.maximum(tl.sum(squares, axis=0) / n - apart_mean * apart_mean, 0.0)
    middle = first + apart_mean
    factor = 1.0 / tl.sqrt(var + eps)
    place = k * channels + c
    tl.store(mean + place, middle, mask=real)
    tl.store(scale + place, factor, mask=real)
    was = tl.load(running_mean + place, mask=real)
    tl.store(running_mean + place, was + momentum * (middle - was), mask=real)
    was = tl.load(running_var + place, mask=real)
    unbiased = var * n / tl.maximum(n - 1.0, 1.0)
    tl.store(running_var + place, was + momentum * (unbiased - was), mask=real)
    gamma = tl.load(weight + place, mask=real) * factor
    beta = tl.load(bias + place, mask=real)
    for begin in range(0, rows, m_block):
        m = begin + tl.arange(0, m_block)
        at = m[:, None] * channels + c[None, :]
        inside = (m < rows)[:, None] & real[None, :]
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        out = (tile - middle[None, :]) * gamma[None, :] + beta[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "pixels"], do_not_specialize_on_alignment=["mask"])
def _normalise_back(
    g, x, mask, weight, mean, scale, of_x, of_weight, of_bias, rows, pixels, channels,
    m_block: tl.constexpr, c_block: tl.constexpr,
):  # fmt: skip
    """Work out the gradients of `_normalise`."""
    k = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * c_block + tl.arange(0, c_block)
    real = c < channels
    x += k * rows * channels
    g += k * rows * channels
    of_x += k * rows * channels
    mask += k * (rows // pixels)
    place = k * channels + c
    middle = tl.load(mean + place, mask=real, other=0.0)
    factor = tl.load(scale + place, mask=real, other=0.0)
    totals = tl.zeros((m_block, c_block), dtype=tl.float32)
    alongs = tl.zeros((m_block, c_block), dtype=tl.float32)
    count = tl.zeros((m_block,), dtype=tl.float32)
    for begin in range(0, rows, m_block):
        m = begin + tl.arange(0, m_block)
        at = m[:, None] * channels + c[None, :]
        inside = (m < rows)[:, None] & real[None, :]
        count += tl.load(mask + m // pixels, mask=m < rows, other=0.0)
        gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        totals += gradient
        alongs += gradient * (tile - middle[None, :])
    total = tl.sum(totals, axis=0)
    along = tl.sum(alongs, axis=0) * factor
    tl.store(of_bias + place, total, mask=real)
    tl.store(of_weight + place, along, mask=real)
    n = tl.sum(count, axis=0)
    gamma = tl.load(weight + place, mask=real, other=0.0) * factor
    total = total / n
    along = along / n * factor
    for begin in range(0, rows, m_block):
        m = begin + tl.arange(0, m_block)
        at = m[:, None] * channels + c[None, :]
        inside = (m < rows)[:, None] & real[None, :]
        counts = tl.load(mask + m // pixels, mask=m < rows, other=0.0)
        gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        common = total[None, :] + (tile - middle[None, :]) * along[None, :]
        out = (gradient - common * counts[:, None]) * gamma[None, :]
        tl.store(of_x + at, out.to(of_x.dtype.element_ty), mask=inside)


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
    rows, pixels = b * height * width, height * width
    grid, blocks = _strips(channels, k)
    assert running_mean.is_contiguous(), "it is changed in place"
    assert running_var.is_contiguous(), "it is changed in place"
    _normalise[grid](
        x, mask.contiguous(), weight.contiguous(), bias.contiguous(), running_mean,
        running_var, y, mean, scale, rows, pixels, channels, momentum, eps, **blocks,
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
    grid, blocks = _strips(channels, k)
    _normalise_back[grid](
        g, x, mask.contiguous(), weight.contiguous(), mean, scale, of_x, of_weight, of_bias,
        rows, pixels, channels, **blocks,
    )  # fmt: skip
    return of_x, of_weight, of_bias


# ----- sizes and layouts -----------------------------------------------------------------------


def _squares(
    taps: int, filters: int, channels: int, k: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of `_weigh` and the sizes of its blocks."""
    o_block, i_block = _block(filters, 128), _block(channels, 128)
    grid = (taps * triton.cdiv(filters, o_block) * triton.cdiv(channels, i_block), k)
    return grid, {
        "m_block": 64,
        "o_block": o_block,
        "i_block": i_block,
        "num_warps": 8 if o_block * i_block > 64 * 64 else 4,
        "num_stages": 3,
    }


def _strips(channels: int, k: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of `_normalise` and the sizes of its blocks: enough of them for the GPU."""
    c_block = 32 if k * triton.cdiv(channels, 32) >= PROGRAMS else 16
    grid = (triton.cdiv(channels, c_block), k)
    return grid, {"m_block": 256, "c_block": c_block, "num_warps": 8}


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
    return min(most, max(16, triton.next_power_of_2(size)))


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

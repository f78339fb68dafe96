"""Convolutions of many clients and their gradients.

Shapes: K clients, B images a client of I channels and H x W pixels, O output channels; U x V
output pixels; R x S taps of a convolution's weights. Of float32, products are in TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim.models.kernels.blocks import block, innermost, new_images, shares

# Triton compiles a kernel anew for arguments that are 1 or multiples of 16, which pays for channels
# and strides only.
_SIZES = ["b_in_k", "h_in", "w_in", "v_out", "rows", "pixels"]
_TAPS = [
    "scale", "from_h", "from_w", "step", "taps_h", "taps_w", "tap_h", "tap_w", "tap_step", "y_h",
    "y_w", "y_scale", "y_from_h", "y_from_w",
]  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, *_TAPS])
def _convolve(
    x, w, y, b_in_k, h_in, w_in, channels, v_out, filters, rows, pixels,
    scale, from_h, from_w, step, taps_h, taps_w, tap_h, tap_w, tap_step,
    y_h, y_w, y_scale, y_from_h, y_from_w,
    w_k, w_n, w_h, w_w, w_i,
    m_block: tl.constexpr, n_block: tl.constexpr, i_block: tl.constexpr,
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
        total = tl.dot(images, weights, total, input_precision="tf32")
    place = ((b * y_h + u * y_scale + y_from_h) * y_w + v * y_scale + y_from_w) * filters
    tl.store(
        y + place[:, None] + n[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < rows)[:, None] & (n < filters)[None, :],
    )


@triton.jit(do_not_specialize=[*_SIZES, "span", "stride", "padding", "taps_w"])
def _weigh(
    x, g, w, b_in_k, h_in, w_in, channels, v_out, filters, rows, pixels, span,
    stride, padding, taps_w, w_share, w_k, w_o, w_h, w_w, w_i,
    m_block: tl.constexpr, o_block: tl.constexpr, i_block: tl.constexpr,
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
        total = tl.dot(tl.trans(gradients), images, total, input_precision="tf32")
    w += tl.program_id(2).to(tl.int64) * w_share
    tl.store(
        w + k * w_k + down * w_h + right * w_w + o[:, None] * w_o + i[None, :] * w_i,
        total.to(w.dtype.element_ty),
        mask=(o < filters)[:, None] & (i < channels)[None, :],
    )


@torch.library.custom_op("fedsim::convolve", mutates_args=())
def convolve(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """Return each client's convolution [K, B, O, U, V] of x [K, B, I, H, W], w [K, O, I, R, S]."""
    x = innermost(x)
    k, b, channels, height, width = x.shape
    filters, taps_h, taps_w = w.shape[1], *w.shape[3:]
    u, v = (
        (side + 2 * padding - taps) // stride + 1
        for side, taps in ((height, taps_h), (width, taps_w))
    )
    y = new_images(x, (k, b, filters, u, v))
    w_k, w_o, w_i, w_h, w_w = w.stride()
    grid, blocks = _tiles(b * u * v, filters, channels, k)
    _convolve[grid](
        x, w, y, b, height, width, channels, v, filters, b * u * v, u * v,
        stride, -padding, -padding, 1, taps_h, taps_w, 0, 0, 1,
        u, v, 1, 0, 0,
        w_k, w_o, w_h, w_w, w_i, **blocks,
    )  # fmt: skip
    return y


@torch.library.custom_op("fedsim::convolve_back", mutates_args=())
def convolve_back(
    g: Tensor, w: Tensor, height: int, width: int, stride: int, padding: int
) -> Tensor:
    """Return the gradients in x [K, B, I, H, W], given those in the output [K, B, O, U, V]."""
    g = innermost(g)
    k, b, filters, u, v = g.shape
    channels, taps_h, taps_w = w.shape[2:]
    of_x = new_images(g, (k, b, channels, height, width))
    w_k, w_o, w_i, w_h, w_w = w.stride()
    # Input pixels that lie alike between the strides meet the same taps.
    for at_h in range(stride):
        for at_w in range(stride):
            first_h, first_w = (at_h + padding) % stride, (at_w + padding) % stride
            of_h, of_w = len(range(at_h, height, stride)), len(range(at_w, width, stride))
            grid, blocks = _tiles(b * of_h * of_w, channels, filters, k)
            _convolve[grid](
                g, w, of_x, b, u, v, filters, of_w, channels, b * of_h * of_w, of_h * of_w,
                1, (at_h + padding - first_h) // stride, (at_w + padding - first_w) // stride, -1,
                len(range(first_h, taps_h, stride)), len(range(first_w, taps_w, stride)),
                first_h, first_w, stride,
                height, width, stride, at_h, at_w,
                w_k, w_i, w_h, w_w, w_o, **blocks,
            )  # fmt: skip
    return of_x


@torch.library.custom_op("fedsim::weigh", mutates_args=())
def weigh(x: Tensor, g: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """Return the gradients in w [K, O, I, R, S], in its memory layout and dtype."""
    x, g = innermost(x), innermost(g)
    k, b, channels, height, width = x.shape
    filters, u, v = g.shape[2:]
    taps_h, taps_w = w.shape[3:]
    rows = b * u * v
    grid, span, blocks = _squares(rows, taps_h * taps_w, filters, channels, k)
    parts = w.new_empty(grid[2], *w.shape).as_strided((grid[2], *w.shape), (w.numel(), *w.stride()))
    w_k, w_o, w_i, w_h, w_w = w.stride()
    _weigh[grid](
        x, g, parts, b, height, width, channels, v, filters, rows, u * v, span,
        stride, padding, taps_w, w.numel(), w_k, w_o, w_h, w_w, w_i, **blocks,
    )  # fmt: skip
    return parts[0] if grid[2] == 1 else torch.sum(parts, 0, out=torch.empty_like(w))


def _tiles(
    rows: int, filters: int, channels: int, k: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of `_convolve` and the sizes of its blocks."""
    # Of few pixels many small blocks keep more of the GPU busy.
    m_block, n_block = 128 if rows >= 1024 else 64, block(filters, 128)
    grid = (triton.cdiv(rows, m_block) * triton.cdiv(filters, n_block), k)
    return grid, {
        "m_block": m_block,
        "n_block": n_block,
        "i_block": block(channels, 64),
        "num_warps": 4,
        "num_stages": 3,
    }


def _squares(
    rows: int, taps: int, filters: int, channels: int, k: int
) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Return the grid of `_weigh`, the pixels of a span and the sizes of blocks."""
    m_block, o_block, i_block = 64, block(filters, 128), block(channels, 128)
    squares = taps * triton.cdiv(filters, o_block) * triton.cdiv(channels, i_block)
    span = m_block * triton.cdiv(rows, m_block * shares(k * squares, rows // (16 * m_block)))
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

"""How work is cut up for a GPU, and how images lie in its memory.

Shapes: K clients, B images a client.
"""

from __future__ import annotations

import triton
from torch import Tensor

PROGRAMS = 512
"""From so many on, all of a large GPU is busy: four on each of its 132 multiprocessors."""


def block(size: int, most: int) -> int:
    """Return the smallest power of two >= size, from 16, which matrix units need, to ``most``."""
    return min(most, max(16, int(triton.next_power_of_2(size))))


def shares(programs: int, most: int) -> int:
    """Return among how many programs the work of each should be shared, for the GPU to be busy."""
    return max(1, min(most, int(triton.cdiv(PROGRAMS, programs))))


def innermost(x: Tensor) -> Tensor:
    """Return images [K, B, channels, height, width], the channels innermost in memory.

    They begin at a multiple of 16 bytes, as Triton's kernels are compiled for.
    """
    y = x.permute(0, 1, 3, 4, 2).contiguous()
    if y.data_ptr() % 16:
        y = y.clone()
    return y.permute(0, 1, 4, 2, 3)


def new_images(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return new images of a shape [K, B, channels, height, width], the channels innermost."""
    k, b, channels, height, width = shape
    return like.new_empty(k, b, height, width, channels).permute(0, 1, 4, 2, 3)

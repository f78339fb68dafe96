"""Convolutions as products of weights and patches, for `experiments.benchmarks.gpu` to measure.

Under ``vmap``, which trains clients side by side, such a convolution becomes one batched product,
where ``conv2d`` becomes a grouped convolution. Shapes: B images of I channels, O output channels.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.models import Model


def by_patches(model: Model) -> Model:
    """Return a copy of a model whose convolutions, which have no bias, are products."""
    copied = deepcopy(model)
    for layer in copied.modules():
        if type(layer) is nn.Conv2d:
            assert layer.bias is None, "PatchConv2d has none"
            layer.__class__ = PatchConv2d
    return copied


class PatchConv2d(nn.Conv2d):
    """A convolution computed by `PatchProduct`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [B, O, ...] of inputs [B, I, height, width]."""
        stride, padding = self.stride[0], int(self.padding[0])
        y: Tensor = PatchProduct.apply(x, self.weight, stride, padding)[0]
        return y


class PatchProduct(torch.autograd.Function):
    """The convolution and its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
        """Return the outputs [B, O, height, width], and the patches for the backward pass."""
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
        spots = _spots(padded.shape[1:3], w.shape[2:], stride)
        shifted = torch.cat([padded[:, down, right] for down, right in spots], dim=-1)
        b, height, width, size = shifted.shape
        patches = shifted.reshape(b * height * width, size)
        y = patches @ _by_patch(w)
        # Under autocast the product rounds the patches anyway.
        return y.view(b, height, width, len(w)).permute(0, 3, 1, 2), patches.to(y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward pass needs."""
        x, w, ctx.stride, ctx.padding = inputs
        ctx.sides = x.shape[2:]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(w, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients in inputs and weights."""
        w, patches = ctx.saved_tensors
        o, i, rows, columns = w.shape
        b, _, height, width = grad.shape
        g = grad.permute(0, 2, 3, 1).reshape(-1, o).to(patches.dtype)
        of_w = (patches.t() @ g).view(rows, columns, i, o).permute(3, 2, 0, 1)
        of_patches = (g @ _by_patch(w).t().to(g.dtype)).view(b, height, width, rows * columns, i)
        h, v = (side + 2 * ctx.padding for side in ctx.sides)
        of_x = of_patches.new_zeros(b, h, v, i)
        for place, (down, right) in enumerate(_spots((h, v), (rows, columns), ctx.stride)):
            of_x[:, down, right] += of_patches[:, :, :, place]
        inside = of_x[:, ctx.padding : h - ctx.padding, ctx.padding : v - ctx.padding]
        return inside.permute(0, 3, 1, 2).to(w.dtype), of_w.to(w.dtype), None, None


def _spots(sides: Any, kernel: Any, stride: int) -> list[tuple[slice, slice]]:
    """Return for each weight of a kernel which pixels it meets, row by row."""
    (h, v), (rows, columns) = sides, kernel
    return [
        (slice(row, row + h - rows + 1, stride), slice(column, column + v - columns + 1, stride))
        for row, column in product(range(rows), range(columns))
    ]


def _by_patch(w: Tensor) -> Tensor:
    """Return weights [O, I, rows, columns] as [rows * columns * I, O]."""
    return w.permute(2, 3, 1, 0).reshape(-1, len(w))

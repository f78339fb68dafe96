"""Layers as they compute where ``vmap`` trains many clients side by side.

Shapes: K clients, B examples a client, C channels; the layers see one client, without the K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fedsim.errors import UserError
from fedsim.models.layers import BATCH_NORMS, GreyConv2d


class PaddingUnknownError(UserError):
    """BatchNorm can't tell which of its examples are padding."""


class Padding:
    """Which examples of a step's batches are padding, which BatchNorm must know.

    It is found by the tensor that a method passes to the model, so that methods needn't care.
    """

    def __init__(self) -> None:
        self._known: Sequence[tuple[Tensor, Tensor]] = ()

    @contextmanager
    def of(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Know for a while the masks [B] of some inputs [B, ...]: 1 for an example, 0 elsewhere."""
        self._known = batches
        try:
            yield
        finally:
            self._known = ()

    def mask(self, x: Tensor) -> Tensor:
        """Return the mask of inputs.

        Raises
        ------
        PaddingUnknownError
            Nobody has said what it is.
        """
        for known, mask in self._known:
            if known is x:
                return mask
        raise PaddingUnknownError(
            "a model with BatchNorm must be called with batch.x or batch.strong itself: of other "
            "tensors it isn't known which examples are padding"
        )


def to_stacked(module: nn.Module) -> nn.Module:
    """Let the layers of a module compute for many clients; return it.

    Raises
    ------
    PaddingUnknownError
        There is a layer that knows no padding.
    """
    for layer in module.modules():
        if StackedBatchNorm.fits(layer):
            layer.__class__ = StackedBatchNorm
        elif StackedConv2d.fits(layer):
            is_grey = isinstance(layer, GreyConv2d)
            layer.__class__ = StackedGreyConv2d if is_grey else StackedConv2d
        elif isinstance(layer, _ConvNd | nn.PReLU):
            layer.register_forward_pre_hook(_in_own_dtype)
        elif type(layer) is nn.GroupNorm:
            layer.__class__ = StackedGroupNorm
        elif type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1)):
            layer.__class__ = StackedMean2d
        elif isinstance(layer, _BatchNorm) or layer._buffers.get("running_mean") is not None:
            raise PaddingUnknownError(
                f"{layer}: of the layers that mix examples only PyTorch's BatchNorm, with weights, "
                "running statistics and a momentum, can leave padding out"
            )
    return module


def _in_own_dtype(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a layer that autocast doesn't reach inputs as its weights are: kernels round theirs."""
    assert isinstance(layer.weight, Tensor)
    dtype = layer.weight.dtype
    return tuple(one.to(dtype) if isinstance(one, Tensor) else one for one in inputs)


class StackedBatchNorm(_BatchNorm):
    """BatchNorm over the examples that aren't padding.

    Made of a layer for which `fits` holds. In training mode ``mask`` [B] is set before each call.
    """

    mask: Tensor

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Tell whether a layer is one of PyTorch's that this computes."""
        return (
            isinstance(layer, _BatchNorm)
            and type(layer) in (*BATCH_NORMS, *BATCH_NORMS.values())
            and layer.affine
            and layer.track_running_stats
            and layer.momentum is not None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised inputs [B, C, ...]; in training mode, running statistics follow."""
        assert self.running_mean is not None, "fits says so"
        assert self.running_var is not None, "fits says so"
        mean, var = self.running_mean, self.running_var
        if self.training:
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            if has_kernels(x) and x.dim() == 4:
                y: Tensor = _Normalisation.apply(  # type: ignore[no-untyped-call]
                    x, self.mask, self.weight, self.bias, mean, var, self.momentum, self.eps
                )
                return y
            mean, var = self._statistics(x, mean, var)
        apart = (-1, *(1,) * (x.dim() - 2))
        factor = self.weight * (var + self.eps).rsqrt()
        y = (x - mean.view(apart)) * factor.view(apart) + self.bias.view(apart)
        return y.to(x.dtype)

    def _statistics(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each channel, and let the running ones follow."""
        assert self.momentum is not None, "fits says so"
        counts = self.mask.view(-1, *(1,) * (x.dim() - 1))
        over = [axis for axis in range(x.dim()) if axis != 1]
        n = self.mask.sum() * x[0, 0].numel()
        exact = x.float()
        mean = (exact * counts).sum(over) / n
        centred = exact - mean.view(-1, *(1,) * (x.dim() - 2))
        var = (centred.square() * counts).sum(over) / n
        with torch.no_grad():
            kept = 1.0 - self.momentum
            running_mean.mul_(kept).add_(mean, alpha=self.momentum)
            # A single value has no unbiased variance.
            unbiased = var * (n / (n - 1).clamp(min=1.0))
            running_var.mul_(kept).add_(unbiased, alpha=self.momentum)
        return mean, var


class StackedGroupNorm(nn.GroupNorm):
    """GroupNorm, of which ``vmap`` knows every operation whatever the memory's layout."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised inputs [B, C, ...]."""
        of_group = list(range(2, x.dim() + 1))
        groups: Tensor = torch.unflatten(x.float(), 1, (self.num_groups, -1))
        centred = groups - groups.mean(of_group, keepdim=True)
        var = centred.square().mean(of_group, keepdim=True)
        y = (centred * (var + self.eps).rsqrt()).flatten(1, 2)
        if self.affine:
            apart = (-1, *(1,) * (x.dim() - 2))
            y = y * self.weight.view(apart) + self.bias.view(apart)
        return y.to(x.dtype)


class StackedConv2d(nn.Conv2d):
    """A convolution that has a kernel for many clients on a GPU, and rounds where autocast asks."""

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Tell whether a layer is one of PyTorch's that this computes."""
        return (
            isinstance(layer, nn.Conv2d)
            and type(layer) in (nn.Conv2d, GreyConv2d)
            and layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and layer.stride[0] == layer.stride[1]
            and layer.padding[0] == layer.padding[1]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [B, O, ...] of inputs [B, I, height, width]."""
        # In full float32 there are no matrix units to use, and Triton compiles for minutes.
        rounds = torch.is_autocast_enabled("cuda") or torch.backends.cudnn.allow_tf32
        if has_kernels(x) and rounds:
            y: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
                x, self.weight, self.stride[0], int(self.padding[0])
            )
            return y if self.bias is None else y + self.bias.view(-1, 1, 1).to(y.dtype)
        if torch.is_autocast_enabled(x.device.type):
            # Which under vmap leaves convolutions as they are.
            dtype = torch.get_autocast_dtype(x.device.type)
            bias = None if self.bias is None else self.bias.to(dtype)
            y = F.conv2d(x.to(dtype), self.weight.to(dtype), bias, self.stride, self.padding)
            return y.to(x.dtype)  # other layers than these have weights in it
        return super().forward(x)


class StackedGreyConv2d(StackedConv2d, GreyConv2d):
    """The same for grey images: in float32 on a processor a product."""


class StackedMean2d(nn.AdaptiveAvgPool2d):
    """An average over all pixels, of which ``vmap`` knows every operation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the averages [B, C, 1, 1] of inputs [B, C, height, width]."""
        return x.mean((-2, -1), keepdim=True)


def has_kernels(x: Tensor) -> bool:
    """Tell whether there are kernels for a tensor's device."""
    return x.device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernels() -> Any:
    # Imported only where there is a GPU: it takes Triton.
    return import_module("fedsim.models.kernels")


class _StackedConvolution(torch.autograd.Function):
    """Convolutions of stacks: images [K, B, I, height, width], weights [K, O, I, rows, columns]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
        """Return the outputs [K, B, O, ...], in the dtype of autocast where that is on."""
        ctx.stride, ctx.padding, ctx.dtype = stride, padding, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rounded = w.to(x.dtype)
        ctx.save_for_backward(x, rounded, w)
        y: Tensor = _kernels().convolve(x, rounded, stride, padding)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients in images and weights."""
        x, rounded, w = ctx.saved_tensors
        kernels, of_x, of_w = _kernels(), None, None
        if ctx.needs_input_grad[0]:
            of_x = kernels.convolve_back(g, rounded, *x.shape[-2:], ctx.stride, ctx.padding)
            of_x = of_x.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_w = kernels.weigh(x, g, w, ctx.stride, ctx.padding)
        return of_x, of_w, None, None


class _StackedNormalisation(torch.autograd.Function):
    """BatchNorm of stacks: images [K, B, C, height, width], masks [K, B], the others [K, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, *others: Any) -> Tensor:
        """Return the normalised images; the running statistics follow."""
        y: Tensor
        y, mean, scale = _kernels().normalise(x, mask, weight, *others)
        ctx.save_for_backward(x, mask, weight, mean, scale)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients in images, weight and bias."""
        of_x, of_weight, of_bias = _kernels().normalise_back(g, *ctx.saved_tensors)
        return of_x, None, of_weight, of_bias, None, None, None, None


class _ForClients(torch.autograd.Function):
    """What ``vmap`` calls once for all clients: ``stacked``, with the clients first."""

    stacked: type[torch.autograd.Function]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, int]:
        """Return the outputs for all clients."""
        whole = [
            arg if not isinstance(arg, Tensor)
            else arg.expand(info.batch_size, *arg.shape) if dim is None
            else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        ]  # fmt: skip
        return cls.stacked.apply(*whole), 0  # type: ignore[no-untyped-call]

    @staticmethod
    def forward(*args: Any) -> Any:
        """Not called: ``vmap`` finds the rule above."""
        raise AssertionError("only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Not called either."""


class _Convolution(_ForClients):
    stacked = _StackedConvolution


class _Normalisation(_ForClients):
    stacked = _StackedNormalisation

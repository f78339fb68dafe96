"""Residual networks with the CIFAR stem (a 3x3 convolution, no pooling).

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.models.layers import norm_layer
from fedsim.models.net import Model

ResNetNorm = Literal["batch", "group"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes (He et al., eq. 2)."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: ResNetNorm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm1 = norm_layer(norm, fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = norm_layer(norm, fan_out)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and fan_in == fan_out
            else nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), norm_layer(norm, fan_out)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for maps ``x``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet8(
    shape: tuple[int, ...], num_classes: int, *, norm: ResNetNorm = "batch", width: int = 16
) -> Model:
    """Return ResNet-8: three stages of one block, ``width`` channels in the first stage."""
    return _resnet("resnet8", shape, num_classes, (1, 1, 1), width, norm)


def resnet18(
    shape: tuple[int, ...], num_classes: int, *, norm: ResNetNorm = "batch", width: int = 64
) -> Model:
    """Return ResNet-18: four stages of two blocks, ``width`` channels in the first stage."""
    return _resnet("resnet18", shape, num_classes, (2, 2, 2, 2), width, norm)


def resnet34(
    shape: tuple[int, ...], num_classes: int, *, norm: ResNetNorm = "batch", width: int = 64
) -> Model:
    """Return ResNet-34: stages of 3, 4, 6 and 3 blocks, ``width`` channels in the first stage."""
    return _resnet("resnet34", shape, num_classes, (3, 4, 6, 3), width, norm)


def _resnet(
    name: str,
    shape: tuple[int, ...],
    num_classes: int,
    blocks: tuple[int, ...],
    width: int,
    norm: ResNetNorm,
) -> Model:
    # Below two pixels a side, BatchNorm would see one value a channel in a batch of one.
    side = 2 ** len(blocks)
    if len(shape) != 3 or min(shape[1:]) < side:
        raise ConfigError(
            f"model.name = {name!r} needs images of at least {side} x {side} pixels, "
            f"but one example has the shape {shape}"
        )
    if width < 1:
        raise ConfigError(f"model.width = {width}: must be at least 1")
    layers: list[nn.Module] = [
        nn.Conv2d(shape[0], width, 3, padding=1, bias=False),
        norm_layer(norm, width),
        nn.ReLU(),
    ]
    fan_in = width
    for stage, depth in enumerate(blocks):
        fan_out = width * 2**stage
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(BasicBlock(fan_in, fan_out, stride, norm))
            fan_in = fan_out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Model(nn.Sequential(*layers), fan_in, num_classes)

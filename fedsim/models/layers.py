"""Pieces the models share."""

from __future__ import annotations

from typing import Literal

from torch import nn

Norm = Literal["none", "batch", "group"]

GROUPS = 8
"""Most groups of a GroupNorm layer; fewer where the channels don't divide by 8."""


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Return a normalisation layer over ``channels`` feature maps.

    BatchNorm keeps running statistics with momentum 0.1 and no step counter: a count means
    nothing once models are averaged.
    """
    if norm == "batch":
        layer = nn.BatchNorm2d(channels)
        layer.num_batches_tracked = None
        return layer
    if norm == "group":
        return nn.GroupNorm(next(g for g in range(GROUPS, 0, -1) if channels % g == 0), channels)
    return nn.Identity()

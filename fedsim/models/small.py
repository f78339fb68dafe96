"""Small models: logistic regression, a perceptron and a two-layer CNN.

A model function takes the shape of one example and the number of classes; its keyword-only
parameters are what an experiment file can set under ``[model]``.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import nn

from fedsim.errors import ConfigError
from fedsim.models.layers import Flatten, Linear, Norm, norm_layer
from fedsim.models.net import Model

MAX_WIDTH = 1_000_000
"""Widths above this are taken for a mistake before memory is asked for them."""


def linear(shape: tuple[int, ...], num_classes: int) -> Model:
    """Return multinomial logistic regression on the flattened inputs.

    The backbone only flattens, so every weight is in the head.
    """
    return Model(nn.Flatten(), prod(shape), num_classes)


def mlp(shape: tuple[int, ...], num_classes: int, *, hidden: tuple[int, ...] = (128,)) -> Model:
    """Return a perceptron with ReLU layers.

    Parameters
    ----------
    shape : tuple of int
        Shape of one example.
    num_classes : int
        Number of classes.
    hidden : tuple of int
        Widths of the hidden layers, at least one, each 1..`MAX_WIDTH`; the last is the feature
        width.
    """
    if not hidden or min(hidden) < 1 or max(hidden) > MAX_WIDTH:
        raise ConfigError(
            f"model.hidden = {list(hidden)}: give one or more widths from 1 to {MAX_WIDTH}"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((prod(shape), *hidden)):
        layers += [Linear(fan_in, fan_out), nn.ReLU()]
    return Model(nn.Sequential(*layers), hidden[-1], num_classes)


def cnn(
    shape: tuple[int, ...],
    num_classes: int,
    *,
    channels: tuple[int, ...] = (16, 32),
    hidden: int = 0,
    norm: Norm = "none",
) -> Model:
    """Return a CNN: for each width a 3x3 convolution, a 2x2 max-pool, a norm and a ReLU.

    Parameters
    ----------
    shape : tuple of int
        Shape of one image, (channels, height, width).
    num_classes : int
        Number of classes.
    channels : tuple of int
        Widths of the convolutions, at least one, each 1..`MAX_WIDTH`.
    hidden : int
        Width of a fully connected ReLU layer before the head, at most `MAX_WIDTH`; 0 means none,
        and the features are the maps, flattened pixel by pixel (`fedsim.models.layers.Flatten`).
    norm : {"none", "batch", "group"}
        Normalisation after each pooling.

    Raises
    ------
    ConfigError
        If the data are not images, or too small for that many poolings.
    """
    if not channels or min(channels) < 1 or max(channels) > MAX_WIDTH:
        raise ConfigError(
            f"model.channels = {list(channels)}: give one or more widths from 1 to {MAX_WIDTH}"
        )
    if not 0 <= hidden <= MAX_WIDTH:
        raise ConfigError(
            f"model.hidden = {hidden}: must be 0 (none) or a width of at most {MAX_WIDTH}"
        )
    side = 2 ** len(channels)
    if len(shape) != 3 or min(shape[1:]) < side:
        raise ConfigError(
            f"model.name = 'cnn' with {len(channels)} poolings needs images of at least "
            f"{side} x {side} pixels, but one example has the shape {shape}; try model.name = 'mlp'"
        )
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((shape[0], *channels)):
        # After pooling, norm and ReLU are a quarter of the work; a ReLU gives the same values.
        layers += [
            nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=norm == "none"),
            nn.MaxPool2d(2),
            norm_layer(norm, fan_out),
            nn.ReLU(),
        ]
    layers.append(Flatten())
    features = channels[-1] * (shape[1] // side) * (shape[2] // side)
    if hidden:
        layers += [Linear(features, hidden), nn.ReLU()]
        features = hidden
    return Model(nn.Sequential(*layers), features, num_classes)

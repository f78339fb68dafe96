"""Checks of hyperparameters: one line that names the key, the value and what is allowed."""

from __future__ import annotations

from math import isfinite

from fedsim.errors import ConfigError
from fedsim.models import Weights, parts


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise a ConfigError unless a hyperparameter is finite and at least ``least``."""
    if not (value >= least and isfinite(value)):
        raise ConfigError(f"method.{name} = {value}: must be at least {least:g}")


def check_above(name: str, value: float, bound: float) -> None:
    """Raise a ConfigError unless a hyperparameter is finite and above ``bound``."""
    if not (value > bound and isfinite(value)):
        raise ConfigError(f"method.{name} = {value}: must be above {bound:g}")


def check_share(name: str, value: float) -> None:
    """Raise a ConfigError unless a hyperparameter lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"method.{name} = {value}: must be in [0, 1]")


def check_backbone(method: str, w: Weights) -> None:
    """Raise a ConfigError if a model has no arrays but the head's."""
    if not parts(w, ["backbone"]):
        raise ConfigError(
            f"{method} shares the layers before the head, and this model has none; choose another "
            "model.name, such as 'mlp' or 'cnn'"
        )

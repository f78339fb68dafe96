"""Checks of the model that a method is given."""

from __future__ import annotations

from fedsim.errors import ConfigError
from fedsim.models import Weights, parts


def check_backbone(method: str, w: Weights) -> None:
    """Raise a ConfigError if a model has no arrays but the head's."""
    if not parts(w, ["backbone"]):
        raise ConfigError(
            f"{method} shares the layers before the head, and this model has none; choose another "
            "model.name, such as 'mlp' or 'cnn'"
        )

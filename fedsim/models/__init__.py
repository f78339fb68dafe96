"""Models whose backbone and head are separate parts, and the functional view used in training."""

from fedsim.models.net import Arrays, Model, Net, Weights, parts

__all__ = ["Arrays", "Model", "Net", "Weights", "parts"]

"""Models whose backbone and head are separate parts, and the functional view used in training."""

from fedsim.models.net import Model, Net, Weights, parts

__all__ = ["Model", "Net", "Weights", "parts"]

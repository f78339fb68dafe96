"""A model in two parts, and the same model as a pure function of its weights.

Shapes: B examples in a batch, D features, C classes.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.func import functional_call

Weights = dict[str, Tensor]
"""Every array of a model by name: parameters, and the buffers of its normalisation layers."""


class Model(nn.Module):
    """A backbone that turns inputs into features and a head that turns features into logits.

    Parameters
    ----------
    backbone : torch.nn.Module
        Maps inputs [B, ...] to features [B, D].
    features : int
        D, the width of the features.
    num_classes : int
        C. The head is a linear layer with bias.
    """

    def __init__(self, backbone: nn.Module, features: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, num_classes)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, C] of inputs [B, ...]."""
        logits: Tensor = self.head(self.backbone(x))
        return logits


class Net:
    """A model as a pure function: logits = net(w, x).

    The weights are an argument, so that the same code serves one client, many clients at once
    and frozen teachers. Names start with ``backbone.`` or ``head.``.

    Parameters
    ----------
    model : Model
        The architecture; its own weights are only used as the initial ones.

    Examples
    --------
    >>> import torch
    >>> from fedsim.models.small import linear
    >>> net = Net(linear((1, 2, 2), 3))
    >>> w = net.initial_weights()
    >>> sorted(w)
    ['head.bias', 'head.weight']
    >>> net(w, torch.zeros(5, 1, 2, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, model: Model) -> None:
        self._initial = {name: tensor.detach().clone() for name, tensor in _arrays(model)}
        self.trainable = frozenset(name for name, _ in model.named_parameters())
        """Names of the parameters; the remaining arrays are buffers."""
        self.features = model.features
        # The weights always come from outside: keep the two modes as empty shells.
        self._train = copy.deepcopy(model).to("meta").train()
        self._eval = copy.deepcopy(self._train).eval()

    def initial_weights(self) -> Weights:
        """Return a copy of the weights the model was made with."""
        return {name: tensor.clone() for name, tensor in self._initial.items()}

    def __call__(self, w: Weights, x: Tensor) -> Tensor:
        """Return logits [B, C] in training mode; BatchNorm updates its buffers in ``w``."""
        logits: Tensor = functional_call(self._train, w, (x,))
        return logits

    def predict(self, w: Weights, x: Tensor) -> Tensor:
        """Return logits [B, C] in evaluation mode; nothing in ``w`` changes."""
        logits: Tensor = functional_call(self._eval, w, (x,))
        return logits


def _arrays(model: Model) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]

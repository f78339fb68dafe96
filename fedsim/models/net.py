"""A model in two parts, and the same model as a pure function of its weights.

Shapes: B examples in a batch, D features, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.models.layers import linear, quicken
from fedsim.models.stacked import Padding, StackedBatchNorm, to_stacked

Weights = dict[str, Tensor]
"""Arrays by name: a model's parameters and the buffers of its normalisation layers, and what
a method adds to them."""

Arrays = dict[str, NDArray[Any]]
"""The same as NumPy arrays."""


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
        features = self.backbone(x)
        if features.shape[1:] != (self.features,):
            raise ValueError(
                f"the backbone turns {len(x)} inputs into features of shape "
                f"{list(features.shape)}, but the model says [{len(x)}, {self.features}]"
            )
        logits: Tensor = self.head(features)
        return logits


class Net:
    """A model as a pure function: logits = net(w, x).

    The weights are an argument, so that the same code serves one client, many clients at once
    and frozen teachers. The model's names start with ``backbone.`` or ``head.``; arrays of other
    names in ``w`` are a method's own.

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
        arrays = [*model.named_parameters(), *model.named_buffers()]
        self._initial = {name: tensor.detach().clone() for name, tensor in arrays}
        self.trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        """Names of the model's parameters, but for those that are frozen."""
        self.frozen = frozenset(n for n, p in model.named_parameters() if not p.requires_grad)
        """Names of those."""
        self.buffers = frozenset(name for name, _ in model.named_buffers())
        """Names of its buffers: arrays that are never trained."""
        self.integer_buffers = {
            name: tensor.dtype
            for name, tensor in model.named_buffers()
            if not tensor.is_floating_point()
        }
        """The dtypes of the buffers of whole numbers or booleans, by name."""
        self.num_features = model.features
        self.num_classes = model.head.out_features
        self.padding = Padding()
        """Of the inputs in training mode; only `side_by_side` asks for it."""
        # The weights always come from outside: keep the two modes as empty shells.
        train, test = (copy.deepcopy(model.backbone).to("meta") for _ in range(2))
        names = _names(model.backbone)
        self._train = _Shell(quicken(train.train()), names, self.padding)
        self._eval = _Shell(test.eval(), names, self.padding)
        self._linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear

    @cached_property
    def side_by_side(self) -> Net:
        """The same function, for ``vmap`` to stack the weights and batches of many clients.

        Raises
        ------
        fedsim.models.stacked.PaddingUnknownError
            The model has a layer that knows no padding.
        """
        net = copy.copy(self)
        net._train, net._eval = (
            _Shell(to_stacked(copy.deepcopy(shell.backbone)), shell.names, self.padding)
            for shell in (self._train, self._eval)
        )
        net._linear = linear
        return net

    def initial_weights(self) -> Weights:
        """Return a copy of the weights the model was made with."""
        return {name: tensor.clone() for name, tensor in self._initial.items()}

    def with_own_buffers(self, w: Weights) -> Weights:
        """Return arrays such that training mode changes nothing in ``w``."""
        return {**w, **{name: w[name].clone() for name in self.buffers if name in w}}

    def __call__(self, w: Weights, x: Tensor) -> Tensor:
        """Return logits [B, C] in training mode; BatchNorm updates its buffers in ``w``."""
        return self.head(w, self.features(w, x))

    def predict(self, w: Weights, x: Tensor) -> Tensor:
        """Return logits [B, C] in evaluation mode; nothing in ``w`` changes."""
        return self.head(w, self.predict_features(w, x))

    def features(self, w: Weights, x: Tensor) -> Tensor:
        """Return features [B, D] in training mode; BatchNorm updates its buffers in ``w``."""
        return self._train(w, x)

    def predict_features(self, w: Weights, x: Tensor) -> Tensor:
        """Return features [B, D] in evaluation mode; nothing in ``w`` changes."""
        return self._eval(w, x)

    def head(self, w: Weights, features: Tensor, name: str = "head") -> Tensor:
        """Return the logits [B, C] of features [B, D] by one of the linear heads in ``w``.

        Its arrays are ``{name}.weight`` [C, D] and, where it has a bias, ``{name}.bias`` [C].
        """
        logits: Tensor = self._linear(features, w[f"{name}.weight"], w.get(f"{name}.bias"))
        return logits


class _Shell:
    """A backbone that is called with weights from outside.

    As ``torch.func.functional_call``, which looks for the places of the weights at each call: a
    tenth of a small CNN's step.
    """

    def __init__(self, backbone: nn.Module, names: list[str], padding: Padding) -> None:
        self.backbone = backbone
        self.names = names
        self._padding = padding
        self._norms = [layer for layer in backbone.modules() if isinstance(layer, StackedBatchNorm)]
        self._places: list[tuple[dict[str, Any], str, str]] = [
            (*place, name) for place, name in zip(_places(backbone), names, strict=True)
        ]

    def __call__(self, w: Weights, x: Tensor) -> Tensor:
        for held, local, name in self._places:
            held[local] = w[name]
        if self._norms and self.backbone.training:
            mask = self._padding.mask(x)
            for layer in self._norms:
                layer.mask = mask
        features: Tensor = self.backbone(x)
        return features


def _places(backbone: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Return where the layers hold their arrays, all places of one that several layers share."""
    return [
        (held, local)
        for layer in backbone.modules()
        for held in (layer._parameters, layer._buffers)
        for local, tensor in held.items()
        if tensor is not None
    ]


def _names(backbone: nn.Module) -> list[str]:
    """Return the name of the array at each of the `_places`."""
    arrays = [*backbone.named_parameters(), *backbone.named_buffers()]
    names = {id(tensor): f"backbone.{name}" for name, tensor in arrays}
    return [names[id(held[local])] for held, local in _places(backbone)]


def step_flops(model: Model, shape: tuple[int, ...], batch_size: int) -> int:
    """Return the floating-point operations of a step of SGD on a batch of inputs of a shape.

    Those of products and convolutions: two for each weight at each place where it is used, and
    twice as many in the backward pass. What isn't a layer with a ``weight`` doesn't count.

    Examples
    --------
    >>> from fedsim.models.small import mlp
    >>> step_flops(mlp((4,), 3, hidden=(5,)), (4,), 10)  # 3 x 10 x 2 x (4 x 5 + 5 x 3)
    2100
    """
    counts = []

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        weight = layer._parameters.get("weight")
        if weight is not None and weight.dim() > 1 and isinstance(output, Tensor):
            counts.append(2 * weight.numel() * (output[0].numel() // len(weight)))

    handles = [layer.register_forward_hook(count) for layer in model.modules()]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    model.train(training)
    for handle in handles:
        handle.remove()
    return 3 * batch_size * sum(counts)


def num_bytes(arrays: Arrays | Weights) -> int:
    """Return what arrays take on a network."""
    return sum([array.nbytes for array in arrays.values()])


def parts(w: Weights, names: Iterable[str]) -> Weights:
    """Return the arrays of some parts of a model: the part is the name up to the first dot.

    Examples
    --------
    >>> import torch
    >>> w = dict.fromkeys(["backbone.0.weight", "head.weight", "head.bias"], torch.zeros(1))
    >>> list(parts(w, ["head"]))
    ['head.weight', 'head.bias']
    """
    chosen = frozenset(names)
    return {name: tensor for name, tensor in w.items() if name.partition(".")[0] in chosen}

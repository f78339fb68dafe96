"""The memory that a client's step of SGD takes, known before it is taken."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fedsim.models.net import Net, Weights


def client_bytes(net: Net, w: Weights, batch_size: int, shape: tuple[int, ...]) -> int:
    """Return the bytes that one client of a stack takes while it trains.

    Weights, gradients, momentum and the weights to return, one batch of inputs, and what the
    forward pass keeps for the backward pass; gradients and what is kept twice, since a CUDA graph
    has memory of its own for them. It is counted on PyTorch's device "meta", where tensors have
    shapes and no contents; the work space of convolutions, which depends on the device, isn't in
    it.

    Parameters
    ----------
    net : Net
        The model.
    w : Weights
        Its weights, or a method's, which has its backbone. A method's own arrays count as the
        others do, which makes up for what a client keeps of them: SCAFFOLD's control, correction
        and change. A second model that isn't among them, such as Ditto's, is not in the number.
    batch_size : int
        Examples in a step, >= 1.
    shape : tuple of int
        One example's, as in ``Source.x_train.shape[1:]``.

    Examples
    --------
    >>> from fedsim.models.small import linear
    >>> net = Net(linear((1, 2, 2), 3))
    >>> weights = 4 * (3 * 4 + 3)
    >>> client_bytes(net, net.initial_weights(), 8, (1, 2, 2)) > 4 * weights + 4 * 8 * 4
    True
    """
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views of one tensor take no room of their own; the reference keeps the address unique.
        whole = tensor if tensor._base is None else tensor._base
        saved[id(whole)] = whole
        return tensor

    there = {name: torch.empty_like(tensor, device="meta") for name, tensor in w.items()}
    for name in net.trainable & there.keys():
        there[name].requires_grad_()
    x = torch.empty(batch_size, *shape, device="meta")
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        net.features(there, x)  # heads, of which a method may have others, keep next to nothing
    given = {id(tensor) for tensor in (*there.values(), x)}
    activations = sum(_bytes(tensor) for key, tensor in saved.items() if key not in given)
    weights = sum(_bytes(tensor) for tensor in w.values())
    return 5 * weights + _bytes(x) + 2 * activations


def fitting(one: int, memory: int) -> int:
    """Return how many clients of ``one`` bytes each may train side by side, at least 1.

    Half of the memory stays free: for the data, for the work space of convolutions, and for methods
    that keep more than plain SGD does. Ditto, with a second model and what holds it near the first,
    takes 1.8 times ``one`` where that is mostly weights.

    Examples
    --------
    >>> fitting(one=100, memory=1000), fitting(one=100, memory=50)
    (5, 1)
    """
    return max(1, memory // (2 * one))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

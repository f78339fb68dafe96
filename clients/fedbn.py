"""FedBN: the BatchNorm layers stay with the client, everything else is shared.

Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch
Normalization, ICLR 2021, algorithm 1.

==========  ====================================================================
paper       here
==========  ====================================================================
w_k         the model of client k
BN layers   the arrays that `batch_norm` returns: scale, shift, running mean and
            variance of each BatchNorm layer
E           ``training.local_epochs`` of the experiment
==========  ====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.engine.update import Client, LocalSGD
from fedsim.errors import ConfigError
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FedBN(LocalSGD):
    """FedBN's client: SGD on the whole model, of which all but the BatchNorm layers is sent.

    A client that has never trained has the initial BatchNorm layers, whose running statistics
    fit no data: with a small ``training.participation`` its accuracy says little. For the same
    reason the server's arrays aren't tested as a generic model.
    """

    views: ClassVar[tuple[str, ...]] = ("personal",)

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Return ``w``; ConfigError if the model has no BatchNorm layer."""
        if not batch_norm(w):
            raise ConfigError(
                "method.name = 'fedbn' keeps the BatchNorm layers with the clients, and this "
                "model has none; choose one that has, for example with model.norm = 'batch'"
            )
        return w

    def shared(self, w_k: Weights) -> Weights:
        """Return what a client uploads: all but its BatchNorm layers."""
        own = batch_norm(w_k)
        return {name: tensor for name, tensor in w_k.items() if name not in own}

    def own(self, w_k: Weights, client: Client) -> Weights:
        """Return what a client keeps: its BatchNorm layers."""
        return batch_norm(w_k)


def batch_norm(w: Weights) -> Weights:
    """Return the arrays of the BatchNorm layers: those beside which there is a running mean.

    Examples
    --------
    >>> import torch
    >>> names = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "2.bias"]
    >>> list(batch_norm(dict.fromkeys(names, torch.zeros(1))))
    ['1.weight', '1.bias', '1.running_mean', '1.running_var']
    """
    return {
        name: tensor for name, tensor in w.items() if f"{name.rpartition('.')[0]}.running_mean" in w
    }

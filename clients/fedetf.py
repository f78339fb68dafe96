"""FedETF: features on a sphere, trained towards a fixed simplex ETF.

Li, Shang, He, Lin, Wu: No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning
with Synthetic and Fixed Classifier, ICCV 2023, arXiv 2303.10058; where the paper leaves something
open, as in the authors' code, github.com/ZexiLee/ICCV-2023-FedETF. The paper's optional
fine-tuning on each client after training isn't implemented.

====================  =====================================================================
paper                 here
====================  =====================================================================
feature extractor     the arrays ``backbone.*`` of ``w``
projection layer      ``projection.weight`` [d', D], ``projection.bias`` [d']
V_ETF                 ``etf.weight`` [C, d']: fixed, unit norms, made once by the server
beta                  ``temperature.beta`` [1], learned; starts at ``temperature``
gamma                 ``gamma``
n_k,c                 ``client.class_counts``
====================  =====================================================================

Shapes: B examples in a batch or a test set, D features, d' projected ones, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.checks import check_above, check_at_least
from fedsim.engine.update import Batch, Client, Inputs, LocalSGD, cross_entropy
from fedsim.errors import ConfigError
from fedsim.models import Net, Weights, parts
from fedsim.models.etf import etf


@dataclass(frozen=True, kw_only=True)
class FedETF(LocalSGD):
    """FedETF's client.

    With h = g / ||g|| and g the projected features, each step minimises the balanced feature loss:
    the cross-entropy of the logits beta * <v_c, h> + gamma * log n_k,c. A class of which the
    client has no example counts as n_k,c = 1, as in the authors' code; in the paper's formula it
    would drop out. The client uploads all that it trains: backbone, projection and temperature,
    which are averaged.

    Parameters
    ----------
    projection : int
        d', the width of the projection, at least C; 0 means C, as in the authors' code.
    gamma : float
        Weight of the class sizes in the loss, >= 0; 0 means plain cross-entropy (authors: 1).
    temperature : float
        What beta starts from, > 0 (authors: 1).
    """

    trained: ClassVar[tuple[str, ...]] = ("backbone", "projection", "temperature")

    projection: int = 0
    gamma: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_at_least("projection", self.projection, 0)
        check_at_least("gamma", self.gamma, 0)
        check_above("temperature", self.temperature, 0)

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Put projection, temperature and the fixed classifier in the place of the model's head.

        The projection starts as a `torch.nn.Linear` does, uniform in +-1/sqrt(D).

        Raises
        ------
        ConfigError
            If the projection is narrower than the number of classes.
        """
        width = self.projection or net.num_classes
        if width < net.num_classes:
            raise ConfigError(
                f"method.projection = {width}: an ETF of {net.num_classes} classes needs at least "
                f"{net.num_classes}; 0 means as many as classes"
            )
        bound = 1 / sqrt(net.num_features)
        layer = torch.from_numpy(rng.uniform(-bound, bound, (width, net.num_features + 1))).float()
        return {
            **parts(w, ["backbone"]),
            "projection.weight": layer[:, :-1].contiguous(),
            "projection.bias": layer[:, -1].contiguous(),
            "etf.weight": etf(width, net.num_classes, rng).float(),
            "temperature.beta": torch.tensor([self.temperature]),
        }

    def given(self, w: Weights, client: Client) -> tuple[Weights, ...]:
        """Return n_k."""
        return ({"class_counts": client.class_counts},)

    def loss(
        self, net: Net, w_k: Weights, batch: Batch, *given: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the balanced feature loss."""
        (logits,) = self.logits(net, w_k, batch.x)
        log_counts = given[0]["class_counts"].clamp(min=1.0).log()
        return cross_entropy(logits + self.gamma * log_counts, batch), {}

    def logits(self, net: Net, w_k: Weights, x: Tensor) -> tuple[Tensor, ...]:
        """Return beta * <v_c, h>."""
        return (_classify(net, w_k, net.features(w_k, x)),)

    def teacher(self, net: Net, w: Weights, x: Tensor) -> Tensor:
        """Return beta * <v_c, h>, in evaluation mode."""
        return _classify(net, w, net.predict_features(w, x))

    def generic(self, net: Net, w: Weights, inputs: Inputs) -> dict[str, Tensor]:
        """Return beta * <v_c, h>."""
        return {"generic": _classify(net, w, inputs.features)}


def _classify(net: Net, w: Weights, features: Tensor) -> Tensor:
    """Return the logits [B, C] of features [B, D]."""
    h = F.normalize(net.head(w, features, "projection"))
    return w["temperature.beta"] * net.head(w, h, "etf")

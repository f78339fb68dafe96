"""FedPer: the base layers are shared, the personalisation layer stays with the client.

Arivazhagan, Aggarwal, Singh, Choudhary: Federated Learning with Personalization Layers, arXiv
1912.00818, 2019, algorithm 1. The personalisation layers are here the last linear layer, the
paper's smallest choice.

=======  ========================================================================
paper    here
=======  ========================================================================
W_B      the base layers: the arrays ``backbone.*`` of ``w``
W_P_j    the personalisation layer of client j: ``head.*`` of its state
n_j      ``num_examples`` of its upload
e, b     ``training.local_epochs`` and ``training.batch_size`` of the experiment
=======  ========================================================================

Shapes: B examples in a test set, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from clients.checks import check_backbone
from fedsim.engine.update import Client, Inputs, LocalSGD
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FedPer(LocalSGD):
    """FedPer's client: SGD on base and personalisation layer together, of which the base is sent.

    Every client begins with the server's initial head, where the paper draws one for each. The
    server's is never trained: there is no generic model.
    """

    views: ClassVar[tuple[str, ...]] = ("personal",)
    kept: ClassVar[tuple[str, ...]] = ("head",)

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Return ``w``; ConfigError if the model has no base layers to share."""
        check_backbone(type(self).__name__, w)
        return w

    def personal(self, net: Net, w_k: Weights, client: Client, inputs: Inputs) -> dict[str, Tensor]:
        """Return the logits [B, C] of the client's head on the global base layers."""
        return {"personal": net.head(w_k, inputs.features)}

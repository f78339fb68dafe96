"""FedRoD: a generic head that is right for balanced data, and a personal head on top of it.

Chen, Chao: On Bridging Generic and Personalized Federated Learning for Image Classification,
ICLR 2022, arXiv 2107.00778; its version with balanced softmax (Ren et al.: Balanced Meta-Softmax
for Long-Tailed Visual Recognition, NeurIPS 2020) and a linear personal head.

====================  =====================================================================
paper                 here
====================  =====================================================================
theta                 the arrays ``backbone.*`` of ``w``
psi                   ``head.weight``, ``head.bias``: the generic head
phi_m                 ``personal.weight``, ``personal.bias``: never leave client m
N_m,c                 ``client.class_counts``
====================  =====================================================================

Shapes: B examples in a batch or a test set, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clients.personal_head import trained_personal_head, with_personal_head
from fedsim.engine.update import Batch, Client, Inputs, LocalSGD, cross_entropy
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FedRoD(LocalSGD):
    """FedRoD's client.

    Each step minimises BSM(psi(f), y) + CE(sg psi(f) + phi_m(sg f), y) with f = theta(x), sg the
    stop-gradient and BSM the balanced softmax: the cross-entropy of psi(f) + log N_m, which leaves
    out the classes of which the client has no labelled example. So the generic loss trains
    theta and psi, the personal one phi_m alone. The client uploads theta, with BatchNorm's
    buffers, and psi.
    """

    views: ClassVar[tuple[str, ...]] = ("generic", "personal")
    trained: ClassVar[tuple[str, ...]] = ("backbone", "head", "personal")
    kept: ClassVar[tuple[str, ...]] = ("personal",)

    def begin(self, w: Weights, client: Client) -> Weights:
        """Add the client's personal head; before its first round it equals the generic head."""
        return with_personal_head(w, client)

    def own(self, w_k: Weights, client: Client) -> Weights:
        """Return the personal head, once a label has trained it."""
        return trained_personal_head(w_k, client)

    def given(self, w: Weights, client: Client) -> tuple[Weights, ...]:
        """Return N_m."""
        return ({"class_counts": client.class_counts},)

    def logits(self, net: Net, w_k: Weights, x: Tensor) -> tuple[Tensor, ...]:
        """Return psi(f), and sg psi(f) + phi_m(sg f)."""
        f = net.features(w_k, x)
        generic = net.head(w_k, f)
        return generic, generic.detach() + net.head(w_k, f.detach(), "personal")

    def loss(
        self, net: Net, w_k: Weights, batch: Batch, *given: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the balanced softmax loss plus the personal cross-entropy."""
        generic, personal = self.logits(net, w_k, batch.x)
        # exp(-1e9) is 0 as exp(-inf) is, but padding labelled with an absent class stays finite.
        log_counts = given[0]["class_counts"].log().clamp(min=-1e9)
        return cross_entropy(generic + log_counts, batch) + cross_entropy(personal, batch), {}

    def personal(self, net: Net, w_k: Weights, client: Client, inputs: Inputs) -> dict[str, Tensor]:
        """Return psi(f) + phi_m(f), on the global backbone's features."""
        f = inputs.features
        return {"personal": net.head(w_k, f) + net.head(w_k, f, "personal")}

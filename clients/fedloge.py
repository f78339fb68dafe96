"""FedLoGe: a backbone trained through a fixed sparse ETF, an auxiliary and a personal head.

Xiao et al.: FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data, ICLR 2024,
arXiv 2401.08977.

====================  ======================================================================
paper                 here
====================  ======================================================================
theta                 the arrays ``backbone.*`` of ``w``
psi, SSE-C            ``etf.weight``: fixed, without bias, made once by the server
psi_aux               ``head.weight``, ``head.bias``: the auxiliary global head
psi_k                 ``personal.weight``, ``personal.bias``: never leave the client
beta                  ``sparsity``
gamma                 ``etf_norm``
====================  ======================================================================

Shapes: B examples in a batch or a test set, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from clients.checks import check_backbone
from clients.personal_head import trained_personal_head, with_personal_head
from fedsim.checks import check_above, check_hyperparameter
from fedsim.engine.update import Client, ClientUpdate, Inputs, LocalSGD
from fedsim.models import Net, Weights
from fedsim.models.etf import sparse_etf


@dataclass(frozen=True, kw_only=True)
class LoGeModel(ClientUpdate):
    """What FedLoGe's model is, and its four views; how it is trained is up to the subclass.

    Parameters
    ----------
    sparsity : float
        Share of the fixed classifier's entries that are zero, in [0, 1); 0 is a dense ETF.
    etf_norm : float
        Norm of each class vector of the fixed classifier, from 1e-6 to 1e6.
    etf_recipe : {"gram", "angles"}
        How the fixed classifier is made; see `fedsim.models.etf.sparse_etf`. "angles" is the
        authors' own, which only comes near an ETF, and sets class 0 apart.
    realigned_norm : float
        Norm of each class vector of the realigned generic head, > 0 (the authors' code: 1.7).
    """

    views: ClassVar[tuple[str, ...]] = (
        "generic",
        "generic-realigned",
        "personal",
        "personal-realigned",
    )
    trained: ClassVar[tuple[str, ...]] = ("backbone", "head", "personal")
    kept: ClassVar[tuple[str, ...]] = ("personal",)

    sparsity: float = 0.6
    etf_norm: float = 0.1
    etf_recipe: Literal["gram", "angles"] = "gram"
    realigned_norm: float = 1.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hyperparameter(0 <= self.sparsity < 1, "sparsity", self.sparsity, "in [0, 1)")
        norm = self.etf_norm
        check_hyperparameter(1e-6 <= norm <= 1e6, "etf_norm", norm, "from 1e-6 to 1e6")
        check_above("realigned_norm", self.realigned_norm, 0)

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Add the fixed classifier, SSE-C; ConfigError if the model has no backbone to train."""
        check_backbone(type(self).__name__, w)
        psi = sparse_etf(
            net.num_features,
            net.num_classes,
            rng,
            sparsity=self.sparsity,
            norm=self.etf_norm,
            recipe=self.etf_recipe,
        )
        return {**w, "etf.weight": psi}

    def begin(self, w: Weights, client: Client) -> Weights:
        """Add the client's personal head; before its first round it equals the auxiliary head."""
        return with_personal_head(w, client)

    def own(self, w_k: Weights, client: Client) -> Weights:
        """Return the personal head, once a label has trained it."""
        return trained_personal_head(w_k, client)

    def logits(self, net: Net, w_k: Weights, x: Tensor) -> tuple[Tensor, ...]:
        """Return psi(f), psi_aux(f) and psi_k(f): only the first trains the backbone."""
        f = net.features(w_k, x)
        detached = f.detach()
        return (
            net.head(w_k, f, "etf"),
            net.head(w_k, detached),
            net.head(w_k, detached, "personal"),
        )

    # ----- the four views (realigned: GLA-FR) -----------------------------------------------

    def generic(self, net: Net, w: Weights, inputs: Inputs) -> dict[str, Tensor]:
        """Return the logits of the fixed classifier, and of the realigned auxiliary head."""
        norms = w["head.weight"].norm(dim=1, keepdim=True)
        realigned = w["head.weight"] * (self.realigned_norm / norms)
        return {
            "generic": net.head(w, inputs.features, "etf"),
            "generic-realigned": F.linear(inputs.features, realigned, w["head.bias"]),
        }

    def personal(self, net: Net, w_k: Weights, client: Client, inputs: Inputs) -> dict[str, Tensor]:
        """Return the sum of the personal and the auxiliary head's logits, and realigned.

        Where all of a client's examples are labelled, the classes that it has none of get minus
        infinity (and a test example of such a class an infinite loss); unlabelled ones may be of
        any class. For the realigned view, each class vector of the auxiliary head is scaled by the
        norm of the personal one.

        The authors' code masks the classes of which a client has no test example, which are more,
        so that its figures are a little higher; and in its realigned view the personal head's
        product takes the place of the auxiliary one's.
        """
        f = inputs.features
        n_k = client.class_counts
        absent = (n_k == 0) & bool(len(client.labelled) and not len(client.unlabelled))
        aux = net.head(w_k, f).masked_fill(absent, -inf)
        norms = w_k["personal.weight"].norm(dim=1, keepdim=True)
        realigned = F.linear(f, w_k["head.weight"] * norms, w_k["personal.bias"])
        return {
            "personal": net.head(w_k, f, "personal") + aux,
            "personal-realigned": realigned + aux,
        }


@dataclass(frozen=True, kw_only=True)
class FedLoGe(LoGeModel, LocalSGD):
    """FedLoGe's client: SGD on the sum of the three heads' cross-entropies.

    Each step minimises CE(psi(f), y) + CE(psi_aux(sg f), y) + CE(psi_k(sg f), y) with f = theta(x)
    and sg the stop-gradient, so the three gradients don't mix. The client uploads theta,
    with BatchNorm's buffers, and psi_aux; psi_k stays.

    Through class vectors of norm 0.1 a step moves the backbone by a tenth of what those of norm 1
    would. The authors train for 500 rounds of five epochs in batches of 8; where there are fewer,
    a higher learning rate and BatchNorm (``model.norm = "batch"``) make good for much of it, as in
    ``experiments/fedloge_digits.toml``.
    """

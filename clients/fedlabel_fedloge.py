"""FedLabel on FedLoGe's model: clients that are long-tailed and only partly labelled.

FedLabel (Cho, Joshi, Dimitriadis, ICCV 2023, see ``clients/fedlabel.py``) says how the unlabelled
examples get their labels, FedLoGe (Xiao et al., ICLR 2024, see ``clients/fedloge.py``) what the
model and its heads are. Two things are this method's own. The two teachers are the auxiliary heads
of the client's labelled model and of the global one: the fixed classifier, which the backbone has
to learn to serve, knows rare classes last. And pseudo-labels train the backbone alone, through the
fixed classifier, for they are scarcest and most often wrong in the tail; the auxiliary and the
personal head, which FedLoGe learns apart from the backbone, see true labels only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.fedlabel import FedLabel
from clients.fedloge import LoGeModel
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FedLabelFedLoGe(LoGeModel, FedLabel):
    """FedLabel's steps over FedLoGe's backbone and heads; parameters are those of both.

    With the sequential schedule the heads stay as they were in the unlabelled pass, but for weight
    decay, and after the warm-up the personal heads of both passes are averaged half and half, as
    the server averages the rest.
    """

    def teacher(self, net: Net, w: Weights, x: Tensor) -> Tensor:
        """Return the logits of the auxiliary head."""
        return net.head(w, net.predict_features(w, x))

    def pseudo_logits(self, net: Net, w_k: Weights, x: Tensor) -> tuple[Tensor, ...]:
        """Return psi(f), the fixed classifier's logits."""
        return (net.head(w_k, net.features(w_k, x), "etf"),)

"""FedLabel on FedLoGe's model: clients that are long-tailed and only partly labelled.

FedLabel (Cho, Joshi, Dimitriadis, ICCV 2023, see ``clients/fedlabel.py``) says how the unlabelled
examples get their labels, FedLoGe (Xiao et al., ICLR 2024, see ``clients/fedloge.py``) what the
model and its heads are. Here the two teachers are the fixed classifiers of the client's labelled
model and of the global one, and a pseudo-label trains all three heads as a label does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.fedlabel import FedLabel
from clients.fedloge import LoGeModel
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FedLabelFedLoGe(LoGeModel, FedLabel):
    """FedLabel's two passes over FedLoGe's backbone and heads; parameters are those of both.

    The personal heads of the labelled and of the unlabelled pass are averaged half and half, as
    the server averages the rest.
    """

    def teacher(self, net: Net, w: Weights, x: Tensor) -> Tensor:
        """Return the logits of the fixed classifier, the generic view."""
        return net.head(w, net.predict_features(w, x), "etf")

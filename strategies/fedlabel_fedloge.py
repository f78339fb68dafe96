"""FedLabel's server on FedLoGe's model.

Cho, Joshi, Dimitriadis: Local or Global: Selective Knowledge Assimilation for Federated Learning
with Limited Labels, ICCV 2023; Xiao et al.: FedLoGe: Joint Local and Generic Federated Learning
under Long-tailed Data, ICLR 2024. The clients are in ``clients/fedlabel_fedloge.py``.
"""

from __future__ import annotations

from strategies.fedlabel import FedLabel


class FedLabelFedLoGe(FedLabel):
    """See `FedLabel`: backbones and auxiliary heads are averaged, the sparse ETF stays."""

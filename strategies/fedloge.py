"""FedLoGe: the server averages backbone and auxiliary head; the fixed classifier stays.

Xiao et al.: FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data, ICLR 2024,
arXiv 2401.08977. The clients, and the realignment of the heads when they are tested, are in
``clients/fedloge.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FedLoGe(FedAvg):
    """FedLoGe's server: see `FedAvg`; what no client uploads, the sparse ETF, stays as it is."""

"""FedBABU: the server averages the bodies; the head stays as it was drawn.

Oh, Kim, Yun: FedBABU: Toward Enhanced Representation for Federated Image Classification,
ICLR 2022, algorithm 1. The clients, and their fine-tuning when they are tested, are in
``clients/fedbabu.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FedBABU(FedAvg):
    """FedBABU's server: see `FedAvg`; what no client uploads, the random head, stays as it is."""

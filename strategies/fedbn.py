"""FedBN: the server averages everything but the BatchNorm layers.

Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch
Normalization, ICLR 2021, algorithm 1. The paper's mean gives every client the same weight; this
one weights by the number of examples. The clients are in ``clients/fedbn.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FedBN(FedAvg):
    """FedBN's server: see `FedAvg`; what no client uploads, BatchNorm, stays as it is."""

"""FedPer: the server averages the base layers; the personalisation layers never reach it.

Arivazhagan, Aggarwal, Singh, Choudhary: Federated Learning with Personalization Layers, arXiv
1912.00818, 2019, algorithm 1. The clients are in ``clients/fedper.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FedPer(FedAvg):
    """FedPer's server: see `FedAvg`; what no client uploads, the initial head, stays as it is."""

"""FedRep: the server averages the representation; the heads never reach it.

Collins, Hassani, Mokhtari, Shakkottai: Exploiting Shared Representations for Personalized
Federated Learning, ICML 2021, algorithm 1. The paper's mean gives every client the same weight;
this one weights by the number of examples. The clients are in ``clients/fedrep.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FedRep(FedAvg):
    """FedRep's server: see `FedAvg`; what no client uploads, the initial head, stays as it is."""

"""Ditto: FedAvg, beside which every client has a personal model that the server never sees.

Li, Hu, Beirami, Smith: Ditto: Fair and Robust Federated Learning Through Personalization,
ICML 2021, algorithm 1. The clients are in ``clients/ditto.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class Ditto(FedAvg):
    """Ditto's server: see `FedAvg`."""

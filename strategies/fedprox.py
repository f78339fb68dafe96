"""FedProx: FedAvg whose clients are held near the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks,
MLSys 2020, algorithm 2. The server averages as in FedAvg; the proximal term is the client's,
in ``clients/fedprox.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedProx's server: see `FedAvg`."""

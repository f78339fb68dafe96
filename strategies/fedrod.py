"""FedRoD: the server averages backbone and generic head; the personal heads stay away.

Chen, Chao: On Bridging Generic and Personalized Federated Learning for Image Classification,
ICLR 2022, arXiv 2107.00778. The two losses and the personal head are the client's, in
``clients/fedrod.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FedRoD(FedAvg):
    """FedRoD's server: see `FedAvg`."""

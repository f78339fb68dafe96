"""FedETF: the server averages backbone, projection and temperature; the classifier is fixed.

Li, Shang, He, Lin, Wu: No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning
with Synthetic and Fixed Classifier, ICCV 2023, arXiv 2303.10058. The fixed classifier and the loss
are in ``clients/fedetf.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FedETF(FedAvg):
    """FedETF's server: see `FedAvg`; what no client uploads, the ETF, stays as it is."""

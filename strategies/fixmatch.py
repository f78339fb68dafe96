"""FixMatch on FedAvg: the server averages, the clients pseudo-label.

Sohn et al.: FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence,
NeurIPS 2020. The method is the clients': ``clients/fixmatch.py``.
"""

from __future__ import annotations

from strategies.fedavg import FedAvg


class FixMatch(FedAvg):
    """FixMatch's server: see `FedAvg`; n_k counts unlabelled examples too."""

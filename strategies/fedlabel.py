"""FedLabel: labelled and unlabelled models are averaged apart.

Cho, Joshi, Dimitriadis: Local or Global: Selective Knowledge Assimilation for Federated Learning
with Limited Labels, ICCV 2023, arXiv 2307.08809. The clients are in ``clients/fedlabel.py``.

=================  =============================================================
paper              here
=================  =============================================================
w_l,k and w_u,k    the arrays ``labelled`` and ``unlabelled`` of client k's reply
n_k                ``num_pseudo`` in its metrics, or what a subclass's ``weights`` name
=================  =============================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, Unpack

from flwr.app import ArrayRecord, Message, MetricRecord

from strategies.fedavg import (
    NUM_EXAMPLES,
    FedAvg,
    Sampling,
    mean_metrics,
    number,
    weighted_mean,
)


class FedLabel(FedAvg):
    """FedLabel's server.

    Parameters
    ----------
    aggregation : {"disjoint", "single"}
        ``"disjoint"``: half the uniform mean of the labelled models, over the clients that have
        labels, plus half the mean of the unlabelled models weighted by n_k. ``"single"``: the
        weighted mean of the one model that each client uploads, as FedAvg.
    schedule : {"sequential", "joint"}
        ``"joint"`` clients upload one model, averaged as in FedAvg.
    **sampling
        See `FedAvg`.
    """

    weights: Mapping[str, str] = MappingProxyType(
        {"labelled": "has_labels", "unlabelled": "num_pseudo"}
    )

    def __init__(
        self,
        *,
        aggregation: Literal["disjoint", "single"] = "disjoint",
        schedule: Literal["sequential", "joint"] = "sequential",
        **sampling: Unpack[Sampling],
    ) -> None:
        super().__init__(**sampling)
        self.disjoint = aggregation == "disjoint" and schedule == "sequential"
        if not self.disjoint:
            self.weights = FedAvg.weights

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Set w to 1/2 mean_k(w_l,k) + 1/2 sum_k(n_k * w_u,k) / sum_k(n_k)."""
        if not self.disjoint:
            return super().aggregate_train(server_round, replies)
        contents = [reply.content for reply in replies if reply.has_content()]
        weights = self.weights or FedLabel.weights
        n = [number(content, weights["unlabelled"]) for content in contents]
        if not sum(n):
            return None, None
        unlabelled = weighted_mean([content.array_records["unlabelled"] for content in contents], n)
        # Without labels w_l,k is w: such clients have no say, and w it is if nobody has labels.
        some = [content for content in contents if number(content, weights["labelled"])]
        if some:
            labelled = weighted_mean(
                [content.array_records["labelled"] for content in some],
                [number(content, weights["labelled"]) for content in some],
            )
        else:
            labelled = ArrayRecord({name: self.sent[name] for name in unlabelled})
        mean = weighted_mean([labelled, unlabelled], [0.5, 0.5])
        examples = [number(content, NUM_EXAMPLES) for content in contents]
        return self.complete(mean), mean_metrics(contents, examples)

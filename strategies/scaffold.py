"""SCAFFOLD: the server averages the clients' models and what changes in their control variates.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning, ICML 2020, arXiv 1910.06378, algorithm 1. The clients are in
``clients/scaffold.py``.

==========  ================================================================
paper       here
==========  ================================================================
x           the arrays ``backbone.*`` and ``head.*``
c           the arrays ``control.*``
y_i         the group ``arrays`` of client i's reply
c_i+ - c_i  the group ``control``
S           the clients that replied and have labelled examples
N           ``num_clients``, the number of all clients
eta_g       ``global_lr``
==========  ================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Unpack

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim.checks import check_above
from strategies.fedavg import (
    NUM_EXAMPLES,
    FedAvg,
    Sampling,
    mean_metrics,
    number,
    weighted_mean,
)


class Scaffold(FedAvg):
    """SCAFFOLD's server.

    All clients with labelled examples count alike, as in the paper, in whose experiments they have
    the same number of examples: f is the mean of the f_i. BatchNorm's running statistics are
    averaged in the same way, whatever eta_g. Clients without labels belong to N, with c_i = 0, as
    those do that haven't trained yet: N is the paper's, and the server isn't told who has labels.
    Where there are many, c stays smaller than the mean gradient, and so do the corrected steps:
    where only half of the clients have labels, training takes about twice as many rounds.

    Parameters
    ----------
    global_lr : float
        eta_g, > 0 (the paper's experiments: 1).
    **sampling
        See `FedAvg`.
    """

    weights: Mapping[str, str] = MappingProxyType({"arrays": "has_labels", "control": "has_labels"})

    def __init__(self, *, global_lr: float = 1.0, **sampling: Unpack[Sampling]) -> None:
        super().__init__(**sampling)
        check_above("global_lr", global_lr, 0)
        self.global_lr = global_lr
        self.num_clients = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Choose S at random and send it x and c."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self.num_clients = len(self._population(grid))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Set x to x + eta_g * mean(y_i - x) and c to c + |S| / N * mean(c_i+ - c_i)."""
        contents = [reply.content for reply in replies if reply.has_content()]
        in_s = [number(content, "has_labels") for content in contents]
        if not sum(in_s):
            return None, None
        y, change = (
            weighted_mean([content.array_records[group] for content in contents], in_s)
            for group in ("arrays", "control")
        )
        new, share = dict(y), sum(in_s) / self.num_clients
        for name in change:  # of trainable arrays only: statistics take no step of eta_g
            of = name.removeprefix("control.")
            x, c = self.sent[of].numpy(), self.sent[name].numpy()
            new[of] = _moved(x, self.global_lr, y[of].numpy().astype(np.float64) - x)  # line 16
            new[name] = _moved(c, share, change[name].numpy().astype(np.float64))  # line 17
        n = [number(content, NUM_EXAMPLES) for content in contents]
        return self.complete(ArrayRecord(new)), mean_metrics(contents, n)


def _moved(start: NDArray[Any], step: float, by: NDArray[np.float64]) -> Array:
    return Array(np.asarray(start + step * by, dtype=start.dtype))

"""SCAFFOLD: control variates correct the clients' drift.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning, ICML 2020, arXiv 1910.06378, algorithm 1 with option II. The server is in
``strategies/scaffold.py``.

=========  =====================================================================
paper      here
=========  =====================================================================
x          ``x``, the arrays ``backbone.*`` and ``head.*`` of ``w``
c          ``c``, the arrays ``control.*`` of ``w``, one for each trainable one
c_i        ``c_i``, arrays of the same names: the client's state
y_i        ``y_i``
g_i(y_i)   gradient of the mean cross-entropy of a batch of labelled examples
K          ``k``, the steps of ``training.local_epochs`` or ``local_steps``
eta_l      ``eta_l``, ``training.lr`` of the experiment in this round
=========  =====================================================================
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Client, LocalSGD, Steps, Upload, sgd
from fedsim.models import Net, Weights, parts


@dataclass(frozen=True, kw_only=True)
class Scaffold(LocalSGD):
    """SCAFFOLD's client.

    Its c_i is zero until it first trains. A client without labelled examples uploads x and no
    change of c_i, and has no say in the means.

    It must train without momentum: with it, option II no longer gives the mean of the g_i, but up
    to 1 / (1 - momentum) times as much, and from about 0.5 on c_i may grow without bound. Weight
    decay does no harm: f_i then includes its penalty, and so does g_i.
    """

    def warn_of(self, training: LocalTraining) -> None:
        """Warn of momentum."""
        if training.momentum:
            warnings.warn(
                f"training.momentum = {training.momentum}: SCAFFOLD's control variates are right "
                "for training.momentum = 0 only",
                stacklevel=3,
            )

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Add c, which is zero at first."""
        c = {f"control.{name}": torch.zeros_like(w[name]) for name in w if name in net.trainable}
        return {**w, **c}

    def update(self, w: Weights, client: Client) -> Steps:
        """Train y_i from x by K corrected steps, and renew c_i."""
        x, c = self.shared(w), parts(w, ["control"])
        zero = {name: torch.zeros_like(c[name]) for name in c}
        c_i = client.state or zero
        # Line 10: y_i <- y_i - eta_l (g_i(y_i) - c_i + c).
        correction = {name.removeprefix("control."): c[name] - c_i[name] for name in c}
        y_i, log = yield from sgd(self.loss, x, client.labelled, correction=correction)
        k, eta_l = client.training.num_steps(client.labelled), client.training.lr
        change, state = zero, client.state
        if k * eta_l:
            # Line 12, option II: c_i+ - c_i = -c + (x - y_i) / (K eta_l).
            moved = {f"control.{name}": x[name] - y_i[name] for name in x}
            change = {name: moved[name] / (k * eta_l) - c[name] for name in c}
            state = {name: c_i[name] + change[name] for name in c}
        metrics = {**log, "has_labels": float(len(client.labelled) > 0)}
        return Upload({"arrays": y_i, "control": change}, len(client.labelled), metrics, state)

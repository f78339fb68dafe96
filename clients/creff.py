"""CReFF: clients that also send the gradients with which the server makes features.

Shang, Lu, Huang, Wang: Federated Learning on Heterogeneous and Long-Tailed Data via Classifier
Re-Training with Federated Features, IJCAI 2022, arXiv 2204.13399; details as in the authors' code,
github.com/shangxinyi/CReFF-FL. The server is in ``strategies/creff.py``.

=========================  ================================================================
paper                      here
=========================  ================================================================
w^t                        the arrays ``backbone.*`` and ``head.*`` of ``w``
re-trained classifier      ``retrained.weight``, ``retrained.bias``
real feature gradients     the group ``gradients`` of the upload
=========================  ================================================================

Shapes: B examples in a batch or a test set, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.update import Batch, Client, Inputs, LocalSGD, Request, Steps, sgd
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class CReFF(LocalSGD):
    """CReFF's client: FedAvg's, and the gradients of the re-trained classifier class by class.

    The re-trained classifier is tested, on the averaged backbone, but no client trains it:
    local training goes on from the averaged head.
    """

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Add the re-trained classifier, which starts as the model's head."""
        first = {f"retrained.{part}": w[f"head.{part}"].clone() for part in ("weight", "bias")}
        return {**w, **first}

    def update(self, w: Weights, client: Client) -> Steps:
        """Train as in FedAvg, then add the class gradients at the received model."""
        upload = yield from super().update(w, client)
        gradients = yield from self.class_gradients(w, client)
        return replace(upload, arrays={**upload.arrays, "gradients": gradients})

    def class_gradients(self, w: Weights, client: Client) -> Generator[Request, Any, Weights]:
        """Return the mean gradient of the cross-entropy over the examples of each class.

        It is that of the re-trained classifier on the features of the received backbone, in
        evaluation mode, from one pass over the labelled examples, augmented as in training. (The
        authors' code averages ten draws of at most 32 augmented examples of a class.)

        Returns
        -------
        Weights
            ``gradients.weight`` [C, C, D] and ``gradients.bias`` [C, C], first axis: the class of
            the examples; ``gradients.has`` [C], 1 where the client has the class and 0 elsewhere,
            where the gradients are 0 too.
        """
        weight = w["retrained.weight"]
        c, d = weight.shape
        sums = {
            "gradients.weight": weight.new_zeros(c, c, d),
            "gradients.bias": weight.new_zeros(c, c),
            "nothing.trained": weight.new_zeros(1),
        }
        found, _ = yield from sgd(
            self.add_gradients, {**w, **sums}, client.labelled, train=("nothing",), epochs=1
        )
        n = client.class_counts.clamp(min=1.0)
        return {
            "gradients.weight": found["gradients.weight"] / n[:, None, None],
            "gradients.bias": found["gradients.bias"] / n[:, None],
            "gradients.has": (client.class_counts > 0).float(),
        }

    def add_gradients(
        self, net: Net, w_k: Weights, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the batch's gradients to the sums of their classes; there is nothing to minimise."""
        f = net.predict_features(w_k, batch.x)
        p = net.head(w_k, f, "retrained").softmax(dim=1)
        # Not F.one_hot, which looks at the labels' numbers: a tape, or vmap, takes no such thing.
        y = (batch.y[:, None] == torch.arange(net.num_classes, device=f.device)).float()
        # Of one example: the cross-entropy's slope is p - y in the logits, (p - y) f^T in the head.
        error = (p - y) * batch.mask[:, None]
        # Sums of scalars, which a loss may return, are too small for a gradient: these arrays
        # follow the batches, untrained, as BatchNorm's buffers do.
        of_class = y[:, :, None] * error[:, None, :]  # [B, C, C]
        sums = w_k["gradients.weight"]
        sums.add_((of_class.flatten(1).t() @ f).view_as(sums))
        w_k["gradients.bias"].add_(of_class.sum(dim=0))
        return w_k["nothing.trained"].sum(), {}

    def generic(self, net: Net, w: Weights, inputs: Inputs) -> dict[str, Tensor]:
        """Return the logits of the re-trained classifier on the averaged backbone."""
        return {"generic": net.head(w, inputs.features, "retrained")}

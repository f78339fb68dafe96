"""FedBABU: only the body is trained, against one random head; clients fine-tune to be tested.

Oh, Kim, Yun: FedBABU: Toward Enhanced Representation for Federated Image Classification,
ICLR 2022, algorithm 1.

============  ==================================================================
paper         here
============  ==================================================================
theta_ext     the body: the arrays ``backbone.*`` of ``w``
theta_cls     the head: ``head.*`` of ``w``, random and the same for everybody
tau           ``training.local_epochs`` of the experiment
tau_f         ``finetune_epochs``
============  ==================================================================

Shapes: B examples in a test set, C classes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from clients.checks import check_backbone
from fedsim.checks import check_at_least
from fedsim.engine.update import Client, Inputs, LocalSGD, Request, sgd
from fedsim.models import Net, Weights


@dataclass(frozen=True, kw_only=True)
class FedBABU(LocalSGD):
    """FedBABU's client: SGD on the body, with the head as the server drew it.

    A client keeps nothing. Its personal model is made anew whenever it is tested, which costs as
    much as training it for ``finetune_epochs``; ``evaluation.every`` and
    ``evaluation.participation`` say how often that happens.

    Parameters
    ----------
    finetune : {"full", "head"}
        What is fine-tuned: the whole model, as the paper does by default, or the head alone. The
        head is then tested on the body as the server has it: BatchNorm's running statistics
        stay the global ones.
    finetune_epochs : int
        Epochs of fine-tuning on the client's labelled examples, with the settings of
        ``[training]``, >= 0; 0 means that the personal model is the generic one. The learning rate
        is the round's: under ``lr_schedule = "cosine"`` the last rounds hardly fine-tune.
    """

    views: ClassVar[tuple[str, ...]] = ("generic", "personal")
    trained: ClassVar[tuple[str, ...]] = ("backbone",)

    finetune: Literal["full", "head"] = "full"
    finetune_epochs: int = 5

    def __post_init__(self) -> None:
        check_at_least("finetune_epochs", self.finetune_epochs, 0)

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Return ``w``; ConfigError if the model has no body to train."""
        check_backbone(type(self).__name__, w)
        return w

    def personalise(self, w: Weights, client: Client) -> Generator[Request, Any, Weights]:
        """Fine-tune the global model for ``finetune_epochs``."""
        train = ("head",) if self.finetune == "head" else ("backbone", "head")
        w_k, _ = yield from sgd(
            self.loss, w, client.labelled, train=train, epochs=self.finetune_epochs
        )
        return w_k

    def personal(self, net: Net, w_k: Weights, client: Client, inputs: Inputs) -> dict[str, Tensor]:
        """Return the logits [B, C] of the fine-tuned model."""
        if self.finetune == "head":
            return {"personal": net.head(w_k, inputs.features)}
        return {"personal": net.predict(w_k, inputs.x)}

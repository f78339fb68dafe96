"""How a client trains: the experiment's ``[training]``, as the engine needs it."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Literal


def epoch_steps(counts: list[int], batch_size: int) -> int:
    """Return the steps of an epoch over one or several kinds of examples.

    The largest kind is gone through once; without examples of any one kind there is no step.

    Examples
    --------
    >>> epoch_steps([5], 2), epoch_steps([5, 12], 2), epoch_steps([0, 12], 2)
    (3, 6, 0)
    """
    return math.ceil(max(counts) / batch_size) if min(counts) else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalTraining:
    """How every pass of SGD on a client is done.

    Attributes
    ----------
    epochs : int
        Passes over the client's examples where a method doesn't set the steps, >= 1.
    steps : int
        Steps of a pass instead of ``epochs``, >= 0; 0 means ``epochs``.
    batch_size : int
        Examples in a step, >= 1.
    lr : float
        Learning rate of the first round, > 0.
    lr_decay : float
        Factor of the learning rate from one round to the next, in (0, 1].
    lr_schedule : {"constant", "cosine"}
        ``"cosine"``: besides, it falls along half a cosine, towards 0 after the last round
        (Loshchilov, Hutter: SGDR, ICLR 2017, equation 5, without restarts).
    rounds : int
        Of the run, >= 1.
    momentum : float
        In [0, 1), as in ``torch.optim.SGD`` without dampening; buffers start at zero each pass.
    weight_decay : float
        Factor of the weights added to the gradient, >= 0.
    augmentation : {"none", "weak"}
        ``"weak"``: random crop, and flip where the source allows it, drawn anew at each step.
    precision : {"float32", "tf32", "bfloat16"}
        To what the inputs of matrix products and convolutions are rounded while training; TF32 on a
        GPU only. Weights, their updates and everything else stay in float32, and so does testing.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_decay: float = 1.0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    rounds: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    augmentation: Literal["none", "weak"] = "none"
    steps: int = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @property
    def is_scheduled(self) -> bool:
        """Whether the learning rate changes from round to round."""
        return self.lr_decay != 1 or self.lr_schedule != "constant"

    def in_round(self, round: int) -> LocalTraining:
        """Return how a round's passes are done, from 1: with its learning rate.

        Examples
        --------
        >>> training = LocalTraining(epochs=1, batch_size=8, lr=0.1, lr_decay=0.5, rounds=4)
        >>> [training.in_round(t).lr for t in (1, 2, 3)]
        [0.1, 0.05, 0.025]
        >>> cosine = replace(training, lr_decay=1.0, lr_schedule="cosine")
        >>> [round(cosine.in_round(t).lr, 4) for t in (1, 2, 3, 4)]
        [0.1, 0.0854, 0.05, 0.0146]
        """
        if not self.is_scheduled:
            return self
        lr = self.lr * self.lr_decay ** (round - 1)
        if self.lr_schedule == "cosine":
            # Flower's servers may go on for longer than the experiment says.
            gone = min((round - 1) / self.rounds, 1.0)
            lr *= (1 + math.cos(math.pi * gone)) / 2
        return replace(self, lr=lr, lr_decay=1.0, lr_schedule="constant")

    def num_steps(self, *kinds: Sized, steps: int | None = None, epochs: int | None = None) -> int:
        """Return the steps of a pass over examples; 0 where there is nothing to train on.

        ``steps`` and ``epochs`` are those that the pass asks for, see `fedsim.engine.requests.sgd`.
        """
        in_an_epoch = epoch_steps([len(kind) for kind in kinds], self.batch_size)
        if not in_an_epoch:
            return 0
        if epochs is not None:
            return epochs * in_an_epoch
        if steps is not None:
            return steps
        return self.steps or self.epochs * in_an_epoch

    def num_draws(self, kind: Sized, *, steps: int | None = None) -> int:
        """Return how many examples a pass over one kind takes, each as often as it is taken.

        Examples
        --------
        >>> training = LocalTraining(epochs=3, batch_size=2, lr=0.1)
        >>> training.num_draws(range(5)), training.num_draws(range(5), steps=4)
        (15, 7)
        """
        in_an_epoch = epoch_steps([len(kind)], self.batch_size)
        if not in_an_epoch:
            return 0
        epochs, more = divmod(self.num_steps(kind, steps=steps), in_an_epoch)
        return epochs * len(kind) + more * self.batch_size

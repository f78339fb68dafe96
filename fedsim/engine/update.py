"""What a client does in a round, written for one client.

A client update is a generator that reads like the paper's ClientUpdate: it asks the engine for
passes of SGD and for predictions, and returns what the client uploads::

    @dataclass(frozen=True, kw_only=True)
    class FedProx(ClientUpdate):
        mu: float = 0.01

        def update(self, w, client):
            w_k, log = yield from sgd(self.loss, w, client.labelled, given=(w,))
            return Upload({"arrays": w_k}, num_examples=len(client.labelled), metrics=log)

The engine carries the requests out, for one client alone or for many clients at once: a loss is
a pure function of one client's weights and one batch, so the same method serves both.

A client update also says what a client's model is: which arrays are trained, sent and kept, and
which views of the model are tested. By default it is one model, shared by all.

Shapes: B examples in a batch or a test set, D features, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fedsim.engine.requests import (
    Batch,
    Examples,
    Loss,
    Request,
    Targets,
    Teacher,
    Trained,
    add_up,
    check_parts,
    predict,
    sgd,
)
from fedsim.engine.training import LocalTraining
from fedsim.models.net import Net, Weights, parts
from fedsim.rng import generator

# All that a method is made of, its requests among it.
__all__ = [
    "Batch",
    "Client",
    "ClientUpdate",
    "Config",
    "Examples",
    "Inputs",
    "LocalSGD",
    "Loss",
    "Request",
    "Steps",
    "Targets",
    "Teacher",
    "Trained",
    "Upload",
    "add_up",
    "cross_entropy",
    "heads_cross_entropy",
    "label_losses",
    "predict",
    "sgd",
]


class Config(Mapping[str, Any]):
    """What a strategy tells a client besides the model; notices what is read of it.

    Examples
    --------
    >>> config = Config({"mu": 0.1, "layers": [1, 2]})
    >>> config["layers"], config.get("nu", 0.0), config.read
    ((1, 2), 0.0, {'layers'})
    >>> config
    Config({'mu': 0.1, 'layers': (1, 2)})
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        # What a client could change, the others and the strategy would see.
        self._values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """Return a value: a number, text, bytes, or a tuple of one of these."""
        if key not in self._values:
            raise KeyError(f"the strategy sends no {key!r} (nothing is sent with a model to test)")
        self.read.add(key)
        return self._values[key]

    def __repr__(self) -> str:
        return f"Config({self._values})"

    def __iter__(self) -> Iterator[str]:
        """Yield the keys."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return how many keys there are."""
        return len(self._values)


@dataclass(frozen=True, slots=True)
class Client:
    """A client in a round.

    Attributes
    ----------
    id : int
        From 0.
    round : int
        From 1.
    labelled, unlabelled : Examples
        The client's training examples with and without a label.
    class_counts : torch.Tensor
        Labelled examples of each class, float32 [C].
    state : Weights
        What the client kept when it last trained (``Upload.state``); empty if it never did.
    training : fedsim.engine.training.LocalTraining
        The experiment's ``[training]``: ``client.training.lr``, the learning rate of this round,
        and ``client.training.num_steps(client.labelled)``, the steps that `sgd` takes on examples.
    seed : int
        The experiment's seed; see `generator`.
    trainable : tuple of str
        Names of the model's parameters but for frozen ones, sorted. Not among them are statistics
        of BatchNorm, nor a method's own arrays.
    config : Config
        What the strategy sends with the model to train, by name, but for Flower's
        ``server-round``; empty while the model is tested. A loss takes numbers from it as all
        tensors, ``sgd(..., given=({"mu": torch.tensor(client.config["mu"])},))``.
    """

    id: int
    round: int
    labelled: Examples
    unlabelled: Examples
    class_counts: Tensor
    state: Weights = field(default_factory=dict)
    training: LocalTraining = field(kw_only=True)
    seed: int = field(kw_only=True)
    trainable: tuple[str, ...] = field(kw_only=True, repr=False, default=())
    config: Mapping[str, Any] = field(kw_only=True, default_factory=lambda: Config({}))

    def generator(self, purpose: str) -> np.random.Generator:
        """Return random numbers of this client in this round, the same each time.

        Those of other purposes are others. A client update that draws from any other generator,
        such as PyTorch's own, doesn't give the same results again.
        """
        return generator(self.seed, f"update's {purpose}", round=self.round, client=self.id)


@dataclass(frozen=True, slots=True)
class Upload:
    """What a client sends back.

    Attributes
    ----------
    arrays : dict
        Groups of arrays by name, each becoming an ArrayRecord of the reply; ``"arrays"`` is the
        one that Flower's own strategies average.
    num_examples : int
        The client's weight in averages; 0 where it had nothing to train on.
    metrics : mapping
        Numbers about the client's training, recorded and sent to the strategy.
    state : Weights
        What the client keeps for its next round, and for its personal model; never sent. Every
        client of a method keeps arrays of the same names and shapes.
    """

    arrays: dict[str, Weights]
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: Weights = field(default_factory=dict)


Steps: TypeAlias = Generator[Request, Any, Upload]
"""What a client update is: it asks for passes, and returns the upload."""


class Inputs:
    """Test examples, as a view sees them.

    Parameters
    ----------
    features : torch.Tensor
        Their features [B, D] under the global backbone, in evaluation mode.
    load : callable
        Returns the normalised inputs.
    """

    def __init__(self, features: Tensor, load: Callable[[], Tensor]) -> None:
        self.features = features
        self._load = load

    @property
    def x(self) -> Tensor:
        """The inputs [B, ...], float32, for views whose backbone isn't the global one."""
        return self._load()


class ClientUpdate(ABC):
    """A client's part of a method.

    Subclasses are frozen dataclasses whose fields are the method's hyperparameters, each with a
    default; an experiment file sets them under ``[method]``.

    Only `update` must be written. The other methods say what the model is, and hold for one model
    that all clients share; a method whose clients have heads or models of their own, or whose
    server has more arrays than the model's, overrides them.
    """

    needs_images: ClassVar[bool] = False
    """Whether the method asks for strongly augmented inputs, which must then be images."""

    stackable: ClassVar[bool] = True
    """Whether the passes of several clients may run side by side: the losses are then called
    through ``torch.func.vmap``, on batches padded as their masks say."""

    views: ClassVar[tuple[str, ...]] = ("generic",)
    """The views of the model that are tested, in order: those that `generic` returns, which every
    client shares, and then those of `personal`. They are called ``generic``, ``generic-...``,
    ``personal`` or ``personal-...``."""

    trained: ClassVar[tuple[str, ...]] = ("backbone", "head")
    """The parts of the model that a client trains."""

    kept: ClassVar[tuple[str, ...]] = ()
    """The parts of the model that a client keeps to itself."""

    def __post_init__(self) -> None:  # noqa: B027
        """Check the hyperparameters, and raise `fedsim.errors.ConfigError`."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse: the clients that train side by side share the update."""
        raise AttributeError(
            f"{type(self).__name__}.{name} can't be set: a client update is a frozen dataclass, "
            "@dataclass(frozen=True, kw_only=True), and holds nothing of a client; what a loss "
            "needs is given to it, sgd(..., given=...)"
        )

    def warn_of(self, training: LocalTraining) -> None:  # noqa: B027
        """Warn, before a run, of settings that hardly go together with the experiment's."""

    @property
    def has_personal_views(self) -> bool:
        """Whether clients have models of their own."""
        return any(view.startswith("personal") for view in self.views)

    # ----- training ------------------------------------------------------------------------

    @abstractmethod
    def update(self, w: Weights, client: Client) -> Steps:
        """Train from the round's global weights ``w`` and return the upload."""

    # ----- what the model is ---------------------------------------------------------------

    def initial(self, net: Net, w: Weights, rng: np.random.Generator) -> Weights:
        """Return the server's arrays of round 0, given the model's initial weights ``w``."""
        return w

    def begin(self, w: Weights, client: Client) -> Weights:
        """Return what a client starts from: the global weights and, over them, its own arrays."""
        return {**w, **client.state}

    def logits(self, net: Net, w_k: Weights, x: Tensor) -> tuple[Tensor, ...]:
        """Return the logits [B, C] of each head that is trained, in training mode."""
        return (net(w_k, x),)

    def teacher(self, net: Net, w: Weights, x: Tensor) -> Tensor:
        """Return the logits [B, C] with which a model pseudo-labels, in evaluation mode."""
        return net.predict(w, x)

    def shared(self, w_k: Weights) -> Weights:
        """Return what a client uploads of its trained weights: the trained parts it doesn't keep.

        Buffers of a trained part go with it. Arrays that no client uploads stay on the server as
        they were.
        """
        return parts(w_k, set(self.trained) - set(self.kept))

    def own(self, w_k: Weights, client: Client) -> Weights:
        """Return what a client keeps of its trained weights."""
        check_parts("kept", self.kept, w_k)
        return parts(w_k, self.kept)

    # ----- its views -----------------------------------------------------------------------

    def generic(self, net: Net, w: Weights, inputs: Inputs) -> dict[str, Tensor]:
        """Return for each generic view the logits [B, C] of test examples.

        Those that aren't among ``views`` are left out.
        """
        return {"generic": net.head(w, inputs.features)}

    def personalise(self, w: Weights, client: Client) -> Generator[Request, Any, Weights]:
        """Return a client's personal weights, for `personal`; may train for it.

        A client that has never trained has the global weights and what `begin` adds to them.
        """
        return self.begin(w, client)
        yield  # a generator, as those that train are

    def personal(self, net: Net, w_k: Weights, client: Client, inputs: Inputs) -> dict[str, Tensor]:
        """Return for each personal view the logits [B, C] of the client's test examples.

        ``w_k`` comes from `personalise`. Heads on the global backbone take ``inputs.features``,
        which were computed once for all clients.
        """
        return {"personal": net.predict(w_k, inputs.x)}


@dataclass(frozen=True, kw_only=True)
class LocalSGD(ClientUpdate):
    """Plain SGD with cross-entropy on the labelled examples: FedAvg's ClientUpdate.

    McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep
    Networks from Decentralized Data, AISTATS 2017, algorithm 1. Used by every method that has
    no client update of its own.
    """

    def update(self, w: Weights, client: Client) -> Steps:
        """Run ``local_epochs`` epochs of SGD."""
        w_k, log = yield from sgd(
            self.loss,
            self.begin(w, client),
            client.labelled,
            train=self.trained,
            given=self.given(w, client),
        )
        return Upload(
            {"arrays": self.shared(w_k)}, len(client.labelled), log, self.own(w_k, client)
        )

    def given(self, w: Weights, client: Client) -> tuple[Weights, ...]:
        """Return more arrays that the loss takes, constant during the round."""
        return ()

    def loss(
        self, net: Net, w_k: Weights, batch: Batch, *given: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch's mean cross-entropy, summed over the heads."""
        return heads_cross_entropy(self.logits(net, w_k, batch.x), batch), {}


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of logits [B, C] over the batch's examples, a scalar."""
    if not batch.padded:
        return F.cross_entropy(logits, batch.y)
    share = batch.mask / batch.mask.sum().clamp(min=1.0)
    return (label_losses(logits, batch.y) * share).sum()


def label_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy [B] of logits [B, C] for each label of ``y`` [B]."""
    # Of F.cross_entropy, vmap knows only a decomposition whose import takes a second. Transposed,
    # as `fedsim.models.layers.linear` leaves the logits, the softmax takes a quarter of the time.
    return -logits.t().log_softmax(dim=0).gather(0, y[None]).squeeze(0)


def heads_cross_entropy(logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Return the sum over heads of `cross_entropy`."""
    total = cross_entropy(logits[0], batch)
    for head in logits[1:]:
        total = total + cross_entropy(head, batch)
    return total

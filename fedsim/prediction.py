"""What a saved run's models say of new examples.

Shapes: n new examples, K clients, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim import registry
from fedsim.checks import check, is_whole
from fedsim.config import Experiment
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import PREDICT_BLOCK
from fedsim.engine.local import LocalTrainer
from fedsim.engine.state import ClientStates
from fedsim.engine.update import Client, ClientUpdate, Examples, Inputs
from fedsim.engine.worker import as_weights
from fedsim.errors import ConfigError, DataError, user_code
from fedsim.experiment_file import load
from fedsim.method import local_training, make_update
from fedsim.models import Arrays, Net, Weights
from fedsim.models.layers import channels_last
from fedsim.run.directory import CHECKPOINT
from fedsim.run.saved import SavedRun
from fedsim.simulation import load_federation


def predict(
    run: Path | str, x: NDArray[Any], *, client: int | None = None, view: str | None = None
) -> NDArray[np.float32]:
    """Return the class probabilities that a run's model gives new examples.

    Works on the processor, from the run's folder, and the modules of one's own that its
    experiment.toml names. Only where a client's personal model is made by training (``fedbabu``)
    are the data read, too.

    Parameters
    ----------
    run : Path or str
        The folder of a run that has finished, was stopped or goes on.
    x : ndarray of uint8 or float [n, ...]
        Examples as the run's source holds them: images [n, channels, H, W], uint8 if its are, or
        vectors [n, D]. They are normalised as the run's training examples were.
    client : int, optional
        The client whose personal model is meant, 0..K-1.
    view : str, optional
        One of the method's views. By default, with a client, its first personal one, if it has
        any; else its first generic one.

    Returns
    -------
    ndarray of float32 [n, C]
        Each row sums to 1.

    Raises
    ------
    fedsim.errors.UserError
        If the folder holds no run or no trained model, ``x`` isn't as the source's examples or
        has a value that isn't finite, or there is no such view or client.

    Examples
    --------
    >>> import fedsim
    >>> from fedsim.data.digits import digits
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     result = fedsim.simulate(fedsim.Experiment(engine={"backend": "inline"}), out=folder)
    ...     probabilities = predict(folder, digits().x_test)
    >>> probabilities.shape, probabilities.dtype
    ((360, 10), dtype('float32'))
    """
    saved = SavedRun.read(run)
    normalise = _Normalisation.of(saved)
    try:
        x = np.asarray(x)
    except ValueError as error:
        raise DataError(f"x is no array of examples: {error}") from None
    normalise.check(x)
    experiment = load(saved.path / "experiment.toml")
    if client is not None:
        known = is_whole(client) and 0 <= client < saved.num_clients
        check(known, "client", client, f"0..{saved.num_clients - 1}")
    update = make_update(experiment)
    view = _chosen_view(update, view, client, saved)
    round, arrays, read_states = _last_model(saved)
    with user_code(f"{saved.path}: view {view!r}"):
        cpu = torch.device("cpu")
        net = _net(experiment, normalise.shape, saved.num_classes)
        w = as_weights(net, arrays, cpu)
        w_k, me = w, None
        if client is not None and view.startswith("personal"):
            states = read_states()
            kept = states.read(client) if states is not None else {}
            state = as_weights(net, kept, cpu)
            me = _client(net, saved, experiment, int(client), round, state)
            w_k = _personal_weights(net, update, w, me, saved, experiment)
        probabilities = np.empty((len(x), saved.num_classes), np.float32)
        with torch.no_grad():
            for start in range(0, len(x), PREDICT_BLOCK):
                inputs = _inputs(net, w, normalise(x[start : start + PREDICT_BLOCK]))
                logits = (
                    update.generic(net, dict(w), inputs)
                    if me is None
                    else update.personal(net, dict(w_k), me, inputs)
                )[view]
                probabilities[start : start + PREDICT_BLOCK] = logits.softmax(dim=1).numpy()
    return probabilities


@dataclass(frozen=True, kw_only=True)
class _Normalisation:
    """How the inputs of a run's model are made of examples as its source holds them."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, run: SavedRun) -> _Normalisation:
        """Return a run's, which its run.json holds."""
        file = run.path / "run.json"
        if "inputs" not in run.description:
            raise DataError(
                f"{file}: doesn't say how inputs are normalised, for an older fedsim wrote it; "
                f"`fedsim run {run.path}/experiment.toml --out {run.path} --resume` adds that"
            )
        try:
            said = run.description["inputs"]
            shape = tuple(map(int, said["shape"]))
            each = (-1, *(1,) * (len(shape) - 1))
            mean, std = (torch.tensor(said[name]).view(each) for name in ("mean", "std"))
            return cls(dtype=np.dtype(said["dtype"]), shape=shape, mean=mean, std=std)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{file}: inputs are broken: {error}") from None

    def check(self, x: NDArray[Any]) -> None:
        """Raise `DataError` unless examples are as the source's."""
        alike = x.dtype == self.dtype or x.dtype.kind == self.dtype.kind == "f"
        if not alike or x.shape[1:] != self.shape:
            sides = ", ".join(map(str, self.shape))
            raise DataError(
                f"x is {x.dtype} {list(x.shape)}; must be {self.dtype} [n, {sides}], as the "
                "examples of the run's source are, not normalised"
            )
        for start in range(0, len(x), PREDICT_BLOCK) if self.dtype.kind == "f" else ():
            good = np.isfinite(self._cast(x[start : start + PREDICT_BLOCK]))
            if not good.all():
                index = start + int(good.reshape(len(good), -1).all(axis=1).argmin())
                raise DataError(f"x[{index}] has a value that is NaN or infinite in float32")

    def __call__(self, x: NDArray[Any]) -> Tensor:
        """Return the model's inputs, as `fedsim.engine.loader.Loader` makes them."""
        return channels_last(torch.from_numpy(self._cast(x)).sub_(self.mean).div_(self.std))

    def _cast(self, x: NDArray[Any]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which `check` tells
            return x.astype(np.float32)


def _chosen_view(
    update: ClientUpdate, view: str | None, client: int | None, saved: SavedRun
) -> str:
    kinds = ("generic", "personal") if client is None else ("personal", "generic")
    if view is None:
        found = (one for kind in kinds for one in update.views if one.startswith(kind))
        view = next(found, "")
    if view not in update.views:
        method = saved.settings["method"]["name"]
        raise ConfigError(f"view = {view!r}: {method} has {', '.join(update.views)}")
    if view.startswith("personal") and client is None:
        limits = f"0..{saved.num_clients - 1}"
        raise ConfigError(f"view = {view!r}: give the client whose model is meant, {limits}")
    return view


def _last_model(saved: SavedRun) -> tuple[int, Arrays, Callable[[], ClientStates | None]]:
    """Return the last round whose model is there, the model, and what gives the clients' states.

    Who needs none of these must not mind that they are lost.
    """
    file = saved.path / CHECKPOINT
    if saved.description.get("finished") is not None or not file.exists():
        return int(saved.rounds["round"].max()), saved.arrays, lambda: saved.states
    # Of a run that was killed, or goes on. What the clients have kept since is of later rounds.
    from fedsim.engine.checkpoint import Checkpoint
    from fedsim.engine.flower import from_record

    found = Checkpoint.read(file)
    if not found.round:
        raise DataError(f"{saved.path}: has no model yet but the first, which is untrained")
    states = ClientStates(saved.path / "state", saved.num_clients, found.versions)
    return found.round, from_record(found.arrays), lambda: states


def _net(experiment: Experiment, shape: tuple[int, ...], num_classes: int) -> Net:
    with torch.random.fork_rng(devices=[]):  # the weights that it is made with don't matter
        model = registry.find("model", experiment.model.name)
        return Net(model(shape, num_classes, **experiment.model.options))


def _inputs(net: Net, w: Weights, x: Tensor) -> Inputs:
    return Inputs(net.predict_features(w, x), lambda: x)


def _client(
    net: Net, saved: SavedRun, experiment: Experiment, client: int, round: int, state: Weights
) -> Client:
    """Return a client as its personal views see it; of its examples only the numbers are there."""
    held = saved.partition[saved.partition["client"] == client].groupby("class").sum()
    counts = held["labelled"].reindex(range(saved.num_classes), fill_value=0)
    labelled, unlabelled = (int(held[kind].sum()) for kind in ("labelled", "unlabelled"))
    return Client(
        client,
        round,
        Examples(np.zeros(labelled, np.int64), True),
        Examples(np.zeros(unlabelled, np.int64), False),
        torch.tensor(counts.to_numpy(np.float32)),
        state,
        training=local_training(experiment).in_round(round),
        seed=experiment.seed,
        trainable=tuple(sorted(net.trainable)),
    )


def _personal_weights(
    net: Net, update: ClientUpdate, w: Weights, me: Client, saved: SavedRun, experiment: Experiment
) -> Weights:
    """Return the weights of a client's personal model."""
    steps = update.personalise(dict(w), me)
    try:
        next(steps)
    except StopIteration as made:
        found: Weights = made.value
        return found
    # It trains, or predicts, on the client's own examples.
    federation = load_federation(experiment)
    (counts,) = federation.labelled_class_counts([me.id])
    if counts.tolist() != me.class_counts.tolist():
        raise DataError(
            f"data.source = {experiment.data.source!r}: client {me.id} no longer has the examples "
            f"that it had in {saved.path}, with which its personal model is made"
        )
    trainer = LocalTrainer(net, federation, Statistics.of(federation), me.training, me.seed)
    (with_examples,) = trainer.clients(me.round, [me.id])
    return trainer.personalise(update, w, replace(with_examples, state=me.state))

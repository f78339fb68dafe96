"""A worker: one process (or this one) that trains clients and tests models."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data.federation import Federation
from fedsim.data.statistics import Statistics
from fedsim.engine.local import PREDICT_BLOCK, LocalTrainer, LocalTraining
from fedsim.engine.update import ClientUpdate
from fedsim.models.net import Model, Net, Weights

Arrays = dict[str, NDArray[Any]]
"""A model's arrays by name, as NumPy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """All a worker needs to know, the same for every worker and every round."""

    federation: Federation
    statistics: Statistics
    model: Callable[[], Model]
    """Makes the model's architecture; its weights come with each round."""
    update: ClientUpdate
    training: LocalTraining
    seed: int
    packages: tuple[str, ...] = ()
    """Top-level packages and modules that must be the same files in every process."""


@dataclass(frozen=True, slots=True)
class ClientReply:
    """What training one client gave: an upload, or why there is none.

    Attributes
    ----------
    client : int
        The client.
    arrays : dict
        Uploaded groups of arrays; empty after a failure.
    num_examples : int
        The client's weight in averages.
    metrics : dict
        Numbers about its training.
    audit : dict
        What only the simulator knows about it; recorded, never sent to the strategy.
    error : str
        Why the client is left out of the round; empty where all went well.
    """

    client: int
    arrays: dict[str, Arrays] = field(default_factory=dict)
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    audit: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Worker:
    """Trains clients and tests models, on one thread.

    Parameters
    ----------
    task : Task
        The work.
    """

    def __init__(self, task: Task) -> None:
        # One thread a worker: the workers share the cores, and sums come out the same everywhere.
        torch.set_num_threads(1)
        self._update = task.update
        self._trainer = LocalTrainer(
            Net(task.model()), task.federation, task.statistics, task.training, task.seed
        )

    def train(self, arrays: Arrays, round: int, clients: Sequence[int]) -> list[ClientReply]:
        """Run the client update of each client, from the global ``arrays``.

        A client that raises, or whose upload isn't finite, gives a reply with an error.
        """
        w = _weights(arrays)
        replies = []
        for client in clients:
            try:
                upload, audit = self._trainer.update(self._update, w, client, round)
            except Exception as error:  # a client's failure must not end the run
                replies.append(ClientReply(client, error=f"{type(error).__name__}: {error}"))
                continue
            groups = {
                group: {name: tensor.numpy() for name, tensor in weights.items()}
                for group, weights in upload.arrays.items()
            }
            broken = _first_not_finite(groups)
            if broken:
                replies.append(ClientReply(client, error=f"{broken} is not finite (NaN or inf)"))
                continue
            metrics = dict(upload.metrics)
            replies.append(ClientReply(client, groups, upload.num_examples, metrics, audit))
        return replies

    def test(
        self, arrays: Arrays, blocks: Iterable[int]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Return predicted classes and losses of blocks of the global test set.

        Block b holds the examples from b * PREDICT_BLOCK on.
        """
        w = _weights(arrays)
        return [
            self._trainer.test(w, slice(block * PREDICT_BLOCK, (block + 1) * PREDICT_BLOCK))
            for block in blocks
        ]

    def test_client(self, arrays: Arrays, client: int) -> tuple[int, float, float]:
        """Return the number of a client's own test examples, mean loss and accuracy on them."""
        federation = self._trainer.federation
        index = federation.test(client)
        if not len(index):
            return 0, float("nan"), float("nan")
        predicted, loss = self._trainer.test(_weights(arrays), index)
        truth = federation.source.y_test[index]
        return len(index), float(loss.mean()), float((predicted == truth).mean())


def num_blocks(federation: Federation) -> int:
    """Return into how many blocks testing cuts the global test set."""
    return ceil(len(federation.source.y_test) / PREDICT_BLOCK)


def fingerprint(packages: Iterable[str]) -> dict[str, str]:
    """Return for each top-level package or module its file and a digest of its contents.

    Processes whose fingerprints agree run the same code. Nothing is imported for it.
    """
    prints = {}
    for name in packages:
        spec = find_spec(name)
        file = Path(spec.origin) if spec is not None and spec.origin else None
        if file is None:
            prints[name] = "nowhere"
            continue
        digest = hashlib.sha256()
        for source in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
            digest.update(source.read_bytes())
        prints[name] = f"{file} ({digest.hexdigest()[:12]})"
    return prints


def extend_path(folders: Iterable[str]) -> None:
    """Search ``folders`` for modules, after everything else."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)


def _weights(arrays: Arrays) -> Weights:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _first_not_finite(groups: dict[str, Arrays]) -> str:
    for arrays in groups.values():
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                return name
    return ""

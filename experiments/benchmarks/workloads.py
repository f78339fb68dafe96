"""The benchmarks' work: experiments, made-up data, and a client that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedsim import Experiment
from fedsim.data.idx import fashion_mnist
from fedsim.data.source import Source
from fedsim.engine.update import Client, ClientUpdate, Steps, Upload
from fedsim.models import Weights

HERE = "experiments.benchmarks.workloads"

WORKLOADS: dict[str, dict[str, Any]] = {
    "w1": {"model": "cnn", "cohort": 20},
    "w2": {"model": "linear", "cohort": 100},
    "fedlabel": {
        "model": "cnn",
        "cohort": 20,
        # Every pseudo-label is kept, so that the steps don't depend on how sure the model is.
        "method": {"name": "fedlabel", "warmup_rounds": 0, "threshold": 0.0},
        "labelled": 0.2,
    },
    "fedloge": {"model": "cnn", "cohort": 20, "method": {"name": "fedloge"}},
    "tiny": {
        "model": "linear",
        "cohort": 100,
        "count": 10_000,
        "data": {"source": f"{HERE}:vectors", "examples": 50_000},
    },
}
"""w1: a CNN, where a round is mostly arithmetic; w2: logistic regression, where it is mostly
overhead; two of the methods on the CNN; and tiny: many registered clients of five made-up vectors,
where it is nothing but overhead."""


def workload(name: str, rounds: int, **changes: Any) -> Experiment:
    """Return a workload by name; see `experiment` for what can be changed."""
    return experiment(name, rounds, **{**WORKLOADS[name], **changes})


def experiment(
    name: str,
    rounds: int,
    *,
    model: str,
    cohort: int,
    count: int = 1000,
    data: Mapping[str, Any] = {"source": "fashion-mnist"},
    partition: Mapping[str, Any] = {"partition": "iid"},
    method: Mapping[str, Any] = {"name": "fedavg"},
    labelled: float = 1.0,
    workers: int = 2,
) -> Experiment:
    """Return an experiment: by default Fashion-MNIST, dealt out to 1000 IID clients.

    Each then has 60 examples and takes six steps of SGD. The model is tested after the last round.
    """
    return Experiment(
        name=name,
        data=dict(data),
        clients={"count": count, "labelled": labelled, **partition},
        model={"name": model},
        method=dict(method),
        training={
            "rounds": rounds,
            "participation": cohort,
            "local_epochs": 1,
            "batch_size": 10,
            "lr": 0.05,
        },
        evaluation={"every": rounds, "participation": 2},
        engine={"backend": "ray", "workers": workers},
    )


FEATURES = 8


def vectors(*, examples: int) -> Source:
    """Return made-up vectors [N, `FEATURES`] of ten equally frequent classes."""
    rng = np.random.default_rng(0)

    def draw(y: np.ndarray) -> np.ndarray:
        x = rng.standard_normal((len(y), FEATURES), np.float32)
        x[np.arange(len(y)), y % FEATURES] += 2
        return x

    return _made_up("vectors", draw, examples)


def images(*, side: int, examples: int) -> Source:
    """Return made-up grey images of ten equally frequent classes: noise, brighter by class."""
    rng = np.random.default_rng(0)

    def draw(y: np.ndarray) -> np.ndarray:
        x: np.ndarray = rng.integers(0, 160, (len(y), 1, side, side)) + 9 * y[:, None, None, None]
        return x.astype(np.uint8)

    return _made_up("images", draw, examples)


def _made_up(name: str, draw: Callable[[np.ndarray], np.ndarray], examples: int) -> Source:
    """Return so many training examples and 1000 to test, drawn for labels 0, 1 ... 9, 0 ..."""
    y_train, y_test = np.arange(examples) % 10, np.arange(1000) % 10
    return Source(
        name=name,
        x_train=draw(y_train),
        y_train=y_train,
        x_test=draw(y_test),
        y_test=y_test,
        num_classes=10,
    )


def part_of_fashion_mnist(*, examples: int) -> Source:
    """Return Fashion-MNIST with its first training examples only."""
    whole = fashion_mnist()
    return replace(whole, x_train=whole.x_train[:examples], y_train=whole.y_train[:examples])


@dataclass(frozen=True, kw_only=True)
class Nothing(ClientUpdate):
    """A client that sends back what it got."""

    def update(self, w: Weights, client: Client) -> Steps:
        """Return the upload at once."""
        return Upload({"arrays": w}, len(client.labelled), {"train_loss": 0.0})
        yield  # a generator, as those that train are

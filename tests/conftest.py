"""What several tests share: a small federation, and the work that workers do on it."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from fedsim import jobs
from fedsim.data.federate import federate
from fedsim.data.federation import Federation
from fedsim.data.partition import iid
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import ClientUpdate, LocalSGD
from fedsim.engine.worker import Task
from fedsim.models.small import linear

# Kernels for a GPU run on the processor; Triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples each time, and a busy machine must not fail a test.
hypothesis.settings.register_profile("fedsim", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fedsim")


def make_source(
    train: int = 60, test: int = 30, classes: int = 3, shape: tuple[int, ...] = (1, 4, 4)
) -> Source:
    """Random images in which the brightness of one column tells the class."""
    rng = np.random.default_rng(1)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(count) % classes
        x = rng.integers(0, 100, size=(count, *shape)).astype(np.uint8)
        x[np.arange(count), 0, :, y] += 150
        return x, y.astype(np.int64)

    x_train, y_train = draw(train)
    x_test, y_test = draw(test)
    return Source(
        name="columns",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        num_classes=classes,
    )


@pytest.fixture(autouse=True)
def denormal_numbers() -> Iterator[None]:
    """Give denormal numbers back where a worker in this process isn't closed: hypothesis minds."""
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork processes for runs from one that has imported PyTorch, which takes each two seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fedsim.simulation", "fedsim.report.report", "fedsim.engine.grid"]
    )
    monkeypatch.setattr(jobs, "_SPAWN", context)


@pytest.fixture
def source() -> Source:
    return make_source()


@pytest.fixture
def federation(source: Source) -> Federation:
    """Four clients of 15 examples, 12 of them labelled."""
    return federate(source, num_clients=4, partition=iid, labelled=0.8)


@pytest.fixture
def make_task(federation: Federation, tmp_path: Path) -> Callable[..., Task]:
    """A function that makes a task; keywords replace its parts."""

    numbers = count()

    def make(**parts: Any) -> Task:
        data = parts.pop("federation", federation)
        update: ClientUpdate = parts.pop("update", LocalSGD())
        stacked = parts.pop("stacked", False)
        step_flops = parts.pop("step_flops", 10**6)
        settings = {"epochs": 2, "batch_size": 5, "lr": 0.1, "momentum": 0.5}
        model = parts.pop("model", linear)
        shape = data.source.x_train.shape[1:]
        return Task(
            federation=data,
            statistics=Statistics.of(data),
            model=partial(model, shape, data.source.num_classes),
            update=update,
            training=LocalTraining(**{**settings, **parts}),
            seed=0,
            stacked=stacked,
            step_flops=step_flops,
            states=tmp_path / f"state{next(numbers)}",
            packages=("fedsim", "strategies", "clients"),
        )

    return make

"""The Ray grid: the same numbers as in this process, and dying workers."""

import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch

from clients import FedLoGe
from fedsim.engine import ray_grid
from fedsim.engine.imports import Origin
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.ray_actors import RayActors, _import_ray, _start_ray
from fedsim.engine.ray_grid import RayGrid
from fedsim.engine.update import LocalSGD, Upload
from fedsim.engine.worker import ClientConfigs
from fedsim.errors import EngineError
from fedsim.experiment_file import load
from fedsim.models.small import cnn
from fedsim.simulation import initial_arrays, simulate


class Dies(LocalSGD):
    """Takes its worker down, the first time or always."""

    def update(self, w, client):
        if client.id == 2:
            flag = os.environ["FEDSIM_TEST_FLAG"]
            if flag == "always" or not os.path.exists(flag):  # noqa: PTH110
                with open(flag if flag != "always" else os.devnull, "w"):  # noqa: PTH123
                    os._exit(1)
        return (yield from super().update(w, client))


class Slow(LocalSGD):
    """The first client takes a while; each says where it was trained."""

    def update(self, w, client):
        if client.id == 0:
            time.sleep(1.0)
        upload = yield from super().update(w, client)
        return replace(upload, metrics={"process": os.getpid()})


@pytest.fixture(scope="module")
def running_ray(tmp_path_factory):
    flag = tmp_path_factory.mktemp("ray") / "died"
    os.environ["FEDSIM_TEST_FLAG"] = str(flag)
    _start_ray(_import_ray(), 2)
    yield flag
    ray.shutdown()
    del os.environ["FEDSIM_TEST_FLAG"]


@pytest.mark.parametrize(
    ("workers", "stacked", "small"),  # each pair of values once
    [
        (1, False, 0),
        (1, True, ray_grid.INLINE_BYTES),
        (2, False, ray_grid.INLINE_BYTES),
        (2, True, 0),
    ],
)
def test_the_numbers_are_those_of_this_process(
    make_task, running_ray, monkeypatch, workers, stacked, small
):
    """FedLoGe: BatchNorm, arrays that the clients keep, and personal views."""
    monkeypatch.setattr(ray_grid, "INLINE_BYTES", small)  # 0: all arrays go through shared memory

    def net(shape, classes):
        return cnn(shape, classes, channels=(4,), norm="batch")

    method = FedLoGe(sparsity=0.3)
    tasks = [make_task(model=net, update=method, stacked=stacked) for _ in range(2)]
    arrays = initial_arrays(tasks[0])
    inline = InlineGrid(tasks[0])
    grid = RayGrid(tasks[1], RayActors(workers))
    try:
        for round, cohort in enumerate([[2, 0, 3], [3, 2]], start=1):
            both = []
            for backend in (inline, grid):
                backend.weighted_by = {"arrays": "num_examples"} if round == 2 else None
                both.append(backend.train(arrays, round, cohort))
            (replies, total), (ray_replies, ray_total) = both
            assert replies.clients == ray_replies.clients == cohort
            assert replies.metrics == ray_replies.metrics
            for one, other in zip(replies.arrays, ray_replies.arrays, strict=True):
                assert_equal(one.get("arrays", {}), other.get("arrays", {}))
            assert total.weights == ray_total.weights
            assert total.shapes == ray_total.shapes
            assert_equal(total.vectors, ray_total.vectors)
        assert total.weights == {"arrays": 24.0}  # two clients of 12 labelled examples
        for client in range(4):
            assert_equal(inline.states.read(client), grid.states.read(client))
        tested = [backend.test_generic(arrays) for backend in (inline, grid)]
        assert_equal(tested[0].scores, tested[1].scores)
        np.testing.assert_array_equal(tested[0].features, tested[1].features)
        everybody = [3, 0, 1, 2]
        found = [
            backend.test_personal(arrays, tested[0].features, 2, everybody)
            for backend in (inline, grid)
        ]
        assert set(found[0]) == {"personal", "personal-realigned"}
        assert_equal(*found)
    finally:
        grid.close()
    assert ray.is_initialized()  # it was not ours to stop


@pytest.mark.parametrize(
    "settings",
    [
        "method.name=fedlabel method.warmup_rounds=1 method.threshold=0.5 training.rounds=3",
        "method.name=fedbabu training.rounds=1",  # which trains models for the test
    ],
)
def test_whole_runs_are_those_of_this_process(running_ray, settings):
    demo = Path(__file__).parents[3] / "experiments" / "digits.toml"
    sets = [*settings.split(), "training.local_epochs=1"]
    inline, *others = (
        simulate(load(demo, [*sets, engine]))
        for engine in ("engine.backend=inline", "engine.workers=1", "engine.workers=2")
    )
    for other in others:
        rounds = (result.rounds.drop(columns="seconds") for result in (inline, other))
        pd.testing.assert_frame_equal(*rounds)
        pd.testing.assert_frame_equal(inline.clients, other.clients)
        pd.testing.assert_frame_equal(inline.training, other.training)
        assert_equal(inline.arrays, other.arrays)


class Repeats(LocalSGD):
    """Says what it was told; only client 3 looks further."""

    def update(self, w, client):
        more = client.config.get("nu", 0) if client.id == 3 else 0
        return Upload({"arrays": w}, 1, {"mu": client.config["mu"] + more})
        yield


def test_clients_are_told_what_the_strategy_sends(make_task, running_ray, monkeypatch):
    task = make_task(update=Repeats())
    arrays = initial_arrays(task)
    grid = RayGrid(task, RayActors(2))
    try:
        cohort = [0, 1, 2, 3]
        # Each worker what the others leave, too, or its share.
        for round, short in enumerate((0, 0, 60, 60), start=1):
            monkeypatch.setattr(ray_grid, "STEAL_FROM_SECONDS", short)
            told = ClientConfigs([{"mu": 0.5, "nu": 2}, {"mu": 0.25}], {0: 0, 1: 1, 2: 1, 3: 0})
            found, _ = grid.train(arrays, round, cohort, told)
            assert found.metrics["mu"] == [0.5, 0.25, 0.25, 2.5]
            assert found.read == {"mu", "nu"}
    finally:
        grid.close()


class Tiny(LocalSGD):
    """Multiplies what is too small for a float32 with all its digits."""

    def update(self, w, client):
        product = torch.full((8,), 1e-30) * torch.full((8,), 1e-9)
        return Upload({"arrays": w}, 1, {"nonzero": int(product.count_nonzero())})
        yield


def test_denormal_numbers_are_zero_on_workers_which_are_slow_with_them(make_task, running_ray):
    task = make_task(update=Tiny())
    grid = RayGrid(task, RayActors(2))
    try:
        found, _ = grid.train(initial_arrays(task), 1, [0, 1, 2, 3])
    finally:
        grid.close()
    assert found.metrics["nonzero"] == [0, 0, 0, 0]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


def test_a_worker_that_dies_is_replaced_and_its_clients_trained_again(make_task, running_ray):
    task = make_task(update=Dies())
    arrays = initial_arrays(task)
    grid = RayGrid(task, RayActors(2))
    try:
        with pytest.warns(UserWarning, match=r"worker \d died and is replaced"):
            found, _ = grid.train(arrays, 1, [0, 1, 2, 3])
    finally:
        grid.close()
    assert running_ray.exists()
    expected, _ = InlineGrid(make_task()).train(arrays, 1, [0, 1, 2, 3])
    assert (found.clients, found.failures) == (expected.clients, {})
    for one, other in zip(expected.arrays, found.arrays, strict=True):
        assert_equal(one["arrays"], other["arrays"])


def test_a_worker_that_is_done_early_takes_over_from_another(make_task, running_ray):
    task = make_task(update=Slow())
    arrays = initial_arrays(task)
    cohort = [0, 1, 2, 3]
    inline, grid = InlineGrid(task), RayGrid(task, RayActors(2))
    try:
        both = []
        for backend in (inline, grid):
            backend.weighted_by = {"arrays": "num_examples"}
            both.append(backend.train(arrays, 1, cohort))
    finally:
        grid.close()
    (_, expected), (replies, total) = both
    slow, *others = replies.metrics["process"]
    assert slow not in others  # though half of the cohort was its worker's share
    assert_equal(total.vectors, expected.vectors)


def test_an_answer_that_nobody_waited_for_is_never_taken_for_another(make_task, running_ray):
    task = make_task()
    arrays = initial_arrays(task)
    grid = RayGrid(task, actors := RayActors(1))
    try:
        actors.actors[0].call("train_client", (arrays, 1, 3, {}))  # and then, say, Ctrl-C
        found, _ = grid.train(arrays, 1, [0])
    finally:
        grid.close()
    assert found.clients == [0]


def test_nothing_stays_behind(make_task, running_ray, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    task = make_task()
    grid = RayGrid(task, RayActors(1))
    grid.train(initial_arrays(task), 1, [0])
    assert list(tmp_path.iterdir())
    grid.close()
    assert not list(tmp_path.iterdir())


class TestRayGridFailure:
    def test_work_that_a_worker_refuses(self, make_task, running_ray):
        task = make_task()
        arrays = initial_arrays(task)
        grid = RayGrid(task, RayActors(2))
        try:
            grid.weighted_by = {"head": "num_examples"}
            with pytest.raises(EngineError, match=r"averages the arrays 'head', but the clients"):
                grid.train(arrays, 1, [0, 1, 2, 3])
            grid.weighted_by = None
            found, _ = grid.train(arrays, 1, [3, 2, 1, 0])  # both workers take work again
        finally:
            grid.close()
        assert (found.clients, found.failures) == ([3, 2, 1, 0], {})

    def test_work_that_always_kills_its_worker(self, make_task, running_ray):
        task = make_task(update=AlwaysDies())
        grid = RayGrid(task, RayActors(1))
        try:
            with (
                pytest.warns(UserWarning, match="died and is replaced"),
                pytest.raises(EngineError, match="a worker died 3 times on the same work"),
            ):
                grid.train(initial_arrays(task), 1, [2])
        finally:
            grid.close()

    def test_a_ray_without_gpus(self, running_ray):
        with pytest.raises(EngineError, match=r"2 workers need 0.3333 of a GPU each"):
            RayActors(2, gpu=1 / 3)

    def test_a_ray_that_cannot_start(self, monkeypatch):
        def fails(*_, **__):
            raise OSError("AF_UNIX path length cannot exceed 107 bytes")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", fails)
        line = (
            "Ray can't start here: OSError: AF_UNIX path .*engine.backend = 'inline' does without"
        )
        with pytest.raises(EngineError, match=line):
            RayActors(1)

    def test_a_task_that_a_worker_cannot_take(self, make_task, running_ray):
        task = replace(make_task(), model=partial(int, "no number"))
        with pytest.raises(EngineError, match=r"could not start: ValueError: .*no number"):
            RayGrid(task, RayActors(1))

    def test_a_worker_that_would_import_other_files(self, make_task, running_ray, monkeypatch):
        monkeypatch.setattr(
            ray_grid, "origins", lambda packages: dict.fromkeys(packages, Origin("elsewhere", ""))
        )
        with pytest.raises(EngineError, match=r"would import '\w+' from .*this process from else"):
            RayGrid(make_task(), RayActors(1))

    def test_code_that_changes_before_a_worker_is_replaced(
        self, make_task, running_ray, monkeypatch
    ):
        grid = RayGrid(task := make_task(update=AlwaysDies()), RayActors(1))
        before = {name: one._replace(digest="0") for name, one in grid._origins.items()}
        monkeypatch.setattr(grid, "_origins", before)
        try:
            with (
                pytest.warns(UserWarning, match="died and is replaced"),
                pytest.raises(EngineError, match="its files have changed since the run began"),
            ):
                grid.train(initial_arrays(task), 1, [2])
        finally:
            grid.close()


class AlwaysDies(LocalSGD):
    """Takes its worker down."""

    def update(self, w, client):
        os._exit(1)
        yield

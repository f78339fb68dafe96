"""The round loop: Flower's strategies, failures, and what is recorded."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedMedian, FedTrimmedAvg, Krum
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedsim.engine import flower
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.loop import run_rounds
from fedsim.engine.update import LocalSGD, Upload
from fedsim.errors import EngineError
from fedsim.simulation import initial_arrays
from strategies import FedAvg


class Broken(LocalSGD):
    """Every client fails, after the first round."""

    def update(self, w, client):
        if client.round > 1:
            raise RuntimeError("no power")
        return (yield from super().update(w, client))


class BrokenAtOnce(LocalSGD):
    """Every client fails."""

    def update(self, w, client):
        raise RuntimeError("no power")
        yield


class Renamed(LocalSGD):
    """Clients upload an array under another name, too, or one of another shape."""

    def update(self, w, client):
        name, shape = type(self).array
        return Upload({"arrays": {**w, name: torch.ones(shape)}}, 1)
        yield

    array = ("head.wieght", (3,))


class Reshaped(Renamed):
    array = ("head.bias", (1,))


class Plus(LocalSGD):
    """Client k adds k + 1 to every array; its weight is k + 1."""

    def update(self, w, client):
        step = client.id + 1
        return Upload({"arrays": {n: a + step for n, a in w.items()}}, step, {"train_loss": step})
        yield


@pytest.fixture
def run(make_task):
    def run(strategy, rounds=1, every=1, seed=0, **parts):
        task = make_task(**parts)
        grid = InlineGrid(task)
        record = flower.to_record(initial_arrays(task))
        found = list(
            run_rounds(strategy, grid, record, rounds=rounds, evaluate_every=every, seed=seed)
        )
        return flower.from_record(record), found

    return run


def test_a_round_of_fedavg_by_hand(run):
    # Weights 1..4 and steps 1..4: the mean step is (1 + 4 + 9 + 16) / 10 = 3.
    start, (only,) = run(FedAvg(), update=Plus())
    for name, array in flower.from_record(only.arrays).items():
        np.testing.assert_allclose(array, start[name] + 3, rtol=1e-6)
    assert only.row["train_loss"] == pytest.approx(3.0)
    assert (only.row["clients"], only.row["failures"]) == (4, 0)


@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        (FlowerFedAvg, 3.0),
        (FedMedian, 2.5),
        (lambda: FedTrimmedAvg(beta=0.25), 2.5),
        # The mean moves by 3; half of that with a server learning rate of 0.5.
        (lambda: FedAvgM(server_learning_rate=0.5), 1.5),
    ],
)
def test_flowers_own_strategies_run_unmodified(run, strategy, step):
    start, (only,) = run(strategy(), update=Plus())
    for name, array in flower.from_record(only.arrays).items():
        np.testing.assert_allclose(array, start[name] + step, rtol=1e-5)


def test_krum_takes_one_of_the_clients_models(run):
    class Square(LocalSGD):
        def update(self, w, client):
            step = (client.id + 1) ** 2
            return Upload({"arrays": {name: a + step for name, a in w.items()}}, 1)
            yield

    # Of 1, 4, 9, 16 the second has its two nearest ones at 9 + 25, the others at 73, 74 and 193.
    start, (only,) = run(Krum(), update=Square())
    step = flower.from_record(only.arrays)["head.bias"][0] - start["head.bias"][0]
    assert step == pytest.approx(4.0, abs=1e-5)


def test_fedadam_moves_towards_the_clients(run):
    start, (only,) = run(FedAdam(eta=0.01), update=Plus())
    for name, array in flower.from_record(only.arrays).items():
        assert (array > start[name]).all()


def test_the_model_is_tested_every_so_often_and_at_the_end(run):
    _, found = run(FedAvg(), rounds=5, every=2)
    evaluated = [not np.isnan(finished.row["generic_accuracy"]) for finished in found]
    assert evaluated == [False, True, False, True, True]
    assert [finished.clients is not None for finished in found] == evaluated
    assert found[-1].clients["client"].tolist() == [0, 1, 2, 3]


def test_personal_accuracy_is_the_mean_over_clients(run):
    _, (only,) = run(FedAvg())
    assert only.row["personal_accuracy"] == pytest.approx(only.clients["accuracy"].mean())


def test_training_learns(run):
    _, found = run(FedAvg(), rounds=10)
    assert found[-1].row["generic_accuracy"] == 1.0
    assert found[-1].row["train_loss"] < 0.5 * found[0].row["train_loss"]


def test_flowers_sampling_is_reproducible(run):
    def cohorts(seed):
        strategy = FlowerFedAvg(fraction_train=0.5)
        return [f.row["train_loss"] for f in run(strategy, rounds=4, seed=seed, update=Plus())[1]]

    assert cohorts(0) == cohorts(0)
    assert cohorts(0) != cohorts(1)


def test_a_round_in_which_all_fail_keeps_the_model_and_names_them(run):
    with pytest.warns(UserWarning, match="round") as caught:
        _, found = run(FlowerFedAvg(), rounds=3, update=Broken())
    texts = [str(warning.message) for warning in caught]
    why = "RuntimeError: no power (test_loop.py, line 27, in update)"
    assert texts[0] == (
        f"round 2: 4 of 4 clients failed and are left out: clients 0, 1, 2 and 1 more: {why}"
    )
    assert "the model stays as it was" in texts[1]
    assert [finished.row["failures"] for finished in found] == [0, 4, 4]
    assert np.isnan(found[1].row["train_loss"])
    before = flower.from_record(found[0].arrays)
    for name, array in flower.from_record(found[-1].arrays).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_method_in_which_all_clients_fail_at_once_stops(run):
    why = r"round 1: all 4 clients failed: clients 0, 1, 2 and 1 more: RuntimeError: no power \("
    with pytest.raises(EngineError, match=why):
        run(FlowerFedAvg(), rounds=2, update=BrokenAtOnce())


@pytest.mark.parametrize(
    ("update", "line"),
    [
        (Renamed(), "an array head.wieght, which the model doesn't have; what clients upload in"),
        (Reshaped(), r"head\.bias of shape \[1\], but the model's is \[3\]"),
    ],
)
@pytest.mark.parametrize("strategy", [FedAvg, FlowerFedAvg, FedMedian])
def test_uploads_must_be_named_and_shaped_as_the_model(run, update, line, strategy):
    with pytest.raises(EngineError, match=f"round 1: the strategy's new model has {line}"):
        run(strategy(), update=update)


@pytest.mark.parametrize(
    "found", [None, {}, ({}, None), (None, None, None), (None, {}), ArrayRecord()]
)
def test_what_aggregate_train_must_return(run, found):
    class Own(FlowerFedAvg):
        def aggregate_train(self, server_round, replies):
            return found

    with pytest.raises(EngineError, match=r"Own\.aggregate_train must return an ArrayRecord or"):
        run(Own())


def test_a_key_error_of_a_strategys_own_is_told_with_its_line(run):
    class Own(FlowerFedAvg):
        def aggregate_train(self, server_round, replies):
            return {}["lambda"]

    line = r"\(KeyError: 'lambda' \(test_loop\.py, line \d+, in aggregate_train\)\)"
    with pytest.raises(EngineError, match=line):
        run(Own())


def raises(*arguments):
    raise ValueError("no luck")


@pytest.mark.parametrize(
    ("method", "does", "line"),
    [
        ("configure_train", raises, r"ValueError: no luck \(test_loop\.py, line \d+, in raises"),
        ("aggregate_train", raises, r"ValueError: no luck \(test_loop\.py, line \d+, in raises"),
        ("configure_evaluate", raises, "ValueError: no luck"),
        ("aggregate_evaluate", raises, "ValueError: no luck"),
        ("configure_train", lambda *_: None, "must return messages, not NoneType"),
        ("configure_train", lambda *_: [1, 2], "must return messages, not int"),
        ("configure_evaluate", lambda *_: (raises() for _ in range(2)), "ValueError: no luck"),
        ("aggregate_train", lambda *_: sys.exit(0), "SystemExit: 0"),
    ],
)
def test_whatever_a_strategy_raises_is_told_with_its_round(run, method, does, line):
    own = type("Own", (FedAvg,), {method: does})
    with pytest.raises(EngineError, match=rf"^round 1: Own\.{method}: .*{line}"):
        run(own())


@pytest.mark.parametrize("weights", ["arrays", {"arrays": 1}, {}])
def test_weights_must_be_metrics_by_group(run, weights):
    own = type("Own", (FedAvg,), {"weights": weights})
    with pytest.raises(EngineError, match=r"Own\.weights = .*must be a dict of metrics by group"):
        run(own())


def test_clients_without_examples_are_no_part_of_a_median(run):
    """Three of four have nothing to train on, and would send back what they got."""

    class Sparse(Plus):
        def update(self, w, client):
            upload = yield from super().update(w, client)
            nothing = replace(upload, arrays={"arrays": w}, num_examples=0)
            return upload if client.id == 3 else nothing

    start, (only,) = run(FedMedian(), update=Sparse())
    for name, array in flower.from_record(only.arrays).items():
        np.testing.assert_allclose(array, start[name] + 4, rtol=1e-6)
    assert only.row["clients"] == 4
    assert only.row["failures"] == 0


def test_weights_that_would_lose_their_fractions_are_refused(run):
    class Whole(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            whole = {name: Array(a.numpy().astype(np.int32)) for name, a in arrays.items()}
            return ArrayRecord(whole), metrics

    with pytest.raises(EngineError, match=r"new \S+ is of int32; the model's is of float32"):
        run(Whole())


def test_a_client_that_is_asked_twice_is_refused(run):
    class Twice(FlowerFedAvg):
        def configure_train(self, *arguments):
            return [*super().configure_train(*arguments)] * 2

    with pytest.raises(EngineError, match=r"client \d gets the same message twice in a round"):
        run(Twice())


def test_a_strategy_that_diverges_keeps_the_model(run):
    class Diverges(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            first = next(iter(arrays))
            arrays[first] = Array(np.full_like(arrays[first].numpy(), np.inf))
            return arrays, metrics

    with pytest.warns(UserWarning, match="round 1: the strategy's new .* isn't finite"):
        start, (only,) = run(Diverges())
    for name, array in flower.from_record(only.arrays).items():
        np.testing.assert_array_equal(array, start[name])


def test_a_strategy_may_skip_the_clients_evaluation(run):
    _, (only,) = run(FedAvg(fraction_evaluate=0.0))
    assert np.isnan(only.row["personal_accuracy"])
    assert not np.isnan(only.row["generic_accuracy"])
    assert only.clients.empty


def test_a_round_in_which_nobody_is_asked_keeps_the_model(run):
    class EverySecond(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            if server_round % 2 == 0:
                return []
            return super().configure_train(server_round, arrays, config, grid)

    with pytest.warns(UserWarning, match="round 2: the strategy chose no client; the model"):
        _, found = run(EverySecond(), rounds=2)
    assert [finished.row["clients"] for finished in found] == [4, 0]
    assert found[1].arrays is found[0].arrays
    assert found[1].row["bytes_up"] == 0
    assert found[1].training == {}


def test_a_round_without_a_new_model_keeps_the_old_one(run):
    class Gives(FedAvg):
        def aggregate_train(self, server_round, replies):
            return None, None

    with pytest.warns(UserWarning, match="round 1: the strategy returned no model; the model"):
        start, (only,) = run(Gives())
    for name, array in flower.from_record(only.arrays).items():
        np.testing.assert_array_equal(array, start[name])


@pytest.mark.parametrize("configure", ["configure_train", "configure_evaluate"])
def test_a_strategy_of_flowers_that_gives_up_says_why(run, configure):
    class GivesUp(FedAvg):
        pass

    def refuse(*arguments):
        raise flower.FlowerError("no trees")

    setattr(GivesUp, configure, refuse)
    with pytest.raises(EngineError, match=f"round 1: GivesUp.{configure}: .*no trees"):
        run(GivesUp())


def test_the_seconds_of_the_parts_add_up(run):
    _, (only,) = run(FedAvg())
    of_training = {"gather", "train", "state", "reduce", "serialise", "wait", "messages"}
    assert set(only.seconds) == {"configure", *of_training, "aggregate", "evaluate"}
    assert min(only.seconds.values()) >= 0
    assert only.row["seconds"] == pytest.approx(sum(only.seconds.values()))
    assert isinstance(only.arrays, ArrayRecord)

"""Arrays that clients keep between rounds, and the views of a model: grid, loop and records."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fedsim
from fedsim.engine import flower
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.loop import run_rounds
from fedsim.engine.state import ClientStates
from fedsim.engine.update import ClientUpdate, Upload
from fedsim.errors import EngineError
from fedsim.simulation import initial_arrays
from strategies import FedAvg


@dataclass(frozen=True, kw_only=True)
class Counts(ClientUpdate):
    """Adds 1 to the backbone part and keeps a head that counts the client's rounds.

    The generic view knows class 0 only, client k's personal view only class min(rounds, 2).
    """

    views: ClassVar[tuple[str, ...]] = ("generic", "generic-realigned", "personal")
    kept: ClassVar[tuple[str, ...]] = ("head",)

    def update(self, w, client):
        w_k = self.begin(w, client)
        if client.id == 3 and client.round == 2:
            raise RuntimeError("out of batteries")
        first = w["head.bias"] * 0
        rounds = client.state.get("head.bias", first) + 1
        w_k = {**w_k, "extra.sum": w_k["extra.sum"] + 1, "head.bias": rounds}
        return Upload({"arrays": self.shared(w_k)}, 1, {}, self.own(w_k, client))
        yield

    def initial(self, net, w, rng):
        return {**w, "extra.sum": w["head.bias"] * 0, "fixed.one": w["head.bias"] * 0 + 1}

    def shared(self, w_k):
        return {"extra.sum": w_k["extra.sum"]}

    def generic(self, net, w, inputs):
        logits = one_class(inputs.features, 0)
        return {"generic": logits, "generic-realigned": one_class(inputs.features, 1)}

    def personal(self, net, w_k, client, inputs):
        assert len(inputs.x) == len(inputs.features)
        rounds = int(client.state["head.bias"][0]) if client.state else 0
        return {"personal": one_class(inputs.features, min(rounds, 2))}


def one_class(features, c):
    logits = features.new_zeros(len(features), 3)
    logits[:, c] = 5.0
    return logits


@pytest.fixture
def rounds(make_task):
    def rounds(strategy, cohorts, **parts):
        class Chosen(strategy):
            def cohort(self, clients, fraction, at_least, purpose, server_round):
                return cohorts[server_round - 1] if purpose == "train" else list(clients)

        task = make_task(update=Counts(), **parts)
        grid = InlineGrid(task)
        record = flower.to_record(initial_arrays(task))
        with pytest.warns(UserWarning, match="client 3: RuntimeError: out of batteries"):
            found = list(
                run_rounds(Chosen(), grid, record, rounds=len(cohorts), evaluate_every=1, seed=0)
            )
        return task, grid, found

    return rounds


def test_states_survive_between_rounds_and_failures_keep_the_old_one(rounds):
    _, grid, _ = rounds(FedAvg, [[1, 3], [1, 3], [1]])
    assert grid.states.trained.tolist() == [1, 3]
    assert grid.states.read(1)["head.bias"].tolist() == [3.0] * 3
    assert grid.states.read(3)["head.bias"].tolist() == [1.0] * 3  # failed in round 2
    assert grid.states.read(0) == {}


def test_what_nobody_uploads_stays_on_the_server(rounds):
    task, _, found = rounds(FedAvg, [[1], [3, 1]])
    start, end = initial_arrays(task), flower.from_record(found[-1].arrays)
    assert list(end) == list(start)
    np.testing.assert_array_equal(end["extra.sum"], [2.0] * 3)
    for name in ("head.weight", "head.bias", "fixed.one"):
        np.testing.assert_array_equal(end[name], start[name])
    # Bytes count what travels: everything down, one array up.
    assert found[0].row["bytes_up"] == 3 * 4
    assert found[0].row["bytes_down"] == sum(array.nbytes for array in start.values())


def test_every_view_of_every_client_is_tested(rounds, federation):
    _, _, found = rounds(FedAvg, [[1, 2], [3, 1]])
    rows = found[-1].clients
    assert rows["client"].tolist() == np.repeat(range(4), 3).tolist()
    assert rows["view"].tolist() == ["generic", "generic-realigned", "personal"] * 4
    # Client 1 trained twice, client 2 once, 3 failed, 0 was never asked.
    knows = {"personal": [0, 2, 1, 0], "generic": [0] * 4, "generic-realigned": [1] * 4}
    for view, classes in knows.items():
        of_view = rows[rows["view"] == view].set_index("client")
        for client, c in enumerate(classes):
            share = np.mean(federation.source.y_test[federation.test(client)] == c)
            assert of_view.loc[client, "accuracy"] == pytest.approx(share)


def test_the_row_of_a_round_has_the_accuracies_of_all_views(rounds):
    _, _, found = rounds(FedAvg, [[1, 2], [3, 1]])
    row, rows = found[-1].row, found[-1].clients
    assert row["generic_accuracy"] == pytest.approx(1 / 3)  # a third of the tests are of class 0
    assert row["generic_realigned_accuracy"] == pytest.approx(1 / 3)
    own = rows[rows["view"] == "personal"]
    for name in ("accuracy", "head_accuracy", "medium_accuracy", "tail_accuracy"):
        assert row[f"personal_{name}"] == pytest.approx(own[name].mean(), nan_ok=True)
    assert {"generic_realigned_tail_accuracy", "head_accuracy"} <= set(row)
    assert "generic_tail_accuracy" not in row


def test_a_run_folder_keeps_the_states(tmp_path):
    out = tmp_path / "run"
    result = fedsim.simulate(
        fedsim.Experiment(
            clients={"count": 4},
            model={"name": "mlp", "hidden": [64]},
            method={"name": "fedloge"},
            training={"rounds": 2, "participation": 2},
            engine={"backend": "inline"},
        ),
        out=out,
    )
    trained = sorted(result.training["client"].unique())
    states = ClientStates.open(out / "state")
    assert states.trained.tolist() == trained
    assert states.read(trained[0])["personal.weight"].shape == (10, 64)
    assert "personal.weight" not in result.arrays
    assert {"class_norms.png", "etf.png", "personal_gain.png"} <= {
        file.name for file in (out / "figures").iterdir()
    }


@pytest.mark.parametrize(
    ("method", "heads"),
    [("ditto", ["global head", "personal heads (mean)"]), ("fedper", ["personal heads (mean)"])],
)
def test_the_global_heads_norms_are_shown_where_it_is_tested(tmp_path, method, heads):
    experiment = fedsim.Experiment(
        clients={"count": 4},
        model={"name": "mlp", "hidden": [16]},
        method={"name": method},
        training={"rounds": 1},
        engine={"backend": "inline"},
    )
    result = fedsim.simulate(experiment, out=tmp_path / "run")
    norms = pd.read_csv(tmp_path / "run" / "class_norms.csv")
    assert sorted(norms["head"].unique()) == heads
    if method == "ditto":
        found = norms.loc[norms["head"] == "global head", "norm"]
        expected = np.linalg.norm(result.arrays["head.weight"], axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


class TestViewsFailure:
    def test_a_strategy_that_needs_all_arrays(self, make_task):
        """Flower's own strategies know only what the clients send."""
        task = make_task(update=Counts())
        record = flower.to_record(initial_arrays(task))
        strategy = FlowerFedAvg(min_available_nodes=1)
        with pytest.raises(EngineError, match=r"round 1: the strategy's new model lacks head"):
            list(run_rounds(strategy, InlineGrid(task), record, rounds=1, evaluate_every=1, seed=0))

    def test_clients_that_keep_different_arrays(self, make_task):
        class Differs(Counts):
            def update(self, w, client):
                kept = {"x": w["head.bias"] if client.id else w["head.weight"]}
                return Upload({"arrays": self.shared(w)}, 1, {}, kept)
                yield

        grid = InlineGrid(make_task(update=Differs()))
        with pytest.raises(EngineError, match=r"client 1 keeps array 'x' as float32 \[3\]"):
            grid.train(initial_arrays(make_task(update=Differs())), 1, [0, 1])

    def test_a_view_that_is_not_there(self, make_task):
        class Promises(Counts):
            views = ("generic", "personal", "personal-realigned")

        task = make_task(update=Promises())
        record = flower.to_record(initial_arrays(task))
        with pytest.raises(EngineError, match=r"view 'personal-realigned', .* 'personal'$"):
            list(run_rounds(FedAvg(), InlineGrid(task), record, rounds=1, evaluate_every=1, seed=0))

    @pytest.mark.parametrize(
        ("made", "line"),
        [
            (
                lambda f: {"generic": f.missing},
                r"AttributeError: .* 'missing' \(test_views",
            ),
            (lambda f: f, "generic must return a dict of logits by view, not Tensor"),
            (lambda f: {"generic": f[:2]}, ""),
        ],
    )
    def test_a_generic_model_that_fails(self, make_task, made, line):
        class Fails(Counts):
            def generic(self, net, w, inputs):
                return made(inputs.features)

        task = make_task(update=Fails())
        record = flower.to_record(initial_arrays(task))
        with pytest.raises(EngineError, match=f"the global model can't be tested: .*{line}"):
            list(run_rounds(FedAvg(), InlineGrid(task), record, rounds=1, evaluate_every=1, seed=0))

    def test_clients_that_upload_different_arrays(self, make_task):
        class Differs(Counts):
            def update(self, w, client):
                sent = {"x": w["head.bias"]} if client.id else {"x": w["head.weight"]}
                return Upload({"arrays": sent}, 1)
                yield

        task = make_task(update=Differs())
        record = flower.to_record(initial_arrays(task))
        with pytest.raises(EngineError, match=r"'x' in 'arrays' has the shape"):
            list(run_rounds(FedAvg(), InlineGrid(task), record, rounds=1, evaluate_every=1, seed=0))

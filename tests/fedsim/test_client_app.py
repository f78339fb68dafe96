"""The experiment's clients as a Flower app: the same answers as in the simulation."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from ray import cloudpickle

import fedsim
from fedsim.engine import flower
from fedsim.engine.inline_grid import InlineGrid
from fedsim.errors import EngineError
from fedsim.simulation import initial_arrays, load_federation, make_task


@pytest.fixture(scope="module")
def experiment():
    return fedsim.Experiment(
        clients={"count": 3, "labelled": 0.1},
        model={"name": "linear"},
        method={"name": "fedlabel", "warmup_rounds": 0, "threshold": 0.5},
        training={"local_steps": 3},
    )


@pytest.fixture
def task(experiment, tmp_path):
    return make_task(experiment, load_federation(experiment), tmp_path / "state")


def message(task, kind):
    flower.enter_runtime()
    content = RecordDict(
        {
            "arrays": flower.to_record(initial_arrays(task)),
            "config": ConfigRecord({"server-round": 4}),
        }
    )
    return Message(content, 1, kind)


def context(**node_config):
    return Context(run_id=1, node_id=9, node_config=node_config, state=RecordDict(), run_config={})


def test_training_gives_the_simulations_reply(experiment, task):
    app = fedsim.client_app(experiment)
    found = app(message(task, "train"), context(**{"partition-id": 1}))
    (expected,) = InlineGrid(task).send_and_receive([message(task, "train")])
    assert set(found.content.array_records) == {"labelled", "unlabelled"}
    for group, record in expected.content.array_records.items():
        for name, array in record.items():
            other = found.content.array_records[group][name]
            np.testing.assert_array_equal(other.numpy(), array.numpy())
    assert found.content["metrics"] == expected.content["metrics"]


def test_clients_are_told_what_the_strategy_sends(experiment, task):
    told = message(task, "train")
    told.content["more"] = ConfigRecord({"mu": 0.5})
    with pytest.warns(UserWarning, match="sends its clients 'mu', which the client update doesn't"):
        fedsim.client_app(experiment)(told, context(**{"partition-id": 1}))


def test_but_not_with_a_model_to_test(experiment, task):
    told = message(task, "evaluate")
    told.content["more"] = ConfigRecord({"mu": 0.5})
    with pytest.warns(UserWarning, match="sends 'mu' with the model to test, of which nobody"):
        fedsim.client_app(experiment)(told, context(**{"partition-id": 1}))


def test_flower_can_send_the_app_to_its_own_workers(experiment, task):
    app = cloudpickle.loads(cloudpickle.dumps(fedsim.client_app(experiment)))
    assert app(message(task, "train"), context(**{"partition-id": 0})).has_content()


def test_testing_gives_the_simulations_figures(experiment, task):
    app = fedsim.client_app(experiment)
    found = app(message(task, "evaluate"), context(**{"partition-id": 1})).content["metrics"]
    (expected,) = InlineGrid(task).send_and_receive([message(task, "evaluate")])
    for name, value in expected.content["metrics"].items():
        assert found[name] == pytest.approx(value, rel=1e-5)


def test_what_a_client_keeps_is_in_its_nodes_context(tmp_path):
    """Two rounds and a test of the personal model, as the simulation does them."""
    experiment = fedsim.Experiment(
        clients={"count": 3},
        model={"name": "mlp"},
        method={"name": "fedper"},
        training={"local_steps": 3},
    )
    task = make_task(experiment, load_federation(experiment), tmp_path / "state")
    app, grid = fedsim.client_app(experiment), InlineGrid(task)
    mine = context(**{"partition-id": 1})
    for _ in range(2):
        found = app(message(task, "train"), mine)
        (expected,) = grid.send_and_receive([message(task, "train")])
        assert set(found.content["arrays"]) == {"backbone.1.weight", "backbone.1.bias"}
        for name, array in expected.content["arrays"].items():
            np.testing.assert_array_equal(found.content["arrays"][name].numpy(), array.numpy())
    kept = flower.from_record(mine.state["fedsim"])
    for name, array in grid.states.read(1).items():
        np.testing.assert_array_equal(kept[name], array)
    found = app(message(task, "evaluate"), mine)
    (expected,) = grid.send_and_receive([message(task, "evaluate")])
    assert found.content["metrics"]["accuracy"] == expected.content["metrics"]["accuracy"] > 0


def test_a_server_starts_from_the_simulations_arrays_and_the_methods_own():
    experiment = fedsim.Experiment(model={"name": "linear"}, method={"name": "scaffold"})
    federation = load_federation(experiment)
    expected = initial_arrays(make_task(experiment, federation, Path("unused")))
    found = fedsim.initial_arrays(experiment)
    assert "control.head.weight" in found
    assert found == flower.to_record(expected)


class TestClientAppFailure:
    @pytest.mark.parametrize("node_config", [{}, {"partition-id": 3}, {"partition-id": "a"}])
    def test_a_node_that_is_no_client(self, experiment, task, node_config):
        app = fedsim.client_app(experiment)
        with pytest.raises(EngineError, match=r"partition-id is .*; it must be a client, 0\.\.2"):
            app(message(task, "train"), context(**node_config))

    @pytest.mark.parametrize("nodes", [2, 10])
    @pytest.mark.parametrize("kind", ["train", "evaluate"])
    def test_another_number_of_nodes_than_of_clients(self, experiment, task, kind, nodes):
        app = fedsim.client_app(experiment)
        with pytest.raises(
            EngineError, match=rf"num-partitions is {nodes}, but clients\.count = 3"
        ):
            app(message(task, kind), context(**{"partition-id": 1, "num-partitions": nodes}))

"""SCAFFOLD's server by hand, and whole rounds against plain loops."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import clients
from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.data.statistics import Statistics
from fedsim.engine import flower
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.loop import run_rounds
from fedsim.errors import ConfigError
from fedsim.simulation import initial_arrays
from strategies import Scaffold


class Nodes:
    """As much of a grid as a strategy looks at."""

    @staticmethod
    def get_node_ids():
        return range(8)


START = {"w": [1, 2], "bn.running_var": [4], "control.w": [0.5, -1]}


def answer(w, running_var, change, num_examples):
    flower.enter_runtime()
    question = Message(RecordDict(), 0, "train")
    groups = {
        "arrays": {"w": np.float32(w), "bn.running_var": np.float32(running_var)},
        "control": {"control.w": np.float32(change)},
    }
    has = float(num_examples > 0)
    return flower.reply(question, groups, {"num-examples": num_examples, "has_labels": has})


def aggregated(strategy, replies):
    start = flower.to_record({name: np.float32(array) for name, array in START.items()})
    strategy.configure_train(1, start, ConfigRecord(), Nodes())
    found = strategy.aggregate_train(1, replies)[0]
    assert {array.dtype for array in found.values()} == {"float32"}
    assert list(found) == list(START)
    return {name: array.numpy().tolist() for name, array in found.items()}


@pytest.mark.parametrize(("eta_g", "x"), [(1.0, [3, 4]), (0.5, [2, 3]), (2.0, [5, 6])])
def test_a_round_by_hand(eta_g, x):
    # mean(y_i) = (3, 4), whatever the numbers of examples; mean(y_i - x) = (2, 2).
    # c: 2 of 8 clients, mean change (2, -4): (0.5, -1) + 2/8 (2, -4) = (1, -2).
    replies = [answer([2, 0], [2], [1, -8], 9), answer([4, 8], [10], [3, 0], 1)]
    found = aggregated(Scaffold(global_lr=eta_g), replies)
    # The running variance is a mean and takes no step, which could end below 0.
    assert found == {"w": x, "bn.running_var": [6], "control.w": [1, -2]}


def test_clients_without_labels_and_failed_ones_are_not_of_s():
    failed = flower.error_reply(Message(RecordDict(), 0, "train"), "broke")
    replies = [answer([3, 4], [6], [4, 4], 5), answer([1, 2], [4], [0, 0], 0), failed]
    found = aggregated(Scaffold(), replies)
    assert found == {"w": [3, 4], "bn.running_var": [6], "control.w": [1, -0.5]}


def test_no_usable_reply_gives_no_model():
    assert Scaffold().aggregate_train(1, []) == (None, None)
    assert Scaffold().aggregate_train(1, [answer([1, 2], [4], [0, 0], 0)]) == (None, None)


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_rounds_equal_plain_loops(source, make_task, reduced, stacked):
    """Softmax regression by full batches, 3 of 5 clients a round, one of them without labels.

    Whether the server gets the means or each client's reply.
    """
    federation = federate(
        source,
        num_clients=5,
        partition=iid,
        labelled=(0.2, 0.9),
        unlabelled_clients=0.2,
        seed=2,
    )
    assert len(set(federation.num_labelled)) > 3
    assert 0 in federation.num_labelled
    k, eta_l, eta_g, rounds = 3, 0.1, 0.8, 4
    task = make_task(
        federation=federation,
        update=clients.Scaffold(),
        stacked=stacked,
        epochs=k,
        batch_size=100,
        lr=eta_l,
        momentum=0.0,
    )
    strategy = Scaffold(global_lr=eta_g, fraction_train=0.6)
    if not reduced:
        strategy.weights = None
    first = initial_arrays(task)
    grid = InlineGrid(task)
    *_, last = run_rounds(
        strategy, grid, flower.to_record(first), rounds=rounds, evaluate_every=9, seed=0
    )
    found = flower.from_record(last.arrays)

    statistics = Statistics.of(federation)
    x = np.concatenate([first["head.weight"], first["head.bias"][:, None]], axis=1).astype(float)
    c, c_i = np.zeros_like(x), np.zeros((5, *x.shape))
    trained = set()
    for round in range(1, rounds + 1):
        ys, changes = [], []
        for i in strategy.cohort(range(5), 0.6, 1, "train", round):
            index = federation.labelled(i)
            if not len(index):
                continue
            inputs = (source.x_train[index] - statistics.mean[0]) / statistics.std[0]
            inputs = np.c_[inputs.reshape(len(index), -1), np.ones(len(index))]
            y = x.copy()
            for _ in range(k):
                p = np.exp(inputs @ y.T)
                p /= p.sum(axis=1, keepdims=True)
                g = (p - np.eye(3)[source.y_train[index]]).T @ inputs / len(index)
                y -= eta_l * (g - c_i[i] + c)
            new = c_i[i] - c + (x - y) / (k * eta_l)
            ys.append(y)
            changes.append(new - c_i[i])
            c_i[i] = new
            trained.add((i, round))
        x = x + eta_g * (np.mean(ys, axis=0) - x)
        c = c + len(ys) / 5 * np.mean(changes, axis=0)
    assert len(trained) > len({i for i, _ in trained}) == 4  # some have trained twice
    for prefix, expected in (("", x), ("control.", c)):
        weight, bias = found[f"{prefix}head.weight"], found[f"{prefix}head.bias"]
        np.testing.assert_allclose(weight, expected[:, :-1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bias, expected[:, -1], rtol=1e-4, atol=1e-5)


class TestScaffoldFailure:
    @pytest.mark.parametrize("global_lr", [0.0, -1.0, float("nan"), float("inf")])
    def test_the_global_learning_rate_must_be_above_zero(self, global_lr):
        with pytest.raises(ConfigError, match=r"method\.global_lr = .*: must be above 0"):
            Scaffold(global_lr=global_lr)

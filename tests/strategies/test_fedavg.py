"""FedAvg's server: the weighted mean by hand, and the choice of the cohort."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine import flower
from strategies import FedAvg, FedProx


class Nodes:
    """As much of a grid as a strategy looks at."""

    def __init__(self, count):
        self.count = count

    def get_node_ids(self):
        return range(self.count)


def answer(arrays, num_examples, **metrics):
    flower.enter_runtime()
    question = Message(RecordDict(), 0, "train")
    flower.identify(question, "1")
    groups = {"arrays": {name: np.float32(array) for name, array in arrays.items()}}
    return flower.reply(question, groups, {"num-examples": num_examples, **metrics})


def values(record: ArrayRecord):
    return {name: array.numpy().tolist() for name, array in record.items()}


def test_the_mean_is_weighted_by_examples_batch_norm_buffers_included():
    # By hand: (3 * 1 + 1 * 5) / 4 = 2, (3 * 0 + 1 * 8) / 4 = 2, (3 * 4 + 1 * 0) / 4 = 3;
    # running mean (3 * 2 + 1 * -2) / 4 = 1, running variance (3 * 1 + 1 * 9) / 4 = 3.
    one = {"w": [1, 0, 4], "bn.running_mean": [2], "bn.running_var": [1]}
    two = {"w": [5, 8, 0], "bn.running_mean": [-2], "bn.running_var": [9]}
    replies = [answer(one, 3, loss=1.0), answer(two, 1, loss=5.0)]
    arrays, metrics = FedAvg().aggregate_train(1, replies)
    assert values(arrays) == {"w": [2, 2, 3], "bn.running_mean": [1], "bn.running_var": [3]}
    assert {array.dtype for array in arrays.values()} == {"float32"}
    assert metrics == MetricRecord({"loss": 2.0})


def test_a_client_with_nothing_to_train_on_has_no_say_even_if_its_loss_is_nan():
    replies = [answer({"w": [1.0]}, 2, loss=0.5), answer({"w": [9.0]}, 0, loss=float("nan"))]
    arrays, metrics = FedAvg().aggregate_train(1, replies)
    assert values(arrays) == {"w": [1.0]}
    assert metrics == MetricRecord({"loss": 0.5})


def test_a_number_that_not_all_clients_have_is_a_mean_over_those_that_have_it():
    # By hand: loss (1 * 1 + 3 * 2) / 4, drift (1 * 5 + 2 * 8) / 3.
    replies = [
        answer({"w": [1.0]}, 1, loss=1.0, drift=5.0),
        answer({"w": [1.0]}, 3, loss=2.0),
        answer({"w": [1.0]}, 2, loss=float("nan"), drift=8.0),
    ]
    _, metrics = FedAvg().aggregate_train(1, replies)
    assert metrics == MetricRecord({"loss": 1.75, "drift": 7.0})


@pytest.mark.parametrize("weight", ["num_kept", "num-kept"])
@pytest.mark.parametrize("group", ["arrays", "model"])
def test_a_subclass_may_weight_by_another_number(weight, group):
    # By hand: w (1 * 2 + 3 * 6) / 4, loss still by examples: (3 * 1 + 1 * 5) / 4.
    strategy = type("ByKept", (FedAvg,), {"weights": {group: weight, "more": "num_examples"}})()
    replies = [
        answer({"w": [2.0]}, 3, num_kept=1.0, loss=1.0),
        answer({"w": [6.0]}, 1, num_kept=3.0, loss=5.0),
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert values(arrays) == {"w": [5.0]}
    assert metrics["loss"] == 2.0
    assert strategy.aggregate_train(1, [answer({"w": [2.0]}, 3, num_kept=0.0)]) == (None, None)


def test_of_several_groups_it_averages_the_first_that_it_weights():
    strategy = type("Own", (FedAvg,), {"weights": {"arrays": "num_examples"}})()
    groups = {"more": {"w": np.float32([9])}, "arrays": {"w": np.float32([4])}}
    flower.enter_runtime()
    question = Message(RecordDict(), 0, "train")
    replies = [flower.reply(question, groups, {"num-examples": 1}) for _ in range(2)]
    assert values(strategy.aggregate_train(1, replies)[0]) == {"w": [4.0]}


def test_an_array_without_dimensions_is_averaged_too():
    arrays, _ = FedAvg().aggregate_train(1, [answer({"beta": 1.0}, 1), answer({"beta": 4.0}, 2)])
    assert values(arrays) == {"beta": 3.0}


def test_failed_clients_are_left_out():
    failed = answer({"w": [0.0]}, 1)
    question = Message(RecordDict(), 0, "train")
    replies = [answer({"w": [4.0]}, 2), flower.error_reply(question, "broke")]
    assert values(FedAvg().aggregate_train(1, replies)[0]) == {"w": [4.0]}
    assert failed.has_content()


def test_no_usable_reply_gives_no_model():
    assert FedAvg().aggregate_train(1, []) == (None, None)
    assert FedAvg().aggregate_train(1, [answer({"w": [1.0]}, 0)]) == (None, None)
    assert FedAvg().aggregate_evaluate(1, []) is None


@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(1, 1000)), min_size=1))
def test_the_mean_equals_numpy_and_lies_between_the_clients(clients):
    replies = [answer({"w": [value]}, weight) for value, weight in clients]
    (mean,) = values(FedAvg().aggregate_train(1, replies)[0])["w"]
    found, weights = zip(*clients, strict=True)
    assert mean == pytest.approx(np.average(found, weights=weights), rel=1e-6, abs=1e-6)
    slack = 1e-5 * max(map(abs, found))
    assert min(found) - slack <= mean <= max(found) + slack


def test_the_cohort_depends_on_seed_and_round_only():
    def cohort(seed, server_round):
        strategy = FedAvg(fraction_train=0.1, seed=seed)
        messages = strategy.configure_train(
            server_round, ArrayRecord(), ConfigRecord(), Nodes(1000)
        )
        return [message.metadata.dst_node_id for message in messages]

    flower.enter_runtime()
    assert cohort(0, 3) == cohort(0, 3)
    assert len(set(cohort(0, 3))) == 100
    assert cohort(0, 3) != cohort(0, 4)
    assert cohort(0, 3) != cohort(1, 3)


def test_every_client_takes_part_equally_often():
    strategy = FedAvg(seed=5)
    counts = np.zeros(20)
    for server_round in range(2000):
        counts[strategy.cohort(range(20), 0.25, 1, "train", server_round)] += 1
    # 2000 draws with probability 1/4: standard deviation 19.4, so 5 of them are 97.
    assert np.abs(counts - 500).max() < 97


def test_a_share_never_loses_a_client_to_rounding():
    strategy = FedAvg()
    assert len(strategy.cohort(range(100), 0.29, 0, "train", 1)) == 29  # 100 * 0.29 < 29
    assert len(strategy.cohort(range(100), 0.001, 2, "train", 1)) == 2
    assert strategy.cohort(range(3), 1.0, 1, "train", 1) == [0, 1, 2]
    assert strategy.cohort(range(3), 0.0, 0, "evaluate", 1) == []


def test_all_messages_of_a_round_share_one_content_that_names_the_round():
    flower.enter_runtime()
    arrays = ArrayRecord()
    messages = FedAvg().configure_train(7, arrays, ConfigRecord(), Nodes(5))
    assert all(message.content is messages[0].content for message in messages)
    assert messages[0].content["arrays"] is arrays
    assert messages[0].content["config"]["server-round"] == 7


def test_a_round_waits_for_its_clients(monkeypatch):
    """On a real network nodes connect one after the other, in any order."""
    flower.enter_runtime()
    connected = [[], [7], [9, 7], [9, 4, 7]]

    class Connecting:
        def get_node_ids(self):
            return iter(connected.pop(0))

    waited = []
    monkeypatch.setattr("strategies.fedavg.sleep", waited.append)
    messages = FedAvg(min_available_nodes=3).configure_train(
        1, ArrayRecord(), ConfigRecord(), Connecting()
    )
    assert [message.metadata.dst_node_id for message in messages] == [4, 7, 9]
    assert waited == [1, 1, 1]


def test_fedprox_aggregates_as_fedavg():
    replies = [answer({"w": [1.0]}, 3), answer({"w": [5.0]}, 1)]
    assert values(FedProx().aggregate_train(1, replies)[0]) == {"w": [2.0]}

"""FedLabel's server: disjoint aggregation by hand, and its special cases."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedsim.engine import flower
from strategies import FedAvg, FedLabel, FixMatch


def answer(labelled, unlabelled, num_labelled, num_pseudo):
    flower.enter_runtime()
    question = Message(RecordDict(), 0, "train")
    flower.identify(question, "1")
    groups = {
        "labelled": {"w": np.float32(labelled)},
        "unlabelled": {"w": np.float32(unlabelled)},
    }
    has = float(num_labelled > 0)
    metrics = {"num-examples": 10, "has_labels": has, "num_pseudo": num_pseudo}
    return flower.reply(question, groups, metrics)


def test_the_workers_weight_the_two_models_apart():
    assert FedLabel().weights == {"labelled": "has_labels", "unlabelled": "num_pseudo"}


def test_half_the_uniform_mean_plus_half_the_mean_by_pseudo_labels():
    # Labelled: (2 + 4) / 2 = 3 and (0 + 8) / 2 = 4, whatever the number of labels.
    # Unlabelled: (3 * 1 + 1 * 5) / 4 = 2 and (3 * 0 + 1 * -8) / 4 = -2. Halves: 2.5 and 1.
    replies = [answer([2, 0], [1, 0], 7, 3.0), answer([4, 8], [5, -8], 1, 1.0)]
    arrays, _ = FedLabel().aggregate_train(1, replies)
    assert arrays["w"].numpy().tolist() == [2.5, 1.0]
    assert arrays["w"].dtype == "float32"


def test_a_subclass_may_weight_by_other_numbers():
    # Labelled: (3 * 2 + 1 * 6) / 4 = 3; unlabelled: both have 10 examples, (1 + 9) / 2 = 5.
    weights = {"labelled": "num_pseudo", "unlabelled": "num_examples"}
    strategy = type("Own", (FedLabel,), {"weights": weights})()
    replies = [answer([2], [1], 7, 3.0), answer([6], [9], 1, 1.0)]
    assert strategy.aggregate_train(1, replies)[0]["w"].numpy().tolist() == [4.0]


def test_clients_without_labels_have_no_say_in_the_labelled_mean():
    replies = [answer([2], [0], 7, 1.0), answer([100], [0], 0, 1.0)]
    assert FedLabel().aggregate_train(1, replies)[0]["w"].numpy().tolist() == [1.0]


def test_if_nobody_has_labels_the_labelled_half_is_the_global_model():
    strategy = FedLabel(fraction_train=0.0, min_train_nodes=0)
    start = flower.to_record({"w": np.float32([6])})
    strategy.configure_train(1, start, ConfigRecord(), Nodes())
    replies = [answer([6], [0], 0, 1.0), answer([6], [0], 0, 3.0)]
    assert strategy.aggregate_train(1, replies)[0]["w"].numpy().tolist() == [3.0]


class Nodes:
    """As much of a grid as a strategy looks at."""

    @staticmethod
    def get_node_ids():
        return range(2)


def test_no_reply_gives_no_model():
    assert FedLabel().aggregate_train(1, []) == (None, None)


@pytest.mark.parametrize("options", [{"aggregation": "single"}, {"schedule": "joint"}])
def test_one_model_a_client_is_averaged_as_fedavg(options):
    flower.enter_runtime()

    def reply(value, num_examples):
        question = Message(RecordDict(), 0, "train")
        groups = {"arrays": {"w": np.float32([value])}}
        return flower.reply(question, groups, {"num-examples": num_examples})

    # So much is asked of the workers, too: sums of what each client uploads.
    assert FedLabel(**options).weights == {"arrays": "num-examples"}
    replies = [reply(1, 3), reply(5, 1)]
    for strategy in (FedLabel(**options), FixMatch(), FedAvg()):
        assert strategy.aggregate_train(1, replies)[0]["w"].numpy().tolist() == [2.0]

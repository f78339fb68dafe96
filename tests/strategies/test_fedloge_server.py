"""FedLoGe's server: backbone and auxiliary head by hand, and the classifier that stays."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedsim.engine import flower
from strategies import FedLabelFedLoGe, FedLoGe

START = {
    "backbone.weight": [0.0, 0.0],
    "backbone.running_mean": [0.0],
    "head.weight": [1.0],
    "etf.weight": [0.1, -0.1],
}
ONE = {"backbone.weight": [1.0, 4.0], "backbone.running_mean": [2.0], "head.weight": [3.0]}
TWO = {"backbone.weight": [5.0, 0.0], "backbone.running_mean": [-2.0], "head.weight": [7.0]}


class Nodes:
    """As much of a grid as a strategy looks at."""

    @staticmethod
    def get_node_ids():
        return range(2)


def f32(arrays):
    return {name: np.float32(array) for name, array in arrays.items()}


def aggregate(strategy, *answers):
    flower.enter_runtime()
    strategy.configure_train(1, flower.to_record(f32(START)), ConfigRecord(), Nodes())
    replies = []
    for groups, metrics in answers:
        question = Message(RecordDict(), 0, "train")
        flower.identify(question, "1")
        replies.append(flower.reply(question, {g: f32(a) for g, a in groups.items()}, metrics))
    arrays, _ = strategy.aggregate_train(1, replies)
    return {name: array.numpy().tolist() for name, array in arrays.items()}


def test_backbone_and_auxiliary_head_are_weighted_by_examples_and_the_etf_stays():
    found = aggregate(
        FedLoGe(), ({"arrays": ONE}, {"num-examples": 3}), ({"arrays": TWO}, {"num-examples": 1})
    )
    assert found == {
        "backbone.weight": [2.0, 3.0],  # (3 * 1 + 5) / 4, (3 * 4 + 0) / 4
        "backbone.running_mean": [1.0],  # (3 * 2 - 2) / 4
        "head.weight": [4.0],  # (3 * 3 + 7) / 4
        "etf.weight": pytest.approx([0.1, -0.1]),
    }


def test_with_fedlabel_both_halves_are_averaged_and_the_etf_stays():
    metrics = {"num-examples": 9, "has_labels": 1.0}
    found = aggregate(
        FedLabelFedLoGe(),
        ({"labelled": ONE, "unlabelled": TWO}, {**metrics, "num_pseudo": 1.0}),
        ({"labelled": TWO, "unlabelled": ONE}, {**metrics, "num_pseudo": 3.0}),
    )
    # Labelled: the plain means 3, 2, 0 and 5. Unlabelled: (TWO + 3 ONE) / 4 = 2, 3, 1 and 4.
    assert found["backbone.weight"] == [2.5, 2.5]
    assert found["backbone.running_mean"] == [0.5]
    assert found["head.weight"] == [4.5]
    assert found["etf.weight"] == pytest.approx([0.1, -0.1])

"""What fedsim relies on inside Flower. If one of these fails, look at fedsim/engine/flower.py."""

import logging
import random
from importlib.metadata import version

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedsim.engine import flower
from fedsim.engine.reduction import Sum
from fedsim.engine.replies import Replies


def test_messages_and_replies_can_be_built_outside_a_flower_runtime():
    why = f"flwr {version('flwr')} builds messages in another way than 1.41 did"
    flower.enter_runtime()
    question = Message(RecordDict({"config": ConfigRecord({"server-round": 3})}), 42, "train")
    flower.identify(question, "17")
    assert question.metadata.message_id == "17", why
    reply = flower.reply(question, {"arrays": {"w": np.float32([1, 2])}}, {"num-examples": 5})
    assert reply.metadata.reply_to_message_id == "17", why
    assert reply.metadata.src_node_id == 42, why
    assert reply.metadata.dst_node_id == flower.SERVER_NODE_ID, why
    assert reply.content["metrics"]["num-examples"] == 5
    error = flower.error_reply(question, "because")
    assert error.has_error()
    assert error.error.reason == "because"


def test_records_own_their_arrays_and_come_back_as_float32():
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    record = flower.to_record({"w": array})
    array[:] = 0
    back = flower.from_record(record)["w"]
    assert back.dtype == np.float32
    assert back.tolist() == [[0, 1, 2], [3, 4, 5]]
    back[0] = 7  # its own copy, too
    assert flower.from_record(record)["w"][0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T,  # numbers in Fortran order
        np.arange(24.0, dtype=np.float32).reshape(2, 3, 2, 2).transpose(0, 3, 1, 2),
        np.array(3.5, np.float32),
        np.zeros((0, 4), np.float32),
        np.array([1, 2], np.int64),
        np.arange(3.0).astype(">f4"),
    ],
    ids=["fortran", "strided", "scalar", "empty", "integers", "big-endian"],
)
def test_records_of_any_layout_are_written_and_read_as_flower_does(array):
    flowers = ArrayRecord({"w": Array(array)})
    if array.flags.c_contiguous:
        assert flower.to_record({"w": array}) == flowers
    for record in (flower.to_record({"w": array}), flowers):
        np.testing.assert_array_equal(record["w"].numpy(), array)
        back = flower.from_record(record)["w"]
        np.testing.assert_array_equal(back, array)
        assert back.shape == array.shape


@pytest.mark.parametrize(
    ("examples", "loss"),
    [
        ([2, 0, 6], (2 * 1.0 + 6 * 2.0) / 8),  # whoever has no examples has no loss
        ([1, 0, 0], 1.0),
    ],
)
def test_one_reply_for_all_has_means_over_those_with_examples_and_sums_of_weights(examples, loss):
    losses = [1.0, float("nan"), 2.0]
    metrics = {"num_examples": examples, "train_loss": losses, "num_pseudo": [1.0, 1.0, 4.0]}
    replies = Replies(clients=[3, 5, 6], metrics=metrics, failures={4: "no battery"})
    weights = {"labelled": "num-examples", "unlabelled": "num_pseudo"}
    found = flower.together(replies, Sum(), weights)
    assert found.metrics == {
        "num_examples": [sum(examples)],
        "train_loss": [pytest.approx(loss)],
        "num_pseudo": [6.0],
    }
    assert (found.clients, found.failures) == ([3], {4: "no battery"})


def test_without_any_examples_there_are_no_means():
    replies = Replies(clients=[0, 1], metrics={"num_examples": [0, 0], "x": [1.0, 4.0]})
    found = flower.together(replies, Sum(), {"arrays": "num_examples"})
    assert found.metrics["num_examples"] == [0]
    assert np.isnan(found.metrics["x"]).all()


def test_what_some_clients_dont_report_is_a_mean_over_the_others():
    metrics = {"num_examples": [1, 3, 2], "x": [2.0, None, 5.0], "y": [np.nan, 1.0, 1.0]}
    found = flower.together(Replies(clients=[0, 1, 2], metrics=metrics), Sum(), {})
    assert found.metrics == {"num_examples": [6], "x": [4.0], "y": [1.0]}


@pytest.mark.parametrize(
    ("seed_it", "number"),
    [
        (random.seed, random.random),
        (np.random.seed, np.random.random),
        (torch.manual_seed, lambda: torch.rand(()).item()),
    ],
    ids=["python", "numpy", "torch"],
)
def test_draws_are_seeded_and_the_global_generators_restored(seed_it, number):
    def draw(seed, purpose, round):
        with flower.seeded_draws(seed, purpose, round):
            return number()

    seed_it(1)
    expected = number()
    seed_it(1)
    assert draw(0, "train", 1) == draw(0, "train", 1)
    assert len({draw(0, "train", 1), draw(0, "train", 2), draw(1, "train", 1)}) == 3
    assert number() == expected


def test_flower_log_is_quiet_inside_only():
    logger = logging.getLogger("flwr")

    def passes(level):
        return bool(logger.filter(logging.makeLogRecord({"levelno": level})))

    with flower.quiet_log():
        assert not passes(logging.INFO)
        assert passes(logging.WARNING)
    assert passes(logging.INFO)

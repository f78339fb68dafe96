"""What fedsim relies on inside Flower. If one of these fails, look at fedsim/engine/flower.py."""

import logging
import random
from importlib.metadata import version

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedsim.engine import flower


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


def test_sampling_is_seeded_and_the_global_generator_restored():
    def draw(seed, purpose, round):
        with flower.seeded_sampling(seed, purpose, round):
            return random.random()

    random.seed(1)
    expected = random.random()
    random.seed(1)
    assert draw(0, "train", 1) == draw(0, "train", 1)
    assert len({draw(0, "train", 1), draw(0, "train", 2), draw(1, "train", 1)}) == 3
    assert random.random() == expected


def test_flower_log_is_quiet_inside_only():
    logger = logging.getLogger("flwr")
    before = logger.level
    with flower.quiet_log():
        assert not logger.isEnabledFor(logging.INFO)
        assert logger.isEnabledFor(logging.WARNING)
    assert logger.level == before

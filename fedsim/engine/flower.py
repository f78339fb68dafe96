"""Where fedsim touches Flower's inside: messages outside a Flower runtime, and its log.

Everything that depends on undocumented parts of ``flwr`` is in this file; its test fails with a
clear message on a release where they changed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsim.engine.worker import Arrays
from fedsim.rng import generator

SERVER_NODE_ID = 1
"""Flower's own number of the server node."""
CLIENT_ERROR = 2
"""Flower's code of an error raised in a client app."""
NUM_EXAMPLES = "num-examples"
"""The key of the weight in Flower's averages."""


def enter_runtime() -> None:
    """Let `flwr.app.Message` be built in this process, outside any Flower runtime."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = SERVER_NODE_ID


@contextmanager
def quiet_log() -> Iterator[None]:
    """Hold back Flower's INFO lines, of which a strategy writes several a round."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def seeded_sampling(seed: int, purpose: str, round: int) -> Iterator[None]:
    """Seed the global ``random``, from which Flower's strategies sample nodes; restore it after."""
    state = random.getstate()
    random.seed(int(generator(seed, purpose, round=round).integers(2**63)))
    try:
        yield
    finally:
        random.setstate(state)


def to_record(arrays: Arrays) -> ArrayRecord:
    """Return an ArrayRecord that owns copies of ``arrays``."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def from_record(record: ArrayRecord) -> Arrays:
    """Return the arrays of a record as float32: some of Flower's strategies answer in float64."""
    return {name: array.numpy().astype(np.float32, copy=False) for name, array in record.items()}


def identify(message: Message, message_id: str) -> None:
    """Give a message the ID that a SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


def reply(message: Message, groups: dict[str, Arrays], metrics: Mapping[str, float]) -> Message:
    """Return a client's answer: an ArrayRecord a group, and the metrics."""
    content = RecordDict({group: to_record(arrays) for group, arrays in groups.items()})
    content["metrics"] = MetricRecord(dict(metrics))
    return Message(content, reply_to=message)


def error_reply(message: Message, reason: str) -> Message:
    """Return a client's answer that says why it failed."""
    return Message(Error(CLIENT_ERROR, reason), reply_to=message)

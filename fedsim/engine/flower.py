"""Where fedsim touches Flower's inside: messages outside a Flower runtime, and its log.

Whatever depends on how undocumented parts of ``flwr`` work is in this file; its test fails with a
clear message on a release where they changed. Elsewhere they lend a type and a logger, no more.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.common.constant import SType
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Strategy,
)
from flwr.supercore.task_identity import TaskIdentity
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from numpy.random import mtrand
from numpy.typing import NDArray

from fedsim.engine.broadcast import Broadcast
from fedsim.engine.reduction import Sum
from fedsim.engine.replies import Column, Replies
from fedsim.engine.worker import ClientConfigs
from fedsim.errors import EngineError
from fedsim.metrics import client_mean
from fedsim.models import Arrays
from fedsim.rng import generator

FlowerError = AppExitException
"""What Flower's strategies raise where they can't go on."""
SERVER_NODE_ID = 1
"""Flower's own number of the server node."""
CLIENT_ERROR = 2
"""Flower's code of an error raised in a client app."""
NUM_EXAMPLES = "num-examples"
"""The key of the weight in Flower's averages."""

_STAND_IN = np.random.MT19937()
"""For what ``numpy.random``'s own functions draw from."""
_CLIENTS_CLIP = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
)
_FLOWER_MEANS = (FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi)


def weights_of(strategy: Strategy) -> Mapping[str, str] | None:
    """Return by which number a strategy weights each group of arrays; None if it needs them all.

    A strategy says in its class's attribute ``weights`` that it only takes weighted means; a
    subclass that averages in another way must say so anew. Of Flower's own strategies, FedAvg and
    the server optimisers on top of it only take weighted means.

    The numbers have the names of an `Upload`'s, with underscores where Flower's have hyphens.

    Raises
    ------
    EngineError
        If the strategy relies on clients that clip what they upload, or if what it says is no such
        dict.
    """
    if isinstance(strategy, _CLIENTS_CLIP):
        raise EngineError(
            f"{type(strategy).__name__} counts on clients that clip their updates, which these "
            "don't; use the DifferentialPrivacyServerSide... strategy of the same kind"
        )
    if type(strategy) in _FLOWER_MEANS:
        assert isinstance(strategy, FedAvg)
        return {"arrays": strategy.weighted_by_key.replace("-", "_")}
    weights = _declared(strategy, "weights", of="aggregate_train")
    if weights is None:
        return None
    if not isinstance(weights, Mapping) or {*map(type, weights.values())} != {str}:
        raise EngineError(
            f"{type(strategy).__name__}.weights = {weights!r}: must be a dict of metrics "
            'by group of arrays, such as {"arrays": "num_examples"}, or None for every reply'
        )
    return {group: name.replace("-", "_") for group, name in weights.items()}


def takes_mean_of_tests(strategy: Strategy) -> bool:
    """Tell whether of the clients' tests a strategy needs the mean only, weighted by examples.

    It says so in its class's attribute ``only_mean_of_tests``, as in ``weights`` of the training.
    """
    return bool(_declared(strategy, "only_mean_of_tests", of="aggregate_evaluate"))


def _declared(strategy: Strategy, name: str, *, of: str) -> Any:
    """Return an attribute that a class declares for its method ``of``; None for an override."""
    for part in type(strategy).__mro__:
        if name in vars(part):
            return getattr(strategy, name)
        if of in vars(part):
            return None
    return None


def enter_runtime() -> None:
    """Let `flwr.app.Message` be built in this process, outside any Flower runtime."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = SERVER_NODE_ID


@contextmanager
def quiet_log() -> Iterator[None]:
    """Hold back Flower's INFO lines, of which a strategy writes several a round."""
    logger = logging.getLogger("flwr")
    logger.addFilter(_is_serious)
    try:
        yield
    finally:
        logger.removeFilter(_is_serious)


def _is_serious(line: logging.LogRecord) -> bool:
    return line.levelno >= logging.WARNING


@contextmanager
def seeded_draws(seed: int, purpose: str, round: int) -> Iterator[None]:
    """Seed the global generators for a while, from which strategies sample nodes and draw noise."""
    rng = generator(seed, purpose, round=round)
    of_python, of_numpy = random.getstate(), mtrand.get_bit_generator()
    random.seed(int(rng.integers(2**63)))
    # Another in its place: to copy its state twice would take longer than all else.
    mtrand.set_bit_generator(_STAND_IN)
    mtrand.seed(int(rng.integers(2**32)))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            yield
    finally:
        random.setstate(of_python)
        mtrand.set_bit_generator(of_numpy)


def to_record(arrays: Arrays) -> ArrayRecord:
    """Return an ArrayRecord that owns copies of ``arrays``."""
    return ArrayRecord({name: _serialise(np.asarray(array)) for name, array in arrays.items()})


def _serialise(array: NDArray[Any]) -> Array:
    """Return ``Array(array)``: NumPy's file format, whose header takes longer than all else."""
    numbers = np.ascontiguousarray(array).data if array.size else b""  # no memory to look at
    data = b"".join((_header(array.dtype, array.shape), numbers))
    return Array(str(array.dtype), array.shape, SType.NUMPY, data)


@lru_cache(maxsize=1024)
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return how a file of such an array begins."""
    file = BytesIO()
    fields = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    write_array_header_1_0(file, fields)
    return file.getvalue()


def from_record(record: ArrayRecord) -> Arrays:
    """Return the arrays of a record as float32: some of Flower's strategies answer in float64."""
    return {name: array.astype(np.float32, order="C") for name, array in arrays_of(record).items()}


def arrays_of(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Return the arrays of a record as they are, mostly read-only views."""
    return {name: _numbers(array) for name, array in record.items()}


def _numbers(array: Array) -> NDArray[Any]:
    """Return ``array.numpy()``, read-only.

    An Array knows its shape and type: where its numbers are in C order, as nearly always, parsing
    the header that repeats them would take longer than all else.
    """
    size = np.dtype(array.dtype).itemsize * math.prod(array.shape)
    if b"'fortran_order': False" not in array.data[: len(array.data) - size]:
        return array.numpy()
    numbers = np.frombuffer(array.data, array.dtype, offset=len(array.data) - size)
    return numbers.reshape(array.shape)


def identify(message: Message, message_id: str) -> None:
    """Give a message the ID that a SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


class Instruction(NamedTuple):
    """What a strategy's message says."""

    record: ArrayRecord
    """The global model."""
    round: int
    config: dict[str, Any]
    """What else it tells the client."""


def instruction(content: RecordDict, kind: str) -> Instruction:
    """Return what a strategy's messages of a kind say.

    Raises
    ------
    EngineError
        If the message doesn't hold exactly one ArrayRecord, or doesn't name its round.
    """
    records = list(content.array_records.values())
    if len(records) != 1:
        raise EngineError(
            f"a {kind} message holds {len(records)} ArrayRecords; "
            "a strategy must send exactly one, the global model"
        )
    config = {n: v for one in content.config_records.values() for n, v in one.items()}
    round = config.pop("server-round", None)
    if not isinstance(round, int):
        raise EngineError(
            f"a {kind} message lacks 'server-round' in its ConfigRecord; "
            "a strategy must name the round"
        )
    return Instruction(records[0], round, config)


class Cohort(NamedTuple):
    """Messages of a round that carry the same model."""

    record: ArrayRecord
    round: int
    configs: ClientConfigs
    """What else they tell their clients."""
    clients: list[int]
    messages: Sequence[Message]


def cohorts(messages: Sequence[Message]) -> Iterator[Cohort]:
    """Group messages that carry the same ArrayRecord and name the same round."""
    if isinstance(messages, Broadcast):
        if len(messages):
            record, round, config = instruction(messages.content, messages.message_type)
            nodes = list(messages.nodes)
            yield Cohort(record, round, ClientConfigs([config]), nodes, messages)
        return
    # A round's messages share one content, and Flower takes long to look into it.
    instructions: dict[int, Instruction] = {}
    groups: dict[tuple[int, int], list[Message]] = {}
    for message in messages:
        content = id(message.content)
        if content not in instructions:
            kind = message.metadata.message_type
            instructions[content] = instruction(message.content, kind)
        found = instructions[content]
        groups.setdefault((id(found.record), found.round), []).append(message)
    for group in groups.values():
        contents = [id(message.content) for message in group]
        clients = [message.metadata.dst_node_id for message in group]
        places = {content: place for place, content in enumerate(dict.fromkeys(contents))}
        configs = [instructions[content].config for content in places]
        place_of = {k: places[content] for k, content in zip(clients, contents, strict=True)}
        told = ClientConfigs(configs, place_of if len(configs) > 1 else {})
        first = instructions[contents[0]]
        yield Cohort(first.record, first.round, told, clients, group)


def reply(message: Message, groups: dict[str, Arrays], metrics: Mapping[str, float]) -> Message:
    """Return a client's answer: an ArrayRecord a group, and the metrics."""
    content = RecordDict({group: to_record(arrays) for group, arrays in groups.items()})
    content["metrics"] = MetricRecord(dict(metrics))
    return Message(content, reply_to=message)


def together(replies: Replies, total: Sum, weights: Mapping[str, str]) -> Replies:
    """Return the failures, and one reply that stands for all other clients.

    Its arrays are weighted means, its weights sums, its other numbers means weighted by examples.
    """
    if not replies.clients:
        return replies
    examples = np.array(replies.metrics["num_examples"])
    sums = {*weights.values()}
    metrics: dict[str, Column] = {}
    for name, column in replies.metrics.items():
        values = np.array(column, float)
        if name in sums:
            metrics[name] = [float(values.sum())]
        else:
            metrics[name] = [client_mean(values, examples)]
    metrics["num_examples"] = [int(examples.sum())]
    return Replies(
        clients=replies.clients[:1],
        metrics=metrics,
        arrays=[total.means()],
        failures=replies.failures,
    )


def train_replies(
    clients: Sequence[int], message_to: Callable[[int], Message], replies: Replies
) -> list[Message]:
    """Return what the clients send after training; an error where one failed.

    In the order of ``clients``, without those for whom another stands. ``message_to`` returns the
    message to a client by its place among them.
    """
    places = {client: place for place, client in enumerate(replies.clients)}
    answers = []
    for asked, client in enumerate(clients):
        if client in replies.failures:
            answers.append(error_reply(message_to(asked), replies.failures[client]))
        elif client in places:
            place = places[client]
            numbers = {name: column[place] for name, column in replies.metrics.items()}
            metrics = {n: v for n, v in numbers.items() if v is not None}
            metrics[NUM_EXAMPLES] = metrics.pop("num_examples")
            answers.append(reply(message_to(asked), replies.arrays[place], metrics))
    return answers


def evaluate_reply(message: Message, num_test: int, loss: float, accuracy: float) -> Message:
    """Return what a client sends after testing the model.

    Without test examples there are no figures; weight 0 keeps it out of means.
    """
    if not num_test:
        loss, accuracy = 0.0, 0.0
    return reply(message, {}, {NUM_EXAMPLES: num_test, "loss": loss, "accuracy": accuracy})


def error_reply(message: Message, reason: str) -> Message:
    """Return a client's answer that says why it failed."""
    return Message(Error(CLIENT_ERROR, reason), reply_to=message)

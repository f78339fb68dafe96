"""An experiment for Flower's own runtimes: its clients as a ClientApp, and the first arrays."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedsim import simulation
from fedsim.config import Experiment
from fedsim.engine import flower
from fedsim.engine.replies import warn_of_unread, warn_of_untold
from fedsim.engine.worker import Task, Worker
from fedsim.errors import EngineError
from fedsim.models import Arrays

STATE = "fedsim"
"""Where a client's arrays stand in its node's context."""


def client_app(experiment: Experiment) -> ClientApp:
    """Return the clients of an experiment as a Flower app, for Flower's own runtimes.

    The same client update runs as in `fedsim.simulate`, one client at a time. Which client a node
    is stands in its ``partition-id``, and ``num-partitions``, where it is given, must be the number
    of clients; Flower's simulation sets both. What the client keeps between rounds is in the node's
    ``context.state``.

    Where all clients take part, the numbers are those of `fedsim.simulate`. Otherwise the cohorts
    are others: Flower's nodes have random numbers, by whose order `strategies.FedAvg` chooses.

    Parameters
    ----------
    experiment : Experiment
        Data, clients, model, method and training. ``[evaluation]`` doesn't matter, and of
        ``[engine]`` only the device.

    Returns
    -------
    flwr.clientapp.ClientApp
        Answers train and evaluate messages. The data are read at the first message.

    Examples
    --------
    In the module that a Flower project names as its client app, with the experiment's file beside
    it. (Flower runs a copy of both, in whichever working directory the SuperLink was started.) ::

        app = fedsim.client_app(fedsim.load(Path(__file__).parent / "experiment.toml"))
    """
    text = experiment.to_toml()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = _client(context, experiment)
        said = flower.instruction(message.content, message.metadata.message_type)
        arrays = flower.from_record(said.record)
        replies, kept = _worker(text).train_client(
            arrays, said.round, client, _state(context), said.config
        )
        warn_of_unread(said.config, replies)
        if kept:
            context.state[STATE] = flower.to_record(kept)
        (answer,) = flower.train_replies([client], lambda _: message, replies)
        return answer

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = _client(context, experiment)
        said = flower.instruction(message.content, message.metadata.message_type)
        warn_of_untold(said.config)
        arrays = flower.from_record(said.record)
        figures = _worker(text).test_client(arrays, said.round, client, _state(context))
        return flower.evaluate_reply(message, *figures)

    return app


def initial_arrays(experiment: Experiment) -> ArrayRecord:
    """Return the arrays of round 0, as `fedsim.simulate` starts from: the model's and the method's.

    Examples
    --------
    In a Flower project's server app::

        fedsim.make_strategy(experiment).start(
            grid=grid,
            initial_arrays=fedsim.initial_arrays(experiment),
            num_rounds=experiment.training.rounds,
        )
    """
    return flower.to_record(simulation.initial_arrays(_task(experiment)))


def _task(experiment: Experiment) -> Task:
    # States are Flower's here: the worker writes none.
    federation = simulation.load_federation(experiment)
    return simulation.make_task(experiment, federation, Path("unused"))


@lru_cache(maxsize=1)
def _worker(text: str) -> Worker:
    """Return this process's worker: Flower unpickles the app anew for every message."""
    return Worker(_task(Experiment(**tomllib.loads(text))))


def _state(context: Context) -> Arrays:
    record = context.state.array_records.get(STATE)
    return {} if record is None else flower.from_record(record)


def _client(context: Context, experiment: Experiment) -> int:
    count = experiment.clients.count
    nodes = context.node_config.get("num-partitions", count)
    if nodes != count:
        raise EngineError(
            f"a node's num-partitions is {nodes!r}, but clients.count = {count}: there must be as "
            f"many nodes as clients; in Flower's simulation set num-supernodes={count}"
        )
    client = context.node_config.get("partition-id")
    if not isinstance(client, int) or not 0 <= client < count:
        raise EngineError(
            f"a node's partition-id is {client!r}; it must be a client, 0..{count - 1}"
        )
    return client

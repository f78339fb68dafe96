"""A worker: one process (or this one) that trains clients and tests models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data.federation import Federation
from fedsim.data.statistics import Statistics
from fedsim.data.transfer import to_device
from fedsim.engine.evaluation import Evaluator, Scores, Tested, join_scores
from fedsim.engine.loader import PREDICT_BLOCK
from fedsim.engine.local import LocalTrainer
from fedsim.engine.memory import client_bytes, fitting
from fedsim.engine.reduction import Sum
from fedsim.engine.replies import Replies
from fedsim.engine.schedule import MAX_STACKED_CLIENTS
from fedsim.engine.state import StateFiles
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Client, ClientUpdate, Config
from fedsim.engine.uploads import Intake
from fedsim.models.layers import channels_last
from fedsim.models.net import Arrays, Model, Net, Weights
from fedsim.processor import flush_denormals

Share = Sequence[tuple[int, Sequence[tuple[int, tuple[int, int]]]]]
"""The leaves of a cohort's tree that a worker trains or tests: node, and its clients, each with the
slots of the state that it starts from and of the next; see `fedsim.engine.reduction` and
`StateFiles`."""


class ClientConfigs(NamedTuple):
    """What a strategy tells clients besides the model."""

    each: Sequence[Mapping[str, Any]] = ({},)
    place_of: Mapping[int, int] = {}
    """Client -> which of them it is told; the first one where a client isn't here."""


NO_CONFIGS = ClientConfigs()


class Order(NamedTuple):
    """What all workers are asked in a round, whoever it is that they train."""

    round: int
    """From 1."""
    weighted_by: Mapping[str, str] | None
    """Array group -> the number by which a client's is weighted, if only sums are wanted."""
    configs: ClientConfigs = NO_CONFIGS
    """What the strategy tells the clients besides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """All a worker needs to know, the same for every worker and every round."""

    federation: Federation
    statistics: Statistics
    model: Callable[[], Model]
    """Makes the model's architecture; its weights come with each round."""
    update: ClientUpdate
    training: LocalTraining
    seed: int
    stacked: bool
    """Whether the clients of a leaf train side by side."""
    step_flops: int
    """Floating-point operations of a client's step: `fedsim.models.net.step_flops`."""
    states: Path
    """Folder for what the clients keep between rounds; made when the first one keeps something."""
    device: str = "cpu"
    """Where clients train and models are tested: ``"cpu"`` or ``"cuda"``."""
    device_share: float = 1.0
    """Share of a GPU that a worker has, in (0, 1]; 0 on the processor."""
    packages: tuple[str, ...] = ()
    """Top-level packages and modules that must be the same files in every process."""


class Worker:
    """Trains clients and tests models, on one thread of the processor or on a GPU.

    Parameters
    ----------
    task : Task
        The work.
    """

    def __init__(self, task: Task) -> None:
        # One thread a worker: the workers share the cores, and sums come out the same everywhere.
        torch.set_num_threads(1)
        flush_denormals()
        self._update = task.update
        self._device = torch.device(task.device)
        self._device_share = task.device_share
        self._trainer = LocalTrainer(
            Net(task.model()),
            task.federation,
            task.statistics,
            task.training,
            task.seed,
            task.stacked,
            self._device,
        )
        self._evaluator = Evaluator(self._trainer)
        self._states = StateFiles(task.states)
        self._at_once = 0

    def train(
        self,
        arrays: Arrays,
        order: Order,
        share: Share,
        taken: Iterable[Share] | None = None,
    ) -> tuple[Replies, dict[int, Sum], dict[str, float]]:
        """Run the client update of each client of some leaves, from the global ``arrays``.

        Parameters
        ----------
        arrays : dict
            The global arrays.
        order : Order
            The round, and what is wanted of it.
        share : Share
            Who trains.
        taken : iterable of Share, optional
            What is really trained, some leaves at a time: mostly those of ``share``, whose clients
            are looked up together, and then maybe others.

        Returns
        -------
        replies : Replies
            In the order in which they are trained. A client that raises, or whose upload isn't
            finite, has failed.
        sums : dict
            With ``order.weighted_by``, the sums at the topmost nodes that these leaves make up; the
            replies have then no arrays.
        seconds : dict
            Where the time went, by part.
        """
        configs = [Config(values) for values in order.configs.each]

        def look_up(leaves: Share) -> dict[int, Client]:
            ids = [client for _, clients in leaves for client, _ in clients]
            of_each = [configs[order.configs.place_of.get(client, 0)] for client in ids]
            return dict(zip(ids, self._trainer.clients(order.round, ids, of_each), strict=True))

        clock = self._trainer.clock
        clock.restart()
        w = self.weights(arrays)
        clock.lap("serialise")
        intake = Intake(self._states.write, order.weighted_by, clock)
        known = look_up(share)
        for leaves in (share,) if taken is None else taken:
            if any(client not in known for _, clients in leaves for client, _ in clients):
                known = look_up(leaves)
            for some in self._stacks(leaves, w):
                clients = [
                    self._with_state(known[client], self._states.read(client, slot))
                    for _, client, (slot, _) in some
                ]
                clock.lap("state")
                found = self._trainer.update_all(self._update, w, clients)
                clock.lap("train")
                for (node, client, (_, new_slot)), one in zip(some, found, strict=True):
                    intake.take(node, client, new_slot, one)
                clock.lap("reduce")
        replies, sums = intake.end()
        replies.read = set().union(*(config.read for config in configs))
        return replies, sums, clock.seconds

    def _stacks(self, share: Share, w: Weights) -> Iterator[list[tuple[int, int, tuple[int, int]]]]:
        """Yield the clients that train at a time: node, client and the slots of its state.

        On the processor clients of different leaves never train side by side, so that how the
        leaves are shared out among workers changes no number. A GPU is fast where many do, and its
        sums depend on how many in the last bit.
        """
        leaves = [[(node, *one) for one in leaf] for node, leaf in share]
        size = 1
        if self._trainer.stacked:
            size = MAX_STACKED_CLIENTS
            if self._device.type != "cpu":
                self._at_once = self._at_once or self._fitting(w)
                most = min(self._at_once, self._trainer.max_stack or self._at_once)
                leaves = [list(chain.from_iterable(leaves))]
                count = max(1, len(leaves[0]))
                size = ceil(count / ceil(count / most))  # the last ones aren't left alone
        for leaf in leaves:
            yield from (leaf[i : i + size] for i in range(0, len(leaf), size))

    def _fitting(self, w: Weights) -> int:
        """Return how many clients fit into the worker's part of the GPU's memory."""
        trainer = self._trainer
        shape = tuple(trainer.federation.source.x_train.shape[1:])
        one = client_bytes(trainer.net, w, trainer.loader.widest, shape)
        total = torch.cuda.get_device_properties(self._device).total_memory
        return fitting(one, int(total * self._device_share))

    def weights(self, arrays: Arrays) -> Weights:
        """Return copies of arrays as tensors on the worker's device, laid out for speed."""
        return as_weights(self._trainer.net, arrays, self._device)

    def train_client(
        self,
        arrays: Arrays,
        round: int,
        client: int,
        state: Arrays,
        config: Mapping[str, Any],
    ) -> tuple[Replies, Arrays]:
        """Run a client's update from the global ``arrays`` and what it kept from its last round.

        Returns its reply, and what it keeps now, if anything.
        """
        told = Config(config)
        kept: list[Arrays] = [{}]
        intake = Intake(lambda client, slot, arrays: kept.append(arrays), None, self._trainer.clock)
        me = self._with_state(self._trainer.clients(round, [client], [told])[0], state)
        (found,) = self._trainer.update_all(self._update, self.weights(arrays), [me])
        intake.take(1, client, 0, found)
        replies, _ = intake.end()
        replies.read = told.read
        return replies, kept[-1]

    def _with_state(self, client: Client, state: Arrays) -> Client:
        return replace(client, state=self.weights(state)) if state else client

    def test_generic(self, arrays: Arrays, blocks: Sequence[int]) -> Tested:
        """Test the generic views on blocks of the global test set, joined.

        Block b holds the examples from b * PREDICT_BLOCK on.
        """
        w = self.weights(arrays)
        num_test = len(self._trainer.federation.source.y_test)
        scores, features = [], []
        for block in blocks:
            begin = block * PREDICT_BLOCK
            examples = np.arange(begin, min(begin + PREDICT_BLOCK, num_test))
            of_block, f = self._evaluator.test_generic(self._update, w, examples)
            scores.append(of_block)
            if self._update.has_personal_views:
                features.append(f.cpu().numpy())
        return Tested(join_scores(scores), np.concatenate(features) if features else None)

    def test_personal(
        self,
        arrays: Arrays,
        features: NDArray[np.float32],
        round: int,
        share: Share,
    ) -> Scores:
        """Test the personal views of clients on their own test sets, joined in their order.

        Personal models that take training are made side by side, as clients train.

        Parameters
        ----------
        arrays : dict
            The global arrays.
        features : ndarray of float32 [M, D]
            Of the whole global test set, from `test_generic`.
        round : int
            From 1.
        share : Share
            Whom to test.
        """
        w = self.weights(arrays)
        test = self._trainer.federation.test
        scores = []
        for some in self._stacks(share, w):
            ids = [client for _, client, _ in some]
            clients = [
                self._with_state(client, self._states.read(client.id, slot))
                for client, (_, _, (slot, _)) in zip(
                    self._trainer.clients(round, ids), some, strict=True
                )
            ]
            own = [to_device(features[test(client.id)], self._device) for client in clients]
            scores += self._evaluator.test_personal(self._update, w, clients, own)
        return join_scores(scores)

    def test_client(
        self, arrays: Arrays, round: int, client: int, state: Arrays
    ) -> tuple[int, float, float]:
        """Return the number of a client's own test examples, mean loss and accuracy on them.

        The figures are those of its personal model, if the method has one.
        """
        federation = self._trainer.federation
        index = federation.test(client)
        if not len(index):
            return 0, float("nan"), float("nan")
        w = self.weights(arrays)
        scores, features = self._evaluator.test_generic(self._update, w, index)
        if self._update.has_personal_views:
            me = self._with_state(self._trainer.clients(round, [client])[0], state)
            (scores,) = self._evaluator.test_personal(self._update, w, [me], [features])
        predicted, loss = next(iter(scores.values()))
        truth = federation.source.y_test[index]
        return len(index), float(loss.mean()), float((predicted == truth).mean())


def as_weights(net: Net, arrays: Arrays, device: torch.device) -> Weights:
    """Return copies of arrays as tensors on a device, laid out as `channels_last` says."""
    w = {n: channels_last(torch.tensor(array, device=device)) for n, array in arrays.items()}
    for name, dtype in net.integer_buffers.items():
        if name in w:  # on the way, and in averages, all are floating-point numbers
            w[name] = w[name].round().to(dtype)
    return w

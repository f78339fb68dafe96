"""The grid between a Flower strategy and the simulated clients.

A strategy writes messages to nodes and reads their replies; here node k is client k, and the
messages of a round are carried out together: training by the workers, tests by one pass over the
global test set from which every client's figures are read off.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from numpy.typing import NDArray

from fedsim.engine import flower
from fedsim.engine.broadcast import Broadcast
from fedsim.engine.clock import Clock
from fedsim.engine.evaluation import Scores, Tested, join_scores, num_blocks
from fedsim.engine.reduction import Sum, merge
from fedsim.engine.replies import Replies, TrainReport, warn_of_unread, warn_of_untold
from fedsim.engine.schedule import STEP_OVERHEAD_FLOPS, expected_work, leaf_size, share_out, tree
from fedsim.engine.state import ClientStates
from fedsim.engine.worker import NO_CONFIGS, ClientConfigs, Order, Share, Task
from fedsim.errors import EngineError
from fedsim.metrics import client_mean, client_metrics, global_metrics
from fedsim.models import Arrays
from fedsim.models.net import num_bytes
from fedsim.processor import flush_denormals


class SimulatedGrid(Grid):
    """A Flower grid whose nodes are the clients of a federation.

    Replies come in the order of the messages, whatever the order in which clients finish.
    Message types other than ``train`` and ``evaluate`` are answered with an error.

    Parameters
    ----------
    task : Task
        The data, the model and the client update.
    versions : ndarray of int8 [K], optional
        Which states the clients go on from, see `ClientStates`. By default they have none.
    """

    def __init__(self, task: Task, versions: NDArray[np.int8] | None = None) -> None:
        flower.enter_runtime()
        self._federation = task.federation
        self._groups = task.statistics.groups
        self._training = task.training
        self._stacked = task.stacked
        self._step_overhead = STEP_OVERHEAD_FLOPS / task.step_flops if task.stacked else 0.0
        self.views = task.update.views
        """The views of the model that are tested, in order."""
        self._personal = task.update.has_personal_views
        self.states = ClientStates(task.states, task.federation.num_clients, versions)
        """What the clients keep between rounds."""
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._tested: tuple[ArrayRecord, Tested] | None = None
        self._run: Run | None = None
        self.weighted_by: Mapping[str, str] | None = None
        """Array group -> the metric that weights it, where the strategy only needs weighted means;
        its training messages then get one reply, which holds them. None: every client's reply."""
        self.mean_of_tests = False
        """Whether evaluate messages get one reply, too: the mean weighted by test examples."""
        self.report = TrainReport()
        """About the last training messages."""
        self.evaluated = pd.DataFrame()
        """A row for each client and view of the last evaluate messages; see `client_metrics`."""
        # As the workers do, so that what is averaged here is what they would make of it.
        self._flushed = flush_denormals()

    # ----- what a backend brings -----------------------------------------------------------

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """How many workers there are."""

    @abstractmethod
    def _put(self, shared: Arrays | NDArray[Any]) -> Any:
        """Return what stands for arrays in the arguments of `_call`, for all workers."""

    @abstractmethod
    def _call(self, work: dict[int, tuple[str, tuple[Any, ...]]]) -> dict[int, Any]:
        """Call a method of some workers, by their numbers; return each one's answer."""

    def close(self) -> None:
        """Stop the workers; the grid can't be used afterwards."""
        torch.set_flush_denormal(self._flushed)

    # ----- training ------------------------------------------------------------------------

    def train(
        self,
        arrays: Arrays,
        round: int,
        clients: Sequence[int],
        configs: ClientConfigs = NO_CONFIGS,
    ) -> tuple[Replies, Sum]:
        """Train clients from the global arrays; ``configs`` are what they are told besides.

        Returns
        -------
        replies : Replies
            In the order of ``clients``.
        total : Sum
            Of their uploads, if the strategy has `weights`.
        """
        shares, _ = self._share_out(clients)
        parts: list[Replies] = []
        nodes: dict[int, Sum] = {}
        weights = None if self.weighted_by is None else dict(self.weighted_by)
        clock = Clock()
        shared = self._put(arrays)
        clock.lap("serialise")
        answers = self._train(shared, Order(round, weights, configs), shares)
        clock.lap("wait")
        for found, sums, seconds in answers.values():
            parts.append(found)
            nodes |= sums
            for part, spent in seconds.items():
                share = spent / self.num_workers
                clock.seconds[part] = clock.seconds.get(part, 0.0) + share
                clock.seconds["wait"] -= share
        replies = Replies.joined(parts, clients)
        self.states.commit(list(itertools.compress(replies.clients, replies.keeps)))
        clock.lap("state")
        total = merge(nodes).get(1, Sum())
        clock.lap("reduce")
        for part, spent in clock.seconds.items():
            self.report.seconds[part] = self.report.seconds.get(part, 0.0) + spent
        return replies, total

    def _share_out(self, clients: Sequence[int]) -> tuple[list[Share], list[int]]:
        """Return whom each worker trains or tests, and all positions in that order.

        Who may train side by side depends on the clients only, not on the number of workers.
        """
        num_train = self._federation.num_train(np.asarray(clients))
        work = expected_work(num_train, self._training, self._stacked)
        leaves = tree(work, leaf_size(self._stacked, len(clients)), self._step_overhead)
        parts = share_out(leaves, work, self.num_workers, self._step_overhead)
        slots = self.states.slots(clients)
        shares: list[Share] = [
            [(node, [(clients[i], slots[i]) for i in leaf]) for node, leaf in part]
            for part in parts
        ]
        return shares, [i for part in parts for _, leaf in part for i in leaf]

    def _train(self, shared: Any, order: Order, shares: list[Share]) -> dict[int, Any]:
        """Have each worker `train` its share, where it has one; return their answers."""
        return self._call(
            {
                worker: ("train", (shared, order, share))
                for worker, share in enumerate(shares)
                if share
            }
        )

    # ----- testing -------------------------------------------------------------------------

    def test_generic(self, arrays: Arrays) -> Tested:
        """Test the generic views on the whole global test set; see `Worker.test_generic`."""
        shared = self._put(arrays)
        parts = np.array_split(np.arange(num_blocks(self._federation)), self.num_workers)
        found = self._call(
            {
                worker: ("test_generic", (shared, part.tolist()))
                for worker, part in enumerate(parts)
                if len(part)
            }
        )
        answers: list[Tested] = [found[worker] for worker in sorted(found)]
        features = [answer.features for answer in answers if answer.features is not None]
        return Tested(
            join_scores([answer.scores for answer in answers]),
            np.concatenate(features) if features else None,
        )

    def test_personal(
        self, arrays: Arrays, features: NDArray[np.float32], round: int, clients: Sequence[int]
    ) -> Scores:
        """Test the personal views of clients, joined in their order; see `Worker.test_personal`."""
        shared, of_all = self._put(arrays), self._put(features)
        shares, order = self._share_out(clients)
        found = self._call(
            {
                worker: ("test_personal", (shared, of_all, round, share))
                for worker, share in enumerate(shares)
                if share
            }
        )
        # Each worker's answer joins its clients; bring them into the order of all.
        sizes = np.array([len(self._federation.test(client)) for client in clients])
        begin = np.cumsum([0, *sizes[order]])[:-1]
        back = np.concatenate(
            [
                np.arange(begin[place], begin[place] + sizes[client])
                for client, place in enumerate(np.argsort(order))
            ]
        )
        joined = join_scores([found[worker] for worker in sorted(found)])
        return {view: (predicted[back], loss[back]) for view, (predicted, loss) in joined.items()}

    def generic_metrics(self, record: ArrayRecord) -> dict[str, dict[str, float]]:
        """Return for each generic view its metrics on the global test set: `global_metrics`."""
        y = self._federation.source.y_test
        return {
            view: global_metrics(predicted=predicted, loss=loss, y=y, groups=self._groups)
            for view, (predicted, loss) in self._test_once(record).scores.items()
        }

    def _test_once(self, record: ArrayRecord) -> Tested:
        """One pass over the test set serves the generic figures and those of every client."""
        if self._tested is None or self._tested[0] is not record:
            self._tested = (record, self.test_generic(flower.from_record(record)))
        return self._tested[1]

    def _client_metrics(
        self, record: ArrayRecord, round: int, clients: Sequence[int]
    ) -> pd.DataFrame:
        """Return a row for each client and view, in the order of both."""
        tested = self._test_once(record)
        source = self._federation.source
        parts = [self._federation.test(client) for client in clients]
        index = np.concatenate(parts)
        scores = {
            view: (predicted[index], loss[index])
            for view, (predicted, loss) in tested.scores.items()
        }
        if self._personal:
            assert tested.features is not None, "personal views come with features"
            arrays = flower.from_record(record)
            scores |= self.test_personal(arrays, tested.features, round, clients)
        frames = []
        for view in self.views:
            if view not in scores:
                raise EngineError(
                    f"the client update lists the view {view!r}, but its generic() or personal() "
                    f"returns only {', '.join(map(repr, scores)) or 'nothing'}"
                )
            predicted, loss = scores[view]
            frame = client_metrics(
                predicted=predicted,
                loss=loss,
                y=source.y_test[index],
                offsets=np.cumsum([0, *map(len, parts)]),
                groups=self._groups,
            )
            frame.insert(0, "client", clients)
            frame.insert(1, "view", view)
            frames.append(frame)
        rows = pd.concat(frames, ignore_index=True)
        # Client by client, in the order of the messages.
        order = np.arange(len(rows)).reshape(len(self.views), -1).T.ravel()
        return rows.iloc[order].reset_index(drop=True)

    # ----- flwr.serverapp.Grid -------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Keep the run's information."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run given to `set_run`."""
        if self._run is None:
            raise EngineError("this grid has no Flower run: call set_run first")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message to client ``dst_node_id``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Return the clients' numbers; a range, so that a million of them cost nothing."""
        return range(self._federation.num_clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Carry the messages out; the replies wait for `pull_messages`."""
        pushed = list(messages)
        for message in pushed:
            flower.identify(message, str(next(self._ids)))
        by_type: dict[str, list[Message]] = {}
        for message in pushed:
            by_type.setdefault(message.metadata.message_type, []).append(message)
        for message_type, group in by_type.items():
            if message_type == MessageType.TRAIN:
                replies = self._answer_train(group)
            elif message_type == MessageType.EVALUATE:
                replies = self._answer_evaluate(group)
            else:
                reason = f"message type {message_type!r} isn't simulated; use train or evaluate"
                replies = [flower.error_reply(message, reason) for message in group]
            self._replies.update((r.metadata.reply_to_message_id, r) for r in replies)
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages pushed before, each once."""
        waiting = (self._replies.pop(message_id, None) for message_id in message_ids)
        return [reply for reply in waiting if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages and return their replies; every simulated client answers.

        ``timeout`` has no effect: a simulated client takes as long as it takes.
        """
        if isinstance(messages, Broadcast) and messages.untouched:
            if messages.message_type == MessageType.TRAIN:
                return self._answer_train(messages)
            if messages.message_type == MessageType.EVALUATE:
                return self._answer_evaluate(messages)
        return self.pull_messages(self.push_messages(messages))

    # ----- answering -----------------------------------------------------------------------

    def _answer_train(self, messages: Sequence[Message]) -> list[Message]:
        report = self.report = TrainReport()
        self._tested = None  # a strategy may put the new model into the record that it sent
        answers: list[Message] = []
        # A strategy sends all clients of a round one and the same record: look at it once.
        for record, round, configs, clients, group in flower.cohorts(messages):
            arrays = flower.from_record(record)
            self._check_clients(clients)
            report.bytes_down += len(group) * num_bytes(arrays)
            replies, total = self.train(arrays, round, clients, configs)
            warn_of_unread(itertools.chain.from_iterable(configs.each), replies)
            report.add(round, clients, replies)
            if self.weighted_by is not None:
                replies = flower.together(replies, total, self.weighted_by)
            answers += flower.train_replies(clients, partial(self._message, group), replies)
        return answers

    def _message(self, group: Sequence[Message], place: int) -> Message:
        """Return one of some messages, with an ID, which those of a broadcast don't have yet."""
        message = group[place]
        if not message.metadata.message_id:
            flower.identify(message, str(next(self._ids)))
        return message

    def _answer_evaluate(self, messages: Sequence[Message]) -> list[Message]:
        frames = []
        answers: list[Message] = []
        for record, round, configs, clients, group in flower.cohorts(messages):
            warn_of_untold(itertools.chain.from_iterable(configs.each))
            self._check_clients(clients)
            frame = self._client_metrics(record, round, clients)
            frames.append(frame)
            # A client answers for its own model, if it has one.
            personal = (view for view in self.views if view.startswith("personal"))
            own = frame[frame["view"] == next(personal, self.views[0])]
            figures = own[["num_test", "loss", "accuracy"]].to_numpy()
            if self.mean_of_tests:
                sizes, *others = figures.T
                means = [client_mean(values, sizes) for values in others]
                figures = np.array([[sizes.sum(), *means]])
            answers += [
                flower.evaluate_reply(self._message(group, place), int(num_test), loss, accuracy)
                for place, (num_test, loss, accuracy) in enumerate(figures.tolist())
            ]
        self.evaluated = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        return answers

    def _check_clients(self, clients: Sequence[int]) -> None:
        unknown = [k for k in clients if not 0 <= k < self._federation.num_clients]
        if unknown:
            raise EngineError(
                f"a message goes to node {unknown[0]}, but the clients are "
                f"0..{self._federation.num_clients - 1}"
            )
        if len(set(clients)) < len(clients):
            twice = next(k for place, k in enumerate(clients) if k in clients[:place])
            raise EngineError(f"client {twice} gets the same message twice in a round")

"""One content for many nodes: messages that are made when somebody looks at them."""

import pandas as pd
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg

import strategies
from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.engine import flower
from fedsim.engine.broadcast import Broadcast
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.loop import run_rounds
from fedsim.simulation import initial_arrays
from tests.conftest import make_source


@pytest.fixture
def content():
    flower.enter_runtime()
    return RecordDict({"config": ConfigRecord({"server-round": 3})})


def test_it_holds_a_message_for_each_node(content):
    broadcast = Broadcast(content, [4, 2, 9], MessageType.TRAIN)

    assert len(broadcast) == 3
    assert [message.metadata.dst_node_id for message in broadcast] == [4, 2, 9]
    assert {message.metadata.message_type for message in broadcast} == {"train"}
    assert all(message.content is content for message in broadcast)
    assert broadcast[-1] is broadcast[2]
    assert broadcast[:2] == [broadcast[0], broadcast[1]]
    with pytest.raises(IndexError):
        broadcast[3]


def test_a_message_is_made_when_it_is_looked_at(content):
    broadcast = Broadcast(content, [4, 2, 9], MessageType.TRAIN)

    assert broadcast.untouched
    assert isinstance(broadcast[1], Message)
    assert not broadcast.untouched


@pytest.fixture
def task(make_task):
    return make_task()


def trained(task, change):
    """Return the replies of a round to the messages of a strategy, changed."""
    grid = InlineGrid(task)
    strategy = strategies.FedAvg()
    arrays = flower.to_record(initial_arrays(task))
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    return list(grid.send_and_receive(change(messages)))


def test_replies_are_those_to_messages_that_are_made_beforehand(task):
    found, expected = trained(task, lambda messages: messages), trained(task, list)

    assert len(found) == len(expected) == task.federation.num_clients
    for reply, other in zip(found, expected, strict=True):
        assert reply.metadata.src_node_id == other.metadata.src_node_id
        assert reply.content == other.content
    ids = [reply.metadata.reply_to_message_id for reply in found]
    assert "" not in ids
    assert len(set(ids)) == len(ids)


def test_a_message_that_was_changed_is_sent_as_it_is_now(task):
    def zero(messages):
        first = messages[0]
        record = next(iter(first.content.array_records.values()))
        nothing = {name: 0 * array.numpy() for name, array in record.items()}
        config = next(iter(first.content.config_records.values()))
        first.content = RecordDict({"arrays": flower.to_record(nothing), "config": config})
        return messages

    changed, plain = trained(task, zero), trained(task, lambda messages: messages)

    assert changed[0].content != plain[0].content
    assert [reply.content for reply in changed[1:]] == [reply.content for reply in plain[1:]]


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_a_round_without_clients_has_no_messages_and_no_replies(task, message_type):
    assert trained(task, lambda messages: Broadcast(messages.content, [], message_type)) == []


class Watches(strategies.FedAvg):
    """Takes a look at every client's figures."""

    def aggregate_evaluate(self, server_round, replies):
        self.seen = list(replies)
        return super().aggregate_evaluate(server_round, self.seen)


def test_one_reply_stands_for_the_tests_of_all_where_only_their_mean_is_asked_for(make_task):
    source = make_source(test=18)
    with pytest.warns(UserWarning, match="1 of 7 clients have no local test example"):
        federation = federate(source, num_clients=7, partition=iid, local_test="floor")
    task = make_task(federation=federation)
    arrays = flower.to_record(initial_arrays(task))
    found = []
    for strategy in (watching := Watches(), strategies.FedAvg()):
        grid = InlineGrid(task)
        grid.mean_of_tests = flower.takes_mean_of_tests(strategy)
        messages = strategy.configure_evaluate(1, arrays, ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages))
        found.append((strategy.aggregate_evaluate(1, replies), grid.evaluated))

    assert len(watching.seen) == 7
    assert len(replies) == 1
    (expected, rows), (mean, same_rows) = found
    pd.testing.assert_frame_equal(same_rows, rows)
    tested = rows[rows["num_test"] > 0]
    assert 1 < len(tested) < 7
    for name in ("accuracy", "loss"):
        by_hand = (tested["num_test"] * tested[name]).sum() / rows["num_test"].sum()
        assert mean[name] == pytest.approx(by_hand, rel=1e-12)
        assert expected[name] == pytest.approx(by_hand, rel=1e-12)


def test_a_strategy_around_fedavg_that_looks_at_the_tests_sees_every_clients(task):
    class Around(Watches):
        """Has another choose the clients."""

        inner = strategies.FedAvg()

        def configure_evaluate(self, *arguments):
            return self.inner.configure_evaluate(*arguments)

    arrays = flower.to_record(initial_arrays(task))
    strategy = Around()
    list(run_rounds(strategy, InlineGrid(task), arrays, rounds=1, evaluate_every=1, seed=0))
    assert len(strategy.seen) == task.federation.num_clients


def test_flowers_own_strategy_sends_lists(task):
    grid = InlineGrid(task)
    arrays = flower.to_record(initial_arrays(task))
    messages = FedAvg().configure_train(1, arrays, ConfigRecord(), grid)

    assert isinstance(messages, list)
    assert len(list(grid.send_and_receive(messages))) == len(messages) == 4

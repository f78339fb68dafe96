"""The grid as a Flower strategy sees it, without Ray."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from clients import FedBABU
from fedsim.data.federate import federate
from fedsim.data.partition import dirichlet
from fedsim.engine import flower
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.sgd import run_stacked
from fedsim.engine.update import ClientUpdate, Config, LocalSGD, Upload
from fedsim.errors import EngineError
from fedsim.models.small import mlp
from fedsim.simulation import initial_arrays


class Fails(LocalSGD):
    """Client 1 raises, client 2 diverges."""

    def update(self, w, client):
        if client.id == 1:
            raise RuntimeError("out of batteries")
        upload = yield from super().update(w, client)
        if client.id == 2:
            upload.arrays["arrays"]["head.bias"][0] = float("nan")
        return upload


class Echo(ClientUpdate):
    """Sends back the client's number, the round and what it is told."""

    def update(self, w, client):
        told = {"mu": client.config["mu"]} if "mu" in client.config else {}
        return Upload({"arrays": w}, 1, {"who": client.id, "when": client.round, **told})
        yield


def messages(record, clients, *, kind="train", round=1, **told):
    config = ConfigRecord({"server-round": round, **told})
    content = RecordDict({"arrays": record, "config": config})
    return [Message(content, client, kind) for client in clients]


@pytest.fixture
def make_grid(make_task):
    def make(**parts):
        task = make_task(**parts)
        return InlineGrid(task), flower.to_record(initial_arrays(task))

    return make


class Shares(InlineGrid):
    """A grid of so many workers, all of which are this process."""

    num_workers = 1


@pytest.fixture
def found_by(make_task, source):
    """A function that tests FedBABU's fine-tuned models of 20 clients, shared out anyhow."""
    with pytest.warns(UserWarning, match="examples"):
        federation = federate(
            source,
            num_clients=20,
            partition=dirichlet,
            options={"alpha": 0.5},
            min_examples=2,
        )
    clients = [*range(10, 20), *range(10)]

    def found(stacked, workers):
        task = make_task(federation=federation, update=FedBABU(), stacked=stacked, model=mlp)
        grid = Shares(task)
        grid.num_workers = workers
        arrays = initial_arrays(task)
        features = grid.test_generic(arrays).features
        with patch("fedsim.engine.local.run_stacked", side_effect=run_stacked) as side_by_side:
            scores = grid.test_personal(arrays, features, 3, clients)
        together = [
            [tuple(request.kinds[0].index) for request, _ in call.args[1]]
            for call in side_by_side.call_args_list
        ]
        grid.close()
        return scores["personal"], sorted(together)

    return found


def test_personal_models_are_made_side_by_side_whoever_shares_the_work(found_by):
    (predicted, loss), together = found_by(stacked=True, workers=1)
    assert len(together) > 2
    assert len({client for leaf in together for client in leaf}) == 20
    for workers in (2, 3):
        others, apart = found_by(stacked=True, workers=workers)
        assert apart == together
        np.testing.assert_array_equal(others, (predicted, loss))


def test_personal_models_are_those_of_one_by_one(found_by):
    (_, loss), _ = found_by(stacked=True, workers=1)
    (_, alone), together = found_by(stacked=False, workers=2)
    assert not together
    # Over ten steps, float32 sums in another order.
    np.testing.assert_allclose(loss, alone, rtol=1e-3, atol=1e-4)


def test_replies_come_in_the_order_of_the_messages(make_grid):
    grid, record = make_grid(update=Echo())
    assert isinstance(grid, Grid)
    replies = grid.send_and_receive(messages(record, [3, 0, 2], round=9))
    assert [reply.metadata.src_node_id for reply in replies] == [3, 0, 2]
    assert [reply.content["metrics"]["who"] for reply in replies] == [3, 0, 2]
    assert {reply.content["metrics"]["when"] for reply in replies} == {9}
    assert list(grid.get_node_ids()) == [0, 1, 2, 3]


def test_clients_are_told_what_the_strategy_sends(make_grid):
    grid, record = make_grid(update=Echo())
    some, others = messages(record, [3, 0], mu=0.5), messages(record, [1], mu=2.0)
    asked = [some[0], *others, some[1], *messages(record, [2])]
    with patch.object(grid, "_call", wraps=grid._call) as call:
        replies = grid.send_and_receive(asked)
    assert call.call_count == 1  # all together
    assert [reply.content["metrics"]["who"] for reply in replies] == [3, 1, 0, 2]
    assert [reply.content["metrics"].get("mu") for reply in replies] == [0.5, 2.0, 0.5, None]


def test_clients_asked_in_other_rounds_train_apart(make_grid):
    grid, record = make_grid(update=Echo())
    asked = [*messages(record, [0], round=2), *messages(record, [1], round=3)]
    replies = grid.send_and_receive(asked)
    assert [reply.content["metrics"]["when"] for reply in replies] == [2, 3]


def test_what_clients_are_told_cannot_be_changed():
    sent = {"layers": [1, 2]}
    config = Config(sent)
    sent["layers"].append(3)
    assert config["layers"] == (1, 2)
    with pytest.raises(KeyError, match="the strategy sends no 'mu'"):
        config["mu"]
    assert config.read == {"layers"}


def test_pushed_messages_are_pulled_once(make_grid):
    grid, record = make_grid()
    ids = grid.push_messages(messages(record, [0, 1]))
    assert len(set(ids)) == 2
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == ids
    assert grid.pull_messages(ids) == []


def test_every_reply_owns_its_arrays(make_grid):
    """FedMedian and FedTrimmedAvg take the arrays out of the replies."""
    grid, record = make_grid()
    first, second = grid.send_and_receive(messages(record, [0, 1]))
    first.content["arrays"].pop("head.bias")
    assert "head.bias" in second.content["arrays"]
    assert "head.bias" in record


def test_a_client_that_raises_or_diverges_is_left_out_and_named(make_grid):
    grid, record = make_grid(update=Fails())
    replies = grid.send_and_receive(messages(record, [0, 1, 2, 3]))
    assert [reply.has_error() for reply in replies] == [False, True, True, False]
    assert grid.report.failures == {
        1: "RuntimeError: out of batteries (test_grid.py, line 29, in update)",
        2: "head.bias is not finite (NaN or inf)",
    }
    assert grid.report.metrics["client"] == [0, 3]


def test_bytes_count_what_a_network_would_carry(make_grid):
    grid, record = make_grid(update=Fails())
    grid.send_and_receive(messages(record, [0, 1, 2, 3]))
    model = (16 * 3 + 3) * 4
    assert grid.report.bytes_down == 4 * model
    assert grid.report.bytes_up == 2 * model


def test_evaluate_replies_are_the_clients_figures(make_grid, federation):
    grid, record = make_grid()
    replies = grid.send_and_receive(messages(record, [2, 1], kind="evaluate"))
    w = flower.from_record(record)
    source = federation.source
    x = (source.x_test - source.x_train.mean()) / source.x_train.std()
    predicted = (x.reshape(30, 16) @ w["head.weight"].T + w["head.bias"]).argmax(1)
    for client, reply in zip([2, 1], replies, strict=True):
        index = federation.test(client)
        figures = reply.content["metrics"]
        assert figures["num-examples"] == len(index)
        assert figures["accuracy"] == pytest.approx(
            np.mean(predicted[index] == source.y_test[index])
        )
    assert grid.evaluated["client"].tolist() == [2, 1]
    assert grid.generic_metrics(record)["generic"]["accuracy"] == pytest.approx(
        np.mean(predicted == source.y_test)
    )


def test_a_record_that_a_strategy_changes_after_training_is_tested_anew(make_grid, federation):
    grid, record = make_grid()
    y = federation.source.y_test
    for c in (2, 1):
        grid.generic_metrics(record)
        grid.send_and_receive(messages(record, [0]))
        # The new model, in the record that was sent: whatever the input, class c.
        record["head.weight"] = Array(np.zeros((3, 16), np.float32))
        record["head.bias"] = Array(np.eye(3, dtype=np.float32)[c])
        assert grid.generic_metrics(record)["generic"]["accuracy"] == pytest.approx(np.mean(y == c))
        assert grid.generic_metrics(record)["generic"]["loss"] == pytest.approx(
            np.log(np.e + 2) - np.mean(y == c)
        )


def denormals():
    """Whether 1e-39 is a number."""
    return bool((torch.full((8,), 1e-30) * torch.full((8,), 1e-9)).count_nonzero())


@pytest.mark.parametrize("breaks", [False, True])
def test_threads_and_denormal_numbers_are_given_back(make_grid, breaks):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_flush_denormal(False)
    try:
        if breaks:
            with pytest.raises(ZeroDivisionError):
                make_grid(model=lambda *_: 1 // 0)
        else:
            grid, _ = make_grid()
            assert torch.get_num_threads() == 1
            assert not denormals()
            grid.close()
        assert torch.get_num_threads() == 2
        assert denormals()
    finally:
        torch.set_num_threads(before)


class TestGridFailure:
    def test_a_node_that_is_no_client(self, make_grid):
        grid, record = make_grid()
        with pytest.raises(EngineError, match=r"node 4, but the clients are 0\.\.3"):
            grid.send_and_receive(messages(record, [0, 4]))

    def test_a_message_without_a_model_or_a_round(self, make_grid):
        grid, record = make_grid()
        with pytest.raises(EngineError, match="holds 0 ArrayRecords"):
            grid.send_and_receive([Message(RecordDict(), 0, "train")])
        with pytest.raises(EngineError, match="lacks 'server-round'"):
            grid.send_and_receive([Message(RecordDict({"arrays": record}), 0, "train")])

    def test_what_no_client_reads_is_told(self, make_grid):
        grid, record = make_grid(update=Echo())
        line = r"sends its clients 'lr', which the client update doesn't read \(client\.config\['lr"
        with pytest.warns(UserWarning, match=line) as warned:
            grid.send_and_receive(messages(record, [0, 1], lr=0.1, mu=0.2))
        assert len(warned) == 1

    def test_one_client_that_reads_it_is_enough(self, make_grid):
        class OneReads(Echo):
            def update(self, w, client):
                return super().update(w, client if client.id == 2 else replace(client, config={}))

        grid, record = make_grid(update=OneReads())
        asked = [*messages(record, [0, 2], mu=0.5), *messages(record, [1], mu=0.2)]
        assert len(grid.send_and_receive(asked)) == 3

    def test_nobody_who_trained_is_there_to_read_it(self, make_grid):
        class Breaks(LocalSGD):
            def update(self, w, client):
                raise RuntimeError("no power")

        grid, record = make_grid(update=Breaks())
        (reply,) = grid.send_and_receive(messages(record, [0], mu=0.5))
        assert "no power" in reply.error.reason

    def test_nobody_is_told_anything_in_a_test(self, make_grid):
        grid, record = make_grid()
        with pytest.warns(UserWarning, match="sends 'mu' with the model to test, of which nobody"):
            grid.send_and_receive(messages(record, [0], kind="evaluate", mu=0.2))

    def test_an_unknown_message_type_is_answered_with_an_error(self, make_grid):
        grid, record = make_grid()
        (reply,) = grid.send_and_receive(messages(record, [0], kind="query"))
        assert "use train or evaluate" in reply.error.reason

    def test_a_run_that_was_never_set(self, make_grid):
        with pytest.raises(EngineError, match="set_run"):
            _ = make_grid()[0].run

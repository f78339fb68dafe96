"""Sums of uploads: right, and the same bits for any number of workers."""

import pickle

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedTrimmedAvg, Krum
from hypothesis import given
from hypothesis import strategies as st

import strategies
from fedsim.engine import flower
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.loop import run_rounds
from fedsim.engine.reduction import Sum, flatten, merge
from fedsim.engine.replies import Replies
from fedsim.engine.schedule import share_out, tree
from fedsim.errors import EngineError
from fedsim.simulation import initial_arrays

work = st.lists(st.integers(0, 500), min_size=1, max_size=150).map(np.array)


def upload(client):
    rng = torch.Generator().manual_seed(client)
    arrays = {
        "w": torch.randn(3, 2, generator=rng),
        "b": torch.randn((), generator=rng),
        "conv": torch.randn(2, 3, 1, 2, generator=rng),
    }
    if client % 3:  # the same numbers, laid out otherwise
        arrays["conv"] = arrays["conv"].to(memory_format=torch.channels_last)
    # Who comes first differs from client to client.
    return dict(sorted(arrays.items(), reverse=bool(client % 2)))


def add(total, w, weight=1.0):
    (flat,) = flatten([w])
    total.add_upload({"arrays": flat}, {"arrays": weight})


def total(cohort, workers, weight=lambda client: float(client % 4)):
    """Sum a cohort's uploads as so many workers would."""
    nodes = {}
    for share in share_out(tree(cohort), cohort, workers):
        mine = {}
        for node, clients in share:
            mine[node] = Sum()
            for client in clients:
                add(mine[node], upload(client), weight(client))
        nodes |= merge(mine)
    (root,) = merge(nodes)
    assert root == 1
    return merge(nodes)[1]


@given(st.lists(st.sampled_from([0, 1, 3]), max_size=6), st.integers(0, 9))
def test_flattened_together_or_alone_the_vectors_are_the_same(clients, broken):
    ws = [upload(client) for client in clients]
    if broken < len(ws):
        ws[broken]["w"] = ws[broken]["w"].clone()
        ws[broken]["w"][1, 1] = [np.nan, np.inf, -np.inf][broken % 3]
    for place, (w, found) in enumerate(zip(ws, flatten(ws) if ws else [], strict=True)):
        (alone,) = flatten([w])
        assert found.shapes == alone.shapes == tuple((name, t.shape) for name, t in w.items())
        torch.testing.assert_close(found.vector, alone.vector, rtol=0, atol=0, equal_nan=True)
        assert found.finite == alone.finite == (place != broken)


@given(work, st.integers(1, 9))
def test_any_number_of_workers_gives_the_same_bits(cohort, workers):
    one, many = total(cohort, 1), total(cohort, workers)
    assert one.weights == many.weights
    assert one.vectors.keys() == many.vectors.keys()
    for group, vector in one.vectors.items():
        assert torch.equal(vector, many.vectors[group])


@given(work)
def test_the_means_are_numpys(cohort):
    weights = [client % 4 for client in range(len(cohort))]
    found = total(cohort, 2).means()
    if not any(weights):
        assert found == {}
        return
    assert set(found["arrays"]) == {"w", "b", "conv"}
    for name, array in found["arrays"].items():
        uploads = [upload(client)[name].double().numpy() for client in range(len(cohort))]
        expected = np.average(uploads, axis=0, weights=weights)
        assert array.dtype == np.float32
        assert array.shape == expected.shape
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-9)


def test_a_sum_travels_whole_and_can_be_added_to():
    sent = total(np.array([3, 1, 2]), 1)
    found = pickle.loads(pickle.dumps(sent, protocol=5))
    assert found == Sum(found.vectors, sent.weights, sent.shapes)
    assert torch.equal(found.vectors["arrays"], sent.vectors["arrays"])
    found.add(sent)
    np.testing.assert_array_equal(found.means()["arrays"]["w"], sent.means()["arrays"]["w"])


@pytest.mark.parametrize(
    ("other", "named"),
    [({"w": torch.ones(3)}, "'w'"), ({"w": torch.ones(2), "v": torch.ones(1)}, "'v'")],
)
def test_clients_that_upload_other_arrays_are_an_error_that_names_one(other, named):
    mine = Sum()
    add(mine, {"w": torch.ones(2)})
    with pytest.raises(EngineError, match=f"can't be averaged: {named} in 'arrays' .*absent"):
        add(mine, other)


def test_a_group_without_arrays_has_empty_means():
    mine = Sum()
    add(mine, {}, 2.0)
    assert mine.means() == {"arrays": {}}


def test_two_workers_take_the_two_halves():
    cohort = np.full(100, 60)
    shares = share_out(tree(cohort), cohort, 2)
    assert [sum(len(leaf) for _, leaf in share) for share in shares] == [50, 50]
    for half, share in zip((2, 3), shares, strict=True):
        nodes = {node: Sum() for node, _ in share}
        for sums in nodes.values():
            add(sums, {"w": torch.ones(1)})
        assert list(merge(nodes)) == [half]  # one sum travels


def test_who_needs_only_means():
    assert flower.weights_of(strategies.FedAvg()) == {"arrays": "num_examples"}
    assert flower.weights_of(strategies.FedLoGe()) == {"arrays": "num_examples"}
    assert flower.weights_of(strategies.FedLabel())["unlabelled"] == "num_pseudo"
    assert flower.weights_of(strategies.FedLabel(aggregation="single")) == {
        "arrays": "num_examples"
    }
    assert flower.weights_of(FedAvg()) == flower.weights_of(FedAdam()) == {"arrays": "num_examples"}
    # These look at every upload.
    for strategy in (strategies.CReFF(), FedMedian(), FedTrimmedAvg(), Krum(num_malicious_nodes=1)):
        assert flower.weights_of(strategy) is None


def test_a_subclass_that_averages_in_its_own_way_gets_every_reply():
    class Own(strategies.FedAvg):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    class Means(Own):
        weights = strategies.FedAvg.weights

    class OfFedLabel(strategies.FedLabel):  # whose constructor says what its own weights are
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    assert flower.weights_of(Own()) is None
    assert flower.weights_of(OfFedLabel()) is None
    assert flower.weights_of(OfFedLabel(schedule="joint")) is None
    assert flower.weights_of(Means()) == {"arrays": "num_examples"}


@pytest.mark.parametrize("strategy", [strategies.FedAvg, FedAvg, FedAdam])
def test_means_of_means_are_the_means_of_all(make_task, strategy):
    """The strategy comes to the same model, whether it gets one reply or one a client."""
    models, replies = [], []
    for reduced in (True, False):
        task = make_task()
        grid = InlineGrid(task)
        made = strategy(min_available_nodes=1)
        record = flower.to_record(initial_arrays(task))
        if not reduced:
            made.weights = None
            made.__class__ = type("Every", (type(made),), {"weights": None})
        send = grid.send_and_receive

        def count(messages, *, send=send, **options):
            found = list(send(messages, **options))
            replies.append(len(found))
            return found

        grid.send_and_receive = count
        (found,) = run_rounds(made, grid, record, rounds=1, evaluate_every=9, seed=0)
        models.append(flower.from_record(found.arrays))
        assert len(found.training["client"]) == 4
    assert replies[0] == 1
    assert 4 in replies
    for name, array in models[0].items():
        np.testing.assert_allclose(array, models[1][name], rtol=1e-5, atol=1e-7)


def by(base, **weights):
    """Return a strategy that does nothing but weight by other numbers than its base does."""
    return type(f"{base.__name__}By", (base,), {"weights": weights})()


class Nodes:
    """As much of a grid as a strategy looks at."""

    def get_node_ids(self):
        return range(9)


@pytest.mark.parametrize(
    ("strategy", "groups"),
    [
        (strategies.FedAvg(), ["arrays"]),
        (by(strategies.FedAvg, arrays="num_kept"), ["arrays"]),
        (by(strategies.FedAvg, model="num-kept", arrays="num-examples"), ["arrays", "model"]),
        (strategies.FedLabel(), ["labelled", "unlabelled"]),
        (strategies.FedLabel(aggregation="single"), ["arrays"]),
        (
            by(strategies.FedLabel, labelled="num_kept", unlabelled="has_labels"),
            ["labelled", "unlabelled"],
        ),
        (strategies.Scaffold(global_lr=0.7), ["arrays", "control"]),
    ],
    ids=lambda given: "+".join(given) if isinstance(given, list) else type(given).__name__,
)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), min_size=1, max_size=6)
)
def test_one_reply_for_all_gives_what_all_replies_give(strategy, groups, clients):
    """The simulator sums up what in Flower's own runtimes is a reply of each client."""
    rng = np.random.default_rng(len(clients))
    names = {"control": "control.w"}
    uploads = [
        {g: {names.get(g, "w"): np.float32(rng.normal(size=3))} for g in groups} for _ in clients
    ]
    numbers = {
        "num_examples": [n for n, _, _ in clients],
        "num_kept": [float(kept) for _, kept, _ in clients],
        "num_pseudo": [float(max(kept, 1)) for _, kept, _ in clients],
        "has_labels": [float(has) for _, _, has in clients],
        "train_loss": rng.normal(size=len(clients)).tolist(),
    }
    every = Replies(clients=list(range(len(clients))), metrics=numbers, arrays=uploads)
    weights, summed = flower.weights_of(strategy), Sum()
    for client, upload in enumerate(uploads):
        tensors = [{n: torch.from_numpy(a) for n, a in upload[g].items()} for g in weights]
        flats = dict(zip(weights, flatten(tensors), strict=True))
        summed.add_upload(flats, {g: numbers[name][client] for g, name in weights.items()})
    flower.enter_runtime()
    start = {"w": np.float32([1, 2, 3]), "control.w": np.float32([4, 5, 6])}
    found = []
    for replies in (every, flower.together(every, summed, weights)):
        messages = strategy.configure_train(1, flower.to_record(start), ConfigRecord(), Nodes())
        answers = flower.train_replies(every.clients, messages.__getitem__, replies)
        found.append(strategy.aggregate_train(1, answers))
    (arrays, metrics), (same, same_metrics) = found
    assert (arrays is None) == (same is None)
    if arrays is not None:
        for name, array in arrays.items():
            np.testing.assert_allclose(array.numpy(), same[name].numpy(), rtol=1e-5, atol=1e-6)
        expected = pytest.approx(metrics["train_loss"], nan_ok=True)
        assert same_metrics["train_loss"] == expected

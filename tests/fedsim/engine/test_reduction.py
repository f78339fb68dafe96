"""Sums of uploads: right, and the same bits for any number of workers."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedTrimmedAvg, Krum
from hypothesis import given
from hypothesis import strategies as st

import strategies
from fedsim.engine import flower
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.loop import run_rounds
from fedsim.engine.reduction import DEPTH, Sum, flatten, merge, share_out, tree
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


@given(work)
def test_the_leaves_hold_every_client_once_and_halves_are_balanced(cohort):
    leaves = tree(cohort)
    clients = [client for _, leaf in leaves for client in leaf]
    assert sorted(clients) == list(range(len(cohort)))
    assert len(leaves) == len({node for node, _ in leaves}) <= 2**DEPTH
    if len(cohort) > 1:
        costs = [0, 0]
        for node, leaf in leaves:
            while node > 3:
                node //= 2
            costs[node - 2] += sum(cohort[client] + 1 for client in leaf)
        # Longest first to the less busy half: they differ by no more than one client.
        assert abs(costs[0] - costs[1]) <= cohort.max() + 1


@given(work)
def test_a_tree_is_halved_longest_first_to_the_less_busy(cohort):
    halves = [[], []]
    for node, leaf in tree(cohort):
        while node > 3:
            node //= 2
        halves[node % 2] += leaf
    expected, busy = [[], []], [0, 0]
    for client in sorted(range(len(cohort)), key=lambda client: -cohort[client]):
        half = int(busy[1] < busy[0])
        expected[half].append(client)
        busy[half] += cohort[client] + 1
    if len(cohort) > 1:
        assert [sorted(half) for half in halves] == [sorted(half) for half in expected]


steps_cost = st.floats(0, 50)


@given(work, st.integers(2, 40), steps_cost)
def test_clients_side_by_side_are_of_similar_length(cohort, size, step):
    leaves = [leaf for _, leaf in tree(cohort, size, step)]
    assert sorted(client for leaf in leaves for client in leaf) == list(range(len(cohort)))
    for longer, shorter in itertools.pairwise(leaves):
        assert cohort[longer].min() >= cohort[shorter].max()


@given(st.integers(2, 9), st.integers(1, 6), steps_cost)
def test_clients_of_the_same_length_fill_leaves_of_the_same_size(size, doublings, step):
    leaves = [leaf for _, leaf in tree(np.full(size * 2**doublings, 7), size, step)]
    assert [len(leaf) for leaf in leaves] == [size] * 2**doublings


@pytest.mark.parametrize(
    ("step", "sizes"),
    [
        (0.0, [7, 9]),  # 30 + 6 x 10 and 9 x 10
        (2.0, [6, 10]),  # 30 + 5 x 10 + 2 x 30 and, in two leaves, 10 x 10 + 2 x 2 x 10
    ],
)
def test_a_long_client_side_by_side_leaves_others_to_the_second_worker(step, sizes):
    cohort = np.array([29, *[9] * 15])  # costs of 30 and 10
    shares = share_out(tree(cohort, 8, step), cohort, 2, step)
    assert [sum(len(leaf) for _, leaf in share) for share in shares] == sizes


@given(st.lists(st.sampled_from([0, 1, 3]), max_size=6), st.integers(0, 9))
def test_flattened_together_or_alone_the_vectors_are_the_same(clients, broken):
    ws = [upload(client) for client in clients]
    if broken < len(ws):
        ws[broken]["w"] = ws[broken]["w"].clone()
        ws[broken]["w"][1, 1] = [np.nan, np.inf, -np.inf][broken % 3]
    for place, (w, found) in enumerate(zip(ws, flatten(ws) if ws else [], strict=True)):
        (alone,) = flatten([w])
        assert found.form == alone.form == tuple((name, t.shape) for name, t in w.items())
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
    assert found == Sum(found.vectors, sent.weights, sent.forms)
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


@pytest.mark.parametrize(
    ("costs", "workers", "expected"),
    [
        ([4, 4, 1], 2, [[0], [1, 2]]),  # 4 and 5 of 9, not 8 and 1
        ([2, 6, 2, 2], 2, [[0, 1], [2, 3]]),  # 8 and 4: 2 and 10 would be further apart
        ([3, 3, 3, 3, 3, 3], 3, [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_shares_are_of_about_the_same_work(costs, workers, expected):
    leaves = [(node, [client]) for client, node in enumerate(range(8, 8 + len(costs)))]
    shares = share_out(leaves, np.array(costs) - 1, workers)  # each client costs one besides
    assert [[client for _, (client,) in share] for share in shares] == expected


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

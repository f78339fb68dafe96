"""How a cohort is cut into leaves, and whom each worker trains."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engine.schedule import DEPTH, expected_work, share_out, tree

work = st.lists(st.integers(0, 500), min_size=1, max_size=150).map(np.array)


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


@pytest.mark.parametrize(
    ("settings", "stacked", "expected"),
    [
        ({"epochs": 3}, False, [0, 3, 36]),
        ({"epochs": 3}, True, [2, 5, 11]),
        ({"epochs": 3, "steps": 7}, False, [0, 7, 35]),
        ({"epochs": 3, "steps": 7}, True, [2, 9, 9]),
    ],
)
def test_expected_work(make_task, settings, stacked, expected):
    training = make_task(batch_size=5, **settings).training
    assert expected_work(np.array([0, 1, 12]), training, stacked).tolist() == expected

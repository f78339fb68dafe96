"""What a worker makes of its clients' results."""

import re

import numpy as np
import pytest
import torch

from fedsim.engine import uploads as module
from fedsim.engine.clock import Clock
from fedsim.engine.update import Upload
from fedsim.engine.uploads import Intake
from fedsim.errors import EngineError

WEIGHTS = {"arrays": "num_examples", "extra": "num_pseudo"}


def result(client, **changes):
    """Return what a client's update gives: two groups, and a state."""
    rng = torch.Generator().manual_seed(client)
    arrays = {
        "arrays": {"w": torch.randn(2, 3, generator=rng), "b": torch.randn(2, generator=rng)},
        "extra": {"v": torch.randn(4, generator=rng)},
    }
    state = {"own": torch.full((2,), float(client))}
    found = {"arrays": arrays, "num_examples": client + 1, "metrics": {"num_pseudo": client % 3}}
    return Upload(**{**found, "state": state, **changes}), {"seen": 1.0}


def taken(results, weights=WEIGHTS, leaf=2):
    """Take results in, by leaves of some clients; return replies, sums and what was kept."""
    kept = {}
    intake = Intake(
        lambda client, version, arrays: kept.update({client: (version, arrays)}), weights, Clock()
    )
    first = 1 << (len(results) // leaf).bit_length()
    for client, found in enumerate(results):
        intake.take(first + client // leaf, client, client % 2, found)
    return *intake.end(), kept


BAD = torch.tensor([1.0, float("nan")])
RESULTS = [
    result(0),
    ValueError("broken"),
    result(2, arrays={"arrays": {"w": torch.ones(2, 3), "b": BAD}, "extra": {"v": torch.ones(4)}}),
    result(3),
    result(4, state={"own": -BAD}),
    result(5, num_examples=0),
    result(6),
]


@pytest.mark.parametrize(
    ("given", "reported"),
    [(torch.tensor(360.0), 360), (np.int64(5), 5), (np.float32(0.5), 0.5), (7, 7), (2.5, 2.5)],
)
def test_examples_and_metrics_become_numbers_of_python(given, reported):
    """As the sum of ``client.class_counts`` is none: tables and Flower's records take no others."""
    replies, _, _ = taken([result(0, num_examples=given, metrics={"num_pseudo": given})])
    (num_examples,), (metric,) = replies.metrics["num_examples"], replies.metrics["num_pseudo"]
    assert (num_examples, type(num_examples)) == (reported, type(reported))
    assert metric == reported
    assert type(metric) in (int, float)


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({"num_pseudo": 10**400}, "must be numbers: int too large to convert to float"),
        ({"num_pseudo": 1, "two\nlines": 1.0}, "'two.nlines' is no name, which is a line of text"),
        ({"num_pseudo": 1, 3: 1.0}, "3 is no name"),
    ],
)
def test_metrics_that_no_table_holds(metrics, line):
    replies, _, _ = taken([result(0), result(1, metrics=metrics)])
    assert replies.clients == [0]
    assert re.search(line, replies.failures[1])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_so_is_one_whose_weight_is_no_weight(weight):
    results = [result(0), result(1, metrics={"num_pseudo": weight}), result(2)]
    replies, sums, _ = taken(results)
    assert replies.clients == [0, 2]
    assert replies.failures == {
        1: f"num_pseudo = {weight}, by which 'extra' is weighted: must be finite and at least 0"
    }
    expected, others = taken([result(0), RuntimeError(), result(2)])[1], sums
    for node, total in expected.items():
        for group, vector in total.vectors.items():
            np.testing.assert_array_equal(others[node].vectors[group], vector)
    # Where nobody weights by it, a strategy may make of it what it likes.
    assert taken(results, weights=None)[0].failures == {}


@pytest.mark.parametrize("together", [1, 100, 1 << 20])
def test_a_client_that_fails_is_left_out_alone(monkeypatch, together):
    monkeypatch.setattr(module, "FLUSH_BYTES", together)
    replies, sums, kept = taken(RESULTS)
    assert replies.clients == [0, 3, 5, 6]
    assert replies.failures == {
        1: "ValueError: broken",
        2: "b is not finite (NaN or inf)",
        4: "own is not finite (NaN or inf)",
    }
    assert replies.metrics == {"num_examples": [1, 4, 0, 7], "num_pseudo": [0, 0, 2, 0]}
    assert replies.audit == {"seen": [1.0] * 4}
    assert replies.keeps == [True] * 4
    assert {client: version for client, (version, _) in kept.items()} == {0: 0, 3: 1, 5: 1, 6: 0}
    np.testing.assert_array_equal(kept[3][1]["own"], [3, 3])
    assert not any(replies.arrays)
    assert replies.num_bytes == [4 * (6 + 2 + 4)] * 4
    for group, counts in {"arrays": {0: 1, 3: 4, 6: 7}, "extra": {5: 2}}.items():
        found = sum(total.weights.get(group, 0.0) for total in sums.values())
        assert found == sum(counts.values())
        mean = dict.fromkeys(result(0)[0].arrays[group], 0.0)
        for total in sums.values():
            for name, array in total.means().get(group, {}).items():
                mean[name] += array * total.weights[group] / found
        for name, array in mean.items():
            clients = [result(client)[0].arrays[group][name].numpy() for client in counts]
            expected = np.average(clients, axis=0, weights=[*counts.values()])
            np.testing.assert_allclose(array, expected, rtol=1e-6)


def test_how_many_are_looked_at_together_changes_no_bit(monkeypatch):
    found = []
    for together in (1, 100, 1 << 20):
        monkeypatch.setattr(module, "FLUSH_BYTES", together)
        found.append(taken(RESULTS))
    (replies, sums, _), *others = found
    for other_replies, other_sums, _ in others:
        assert replies == other_replies
        assert list(sums) == list(other_sums)
        for node, total in sums.items():
            assert total.weights == other_sums[node].weights
            for group, vector in total.vectors.items():
                assert torch.equal(vector, other_sums[node].vectors[group])


def test_a_leaf_whose_clients_all_fail_still_has_a_sum():
    _, sums, _ = taken([result(0), result(1), ValueError("broken"), ValueError("broken")])
    assert list(sums) == [2]
    assert sums[2].weights["arrays"] == 1 + 2


def test_without_weights_the_replies_have_the_arrays():
    replies, sums, _ = taken(RESULTS, weights=None)
    assert sums == {}
    assert [sorted(groups) for groups in replies.arrays] == [["arrays", "extra"]] * 4
    np.testing.assert_array_equal(
        replies.arrays[3]["extra"]["v"], result(6)[0].arrays["extra"]["v"]
    )


class TestIntakeFailure:
    def test_a_group_that_the_clients_do_not_upload(self):
        with pytest.raises(EngineError, match=r"averages the arrays 'heads'.*upload 'arrays', 'ex"):
            taken([result(0)], weights={"heads": "num_examples"})

    def test_a_weight_that_the_clients_do_not_report(self):
        with pytest.raises(EngineError, match=r"weights by 'steps'.*report num_examples, num_ps"):
            taken([result(0)], weights={"arrays": "steps"})


def test_a_group_that_nobody_averages_is_told():
    with pytest.warns(UserWarning, match=r"the arrays 'extra', which the strategy doesn't average"):
        taken(RESULTS[:1], {"arrays": "num_examples"})

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.labels import labelled_counts, labelled_first
from fedsim.errors import DataError

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(np.array)
SHARES = st.floats(0, 1)


def rng(seed=0):
    return np.random.default_rng(seed)


class TestLabelledCounts:
    def test_by_hand(self):
        # 2.0, 0.8 -> 1, 0.2 -> at least 1, 2.4 -> 2, 2.6 -> 3; 0 has none to label.
        sizes = np.array([10, 4, 1, 12, 13, 0])
        assert labelled_counts(sizes, 0.2, 0.0, rng()).tolist() == [2, 1, 1, 2, 3, 0]

    def test_halves_go_up_whatever_floats_say(self):
        assert 0.29 * 50 < 14.5
        assert labelled_counts(np.array([50, 10]), 0.29, 0.0, rng()).tolist() == [15, 3]
        assert labelled_counts(np.array([1, 3, 5]), 0.5, 0.0, rng()).tolist() == [1, 2, 3]

    def test_none_and_all(self):
        sizes = np.array([3, 1, 200])
        assert labelled_counts(sizes, 0, 0.0, rng()).tolist() == [0, 0, 0]
        assert labelled_counts(sizes, 1, 0.0, rng()).tolist() == [3, 1, 200]
        assert labelled_counts(sizes, 1, 1.0, rng()).tolist() == [0, 0, 0]

    def test_pair_is_uniform(self):
        counts = labelled_counts(np.full(10_000, 1000), [0.1, 0.3], 0.0, rng()) / 1000
        assert counts.min() >= 0.1
        assert counts.max() <= 0.3
        # Uniform quartiles 0.15, 0.2, 0.25; standard error 0.001.
        np.testing.assert_allclose(
            np.quantile(counts, [0.25, 0.5, 0.75]), [0.15, 0.2, 0.25], atol=0.006
        )

    @given(SIZES, SHARES, SHARES, st.integers(0, 99))
    def test_unlabelled_clients_are_rounded_to_the_nearest_count(self, sizes, share, without, seed):
        counts = labelled_counts(sizes, max(share, 0.01), without, rng(seed))
        assert abs((counts == 0).sum() - without * len(sizes)) <= 0.5 + 1e-6
        rest = counts[counts > 0]
        assert (rest >= 1).all()
        assert (counts <= sizes).all()
        exact = max(share, 0.01) * sizes[counts > 0]
        assert ((abs(rest - exact) <= 0.5 + 1e-6) | ((rest == 1) & (exact < 1))).all()

    def test_any_client_may_be_without(self):
        chosen = [labelled_counts(np.full(4, 9), 1.0, 0.5, rng(s)) == 0 for s in range(400)]
        assert all(c.sum() == 2 for c in chosen)
        # Binomial(400, 1/2): 200 +- 5 * 10.
        assert (abs(np.sum(chosen, axis=0) - 200) < 50).all()


class TestLabelledFirst:
    @given(
        st.integers(1, 6), st.integers(1, 4), st.integers(1, 60), st.booleans(), st.integers(0, 99)
    )
    def test_order_is_a_permutation_by_client(self, num_clients, num_classes, n, each, seed):
        owner, y = rng(seed).integers(0, [[num_clients], [num_classes]], (2, n))
        order, offsets = labelled_first(owner, y, num_clients, each, rng(seed))
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
        assert offsets.tolist() == [0, *np.cumsum(np.bincount(owner, minlength=num_clients))]
        np.testing.assert_array_equal(owner[order], np.sort(owner))
        if each:
            for start, end in pairwise(offsets):
                of_client = y[order[start:end]]
                distinct = len(np.unique(of_client))
                assert len(np.unique(of_client[:distinct])) == distinct

    def test_every_example_comes_first_equally_often(self):
        owner, y = np.zeros(5, int), np.array([0, 0, 0, 0, 1])
        first = [labelled_first(owner, y, 1, False, rng(s))[0][0] for s in range(1000)]
        # Binomial(1000, 1/5): 200 +- 5 * 12.6.
        assert (abs(np.bincount(first) - 200) < 63).all()

    def test_classes_come_first_equally_often_however_frequent(self):
        owner, y = np.zeros(20, int), np.array([0] * 19 + [1])
        first = [y[labelled_first(owner, y, 1, True, rng(s))[0][0]] for s in range(1000)]
        # Binomial(1000, 1/2): 500 +- 5 * 15.8.
        assert abs(sum(first) - 500) < 79

    def test_examples_of_a_class_are_chosen_equally_often(self):
        owner, y = np.zeros(5, int), np.array([0, 0, 0, 0, 1])
        firsts = [labelled_first(owner, y, 1, True, rng(s))[0][:2] for s in range(1000)]
        often = np.bincount(np.concatenate(firsts))
        assert often[4] == 1000
        # Binomial(1000, 1/4): 250 +- 5 * 13.7.
        assert (abs(often[:4] - 250) < 69).all()


class TestLabelledCountsFailure:
    @pytest.mark.parametrize(
        "labelled",
        [-0.1, 1.1, float("nan"), "0.5", "ab", None, [0.1], [0.1, 0.2, 0.3], [0.5, 0.2], [0, 1.1]],
    )
    def test_labelled(self, labelled):
        with pytest.raises(
            DataError, match=r"^clients\.labelled = .*a share from 0 to 1, or a pair"
        ):
            labelled_counts(np.array([4, 4]), labelled, 0.0, rng())

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "0.5", [0, 1]])
    def test_unlabelled_clients(self, share):
        with pytest.raises(DataError, match=r"^clients\.unlabelled_clients = .*from 0 to 1"):
            labelled_counts(np.array([4, 4]), 0.5, share, rng())

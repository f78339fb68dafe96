import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.longtail import long_tail
from fedsim.errors import DataError


def counts_after(sizes, imbalance, profile, seed=0):
    y = np.repeat(np.arange(len(sizes)), sizes)
    kept = long_tail(y, len(sizes), imbalance, profile, np.random.default_rng(seed))
    return np.bincount(y[kept], minlength=len(sizes)).tolist()


class TestLongTail:
    def test_cifar10_lt(self):
        # 5000 * 0.01^(c/9), rounded down: the counts of CIFAR-10-LT.
        expected = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        assert counts_after([5000] * 10, 0.01, "exponential") == expected

    def test_step(self):
        assert counts_after([100] * 4, 0.05, "step") == [100, 100, 5, 5]
        assert counts_after([100] * 5, 0.05, "step") == [100, 100, 100, 5, 5]

    def test_product_that_floats_round_below_a_whole_number(self):
        assert counts_after([100, 100], 0.29, "exponential") == [100, 29]

    def test_no_more_than_the_class_has_and_at_least_one(self):
        # The largest class, not the first, sets the scale: 100, 10, 1.
        assert counts_after([40, 100, 3], 0.01, "exponential") == [40, 10, 1]
        assert counts_after([10, 10, 10], 1e-9, "exponential") == [10, 1, 1]

    @pytest.mark.parametrize("profile", ["exponential", "step"])
    def test_one_keeps_everything(self, profile):
        y = np.random.default_rng(0).integers(0, 7, 500)
        kept = long_tail(y, 7, 1.0, profile, np.random.default_rng(1))
        np.testing.assert_array_equal(kept, np.arange(500))

    def test_which_examples_are_kept_is_random(self):
        y = np.zeros(1000, int)
        y[500:] = 1
        chosen = [long_tail(y, 2, 0.1, "step", np.random.default_rng(s)) for s in range(200)]
        # Each of class 1 is kept with probability 0.1: Binomial(200, 0.1), 20 +- 5 * 4.2, and
        # 0 has probability 7e-10.
        often = np.bincount(np.concatenate(chosen), minlength=1000)[500:]
        assert often.min() > 0
        assert often.max() <= 42
        assert often.mean() == 20

    @given(
        st.lists(st.integers(0, 60), min_size=2, max_size=12).filter(any),
        st.floats(1e-4, 1),
        st.sampled_from(["exponential", "step"]),
        st.integers(0, 99),
    )
    def test_sorted_unique_and_no_class_lost(self, sizes, imbalance, profile, seed):
        y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
        kept = long_tail(y, len(sizes), imbalance, profile, np.random.default_rng(seed))
        assert (np.diff(kept) > 0).all()
        before = np.bincount(y, minlength=len(sizes))
        after = np.bincount(y[kept], minlength=len(sizes))
        assert (after <= before).all()
        assert ((after > 0) == (before > 0)).all()


def test_examples_of_unknown_label_are_kept_and_change_nothing_else():
    y = np.repeat([0, 1, 2], 40)
    alone = long_tail(y, 3, 0.1, "exponential", np.random.default_rng(3))
    mixed = np.full(240, -1)
    mixed[1::2] = y
    kept = long_tail(mixed, 3, 0.1, "exponential", np.random.default_rng(3))
    assert kept.tolist() == sorted([*range(0, 240, 2), *(1 + 2 * alone)])


class TestLongTailFailure:
    @pytest.mark.parametrize("imbalance", [0, -0.1, 1.5, float("nan"), float("inf"), "0.1", True])
    def test_imbalance(self, imbalance):
        with pytest.raises(DataError, match=r"data\.imbalance = .*above 0 and at most 1"):
            counts_after([5, 5], imbalance, "exponential")

    def test_profile(self):
        with pytest.raises(DataError, match=r"data\.profile = 'linear'.*exponential.*step"):
            counts_after([5, 5], 0.5, "linear")

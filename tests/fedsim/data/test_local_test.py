from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data import local_test
from fedsim.data.local_test import draw_local_tests


def draw(owner, y, y_test, num_clients, seed=0):
    return draw_local_tests(
        np.array(owner), np.array(y), np.array(y_test), num_clients, np.random.default_rng(seed)
    )


def counts(offsets, index, y_test, num_classes):
    return [
        np.bincount(y_test[index[a:b]], minlength=num_classes).tolist()
        for a, b in pairwise(offsets)
    ]


class TestDrawLocalTests:
    def test_by_hand(self):
        # n = 50, M = 100. Client 0: 30 examples, 20 + 10, so 60 tests, 40 + 20.
        # Client 1: 20 examples, 7 + 13, so 40 tests, 14 + 26.
        owner = [0] * 30 + [1] * 20
        y = [0] * 20 + [1] * 10 + [0] * 7 + [1] * 13
        y_test = np.arange(100) % 2
        offsets, index = draw(owner, y, y_test, 2)
        assert offsets.tolist() == [0, 60, 100]
        assert counts(offsets, index, y_test, 2) == [[40, 20], [14, 26]]

    def test_sizes_are_rounded(self):
        # M = 100 and n = 14: 3 examples are 21.43 tests, 4 are 28.57 and 7 are 50.
        offsets, _ = draw([0] * 3 + [1] * 4 + [2] * 7, [0] * 14, np.zeros(100, int), 3)
        assert np.diff(offsets).tolist() == [21, 29, 50]

    @pytest.mark.parametrize("seed", range(8))
    def test_largest_remainder_by_hand(self, seed):
        # 7 training examples of a client of its own: 4, 2, 1; M = 10 tests of each class, but
        # only 10 in all (n_k / n * 30 is rounded to 10): 5.71, 2.86, 1.43 -> 6, 3, 1.
        owner = [0] * 7 + [1] * 14
        y = [0] * 4 + [1] * 2 + [2] + [0] * 14
        y_test = np.repeat([0, 1, 2], 10)
        offsets, index = draw(owner, y, y_test, 2, seed)
        assert counts(offsets, index, y_test, 3) == [[6, 3, 1], [10, 0, 0]]

    def test_small_clients_get_ten(self):
        # M * n_k / n = 2; 10 in proportion 1:1 instead.
        owner, y = np.repeat(np.arange(50), 2), np.tile([0, 1], 50)
        y_test = np.arange(100) % 2
        offsets, index = draw(owner, y, y_test, 50)
        assert counts(offsets, index, y_test, 2) == [[5, 5]] * 50

    def test_what_the_test_set_lacks_is_dropped(self):
        # 3 of class 0, none of class 1; client 1 has class 1 alone.
        y_test = np.array([0, 0, 0, 2, 2])
        offsets, index = draw([0, 0, 0, 1], [0, 1, 0, 1], y_test, 2)
        assert offsets.tolist() == [0, 3, 3]
        assert sorted(index.tolist()) == [0, 1, 2]

    def test_ties_favour_no_class(self):
        # A client with one example of each of 20 classes is meant to have 10 tests.
        y_test = np.arange(20)
        clients = 400
        owner, y = np.repeat(np.arange(clients), 20), np.tile(np.arange(20), clients)
        offsets, index = draw(owner, y, y_test, clients)
        assert (np.diff(offsets) == 10).all()
        # Binomial(400, 1/2): 200 +- 5 * 10.
        assert (abs(np.bincount(y_test[index], minlength=20) - 200) < 50).all()

    def test_every_test_example_is_used_equally_often(self):
        clients = 2000
        owner, y = np.arange(clients), np.zeros(clients, int)
        _, index = draw(owner, y, np.zeros(40, int), clients)
        # Binomial(2000, 10 / 40): 500 +- 5 * 19.4.
        assert (abs(np.bincount(index, minlength=40) - 500) < 97).all()

    def test_neighbours_in_the_file_part(self):
        # 10 of 40: at random 39 * (10 / 40) * (9 / 39) = 2.25 pairs of neighbours, not 9.
        _, index = draw([0] * 10 + [1] * 990, [0] * 1000, np.zeros(40, int), 2)
        assert (np.diff(np.sort(index[:10])) == 1).sum() < 7

    @pytest.mark.parametrize("chunk", [1, 7, 64])
    def test_chunks_change_nothing(self, monkeypatch, chunk):
        rng = np.random.default_rng(0)
        owner, y = np.arange(300) % 20, rng.integers(0, 5, 300)
        y_test = rng.integers(0, 5, 200)
        expected = draw(owner, y, y_test, 20)
        monkeypatch.setattr(local_test, "_CHUNK", chunk)
        for ours, whole in zip(draw(owner, y, y_test, 20), expected, strict=True):
            np.testing.assert_array_equal(ours, whole)

    @given(
        st.integers(1, 8),
        st.integers(1, 6),
        st.integers(0, 60),
        st.integers(1, 80),
        st.integers(0, 99),
    )
    def test_without_replacement_and_near_the_class_distribution(
        self, num_clients, num_classes, more, num_tests, seed
    ):
        rng = np.random.default_rng(seed)
        owner = np.concatenate([np.arange(num_clients), rng.integers(0, num_clients, more)])
        y = rng.integers(0, num_classes, len(owner))
        y_test = rng.integers(0, num_classes, num_tests)
        offsets, index = draw(owner, y, y_test, num_clients, seed)
        assert offsets[0] == 0
        assert offsets[-1] == len(index)
        for k in range(num_clients):
            mine = index[offsets[k] : offsets[k + 1]]
            assert len(np.unique(mine)) == len(mine)
            train = np.bincount(y[owner == k], minlength=num_classes)
            have = np.bincount(y_test, minlength=num_classes)
            got = np.bincount(y_test[mine], minlength=num_classes)
            wanted = max(num_tests * train.sum() / len(y), min(10, num_tests))
            exact = wanted * train / train.sum()
            assert (got <= have).all()
            assert ((abs(got - exact) < 1.5) | (got == have)).all()
            assert (got[train == 0] == 0).all()

    def test_floor_rounds_each_class_down(self):
        """FedLoGe's protocol: floor(M * n_k,c / n), capped by what the test set has."""
        rng = np.random.default_rng(3)
        owner = np.concatenate([np.arange(5), rng.integers(0, 5, 200)])
        y = rng.integers(0, 4, len(owner))
        y_test = np.repeat(np.arange(4), [3, 40, 40, 40])
        offsets, index = draw_local_tests(owner, y, y_test, 5, rng, floor=True)
        for k in range(5):
            got = np.bincount(y_test[index[offsets[k] : offsets[k + 1]]], minlength=4)
            for c in range(4):
                exact = 123 * int(((owner == k) & (y == c)).sum()) / 205
                assert got[c] == min(int(exact), [3, 40, 40, 40][c])

"""Head, medium and tail classes: by hand, and against a plain loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.class_groups import class_groups
from fedsim.errors import DataError


class TestClassGroups:
    def test_long_tail_by_hand(self):
        # Sum 12406; 75 % is 9304.5 and 95 % is 11785.7. Before each class come
        # 0, 5000, 7997 | 9793, 10870, 11515 | 11902, 12134, 12273, 12356.
        counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        assert class_groups(counts).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]

    def test_order_of_the_classes_does_not_matter(self):
        counts = np.array([50, 5000, 387, 2997, 1796, 139, 1077, 83, 645, 232])
        assert class_groups(counts).tolist() == [2, 0, 1, 0, 0, 2, 1, 2, 1, 2]

    def test_exactly_75_and_95_percent_before_a_class_end_the_group(self):
        assert class_groups([75, 20, 5]).tolist() == [0, 1, 2]
        # One example fewer before the class, and it still belongs to the earlier group.
        assert class_groups([74, 21, 5]).tolist() == [0, 0, 2]
        assert class_groups([75, 19, 6]).tolist() == [0, 1, 1]

    @given(st.integers(1, 10**12))
    def test_scaling_the_counts_changes_nothing(self, scale):
        assert class_groups(np.array([75, 20, 5]) * scale).tolist() == [0, 1, 2]

    def test_ties_go_to_the_lower_class(self):
        assert class_groups([25, 25, 25, 25]).tolist() == [0, 0, 0, 1]

    def test_class_without_examples_is_tail(self):
        assert class_groups([3, 0, 1]).tolist() == [0, 2, 1]

    @given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
    def test_matches_a_loop(self, counts):
        order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
        expected, before = [0] * len(counts), 0
        for c in order:
            percent = 100 * before
            expected[c] = (percent >= 75 * sum(counts)) + (percent >= 95 * sum(counts))
            before += counts[c]
        got = class_groups(counts)
        assert got.dtype == np.int64
        assert got.tolist() == expected


class TestClassGroupsFailure:
    def test_negative_count(self):
        with pytest.raises(DataError, match="class 1 has -2 examples"):
            class_groups([3, -2])

    def test_nothing_to_group(self):
        with pytest.raises(DataError, match="no class has a training example"):
            class_groups([0, 0])

    @pytest.mark.parametrize("counts", [[0.5, 0.5], [[1, 2]], 3])
    def test_not_a_row_of_whole_numbers(self, counts):
        with pytest.raises(DataError, match="whole number for each class"):
            class_groups(counts)

"""Scores of a model: by hand, against scikit-learn, and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from fedsim import metrics
from fedsim.errors import DataError
from fedsim.metrics import client_metrics, spread

COLUMNS = [
    "num_test",
    "accuracy",
    "loss",
    "head_accuracy",
    "medium_accuracy",
    "tail_accuracy",
    "f1_macro",
]


def scores(**changes):
    """Three clients with six entries; what a test doesn't care about stays as here."""
    given = {
        "predicted": np.array([0, 1, 2, 2, 2, 0]),
        "loss": np.array([0.1, 0.2, 0.3, 0.4, 0.4, 0.6]),
        "y": np.array([0, 1, 2, 0, 0, 1]),
        "offsets": np.array([0, 4, 4, 6]),
        "groups": np.array([0, 1, 2]),
    }
    return client_metrics(**(given | changes))


class TestClientMetrics:
    def test_by_hand(self):
        got = scores()
        assert list(got.columns) == COLUMNS
        assert got["num_test"].tolist() == [4, 0, 2]
        # Client 0 sees truths 0 1 2 0 and guesses 0 1 2 2; client 2 truths 0 1, guesses 2 0.
        np.testing.assert_allclose(got["accuracy"], [3 / 4, np.nan, 0])
        np.testing.assert_allclose(got["loss"], [(0.1 + 0.2 + 0.3 + 0.4) / 4, np.nan, 0.5])
        np.testing.assert_allclose(got["head_accuracy"], [1 / 2, np.nan, 0])
        np.testing.assert_allclose(got["medium_accuracy"], [1, np.nan, 0])
        np.testing.assert_allclose(got["tail_accuracy"], [1, np.nan, np.nan])
        # Client 0: F1 of class 0 is 2/(2+0+1), of class 1 is 1, of class 2 is 2/(2+1+0).
        np.testing.assert_allclose(got["f1_macro"], [(2 / 3 + 1 + 2 / 3) / 3, np.nan, 0])

    @given(st.data())
    def test_matches_sklearn_and_plain_loops(self, data):
        num_classes = data.draw(st.integers(1, 5))
        sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
        offsets = np.cumsum([0, *sizes])
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        y, predicted = rng.integers(num_classes, size=(2, offsets[-1]))
        loss, groups = rng.random(offsets[-1]), rng.integers(3, size=num_classes)

        got = client_metrics(predicted=predicted, loss=loss, y=y, offsets=offsets, groups=groups)

        assert got["num_test"].tolist() == sizes
        for k, row in enumerate(got.to_dict("records")):
            mine = np.arange(offsets[k], offsets[k + 1])
            if len(mine) == 0:
                assert all(math.isnan(row[name]) for name in COLUMNS[1:])
                continue
            right = y[mine] == predicted[mine]
            assert row["accuracy"] == pytest.approx(right.mean())
            assert row["loss"] == pytest.approx(loss[mine].mean())
            for g, name in enumerate(("head", "medium", "tail")):
                inside = right[groups[y[mine]] == g]
                expected = inside.mean() if len(inside) else np.nan
                assert row[f"{name}_accuracy"] == pytest.approx(expected, nan_ok=True)
            f1 = f1_score(y[mine], predicted[mine], average="macro", zero_division=0)
            assert row["f1_macro"] == pytest.approx(f1)

    def test_no_client_has_a_test_example(self):
        none = np.array([], np.int64)
        got = scores(predicted=none, loss=np.array([]), y=none, offsets=np.array([0, 0, 0]))
        assert got["num_test"].tolist() == [0, 0]
        assert got[COLUMNS[1:]].isna().all(axis=None)

    def test_memory_does_not_grow_with_clients_times_classes(self):
        # K x C is 10^11 here: a table of that size could not be made.
        num_clients, num_classes = 100_000, 1_000_000
        got = scores(
            predicted=np.tile([999_999, 3], num_clients // 2),
            loss=np.full(num_clients, 0.5),
            y=np.tile([999_999, 4], num_clients // 2),
            offsets=np.arange(num_clients + 1),
            groups=np.zeros(num_classes, dtype=np.int64),
        )
        assert got["f1_macro"].tolist() == [1.0, 0.0] * (num_clients // 2)


class TestTestMetrics:
    def test_is_the_score_of_a_client_that_holds_everything(self):
        y, predicted = np.array([0, 1, 2, 0, 1, 1]), np.array([0, 1, 2, 2, 1, 0])
        got = metrics.global_metrics(
            predicted=predicted, loss=np.arange(6.0), y=y, groups=np.array([0, 0, 1])
        )
        assert list(got) == COLUMNS
        assert got["num_test"] == 6
        assert got["accuracy"] == pytest.approx(4 / 6)
        assert got["loss"] == pytest.approx(2.5)
        assert got["head_accuracy"] == pytest.approx(3 / 5)
        assert got["medium_accuracy"] == 1
        assert math.isnan(got["tail_accuracy"])
        assert got["f1_macro"] == pytest.approx(f1_score(y, predicted, average="macro"))


class TestClientMetricsFailure:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"loss": np.zeros(5)}, "6 predictions and 5 losses for 6 test examples"),
            ({"groups": np.array([0, 1, 3])}, r"class groups: entry 2 is 3; must be in \[0, 3\)"),
            (
                {"predicted": np.array([0, 1, 2, 2, 1, 3])},
                r"predicted classes: entry 5 is 3; must be in \[0, 3\)",
            ),
            ({"y": np.array([0, 1, 2, -1, 1, 1])}, "test labels: entry 3 is -1"),
            ({"offsets": np.array([0, 4, 5])}, "offsets run from 0 to 5; must be 0 to 6"),
            ({"offsets": np.array([], dtype=np.int64)}, "offsets run from nothing"),
            ({"offsets": np.array([0, 5, 4, 6])}, "client 1 runs from 5 to 4"),
        ],
    )
    def test_names_what_does_not_fit(self, changes, message):
        with pytest.raises(DataError, match=message):
            scores(**changes)


class TestSpread:
    def test_by_hand(self):
        # 20 clients: the worst tenth is two of them, 0.0 and 0.1.
        values = np.array([1.0] * 18 + [0.1, 0.0])
        got = spread(values)
        assert got["mean"] == pytest.approx(18.1 / 20)
        assert got["std"] == pytest.approx(math.sqrt((18 + 0.01) / 20 - (18.1 / 20) ** 2))
        assert got["worst10"] == pytest.approx(0.05)
        assert (got["min"], got["max"]) == (0.0, 1.0)

    @pytest.mark.parametrize(("count", "worst"), [(1, 1), (9, 1), (19, 1), (20, 2), (105, 10)])
    def test_worst_tenth_is_rounded_down_and_at_least_one(self, count, worst):
        values = np.arange(count, dtype=float)
        assert spread(values[::-1])["worst10"] == pytest.approx(values[:worst].mean())

    def test_clients_without_test_examples_are_left_out(self):
        assert spread([np.nan, 0.2, np.nan, 0.6]) == pytest.approx(spread([0.6, 0.2]))

    @pytest.mark.parametrize("values", [[], [np.nan, np.nan]])
    def test_nothing_to_summarise_is_nan(self, values):
        got = spread(values)
        assert list(got) == ["mean", "std", "worst10", "min", "max"]
        assert all(math.isnan(value) for value in got.values())

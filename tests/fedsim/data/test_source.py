import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.data import source as source_module
from fedsim.data.source import Source
from fedsim.errors import DataError


def toy(**changes):
    fields = {
        "name": "toy",
        "x_train": np.arange(12, dtype=np.float32).reshape(4, 3),
        "y_train": np.array([0, 1, 2, 1]),
        "x_test": np.zeros((2, 3), np.float32),
        "y_test": np.array([2, 0]),
        "num_classes": 3,
    }
    return Source(**(fields | changes))


def images(dtype=np.uint8):
    return {"x_train": np.zeros((4, 3, 5, 6), dtype), "x_test": np.zeros((2, 3, 5, 6), dtype)}


def test_imports_stay_cheap():
    code = (
        "import sys, fedsim.data.federate, fedsim.data.digits, fedsim.data.idx, fedsim.data.npz;"
        "print([m for m in ('torch', 'pandas', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestSource:
    def test_bytes_stay_bytes(self):
        assert toy(**images()).x_train.dtype == np.uint8

    def test_labels_and_groups_become_int64(self):
        source = toy(
            y_train=np.array([0, 1, 2, 1], np.uint8), group_train=np.array([5, 5, 1, 0], np.int16)
        )
        assert source.y_train.dtype == source.group_train.dtype == np.int64
        assert source.y_train.tolist() == [0, 1, 2, 1]
        assert source.group_train.tolist() == [5, 5, 1, 0]

    def test_names_of_classes_and_groups(self):
        groups = {"group_train": np.array([1, 1, 0, 0]), "group_test": np.array([2, 2])}
        source = toy(class_names=("a", "b", "c"), client_names=("x", "y", "z"), **groups)
        assert source.class_names == ("a", "b", "c")
        assert source.client_names == ("x", "y", "z")
        assert toy().class_names == toy().client_names == ()

    def test_a_class_may_be_missing(self):
        assert toy(num_classes=10).num_classes == 10


class TestNormalisation:
    def test_of_vectors_by_hand(self):
        x = np.array([[1, 7], [2, 7], [3, 7], [6, 7]], np.float32)
        mean, std = toy(x_train=x, x_test=x[:2]).normalisation()
        # (4 + 1 + 0 + 9) / 4 = 3.5; the second feature is constant.
        np.testing.assert_allclose(mean, [3, 7])
        np.testing.assert_allclose(std, [3.5**0.5, 1], rtol=1e-6)
        assert mean.dtype == std.dtype == np.float32

    def test_of_images_is_by_channel(self):
        rng = np.random.default_rng(0)
        x = rng.integers(0, 256, (4, 3, 5, 6), np.uint8)
        x[:, 2] = 9
        mean, std = toy(x_train=x, x_test=x[:2]).normalisation()
        expected = x.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1)
        np.testing.assert_allclose(mean, expected.mean(axis=1), rtol=1e-6)
        np.testing.assert_allclose(std, [*expected[:2].std(axis=1), 1], rtol=1e-6)

    def test_in_chunks_is_the_same(self, monkeypatch):
        x = np.random.default_rng(1).normal(1e4, 0.1, (101, 3)).astype(np.float32)
        source = toy(x_train=x, y_train=np.zeros(101, int))
        monkeypatch.setattr(source_module, "_CHUNK", 7)
        mean, std = source.normalisation()
        np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(std, x.astype(np.float64).std(axis=0), rtol=1e-5)

    def test_of_inputs_that_stay_as_they_are(self):
        mean, std = toy(normalise=False).normalisation()
        assert (set(mean), set(std)) == ({0.0}, {1.0})
        assert len(mean) == len(std) == toy().x_train.shape[1]

    @given(hnp.arrays(np.float32, (4, 3), elements=st.floats(-1e6, 1e6, width=32)))
    def test_std_is_never_zero_or_nan(self, x):
        mean, std = toy(x_train=x).normalisation()
        assert np.isfinite(mean).all()
        assert (std > 0).all()


class TestSourceFailure:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_classes": 1}, "num_classes = 1"),
            ({"num_classes": 10**12}, "num_classes = 1000000000000"),
            ({"num_classes": 2.5}, r"num_classes = 2\.5; must be a whole number"),
            ({"num_classes": "3"}, "num_classes = '3'"),
            ({"x_train": [[0.0] * 3] * 4}, "x_train is of type list; must be a NumPy array"),
            ({"x_test": None}, "x_test is of type NoneType; must be a NumPy array"),
            ({"y_train": (0, 1, 2, 1)}, "y_train is of type tuple; must be a NumPy array"),
            ({"group_train": [1, 2, 3, 4]}, "group_train is of type list"),
            ({"x_train": np.zeros((4, 3))}, "x_train is float64"),
            ({"x_train": np.zeros((4, 3), np.uint8)}, "x_train is uint8"),
            ({"x_test": np.zeros((2, 3, 4), np.float32)}, r"x_test is float32 \[2, 3, 4\]"),
            ({"x_test": np.zeros((2, 4), np.float32)}, r"shape \(3,\) but one of x_test \(4,\)"),
            (images() | {"x_test": np.zeros((2, 3, 5, 6), np.float32)}, "x_test is float32"),
            (
                {"x_test": np.zeros((0, 3), np.float32), "y_test": np.zeros(0, int)},
                "x_test is empty",
            ),
            ({"y_train": np.array([0, 1])}, "4 examples but y_train has 2"),
            ({"y_test": np.array([0.0, 1.0])}, "y_test is float64"),
            ({"y_test": np.array([[0], [1]])}, r"y_test is int64 \[2, 1\]"),
            ({"y_train": np.array([0, 1, 3, -1])}, r"y_train\[2\] = 3; labels must be 0\.\.2"),
            ({"y_test": np.array([0, -1])}, r"y_test\[1\] = -1; labels must be 0\.\.2$"),
            (
                {"y_train": np.array([0, -1, -2, 1])},
                r"y_train\[2\] = -2; labels must be 0\.\.2, or -1 where nobody knows it",
            ),
            ({"y_train": np.full(4, -1)}, "y_train has no label: all are -1"),
            ({"group_train": np.array([1, 2, 3])}, "4 examples but group_train has 3"),
            ({"group_test": np.array([1, 2])}, "group_test but no group_train"),
            ({"class_names": ("a", "b")}, "class_names has 2 names, but there are 3 classes"),
            ({"class_names": ("a", "b", "a")}, "class_names has 'a' twice; names must be distinct"),
            ({"class_names": ["a", "b", "c"]}, r"class_names is \[.*; must be a tuple of texts"),
            ({"class_names": (1, 2, 3)}, r"class_names is \(1, 2, 3\); must be a tuple of texts"),
            ({"client_names": ("a",)}, "client_names has 1 names, but there are 0 natural groups"),
            (
                {"client_names": ("a", "b"), "group_train": np.array([1, 2, 1, 2])},
                r"the groups are numbered 1\.\.2; with client_names they must be 0\.\.1",
            ),
        ],
    )
    def test_one_line_names_the_array(self, changes, message):
        with pytest.raises(DataError, match=f"^toy: .*{message}") as error:
            toy(**changes)
        assert "\n" not in str(error.value)

    def test_a_name_that_is_no_text(self):
        with pytest.raises(DataError, match=r"^a source's name is 3; must be a text$"):
            toy(name=3)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_first_value_that_is_not_finite(self, bad, split, monkeypatch):
        monkeypatch.setattr(source_module, "_CHUNK", 3)  # several chunks
        x = np.zeros((4, 3), np.float32)
        x[1:, 2] = bad
        changes = {f"x_{split}": x, f"y_{split}": np.zeros(4, int)}
        with pytest.raises(DataError, match=rf"x_{split}\[1\]"):
            toy(**changes)

    def test_replace_validates_again(self):
        with pytest.raises(DataError, match="num_classes"):
            replace(toy(), num_classes=0)

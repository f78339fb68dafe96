import gzip
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from fedsim.data import sources
from fedsim.errors import DataError

IMAGES = {
    "train": np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3),
    "t10k": np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3),
}
LABELS = {"train": np.array([0, 1, 2, 1, 3], np.uint8), "t10k": np.array([2, 0], np.uint8)}


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, *, compress):
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", IMAGES[split]), ("labels-idx1", LABELS[split])):
            path = folder / f"{split}-{kind}-ubyte{'.gz' if compress else ''}"
            data = idx_bytes(array)
            path.write_bytes(gzip.compress(data) if compress else data)


def arrays(**changes):
    fields = {
        "x_train": np.arange(4 * 3, dtype=np.float64).reshape(4, 3),
        "y_train": np.array([0, 1, 2, 1]),
        "x_test": np.ones((2, 3)),
        "y_test": np.array([3, 0]),
    }
    return fields | changes


@pytest.fixture
def save(tmp_path):
    def write(**changes):
        path = tmp_path / "data.npz"
        np.savez(path, **{key: a for key, a in arrays(**changes).items() if a is not None})
        return str(path)

    return write


def test_imports_stay_cheap():
    code = (
        "import sys, fedsim.data.federation, fedsim.data.sources;"
        "print([m for m in ('torch', 'pandas', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestDigits:
    def test_split(self):
        source = sources.digits()
        assert source.x_train.shape == (1437, 1, 8, 8)
        assert source.x_train.dtype == np.uint8
        assert source.x_train.max() == 16
        assert np.bincount(source.y_test).tolist() == [36] * 10
        assert not source.flip

    def test_nothing_is_lost_or_shared(self):
        from sklearn.datasets import load_digits

        source = sources.digits()
        ours = np.concatenate([source.x_train, source.x_test]).reshape(1797, 64)
        theirs = load_digits().data.astype(np.uint8)
        assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))

    def test_tests_are_spread_over_the_file(self):
        from sklearn.datasets import load_digits

        data = load_digits()
        zeros = data.images[data.target == 0]
        source = sources.digits()
        ours = source.x_test[source.y_test == 0][:, 0]
        # 178 zeros; floor(i * 178 / 36) for i = 0, 1, 2, 3, 35.
        assert len(zeros) == 178
        np.testing.assert_array_equal(ours[[0, 1, 2, 3, 35]], zeros[[0, 4, 9, 14, 173]])


class TestFashionMnist:
    def test_loads(self):
        if not sources.FASHION_MNIST.is_dir():
            pytest.skip(f"needs the Debian package dataset-fashion-mnist ({sources.FASHION_MNIST})")
        source = sources.fashion_mnist()
        assert source.x_train.shape == (60_000, 1, 28, 28)
        assert source.x_test.shape == (10_000, 1, 28, 28)
        assert np.bincount(source.y_train).tolist() == [6000] * 10
        assert np.bincount(source.y_test).tolist() == [1000] * 10
        # Mean and standard deviation as they are given everywhere: 0.2860 and 0.3530 of 255.
        mean, std = source.normalisation()
        np.testing.assert_allclose([mean[0] / 255, std[0] / 255], [0.2860, 0.3530], atol=5e-5)
        assert source.flip

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "none")
        with pytest.raises(DataError, match=r"dataset-fashion-mnist, or set .*idx:DIR"):
            sources.fashion_mnist()


class TestIdx:
    @pytest.mark.parametrize("compress", [False, True])
    def test_reads_both_splits(self, tmp_path, compress):
        write_idx(tmp_path, compress=compress)
        source = sources.idx(str(tmp_path))
        np.testing.assert_array_equal(source.x_train, IMAGES["train"][:, None])
        np.testing.assert_array_equal(source.y_train, LABELS["train"])
        np.testing.assert_array_equal(source.x_test, IMAGES["t10k"][:, None])
        np.testing.assert_array_equal(source.y_test, LABELS["t10k"])
        assert source.num_classes == 4
        assert source.x_train.flags.writeable
        assert not source.flip
        assert sources.idx(str(tmp_path), flip=True).flip


class TestIdxFailure:
    def damage(self, folder, name, change):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DataError) as error:
            sources.idx(str(folder))
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(
            DataError, match=r"no file .*none/train-images-idx3-ubyte, nor with \.gz"
        ):
            sources.idx(str(tmp_path / "none"))

    @pytest.mark.parametrize(
        "shape", [(0, 2, 3), (2**32 - 1, 2**32 - 1, 0), (0, 2**32 - 1, 2**32 - 1)]
    )
    def test_no_values(self, tmp_path, shape):
        write_idx(tmp_path, compress=False)
        empty = struct.pack(">4I", 0x0803, *shape)
        message = self.damage(tmp_path, "train-images-idx3-ubyte", lambda _: empty)
        assert f"train-images-idx3-ubyte is empty, its shape is {list(shape)}" in message

    @pytest.mark.parametrize("length", [0, 3, 7, 12, 20])
    def test_cut_short(self, tmp_path, length):
        write_idx(tmp_path, compress=False)
        message = self.damage(tmp_path, "train-images-idx3-ubyte", lambda data: data[:length])
        if length < 16:
            assert f"was cut short: it has {length} bytes, but an IDX file's header" in message
        else:
            assert f"has {length - 16} bytes of values, but its header says 5 x 2 x 3" in message

    def test_too_long(self, tmp_path):
        write_idx(tmp_path, compress=False)
        message = self.damage(tmp_path, "t10k-labels-idx1-ubyte", lambda data: data + b"x")
        assert "has 3 bytes of values, but its header says 2 = 2" in message

    def test_labels_in_place_of_images(self, tmp_path):
        write_idx(tmp_path, compress=False)
        labels = idx_bytes(LABELS["train"])
        message = self.damage(tmp_path, "train-images-idx3-ubyte", lambda _: labels)
        assert message.endswith("with 3 axes: it begins with 0x00000801, not 0x00000803")

    def test_another_beginning_cut_short(self, tmp_path):
        write_idx(tmp_path, compress=False)
        message = self.damage(tmp_path, "train-images-idx3-ubyte", lambda _: b"\x00\x01")
        assert message.endswith("it begins with 0x0001, not 0x00000803")

    @pytest.mark.parametrize("length", [0, 1, 5, 15, -9, -1])
    def test_gzip_cut_short(self, tmp_path, length):
        write_idx(tmp_path, compress=True)
        message = self.damage(tmp_path, "train-labels-idx1-ubyte.gz", lambda data: data[:length])
        assert "train-labels-idx1-ubyte.gz" in message

    def test_gzip_corrupted(self, tmp_path):
        write_idx(tmp_path, compress=True)
        message = self.damage(
            tmp_path, "train-images-idx3-ubyte.gz", lambda data: data[:12] + b"\xff" + data[13:]
        )
        assert "can't read" in message

    def test_other_number_of_labels(self, tmp_path):
        write_idx(tmp_path, compress=False)
        message = self.damage(
            tmp_path, "train-labels-idx1-ubyte", lambda _: idx_bytes(np.zeros(4, np.uint8))
        )
        assert "x_train has 5 examples but y_train has 4" in message


class TestNpz:
    def test_vectors_become_float32(self, save):
        source = sources.npz(save())
        assert source.x_train.dtype == np.float32
        np.testing.assert_array_equal(source.x_train, arrays()["x_train"])
        assert source.num_classes == 4  # the largest label is in the test set
        assert source.group_train is None
        assert not source.flip
        assert sources.npz(save(), flip=True).flip

    def test_num_classes_of_the_file(self, save):
        assert sources.npz(save(num_classes=np.array(7))).num_classes == 7

    @pytest.mark.parametrize(
        ("shape", "first_axis"),
        [
            ((4, 5, 6), None),
            ((4, 5, 6, 3), 3),
            ((4, 5, 6, 1), 3),
            ((4, 3, 5, 6), 1),
            ((4, 2, 5, 6), 1),
            ((4, 3, 5, 3), 1),  # could be both: the second axis is taken
        ],
    )
    def test_layouts_of_images(self, save, shape, first_axis):
        x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        source = sources.npz(save(x_train=x, x_test=x[:2]))
        expected = x[:, None] if first_axis is None else np.moveaxis(x, first_axis, 1)
        np.testing.assert_array_equal(source.x_train, expected)
        np.testing.assert_array_equal(source.x_test, expected[:2])
        assert source.x_train.dtype == np.uint8

    def test_both_splits_have_one_layout(self, save):
        # A test set of this shape alone would be taken for channels first.
        with pytest.raises(DataError, match="shape"):
            sources.npz(save(x_train=np.zeros((4, 5, 6, 3)), x_test=np.zeros((2, 3, 6, 3))))

    def test_groups_of_both_splits_are_numbered_together(self, save):
        source = sources.npz(
            save(group_train=np.array(["bo", "al", "bo", "cy"]), group_test=np.array(["cy", "abe"]))
        )
        assert source.group_train.tolist() == [2, 1, 2, 3]
        assert source.group_test.tolist() == [3, 0]
        assert source.client_names == ("abe", "al", "bo", "cy")
        assert source.class_names == ()

    @pytest.mark.parametrize(
        ("group", "names"),
        [
            ([205, 101, 205, 101], ("101", "205")),
            ([1, 0, 1, 0], ()),
            (["1", "0", "1", "0"], ()),
            (["10", "9", "10", "9"], ("10", "9")),
            (["Zoë".encode(), b"\xff", b"a", b"a"], ("Zoë", "\\xff", "a")),
        ],
    )
    def test_groups_keep_their_names_unless_these_are_their_numbers(self, save, group, names):
        assert set(sources.npz(save(group_train=np.array(group))).client_names) == set(names)

    def test_groups_of_integers_of_several_sizes(self, save):
        group = np.array([2**53 + 1, 2**53, 5, 6])
        source = sources.npz(save(group_train=group, group_test=np.array([6, 5], np.uint8)))
        assert source.group_train.tolist() == [3, 2, 0, 1]
        assert source.group_test.tolist() == [1, 0]

    def test_groups_of_the_training_set_alone(self, save):
        source = sources.npz(save(group_train=np.array([30, 10, 30, 20])))
        assert source.group_train.tolist() == [2, 0, 2, 1]
        assert source.group_test is None


class TestNpzFailure:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x_test": None, "y_test": None}, "lacks x_test, y_test; it has x_train, y_train"),
            (
                {"y_train": np.array([0, 1, 2, "a"], object)},
                "y_train is an array of Python objects; must be integers$",
            ),
            (
                {"group_test": np.array([0, "a"], object)},
                "group_test is an array of Python objects; must be integers or strings$",
            ),
            ({"y_train": np.array([0.0, 1, 2, 1])}, "y_train is float64"),
            ({"y_train": np.array(["a", "b", "c", "d"])}, "y_train is <U1"),
            ({"y_train": np.array([0, -2, 2, 1])}, r"y_train\[1\] = -2"),
            ({"num_classes": np.array(3)}, r"y_test\[0\] = 3; labels must be 0\.\.2"),
            ({"num_classes": np.array([3, 4])}, "num_classes is int64"),
            ({"x_train": np.full((4, 3), np.nan)}, r"x_train\[0\] has a value that is NaN"),
            ({"x_test": np.full((2, 3), 1e300)}, r"x_test\[0\] has a value .* infinite"),
            ({"x_train": np.zeros((4, 3), complex)}, "x_train is complex128"),
            ({"x_train": np.zeros(4)}, r"x_train is float64 \[4\]"),
            ({"group_train": np.zeros(4)}, "group_train is float64"),
            (
                {"group_train": np.array(list("abcd")), "group_test": np.array([1, 2])},
                "group_train is <U1 but group_test is int64; must be integers or strings of one",
            ),
            (
                {"group_train": np.arange(4, dtype=np.uint64), "group_test": np.array([1, 2])},
                "group_train is uint64 but group_test is int64",
            ),
            (
                {"group_train": np.array([b"\xc3"] * 4), "group_test": np.array(["a", "b"])},
                r"group_train is \|S1 but group_test is <U1",
            ),
        ],
    )
    def test_one_line_says_what(self, save, changes, message):
        with pytest.raises(DataError, match=f"^npz:.*{message}") as error:
            sources.npz(save(**changes))
        assert "\n" not in str(error.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match=r"no file .*none\.npz"):
            sources.npz(str(tmp_path / "none.npz"))

    def test_other_files(self, tmp_path, save):
        np.save(tmp_path / "one.npy", np.zeros(3))
        (tmp_path / "text.npz").write_text("x_train, y_train\n")
        (tmp_path / "empty.npz").write_bytes(b"")
        for name in ("one.npy", "text.npz", "empty.npz"):
            with pytest.raises(DataError, match=r"is no \.npz file"):
                sources.npz(str(tmp_path / name))

    def test_cut_short(self, tmp_path, save):
        with open(save(), "rb") as file:  # noqa: PTH123
            data = file.read()
        for length in range(0, len(data), 97):
            path = tmp_path / "cut.npz"
            path.write_bytes(data[:length])
            with pytest.raises(DataError, match="was cut short"):
                sources.npz(str(path))

    def test_a_member_cut_short(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "cut.npz", "w") as file:
            file.writestr("x_train.npy", b"\x93NUMPY\x01\x00v\x00{'descr'")
        with pytest.raises(DataError, match="can't read array 'x_train'"):
            sources.npz(str(tmp_path / "cut.npz"))

    def test_a_member_that_is_no_array(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "odd.npz", "w") as file:
            file.writestr("x_train", b"hello")
        with pytest.raises(DataError, match="x_train is 5 bytes that aren't in NumPy's format"):
            sources.npz(str(tmp_path / "odd.npz"))

    @pytest.mark.parametrize("key", ["x_train", "group_train"])
    @pytest.mark.parametrize("content", [b"", b"hello"])
    def test_a_member_in_an_arrays_place(self, save, key, content):
        with zipfile.ZipFile(save(x_train=None), "a") as file:
            file.writestr(f"{key}.npy", content)
            path = file.filename
        expected = f"{key} is {len(content)} bytes that aren't in NumPy's format; must be an array"
        with pytest.raises(DataError, match=expected):
            sources.npz(path)

    def test_an_archive_without_arrays(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "none.npz", "w"):
            pass
        with pytest.raises(DataError, match=r"lacks x_train, .*; it has no arrays"):
            sources.npz(str(tmp_path / "none.npz"))

    def test_bytes_before_the_archive(self, tmp_path, save):
        # NumPy would take the file for a pickle, and say how to load it.
        with open(save(), "rb") as file:  # noqa: PTH123
            (tmp_path / "more.npz").write_bytes(b"GIF89a" + file.read())
        with pytest.raises(DataError, match=r"more\.npz is no \.npz file \(numpy\.savez\)"):
            sources.npz(str(tmp_path / "more.npz"))

    def test_other_arrays_are_not_read(self, save):
        path = save(notes=np.array([None, "x"], object))
        assert sources.npz(path).num_classes == 4


def cifar_arrays(classes, **changes):
    rng = np.random.default_rng(0)
    fields = {
        "x_train": rng.integers(0, 256, (classes, 32, 32, 3), np.uint8),
        "y_train": np.arange(classes),
        "x_test": rng.integers(0, 256, (2, 32, 32, 3), np.uint8),
        "y_test": np.array([1, 0]),
    }
    return fields | changes


class TestCifar:
    @pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
    def test_loads(self, save, name, classes):
        data = cifar_arrays(classes)
        path = save(**data)
        source = getattr(sources, name)(path)
        np.testing.assert_array_equal(source.x_train, np.moveaxis(data["x_train"], 3, 1))
        np.testing.assert_array_equal(source.y_test, [1, 0])
        assert source.name == f"{name}:{path}"
        assert source.num_classes == classes
        assert source.flip


class TestCifarFailure:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"y_train": np.arange(10) // 2}, r"has 5 classes; must be 10; .*npz:FILE"),
            ({"num_classes": np.array(100)}, "has 100 classes; must be 10"),
            (
                {
                    "x_train": np.zeros((10, 28, 28), np.uint8),
                    "x_test": np.zeros((2, 28, 28), "u1"),
                },
                r"x_train is uint8 \[10, 1, 28, 28\]; CIFAR's images are uint8",
            ),
            (
                {"x_train": np.zeros((10, 32, 32, 3)), "x_test": np.zeros((2, 32, 32, 3))},
                r"x_train is float32 \[10, 3, 32, 32\]",
            ),
            ({"y_test": None}, "lacks y_test"),
        ],
    )
    def test_one_line_says_what(self, save, changes, message):
        with pytest.raises(DataError, match=f"^cifar10:.*{message}") as error:
            sources.cifar10(save(**cifar_arrays(10, **changes)))
        assert "\n" not in str(error.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match=r"^cifar100:.*no file .*none\.npz"):
            sources.cifar100(str(tmp_path / "none.npz"))

import struct
import zipfile

import numpy as np
import pytest

from fedsim.data.npz import cifar10, cifar100, npz
from fedsim.errors import DataError


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


class TestNpz:
    def test_vectors_become_float32(self, save):
        source = npz(save())
        assert source.x_train.dtype == np.float32
        np.testing.assert_array_equal(source.x_train, arrays()["x_train"])
        assert source.num_classes == 4  # the largest label is in the test set
        assert source.group_train is None
        assert not source.flip
        assert npz(save(), flip=True).flip

    def test_num_classes_of_the_file(self, save):
        assert npz(save(num_classes=np.array(7))).num_classes == 7

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
        source = npz(save(x_train=x, x_test=x[:2]))
        expected = x[:, None] if first_axis is None else np.moveaxis(x, first_axis, 1)
        np.testing.assert_array_equal(source.x_train, expected)
        np.testing.assert_array_equal(source.x_test, expected[:2])
        assert source.x_train.dtype == np.uint8

    def test_both_splits_have_one_layout(self, save):
        # A test set of this shape alone would be taken for channels first.
        with pytest.raises(DataError, match="shape"):
            npz(save(x_train=np.zeros((4, 5, 6, 3)), x_test=np.zeros((2, 3, 6, 3))))

    def test_groups_of_both_splits_are_numbered_together(self, save):
        source = npz(
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
        assert set(npz(save(group_train=np.array(group))).client_names) == set(names)

    def test_groups_of_integers_of_several_sizes(self, save):
        group = np.array([2**53 + 1, 2**53, 5, 6])
        source = npz(save(group_train=group, group_test=np.array([6, 5], np.uint8)))
        assert source.group_train.tolist() == [3, 2, 0, 1]
        assert source.group_test.tolist() == [1, 0]

    def test_groups_of_the_training_set_alone(self, save):
        source = npz(save(group_train=np.array([30, 10, 30, 20])))
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
            npz(save(**changes))
        assert "\n" not in str(error.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match=r"no file .*none\.npz"):
            npz(str(tmp_path / "none.npz"))

    def test_other_files(self, tmp_path, save):
        np.save(tmp_path / "one.npy", np.zeros(3))
        (tmp_path / "text.npz").write_text("x_train, y_train\n")
        (tmp_path / "empty.npz").write_bytes(b"")
        for name in ("one.npy", "text.npz", "empty.npz"):
            with pytest.raises(DataError, match=r"is no \.npz file"):
                npz(str(tmp_path / name))

    def test_cut_short(self, tmp_path, save):
        with open(save(), "rb") as file:  # noqa: PTH123
            data = file.read()
        for length in range(0, len(data), 97):
            path = tmp_path / "cut.npz"
            path.write_bytes(data[:length])
            with pytest.raises(DataError, match="was cut short"):
                npz(str(path))

    def test_a_member_cut_short(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "cut.npz", "w") as file:
            file.writestr("x_train.npy", b"\x93NUMPY\x01\x00v\x00{'descr'")
        with pytest.raises(DataError, match="can't read array 'x_train'"):
            npz(str(tmp_path / "cut.npz"))

    def test_a_member_that_is_no_array(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "odd.npz", "w") as file:
            file.writestr("x_train", b"hello")
        with pytest.raises(DataError, match="x_train is 5 bytes that aren't in NumPy's format"):
            npz(str(tmp_path / "odd.npz"))

    @pytest.mark.parametrize("key", ["x_train", "group_train"])
    @pytest.mark.parametrize("content", [b"", b"hello"])
    def test_a_member_in_an_arrays_place(self, save, key, content):
        with zipfile.ZipFile(save(x_train=None), "a") as file:
            file.writestr(f"{key}.npy", content)
            path = file.filename
        expected = f"{key} is {len(content)} bytes that aren't in NumPy's format; must be an array"
        with pytest.raises(DataError, match=expected):
            npz(path)

    def test_an_archive_without_arrays(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "none.npz", "w"):
            pass
        with pytest.raises(DataError, match=r"lacks x_train, .*; it has no arrays"):
            npz(str(tmp_path / "none.npz"))

    def test_bytes_before_the_archive(self, tmp_path, save):
        # NumPy would take the file for a pickle, and say how to load it.
        with open(save(), "rb") as file:  # noqa: PTH123
            (tmp_path / "more.npz").write_bytes(b"GIF89a" + file.read())
        with pytest.raises(DataError, match=r"more\.npz is no \.npz file \(numpy\.savez\)"):
            npz(str(tmp_path / "more.npz"))

    def test_other_arrays_are_not_read(self, save):
        path = save(notes=np.array([None, "x"], object), groups_train=np.zeros(6))
        with pytest.warns(UserWarning, match=r"arrays groups_train, notes aren't used; .*group_tr"):
            assert npz(path).num_classes == 4

    def test_integers_that_float32_rounds_are_told(self, save):
        x = np.arange(4)[:, None] + 2**60
        with pytest.warns(UserWarning, match=r"x_train has integers up to 1152921504606846979; "):
            npz(save(x_train=x, x_test=np.zeros((2, 1))))

    def test_a_label_too_large_for_an_integer(self, save):
        y = np.array([0, 1, 2, 2**64 - 1], np.uint64)
        with pytest.raises(DataError, match=r"y_train\[3\] = 18446744073709551615: too large"):
            npz(save(y_train=y, num_classes=4))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8'",  # tokenize.TokenError
        "{'descr': '<i8', 'fortran_order': False, b'shape': (1,)}",  # TypeError
        f"{{'descr': '<i8', 'fortran_order': False, 'shape': (1{'0' * 30},)}}",  # OverflowError
    ],
)
def test_damaged_headers(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as file:
        length = struct.pack("<H", len(header))
        file.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + length + header.encode())
    with pytest.raises(DataError, match="can't read array 'x_train': ") as error:
        npz(str(tmp_path / "odd.npz"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "byte", "message"),
    [(4, 255, "zip file version 25.5"), (6, 1, "File 'x_train.npy' is encrypted")],
)
def test_damaged_archives(tmp_path, place, byte, message):
    path = tmp_path / "odd.npz"
    np.savez(path, x_train=np.zeros(3))
    data = bytearray(path.read_bytes())
    in_directory = data.index(b"PK\x01\x02") + 2
    data[place] = data[in_directory + place] = byte
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"can't read array '.*': {message}"):
        npz(str(path))


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
    @pytest.mark.parametrize(("cifar", "classes"), [(cifar10, 10), (cifar100, 100)])
    def test_loads(self, save, cifar, classes):
        data = cifar_arrays(classes)
        path = save(**data)
        source = cifar(path)
        np.testing.assert_array_equal(source.x_train, np.moveaxis(data["x_train"], 3, 1))
        np.testing.assert_array_equal(source.y_test, [1, 0])
        assert source.name == f"cifar{classes}:{path}"
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
            cifar10(save(**cifar_arrays(10, **changes)))
        assert "\n" not in str(error.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match=r"^cifar100:.*no file .*none\.npz"):
            cifar100(str(tmp_path / "none.npz"))

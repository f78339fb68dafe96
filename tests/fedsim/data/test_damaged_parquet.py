"""Parquet files that can't be used: one line says where, and why."""

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.data.parquet import parquet
from fedsim.errors import DataError
from tests.fedsim.data.test_parquet import TEST, TRAIN, png, write


def message(place, **settings):
    with pytest.raises(DataError, match=f"^parquet:{place}: ") as error:
        parquet(str(place), **settings)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"parquet:{place}: ")


class TestFilesFailure:
    @pytest.mark.parametrize("module", [None, ModuleType("pyarrow")])
    def test_without_the_library(self, tmp_path, monkeypatch, module):
        # A folder pyarrow/ in the working directory imports as an empty package.
        monkeypatch.setitem(sys.modules, "pyarrow", module)
        monkeypatch.delitem(sys.modules, "pyarrow.parquet")
        assert 'pip install "fedsim-flwr[parquet]"' in message(write(tmp_path))

    def test_nothing_there(self, tmp_path):
        assert message(tmp_path / "none") == f"no file or folder {tmp_path / 'none'}"
        assert message("~no_such_user/x").startswith("can't read ~no_such_user/x: ")

    def test_a_missing_split(self, tmp_path):
        assert message(tmp_path) == (
            "no file train*.parquet in the folder itself; it has no .parquet files"
        )
        write(tmp_path)
        (tmp_path / "test.parquet").rename(tmp_path / "valid.parquet")
        assert message(tmp_path) == (
            "no file test*.parquet in the folder itself; it has train.parquet, valid.parquet"
        )

    def test_a_folder_that_is_closed(self, tmp_path, monkeypatch):
        def iterdir(path):
            raise PermissionError(13, "Permission denied", str(path))

        # Nothing is closed to the user root, who may run this.
        monkeypatch.setattr(Path, "iterdir", iterdir)
        assert message(tmp_path).startswith("can't read the folder: [Errno 13] Permission denied")

    def test_a_folder_in_place_of_a_file(self, tmp_path):
        write(tmp_path)
        (tmp_path / "train-more.parquet").mkdir()
        assert message(tmp_path) == "train-more.parquet is a folder; must be a file"

    def test_a_pipe_in_place_of_a_file(self, tmp_path):
        write(tmp_path)
        os.mkfifo(tmp_path / "train-more.parquet")  # to open it would wait for ever
        expected = "train-more.parquet is a pipe, socket or device; must be a file"
        assert message(tmp_path) == expected

    def test_files_cut_short(self, tmp_path):
        write(tmp_path)
        file = tmp_path / "test.parquet"
        data = file.read_bytes()
        for length in range(0, len(data), 97):
            file.write_bytes(data[:length])
            assert message(tmp_path).startswith("test.parquet: can't be read: ")

    def test_a_damaged_page(self, tmp_path):
        write(tmp_path)
        file = tmp_path / "train.parquet"
        pq.write_table(
            pq.read_table(file), file, use_dictionary=False, compression="none",
            write_page_checksum=True,
        )  # fmt: skip
        data = bytearray(file.read_bytes())
        data[data.index(np.float64(0.5).tobytes())] ^= 1
        file.write_bytes(data)
        assert message(tmp_path).startswith("train.parquet: can't be read: could not verify page")

    def test_text_that_is_no_utf8(self, tmp_path):
        bad = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
        place = write(tmp_path, label=(bad, ["a", "b"]))
        assert message(place).startswith("train.parquet: can't be read: ")
        assert "Invalid UTF8" in message(place)

    def test_two_columns_of_one_name(self, tmp_path):
        write(tmp_path)
        twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["age", "age"])
        pq.write_table(twice, tmp_path / "test.parquet")
        assert message(tmp_path) == "test.parquet: has several columns 'age'"

    def test_a_split_without_rows(self, tmp_path):
        write(tmp_path)
        empty = pq.read_table(tmp_path / "test.parquet").slice(0, 0)
        pq.write_table(empty, tmp_path / "test.parquet")
        assert message(tmp_path) == "the split test has no rows"


class TestOneFileFailure:
    def message(self, root, split):
        table = dict(TRAIN)
        if split is not None:
            table["split"] = split
        pq.write_table(pa.table(table), root / "all.parquet")
        return message(root / "all.parquet")

    def test_no_column_of_splits(self, tmp_path):
        assert self.message(tmp_path, None) == (
            "has no column 'split'; its columns are age, height, label"
        )

    @pytest.mark.parametrize(
        ("split", "expected"),
        [
            (["train", "test", "valid"], "column 'split', row 2 is 'valid'; must be train or test"),
            (["train", None, "test"], "column 'split', row 1 is null"),
            ([0, 1, 0], "column 'split' is int64; must be train or test"),
            (["train"] * 3, "the split test has no rows"),
        ],
    )
    def test_splits(self, tmp_path, split, expected):
        assert self.message(tmp_path, split) == expected

    def test_rows_are_counted_in_the_file(self, tmp_path):
        table = {"split": ["test", "train", "test"], "a": [1.0, 2.0, None], "label": [0, 1, 0]}
        pq.write_table(pa.table(table), tmp_path / "all.parquet")
        assert message(tmp_path / "all.parquet") == "column 'a', row 2 is null"


EMPTY = pa.array([[], [], []], pa.list_(pa.int8()))
IMAGES = [png(np.full((2, 3), value, np.uint8)) for value in range(5)]


class TestColumnsFailure:
    @pytest.mark.parametrize(
        ("changes", "options", "expected"),
        [
            (
                {"label": ([0, 1, 2], None)},
                {},
                "test.parquet: has no column 'label'; its columns are age, height",
            ),
            (
                {},
                {"label": "kind"},
                "train.parquet: has no column 'kind'; its columns are age, height, label",
            ),
            (
                {},
                {"client": "writer"},
                "train.parquet: has no column 'writer'; its columns are age, height, label",
            ),
            (
                {"client": (None, [1, 2])},
                {},
                "train.parquet: has no column 'client'; its columns are age, height, label",
            ),
            (
                {},
                {"x": "pixels"},
                "train.parquet: has no column 'pixels'; its columns are age, height, label",
            ),
            (
                {"height": ([0.5, 1.5, 2.5], None)},
                {},
                "test.parquet: has no column 'height'; its columns are age, label",
            ),
            (
                {"weight": (None, [1, 2])},
                {},
                "test.parquet: the examples are age (int64), height (double), weight (int64), but"
                " train.parquet: age (int64), height (double)",
            ),
            (
                {"age": (None, None), "height": (["a", "b", "c"], ["d", "e"])},
                {},
                "train.parquet: has no column of examples; its columns are height (string), label"
                " (int64)",
            ),
            (
                {"image": (["a", "b", "c"], ["d", "e"])},
                {},
                "train.parquet: column 'image' is string; examples must be encoded images (bytes,"
                " or a struct with a field bytes) or lists of numbers",
            ),
            ({}, {"x": "age"}, "train.parquet: column 'age' is int64; examples must be encoded"),
            (
                {"one": ([[1]] * 3, [[1]] * 2), "two": ([[1]] * 3, [[1]] * 2)},
                {},
                "train.parquet: has several columns of lists, one, two; set data.x to that of the",
            ),
            (
                {"photo": (IMAGES[:3], IMAGES[3:])},
                {},
                "train.parquet: column 'photo' is binary, which is no feature of a table; set"
                " data.x to the column of the examples, or leave it out of the file",
            ),
            (
                {"grid": ([[[1]]] * 3, [[[1]]] * 2)},
                {},
                "train.parquet: column 'grid' is list<element: list<element: int64>>, which is no",
            ),
            (
                {"image": (IMAGES[:3], [[1], [2]])},
                {},
                "test.parquet: the examples are image (list<element: int64>), but"
                " train.parquet: image (binary)",
            ),
            (
                {"label": ([0.0, 1.5, 2.0], [0, 1])},
                {},
                "train.parquet: column 'label' is double; labels must be whole numbers or text",
            ),
            (
                {"label": ([0, 1, 2], ["a", "b"])},
                {},
                "test.parquet: column 'label' is string, but train.parquet: int64",
            ),
            (
                {"client": ([True, False, True], None)},
                {},
                "train.parquet: column 'client' is bool; clients must be whole numbers or text",
            ),
        ],
    )
    def test_columns(self, tmp_path, changes, options, expected):
        assert message(write(tmp_path, **changes), **options).startswith(expected)

    def test_several_files_of_a_split(self, tmp_path):
        write(tmp_path, client=([1, 2, 1], [1, 1]))
        pq.write_table(pa.table(TEST), tmp_path / "test-2.parquet")
        assert message(tmp_path).startswith("test-2.parquet: has no column 'client'")


class TestValuesFailure:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"label": ([0, 1, 2], [0, None])}, "test.parquet: column 'label', row 1 is null"),
            ({"label": (["a", "c", "b"], ["a", None])}, "test.parquet: column 'label', row 1 is"),
            ({"label": ([0, 1, 2], [None] * 2)}, "test.parquet: column 'label', row 0 is null"),
            ({"label": ([0, 1, 2], [0, -1])}, "test.parquet: column 'label', row 1 is -1; labels"),
            (
                {"label": ([0, -2, 2], [0, 1])},
                "train.parquet: column 'label', row 1 is -2; labels must be text, or 0..C-1, C at"
                " most 1000000, or null or -1 where unknown",
            ),
            ({"label": ([None] * 3, [0, 1])}, "y_train has no label: all are -1"),
            (
                {"client": (["a", None, "b"], None)},
                "train.parquet: column 'client', row 1 is null",
            ),
            (
                {"label": ([0, 10**6, 2], [0, 1])},
                "train.parquet: column 'label', row 1 is 1000000; labels must be text, or 0..C-1, C"
                " at most 1000000",
            ),
            ({"label": ([0, 0, 0], [0, 0])}, "num_classes = 1; must be a whole number, 2.."),
            ({"client": ([1, 2, 3], [None, 1])}, "test.parquet: column 'client', row 0 is null"),
            (
                {"age": ([1, 2, 3], [None, 1])},
                "test.parquet: column 'age', row 0 is null",
            ),
            (
                {"height": ([1, 2, float("nan")], [1, 1])},
                "train.parquet: column 'height', row 2 has a value that is NaN or infinite in",
            ),
            (
                {"height": ([1, 1e300, 2], [1, 1])},
                "train.parquet: column 'height', row 1 has a value that is NaN or infinite in",
            ),
            (
                {"v": ([[1, 2], [3], [4, 5]], [[1, 2]] * 2)},
                "train.parquet: column 'v', row 1 has 1 numbers, but train.parquet: column 'v', row"
                " 0 has 2; all must have one length",
            ),
            (
                {"v": ([[1, 2]] * 3, [[1, 2], [1, 2, 3]])},
                "test.parquet: column 'v', row 1 has 3 numbers, but train.parquet: column 'v', row",
            ),
            ({"v": (EMPTY, EMPTY[:2])}, "train.parquet: column 'v', row 0 is an empty list"),
            (
                {"v": ([None, [1], [2]], [[1], [2]])},
                "train.parquet: column 'v', row 0 is null",
            ),
            (
                {"v": ([[1, 2], [1, 2], [3, None]], [[1, 2]] * 2)},
                "train.parquet: column 'v', row 2 has a null",
            ),
            (
                {"v": ([[1.0, 2.0]] * 3, [[1.0, 2.0], [float("nan"), 1.0]])},
                "test.parquet: column 'v', row 1 has a value that is NaN or infinite in float32",
            ),
            (
                {"image": (IMAGES[:3], [IMAGES[3], None])},
                "test.parquet: column 'image', row 1 is null",
            ),
            (
                {"image": ([{"bytes": i} for i in IMAGES[:3]], [{"bytes": IMAGES[0]}, None])},
                "test.parquet: column 'image', row 1 is null",
            ),
            (
                {
                    "image": (
                        [{"bytes": None}, *({"bytes": i} for i in IMAGES[:2])],
                        [{"bytes": b""}] * 2,
                    )
                },
                "train.parquet: column 'image', row 0 is null",
            ),
            (
                {"image": (IMAGES[:3], [IMAGES[3], IMAGES[4][:30]])},
                "test.parquet: column 'image', row 1: can't read the image: ",
            ),
            (
                {"image": (IMAGES[:3], [IMAGES[3], b"\x80\x04."])},
                "test.parquet: column 'image', row 1: can't read the image: it is none of PNG,",
            ),
            (
                {"image": (IMAGES[:3], [IMAGES[3], png(np.zeros((4, 5), np.uint8))])},
                "test.parquet: column 'image', row 1 has 4 x 5 pixels, but train.parquet: column"
                " 'image', row 0 2 x 3; all must have one size, or set data.size",
            ),
        ],
    )
    def test_one_line_says_where(self, tmp_path, changes, expected):
        assert message(write(tmp_path, **changes)).startswith(expected)

    @pytest.mark.parametrize("key", ["x", "label", "client"])
    def test_a_column_without_a_name(self, tmp_path, key):
        expected = rf"^data\.{key} = '': must be the name of a column, or not given$"
        with pytest.raises(DataError, match=expected):
            parquet(write(tmp_path), **{key: ""})

    @pytest.mark.parametrize(
        ("settings", "line"),
        [({"size": 4}, r"data\.size = 4"), ({"grey": True}, r"data\.grey = true")],
    )
    def test_numbers_are_no_images(self, tmp_path, settings, line):
        with pytest.raises(DataError, match=line + ": is for images, but the examples of parquet"):
            parquet(write(tmp_path), **settings)

    def test_a_size_out_of_range(self, tmp_path):
        with pytest.raises(DataError, match=r"^data\.size = -1: must be a whole number from 0 to"):
            parquet(write(tmp_path), size=-1)

"""Parquet files: tables, vectors and images, and whose they are."""

import io
import pickle
import tempfile
from datetime import date
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsim import registry
from fedsim.data.parquet import parquet
from tests.fedsim.data.test_folder import natural_clients_train_on_their_own

TRAIN = {"age": [1, 2, 3], "height": [0.5, -1.5, 2.5], "label": [0, 2, 1]}
TEST = {"age": [4, 5], "height": [3.5, 4.5], "label": [3, 0]}
X_TRAIN = [[1, 0.5], [2, -1.5], [3, 2.5]]
X_TEST = [[4, 3.5], [5, 4.5]]


def write(root, *, train=None, test=None, **changes):
    """Write train.parquet and test.parquet; a change is the column's values in both."""
    columns = {"train": dict(train or TRAIN), "test": dict(test or TEST)}
    for column, (in_train, in_test) in changes.items():
        for split, values in (("train", in_train), ("test", in_test)):
            if values is None:
                columns[split].pop(column, None)
            else:
                columns[split][column] = values
    for split, table in columns.items():
        pq.write_table(pa.table(table), root / f"{split}.parquet", row_group_size=2)
    return str(root)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class TestParquet:
    def test_a_table_in_a_folder(self, tmp_path):
        source = parquet(write(tmp_path))
        assert source.x_train.tolist() == X_TRAIN
        assert source.x_test.tolist() == X_TEST
        assert source.x_train.dtype == source.x_test.dtype == np.float32
        assert source.y_train.tolist() == [0, 2, 1]
        assert source.y_test.tolist() == [3, 0]
        assert source.num_classes == 4  # the largest label is in the test set
        assert source.name == f"parquet:{tmp_path}"
        assert source.group_train is None
        assert not source.flip
        assert parquet(str(tmp_path), flip=True).flip

    def test_one_file(self, tmp_path):
        rows = {key: [*TRAIN[key][:2], *TEST[key], TRAIN[key][2]] for key in TRAIN}
        split = ["train", "train", "test", "test", "train"]
        pq.write_table(pa.table({"split": split, **rows}), tmp_path / "all.parquet")
        source = parquet(str(tmp_path / "all.parquet"))
        assert source.x_train.tolist() == X_TRAIN
        assert source.x_test.tolist() == X_TEST
        assert source.y_train.tolist() == [0, 2, 1]
        assert source.y_test.tolist() == [3, 0]

    @given(cuts=st.lists(st.integers(0, 3), max_size=3), names=st.randoms())
    @settings(max_examples=20)
    def test_however_the_rows_lie_in_files(self, cuts, names):
        ends = [0, *sorted(cuts), 3]
        parts = list(enumerate(pairwise(ends)))
        names.shuffle(parts)
        with tempfile.TemporaryDirectory() as place:
            write(Path(place), client=(["b", "a", "b"], ["c", "a"]))
            whole = pq.read_table(Path(place) / "train.parquet")
            (Path(place) / "train.parquet").unlink()
            for number, (start, end) in parts:
                columns = names.sample(whole.column_names, 4)
                if number == 0:
                    columns = whole.column_names
                part = whole.slice(start, end - start).select(columns)
                pq.write_table(part, Path(place) / f"train-{number:05}-of-{len(parts):05}.parquet")
            source = parquet(place)
        assert source.x_train.tolist() == X_TRAIN
        assert source.y_train.tolist() == [0, 2, 1]
        assert source.group_train.tolist() == [1, 0, 1]
        assert source.group_test.tolist() == [2, 0]

    def test_other_files_of_a_folder_are_left_out(self, tmp_path):
        write(tmp_path)
        for name in ("validation.parquet", "train.csv", "README.md"):
            (tmp_path / name).write_text("x")
        assert len(parquet(str(tmp_path)).y_train) == 3

    def test_columns_that_are_no_numbers_are_left_out(self, tmp_path):
        place = write(
            tmp_path,
            name=(["x", "y", "z"], ["u", "v"]),
            day=([date(2020, 1, 1)] * 3, [date(2020, 1, 2)] * 2),
            __index_level_0__=([7, 8, 9], [5, 6]),
        )
        expected = r"train\.parquet: not among the features, .*: name \(string\), day \(date32.*\)$"
        with pytest.warns(UserWarning, match=expected):
            assert parquet(place).x_test.tolist() == X_TEST

    def test_all_kinds_of_numbers(self, tmp_path):
        place = write(
            tmp_path,
            age=([True, False, True], [False, True]),
            height=([Decimal("0.25"), Decimal("1"), Decimal("-3.5")], [Decimal("2"), Decimal("4")]),
            tiny=(pa.array([1, 2, 3], pa.uint8()), pa.array([4, 5], pa.uint8())),
            half=(np.array([0.5, 1, 2], np.float16), np.array([4, 8], np.float16)),
            code=(pa.array([5, 6, 5]).dictionary_encode(), pa.array([6, 6]).dictionary_encode()),
        )
        expected = [[1, 0.25, 1, 0.5, 5], [0, 1, 2, 1, 6], [1, -3.5, 3, 2, 5]]
        assert parquet(place).x_train.tolist() == expected

    @pytest.mark.parametrize(
        "kind",
        [
            pa.list_(pa.float64()),
            pa.large_list(pa.int16()),
            pa.list_(pa.float32(), 2),
        ],
    )
    def test_vectors(self, tmp_path, kind):
        train, test = [[1, 0], [-2, 0], [0, 3]], [[1, 1], [0, 7]]
        lists = (pa.array(train, kind), pa.array(test, kind))
        source = parquet(write(tmp_path, embedding=lists))
        assert source.x_train.tolist() == train
        assert source.x_test.tolist() == test
        assert source.x_train.dtype == np.float32

    def test_vectors_of_booleans(self, tmp_path):
        train, test = [[True, False], [False, False], [False, True]], [[True, True]] * 2
        assert parquet(write(tmp_path, seen=(train, test))).x_train.tolist() == train

    def test_which_of_several_columns_of_lists(self, tmp_path):
        one, two = ([[1], [2], [3]], [[4], [5]]), ([[6], [7], [8]], [[9], [0]])
        place = write(tmp_path, one=one, two=two)
        assert parquet(place, x="two").x_train.tolist() == two[0]
        assert parquet(write(tmp_path, one=one, img=two)).x_train.tolist() == two[0]

    @pytest.mark.parametrize("form", ["struct", "binary", "large_binary"])
    @pytest.mark.parametrize("column", ["image", "img", "photo"])
    def test_images(self, tmp_path, form, column):
        x = np.random.default_rng(0).integers(0, 256, (5, 4, 6), np.uint8)
        encoded = [png(image) for image in x]
        if form == "struct":
            values = [{"bytes": data, "path": "x.png"} for data in encoded]
        else:
            values = pa.array(encoded, getattr(pa, form)())
        place = write(tmp_path, **{column: (values[:3], values[3:])})
        source = parquet(place, x="photo" if column == "photo" else None)
        np.testing.assert_array_equal(source.x_train[:, 0], x[:3])
        np.testing.assert_array_equal(source.x_test[:, 0], x[3:])

    def test_grey_images_among_coloured_ones_get_three_channels(self, tmp_path):
        rng = np.random.default_rng(0)
        grey, colour = rng.integers(0, 256, (4, 6), np.uint8), rng.integers(0, 256, (4, 6, 3), "u1")
        place = write(tmp_path, image=([png(grey)] * 3, [png(grey), png(colour)]))
        source = parquet(place)
        np.testing.assert_array_equal(source.x_train[2], np.stack([grey] * 3))
        np.testing.assert_array_equal(source.x_test[1], np.moveaxis(colour, 2, 0))

    def test_images_are_resized_and_made_grey_as_in_folders(self, tmp_path):
        # Of 4 x 6 pixels the centre's 4 x 4 stay; colours of one value have it as their grey.
        values = np.arange(24, dtype=np.uint8).reshape(4, 6)
        grey, small = png(np.stack([values] * 3, 2)), png(np.full((1, 1, 3), 7, np.uint8))
        place = write(tmp_path, image=([grey] * 3, [grey, small]))
        source = parquet(place, size=4, grey=True)
        np.testing.assert_array_equal(source.x_train[2, 0], values[:, 1:5])
        np.testing.assert_array_equal(source.x_test[1], np.full((1, 4, 4), 7))

    def test_a_column_with_the_name_of_another_and_a_point(self, tmp_path):
        place = write(tmp_path, **{"label.old": (["x", "y", "z"], ["u", "v"])})
        with pytest.warns(UserWarning, match=r"not among the features, .*: label\.old \(string\)$"):
            assert parquet(place).x_train.tolist() == X_TRAIN

    def test_nothing_is_unpickled(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return Path.touch, (tmp_path / "sprung",)

        metadata = {
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Trap(), 0),
        }
        write(tmp_path)
        for split in ("train", "test"):
            file = tmp_path / f"{split}.parquet"
            table = pq.read_table(file)
            field = table.schema.field("age").with_metadata(metadata)
            pq.write_table(table.cast(table.schema.set(0, field)), file)
            assert b"ARROW:schema" in pq.read_metadata(file).metadata
        assert parquet(str(tmp_path)).x_train.tolist() == X_TRAIN
        assert not (tmp_path / "sprung").exists()


class TestLabels:
    @pytest.mark.parametrize(
        "kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"]
    )
    def test_texts_of_both_splits_are_sorted(self, tmp_path, kind):
        values = [["dog", "cat", "dog"], ["ape", "cat"]]
        arrays = [
            pa.array(part).dictionary_encode() if kind == "dictionary" else pa.array(part, kind)
            for part in values
        ]
        source = parquet(write(tmp_path, label=arrays))
        assert source.y_train.tolist() == [2, 1, 2]
        assert source.y_test.tolist() == [0, 1]
        assert source.num_classes == 3
        assert source.class_names == ("ape", "cat", "dog")

    def test_numbers_stay_as_they_are_and_need_no_names(self, tmp_path):
        source = parquet(write(tmp_path, label=([3, 7, 5], [5, 3])))
        assert source.y_train.tolist() == [3, 7, 5]
        assert source.class_names == ()

    def test_fine_labels_come_first(self, tmp_path):
        images = [png(np.full((2, 2), value, np.uint8)) for value in range(5)]
        place = write(tmp_path, image=(images[:3], images[3:]), fine_label=([5, 6, 7], [5, 6]))
        assert parquet(place).y_train.tolist() == [5, 6, 7]
        assert parquet(place, label="label").y_train.tolist() == [0, 2, 1]

    @pytest.mark.parametrize(
        ("label", "expected"),
        [
            (([2, None, 0], [1, 0]), [2, -1, 0]),
            (([2, -1, None], [1, 0]), [2, -1, -1]),
            (([2.0, None, 0.0], [1.0, 0.0]), [2, -1, 0]),  # as pandas writes them
            ((np.array([2.0, np.nan, 0.0]), [1, 0]), [2, -1, 0]),
            ((["cat", "", None], ["ape", "dog"]), [1, -1, -1]),
            ((["cat", None, None], ["ape", "dog"]), [1, -1, -1]),
        ],
    )
    def test_null_is_a_training_label_that_nobody_knows(self, tmp_path, label, expected):
        source = parquet(write(tmp_path, label=label))
        assert source.y_train.tolist() == expected
        assert source.num_classes == 3

    @pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.float64()])
    def test_a_file_may_have_none(self, tmp_path, kind):
        place = write(tmp_path, label=(["cat", "ape", "cat"], ["ape", "cat"]))
        nothing = pa.nulls(1, kind)
        without = pa.table({"age": [7], "height": [0.5], "label": nothing})
        pq.write_table(without, tmp_path / "train-0.parquet")
        source = parquet(place)
        assert source.y_train.tolist() == [-1, 1, 0, 1]
        assert source.x_train[0].tolist() == [7, 0.5]

    def test_another_column(self, tmp_path):
        source = parquet(write(tmp_path, kind=([1, 0, 1], [0, 1])), label="kind")
        assert source.y_train.tolist() == [1, 0, 1]
        # The column of the usual name is then one of the features.
        assert source.x_train.tolist() == [[1, 0.5, 0], [2, -1.5, 2], [3, 2.5, 1]]


class TestClients:
    def groups(self, place, **options):
        source = parquet(place, **options)
        assert source.x_train.tolist() == X_TRAIN
        return [
            None if group is None else group.tolist()
            for group in (source.group_train, source.group_test)
        ]

    def test_texts_in_sorted_order(self, tmp_path):
        place = write(tmp_path, client=(["b", "10", "9"], ["Z", "b"]))
        assert self.groups(place) == [[3, 0, 1], [2, 3]]
        assert parquet(place).client_names == ("10", "9", "Z", "b")

    @pytest.mark.parametrize(
        ("clients", "names"), [([205, 101, 205], ("101", "205")), ([1, 0, 1], ())]
    )
    def test_numbers_are_names_where_they_are_others(self, tmp_path, clients, names):
        source = parquet(write(tmp_path, client=(clients, None)))
        assert source.client_names == names

    def test_numbers_by_value(self, tmp_path):
        first = pa.array([10, 9, 2**63], pa.uint64())
        place = write(tmp_path, client=(first, pa.array([9, -1], pa.int8())))
        assert self.groups(place) == [[2, 1, 3], [1, 0]]

    def test_the_training_rows_alone(self, tmp_path):
        assert self.groups(write(tmp_path, client=([4, 7, 4], None))) == [[0, 1, 0], None]

    def test_another_column(self, tmp_path):
        place = write(tmp_path, writer=(["b", "a", "b"], ["a", "a"]))
        assert self.groups(place, client="writer") == [[1, 0, 1], [0, 0]]


def test_the_source_is_registered_and_needs_a_location():
    loader, arguments = registry.find_dataset("parquet:some/place")
    assert (loader, arguments) == (parquet, ("some/place",))
    assert set(registry.options(loader).model_fields) == {
        *("flip", "normalise", "size", "grey"),
        *("x", "label", "client"),
    }


def test_each_natural_client_trains_on_its_own_rows(tmp_path):
    table = {
        "split": ["train", "test", "train", "test", "train"],
        "writer": ["bo", "al", "al", "bo", "bo"],
        "x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 1.0]],
        "label": ["cat", "ape", "cat", "dog", "dog"],
    }
    pq.write_table(pa.table(table), tmp_path / "all.parquet")
    place = tmp_path / "all.parquet"
    natural_clients_train_on_their_own(source=f"parquet:{place}", client="writer")

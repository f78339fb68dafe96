"""Images of the hub, with a stand-in for the library ``datasets``."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from fedsim import registry
from fedsim.data.hub import hf
from fedsim.errors import DataError


class ImageFeature:
    pass


class ClassLabel:
    def __init__(self, num_classes, names=None):
        self.num_classes = num_classes
        self.names = names or [str(c) for c in range(num_classes)]  # as the library's


class Value:
    pass


class Split:
    """As a `datasets.Dataset`: features, and columns by name."""

    def __init__(self, features, **columns):
        self.features = features
        self.columns = columns

    def __getitem__(self, column):
        # Recent versions of the library give a column that is read as it is gone through.
        return iter(self.columns[column])

    def select_columns(self, column):
        for value in self.columns[column]:
            if isinstance(value, Exception):  # an image that can't be decoded
                raise value
            yield {column: value}


class DatasetsError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch):
    """Offer what it is called with as the only data set of the hub, of the name me/data."""

    def offer(splits):
        def load_dataset(path):
            if path != "me/data":
                raise DatasetsError(f"Dataset {path!r} doesn't exist on the Hub.\nAsk elsewhere.")
            return splits

        library = ModuleType("datasets")
        library.Image, library.ClassLabel = ImageFeature, ClassLabel
        library.load_dataset = load_dataset
        library.exceptions = ModuleType("datasets.exceptions")
        library.exceptions.DatasetsError = DatasetsError
        monkeypatch.setitem(sys.modules, "datasets", library)
        monkeypatch.setitem(sys.modules, "datasets.exceptions", library.exceptions)

    return offer


def pixels(count, *shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


def pictures(x):
    return [Image.fromarray(image) for image in x]


def splits(train, test, features=None, **columns):
    """Splits with the images ``train`` and ``test``."""
    features = features or {"img": ImageFeature(), "label": ClassLabel(4)}
    y = {len(part): np.arange(len(part)).tolist() for part in (train, test)}
    return {
        name: Split(features, img=part, label=y[len(part)], **columns)
        for name, part in (("train", train), ("test", test))
    }


def test_colour_images(hub):
    train, test = pixels(3, 4, 5, 3), pixels(2, 4, 5, 3)
    hub(splits(pictures(train), pictures(test)) | {"validation": None})
    source = hf("me/data")
    np.testing.assert_array_equal(source.x_train, np.moveaxis(train, 3, 1))
    np.testing.assert_array_equal(source.x_test, np.moveaxis(test, 3, 1))
    assert source.y_train.tolist() == [0, 1, 2]
    assert source.y_test.tolist() == [0, 1]
    assert source.num_classes == 4
    assert source.name == "hf:me/data"
    assert not source.flip
    assert hf("me/data", flip=True).flip


def test_grey_images(hub):
    train, test = pixels(3, 4, 5), pixels(2, 4, 5)
    hub(splits(pictures(train), pictures(test)))
    source = hf("me/data")
    np.testing.assert_array_equal(source.x_train, train[:, None])
    np.testing.assert_array_equal(source.x_test, test[:, None])


def test_grey_images_among_coloured_ones_get_three_channels(hub):
    train, test = pixels(3, 4, 5), pixels(2, 4, 5, 3)
    hub(splits(pictures(train), pictures(test)))
    source = hf("me/data")
    np.testing.assert_array_equal(source.x_train, np.repeat(train[:, None], 3, axis=1))
    np.testing.assert_array_equal(source.x_test, np.moveaxis(test, 3, 1))


def test_names_of_classes(hub):
    features = {"img": ImageFeature(), "label": ClassLabel(4, ["ape", "bee", "cat", "dog"])}
    hub(splits(pictures(pixels(3, 4, 4)), pictures(pixels(2, 4, 4)), features))
    assert hf("me/data").class_names == ("ape", "bee", "cat", "dog")
    hub(splits(pictures(pixels(3, 4, 4)), pictures(pixels(2, 4, 4))))
    assert hf("me/data").class_names == ()


def test_fine_labels_come_first(hub):
    image = ImageFeature()
    features = {"img": image, "coarse_label": ClassLabel(2), "fine_label": ClassLabel(5)}
    parts = splits(
        pictures(pixels(3, 4, 4)),
        pictures(pixels(3, 4, 4)),
        features,
        coarse_label=[0, 1, 0],
        fine_label=[4, 3, 2],
    )
    hub(parts)
    source = hf("me/data")
    assert source.y_train.tolist() == [4, 3, 2]
    assert source.num_classes == 5


def test_training_labels_may_be_missing(hub):
    parts = splits(pictures(pixels(3, 4, 4)), pictures(pixels(2, 4, 4)))
    parts["train"].columns["label"] = [3, None, -1]
    hub(parts)
    assert hf("me/data").y_train.tolist() == [3, -1, -1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "hf"])
def test_the_sources_are_registered_and_need_a_location(name):
    loader, arguments = registry.find_dataset(f"{name}:some/place")
    assert arguments == ("some/place",)
    assert set(registry.options(loader).model_fields) == ({"flip"} if name == "hf" else set())


class TestHfFailure:
    def message(self, name="me/data"):
        with pytest.raises(DataError, match=f"^hf:{name}: ") as error:
            hf(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_without_the_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert 'pip install "fedsim-flwr[hub]"' in self.message()

    def test_a_folder_that_only_has_its_name(self, monkeypatch):
        # A folder datasets/ in the working directory imports as an empty package.
        monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
        assert 'pip install "fedsim-flwr[hub]"' in self.message()

    def test_no_such_data_set(self, hub):
        hub({})
        assert "can't load it: Dataset 'you/none' doesn't exist" in self.message("you/none")

    def test_missing_split(self, hub):
        part = splits(pictures(pixels(2, 3, 3)), [])["train"]
        hub({"train": part, "validation": part})
        assert "has no split test; it has train, validation" in self.message()

    @pytest.mark.parametrize(
        ("features", "expected"),
        [
            ({"a": Value(), "b": ClassLabel(2)}, "no column of images; its columns are a (Value)"),
            ({"img": ImageFeature(), "y": Value()}, "no column of class labels; its columns are"),
            (
                {"img": ImageFeature(), "y": ClassLabel(2), "z": ClassLabel(3)},
                "several columns of class labels, y, z, and none of them is named fine_label",
            ),
            (
                {"left": ImageFeature(), "right": ImageFeature(), "y": ClassLabel(2)},
                "several columns of images, left, right, and none of them is named image or img",
            ),
        ],
    )
    def test_columns(self, hub, features, expected):
        hub(splits(pictures(pixels(2, 3, 3)), pictures(pixels(2, 3, 3)), features))
        assert expected in self.message()

    def test_a_column_that_only_the_training_set_has(self, hub):
        parts = splits(pictures(pixels(2, 3, 3)), pictures(pixels(2, 3, 3)))
        parts["test"] = SimpleNamespace(features={"img": ImageFeature()})
        hub(parts)
        assert "train has a column 'label', but test has none" in self.message()

    @pytest.mark.parametrize(
        ("odd", "expected"),
        [
            (Image.new("L", (5, 4)), "train: image 2 has 4 x 5 pixels, but train: image 0 3 x 3"),
            (Image.new("I;16", (3, 3)), "train: image 2 has the pixel mode I;16; allowed: 1, L"),
            (None, "train: image 2 has the pixel mode None"),
        ],
    )
    def test_odd_images(self, hub, odd, expected):
        hub(splits([*pictures(pixels(2, 3, 3)), odd], pictures(pixels(2, 3, 3))))
        assert expected in self.message()

    @pytest.mark.parametrize(
        "error",
        [
            UnidentifiedImageError("cannot identify image file"),
            OSError("image file is truncated"),
            SyntaxError("broken PNG file\nin many words"),
            Image.DecompressionBombError(),
        ],
    )
    def test_an_image_that_cannot_be_decoded(self, hub, error):
        hub(splits(pictures(pixels(2, 3, 3)), [*pictures(pixels(3, 3, 3)), error]))
        line = str(error).partition("\n")[0] or "DecompressionBombError"
        assert f"test: image 3 can't be decoded: {line}" in self.message()

    def test_empty_split(self, hub):
        hub(splits(pictures(pixels(2, 3, 3)), []))
        assert "test has no images" in self.message()

    @pytest.mark.parametrize("label", [-1, 4, None])
    def test_labels(self, hub, label):
        parts = splits(pictures(pixels(3, 3, 3)), pictures(pixels(2, 3, 3)))
        parts["test"].columns["label"] = [0, label]
        hub(parts)
        assert "y_test" in self.message()

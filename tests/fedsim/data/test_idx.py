import gzip
import struct

import numpy as np
import pytest

from fedsim.data.idx import FASHION_MNIST, fashion_mnist, idx
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


class TestIdx:
    @pytest.mark.parametrize("compress", [False, True])
    def test_reads_both_splits(self, tmp_path, compress):
        write_idx(tmp_path, compress=compress)
        source = idx(str(tmp_path))
        np.testing.assert_array_equal(source.x_train, IMAGES["train"][:, None])
        np.testing.assert_array_equal(source.y_train, LABELS["train"])
        np.testing.assert_array_equal(source.x_test, IMAGES["t10k"][:, None])
        np.testing.assert_array_equal(source.y_test, LABELS["t10k"])
        assert source.num_classes == 4
        assert source.x_train.flags.writeable
        assert not source.flip
        assert idx(str(tmp_path), flip=True).flip


class TestIdxFailure:
    def damage(self, folder, name, change):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DataError) as error:
            idx(str(folder))
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(
            DataError, match=r"no file .*none/train-images-idx3-ubyte, nor with \.gz"
        ):
            idx(str(tmp_path / "none"))

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


class TestFashionMnist:
    def test_loads(self):
        if not FASHION_MNIST.is_dir():
            pytest.skip(f"needs the Debian package dataset-fashion-mnist ({FASHION_MNIST})")
        source = fashion_mnist()
        assert source.x_train.shape == (60_000, 1, 28, 28)
        assert source.x_test.shape == (10_000, 1, 28, 28)
        assert np.bincount(source.y_train).tolist() == [6000] * 10
        assert np.bincount(source.y_test).tolist() == [1000] * 10
        # Mean and standard deviation as they are given everywhere: 0.2860 and 0.3530 of 255.
        mean, std = source.normalisation()
        np.testing.assert_allclose([mean[0] / 255, std[0] / 255], [0.2860, 0.3530], atol=5e-5)
        assert source.flip

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fedsim.data.idx.FASHION_MNIST", tmp_path / "none")
        with pytest.raises(DataError, match=r"dataset-fashion-mnist, or set .*idx:DIR"):
            fashion_mnist()

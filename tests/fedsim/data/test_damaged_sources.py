"""Files that can't be read: one line says which, and why."""

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedsim.data import sources
from fedsim.errors import DataError


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
        sources.npz(str(tmp_path / "odd.npz"))
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
        sources.npz(str(path))


@pytest.mark.parametrize("name", ["idx", "npz", "cifar10", "cifar100"])
class TestPlacesFailure:
    def message(self, name, location):
        with pytest.raises(DataError, match=f"^{name}:{location}: can't read {location}") as error:
            getattr(sources, name)(location)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_the_folder_of_nobody(self, name):
        assert "Could not determine home directory" in self.message(name, "~no_such_user/x")

    def test_a_name_that_is_too_long(self, name):
        assert "File name too long" in self.message(name, "a" * 300)

    def test_a_folder_that_is_closed(self, name, monkeypatch):
        def is_file(path):
            raise PermissionError(13, "Permission denied", str(path))

        # Nothing is closed to the user root, who may run this.
        monkeypatch.setattr(Path, "is_file", is_file)
        assert "Permission denied" in self.message(name, "closed/x")

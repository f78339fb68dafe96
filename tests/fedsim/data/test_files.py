"""Places that can't be read: one line says which, and why."""

from pathlib import Path

import pytest

from fedsim.data.idx import idx
from fedsim.data.npz import cifar10, cifar100, npz
from fedsim.errors import DataError


@pytest.mark.parametrize("load", [idx, npz, cifar10, cifar100])
class TestPlacesFailure:
    def message(self, load, location):
        expected = f"^{load.__name__}:{location}: can't read {location}"
        with pytest.raises(DataError, match=expected) as error:
            load(location)
        assert "\n" not in str(error.value)
        return str(error.value)

    def test_the_folder_of_nobody(self, load):
        assert "Could not determine home directory" in self.message(load, "~no_such_user/x")

    def test_a_name_that_is_too_long(self, load):
        assert "File name too long" in self.message(load, "a" * 300)

    def test_a_folder_that_is_closed(self, load, monkeypatch):
        def is_file(path):
            raise PermissionError(13, "Permission denied", str(path))

        # Nothing is closed to the user root, who may run this.
        monkeypatch.setattr(Path, "is_file", is_file)
        assert "Permission denied" in self.message(load, "closed/x")

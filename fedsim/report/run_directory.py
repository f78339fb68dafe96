"""The folder a run writes: readable at any time, complete up to the last finished round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.errors import EngineError


class RunDirectory:
    """A new folder for one run.

    ``experiment.toml``, ``run.json``, ``partition.csv``, ``rounds.csv``, ``clients.csv``,
    ``model.safetensors`` and ``figures/``. Rows reach the disk as each round ends.

    Parameters
    ----------
    path : Path
        The folder; made with its parents, and must be empty if it exists.

    Raises
    ------
    EngineError
        If the folder isn't empty or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing(path):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise EngineError(f"{path} exists and isn't an empty folder; choose another --out")
            path.mkdir(parents=True, exist_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        file = self.path / name
        with self._writing(file):
            part = file.with_name(f"{name}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(file)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV file, whole or not at all."""
        self.write_text(name, table.to_csv(index=False))

    def append(self, name: str, rows: pd.DataFrame) -> None:
        """Add rows to a CSV file; the first call writes the header."""
        file = self.path / name
        with self._writing(file), file.open("a", encoding="utf-8", newline="") as stream:
            stream.write(rows.to_csv(index=False, header=stream.tell() == 0))

    def write_model(self, arrays: dict[str, Any]) -> None:
        """Write ``model.safetensors`` from NumPy arrays by name."""
        from safetensors.numpy import save

        file = self.path / "model.safetensors"
        with self._writing(file):
            part = file.with_name("model.safetensors.part")
            part.write_bytes(save(arrays))
            part.replace(file)

    @contextmanager
    def _writing(self, file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EngineError(
                f"can't write {file}: {error.strerror or error}; what the finished rounds wrote "
                f"is in {self.path}"
            ) from None

"""The folder a run writes: readable at any time, complete up to the last finished round."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.errors import EngineError

CHECKPOINT = "checkpoint/latest.safetensors"
"""File in a run directory from which the run can go on."""


def is_new(path: Path) -> bool:
    """Tell whether a run may begin in a folder: there is none, or an empty one."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


class RunDirectory:
    """A folder for one run.

    ``experiment.toml``, ``run.json``, ``partition.csv``, ``rounds.csv``, ``clients.csv``,
    ``training.csv``, ``model.safetensors``, ``checkpoint/`` and ``figures/``. Rows reach the disk
    as each round ends.

    Parameters
    ----------
    path : Path
        The folder; made with its parents.
    resumed : bool
        Whether it is that of an earlier run; else it must be empty if it exists.

    Raises
    ------
    EngineError
        If the folder isn't empty or can't be written.
    """

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        self.path = path
        with self._writing(path):
            if not resumed and not is_new(path):
                raise EngineError(
                    f"{path} exists and isn't an empty folder; choose another --out, or --resume "
                    "the run in it"
                )
            path.mkdir(parents=True, exist_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        file = self.path / name
        part = file.with_name(f"{file.name}.part")
        with self._writing(file):
            file.parent.mkdir(exist_ok=True)
            try:
                part.write_bytes(content)
                part.replace(file)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

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

    def cut(self, name: str, rounds: int) -> pd.DataFrame:
        """Take the rows after a round out of a CSV file, and return the others.

        A row that was being written when the run ended is one of those after it.
        """
        file = self.path / name
        if not file.exists():
            return pd.DataFrame()
        with self._writing(file):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            rows = [row for row in lines[1:] if int(row.partition(",")[0]) <= rounds]
        except ValueError:
            raise EngineError(f"{file}: a row doesn't begin with the number of a round") from None
        if rows and not rows[-1].endswith("\n"):
            del rows[-1]
        text = "".join([*lines[:1], *rows])
        self.write_text(name, text)
        return pd.read_csv(io.StringIO(text))

    def write_model(self, arrays: dict[str, Any]) -> None:
        """Write ``model.safetensors`` from NumPy arrays by name."""
        from safetensors.numpy import save

        self.write_bytes("model.safetensors", save(arrays))

    @contextmanager
    def _writing(self, file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EngineError(
                f"can't write {file}: {error.strerror or error}; what the finished rounds wrote "
                f"is in {self.path}"
            ) from None

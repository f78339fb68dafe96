"""The folder a run writes: readable at any time, complete up to the last finished round."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedsim.errors import EngineError

if TYPE_CHECKING:
    from fedsim.config import Experiment

CHECKPOINT = "checkpoint/latest.safetensors"
"""File in a run directory from which the run can go on."""


_FIRST_FILES = {
    "experiment.toml",
    "partition.csv",
    "names.csv",
    "checkpoint",
    "run.json",
    "model.safetensors",
}
_OF_FIRST_ROUND = {
    CHECKPOINT,
    *("rounds.csv", "clients.csv", "training.csv", "metrics.csv"),
    *("state", "state/states.bin", "state/schema.json", "state/versions.npy"),
}


def is_new(path: Path) -> bool:
    """Tell whether a run may begin in a folder: there is none, or an empty one."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def lacks_checkpoint(path: Path) -> bool:
    """Tell whether a folder holds no more than a run that ended before its first checkpoint."""
    if not path.is_dir() or (path / CHECKPOINT).exists() or not _says_no_round(path):
        return False
    return {file.name.removesuffix(".part") for file in path.iterdir()} <= _FIRST_FILES


def lacks_finished_round(path: Path) -> bool:
    """Tell whether a folder holds no more than a run that ended before its first round did.

    Then nothing is lost with it.
    """
    if not (path / "run.json").is_file():  # perhaps a large folder of something else
        return False
    found = {file.relative_to(path).as_posix().removesuffix(".part") for file in path.rglob("*")}
    if not found <= _FIRST_FILES | _OF_FIRST_ROUND:
        return False
    checkpoint = path / CHECKPOINT
    from fedsim.engine.checkpoint import Checkpoint

    try:
        tables = [path / name for name in _OF_FIRST_ROUND & found if name.endswith(".csv")]
        has_rows = any(file.read_bytes().count(b"\n") > 1 for file in tables)
        began = checkpoint.exists() and Checkpoint.read(checkpoint).round > 0
        return not has_rows and _says_no_round(path) and not began
    except (OSError, EngineError):
        return False


def _says_no_round(path: Path) -> bool:
    """Tell whether there is a run.json by which no round has finished."""
    try:
        described = json.loads((path / "run.json").read_text(encoding="utf-8"))
        return bool(described["rounds_finished"] == 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_no_run(path: Path) -> None:
    """Raise `EngineError` if a folder is that of a run, whose files others must not replace."""
    if (path / "experiment.toml").exists():
        raise EngineError(f"{path} is the folder of a run; choose another --out")


class RunDirectory:
    """A folder for one run.

    ``experiment.toml``, ``run.json``, ``partition.csv``, ``names.csv`` where there are names,
    ``rounds.csv``, ``clients.csv``, ``training.csv``, ``metrics.csv``, ``model.safetensors``,
    ``checkpoint/`` and ``figures/``. Rows reach the disk as each round ends.

    Parameters
    ----------
    path : Path
        The folder; made with its parents.
    resumed : bool
        Whether it may be that of an earlier run; else it must be empty if it exists, or hold no
        more than a run of which no round finished, which is taken away.

    Raises
    ------
    EngineError
        If the folder isn't empty, can't be written or belongs to a run that is still going on.
    """

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        self.path = path
        locked = True
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise EngineError(
                f"can't write results to {path}: {error.strerror or error}; choose another --out"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise EngineError(f"another run is writing to {path}; choose another --out") from None
        except OSError:  # a file system without locks
            locked = False
        if not resumed:
            self._clear(locked)

    def _clear(self, locked: bool) -> None:
        """Make sure that the folder is empty; without a lock a run may be in its first round."""
        try:
            if not is_new(self.path) and not (locked and lacks_finished_round(self.path)):
                hint = ", or --resume the run in it" if (self.path / CHECKPOINT).exists() else ""
                raise EngineError(
                    f"{self.path} exists and isn't an empty folder; choose another --out{hint}"
                )
            with writing(self.path):
                for file in self.path.iterdir():
                    if file.is_dir():
                        shutil.rmtree(file)
                    else:
                        file.unlink()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let another run have the folder."""
        os.close(self._lock)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        write_whole(self.path / name, content)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a CSV file, whole or not at all."""
        self.write_text(name, table.to_csv(index=False))

    def write_partition(
        self, experiment: Experiment, partition: pd.DataFrame, names: pd.DataFrame
    ) -> None:
        """Write the experiment, who holds what by it, and names where there are some."""
        self.write_text("experiment.toml", experiment.to_toml())
        self.write_table("partition.csv", partition)
        if len(names):
            self.write_table("names.csv", names)

    def append(self, name: str, rows: pd.DataFrame) -> None:
        """Add rows to a CSV file; the first call writes the header."""
        file = self.path / name
        with writing(file), file.open("a", encoding="utf-8", newline="") as stream:
            stream.write(rows.to_csv(index=False, header=stream.tell() == 0))

    def append_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to a CSV file, as `append` does; where they are few, in less time."""
        file = self.path / name
        with writing(file), file.open("a", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, rows[0], lineterminator="\n")
            if stream.tell() == 0:
                table.writeheader()
            table.writerows(rows)

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        remove(self.path / name)

    def until(self, name: str, rounds: int) -> bytes:
        """Return the header of a CSV file and its rows up to a round; nothing if it has no row.

        A row that was being written when the run ended is one of those after it.
        """
        file = self.path / name
        if not file.exists():
            return b""
        try:
            lines = file.read_bytes().splitlines(keepends=True)
            filled = (line for line in lines[1:] if line.strip())
            rows = [row for row in filled if int(row.partition(b",")[0]) <= rounds]
        except OSError as error:
            raise EngineError(f"{file}: can't be read: {error.strerror or error}") from None
        except ValueError:
            raise EngineError(f"{file}: a row doesn't begin with the number of a round") from None
        if rows and not rows[-1].endswith(b"\n"):
            del rows[-1]
        return b"".join([*lines[:1], *rows]) if rows else b""

    def write_model(self, arrays: dict[str, Any]) -> None:
        """Write ``model.safetensors`` from NumPy arrays by name."""
        from fedsim.engine import arrays_file

        self.write_bytes("model.safetensors", arrays_file.to_bytes(arrays))


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all; its folder is made if it isn't there.

    Raises `EngineError` if that can't be done.
    """
    part = file.with_name(f"{file.name}.part")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def remove(file: Path) -> None:
    """Take a file away, if it is there; `EngineError` if that can't be done."""
    with writing(file):
        file.unlink(missing_ok=True)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn a full disk and its like into an `EngineError` that names the file."""
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"can't write {file}: {error.strerror or error}; what was written before is kept"
        ) from None

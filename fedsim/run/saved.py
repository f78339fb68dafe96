"""A run as its folder holds it: finished, stopped, or still going on."""

from __future__ import annotations

import csv
import io
import json
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError

from fedsim.errors import DataError
from fedsim.run import frames
from fedsim.run.client_scores import COUNTS, F1, GROUP_SCORES, ClientScores
from fedsim.run.directory import CHECKPOINT

if TYPE_CHECKING:
    from fedsim.engine.state import ClientStates
    from fedsim.models import Arrays

# What is read of a run's files.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "rounds.csv": (
        *("round", "generic_accuracy", "personal_accuracy", "train_loss"),
        *("seconds", "bytes_up", "bytes_down"),
    ),
    "clients.csv": ("round", "client", "view", "accuracy", *COUNTS, *GROUP_SCORES, F1),
    "training.csv": ("round",),
    "metrics.csv": ("round", "phase", "metric", "value"),
    "names.csv": ("kind", "number", "name"),
    "partition.csv": ("client", "class", "labelled", "unlabelled", "test"),
}
_WORDS = {
    "clients.csv": ("view",),
    "metrics.csv": ("phase", "metric"),
    "names.csv": ("kind", "name"),
}
"""The columns that aren't numbers."""
_SETTINGS = {
    "name": str,
    "data.source": str,
    "clients.count": int,
    "clients.partition": str,
    "model.name": str,
    "method.name": str,
    "training.rounds": int,
    "seed": int,
}
_DESCRIPTION = {
    "num_classes": int,
    "started": str,
    "seconds_setup": float,
    "seconds_per_round": dict,
    "device": str,
    "workers": int,
    "versions": dict,
    "hardware.cores": int,
    "hardware.memory_bytes": int,
    "hardware.system": str,
}


@dataclass(frozen=True)
class SavedRun:
    """What a run directory says of its run.

    Attributes
    ----------
    path : Path
        The run directory.
    settings : dict
        Its experiment.toml, with every default written out.
    description : dict
        Its run.json.
    rounds, clients, partition : DataFrame
        Its CSV files, up to the last finished round; without rows and columns where nobody was
        tested, or trained.
    """

    path: Path
    settings: dict[str, Any]
    description: dict[str, Any]
    rounds: pd.DataFrame
    clients: pd.DataFrame
    partition: pd.DataFrame

    @classmethod
    def read(cls, folder: Path | str) -> SavedRun:
        """Read a run directory.

        Raises
        ------
        DataError
            If it isn't one, no round has finished, or a file can't be read.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder")
        for name in ("experiment.toml", "run.json", "partition.csv"):
            if not (folder / name).is_file():
                raise DataError(f"{folder}: isn't the folder of a run, it has no {name}")
        settings = _parsed(folder / "experiment.toml", _SETTINGS)
        description = _parsed(folder / "run.json", _DESCRIPTION)
        if not all(isinstance(v, int | float) for v in description["seconds_per_round"].values()):
            raise DataError(f"{folder / 'run.json'}: seconds_per_round must hold numbers")
        rounds = _table(folder / "rounds.csv")
        if rounds.empty:
            raise DataError(f"{folder}: no round of this run has finished")
        partition = _table(folder / "partition.csv")
        if partition.empty:
            raise DataError(f"{folder / 'partition.csv'}: has no rows")
        clients = _table(folder / "clients.csv")
        _warn_of_loss(folder / "partition.csv", partition, description)
        _warn_of_loss(folder / "rounds.csv", rounds, description)
        _warn_of_loss(
            folder / "clients.csv", clients, description, missing_client_rows(rounds, clients)
        )
        return cls(
            path=folder,
            settings=settings,
            description=description,
            rounds=rounds,
            clients=_until(rounds, clients),
            partition=partition,
        )

    @property
    def name(self) -> str:
        """The experiment's name."""
        return str(self.settings["name"])

    @property
    def rounds_asked(self) -> int:
        """Of how many rounds the run was to be."""
        return int(self.settings["training"]["rounds"])

    @property
    def num_clients(self) -> int:
        """K."""
        return int(self.settings["clients"]["count"])

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.description["num_classes"])

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        """Training examples of each class over all clients, labelled or hidden, [C]."""
        train = self.partition["labelled"] + self.partition["unlabelled"]
        by_class = train.groupby(self.partition["class"]).sum()
        return by_class.reindex(range(self.num_classes), fill_value=0).to_numpy(dtype=np.int64)

    @cached_property
    def training(self) -> pd.DataFrame:
        """Its training.csv, as the other tables."""
        table = _table(self.path / "training.csv")
        _warn_of_loss(self.path / "training.csv", table, self.description)
        return _until(self.rounds, table)

    @cached_property
    def names(self) -> pd.DataFrame:
        """Its names.csv; empty where classes and clients are called by their numbers."""
        table = _table(self.path / "names.csv")
        _warn_of_loss(self.path / "names.csv", table, self.description)
        return table

    @cached_property
    def last_evaluated(self) -> pd.Series[float] | None:
        """The row of its last evaluated round; None where there was none."""
        done = frames.evaluated(self.rounds, frames.overall_columns(self.rounds).values())
        return done.iloc[-1] if len(done) else None

    @cached_property
    def client_scores(self) -> ClientScores | None:
        """Its clients' scores in the last evaluated round; None where none was tested."""
        if frames.last_round(self.clients).empty:
            return None
        try:
            return ClientScores.of(self.clients)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    @cached_property
    def arrays(self) -> Arrays:
        """The global model; that of the last checkpoint where the run was killed or goes on.

        Raises `DataError` if there is none.
        """
        from fedsim.engine import arrays_file

        if self.description.get("finished") is None and (self.path / CHECKPOINT).exists():
            from fedsim.engine.checkpoint import Checkpoint
            from fedsim.engine.flower import from_record

            return from_record(Checkpoint.read(self.path / CHECKPOINT).arrays)
        file = self.path / "model.safetensors"
        if not file.exists():
            raise DataError(f"{self.path}: holds no model.safetensors")
        try:
            arrays, _ = arrays_file.read(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{file}: can't be read: {error}") from None
        return arrays

    @cached_property
    def states(self) -> ClientStates | None:
        """What the clients keep to themselves; None where that is nothing.

        Raises `DataError` if it is lost.
        """
        from fedsim.engine.state import VERSIONS, ClientStates

        file = self.path / "state" / VERSIONS
        if file.exists():
            return ClientStates.open(file.parent)
        if kept := self._num_kept():
            raise DataError(f"{file}: is missing, though {kept:,} clients kept something")
        return None

    def _num_kept(self) -> int:
        """Return how many clients had a state at the last checkpoint; 0 where there is none."""
        from fedsim.engine.checkpoint import Checkpoint

        file = self.path / CHECKPOINT
        return int((Checkpoint.read(file).versions >= 0).sum()) if file.exists() else 0


def _parsed(file: Path, needed: Mapping[str, type]) -> dict[str, Any]:
    """Read a file of settings that has some keys, ``table.key`` each, of certain types."""
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: can't be read: {error}") from None
    for key, kind in needed.items():
        found = content
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not isinstance(found, kind):
            raise DataError(
                f"{file}: has no {key} that is of type {kind.__name__}; was it written by another "
                "version of fedsim?"
            )
    assert isinstance(content, dict)
    return content


def _until(rounds: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return a table without the rows of a round that hasn't finished."""
    return table if table.empty else table[table["round"] <= rounds["round"].max()]


def _table(file: Path) -> pd.DataFrame:
    """Read a CSV file, without a row that isn't whole; without columns if it isn't there."""
    if not file.exists():
        return pd.DataFrame()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: can't be read: {error}") from None
    return parsed_table(file, content[: content.rfind(b"\n") + 1])


def parsed_table(file: Path, content: bytes) -> pd.DataFrame:
    """Return a table of a run, given what its CSV file holds: whole rows only.

    Raises
    ------
    DataError
        If it can't be read, a row is cut short, a column is missing, or has a word among its
        numbers.
    """
    words = _WORDS.get(file.name, ())
    table = pd.DataFrame()
    try:
        if content.find(b"\n") + 1 < len(content):
            # In names, what is empty, or NA, is a word like others.
            gaps = file.name != "names.csv"
            dtypes = dict.fromkeys(words, str)
            table = pd.read_csv(io.BytesIO(content), dtype=dtypes, na_filter=gaps)
    except ValueError as error:  # pandas' own are ValueErrors, too
        raise DataError(f"{file}: can't be read: {error}") from None
    if not table.empty:
        # What a row lacks pandas takes for empty. To count all fields takes as long as to read.
        if table.iloc[:, -1].isin([np.nan, ""]).any():
            _check_lengths(file, content)
        frames.require(table, _COLUMNS[file.name], str(file))
    for name, column in table.items():
        if name not in words and not pd.api.types.is_numeric_dtype(column):
            raise DataError(f"{file}: column {name!r} has an entry that is no number")
    return table


def _check_lengths(file: Path, content: bytes) -> None:
    """Raise `DataError` if a row has fewer fields than the header; an empty line is no row."""
    rows = csv.reader(io.StringIO(content.decode(), newline=""))
    width = len(next(rows))
    for row in rows:
        if row and len(row) < width:
            raise DataError(
                f"{file}: line {rows.line_num} has {len(row)} fields, the header has {width}"
            )


def missing_client_rows(rounds: pd.DataFrame, clients: pd.DataFrame) -> str:
    """Say so where a round has a personal accuracy, but no client's; else return ""."""
    if rounds.empty:
        return ""
    tested = rounds.loc[rounds["personal_accuracy"].notna(), "round"].tolist()
    known = set() if clients.empty else set(clients["round"].tolist())
    lacking = [number for number in tested if number not in known]
    if not lacking:
        return ""
    more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
    return f"has no row of round {lacking[0]}{more}, in which clients were tested"


def _warn_of_loss(
    file: Path, table: pd.DataFrame, description: Mapping[str, Any], problem: str = ""
) -> None:
    """Warn of a table with fewer or more rows than run.json knows of, or with another problem."""
    counts = description.get("rows")
    # An older fedsim counts the rounds only, or not the rows of partition.csv and names.csv.
    known = {"rounds.csv": description.get("rounds_finished")}
    known |= counts if isinstance(counts, dict) else {}
    written = known.get(file.name)
    shown = "the rest of the run is shown"
    if isinstance(written, int) and len(table) < written:
        problem = f"has {len(table):,} of the {written:,} rows that the run wrote"
    # Of a run that goes on, or was killed, the file may well be ahead.
    elif isinstance(written, int) and len(table) > written and description.get("finished"):
        problem = f"has {len(table):,} rows, of which the run wrote {written:,}"
        shown = "all are shown"
    if problem:
        problem = problem if file.exists() else "is missing"
        warnings.warn(f"{file}: {problem}; {shown}", stacklevel=3)

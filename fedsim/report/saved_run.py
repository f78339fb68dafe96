"""A run as its folder holds it: finished, stopped, or still going on."""

from __future__ import annotations

import io
import json
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError

from fedsim.errors import DataError
from fedsim.report import _frames
from fedsim.report.run_directory import CHECKPOINT
from fedsim.report.standing import COUNTS, F1, GROUP_SCORES, Standing

if TYPE_CHECKING:
    from fedsim.engine.state import ClientStates
    from fedsim.models import Arrays

# What is read of a run's files.
_ROUNDS = (
    *("round", "generic_accuracy", "personal_accuracy", "train_loss"),
    *("seconds", "bytes_up", "bytes_down"),
)
_CLIENTS = ("round", "client", "view", "accuracy", *COUNTS, *GROUP_SCORES, F1)
_NAMES = ("kind", "number", "name")
_PARTITION = ("client", "class", "labelled", "unlabelled", "test")
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


class NoRoundError(DataError):
    """A run of which no round has finished."""


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
        rounds = _table(folder / "rounds.csv", _ROUNDS)
        if rounds.empty:
            raise NoRoundError(f"{folder}: no round of this run has finished")
        partition = _table(folder / "partition.csv", _PARTITION)
        if partition.empty:
            raise DataError(f"{folder / 'partition.csv'}: has no rows")
        return cls(
            path=folder,
            settings=settings,
            description=description,
            rounds=rounds,
            clients=_until(rounds, _table(folder / "clients.csv", _CLIENTS, but={"view"})),
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
        return _until(self.rounds, _table(self.path / "training.csv", ("round",)))

    @cached_property
    def names(self) -> pd.DataFrame:
        """Its names.csv; empty where classes and clients are called by their numbers."""
        return _table(self.path / "names.csv", _NAMES, but={"kind", "name"}, gaps=False)

    @cached_property
    def tested(self) -> pd.Series[float] | None:
        """The row of its last evaluated round; None where there was none."""
        done = _frames.evaluated(self.rounds, _frames.overall_columns(self.rounds).values())
        return done.iloc[-1] if len(done) else None

    @cached_property
    def standing(self) -> Standing | None:
        """Where its clients stand after the last evaluated round; None where none was tested."""
        if _frames.last_round(self.clients).empty:
            return None
        try:
            return Standing.of(self.clients)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    @cached_property
    def arrays(self) -> Arrays:
        """The global model; that of the last checkpoint where the run was killed or goes on."""
        from fedsim.engine import arrays_file

        if self.description.get("finished") is None and (self.path / CHECKPOINT).exists():
            from fedsim.engine.checkpoint import Checkpoint
            from fedsim.engine.flower import from_record

            return from_record(Checkpoint.read(self.path / CHECKPOINT).arrays)
        file = self.path / "model.safetensors"
        if not file.exists():
            return {}
        try:
            arrays, _ = arrays_file.read(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{file}: can't be read: {error}") from None
        return arrays

    @cached_property
    def states(self) -> ClientStates | None:
        """What the clients keep to themselves; None where that is nothing."""
        from fedsim.engine.state import VERSIONS, ClientStates

        folder = self.path / "state"
        return ClientStates.open(folder) if (folder / VERSIONS).exists() else None


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


def _table(
    file: Path, needed: Iterable[str], but: Collection[str] = (), *, gaps: bool = True
) -> pd.DataFrame:
    """Read a CSV file of numbers, ``but`` some columns, without a row that isn't whole.

    ``gaps`` says whether what is empty, or NA, is missing; if not, it is a word like others.
    """
    if not file.exists():
        return pd.DataFrame()
    try:
        content = file.read_bytes()
        header, rows = content.find(b"\n") + 1, content.rfind(b"\n") + 1
        table = pd.DataFrame()
        if rows > header:
            words = dict.fromkeys(but, str)
            table = pd.read_csv(io.BytesIO(content[:rows]), dtype=words, na_filter=gaps)
    except (OSError, ValueError) as error:  # pandas' own are ValueErrors, too
        raise DataError(f"{file}: can't be read: {error}") from None
    if not table.empty:
        _frames.require(table, needed, str(file))
    for name, column in table.items():
        if name not in but and not pd.api.types.is_numeric_dtype(column):
            raise DataError(f"{file}: column {name!r} has an entry that is no number")
    return table

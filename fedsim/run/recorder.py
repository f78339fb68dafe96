"""Keeps what a run gives, and writes it as the rounds end."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedsim.config import Experiment
from fedsim.errors import EngineError
from fedsim.hardware import num_cores
from fedsim.run.directory import CHECKPOINT, RunDirectory
from fedsim.run.result import Result
from fedsim.run.resume import changed_modules, user_module_digests
from fedsim.run.saved import SavedRun, missing_client_rows, parsed_table

if TYPE_CHECKING:
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import Strategy

    from fedsim.engine.checkpoint import Checkpoint
    from fedsim.engine.loop import Round
    from fedsim.engine.state import ClientStates
    from fedsim.engine.worker import Task
    from fedsim.models import Arrays

CHECKPOINT_SPACING = 20
"""A checkpoint is written at most every so many times as long as writing the last one took."""


class Recorder:
    """Keeps a run's frames and, where a folder is given, writes them as the rounds end."""

    def __init__(
        self,
        experiment: Experiment,
        task: Task,
        workers: int,
        out: Path | str | None,
        resume: bool = False,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.setup_seconds = 0.0
        self._workers = workers
        self._device = task.device
        self._experiment = experiment
        self._federation = federation = task.federation
        self._partition = federation.table()
        self._names = federation.names()
        self._rounds: list[dict[str, Any]] = []
        self._clients: list[pd.DataFrame] = []
        self._training: list[dict[str, list[Any]]] = []
        self._training_columns: list[str] = []
        self._metrics: list[dict[str, Any]] = []
        self._rows = {"clients.csv": 0, "training.csv": 0, "metrics.csv": 0}
        self._seconds: dict[str, float] = {}
        self._own_parts = user_module_digests(experiment) if out is not None else {}
        self._earlier_parts: list[dict[str, Any]] = []
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._resumed_after: list[int] = []
        self._next_checkpoint = 0.0
        self._folder: RunDirectory | None = None
        if out is not None:
            from fedsim.engine.checkpoint import digest

            self._inputs = {
                "dtype": federation.source.x_train.dtype.name,
                "shape": list(federation.source.x_train.shape[1:]),
                "mean": task.statistics.mean.tolist(),
                "std": task.statistics.std.tolist(),
            }
            self._digest = digest(federation)
            self._folder = RunDirectory(Path(out), resumed=resume)
            if checkpoint is not None:
                try:
                    self._check_last(checkpoint, self._folder)
                    self._take_up(checkpoint, self._folder)
                except BaseException:
                    self.release()
                    raise

    def _check_last(self, checkpoint: Checkpoint, folder: RunDirectory) -> None:
        """Raise `EngineError` if another process has gone on with the run since it was read."""
        from fedsim.engine.checkpoint import Checkpoint as Saved

        now = Saved.read(folder.path / CHECKPOINT).round
        if now != checkpoint.round:
            raise EngineError(
                f"the run in {folder.path} has gone on from round {checkpoint.round} to {now} "
                "meanwhile; the same command goes on from there"
            )

    def _take_up(self, checkpoint: Checkpoint, folder: RunDirectory) -> None:
        """Go on with the tables and sums of an earlier run, as they were at its checkpoint."""
        from fedsim.engine.checkpoint import has_data

        if not has_data(checkpoint, self._federation, self._digest):
            raise EngineError(
                f"the clients' data aren't those with which the run in {folder.path} began: has "
                f"data.source = {self._experiment.data.source!r} changed?"
            )
        kept = {name: folder.until(name, checkpoint.round) for name in ("rounds.csv", *self._rows)}
        # All is checked before a round is trained, or a file changed.
        tables = {name: parsed_table(folder.path / name, rows) for name, rows in kept.items()}
        rounds = tables["rounds.csv"]
        if rounds.get("round", pd.Series()).tolist() != [*range(1, checkpoint.round + 1)]:
            raise EngineError(
                f"{folder.path / 'rounds.csv'} has {len(rounds)} rows, not one for each of the "
                f"{checkpoint.round} rounds that the checkpoint has seen"
            )
        self._rows = {name: len(tables[name]) for name in self._rows}
        for name, written in checkpoint.record.get("rows", {}).items():
            if self._rows[name] != written:
                raise EngineError(
                    f"{folder.path / name} has {self._rows[name]} rows of the first "
                    f"{checkpoint.round} rounds, of which the run wrote {written}"
                )
        # Of an older checkpoint, which counts no rows, this is all that tells.
        if problem := missing_client_rows(rounds, tables["clients.csv"]):
            raise EngineError(f"{folder.path / 'clients.csv'} {problem}")
        for name, rows in kept.items():
            if rows:
                folder.write_bytes(name, rows)
            else:  # the header may not be whole either; the next row brings another
                folder.remove(name)
        self._rounds = _records(rounds)
        if self._rows["clients.csv"]:
            self._clients = [tables["clients.csv"]]
        training = tables["training.csv"]
        if not training.empty:
            self._training = [{str(name): list(column) for name, column in training.items()}]
        self._training_columns = list(training.columns)
        self._metrics = _records(tables["metrics.csv"])
        self._seconds = checkpoint.record["seconds"]
        self._started = checkpoint.record["started"]
        self._resumed_after = [*checkpoint.record["resumed_after"], checkpoint.round]
        self._earlier_parts = checkpoint.record.get("earlier_parts", [])
        before = checkpoint.record.get("own_parts", self._own_parts)  # an older fedsim wrote none
        if changed_modules(before, self._own_parts) and checkpoint.round:
            earlier = {"until_round": checkpoint.round, "own_parts": before}
            self._earlier_parts = [*self._earlier_parts, earlier]

    def begin(self, arrays: ArrayRecord, strategy: Strategy, states: ClientStates) -> None:
        """Write what is known before the first round, or the next one of a resumed run."""
        if self._folder is not None:
            # First what says how far the run is: a folder without it isn't begun anew.
            self._folder.write_json("run.json", self._description(finished=None))
            self._folder.write_partition(self._experiment, self._partition, self._names)
            # That of a run which goes on would be taken for the new one's.
            self._folder.remove("report.html")
            if not self._rounds:
                self._save(0, arrays, strategy, states)

    def release(self) -> None:
        """Let another run have the folder."""
        if self._folder is not None:
            self._folder.release()

    def _save(
        self, round: int, arrays: ArrayRecord, strategy: Strategy, states: ClientStates
    ) -> None:
        """Write a checkpoint after a round, 0 before the first."""
        assert self._folder is not None
        from fedsim.engine.checkpoint import Checkpoint, attributes

        begun = time.perf_counter()
        checkpoint = Checkpoint(
            round=round,
            arrays=arrays,
            strategy=attributes(strategy),
            versions=states.versions,
            data=self._digest,
            record={
                "seconds": self._seconds,
                "started": self._started,
                "resumed_after": self._resumed_after,
                "rows": self._rows,
                "own_parts": self._own_parts,
                "earlier_parts": self._earlier_parts,
            },
        )
        self._folder.write_bytes(CHECKPOINT, checkpoint.to_bytes())
        states.retain()
        now = time.perf_counter()
        self._next_checkpoint = now + CHECKPOINT_SPACING * (now - begun)

    def add(self, finished: Round, strategy: Strategy, states: ClientStates) -> None:
        """Record a finished round, after which strategy and clients carry on what they have."""
        begun = time.perf_counter()
        row, clients = finished.row, finished.clients
        self._rounds.append(row)
        if finished.training:
            self._training.append(finished.training)
            self._rows["training.csv"] += len(next(iter(finished.training.values())))
            self._write_training(finished.training)
        rows = None if clients is None or clients.empty else self._client_rows(row, clients)
        if rows is not None:
            self._clients.append(rows)
            self._rows["clients.csv"] += len(rows)
        self._metrics += finished.metrics
        self._rows["metrics.csv"] += len(finished.metrics)
        if self._folder is not None:
            if rows is not None:
                self._folder.append("clients.csv", rows)
            if finished.metrics:
                self._folder.append_rows("metrics.csv", finished.metrics)
            # The round's own row comes last: whoever finds it finds all that belongs to it.
            self._folder.append("rounds.csv", pd.DataFrame([row]))
        for part, spent in finished.seconds.items():
            self._seconds[part] = self._seconds.get(part, 0.0) + spent
        due = time.perf_counter() >= self._next_checkpoint
        last = row["round"] == self._experiment.training.rounds
        if self._folder is not None and (due or last):
            self._save(row["round"], finished.arrays, strategy, states)
        spent = time.perf_counter() - begun
        self._seconds["write"] = self._seconds.get("write", 0.0) + spent

    def _write_training(self, columns: dict[str, list[Any]]) -> None:
        """Add rows to training.csv; a method may have more to say after its warm-up."""
        if self._folder is None:
            return
        if columns.keys() <= set(self._training_columns):
            frame = pd.DataFrame(columns, columns=self._training_columns)
            self._folder.append("training.csv", frame)
            return
        table = self._whole_training()
        self._folder.write_table("training.csv", table)
        self._training_columns = list(table.columns)

    def _whole_training(self) -> pd.DataFrame:
        # One frame a round, made only here, would be a twentieth of a round without training.
        frames = [pd.DataFrame(columns) for columns in self._training]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _client_rows(self, row: dict[str, Any], clients: pd.DataFrame) -> pd.DataFrame:
        index = clients["client"].to_numpy()
        frame = clients.copy()
        frame.insert(0, "round", row["round"])
        frame.insert(3, "num_train", self._federation.num_train(index))
        frame.insert(4, "num_labelled", self._federation.num_labelled[index])
        return frame

    def close(self, arrays: Arrays) -> None:
        """Write what is only known at the end, be it early or not."""
        if self._folder is not None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._folder.write_model(arrays)
            # Last: that the run has finished says whose model it is.
            self._folder.write_json("run.json", self._description(finished=now))

    def result(self, arrays: Arrays) -> Result:
        """Return the frames; of a run with a folder, draw the figures and write the report."""
        if self._folder is not None:
            path = self._folder.path
            try:
                from fedsim.report.report import write_report
            except EngineError as error:
                hint = f"the run's results are in {path}; once that is mended, draw its report by"
                raise EngineError(f"{error}; {hint} `fedsim report {path}`") from None
            write_report(SavedRun.read(path))
        return Result(
            experiment=self._experiment,
            rounds=pd.DataFrame(self._rounds),
            clients=pd.concat(self._clients, ignore_index=True)
            if self._clients
            else pd.DataFrame(),
            training=self._whole_training(),
            metrics=pd.DataFrame(self._metrics),
            partition=self._partition,
            names=self._names,
            arrays=arrays,
            path=self._folder.path if self._folder is not None else None,
        )

    def _description(self, finished: str | None) -> dict[str, Any]:
        rounds = len(self._rounds)
        mean = {part: spent / rounds for part, spent in sorted(self._seconds.items())}
        return {
            "started": self._started,
            "resumed_after": self._resumed_after,
            "finished": finished,
            "rounds_finished": rounds,
            "rows": {
                **self._rows,
                "partition.csv": len(self._partition),
                "names.csv": len(self._names),
            },
            "rounds_asked": self._experiment.training.rounds,
            "num_classes": self._federation.source.num_classes,
            "seconds_setup": self.setup_seconds,
            "seconds_per_round": {"total": sum(mean.values()), **mean},
            "bytes_up": sum(row["bytes_up"] for row in self._rounds),
            "bytes_down": sum(row["bytes_down"] for row in self._rounds),
            "workers": self._workers,
            "device": _device_name(self._device),
            "versions": _versions(),
            "commit": _commit(),
            "own_parts": self._own_parts,
            "earlier_parts": self._earlier_parts,
            "hardware": {
                "machine": platform.machine(),
                "system": platform.platform(),
                "cores": num_cores(),
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            },
            # (x - mean) / std of each channel or feature; last, for these may be thousands.
            "inputs": self._inputs,
        }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _device_name(device: str) -> str:
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name(device)


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that there are: not all runs need Ray."""
    found = {"python": platform.python_version()}
    for name in ("fedsim-flwr", "flwr", "ray", "torch", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit() -> str | None:
    """Return the commit of the checkout that fedsim runs from, if it is one."""
    home = Path(__file__).resolve().parents[2]
    try:
        # Installed inside somebody's project, git would answer for that project.
        if Path(_git(home, "rev-parse", "--show-toplevel")).resolve() != home:
            return None
        return _git(home, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()

"""From an experiment to its result."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedsim import registry
from fedsim.config import Experiment, cohort_size, find_update
from fedsim.data.federation import Federation, federate
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.errors import ConfigError, DataError
from fedsim.report.run_directory import RunDirectory
from fedsim.rng import generator

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from fedsim.engine.grid import SimulatedGrid
    from fedsim.engine.loop import Round
    from fedsim.engine.worker import Arrays, Task
    from fedsim.models import Model

VIEW = "generic"
"""The view of clients.csv: every client tests the one global model."""


@dataclass(frozen=True)
class Result:
    """What a run gave; the frames are those of the run directory's CSV files.

    Attributes
    ----------
    experiment : Experiment
        What was run.
    rounds : pandas.DataFrame
        A row a round.
    clients : pandas.DataFrame
        A row for each client, evaluated round and view.
    training : pandas.DataFrame
        A row for each client that trained and round: examples, loss, and the method's numbers.
    partition : pandas.DataFrame
        A row for each client and class it holds: labelled, unlabelled and test examples.
    arrays : dict of str to ndarray
        The global model after the last finished round.
    path : Path or None
        The run directory, if one was asked for.
    """

    experiment: Experiment
    rounds: pd.DataFrame
    clients: pd.DataFrame
    training: pd.DataFrame
    partition: pd.DataFrame
    arrays: Arrays = field(repr=False)
    path: Path | None


def load_source(experiment: Experiment) -> Source:
    """Read the experiment's examples."""
    loader, arguments = registry.find_dataset(experiment.data.source)
    source = loader(*arguments, **experiment.data.options)
    if not isinstance(source, Source):
        raise DataError(
            f"data.source = {experiment.data.source!r}: the function must return a "
            f"fedsim.data.source.Source, not {type(source).__name__}"
        )
    return source


def load_federation(experiment: Experiment) -> Federation:
    """Read the experiment's examples and deal them out to its clients."""
    clients = experiment.clients
    return federate(
        load_source(experiment),
        num_clients=clients.count,
        partition=registry.find("partition", clients.partition),
        options=clients.options,
        imbalance=experiment.data.imbalance,
        profile=experiment.data.profile,
        labelled=clients.labelled,
        unlabelled_clients=clients.unlabelled_clients,
        label_each_class=clients.label_each_class,
        min_examples=clients.min_examples,
        seed=experiment.seed,
    )


def simulate(
    experiment: Experiment,
    *,
    out: Path | str | None = None,
    observer: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Run an experiment.

    Parameters
    ----------
    experiment : Experiment
        What to run.
    out : Path or str, optional
        Folder to write the run to; new or empty. By default nothing is written.
    observer : callable, optional
        Called with each finished round's row of ``rounds.csv``.

    Returns
    -------
    Result
        Frames and the final model.

    Raises
    ------
    fedsim.errors.UserError
        If the experiment can't be run as it stands.

    Examples
    --------
    >>> result = simulate(Experiment(
    ...     clients={"count": 4}, model={"name": "linear"}, training={"rounds": 2},
    ...     engine={"backend": "inline"},
    ... ))
    >>> result.rounds["round"].tolist(), len(result.clients)
    ([1, 2], 8)
    """
    from fedsim.engine import flower
    from fedsim.engine.loop import run_rounds

    started = time.perf_counter()
    federation = load_federation(experiment)
    strategy = make_strategy(experiment)
    task = make_task(experiment, federation)
    initial = initial_arrays(task)
    _warn_of_running_statistics(experiment, strategy, initial)
    arrays = flower.to_record(initial)
    recorder = _Recorder(experiment, federation, out)
    grid = make_grid(experiment, task)
    recorder.setup_seconds = time.perf_counter() - started
    try:
        with _noted_interrupts() as interrupted:
            for finished in run_rounds(
                strategy,
                grid,
                arrays,
                rounds=experiment.training.rounds,
                evaluate_every=experiment.evaluation.every,
                seed=experiment.seed,
            ):
                arrays = finished.arrays
                recorder.add(finished)
                if observer is not None:
                    observer(finished.row)
                if interrupted.is_set():
                    raise KeyboardInterrupt
    finally:
        # Also after Ctrl-C or an error: the workers go, what the finished rounds gave stays.
        grid.close()
        recorder.close(flower.from_record(arrays))
    return recorder.result(flower.from_record(arrays))


@contextmanager
def _noted_interrupts() -> Iterator[threading.Event]:
    """Note every Ctrl-C, which raises KeyboardInterrupt as usual.

    Python drops the exception where the signal arrives inside a destructor or a callback, and
    Ray has many of both; the note lets the round loop stop all the same.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread gets signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def make_strategy(experiment: Experiment) -> Strategy:
    """Return the server's strategy, with the experiment's hyperparameters and participation."""
    from flwr.serverapp.strategy import Strategy

    from fedsim.engine import flower

    name = experiment.method.name
    make = registry.find("method", name)
    count = experiment.clients.count
    train = cohort_size(experiment.training.participation, count)
    evaluate = cohort_size(experiment.evaluation.participation, count)
    # Flower rounds a share down: the minimum makes the cohort exact.
    plumbing = {
        "fraction_train": train / count,
        "min_train_nodes": train,
        "fraction_evaluate": evaluate / count,
        "min_evaluate_nodes": evaluate,
        "min_available_nodes": 1,
        "seed": experiment.seed,
    }
    settings = experiment.method.options_of(make)
    settings |= {key: value for key, value in plumbing.items() if registry.accepts(make, key)}
    try:
        with flower.quiet_log():
            strategy = make(**settings)
    except ValueError as error:
        raise ConfigError(f"method.name = {name!r}: {error}") from None
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"method.name = {name!r}: isn't a flwr.serverapp.strategy.Strategy")
    return strategy


def make_task(experiment: Experiment, federation: Federation) -> Task:
    """Return what the workers need to know."""
    from fedsim.engine.local import LocalTraining
    from fedsim.engine.update import ClientUpdate, LocalSGD
    from fedsim.engine.worker import Task

    method = experiment.method
    make_update = find_update(method.name, method.client) or LocalSGD
    update = make_update(**method.options_of(make_update))
    if not isinstance(update, ClientUpdate):
        raise ConfigError(
            f"method.client = {method.client!r}: isn't a fedsim.engine.update.ClientUpdate"
        )
    source = federation.source
    shape = tuple(int(side) for side in source.x_train.shape[1:])
    model = registry.find("model", experiment.model.name)
    training = experiment.training
    for key, value, asks in (
        ("training.augmentation", "weak", training.augmentation == "weak"),
        ("method.name", method.name, update.needs_images),
    ):
        if asks and len(shape) != 3:
            raise ConfigError(
                f"{key} = {value!r}: augmentation needs images, but one example of "
                f"{source.name} has the shape {shape}"
            )
    own = {function.__module__.partition(".")[0] for function in (type(update), model)}
    return Task(
        federation=federation,
        statistics=Statistics.of(federation),
        model=partial(model, shape, source.num_classes, **experiment.model.options),
        update=update,
        training=LocalTraining(
            epochs=training.local_epochs,
            steps=training.local_steps,
            batch_size=training.batch_size,
            lr=training.lr,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            augmentation=training.augmentation,
        ),
        seed=experiment.seed,
        packages=tuple(sorted(own | {"fedsim", "strategies", "clients"})),
    )


def initial_arrays(task: Task) -> Arrays:
    """Return the weights of round 0, drawn from the experiment's seed."""
    import torch

    from fedsim.models import Model, Net

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(task.seed, "initial weights").integers(2**63)))
        model: Model = task.model()
    if not isinstance(model, Model):
        raise ConfigError(f"the model function must return a fedsim.models.Model, not {model!r}")
    return {name: tensor.numpy() for name, tensor in Net(model).initial_weights().items()}


def _warn_of_running_statistics(experiment: Experiment, strategy: Strategy, arrays: Arrays) -> None:
    from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

    running = [name for name in arrays if name.endswith(("running_mean", "running_var"))]
    if running and isinstance(strategy, FedAdagrad | FedAdam | FedAvgM | FedYogi):
        warnings.warn(
            f"method.name = {experiment.method.name!r} takes steps on BatchNorm's running "
            "statistics as if they were weights; model.norm = 'group' avoids that",
            stacklevel=3,
        )


def make_grid(experiment: Experiment, task: Task) -> SimulatedGrid:
    """Start the workers."""
    if experiment.engine.backend == "inline":
        from fedsim.engine.grid import InlineGrid

        return InlineGrid(task)
    from fedsim.engine.ray_grid import RayGrid

    return RayGrid(task, num_workers(experiment))


def num_workers(experiment: Experiment) -> int:
    """Return how many Ray workers an experiment gets: no more than clients in a round."""
    if experiment.engine.backend == "inline":
        return 1
    if isinstance(experiment.engine.workers, int):
        return experiment.engine.workers
    cohort = cohort_size(experiment.training.participation, experiment.clients.count)
    return max(1, min(len(os.sched_getaffinity(0)), cohort))


class _Recorder:
    """Keeps a run's frames and, where a folder is given, writes them as the rounds end."""

    def __init__(
        self, experiment: Experiment, federation: Federation, out: Path | str | None
    ) -> None:
        self.setup_seconds = 0.0
        self._experiment = experiment
        self._federation = federation
        self._partition = federation.table()
        self._rounds: list[dict[str, Any]] = []
        self._clients: list[pd.DataFrame] = []
        self._training: list[pd.DataFrame] = []
        self._training_columns: list[str] = []
        self._seconds: list[dict[str, float]] = []
        self._started = datetime.now(UTC)
        self._folder = RunDirectory(Path(out)) if out is not None else None
        if self._folder is not None:
            self._folder.write_text("experiment.toml", experiment.to_toml())
            self._folder.write_table("partition.csv", self._partition)

    def add(self, finished: Round) -> None:
        """Record a finished round."""
        row, clients = finished.row, finished.clients
        self._rounds.append(row)
        self._seconds.append(finished.seconds)
        if not finished.training.empty:
            training = finished.training.copy()
            training.insert(0, "round", row["round"])
            self._training.append(training)
            self._write_training(training)
        rows = None if clients is None or clients.empty else self._client_rows(row, clients)
        if rows is not None:
            self._clients.append(rows)
        if self._folder is not None:
            self._folder.append("rounds.csv", pd.DataFrame([row]))
            if rows is not None:
                self._folder.append("clients.csv", rows)

    def _write_training(self, rows: pd.DataFrame) -> None:
        """Add rows to training.csv; a method may have more to say after its warm-up."""
        if self._folder is None:
            return
        if list(rows.columns) == self._training_columns:
            self._folder.append("training.csv", rows)
            return
        table = pd.concat(self._training, ignore_index=True)
        self._folder.write_table("training.csv", table)
        self._training_columns = list(table.columns)

    def _client_rows(self, row: dict[str, Any], clients: pd.DataFrame) -> pd.DataFrame:
        index = clients["client"].to_numpy()
        frame = clients.copy()
        frame.insert(0, "round", row["round"])
        frame.insert(2, "view", VIEW)
        frame.insert(3, "num_train", self._federation.num_train(index))
        frame.insert(4, "num_labelled", self._federation.num_labelled[index])
        return frame

    def close(self, arrays: Arrays) -> None:
        """Write what is only known at the end, be it early or not."""
        if self._folder is not None:
            self._folder.write_json("run.json", self._description())
            self._folder.write_model(arrays)

    def result(self, arrays: Arrays) -> Result:
        """Return the frames, and draw the figures."""
        result = Result(
            experiment=self._experiment,
            rounds=pd.DataFrame(self._rounds),
            clients=pd.concat(self._clients, ignore_index=True)
            if self._clients
            else pd.DataFrame(),
            training=pd.concat(self._training, ignore_index=True)
            if self._training
            else pd.DataFrame(),
            partition=self._partition,
            arrays=arrays,
            path=self._folder.path if self._folder is not None else None,
        )
        if result.path is not None:
            from fedsim.report.figures import save_figures

            save_figures(
                result.path / "figures",
                rounds=result.rounds,
                clients=result.clients,
                partition=result.partition,
                training=result.training,
                num_clients=self._federation.num_clients,
                num_classes=self._federation.source.num_classes,
                title=self._experiment.name,
            )
        return result

    def _description(self) -> dict[str, Any]:
        rounds = len(self._rounds)
        parts = sorted({part for seconds in self._seconds for part in seconds})
        mean = {
            part: sum(seconds.get(part, 0.0) for seconds in self._seconds) / rounds
            for part in parts
        }
        return {
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "rounds_finished": rounds,
            "rounds_asked": self._experiment.training.rounds,
            "seconds_setup": self.setup_seconds,
            "seconds_per_round": {"total": sum(mean.values()), **mean},
            "bytes_up": sum(row["bytes_up"] for row in self._rounds),
            "bytes_down": sum(row["bytes_down"] for row in self._rounds),
            "workers": num_workers(self._experiment),
            "versions": {
                "python": platform.python_version(),
                **{
                    name: version(name) for name in ("fedsim-flwr", "flwr", "ray", "torch", "numpy")
                },
            },
            "commit": _commit(),
            "hardware": {
                "machine": platform.machine(),
                "system": platform.platform(),
                "cores": len(os.sched_getaffinity(0)),
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            },
        }


def _commit() -> str | None:
    """Return the commit of the checkout that fedsim runs from, if it is one."""
    home = Path(__file__).resolve().parent.parent
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

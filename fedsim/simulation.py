"""From an experiment to its result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from typing import TYPE_CHECKING, Any

from fedsim import registry
from fedsim.config import Experiment
from fedsim.data.federate import federate
from fedsim.data.federation import Federation
from fedsim.data.flower_partitioners import as_partition
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.errors import ConfigError, DataError, EngineError, user_code
from fedsim.hardware import device, gpu_share, num_workers
from fedsim.interrupts import noted_interrupts
from fedsim.method import local_training, make_strategy, make_update
from fedsim.rng import generator
from fedsim.run.recorder import Recorder
from fedsim.run.result import Result
from fedsim.run.resume import check_model, last_checkpoint, warn_of_changes

if TYPE_CHECKING:
    import numpy as np
    from flwr.serverapp.strategy import Strategy
    from numpy.typing import NDArray

    from fedsim.engine.grid import SimulatedGrid
    from fedsim.engine.ray_actors import RayActors
    from fedsim.engine.worker import Task
    from fedsim.models import Arrays, Model


DEALING_SECONDS = 0.5
"""If dealing out takes longer, Ray starts meanwhile."""


def load_source(experiment: Experiment) -> Source:
    """Read the experiment's examples."""
    loader, arguments = registry.find_dataset(experiment.data.source)
    with user_code(f"data.source = {experiment.data.source!r}"):
        source = loader(*arguments, **experiment.data.options)
    if not isinstance(source, Source):
        raise DataError(
            f"data.source = {experiment.data.source!r}: the function must return a "
            f"fedsim.data.source.Source, not {type(source).__name__}"
        )
    return source


def load_federation(experiment: Experiment, source: Source | None = None) -> Federation:
    """Deal the experiment's examples out to its clients; they are read where they aren't given."""
    if source is None:
        source = load_source(experiment)
    clients = experiment.clients
    partition = registry.find("partition", clients.partition)
    return federate(
        source,
        num_clients=clients.count,
        partition=as_partition(partition) if registry.is_partitioner(partition) else partition,
        options=clients.options,
        imbalance=experiment.data.imbalance,
        profile=experiment.data.profile,
        labelled=clients.labelled,
        unlabelled_clients=clients.unlabelled_clients,
        label_each_class=clients.label_each_class,
        min_examples=clients.min_examples,
        local_test=clients.local_test,
        seed=experiment.seed,
    )


_ONE_AT_A_TIME = RLock()
"""PyTorch's random numbers, and Ray, are there once in a process."""


def simulate(
    experiment: Experiment,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    observer: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Run an experiment.

    In a process there is one run at a time: calls from several threads wait for each other. A
    partition or another part of one's own must not wait for a run of its own.

    Parameters
    ----------
    experiment : Experiment
        What to run.
    out : Path or str, optional
        Folder to write the run to; new or empty, or that of a run of which no round finished. By
        default nothing is written.
    resume : bool
        Whether to go on with the run in ``out``, from its last finished round. The experiment must
        be the same, but for `fedsim.run.resume.MAY_CHANGE` (whose ``training.rounds`` a learning
        rate that falls by "cosine" fixes). Where no run has begun, one begins.
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
    with _ONE_AT_A_TIME:
        return _simulate(experiment, out, resume, observer)


def _simulate(
    experiment: Experiment,
    out: Path | str | None,
    resume: bool,
    observer: Callable[[dict[str, Any]], None] | None,
) -> Result:
    from fedsim.engine import flower
    from fedsim.engine.checkpoint import restore
    from fedsim.engine.loop import run_rounds

    started = time.perf_counter()
    given: Any = experiment
    if not isinstance(given, Experiment):
        raise ConfigError(f"experiment must be a fedsim.Experiment, not {type(given).__name__}")
    # Once more, since pydantic's model_copy doesn't look at what it changes.
    experiment = Experiment(**experiment.model_dump())
    if observer is not None and not callable(observer):
        raise ConfigError(f"observer = {observer!r}: must be a function")
    strategy = make_strategy(experiment)
    _warn_of_own_start(experiment, strategy)
    checkpoint = None
    if resume:
        if out is None:
            raise ConfigError("resume: say in out which folder's run is to go on")
        checkpoint = last_checkpoint(experiment, Path(out))
        if checkpoint is not None:
            warn_of_changes(experiment, checkpoint, Path(out))
    with ExitStack() as leaving:
        interrupted = leaving.enter_context(noted_interrupts())
        federation, actors = _load_federation_and_start_ray(experiment)
        if actors is not None:
            leaving.callback(actors.close)
        if out is None:
            states = Path(leaving.enter_context(TemporaryDirectory(prefix="fedsim-")))
        else:
            states = Path(out) / "state"
        task = make_task(experiment, federation, states)
        if task.device == "cpu" and experiment.training.precision == "tf32":
            warnings.warn("training.precision = 'tf32' changes nothing on a CPU", stacklevel=2)
        task.update.warn_of(task.training)
        initial = initial_arrays(task)
        _warn_of_running_statistics(experiment, strategy, initial)
        arrays, rounds_before, versions = flower.to_record(initial), 0, None
        if checkpoint is not None:
            check_model(checkpoint, arrays)
            restore(strategy, checkpoint.strategy)
            arrays, versions = checkpoint.arrays, checkpoint.versions
            rounds_before = checkpoint.round
        recorder = Recorder(experiment, task, num_workers(experiment), out, resume, checkpoint)
        leaving.callback(recorder.release)
        grid = make_grid(experiment, task, actors, versions)
        leaving.callback(grid.close)
        recorder.setup_seconds = time.perf_counter() - started
        try:
            recorder.begin(arrays, strategy, grid.states)
            for finished in run_rounds(
                strategy,
                grid,
                arrays,
                rounds=experiment.training.rounds,
                evaluate_every=experiment.evaluation.every,
                seed=experiment.seed,
                finished=rounds_before,
            ):
                arrays = finished.arrays
                recorder.add(finished, strategy, grid.states)
                if observer is not None:
                    observer(finished.row)
                interrupted.raise_again()
        except BaseException:
            # What the finished rounds gave stays; on a full disk the first error is the one that
            # counts.
            with suppress(EngineError):
                recorder.close(flower.from_record(arrays))
            raise
        recorder.close(flower.from_record(arrays))
        return recorder.result(flower.from_record(arrays))


def _load_federation_and_start_ray(experiment: Experiment) -> tuple[Federation, RayActors | None]:
    """Return the federation, and Ray's actors if they started while a large one was dealt out."""
    source = load_source(experiment)
    with ThreadPoolExecutor(1) as beside:
        dealt = beside.submit(load_federation, experiment, source)
        # With a small one Ray waits until all else is known to be right.
        wait([dealt], timeout=DEALING_SECONDS)
        if dealt.done() or experiment.engine.backend == "inline":
            return dealt.result(), None
        actors = _start_actors(experiment)
        try:
            return dealt.result(), actors
        except BaseException:
            actors.close()
            raise


def make_task(experiment: Experiment, federation: Federation, states: Path) -> Task:
    """Return what the workers need to know; clients keep their states in folder ``states``."""
    from fedsim.engine.worker import Task
    from fedsim.models.net import step_flops

    update = make_update(experiment)
    source = federation.source
    shape = tuple(int(side) for side in source.x_train.shape[1:])
    model = registry.find("model", experiment.model.name)
    training = experiment.training
    for key, value, asks in (
        ("training.augmentation", "weak", training.augmentation == "weak"),
        ("method.name", experiment.method.name, update.needs_images),
    ):
        if asks and len(shape) != 3:
            raise ConfigError(
                f"{key} = {value!r}: augmentation needs images, but one example of "
                f"{source.name} has the shape {shape}"
            )
    make_model = partial(model, shape, source.num_classes, **experiment.model.options)
    what = f"model.name = {experiment.model.name!r}"
    with user_code(what):
        first = _new_model(make_model, experiment.seed)
        _check_model(first, what)
        flops = step_flops(first, shape, training.batch_size)
    own = {function.__module__.partition(".")[0] for function in (type(update), model)}
    own.discard("__main__")  # a script, or an interactive session: Ray sends what it defines
    return Task(
        federation=federation,
        statistics=Statistics.of(federation),
        model=make_model,
        update=update,
        training=local_training(experiment),
        seed=experiment.seed,
        stacked=_trains_stacked(experiment, flops),
        step_flops=flops,
        states=states,
        device=device(experiment),
        device_share=gpu_share(experiment),
        packages=tuple(sorted(own | {"fedsim", "strategies", "clients"})),
    )


MAX_STACKED_STEP_FLOPS = 12e6
"""The most floating-point operations of a client's step of SGD for which many clients' steps
together take less time on a CPU than one by one; see `experiments.benchmarks.stacking`."""


def _trains_stacked(experiment: Experiment, flops: int) -> bool:
    """Tell whether clients train side by side, whose steps take so many operations.

    On a CPU that pays where a step is little arithmetic and much overhead. A GPU waits for the next
    operation rather than for arithmetic, whatever the model.
    """
    if experiment.engine.cohort != "auto":
        return experiment.engine.cohort == "stacked"
    return device(experiment) != "cpu" or flops <= MAX_STACKED_STEP_FLOPS


def _new_model(make_model: Callable[[], Model], seed: int) -> Model:
    """Return a model with weights drawn from the experiment's seed."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "initial weights").integers(2**63)))
        return make_model()


def _check_model(model: object, what: str) -> None:
    """Raise `ConfigError` if clients can't train what the function ``what`` returned."""
    from torch import nn

    from fedsim.models import Model

    kind = type(model).__name__
    if not isinstance(model, Model):
        raise ConfigError(
            f"{what}: the function must return a fedsim.models.Model, not {kind}; give it a "
            "backbone, which turns inputs into D features each, as Model(backbone, D, num_classes)"
        )
    if type(model).forward is not Model.forward:
        raise ConfigError(
            f"{what}: {kind}.forward isn't called: a model is the linear head of its backbone's "
            "features; put what it computes into the backbone"
        )
    if not isinstance(model.head, nn.Linear):
        kind = type(model.head).__name__
        raise ConfigError(f"{what}: the model's head must be a torch.nn.Linear, not {kind}")
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise ConfigError(
            f"{what}: the model has lazy layers, such as LazyLinear: give them their sizes"
        )


def initial_arrays(task: Task) -> Arrays:
    """Return the arrays of round 0, drawn from the experiment's seed."""
    from fedsim.models import Net

    with user_code("the model can't be made"):
        net = Net(_new_model(task.model, task.seed))
    rng = generator(task.seed, "method's initial arrays")
    with user_code(f"method: {type(task.update).__name__}.initial"):
        initial: Any = task.update.initial(net, net.initial_weights(), rng)
        if not isinstance(initial, dict):
            raise TypeError(f"must return a dict of tensors, not {type(initial).__name__}")
        return {name: tensor.numpy() for name, tensor in initial.items()}


def _warn_of_own_start(experiment: Experiment, strategy: Strategy) -> None:
    from flwr.serverapp.strategy import Strategy

    if type(strategy).start is not Strategy.start:
        warnings.warn(
            f"method.name = {experiment.method.name!r}: its own start() isn't called; the "
            "simulator's round loop calls configure_train, aggregate_train, configure_evaluate and "
            "aggregate_evaluate",
            stacklevel=3,
        )


def _warn_of_running_statistics(experiment: Experiment, strategy: Strategy, arrays: Arrays) -> None:
    from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

    running = [name for name in arrays if name.endswith(("running_mean", "running_var"))]
    if running and isinstance(strategy, FedAdagrad | FedAdam | FedAvgM | FedYogi):
        warnings.warn(
            f"method.name = {experiment.method.name!r} takes steps on BatchNorm's running "
            "statistics as if they were weights; model.norm = 'group' avoids that",
            stacklevel=3,
        )


def make_grid(
    experiment: Experiment,
    task: Task,
    actors: RayActors | None = None,
    versions: NDArray[np.int8] | None = None,
) -> SimulatedGrid:
    """Return the grid; on Ray with the actors that have been started, or new ones.

    ``versions`` says from which states the clients go on, if they do.
    """
    if experiment.engine.backend == "inline":
        from fedsim.engine.inline_grid import InlineGrid

        return InlineGrid(task, versions)
    from fedsim.engine.ray_grid import RayGrid

    return RayGrid(task, actors or _start_actors(experiment), versions)


def _start_actors(experiment: Experiment) -> RayActors:
    from fedsim.engine.ray_actors import RayActors

    return RayActors(num_workers(experiment), gpu_share(experiment))

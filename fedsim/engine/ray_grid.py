"""The grid whose workers are long-lived Ray actors."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.engine.grid import SimulatedGrid
from fedsim.engine.worker import Task, fingerprint
from fedsim.errors import EngineError, UserError
from fedsim.models import Arrays
from fedsim.models.net import num_bytes

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

ATTEMPTS = 3
"""How often work is given to a fresh worker after its worker died."""
SMALL = 1 << 20
"""Bytes up to which a call carries its arrays along, for all workers together: what goes through
shared memory arrives a few milliseconds later, and is there once for any number of workers."""


class RayActors:
    """The actors, which start while this process goes on.

    If Ray already runs in this process it is used, and left running; otherwise it is started on
    the loopback address only, without a dashboard, and stopped by `close`.

    Parameters
    ----------
    workers : int
        Number of actors, each on one core, >= 1.
    gpu : float
        Share of a GPU that each of them gets, in [0, 1].

    Raises
    ------
    EngineError
        If Ray already runs, with too few GPUs.
    """

    def __init__(self, workers: int, gpu: float = 0.0) -> None:
        self.ray = _import_ray()
        # Ray counts in ten-thousandths, and shares that exceed a GPU would wait for ever.
        self._gpu = floor(1e4 * gpu) / 1e4
        self._own_ray = not self.ray.is_initialized()
        if self._own_ray:
            _start_ray(self.ray, workers, ceil(workers * self._gpu))
        elif self.ray.cluster_resources().get("GPU", 0) < workers * self._gpu:
            raise EngineError(
                f"{workers} workers need {self._gpu:g} of a GPU each, but the Ray that runs in "
                "this process has been started without; start it with num_gpus, or not at all"
            )
        self.actors: list[ActorHandle[Any]] = []
        try:
            for _ in range(workers):
                self.actors.append(self.start())
        except BaseException:
            self.close()
            raise

    def start(self) -> ActorHandle[Any]:
        """Start one more actor."""
        from fedsim.engine.ray_worker import RayWorker

        remote = self.ray.remote(num_cpus=1, num_gpus=self._gpu)(RayWorker)
        actor: ActorHandle[Any] = remote.remote(sys.path)
        return actor

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors = []
        if self._own_ray:
            self.ray.shutdown()


class RayGrid(SimulatedGrid):
    """A grid on Ray: the data and each round's model are put once into shared memory.

    Parameters
    ----------
    task : Task
        The work.
    actors : RayActors
        Who does it; `close` ends them.

    Raises
    ------
    EngineError
        If a worker would import other files than this process, or can't start.
    """

    def __init__(self, task: Task, actors: RayActors) -> None:
        super().__init__(task)
        self._actors = actors
        self._ray = actors.ray
        try:
            self._task = self._ray.put(task)
            expected = fingerprint(task.packages)
            begun = [actor.begin.remote([self._task]) for actor in actors.actors]
            for found in self._ray.get(begun):
                _check_imports(found, expected)
        except BaseException as error:
            self.close()
            if isinstance(error, self._ray.exceptions.RayTaskError):
                error = error.cause
                if isinstance(error, UserError):
                    raise error from None
            elif not isinstance(error, self._ray.exceptions.RayActorError):
                raise
            reason = f"{type(error).__name__}: {error}"
            raise EngineError(f"a Ray worker could not start: {reason}") from None

    @property
    def num_workers(self) -> int:
        """The number of actors."""
        return len(self._actors.actors)

    def _put(self, shared: Arrays | NDArray[Any]) -> Any:
        size = shared.nbytes if isinstance(shared, np.ndarray) else num_bytes(shared)
        if size * self.num_workers <= SMALL:
            return shared
        return self._ray.put(shared)

    def close(self) -> None:
        """End the workers, and Ray if it was started for them."""
        self._actors.close()

    def _call(self, work: dict[int, tuple[str, tuple[Any, ...]]]) -> dict[int, Any]:
        # A worker that dies is replaced and its call made again.
        answers: dict[int, Any] = {}
        for _ in range(ATTEMPTS):
            pending: dict[int, ObjectRef[Any]] = {
                worker: self._actors.actors[worker].call.remote(*self._packed(method, arguments))
                for worker, (method, arguments) in work.items()
                if worker not in answers
            }
            for worker, result in pending.items():
                try:
                    answers[worker] = pickle.loads(self._ray.get(result))
                except self._ray.exceptions.RayActorError as error:
                    warnings.warn(
                        f"worker {worker} died and is replaced; its work is done again "
                        f"({type(error).__name__})",
                        stacklevel=2,
                    )
                    actor = self._actors.actors[worker] = self._actors.start()
                    actor.begin.remote([self._task])
                except self._ray.exceptions.RayTaskError as error:
                    # What the user can mend is one line here, too.
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
            if len(answers) == len(work):
                return answers
        raise EngineError(
            f"a worker died {ATTEMPTS} times on the same work; is there enough memory? "
            "engine.workers = 1 needs the least"
        )

    def _packed(self, method: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
        """Yield what `RayWorker.call` takes: what Ray doesn't share in one piece, then the rest.

        Ray takes longer to pack each argument than a short round lasts.
        """
        shared = {
            place: argument
            for place, argument in enumerate(arguments)
            if isinstance(argument, self._ray.ObjectRef)
        }
        own = [None if place in shared else one for place, one in enumerate(arguments)]
        yield pickle.dumps((method, own, list(shared)), protocol=5)
        yield from shared.values()


def _check_imports(found: dict[str, str], expected: dict[str, str]) -> None:
    for name, file in expected.items():
        if found[name] != file:
            raise EngineError(
                f"a Ray worker would import {name!r} from {found[name]}, this process from "
                f"{file}: a folder of that name in the working directory hides it; "
                "rename that folder or start from another directory"
            )


def _import_ray() -> Any:
    # Ray resolves "127.0.0.1" to the machine's outward address and listens there, unless it is
    # told, before its import, that this is no cluster. Usage statistics would go to the network.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray starts its workers with the lowest priority but a few; they are the work here.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What is smaller comes and goes with the call, what is larger through shared memory.
    os.environ.setdefault("RAY_max_direct_call_object_size", str(SMALL))
    import ray

    return ray


def _start_ray(ray: Any, workers: int, gpus: int = 0) -> None:
    ray.init(
        num_cpus=workers,
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=False,
    )

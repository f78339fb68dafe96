"""The grid whose workers are long-lived Ray actors."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from math import ceil, floor, inf
from multiprocessing.connection import Client, Connection
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.engine.claims import Claims
from fedsim.engine.grid import SimulatedGrid
from fedsim.engine.worker import Order, Share, Task, fingerprint
from fedsim.errors import EngineError, UserError
from fedsim.interrupts import held_interrupts
from fedsim.models import Arrays
from fedsim.models.net import num_bytes

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

ATTEMPTS = 3
"""How often a piece of work is tried, by a new worker each time, where workers die of it."""
SMALL = 8 << 20
"""Bytes up to which a call carries its arrays along, for all workers together: what goes through
shared memory arrives ten milliseconds later, and is there once for any number of workers."""

PATIENCE = 10.0
"""Seconds that actors which are being made are waited for before they are ended."""

SHORT = 0.05
"""Seconds of training below which workers keep to their shares in the next round: to take over from
others costs a round a millisecond or two."""


HELPERS = ("start_api_server", "start_log_monitor", "start_monitor")
"""What Ray starts beside its workers, and nobody asks for here: the server of its dashboard, the
reader of its workers' logs, and its autoscaler. They take a second of its start, another of its
end, and memory for three more processes of Python."""


class RayActor:
    """An actor on this machine, and the socket over which it is called.

    Parameters
    ----------
    ray : module
        Ray.
    handle : ActorHandle
        The actor, a `fedsim.engine.ray_worker.RayWorker`.
    address : str
        A path at which nothing is yet, for the socket.
    """

    def __init__(self, ray: Any, handle: ActorHandle[Any], address: str) -> None:
        self._ray = ray
        self.handle = handle
        self._address = address
        self._begun: ObjectRef[dict[str, str]] | None = None
        self._serving: ObjectRef[None] | None = None
        self._connection: Connection | None = None
        self._waiting = False

    def begin(self, task: ObjectRef[Task], claims: Path) -> ObjectRef[dict[str, str]]:
        """Give it its task; returns what `RayWorker.begin` will return."""
        self._begun = self.handle.begin.remote([task], self._address, claims)
        return self._begun

    @property
    def begun(self) -> ObjectRef[Any]:
        """What is there once the actor has begun, or failed to; without a task, once it exists."""
        return self._begun or self.handle.__ray_ready__.remote()

    def call(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Call a method, some of whose arguments may be in Ray's memory; `answer` waits for it."""
        shared = {
            place: argument
            for place, argument in enumerate(arguments)
            if isinstance(argument, self._ray.ObjectRef)
        }
        own = [None if place in shared else one for place, one in enumerate(arguments)]
        if self._waiting:  # an exception has come in between: that answer is not for us
            self.hang_up()
        if self._connection is None:
            self._connect(*shared.values())
        elif shared:
            self._send(b"")  # ends what it serves now
            self._serving = self.handle.serve.remote(*shared.values())
        self._waiting = True
        self._send(pickle.dumps((method, own, list(shared)), protocol=5))

    def answer(self) -> Any:
        """Return what the method returned; warn of what it has warned of.

        Raises Ray's exceptions: RayTaskError if it raised, RayActorError if the actor died.
        """
        try:
            if self._connection is None:
                raise EOFError
            packed = self._connection.recv_bytes()
        except (EOFError, ConnectionError):
            self.hang_up()
            self._ray.get(self._serving)
            raise AssertionError("a worker hangs up only if it fails") from None
        self._waiting = False
        found, warned = pickle.loads(packed)
        for text in warned:
            warnings.warn(text, stacklevel=3)
        return found

    def hang_up(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._waiting = None, False

    def _connect(self, *shared: ObjectRef[Any]) -> None:
        assert self._begun is not None
        self._serving = self.handle.serve.remote(*shared)
        self._ray.wait([self._begun])
        with suppress(OSError):  # where nobody listens, `answer` says why
            self._connection = Client(self._address, "AF_UNIX")

    def _send(self, packed: bytes) -> None:
        if self._connection is not None:
            with suppress(ConnectionError):  # `answer` says why
                self._connection.send_bytes(packed)


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
        self._session: Path | None = None
        """Of the Ray that was started here."""
        self._folder = TemporaryDirectory(prefix="fedsim-")
        self.claims = Path(self._folder.name) / "claims"
        """A file for `fedsim.engine.claims.Claims`."""
        self._numbers = count()
        self.actors: list[RayActor] = []
        try:
            if not self.ray.is_initialized():
                with held_interrupts():
                    self._session = _start_ray(self.ray, workers, ceil(workers * self._gpu))
            elif self.ray.cluster_resources().get("GPU", 0) < workers * self._gpu:
                raise EngineError(
                    f"{workers} workers need {self._gpu:g} of a GPU each, but the Ray that runs in "
                    "this process has been started without; start it with num_gpus, or not at all"
                )
            with held_interrupts():
                for _ in range(workers):
                    self.actors.append(self.start())
        except BaseException:
            self.close()
            raise

    def start(self) -> RayActor:
        """Start one more actor, on this machine: it shares our files, and a socket with us."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from fedsim.engine.ray_worker import RayWorker

        here = self.ray.get_runtime_context().get_node_id()
        remote = self.ray.remote(
            num_cpus=1,
            num_gpus=self._gpu,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )(RayWorker)
        address = Path(self._folder.name) / str(next(self._numbers))
        return RayActor(self.ray, remote.remote(sys.path), str(address))

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        # Ray breaks down where it ends while they are being made.
        begun = [actor.begun for actor in self.actors]
        try:
            if begun:
                self.ray.wait(begun, num_returns=len(begun), timeout=PATIENCE)
        finally:
            for actor in self.actors:
                actor.hang_up()
                self.ray.kill(actor.handle)
            self.actors = []
            self._folder.cleanup()
            if self._session is not None:
                self.ray.shutdown()
                # Ray never takes it away itself.
                rmtree(self._session, ignore_errors=True)


class RayGrid(SimulatedGrid):
    """A grid on Ray, whose shared memory holds the data once, and what else is large.

    Parameters
    ----------
    task : Task
        The work.
    actors : RayActors
        Who does it; `close` ends them.
    versions : ndarray of int8 [K], optional
        See `SimulatedGrid`.

    Raises
    ------
    EngineError
        If a worker would import other files than this process, or can't start.
    """

    def __init__(
        self, task: Task, actors: RayActors, versions: NDArray[np.int8] | None = None
    ) -> None:
        super().__init__(task, versions)
        self._actors = actors
        self._ray = actors.ray
        self._claims = Claims(actors.claims)
        self._seconds = inf
        """How long the workers trained in the last round."""
        try:
            with held_interrupts():
                self._task = self._ray.put(task)
                self._imports = fingerprint(task.packages)
                self._wait_for([actor.begin(self._task, actors.claims) for actor in actors.actors])
        except BaseException as error:
            self.close()
            if isinstance(error, self._ray.exceptions.RayActorError):
                raise _not_started(error) from None
            raise

    def _wait_for(self, begun: list[ObjectRef[dict[str, str]]]) -> None:
        """Wait until workers have begun, and see that they run the same code as this process."""
        try:
            for found in self._ray.get(begun):
                _check_imports(found, self._imports)
        except self._ray.exceptions.RayTaskError as error:
            is_users = isinstance(error.cause, UserError)
            raise (error.cause if is_users else _not_started(error.cause)) from None

    @property
    def num_workers(self) -> int:
        """The number of actors."""
        return len(self._actors.actors)

    def _put(self, shared: Arrays | NDArray[Any]) -> Any:
        size = shared.nbytes if isinstance(shared, np.ndarray) else num_bytes(shared)
        if size * self.num_workers <= SMALL:
            return shared
        return self._ray.put(shared)

    def _train(self, shared: Any, order: Order, shares: list[Share]) -> dict[int, Any]:
        begin = perf_counter()
        if self._seconds < SHORT:
            answers = super()._train(shared, order, shares)
        else:
            begun = self._claims.begin(sum(map(len, shares)))
            answers = self._call(
                {
                    worker: ("train_some", (shared, order, shares, begun, worker))
                    for worker, share in enumerate(shares)
                    if share
                }
            )
        self._seconds = perf_counter() - begin
        return answers

    def close(self) -> None:
        """End the workers, and Ray if it was started for them."""
        self._claims.close()
        self._actors.close()
        super().close()

    def _call(self, work: dict[int, tuple[str, tuple[Any, ...]]]) -> dict[int, Any]:
        # A worker that dies is replaced and its call made again.
        answers: dict[int, Any] = {}
        actors = self._actors.actors
        for _ in range(ATTEMPTS):
            dead: list[int] = []
            pending = [worker for worker in work if worker not in answers]
            for worker in pending:
                actors[worker].call(*work[worker])
            for worker in pending:
                try:
                    answers[worker] = actors[worker].answer()
                except self._ray.exceptions.RayActorError as error:
                    warnings.warn(
                        f"worker {worker} died and is replaced; its work is done again "
                        f"({type(error).__name__})",
                        stacklevel=2,
                    )
                    actors[worker] = self._actors.start()
                    begun = actors[worker].begin(self._task, self._actors.claims)
                    with suppress(self._ray.exceptions.RayActorError):  # its answer will say so
                        self._wait_for([begun])
                    dead.append(worker)
                except self._ray.exceptions.RayTaskError as error:
                    # What the user can mend is one line here, too.
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
            if not dead:
                return answers
            for worker in dead:  # only now, so that nobody else dies of what it has taken
                self._claims.release(worker)
        raise EngineError(
            f"a worker died {ATTEMPTS} times on the same work; is there enough memory? "
            "engine.workers = 1 needs the least"
        )


def _not_started(error: BaseException) -> EngineError:
    return EngineError(f"a Ray worker could not start: {type(error).__name__}: {error}")


def _check_imports(found: dict[str, str], expected: dict[str, str]) -> None:
    for name, file in expected.items():
        if found[name] != file:
            reason = (
                "its files have changed since the run began"
                if found[name].rpartition(" (")[0] == file.rpartition(" (")[0]
                else "a folder of that name in the working directory hides it; rename that folder "
                "or start from another directory"
            )
            raise EngineError(
                f"a Ray worker would import {name!r} from {found[name]}, this process from "
                f"{file}: {reason}"
            )


def _import_ray() -> Any:
    # Usage statistics would go to the network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray starts its workers with the lowest priority but a few; they are the work here.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def _start_ray(ray: Any, workers: int, gpus: int = 0) -> Path:
    """Start Ray on the loopback; returns the folder of its log and sockets."""
    from ray._private import node, utils

    # Ray resolves "127.0.0.1" to the machine's outward address and listens there, unless this is
    # no cluster; it reads the variable when it is imported, which may be before us.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    # Ray's own handler of SIGTERM would end this process half-way through its start.
    with _idle(node.Node, HELPERS), _idle(utils, ["set_sigterm_handler"]):
        started = ray.init(
            "local",  # whatever cluster is running or RAY_ADDRESS names
            num_cpus=workers,
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
        )
    return Path(started.address_info["session_dir"])


@contextmanager
def _idle(owner: Any, names: Iterable[str]) -> Iterator[None]:
    """Let some functions of Ray's do nothing for a while; no setting of `ray.init` does."""
    known = {name: getattr(owner, name) for name in names if hasattr(owner, name)}
    for name in known:
        setattr(owner, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, function in known.items():
            setattr(owner, name, function)

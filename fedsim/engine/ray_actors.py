"""Ray, and the actors that run in it: how they are started, called and ended."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from math import ceil, floor
from multiprocessing.connection import Client, Connection
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedsim.engine.imports import Origin
from fedsim.errors import EngineError, described
from fedsim.interrupts import held_interrupts

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from fedsim.engine.worker import Task

SHUTDOWN_SECONDS = 10.0
"""Seconds for which `RayActors.close` waits for actors that are still being made."""

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
        self._begun: ObjectRef[dict[str, Origin]] | None = None
        self._serving: ObjectRef[None] | None = None
        self._connection: Connection | None = None
        self._waiting = False

    def begin(self, task: ObjectRef[Task], claims: Path) -> ObjectRef[dict[str, Origin]]:
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
        If Ray can't start, or already runs, with too few GPUs.
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
                try:
                    with held_interrupts():
                        self._session = _start_ray(self.ray, workers, ceil(workers * self._gpu))
                except Exception as error:  # whatever this machine lacks
                    raise EngineError(
                        f"Ray can't start here: {described(error)}; engine.backend = 'inline' "
                        "does without it"
                    ) from error
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
                self.ray.wait(begun, num_returns=len(begun), timeout=SHUTDOWN_SECONDS)
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

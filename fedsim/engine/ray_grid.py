"""The grid whose workers are long-lived Ray actors."""

from __future__ import annotations

import warnings
from contextlib import suppress
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.engine.claims import Claims
from fedsim.engine.grid import SimulatedGrid
from fedsim.engine.imports import Origin, check_origins, origins
from fedsim.engine.ray_actors import RayActors
from fedsim.engine.worker import Order, Share, Task
from fedsim.errors import EngineError, UserError, described
from fedsim.interrupts import held_interrupts
from fedsim.models import Arrays
from fedsim.models.net import num_bytes

if TYPE_CHECKING:
    from ray import ObjectRef

ATTEMPTS = 3
"""How often a piece of work is tried, by a new worker each time, where workers die of it."""
INLINE_BYTES = 8 << 20
"""Bytes up to which a call carries its arrays along, for all workers together: what goes through
shared memory arrives ten milliseconds later, and is there once for any number of workers."""

STEAL_FROM_SECONDS = 0.05
"""Seconds of training from which on workers that are done early take over others' leaves in the
next round, which costs it a millisecond or two."""


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
                self._origins = origins(task.packages)
                self._wait_for([actor.begin(self._task, actors.claims) for actor in actors.actors])
        except BaseException as error:
            self.close()
            if isinstance(error, self._ray.exceptions.RayActorError):
                raise _not_started(error) from None
            raise

    def _wait_for(self, begun: list[ObjectRef[dict[str, Origin]]]) -> None:
        """Wait until workers have begun, and see that they run the same code as this process."""
        try:
            for found in self._ray.get(begun):
                check_origins(found, self._origins)
        except self._ray.exceptions.RayTaskError as error:
            is_users = isinstance(error.cause, UserError)
            raise (error.cause if is_users else _not_started(error.cause)) from None

    @property
    def num_workers(self) -> int:
        """The number of actors."""
        return len(self._actors.actors)

    def _put(self, shared: Arrays | NDArray[Any]) -> Any:
        size = shared.nbytes if isinstance(shared, np.ndarray) else num_bytes(shared)
        if size * self.num_workers <= INLINE_BYTES:
            return shared
        return self._ray.put(shared)

    def _train(self, shared: Any, order: Order, shares: list[Share]) -> dict[int, Any]:
        begin = perf_counter()
        if self._seconds < STEAL_FROM_SECONDS:
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
    return EngineError(f"a Ray worker could not start: {described(error)}")

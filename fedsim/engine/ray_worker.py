"""What runs in a Ray actor: apart from the grid, so that it imports neither Flower nor pandas."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from fedsim.engine.claims import Claims
from fedsim.engine.imports import Origin, extend_path, origins
from fedsim.engine.reduction import Sum
from fedsim.engine.replies import Replies
from fedsim.engine.worker import Order, Share, Task, Worker
from fedsim.models.net import Arrays

if TYPE_CHECKING:
    from ray import ObjectRef


class RayWorker(Worker):
    """A worker that is there before its task: it imports what it needs in the meantime.

    Ray starts it, gives it what is in shared memory, and says why it failed. The calls themselves
    come over a socket, in a tenth of the time that Ray's own take.

    Parameters
    ----------
    path : sequence of str
        Folders to search for the user's own modules.
    """

    def __init__(self, path: Sequence[str]) -> None:
        extend_path(path)

    def begin(self, task: list[ObjectRef[Task]], address: str, claims: Path) -> dict[str, Origin]:
        """Read the task from shared memory, and listen on a Unix socket that is made for it.

        ``claims`` is the file in which the workers say what they take.

        Returns which files this process imports. The task's one reference comes in a list: Ray
        would unpack a bare one outside this method.
        """
        contents = ray.get(task[0])
        super().__init__(contents)
        self._claims = Claims(claims)
        self._warned: list[str] = []
        warnings.showwarning = lambda message, *_, **__: self._warned.append(str(message))
        self._listener = Listener(address, "AF_UNIX")
        self._driver: Connection | None = None
        return origins(contents.packages)

    def serve(self, *shared: Any) -> None:
        """Answer calls until an empty one comes, or the driver hangs up.

        A call is a method's name, its arguments, and where among them those of Ray's memory go:
        ``shared``, which later calls need not use. One that raises ends this, too, so that Ray
        tells the driver. An answer is what the method returned, and what was warned of.
        """
        if self._driver is None:
            self._driver = self._listener.accept()
        try:
            while packed := self._next():
                method, arguments, places = pickle.loads(packed)
                for place, argument in zip(places, shared, strict=False):
                    arguments[place] = argument
                found = getattr(self, method)(*arguments)
                answer = pickle.dumps((found, self._warned), protocol=5)
                self._warned.clear()
                with suppress(ConnectionError):  # then there is no next call, either
                    self._driver.send_bytes(answer)
        except BaseException:
            self._hang_up()
            raise

    def train_some(
        self,
        arrays: Arrays,
        order: Order,
        shares: Sequence[Share],
        begun: int,
        worker: int,
    ) -> tuple[Replies, dict[int, Sum], dict[str, float]]:
        """`train` the share of a worker, and of the others what they haven't begun.

        On a GPU, where as many as fit train at a time, only its own.

        Parameters
        ----------
        shares : sequence of Share
            Of all workers.
        begun, worker : int
            As `fedsim.engine.claims.Claims.take` asks for them.
        """
        leaves = [leaf for share in shares for leaf in share]
        sizes = [len(share) for share in shares]

        def taken() -> Iterator[Share]:
            while places := self._claims.take(begun, worker, sizes):
                yield [leaves[place] for place in places]

        alone = self._device.type != "cpu"
        return self.train(arrays, order, shares[worker], None if alone else taken())

    def _next(self) -> bytes:
        assert self._driver is not None
        try:
            return self._driver.recv_bytes()
        except (EOFError, ConnectionError):
            self._hang_up()
            return b""

    def _hang_up(self) -> None:
        assert self._driver is not None
        self._driver.close()
        self._driver = None

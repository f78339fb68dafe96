"""What runs in a Ray actor: apart from the grid, so that it imports neither Flower nor pandas."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from fedsim.engine.worker import Task, Worker, extend_path, fingerprint

if TYPE_CHECKING:
    from ray import ObjectRef


class RayWorker(Worker):
    """A worker that reads its task from shared memory.

    Parameters
    ----------
    path : sequence of str
        Folders to search for the user's own modules.
    task : list of ObjectRef
        The task's one reference, in a list: Ray would unpack a bare one before ``path`` is set.
    """

    def __init__(self, path: Sequence[str], task: list[ObjectRef[Task]]) -> None:
        extend_path(path)
        contents = ray.get(task[0])
        self._packages = contents.packages
        super().__init__(contents)

    def call(self, packed: bytes, *shared: Any) -> bytes:
        """Call a method: its name, its arguments, and where among them those of Ray's memory go."""
        method, arguments, places = pickle.loads(packed)
        for place, argument in zip(places, shared, strict=True):
            arguments[place] = argument
        return pickle.dumps(getattr(self, method)(*arguments), protocol=5)

    def fingerprint(self) -> dict[str, str]:
        """Return which files this process imports."""
        return fingerprint(self._packages)

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
    """A worker that is there before its task: it imports what it needs in the meantime.

    Parameters
    ----------
    path : sequence of str
        Folders to search for the user's own modules.
    """

    def __init__(self, path: Sequence[str]) -> None:
        extend_path(path)

    def begin(self, task: list[ObjectRef[Task]]) -> dict[str, str]:
        """Read the task from shared memory, and return which files this process imports.

        The task's one reference comes in a list: Ray would unpack a bare one outside this method.
        """
        contents = ray.get(task[0])
        super().__init__(contents)
        return fingerprint(contents.packages)

    def call(self, packed: bytes, *shared: Any) -> bytes:
        """Call a method: its name, its arguments, and where among them those of Ray's memory go."""
        method, arguments, places = pickle.loads(packed)
        for place, argument in zip(places, shared, strict=True):
            arguments[place] = argument
        return pickle.dumps(getattr(self, method)(*arguments), protocol=5)

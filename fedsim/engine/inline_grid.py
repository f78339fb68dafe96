"""The grid whose one worker is this process: for debugging, notebooks and tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.engine.grid import SimulatedGrid
from fedsim.engine.worker import Task, Worker
from fedsim.models import Arrays


class InlineGrid(SimulatedGrid):
    """The grid that starts no process."""

    def __init__(self, task: Task, versions: NDArray[np.int8] | None = None) -> None:
        super().__init__(task, versions)
        self._threads = torch.get_num_threads()
        try:
            self._worker = Worker(task)
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        """One."""
        return 1

    def _put(self, shared: Arrays | NDArray[Any]) -> Any:
        return shared

    def _call(self, work: dict[int, tuple[str, tuple[Any, ...]]]) -> dict[int, Any]:
        return {
            worker: getattr(self._worker, method)(*arguments)
            for worker, (method, arguments) in work.items()
        }

    def close(self) -> None:
        """Give PyTorch its threads back: a worker takes one, and this process goes on."""
        torch.set_num_threads(self._threads)
        super().close()

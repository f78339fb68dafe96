"""Who trains which leaf of a cohort's tree: a worker that is done early takes over from others.

The leaves are shared out by what they are expected to cost, but processors are shared with other
programs, and clients differ. Whoever trains a leaf, its sum is the same.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from math import ceil
from pathlib import Path

FREE = 0
NUMBER = array("Q").itemsize


class Claims:
    """What has been taken in this round, in a small file that all processes on this machine open.

    Parameters
    ----------
    path : Path
        The file; it is made where it isn't there.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     claims = Claims(Path(folder) / "claims")
    ...     round = claims.begin(6)
    ...     [claims.take(round, worker, [4, 2]) for worker in (0, 1, 1, 1, 0)]
    ...     claims.close()
    [[0, 1], [4], [5], [3], [2]]
    """

    def __init__(self, path: Path) -> None:
        self._opened = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        self._file = self._opened.fileno()

    def begin(self, leaves: int) -> int:
        """Begin with so many leaves of which none is taken; returns a number for `take`."""
        with self._locked():
            begun = (self._read() or [0])[0] + 1
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, array("Q", [begun, *[FREE] * leaves]), 0)
        return begun

    def take(self, begun: int, worker: int, shares: Sequence[int]) -> list[int]:
        """Return the places of the leaves that a worker trains next.

        Half of what is left of its own share, from the left; and then, one by one and from the
        right, those of the worker with most left. None where all are taken, or where `begin` was
        called again.

        Parameters
        ----------
        begun : int
            What `begin` returned.
        worker : int
            Who asks, >= 0.
        shares : sequence of int
            How many leaves each worker's share has; they stand one after the other.
        """
        bounds = [0, *accumulate(shares)]
        with self._locked():
            now, *owners = self._read()
            if now != begun:
                return []
            free = [
                [place for place in range(begin, end) if owners[place] == FREE]
                for begin, end in pairwise(bounds)
            ]
            own, most = free[worker], max(free, key=len)
            taken = own[: ceil(len(own) / 2)] or most[-1:]
            for place in taken:
                self._write(place, worker + 1)
        return taken

    def release(self, worker: int) -> None:
        """Let others take what a worker has taken: it is dead, and what it did is lost."""
        with self._locked():
            for place, owner in enumerate(self._read()[1:]):
                if owner == worker + 1:
                    self._write(place, FREE)

    def close(self) -> None:
        """Close the file; nothing can be taken afterwards."""
        self._opened.close()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)  # of a process that dies, the system lets it go
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read(self) -> list[int]:
        """Return the round's number, and for each leaf a number that stands for who took it."""
        size = os.fstat(self._file).st_size
        return memoryview(os.pread(self._file, size, 0)).cast("Q").tolist()

    def _write(self, place: int, owner: int) -> None:
        os.pwrite(self._file, array("Q", [owner]), NUMBER * (1 + place))

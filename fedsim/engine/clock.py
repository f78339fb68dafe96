"""Where the time of a round goes."""

from __future__ import annotations

import time


class Clock:
    """Adds up seconds by part.

    Examples
    --------
    >>> clock = Clock()
    >>> clock.lap("train")
    >>> clock.lap("reduce")
    >>> clock.lap("train")
    >>> list(clock.seconds)
    ['train', 'reduce']
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget everything and begin now."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the last lap, or since the beginning, as that of a part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

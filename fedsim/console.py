"""The command's standard output and error, where they may be closed, full or of few characters."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedsim.errors import EngineError


class _Results(io.TextIOWrapper):
    """Standard output: a full disk is told, and a pipe that is closed ends the program."""

    def write(self, text: str) -> int:
        """Write."""
        with self._told():
            return super().write(text)

    def flush(self) -> None:
        """Flush."""
        with self._told():
            super().flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:  # click and rich know what to do
                raise
            # What couldn't be written would be tried once more at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise EngineError(f"can't print the results: {error.strerror or error}") from None


class _Aside(io.TextIOWrapper):
    """Standard error: a run goes on where its progress can't be shown."""

    def write(self, text: str) -> int:
        """Write, or not."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        with suppress(OSError):
            super().flush()


def guard_output() -> None:
    """Be prepared that standard output or error can't be written as it should be."""
    if isinstance(out := sys.stdout, io.TextIOWrapper):  # not closed
        sys.stdout = _Results(
            out.buffer,
            out.encoding,
            "replace",
            line_buffering=out.line_buffering,
            write_through=out.write_through,
        )
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding, errors = sys.stderr.encoding, sys.stderr.errors
        sys.stderr = _Aside(sys.stderr.buffer, encoding, errors, line_buffering=True)

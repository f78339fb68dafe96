"""The command's standard output and error, where they may be closed, full or of few characters."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console

from fedsim.errors import EngineError


class Output(Console):
    """Where results go; a full disk is told, and a pipe that is closed ends the program."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, as rich does."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.errno == errno.EPIPE:  # click and rich know what to do
                raise
            # What couldn't be written would be tried once more at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def let_go_on() -> None:
    """Let a run go on where standard output or error can't be written as it should be."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not closed
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        encoding, errors = sys.stderr.encoding, sys.stderr.errors
        sys.stderr = _Aside(sys.stderr.buffer, encoding, errors, line_buffering=True)

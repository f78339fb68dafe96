"""The command's standard output and error: what is shown there, and how errors end the command.

Both may be closed, full or of few characters.
"""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from fedsim.errors import EngineError, UserError, described
from fedsim.interrupts import Terminated

if not os.environ.get("COLUMNS", "1").strip("0"):  # 0, or nothing: rich would show nothing at all
    del os.environ["COLUMNS"]
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_warned: set[str] = set()
_SETTING = re.compile(r"(data|clients|model|method|training|evaluation|engine)\.\w+ = ")


def show_line(line: str) -> None:
    """Print a line of results as it is, however long."""
    out.print(line, markup=False, soft_wrap=True)


def show_note(line: str) -> None:
    """Print a line beside the results as it is, however long."""
    err.print(line, markup=False, soft_wrap=True)


def show_error(line: str) -> None:
    """Print what went wrong."""
    err.print(f"error: {line}", markup=False, soft_wrap=True, style="bold red")


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning, once; Python forgets now and then what it has shown."""
    text = str(message)
    if text not in _warned:
        _warned.add(text)
        err.print(f"warning: {text}", markup=False, soft_wrap=True, style="yellow")


def usage(error: click.ClickException) -> str:
    """Say in one line what is wrong with the arguments."""
    text = error.format_message().rstrip(".")
    if type(error) is click.BadParameter and error.param is not None:
        text = f"{error.param.opts[0]}: {error.message.rstrip('.')}"
    context = error.ctx if isinstance(error, click.UsageError) else None
    text = " ".join(text.split())
    return f"{text}; see {context.command_path} --help" if context is not None else text


@contextmanager
def clear_errors(file: Path | None = None) -> Iterator[None]:
    """Show what the user did wrong as plain lines, with exit code 2.

    So is what the system refuses. A line about a setting names the experiment file. A signal's
    exit code is 128 + its number.
    """
    try:
        yield
    except UserError as error:
        for line in str(error).split("\n"):
            if file is not None and _SETTING.match(line):
                line = f"{file}: {line}"
            show_error(line)
        raise click.exceptions.Exit(2) from None
    except OSError as error:
        # Of a closed pipe click and rich know what to do; without a number it isn't the system's.
        if error.errno in (None, errno.EPIPE):
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        show_error(place + " ".join((error.strerror or described(error)).split()))
        raise click.exceptions.Exit(2) from None
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        raise click.exceptions.Exit(128 + number) from None


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

"""Ctrl-C; SIGTERM, with which a queue or a container ends a program; and SIGHUP, a terminal's."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: whatever stops at Ctrl-C stops at this, too.

    Parameters
    ----------
    number : int
        Of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


class Noted:
    """The signal that has come, if any."""

    def __init__(self) -> None:
        self.number: int | None = None

    def raise_again(self) -> None:
        """Raise what the signal has raised, if one has come."""
        if self.number is not None:
            raise _interrupt(self.number)


@contextmanager
def noted_interrupts() -> Iterator[Noted]:
    """Note every interrupt, which raises KeyboardInterrupt as usual, or `Terminated`.

    Python drops the exception where the signal arrives inside a destructor or a callback, and
    Ray has many of both; the note lets the round loop stop all the same.
    """
    noted = Noted()

    def note(number: int, frame: FrameType | None) -> None:
        noted.number = number
        noted.raise_again()

    with _handled_by(note):
        yield noted


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Let an interrupt wait for the end of the block; a second one doesn't.

    Ray breaks down, or leaves a folder behind, where it is interrupted as it starts.
    """
    held = Noted()

    def hold(number: int, frame: FrameType | None) -> None:
        held.raise_again()
        held.number = number

    try:
        with _handled_by(hold):
            yield
    finally:
        held.raise_again()


def _interrupt(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals for a while; others than SIGINT only if the program does nothing else.

    Ray's handler of SIGTERM, which only exits, is nothing else; to ignore SIGHUP, as under
    ``nohup``, is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    numbers = [signal.SIGINT]
    for number in (signal.SIGTERM, signal.SIGHUP):
        known = signal.getsignal(number)
        whose = getattr(known, "__module__", "").partition(".")[0]
        if known is signal.SIG_DFL or whose in ("fedsim", "ray"):
            numbers.append(number)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)

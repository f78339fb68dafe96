"""Ctrl-C, and SIGTERM, with which a queue or a container ends a program: the same here."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever stops at Ctrl-C stops at this, too."""


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
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals for a while; not SIGTERM where the program has a handler of its own.

    Ray's, which only exits, isn't one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    numbers = [signal.SIGINT]
    of_term = signal.getsignal(signal.SIGTERM)
    whose = getattr(of_term, "__module__", "").partition(".")[0]
    if of_term is signal.SIG_DFL or whose in ("fedsim", "ray"):
        numbers.append(signal.SIGTERM)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)

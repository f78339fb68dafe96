"""Runs experiments in processes of their own, several at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tomllib
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from fedsim.config import Experiment
from fedsim.errors import UserError, described

_SPAWN = multiprocessing.get_context("spawn")  # Ray and PyTorch don't survive a fork
_INTERRUPTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass(frozen=True)
class Event:
    """Something that happened to one of several runs.

    Attributes
    ----------
    run : int
        Number of the run, from 0.
    kind : {"begun", "round", "warning", "ended"}
        A run that had finished before ends without having begun.
    what
        ``"round"``: the row of ``rounds.csv``; ``"warning"``: its text; ``"ended"``: what stopped
        the run, None if nothing did; ``"begun"``: None.
    """

    run: int
    kind: Literal["begun", "round", "warning", "ended"]
    what: Any = None


def run_all(
    experiments: Sequence[Experiment], folders: Sequence[Path], jobs: int
) -> Generator[Event]:
    """Run what hasn't finished in its folder yet, some runs at a time.

    A run that was stopped goes on where it stopped. One that can't be run, breaks, or takes its
    process along leaves the others alone. Where the iterator is closed early, as after Ctrl-C, the
    runs that go on write down what they have and stop.

    Parameters
    ----------
    experiments : sequence of Experiment
        What to run, in this order.
    folders : sequence of Path
        The folder of each.
    jobs : int
        How many at a time, >= 1.

    Yields
    ------
    Event
        What happens, as it happens.
    """
    waiting = iter(range(len(experiments)))
    busy: dict[Connection, tuple[_Child, int]] = {}

    def give_work(child: _Child | None) -> None:
        number = next(waiting, None)
        if number is None:
            if child is not None:
                child.connection.close()
            return
        work = experiments[number].to_toml(), folders[number]
        try:
            child = child or _Child()
            child.connection.send(work)
        except OSError:  # it has died since its last run, which this one has nothing to do with
            child = _Child()
            with suppress(OSError):  # found out when it should answer
                child.connection.send(work)
        busy[child.connection] = child, number

    # To start it lets Ctrl-C through, which a child that is being started must not meet.
    resource_tracker.ensure_running()
    try:
        for _ in range(jobs):
            give_work(None)
        while busy:
            for connection in wait([*busy]):
                assert isinstance(connection, Connection)
                child, number = busy[connection]
                alive: _Child | None = child
                try:
                    kind, what = connection.recv()
                except (EOFError, OSError):
                    kind, what, alive = "ended", child.cause_of_death(), None
                if kind == "ended":
                    del busy[connection]
                    give_work(alive)
                yield Event(number, kind, what)
    finally:
        _stop([child for child, _ in busy.values()])


class _Child:
    """A process that runs one experiment after the other."""

    def __init__(self) -> None:
        self.connection, there = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(there,))
        # Until the child is ready for it, an interrupt waits.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()

    def cause_of_death(self) -> str:
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        if code == 0:
            return "it was interrupted"
        if code > 0:
            return f"its process ended with exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:  # a real-time signal
            name = f"signal {-code}"
        memory = " (perhaps the memory was full; --jobs 1 takes least)" * (code == -signal.SIGKILL)
        return f"its process was ended by {name}{memory}"


def _stop(children: Sequence[_Child]) -> None:
    """Let runs stop as after Ctrl-C; a second Ctrl-C doesn't wait for them."""
    try:
        for child in children:
            assert child.process.pid is not None
            with suppress(ProcessLookupError):
                os.kill(child.process.pid, signal.SIGINT)
            # One that has missed it stops when it can't tell of its next round.
            child.connection.close()
        for child in children:
            child.process.join()
    except KeyboardInterrupt:
        for child in children:
            child.process.kill()
        raise


# ----- in a process of its own ---------------------------------------------------------------


def _work(connection: Connection) -> None:
    """Run the experiments that come through a connection, until it is closed."""
    # Ctrl-C in a terminal goes to the sweep alone, which passes it on once.
    os.setpgid(0, 0)

    def send(kind: str, what: Any) -> None:
        connection.send((kind, what))

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        with suppress(OSError):
            send("warning", str(message))

    warnings.showwarning = show_warning
    # The sweep may have been killed; then a run stops after its round.
    with suppress(KeyboardInterrupt, EOFError, OSError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        while True:
            text, folder = connection.recv()
            send("ended", _run(text, folder, send))


def _run(text: str, folder: Path, send: Callable[[str, Any], None]) -> str | None:
    """Run an experiment, or the rest of it; return what stopped it."""
    from fedsim.run.resume import has_ended, last_checkpoint, warn_of_changes
    from fedsim.simulation import simulate

    try:
        experiment = Experiment(**tomllib.loads(text))
        checkpoint = last_checkpoint(experiment, folder)
        done = checkpoint is not None and checkpoint.round == experiment.training.rounds
        if not done or not has_ended(folder):
            send("begun", None)
            simulate(experiment, out=folder, resume=True, observer=partial(send, "round"))
        elif checkpoint is not None:
            warn_of_changes(experiment, checkpoint, folder)
    except UserError as error:
        return str(error)
    except (Exception, SystemExit) as error:  # a strategy of the user's own may raise all kinds
        return described(error)
    return None

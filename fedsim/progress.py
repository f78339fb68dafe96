"""How far runs are: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from datetime import timedelta
from math import isnan
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Board:
    """Shows each run that goes on: on a terminal a bar, elsewhere a line for each evaluated round.

    Parameters
    ----------
    console : rich.console.Console
        Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = (
            Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
                transient=True,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        """Start to show."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()

    def begin(self, rounds: int, name: str = "") -> RunProgress:
        """Return what shows a run of so many rounds, which begins; several have names."""
        return RunProgress(rounds, f"{name}: " if name else "", self._console, self._bars)


class RunProgress:
    """Shows each finished round of a run: accuracy, clients a second and the time left."""

    def __init__(self, rounds: int, prefix: str, console: Console, bars: Progress | None) -> None:
        self._rounds = rounds
        self._prefix = prefix
        self._console = console
        self._bars = bars
        self._bar: TaskID | None = None
        if bars is not None:
            self._bar = bars.add_task(f"{prefix}starting", total=rounds, figures="")
        self._seconds = 0.0
        self._finished = 0
        self._clients = 0
        self._known: dict[str, str] = {}

    def __call__(self, row: dict[str, Any]) -> None:
        """Show a finished round, given its row of ``rounds.csv``."""
        self._clients += row["clients"]
        # The rounds' own time: starting the workers says nothing about the time left.
        self._seconds += row["seconds"]
        self._finished += 1  # of a resumed run others were before
        speed = f"{self._clients / self._seconds:.1f} clients/s"
        accuracies = {name: row[f"{name}_accuracy"] for name in ("generic", "personal")}
        # A method may lack a generic model, and a strategy may test no client.
        known = {name: f"{100 * a:.1f} %" for name, a in accuracies.items() if not isnan(a)}
        evaluated = bool(known)
        if evaluated:
            self._known = known
        accuracy = ", ".join(f"{name} {a}" for name, a in self._known.items())
        text = f"{self._prefix}round {row['round']}/{self._rounds}"
        if self._bars is not None and self._bar is not None:
            # Beside a name there is no room for more in 80 columns.
            figures = " / ".join(self._known.values()) if self._prefix else f"{accuracy}  {speed}"
            self._bars.update(self._bar, description=text, completed=row["round"], figures=figures)
        elif evaluated:
            left = timedelta(
                seconds=round(self._seconds / self._finished * (self._rounds - row["round"]))
            )
            line = f"{text}: {accuracy}, {speed}, {left} left"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        """Take the run's bar away."""
        if self._bars is not None and self._bar is not None:
            self._bars.remove_task(self._bar)

"""How far a run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from datetime import timedelta
from math import isnan
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows each finished round: accuracy, clients a second and the time left.

    On a terminal one bar; elsewhere a line for each evaluated round.

    Parameters
    ----------
    rounds : int
        Rounds in all.
    console : rich.console.Console
        Where to show it.
    """

    def __init__(self, rounds: int, console: Console) -> None:
        self._rounds = rounds
        self._console = console
        self._seconds = 0.0
        self._finished = 0
        self._clients = 0
        self._accuracy = ""
        self._bar = (
            RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
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
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._rounds, figures="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        """Show a finished round, given its row of ``rounds.csv``."""
        self._clients += row["clients"]
        # The rounds' own time: starting the workers says nothing about the time left.
        self._seconds += row["seconds"]
        self._finished += 1  # of a resumed run others were before
        speed = f"{self._clients / self._seconds:.1f} clients/s"
        accuracies = {name: row[f"{name}_accuracy"] for name in ("generic", "personal")}
        # A method may lack a generic model, and a strategy may test no client.
        known = [f"{name} {100 * a:.1f} %" for name, a in accuracies.items() if not isnan(a)]
        evaluated = bool(known)
        if evaluated:
            self._accuracy = ", ".join(known)
        name = f"round {row['round']}/{self._rounds}"
        if self._bar is not None:
            figures = f"{self._accuracy}  {speed}"
            self._bar.update(self._task, description=name, completed=row["round"], figures=figures)
        elif evaluated:
            left = timedelta(
                seconds=round(self._seconds / self._finished * (self._rounds - row["round"]))
            )
            self._console.print(f"{name}: {self._accuracy}, {speed}, {left} left", highlight=False)

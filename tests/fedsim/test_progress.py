"""What a user sees while runs go on."""

import io
import re
from math import nan

from rich.console import Console

from fedsim.progress import Board


def row(number, generic=nan, personal=nan):
    accuracies = {"generic_accuracy": generic, "personal_accuracy": personal}
    return {"round": number, "clients": 10, "seconds": 2.0, **accuracies}


def shown(terminal, show):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with Board(console) as board:
        show(board)
        console.print("END")
    return file.getvalue()


def test_without_a_terminal_a_line_for_each_evaluated_round():
    def show(board):
        progress = board.begin(4)
        for figures in (row(1), row(2, 0.5, 0.75), row(3), row(4, 0.625)):
            progress(figures)
        progress.end()

    assert shown(False, show).splitlines() == [
        "round 2/4: generic 50.0 %, personal 75.0 %, 5.0 clients/s, 0:00:04 left",
        "round 4/4: generic 62.5 %, 5.0 clients/s, 0:00:00 left",
        "END",
    ]


def test_a_resumed_run_knows_how_long_the_rest_takes():
    assert shown(False, lambda board: board.begin(9)(row(8, 0.5))) == (
        "round 8/9: generic 50.0 %, 5.0 clients/s, 0:00:02 left\nEND\n"
    )


def test_runs_at_a_time_are_told_apart_by_name():
    def show(board):
        first, second = board.begin(2, "lr=0.1,[x]"), board.begin(2, "lr=1.0")
        second(row(1, 0.25))
        first(row(1, 0.5))

    assert [line.partition(", ")[0] for line in shown(False, show).splitlines()] == [
        "lr=1.0: round 1/2: generic 25.0 %",
        "lr=0.1,[x]: round 1/2: generic 50.0 %",
        "END",
    ]


def test_on_a_terminal_a_bar_for_each_run_that_goes_on():
    def show(board):
        first, second = board.begin(2, "lr=0.1"), board.begin(2, "lr=1.0")
        first(row(1, 0.5))
        second.end()

    plain = re.sub(r"\x1b\[[\d;?]*\w", "", shown(True, show))
    bars = [
        line.partition("━")[0].strip()
        for line in re.split(r"[\r\n]", plain)
        if line.endswith(" left")
    ]
    assert {"lr=0.1: starting", "lr=1.0: starting"} <= {*bars}
    assert bars[-1] == "lr=0.1: round 1/2"  # the second, which stood below, has ended

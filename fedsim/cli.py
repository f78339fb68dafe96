"""The command ``fedsim``."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.markup import escape
from rich.table import Table

from fedsim import console, registry
from fedsim.config import Experiment
from fedsim.errors import ConfigError, UserError
from fedsim.experiment_file import load
from fedsim.interrupts import noted_interrupts

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.sweep import Planned

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Simulate federated learning on long-tailed, partly labelled clients.",
)

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", show_default=False)]


Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a setting; repeatable."),
]


def _folder(text: str) -> Path:
    """Return a folder with ``~`` written out, which shells leave to us in ``--out=~/runs``."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (pathlib's raises for an unknown user)


OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        parser=_folder,
        help="Folder for the results; by default in runs/.",
    ),
]


class Kinds(StrEnum):
    """What ``fedsim list`` lists."""

    methods = "methods"
    clients = "clients"
    datasets = "datasets"
    models = "models"
    partitions = "partitions"


@app.command()
def run(
    file: ExperimentFile,
    set_: Overrides = None,
    out: OutFolder = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, after its last round."),
    ] = False,
) -> None:
    """Run an experiment and report each client's accuracy."""
    with console.clear_errors(file):
        if resume and out is None:
            raise ConfigError("--resume: say with --out which folder's run is to go on")
        experiment = load(file, set_ or [])
        from fedsim.progress import Board
        from fedsim.simulation import simulate

        with _run_folder(out, experiment) as folder, Board(console.err) as board:
            progress = board.begin(experiment.training.rounds)
            try:
                result = simulate(experiment, out=folder, resume=resume, observer=progress)
            except KeyboardInterrupt:
                console.show_note(_how_to_go_on(folder))
                raise
        _show(result.rounds, result.clients, result.names)
        console.show_line(f"report: {folder / 'report.html'}")
        console.show_line(f"results and figures: {folder}")


@app.command()
def sweep(
    file: ExperimentFile,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="TABLE.KEY=V1,V2",
            help="Values of a setting to run; repeatable.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Run each with so many seeds.")] = 1,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            help="How many runs at a time; by default as many as there are cores, one on a GPU.",
            show_default=False,
        ),
    ] = None,
    set_: Overrides = None,
    out: OutFolder = None,
) -> None:
    """Run every combination of some settings, each with several seeds, and compare them.

    The same command with the same --out goes on with a sweep that was stopped.
    """
    with console.clear_errors(file):
        from fedsim.report.comparison import compare, read_runs
        from fedsim.report.comparison_table import comparison_table
        from fedsim.report.report import write_comparison
        from fedsim.run.directory import check_no_run, remove
        from fedsim.sweep import plan

        planned = plan(file, grid or [], seeds, set_ or [])
        with _run_folder(out, planned[0].experiment, suffix="-sweep") as folder:
            check_no_run(folder)
            try:
                errors = _run_planned(planned, folder, jobs)
            except KeyboardInterrupt:
                line = "stopped; the same command goes on, with --out "
                console.show_note(line + shlex.quote(str(folder)))
                raise
        done = [folder / one.name for i, one in enumerate(planned) if i not in errors]
        failed = [f"{planned[i].name}: {why}" for i, why in sorted(errors.items())]
        if done:
            remove(folder / "comparison.html")  # should the new one fail
            seed_groups = compare(read_runs(done))
            page = write_comparison(folder, seed_groups, planned[0].experiment.name, failed)
            console.out.print(comparison_table(seed_groups))
            console.show_line(f"comparison: {page}")
            console.show_line(f"each run's report: {folder}/*/report.html")
        if failed:
            raise ConfigError(f"{len(failed)} of {len(planned)} runs failed, as said above")


def _run_planned(planned: list[Planned], folder: Path, jobs: int | None) -> dict[int, str]:
    """Run a sweep, and show how; return what stopped the runs that failed, by their numbers."""
    from fedsim.jobs import run_all
    from fedsim.progress import Board, RunProgress
    from fedsim.sweep import jobs_at_a_time, on_its_cores

    jobs = jobs_at_a_time(planned, jobs)
    experiments = [on_its_cores(one.experiment, jobs) for one in planned]
    errors: dict[int, str] = {}
    progress: dict[int, RunProgress] = {}
    # What several runs are warned of alike is shown once, with the name of the first. The names
    # make the lines that `show_warning` compares different ones.
    warned: set[str] = set()
    folders = [folder / one.name for one in planned]
    with (
        noted_interrupts() as interrupted,
        Board(console.err) as board,
        closing(run_all(experiments, folders, jobs)) as events,
    ):
        for event in events:
            interrupted.raise_again()
            i, name = event.run, planned[event.run].name
            if event.kind == "begun":
                console.show_note(f"run {i + 1} of {len(planned)}: {name}")
                progress[i] = board.begin(planned[i].experiment.training.rounds, name)
            elif event.kind == "round":
                progress[i](event.what)
            elif event.kind == "warning" and event.what not in warned:
                warned.add(event.what)
                console.show_warning(f"{name}: {event.what}")
            elif event.kind == "ended":
                if i in progress:
                    progress[i].end()
                if event.what is not None:
                    errors[i] = event.what
                    console.show_error(f"{name}: {event.what}")
    return errors


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", show_default=False)],
) -> None:
    """Draw a run's figures and write its report anew, also of one that was stopped or goes on."""
    with console.clear_errors():
        from fedsim.report.report import report_of

        run, page = report_of(folder)
        _show(run.rounds, run.clients, run.names)
        console.show_line(f"report: {page}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            parser=_folder,
            help="Folder for a page, figures and a CSV file.",
        ),
    ] = None,
    target: Annotated[
        list[float] | None,
        typer.Option(
            "--target",
            metavar="PERCENT",
            help="Compare also in which evaluated round each first has this accuracy; repeatable.",
        ),
    ] = None,
) -> None:
    """Compare runs; a folder of runs stands for all of them, and seeds are put together."""
    with console.clear_errors():
        from fedsim.report.comparison import compare, read_runs
        from fedsim.report.comparison_table import comparison_table
        from fedsim.report.report import write_comparison

        seed_groups = compare(read_runs(folders), target or [])
        page = None if out is None else write_comparison(out, seed_groups, "Comparison")
        console.out.print(comparison_table(seed_groups))
        if page is not None:
            console.show_line(f"comparison: {page}")


def _show(rounds: pd.DataFrame, clients: pd.DataFrame, names: pd.DataFrame) -> None:
    """Print the table of the clients, and how a run ended."""
    from fedsim.report.tables import client_table, summary_line
    from fedsim.run.frames import last_round

    if not last_round(clients).empty:
        console.out.print(client_table(clients, names))
    console.show_line(summary_line(rounds, clients))


@app.command()
def partition(file: ExperimentFile, set_: Overrides = None, out: OutFolder = None) -> None:
    """Show who holds what, without training."""
    with console.clear_errors(file):
        experiment = load(file, set_ or [])
        from fedsim.report.figures.class_counts import class_counts
        from fedsim.report.figures.style import save
        from fedsim.report.tables import partition_table
        from fedsim.run.directory import RunDirectory
        from fedsim.simulation import load_federation

        federation = load_federation(experiment)
        table, names = federation.table(), federation.names()
        with _run_folder(out, experiment, suffix="-partition") as path:
            folder = RunDirectory(path)
            folder.write_partition(experiment, table, names)
        shape = federation.num_clients, federation.source.num_classes
        picture = folder.path / "class_counts.png"
        save(class_counts(table, *shape, experiment.name, names), picture)
        folder.release()
        console.out.print(partition_table(table, federation.num_clients, names))
        console.show_line(f"who holds what: {folder.path / 'partition.csv'}")
        console.show_line(f"picture: {picture}")


@app.command("list")
def list_(
    what: Annotated[Kinds, typer.Argument(show_default=False)],
) -> None:
    """List what an experiment can name, with the settings of each and their defaults."""
    with console.clear_errors():
        table = Table("name", "settings and their defaults", box=None)
        for name in registry.names(_KIND[what]):
            try:
                settings = _settings(what, name)
                shown = _as_written(what, name)
            except ConfigError as error:  # of another package: the rest can be listed
                table.add_row(name, f"[red]{escape(str(error))}[/]")
                continue
            table.add_row(shown, ", ".join(settings.values()))
        console.out.print(table)


_KIND: dict[Kinds, registry.Kind] = {
    Kinds.methods: "method",
    Kinds.clients: "client",
    Kinds.datasets: "dataset",
    Kinds.models: "model",
    Kinds.partitions: "partition",
}


def _as_written(what: Kinds, name: str) -> str:
    """Return how an experiment names a component: a source that reads files with their place."""
    placed = what is Kinds.datasets and registry.accepts(registry.find("dataset", name), "location")
    return f"{name}:PATH" if placed else name


def _settings(what: Kinds, name: str) -> dict[str, str]:
    """Return what can be set of a component, each with its default as text."""
    components = [registry.find(_KIND[what], name)]
    if what is Kinds.methods and (update := registry.find_update(name, "")) is not None:
        components.append(update)
    found = {}
    for model in map(registry.options, components):
        defaults = model.model_construct().model_dump(mode="json")
        for key in model.model_fields:
            found[key] = f"{key} = {defaults[key]!r}" if key in defaults else f"{key} (required)"
    return found


def _how_to_go_on(folder: Path) -> str:
    """Return what to say of a run in a folder that the user has stopped."""
    from fedsim.run.directory import CHECKPOINT

    if not (folder / CHECKPOINT).exists():
        return "stopped before the first round"
    resume = ["fedsim", "run", f"{folder}/experiment.toml", "--resume", "--out", f"{folder}"]
    return (
        f"stopped; the finished rounds are in {folder}; go on with\n{shlex.join(resume)}\n"
        f"or see them with\n{shlex.join(['fedsim', 'report', f'{folder}'])}"
    )


@contextmanager
def _run_folder(out: Path | None, experiment: Experiment, suffix: str = "") -> Iterator[Path]:
    """Give --out, or a new folder in runs/, which goes again where it stays empty.

    It is made at once, so that no command that starts in the same second takes its name.
    """
    if out is not None:
        yield out
        return
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{experiment.name}-{stamp}{suffix}"
    folder, count = base, 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            count += 1
            folder = base.with_name(f"{base.name}-{count}")
    try:
        yield folder
    finally:
        with suppress(OSError):  # not empty
            folder.rmdir()
            folder.parent.rmdir()


def main() -> None:
    """Run the command line."""
    warnings.showwarning = console.show_warning
    # Modules of the user's own come last, so that none of them can hide an installed one.
    with suppress(FileNotFoundError):  # the working directory has been deleted
        here = os.getcwd()  # noqa: PTH109
        if here not in sys.path:
            sys.path.append(here)
    console.guard_output()
    os.environ["MPLBACKEND"] = "agg"  # files alone are drawn, whatever shows windows here
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except click.ClickException as error:
        console.show_error(console.usage(error))
        sys.exit(error.exit_code)
    except UserError as error:  # as the help is printed
        console.show_error(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()

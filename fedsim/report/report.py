"""All that people look at of a run, made from its folder alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from fedsim.errors import UserError
from fedsim.report.comparison import SeedGroup, all_results, runs_of
from fedsim.report.comparison_table import NOTE, comparison_rows
from fedsim.report.figures.comparison import CAPTIONS, save_comparison
from fedsim.report.figures.one_run import save_figures
from fedsim.report.norms import class_norms
from fedsim.report.page import Picture, render, write_page
from fedsim.report.text import counted
from fedsim.run.directory import check_no_run, write_whole
from fedsim.run.saved import SavedRun


def report_of(folder: Path) -> tuple[SavedRun, Path]:
    """Write the report of a run that may end, or go on, meanwhile.

    Returns
    -------
    SavedRun, Path
        The run as the report shows it, and the page.
    """
    file = folder / "run.json"
    while True:
        was = _version(file)
        run = SavedRun.read(folder)
        page = write_report(run)
        # A run that has ended since has perhaps written its own report before this one, which
        # shows an earlier state.
        if _version(file) == was:
            return run, page


def _version(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written anew; None if there is none."""
    if not file.exists():
        return None
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def write_report(run: SavedRun) -> Path:
    """Draw a run's figures and write class_norms.csv and report.html into its folder.

    Parameters
    ----------
    run : SavedRun
        The run, which may have finished, have been stopped, or still go on.

    Returns
    -------
    Path
        The page, report.html: one file with the figures in it.

    Raises
    ------
    DataError
        If a table lacks a column.
    EngineError
        If a file can't be written.
    """
    norms = None
    try:
        norms = class_norms(run)
    except UserError as error:  # all else is in the tables; what an earlier report wrote stays
        warnings.warn(f"{error}; the report goes without the heads", stacklevel=2)
    if norms is not None:
        write_whole(run.path / "class_norms.csv", norms.to_csv(index=False).encode())
    has_etf = norms is not None and "fixed ETF" in set(norms["head"])
    pictures = save_figures(
        run.path / "figures",
        rounds=run.rounds,
        clients=run.clients,
        partition=run.partition,
        training=run.training,
        norms=norms,
        etf=run.arrays["etf.weight"] if has_etf else None,
        names=run.names,
        num_clients=run.num_clients,
        num_classes=run.num_classes,
        title=run.name,
    )
    return write_page(run, pictures)


def write_comparison(
    folder: Path, seed_groups: Sequence[SeedGroup], title: str, failed: Sequence[str] = ()
) -> Path:
    """Write comparison.csv, figures and comparison.html about some runs into a folder.

    Parameters
    ----------
    folder : Path
        Made if it isn't there; files of the same names are replaced.
    seed_groups : sequence of SeedGroup
        The runs, by what they differ in.
    title : str
        Written above the page and its figures.
    failed : sequence of str
        A line for each run that isn't there, with why.

    Returns
    -------
    Path
        The page, comparison.html: one file with the figures in it.

    Raises
    ------
    EngineError
        If the folder is that of a run, or a file can't be written.
    """
    check_no_run(folder)
    write_whole(folder / "comparison.csv", all_results(seed_groups).to_csv(index=False).encode())
    pictures = save_comparison(folder / "figures", seed_groups, title)
    heads, rows = comparison_rows(seed_groups)
    runs = runs_of(seed_groups)
    page = render(
        "comparison.html.jinja",
        title=title,
        subtitle=f"{counted(len(runs), 'run')}, {counted(len(seed_groups), 'setting')}",
        failed=failed,
        note=f"Mean ± standard deviation over the seeds. {NOTE} Click a heading to sort.",
        heads=heads,
        rows=rows,
        pictures=[Picture.read(file, CAPTIONS[file.stem]) for file in pictures],
        runs=runs,
    )
    path = folder / "comparison.html"
    write_whole(path, page.encode())
    return path

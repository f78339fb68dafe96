"""All that people look at of a run, made from its folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedsim.report.comparison import NOTE, Series, comparison_rows
from fedsim.report.comparison_figures import CAPTIONS, save_comparison
from fedsim.report.figures import save_figures
from fedsim.report.norms import class_norms
from fedsim.report.page import Picture, render, write_page
from fedsim.report.run_directory import write_whole
from fedsim.report.saved_run import SavedRun


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
        If the model can't be read, or a table lacks a column.
    EngineError
        If a file can't be written, or what the clients keep is broken.
    """
    norms = class_norms(run)
    write_whole(run.path / "class_norms.csv", norms.to_csv(index=False).encode())
    pictures = save_figures(
        run.path / "figures",
        rounds=run.rounds,
        clients=run.clients,
        partition=run.partition,
        training=run.training,
        norms=norms,
        etf=run.arrays.get("etf.weight"),
        num_clients=run.num_clients,
        num_classes=run.num_classes,
        title=run.name,
    )
    return write_page(run, pictures)


def write_comparison(folder: Path, series: Sequence[Series], title: str) -> Path:
    """Write comparison.csv, figures and comparison.html about some runs into a folder.

    Parameters
    ----------
    folder : Path
        Made if it isn't there; files of the same names are replaced.
    series : sequence of Series
        The runs, by what they differ in.
    title : str
        Written above the page and its figures.

    Returns
    -------
    Path
        The page, comparison.html: one file with the figures in it.

    Raises
    ------
    EngineError
        If a file can't be written.
    """
    table = pd.concat([one.figures.assign(label=one.label) for one in series], ignore_index=True)
    table.insert(0, "label", table.pop("label"))
    write_whole(folder / "comparison.csv", table.to_csv(index=False).encode())
    pictures = save_comparison(folder / "figures", series, title)
    heads, rows = comparison_rows(series)
    runs = [(one.label, run.settings["seed"], run.path) for one in series for run in one.runs]
    page = render(
        "comparison.html.jinja",
        title=title,
        subtitle=f"{len(runs)} runs, {len(series)} settings",
        note=f"Mean ± standard deviation over the seeds. {NOTE} Click a heading to sort.",
        heads=heads,
        rows=rows,
        pictures=[Picture.read(file, CAPTIONS[file.stem]) for file in pictures],
        runs=runs,
    )
    path = folder / "comparison.html"
    write_whole(path, page.encode())
    return path

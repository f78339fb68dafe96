"""All that people look at of a run, made from its folder alone."""

from __future__ import annotations

from pathlib import Path

from fedsim.report.figures import save_figures
from fedsim.report.norms import class_norms
from fedsim.report.page import write_page
from fedsim.report.run_directory import write_whole
from fedsim.report.saved_run import SavedRun


def write_report(folder: Path | str) -> Path:
    """Draw a run's figures and write class_norms.csv and report.html into its folder.

    The run may have finished, have been stopped, or still go on.

    Parameters
    ----------
    folder : path
        A run directory, in which at least one round has finished.

    Returns
    -------
    Path
        The page, report.html: one file with the figures in it.

    Raises
    ------
    DataError
        If the folder isn't that of a run, or a file in it can't be read.
    EngineError
        If a file can't be written, or what the clients keep is broken.
    """
    run = SavedRun.read(folder)
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

"""What a run gives to Python: its tables as frames, and the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from fedsim.config import Experiment
from fedsim.metrics import accuracy_column

if TYPE_CHECKING:
    from fedsim.models import Arrays


@dataclass(frozen=True)
class Result:
    """What a run gave; the frames are those of the run directory's CSV files.

    Attributes
    ----------
    experiment : Experiment
        What was run.
    rounds : pandas.DataFrame
        A row a round.
    clients : pandas.DataFrame
        A row for each client, evaluated round and view.
    training : pandas.DataFrame
        A row for each client that trained and round: examples, loss, and the method's numbers.
    metrics : pandas.DataFrame
        A row for each number that the strategy returned besides the model: ``round``, ``phase``
        (``train`` or ``evaluate``), ``metric`` and ``value``.
    partition : pandas.DataFrame
        A row for each client and class it holds: labelled, unlabelled and test examples.
    names : pandas.DataFrame
        A row for each class, and each client, that has a name besides its number: its kind
        (``class`` or ``client``), number and name.
    arrays : dict of str to ndarray
        The global model after the last finished round.
    path : Path or None
        The run directory, if one was asked for.
    """

    experiment: Experiment
    rounds: pd.DataFrame
    clients: pd.DataFrame
    training: pd.DataFrame
    metrics: pd.DataFrame
    partition: pd.DataFrame
    names: pd.DataFrame
    arrays: Arrays
    path: Path | None

    def __repr__(self) -> str:
        """Say in a line what was run and what came out."""
        asked = self.experiment.training.rounds
        told = [f"{self.experiment.name}: {len(self.rounds)} of {asked} rounds"]
        for kind in ("generic", "personal"):
            measured = self.rounds[accuracy_column(kind)].dropna()
            if len(measured):
                told.append(f"{kind} accuracy {100 * measured.iloc[-1]:.1f} %")
        if self.path is not None:
            told.append(f"in {self.path}")
        return f"<Result of {', '.join(told)}>"

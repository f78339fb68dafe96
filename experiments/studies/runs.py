"""What the studies share: run what a CSV file lacks, and say figures as mean and deviation."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import fedsim
from fedsim import Result

Key = Mapping[str, object]
Figures = Mapping[str, float]


def study_parser(description: str | None, *, seeds: int = 3) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every study takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--csv", type=Path, required=True, help="read, and added to")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="as fedsim's")
    return parser


def run_missing(
    experiment: Path,
    csv: Path,
    runs: Iterable[tuple[Key, list[str]]],
    figures: Callable[[Result], Figures],
) -> pd.DataFrame:
    """Run an experiment once for each key that the CSV file hasn't got, and return its rows.

    Parameters
    ----------
    experiment : Path
        The experiment file.
    csv : Path
        Read if it exists; a row is added as each run ends.
    runs : iterable of (key, overrides)
        Columns that tell a run from the others, and its ``--set`` overrides.
    figures : callable
        Takes what to keep from a run's result.
    """
    for key, overrides in runs:
        done = pd.read_csv(csv) if csv.exists() else pd.DataFrame()
        if len(done) and (done[list(key)] == pd.Series(dict(key))).all(axis=1).any():
            continue
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            result = fedsim.simulate(fedsim.load(experiment, overrides))
        row: dict[str, Any] = dict(key)
        row |= {name: round(float(value), 2) for name, value in figures(result).items()}
        row["seconds"] = round(time.perf_counter() - started, 1)
        print(row, flush=True)
        pd.concat([done, pd.DataFrame([row])]).to_csv(csv, index=False)
    return pd.read_csv(csv)


def spread(values: pd.Series[float], seeds: int = 3) -> str:
    """Return "mean ± standard deviation"; says so where there are other than ``seeds`` values.

    Examples
    --------
    >>> spread(pd.Series([1.0, 2.0, 3.0])), spread(pd.Series([1.0, 2.0])), spread(pd.Series([]))
    ('2.0 ± 1.0', '1.5 ± 0.7 (2 seeds)', '–')
    """
    values = values.dropna()
    if values.empty:
        return "–"
    if len(values) == 1:
        return f"{values.iloc[0]:.1f} (1 seed)"
    note = "" if len(values) == seeds else f" ({len(values)} seeds)"
    return f"{values.mean():.1f} ± {values.std():.1f}{note}"

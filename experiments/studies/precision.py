"""Whether accuracy depends on how clients train: one by one or side by side, in which precision.

``python -m experiments.studies.precision EXPERIMENT.toml --csv FILE`` runs the experiment in each
way of `WAYS` for each seed, and prints a Markdown table: last-round accuracy, mean and standard
deviation over the seeds, and the mean difference of a seed's run from its run of the first way,
with its standard error. The second way differs from the first by rounding in float32 only, so that
its differences say what chance does. Runs that are in FILE already aren't run again.
"""

from __future__ import annotations

import pandas as pd

from experiments.studies.runs import Figures, run_missing, spread, study_parser
from fedsim import Result

WAYS = {
    "one by one, float32": ["engine.cohort=one-by-one", "training.precision=float32"],
    "side by side, float32": ["engine.cohort=stacked", "training.precision=float32"],
    "side by side, tf32": ["engine.cohort=stacked", "training.precision=tf32"],
    "side by side, bfloat16": ["engine.cohort=stacked", "training.precision=bfloat16"],
}
REFERENCE = next(iter(WAYS))


def main() -> None:
    """Run what is missing and print the table."""
    parser = study_parser(__doc__, seeds=10)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    runs = [
        ({"way": way, "seed": seed}, [f"seed={seed}", *arguments.overrides, *WAYS[way]])
        for seed in range(arguments.seeds)
        for way in arguments.ways
    ]
    rows = run_missing(arguments.experiment, arguments.csv, runs, last_round)
    print(f"\n{table(rows, arguments.seeds)}")


def last_round(result: Result) -> Figures:
    """Return the accuracies of a run's last round, in %."""
    last = result.rounds.iloc[-1]
    return {view: 100 * last[f"{view}_accuracy"] for view in ("generic", "personal")}


def table(rows: pd.DataFrame, seeds: int) -> str:
    """Return a Markdown table, a row a way."""
    lines = ["| way | generic | difference | personal | difference |", "|---|---|---|---|---|"]
    by_seed = rows.set_index(["way", "seed"])
    for way in (way for way in WAYS if way in set(rows["way"])):
        cells = [way]
        for view in ("generic", "personal"):
            own = by_seed[view][way]
            cells += [spread(own, seeds), difference(own - by_seed[view][REFERENCE])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(values: pd.Series[float]) -> str:
    """Return the mean of some differences, and its standard error.

    Examples
    --------
    >>> difference(pd.Series([1.0, 2.0, 3.0])), difference(pd.Series([0.0, 0.0]))
    ('+2.00 ± 0.58', '–')
    """
    values = values.dropna()
    error = values.sem()
    return f"{values.mean():+.2f} ± {error:.2f}" if values.any() else "–"  # type: ignore[str-bytes-safe]


if __name__ == "__main__":
    main()

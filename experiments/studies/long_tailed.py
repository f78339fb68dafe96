"""FedLoGe against the long-tailed and personalised methods, over imbalance, skew and seeds.

``python -m experiments.studies.long_tailed EXPERIMENT.toml --csv FILE`` runs each method of
`METHODS` on the experiment's data, model and optimiser, for each imbalance factor, Dirichlet alpha
and seed, and prints a Markdown table for each setting: last-round accuracy, mean and standard
deviation over the seeds. Runs that are in FILE already aren't run again.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from experiments.studies.runs import Figures, run_missing, spread, study_parser
from fedsim import Result
from fedsim.data.class_groups import GROUPS

METHODS: dict[str, list[str]] = {
    "FedLoGe": [],
    "FedAvg": ["method.name=fedavg"],
    "FedProx": ["method.name=fedprox"],
    "FedBN": ["method.name=fedbn"],
    "FedPer": ["method.name=fedper"],
    "FedRep": ["method.name=fedrep", "method.head_epochs=1"],
    "FedBABU": ["method.name=fedbabu"],
    "Ditto": ["method.name=ditto"],
    "FedRoD": ["method.name=fedrod"],
    "FedETF": ["method.name=fedetf"],
    "CReFF": ["method.name=creff"],
}
COLUMNS = {
    "generic": "generic",
    "generic_realigned": "realigned",
    "personal": "personal",
    "personal_realigned": "realigned",
    "generic_groups": "generic head/medium/tail",
    "generic_realigned_groups": "realigned head/medium/tail",
    "personal_groups": "personal head/medium/tail",
}


def main() -> None:
    """Run what is missing and print the tables."""
    parser = study_parser(__doc__)
    parser.add_argument("--imbalances", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    runs = [
        (
            {"method": method, "imbalance": imbalance, "alpha": alpha, "seed": seed},
            [
                f"data.imbalance={imbalance}",
                f"clients.alpha={alpha}",
                f"seed={seed}",
                *arguments.overrides,
                *METHODS[method],
            ],
        )
        for seed, imbalance, alpha, method in itertools.product(
            range(arguments.seeds), arguments.imbalances, arguments.alphas, arguments.methods
        )
    ]
    rows = run_missing(arguments.experiment, arguments.csv, runs, last_round)
    for imbalance, alpha in itertools.product(arguments.imbalances, arguments.alphas):
        chosen = rows[(rows["imbalance"] == imbalance) & (rows["alpha"] == alpha)]
        print(f"\nImbalance factor {imbalance}, alpha {alpha}\n\n{table(chosen, list(METHODS))}")


def last_round(result: Result) -> Figures:
    """Return the accuracies of a run's last round, in %; for each view overall and by group."""
    last = result.rounds.iloc[-1]
    figures = {}
    for view in ("generic", "generic_realigned", "personal", "personal_realigned"):
        prefix = "" if view == "generic" else f"{view}_"
        figures[view] = 100 * last.get(f"{view}_accuracy", float("nan"))
        for group in GROUPS:
            name = f"{prefix}{group}_accuracy"
            figures[f"{view}_{group}"] = 100 * last.get(name, float("nan"))
    return figures


def table(rows: pd.DataFrame, methods: list[str]) -> str:
    """Return a Markdown table, a row a method: accuracies of each view, and by group."""
    lines = ["| ".join(["", "method ", *(f"{head} " for head in COLUMNS.values())]) + "|"]
    lines.append("|---" * (1 + len(COLUMNS)) + "|")
    for method in methods:
        chosen = rows[rows["method"] == method]
        cells = [method]
        for column in COLUMNS:
            if column.endswith("_groups"):
                view = column.removesuffix("_groups")
                means = [chosen[f"{view}_{group}"].mean() for group in GROUPS]
                cells.append("/".join("–" if np.isnan(mean) else f"{mean:.0f}" for mean in means))
            else:
                cells.append(spread(chosen[column]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""FedLabel against what people would use instead, over label skews and seeds.

``python -m experiments.studies.semi_supervised EXPERIMENT.toml --csv FILE`` runs each method of
`METHODS` on the experiment's data, model and optimiser, for each Dirichlet alpha and seed, and
prints a Markdown table: last-round accuracy, mean and standard deviation over the seeds. Runs that
are in FILE already aren't run again.
"""

from __future__ import annotations

import itertools

import pandas as pd

from experiments.studies.runs import Figures, run_missing, spread, study_parser
from fedsim import Result
from fedsim.report.figures.pseudo_labels import by_round

METHODS: dict[str, list[str]] = {
    "FedAvg, labelled part only": ["method.name=fedavg"],
    "FixMatch, local teacher": ["method.name=fixmatch-local"],
    "FixMatch, global teacher": ["method.name=fixmatch-global"],
    "FedLabel": [],
    "FedLabel, single upload": ["method.aggregation=single"],
    "FedAvg, all labels": ["method.name=fedavg", "clients.labelled=1.0"],
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--fixmatch-threshold", type=float, default=0.95)
    arguments = parser.parse_args()
    runs = []
    for seed, alpha, method in itertools.product(
        range(arguments.seeds), arguments.alphas, arguments.methods
    ):
        overrides = [f"clients.alpha={alpha}", f"seed={seed}", *arguments.overrides]
        overrides += METHODS[method]
        if "FixMatch" in method:
            overrides.append(f"method.threshold={arguments.fixmatch_threshold}")
        runs.append(({"method": method, "alpha": alpha, "seed": seed}, overrides))
    print(table(run_missing(arguments.experiment, arguments.csv, runs, last_round)))


def last_round(result: Result) -> Figures:
    """Return a run's last-round figures, in %."""
    last = result.rounds.iloc[-1]
    figures = {
        "generic": 100 * last["generic_accuracy"],
        "personal": 100 * last["personal_accuracy"],
        "pseudo_accuracy": float("nan"),
        "kept": float("nan"),
        "local": float("nan"),
    }
    shares = by_round(result.training[result.training["round"] == last["round"]])
    for share in shares[shares["kept"] > 0].to_dict("records"):
        figures["pseudo_accuracy"] = 100 * share["accuracy"]
        figures["kept"] = 100 * share["kept"]
        figures["local"] = 100 * share["local"]
    return figures


def table(rows: pd.DataFrame) -> str:
    """Return the Markdown table: a row a method, columns for each alpha; – where nothing ran."""
    alphas = sorted(rows["alpha"].unique())
    columns = ("generic", "personal", "pseudo-labels right / kept")
    heads = [f"alpha {alpha}: {column}" for alpha in alphas for column in columns]
    lines = [" | ".join(["| method", *heads]) + " |", "|---" * (1 + len(heads)) + "|"]
    for method in METHODS:
        cells = [f"| {method}"]
        for alpha in alphas:
            chosen = rows[(rows["method"] == method) & (rows["alpha"] == alpha)]
            cells += [spread(chosen["generic"]), spread(chosen["personal"])]
            right, kept = chosen["pseudo_accuracy"].mean(), chosen["kept"].mean()
            cells.append("–" if pd.isna(right) else f"{right:.1f} / {kept:.1f}")
        lines.append(" | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

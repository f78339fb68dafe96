"""FedLabel on FedLoGe's model against each of the two alone, where the data are long-tailed.

``python -m experiments.studies.partly_labelled EXPERIMENT.toml --csv FILE`` runs each method of
`METHODS` on the experiment's data, model and optimiser for each seed, and prints a Markdown table:
last-round accuracy, mean and standard deviation over the seeds. Runs that are in FILE already
aren't run again.
"""

from __future__ import annotations

import itertools

from experiments.studies.long_tailed import last_round, table
from experiments.studies.runs import run_missing, study_parser

JOINT = ["method.schedule=joint", "method.warmup_rounds=10", "method.threshold=0.95"]
METHODS: dict[str, list[str]] = {
    "FedLabel on FedLoGe's model": [],
    "FedLabel": ["method.name=fedlabel", *JOINT],
    "FedLoGe, labelled part only": ["method.name=fedloge", "method.etf_norm=0.4"],
    "FixMatch, global teacher": ["method.name=fixmatch-global", "method.threshold=0.95"],
    "FedAvg, labelled part only": ["method.name=fedavg"],
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = study_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    runs = [
        (
            {"method": method, "seed": seed},
            [f"seed={seed}", *arguments.overrides, *METHODS[method]],
        )
        for seed, method in itertools.product(range(arguments.seeds), arguments.methods)
    ]
    rows = run_missing(arguments.experiment, arguments.csv, runs, last_round)
    print(table(rows, list(METHODS)))


if __name__ == "__main__":
    main()

"""What a round costs in which nobody trains.

    python -m experiments.benchmarks.empty

runs rounds of 100 of 1000 clients who send back the weights that they got, on two workers:
those of logistic regression, and of the small CNN. The ratio in the last line is to one
millisecond: how many of them the slower of both rounds takes. At most 15 is the aim.
"""

from __future__ import annotations

from experiments.benchmarks import harness
from experiments.benchmarks.workloads import HERE, experiment

MODELS = ("linear", "cnn")
COHORT = 100


def main() -> None:
    """Run the benchmark of the command line."""
    args = harness.parse(harness.parser(__doc__, rounds=50))
    method = {"name": "fedavg", "client": f"{HERE}:Nothing"}
    variants = [
        harness.of_fedsim(
            f"{model}'s weights",
            experiment("empty", args.rounds, model=model, cohort=COHORT, method=method),
        )
        for model in MODELS
    ]
    rows = harness.take_turns(variants, args.repeats)
    columns = {"ms a round": lambda row: f"{1000 * row.round_seconds:.1f}"}
    slowest = 1000 * max(row.round_seconds for row in rows)
    harness.report(f"{COHORT} clients that do nothing", args, rows, columns, slowest)


if __name__ == "__main__":
    main()

"""What a client costs in small and in large cohorts.

    python -m experiments.benchmarks.cohort

trains ever more of 1000 clients of Fashion-MNIST in each round, for logistic regression and the
small CNN. The ratio is a client's share of the time in the smallest cohort over that in the
largest, for logistic regression: what a large cohort saves.
"""

from __future__ import annotations

from experiments.benchmarks import harness
from experiments.benchmarks.workloads import experiment

COHORTS = (10, 30, 100, 300, 1000)
MODELS = ("linear", "cnn")


def main() -> None:
    """Run the benchmark of the command line."""
    args = harness.parse(harness.parser(__doc__, rounds=8))
    variants = []
    size = {}
    for model in MODELS:
        for cohort in COHORTS:
            work = experiment("cohort", args.rounds, model=model, cohort=cohort)
            variants.append(harness.of_fedsim(f"{model}, {cohort} clients", work))
            size[variants[-1].name] = cohort
    rows = harness.take_turns(variants, args.repeats)
    columns = {
        **harness.SECONDS,
        "ms a client": lambda row: f"{1000 * row.round_seconds / size[row.name]:.2f}",
    }
    saved = harness.ratio(rows[0], rows[len(COHORTS) - 1]) * COHORTS[-1] / COHORTS[0]
    harness.report("cohorts out of 1000 clients", args, rows, columns, saved)


if __name__ == "__main__":
    main()

"""What skewed clients cost: some with many examples of a few classes, some with hardly any.

    python -m experiments.benchmarks.skew

trains all of 100 clients in each round, who hold 6,000 examples of Fashion-MNIST together: 60 each,
or as a Dirichlet(0.3) distribution deals each class out. Both go once through all the examples; the
skewed clients have about 50 steps more, with smaller batches, for 600 IID ones. They take turns
round by round. The ratio is the time a round with skewed clients over that with IID ones next to
it, the last line has the largest: at most 1.2 is the aim.
"""

from __future__ import annotations

from typing import Any

from experiments.benchmarks import harness
from experiments.benchmarks.workloads import HERE, experiment

MODELS = ("linear", "mlp", "cnn")
PARTITIONS: dict[str, dict[str, Any]] = {
    "Dirichlet(0.3)": {"partition": "dirichlet", "alpha": 0.3},
    "IID": {"partition": "iid"},
}
CLIENTS = 100
EXAMPLES = 6_000


def main() -> None:
    """Run the benchmark of the command line."""
    args = harness.parse(harness.parser(__doc__, rounds=30))
    data = {"source": f"{HERE}:part_of_fashion_mnist", "examples": EXAMPLES}
    rows: list[harness.Row] = []
    for model in MODELS:
        pair = []
        for name, partition in PARTITIONS.items():
            work = experiment(
                "skew",
                args.rounds,
                model=model,
                cohort=CLIENTS,
                count=CLIENTS,
                data=data,
                partition=partition,
            )
            pair.append(harness.of_fedsim(f"{model}, {name}", work))
        rows += harness.take_turns(pair, args.repeats, harness.measure_together)
    title = f"all of {CLIENTS} clients"
    harness.report_pairs(title, args, rows, "skewed / IID", max, harness.ratio_by_round)


if __name__ == "__main__":
    main()

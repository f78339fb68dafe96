"""What registered clients cost that don't take part.

    python -m experiments.benchmarks.population

runs rounds of 100 clients of five made-up vectors each, out of ever more registered clients, which
take turns round by round: a machine's speed changes by more than so short a round takes. The
memory is the most that the driver had resident, and the same without the data themselves (vectors
and labels). The ratio is the time a round with the most registered clients over that with the
fewest: at most 1.2 is the aim, with a start-up under 30 s and a driver under 2 GiB above the data.
"""

from __future__ import annotations

from experiments.benchmarks import harness
from experiments.benchmarks.harness import Row
from experiments.benchmarks.workloads import FEATURES, HERE, experiment

REGISTERED = (1_000, 10_000, 100_000, 1_000_000)
COHORT = 100
EXAMPLES = 5
EXAMPLE_BYTES = FEATURES * 4 + 8


def main() -> None:
    """Run the benchmark of the command line."""
    args = harness.parse(harness.parser(__doc__, rounds=60))
    variants = []
    data_mib = {}
    for count in REGISTERED:
        data = {"source": f"{HERE}:vectors", "examples": count * EXAMPLES}
        work = experiment(
            "population", args.rounds, model="linear", cohort=COHORT, count=count, data=data
        )
        variants.append(harness.of_fedsim(f"{count:,} clients", work))
        data_mib[variants[-1].name] = count * EXAMPLES * EXAMPLE_BYTES / 2**20

    def peak(row: Row) -> float:
        return row.median(lambda run: run.peak_mib)

    rows = harness.take_turns(variants, args.repeats, harness.measure_together)
    columns = harness.STARTUP | harness.SECONDS
    columns["driver's peak MiB"] = lambda row: f"{peak(row):.0f}"
    columns["without the data"] = lambda row: f"{peak(row) - data_mib[row.name]:.0f}"
    title = f"{COHORT} clients a round"
    harness.report(title, args, rows, columns, harness.ratio_by_round(rows[-1], rows[0]))


if __name__ == "__main__":
    main()

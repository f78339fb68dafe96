"""What a second worker gains.

    python -m experiments.benchmarks.workers

runs the workloads w1 and w2 on one and on two workers. The ratio is the time a round on one worker
over that on two; the last line has the smaller of both workloads'.
"""

from __future__ import annotations

from experiments.benchmarks import harness
from experiments.benchmarks.workloads import workload

NAMES = ("w1", "w2")
WORKERS = (1, 2)


def main() -> None:
    """Run the benchmark of the command line."""
    args = harness.parse(harness.parser(__doc__, rounds=20))
    variants = []
    for name in NAMES:
        for workers in WORKERS:
            work = workload(name, args.rounds, workers=workers)
            variants.append(harness.of_fedsim(f"{name}, workers: {workers}", work))
    rows = harness.take_turns(variants, args.repeats)
    harness.report_pairs("workers", args, rows, "1 / 2", min)


if __name__ == "__main__":
    main()

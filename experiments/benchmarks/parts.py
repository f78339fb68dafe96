"""Where the time of a round goes.

    python -m experiments.benchmarks.parts

runs workloads with a run directory and prints, in milliseconds a round, what their run.json has
under ``seconds_per_round``. Those are means over all rounds: the first one, and the test after the
last one, weigh the less the more rounds there are. The ratio is the total over the part spent
training; the last line has the largest.
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.benchmarks import harness
from experiments.benchmarks.harness import Row
from experiments.benchmarks.workloads import workload

NAMES = ("w1", "w2", "fedlabel", "fedloge")


def main() -> None:
    """Run the benchmark of the command line."""
    args = harness.parse(harness.parser(__doc__, rounds=50))
    variants = [harness.of_fedsim(name, workload(name, args.rounds), parts=True) for name in NAMES]
    rows = harness.take_turns(variants, args.repeats)
    # Whatever parts there are, in the order of the file.
    others = ("accuracy", "without_ray_mib")
    parts = [part for part in rows[0].runs[0].more if part not in others]
    columns: dict[str, Callable[[Row], str]] = {
        part: lambda row, part=part: f"{1000 * row.more(part):.1f}"  # type: ignore[misc]
        for part in parts
    }
    ratios = {
        row.name: row.median(lambda run: run.more["total"] / run.more["train"]) for row in rows
    }
    columns["total / train"] = lambda row: f"{ratios[row.name]:.2f}"
    harness.report("ms a round by part", args, rows, columns, max(ratios.values()))


if __name__ == "__main__":
    main()

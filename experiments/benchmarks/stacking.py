"""Where it pays to train clients side by side.

    python -m experiments.benchmarks.stacking

runs the small CNN on made-up images of several sizes in this process, 20 clients a round with 60
examples each, one by one and side by side (8 at a time), in turn round by round. Beside it stands
what a step takes, in millions of floating-point operations, by which ``engine.cohort = "auto"``
chooses (`fedsim.simulation.MAX_STACKED_STEP_FLOPS`). The last line has the largest ratio, side by
side over one by one, of those for which it chooses side by side.
"""

from __future__ import annotations

from typing import Any

from experiments.benchmarks import harness
from experiments.benchmarks.workloads import HERE
from fedsim import Experiment
from fedsim.models.net import step_flops
from fedsim.models.small import cnn
from fedsim.simulation import MAX_STACKED_STEP_FLOPS

SETTINGS = ((8, 8), (12, 10), (28, 2), (16, 10), (28, 10))
"""Side of an image in pixels, and batch size."""
COHORTS = ("stacked", "one-by-one")
CLASSES = 10


def work(side: int, batch_size: int, cohort: str, rounds: int) -> Experiment:
    """Return a setting's experiment."""
    tables: dict[str, Any] = {
        "data": {"source": f"{HERE}:images", "side": side, "examples": 1200},
        "clients": {"count": 20},
        "model": {"name": "cnn"},
        "training": {"rounds": rounds, "batch_size": batch_size, "lr": 0.05},
        "evaluation": {"every": rounds},
        "engine": {"backend": "inline", "cohort": cohort},
    }
    return Experiment(name="stacking", **tables)


def main() -> None:
    """Run the benchmark of the command line."""
    args = harness.parse(harness.parser(__doc__, rounds=20))
    rows, columns, ratios = [], dict(harness.SECONDS), {}
    for side, batch_size in SETTINGS:
        variants = [
            harness.of_fedsim(
                f"{side} x {side}, batches of {batch_size}: {cohort}",
                work(side, batch_size, cohort, args.rounds),
            )
            for cohort in COHORTS
        ]
        stacked, alone = harness.take_turns(variants, args.repeats, harness.measure_together)
        shape = (1, side, side)
        step = step_flops(cnn(shape, CLASSES), shape, batch_size)
        ratios[stacked.name] = step, harness.ratio_by_round(stacked, alone)
        rows += [stacked, alone]

    def of(row: harness.Row, place: int, text: str) -> str:
        return text.format(ratios[row.name][place]) if row.name in ratios else ""

    columns["operations a step"] = lambda row: of(row, 0, "{:.2g}")
    columns["/ one by one"] = lambda row: of(row, 1, "{:.2f}")
    chosen = max(ratio for step, ratio in ratios.values() if step <= MAX_STACKED_STEP_FLOPS)
    harness.report("side by side", args, rows, columns, chosen)


if __name__ == "__main__":
    main()

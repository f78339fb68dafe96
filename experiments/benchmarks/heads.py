"""What it costs to test clients' own heads.

    python -m experiments.benchmarks.heads

tests 1000 clients of FedLoGe on their own test sets, in one process of one thread: each has a head
of its own on the small CNN, read from its file, and two personal views. Next to it, in turn, one
pass of the CNN over the 10,000 test images, which comes before it and serves all clients. The ratio
is the clients' time over the pass's: at most 1.5 is the aim.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks.harness import Measured, Stopwatch
from experiments.benchmarks.workloads import workload
from fedsim.engine.evaluation import num_blocks
from fedsim.engine.state import StateFiles
from fedsim.engine.worker import Worker
from fedsim.simulation import initial_arrays, load_federation, make_task


def run_pass(rounds: int) -> Measured:
    """Test the generic views on the whole test set, and compute its features."""
    return _run(rounds, heads=False)


def run_heads(rounds: int) -> Measured:
    """Test every client's personal views on features that are there."""
    return _run(rounds, heads=True)


def _run(rounds: int, *, heads: bool) -> Measured:
    work = workload("fedloge", rounds)
    federation = load_federation(work)
    with tempfile.TemporaryDirectory(prefix="fedsim-benchmark-") as folder:
        task = make_task(work, federation, Path(folder))
        worker, arrays = Worker(task), initial_arrays(task)
        blocks = range(num_blocks(federation))
        features = worker.test_generic(arrays, blocks).features
        assert features is not None, "FedLoGe has personal views"
        share = [(1, [(client, (0, 1)) for client in range(work.clients.count)])]
        _, own = worker.train_client(arrays, 1, 0, {}, {})
        states, rng = StateFiles(Path(folder)), np.random.default_rng(0)
        for client in range(work.clients.count):
            kept = {n: a + rng.normal(size=a.shape).astype(a.dtype) for n, a in own.items()}
            states.write(client, 0, kept)
        once: Callable[[], object] = lambda: worker.test_generic(arrays, blocks)  # noqa: E731
        if heads:
            once = lambda: worker.test_personal(arrays, features, 1, share)  # noqa: E731
        watch = Stopwatch()
        for done in range(1, rounds + 1):
            once()
            watch.lap(last=done == rounds)
        return Measured(
            ends=watch.ends,
            begins=watch.begins,
            pss_mib=harness.pss_mib(),
            peak_mib=harness.peak_mib(),
        )


def main() -> None:
    """Run the benchmark of the command line."""
    args = harness.parse(harness.parser(__doc__, rounds=12))
    same = {"rounds": args.rounds}
    variants = [
        harness.Variant(name="own heads of 1000 clients", run=run_heads, arguments=same),
        harness.Variant(name="a pass over the images", run=run_pass, arguments=same),
    ]
    rows = harness.take_turns(variants, args.repeats, harness.measure_together)
    ratio = harness.ratio_by_round(*rows)
    harness.report("testing personal heads", args, rows, harness.SECONDS, ratio)


if __name__ == "__main__":
    main()

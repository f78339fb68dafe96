r"""Seconds a round of fedsim and of Flower's own simulation, or of pfl, on the same work.

    python -m experiments.benchmarks.flower --workload w2

runs a workload of `experiments.benchmarks.workloads` in both, in turn, each on two processes of one
thread, and prints a table and how many times fedsim's time a round the other one takes. What the
other one runs says `experiments.benchmarks.peers`; how time and memory are taken,
`experiments.benchmarks.harness`. With ``--by-round`` both are there at once and take turns round by
round, which a machine needs whose speed changes; memory can't be compared then.

``--peer pfl`` needs pfl (0.6), which need not be in this environment::

    pip install --no-deps --target DIR pfl multiprocess dill dp-accounting prv-accountant \
        absl-py dm-tree
    PYTHONPATH=DIR python -m experiments.benchmarks.flower --workload w2 --peer pfl
"""

from __future__ import annotations

from importlib.metadata import version

from experiments.benchmarks import harness, peers
from experiments.benchmarks.workloads import WORKLOADS, workload


def main() -> None:
    """Run the benchmark of the command line."""
    parser = harness.parser(__doc__, rounds=12)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--peer", choices=("flower", "pfl"), default="flower")
    parser.add_argument("--by-round", action="store_true", help="take turns round by round")
    args = harness.parse(parser)
    if args.by_round and args.peer != "flower":
        parser.error("--by-round: pfl's second process would not wait for its turn")
    work = workload(args.workload, args.rounds)
    same = {"name": args.workload, "rounds": args.rounds}
    if args.peer == "flower":
        name = f"Flower {version('flwr')}"
        peer = harness.Variant(name=name, run=peers.run_flower, arguments=same)
    elif work.method.name == "fedavg":
        name = f"pfl {version('pfl')}, 2 processes"
        peer = harness.Variant(name=name, run=peers.run_pfl, arguments=same, processes=2)
    else:
        parser.error(f"--peer pfl: doesn't have {work.method.name}; use w1, w2 or tiny")
    variants = [harness.of_fedsim("fedsim", work), peer]
    columns = harness.STARTUP | harness.SECONDS
    if args.by_round:
        ours, theirs = harness.take_turns(variants, args.repeats, harness.measure_together)
        ratio = harness.ratio_by_round(theirs, ours)
    else:
        ours, theirs = harness.take_turns(variants, args.repeats)
        ratio = harness.ratio(theirs, ours)
        columns = columns | harness.PSS
    columns = columns | {"accuracy": lambda row: f"{row.more('accuracy'):.3f}"}
    harness.report(args.workload, args, [ours, theirs], columns, ratio)


if __name__ == "__main__":
    main()

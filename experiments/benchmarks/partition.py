r"""Seconds and memory to deal a large data set out to many clients.

    python -m experiments.benchmarks.partition \
        --clients 1000000 --examples 2000000 --partition dirichlet

prints a Markdown table of one row. The data are made up: vectors of one feature, so that the
memory is that of the federation.
"""

from __future__ import annotations

import argparse
import datetime
import time
import warnings
from collections.abc import Callable

import numpy as np

from experiments.benchmarks.harness import peak_mib
from fedsim.data import partition
from fedsim.data.federate import federate
from fedsim.data.source import Source

PARTITIONS: dict[str, Callable[..., np.ndarray]] = {
    "iid": partition.iid,
    "dirichlet": partition.dirichlet,
    "client-dirichlet": partition.client_dirichlet,
    "shards": partition.shards,
    "quantity": partition.quantity,
}


def make_source(num_examples: int, num_classes: int) -> Source:
    """Return `num_examples` training and 10,000 test examples, classes equally frequent."""
    return Source(
        name="synthetic",
        x_train=np.zeros((num_examples, 1), np.float32),
        y_train=np.arange(num_examples) % num_classes,
        x_test=np.zeros((10_000, 1), np.float32),
        y_test=np.arange(10_000) % num_classes,
        num_classes=num_classes,
    )


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1_000_000)
    parser.add_argument("--examples", type=int, default=2_000_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--partition", choices=PARTITIONS, default="dirichlet")
    parser.add_argument("--label-each-class", action="store_true")
    args = parser.parse_args()

    source = make_source(args.examples, args.classes)
    before = peak_mib()
    start = time.perf_counter()
    with warnings.catch_warnings(record=True):
        federate(
            source,
            num_clients=args.clients,
            partition=PARTITIONS[args.partition],
            labelled=0.2,
            label_each_class=args.label_each_class,
        )
    seconds = time.perf_counter() - start
    today = datetime.datetime.now(tz=datetime.UTC).date()
    print("| date | partition | clients | examples | classes | seconds | MiB above the data |")
    print(
        f"| {today} | {args.partition} | {args.clients:,} | {args.examples:,} | {args.classes}"
        f" | {seconds:.2f} | {peak_mib() - before:.0f} |"
    )


if __name__ == "__main__":
    main()

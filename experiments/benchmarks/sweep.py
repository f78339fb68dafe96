"""What it gains that a sweep's runs go on at the same time.

    python -m experiments.benchmarks.sweep

sweeps the digits over three methods, with as many seeds as `--seeds` says, one run after the other
on all cores and then one run on each core. The ratio is the time of the first over that of the
second; the last line has the median over the repeats.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from experiments.benchmarks.harness import HOME, QUIET, describe

GRID = "method.name=fedavg,fixmatch-global,fedrod"
WAYS = ("--jobs 1", "as by default")


def seconds(way: str, seeds: int) -> float:
    """Return how long a sweep takes, with its comparison."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedsim.cli", "sweep", "experiments/digits.toml"]
        command += ["--grid", GRID, "--seeds", str(seeds), "--out", f"{folder}/sweep"]
        command += way.split() if way.startswith("--") else []
        begun = time.perf_counter()
        subprocess.run(
            command, cwd=HOME, env={**os.environ, **QUIET}, capture_output=True, check=True
        )
        return time.perf_counter() - begun


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each method")
    parser.add_argument("--repeats", type=int, default=3, help="how often both take their turn")
    args = parser.parse_args()
    described = describe()
    print(described["date"], described["commit"], described["machine"])
    ratios = []
    for _ in range(args.repeats):
        one, many = (seconds(way, args.seeds) for way in WAYS)
        ratios.append(one / many)
        print(f"{WAYS[0]}: {one:.1f} s, {WAYS[1]}: {many:.1f} s", flush=True)
    print(f"ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()

r"""Seconds a round of fedsim and of Flower's own simulation, on the same work.

    python -m experiments.benchmarks.flower --workload w2

runs a workload of `experiments.benchmarks.workloads` in both, one after the other, each in a fresh
process with two Ray actors of one thread, and prints a table and the ratio. Both start from the
same weights, train as many clients of the same federation in each round, and average.

In ``w1`` and ``w2`` Flower runs its own FedAvg and a client in plain PyTorch. In ``fedlabel`` and
``fedloge``, which Flower doesn't have, it runs this project's strategy and client update, one
client at a time: the ratio is then that of the engines alone.

Start-up is the time from starting the process to the end of the first round. The seconds a round
leave out the first two rounds, and the last, after which fedsim tests the model. The memory is the
proportional set size (PSS) of all processes after the last round.

Ray's own niceness of 15 would let anything else that runs take the cores away: both sides' workers
run at normal priority. The machine should be idle all the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy
from rich.console import Console
from rich.table import Table

import fedsim
from experiments.benchmarks import workloads
from fedsim.engine import flower
from fedsim.engine.worker import Worker, num_blocks
from fedsim.simulation import initial_arrays, load_federation, make_task
from strategies import FedLabel, FedLoGe

ENGINES = ("fedsim", "flower")
WARM_UP = 2
HOME = Path(__file__).resolve().parents[2]

# No usage statistics of either project, and Ray on the loopback address and at normal priority.
QUIET = {
    "RAY_worker_niceness": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run of one engine gave.

    Attributes
    ----------
    ends : list of float
        When each round ended, in seconds of the clock that all processes share.
    accuracy : float
        Of the last model on the global test set.
    pss_mib : float
        Memory of the process and all below it, in MiB.
    """

    ends: list[float]
    accuracy: float
    pss_mib: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A row of the table."""

    engine: str
    startup_seconds: float
    round_seconds: float
    round_seconds_min: float
    pss_mib: float
    accuracy: float
    rounds_seconds: list[float]


def run_fedsim(workload: str, rounds: int) -> Measured:
    """Run a workload in fedsim."""
    ends: list[float] = []
    memory: list[float] = []

    def note(row: dict[str, Any]) -> None:
        ends.append(time.monotonic())
        if len(ends) == rounds:
            memory.append(pss_mib())

    result = fedsim.simulate(workloads.experiment(workload, rounds), observer=note)
    failures = int(result.rounds["failures"].sum())
    if failures:
        raise SystemExit(f"fedsim: {failures} clients failed")
    accuracy = float(result.rounds["generic_accuracy"].iloc[-1])
    return Measured(ends=ends, accuracy=accuracy, pss_mib=memory[0])


def run_flower(workload: str, rounds: int) -> Measured:
    """Run a workload in Flower's own simulation."""
    from flwr.simulation import run_simulation  # it imports Ray, which fedsim does in its own way

    logging.getLogger("flwr").setLevel(logging.ERROR)
    work = workloads.experiment(workload, rounds)
    federation = load_federation(work)
    task = make_task(work, federation, Path("unused"))
    ends: list[float] = []
    memory: list[float] = []
    models: list[ArrayRecord] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = _flower_strategy(work.method.name, work.training.participation)
        _note_rounds(strategy, ends)
        training = work.training
        config = {"workload": workload, "lr": training.lr, "batch-size": training.batch_size}
        result = strategy.start(
            grid=grid,
            initial_arrays=flower.to_record(initial_arrays(task)),
            num_rounds=rounds,
            train_config=ConfigRecord(config),
        )
        memory.append(pss_mib())
        models.append(result.arrays)

    run_simulation(
        server,
        workloads.app if work.method.name == "fedavg" else fedsim.client_app(work),
        num_supernodes=workloads.CLIENTS,
        backend_config={
            "init_args": {"num_cpus": 2, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    tested = Worker(task).test(flower.from_record(models[0]), range(num_blocks(federation)))
    predicted, _ = tested.scores["generic"]
    accuracy = float((predicted == federation.source.y_test).mean())
    return Measured(ends=ends, accuracy=accuracy, pss_mib=memory[0])


def _flower_strategy(method: str, cohort: int) -> Strategy:
    """Return Flower's own FedAvg, or this project's strategy; neither has clients test."""
    make: Any = {"fedavg": FedAvg, "fedlabel": FedLabel, "fedloge": FedLoGe}[method]
    return make(
        fraction_train=cohort / workloads.CLIENTS,
        min_train_nodes=cohort,
        min_available_nodes=workloads.CLIENTS,
        fraction_evaluate=0.0,
    )


def _note_rounds(strategy: Strategy, ends: list[float]) -> None:
    """Let a strategy note when each round ends, and refuse rounds that lack a client."""
    aggregate = strategy.aggregate_train

    def aggregate_train(
        server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed:
            raise RuntimeError(f"Flower: {len(failed)} clients failed, the first: {failed[0]}")
        answer = aggregate(server_round, replies)
        ends.append(time.monotonic())
        return answer

    strategy.aggregate_train = aggregate_train  # type: ignore[method-assign]


def pss_mib() -> float:
    """Return the memory of this process and all below it in MiB, what they share counted once."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue  # it ended since the list was made
    return total / 2**20


def measure(engine: str, workload: str, rounds: int) -> Figures:
    """Run a workload in one engine, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="fedsim-benchmark-") as folder:
        file = Path(folder) / "measured.json"
        module = "experiments.benchmarks.flower"
        command = [sys.executable, "-m", module, "--workload", workload, "--rounds", str(rounds)]
        started = time.monotonic()
        done = subprocess.run(
            [*command, "--only", engine, "--json", str(file)],
            env=os.environ | QUIET,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{engine} ended with exit code {done.returncode}")
        measured = Measured(**json.loads(file.read_text()))
    seconds = [after - before for before, after in pairwise(measured.ends)]
    counted = seconds[WARM_UP - 1 : -1]
    return Figures(
        engine=engine,
        startup_seconds=measured.ends[0] - started,
        round_seconds=statistics.median(counted),
        round_seconds_min=min(counted),
        pss_mib=measured.pss_mib,
        accuracy=measured.accuracy,
        rounds_seconds=seconds,
    )


def show(workload: str, rounds: int, rows: list[Figures]) -> None:
    """Print the rows as a table."""
    today = datetime.now(tz=UTC).date()
    table = Table(title=f"{workload}, {rounds} rounds, {today}")
    table.add_column("engine")
    for column in ("start-up s", "s a round", "min", "PSS MiB", "accuracy"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            {"fedsim": "fedsim", "flower": f"Flower {version('flwr')}"}[row.engine],
            f"{row.startup_seconds:.1f}",
            f"{row.round_seconds:.3f}",
            f"{row.round_seconds_min:.3f}",
            f"{row.pss_mib:.0f}",
            f"{row.accuracy:.3f}",
        )
    Console().print(table)


def describe() -> dict[str, Any]:
    """Return what the numbers depend on: machine, versions, commit, and when this is."""
    git = ["git", "-C", str(HOME), "describe", "--always", "--dirty", "--abbrev=12"]
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "machine": {
            "processor": models[0] if models else platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_before": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("fedsim-flwr", "flwr", "ray", "torch", "numpy")},
        },
    }


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=workloads.WORKLOADS, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--only", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < WARM_UP + 2:
        parser.error(f"--rounds {args.rounds}: must be at least {WARM_UP + 2}")
    if args.only:
        run = run_fedsim if args.only == "fedsim" else run_flower
        args.json.write_text(json.dumps(asdict(run(args.workload, args.rounds))))
        return
    described = describe()
    rows = [measure(engine, args.workload, args.rounds) for engine in ENGINES]
    ratio = rows[1].round_seconds / rows[0].round_seconds
    if args.json:
        found = {"workload": args.workload, "rounds": args.rounds, **described, "ratio": ratio}
        args.json.write_text(json.dumps(found | {"engines": [asdict(r) for r in rows]}, indent=2))
    show(args.workload, args.rounds, rows)
    print(f"ratio {ratio:.1f}")


if __name__ == "__main__":
    main()

"""What the benchmarks share: taking turns, fresh processes, medians, the table and the JSON file.

Two minutes apart the same work may take 1.4 times as long on a shared machine. So the variants of a
comparison run in turn, each in a fresh process, and all of them again for each repeat; a ratio is
taken within each repeat, and the median of those is the one that counts. Where a benchmark asks for
it, all variants of a repeat are there at once and take turns round by round, with a ratio for each
round: that holds on a machine whose speed changes within seconds, but their memory can't be
compared, for what they share is counted in parts.

The seconds a round leave out the first two rounds, and the last, after which fedsim tests the
model. Start-up is the time from starting the process to the end of the first round. Memory is the
proportional set size (PSS) of all processes after the last round, and the same without those of
Ray's own: of the driver and the workers.

Ray's own niceness of 15 would let anything else that runs take the cores away: its workers run at
normal priority. The machine should be idle all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

import fedsim
from fedsim import Experiment

WARM_UP = 2
WIDTH = 160
HOME = Path(__file__).resolve().parents[2]

# No usage statistics of anybody's, and what listens on the loopback address.
QUIET = {
    "RAY_worker_niceness": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
}


# ----- one run -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run says of itself.

    Attributes
    ----------
    ends : list of float
        When each round ended, in seconds of the clock that all processes share.
    begins : list of float
        When each round but the first began; if empty, when the one before it ended.
    pss_mib : float
        Memory of the process and all below it, in MiB, what they share counted once.
    peak_mib : float
        The most memory that the process alone has had resident, in MiB.
    more : dict
        Figures of the benchmark's own.
    """

    ends: list[float]
    pss_mib: float
    peak_mib: float
    begins: list[float] = field(default_factory=list)
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as seen from outside; ``seconds`` are those of each round but the first."""

    startup_seconds: float
    seconds: list[float]
    pss_mib: float
    peak_mib: float
    more: dict[str, float] = field(default_factory=dict)

    @property
    def counted(self) -> list[float]:
        """The seconds of the rounds that count."""
        return self.seconds[WARM_UP - 1 : -1]

    @property
    def round_seconds(self) -> float:
        """Their median."""
        return statistics.median(self.counted)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Something to measure.

    Attributes
    ----------
    name : str
        What the table calls it.
    run : callable
        A function of a module, which returns `Measured`; of several processes the first one's
        counts, and the others return None.
    arguments : dict
        Its keyword arguments; what JSON can hold.
    processes : int
        How many processes ``torchrun`` starts.
    """

    name: str
    run: Callable[..., Measured | None]
    arguments: Mapping[str, Any]
    processes: int = 1


class Stopwatch:
    """Notes when rounds begin and end; where variants take turns, it waits in between."""

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.ends: list[float] = []
        self._turns: socket.socket | None = None
        if TURNS in os.environ:
            self._turns = socket.socket(socket.AF_UNIX)
            self._turns.connect(os.environ[TURNS])

    def lap(self, last: bool) -> None:
        """End a round, and begin the next."""
        self.ends.append(time.monotonic())
        if last:
            return
        if self._turns is not None:
            self._turns.sendall(b".")
            self._turns.recv(1)
        self.begins.append(time.monotonic())


def measure(variant: Variant) -> Run:
    """Run a variant in a fresh process, or several."""
    with tempfile.TemporaryDirectory(prefix="fedsim-benchmark-") as folder:
        return _Process(variant, Path(folder), {}).run()


def measure_in_turn(variants: Sequence[Variant]) -> Iterable[Run]:
    """Run variants one after the other, A B A B ... over the repeats; see `measure`."""
    return map(measure, variants)


def measure_together(variants: Sequence[Variant]) -> list[Run]:
    """Run variants that use a `Stopwatch` in fresh processes, which take turns round by round.

    Each is started when those before it have done their first round.
    """
    with tempfile.TemporaryDirectory(prefix="fedsim-benchmark-") as folder:
        processes: list[_Process] = []
        lines: list[socket.socket] = []
        try:
            for place, variant in enumerate(variants):
                mine = Path(folder) / str(place)
                mine.mkdir()
                with socket.socket(socket.AF_UNIX) as door:
                    door.bind(str(mine / "turns"))
                    door.listen()
                    door.settimeout(FIRST_ROUND_SECONDS)
                    processes.append(_Process(variant, mine, {TURNS: str(mine / "turns")}))
                    lines.append(door.accept()[0])
                lines[-1].recv(1)
            running = list(lines)
            while running:
                for line in list(running):
                    line.sendall(b".")
                    if not line.recv(1):  # it answers after its round, or hangs up after the last
                        running.remove(line)
            return [process.run() for process in processes]
        finally:
            for process in processes:
                process.kill()
            for line in lines:
                line.close()


TURNS = "FEDSIM_BENCHMARK_TURNS"
"""The environment's name for the socket at which a variant asks for its turn."""
FIRST_ROUND_SECONDS = 300.0


class _Process:
    """The fresh process of a variant, under way."""

    def __init__(self, variant: Variant, folder: Path, environment: Mapping[str, str]) -> None:
        self._variant = variant
        self._file = folder / "measured.json"
        command = [sys.executable]
        if variant.processes > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
            command += ["-m", *launcher, str(variant.processes)]
        command += ["-m", "experiments.benchmarks.harness"]
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [*command, _name_of(variant.run), json.dumps(variant.arguments), str(self._file)],
            env={**os.environ, **QUIET, **environment},
        )

    def run(self) -> Run:
        """Wait until it has ended, and return what it measured."""
        if code := self._process.wait():
            raise SystemExit(f"{self._variant.name} ended with exit code {code}")
        measured = Measured(**json.loads(self._file.read_text()))
        begins = measured.begins or measured.ends[:-1]
        return Run(
            startup_seconds=measured.ends[0] - self._started,
            seconds=[end - begin for begin, end in zip(begins, measured.ends[1:], strict=True)],
            pss_mib=measured.pss_mib,
            peak_mib=measured.peak_mib,
            more=measured.more,
        )

    def kill(self) -> None:
        """End it, unless it has ended."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


def _name_of(function: Callable[..., Any]) -> str:
    """Return ``module:function``, the name under which a fresh process finds a function."""
    module = function.__module__
    if module == "__main__":
        spec = sys.modules[module].__spec__
        assert spec is not None, "benchmarks are run as modules"
        module = spec.name
    return f"{module}:{function.__name__}"


def _run_here(function: str, arguments: str, file: str) -> None:
    """Be the fresh process."""
    module, _, name = function.partition(":")
    measured = getattr(import_module(module), name)(**json.loads(arguments))
    if measured is not None:
        Path(file).write_text(json.dumps(asdict(measured)))


RAYS_OWN = ("/ray/core/", "/ray/_private/", "/ray/autoscaler/", "/ray/dashboard/", "Agent")
"""What the command lines of Ray's own processes have, and those of its workers haven't."""


def pss_mib(root: int | None = None, *, without: Sequence[str] = ()) -> float:
    """Return the memory of a process (this one) and all below it in MiB, shared parts once.

    Those below it whose command line has one of the words of ``without`` are left out.
    """
    me = psutil.Process(root)
    total: float = me.memory_full_info().pss
    for process in me.children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            if not any(word in command for word in without):
                total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue  # it ended since the list was made
    return total / 2**20


def peak_mib() -> float:
    """Return the most memory this process has had resident so far, in MiB (Linux)."""
    # Not getrusage(), whose figure a process inherits from the one that started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")


def run_fedsim(experiment: dict[str, Any], parts: bool = False) -> Measured:
    """Run an experiment in fedsim, with a run directory if its ``parts`` are asked for."""
    watch = Stopwatch()
    memory: list[float] = []
    more: dict[str, float] = {}
    work = Experiment(**experiment)

    def note(row: dict[str, Any]) -> None:
        watch.lap(last=row["round"] == work.training.rounds)
        if row["round"] == work.training.rounds:
            memory.extend((pss_mib(), peak_mib()))
            more["without_ray_mib"] = pss_mib(without=RAYS_OWN)

    with tempfile.TemporaryDirectory(prefix="fedsim-benchmark-") as folder:
        out = Path(folder) / "run"
        result = fedsim.simulate(work, out=out if parts else None, observer=note)
        if parts:
            more |= json.loads((out / "run.json").read_text())["seconds_per_round"]
    failures = int(result.rounds["failures"].sum())
    if failures:
        raise SystemExit(f"fedsim: {failures} clients failed")
    more["accuracy"] = float(result.rounds["generic_accuracy"].iloc[-1])
    return Measured(
        ends=watch.ends,
        begins=watch.begins,
        pss_mib=memory[0],
        peak_mib=memory[1],
        more=more,
    )


def of_fedsim(name: str, experiment: Experiment, parts: bool = False) -> Variant:
    """Return the variant that runs an experiment in fedsim."""
    arguments = {"experiment": experiment.model_dump(mode="json"), "parts": parts}
    return Variant(name=name, run=run_fedsim, arguments=arguments)


# ----- many runs ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant's runs, one for each repeat."""

    name: str
    runs: list[Run]

    def median(self, pick: Callable[[Run], float]) -> float:
        """Return the median over the repeats."""
        return statistics.median(map(pick, self.runs))

    def more(self, name: str) -> float:
        """Return the median of one of the benchmark's own figures."""
        return self.median(lambda run: run.more[name])

    @property
    def counted(self) -> list[float]:
        """The seconds of all rounds that count, of all repeats."""
        return [seconds for run in self.runs for seconds in run.counted]

    @property
    def round_seconds(self) -> float:
        """Their median."""
        return statistics.median(self.counted)


def take_turns(
    variants: Sequence[Variant],
    repeats: int,
    measure_all: Callable[[Sequence[Variant]], Iterable[Run]] = measure_in_turn,
) -> list[Row]:
    """Measure the variants again and again, and say on stderr how it goes.

    ``measure_all`` is `measure_in_turn` or `measure_together`.
    """
    rows = [Row(name=variant.name, runs=[]) for variant in variants]
    for repeat in range(repeats):
        for row, run in zip(rows, measure_all(variants), strict=True):
            row.runs.append(run)
            place = f"repeat {repeat + 1} of {repeats}"
            print(f"{place}, {row.name}: {run.round_seconds:.4f} s a round", file=sys.stderr)
    return rows


def ratio(over: Row, under: Row) -> float:
    """Return how many times as long a round takes: the median of the repeats' own ratios."""
    pairs = zip(over.runs, under.runs, strict=True)
    return statistics.median(a.round_seconds / b.round_seconds for a, b in pairs)


def ratio_by_round(over: Row, under: Row) -> float:
    """Return the median of the ratios of rounds that followed each other."""
    return statistics.median(a / b for a, b in zip(over.counted, under.counted, strict=True))


# ----- command line and output -------------------------------------------------------------


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all benchmarks take."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    made.add_argument("--repeats", type=int, default=3, help="default 3")
    made.add_argument("--json", type=Path, help="also write the numbers to this file")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments, with ``described``: the machine and the versions, before any run."""
    args = made.parse_args()
    if args.rounds < WARM_UP + 2:
        made.error(f"--rounds {args.rounds}: must be at least {WARM_UP + 2}")
    if args.repeats < 1:
        made.error(f"--repeats {args.repeats}: must be at least 1")
    args.described = describe()
    return args


SECONDS: dict[str, Callable[[Row], str]] = {
    "s a round": lambda row: f"{row.round_seconds:.4f}",
    "min": lambda row: f"{min(row.counted):.4f}",
}
STARTUP: dict[str, Callable[[Row], str]] = {
    "start-up s": lambda row: f"{row.median(lambda run: run.startup_seconds):.1f}"
}
PSS: dict[str, Callable[[Row], str]] = {
    "PSS MiB": lambda row: f"{row.median(lambda run: run.pss_mib):.0f}",
    "without Ray's": lambda row: f"{row.more('without_ray_mib'):.0f}",
}


def report(
    title: str,
    args: argparse.Namespace,
    rows: Sequence[Row],
    columns: Mapping[str, Callable[[Row], str]],
    ratio: float,
) -> None:
    """Print the table and the ratio, and write the JSON file.

    Parameters
    ----------
    title : str
        What was measured.
    args : argparse.Namespace
        From `parse`.
    rows : sequence of Row
        From `take_turns`.
    columns : mapping
        Heading -> what a row has there.
    ratio : float
        The last line.
    """
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "described"}
        found = {
            "benchmark": title,
            **settings,
            "json": str(args.json),
            **args.described,
            "ratio": ratio,
            "rows": [{"round_seconds": row.round_seconds, **asdict(row)} for row in rows],
        }
        args.json.write_text(json.dumps(found, indent=2))
    today = datetime.now(tz=UTC).date()
    table = Table("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row.name, *(text(row) for text in columns.values()))
    print(f"{title}, {args.repeats} x {args.rounds} rounds, {today}")
    # In a file it may be wide.
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    print(f"ratio {ratio:.2f}")


def report_pairs(
    title: str,
    args: argparse.Namespace,
    rows: Sequence[Row],
    column: str,
    pick: Callable[[list[float]], float],
    ratio_of: Callable[[Row, Row], float] = ratio,
) -> None:
    """Report rows that belong together by twos, with the ratio of each first one to its second.

    Parameters
    ----------
    title, args, rows
        See `report`.
    column : str
        Heading of the ratios.
    pick : callable
        Chooses the last line among them.
    ratio_of : callable
        `ratio`, or `ratio_by_round`.
    """
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    ratios = {first.name: ratio_of(first, second) for first, second in pairs}
    columns = {
        **SECONDS,
        column: lambda row: f"{ratios[row.name]:.2f}" if row.name in ratios else "",
    }
    report(title, args, rows, columns, pick(list(ratios.values())))


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


if __name__ == "__main__":
    _run_here(*sys.argv[1:])

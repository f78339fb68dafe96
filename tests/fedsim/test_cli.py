"""The command, as a user runs it."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from datetime import datetime
from importlib.metadata import EntryPoint
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import numpy as np
import pandas as pd
import psutil
import pytest
from rich.console import Console

import clients
from fedsim import cli, console, registry
from fedsim.experiment_file import load
from fedsim.interrupts import noted_interrupts

FEDSIM = Path(sys.executable).parent / "fedsim"

SMALL = """\
name = "small"
[clients]
count = 6
[model]
name = "linear"
[training]
rounds = 3
participation = 0.5
[engine]
backend = "inline"
"""


@pytest.fixture
def here(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path


def fedsim(folder, *arguments, code=0):
    """Run the command in this process, which has imported PyTorch already, as if it were new."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        # Where processes begin that it starts.
        patch("multiprocessing.process.ORIGINAL_DIR", str(folder)),
        patch.object(sys, "argv", ["fedsim", *map(str, arguments)]),
        patch.object(sys, "path", [*sys.path]),
        patch.object(console, "out", Console(highlight=False)),
        patch.object(console, "err", Console(stderr=True, highlight=False)),
        patch.object(console, "_warned", set()),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            cli.main()
        except SystemExit as end:
            found = end.code or 0
    assert found == code, out.getvalue() + err.getvalue()
    return CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def fedsim_alone(folder, *arguments, code=0):
    """Run the command in a process of its own."""
    done = subprocess.run(
        [FEDSIM, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def living(processes):
    """Return those of `processes` that still run; one that nobody has reaped yet does not."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_run_prints_a_table_of_clients_and_where_the_results_are(here):
    done = fedsim_alone(here, "run", "small.toml", "--out", "results")
    assert "Clients after round 3" in done.stdout
    assert len(re.findall(r"^ +\d+ +[\d,]+ +[\d,]+ +\d+ +[\d.]+ ", done.stdout, re.M)) == 6
    assert "round 3: generic" in done.stdout
    assert "report: results/report.html\nresults and figures: results\n" in done.stdout
    assert len(pd.read_csv(here / "results" / "rounds.csv")) == 3
    # No terminal here: plain lines, one an evaluated round.
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        f"round {r}/3" for r in (1, 2, 3)
    ]


def test_a_folder_in_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    fedsim(here, "partition", "small.toml", "--out=~/who")
    assert (here / "home" / "who" / "partition.csv").exists()
    assert not (here / "~").exists()


def test_report_makes_a_stopped_runs_page(here):
    whole = fedsim(here, "run", "small.toml", "--out", "results")
    rows = (here / "results" / "clients.csv").read_text().splitlines(keepends=True)
    for name in ("report.html", "figures/client_accuracy.png", "model.safetensors"):
        (here / "results" / name).unlink()
    assert fedsim(here, "report", "results").stdout == whole.stdout.replace(
        "results and figures: results\n", ""
    )
    assert (here / "results" / "report.html").stat().st_size > 50_000
    (here / "results" / "clients.csv").write_text(rows[0])
    assert "round 3: generic" in fedsim(here, "report", "results").stdout
    done = fedsim(here, "report", "small.toml", code=2)
    assert done.stderr == "error: small.toml: there is no such folder\n"


def test_a_run_without_local_test_examples_shows_the_rest(here):
    arrays = {f"y_{split}": np.arange(60) % 3 for split in ("train", "test")}
    arrays |= {f"x_{split}": np.eye(4)[np.arange(60) % 3] for split in ("train", "test")}
    # Of each class a client has less than a hundredth: rounded down, no test example.
    np.savez(here / "own.npz", **arrays | {"x_test": np.eye(3, 4), "y_test": np.arange(3)})
    sets = [
        *("--set", "data.source=npz:own.npz"),
        *("--set", "clients.local_test=floor", "--set", "clients.count=6"),
    ]
    done = fedsim(here, "run", "small.toml", *sets, "--out", "results")
    assert re.match(r"round 3: generic [\d.]+ %, personal – %", done.stdout)
    assert "client_accuracy.png: skipped, no client was tested on examples" in done.stderr
    assert fedsim(here, "report", "results").stdout.startswith("round 3: generic")


class TestOutput:
    """What can't be shown stops no run."""

    def shell(self, here, command, **environment):
        command = command.replace("fedsim", str(FEDSIM))
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=here,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr + done.stdout
        return done

    def test_a_run_goes_on_when_nobody_reads_its_progress(self, here):
        run = "fedsim run small.toml --out results --set engine.backend=ray"
        done = self.shell(here, f"{run} 2>&1 >/dev/null | head -c 9")
        assert (done.returncode, done.stdout) == (0, "round 1/3")
        assert len(pd.read_csv(here / "results" / "rounds.csv")) == 3
        assert (here / "results" / "report.html").exists()

    def test_nor_when_the_disk_of_its_progress_is_full_and_a_terminal_lacks_characters(self, here):
        run = "fedsim run small.toml --out results 2>/dev/full"
        done = self.shell(here, run, PYTHONIOENCODING="ascii")
        assert done.returncode == 0
        assert "Clients after round 3" in done.stdout
        assert re.search(r"^round 3: generic .* \(std", done.stdout, re.M)
        assert done.stdout.isascii()

    def test_figures_need_no_window(self, here):
        done = self.shell(here, "fedsim run small.toml --out results", MPLBACKEND="foo")
        assert (done.returncode, "error" in done.stderr) == (0, False)
        assert (here / "results" / "report.html").exists()

    @pytest.mark.parametrize("columns", ["0", ""])
    def test_a_terminal_of_no_width_is_one_of_unknown_width(self, here, columns):
        done = self.shell(here, "fedsim list methods; fedsim run none.toml", COLUMNS=columns)
        assert done.stderr == "error: none.toml: there is no such experiment file\n"
        assert "fedprox" in done.stdout

    def test_results_that_nobody_reads_end_quietly(self, here):
        done = self.shell(here, "fedsim list datasets | true")
        assert (done.returncode, done.stderr) == (1, "")

    def test_results_on_a_full_disk_are_an_error(self, here):
        done = self.shell(here, "fedsim list datasets >/dev/full")
        line = "error: can't print the results: No space left on device\n"
        assert (done.returncode, done.stderr) == (2, line)

    @pytest.mark.parametrize("command", ["fedsim --help", "fedsim run --help"])
    def test_so_is_help(self, command, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", [*sys.path])  # `main` changes these two
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setattr(sys, "argv", command.split())
        with Path("/dev/full").open("w") as full, (tmp_path / "errors").open("w") as errors:
            monkeypatch.setattr(sys, "stdout", full)
            monkeypatch.setattr(sys, "stderr", errors)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        line = "error: can't print the results: No space left on device\n"
        assert (ended.value.code, (tmp_path / "errors").read_text()) == (2, line)


def test_compare_puts_runs_side_by_side(here):
    for lr in ("0.1", "1.0"):
        fedsim(here, "run", "small.toml", "--set", f"training.lr={lr}", "--out", f"all/{lr}")
    done = fedsim(here, "compare", "all/0.1", "all/1.0")
    assert re.search(r"^lr=0\.1 +1 +[\d.]+ ", done.stdout, re.M)
    assert not (here / "all" / "comparison.html").exists()
    fedsim(here, "compare", "all", "--out", "both")
    assert (here / "both" / "comparison.html").stat().st_size > 50_000
    done = fedsim(here, "compare", "all", "--target", "0.8", code=2)
    assert done.stderr == "error: target = 0.8: must be in %, above 1 and at most 100\n"
    done = fedsim(here, "compare", "all/0.1", "nowhere", code=2)
    assert done.stderr == "error: nowhere: there is no such folder\n"


def test_runs_get_folders_of_their_own(here):
    for _ in range(2):
        fedsim(here, "run", "small.toml", "--set", "training.rounds=1")
    assert len(list((here / "runs").iterdir())) == 2


def test_so_do_runs_that_start_in_the_same_second(here, monkeypatch):
    """The name is taken before anything is written."""

    class Noon(datetime):
        @classmethod
        def now(cls):
            return cls(2030, 1, 1, 12)

    monkeypatch.setattr(cli, "datetime", Noon)
    monkeypatch.chdir(here)
    experiment = load("small.toml")
    with cli._run_folder(None, experiment) as one, cli._run_folder(None, experiment) as other:
        assert [str(folder) for folder in (one, other)] == [
            "runs/small-20300101-120000",
            "runs/small-20300101-120000-2",
        ]
        (one / "rounds.csv").touch()
    assert [file.name for file in (here / "runs").iterdir()] == [one.name]  # the other is empty


def test_partition_shows_who_holds_what_without_training(here):
    done = fedsim(here, "partition", "small.toml", "--out", "who")
    assert "total" in done.stdout
    assert "1,437" in done.stdout
    table = pd.read_csv(here / "who" / "partition.csv")
    assert table[["labelled", "unlabelled"]].to_numpy().sum() == 1437
    assert (here / "who" / "class_counts.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("methods", r"fedprox +mu = 0\.01"),
        ("clients", r"fedprox +mu = 0\.01"),
        ("datasets", r"fashion-mnist +\n"),
        ("datasets", r"folder:PATH +flip = False, size = 0, grey = False"),
        ("models", r"cnn +channels = \[16, 32\]"),
        ("partitions", r"dirichlet +alpha = 0\.5"),
    ],
)
def test_list_names_settings_and_defaults(here, what, line):
    assert re.search(line, fedsim(here, "list", what).stdout)


def test_list_of_another_packages_method_has_its_clients_settings(here, monkeypatch):
    (here / "other_package.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedsim.engine.update import LocalSGD\n"
        "from strategies import FedAvg\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class MyClient(LocalSGD):\n"
        "    nu: float = 0.5\n"
        "class Mine(FedAvg):\n"
        "    client = MyClient\n"
        "    def __init__(self, *, beta: float, **others):\n"
        "        super().__init__(**others)\n"
    )
    monkeypatch.syspath_prepend(here)
    points = {"mine": EntryPoint("mine", "other_package:Mine", "fedsim.methods")}
    monkeypatch.setattr(registry, "_points", lambda kind: points if kind == "method" else {})
    assert re.search(r"mine +beta \(required\), nu = 0\.5", fedsim(here, "list", "methods").stdout)


def test_parts_of_ones_own_are_found_in_the_working_directory(here):
    """What they are warned of is shown once, on workers too."""
    (here / "own.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedsim.engine.update import LocalSGD\n"
        "from fedsim.models.small import mlp\n"
        "from torch.nn import functional as F\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(LocalSGD):\n"
        "    scale: float = 1.0\n"
        "    def loss(self, net, w, batch):\n"
        "        return F.cross_entropy(net(w, batch.x), batch.y), {}\n"
        "def model(shape, num_classes, *, width: int = 4):\n"
        "    return mlp(shape, num_classes, hidden=(width,))\n"
    )
    overrides = ("model.name=own:model", "model.width=5", "method.client=own:Mine")
    sets = [part for override in overrides for part in ("--set", override)]
    on_ray = ("--set", "engine.backend=ray", "--set", "engine.workers=2")
    for run, engine, name in ((fedsim, (), "inline"), (fedsim_alone, on_ray, "ray")):
        done = run(here, "run", "small.toml", *sets, *engine, "--out", name)
        assert done.stderr.count("warning:") == 1
        assert "Mine.loss counts examples that are padding" in done.stderr
    assert "width = 5" in (here / "ray" / "experiment.toml").read_text()
    drop = {"columns": "seconds"}
    inline, on_ray = (pd.read_csv(here / b / "rounds.csv").drop(**drop) for b in ("inline", "ray"))
    pd.testing.assert_frame_equal(inline, on_ray)


def test_a_script_may_define_its_own_client_update(here):
    """Ray's workers get it from there; Ray listens on the loopback, and leaves nothing behind."""
    (here / "script.py").write_text(
        "import os\n"
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "import ray  # before fedsim can say where it is to listen\n"
        "import fedsim, psutil\n"
        "from fedsim.engine.update import LocalSGD\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(LocalSGD):\n"
        "    scale: float = 1.0\n"
        "def look(row):\n"
        "    own = [psutil.Process(), *psutil.Process().children(recursive=True)]\n"
        "    print(sorted({c.laddr.ip for p in own for c in p.net_connections()"
        " if c.status == 'LISTEN'}))\n"
        "    print(any('dashboard.py' in part for p in own for part in p.cmdline()))\n"
        "def sessions():\n"
        "    return set(Path('/tmp/ray').glob(f'session_*_{os.getpid()}'))\n"
        "if __name__ == '__main__':\n"
        "    before = sessions()  # of a killed process that had the same number\n"
        "    method = {'client': '__main__:Mine', 'scale': 2.0}\n"
        "    tables = {'training': {'rounds': 1}, 'model': {'name': 'linear'}}\n"
        "    experiment = fedsim.Experiment(method=method, **tables)\n"
        "    result = fedsim.simulate(experiment, observer=look)\n"
        "    print(len(result.rounds), result.rounds['failures'].sum())\n"
        "    print([*sessions() - before])\n"
    )
    elsewhere = {"RAY_ADDRESS": "127.0.0.1:7777", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=here,
        env={**os.environ, **elsewhere},
        capture_output=True,
        text=True,
        timeout=120,
    )
    listening, *others = done.stdout.splitlines() or [""]
    assert others == ["False", "1 0", "[]"], done.stderr
    assert listening in ("['127.0.0.1', '::ffff:127.0.0.1']", "['127.0.0.1']")


def test_resume_goes_on_with_a_run(here):
    fedsim(here, "run", "small.toml", "--out", "a run", "--set", "training.rounds=2")
    done = fedsim(here, "run", "small.toml", "--out", "a run", "--resume")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["round 3/3"]
    assert "Clients after round 3" in done.stdout
    assert pd.read_csv(here / "a run" / "rounds.csv")["round"].tolist() == [1, 2, 3]


def test_ctrl_c_keeps_the_finished_rounds_and_leaves_no_process(here):
    command = [FEDSIM, "run", "small.toml", "--out", "results"]
    for override in ("training.rounds=100000", "engine.backend=ray", "engine.workers=2"):
        command += ["--set", override]
    process = subprocess.Popen(
        command,
        cwd=here,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    rows = here / "results" / "rounds.csv"
    try:
        deadline = time.monotonic() + 60
        while not rows.exists() or rows.read_text().count("\n") < 4:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # Ray's control store, its raylet and the two workers among them.
        started = living(psutil.Process(process.pid).children(recursive=True))
        assert len(started) >= 4, [one.name() for one in started]
        # A terminal sends the signal to the whole foreground group, Ray's processes included.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-4:] == [
        "stopped; the finished rounds are in results; go on with",
        "fedsim run results/experiment.toml --resume --out results",
        "or see them with",
        "fedsim report results",
    ]
    assert "Traceback" not in errors
    table = pd.read_csv(rows)
    assert table["round"].tolist() == list(range(1, len(table) + 1))
    assert (here / "results" / "model.safetensors").exists()
    deadline = time.monotonic() + 10
    while living(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not living(started), [one.cmdline() for one in living(started)]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_exit_code_says_which_signal_came(here, monkeypatch, number, code):
    def interrupted(*_, **__):
        with noted_interrupts():
            signal.raise_signal(number)

    monkeypatch.setattr("fedsim.simulation.simulate", interrupted)
    monkeypatch.setattr("fedsim.cli._run_planned", interrupted)
    for command in ("run", "sweep"):
        arguments = [command, str(here / "small.toml"), "--out", str(here / "out")]
        assert cli.app(arguments, standalone_mode=False) == code


def test_sigterm_as_ray_connects_leaves_nothing(here):
    code = (
        "import signal\n"
        "from pathlib import Path\n"
        "from fedsim.engine import ray_actors\n"
        "from fedsim.interrupts import Terminated\n"
        "ray = ray_actors._import_ray()\n"
        "connect, found = ray._private.worker.connect, []\n"
        "def interrupted(node, *arguments, **others):\n"
        "    found.append(Path(node.get_session_dir_path()))\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    return connect(node, *arguments, **others)\n"
        "ray._private.worker.connect = interrupted\n"
        "try:\n"
        "    ray_actors.RayActors(1)\n"
        "except Terminated:\n"
        "    print(ray.is_initialized(), found[0].exists())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["False False"], done.stderr


class TestCommandFailure:
    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["run", "none.toml"], "error: none.toml: there is no such experiment file"),
            (
                ["run", "small.toml", "--set", "training.lrr=3"],
                "error: small.toml: training.lrr = 3: unknown key; did you mean lr? allowed: ",
            ),
            (
                [
                    *("run", "small.toml", "--set", "clients.partition=dirichlet"),
                    *("--set", "clients.alpha=-1.0"),
                ],
                "error: small.toml: clients.alpha = -1.0: must be a number above 0",
            ),
            (
                ["partition", "small.toml", "--set", "clients.count=10000"],
                "error: small.toml: clients.count = 10000, but digits has 1437 training examples",
            ),
            (
                ["run", "small.toml", "--resume"],
                "error: --resume: say with --out which folder's run is to go on",
            ),
            (
                ["run", "small.toml", "--set", "data.source=npz:none.npz"],
                "error: npz:none.npz: no file none.npz",
            ),
            (
                ["sweep", "small.toml", "--seeds", "x"],
                "error: --seeds: 'x' is not a valid integer; see fedsim sweep --help",
            ),
            (["run"], "error: Missing argument 'EXPERIMENT.toml'; see fedsim run --help"),
            (["runn"], "error: No such command 'runn'"),
        ],
    )
    def test_one_clear_line_and_exit_code_2(self, here, arguments, line):
        # One by itself, and those which are seen before PyTorch is imported.
        alone = "training.lrr=3" in arguments or not {"--set", "--resume"} & {*arguments}
        done = (fedsim_alone if alone else fedsim)(here, *arguments, code=2)
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(line)
        assert not (here / "runs").exists()

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ({"x_train": (3, float("nan"))}, r"x_train\[3\] has a value that is NaN or infinite"),
            ({"y_train": (7, -2)}, r"y_train\[7\] = -2; labels must be 0\.\.4"),
        ],
    )
    def test_bad_data_of_ones_own(self, here, change, line):
        y = np.arange(50) % 5
        x = np.random.default_rng(0).random((50, 8, 8))
        arrays = {"x_train": x, "y_train": y, "x_test": x.copy(), "y_test": y.copy()}
        for name, (index, value) in change.items():
            arrays[name][index] = value
        np.savez(here / "own.npz", **arrays)
        done = fedsim(here, "run", "small.toml", "--set", "data.source=npz:own.npz", code=2)
        assert re.fullmatch(f"error: npz:own.npz: {line}.*\n", done.stderr)

    def test_a_folder_that_hides_ours_from_the_workers(self, here):
        (here / "clients").mkdir()
        (here / "clients" / "__init__.py").write_text("")
        done = fedsim_alone(here, "run", "small.toml", "--set", "engine.backend=ray", code=2)
        # In the command's process the installed package comes first.
        line = f"would import 'clients' from {here}/clients/.*, this process from (.*): a folder"
        found = re.search(line, done.stderr)
        assert found, done.stderr
        assert Path(found[1]).parent == Path(clients.__file__).parent
        assert "rename that folder or start from another directory" in done.stderr

    def test_a_folder_of_results_is_not_overwritten(self, here):
        (here / "results").mkdir()
        (here / "results" / "precious.txt").write_text("x")
        done = fedsim(here, "run", "small.toml", "--out", "results", code=2)
        assert done.stderr.endswith(
            "results exists and isn't an empty folder; choose another --out\n"
        )

    def test_only_a_run_can_be_resumed(self, here):
        fedsim(here, "partition", "small.toml", "--out", "who")
        for command in ("partition", "run"):
            done = fedsim(here, command, "small.toml", "--out", "who", code=2)
            line = "error: who exists and isn't an empty folder; choose another --out\n"
            assert done.stderr == line
        fedsim(here, "run", "small.toml", "--out", "run")
        done = fedsim(here, "run", "small.toml", "--out", "run", code=2)
        assert done.stderr.endswith("choose another --out, or --resume the run in it\n")

    @pytest.mark.parametrize(
        ("command", "file"),
        [
            (["run", "small.toml", "--resume", "--out"], ""),
            (["sweep", "small.toml", "--out"], "/experiment.toml"),
            (["report"], "/run.json"),
            (["compare"], "/experiment.toml"),
        ],
    )
    def test_what_the_system_refuses_is_one_line(self, here, command, file):
        name = "x" * 300
        done = fedsim(here, *command, name, code=2)
        assert done.stderr == f"error: {name}{file}: File name too long\n"

    def test_a_folder_that_can_not_be_entered(self, here, monkeypatch):
        def refuse(self):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "is_dir", refuse)
        done = fedsim(here, "report", "results", code=2)
        assert done.stderr.startswith("error: results")
        assert done.stderr.endswith(": Permission denied\n")
        assert done.stderr.count("\n") == 1

    def test_a_broken_matplotlibrc_costs_no_results(self, here):
        (here / "matplotlibrc").write_bytes(b"\xff\xfe\x00")
        done = fedsim_alone(here, "run", "small.toml", "--out", "results", code=2)
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: Matplotlib can't be imported, which draws the figures: ")
        assert "the run's results are in results; " in line
        assert len(pd.read_csv(here / "results" / "rounds.csv")) == 3
        done = fedsim_alone(here, "report", "results", code=2)
        assert "error: Matplotlib can't be imported" in done.stderr

"""Sweeps: every combination, each seed, and what had finished isn't run again."""

import itertools
import os
import re
import signal
import subprocess
import time

import pandas as pd
import psutil
import pytest

from fedsim.errors import ConfigError
from fedsim.sweep import jobs_at_a_time, on_its_cores, plan
from tests.fedsim.test_cli import FEDSIM, SMALL, fedsim

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text("seed = 3\n" + SMALL)
    return file


def test_every_combination_has_every_seed(file):
    planned = plan(file, ["training.lr=0.1,0.2", "model.name=linear,mlp"], seeds=2)
    assert [one.name for one in planned] == [
        f"lr={lr},{model},seed={seed}"
        for lr, model, seed in itertools.product((0.1, 0.2), ("linear", "mlp"), (3, 4))
    ]
    last = planned[-1].experiment
    assert (last.training.lr, last.model.name, last.seed) == (0.2, "mlp", 4)
    assert last.training.rounds == 3  # the file's


def test_a_components_own_settings_can_be_swept(file):
    planned = plan(file, ["method.mu=0.0,0.1"], 1, ["method.name=fedprox", "seed=9"])
    assert [one.experiment.method.options for one in planned] == [{"mu": 0.0}, {"mu": 0.1}]
    assert [one.name for one in planned] == ["mu=0.0,seed=9", "mu=0.1,seed=9"]


def test_values_with_commas_are_written_as_toml(file):
    planned = plan(file, ["model.hidden=[[4, 8], [16]]"], 1, ["model.name=mlp"])
    assert [one.experiment.model.options["hidden"] for one in planned] == [(4, 8), (16,)]
    assert [one.name for one in planned] == ["hidden=4,8,seed=3", "hidden=16,seed=3"]


def test_without_a_grid_only_the_seeds_differ(file):
    assert [one.name for one in plan(file, [], 2)] == ["seed=3", "seed=4"]


class TestCores:
    """How a machine of eight cores is shared out."""

    @pytest.fixture(autouse=True)
    def eight_cores(self, monkeypatch):
        monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))

    def shared_out(self, file, runs, jobs=None, *overrides):
        planned = plan(file, [], runs, ["engine.backend=ray", "engine.device=cpu", *overrides])
        jobs = jobs_at_a_time(planned, jobs)
        engine = on_its_cores(planned[0].experiment, jobs).engine
        return jobs, engine.backend, engine.workers

    def test_many_runs_get_a_core_each(self, file):
        assert self.shared_out(file, 9) == (8, "inline", "auto")

    def test_few_runs_share_the_cores_out(self, file):
        assert self.shared_out(file, 4) == (4, "ray", 2)
        assert self.shared_out(file, 3) == (3, "ray", 2)
        assert self.shared_out(file, 2, None, "training.participation=3") == (2, "ray", 3)

    def test_a_single_run_is_left_alone(self, file):
        assert self.shared_out(file, 1) == (1, "ray", "auto")
        assert self.shared_out(file, 9, 1) == (1, "ray", "auto")

    def test_what_the_experiment_says_itself_stays(self, file):
        assert self.shared_out(file, 9, None, "engine.workers=3") == (2, "ray", 3)
        assert self.shared_out(file, 9, None, "engine.workers=20") == (1, "ray", 20)
        assert self.shared_out(file, 9, 4, "engine.workers=3") == (4, "ray", 3)
        assert self.shared_out(file, 9, None, "engine.backend=inline") == (8, "inline", "auto")

    def test_on_a_gpu_one_at_a_time(self, file, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert self.shared_out(file, 9, None, "engine.device=auto") == (1, "ray", "auto")
        assert self.shared_out(file, 9, 2, "engine.device=auto") == (2, "ray", "auto")

    def test_no_job(self, file):
        with pytest.raises(ConfigError, match="--jobs 0: must be at least 1"):
            self.shared_out(file, 2, 0)


class TestPlanFailure:
    @pytest.mark.parametrize(
        ("grid", "line"),
        [
            ("training.lr", r"--grid 'training.lr': write --grid table.key=V1,V2"),
            ("training.lr=", r"write --grid table.key=V1,V2"),
            ("'training'.lr=1", r"--grid \"'training'.lr=1\": write table.key without quotes or"),
            ("training.lr=0.1,,0.2", r"write --grid table.key=V1,V2"),
            ("training.lr=[0.1", r"table.key=\[V1, V2\] in TOML"),
            ("seed=1,2", r"--grid seed=...: give --seeds, the number of seeds"),
            ("training.lr=0.1,0.10", r"lr=0.1,seed=3 and lr=0.10,seed=3 are the same experiment"),
            ("training.lr=[2020-01-01]", r"table.key=\[V1, V2\] in TOML"),
            ("data.source=npz:a/b,npz:a-b", r"two runs would have the folder npz-a-b,seed=3"),
            ("method.name=fedavg,fedx", r"fedx: .*small.toml: .*unknown method 'fedx'"),
            ("method.mu=0.1", r"mu=0.1: .*small.toml: method.mu"),
        ],
    )
    def test_a_grid_that_can_not_be_run(self, file, grid, line):
        with pytest.raises(ConfigError, match=line):
            plan(file, [grid], 1)

    def test_a_key_twice(self, file):
        with pytest.raises(ConfigError, match=r"--grid training\.lr: is there twice"):
            plan(file, ["training.lr=0.1", "training.lr=0.2"], 1)

    def test_no_seed(self, file):
        with pytest.raises(ConfigError, match="--seeds 0: must be at least 1"):
            plan(file, [], 0)

    @pytest.mark.parametrize(
        ("grid", "seeds", "line"),
        [
            (
                [],
                10**11,
                "--seeds 100000000000: makes 100,000,000,000 runs; must be at most 10,000",
            ),
            (
                ["seed.x=1,2", "b.c=1,2"],
                2501,
                "--seeds 2501 of each of 4 combinations: makes 10,004",
            ),
        ],
    )
    def test_more_runs_than_anybody_means(self, file, grid, seeds, line):
        with pytest.raises(ConfigError, match=line):
            plan(file, grid, seeds)

    def test_all_mistakes_are_named_before_anything_runs(self, file):
        with pytest.raises(ConfigError) as mistakes:
            plan(file, ["training.lr=0.1,-1.0,-2.0"], 3)
        assert [line.partition(":")[0] for line in str(mistakes.value).split("\n")] == [
            "lr=-1.0",
            "lr=-2.0",
        ]


MINE = """\
from strategies import FedAvg
class Exit(FedAvg):
    def configure_train(self, *arguments):
        raise SystemExit(3)
class Boom(FedAvg):
    def aggregate_train(self, server_round, replies):
        raise RuntimeError('boom')
"""


def test_strategies_that_exit_or_raise_leave_the_other_runs_alone(file):
    file.with_name("mine.py").write_text(MINE)
    grid = ("--grid", "method.name=mine:Exit,mine:Boom,fedavg")
    done = fedsim(file.parent, "sweep", "small.toml", *grid, "--out", "all", code=2)
    for line in (
        "mine-Exit,seed=3: round 1: Exit.configure_train: SystemExit: 3",
        "mine-Boom,seed=3: round 1: Boom.aggregate_train: RuntimeError: boom (mine.py, line 7, in ",
    ):
        assert f"error: {line}" in done.stderr
        assert f"Not here: {line}" in (file.parent / "all/comparison.html").read_text()
    assert done.stderr.endswith("error: 2 of 3 runs failed, as said above\n")
    assert "After round 3" in done.stdout
    assert re.search(r"^small +1 +[\d.]+ ", done.stdout, re.M)


def test_what_ran_before_is_no_result_of_a_sweep_that_fails(file):
    fedsim(file.parent, "run", "small.toml", "--out", "all/seed=3")
    other = ("--set", "training.lr=0.5")
    done = fedsim(file.parent, "sweep", "small.toml", *other, "--out", "all", code=2)
    line = "error: seed=3: training.lr was 0.05 in all/seed=3, but is 0.5 now; a resumed run can"
    assert done.stderr.startswith(line)
    assert done.stdout == ""


def test_a_mistyped_sweep_leaves_the_comparison_that_is_there(file):
    fedsim(file.parent, "sweep", "small.toml", "--out", "all")
    page = (file.parent / "all" / "comparison.html").read_bytes()
    other = ("--set", "training.lr=0.5")
    fedsim(file.parent, "sweep", "small.toml", *other, "--out", "all", code=2)
    assert (file.parent / "all" / "comparison.html").read_bytes() == page


def test_a_comparison_that_can_not_be_replaced(file):
    (file.parent / "all" / "comparison.html").mkdir(parents=True)
    done = fedsim(file.parent, "sweep", "small.toml", "--out", "all", code=2)
    line = "error: can't write all/comparison.html: Is a directory; what was written before is kept"
    assert done.stderr.splitlines()[-1] == line


def test_a_sweep_is_no_run(file):
    fedsim(file.parent, "run", "small.toml", "--out", "one")
    done = fedsim(file.parent, "sweep", "small.toml", "--out", "one", code=2)
    assert done.stderr == "error: one is the folder of a run; choose another --out\n"


def test_sweep_compares_its_runs_and_runs_none_twice(file):
    command = ["sweep", "small.toml", "--grid", "training.lr=0.1,1.0", "--seeds", "2"]
    done = fedsim(file.parent, *command, "--out", "all")
    assert "After round 3, accuracies in %" in done.stdout
    assert "comparison: all/comparison.html" in done.stdout
    assert sorted(re.findall(r"^run . of 4: .*", done.stderr, re.M)) == [
        f"run {i + 1} of 4: lr={lr},seed={seed}"
        for i, (lr, seed) in enumerate(itertools.product((0.1, 1.0), (3, 4)))
    ]
    assert re.search(r"^lr=1.0,seed=4: round 3/3: generic [\d.]+ %, personal ", done.stderr, re.M)
    table = pd.read_csv(file.parent / "all" / "comparison.csv")
    assert table[["label", "seed"]].to_numpy().tolist() == [
        ["lr=0.1", 3],
        ["lr=0.1", 4],
        ["lr=1.0", 3],
        ["lr=1.0", 4],
    ]
    rounds = file.parent / "all" / "lr=1.0,seed=4" / "rounds.csv"
    assert table["generic"].iloc[3] == pd.read_csv(rounds)["generic_accuracy"].iloc[-1]
    # One was killed after the last round, but before its end.
    killed = rounds.parents[1] / "lr=0.1,seed=4"
    for name in ("report.html", "model.safetensors"):
        (killed / name).unlink()
    command += ["--jobs", "1", "--out", "all"]
    before = rounds.stat().st_mtime_ns
    again = fedsim(file.parent, *command, "--set", "training.rounds=3")
    assert (again.stdout, again.stderr) == (done.stdout, "run 2 of 4: lr=0.1,seed=4\n")
    assert (killed / "report.html").exists()
    assert (killed / "model.safetensors").exists()
    assert rounds.stat().st_mtime_ns == before
    # More rounds: each goes on.
    fedsim(file.parent, *command, "--set", "training.rounds=4")
    assert len(pd.read_csv(rounds)) == 4
    assert (
        "linear on digits, 6 clients (iid), 4 rounds" in rounds.with_name("report.html").read_text()
    )


def begin_endless(file):
    """Begin a sweep of two runs that won't end; return its process and rounds when both run."""
    command = [
        *("sweep", "small.toml", "--seeds", "2", "--jobs", "2", "--out", "all"),
        *("--set", "evaluation.every=1", "--set", "training.rounds=100000"),
    ]
    process = subprocess.Popen(
        [FEDSIM, *command],
        cwd=file.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rounds = [file.parent / "all" / f"seed={seed}" / "rounds.csv" for seed in (3, 4)]
    begun = time.monotonic()
    # A file is there a moment before its first row.
    while not all(file.exists() and file.read_text().count("\n") > 1 for file in rounds):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < begun + 120
        time.sleep(0.1)
    return process, command, rounds


def test_a_sweep_that_is_stopped_says_how_to_go_on(file):
    process, command, rounds = begin_endless(file)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; the same command goes on, with --out all" in stderr
    assert "Traceback" not in stderr
    done = [len(pd.read_csv(file)) for file in rounds]
    assert all((file.parent / "model.safetensors").exists() for file in rounds)
    assert not any('"finished": null' in file.with_name("run.json").read_text() for file in rounds)
    command[-1] = f"training.rounds={max(done) + 1}"
    fedsim(file.parent, *command)
    assert [len(pd.read_csv(file)) for file in rounds] == [max(done) + 1] * 2


def test_when_a_sweep_is_killed_its_runs_stop(file):
    process, _, rounds = begin_endless(file)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=60)
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert all((file.parent / "model.safetensors").exists() for file in rounds)


def test_a_grid_of_a_whole_table_is_refused(file):
    with pytest.raises(
        ConfigError, match=r"^--grid 'model=.*: model is a table; write model\.key="
    ):
        plan(file, ["model=linear,mlp"], 1)


def test_a_sweep_with_mistakes_runs_nothing(file):
    done = fedsim(file.parent, "sweep", "small.toml", "--grid", "training.lr=0.1,x", code=2)
    assert "error: lr=x: small.toml: training.lr = 'x'" in done.stderr
    assert not (file.parent / "runs").exists()

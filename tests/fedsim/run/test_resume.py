"""A run that was interrupted goes on as if nothing had happened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from safetensors.numpy import load_file, save_file

import fedsim
from fedsim import simulation
from fedsim.engine.checkpoint import Checkpoint
from fedsim.engine.state import ClientStates
from fedsim.errors import ConfigError, DataError, EngineError
from fedsim.run import recorder
from fedsim.run.directory import CHECKPOINT, RunDirectory
from strategies import FedAvg

FEDSIM = Path(sys.executable).parent / "fedsim"
SMALL = {
    "name": "small",
    "clients": {"count": 6, "partition": "dirichlet", "alpha": 0.5, "labelled": 0.5},
    "model": {"name": "linear"},
    "training": {"rounds": 5, "participation": 0.5, "momentum": 0.5},
    "evaluation": {"every": 2},
    "engine": {"backend": "inline"},
}
TABLES = ("clients.csv", "training.csv", "metrics.csv", "class_norms.csv", "partition.csv")
METHODS = {
    "fedavg": {},
    "fedadam": {},
    "fedavgm": {"server_momentum": 0.5},
    "fedloge": {"sparsity": 0.2},
    # Its clients have more to say once the warm-up is over: a resumed run must know the columns.
    "fedlabel": {"warmup_rounds": 4},
    "creff": {"crt_epochs": 2, "match_epochs": 2},
}


def experiment(**changes):
    """Return the small experiment with some settings of its tables changed."""
    tables = {key: {**SMALL.get(key, {}), **changes.get(key, {})} for key in (*SMALL, *changes)
              if key not in ("name", "seed")}  # fmt: skip
    return fedsim.Experiment(name="small", seed=changes.get("seed", 0), **tables)


def of(method, **changes):
    model = {"name": "mlp"} if method == "fedloge" else {"name": "linear"}
    return experiment(method={"name": method, **METHODS[method]}, model=model, **changes)


class StopRunError(Exception):
    """Ends a run."""


def stopped(experiment, out, after, **options):
    """Run an experiment until a round is finished."""

    def stop(row):
        if row["round"] == after:
            raise StopRunError

    with pytest.raises(StopRunError):
        fedsim.simulate(experiment, out=out, observer=stop, **options)


def assert_same_run(one, other):
    rounds = [pd.read_csv(run / "rounds.csv").drop(columns="seconds") for run in (one, other)]
    pd.testing.assert_frame_equal(*rounds)
    for name in TABLES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    models = [load_file(run / "model.safetensors") for run in (one, other)]
    assert models[0].keys() == models[1].keys()
    for name, array in models[0].items():
        np.testing.assert_array_equal(array, models[1][name])
    if (one / "state").exists():
        states = [ClientStates.open(run / "state") for run in (one, other)]
        assert states[0].trained.tolist() == states[1].trained.tolist()
        for client in states[0].trained.tolist():
            for name, array in states[0].read(client).items():
                np.testing.assert_array_equal(array, states[1].read(client)[name])


@pytest.fixture(scope="module", autouse=True)
def pictures():
    """Draw figures, but put a point into their files: Matplotlib's part takes most of a run."""
    point = BytesIO()
    Image.new("L", (1, 1)).save(point, "png")
    with patch.object(Figure, "savefig", lambda _, file, **__: file.write(point.getvalue())):
        yield


@pytest.fixture
def each_round(monkeypatch):
    """Write a checkpoint after each round."""
    monkeypatch.setattr(recorder, "CHECKPOINT_SPACING", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of each method that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        fedsim.simulate(of(method), out=folder / method)
    return folder


class TestResume:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_run_goes_on_where_it_stopped(self, whole, tmp_path, each_round, method):
        out = tmp_path / "run"
        stopped(of(method), out, after=3)
        seen = []
        result = fedsim.simulate(of(method), out=out, resume=True, observer=seen.append)
        assert [row["round"] for row in seen] == [4, 5]
        assert result.rounds["round"].tolist() == [1, 2, 3, 4, 5]
        assert_same_run(out, whole / method)
        read = [pd.read_csv(out / f"{name}.csv") for name in ("rounds", "clients", "training")]
        for frame, other in zip(
            (result.rounds, result.clients, result.training), read, strict=True
        ):
            pd.testing.assert_frame_equal(frame, other)

    @pytest.mark.parametrize("method", ["fedloge", "fedadam"])
    def test_and_from_an_older_checkpoint(self, whole, tmp_path, monkeypatch, method):
        """The rounds after it, rows and states of clients among them, are as if not there."""
        out = tmp_path / "run"
        monkeypatch.setattr(recorder, "CHECKPOINT_SPACING", 0)
        stopped(of(method), out, after=2)
        monkeypatch.setattr(recorder, "CHECKPOINT_SPACING", 1e9)
        stopped(of(method), out, after=4, resume=True)
        assert Checkpoint.read(out / CHECKPOINT).round == 3  # the first of this process
        assert len(pd.read_csv(out / "rounds.csv")) == 4
        fedsim.simulate(of(method), out=out, resume=True)
        assert_same_run(out, whole / method)

    @pytest.mark.parametrize("method", ["fedloge", "creff"])
    def test_an_interrupt_in_the_middle_of_a_round(
        self, whole, tmp_path, each_round, monkeypatch, method
    ):
        """What clients and strategy had done of that round is as if not done."""
        out = tmp_path / "run"
        aggregate = FedAvg.complete

        def interrupt(self, arrays):
            if len(pd.read_csv(out / "rounds.csv")) == 3:
                raise KeyboardInterrupt
            return aggregate(self, arrays)

        fedsim.simulate(of(method, training={"rounds": 1}), out=out)
        with monkeypatch.context() as patch:
            patch.setattr(FedAvg, "complete", interrupt)
            with pytest.raises(KeyboardInterrupt):
                fedsim.simulate(of(method), out=out, resume=True)
        shutil.rmtree(out / "figures")
        result = fedsim.simulate(of(method), out=out, resume=True)
        # Round 1 was the last of a run, and so was evaluated.
        assert result.clients["round"].unique().tolist() == [1, 2, 4, 5]
        model, expected = (load_file(p / "model.safetensors") for p in (out, whole / method))
        for name, array in expected.items():
            np.testing.assert_array_equal(model[name], array)

    def test_a_finished_run_can_have_more_rounds(self, whole, tmp_path):
        out = tmp_path / "run"
        fedsim.simulate(of("fedadam", training={"rounds": 4}), out=out)
        fedsim.simulate(of("fedadam"), out=out, resume=True)
        assert_same_run(out, whole / "fedadam")
        assert fedsim.load(out / "experiment.toml").training.rounds == 5

    def test_a_learning_rate_goes_on_falling(self, tmp_path, each_round):
        falling = experiment(training={"lr_schedule": "cosine", "lr_decay": 0.9})
        fedsim.simulate(falling, out=tmp_path / "whole")
        stopped(falling, tmp_path / "run", after=2)
        fedsim.simulate(falling, out=tmp_path / "run", resume=True)
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    def test_where_its_last_round_counts_there_cannot_be_more(self, tmp_path):
        falling = {"lr_schedule": "cosine", "rounds": 2}
        fedsim.simulate(experiment(training=falling), out=tmp_path / "run")
        longer = experiment(training={**falling, "rounds": 3})
        line = (
            r"rounds was 2 .* but is 3 now; a resumed run can only change evaluation.every, engine"
        )
        with pytest.raises(ConfigError, match=line):
            fedsim.simulate(longer, out=tmp_path / "run", resume=True)

    def test_a_finished_run_is_shown_again(self, whole, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(whole / "fedavg", out)
        shutil.rmtree(out / "figures")
        result = fedsim.simulate(of("fedavg"), out=out, resume=True)
        assert len(result.rounds) == 5
        assert_same_run(out, whole / "fedavg")
        assert (out / "figures" / "client_accuracy.png").exists()

    def test_where_no_run_has_begun_one_begins(self, whole, tmp_path):
        out = tmp_path / "run"
        out.mkdir()
        fedsim.simulate(of("fedavg"), out=out, resume=True)
        assert_same_run(out, whole / "fedavg")

    def test_a_run_that_never_finished_a_round(self, whole, tmp_path, monkeypatch):
        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(FedAvg, "configure_train", lambda *_: 1 / 0)
            with pytest.raises(EngineError, match=r"FedAvg\.configure_train: ZeroDivision"):
                fedsim.simulate(of("fedavg"), out=out)
        fedsim.simulate(of("fedavg"), out=out, resume=True)
        assert_same_run(out, whole / "fedavg")

    def test_a_run_that_ended_before_its_first_checkpoint(self, whole, tmp_path, monkeypatch):
        """A job stopped while its workers start can be started again by the same command."""
        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(recorder.Recorder, "_save", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fedsim.simulate(of("fedavg"), out=out)
        assert (out / "experiment.toml").exists()
        fedsim.simulate(of("fedavg"), out=out, resume=True)
        assert_same_run(out, whole / "fedavg")

    def test_a_run_whose_workers_do_not_start_leaves_an_empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fedsim.simulation.make_grid", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fedsim.simulate(of("fedavg"), out=tmp_path / "run")
        assert not list((tmp_path / "run").iterdir())

    @pytest.mark.parametrize("row", ["4", "4,0.5", "4,0.5\n", "5,", ""])
    def test_a_row_that_was_being_written(self, whole, tmp_path, each_round, row):
        out = tmp_path / "run"
        stopped(of("fedavg"), out, after=3)
        for name in ("rounds.csv", "clients.csv", "training.csv"):
            with (out / name).open("a") as file:
                file.write(row)
        fedsim.simulate(of("fedavg"), out=out, resume=True)
        assert_same_run(out, whole / "fedavg")

    @pytest.mark.parametrize("blank", ["\n", "\r\n\n"])
    def test_a_blank_line_is_no_row(self, whole, tmp_path, each_round, blank):
        out = tmp_path / "run"
        stopped(of("fedavg"), out, after=3)
        for name in ("rounds.csv", "clients.csv", "training.csv"):
            with (out / name).open("a", newline="") as file:
                file.write(blank)
        fedsim.simulate(of("fedavg"), out=out, resume=True)
        assert_same_run(out, whole / "fedavg")

    def test_a_row_of_an_early_round_cut_off_is_no_row(self, tmp_path):
        """The beginning of "12,0.5" is "1", but no row of round 1."""
        (tmp_path / "x.csv").write_text("round,a\n1,0.1\n2,0.2\n1")
        found = RunDirectory(tmp_path, resumed=True).until("x.csv", 2)
        assert found == b"round,a\n1,0.1\n2,0.2\n"

    @pytest.mark.parametrize(
        "text", ["", "rou", "round,a", "round,a\n", "round,a\n1,0", "a\n9,1\n"]
    )
    def test_a_table_without_a_row_that_counts_begins_anew(
        self, whole, tmp_path, monkeypatch, text
    ):
        out = tmp_path / "run"
        monkeypatch.setattr(recorder, "CHECKPOINT_SPACING", 1e9)
        stopped(of("fedavg"), out, after=1)
        for name in ("rounds.csv", "clients.csv", "training.csv"):
            (out / name).write_text(text)
        fedsim.simulate(of("fedavg"), out=out, resume=True)
        assert_same_run(out, whole / "fedavg")

    def test_how_it_runs_may_change(self, whole, tmp_path, each_round):
        out = tmp_path / "run"
        stopped(of("fedavg"), out, after=3)
        other = of("fedavg", engine={"cohort": "one-by-one"}, evaluation={"every": 5})
        result = fedsim.simulate(other, out=out, resume=True)
        assert result.clients["round"].unique().tolist() == [2, 5]

    def test_run_json_counts_all_rounds(self, tmp_path, each_round):
        out = tmp_path / "run"
        stopped(of("fedavg"), out, after=2)
        stopped(of("fedavg"), out, after=4, resume=True)
        fedsim.simulate(of("fedavg"), out=out, resume=True)
        facts = pd.read_json(out / "run.json", typ="series")
        rounds = pd.read_csv(out / "rounds.csv")
        assert facts["resumed_after"] == [2, 4]
        assert facts["rounds_finished"] == 5
        assert facts["bytes_up"] == rounds["bytes_up"].sum()
        spent = facts["seconds_per_round"]
        of_rounds = spent["total"] - spent["write"]
        assert of_rounds == pytest.approx(rounds["seconds"].mean(), rel=1e-6)

    def test_a_large_model_is_not_written_after_each_round(self, tmp_path, monkeypatch):
        monkeypatch.setattr(recorder, "CHECKPOINT_SPACING", 1e9)
        rounds = []
        to_bytes = Checkpoint.to_bytes
        monkeypatch.setattr(
            Checkpoint, "to_bytes", lambda self: rounds.append(self.round) or to_bytes(self)
        )
        fedsim.simulate(of("fedavg"), out=tmp_path / "run")
        assert rounds == [0, 5]

    def test_without_a_folder_there_is_no_checkpoint(self, monkeypatch):
        monkeypatch.setattr(Checkpoint, "to_bytes", lambda self: 1 / 0)
        fedsim.simulate(of("fedavg"))


KILLED = """\
name = "small"
[clients]
count = 6
[model]
name = "mlp"
[method]
name = "fedloge"
sparsity = 0.2
[training]
rounds = 8
participation = 0.5
[engine]
workers = 2
"""


def test_a_run_on_ray_that_is_killed_goes_on(tmp_path):
    (tmp_path / "small.toml").write_text(KILLED)
    inline = fedsim.load(tmp_path / "small.toml", ["engine.backend=inline"])
    fedsim.simulate(inline, out=tmp_path / "whole")
    command = [FEDSIM, "run", "small.toml", "--out"]
    process = subprocess.Popen(
        [*command, "run"], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL
    )
    rows = tmp_path / "run" / "rounds.csv"
    deadline = time.monotonic() + 60
    while not (rows.exists() and rows.read_text().count("\n") > 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "run", "--resume"], cwd=tmp_path, check=True, capture_output=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_two_threads_that_go_on_with_a_run_go_on_one_after_the_other(tmp_path):
    whole = fedsim.simulate(of("fedloge"), out=tmp_path / "whole")
    stopped(of("fedloge"), tmp_path / "run", after=2)
    with ThreadPoolExecutor(2) as pool:
        for rounds in (4, 5):
            longer = of("fedloge", training={"rounds": rounds})
            pool.submit(fedsim.simulate, longer, out=tmp_path / "run", resume=True)
            time.sleep(0.05)
    assert_same_run(whole.path, tmp_path / "run")


def test_a_run_that_another_process_has_gone_on_with_meanwhile(tmp_path, monkeypatch):
    stopped(of("fedloge"), tmp_path / "run", after=2)
    checkpoint = (tmp_path / "run" / CHECKPOINT).read_bytes()
    fedsim.simulate(of("fedloge"), out=tmp_path / "run", resume=True)
    stale = tmp_path / "stale"
    stale.write_bytes(checkpoint)
    monkeypatch.setattr(simulation, "last_checkpoint", lambda *_: Checkpoint.read(stale))
    rounds = (tmp_path / "run" / "rounds.csv").read_bytes()
    with pytest.raises(EngineError, match="has gone on from round 2 to 5 meanwhile; the same"):
        fedsim.simulate(of("fedloge"), out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "rounds.csv").read_bytes() == rounds


def test_a_module_of_ones_own_that_has_changed_is_warned_of(tmp_path, monkeypatch, each_round):
    """Also one that another of them imports."""
    (tmp_path / "my_client.py").write_text(
        "import my_helpers.base\nclass Mine(my_helpers.base.Base): ...\n"
    )
    (tmp_path / "my_helpers").mkdir()
    file = tmp_path / "my_helpers" / "base.py"
    text = "from fedsim.engine.update import LocalSGD\nclass Base(LocalSGD): ...\n"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    mine = experiment(method={"client": "my_client:Mine"}, model={"name": "linear"})
    stopped(mine, tmp_path / "run", after=3)
    was = json.loads((tmp_path / "run" / "run.json").read_text())
    # Beside them, but no part of them.
    (tmp_path / "my_plots.py").write_text("size = 1\n")
    import_module("my_plots")
    file.write_text(text + "# otherwise\n")
    with pytest.warns(
        UserWarning, match=r"my_helpers.base: changed since .*, whose 3 rounds are those"
    ):
        fedsim.simulate(mine, out=tmp_path / "run", resume=True)
    now = json.loads((tmp_path / "run" / "run.json").read_text())
    assert was["own_parts"].keys() == now["own_parts"].keys() == {"my_client", "my_helpers.base"}
    assert now["own_parts"] != was["own_parts"]
    assert now["earlier_parts"] == [{"until_round": 3, "own_parts": was["own_parts"]}]
    # Of a run that ended in its first round nothing is from before.
    (tmp_path / "new").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(FedAvg, "complete", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            fedsim.simulate(mine, out=tmp_path / "new")
    file.write_text(text + "# mended\n")
    fedsim.simulate(mine, out=tmp_path / "new", resume=True)
    assert json.loads((tmp_path / "new" / "run.json").read_text())["earlier_parts"] == []
    file.write_text(text + "# otherwise\n")
    # What is as it was is no news, and warnings are errors here.
    fedsim.simulate(mine, out=tmp_path / "run", resume=True)
    sys.modules.pop("my_client", None)


class TestAnew:
    """Without --resume, in the folder of a run that ended in its first round."""

    @pytest.fixture
    def failed(self, tmp_path, monkeypatch):
        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(FedAvg, "complete", lambda *_: 1 / 0)
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                fedsim.simulate(of("fedloge"), out=out)
        assert Checkpoint.read(out / CHECKPOINT).round == 0
        assert (out / "state" / "states.bin").exists()
        return out

    def test_another_run_begins(self, whole, failed):
        fedsim.simulate(of("fedavg"), out=failed)
        assert_same_run(failed, whole / "fedavg")
        assert not (failed / "state").exists()

    def test_also_without_a_checkpoint(self, whole, failed):
        shutil.rmtree(failed / "checkpoint")
        fedsim.simulate(of("fedavg"), out=failed)
        assert_same_run(failed, whole / "fedavg")

    @pytest.mark.parametrize("name", ["notes.txt", "state/notes.txt", "report.html"])
    def test_not_where_there_is_something_else(self, failed, name):
        (failed / name).touch()
        with pytest.raises(EngineError, match="isn't an empty folder; choose another --out"):
            fedsim.simulate(of("fedavg"), out=failed)
        assert (failed / name).exists()

    def test_not_where_a_file_is_all_there_is(self, tmp_path):
        (tmp_path / "experiment.toml").write_text("# mine\n")
        with pytest.raises(EngineError, match="isn't an empty folder"):
            fedsim.simulate(of("fedavg"), out=tmp_path)
        assert (tmp_path / "experiment.toml").read_text() == "# mine\n"

    @pytest.mark.parametrize("lost", [None, "rounds.csv", CHECKPOINT])
    def test_not_where_a_round_has_finished(self, tmp_path, each_round, lost):
        stopped(of("fedavg"), tmp_path, after=1)
        if lost:
            (tmp_path / lost).unlink()
        with pytest.raises(EngineError, match="isn't an empty folder"):
            fedsim.simulate(of("fedavg"), out=tmp_path)

    def test_not_where_the_model_or_rows_are_all_that_is_left(self, tmp_path, each_round):
        stopped(of("fedavg"), tmp_path, after=2)
        for lost in ("rounds.csv", CHECKPOINT, "clients.csv", "training.csv"):
            (tmp_path / lost).unlink()
            with pytest.raises(EngineError, match="isn't an empty folder"):
                fedsim.simulate(of("fedavg"), out=tmp_path)
        assert (tmp_path / "model.safetensors").exists()

    def test_not_where_there_are_no_locks(self, failed, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        with pytest.raises(EngineError, match="isn't an empty folder"):
            fedsim.simulate(of("fedavg"), out=failed)

    def test_not_while_a_run_is_in_its_first_round(self, tmp_path, monkeypatch):
        complete = FedAvg.complete
        found = []

        def start_another(self, arrays):
            if not found:
                with pytest.raises(EngineError, match="another run is writing to") as error:
                    fedsim.simulate(of("fedavg"), out=tmp_path)
                found.append(error)
            return complete(self, arrays)

        monkeypatch.setattr(FedAvg, "complete", start_another)
        assert len(fedsim.simulate(of("fedavg"), out=tmp_path).rounds) == 5
        assert found


class TestResumeFailure:
    @pytest.fixture
    def run(self, tmp_path, each_round):
        stopped(of("fedavg"), tmp_path / "run", after=3)
        return tmp_path / "run"

    def fails(self, run, error, line, experiment=None):
        with pytest.raises(error, match=line):
            fedsim.simulate(experiment or of("fedavg"), out=run, resume=True)

    def test_no_folder_named(self):
        with pytest.raises(ConfigError, match="say in out which folder"):
            fedsim.simulate(of("fedavg"), resume=True)

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ({"seed": 1}, r"seed was 0 in .*run, but is 1 now; a resumed run can only change"),
            ({"training": {"lr": 0.1}}, r"training.lr was 0.05 in .*, but is 0.1 now"),
            ({"clients": {"count": 7}}, r"clients.count was 6 in .*, but is 7 now"),
            ({"evaluation": {"participation": 0.5}}, r"evaluation.participation was 1.0"),
            ({"model": {"name": "mlp"}}, r"model.name was 'linear' in .*, but is 'mlp' now"),
        ],
    )
    def test_another_experiment(self, run, change, line):
        changed = experiment(method={"name": "fedavg"}, **change)
        self.fails(run, ConfigError, line, changed)

    def test_fewer_rounds(self, run):
        fewer = of("fedavg", training={"rounds": 2})
        self.fails(run, ConfigError, r"rounds = 2: the run in .* has finished 3 already", fewer)

    def test_two_runs_in_one_folder(self, tmp_path):
        out = tmp_path / "run"

        def start_another(row):
            self.fails(out, EngineError, "another run is writing to .*run; choose another --out")

        result = fedsim.simulate(of("fedavg"), out=out, observer=start_another)
        assert len(result.rounds) == 5
        fedsim.simulate(of("fedavg"), out=out, resume=True)  # it has been let go

    def test_a_folder_without_a_run(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        line = r"holds no run that could go on: .*checkpoint/latest.safetensors is missing"
        self.fails(tmp_path, EngineError, line)
        assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_finished_run_without_its_checkpoint(self, whole, tmp_path):
        """Copied without what takes most room: its model isn't replaced by another experiment's."""
        for name in ("experiment.toml", "run.json", "partition.csv", "model.safetensors"):
            shutil.copy(whole / "fedavg" / name, tmp_path)
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        line = r"holds no run that could go on: .*checkpoint/latest.safetensors is missing"
        self.fails(tmp_path, EngineError, line, of("fedadam"))
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("said", [None, "{", "[]", "{}"])
    def test_a_folder_with_an_experiment_of_ones_own(self, tmp_path, said):
        (tmp_path / "experiment.toml").write_text("# mine\n")
        (tmp_path / "names.csv").touch()
        if said is not None:
            (tmp_path / "run.json").write_text(said)
        self.fails(tmp_path, EngineError, "holds no run that could go on")
        assert (tmp_path / "experiment.toml").read_text() == "# mine\n"

    def test_a_broken_checkpoint(self, run):
        os.truncate(run / CHECKPOINT, 100)
        self.fails(run, EngineError, r"latest.safetensors is broken, or no checkpoint")

    def test_a_missing_experiment(self, run):
        (run / "experiment.toml").unlink()
        self.fails(run, ConfigError, r"run/experiment.toml: there is no such experiment file")

    def test_other_data(self, run, monkeypatch):
        line = r"clients' data aren't those with which the run in .* began: has data.source"
        monkeypatch.setattr("fedsim.engine.checkpoint.digest", lambda federation: "other")
        self.fails(run, EngineError, line)

    def test_an_example_that_has_changed(self, tmp_path, each_round):
        rng = np.random.default_rng(0)
        arrays = {"x_train": rng.random((900, 4)), "x_test": rng.random((300, 4))}
        arrays |= {"y_train": np.arange(900) % 3, "y_test": np.arange(300) % 3}
        np.savez(tmp_path / "own.npz", **arrays)
        own = of("fedavg", data={"source": f"npz:{tmp_path}/own.npz"})
        stopped(own, tmp_path / "run", after=3)
        arrays["x_test"][250] += 0.5
        np.savez(tmp_path / "own.npz", **arrays)
        line = "clients' data aren't those with which the run in .* began: has data.source"
        self.fails(tmp_path / "run", EngineError, line, own)

    def test_another_model_of_the_same_name(self, run, monkeypatch):
        monkeypatch.setattr(
            "fedsim.simulation.initial_arrays",
            lambda task: {"head.weight": np.zeros((10, 3), np.float32)},
        )
        line = r"model has head.weight \[10, 64\], this experiment's head.weight \[10, 3\]"
        self.fails(run, ConfigError, line)

    @pytest.mark.parametrize("wanted", [[0, 1, 3], [0, 1, 1, 3], [0]])
    def test_missing_rounds(self, run, wanted):
        lines = (run / "rounds.csv").read_text().splitlines(keepends=True)
        (run / "rounds.csv").write_text("".join(lines[i] for i in wanted))
        line = rf"rounds.csv has {len(wanted) - 1} rows, not one for each of the 3 rounds that"
        self.fails(run, EngineError, line)

    @pytest.mark.parametrize("lost", ["row", "all", "file"])
    @pytest.mark.parametrize("name", ["clients.csv", "training.csv", "metrics.csv"])
    def test_missing_rows(self, run, name, lost):
        file = run / name
        lines = file.read_text().splitlines(keepends=True)
        if lost == "file":
            file.unlink()
        else:
            file.write_text("".join(lines[:-1]) if lost == "row" else "")
        left, written = len(lines) - 2 if lost == "row" else 0, len(lines) - 1
        before = {file: file.read_bytes() for file in run.rglob("*.csv")}
        line = rf"{name} has {left} rows of the first 3 rounds, of which the run wrote {written}"
        self.fails(run, EngineError, line)
        assert {file: file.read_bytes() for file in run.rglob("*.csv")} == before

    def test_missing_rows_of_a_run_whose_checkpoint_counts_none(self, run):
        found = Checkpoint.read(run / CHECKPOINT)
        del found.record["rows"]
        (run / CHECKPOINT).write_bytes(found.to_bytes())
        (run / "clients.csv").unlink()
        line = r"clients.csv has no row of round 2, in which clients were tested"
        self.fails(run, EngineError, line)

    @pytest.mark.parametrize(
        ("name", "old", "new", "line"),
        [
            ("clients.csv", b",generic,", b",\xff,", r"clients.csv: can't be read: 'utf-8' codec"),
            ("rounds.csv", b"\n2,", b"\n2,0.5,high", r"rounds.csv: (column .* no number|can't be)"),
            ("clients.csv", b"num_test", b"tests", r"clients.csv: column 'num_test' is missing"),
            ("rounds.csv", b"\n2,", b"\n2\n2,", r"rounds.csv: line 3 has 1 fields, the header has"),
        ],
    )
    def test_what_is_no_number_is_found_before_the_rest_is_trained(
        self, run, monkeypatch, name, old, new, line
    ):
        text = (run / name).read_bytes()
        assert old in text
        (run / name).write_bytes(text.replace(old, new, 1))
        monkeypatch.setattr("fedsim.engine.loop.run_rounds", lambda *_, **__: 1 / 0)
        self.fails(run, DataError, line)
        assert (run / name).read_bytes() == text.replace(old, new, 1)

    def test_a_page_that_is_a_folder(self, run):
        (run / "report.html").mkdir()
        self.fails(run, EngineError, r"can't write .*report.html: Is a directory")

    def test_rows_of_something_else(self, run):
        (run / "clients.csv").write_text("name\nme\n")
        self.fails(run, EngineError, r"clients.csv: a row doesn't begin with the number of a round")

    def test_missing_states(self, tmp_path, each_round):
        out = tmp_path / "run"
        stopped(of("fedloge"), out, after=3)
        (out / "state" / "states.bin").unlink()
        self.fails(out, EngineError, r"can't read the state of client \d from", of("fedloge"))

    def test_damaged_states(self, tmp_path, each_round):
        out = tmp_path / "run"
        stopped(of("fedloge"), out, after=3)
        file = out / "state" / "states.bin"
        damaged = bytes(byte ^ 1 for byte in file.read_bytes())
        file.write_bytes(damaged)
        line = rf"can't read the state of client \d from {file}: .* \(its checksum differs\)"
        self.fails(out, EngineError, line, of("fedloge"))

    def test_a_full_disk_leaves_the_checkpoint_before(self, run, monkeypatch):
        write_bytes = Path.write_bytes

        def full(self, content):
            if "checkpoint" in str(self):
                write_bytes(self, content[:50])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(self, content)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            line = r"can't write .*latest.safetensors: No space left on device; what was written"
            self.fails(run, EngineError, line)
        assert Checkpoint.read(run / CHECKPOINT).round == 3
        assert not list(run.rglob("*.part"))
        assert len(fedsim.simulate(of("fedavg"), out=run, resume=True).rounds) == 5

    def test_a_model_that_is_no_checkpoint(self, run):
        save_file({"w": np.zeros(2)}, run / CHECKPOINT)
        self.fails(run, EngineError, r"its format isn't 1")

"""Runs in processes of their own: side by side, with the same results, none harms another."""

import os
from contextlib import closing

import pytest

from fedsim.config import Experiment
from fedsim.jobs import run_all


def experiment(seed=0, **tables):
    tables = {"clients": {"count": 4}, "model": {"name": "linear"}, **tables}
    tables["training"] = {"rounds": 2, **tables.get("training", {})}
    return Experiment(seed=seed, engine={"backend": "inline"}, **tables)


def ended(events):
    return {event.run: event.what for event in events if event.kind == "ended"}


def test_runs_at_a_time_give_what_one_after_the_other_gives(tmp_path):
    experiments = [experiment(seed) for seed in range(3)]
    folders = {jobs: [tmp_path / f"{jobs} at a time" / str(i) for i in range(3)] for jobs in (1, 2)}
    alone = [*run_all(experiments, folders[1], 1)]
    assert [(event.run, event.kind) for event in alone] == [
        (i, kind) for i in range(3) for kind in ("begun", "round", "round", "ended")
    ]
    assert alone[2].what["round"] == 2
    together = [*run_all(experiments, folders[2], 2)]
    assert ended(alone) == ended(together) == dict.fromkeys(range(3))
    # The second run begins before the first has ended.
    order = [(event.run, event.kind) for event in together]
    assert order.index((1, "begun")) < order.index((0, "ended"))
    for one, other in zip(*folders.values(), strict=True):
        assert (one / "clients.csv").read_bytes() == (other / "clients.csv").read_bytes()


def test_what_has_finished_is_not_run_again(tmp_path):
    [*run_all([experiment()], [tmp_path / "a"], 1)]
    longer = experiment(training={"rounds": 3})
    events = [*run_all([experiment(), longer], [tmp_path / "a", tmp_path / "a"], 1)]
    kinds = [(event.run, event.kind) for event in events]
    assert kinds == [(0, "ended"), (1, "begun"), (1, "round"), (1, "ended")]


def test_a_report_from_before_the_end_is_no_end(tmp_path):
    """Made by `fedsim report` while the run went on, which was killed before its own."""
    folder = tmp_path / "a"
    [*run_all([experiment()], [folder], 1)]
    page, description = folder / "report.html", folder / "run.json"
    end, text = description.stat().st_mtime_ns, description.read_text()
    page.write_text("of the first round")
    os.utime(page, ns=(end - 1, end - 1))
    [*run_all([experiment()], [folder], 1)]
    assert "of the first round" not in page.read_text()
    description.write_text(text.replace('"finished": "', '"finished": null, "was": "', 1))
    page.write_text("of the first round")
    [*run_all([experiment()], [folder], 1)]
    assert "of the first round" not in page.read_text()


def test_what_runs_warn_of_is_passed_on(tmp_path):
    tables = {"model": {"name": "resnet8"}, "method": {"name": "fedadam"}}
    events = run_all([experiment(**tables)], [tmp_path / "a"], 1)
    (warning,) = [event.what for event in events if event.kind == "warning"]
    assert warning.startswith("method.name = 'fedadam' takes steps on BatchNorm's running")


ENDS = """
import os, signal
from strategies import FedAvg
class {name}(FedAvg):
    def configure_train(self, *arguments):
        {code}
"""


class TestFailure:
    @pytest.mark.parametrize(
        ("name", "code", "line"),
        [
            (
                "Raises",
                "raise RuntimeError('boom')",
                "round 1: Raises.configure_train: RuntimeError: b",
            ),
            ("Exits", "raise SystemExit(3)", "round 1: Exits.configure_train: SystemExit: 3"),
            ("Leaves", "os._exit(7)", "its process ended with exit code 7"),
            ("Killed", "os.kill(os.getpid(), 9)", "its process was ended by SIGKILL (perhaps the"),
            ("Signalled", "os.kill(os.getpid(), 40)", "its process was ended by signal 40"),
        ],
    )
    def test_a_run_that_ends_badly_leaves_the_others_alone(
        self, tmp_path, monkeypatch, name, code, line
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        module = f"ends_{name.lower()}"
        (tmp_path / f"{module}.py").write_text(ENDS.format(name=name, code=code))
        bad = experiment(method={"name": f"{module}:{name}"})
        events = ended(run_all([bad, experiment()], [tmp_path / "bad", tmp_path / "good"], 1))
        assert events[0].startswith(line)
        assert events[1] is None
        assert (tmp_path / "good" / "report.html").exists()

    def test_a_folder_with_something_else(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine.txt").write_text("not a run")
        (event,) = run_all([experiment()], [tmp_path / "a"], 1)
        assert event.what.startswith(f"{tmp_path}/a holds no run that could go on")

    def test_runs_stop_when_nobody_listens_any_more(self, tmp_path):
        endless = [experiment(seed, training={"rounds": 100_000}) for seed in range(2)]
        folders = [tmp_path / "0", tmp_path / "1"]
        with closing(run_all(endless, folders, 2)) as events:
            running: set[int] = set()
            for event in events:
                running |= {event.run} if event.kind == "round" else set()
                if len(running) == 2:
                    break
        for folder in folders:
            assert (folder / "model.safetensors").exists()
            assert '"finished": null' not in (folder / "run.json").read_text()

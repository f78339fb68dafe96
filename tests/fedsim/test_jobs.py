"""Runs in processes of their own: side by side, with the same results, none harms another."""

import os
import shutil

import pytest

from fedsim.config import Experiment
from fedsim.jobs import run_all
from fedsim.simulation import simulate

pytestmark = pytest.mark.usefixtures("ready")


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
    """A report made by `fedsim report` while a run went on, which was then killed, is no end."""
    folder, before, killed = (tmp_path / name for name in ("a", "before", "killed"))
    simulate(experiment(), out=folder)
    for other in (before, killed):
        shutil.copytree(folder, other)
        (other / "report.html").write_text("of the first round")
    end = (before / "run.json").stat().st_mtime_ns
    os.utime(before / "report.html", ns=(end - 1, end - 1))
    text = (killed / "run.json").read_text()
    (killed / "run.json").write_text(text.replace('"finished": "', '"finished": null, "was": "', 1))
    os.utime(killed / "report.html")
    longer = experiment(training={"rounds": 3})
    work = [experiment(), longer, experiment(), experiment()]
    events = [*run_all(work, [folder, folder, before, killed], 1)]
    assert [(event.run, event.kind) for event in events] == [
        (0, "ended"),
        *((1, kind) for kind in ("begun", "round", "ended")),
        *((i, kind) for i in (2, 3) for kind in ("begun", "ended")),
    ]
    for other in (before, killed):
        assert "of the first round" not in (other / "report.html").read_text()


def test_what_runs_warn_of_is_passed_on(tmp_path):
    model = {"name": "cnn", "channels": [2], "norm": "batch"}
    tables = {"model": model, "method": {"name": "fedadam"}}
    events = run_all([experiment(**tables)], [tmp_path / "a"], 1)
    (warning,) = [event.what for event in events if event.kind == "warning"]
    assert warning.startswith("method.name = 'fedadam' takes steps on BatchNorm's running")


ENDS = """
class {name}(FedAvg):
    def configure_train(self, *arguments):
        {code}
"""


def test_a_run_that_ends_badly_leaves_the_others_alone(tmp_path, monkeypatch):
    ends = {
        "Raises": (
            "raise RuntimeError('boom')",
            "round 1: Raises.configure_train: RuntimeError: b",
        ),
        "Exits": ("raise SystemExit(3)", "round 1: Exits.configure_train: SystemExit: 3"),
        "Leaves": ("os._exit(7)", "its process ended with exit code 7"),
        "Killed": ("os.kill(os.getpid(), 9)", "its process was ended by SIGKILL (perhaps the"),
        "Signalled": ("os.kill(os.getpid(), 40)", "its process was ended by signal 40"),
    }
    monkeypatch.syspath_prepend(tmp_path)
    code = "".join(ENDS.format(name=name, code=code) for name, (code, _) in ends.items())
    (tmp_path / "ends_badly.py").write_text("import os\nfrom strategies import FedAvg\n" + code)
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "mine.txt").write_text("not a run")
    bad = [experiment(method={"name": f"ends_badly:{name}"}) for name in ends]
    names = [*ends, "no run", "good"]
    found = ended(
        run_all([*bad, experiment(), experiment()], [tmp_path / name for name in names], 1)
    )
    for i, (_, line) in enumerate(ends.values()):
        assert found[i].startswith(line)
    assert found[5].startswith(f"{tmp_path}/no run holds no run that could go on")
    assert found[6] is None
    assert (tmp_path / "good" / "report.html").exists()

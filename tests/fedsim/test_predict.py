"""What a run's folder predicts is what the run measured."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import fedsim
from fedsim import prediction
from fedsim.engine.state import ClientStates
from fedsim.errors import ConfigError, DataError, EngineError
from fedsim.metrics import accuracy_column
from fedsim.run import recorder
from fedsim.simulation import load_federation

NORM = {"name": "cnn", "channels": [4], "norm": "batch"}
METHODS = {
    "fedavg": ({}, NORM),
    "fedloge": ({"sparsity": 0.2}, {"name": "mlp"}),
    "fedper": ({}, {"name": "mlp"}),
    "ditto": ({}, {"name": "mlp"}),
    "fedbn": ({}, NORM),
    "fedrod": ({}, {"name": "mlp"}),
    "creff": ({"crt_epochs": 2, "match_epochs": 2}, {"name": "mlp"}),
    "fedbabu": ({}, {"name": "mlp"}),
}


def experiment(method="fedavg", rounds=3, **changes):
    settings, model = METHODS[method]
    tables = {
        "clients": {
            "count": 4,
            "partition": "dirichlet",
            "alpha": 0.5,
            # FedLoGe rules out the classes of which a client has none, if it knows all its labels.
            "labelled": 1.0 if method == "fedloge" else 0.5,
        },
        "method": {"name": method, **settings},
        "model": model,
        # In a run's half of the clients the others have no state, and the rate is the round's.
        "training": {"rounds": rounds, "participation": 0.5, "lr_decay": 0.8},
        "engine": {"backend": "inline"},
    }
    return fedsim.Experiment(**tables | changes)


class StopRunError(Exception):
    """Ends a run."""


def stopped(experiment, out, after):
    """Run an experiment until a round is finished."""

    def stop(row):
        if row["round"] == after:
            raise StopRunError

    with pytest.raises(StopRunError):
        fedsim.simulate(experiment, out=out, observer=stop)


def describe(run, **changes):
    """Change what a run's run.json says."""
    file = run / "run.json"
    said = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(said))


def assert_same_predictions(one, other, x, clients=range(4)):
    for client in (None, *clients):
        found = [fedsim.predict(run, x, client=client) for run in (one, other)]
        np.testing.assert_array_equal(*found)


@pytest.fixture(scope="module", autouse=True)
def no_reports():
    """Draw no figures, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.report.report.write_report", lambda run: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that returns a method's run."""
    found = {}

    def of(method):
        if method not in found:
            out = tmp_path_factory.mktemp(method) / "run"
            found[method] = fedsim.simulate(experiment(method), out=out)
        return found[method]

    return of


@pytest.fixture(scope="module")
def federation():
    return load_federation(experiment())


@pytest.fixture
def x(federation):
    return federation.source.x_test[:30]


class TestTheFiguresOfTheRun:
    @pytest.mark.parametrize("method", METHODS)
    def test_each_clients(self, run, federation, method):
        rows = run(method).clients.query("round == 3")
        assert len(rows) >= 4
        for row in rows.itertuples():
            index = federation.test(row.client)
            x, y = federation.source.x_test[index], federation.source.y_test[index]
            found = fedsim.predict(run(method).path, x, client=row.client, view=row.view)
            assert (found.argmax(axis=1) == y).mean() == pytest.approx(row.accuracy)
            loss = -np.log(found[np.arange(len(y)), y].astype(float)).mean()
            assert loss == pytest.approx(row.loss, rel=1e-3)

    @pytest.mark.parametrize("method", sorted(METHODS.keys() - {"fedper", "fedbn"}))
    def test_on_the_global_test_set(self, run, federation, method):
        last = run(method).rounds.iloc[-1]
        source = federation.source
        views = ["generic", "generic-realigned"] if method == "fedloge" else ["generic"]
        for view in views:
            found = fedsim.predict(str(run(method).path), source.x_test, view=view)
            assert (found.argmax(axis=1) == source.y_test).mean() == last[accuracy_column(view)]
        assert (found.shape, found.dtype) == ((len(source.y_test), 10), np.float32)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)

    def test_of_vectors_whose_source_is_gone(self, tmp_path):
        rng = np.random.default_rng(0)
        y = np.arange(90) % 3
        x = (1000 + 50 * y[:, None] + rng.normal(0, 20, (90, 5)) * [1, 10, 1, 1, 0]).astype("f4")
        arrays = {"x_train": x[:60], "y_train": y[:60], "x_test": x[60:], "y_test": y[60:]}
        np.savez(tmp_path / "data.npz", **arrays)
        data = {"source": f"npz:{tmp_path / 'data.npz'}"}
        training = {"rounds": 5, "lr": 0.5}
        tables = {"data": data, "model": {"name": "linear"}, "training": training}
        result = fedsim.simulate(experiment(**tables, clients={"count": 4}), out=tmp_path / "run")
        (tmp_path / "data.npz").unlink()
        found = fedsim.predict(tmp_path / "run", x[60:].astype(float))
        accuracy = (found.argmax(axis=1) == y[60:]).mean()
        assert accuracy == result.rounds["generic_accuracy"].iloc[-1] > 0.5


class TestView:
    def test_without_a_view_a_client_has_its_own(self, run, x):
        path = run("fedloge").path
        mine = fedsim.predict(path, x, client=np.int64(2))
        np.testing.assert_array_equal(mine, fedsim.predict(path, x, client=2, view="personal"))
        assert (mine != fedsim.predict(path, x)).any()
        assert (mine != fedsim.predict(path, x, client=3)).any()

    def test_or_what_all_have(self, run, x):
        path = run("fedavg").path
        same = fedsim.predict(path, x, client=2), fedsim.predict(path, x, view="generic")
        np.testing.assert_array_equal(*same)

    @pytest.mark.parametrize("view", [None, "personal"])
    def test_a_personal_one_is_somebodys(self, run, x, view):
        with pytest.raises(ConfigError, match=r"view = 'personal': give the client .* 0\.\.3$"):
            fedsim.predict(run("fedper").path, x, view=view)

    def test_one_that_the_method_does_not_have(self, run, x):
        with pytest.raises(ConfigError, match=r"view = 'personal': fedavg has generic$"):
            fedsim.predict(run("fedavg").path, x, client=1, view="personal")

    @pytest.mark.parametrize("client", [-1, 4, 1.5, True, "1"])
    def test_no_such_client(self, run, x, client):
        with pytest.raises(DataError, match=rf"client = {client!r}: must be 0\.\.3"):
            fedsim.predict(run("fedavg").path, x, client=client)


class TestExamples:
    def test_in_batches_as_alone(self, run, x, monkeypatch):
        whole = fedsim.predict(run("fedavg").path, x)
        monkeypatch.setattr(prediction, "PREDICT_BLOCK", 7)
        np.testing.assert_allclose(fedsim.predict(run("fedavg").path, x), whole, atol=1e-6)
        assert fedsim.predict(run("fedavg").path, x[:0]).shape == (0, 10)

    def test_and_leave_all_as_it_was(self, run, x):
        before, given = torch.get_rng_state(), x.copy()
        fedsim.predict(run("fedbabu").path, x, client=0)
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(x, given)

    def test_of_unequal_lengths(self, run):
        with pytest.raises(DataError, match="x is no array of examples"):
            fedsim.predict(run("fedavg").path, [[1], [1, 2]])

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x / 16,
            lambda x: x.astype(np.int64),
            lambda x: x[:, 0],
            lambda x: x[0],
            lambda x: x.reshape(len(x), -1),
            lambda x: 5,
        ],
    )
    def test_of_another_form(self, run, x, change):
        with pytest.raises(DataError, match=r"^x is .*; must be uint8 \[n, 1, 8, 8\]"):
            fedsim.predict(run("fedavg").path, change(x))

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
    def test_of_values_that_are_not_finite(self, run, tmp_path, value):
        shutil.copytree(run("fedavg").path, tmp_path / "run")
        inputs = {"dtype": "float32", "shape": [1, 8, 8], "mean": [4.0], "std": [6.0]}
        describe(tmp_path / "run", inputs=inputs)
        x = np.zeros((300, 1, 8, 8))
        x[270, 0, 3, 3] = value
        with pytest.raises(DataError, match=r"^x\[270\] has a value that is NaN or infinite"):
            fedsim.predict(tmp_path / "run", x)


class TestRun:
    def test_one_that_was_stopped(self, tmp_path, x):
        stopped(experiment("fedloge", rounds=3), tmp_path / "stopped", after=2)
        fedsim.simulate(experiment("fedloge", rounds=2), out=tmp_path / "whole")
        assert_same_predictions(tmp_path / "stopped", tmp_path / "whole", x)

    def test_one_that_was_killed(self, tmp_path, x, monkeypatch):
        """Its checkpoint counts, though its clients have trained on."""
        monkeypatch.setattr(recorder, "CHECKPOINT_SPACING", 0)
        fedsim.simulate(experiment("fedloge", rounds=2), out=tmp_path / "run")
        shutil.copytree(tmp_path / "run", tmp_path / "whole")
        monkeypatch.setattr(recorder, "CHECKPOINT_SPACING", 1e9)
        monkeypatch.setattr(recorder.Recorder, "close", lambda self, arrays: None)

        def stop(row):
            if row["round"] == 4:
                raise StopRunError

        longer = experiment("fedloge", rounds=5)
        # The first checkpoint of a process is due at once, the next ones never.
        with pytest.raises(StopRunError):
            fedsim.simulate(longer, out=tmp_path / "run", resume=True, observer=stop)
        fedsim.simulate(experiment("fedloge", rounds=3), out=tmp_path / "three")
        now = ClientStates.open(tmp_path / "run" / "state").versions.tolist()
        assert now != ClientStates.open(tmp_path / "three" / "state").versions.tolist()
        assert_same_predictions(tmp_path / "run", tmp_path / "three", x)

    def test_one_that_was_killed_before_its_first_checkpoint(self, tmp_path, x, monkeypatch):
        monkeypatch.setattr(recorder, "CHECKPOINT_SPACING", 1e9)
        stopped(experiment(), tmp_path / "run", after=2)
        describe(tmp_path / "run", finished=None)
        with pytest.raises(DataError, match="no model yet but the first, which is untrained"):
            fedsim.predict(tmp_path / "run", x)

    def test_one_without_a_model(self, run, tmp_path, x):
        shutil.copytree(run("fedavg").path, tmp_path / "run")
        (tmp_path / "run" / "model.safetensors").unlink()
        with pytest.raises(DataError, match=r"run: holds no model\.safetensors$"):
            fedsim.predict(tmp_path / "run", x)

    def test_none(self, tmp_path, x):
        with pytest.raises(DataError, match="nowhere: there is no such folder"):
            fedsim.predict(tmp_path / "nowhere", x)
        with pytest.raises(DataError, match=r"isn't the folder of a run"):
            fedsim.predict(tmp_path, x)

    def test_an_older_one_says_how_to_mend_it(self, run, tmp_path, x):
        out = tmp_path / "run"
        shutil.copytree(run("fedavg").path, out)
        said = json.loads((out / "run.json").read_text())
        del said["inputs"]
        (out / "run.json").write_text(json.dumps(said))
        with pytest.raises(DataError, match=r"run\.json: .* --resume` adds that$"):
            fedsim.predict(out, x)
        fedsim.simulate(fedsim.load(out / "experiment.toml"), out=out, resume=True)
        assert_same_predictions(out, run("fedavg").path, x)

    @pytest.mark.parametrize("inputs", [3, {}, {"dtype": "uint8", "shape": [1], "mean": "a"}])
    def test_one_that_is_broken(self, run, tmp_path, x, inputs):
        shutil.copytree(run("fedavg").path, tmp_path / "run")
        describe(tmp_path / "run", inputs=inputs)
        with pytest.raises(DataError, match=r"run\.json: inputs are broken"):
            fedsim.predict(tmp_path / "run", x)

    def test_one_whose_model_is_another_now(self, run, tmp_path, x):
        shutil.copytree(run("fedavg").path, tmp_path / "run")
        file = tmp_path / "run" / "experiment.toml"
        file.write_text(file.read_text().replace('norm = "batch"', 'norm = "group"'))
        file.write_text(file.read_text().replace("channels = [\n    4,\n]", "channels = [2, 2]"))
        with pytest.raises(ConfigError, match=r"run: view 'generic': \w+: "):
            fedsim.predict(tmp_path / "run", x)

    def test_one_whose_clients_states_are_damaged(self, run, tmp_path, x):
        shutil.copytree(run("fedloge").path, tmp_path / "run")
        file = tmp_path / "run" / "state" / "states.bin"
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
        with pytest.raises(EngineError, match=rf"client 1 from {file}: .* checksum differs"):
            fedsim.predict(tmp_path / "run", x, client=1)

    @pytest.mark.parametrize("lost", ["state", "state/versions.npy"])
    def test_one_whose_clients_states_are_lost(self, run, tmp_path, x, lost):
        shutil.copytree(run("fedloge").path, tmp_path / "run")
        lost = tmp_path / "run" / lost
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
        line = r"state/versions\.npy: is missing, though 4 clients kept something"
        with pytest.raises(DataError, match=line):
            fedsim.predict(tmp_path / "run", x, client=1)
        fedsim.predict(tmp_path / "run", x)
        # Of a copy without a checkpoint nobody knows whether there was any.
        shutil.rmtree(tmp_path / "run" / "checkpoint")
        fedsim.predict(tmp_path / "run", x, client=1)

    def test_a_client_that_trains_anew_has_its_own_examples(self, run, tmp_path, x):
        shutil.copytree(run("fedbabu").path, tmp_path / "run")
        file = tmp_path / "run" / "experiment.toml"
        file.write_text(file.read_text().replace("seed = 0", "seed = 1"))
        with pytest.raises(DataError, match="client 1 no longer has the examples"):
            fedsim.predict(tmp_path / "run", x, client=1)


def test_it_needs_no_ray(run):
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import fedsim, numpy\n"
        f"fedsim.predict({str(run('fedper').path)!r}, numpy.zeros((2, 1, 8, 8), 'u1'), client=1)\n"
        # Twice: the name stays that of the function.
        f"print(fedsim.predict({str(run('fedavg').path)!r}, numpy.zeros((2, 1, 8, 8), 'u1')).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "(2, 10)\n"


def test_public_names_are_listed():
    assert set(fedsim.__all__) <= set(dir(fedsim))
    assert "__name__" in dir(fedsim)
    for name in fedsim.__all__:
        assert callable(getattr(fedsim, name))


@pytest.mark.parametrize("client", [-1, 4])
def test_nobody_has_kept_anything(run, client):
    states = ClientStates.open(run("fedloge").path / "state")
    with pytest.raises(EngineError, match=rf"client {client}: clients are 0\.\.3"):
        states.read(client)

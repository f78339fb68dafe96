"""Whole runs, in this process."""

import copy
import hashlib
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata

import numpy as np
import pandas as pd
import pytest
from flwr.app import MetricRecord
from safetensors.numpy import load_file

import fedsim
from fedsim import simulation
from fedsim.engine.update import LocalSGD
from fedsim.errors import ConfigError, DataError, EngineError
from fedsim.experiment_file import load
from fedsim.interrupts import Terminated
from fedsim.method import make_strategy
from fedsim.run.directory import RunDirectory
from fedsim.simulation import initial_arrays, load_federation, make_task
from strategies import FedAvg

SMALL = {
    "name": "small",
    "clients": {"count": 6, "partition": "dirichlet", "alpha": 0.5, "labelled": 0.5},
    "model": {"name": "linear"},
    "training": {"rounds": 4, "participation": 0.5},
    "evaluation": {"every": 2},
    "engine": {"backend": "inline"},
}


def experiment(**changes):
    tables = copy.deepcopy(SMALL)
    for key, value in changes.items():
        if isinstance(value, dict):
            tables.setdefault(key, {}).update(value)
        else:
            tables[key] = value
    return fedsim.Experiment(**tables)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return fedsim.simulate(experiment(), out=out)


def test_the_folder_holds_what_the_result_says(run):
    pd.testing.assert_frame_equal(pd.read_csv(run.path / "rounds.csv"), run.rounds)
    pd.testing.assert_frame_equal(pd.read_csv(run.path / "clients.csv"), run.clients)
    pd.testing.assert_frame_equal(pd.read_csv(run.path / "partition.csv"), run.partition)
    pd.testing.assert_frame_equal(pd.read_csv(run.path / "training.csv"), run.training)
    arrays = load_file(run.path / "model.safetensors")
    assert set(arrays) == set(run.arrays)
    assert all(np.array_equal(arrays[name], run.arrays[name]) for name in arrays)
    figures = {file.name for file in (run.path / "figures").iterdir()}
    assert figures == {
        "accuracy_over_rounds.png",
        "client_accuracy.png",
        "class_norms.png",
        "class_counts.png",
        "group_accuracy.png",
    }
    assert not list(run.path.rglob("*.part"))


def test_columns_and_rows(run):
    assert run.rounds.columns.tolist() == [
        "round",
        "generic_accuracy",
        "personal_accuracy",
        "head_accuracy",
        "medium_accuracy",
        "tail_accuracy",
        "train_loss",
        "clients",
        "failures",
        "bytes_up",
        "bytes_down",
        "seconds",
    ]
    assert run.clients.columns.tolist() == [
        "round",
        "client",
        "view",
        "num_train",
        "num_labelled",
        "num_test",
        "accuracy",
        "loss",
        "head_accuracy",
        "medium_accuracy",
        "tail_accuracy",
        "f1_macro",
    ]
    assert run.rounds["round"].tolist() == [1, 2, 3, 4]
    assert run.rounds["clients"].tolist() == [3, 3, 3, 3]
    assert run.clients["round"].tolist() == [2] * 6 + [4] * 6
    assert run.clients["client"].tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert set(run.clients["view"]) == {"generic"}


def test_client_rows_agree_with_the_partition(run):
    held = run.partition.groupby("client")[["labelled", "unlabelled", "test"]].sum()
    last = run.clients[run.clients["round"] == 4].set_index("client")
    assert (last["num_train"] == held["labelled"] + held["unlabelled"]).all()
    assert (last["num_labelled"] == held["labelled"]).all()
    assert (last["num_test"] == held["test"]).all()


def test_a_model_of_known_size_sends_known_bytes(run):
    assert set(run.rounds["bytes_down"]) == {3 * (64 * 10 + 10) * 4}
    assert set(run.rounds["bytes_up"]) == {3 * (64 * 10 + 10) * 4}


def test_the_written_experiment_gives_the_same_run(run):
    again = fedsim.simulate(load(run.path / "experiment.toml"))
    drop = {"columns": "seconds"}
    pd.testing.assert_frame_equal(again.rounds.drop(**drop), run.rounds.drop(**drop))
    pd.testing.assert_frame_equal(again.clients, run.clients)


def test_another_seed_gives_another_run(run):
    other = fedsim.simulate(experiment(seed=1))
    assert not other.partition.equals(run.partition)
    assert not np.array_equal(other.arrays["head.weight"], run.arrays["head.weight"])


def test_training_rows_are_the_clients_of_each_round(run):
    assert run.training.columns.tolist() == ["round", "client", "num_examples", "train_loss"]
    assert run.training.groupby("round").size().tolist() == [3, 3, 3, 3]
    for round, rows in run.training.groupby("round"):
        mean = np.average(rows["train_loss"], weights=rows["num_examples"])
        assert run.rounds.set_index("round").loc[round, "train_loss"] == pytest.approx(mean)


class Now(LocalSGD):
    """Reports a number of its own in some rounds only, before the others or after them."""

    def update(self, w, client):
        upload = yield from super().update(w, client)
        own = {"own": float(client.round)} if client.round > 1 else {}
        metrics = {**own, **upload.metrics} if client.round % 2 else {**upload.metrics, **own}
        return replace(upload, metrics=metrics if client.round != 4 else upload.metrics)


def test_columns_that_come_and_go_dont_write_the_training_table_anew(tmp_path, monkeypatch):
    written = []

    def write_table(self, name, table, real=RunDirectory.write_table):
        written.append(name)
        real(self, name, table)

    monkeypatch.setattr(RunDirectory, "write_table", write_table)
    method = {"client": f"{__name__}:Now"}
    result = fedsim.simulate(
        experiment(method=method, training={"rounds": 6}), out=tmp_path / "run"
    )
    table = pd.read_csv(tmp_path / "run" / "training.csv")
    pd.testing.assert_frame_equal(table, result.training)
    own = table.groupby("round")["own"].mean()
    assert own.dropna().to_dict() == {2: 2.0, 3: 3.0, 5: 5.0, 6: 6.0}
    assert written.count("training.csv") == 2  # the first time, and where there is a new column


class Says(FedAvg):
    """Has numbers of its own."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return arrays, MetricRecord({**metrics, "norm": server_round, "angles": [0.5, 1.5]})

    def aggregate_evaluate(self, server_round, replies):
        return MetricRecord({"fairness": 0.25 * server_round})


def test_runs_in_several_threads_are_those_of_one(run):
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(lambda _: fedsim.simulate(experiment()), range(3))]
    for one in found:
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, run.arrays[name])


def test_what_a_strategy_returns_besides_the_model_is_recorded(tmp_path):
    method = {"name": f"{__name__}:Says"}
    result = fedsim.simulate(experiment(method=method), out=tmp_path / "run")
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    pd.testing.assert_frame_equal(table, result.metrics)
    found = table.groupby(["phase", "metric"])["value"].apply(list).to_dict()
    assert found.pop(("train", "train_loss")) == pytest.approx(result.rounds["train_loss"].tolist())
    assert found == {
        ("train", "norm"): [1.0, 2.0, 3.0, 4.0],
        ("train", "angles[0]"): [0.5] * 4,
        ("train", "angles[1]"): [1.5] * 4,
        ("evaluate", "fairness"): [0.5, 1.0],  # after rounds 2 and 4
    }


def test_fedavgs_are_the_means_of_what_the_clients_report(run):
    tested = run.metrics[run.metrics["phase"] == "evaluate"].set_index(["round", "metric"])["value"]
    for round, rows in run.clients.groupby("round"):
        for name in ("accuracy", "loss"):
            mean = np.average(rows[name], weights=rows["num_test"])
            assert tested[round, name] == pytest.approx(mean)


def test_pseudo_labels_are_recorded_once_there_are_any(tmp_path):
    method = {"name": "fedlabel", "warmup_rounds": 2, "threshold": 0.3}
    result = fedsim.simulate(experiment(method=method), out=tmp_path / "run")
    written = pd.read_csv(tmp_path / "run" / "training.csv")
    pd.testing.assert_frame_equal(written, result.training)
    assert (written["pseudo_seen"].notna() == (written["round"] > 2)).all()
    late = written[written["round"] > 2]
    assert (late["pseudo_kept"] <= late["pseudo_seen"]).all()
    assert (late["pseudo_correct"] <= late["pseudo_kept"]).all()
    groups = sum(late[f"pseudo_kept_{group}"] for group in ("head", "medium", "tail"))
    assert (groups == late["pseudo_kept"]).all()
    assert (tmp_path / "run" / "figures" / "pseudo_labels.png").exists()
    # Two models travel up, one comes down.
    assert (result.rounds["bytes_up"] == 2 * result.rounds["bytes_down"]).all()


@pytest.mark.filterwarnings("ignore:method.warmup_rounds")
@pytest.mark.parametrize("options", [{"threshold": 1.0}, {"warmup_rounds": 99}])
def test_fedlabel_without_pseudo_labels_is_half_a_step_of_the_labelled_mean(options, tmp_path):
    """w <- 1/2 mean(w_l) + 1/2 w: equal clients make the labelled mean that of FedAvg."""
    equal = {"partition": "iid", "count": 3, "labelled": 0.5}
    tables = {**SMALL, "clients": equal, "training": {"rounds": 1}}
    fedavg = fedsim.simulate(fedsim.Experiment(**tables))
    method = {"name": "fedlabel", "warmup_rounds": 0, **options}
    label = fedsim.simulate(fedsim.Experiment(**tables, method=method))
    start = initial_arrays(make_task(label.experiment, load_federation(label.experiment), tmp_path))
    for name, array in label.arrays.items():
        middle = (start[name] + fedavg.arrays[name]) / 2
        np.testing.assert_allclose(array, middle, rtol=1e-4, atol=1e-6)


def test_run_json_says_what_ran(run):
    facts = json.loads((run.path / "run.json").read_text())
    assert (facts["rounds_finished"], facts["rounds_asked"]) == (4, 4)
    assert {"python", "fedsim-flwr", "flwr", "ray", "torch"} <= set(facts["versions"])
    parts = dict(facts["seconds_per_round"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert {"gather", "train", "reduce", "serialise", "evaluate", "write"} <= set(parts)
    assert facts["bytes_up"] == run.rounds["bytes_up"].sum()


def test_fedprox_with_mu_zero_is_fedavg(run):
    prox = fedsim.simulate(experiment(method={"name": "fedprox", "mu": 0.0}))
    for name, array in run.arrays.items():
        np.testing.assert_array_equal(prox.arrays[name], array)


@pytest.mark.parametrize("name", ["fedadam", "fedavgm", "fedmedian", "krum"])
def test_flowers_strategies_by_name(name):
    result = fedsim.simulate(experiment(method={"name": name}, training={"participation": 4}))
    assert result.rounds["clients"].tolist() == [4] * 4
    assert result.rounds["failures"].sum() == 0
    assert np.isfinite(result.arrays["head.weight"]).all()


def test_a_server_optimiser_on_batch_norm_statistics_is_warned_of():
    model = {"name": "cnn", "channels": [4], "norm": "batch"}
    one_round = {"training": {"rounds": 1}, "method": {"name": "fedadam", "eta": 0.001}}
    tables = {**SMALL, **one_round, "model": model}
    with pytest.warns(UserWarning, match="BatchNorm's running statistics .* 'group' avoids"):
        fedsim.simulate(fedsim.Experiment(**tables))
    # Group normalisation has none, and warnings are errors here.
    fedsim.simulate(fedsim.Experiment(**tables | {"model": model | {"norm": "group"}}))


def test_tf32_on_a_processor_is_warned_of():
    training = {"precision": "tf32", "rounds": 1}
    with pytest.warns(UserWarning, match="'tf32' changes nothing on a CPU"):
        fedsim.simulate(experiment(training=training, engine={"device": "cpu"}))


def test_a_warm_up_that_never_ends_is_warned_of():
    method = {"name": "fedlabel", "warmup_rounds": 2}
    with pytest.warns(UserWarning, match="warmup_rounds = 2, but training.rounds = 2: unlabelled"):
        fedsim.simulate(experiment(method=method, training={"rounds": 2}))
    # With a round after it there is nothing to say, and warnings are errors here.
    fedsim.simulate(experiment(method=method, training={"rounds": 3}))


@pytest.mark.parametrize(("participation", "cohort"), [(0.5, 10), (7, 7), (1.0, 20), (0.29, 5)])
@pytest.mark.parametrize("method", ["fedavg", "fedmedian"])
def test_participation_by_share_and_by_count(method, participation, cohort):
    strategy = make_strategy(
        fedsim.Experiment(
            method={"name": method},
            clients={"count": 20},
            training={"participation": participation},
        )
    )
    expected = max(int(20 * strategy.fraction_train + 1e-9), strategy.min_train_nodes)
    assert expected == cohort


@pytest.mark.parametrize("method", ["fedavg", "fedlabel", "fedloge"])
def test_whole_runs_side_by_side_and_one_by_one_agree(method):
    """The difference of a step's rounding, 1e-7, stays far from what changes a prediction."""
    options = {"fedlabel": {"warmup_rounds": 1, "threshold": 0.5}, "fedloge": {"sparsity": 0.3}}
    runs = [
        fedsim.simulate(
            experiment(
                model={"name": "mlp"},
                method={"name": method, **options.get(method, {})},
                training={"rounds": 5, "local_epochs": 3},
                engine={"cohort": cohort},
            )
        )
        for cohort in ("stacked", "one-by-one")
    ]
    one, other = (run.rounds for run in runs)
    assert one["generic_accuracy"].iloc[-1] > 0.3
    names = [name for name in one if name.endswith("accuracy")]
    np.testing.assert_allclose(one[names], other[names], atol=0.01)
    np.testing.assert_allclose(one["train_loss"], other["train_loss"], rtol=1e-3)
    for name, array in runs[0].arrays.items():
        np.testing.assert_allclose(array, runs[1].arrays[name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "stacked"),
    [
        # Three times 2 x 64 x 10 x 8 operations a step.
        ({}, True),
        # Three times 2 x (64 x 9 x 16 + 16 x 144 x 32 + 128 x 10) x B: 4 million, and 12.6.
        ({"model": {"name": "cnn"}, "training": {"batch_size": 8}}, True),
        ({"model": {"name": "cnn"}, "training": {"batch_size": 25}}, False),
        ({"model": {"name": "cnn"}, "engine": {"cohort": "one-by-one"}}, False),
        ({"model": {"name": "mlp", "hidden": (2000, 2000)}}, False),
        ({"model": {"name": "mlp", "hidden": (2000, 2000)}, "engine": {"cohort": "stacked"}}, True),
    ],
    ids=str,
)
def test_clients_train_side_by_side_where_steps_are_short(tmp_path, changes, stacked):
    given = experiment(**changes)
    assert make_task(given, load_federation(given), tmp_path).stacked is stacked


def test_fewer_clients_can_be_evaluated():
    result = fedsim.simulate(experiment(evaluation={"participation": 2}))
    assert result.clients.groupby("round").size().tolist() == [2, 2]


def test_clients_without_labels_are_carried_along():
    result = fedsim.simulate(experiment(clients={"unlabelled_clients": 0.5}))
    last = result.clients[result.clients["round"] == 4]
    assert (last["num_labelled"] == 0).sum() == 3
    assert last["accuracy"].notna().all()


def test_all_clients_without_labels_keep_the_initial_model():
    with pytest.warns(UserWarning, match="the model stays as it was"):
        result = fedsim.simulate(experiment(clients={"labelled": 0.0}))
    assert result.rounds["train_loss"].isna().all()


def test_one_class_a_client_and_clients_of_one_example():
    one_class = {"count": 10, "partition": "shards", "shards_per_client": 1, "labelled": 1.0}
    tables = {**SMALL, "clients": one_class}
    assert len(fedsim.simulate(fedsim.Experiment(**tables)).rounds) == 4
    tiny = {"count": 1437, "labelled": 1.0}
    tables = {**SMALL, "clients": tiny, "training": {"rounds": 1, "participation": 3}}
    assert fedsim.simulate(fedsim.Experiment(**tables)).clients["num_train"].max() == 1


def test_iid_labelled_digits_reach_95_percent():
    result = fedsim.simulate(
        fedsim.Experiment(
            training={"rounds": 8, "local_epochs": 3, "lr": 0.05, "momentum": 0.9},
            evaluation={"every": 8},
            engine={"backend": "inline"},
        )
    )
    assert result.rounds["generic_accuracy"].iloc[-1] >= 0.95


def test_a_run_that_diverges_ends_as_any_other(tmp_path):
    """Weights so large that their squares are beyond float32 still have lengths."""
    wild = experiment(model={"name": "mlp"}, training={"lr": 1e6, "rounds": 3})
    result = fedsim.simulate(wild, out=tmp_path / "run")
    norms = pd.read_csv(tmp_path / "run" / "class_norms.csv")["norm"]
    assert norms.max() > 1e20
    assert np.isfinite(norms).all()
    assert (result.path / "figures" / "class_norms.png").exists()


def test_an_interrupted_run_keeps_its_finished_rounds(tmp_path):
    def stop_after_two(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.simulate(experiment(), out=tmp_path / "run", observer=stop_after_two)
    assert pd.read_csv(tmp_path / "run" / "rounds.csv")["round"].tolist() == [1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["rounds_finished"] == 2
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == {"head.weight", "head.bias"}


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        fedsim.simulate(
            experiment(),
            out=tmp_path / "run",
            observer=lambda row: signal.raise_signal(signal.SIGTERM),
        )
    assert pd.read_csv(tmp_path / "run" / "rounds.csv")["round"].tolist() == [1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["rounds_finished"] == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_still_ends_the_run(tmp_path):
    class Signals:
        def __del__(self):
            # What is raised in a destructor goes nowhere.
            signal.raise_signal(signal.SIGINT)

    def interrupt_in_round_2(row):
        if row["round"] == 2:
            Signals()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fedsim.simulate(experiment(), out=tmp_path / "run", observer=interrupt_in_round_2)
    assert pd.read_csv(tmp_path / "run" / "rounds.csv")["round"].tolist() == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


class Actors:
    """Stands for Ray's."""

    def __init__(self, *arguments):
        started.append(self)
        self.closed = False

    def close(self):
        self.closed = True


started = []


@pytest.fixture
def own_views(tmp_path, monkeypatch):
    """A module with updates that have views of their own."""
    (tmp_path / "my_views.py").write_text(
        "from fedsim.engine.update import LocalSGD\n"
        "class Cold(LocalSGD):\n"
        "    views = ('generic', 'generic-cold')\n"
        "    def generic(self, net, w, inputs):\n"
        "        logits = net.head(w, inputs.features)\n"
        "        return {'generic': logits, 'generic-cold': -logits}\n"
        "class Tail(LocalSGD):\n"
        "    views = ('generic', 'generic-tail')\n"
        "class Twice(LocalSGD):\n"
        "    views = ('generic', 'generic')\n"
        "class Low(LocalSGD):\n"
        "    views = ('generic_low',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_views"
    sys.modules.pop("my_views", None)


def test_without_personal_models_personal_is_the_first_generic_view(own_views, tmp_path):
    method = {"client": f"{own_views}:Cold"}
    result = fedsim.simulate(experiment(method=method), out=tmp_path / "run")
    last = result.rounds.iloc[-1]
    clients = result.clients.query("round == @last['round'] and view == 'generic'")
    assert last["personal_accuracy"] == pytest.approx(clients["accuracy"].mean())
    assert "generic-cold" in (tmp_path / "run" / "report.html").read_text()
    digest = hashlib.sha256((tmp_path / "my_views.py").read_bytes()).hexdigest()
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["own_parts"] == {"my_views": digest}


def test_a_strategy_that_passes_others_on_gets_participation_and_seed(tmp_path, monkeypatch):
    (tmp_path / "my_others.py").write_text(
        "from strategies import FedAvg\n"
        "class Passes(FedAvg):\n"
        "    def __init__(self, *, beta: float = 0.5, **others):\n"
        "        super().__init__(**others)\n"
        "class Fixes(FedAvg):\n"
        "    def __init__(self, **others):\n"
        "        super().__init__(fraction_train=0.25, min_train_nodes=2, **others)\n"
        "from flwr.serverapp import strategy\n"
        "def private(*, clip: float = 1.0, **others):\n"
        "    inner = strategy.FedAvg(**others)\n"
        "    return strategy.DifferentialPrivacyServerSideFixedClipping(inner, 0.1, clip, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    passes = make_strategy(experiment(seed=7, method={"name": "my_others:Passes", "beta": 0.1}))
    assert (passes.fraction_train, passes.min_train_nodes, passes.seed) == (0.5, 3, 7)
    with pytest.warns(UserWarning, match=r"or sets it itself, so that training\.participation has"):
        fixes = make_strategy(experiment(seed=7, method={"name": "my_others:Fixes"}))
    assert (fixes.fraction_train, fixes.min_train_nodes, fixes.seed) == (0.25, 2, 7)
    # A function's may be Flower's, which takes no seed.
    private = make_strategy(experiment(method={"name": "my_others:private", "clip": 2.0}))
    assert (private.strategy.fraction_train, private.clipping_norm) == (0.5, 2.0)
    sys.modules.pop("my_others", None)


def test_tokens_reach_a_model_of_ones_own_as_they_are(tmp_path, monkeypatch):
    """The class is which of two rare tokens a sequence holds."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 40, (300, 6)), rng.integers(0, 2, 300)
    x[:, 3] = 48 + y
    np.savez(
        tmp_path / "tokens.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:]
    )
    (tmp_path / "my_words.py").write_text(
        "from torch import nn\n"
        "from fedsim.models import Model\n"
        "class Bag(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embedding = nn.Embedding(50, 8)\n"
        "    def forward(self, x):\n"
        "        return self.embedding(x.long()).mean(1)\n"
        "def bag(shape, num_classes):\n"
        "    return Model(Bag(), 8, num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    for cohort in ("stacked", "one-by-one"):
        result = fedsim.simulate(
            experiment(
                data={"source": f"npz:{tmp_path / 'tokens.npz'}", "normalise": False},
                clients={"labelled": 1.0},
                model={"name": "my_words:bag"},
                training={"lr": 2.0, "participation": 1.0, "rounds": 20},
                engine={"cohort": cohort},
            )
        )
        found[cohort] = result.rounds["generic_accuracy"].iloc[-1]
    assert found["stacked"] == found["one-by-one"] > 0.9
    sys.modules.pop("my_words", None)


def test_what_is_not_asked_of_a_strategy_of_ones_own_is_warned_of(tmp_path, monkeypatch):
    (tmp_path / "my_rounds.py").write_text(
        "from strategies import FedAvg\n"
        "class Deaf(FedAvg):\n"
        "    def __init__(self, *, beta: float = 0.5):\n"
        "        super().__init__()\n"
        "def wrapped(**others):\n"
        "    return Deaf(**others)\n"
        "class Starts(FedAvg):\n"
        "    def start(self, *args, **others):\n"
        "        raise AssertionError\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Deaf", "wrapped"):
        deaf = experiment(method={"name": f"my_rounds:{name}"}, evaluation={"participation": 2})
        with (
            pytest.warns(UserWarning, match=r"training\.participation has no effect"),
            pytest.warns(UserWarning, match=r"evaluation\.participation has no effect"),
        ):
            make_strategy(deaf)
    # Where all take part there is nothing to say, and warnings are errors here.
    make_strategy(experiment(method={"name": "my_rounds:Deaf"}, training={"participation": 1.0}))
    with pytest.warns(UserWarning, match=r"method.eta_l = 0.5 has no effect"):
        make_strategy(experiment(method={"name": "fedadam", "eta_l": 0.5}))
    make_strategy(experiment(method={"name": "fedadam"}))
    with pytest.warns(UserWarning, match=r"its own start\(\) isn't called"):
        fedsim.simulate(experiment(method={"name": "my_rounds:Starts"}))
    sys.modules.pop("my_rounds", None)


def test_a_result_says_in_a_line_what_came_out():
    result = fedsim.simulate(
        fedsim.Experiment(
            name="mine",
            clients={"count": 4},
            model={"name": "linear"},
            training={"rounds": 2},
            engine={"backend": "inline"},
        )
    )
    generic, personal = 100 * result.rounds[["generic_accuracy", "personal_accuracy"]].iloc[-1]
    assert repr(result) == (
        f"<Result of mine: 2 of 2 rounds, generic accuracy {generic:.1f} %, "
        f"personal accuracy {personal:.1f} %>"
    )


class TestSimulateFailure:
    @pytest.mark.parametrize("given", [None, {}, "experiment.toml"])
    def test_what_is_no_experiment(self, given):
        with pytest.raises(ConfigError, match=r"must be a fedsim\.Experiment, not "):
            fedsim.simulate(given)

    def test_a_copy_with_a_mistake(self):
        wrong = fedsim.Experiment().model_copy(update={"seed": -1})
        with pytest.raises(ConfigError, match="seed = -1: must be greater than or equal to 0"):
            fedsim.simulate(wrong)

    def test_an_observer_that_is_none(self):
        with pytest.raises(ConfigError, match="observer = 3: must be a function"):
            fedsim.simulate(fedsim.Experiment(), observer=3)

    def test_a_view_that_is_there_twice(self, own_views):
        line = r"method\.client = '.*:Twice': has the view 'generic' twice; once is enough"
        with pytest.raises(ConfigError, match=line):
            fedsim.simulate(experiment(method={"client": f"{own_views}:Twice"}))

    @pytest.mark.parametrize("name", ["Tail", "Low"])
    def test_views_that_tables_could_not_tell_apart(self, own_views, name):
        line = r"calls a view 'generic.(tail|low)'; must be generic, personal, or"
        with pytest.raises(ConfigError, match=line):
            fedsim.simulate(experiment(method={"client": f"{own_views}:{name}"}))

    @pytest.mark.parametrize("seconds", [0.0, 60.0])
    def test_a_mistake_while_ray_starts_ends_it(self, monkeypatch, seconds):
        def load_federation(*arguments):
            time.sleep(0.1)
            raise DataError("nobody has any")

        started.clear()
        monkeypatch.setattr(simulation, "load_federation", load_federation)
        monkeypatch.setattr(simulation, "DEALING_SECONDS", seconds)
        monkeypatch.setattr("fedsim.engine.ray_actors.RayActors", Actors)
        with pytest.raises(DataError, match="nobody has any"):
            fedsim.simulate(experiment(engine={"backend": "ray"}))
        # Known soon enough, it keeps Ray from being started at all.
        assert [actors.closed for actors in started] == ([] if seconds else [True])

    def test_a_gpu_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(ConfigError, match=r"engine.device = 'cuda': PyTorch finds no CUDA"):
            fedsim.simulate(experiment(engine={"device": "cuda"}))

    def test_a_folder_that_is_not_empty(self, tmp_path):
        (tmp_path / "results.txt").write_text("precious")
        with pytest.raises(EngineError, match="isn't an empty folder; choose another"):
            fedsim.simulate(experiment(), out=tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["results.txt"]

    def test_a_full_disk_is_one_line_and_keeps_what_was_written(self, tmp_path, monkeypatch):
        from fedsim.run.directory import RunDirectory, writing

        append = RunDirectory.append

        def full(self, name, rows):
            if name == "rounds.csv" and rows["round"].iloc[0] == 3:
                with writing(self.path / name):
                    raise OSError(28, "No space left on device")
            append(self, name, rows)

        def full_too(self, name, content):
            with writing(self.path / name):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(RunDirectory, "append", full)
        with pytest.raises(EngineError, match=r"can't write .*rounds.csv: No space left on device"):
            fedsim.simulate(experiment(), out=tmp_path / "run")
        # The end of a run can't be written either: what failed first is what is said.
        monkeypatch.setattr(RunDirectory, "write_model", lambda self, _: full_too(self, "m", b""))
        with pytest.raises(EngineError, match=r"can't write .*rounds.csv: No space left on device"):
            fedsim.simulate(experiment(), out=tmp_path / "again")
        assert pd.read_csv(tmp_path / "run" / "rounds.csv")["round"].tolist() == [1, 2]

    def test_more_clients_than_examples(self):
        with pytest.raises(DataError, match=r"clients.count = 10000, but digits has 1437"):
            fedsim.simulate(experiment(clients={"count": 10_000}))

    def test_augmentation_of_vectors(self, tmp_path):
        file = tmp_path / "vectors.npz"
        x, y = np.random.default_rng(0).random((40, 5)), np.arange(40) % 2
        np.savez(file, x_train=x, y_train=y, x_test=x, y_test=y)
        vectors = {"data": {"source": f"npz:{file}"}, "training": {"augmentation": "weak"}}
        with pytest.raises(ConfigError, match="'weak': augmentation needs images"):
            fedsim.simulate(experiment(**vectors))
        vectors = {"data": vectors["data"], "method": {"name": "fixmatch-local"}}
        with pytest.raises(ConfigError, match="'fixmatch-local': augmentation needs images"):
            fedsim.simulate(experiment(**vectors))
        assert len(fedsim.simulate(experiment(data=vectors["data"])).rounds) == 4

    def test_a_strategy_that_would_wait_for_more_clients_than_there_are(self, monkeypatch):
        class Waits(FedAvg):
            def __init__(self, **others):
                super().__init__(**{**others, "min_available_nodes": 10})

        monkeypatch.setattr(sys.modules[__name__], "Waits", Waits, raising=False)
        line = (
            r"waits until 10 clients are connected \(min_available_nodes\), but clients.count = 6"
        )
        with pytest.raises(ConfigError, match=line):
            fedsim.simulate(experiment(method={"name": f"{__name__}:Waits"}))

    def test_a_strategy_and_clients_that_do_not_belong_together(self):
        method = {"name": "fedmedian", "client": "clients:FedLabel", "warmup_rounds": 0}
        with pytest.raises(EngineError, match=r"round 1: FedMedian can't average .*ArrayRecord"):
            fedsim.simulate(experiment(method=method))

    def test_parts_of_ones_own_of_the_wrong_kind(self):
        with pytest.raises(ConfigError, match=r"isn't a flwr.serverapp.strategy.Strategy"):
            fedsim.simulate(experiment(method={"name": "fractions:Fraction"}))
        with pytest.raises(ConfigError, match=r"it is a client update: give it as method\.client"):
            fedsim.simulate(experiment(method={"name": "clients:FedProx"}))
        with pytest.raises(ConfigError, match=r"name = 'json:loads': TypeError: loads\(\) missing"):
            fedsim.simulate(experiment(method={"name": "json:loads"}))
        with pytest.raises(
            ConfigError, match=r"source = 'json:loads': TypeError: loads\(\) missing"
        ):
            fedsim.simulate(experiment(data={"source": "json:loads"}))
        with pytest.raises(DataError, match=r"must return a fedsim.data.source.Source, not str"):
            fedsim.simulate(experiment(data={"source": "getpass:getuser"}))

    @pytest.mark.parametrize(
        ("body", "line"),
        [
            (
                "return Model(nn.Flatten(), 5, num_classes)",
                r"1 inputs into features of shape \[1, 64\], but the model says \[1, 5\]",
            ),
            (
                "m = Model(nn.Flatten(), 64, num_classes)\n"
                "    m.head = nn.Sequential(m.head)\n    return m",
                "the model's head must be a torch.nn.Linear, not Sequential",
            ),
            (
                "return Model(nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), 5, num_classes)",
                "the model has lazy layers",
            ),
            (
                "class Own(Model):\n        def forward(self, x): return 2 * super().forward(x)\n"
                "    return Own(nn.Flatten(), 64, num_classes)",
                "Own.forward isn't called",
            ),
            ("return shape.nothing", r"AttributeError: .*\(my_models.py, line 4, in f\)"),
            ("return 3", "must return a fedsim.models.Model, not int"),
            ("return nn.Flatten()", r"not Flatten; .* as Model\(backbone, D, num_classes\)"),
        ],
    )
    def test_a_model_of_ones_own_that_cannot_be_used(self, tmp_path, monkeypatch, body, line):
        (tmp_path / "my_models.py").write_text(
            f"from torch import nn\nfrom fedsim.models import Model\n"
            f"def f(shape, num_classes):\n    {body}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "my_models", raising=False)
        with pytest.raises(ConfigError, match=rf"^model\.name = 'my_models:f': .*{line}"):
            fedsim.simulate(experiment(model={"name": "my_models:f"}))


def test_a_run_of_this_process_needs_no_ray(tmp_path, monkeypatch):
    def installed(name, of=metadata.version):
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return of(name)

    monkeypatch.setattr("fedsim.run.recorder.version", installed)
    monkeypatch.setitem(sys.modules, "ray", None)
    fedsim.simulate(experiment(engine={"backend": "inline"}), out=tmp_path / "run")
    versions = json.loads((tmp_path / "run" / "run.json").read_text())["versions"]
    assert versions.keys() == {"python", "fedsim-flwr", "flwr", "torch", "numpy"}

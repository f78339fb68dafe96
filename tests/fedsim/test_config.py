"""Experiment files: what is accepted, what is said about mistakes."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

import fedsim
from fedsim import registry
from fedsim.config import Experiment
from fedsim.engine.update import LocalSGD
from fedsim.errors import ConfigError
from fedsim.experiment_file import load
from fedsim.method import make_strategy, make_update
from fedsim.models.small import mlp

FILES = sorted(Path(__file__).parents[2].glob("experiments/*.toml"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "mine.toml"
        file.write_text(text)
        return file

    return write


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_splits.py").write_text(
        "def split(y, group, num_clients, rng, *, limit: int | None = None, far: float = 2.0,"
        " least: int | None = 3): ...\n"
        "def clash(y, group, num_clients, rng, *, count: int = 4): ...\n"
        "def odd(y, group, num_clients, rng, *, order=sorted): ...\n"
        "from typing import ClassVar\n"
        "from fedsim.engine.update import LocalSGD\n"
        "class Bare(LocalSGD):\n"
        "    views: ClassVar = ('generic',)\n"
        "    mu: float = 0.5\n"
        "class Plain(LocalSGD):\n"
        "    views: ClassVar = ('generic',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_splits"
    sys.modules.pop("my_splits", None)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_experiments_are_valid(file):
    assert load(file).name


def test_a_resolved_experiment_reads_back_as_itself(tmp_path):
    experiment = Experiment(
        name="mine",
        clients={"count": 5, "partition": "dirichlet", "alpha": 0.1, "labelled": [0.1, 0.5]},
        model={"name": "mlp", "hidden": [32, 16]},
        method={"name": "fedprox", "mu": 0.3},
        training={"participation": 3},
    )
    file = tmp_path / "experiment.toml"
    file.write_text(experiment.to_toml())
    assert load(file) == experiment
    assert load(file).to_toml() == experiment.to_toml()


def test_every_default_is_written_out():
    tables = tomllib.loads(Experiment(clients={"partition": "dirichlet"}).to_toml())
    assert tables["clients"]["alpha"] == 0.5
    assert tables["model"]["channels"] == [16, 32]
    assert tables["training"]["momentum"] == 0.0


def test_settings_that_are_none_or_infinite_come_back(own_module, write):
    partition = {"partition": f"{own_module}:split", "far": float("inf")}
    experiment = Experiment(clients=partition)
    assert experiment.clients.options == {"limit": None, "far": float("inf"), "least": 3}
    assert "limit" not in experiment.to_toml()
    assert load(write(experiment.to_toml())) == experiment


def test_set_overrides_the_file(write):
    file = write("[training]\nrounds = 100\nlr = 0.1\n")
    experiment = load(file, ["training.rounds=5", "seed=3", "data.source=digits", "name=other"])
    assert (experiment.training.rounds, experiment.training.lr) == (5, 0.1)
    assert (experiment.seed, experiment.name) == (3, "other")


def test_another_method_starts_from_its_own_defaults(write):
    file = write('[method]\nname = "fedprox"\nmu = 0.7\n')
    with pytest.warns(UserWarning, match=r"method\.name=fedavgm drops the file's method\.mu"):
        experiment = load(file, ["method.server_momentum=0.9", "method.name=fedavgm"])
    assert experiment.method.options == {"server_learning_rate": 1.0, "server_momentum": 0.9}
    # The same name keeps the file's settings.
    assert load(file, ["method.name=fedprox"]).method.options == {"mu": 0.7}


def test_another_file_of_the_same_source_keeps_the_settings(write):
    file = write('[data]\nsource = "npz:a.npz"\nimbalance = 0.1\nflip = true\n')
    data = load(file, ["data.source=npz:b.npz"]).data
    assert (data.source, data.imbalance, data.options["flip"]) == ("npz:b.npz", 0.1, True)
    with pytest.warns(UserWarning, match=r"drops the file's data\.imbalance, data\.flip"):
        assert load(file, ["data.source=cifar10:b.npz"]).data.imbalance == 1.0


def test_another_function_of_the_same_module_is_another_source(write, tmp_path, monkeypatch):
    (tmp_path / "mine_two_sources.py").write_text("def one(): ...\ndef two(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = write('[data]\nsource = "mine_two_sources:one"\nimbalance = 0.1\n')
    with pytest.warns(UserWarning, match=r"drops the file's data\.imbalance"):
        assert load(file, ["data.source=mine_two_sources:two"]).data.imbalance == 1.0


def test_another_partition_drops_only_the_old_ones_settings(write):
    file = write('[clients]\ncount = 7\npartition = "dirichlet"\nalpha = 0.1\n')
    with pytest.warns(UserWarning, match=r"drops the file's clients\.alpha"):
        experiment = load(file, ["clients.partition=iid"])
    assert (experiment.clients.count, experiment.clients.options) == (7, {})


def test_spaces_around_an_override(write):
    experiment = load(write(""), ["method.name = fedprox", " seed =  3 # three", "name= mine "])
    assert (experiment.method.name, experiment.seed, experiment.name) == ("fedprox", 3, "mine")


def test_a_file_may_begin_with_a_byte_order_mark_and_be_named_by_a_string(write):
    file = write("")
    file.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert load(str(file)).seed == 3


def test_the_default_named_once_more_drops_nothing(write):
    file = write('[data]\nimbalance = 0.1\n[model]\nchannels = [4]\n[method]\nclient = ""\n')
    experiment = load(file, ["data.source=digits", "model.name=cnn", "method.name=fedavg"])
    assert experiment.data.imbalance == 0.1
    assert experiment.model.options["channels"] == (4,)


def test_integers_count_clients_and_floats_are_shares():
    assert Experiment(training={"participation": 4}).training.participation == 4
    assert Experiment(training={"participation": 0.4}).training.participation == 0.4
    assert Experiment(training={"lr": 1}).training.lr == 1.0


# Text of the file -> the one line that must come out, after the file's name.
MISTAKES = {
    "[training]\nlearning_rate = 0.1": "training.learning_rate = 0.1: unknown key; ",
    "[training]\nround = 3": "training.round = 3: unknown key; did you mean rounds? allowed: ",
    "[trainning]\nrounds = 3": "trainning = {'rounds': 3}: unknown key; did you mean training? ",
    "[training]\nlr = -1.0": "training.lr = -1.0: must be greater than 0",
    "[training]\nlr = nan": "training.lr = nan: must be ",
    '[training]\nrounds = "many"': "training.rounds = 'many': must be a valid integer",
    "[training]\nrounds = true": "training.rounds = True: must be a valid integer",
    "[training]\nrounds = 2.5": "training.rounds = 2.5: must be a valid integer",
    "[training]\nparticipation = 1": "training.participation = 1: a count must be at least 2; "
    "one of 50 is 0.02, and 1.0 all clients",
    "[training]\nparticipation = 1.5": "training.participation = 1.5: a share must be above 0 ",
    "[training]\nparticipation = 11": "training.participation = 11: more than clients.count = 10",
    "[evaluation]\nparticipation = 99": "evaluation.participation = 99: more than clients.count",
    "[training]\nmomentum = 1.0": "training.momentum = 1.0: must be less than 1",
    '[training]\naugmentation = "strong"': "training.augmentation = 'strong': must be 'none' or ",
    "[data]\nimbalance = 0.0": "data.imbalance = 0.0: must be greater than 0",
    '[data]\nsource = "mnist"': "data.source = 'mnist': unknown dataset 'mnist'; allowed: cifar10",
    '[data]\nsource = "npz"': "data.source = 'npz': the source 'npz' needs a place ",
    '[data]\nsource = "digits:x"': "data.source = 'digits:x': the source 'digits' takes no place",
    '[clients]\npartition = "iid"\nalpha = 0.5': "clients.alpha = 0.5: unknown key; allowed: ",
    '[clients]\npartition = "dirichlet"\nalpha = "a"': "clients.alpha = 'a': must be a valid ",
    "[clients]\nlabelled = 1.2": "clients.labelled = 1.2: must be a share from 0 to 1, or [",
    "[clients]\nlabelled = nan": "clients.labelled = nan: must be a share from 0 to 1, or [",
    "[clients]\nlabelled = true": "clients.labelled = True: must be a share from 0 to 1, or [low",
    "[clients]\nlabelled = [0.1, 0.2, 0.3]": "clients.labelled = [0.1, 0.2, 0.3]: must be a share ",
    "[clients]\nlabelled = [nan, 1.0]": "clients.labelled = [nan, 1.0]: must be a share from 0 ",
    "[clients]\nlabelled = [0.5, 0.1]": "clients.labelled = [0.5, 0.1]: in [low, high] ",
    "[clients]\ncount = 0": "clients.count = 0: must be greater than or equal to 1",
    '[method]\nname = "fedprx"': "method.name = 'fedprx': unknown method 'fedprx'; did you mean "
    "fedprox? allowed: ",
    "[clients]\nlabelled = [0.5]": "clients.labelled = [0.5]: must be a share from 0 to 1, ",
    '[model]\nname = "mlp"\nhidden = 5': "model.hidden = 5: must be a list",
    '[method]\nname = "fedprox"\nmu = -1.0': "method.mu = -1.0: must be at least 0",
    '[method]\nname = "fedprox"\nnu = 1.0': "method.nu = 1.0: unknown key; allowed: ",
    '[method]\nclient = "no.such:Thing"': "method.client = 'no.such:Thing': ",
    '[method]\nclient = "json:Thing"': "method.client = 'json:Thing': 'json:Thing': the module ",
    '[engine]\nworkers = "many"': "engine.workers = 'many': must be a valid integer, or must be ",
    "[data]\nsource = 5": "data.source = 5: must be a valid string",
    "[clients]\npartition = [3]": "clients.partition = [3]: must be a valid string",
    "[model]\nname = 3": "model.name = 3: must be a valid string",
    '[method]\nname = ["fedavg"]': "method.name = ['fedavg']: must be a valid string",
    "[method.name]\na = 1": "method.name = {'a': 1}: must be a valid string",
    "[method]\nclient = 3": "method.client = 3: must be a valid string",
    'name = "a b"': "name = 'a b': use letters, digits",
    "seed = -1": "seed = -1: must be greater than or equal to 0",
    "training = 3": "training = 3: must be a table",
    "[training\n": "not valid TOML: ",
    f"seed = {'9' * 5000}": "not valid TOML: Exceeds the limit (4300 digits)",
    f"seed = {'[' * 5000}": "not valid TOML: maximum recursion depth exceeded",
}


class TestExperimentFailure:
    @pytest.mark.parametrize("text", MISTAKES)
    def test_one_line_says_file_key_value_and_what_is_allowed(self, write, text):
        file = write(text)
        with pytest.raises(ConfigError) as caught:
            load(file)
        message = str(caught.value)
        assert message.startswith(f"{file}: {MISTAKES[text]}"), message
        assert "\n" not in message

    def test_a_client_update_that_is_no_dataclass(self, own_module):
        line = r"my_splits:Bare' has settings \(mu\) but is no dataclass; write @dataclass"
        with pytest.raises(ConfigError, match=line):
            Experiment(method={"client": f"{own_module}:Bare"})
        Experiment(method={"client": f"{own_module}:Plain"})  # without settings it need not be

    def test_a_setting_of_ones_own_with_the_name_of_a_key(self, own_module):
        problem = "clients.count = 7: clash has a setting of this name too; rename that one"
        with pytest.raises(ConfigError, match=f"^{problem}$"):
            Experiment(clients={"count": 7, "partition": f"{own_module}:clash"})

    @pytest.mark.parametrize(
        ("changes", "setting"),
        [
            ({"partition": "my_splits:split", "least": None}, "least = None"),
            ({"partition": "my_splits:odd"}, "order = <built-in function sorted>"),
            ({"partition": "my_splits:odd", "order": [1, None]}, r"order = \[1, None\]"),
        ],
    )
    def test_a_setting_that_no_file_can_hold(self, own_module, changes, setting):
        with pytest.raises(
            ConfigError, match=rf"^clients\.{setting}: an experiment file can't hold this value$"
        ):
            Experiment(clients=changes)

    def test_two_mistakes_are_two_lines(self, write):
        file = write("[training]\nrounds = 0\nlr = 0.0\n")
        with pytest.raises(ConfigError) as caught:
            load(file)
        assert [line.split(" = ")[0] for line in str(caught.value).split("\n")] == [
            f"{file}: training.rounds",
            f"{file}: training.lr",
        ]

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match="there is no such experiment file"):
            load(tmp_path / "none.toml")

    def test_a_file_that_is_no_text(self, tmp_path):
        file = tmp_path / "binary.toml"
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match=r"binary\.toml: can't be read"):
            load(file)

    @pytest.mark.parametrize(
        "override", ["rounds", "=5", " =5", "training.lr.x=3", "seed=1\nx=2", "seed=1\n[training]"]
    )
    def test_an_override_that_is_no_assignment(self, write, override):
        with pytest.raises(ConfigError, match=r"write --set table\.key=value"):
            load(write(""), [override])

    @pytest.mark.parametrize("key", ["'training'.lr", 'training."lr"', "[training].lr"])
    def test_a_key_is_written_without_quotes(self, write, key):
        with pytest.raises(ConfigError, match=r"^--set .*=1.*: write table\.key without quotes"):
            load(write(""), [f"{key}=1"])

    @pytest.mark.parametrize("text", ["rounds = 9", ""])
    def test_an_override_of_a_whole_table(self, write, text):
        """The file's other keys of it would go without a word."""
        line = r"^--set 'training=.*: training is a table; write training\.key=value"
        with pytest.raises(ConfigError, match=line):
            load(write(f"[training]\n{text}"), ["training={lr=0.5}"])

    def test_an_override_that_is_no_toml_is_a_string(self, write):
        for value in ("9" * 5000, "[" * 5000):
            with pytest.raises(ConfigError, match=r"seed = '.*': must be a valid integer"):
                load(write(""), [f"seed={value}"])

    def test_an_override_below_a_plain_value(self, write):
        with pytest.raises(ConfigError, match="seed isn't a table"):
            load(write("seed = 1"), ["seed.x=3"])


def test_a_client_update_that_is_not_frozen_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "my_thawed.py").write_text(
        "from fedsim.engine.update import LocalSGD\n"
        "class Thawed(LocalSGD):\n"
        "    def __init__(self, *, mu: float = 0.1):\n"
        "        self.mu = mu\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = r"Thawed: AttributeError: Thawed\.mu can't be set: a client update is a frozen dataclass"
    with pytest.raises(ConfigError, match=line):
        Experiment(method={"client": "my_thawed:Thawed"})


OWN_METHOD = """
from dataclasses import dataclass
import sys
from fedsim.engine.update import LocalSGD
from fedsim.models.small import linear
from strategies import FedAvg

@dataclass(frozen=True, kw_only=True)
class Mine(LocalSGD):
    alpha: float = 0.1

class Outer:
    class Inner(LocalSGD):
        pass

class Server(FedAvg):
    client = Mine

class Same(FedAvg):
    client = Mine
    def __init__(self, *, alpha: float = 0.1, **others):
        super().__init__(**others)
        self.alpha = alpha

class Other(Same):
    def __init__(self, *, alpha: float = 0.5, **others):
        super().__init__(alpha=alpha, **others)

class Text(FedAvg):
    client = "my_method:Mine"

class NoUpdate(FedAvg):
    client = Outer

def leaves(*arguments):
    sys.exit(0)
"""


@pytest.fixture
def own_method(tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text(OWN_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_method")
    del sys.modules["my_method"]


class TestOwnMethod:
    def test_a_strategy_may_say_its_client(self, own_method):
        experiment = Experiment(method={"name": "my_method:Server", "alpha": 0.3})
        assert make_update(experiment) == own_method.Mine(alpha=0.3)
        again = Experiment(**tomllib.loads(experiment.to_toml()))
        assert make_update(again) == own_method.Mine(alpha=0.3)
        plain = Experiment(
            method={"name": "my_method:Server", "client": "fedsim.engine.update:LocalSGD"}
        )
        assert type(make_update(plain)) is LocalSGD

    def test_a_setting_of_both_goes_to_both(self, own_method):
        experiment = Experiment(method={"name": "my_method:Same", "alpha": 0.3})
        assert make_update(experiment).alpha == make_strategy(experiment).alpha == 0.3
        assert Experiment(method={"name": "my_method:Other", "alpha": 0.3}).method.options == {
            "alpha": 0.3
        }
        problem = r"alpha = 0\.1: the client update's default, while the strategy's is 0\.5"
        with pytest.raises(ConfigError, match=problem):
            Experiment(method={"name": "my_method:Other"})

    @pytest.mark.parametrize(
        ("name", "line"),
        [
            ("Text", "my_method:Text.*its client is 'my_method:Mine'; must be a client"),
            ("NoUpdate", "'my_method:NoUpdate': its client 'Outer': isn't a fedsim.engine.update"),
        ],
    )
    def test_a_client_that_is_none(self, own_method, name, line):
        with pytest.raises(ConfigError, match=line):
            make_update(Experiment(method={"name": f"my_method:{name}"}))

    def test_classes_and_functions_stand_for_their_names(self, own_method):
        experiment = Experiment(method={"name": own_method.Server}, model={"name": mlp})
        assert experiment.method.name == "my_method:Server"
        assert Experiment(method={"client": own_method.Mine}).method.client == "my_method:Mine"
        assert experiment.model.name == "mlp"
        with pytest.raises(ConfigError, match=r"Inner.*must stand at the top of a module"):
            Experiment(method={"client": own_method.Outer.Inner})

    @pytest.mark.parametrize("key", ["data.source", "model.name", "clients.partition"])
    def test_a_function_that_leaves(self, own_method, key):
        table, _, name = key.partition(".")
        experiment = Experiment(**{table: {name: "my_method:leaves"}})
        with pytest.raises(ConfigError, match=r"leaves.*it called sys\.exit\(0\)"):
            fedsim.simulate(experiment)

    def test_a_module_that_leaves(self, tmp_path, monkeypatch):
        (tmp_path / "my_script.py").write_text("import sys\nsys.exit(0)\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match=r"my_script can't be imported: it called sys\.exit"):
            Experiment(model={"name": "my_script:model"})


def test_a_key_that_is_no_name():
    with pytest.raises(ConfigError, match=r"data\.1 = 2: unknown key"):
        Experiment(data={1: 2})


@pytest.mark.parametrize("name", registry.names("method"))
def test_an_installed_strategys_class_stands_for_its_method(name):
    strategy = registry.find("method", name)
    same = registry.entry_point_names("method", strategy)
    if len(same) == 1:
        assert Experiment(method={"name": strategy}) == Experiment(method={"name": name})
    else:
        with pytest.raises(ConfigError, match=f"give one of its names, {', '.join(same)}"):
            Experiment(method={"name": strategy})

"""Finding components, one's own among them."""

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from fedsim import registry
from fedsim.errors import ConfigError

OWN = """\
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from strategies import FedAvg
if TYPE_CHECKING:
    from numpy.typing import NDArray

value = 3
def small(shape, num_classes, *, width: int = 3): ...
def checked(y: NDArray, rng: NDArray | None = None, *, step: int = 2) -> NDArray: ...
def unknown(shape, *, width: int = 3, start: NDArray | None = None): ...
def number(shape, *, width: int | 3 = 3): ...
def strange(shape, *, width: int = 3, start: FedAvg | None = None): ...
@dataclass
class Known:
    kind: Literal["a", "b"] = "a"
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_parts"
    sys.modules.pop("my_parts", None)


def test_the_documented_names_are_installed():
    assert {"fedavg", "fedprox", "fedadam", "fedavgm", "fedmedian", "krum"} <= set(
        registry.names("method")
    )
    assert {"digits", "fashion-mnist", "idx", "npz"} <= set(registry.names("dataset"))
    assert {"linear", "mlp", "cnn", "resnet8", "resnet18", "resnet34"} <= set(
        registry.names("model")
    )
    partitions = {"iid", "dirichlet", "client-dirichlet", "shards", "quantity", "group"}
    assert partitions <= set(registry.names("partition"))


@pytest.mark.parametrize("kind", ["method", "client", "dataset", "model", "partition"])
def test_every_installed_name_loads_and_has_readable_settings(kind):
    for name in registry.names(kind):
        assert registry.options(registry.find(kind, name))


def test_a_function_of_ones_own(own_module):
    function = registry.find("model", f"{own_module}:small")
    assert registry.options(function)().model_dump() == {"width": 3}


def test_only_the_types_of_settings_must_be_known(own_module):
    function = registry.find("partition", f"{own_module}:checked")
    assert registry.options(function)().model_dump() == {"step": 2}


def test_an_inherited_setting_has_a_type_that_its_own_module_knows(own_module):
    @dataclass
    class Mine(registry.find("client", f"{own_module}:Known")):
        late: bool = False

    assert registry.options(Mine)(kind="b").model_dump() == {"kind": "b", "late": False}


def test_flowers_plumbing_is_no_setting():
    fields = registry.options(registry.find("method", "fedavgm")).model_fields
    assert set(fields) == {"server_learning_rate", "server_momentum"}


def test_lists_of_lists_are_settings_that_a_file_can_hold():
    def mine(
        y, group, num_clients, rng, *, deep: list[list[int]], pairs: list[tuple[int, int]]
    ): ...

    made = registry.options(mine)(deep=((1, 2), (3,)), pairs=((1, 2),))
    assert made.model_dump() == {"deep": [[1, 2], [3]], "pairs": [(1, 2)]}


def test_a_partition_of_ones_own_may_name_its_settings_as_flower_does():
    def mine(y, group, num_clients, rng, *, partition_by: str = "label"): ...

    assert registry.options(mine)().model_dump() == {"partition_by": "label"}


def test_a_dataset_and_its_place():
    loader, arguments = registry.find_dataset("npz:a/b:c.npz")
    assert (loader.__name__, arguments) == ("npz", ("a/b:c.npz",))
    assert registry.find_dataset("digits")[1] == ()


def test_a_place_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert registry.find_dataset("npz:~/x.npz")[1] == ("/home/me/x.npz",)
    assert registry.find_dataset("npz:a~/~x.npz")[1] == ("a~/~x.npz",)
    assert registry.find_dataset("folder:~nobody-here/x")[1] == ("~nobody-here/x",)


class TestRegistryFailure:
    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(
            ConfigError, match=r"unknown model 'cn'; did you mean cnn\? allowed: cnn, linear"
        ):
            registry.find("model", "cn")

    def test_what_a_module_of_ones_own_lacks_is_its_own_error(self, tmp_path, monkeypatch):
        (tmp_path / "timm_models.py").write_text("import timm\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match=r"timm_models can't be imported: .*'timm'.*line 1"):
            registry.find("model", "timm_models:f")

    def test_a_module_that_is_missing(self):
        with pytest.raises(ConfigError, match=r"there is no module 'no_such_module' .* packages$"):
            registry.find("model", "no_such_module:f")

    def test_flowers_partitioners_need_a_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "flwr_datasets", None)
        with pytest.raises(ConfigError, match=r"install it: pip install flwr-datasets$"):
            registry.find("partition", "flwr_datasets.partitioner:IidPartitioner")

    def test_an_attribute_that_is_missing_or_no_function(self, own_module):
        for attribute in ("large", "value"):
            with pytest.raises(ConfigError, match=f"no function or class '{attribute}'"):
                registry.find("model", f"{own_module}:{attribute}")

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (
                "x = 1\n@dataclass\nclass F: ...",
                "NameError: name 'dataclass' .*broken.py, line 2, in",
            ),
            ("def f(:", "SyntaxError: invalid syntax"),
            ("import no_such_module", "No module named 'no_such_module' .broken.py, line 1, in"),
        ],
    )
    def test_a_module_that_cannot_be_imported(self, tmp_path, monkeypatch, text, line):
        (tmp_path / "broken.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match=f"'broken:F': broken can't be imported: .*{line}"):
            registry.find("client", "broken:F")

    @pytest.mark.parametrize("name", [":f", ".:f", ".my_parts:f", "my..parts:f"])
    def test_a_name_without_a_module(self, name):
        with pytest.raises(ConfigError, match=r"names no module; write package\.module:name"):
            registry.find("model", name)

    def test_modules_without_a_file(self, tmp_path, monkeypatch):
        (tmp_path / "my_folder").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        for module in ("sys", "my_folder"):
            with pytest.raises(ConfigError, match=f"the module {module} has no function or class"):
                registry.find("model", f"{module}:nothing")

    def test_a_folder_of_ones_own_that_is_hidden(self, tmp_path, monkeypatch):
        (tmp_path / "clients").mkdir()
        (tmp_path / "clients" / "mine.py").write_text("class Mine: ...")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=r"__init__\.py hides your own folder clients, which"):
            registry.find("client", "clients.mine:Mine")
        (tmp_path / "time").mkdir()
        (tmp_path / "time" / "mine.py").write_text("class Mine: ...")
        with pytest.raises(ConfigError, match=r"the module time hides your own folder time"):
            registry.find("client", "time.mine:Mine")
        with pytest.raises(ConfigError, match=r"there is no module 'clients\.other'"):
            registry.find("client", "clients.other:Mine")

    def test_a_file_of_ones_own_that_is_hidden(self, tmp_path, monkeypatch):
        (tmp_path / "strategies.py").write_text("class Mine: ...")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=r"'Mine'; it hides your own strategies\.py, which"):
            registry.find("method", "strategies:Mine")

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("unknown", "the type of its setting 'start' can't be found out: name 'NDArray'"),
            ("number", "the type of its setting 'width' can't be found out: unsupported"),
            ("strange", "has a setting that no file can hold; .*FedAvg'>$"),
        ],
    )
    def test_a_setting_of_a_type_that_cannot_be_used(self, own_module, name, problem):
        function = registry.find("model", f"{own_module}:{name}")
        with pytest.raises(ConfigError, match=f"^{name}:? {problem}"):
            registry.options(function)

    def test_two_packages_with_the_same_name(self, monkeypatch):
        points = [EntryPoint("x", value, "fedsim.models") for value in ("one:f", "one:f", "two:f")]
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        registry._points.cache_clear()
        try:
            with pytest.raises(ConfigError, match="two installed packages call a model 'x'"):
                registry.names("model")
        finally:
            registry._points.cache_clear()

    def test_a_folder_that_hides_our_packages(self, tmp_path, monkeypatch):
        (tmp_path / "clients").mkdir()
        (tmp_path / "clients" / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "clients", raising=False)
        registry.check_packages.cache_clear()
        with pytest.raises(ConfigError, match=r"clients hides fedsim's own package 'clients'"):
            registry.check_packages()


def test_a_class_that_passes_others_on_takes_what_its_parent_takes():
    from strategies import FedAvg, FedLabel

    class Mine(FedLabel):
        def __init__(self, *, beta: float = 0.5, schedule: str = "joint", **others):
            super().__init__(schedule=schedule, **others)

    class Closed(FedAvg):
        def __init__(self, *, beta: float = 0.5):
            super().__init__()

    class Open(Closed):
        def __init__(self, **others):
            super().__init__(**others)

    assert registry.options(Mine)().model_dump() == {"beta": 0.5, "schedule": "joint"}
    assert registry.accepts(Mine, "fraction_train")
    assert not registry.accepts(Closed, "fraction_train")
    # What the nearest one takes is all that can be passed on.
    assert not registry.accepts(Open, "fraction_train")

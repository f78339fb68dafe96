"""Finding components, one's own among them."""

import sys
from importlib.metadata import EntryPoint

import pytest

from fedsim import registry
from fedsim.errors import ConfigError


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "def small(shape, num_classes, *, width: int = 3): ...\nvalue = 3\n"
    )
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


def test_flowers_plumbing_is_no_setting():
    fields = registry.options(registry.find("method", "fedavgm")).model_fields
    assert set(fields) == {"server_learning_rate", "server_momentum"}


def test_a_dataset_and_its_place():
    loader, arguments = registry.find_dataset("npz:a/b:c.npz")
    assert (loader.__name__, arguments) == ("npz", ("a/b:c.npz",))
    assert registry.find_dataset("digits")[1] == ()


class TestRegistryFailure:
    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ConfigError, match=r"unknown model 'cn'; allowed: cnn, linear"):
            registry.find("model", "cn")

    def test_a_module_that_is_missing(self):
        with pytest.raises(ConfigError, match="there is no module 'no_such_module'"):
            registry.find("model", "no_such_module:f")

    def test_an_attribute_that_is_missing_or_no_function(self, own_module):
        for attribute in ("large", "value"):
            with pytest.raises(ConfigError, match=f"no function or class '{attribute}'"):
                registry.find("model", f"{own_module}:{attribute}")

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

"""What the README shows of methods of one's own, and of Flower's runtimes, works as it stands."""

import random
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

import fedsim
from fedsim.engine import flower

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Return the module that the README's classes make together."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    classes = [block for block in blocks if "class " in block]
    folder = tmp_path_factory.mktemp("readme")
    imports = "import torch\nfrom strategies import FedAvg\n"
    (folder / "shown_in_readme.py").write_text("\n".join([imports, *classes]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield __import__("shown_in_readme")


@pytest.mark.parametrize(
    "method",
    [
        {"client": "FedProx", "mu": 0.1},
        {"client": "MeanTeacher", "threshold": 0.3},
        {"client": "FedPer"},
        {"client": "Proximal", "name": "Ramp"},
    ],
    ids=lambda method: method["client"],
)
def test_a_method_of_ones_own(shown, method):
    named = {key: getattr(shown, method[key]) for key in ("client", "name") if key in method}
    experiment = fedsim.Experiment(
        data={"imbalance": 0.1},
        clients={"count": 6, "partition": "dirichlet", "labelled": 0.4},
        method=method | named,
        training={"rounds": 8, "lr": 0.1, "local_epochs": 2},
        evaluation={"every": 8},
        engine={"backend": "inline"},
    )
    result = fedsim.simulate(experiment)
    assert result.rounds["failures"].sum() == 0
    assert result.rounds["personal_accuracy"].iloc[-1] > 0.4
    if method["client"] == "MeanTeacher":
        assert result.training["pseudo_kept"].sum() > 0


class Nodes:
    """As much of a Flower runtime as a server app looks at; its nodes answer in any order."""

    def __init__(self, client_app, count):
        self.app = client_app
        self.rng = random.Random(1)
        self.contexts = {}
        for client in range(count):
            node = self.rng.getrandbits(63)
            config = {"partition-id": client, "num-partitions": count}
            self.contexts[node] = Context(1, node, config, RecordDict(), {})

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, timeout):
        messages = self.rng.sample(list(messages), len(messages))
        return [self.app(one, self.contexts[one.metadata.dst_node_id]) for one in messages]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedavg"},
        {"name": "fedlabel", "warmup_rounds": 1, "threshold": 0.3},
        {"name": "scaffold"},
    ],
    ids=lambda method: method["name"],
)
def test_a_flower_project_gives_the_simulations_model(tmp_path, monkeypatch, method):
    experiment = fedsim.Experiment(
        data={"imbalance": 0.1},
        clients={"count": 4, "partition": "dirichlet", "labelled": 0.4},
        model={"name": "linear"},
        method=method,
        training={"rounds": 3, "lr": 0.1, "participation": 1.0, "momentum": 0.0},
        engine={"backend": "inline"},
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "experiment.toml").write_text(experiment.to_toml(), encoding="utf-8")
    section = README.read_text(encoding="utf-8").split("### In Flower's own runtimes")[1]
    apps = []
    for block in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)[:2]:
        (tmp_path / "shown.py").write_text(block, encoding="utf-8")
        apps.append(runpy.run_path(str(tmp_path / "shown.py"))["app"])
    client_app, server_app = apps
    flower.enter_runtime()
    server_app(Nodes(client_app, 4), Context(1, 1, {}, RecordDict(), {}))
    found = torch.load(tmp_path / "my-experiment.pt")
    expected = fedsim.simulate(experiment).arrays
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array, rtol=1e-5, atol=1e-5)

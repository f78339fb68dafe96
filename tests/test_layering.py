"""Who may import whom, read off the source."""

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("fedsim", "strategies", "clients", "experiments", "tests")
MAY_IMPORT = {
    "fedsim": {"fedsim"},
    "strategies": {"fedsim", "strategies"},
    "clients": {"fedsim", "clients"},
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            yield node.module or ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        found = {name.partition(".")[0] for name in imports(file)} & set(OURS)
        assert found <= MAY_IMPORT[package], f"{file.relative_to(ROOT)} imports {found}"


def test_the_layering_test_sees_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from strategies.fedavg import FedAvg\n    import clients.x\n")
    assert set(imports(file)) == {"strategies.fedavg", "clients.x"}


def needed_by(*distributions):
    """Distributions, and those without which they can't be installed."""
    found, open_ = set(), list(distributions)
    while open_:
        name = re.sub(r"[-_.]+", "-", open_.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            said = requires(name) or []
        except PackageNotFoundError:  # on other systems only
            continue
        open_ += [re.split(r"[^\w.-]", one)[0] for one in said if "extra ==" not in one]
    return found


TRAINS = """
import sys
from importlib import import_module


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is neither PyTorch nor NumPy")


sys.meta_path.insert(0, Blocked())

import numpy as np
import clients
import fedsim.engine.worker
import experiments.benchmarks.gpu
from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.models import Net
from fedsim.models.resnet import resnet8

rng = np.random.default_rng(0)
y = np.arange(16) % 2
x = rng.integers(0, 256, (16, 3, 8, 8), dtype=np.uint8)
source = Source(name="noise", x_train=x, y_train=y, x_test=x, y_test=y, num_classes=2)
federation = federate(source, num_clients=2, partition=iid, labelled=0.5)
net = Net(resnet8((3, 8, 8), 2, width=4))
training = LocalTraining(epochs=1, batch_size=4, lr=0.1, augmentation="weak")
for stacked in (False, True):
    trainer = LocalTrainer(net, federation, Statistics.of(federation), training, 0, stacked)
    method = clients.FixMatchGlobal(threshold=0.5)
    for found in trainer.update_all(method, net.initial_weights(), trainer.clients(1, range(2))):
        if isinstance(found, Exception):
            raise found
        _, counts = found
        assert counts["pseudo_seen"], counts
"""


def test_the_training_core_trains_where_there_is_only_pytorch_and_numpy():
    there = needed_by("torch", "numpy") | {"fedsim-flwr"}
    blocked = {
        package
        for package, of in packages_distributions().items()
        if there.isdisjoint(re.sub(r"[-_.]+", "-", name).lower() for name in of)
    }
    assert {"pandas", "flwr", "ray", "pydantic", "sklearn", "matplotlib", "kornia"} <= blocked
    code = f"BLOCKED = {blocked!r}\n{TRAINS}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

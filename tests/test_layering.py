"""Who may import whom, read off the source."""

import ast
import subprocess
import sys
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


def test_the_training_core_needs_neither_flower_nor_ray_nor_pandas():
    core = [
        "fedsim.engine.local",
        "fedsim.engine.worker",
        "fedsim.models.resnet",
        "clients",
        "experiments.benchmarks.gpu",
    ]
    code = (
        "import sys\n"
        "for name in ('flwr', 'ray', 'pandas', 'pydantic', 'sklearn', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        f"import {', '.join(core)}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

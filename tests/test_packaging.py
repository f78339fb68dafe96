"""The built wheel: what it holds, and that it works outside the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"fedsim", "strategies", "clients"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for package in (*PACKAGES, "experiments", "tests"):
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                copy = source / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    # With the setuptools of this environment: a build must not need the network.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert top - PACKAGES == {name for name in top if name.endswith(".dist-info")}
    assert top >= PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert wheel.name.startswith("fedsim_flwr-")
    sources = {str(f.relative_to(ROOT)) for p in PACKAGES for f in (ROOT / p).rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "import fedsim.registry, strategies\n"
        "print(fedsim.__file__, strategies.FedAvg.__module__)\n"
        "print(fedsim.registry.names('method'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "site" / "fedsim") in done.stdout
    assert "fedprox" in done.stdout

"""Runs that are compared."""

import shutil

import pytest

import fedsim
from fedsim import Experiment


@pytest.fixture(scope="session")
def two_methods(tmp_path_factory):
    """Two methods, of which one has no generic model, each with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("fedavg", "fedper"):
        for seed in (0, 1):
            fedsim.simulate(
                Experiment(
                    seed=seed,
                    data={"imbalance": 0.1},
                    clients={"count": 4},
                    model={"name": "mlp", "hidden": [8]},
                    method={"name": method},
                    training={"rounds": 2, "lr": 0.1},
                    engine={"backend": "inline"},
                ),
                out=folder / f"{method}-{seed}",
            )
    return folder


@pytest.fixture
def runs(two_methods, tmp_path):
    return shutil.copytree(two_methods, tmp_path / "runs")

"""A run that several tests look at."""

import pytest

import fedsim
from fedsim import Experiment


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run that has all views and heads; tests change copies of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fedsim.simulate(
        Experiment(
            name="small",
            clients={"count": 5, "labelled": 0.5},
            model={"name": "cnn", "channels": [4, 16]},
            method={"name": "fedloge"},
            training={"rounds": 3},
            evaluation={"every": 2},
            engine={"backend": "inline"},
        ),
        out=folder,
    )
    return folder

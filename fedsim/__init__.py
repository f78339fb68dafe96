"""fedsim: federated learning on long-tailed, partly labelled clients, simulated.

The main entries are `Experiment`, `load`, `simulate` and `predict`, and for Flower's own runtimes
`client_app`, `make_strategy` and `initial_arrays`; they are imported on first use, so that parts
which need neither Flower nor Ray can be used without them.

Examples
--------
>>> import fedsim
>>> fedsim.Experiment(name="mine").method.name
'fedavg'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.config import Experiment
    from fedsim.experiment_file import load
    from fedsim.flower_app import client_app, initial_arrays
    from fedsim.method import make_strategy
    from fedsim.prediction import predict
    from fedsim.run.result import Result
    from fedsim.simulation import simulate

__all__ = [
    "Experiment",
    "Result",
    "client_app",
    "initial_arrays",
    "load",
    "make_strategy",
    "predict",
    "simulate",
]

_HOMES = {
    "Experiment": "fedsim.config",
    "client_app": "fedsim.flower_app",
    "initial_arrays": "fedsim.flower_app",
    "load": "fedsim.experiment_file",
    "make_strategy": "fedsim.method",
    "predict": "fedsim.prediction",
    "Result": "fedsim.run.result",
    "simulate": "fedsim.simulation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

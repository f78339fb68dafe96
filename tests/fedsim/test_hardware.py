"""The cores and GPUs that workers get."""

import pytest

from fedsim import hardware
from fedsim.config import Experiment


@pytest.mark.parametrize(
    ("gpus", "engine", "device", "workers", "share"),
    [
        (0, {}, "cpu", 3, 0.0),
        (2, {}, "cuda", 2, 1.0),
        (1, {"workers": 3}, "cuda", 3, 1 / 3),
        (4, {"workers": 2}, "cuda", 2, 1.0),
        (2, {"device": "cpu"}, "cpu", 3, 0.0),
        (1, {"backend": "inline"}, "cuda", 1, 1.0),
    ],
)
def test_workers_share_the_gpus(monkeypatch, gpus, engine, device, workers, share):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(3))
    given = Experiment(clients={"count": 50}, engine=engine)
    assert hardware.device(given) == device
    assert hardware.num_workers(given) == workers
    assert hardware.gpu_share(given) == share

"""What an experiment runs on: this machine's cores and GPUs, and how many workers share them."""

from __future__ import annotations

import os

from fedsim.config import Experiment, cohort_size
from fedsim.errors import ConfigError


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def device(experiment: Experiment) -> str:
    """Return where clients train, ``"cpu"`` or ``"cuda"``."""
    wanted = experiment.engine.device
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise ConfigError(
            "engine.device = 'cuda': PyTorch finds no CUDA device here; give 'cpu', or 'auto'"
        )
    return "cpu"


def num_workers(experiment: Experiment) -> int:
    """Return how many Ray workers an experiment gets: no more than clients in a round."""
    if experiment.engine.backend == "inline":
        return 1
    if isinstance(experiment.engine.workers, int):
        return experiment.engine.workers
    cohort = cohort_size(experiment.training.participation, experiment.clients.count)
    return max(1, min(_num_gpus(experiment) or num_cores(), cohort))


def gpu_share(experiment: Experiment) -> float:
    """Return which share of a GPU each worker gets, in (0, 1]; 0.0 on the processor."""
    return min(1.0, _num_gpus(experiment) / num_workers(experiment))


def _num_gpus(experiment: Experiment) -> int:
    import torch

    return torch.cuda.device_count() if device(experiment) == "cuda" else 0

"""FedLoGe's authors' clients, and how their published run averaged."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from experiments.studies.fedloge_authors import Weighted, clients
from fedsim import Experiment, simulate

COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_the_clients_hold_what_the_authors_log_prints():
    y = np.repeat(np.arange(10), COUNTS)
    owner = clients(y, None, 40, np.random.default_rng())
    held = np.zeros((40, 10), int)
    np.add.at(held, (owner, y), 1)
    assert held[0].tolist() == [72, 83, 9, 1, 40, 5, 5, 0, 0, 0]
    assert held[30].tolist() == [190, 532, 336, 27, 4, 10, 0, 3, 2, 2]
    assert held[39].tolist() == [37, 0, 51, 30, 34, 9, 11, 3, 1, 0]


@dataclass(frozen=True, kw_only=True)
class Numbered(Weighted):
    """Uploads its client's number as the biases of the head: their mean tells the weights."""

    def update(self, w, client):
        upload = yield from super().update(w, client)
        arrays = upload.arrays["arrays"]
        number = torch.full_like(arrays["head.bias"], client.id)
        return replace(upload, arrays={"arrays": {**arrays, "head.bias": number}})


def test_the_numbers_of_examples_are_dealt_out_anew_each_round():
    strategy = "experiments.studies.fedloge_authors:ShuffledWeights"
    result = simulate(
        Experiment(
            clients={"count": 40},
            model={"name": "mlp"},
            method={"name": strategy, "client": f"{__name__}:Numbered"},
            training={"rounds": 2},
            engine={"backend": "inline"},
        )
    )
    first, second = (of["others_examples"].tolist() for _, of in result.training.groupby("round"))
    theirs = [215, 141, 207, 171, 243, 132, 178, 751]  # of the first ones
    assert not Counter(theirs) - Counter(map(int, first))
    assert sorted(first) == sorted(second)
    assert first != second
    assert sum(first) == sum(COUNTS)
    mean = np.average(np.arange(40), weights=second)
    assert result.arrays["head.bias"] == pytest.approx(np.full(10, mean), rel=1e-6)
    assert abs(mean - np.average(np.arange(40), weights=first)) > 0.01

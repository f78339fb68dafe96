"""FedLoGe's authors' clients, and how their published run averaged."""

from collections import Counter

import numpy as np

from experiments.studies.fedloge_authors import clients
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


def test_the_numbers_of_examples_are_dealt_out_anew_each_round():
    here = "experiments.studies.fedloge_authors"
    result = simulate(
        Experiment(
            clients={"count": 40},
            model={"name": "mlp"},
            method={"name": f"{here}:ShuffledWeights", "client": f"{here}:Weighted"},
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

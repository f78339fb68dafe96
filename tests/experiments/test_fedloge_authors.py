"""FedLoGe's authors' clients, and how their published run averaged."""

import numpy as np

from experiments.studies.fedloge_authors import ShuffledWeights, clients
from strategies import FedAvg
from tests.strategies.test_fedavg import answer, values


def test_the_clients_hold_what_the_authors_log_prints():
    y = np.repeat(np.arange(10), [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    owner = clients(y, None, 40, np.random.default_rng())
    held = np.zeros((40, 10), int)
    np.add.at(held, (owner, y), 1)
    assert held[0].tolist() == [72, 83, 9, 1, 40, 5, 5, 0, 0, 0]
    assert held[30].tolist() == [190, 532, 336, 27, 4, 10, 0, 3, 2, 2]
    assert held[39].tolist() == [37, 0, 51, 30, 34, 9, 11, 3, 1, 0]


def test_the_numbers_of_examples_are_dealt_out_anew_each_round():
    # Client k's model is its own one-hot vector: the mean says which weight each one got.
    sizes = [1, 2, 4, 8]

    def shares(strategy, round):
        replies = [answer({"w": np.eye(4)[k]}, n) for k, n in enumerate(sizes)]
        return [15 * share for share in values(strategy.aggregate_train(round, replies)[0])["w"]]

    rounds = [np.round(shares(ShuffledWeights(), round)).astype(int) for round in (1, 2, 3)]
    assert all(sorted(given) == sizes for given in rounds)
    assert len({tuple(given) for given in rounds}) > 1
    np.testing.assert_array_equal(np.round(shares(ShuffledWeights(), 1)), rounds[0])
    np.testing.assert_allclose(shares(FedAvg(), 1), sizes, rtol=1e-6)

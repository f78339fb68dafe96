"""FedProx's client: the proximal term by hand, and its special case."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clients import FedProx
from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Batch, LocalSGD
from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.small import cnn


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(cnn((1, 4, 4), 3, channels=(4,), norm="batch"))


def run(net, federation, update, **settings):
    training = LocalTraining(**{"epochs": 3, "batch_size": 4, "lr": 0.1, **settings})
    trainer = LocalTrainer(net, federation, Statistics.of(federation), training, seed=0)
    return trainer.update(update, net.initial_weights(), client=1, round=1)[0]


def test_mu_zero_is_fedavg(net, federation):
    prox = run(net, federation, FedProx(mu=0.0), momentum=0.5)
    plain = run(net, federation, LocalSGD(), momentum=0.5)
    assert prox.num_examples == plain.num_examples
    for name, array in plain.arrays["arrays"].items():
        assert torch.equal(prox.arrays["arrays"][name], array)


def test_the_loss_adds_half_mu_times_the_squared_distance_of_the_parameters(net):
    w = net.initial_weights()
    w_k = {name: array + 0.5 for name, array in w.items()}
    batch = Batch(torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]), torch.ones(6))
    loss, _ = FedProx(mu=3.0).loss(net, dict(w_k), batch, w)
    logits = net({name: array.clone() for name, array in w_k.items()}, batch.x)
    # Every parameter is 0.5 away; buffers don't count.
    num_parameters = sum(w[name].numel() for name in net.trainable)
    expected = F.cross_entropy(logits, batch.y) + 3.0 / 2 * 0.25 * num_parameters
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_large_mu_holds_the_client_near_the_global_model(net, federation):
    w = net.initial_weights()

    def distance(mu):
        w_k = run(net, federation, FedProx(mu=mu), lr=0.01).arrays["arrays"]
        return np.sqrt(sum(float((w_k[n] - w[n]).square().sum()) for n in net.trainable))

    assert distance(50.0) < 0.3 * distance(1.0) < 0.3 * 1.05 * distance(0.0)


class TestFedProxFailure:
    @pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
    def test_mu_must_not_be_negative(self, mu):
        with pytest.raises(ConfigError, match=r"method\.mu = .*: must be at least 0"):
            FedProx(mu=mu)

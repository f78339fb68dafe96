"""Training on a device other than the processor.

PyTorch's device "meta" has shapes but no contents: a pass runs through on it until its result is
to be brought back, and an operation that mixes it with the processor's tensors fails earlier.
"""

import numpy as np
import pytest
import torch

import clients
from fedsim.data.federate import federate
from fedsim.data.partition import dirichlet
from fedsim.data.statistics import Statistics
from fedsim.engine import local, sgd
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Batch, LocalSGD
from fedsim.models import Net
from fedsim.models.small import cnn

METHODS = {
    "fedavg": LocalSGD(),
    "fedprox": clients.FedProx(mu=0.5),
    "fedloge": clients.FedLoGe(sparsity=0.2, etf_norm=1.0),
    "fedrod": clients.FedRoD(),
    "fedetf": clients.FedETF(),
}


@pytest.fixture(autouse=True)
def _no_check_of_losses(monkeypatch):
    """It compares numbers, which there are none."""
    monkeypatch.setattr(sgd._Loop, "check", lambda *_: None)


def train(federation, method, stacked, augmentation):
    net = Net(cnn((1, 4, 4), 3, channels=(6,), norm="batch"))
    w = method.initial(net, net.initial_weights(), np.random.default_rng(0))
    training = LocalTraining(
        epochs=2, batch_size=4, lr=0.1, momentum=0.5, augmentation=augmentation
    )
    trainer = LocalTrainer(
        net, federation, Statistics.of(federation), training, 7, stacked, device="meta"
    )
    there = {name: tensor.to("meta") for name, tensor in w.items()}
    return trainer.update_all(method, there, trainer.clients(1, range(federation.num_clients)))


@pytest.fixture
def federation(source):
    return federate(source, num_clients=3, partition=dirichlet, options={"alpha": 1.0}, seed=5)


@pytest.mark.parametrize("augmentation", ["none", "weak"])
@pytest.mark.parametrize("name", METHODS)
def test_a_pass_stays_on_its_device(federation, name, augmentation):
    for found in train(federation, METHODS[name], False, augmentation):
        assert isinstance(found, NotImplementedError), found
        assert "Cannot copy out of meta tensor" in str(found)


class Told(LocalSGD):
    """Takes a number that lies on the processor."""

    def given(self, w, client):
        return ({"mu": torch.tensor(0.5 + client.id)},)

    def loss(self, net, w_k, batch: Batch, told):
        loss, log = super().loss(net, w_k, batch)
        return told["mu"] * loss, log


@pytest.mark.parametrize("augmentation", ["none", "weak"])
@pytest.mark.parametrize("method", [*METHODS.values(), Told()], ids=[*METHODS, "told"])
def test_so_do_passes_side_by_side(federation, method, augmentation, monkeypatch):
    run_stacked, errors = local.run_stacked, []

    def watched(*arguments):
        try:
            return run_stacked(*arguments)
        except Exception as error:
            errors.append(error)
            raise

    monkeypatch.setattr(local, "run_stacked", watched)
    train(federation, method, True, augmentation)
    (found,) = errors
    assert isinstance(found, NotImplementedError), found
    assert "Cannot copy out of meta tensor" in str(found)


class Mixed(LocalSGD):
    """Adds something of the processor's to its loss."""

    def loss(self, net, w_k, batch: Batch, *given):
        loss, log = super().loss(net, w_k, batch)
        return loss + torch.ones(2) @ torch.ones(2, device=loss.device), log


def test_a_loss_that_mixes_devices_is_found_out(federation):
    for found in train(federation, Mixed(), False, "none"):
        assert isinstance(found, Exception)
        assert "Cannot copy out of meta tensor" not in str(found)

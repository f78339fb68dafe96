"""Steps as a GPU takes them: begun as one graph, which reads and writes where it was captured.

A stand-in on the processor repeats a step's operations on the very tensors with which it was
captured.
"""

import numpy as np
import pytest
import torch

import clients
from fedsim.data.federate import federate
from fedsim.data.partition import dirichlet
from fedsim.data.statistics import Statistics
from fedsim.engine import tape
from fedsim.engine.local import LocalTrainer
from fedsim.engine.stacks import Stacks
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import LocalSGD
from fedsim.models import Net
from fedsim.models.small import cnn

METHODS = {
    "fedavg": LocalSGD(),
    "fedprox": clients.FedProx(mu=0.5),
    "fedlabel": clients.FedLabel(warmup_rounds=0, threshold=0.7),  # of some clients nothing
    "fedlabel joint": clients.FedLabel(warmup_rounds=0, threshold=0.4, schedule="joint"),
    "fedloge": clients.FedLoGe(sparsity=0.2, etf_norm=1.0),
}


class StandIn:
    """In the place of `fedsim.engine.graph.Graphs`."""

    captured = 0
    replayed = 0

    def capture(self, function, tensors, num_static):
        type(self).captured += 1
        fixed = tuple(tensors[:num_static])
        rooms = [tensor.clone() for tensor in tensors[num_static:]]

        def replay(*tensors):
            type(self).replayed += 1
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(fixed, tensors, strict=False))
            for room, tensor in zip(rooms, tensors[num_static:], strict=True):
                room.copy_(tensor)
            return {name: output.clone() for name, output in function(*fixed, *rooms).items()}

        return replay


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(Stacks, "are_static", staticmethod(lambda device: True))
    monkeypatch.setattr(tape, "Graphs", StandIn)
    monkeypatch.setattr(StandIn, "captured", 0)
    monkeypatch.setattr(StandIn, "replayed", 0)


def train(source, method, stacked, **settings):
    federation = federate(
        source,
        num_clients=5,
        partition=dirichlet,
        options={"alpha": 1.0},
        labelled=0.5,
        min_examples=4,
        seed=2,
    )
    torch.manual_seed(0)
    # BatchNorm over several pixels: of a single value it gives 0, and ReLU no gradient to compare.
    net = Net(cnn((1, 4, 4), 3, channels=(6,), norm="batch"))
    options = {"epochs": 3, "batch_size": 4, "lr": 0.1, "momentum": 0.5, **settings}
    training = LocalTraining(**options)
    trainer = LocalTrainer(net, federation, Statistics.of(federation), training, 7, stacked)
    w = method.initial(net, net.initial_weights(), np.random.default_rng(0))
    for round, some in ((1, range(5)), (2, range(3)), (3, range(5))):
        found = trainer.update_all(method, w, trainer.clients(round, some))
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


@pytest.mark.filterwarnings("ignore:.*had fewer than")
@pytest.mark.parametrize("settings", [{}, {"lr_decay": 0.5, "weight_decay": 0.01}], ids=["", "lr"])
@pytest.mark.parametrize("name", METHODS)
def test_a_graph_gives_the_numbers_of_a_client_alone(source, graphs, name, settings):
    alone = train(source, METHODS[name], False, **settings)
    assert not StandIn.captured
    together = train(source, METHODS[name], True, **settings)
    assert StandIn.replayed > StandIn.captured > 0
    for (one, counts), (other, others) in zip(alone, together, strict=True):
        assert counts == others
        for group, arrays in one.arrays.items():
            for key, tensor in arrays.items():
                torch.testing.assert_close(
                    other.arrays[group][key], tensor, rtol=1e-4, atol=1e-5, msg=key
                )
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4, nan_ok=True)

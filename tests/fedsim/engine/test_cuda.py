"""What only a GPU can show: ``TRITON_INTERPRET=0 pytest tests/fedsim/engine/test_cuda.py``.

Elsewhere these tests are skipped, and with the others, in which kernels run on the processor.
"""

import os
import warnings

import numpy as np
import pytest
import torch

import clients
from fedsim.data.federate import federate
from fedsim.data.partition import dirichlet
from fedsim.data.statistics import Statistics
from fedsim.engine import graph
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import LocalSGD
from fedsim.models import Net
from fedsim.models.small import cnn

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] != "0",
    reason="needs a GPU, and TRITON_INTERPRET=0",
)

SHAPE = (1, 4, 4)
METHODS = {
    "fedavg": LocalSGD(),
    "fedlabel": clients.FedLabel(warmup_rounds=0, threshold=0.5),
    "fedlabel joint": clients.FedLabel(warmup_rounds=0, threshold=0.5, schedule="joint"),
    "fedloge": clients.FedLoGe(sparsity=0.2, etf_norm=1.0),
    "scaffold": clients.Scaffold(),  # whose gradients are corrected
}


def train(source, method, stacked, device, rounds=2, **training):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # clients that had to be filled up
        federation = federate(
            source, num_clients=5, partition=dirichlet, options={"alpha": 0.3}, labelled=0.5
        )
    torch.manual_seed(0)
    # BatchNorm over several pixels: of a single value it gives 0, and ReLU no gradient to compare.
    net = Net(cnn(SHAPE, 3, channels=(6,), norm="batch"))
    settings = {"epochs": 4, "batch_size": 4, "lr": 0.1, "momentum": 0.5, **training}
    trainer = LocalTrainer(
        net,
        federation,
        Statistics.of(federation),
        LocalTraining(**settings),
        7,
        stacked,
        device,
    )
    w = method.initial(net, net.initial_weights(), np.random.default_rng(0))
    w = {name: tensor.to(device) for name, tensor in w.items()}
    for round in range(1, rounds + 1):
        found = trainer.update_all(method, w, trainer.clients(round, range(5)))
    for one in found:
        if isinstance(one, Exception):
            raise one
    return [upload.arrays for upload, _ in found]


@pytest.mark.parametrize("stacked", [False, True])
def test_a_graph_reads_the_rounds_learning_rate(source, stacked):
    settings = {"rounds": 3, "lr_decay": 0.1}
    on_gpu = train(source, METHODS["fedavg"], stacked, "cuda", **settings)
    on_cpu = train(source, METHODS["fedavg"], False, "cpu", **settings)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        for key, tensor in other["arrays"].items():
            torch.testing.assert_close(one["arrays"][key].cpu(), tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_gpu_gives_the_numbers_of_the_processor(source, name, stacked, monkeypatch):
    captured = []
    capture = graph.Graphs.capture

    def watched(self, function, tensors, num_static):
        made = capture(self, function, tensors, num_static)
        captured.append(made is not function)
        return made

    monkeypatch.setattr(graph.Graphs, "capture", watched)
    on_gpu = train(source, METHODS[name], stacked, "cuda")
    assert bool(captured) == stacked
    assert all(captured)
    for one, other in zip(on_gpu, train(source, METHODS[name], False, "cpu"), strict=True):
        for group, arrays in other.items():
            for key, tensor in arrays.items():
                torch.testing.assert_close(one[group][key].cpu(), tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_rounded_products_stay_near(source, precision):
    exact = train(source, LocalSGD(), True, "cuda")
    for one, other in zip(
        train(source, LocalSGD(), True, "cuda", precision=precision), exact, strict=True
    ):
        for name, tensor in other["arrays"].items():
            torch.testing.assert_close(one["arrays"][name], tensor, rtol=0.1, atol=0.1)

"""The kernels for a GPU, interpreted on the processor: the numbers of PyTorch's own layers.

A GPU adds up in another order and may use TF32; what is compared here is what they compute.
"""

import importlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedsim.data.federation import federate
from fedsim.data.partition import iid
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.sgd import LocalTraining
from fedsim.engine.update import LocalSGD
from fedsim.models import Net, stacked
from fedsim.models.resnet import resnet8
from fedsim.models.small import cnn


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    return importlib.import_module("fedsim.models.kernels")


def innermost(x):
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


@pytest.mark.parametrize(
    ("shape", "filters", "taps", "stride", "padding"),
    [
        ((2, 3, 3, 6, 6), 5, 3, 1, 1),
        ((2, 2, 20, 6, 8), 18, 3, 2, 1),
        ((2, 2, 8, 6, 6), 16, 1, 2, 0),
        ((1, 2, 4, 5, 7), 4, 3, 2, 1),
        ((1, 2, 4, 7, 7), 4, 5, 1, 2),
        ((3, 1, 70, 4, 4), 40, 3, 1, 1),
        ((1, 1, 2, 9, 9), 3, 3, 3, 0),
        ((1, 2, 2, 40, 32), 3, 3, 1, 1),  # so many pixels that several programs share them
    ],
)
def test_a_convolution_and_its_gradients(kernels, shape, filters, taps, stride, padding):
    torch.manual_seed(0)
    x = torch.randn(shape)
    w = innermost(torch.randn(shape[0], filters, shape[2], taps, taps))
    x64, w64 = (one.double().requires_grad_() for one in (x, w))
    y64 = torch.stack(
        [F.conv2d(a, b, stride=stride, padding=padding) for a, b in zip(x64, w64, strict=True)]
    )
    g = torch.randn(y64.shape)
    of_x64, of_w64 = torch.autograd.grad(y64, (x64, w64), g.double())
    y = kernels.convolve(x, w, stride, padding)
    of_x = kernels.convolve_back(g, w, *shape[-2:], stride, padding)
    of_w = kernels.weigh(x, g, w, stride, padding)
    assert of_w.stride() == w.stride()
    for found, wanted in ((y, y64), (of_x, of_x64), (of_w, of_w64)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 6), (3, 4, 70, 3, 5), (2, 8, 16, 16, 16)])
def test_batch_norm_and_its_gradients(kernels, shape):
    torch.manual_seed(0)
    k, b, channels = shape[:3]
    # A mean far from 0 costs digits where squares are summed up as they are.
    x = innermost(torch.randn(shape) * 2 + 30)
    mask = torch.ones(k, b)
    mask[0, -1] = mask[1, 1] = 0
    g = torch.randn(shape) * mask.view(k, b, 1, 1, 1)
    weight, bias = torch.rand(k, channels), torch.randn(k, channels)
    running = torch.randn(k, channels), torch.rand(k, channels)
    running64 = [one.double() for one in running]
    x64, weight64, bias64 = (one.double().requires_grad_() for one in (x, weight, bias))
    wanted = [
        F.batch_norm(
            x64[i][mask[i] > 0], *(one[i] for one in running64), weight64[i], bias64[i], True, 0.1
        )
        for i in range(k)
    ]
    total = sum((y * g[i][mask[i] > 0]).sum() for i, y in enumerate(wanted))
    gradients = torch.autograd.grad(total, (x64, weight64, bias64))
    y, mean, scale = kernels.normalise(x, mask, weight, bias, *running, 0.1, 1e-5)
    for i in range(k):
        torch.testing.assert_close(y[i][mask[i] > 0].double(), wanted[i], rtol=1e-5, atol=1e-5)
    for found, one in zip(running, running64, strict=True):
        torch.testing.assert_close(found.double(), one, rtol=1e-5, atol=1e-5)
    found = kernels.normalise_back(g, x, mask, weight, mean, scale)
    for one, gradient in zip(found, gradients, strict=True):
        torch.testing.assert_close(one.double(), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet8((1, 8, 8), 3, width=4),
        # A first layer that is a product on the processor, and has a bias.
        lambda: cnn((1, 8, 8), 3, channels=(12,)),
    ],
    ids=["resnet8", "cnn"],
)
def test_clients_train_as_without_kernels(kernels, make, monkeypatch):
    rng = np.random.default_rng(0)
    source = Source(
        name="noise",
        x_train=rng.integers(0, 256, (13, 1, 8, 8), dtype=np.uint8),
        y_train=np.arange(13) % 3,
        x_test=np.zeros((3, 1, 8, 8), np.uint8),
        y_test=np.arange(3),
        num_classes=3,
    )
    # One client has batches of 4 and 3 examples, the other of 4 and 2.
    federation = federate(source, num_clients=2, partition=iid)
    assert np.diff(federation.train_offsets).tolist() == [7, 6]
    torch.manual_seed(0)
    net = Net(make())
    w = net.initial_weights()
    training = LocalTraining(epochs=4, batch_size=4, lr=0.1, momentum=0.5, precision="tf32")

    def train():
        trainer = LocalTrainer(
            net, federation, Statistics.of(federation), training, 7, stacked=True
        )
        clients = trainer.clients(1, range(federation.num_clients))
        return [found.arrays["arrays"] for found, _ in trainer.update_all(LocalSGD(), w, clients)]

    without = train()
    called, convolve = [], kernels.convolve
    monkeypatch.setattr(kernels, "convolve", lambda *args: called.append(args) or convolve(*args))
    monkeypatch.setattr(stacked, "has_kernels", lambda x: True)
    for one, other in zip(train(), without, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4)
    assert called

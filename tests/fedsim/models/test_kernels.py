"""The kernels for a GPU, interpreted on the processor: the numbers of PyTorch's own layers.

A GPU adds up in another order and may use TF32; what is compared here is what they compute.
"""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.engine import sgd, tape
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import LocalSGD
from fedsim.models import Net, stacked
from fedsim.models.resnet import resnet8
from fedsim.models.small import cnn


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    return importlib.import_module("fedsim.models.kernels")


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedsim.models.kernels import batch_norm, convolution

CONSTANTS = dict(m_block=64, n_block=64, i_block=64, o_block=64, c_block=64, b_block=8)
KERNELS = {  # images in bfloat16, and arrays in float32
    convolution._convolve: ("x w y", ""),
    convolution._weigh: ("x g", "w"),
    batch_norm._sum: ("x", "mask sums"),
    batch_norm._normalise: (
        "x y", "mask sums weight bias running_mean running_var mean scale"
    ),
    batch_norm._sum_back: ("g x", "mean sums"),
    batch_norm._normalise_back: (
        "g x of_x", "mask sums weight mean scale of_weight of_bias"
    ),
}
for kernel, (images, arrays) in KERNELS.items():
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(images.split(), "*bf16") | dict.fromkeys(arrays.split(), "*fp32")
    types |= {name: "fp32" for name in ("momentum", "eps") if name in types}
    types |= {name: "constexpr" for name in CONSTANTS if name in types}
    constants = {
        (place,): CONSTANTS[name] for place, name in enumerate(types) if name in CONSTANTS
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    for capability in (80, 90):
        made = compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.metadata.shared < 160 * 1024
        print(kernel.__name__, capability)
"""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    pytest.importorskip("triton")
    mine = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env={**os.environ, **mine}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 6 * 2


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
    ("make", "examples", "epochs"),
    [
        (lambda: resnet8((1, 8, 8), 3, width=4), 5, 1),
        # A first layer that is a product on the processor, and has a bias. In the second epoch a
        # step is what was noted in the first.
        (lambda: cnn((1, 8, 8), 3, channels=(12,)), 13, 2),
        (lambda: cnn((1, 8, 8), 3, channels=(12, 4), norm="batch"), 13, 2),
    ],
    ids=["resnet8", "cnn", "cnn batch"],
)
def test_clients_train_as_without_kernels(kernels, make, examples, epochs, monkeypatch):
    monkeypatch.setattr(tape, "RECORD_AT", 1)
    if epochs == 1:  # a look at the loss first, as the others take, is most of the work
        monkeypatch.setattr(sgd, "check_loss", lambda *_: None)
    rng = np.random.default_rng(0)
    source = Source(
        name="noise",
        x_train=rng.integers(0, 256, (examples, 1, 8, 8), dtype=np.uint8),
        y_train=np.arange(examples) % 3,
        x_test=np.zeros((3, 1, 8, 8), np.uint8),
        y_test=np.arange(3),
        num_classes=3,
    )
    # Of 13 examples one client has batches of 4 and 3, the other of 4 and 2; of 5, of 3 and 2.
    federation = federate(source, num_clients=2, partition=iid)
    assert np.diff(federation.train_offsets).tolist() == [(examples + 1) // 2, examples // 2]
    torch.manual_seed(0)
    net = Net(make())
    w = net.initial_weights()
    training = LocalTraining(epochs=epochs, batch_size=4, lr=0.1, momentum=0.5, precision="tf32")

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

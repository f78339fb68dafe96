"""Memory layouts change no values, and the quicker layers compute what PyTorch's do."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

from fedsim.models.layers import GreyConv2d, channels_last, quicken

SHAPES = [(5, 1, 4, 6), (5, 3, 4, 6), (5, 1, 1, 1), (5, 8), (5,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_last_keeps_values_and_puts_channels_innermost(shape):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=shape))
    found = channels_last(x)
    assert torch.equal(found, x)
    if x.dim() == 4:
        _, channels, height, width = shape
        assert found.stride() == (height * width * channels, 1, width * channels, channels)


def quick(**changes) -> nn.Module:
    torch.manual_seed(0)
    options = {"in_channels": 1, "out_channels": 12, "kernel_size": 3, **changes}
    return quicken(nn.Conv2d(**options))


class TestGreyConv2d:
    @given(
        batch=st.integers(1, 3),
        side=st.tuples(st.integers(5, 9), st.integers(5, 9)),
        kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        bias=st.booleans(),
    )
    def test_is_a_convolution(self, batch, side, kernel, stride, padding, bias):
        layer = quick(kernel_size=kernel, stride=stride, padding=padding, bias=bias).double()
        x = torch.from_numpy(np.random.default_rng(0).normal(size=(batch, 1, *side)))
        w = layer.weight.detach().numpy()
        padded = np.pad(x.numpy()[:, 0], [(0, 0), *((p, p) for p in padding)])
        height, width = ((padded.shape[i + 1] - kernel[i]) // stride[i] + 1 for i in (0, 1))
        expected = np.empty((batch, 12, height, width))
        for i in range(height):
            for j in range(width):
                top, left = i * stride[0], j * stride[1]
                patch = padded[:, top : top + kernel[0], left : left + kernel[1]]
                expected[:, :, i, j] = np.einsum("bij,oij->bo", patch, w[:, 0])
        if bias:
            expected += layer.bias.detach().numpy()[:, None, None]
        assert type(layer) is GreyConv2d
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)

    def test_has_its_gradient(self):
        layer = quick(padding=1).double()
        x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 4, 5)))
        arguments = (x.requires_grad_(), layer.weight, layer.bias)

        def forward(x, weight, bias):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

        assert torch.autograd.gradcheck(forward, arguments)

    def test_of_many_clients_is_that_of_each(self):
        layer = quick(padding=1)
        x, weights = torch.randn(3, 2, 1, 6, 6), torch.randn(3, 12, 1, 3, 3)

        def forward(x, weight):
            return torch.func.functional_call(layer, {"weight": weight}, (x,))

        found = vmap(forward)(x, weights)
        expected = torch.stack([forward(*one) for one in zip(x, weights, strict=True)])
        torch.testing.assert_close(found, expected)

    def test_puts_channels_innermost(self):
        y = quick()(torch.zeros(2, 1, 6, 6))
        assert y.is_contiguous(memory_format=torch.channels_last)

    def test_leaves_many_patches_to_pytorch(self, monkeypatch):
        layer, x = quick(), torch.randn(2, 1, 6, 6)
        expected = layer(x)
        monkeypatch.setattr(GreyConv2d, "MOST_PIXELS", 0)
        monkeypatch.setattr(torch.Tensor, "unfold", None)
        torch.testing.assert_close(layer(x), expected)

    @pytest.mark.parametrize(
        "changes",
        [
            {"in_channels": 3},
            {"out_channels": 8},
            {"dilation": 2},
            {"padding": "same"},
            {"padding": 1, "padding_mode": "reflect"},
        ],
        ids=str,
    )
    def test_other_layers_stay_as_they_are(self, changes):
        assert type(quick(**changes)) is nn.Conv2d

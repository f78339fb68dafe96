"""Memory layouts change no values, and rows are taken as indexing takes them."""

import numpy as np
import pytest
import torch

from fedsim.models.layers import channels_last, take

SHAPES = [(5, 1, 4, 6), (5, 3, 4, 6), (5, 1, 1, 1), (5, 8), (5,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_last_keeps_values_and_puts_channels_innermost(shape):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=shape))
    found = channels_last(x)
    assert torch.equal(found, x)
    if x.dim() == 4:
        _, channels, height, width = shape
        assert found.stride() == (height * width * channels, 1, width * channels, channels)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["as it is", "channels last"])
def test_rows_are_those_of_indexing_in_the_same_layout(shape, layout):
    x = layout(torch.arange(int(np.prod(shape))).reshape(shape))
    index = torch.tensor([3, 0, 3])
    found = take(x, index)
    assert found.tolist() == x.numpy()[[3, 0, 3]].tolist()
    assert found.stride() == x.stride()

"""Facts about the training data, and data that have none."""

import numpy as np
import pytest

from fedsim.data import partition
from fedsim.data.federate import federate
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.errors import DataError


def statistics(x, **changes):
    y = np.arange(len(x)) % 2
    source = Source(name="toy", x_train=x, y_train=y, x_test=x, y_test=y, num_classes=2, **changes)
    return Statistics.of(federate(source, num_clients=1, partition=partition.iid))


def column(scale):
    """Two features: the second has the standard deviation `scale`."""
    signs = np.array([[1, -1], [2, 1], [1, -1], [2, 1]])
    return (signs * np.array([1.0, scale])).astype(np.float32)


@pytest.mark.parametrize("scale", [0.0, 2e-38, 1.0, 1e38])
def test_deviations_that_can_be_divided_by(scale):
    expected = 1.0 if scale == 0 else scale
    np.testing.assert_allclose(statistics(column(scale)).std, [0.5, expected], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-44])
def test_a_deviation_that_is_too_small(scale):
    with pytest.raises(DataError, match=r"^toy: feature 1 of x_train has .* at least 1\.2e-38"):
        statistics(column(scale))
    assert statistics(column(scale), normalise=False).std.tolist() == [1, 1]


def test_a_channel_whose_deviation_is_too_small():
    x = np.moveaxis(column(1e-40).reshape(4, 1, 1, 2), 3, 1)
    with pytest.raises(DataError, match="toy: channel 1 of x_train has a standard deviation"):
        statistics(np.ascontiguousarray(x))

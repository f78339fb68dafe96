import numpy as np
import pytest

from fedsim import registry
from fedsim.engine.memory import client_bytes
from fedsim.models import Net
from fedsim.models.small import cnn, mlp

HIDDEN, FEATURES, CLASSES = 1000, 16, 3
WEIGHTS = 4 * (HIDDEN * (FEATURES + 1) + CLASSES * (HIDDEN + 1))


def of_batch(size):
    net = Net(mlp((1, 4, 4), CLASSES, hidden=(HIDDEN,)))
    return client_bytes(net, net.initial_weights(), size, (1, 4, 4))


def test_what_a_client_takes_grows_with_its_batch_and_not_its_weights():
    one, ten, hundred = of_batch(1), of_batch(10), of_batch(100)

    assert hundred - ten == 10 * (ten - one) > 0


def test_an_mlps_hidden_layer_is_kept_once_or_twice():
    activations = (of_batch(100) - 5 * WEIGHTS) / 2  # a CUDA graph has some of its own

    hidden = 4 * 100 * HIDDEN  # after ReLU; the next layer may keep it, too
    assert hidden <= activations <= 2.2 * hidden


@pytest.mark.parametrize("name", registry.names("client"))
def test_of_every_method_whatever_its_heads(name):
    method = registry.find("client", name)()
    net = Net(cnn((1, 8, 8), 3, norm="batch"))
    w = method.initial(net, net.initial_weights(), np.random.default_rng(0))
    assert client_bytes(net, w, 8, (1, 8, 8)) > 5 * sum(4 * array.numel() for array in w.values())

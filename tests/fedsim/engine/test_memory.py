import gc
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import clients
from fedsim import registry
from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.data.source import Source
from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.memory import client_bytes
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import LocalSGD
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


def peak(method, count):
    """Return the most bytes that so many clients take at a time, of whom all have trained before.

    And what is known beforehand of one of them.
    """
    torch.manual_seed(0)
    shape, y = (1, 4, 4), np.arange(48) % CLASSES
    x = np.random.default_rng(0).integers(0, 256, (48, *shape), dtype=np.uint8)
    source = Source(name="noise", x_train=x, y_train=y, x_test=x, y_test=y, num_classes=CLASSES)
    federation = federate(source, num_clients=12, partition=iid)
    net = Net(mlp(shape, CLASSES, hidden=(HIDDEN, 200)))
    w = method.initial(net, net.initial_weights(), np.random.default_rng(0))
    training = LocalTraining(epochs=1, batch_size=2, lr=0.01)
    trainer = LocalTrainer(net, federation, Statistics.of(federation), training, 0, True)
    first = trainer.update_all(method, w, trainer.clients(1, range(count)))
    states = [upload.state for upload, _ in first]
    del first
    gc.collect()  # what earlier tests left must not be freed in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        them = [
            replace(client, state={name: tensor.clone() for name, tensor in state.items()})
            for client, state in zip(trainer.clients(2, range(count)), states, strict=True)
        ]
        trained = trainer.update_all(method, w, them)
    assert len(trained) == count
    assert trainer.stacked
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes)), client_bytes(net, w, 2, shape)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "ditto"])
def test_clients_take_no_more_than_was_reckoned_with_for_them(name):
    """Of SCAFFOLD its control, correction and change; Ditto's second model is in the free half."""
    method = {"fedavg": LocalSGD(), "scaffold": clients.Scaffold(), "ditto": clients.Ditto()}[name]
    count = 12
    most, one = peak(method, count)
    room = 2 * one if name == "ditto" else one
    # Not next to nothing, as if the profiler had seen nothing.
    assert one / 10 < most / count < room

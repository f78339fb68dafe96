"""SCAFFOLD's client against a plain loop, in which c_i+ is the mean of the gradients themselves."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clients import Scaffold
from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Examples, LocalSGD
from fedsim.models import Net
from fedsim.models.small import cnn
from fedsim.rng import generator

CLIENT, SEED = 1, 3
# 12 labelled examples: an epoch is two steps.
TRAINING = LocalTraining(epochs=3, batch_size=6, lr=0.05, lr_decay=0.5, rounds=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return cnn((1, 4, 4), 3, channels=(6, 4), norm="batch")


def update(model, federation, w, round, state=None, method=None, training=TRAINING):
    trainer = LocalTrainer(Net(model), federation, Statistics.of(federation), training, SEED)
    return trainer.update(method or Scaffold(), w, CLIENT, round, state)[0]


def beginning(model):
    net = Net(model)
    return Scaffold().initial(net, net.initial_weights(), np.random.default_rng(0))


def plain(model, federation, x, c, c_i, round, training=TRAINING):
    """Return y_i, with its statistics, the mean of the g_i, by parameter, and of the losses."""
    module = copy.deepcopy(model).train()
    module.load_state_dict(x, strict=False)
    p = dict(module.named_parameters())
    sums = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    loader = Loader(federation, Statistics.of(federation), training.batch_size, "none")
    rng = generator(SEED, "pass 0.0", round=round, client=CLIENT)
    losses = []
    lr = training.lr * training.lr_decay ** (round - 1)
    for batch, y in loader.batches(Examples(federation.labelled(CLIENT), True), rng, 6, False):
        loss = F.cross_entropy(module(batch.x), y)
        losses.append(loss.item())
        loss = loss + training.weight_decay / 2 * sum(t.square().sum() for t in p.values())
        gradients = torch.autograd.grad(loss, list(p.values()))
        with torch.no_grad():
            for name, g in zip(p, gradients, strict=True):
                sums[name] += g
                p[name] -= lr * (g - c_i[name] + c[name])
    means = {name: total / 6 for name, total in sums.items()}
    return module.state_dict(), means, np.mean(losses)


def assert_weights(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-4, atol=1e-5)


def control(w):
    return {f"control.{name}": tensor for name, tensor in w.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_two_rounds_equal_plain_loops(model, federation, weight_decay):
    training = replace(TRAINING, weight_decay=weight_decay)
    w = beginning(model)
    x = {name: t for name, t in w.items() if not name.startswith("control.")}
    zero = {name: torch.zeros_like(t) for name, t in model.named_parameters()}
    first = update(model, federation, w, 1, training=training)
    y_i, c_i, _ = plain(model, federation, x, zero, zero, 1, training)
    assert_weights(first.arrays["arrays"], {name: y_i[name] for name in x})
    assert_weights(first.arrays["control"], control(c_i))  # from c_i = c = 0
    assert_weights(first.state, control(c_i))

    # In the meantime others have trained, too: any c, as large as gradients are.
    draw = torch.Generator().manual_seed(1)
    c = {name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in c_i.items()}
    second = update(model, federation, {**x, **control(c)}, 2, first.state, training=training)
    y_i, new, loss = plain(model, federation, x, c, c_i, 2, training)
    assert_weights(second.arrays["arrays"], {name: y_i[name] for name in x})
    assert_weights(second.state, control(new))
    assert_weights(second.arrays["control"], control({n: new[n] - c_i[n] for n in new}))
    assert second.num_examples == 12
    assert second.metrics["has_labels"] == 1.0
    assert second.metrics["train_loss"] == pytest.approx(loss, rel=1e-4)


def test_there_is_a_control_variate_for_each_trainable_array_zero_at_first(model):
    w = beginning(model)
    found = {name: t for name, t in w.items() if name.startswith("control.")}
    assert set(found) == set(control(dict(model.named_parameters())))
    assert Net(model).buffers <= set(w)  # which have none
    for name, tensor in found.items():
        assert tensor.shape == w[name.removeprefix("control.")].shape
        assert not tensor.any()


def test_the_first_round_is_fedavgs(model, federation):
    found = update(model, federation, beginning(model), 1)
    plain = update(model, federation, Net(model).initial_weights(), 1, method=LocalSGD())
    for name, tensor in plain.arrays["arrays"].items():
        assert torch.equal(found.arrays["arrays"][name], tensor)
    assert found.metrics["train_loss"] == plain.metrics["train_loss"]


def test_a_client_without_labels_uploads_the_model_and_no_change(model, source):
    federation = federate(source, num_clients=4, partition=iid, labelled=0.0)
    w = beginning(model)
    w |= {name: t + 1 for name, t in w.items() if name.startswith("control.")}
    upload = update(model, federation, w, 1)
    assert upload.num_examples == upload.metrics["has_labels"] == 0
    assert upload.state == {}
    for name, tensor in upload.arrays["arrays"].items():
        assert torch.equal(tensor, w[name])
    assert set(upload.arrays["control"]) == {name for name in w if name.startswith("control.")}
    assert not any(tensor.any() for tensor in upload.arrays["control"].values())


def test_where_the_learning_rate_has_fallen_to_zero_nothing_changes(model, federation):
    """As after the last round of a cosine, in Flower's own runtime."""
    state = update(model, federation, beginning(model), 1).state
    training = replace(TRAINING, lr_decay=1.0, lr_schedule="cosine")
    upload = update(model, federation, beginning(model), 3, state, training=training)
    assert not any(tensor.any() for tensor in upload.arrays["control"].values())
    assert_weights(upload.state, state)


def test_momentum_is_warned_of_and_weight_decay_is_not():
    with pytest.warns(UserWarning, match=r"training\.momentum = 0\.9: SCAFFOLD's control"):
        Scaffold().warn_of(replace(TRAINING, momentum=0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Scaffold().warn_of(replace(TRAINING, weight_decay=0.1))

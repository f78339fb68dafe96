"""CReFF's client: FedAvg's model, and class gradients against automatic differentiation."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clients.creff import CReFF
from fedsim.data.federate import federate
from fedsim.data.partition import client_dirichlet
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Examples, Inputs, LocalSGD
from fedsim.models import Net
from fedsim.models.small import cnn
from fedsim.rng import generator

LR, MOMENTUM, BATCH, EPOCHS, SEED, CLIENT, ROUND = 0.1, 0.5, 5, 3, 3, 1, 2
METHOD = CReFF()


@pytest.fixture
def model():
    """With running statistics that are not those of a fresh model."""
    torch.manual_seed(0)
    made = cnn((1, 4, 4), 3, channels=(6,), norm="batch")
    for name, buffer in made.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return made


@pytest.fixture
def skewed(source):
    """Three clients, client 1 without examples of some class."""
    federation = federate(
        source, num_clients=3, partition=client_dirichlet, options={"alpha": 0.2}, seed=4
    )
    counts = np.bincount(source.y_train[federation.labelled(CLIENT)], minlength=3)
    assert (counts == 0).any()
    assert (counts > 0).sum() == 2
    return federation


def initial(model):
    """With a re-trained classifier that is not the head."""
    net = Net(model)
    w = METHOD.initial(net, net.initial_weights(), np.random.default_rng(0))
    draw = torch.Generator().manual_seed(7)
    for part in ("weight", "bias"):
        w[f"retrained.{part}"] += 0.1 * torch.randn(w[f"retrained.{part}"].shape, generator=draw)
    return w


def train(model, federation, method=METHOD, **settings):
    defaults = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "momentum": MOMENTUM}
    training = LocalTraining(**{**defaults, **settings})
    trainer = LocalTrainer(Net(model), federation, Statistics.of(federation), training, SEED)
    return trainer.update(method, initial(model), CLIENT, ROUND)[0]


def test_the_re_trained_classifier_starts_as_the_head(model):
    net = Net(model)
    w = METHOD.initial(net, net.initial_weights(), np.random.default_rng(0))
    for part in ("weight", "bias"):
        assert torch.equal(w[f"retrained.{part}"], w[f"head.{part}"])
        assert w[f"retrained.{part}"] is not w[f"head.{part}"]


def test_the_model_is_trained_as_a_plain_loop_does(model, skewed):
    upload = train(model, skewed)
    plain = copy.deepcopy(model).train()
    optimiser = torch.optim.SGD(plain.parameters(), lr=LR, momentum=MOMENTUM)
    loader = Loader(skewed, Statistics.of(skewed), BATCH, "none")
    rng = generator(SEED, "pass 0.0", round=ROUND, client=CLIENT)
    index = skewed.labelled(CLIENT)
    steps = EPOCHS * -(-len(index) // BATCH)
    for batch, y in loader.batches(Examples(index, True), rng, steps, False):
        optimiser.zero_grad()
        F.cross_entropy(plain(batch.x), y).backward()
        optimiser.step()
    sent = upload.arrays["arrays"]
    assert set(sent) == set(plain.state_dict())  # not the re-trained classifier
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-5, atol=1e-5)
    assert upload.state == {}
    assert upload.num_examples == len(index)


def test_the_model_does_not_notice_the_gradients(model, skewed):
    """CReFF's clients train as FedAvg's do, to the last bit."""
    ours, plain = train(model, skewed), train(model, skewed, LocalSGD())
    assert ours.metrics == plain.metrics
    for name, tensor in plain.arrays["arrays"].items():
        assert torch.equal(ours.arrays["arrays"][name], tensor)


# One epoch of the training must not change them; nor must anything of the optimiser.
@pytest.mark.parametrize("settings", [{}, {"epochs": 1, "lr": 0.5, "weight_decay": 0.1}])
def test_gradients_are_the_means_over_a_class_at_the_received_model(
    model, skewed, source, settings
):
    sent = train(model, skewed, **settings).arrays["gradients"]
    w = initial(model)
    backbone = copy.deepcopy(model.backbone).eval()
    classifier = nn.Linear(24, 3)
    classifier.load_state_dict({p: w[f"retrained.{p}"] for p in ("weight", "bias")})
    index = skewed.labelled(CLIENT)
    loader = Loader(skewed, Statistics.of(skewed), BATCH, "none")
    x, y = loader.inputs(Examples(index, True)), torch.from_numpy(source.y_train[index])
    for c in range(3):
        own = y == c
        assert sent["gradients.has"][c] == float(own.any())
        if not own.any():
            assert not sent["gradients.weight"][c].any()
            assert not sent["gradients.bias"][c].any()
            continue
        loss = F.cross_entropy(classifier(backbone(x[own]).detach()), y[own])
        weight, bias = torch.autograd.grad(loss, list(classifier.parameters()))
        torch.testing.assert_close(sent["gradients.weight"][c], weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sent["gradients.bias"][c], bias, rtol=1e-5, atol=1e-6)
    assert set(sent) == {"gradients.weight", "gradients.bias", "gradients.has"}


def test_a_client_without_labels_has_no_gradients(model, source):
    federation = federate(
        source, num_clients=3, partition=client_dirichlet, options={"alpha": 0.2}, labelled=0.0
    )
    upload = train(model, federation)
    assert upload.num_examples == 0
    assert not any(tensor.any() for tensor in upload.arrays["gradients"].values())
    assert all(tensor.isfinite().all() for tensor in upload.arrays["gradients"].values())


def test_the_generic_view_is_the_re_trained_classifier(model):
    net, w = Net(model), initial(model)
    f = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    found = METHOD.generic(net, w, Inputs(f, lambda: pytest.fail("the inputs aren't needed")))
    weight, bias = (w[f"retrained.{part}"].double().numpy() for part in ("weight", "bias"))
    assert list(found) == list(METHOD.views) == ["generic"]
    expected = f.double().numpy() @ weight.T + bias
    np.testing.assert_allclose(found["generic"].numpy(), expected, rtol=1e-4, atol=1e-5)

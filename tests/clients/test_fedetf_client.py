"""FedETF's client and view against a plain loop and NumPy, written from the formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clients.fedetf import FedETF
from fedsim.data.federate import federate
from fedsim.data.partition import client_dirichlet
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Examples, Inputs
from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.etf import geometry
from fedsim.models.small import cnn
from fedsim.rng import generator

LR, MOMENTUM, BATCH, EPOCHS, SEED, CLIENT, ROUND = 0.1, 0.5, 5, 3, 3, 1, 2
METHOD = FedETF(projection=5, gamma=0.7, temperature=2.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return cnn((1, 4, 4), 3, channels=(6,), norm="batch")


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


def initial(model, method=METHOD):
    net = Net(model)
    return method.initial(net, net.initial_weights(), np.random.default_rng(0))


def train(model, federation, method=METHOD):
    training = LocalTraining(epochs=EPOCHS, batch_size=BATCH, lr=LR, momentum=MOMENTUM)
    trainer = LocalTrainer(Net(model), federation, Statistics.of(federation), training, SEED)
    return trainer.update(method, initial(model, method), CLIENT, ROUND)[0]


def test_the_server_starts_with_an_etf_of_unit_norms_on_the_projected_features(model):
    w = initial(model)
    found = geometry(w["etf.weight"])
    assert (found.norm_min, found.norm_max) == pytest.approx((1, 1), rel=1e-5)
    assert (found.angle_min, found.angle_max) == pytest.approx((120, 120), abs=0.01)
    assert w["etf.weight"].shape == (3, 5)
    assert w["temperature.beta"].tolist() == [2.0]
    # torch.nn.Linear's own start: uniform in +-1/sqrt(24).
    assert w["projection.weight"].shape == (5, 24)
    drawn = torch.cat([w["projection.weight"].flatten(), w["projection.bias"]])
    assert drawn.abs().max() <= 1 / math.sqrt(24)
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(24 * 3), rel=0.1)
    assert not any(name.startswith("head.") for name in w)


def test_the_projection_is_as_wide_as_there_are_classes_unless_told(model):
    assert initial(model, FedETF())["projection.weight"].shape == (3, 24)


def test_a_model_with_fewer_features_than_classes_will_do():
    narrow = cnn((1, 4, 4), 3, channels=(2,), hidden=2)
    assert geometry(initial(narrow, FedETF())["etf.weight"]).angle_min == pytest.approx(120)


def test_update_equals_a_plain_loop_over_the_balanced_feature_loss(model, skewed, source):
    w, upload = initial(model), train(model, skewed)

    backbone = copy.deepcopy(model.backbone).train()
    projection = nn.Linear(24, 5)
    projection.load_state_dict({p: w[f"projection.{p}"].clone() for p in ("weight", "bias")})
    beta = nn.Parameter(torch.tensor(2.0))
    index = skewed.labelled(CLIENT)
    counts = np.bincount(source.y_train[index], minlength=3)
    sizes = torch.tensor([max(count, 1) ** 0.7 for count in counts])  # n^gamma, absent: 1
    optimiser = torch.optim.SGD(
        [*backbone.parameters(), *projection.parameters(), beta], lr=LR, momentum=MOMENTUM
    )
    loader = Loader(skewed, Statistics.of(skewed), BATCH, "none")
    rng = generator(SEED, "pass 0.0", round=ROUND, client=CLIENT)
    steps = EPOCHS * -(-len(index) // BATCH)
    for batch, y in loader.batches(Examples(index, True), rng, steps, False):
        g = projection(backbone(batch.x))
        h = g / g.square().sum(1, keepdim=True).sqrt()
        terms = sizes * (beta * h @ w["etf.weight"].T).exp()
        loss = -(terms[torch.arange(len(y)), y] / terms.sum(1)).log().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    expected = {f"backbone.{n}": t for n, t in backbone.state_dict().items()}
    expected |= {f"projection.{n}": t for n, t in projection.state_dict().items()}
    expected |= {"temperature.beta": beta.detach().reshape(1)}
    sent = upload.arrays["arrays"]
    assert set(sent) == set(expected)  # neither the ETF nor a linear head
    for name, tensor in expected.items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-5, atol=1e-5)
    assert not torch.equal(sent["temperature.beta"], w["temperature.beta"])
    assert upload.state == {}
    assert upload.num_examples == len(index)
    assert np.isfinite(upload.metrics["train_loss"])


def test_gamma_0_is_plain_cross_entropy(model, skewed):
    net, method = Net(model), FedETF(gamma=0.0)
    w = initial(model, method)
    loader = Loader(skewed, Statistics.of(skewed), BATCH, "none")
    examples = Examples(skewed.labelled(CLIENT), True)
    batch, y = next(loader.batches(examples, np.random.default_rng(0), 1, False))
    loss, _ = method.loss(net, w, batch, {"class_counts": torch.tensor([5.0, 0.0, 2.0])})
    torch.testing.assert_close(loss, F.cross_entropy(method.logits(net, w, batch.x)[0], y))


def test_the_generic_view(model):
    net, w = Net(model), initial(model)
    f = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    found = METHOD.generic(net, w, Inputs(f, lambda: pytest.fail("the inputs aren't needed")))
    arrays = {name: tensor.double().numpy() for name, tensor in w.items()}
    g = f.double().numpy() @ arrays["projection.weight"].T + arrays["projection.bias"]
    h = g / np.sqrt((g**2).sum(1, keepdims=True))
    assert list(found) == list(METHOD.views) == ["generic"]
    np.testing.assert_allclose(
        found["generic"].numpy(), 2 * h @ arrays["etf.weight"].T, rtol=1e-4, atol=1e-5
    )


def test_as_a_teacher_it_predicts_what_the_view_does(model):
    net, w = Net(model), initial(model)
    x = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    view = METHOD.generic(net, w, Inputs(net.predict_features(w, x), lambda: x))["generic"]
    torch.testing.assert_close(METHOD.teacher(net, w, x), view)


class TestFedETFFailure:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"projection": -1}, "method.projection = -1"),
            ({"gamma": -0.5}, "method.gamma = -0.5"),
            ({"temperature": 0.0}, "method.temperature = 0.0"),
            ({"temperature": math.inf}, "method.temperature = inf"),
        ],
    )
    def test_hyperparameters_out_of_range(self, options, message):
        with pytest.raises(ConfigError, match=message):
            FedETF(**options)

    def test_a_projection_narrower_than_the_classes(self, model):
        with pytest.raises(ConfigError, match=r"method.projection = 2: .* at least 3"):
            initial(model, FedETF(projection=2))

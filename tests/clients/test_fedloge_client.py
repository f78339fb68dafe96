"""FedLoGe's client, views and aggregation against plain loops written from the formulas."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clients import FedLabelFedLoGe, FedLoGe, FedRoD
from fedsim.data.federate import federate
from fedsim.data.partition import client_dirichlet, iid
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Client, Examples, Inputs
from fedsim.errors import ConfigError
from fedsim.models import Net, parts
from fedsim.models.etf import geometry
from fedsim.models.small import cnn, linear
from fedsim.rng import generator
from tests.clients.conftest import TRAINING

LR, MOMENTUM, BATCH, EPOCHS, SEED, CLIENT, ROUND = 0.1, 0.5, 5, 3, 3, 1, 2
METHOD = FedLoGe(sparsity=0.3)


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


def trainer_of(model, federation):
    training = LocalTraining(epochs=EPOCHS, batch_size=BATCH, lr=LR, momentum=MOMENTUM)
    return LocalTrainer(Net(model), federation, Statistics.of(federation), training, SEED)


def initial(model):
    net = Net(model)
    return METHOD.initial(net, net.initial_weights(), np.random.default_rng(0))


def some_state(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "personal.weight": torch.randn(3, 24, generator=draw),
        "personal.bias": torch.randn(3, generator=draw),
    }


def test_the_server_starts_with_a_sparse_etf(model):
    w = initial(model)
    found = geometry(w["etf.weight"])
    assert found.norm_mean == pytest.approx(0.1, rel=1e-5)
    assert found.sparsity == pytest.approx(0.3, abs=0.01)
    assert found.angle_min == pytest.approx(120, abs=0.01)
    assert "etf.bias" not in w


def test_update_equals_a_plain_loop_over_three_heads(model, skewed):
    w, state = initial(model), some_state(1)
    upload, _ = trainer_of(model, skewed).update(METHOD, w, CLIENT, ROUND, state)

    backbone = copy.deepcopy(model.backbone).train()
    aux = copy.deepcopy(model.head)
    personal = copy.deepcopy(model.head)
    personal.load_state_dict({n.removeprefix("personal."): t for n, t in state.items()})
    # Three optimisers, as the authors have: momentum doesn't mix either.
    optimisers = [
        torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM)
        for module in (backbone, aux, personal)
    ]
    loader = Loader(skewed, Statistics.of(skewed), BATCH, "none")
    rng = generator(SEED, "pass 0.0", round=ROUND, client=CLIENT)
    index = skewed.labelled(CLIENT)
    steps = EPOCHS * -(-len(index) // BATCH)
    for batch, y in loader.batches(Examples(index, True), rng, steps, False):
        f = backbone(batch.x)
        losses = [
            F.cross_entropy(f @ w["etf.weight"].T, y),
            F.cross_entropy(aux(f.detach()), y),
            F.cross_entropy(personal(f.detach()), y),
        ]
        for optimiser, loss in zip(optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    expected = {f"backbone.{n}": t for n, t in backbone.state_dict().items()}
    expected |= {f"head.{n}": t for n, t in aux.state_dict().items()}
    sent = upload.arrays["arrays"]
    assert set(sent) == set(expected)  # neither the ETF nor the personal head leaves the client
    for name, tensor in expected.items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-5, atol=1e-5)
    assert set(upload.state) == {"personal.weight", "personal.bias"}
    for name, tensor in personal.state_dict().items():
        torch.testing.assert_close(upload.state[f"personal.{name}"], tensor, rtol=1e-5, atol=1e-5)
    assert upload.num_examples == len(index)


def test_the_heads_do_not_train_the_backbone(model, skewed):
    """Whatever the auxiliary and personal heads are, the backbone comes out the same."""
    w = initial(model)
    trainer = trainer_of(model, skewed)
    one, _ = trainer.update(METHOD, w, CLIENT, ROUND, some_state(1))
    other_w = {**w, "head.weight": w["head.weight"] * 50 + 1}
    other, _ = trainer.update(METHOD, other_w, CLIENT, ROUND, some_state(2))
    for name, tensor in parts(one.arrays["arrays"], ["backbone"]).items():
        assert torch.equal(tensor, other.arrays["arrays"][name])
    assert not torch.equal(one.arrays["arrays"]["head.bias"], other.arrays["arrays"]["head.bias"])
    # And the personal head doesn't touch the auxiliary one.
    third, _ = trainer.update(METHOD, w, CLIENT, ROUND, some_state(2))
    assert torch.equal(one.arrays["arrays"]["head.bias"], third.arrays["arrays"]["head.bias"])
    assert not torch.equal(one.state["personal.bias"], third.state["personal.bias"])


def test_a_first_round_starts_the_personal_head_from_the_auxiliary_one(model, skewed):
    """Both see the same batches and losses, so they stay equal."""
    upload, _ = trainer_of(model, skewed).update(METHOD, initial(model), CLIENT, ROUND)
    sent = upload.arrays["arrays"]
    torch.testing.assert_close(upload.state["personal.weight"], sent["head.weight"])


def views(model, counts, state=None, unlabelled=0):
    """The views by the engine's calls, and what the test needs to work them out in NumPy."""
    net, w = Net(model), initial(model)
    f = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    labelled = Examples(np.arange(int(sum(counts))), True)
    unlabelled = Examples(np.arange(unlabelled), False)
    n_k, kept = torch.tensor(counts), state or {}
    client = Client(0, 3, labelled, unlabelled, n_k, kept, training=TRAINING, seed=0)
    inputs = Inputs(f, lambda: pytest.fail("the inputs aren't needed"))
    found = METHOD.generic(net, w, inputs)
    found |= METHOD.personal(net, METHOD.begin(w, client), client, inputs)
    arrays = {name: tensor.double().numpy() for name, tensor in (w | (state or {})).items()}
    return {name: logits.numpy() for name, logits in found.items()}, f.double().numpy(), arrays


def test_the_four_views(model):
    counts = [4.0, 0.0, 1.0]
    found, f, w = views(model, counts, some_state(1))
    w_aux, b_aux, w_k, b_k = (
        w[name] for name in ("head.weight", "head.bias", "personal.weight", "personal.bias")
    )
    aux = f @ w_aux.T + b_aux
    realigned = np.stack([1.7 * row / np.sqrt((row**2).sum()) for row in w_aux])
    scaled = np.stack([row * np.sqrt((own**2).sum()) for row, own in zip(w_aux, w_k, strict=True)])
    expected = {
        "generic": f @ w["etf.weight"].T,
        "generic-realigned": f @ realigned.T + b_aux,
        "personal": f @ w_k.T + b_k + aux,
        "personal-realigned": f @ scaled.T + b_k + aux,
    }
    assert list(found) == list(METHOD.views)
    for view, logits in expected.items():
        if view.startswith("personal"):
            assert (found[view][:, 1] == -np.inf).all()  # the client has no example of class 1
            logits[:, 1] = -np.inf
        np.testing.assert_allclose(found[view], logits, rtol=1e-4, atol=1e-5)


def test_a_client_that_never_trained_predicts_as_the_auxiliary_head_among_its_classes(model):
    found, f, w = views(model, [1.0, 0.0, 2.0])
    logits = f @ w["head.weight"].T + w["head.bias"]
    expected = np.array([0, 2])[logits[:, [0, 2]].argmax(1)]
    np.testing.assert_array_equal(found["personal"].argmax(1), expected)


@pytest.mark.parametrize(
    ("counts", "unlabelled"),
    [([0.0, 0.0, 0.0], 0), ([0.0, 0.0, 0.0], 2), ([4.0, 0.0, 1.0], 1)],
)
def test_what_may_be_of_any_class_masks_none(model, counts, unlabelled):
    """Nor has a client without any example classes to choose among."""
    found, f, w = views(model, counts, unlabelled=unlabelled)
    aux = f @ w["head.weight"].T + w["head.bias"]
    np.testing.assert_allclose(found["personal"], 2 * aux, rtol=1e-4, atol=1e-5)
    assert np.isfinite(found["personal-realigned"]).all()


@pytest.mark.parametrize(
    "method",
    [METHOD, FedRoD(), FedLabelFedLoGe(warmup_rounds=0, threshold=0.0, sparsity=0.3)],
    ids=["fedloge", "fedrod", "fedlabel-fedloge"],
)
def test_a_personal_head_that_no_label_has_trained_is_not_kept(model, source, method):
    """It would stay an early round's global head while the global one goes on."""
    federation = federate(source, num_clients=2, partition=iid, labelled=0.0)
    upload, _ = trainer_of(model, federation).update(method, initial(model), 0, ROUND)
    assert upload.state == {}


class TestFedLoGeFailure:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 1.0}, "method.sparsity = 1.0"),
            ({"sparsity": -0.1}, "method.sparsity = -0.1"),
            ({"etf_norm": 0.0}, "method.etf_norm = 0.0: must be from 1e-6 to 1e6"),
            ({"etf_norm": 1e7}, "method.etf_norm = 10000000.0"),
            ({"realigned_norm": 0.0}, "method.realigned_norm = 0.0"),
        ],
    )
    def test_hyperparameters_out_of_range(self, options, message):
        with pytest.raises(ConfigError, match=message):
            FedLoGe(**options)

    @pytest.mark.parametrize("method", [METHOD, FedLabelFedLoGe()])
    def test_a_model_of_which_the_fixed_classifier_trains_nothing(self, method):
        net = Net(linear((1, 4, 4), 3))
        with pytest.raises(ConfigError, match="shares the layers before the head, and this model"):
            method.initial(net, net.initial_weights(), np.random.default_rng(0))

    def test_a_model_with_fewer_features_than_classes(self):
        net = Net(cnn((1, 4, 4), 3, channels=(2,), hidden=2))
        with pytest.raises(ConfigError, match="features"):
            METHOD.initial(net, net.initial_weights(), np.random.default_rng(0))

"""FedRoD's client and views against plain loops written from the formulas."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clients.fedrod import FedRoD
from fedsim.data.federate import federate
from fedsim.data.partition import client_dirichlet
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Batch, Client, Examples, Inputs
from fedsim.models import Net, parts
from fedsim.models.small import cnn
from fedsim.rng import generator
from tests.clients.conftest import TRAINING

LR, MOMENTUM, BATCH, EPOCHS, SEED, CLIENT, ROUND = 0.1, 0.5, 5, 3, 3, 1, 2
METHOD = FedRoD()


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


def some_state(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "personal.weight": torch.randn(3, 24, generator=draw),
        "personal.bias": torch.randn(3, generator=draw),
    }


def balanced_softmax(logits, y, counts):
    """-log(n_y e^(z_y) / sum_c n_c e^(z_c)), as the paper writes it."""
    terms = counts * logits.exp()
    return -(terms[torch.arange(len(y)), y] / terms.sum(1)).log().mean()


def test_update_equals_a_plain_loop_over_two_losses(model, skewed, source):
    w, state = Net(model).initial_weights(), some_state(1)
    upload, _ = trainer_of(model, skewed).update(METHOD, w, CLIENT, ROUND, state)

    backbone = copy.deepcopy(model.backbone).train()
    generic = copy.deepcopy(model.head)
    personal = copy.deepcopy(model.head)
    personal.load_state_dict({n.removeprefix("personal."): t for n, t in state.items()})
    index = skewed.labelled(CLIENT)
    counts = torch.from_numpy(np.bincount(source.y_train[index], minlength=3))
    shared = [*backbone.parameters(), *generic.parameters()]
    # Two optimisers, as in the public implementations: momentum doesn't mix either.
    optimisers = [
        torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)
        for parameters in (shared, personal.parameters())
    ]
    loader = Loader(skewed, Statistics.of(skewed), BATCH, "none")
    rng = generator(SEED, "pass 0.0", round=ROUND, client=CLIENT)
    steps = EPOCHS * -(-len(index) // BATCH)
    for batch, y in loader.batches(Examples(index, True), rng, steps, False):
        f = backbone(batch.x)
        z = generic(f)
        losses = [
            balanced_softmax(z, y, counts),
            F.cross_entropy(z.detach() + personal(f.detach()), y),
        ]
        for optimiser, loss in zip(optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss.backward()
        for optimiser in optimisers:
            optimiser.step()

    expected = {f"backbone.{n}": t for n, t in backbone.state_dict().items()}
    expected |= {f"head.{n}": t for n, t in generic.state_dict().items()}
    sent = upload.arrays["arrays"]
    assert set(sent) == set(expected)  # the personal head doesn't leave the client
    for name, tensor in expected.items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-5, atol=1e-5)
    assert set(upload.state) == {"personal.weight", "personal.bias"}
    for name, tensor in personal.state_dict().items():
        torch.testing.assert_close(upload.state[f"personal.{name}"], tensor, rtol=1e-5, atol=1e-5)
    assert upload.num_examples == len(index)


def test_the_personal_head_trains_nothing_but_itself(model, skewed):
    w, trainer = Net(model).initial_weights(), trainer_of(model, skewed)
    one, _ = trainer.update(METHOD, w, CLIENT, ROUND, some_state(1))
    other, _ = trainer.update(METHOD, w, CLIENT, ROUND, some_state(2))
    for name, tensor in one.arrays["arrays"].items():
        assert torch.equal(tensor, other.arrays["arrays"][name])
    assert not torch.equal(one.state["personal.bias"], other.state["personal.bias"])


def test_the_generic_loss_leaves_absent_classes_alone(model, skewed, source):
    """Without examples n_c = 0, so the class drops out of the softmax: its row never moves."""
    w = Net(model).initial_weights()
    upload, _ = trainer_of(model, skewed).update(METHOD, w, CLIENT, ROUND, some_state(1))
    counts = np.bincount(source.y_train[skewed.labelled(CLIENT)], minlength=3)
    for part in ("head.weight", "head.bias"):
        moved = (upload.arrays["arrays"][part] != w[part]).reshape(3, -1).any(1).numpy()
        np.testing.assert_array_equal(moved, counts > 0)
    assert all(tensor.isfinite().all() for tensor in upload.arrays["arrays"].values())
    assert np.isfinite(upload.metrics["train_loss"])


def test_padding_labelled_with_an_absent_class_does_not_count(model):
    net = Net(model)
    w = METHOD.begin(net.initial_weights(), client_of([2.0, 1.0, 0.0]))
    w["head.weight"].requires_grad_()
    x = torch.ones(3, 1, 4, 4)  # the same inputs, so that BatchNorm doesn't tell padding apart
    given = {"class_counts": torch.tensor([2.0, 1.0, 0.0])}
    padded, _ = METHOD.loss(
        net, w, Batch(x, torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.0, 0.0])), given
    )
    exact, _ = METHOD.loss(net, w, Batch(x[:2], torch.tensor([0, 1]), torch.ones(2)), given)
    torch.testing.assert_close(padded, exact)
    (slope,) = torch.autograd.grad(padded, w["head.weight"])
    assert slope.isfinite().all()


def client_of(counts, state=None):
    none = Examples(np.array([], dtype=np.int64), True)
    counts = torch.tensor(counts)
    return Client(0, 3, none, none, counts, state or {}, training=TRAINING, seed=0)


def test_a_first_round_starts_the_personal_head_from_the_generic_one(model):
    w = Net(model).initial_weights()
    w_m = METHOD.begin(w, client_of([1.0, 0.0, 0.0]))
    for part in ("weight", "bias"):
        assert torch.equal(w_m[f"personal.{part}"], w[f"head.{part}"])
    assert torch.equal(parts(w_m, ["head"])["head.bias"], w["head.bias"])


def test_the_two_views(model):
    net, state = Net(model), some_state(1)
    w, client = net.initial_weights(), client_of([4.0, 0.0, 1.0], state)
    f = torch.randn(7, 24, generator=torch.Generator().manual_seed(5))
    inputs = Inputs(f, lambda: pytest.fail("the inputs aren't needed"))
    found = METHOD.generic(net, w, inputs)
    found |= METHOD.personal(net, METHOD.begin(w, client), client, inputs)
    arrays = {name: tensor.double().numpy() for name, tensor in (w | state).items()}
    generic = f.double().numpy() @ arrays["head.weight"].T + arrays["head.bias"]
    own = f.double().numpy() @ arrays["personal.weight"].T + arrays["personal.bias"]
    assert list(found) == list(METHOD.views)
    np.testing.assert_allclose(found["generic"].numpy(), generic, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["personal"].numpy(), generic + own, rtol=1e-4, atol=1e-5)

"""The SGD loop against torch.optim and plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fedsim.data.statistics import Statistics
from fedsim.engine.evaluation import Evaluator
from fedsim.engine.loader import PREDICT_BLOCK, plan
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining, epoch_steps
from fedsim.engine.update import (
    Batch,
    Client,
    Examples,
    LocalSGD,
    Upload,
    cross_entropy,
    predict,
    sgd,
)
from fedsim.models import Net
from fedsim.models.small import cnn, linear
from fedsim.rng import generator


def make_trainer(federation, model, **settings):
    training = LocalTraining(
        **{"epochs": 2, "batch_size": 5, "lr": 0.1, "momentum": 0.5, **settings}
    )
    torch.manual_seed(0)
    net = Net(model)
    return LocalTrainer(net, federation, Statistics.of(federation), training, seed=7), net


def normalised(source, index):
    x = source.x_train[index].astype(np.float64)
    mean = source.x_train.mean(axis=(0, 2, 3), dtype=np.float64).reshape(-1, 1, 1)
    std = source.x_train.std(axis=(0, 2, 3), dtype=np.float64).reshape(-1, 1, 1)
    return torch.tensor((x - mean) / std, dtype=torch.float32)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_a_plain_torch_loop(federation, norm, weight_decay, momentum):
    torch.manual_seed(3)
    model = cnn((1, 4, 4), 3, channels=(8,), norm=norm)
    trainer, net = make_trainer(federation, model, momentum=momentum, weight_decay=weight_decay)
    w = net.initial_weights()

    upload, _ = trainer.update(LocalSGD(), w, client=2, round=4)

    index = federation.labelled(2)
    x, y = normalised(federation.source, index), federation.source.y_train[index]
    optimiser = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay
    )
    losses = []
    rng = generator(7, "pass 0.0", round=4, client=2)
    for _ in range(2):
        order = rng.permutation(len(index))
        for start in range(0, len(index), 5):
            chosen = order[start : start + 5]
            optimiser.zero_grad()
            loss = F.cross_entropy(model(x[chosen]), torch.from_numpy(y[chosen]))
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    # With channels innermost, PyTorch's GroupNorm is less exact.
    atol = 1e-5 if norm == "group" else 1e-6
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(upload.arrays["arrays"][name], expected, rtol=1e-5, atol=atol)
    assert upload.num_examples == 12
    assert upload.metrics["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_given_weights_do_not_change(federation):
    trainer, net = make_trainer(federation, cnn((1, 4, 4), 3, channels=(8,), norm="batch"))
    w = net.initial_weights()
    before = {name: tensor.clone() for name, tensor in w.items()}
    upload, _ = trainer.update(LocalSGD(), w, client=0, round=1)
    for name, tensor in w.items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, upload.arrays["arrays"][name])


def test_hidden_labels_are_out_of_reach(federation):
    """What a client update trains on doesn't depend on the labels it must not see."""

    class OnUnlabelled(LocalSGD):
        def update(self, w, client):
            w_k, log = yield from sgd(self.count_labels, w, client.unlabelled)
            return Upload({"arrays": w_k}, len(client.unlabelled), log)

        @staticmethod
        def count_labels(net, w, batch: Batch):
            known = (batch.y >= 0).sum()
            return net(w, batch.x).square().mean(), {"known": known, "seen": batch.mask.sum()}

    trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
    upload, _ = trainer.update(OnUnlabelled(), net.initial_weights(), client=1, round=1)
    assert upload.metrics["known"] == 0
    assert upload.metrics["seen"] == 2 * len(federation.unlabelled(1)) > 0


def test_two_passes_of_one_update_draw_different_batches(federation):
    seen = []

    class Twice(LocalSGD):
        def update(self, w, client):
            w, _ = yield from sgd(self.note, w, client.labelled, steps=1)
            w, log = yield from sgd(self.note, w, client.labelled, steps=1)
            return Upload({"arrays": w}, 1, log)

        @staticmethod
        def note(net, w, batch):
            seen.append(batch.x.clone())
            return net(w, batch.x).sum(), {}

    trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
    trainer.update(Twice(), net.initial_weights(), client=0, round=1)
    seen = seen[2:]  # before its first step a loss is called twice, to see whether it is pure
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_predict_returns_results_in_the_order_of_the_examples(federation):
    found = []

    class Ask(LocalSGD):
        def update(self, w, client: Client):
            p = yield from predict(self.logits, w, client.unlabelled, given=(w,))
            found.append(p)
            return Upload({"arrays": w}, 1)

        @staticmethod
        def logits(net, w, x, other):
            return net.predict(w, x) + net.predict(other, x)

    trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
    w = net.initial_weights()
    trainer.update(Ask(), w, client=3, round=1)
    x = normalised(federation.source, federation.unlabelled(3)).flatten(1)
    torch.testing.assert_close(found[0], 2 * (x @ w["head.weight"].T + w["head.bias"]))


def test_a_client_without_labels_returns_the_global_model_with_weight_zero(source):
    from fedsim.data.federate import federate
    from fedsim.data.partition import iid

    federation = federate(source, num_clients=4, partition=iid, labelled=0.0)
    trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
    w = net.initial_weights()
    upload, _ = trainer.update(LocalSGD(), w, client=0, round=1)
    assert upload.num_examples == 0
    assert np.isnan(upload.metrics["train_loss"])
    assert all(torch.equal(upload.arrays["arrays"][name], w[name]) for name in w)


@given(count=st.integers(0, 40), batch_size=st.integers(1, 12), steps=st.integers(0, 15))
def test_batches_cover_each_epoch_once(count, batch_size, steps):
    found = list(plan(np.random.default_rng(0), count, batch_size, steps))
    assert len(found) == (steps if count else 0)
    in_an_epoch = epoch_steps([count], batch_size)
    assert in_an_epoch == -(-count // batch_size)
    whole = len(found) // in_an_epoch if count else 0
    for first in range(0, whole * in_an_epoch, max(1, in_an_epoch)):
        epoch = np.concatenate(found[first : first + in_an_epoch])
        assert sorted(epoch) == list(range(count))


def test_weak_augmentation_is_drawn_anew_at_each_step_and_repeats_with_the_seed(federation):
    trainer, _ = make_trainer(federation, linear((1, 4, 4), 3), augmentation="weak", batch_size=12)
    examples = Examples(federation.labelled(0), True)
    first_epoch, second_epoch, *again = (
        batch.x
        for _ in range(2)
        for batch, _ in trainer.loader.batches(examples, np.random.default_rng(0), 2, False)
    )
    assert torch.equal(first_epoch, again[0])
    assert torch.equal(second_epoch, again[1])
    # Sorted, the batches of two epochs would agree if nothing had been shifted.
    by_sum = [x.flatten(1).sum(1).sort().values for x in (first_epoch, second_epoch)]
    assert not torch.allclose(*by_sum)


def test_testing_equals_a_plain_forward_pass(federation):
    trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
    w = net.initial_weights()
    scores, features = Evaluator(trainer).test_generic(LocalSGD(), w, slice(0, PREDICT_BLOCK))
    predicted, loss = scores["generic"]
    source = federation.source
    mean, std = source.x_train.mean(), source.x_train.std()
    x = torch.tensor((source.x_test - mean) / std, dtype=torch.float32).flatten(1)
    logits = x @ w["head.weight"].T + w["head.bias"]
    expected = F.cross_entropy(logits, torch.from_numpy(source.y_test), reduction="none")
    np.testing.assert_array_equal(predicted, logits.argmax(1).numpy())
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, x)
    half, _ = Evaluator(trainer).test_generic(LocalSGD(), w, np.arange(0, 30, 2))
    np.testing.assert_array_equal(half["generic"][0], predicted[::2])


def test_the_mean_cross_entropy_is_that_of_the_examples_without_the_padding():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4)).astype(np.float32)
    y = np.array([2, 0, 3])
    losses = np.log(np.exp(logits).sum(1)) - logits[range(3), y]
    z, labels = torch.from_numpy(logits), torch.from_numpy(y)
    x = torch.zeros(3, 1)
    for mask, padded in (([1, 1, 1], False), ([1, 1, 1], True), ([1, 1, 0], True)):
        batch = Batch(x, labels, torch.tensor(mask, dtype=torch.float32), padded=padded)
        expected = losses[np.array(mask) == 1].mean()
        assert float(cross_entropy(z, batch)) == pytest.approx(expected, rel=1e-6)

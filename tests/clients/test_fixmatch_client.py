"""FixMatch's client against a plain loop, with both teachers."""

import copy

import pytest
import torch
from torch.nn import functional as F

from clients import FixMatchGlobal, FixMatchLocal
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Batch, Examples, LocalSGD
from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.small import cnn
from fedsim.rng import generator


@pytest.fixture
def model():
    torch.manual_seed(0)
    return cnn((1, 4, 4), 3, channels=(6,), norm="batch")


def run(model, federation, update, steps=4):
    training = LocalTraining(epochs=1, steps=steps, batch_size=5, lr=0.1, augmentation="weak")
    trainer = LocalTrainer(Net(model), federation, Statistics.of(federation), training, 3)
    return trainer.update(update, Net(model).initial_weights(), client=1, round=1)


@pytest.mark.parametrize("kind", [FixMatchLocal, FixMatchGlobal])
def test_the_client_update_equals_a_plain_loop(model, federation, kind):
    update = kind(threshold=0.4, unlabelled_weight=0.5)
    upload, audit = run(model, federation, update)

    loader = Loader(federation, Statistics.of(federation), 5, "weak")
    streams = [
        loader.batches(
            Examples(index, labelled),
            generator(3, f"pass 0.{part}", round=1, client=1),
            4,
            not labelled,
        )
        for part, (index, labelled) in enumerate(
            [(federation.labelled(1), True), (federation.unlabelled(1), False)]
        )
    ]
    reference, start = copy.deepcopy(model), copy.deepcopy(model).eval()
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.1)
    num_kept = 0
    for (labelled, truth), (unlabelled, _) in zip(*streams, strict=True):
        with torch.no_grad():
            teacher = reference.eval() if kind is FixMatchLocal else start
            q, label = teacher(unlabelled.x).softmax(1).max(1)
        reference.train()
        kept = [i for i in range(len(q)) if q[i] > 0.4]
        num_kept += len(kept)
        loss = F.cross_entropy(reference(labelled.x), truth)
        logits = reference(unlabelled.strong)
        if kept:
            loss_u = sum(F.cross_entropy(logits[i], label[i]) for i in kept) / len(q)
            loss = loss + 0.5 * loss_u
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, array in reference.state_dict().items():
        torch.testing.assert_close(upload.arrays["arrays"][name], array, rtol=1e-5, atol=1e-5)
    assert upload.num_examples == 15
    assert audit["pseudo_kept"] == num_kept > 0
    assert "pseudo_local" not in audit


@pytest.mark.parametrize("kind", [FixMatchLocal, FixMatchGlobal])
def test_without_weight_or_without_kept_labels_only_labels_train(model, federation, kind):
    ignored, _ = run(model, federation, kind(unlabelled_weight=0.0), steps=1)
    unsure, _ = run(model, federation, kind(threshold=1.0), steps=1)
    plain, _ = run(model, federation, LocalSGD(), steps=1)
    for name, array in plain.arrays["arrays"].items():
        if "running" not in name:  # the unlabelled batch also passes through BatchNorm
            torch.testing.assert_close(ignored.arrays["arrays"][name], array)
            torch.testing.assert_close(unsure.arrays["arrays"][name], array)


def test_a_probability_equal_to_the_threshold_is_kept(model):
    """As in the paper's 1(max q_b >= tau): of a model that is certain, even where tau is 1."""
    w = Net(model).initial_weights()
    w["head.weight"].zero_()
    w["head.bias"] = torch.tensor([0.0, 200.0, 0.0])
    batch = Batch(torch.zeros(2, 1, 4, 4), torch.full((2,), -1), torch.tensor([1.0, 0.0]))
    targets = FixMatchLocal(threshold=1.0).teach(Net(model), w, batch)
    assert targets["pseudo_label"].tolist() == [1, 1]
    assert targets["kept"].tolist() == [1, 0]


class TestFixMatchFailure:
    def test_hyperparameters_out_of_range(self):
        with pytest.raises(ConfigError, match=r"method\.threshold = -0\.1"):
            FixMatchLocal(threshold=-0.1)
        with pytest.raises(ConfigError, match=r"method\.unlabelled_weight = -1"):
            FixMatchGlobal(unlabelled_weight=-1.0)

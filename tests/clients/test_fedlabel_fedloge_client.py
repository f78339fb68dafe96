"""FedLabel on FedLoGe's model: each part does what it does alone, and both at once."""

import copy

import pytest
import torch
from torch.nn import functional as F

from clients import FedLabelFedLoGe, FedLoGe
from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Examples
from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.small import cnn
from fedsim.rng import generator
from fedsim.simulation import initial_arrays

LR, BATCH, STEPS, SEED, CLIENT, ROUND = 0.1, 5, 4, 3, 1, 2
LOGE = {"sparsity": 0.3, "etf_norm": 1.0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return cnn((1, 4, 4), 3, channels=(6,), norm="batch")


@pytest.fixture
def half(source):
    """Three clients of 20 examples, 8 of them labelled."""
    return federate(source, num_clients=3, partition=iid, labelled=0.4)


@pytest.fixture
def start(make_task, model):
    """The server's arrays: the sparse ETF among them."""
    arrays = initial_arrays(make_task(model=lambda *_: model, update=FedLoGe(**LOGE)))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def run(model, federation, update, w, state=None):
    training = LocalTraining(epochs=1, steps=STEPS, batch_size=BATCH, lr=LR, augmentation="weak")
    trainer = LocalTrainer(Net(model), federation, Statistics.of(federation), training, SEED)
    return trainer.update(update, w, CLIENT, ROUND, state)


def personal_head(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "personal.weight": torch.randn(3, 24, generator=draw),
        "personal.bias": torch.randn(3, generator=draw),
    }


def test_the_labelled_pass_is_fedloges(model, half, start):
    both = FedLabelFedLoGe(warmup_rounds=99, **LOGE)
    upload, _ = run(model, half, both, start, personal_head(1))
    alone, _ = run(model, half, FedLoGe(**LOGE), start, personal_head(1))
    labelled = upload.arrays["labelled"]
    assert set(labelled) == set(alone.arrays["arrays"])  # neither ETF nor personal head is sent
    for name, tensor in labelled.items():
        assert torch.equal(tensor, alone.arrays["arrays"][name])
    for name, tensor in upload.state.items():
        assert torch.equal(tensor, alone.state[name])
    # Before the end of the warm-up the unlabelled model is the global one.
    for name, tensor in upload.arrays["unlabelled"].items():
        assert torch.equal(tensor, start[name])


def test_pseudo_labels_of_auxiliary_heads_train_the_backbone_alone(model, half, start):
    """The unlabelled pass in plain PyTorch: steps on kept pseudo-labels through the fixed head."""
    method = FedLabelFedLoGe(
        warmup_rounds=1,
        threshold=0.4,
        consistency_weight=0.0,
        proximal_weight=0.0,
        unlabelled_weight=0.7,
        **LOGE,
    )
    state = personal_head(1)
    upload, audit = run(model, half, method, start, state)

    etf = start["etf.weight"]
    teachers = []
    for arrays in (upload.arrays["labelled"], start):
        teacher = copy.deepcopy(model).eval()
        for name, tensor in teacher.state_dict().items():
            tensor.copy_(arrays[name])
        teachers.append(teacher)
    backbone = copy.deepcopy(model.backbone).train()
    for name, tensor in backbone.state_dict().items():
        tensor.copy_(start[f"backbone.{name}"])
    optimiser = torch.optim.SGD(backbone.parameters(), lr=LR)
    loader = Loader(half, Statistics.of(half), BATCH, "weak")
    rng = generator(SEED, "pass 1.0", round=ROUND, client=CLIENT)
    examples = Examples(half.unlabelled(CLIENT), False)
    total = 0
    for batch, _ in loader.batches(examples, rng, STEPS, True):
        with torch.no_grad():
            p_l, p_g = (torch.softmax(teacher(batch.x), 1) for teacher in teachers)
        kept, labels = [], []
        for i in range(len(batch.x)):
            expert = p_l[i] if p_l[i].var() >= p_g[i].var() else p_g[i]
            if expert.max() > 0.4:
                kept.append(i)
                labels.append(int(expert.argmax()))
        total += len(kept)
        if not kept:
            continue
        logits = backbone(batch.strong) @ etf.T
        loss = F.cross_entropy(logits[kept], torch.tensor(labels))
        optimiser.zero_grad()
        (0.7 * loss).backward()
        optimiser.step()
    assert audit["pseudo_kept"] == total > 3
    sent = upload.arrays["unlabelled"]
    expected = {f"backbone.{n}": t for n, t in backbone.state_dict().items()}
    expected |= {name: start[name] for name in ("head.weight", "head.bias")}
    assert set(sent) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(sent[name], tensor, rtol=1e-5, atol=1e-5)
    # The client keeps the middle of the personal head before and after the labelled pass.
    alone, _ = run(model, half, FedLoGe(**LOGE), start, state)
    for name, tensor in state.items():
        middle = (tensor + alone.state[name]) / 2
        torch.testing.assert_close(upload.state[name], middle, rtol=1e-5, atol=1e-5)


def test_views_are_fedloges_and_the_teacher_is_the_auxiliary_head(model, start):
    assert FedLabelFedLoGe.views == FedLoGe.views
    net = Net(model)
    x = torch.randn(6, 1, 4, 4)
    expected = model.eval()(x)
    torch.testing.assert_close(FedLabelFedLoGe(**LOGE).teacher(net, start, x), expected)


class TestFedLabelFedLoGeFailure:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sparsity": 1.0}, "method.sparsity = 1.0"),
            ({"threshold": 1.5}, "method.threshold = 1.5"),
            ({"temperature": 0.0}, "method.temperature = 0.0"),
        ],
    )
    def test_both_parts_check_their_hyperparameters(self, options, message):
        with pytest.raises(ConfigError, match=message):
            FedLabelFedLoGe(**options)

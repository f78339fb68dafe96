"""FedLabel's client against plain loops written from the formulas, and its special cases."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clients import FedLabel
from clients.pseudo_label import expertise
from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.data.statistics import Statistics
from fedsim.engine.loader import Loader
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import Batch, Examples
from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.small import cnn, linear
from fedsim.rng import generator

LR, MOMENTUM, BATCH, STEPS, SEED, CLIENT, ROUND = 0.1, 0.5, 5, 4, 3, 1, 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    return cnn((1, 4, 4), 3, channels=(6,), norm="batch")


@pytest.fixture
def half(source):
    """Three clients of 20 examples, 8 of them labelled."""
    return federate(source, num_clients=3, partition=iid, labelled=0.4)


def run(model, federation, update, client=CLIENT, round=ROUND):
    training = LocalTraining(
        epochs=1, steps=STEPS, batch_size=BATCH, lr=LR, momentum=MOMENTUM, augmentation="weak"
    )
    trainer = LocalTrainer(Net(model), federation, Statistics.of(federation), training, SEED)
    return trainer.update(update, Net(model).initial_weights(), client, round)


def drawn_batches(federation, index, labelled, purpose, strong):
    loader = Loader(federation, Statistics.of(federation), BATCH, "weak")
    rng = generator(SEED, purpose, round=ROUND, client=CLIENT)
    return list(loader.batches(Examples(index, labelled), rng, STEPS, strong))


def optimiser(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def h(p, kind):
    """Expertise of one example's probabilities, in plain NumPy."""
    if kind == "variance":
        return np.mean((p - p.mean()) ** 2)
    if kind == "entropy":
        return 1 / -np.sum(p * np.log(p))
    return p.max()


def judge(local, global_, x, options):
    """Return for each example of a batch what the experts say, from the formulas."""
    found = []
    local.eval(), global_.eval()
    with torch.no_grad():
        logits = [m(x).double().numpy() / options.temperature for m in (local, global_)]
    for z_l, z_g in zip(*logits, strict=True):
        p_l, p_g = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (z_l, z_g))
        h_l, h_g = h(p_l, options.expertise), h(p_g, options.expertise)
        expert, other = (p_l, p_g) if h_l >= h_g else (p_g, p_l)
        found.append(
            {
                "kept": expert.max() > options.threshold,
                "local": h_l >= h_g,
                "label": int(expert.argmax()),
                "agreed": p_l.argmax() == p_g.argmax(),
                "rho": min(h_l, h_g) / max(h_l, h_g),
                "p_l": p_l,
                "other": other,
            }
        )
    return found


def unlabelled_terms(model, batch, judged, options, target):
    """Cross-entropy on kept pseudo-labels, and the agreement term, example by example."""
    kept = [i for i, example in enumerate(judged) if example["kept"]]
    strong = model(batch.strong).log_softmax(1)
    pseudo = sum(-strong[i, judged[i]["label"]] for i in kept) / max(len(kept), 1)
    consistency = torch.zeros(())
    if options.consistency_weight:
        log_q = (model(batch.x) / options.temperature).log_softmax(1)
        agreed = [i for i in kept if judged[i]["agreed"]]
        for i in agreed:
            p = torch.tensor(judged[i][target], dtype=torch.float32)
            divergence = sum(p[c] * (p[c].log() - log_q[i, c]) for c in range(3))
            consistency = consistency + judged[i]["rho"] * divergence / len(agreed)
    return pseudo, consistency


def sequential_reference(model, federation, options):
    """Return w_l, w_u and n_k of the sequential schedule."""
    model_l, model_u, start = (copy.deepcopy(model) for _ in range(3))
    step = optimiser(model_l)
    for batch, truth in drawn_batches(
        federation, federation.labelled(CLIENT), True, "pass 0.0", False
    ):
        step.zero_grad()
        F.cross_entropy(model_l(batch.x), truth).backward()
        step.step()
    step, num_kept = optimiser(model_u), 0
    for batch, _ in drawn_batches(
        federation, federation.unlabelled(CLIENT), False, "pass 1.0", True
    ):
        judged = judge(copy.deepcopy(model_l), copy.deepcopy(start), batch.x, options)
        if not any(example["kept"] for example in judged):
            continue
        num_kept += sum(example["kept"] for example in judged)
        step.zero_grad()
        target = "p_l" if options.consistency_target == "local" else "other"
        pseudo, consistency = unlabelled_terms(model_u, batch, judged, options, target)
        proximal = sum(
            ((a - b.detach()) ** 2).mean()
            for a, b in zip(model_u.parameters(), start.parameters(), strict=True)
        )
        loss = (
            options.unlabelled_weight * pseudo
            + options.consistency_weight * consistency
            + options.proximal_weight * proximal
        )
        loss.backward()
        step.step()
    return model_l.state_dict(), model_u.state_dict(), max(num_kept, 1)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        torch.testing.assert_close(found[name], array, rtol=1e-5, atol=1e-5)


OPTIONS = {
    "defaults": {"threshold": 0.75},
    "entropy": {"threshold": 0.75, "expertise": "entropy"},
    "max": {"threshold": 0.75, "expertise": "max"},
    "other": {"threshold": 0.75, "consistency_target": "other", "consistency_weight": 2.0},
    "temperature": {"threshold": 0.5, "temperature": 2.0, "consistency_weight": 1.0},
    "weights": {"threshold": 0.75, "unlabelled_weight": 0.3, "proximal_weight": 0.0},
    "no consistency": {"threshold": 0.75, "consistency_weight": 0.0},
    "some batches keep nothing": {"threshold": 0.78},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_client_update_equals_plain_loops(model, half, options):
    update = FedLabel(warmup_rounds=1, **options)
    upload, audit = run(model, half, update)
    w_l, w_u, num_kept = sequential_reference(model, half, update)
    assert_same(upload.arrays["labelled"], w_l)
    assert_same(upload.arrays["unlabelled"], w_u)
    assert upload.metrics["num_pseudo"] == num_kept
    assert upload.metrics["num_labelled"] == 8
    assert audit["pseudo_seen"] == 12 + 5  # an epoch of 5 + 5 + 2, and 5 of the next
    assert audit["pseudo_kept"] == num_kept
    # The cases must exercise what they are about.
    assert 1 < num_kept < 17
    start = Net(model).initial_weights()
    assert not torch.equal(upload.arrays["unlabelled"]["head.bias"], start["head.bias"])


def test_the_single_upload_is_the_middle_of_the_two_models(model, half):
    options = {"warmup_rounds": 0, "threshold": 0.75}
    both, _ = run(model, half, FedLabel(**options))
    single, _ = run(model, half, FedLabel(aggregation="single", **options))
    assert list(single.arrays) == ["arrays"]
    w_l, w_u = both.arrays["labelled"], both.arrays["unlabelled"]
    assert_same(single.arrays["arrays"], {name: (w_l[name] + w_u[name]) / 2 for name in w_l})
    # 17 unlabelled examples are drawn, of 12.
    assert 0 < both.metrics["num_pseudo"] < 17
    assert single.num_examples == 8 + round(12 * both.metrics["num_pseudo"] / 17)
    # In less than an epoch each is drawn once.
    once = {**options, "unlabelled_steps": 1, "threshold": 0.6}
    both, _ = run(model, half, FedLabel(**once))
    single, _ = run(model, half, FedLabel(aggregation="single", **once))
    assert 1 < both.metrics["num_pseudo"] <= 5
    assert single.num_examples == 8 + both.metrics["num_pseudo"]


@pytest.mark.parametrize("threshold", [0.4, 0.75, 1.0])
def test_the_joint_schedule_equals_plain_loops(model, half, threshold):
    options = FedLabel(
        schedule="joint",
        warmup_rounds=ROUND - 1,
        threshold=threshold,
        unlabelled_weight=0.7,
        consistency_weight=0.5,
    )
    upload, _ = run(model, half, options)

    reference, start = copy.deepcopy(model), copy.deepcopy(model)
    step = optimiser(reference)
    pairs = zip(
        drawn_batches(half, half.labelled(CLIENT), True, "pass 0.0", False),
        drawn_batches(half, half.unlabelled(CLIENT), False, "pass 0.1", True),
        strict=True,
    )
    for (labelled, truth), (unlabelled, _) in pairs:
        judged = judge(copy.deepcopy(reference), copy.deepcopy(start), unlabelled.x, options)
        step.zero_grad()
        loss = F.cross_entropy(reference.train()(labelled.x), truth)
        pseudo, consistency = unlabelled_terms(reference, unlabelled, judged, options, "other")
        (loss + 0.7 * (pseudo + 0.5 * consistency)).backward()
        step.step()
    assert_same(upload.arrays["arrays"], reference.state_dict())
    assert upload.num_examples == 20


@pytest.mark.parametrize(
    ("options", "round"),
    [({"threshold": 1.0, "warmup_rounds": 0}, 5), ({"warmup_rounds": 5, "threshold": 0.0}, 5)],
    ids=["nothing is sure enough", "warm-up"],
)
def test_without_pseudo_labels_the_unlabelled_model_is_the_global_one(model, half, options, round):
    upload, audit = run(model, half, FedLabel(**options), round=round)
    assert_same(upload.arrays["unlabelled"], Net(model).initial_weights())
    assert upload.metrics["num_pseudo"] == 1
    assert audit.get("pseudo_kept", 0) == 0


def test_a_joint_client_trains_on_labelled_examples_alone_in_the_warm_up(model, half):
    options = FedLabel(schedule="joint", warmup_rounds=ROUND, labelled_steps=3, threshold=0.0)
    upload, audit = run(model, half, options)
    plain = copy.deepcopy(model)
    step = optimiser(plain)
    batches = drawn_batches(half, half.labelled(CLIENT), True, "pass 0.0", False)
    for batch, truth in batches[:3]:
        step.zero_grad()
        F.cross_entropy(plain(batch.x), truth).backward()
        step.step()
    assert_same(upload.arrays["arrays"], plain.state_dict())
    assert upload.num_examples == 8
    assert audit == {}


def verdict(update, local, global_):
    """What the teachers say of two examples, each model by the logits that it gives to any."""
    net = Net(linear((1, 4, 4), 3))
    w_l, w = (
        {"head.weight": torch.zeros(3, 16), "head.bias": torch.tensor(logits)}
        for logits in (local, global_)
    )
    batch = Batch(torch.zeros(2, 1, 4, 4), torch.tensor([-1, -1]), torch.ones(2))
    return {name: found.tolist() for name, found in update.teach(net, w, batch, w_l, w).items()}


def test_a_pseudo_label_is_kept_above_the_threshold_only():
    sure, undecided = [200.0, 0.0, 0.0], [0.0, 0.0, -200.0]  # probabilities of 1, and of 1/2
    for logits, threshold, kept in (
        (sure, 1.0, 0.0),
        (sure, 0.99, 1.0),
        (undecided, 0.5, 0.0),
        (undecided, 0.49, 1.0),
    ):
        found = verdict(FedLabel(threshold=threshold), logits, logits)
        assert found["kept"] == [kept, kept]


@pytest.mark.parametrize("kind", ["variance", "entropy", "max"])
def test_of_two_equal_experts_the_local_one_labels(kind):
    found = verdict(FedLabel(expertise=kind), [0.0, 3.0, 1.0], [0.0, 3.0, 1.0])
    assert found["local"] == [1.0, 1.0]
    assert found["rho"] == [1.0, 1.0]


def test_a_tie_goes_to_the_local_models_class():
    update = FedLabel(expertise="max")  # of probabilities of 1, whatever the class
    found = verdict(update, [0.0, 200.0, 0.0], [200.0, 0.0, 0.0])
    assert found["pseudo_label"] == [1, 1]
    assert found["agreed"] == [0.0, 0.0]


def test_hidden_labels_do_not_change_training_but_the_records_know_them(model, source):
    first = federate(source, num_clients=3, partition=iid, labelled=0.4)
    upload, audit = run(model, first, FedLabel(warmup_rounds=0, threshold=0.4))
    hidden = np.concatenate([first.unlabelled(k) for k in range(3)])
    source.y_train[hidden] = (source.y_train[hidden] + 1) % 3
    again, other_audit = run(model, first, FedLabel(warmup_rounds=0, threshold=0.4))
    for group, arrays in upload.arrays.items():
        for name, array in arrays.items():
            assert torch.equal(again.arrays[group][name], array)
    assert again.metrics == pytest.approx(upload.metrics, nan_ok=True)
    assert audit["pseudo_kept"] == other_audit["pseudo_kept"] > 0
    assert audit["pseudo_correct"] != other_audit["pseudo_correct"]


def test_the_audit_counts_by_hand(model, half):
    update = FedLabel(warmup_rounds=0, threshold=0.4)
    _, audit = run(model, half, update)
    model_l = copy.deepcopy(model)
    w_l = run(model, half, update)[0].arrays["labelled"]
    for name, array in model_l.state_dict().items():
        array.copy_(w_l[name])
    kept = correct = local = 0
    for batch, truth in drawn_batches(half, half.unlabelled(CLIENT), False, "pass 1.0", True):
        judged = judge(model_l, copy.deepcopy(model), batch.x, update)
        for example, y in zip(judged, truth.tolist(), strict=True):
            kept += example["kept"]
            correct += example["kept"] and example["label"] == y
            local += example["kept"] and example["local"]
    assert (audit["pseudo_kept"], audit["pseudo_correct"]) == (kept, correct)
    assert audit["pseudo_local"] == local
    by_group = [audit[f"pseudo_kept_{g}"] for g in ("head", "medium", "tail")]
    assert sum(by_group) == kept


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_a_client_without_labelled_examples(model, source, schedule):
    federation = federate(source, num_clients=3, partition=iid, labelled=0.0)
    options = {"warmup_rounds": 0, "threshold": 0.0, "schedule": schedule}
    upload, _ = run(model, federation, FedLabel(**options))
    start = Net(model).initial_weights()
    if schedule == "sequential":
        assert_same(upload.arrays["labelled"], start)
        assert upload.metrics["num_labelled"] == 0
        trained = upload.arrays["unlabelled"]
    else:
        trained = upload.arrays["arrays"]
    assert not torch.equal(trained["head.bias"], start["head.bias"])


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_a_client_without_unlabelled_examples(model, source, schedule):
    federation = federate(source, num_clients=3, partition=iid, labelled=1.0)
    upload, audit = run(model, federation, FedLabel(warmup_rounds=0, schedule=schedule))
    assert audit == {}
    start = Net(model).initial_weights()
    if schedule == "sequential":
        assert_same(upload.arrays["unlabelled"], start)
        assert upload.metrics["num_pseudo"] == 1
        trained = upload.arrays["labelled"]
    else:
        trained = upload.arrays["arrays"]
    assert not torch.equal(trained["head.bias"], start["head.bias"])


def test_a_client_of_one_class(model, source):
    source.y_train[:] = 2
    federation = federate(source, num_clients=3, partition=iid, labelled=0.4)
    upload, audit = run(model, federation, FedLabel(warmup_rounds=0, threshold=0.0))
    assert all(torch.isfinite(a).all() for g in upload.arrays.values() for a in g.values())
    assert audit["pseudo_seen"] == audit["pseudo_kept"]


@pytest.mark.parametrize("kind", ["variance", "entropy", "max"])
def test_a_more_decided_model_is_more_of_an_expert(kind):
    p = torch.tensor([[0.25] * 4, [0.4, 0.2, 0.2, 0.2], [0.97, 0.01, 0.01, 0.01], [1.0, 0, 0, 0]])
    found = expertise(p, kind)
    assert (found.diff() > 0).all()
    assert (found > 0).all()
    assert torch.isfinite(found).all()


class TestFedLabelFailure:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 1.5}, r"method.threshold = 1.5: must be in \[0, 1\]"),
            ({"threshold": float("nan")}, "method.threshold = nan"),
            ({"temperature": 0.0}, "method.temperature = 0.0: must be above 0"),
            ({"warmup_rounds": -1}, "method.warmup_rounds = -1: must be at least 0"),
            ({"unlabelled_weight": -1.0}, "method.unlabelled_weight = -1.0"),
            ({"proximal_weight": float("inf")}, "method.proximal_weight = inf"),
        ],
    )
    def test_hyperparameters_out_of_range(self, options, message):
        with pytest.raises(ConfigError, match=message):
            FedLabel(**options)

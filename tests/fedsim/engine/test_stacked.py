"""Clients side by side: for every method the same numbers as one by one.

float32 sums run in another order on stacked weights (a batched matrix product instead of many), so
each step differs by a few 1e-7 of a value's size; over the dozen steps of these passes a difference
of 1e-4 of the largest entry would already mean another computation.
"""

import warnings
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import clients
from fedsim.data.federate import federate
from fedsim.data.partition import dirichlet
from fedsim.data.statistics import Statistics
from fedsim.engine import tape
from fedsim.engine.local import LocalTrainer
from fedsim.engine.sgd import run_stacked
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import LocalSGD, Upload, sgd
from fedsim.models import Net
from fedsim.models.small import cnn, linear, mlp

METHODS = {
    "fedavg": LocalSGD(),
    "fedprox": clients.FedProx(mu=0.5),
    "fedlabel": clients.FedLabel(warmup_rounds=0, threshold=0.6, consistency_weight=0.5),
    "fedlabel steps": clients.FedLabel(
        warmup_rounds=0, threshold=0.5, labelled_steps=3, unlabelled_steps=4
    ),
    "fedlabel joint": clients.FedLabel(warmup_rounds=0, threshold=0.5, schedule="joint"),
    "fixmatch-local": clients.FixMatchLocal(threshold=0.5),
    "fixmatch-global": clients.FixMatchGlobal(threshold=0.5),
    "fedloge": clients.FedLoGe(sparsity=0.2, etf_norm=1.0),
    "fedlabel-fedloge": clients.FedLabelFedLoGe(
        warmup_rounds=0, threshold=0.4, sparsity=0.2, etf_norm=1.0
    ),
    "fedper": clients.FedPer(),
    "fedrep": clients.FedRep(head_epochs=2),
    "fedbabu": clients.FedBABU(),
    "ditto": clients.Ditto(lam=0.3),
    "fedrod": clients.FedRoD(),
    "fedetf": clients.FedETF(),
    "creff": clients.CReFF(),
    "scaffold": clients.Scaffold(),
    "fedbn": clients.FedBN(),
}
SHAPE = (1, 4, 4)
MODELS = {
    "mlp": lambda: mlp(SHAPE, 3, hidden=(12,)),
    "cnn": lambda: cnn(SHAPE, 3, channels=(6,)),
    "cnn batch": lambda: cnn(SHAPE, 3, channels=(6,), norm="batch"),
    "cnn group": lambda: cnn(SHAPE, 3, channels=(8,), norm="group"),
}


def run(net, federation, method, stacked, w, states, **training):
    settings = {"epochs": 2, "batch_size": 4, "lr": 0.1, "momentum": 0.5, **training}
    trainer = LocalTrainer(
        net, federation, Statistics.of(federation), LocalTraining(**settings), 7, stacked
    )
    clients = trainer.clients(2, range(federation.num_clients))
    return trainer.update_all(
        method, w, [replace(client, state=states.get(client.id, {})) for client in clients]
    )


def assert_same(one, other, where):
    assert list(one) == list(other), where
    for name, tensor in one.items():
        scale = max(float(tensor.abs().max()), 1.0)
        difference = float((tensor - other[name]).abs().max()) if tensor.numel() else 0.0
        assert difference < 1e-4 * scale, f"{where}: {name} differs by {difference}"


def compare(make_model, federation, method, seed=0, **training):
    torch.manual_seed(seed)
    net = Net(make_model())
    w = method.initial(net, net.initial_weights(), np.random.default_rng(seed))
    # Some clients come with what they kept in an earlier round, as its file gives it back.
    earlier = run(net, federation, method, False, w, {}, **training)
    states = {client: dict(sorted(earlier[client][0].state.items())) for client in (0, 1, 2)}
    alone = run(net, federation, method, False, w, states, **training)
    failures = []

    def watched(*arguments):
        try:
            return run_stacked(*arguments)
        except Exception as error:
            failures.append(error)
            raise

    with patch("fedsim.engine.local.run_stacked", side_effect=watched) as side_by_side:
        stacked = run(net, federation, method, True, w, states, **training)
    assert not failures  # a failed stack would be done again one by one
    assert side_by_side.called
    numbers = [call.args[3] for call in side_by_side.call_args_list]
    assert len(numbers) == len({*numbers})  # all clients take a pass together
    for client, ((one, counts), (other, stacked_counts)) in enumerate(
        zip(alone, stacked, strict=True)
    ):
        assert one.num_examples == other.num_examples
        assert set(one.arrays) == set(other.arrays)
        for group, arrays in one.arrays.items():
            assert_same(arrays, other.arrays[group], f"client {client}, {group}")
        assert_same(one.state, other.state, f"client {client}, state")
        assert counts == stacked_counts
        assert one.metrics == pytest.approx(other.metrics, rel=1e-3, abs=1e-5, nan_ok=True)
    return alone


@pytest.fixture
def ragged(source):
    """Five clients of very different size, about half of it labelled, one without labels."""
    with pytest.warns(UserWarning, match="examples"):
        federation = federate(
            source,
            num_clients=5,
            partition=dirichlet,
            options={"alpha": 0.3},
            labelled=(0.2, 0.9),
            unlabelled_clients=0.2,
            min_examples=3,
            seed=5,
        )
    sizes = np.diff(federation.train_offsets)
    assert sizes.max() > 2 * sizes.min()
    assert (federation.num_labelled == 0).sum() == 1
    return federation


def test_clients_with_and_without_something_kept_train_together(federation):
    class Keeps(LocalSGD):
        kept = ("own",)

        def update(self, w, client):
            own = client.state or {"own.b": torch.zeros(2), "own.a": torch.zeros(3)}
            w_k, log = yield from sgd(self.loss, {**w, **own}, client.labelled)
            return Upload({"arrays": w_k}, 1, log)

    net = Net(linear(SHAPE, 3))
    # From its file it comes back sorted by name.
    states = {client: {"own.a": torch.ones(3), "own.b": torch.ones(2)} for client in (1, 3)}
    with patch("fedsim.engine.local.run_stacked", side_effect=run_stacked) as side_by_side:
        found = run(net, federation, Keeps(), True, net.initial_weights(), states)
    (call,) = side_by_side.call_args_list
    assert len(call.args[1]) == federation.num_clients
    kept = [upload.arrays["arrays"]["own.a"].tolist() for upload, _ in found]
    assert kept == [[float(client in states)] * 3 for client in range(federation.num_clients)]


def test_a_method_that_asks_for_it_goes_one_by_one(federation):
    class Alone(LocalSGD):
        stackable = False

        def loss(self, net, w, batch):
            assert not batch.padded
            loss, counts = super().loss(net, w, batch)
            return (loss * 2 if loss > 0 else loss), counts  # vmap would refuse it

    net = Net(linear(SHAPE, 3))
    w = net.initial_weights()
    found, alone = (run(net, federation, Alone(), stacked, w, {}) for stacked in (True, False))
    for (one, _), (other, _) in zip(found, alone, strict=True):
        for name, tensor in one.arrays["arrays"].items():
            assert torch.equal(tensor, other.arrays["arrays"][name])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_numbers_of_one_by_one(ragged, name):
    model = MODELS["cnn batch"] if name == "fedbn" else MODELS["mlp"]
    alone = compare(model, ragged, METHODS[name])
    trained = [upload for upload, _ in alone if upload.num_examples]
    assert len(trained) >= 4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["fedavg", "fedlabel", "fedloge"])
@pytest.mark.parametrize("augmentation", ["none", "weak"])
def test_every_kind_of_model(ragged, model, name, augmentation):
    compare(MODELS[model], ragged, METHODS[name], augmentation=augmentation, weight_decay=0.01)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(3, 9),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.9]),
    st.integers(0, 5),
    st.integers(0, 10**6),
)
def test_any_cohort(source, num_clients, batch_size, momentum, steps, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # clients that had to be filled up
        federation = federate(
            source,
            num_clients=num_clients,
            partition=dirichlet,
            options={"alpha": 0.5},
            labelled=(0.0, 1.0),
            seed=seed,
        )
    training = {"batch_size": batch_size, "momentum": momentum, "steps": steps}
    compare(lambda: linear(SHAPE, 3), federation, LocalSGD(), seed, **training)


class TestStackedFailure:
    def test_a_client_whose_loss_fails_is_the_only_one_left_out(self, federation):
        class Fails(LocalSGD):
            def update(self, w, client):
                steps = "three" if client.id == 1 else 3
                w_k, log = yield from sgd(self.loss, w, client.labelled, steps=steps)
                return Upload({"arrays": w_k}, 1, log)

        net = Net(linear(SHAPE, 3))
        found = run(net, federation, Fails(), True, net.initial_weights(), {})
        assert [isinstance(one, Exception) for one in found] == [False, True, False, False]

    def test_a_loss_that_vmap_cannot_take_runs_one_by_one_and_says_so(self, federation):
        class Branches(LocalSGD):
            def loss(self, net, w, batch):
                loss, counts = super().loss(net, w, batch)
                return (loss * 2 if loss > 0 else loss), counts

        net = Net(linear(SHAPE, 3))
        w = net.initial_weights()
        with pytest.warns(UserWarning, match="one by one, for their passes can't run side by side"):
            found = run(net, federation, Branches(), True, w, {})
        alone = run(net, federation, Branches(), False, w, {})
        for (one, _), (other, _) in zip(found, alone, strict=True):
            assert_same(one.arrays["arrays"], other.arrays["arrays"], "alone")

    def test_a_diverging_client_leaves_the_others_alone(self, federation):
        class Explodes(LocalSGD):
            def update(self, w, client):
                scale = {"scale": torch.tensor(float("inf") if client.id == 2 else 1.0)}
                w_k, log = yield from sgd(self.scaled, w, client.labelled, given=(scale,))
                return Upload({"arrays": w_k}, 1, log)

            def scaled(self, net, w, batch, scale):
                loss, counts = self.loss(net, w, batch)
                return loss * scale["scale"], counts

        net = Net(linear(SHAPE, 3))
        w = net.initial_weights()
        found = run(net, federation, Explodes(), True, w, {})
        alone = run(net, federation, LocalSGD(), False, w, {})
        for client in (0, 1, 3):
            assert_same(
                found[client][0].arrays["arrays"], alone[client][0].arrays["arrays"], client
            )
        assert not torch.isfinite(found[2][0].arrays["arrays"]["head.weight"]).all()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["fedavg", "fedlabel joint", "fedloge", "fedetf", "fedrod"])
@pytest.mark.parametrize("model", ["cnn batch", "mlp"])
def test_in_bfloat16_only_products_are_rounded(source, model, name, stacked):
    """To 8 bits, which BatchNorm in small batches amplifies to a tenth and more of the update."""
    federation = federate(
        source, num_clients=3, partition=dirichlet, options={"alpha": 10.0}, labelled=0.5, seed=5
    )
    torch.manual_seed(1)
    net = Net(MODELS[model]())
    w = METHODS[name].initial(net, net.initial_weights(), np.random.default_rng(0))
    exact, rounded = (
        run(net, federation, METHODS[name], stacked, w, {}, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    for (one, _), (other, _) in zip(exact, rounded, strict=True):
        for group, arrays in one.arrays.items():
            found = other.arrays[group]
            assert {t.dtype for t in found.values()} == {torch.float32}
            moved = torch.cat([(arrays[n] - w[n]).flatten() for n in arrays])
            apart = torch.cat([(arrays[n] - found[n]).flatten() for n in arrays])
            assert 1e-5 < float(apart.norm() / moved.norm()) < 0.3


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_to_the_same_bits_without_tapes(federation, name, stacked):
    method = METHODS[name]
    make_model = MODELS["cnn batch"] if name == "fedbn" else MODELS["mlp"]
    training = LocalTraining(epochs=4, batch_size=6, lr=0.1, momentum=0.5, augmentation="weak")

    statistics = Statistics.of(federation)

    def train():
        torch.manual_seed(0)
        net = Net(make_model())
        w = method.initial(net, net.initial_weights(), np.random.default_rng(0))
        trainer = LocalTrainer(net, federation, statistics, training, 7, stacked)
        return trainer.update_all(method, w, trainer.clients(2, range(federation.num_clients)))

    with patch.object(tape, "RECORD_AT", 10**9):
        plain = train()
    tapes = []

    def watched(*arguments, record=tape._record):
        outputs, made = record(*arguments)
        tapes.append(made)
        return outputs, made

    with patch.object(tape, "_record", watched):
        taped = train()
    assert tapes
    assert None not in tapes  # otherwise its steps would be slow
    for (one, counts), (other, same_counts) in zip(plain, taped, strict=True):
        assert counts == same_counts
        assert one.metrics == pytest.approx(other.metrics, rel=0, abs=0, nan_ok=True)
        groups = {**one.arrays, "state": one.state}, {**other.arrays, "state": other.state}
        for group, arrays in groups[0].items():
            for key, tensor in arrays.items():
                assert torch.equal(tensor, groups[1][group][key]), (group, key)

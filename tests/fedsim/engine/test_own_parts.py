"""Models, losses and client updates of a user's own, as odd as they come."""

import copy
import gc
import re
import sys
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsim.engine import local
from fedsim.engine.clock import Clock
from fedsim.engine.evaluation import Evaluator
from fedsim.engine.inline_grid import InlineGrid
from fedsim.engine.local import LocalTrainer
from fedsim.engine.update import LocalSGD, Upload, cross_entropy, sgd
from fedsim.engine.uploads import Intake
from fedsim.engine.worker import Worker
from fedsim.errors import EngineError
from fedsim.models import Model, Net, parts
from fedsim.models.small import linear, mlp
from tests.fedsim.engine.test_local import make_trainer, normalised


def small(*layers, features=16):
    return Model(nn.Sequential(nn.Flatten(), *layers), features, 3)


def both(federation, model, update=None, **settings):
    """Train all clients one by one and side by side."""
    found = []
    for stacked in (False, True):
        trainer, net = make_trainer(federation, model, **settings)
        trainer.stacked = stacked
        clients = trainer.clients(1, range(federation.num_clients))
        update = update or LocalSGD()
        results = trainer.update_all(
            update, update.initial(net, net.initial_weights(), None), clients
        )
        found.append([upload for upload, _ in results])
    return found


def assert_same(alone, together, exactly=False):
    for one, other in zip(alone, together, strict=True):
        for name, tensor in one.arrays["arrays"].items():
            found = other.arrays["arrays"][name]
            if exactly:
                assert torch.equal(tensor, found)
            else:
                torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-5)


def test_frozen_parameters_stay_as_they_are(federation):
    """Those of which the model says that they need no gradient, as after pre-training."""
    model = small(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), features=8)
    model.backbone[1].requires_grad_(False)
    alone, together = both(federation, model, epochs=5, weight_decay=0.1)
    assert_same(alone, together)
    start = Net(model).initial_weights()
    for upload in alone + together:
        for name, tensor in upload.arrays["arrays"].items():
            assert torch.equal(tensor, start[name]) == name.startswith("backbone.1."), name


class Corrected(LocalSGD):
    """Passes whose gradients are corrected, by other arrays for each client."""

    def update(self, w, client):
        w_k, log = yield from sgd(
            self.loss,
            w,
            client.labelled,
            train=self.trained,
            correction=self.correction(w, client),
            lr=client.training.lr / 2 if client.id % 2 else None,
        )
        return Upload({"arrays": w_k}, 1, log)

    def correction(self, w, client):
        draw = torch.Generator().manual_seed(client.id)
        # In another order than the weights.
        trained = sorted(parts(w, self.trained), reverse=True)
        return {name: 0.1 * torch.randn(w[name].shape, generator=draw) for name in trained}


class CorrectedHead(Corrected):
    trained = ("head",)


class TestCorrections:
    @pytest.mark.parametrize("update", [Corrected(), CorrectedHead()])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_they_are_added_to_the_gradient_of_each_step(
        self, federation, update, momentum, weight_decay
    ):
        # 12 examples in one batch: the order of the batches doesn't matter.
        settings = {"momentum": momentum, "weight_decay": weight_decay}
        model = mlp((1, 4, 4), 3, hidden=(6,))
        w = Net(model).initial_weights()
        for found in both(federation, model, update, epochs=5, batch_size=12, **settings):
            for client in range(4):
                index = federation.labelled(client)
                x, y = normalised(federation.source, index), federation.source.y_train[index]
                mine = copy.deepcopy(model)
                named = parts(dict(mine.named_parameters()), update.trained)
                lr = 0.05 if client % 2 else 0.1
                optimiser = torch.optim.SGD(named.values(), lr, **settings)
                more = update.correction(w, SimpleNamespace(id=client))
                for _ in range(5):
                    optimiser.zero_grad()
                    F.cross_entropy(mine(x), torch.from_numpy(y)).backward()
                    for name, parameter in named.items():
                        parameter.grad += more[name]
                    optimiser.step()
                for name, tensor in mine.state_dict().items():
                    torch.testing.assert_close(
                        found[client].arrays["arrays"][name], tensor, rtol=1e-5, atol=1e-6
                    )

    @pytest.mark.parametrize("stacked", [False, True])
    @pytest.mark.parametrize(
        ("correction", "line"),
        [
            (
                {"head.bias": torch.zeros(3)},
                "correction lacks 'head.weight', which this pass trains",
            ),
            (
                {"head.bias": torch.zeros(1), "head.weight": torch.zeros(3, 16)},
                r"'head.bias' has the shape \[1\], what is trained \[3\]",
            ),
            (
                {n: torch.zeros(2) for n in ("head.bias", "head.weight", "head.delta")},
                r"'head.bias' has the shape \[2\], what is trained \[3\]",
            ),
            (
                {n: torch.zeros(3) for n in ("head.bias", "backbone.1.running_mean")},
                r"correction has 'backbone.1.running_mean', which this pass doesn't train; the",
            ),
            ({"head.bias": 0.0}, r"correction\['head.bias'\] must be a tensor, not float"),
        ],
    )
    def test_others_than_what_is_trained_are_refused(self, federation, stacked, correction, line):
        class Wrong(Corrected):
            def correction(self, w, client):
                return correction

        trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
        trainer.stacked = stacked
        clients = trainer.clients(1, range(2))
        for error in trainer.update_all(Wrong(), net.initial_weights(), clients):
            assert isinstance(error, TypeError if "float" in line else ValueError)
            assert re.search(line, str(error))


class TestLosses:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_weights_that_are_added_up_decay_each_by_itself(self, federation, momentum):
        """Their gradients are one and the same tensor."""

        class Delta(LocalSGD):
            def initial(self, net, w, rng):
                return {**w, "head.delta": torch.zeros(3, 16)}

            def loss(self, net, w, batch):
                x = batch.x.flatten(1)
                logits = F.linear(x, w["head.weight"] + w["head.delta"], w["head.bias"])
                return cross_entropy(logits, batch), {}

        settings = {"momentum": momentum, "weight_decay": 0.1, "epochs": 1, "batch_size": 12}
        model = linear((1, 4, 4), 3)
        alone, together = both(federation, model, Delta(), **settings)
        assert_same(alone, together)
        # One step on all of client 2's examples, by torch.optim.
        net = Net(model)
        w = {**net.initial_weights(), "head.delta": torch.zeros(3, 16)}
        w = {name: tensor.requires_grad_() for name, tensor in w.items()}
        index = federation.labelled(2)
        x, y = normalised(federation.source, index), federation.source.y_train[index]
        logits = F.linear(x.flatten(1), w["head.weight"] + w["head.delta"], w["head.bias"])
        F.cross_entropy(logits, torch.from_numpy(y)).backward()
        torch.optim.SGD(w.values(), lr=0.1, momentum=momentum, weight_decay=0.1).step()
        for name, tensor in w.items():
            torch.testing.assert_close(alone[2].arrays["arrays"][name], tensor.detach())

    def test_a_count_that_is_a_weight_is_that_of_its_step(self, federation):
        class Noting(LocalSGD):
            def initial(self, net, w, rng):
                return {**w, "head.scale": torch.ones(())}

            def loss(self, net, w, batch):
                loss = cross_entropy(w["head.scale"] * net(w, batch.x), batch)
                return loss, {"scale": w["head.scale"], "copy": w["head.scale"] * 1}

        for found in both(federation, linear((1, 4, 4), 3), Noting()):
            for upload in found:
                assert upload.metrics["scale"] == pytest.approx(upload.metrics["copy"])
                assert upload.metrics["scale"] != 6.0  # six steps, and it moves

    def test_no_steps_are_no_steps(self, federation):
        class Idle(LocalSGD):
            def update(self, w, client):
                w_k, log = yield from sgd(self.loss, w, client.labelled, steps=0)
                return Upload({"arrays": w_k}, 1, log)

        trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
        w = net.initial_weights()
        upload, _ = trainer.update(Idle(), w, 0, 1)
        assert np.isnan(upload.metrics["train_loss"])
        assert all(torch.equal(upload.arrays["arrays"][name], w[name]) for name in w)

    def test_what_a_loss_holds_is_let_go(self, federation):
        """A partial with a model of its own, made anew for each client and round."""
        anchors = []

        class Anchored(LocalSGD):
            def update(self, w, client):
                anchor = w["head.bias"].clone()
                anchors.append(weakref.ref(anchor))
                loss = partial(self.near, anchor=anchor)
                w_k, log = yield from sgd(loss, w, client.labelled)
                return Upload({"arrays": w_k}, 1, log)

            def near(self, net, w, batch, anchor):
                apart = (w["head.bias"] - anchor).square().sum()
                return cross_entropy(net(w, batch.x), batch) + apart, {}

        trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
        for round in (1, 2):
            trainer.update_all(Anchored(), net.initial_weights(), trainer.clients(round, range(4)))
        gc.collect()
        assert len(anchors) == 8
        assert not any(anchor() is not None for anchor in anchors)

    @pytest.mark.parametrize(
        ("returned", "line"),
        [
            (lambda loss: loss, r"a loss must return \(loss, counts\)"),
            (lambda loss: (loss, [loss]), r"a loss must return \(loss, counts\)"),
            (lambda loss: (loss, {"n": 3.0}), "scalar tensors, but n is float"),
            (lambda loss: (loss.repeat(2), {}), r"scalar tensors, but the loss is \[2\]"),
        ],
    )
    def test_a_loss_that_returns_something_else(self, federation, returned, line):
        class Odd(LocalSGD):
            def loss(self, net, w, batch):
                return returned(cross_entropy(net(w, batch.x), batch))

        trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
        with pytest.raises(TypeError, match=line):
            trainer.update(Odd(), net.initial_weights(), 0, 1)


def test_clients_that_do_not_fit_side_by_side_go_in_halves(federation, monkeypatch):
    """And what the failed attempt has made is let go before the next."""
    made, asked = [], []
    run_stacked = local.run_stacked

    def short_of_memory(setting, passes, *when):
        asked.append(len(passes))
        assert not any(one() is not None for one in made)
        if len(passes) > 2:
            activation = torch.ones(3)
            made.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("no memory")
        return run_stacked(setting, passes, *when)

    monkeypatch.setattr(local, "run_stacked", short_of_memory)
    with pytest.warns(UserWarning, match="4 clients don't fit side by side: in halves"):
        alone, together = both(federation, linear((1, 4, 4), 3))
    assert asked == [4, 2, 2]
    assert_same(alone, together)
    trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
    trainer.stacked = True
    with pytest.warns(UserWarning, match="in halves"):
        trainer.update_all(LocalSGD(), net.initial_weights(), trainer.clients(1, range(4)))
    assert trainer.max_stack == 2


class TestModels:
    def test_dropout_depends_on_seed_round_and_client_only(self, federation):
        model = small(nn.Linear(16, 16), nn.Dropout(0.5))
        with pytest.warns(UserWarning, match="clients go one by one"):
            alone, together = both(federation, model)
        assert_same(alone, together, exactly=True)
        trainer, net = make_trainer(federation, model)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        upload, _ = trainer.update(LocalSGD(), net.initial_weights(), 3, 1)
        assert torch.equal(torch.get_rng_state(), state)
        assert_same([upload], alone[3:], exactly=True)
        other, _ = trainer.update(LocalSGD(), net.initial_weights(), 3, 2)
        name = "backbone.1.weight"
        assert not torch.equal(other.arrays["arrays"][name], upload.arrays["arrays"][name])

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_batch_norm_takes_a_batch_of_one(self, federation, dims):
        """Twelve examples in batches of 11: the last batch has one, without a variance."""
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](16)
        shape = nn.Unflatten(1, (16,) + (1,) * (0, 2, 3)[dims - 1])
        model = small(nn.Linear(16, 16), shape, norm, nn.Flatten())
        alone, together = both(federation, model, batch_size=11, lr=0.01)
        assert_same(alone, together)
        assert all(t.isfinite().all() for one in alone for t in one.arrays["arrays"].values())

    def test_static_batch_norm_makes_clients_go_one_by_one(self, federation):
        model = small(nn.Linear(16, 16), nn.BatchNorm1d(16, track_running_stats=False))
        with pytest.warns(UserWarning, match="one by one.*layers that mix examples"):
            alone, together = both(federation, model)
        assert_same(alone, together, exactly=True)

    def test_layers_may_share_a_weight(self, federation):
        first, second = nn.Linear(16, 16), nn.Linear(16, 16)
        second.weight = first.weight
        model = small(first, nn.ReLU(), second)
        net = Net(model)
        assert [n for n in net.initial_weights() if n.endswith("weight")] == [
            "backbone.1.weight",
            "head.weight",
        ]
        x = torch.randn(5, 1, 4, 4)
        torch.testing.assert_close(net(net.initial_weights(), x), model(x))
        assert_same(*both(federation, model))

    def test_buffers_of_whole_numbers_stay_such(self, make_task):
        """On the way and in averages all arrays are float32."""

        class Order(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("order", torch.arange(16).flip(0))
                self.register_buffer("on", torch.tensor([True, False] * 8))

            def forward(self, x):
                return torch.where(self.on, x, 0.0)[:, self.order]

        task = make_task(model=lambda shape, classes: small(Order()))
        arrays = {
            name: tensor.numpy().astype(np.float32)
            for name, tensor in Net(task.model()).initial_weights().items()
        }
        replies, _ = InlineGrid(task).train(arrays, 1, [0, 1, 2, 3])
        assert not replies.failures
        for found in (arrays["arrays"] for arrays in replies.arrays):
            np.testing.assert_array_equal(found["backbone.1.order"], np.arange(15, -1, -1))
            np.testing.assert_array_equal(found["backbone.1.on"], [1, 0] * 8)
        tested = Worker(task).test_generic(arrays, [0])
        assert len(tested.scores["generic"][0]) == 30


def outcome(update, federation):
    """Return what becomes of client 0's update: its metrics, or why it has failed."""
    trainer, net = make_trainer(federation, linear((1, 4, 4), 3))
    intake = Intake(lambda *kept: None, None, Clock())
    (found,) = trainer.update_all(update, net.initial_weights(), trainer.clients(1, [0]))
    intake.take(1, 0, 0, found)
    replies, _ = intake.end()
    return replies.failures.get(0) or {name: column[0] for name, column in replies.metrics.items()}


def giving(upload):
    """Return a client update whose result is made from its weights."""

    class Giving(LocalSGD):
        def update(self, w, client):
            return upload(w)
            yield

    return Giving()


class TestFaultyUpdates:
    @pytest.mark.parametrize(
        ("upload", "line"),
        [
            (lambda w: w, "TypeError: the client update returned dict, not an Upload"),
            (lambda w: Upload({"arrays": w}, float("nan")), "ValueError: num_examples = nan: must"),
            (
                lambda w: Upload({"arrays": w}, -1),
                "ValueError: num_examples = -1.0: must be",
            ),
            (lambda w: Upload({"arrays": w}, None), "TypeError: num_examples and the metrics must"),
            (lambda w: Upload({"arrays": w}, 1, {"x": "y"}), "TypeError: num_examples and the"),
            (
                lambda w: Upload({"arrays": {"x": np.ones(2)}}, 1),
                "TypeError: the array x is no",
            ),
            (lambda w: sys.exit("bye"), "RuntimeError: it called sys.exit('bye')"),
            (lambda w: w["nowhere"], "KeyError: 'nowhere' (test_own_parts.py, line "),
        ],
    )
    def test_a_client_fails_alone(self, federation, upload, line):
        assert outcome(giving(upload), federation).startswith(line)

    def test_one_that_is_no_generator(self, federation):
        class Plain(LocalSGD):
            def update(self, w, client):
                return Upload({"arrays": w}, 1)

        line = "TypeError: update must be a generator"
        assert outcome(Plain(), federation).startswith(line)

    def test_metrics_may_be_tensors(self, federation):
        metrics = {"a": torch.tensor(2.5), "b": np.float32(0.5), "c": True, "d": 3}
        found = outcome(giving(lambda w: Upload({"arrays": w}, 1, metrics)), federation)
        assert found == {"num_examples": 1, "a": 2.5, "b": 0.5, "c": 1, "d": 3}
        assert {type(value) for value in found.values()} <= {int, float}

    def test_a_personal_model_that_fails_names_its_client(self, federation):
        class NoPersonal(LocalSGD):
            def personal(self, net, w_k, client, inputs):
                raise RuntimeError("no battery")

        trainer, net = make_trainer(federation, mlp((1, 4, 4), 3))
        line = "round 2: client 1's personal model can't be tested: RuntimeError: no battery"
        assert isinstance(trainer, LocalTrainer)
        clients, none = trainer.clients(2, [1, 3]), torch.zeros(0, 16)
        with pytest.raises(EngineError, match=line):
            Evaluator(trainer).test_personal(
                NoPersonal(), net.initial_weights(), clients, [none] * 2
            )

"""CReFF's server: aggregation by hand, gradient matching and re-training."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn
from torch.nn import functional as F

from fedsim.engine import flower
from fedsim.errors import ConfigError
from strategies import FedAvg
from strategies.creff import CReFF, Gradients, distances, match, mean_gradients, retrain

C, D, M = 3, 4, 6
FEW = {"num_of_feature": M, "match_epochs": 5, "crt_epochs": 4}


class Nodes:
    """As much of a grid as a strategy looks at."""

    def get_node_ids(self):
        return range(4)


def rng():
    return np.random.default_rng(0)


def answer(num_examples, has, seed=0, model=1.0, loss=1.0):
    """Return a client's reply, with random gradients for the classes it has."""
    flower.enter_runtime()
    draw, has = np.random.default_rng(seed), np.float32(has)
    gradients = {
        "gradients.weight": np.float32(draw.normal(size=(C, C, D))) * has[:, None, None],
        "gradients.bias": np.float32(draw.normal(size=(C, C))) * has[:, None],
        "gradients.has": has,
    }
    question = Message(RecordDict(), 0, "train")
    flower.identify(question, "1")
    arrays = {"backbone.w": np.float32([model]), "head.weight": np.full((C, D), model, "float32")}
    groups = {"arrays": arrays, "gradients": gradients}
    return flower.reply(question, groups, {"num-examples": num_examples, "train_loss": loss})


def start(**options):
    """Return a strategy that has sent round 1's model."""
    flower.enter_runtime()
    strategy = CReFF(**{**FEW, **options})
    arrays = {
        "backbone.w": np.float32([0.0]),
        "head.weight": np.zeros((C, D), np.float32),
        "retrained.weight": np.float32(rng().normal(size=(C, D))),
        "retrained.bias": np.float32(rng().normal(size=C)),
    }
    strategy.configure_train(1, flower.to_record(arrays), ConfigRecord(), Nodes())
    return strategy


def gradient_record(weight, bias, has):
    return flower.to_record(
        {
            "gradients.weight": np.float32(weight),
            "gradients.bias": np.float32(bias),
            "gradients.has": np.float32(has),
        }
    )


def some_gradients(classes=range(C)):
    draw = torch.Generator().manual_seed(1)
    a = len(classes)
    return Gradients(
        torch.tensor(list(classes)),
        torch.randn(a, C, D, generator=draw),
        torch.randn(a, C, generator=draw),
    )


def some_features(seed=2):
    return torch.randn(C, M, D, generator=torch.Generator().manual_seed(seed))


def some_classifier():
    draw = torch.Generator().manual_seed(3)
    return torch.randn(C, D, generator=draw), torch.randn(C, generator=draw)


class TestAggregation:
    def test_gradients_are_averaged_over_the_clients_that_have_the_class(self):
        # Two classes, one feature. Class 0: both clients, (1 + 3) / 2 = 2 and (-4 + 0) / 2 = -2;
        # class 1: the second client only. Numbers of examples play no part.
        one = gradient_record([[[1], [-4]], [[0], [0]]], [[6, 2], [0, 0]], [1, 0])
        two = gradient_record([[[3], [0]], [[5], [7]]], [[0, 2], [8, 9]], [1, 1])
        found = mean_gradients([one, two])
        assert found.classes.tolist() == [0, 1]
        assert found.weight.tolist() == [[[2], [-2]], [[5], [7]]]
        assert found.bias.tolist() == [[3, 2], [8, 9]]
        assert found.weight.dtype == found.bias.dtype == torch.float32

    def test_a_class_that_nobody_has_is_left_out(self):
        record = gradient_record([[[0], [0]], [[5], [7]]], [[0, 0], [8, 9]], [0, 1])
        found = mean_gradients([record, record])
        assert found.classes.tolist() == [1]
        assert found.weight.tolist() == [[[5], [7]]]
        assert found.bias.tolist() == [[8, 9]]

    def test_the_model_is_averaged_as_fedavg_does(self):
        replies = [answer(3, [1, 1, 0], model=1.0), answer(1, [0, 1, 1], 1, model=5.0)]
        arrays, metrics = start().aggregate_train(1, replies)
        # (3 * 1 + 1 * 5) / 4 = 2.
        assert arrays["backbone.w"].numpy().tolist() == [2.0]
        assert (arrays["head.weight"].numpy() == 2.0).all()
        assert list(arrays) == ["backbone.w", "head.weight", "retrained.weight", "retrained.bias"]
        assert metrics["train_loss"] == 1.0
        plain = FedAvg()
        plain.configure_train(1, ArrayRecord(), ConfigRecord(), Nodes())
        expected, _ = plain.aggregate_train(1, replies)
        for name, array in expected.items():
            assert (arrays[name].numpy() == array.numpy()).all()

    def test_a_round_matches_at_the_classifier_that_was_sent_and_re_trains(self):
        strategy = start(seed=5)
        replies = [answer(3, [1, 1, 0]), answer(1, [0, 1, 0], 1)]
        sent = strategy.sent
        arrays, _ = strategy.aggregate_train(1, replies)
        classifier = [
            torch.tensor(sent[name].numpy()) for name in ("retrained.weight", "retrained.bias")
        ]
        real = mean_gradients([reply.content.array_records["gradients"] for reply in replies])
        untouched = start(seed=5, match_epochs=1, lr_feature=1e-30)
        untouched.aggregate_train(1, replies)
        drawn = untouched.features
        expected = match(drawn, real, *classifier, steps=5, lr=0.1)
        torch.testing.assert_close(strategy.features, expected)
        # Class 2 has no gradient: its features stay as they were drawn.
        assert torch.equal(strategy.features[2], drawn[2])
        assert not torch.equal(strategy.features[0], drawn[0])
        assert arrays["retrained.weight"].numpy().shape == (C, D)
        assert not np.array_equal(arrays["retrained.weight"].numpy(), classifier[0].numpy())

    def test_clients_without_examples_have_no_say(self):
        some = [answer(3, [1, 1, 0], model=1.0)]
        idle = answer(0, [0, 0, 0], model=9.0, loss=float("nan"))
        one, other = start(), start()
        alone, _ = one.aggregate_train(1, some)
        both, metrics = other.aggregate_train(1, [*some, idle])
        for name, array in alone.items():
            np.testing.assert_array_equal(both[name].numpy(), array.numpy())
        assert torch.equal(one.features, other.features)
        assert metrics["train_loss"] == 1.0

    def test_a_round_without_examples_changes_nothing(self):
        strategy = start()
        assert strategy.aggregate_train(1, []) == (None, None)
        assert strategy.aggregate_train(1, [answer(0, [0, 0, 0])]) == (None, None)
        assert strategy.features is None

    def test_the_seed_decides_all(self):
        def run(seed):
            strategy = start(seed=seed)
            arrays, _ = strategy.aggregate_train(1, [answer(3, [1, 1, 1])])
            return strategy.features, arrays["retrained.weight"].numpy()

        (features, weight), (again, same), (other, unlike) = run(1), run(1), run(2)
        assert torch.equal(features, again)
        np.testing.assert_array_equal(weight, same)
        assert not torch.equal(features, other)
        assert not np.array_equal(weight, unlike)

    def test_features_go_on_from_round_to_round(self):
        strategy = start()
        model, _ = strategy.aggregate_train(1, [answer(3, [1, 1, 1])])
        first = strategy.features
        strategy.configure_train(2, model, ConfigRecord(), Nodes())
        strategy.aggregate_train(2, [answer(3, [1, 0, 0])])
        assert torch.equal(strategy.features[1:], first[1:])
        assert not torch.equal(strategy.features[0], first[0])

    def test_threads_are_given_back(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            start().aggregate_train(1, [answer(3, [1, 1, 1])])
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


class TestMatching:
    def test_distances_equal_a_loop_with_automatic_differentiation(self):
        real, features, (weight, bias) = some_gradients([0, 2]), some_features(), some_classifier()
        found = distances(features[[0, 2]], real, weight, bias)
        layer = nn.Linear(D, C)
        layer.load_state_dict({"weight": weight, "bias": bias})
        for i, c in enumerate([0, 2]):
            loss = F.cross_entropy(layer(features[c]), torch.full((M,), c))
            made_w, made_b = (
                g.double().numpy() for g in torch.autograd.grad(loss, list(layer.parameters()))
            )
            pairs = [*zip(made_w, real.weight[i].double().numpy(), strict=True)]
            pairs.append((made_b, real.bias[i].double().numpy()))
            cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in pairs]
            assert found[i].item() == pytest.approx(sum(1 - cos for cos in cosines), rel=1e-4)

    def test_the_distance_of_a_gradient_from_itself_is_0(self):
        features, (weight, bias) = some_features(), some_classifier()
        y = torch.eye(C)[:, None]
        error = ((features @ weight.T + bias).softmax(2) - y) / M
        real = Gradients(torch.arange(C), error.transpose(1, 2) @ features, error.sum(1))
        torch.testing.assert_close(
            distances(features, real, weight, bias), torch.zeros(C), rtol=0, atol=1e-3
        )

    def test_matching_brings_every_class_nearer(self):
        real, features, classifier = some_gradients(), some_features(), some_classifier()
        matched = match(features, real, *classifier, steps=100, lr=0.1)
        before = distances(features, real, *classifier)
        after = distances(matched, real, *classifier)
        assert (after < before - 0.5).all()
        assert torch.equal(features, some_features())  # not changed in place

    def test_steps_equal_those_of_an_optimiser(self):
        real, features, classifier = some_gradients([1]), some_features(), some_classifier()
        own = features[[1]].clone().requires_grad_()
        optimiser = torch.optim.SGD([own], lr=0.3)
        for _ in range(4):
            optimiser.zero_grad()
            distances(own, real, *classifier).sum().backward()
            optimiser.step()
        matched = match(features, real, *classifier, steps=4, lr=0.3)
        torch.testing.assert_close(matched[1], own[0].detach())
        assert torch.equal(matched[[0, 2]], features[[0, 2]])

    def test_rows_without_length_are_finite(self):
        """Gradients of 0, and features all 0 or so sure of their class that theirs vanish."""
        real = some_gradients()
        real = real._replace(weight=real.weight.clone(), bias=torch.zeros(C, C))
        real.weight[:, 1] = 0
        features = some_features()
        features[0] = 0
        features[1] = 1e4 * torch.eye(D)[1]
        weight, bias = torch.eye(C, D), torch.zeros(C)
        found = distances(features, real, weight, bias)
        assert found.isfinite().all()
        assert found[1].item() == C + 1  # all cosines are 0
        assert match(features, real, weight, bias, steps=3, lr=0.1).isfinite().all()


class TestRetraining:
    def test_it_equals_a_plain_loop(self):
        features = some_features()
        weight, bias = retrain(features, rng(), epochs=3, batch_size=4, lr=0.5)
        draw = rng()
        first = torch.from_numpy(draw.uniform(-0.5, 0.5, (C, D + 1))).float()  # 1 / sqrt(4)
        layer = nn.Linear(D, C)
        layer.load_state_dict({"weight": first[:, :-1], "bias": first[:, -1]})
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
        x, y = features.reshape(-1, D), torch.tensor([c for c in range(C) for _ in range(M)])
        for _ in range(3):
            order = draw.permutation(C * M)
            for begin in range(0, C * M, 4):  # 18 examples: the last batch has 2
                chosen = order[begin : begin + 4]
                optimiser.zero_grad()
                F.cross_entropy(layer(x[chosen]), y[chosen]).backward()
                optimiser.step()
        torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(bias, layer.bias.detach(), rtol=1e-5, atol=1e-5)

    def test_it_lowers_the_loss(self):
        features = some_features() + 2 * torch.eye(C, D)[:, None]

        def loss(epochs):
            weight, bias = retrain(features, rng(), epochs=epochs, batch_size=4, lr=0.1)
            y = torch.tensor([c for c in range(C) for _ in range(M)])
            return F.cross_entropy(features.reshape(-1, D) @ weight.T + bias, y).item()

        assert loss(30) < 0.5 * loss(1)


class TestCReFFFailure:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_of_feature": 0}, "method.num_of_feature = 0"),
            ({"match_epochs": 0}, "method.match_epochs = 0"),
            ({"crt_epochs": -1}, "method.crt_epochs = -1"),
            ({"crt_batch_size": 0}, "method.crt_batch_size = 0"),
            ({"lr_feature": 0.0}, "method.lr_feature = 0.0"),
            ({"lr_net": math.nan}, "method.lr_net = nan"),
            ({"lr_net": math.inf}, "method.lr_net = inf"),
        ],
    )
    def test_hyperparameters_out_of_range(self, options, message):
        with pytest.raises(ConfigError, match=message):
            CReFF(**options)

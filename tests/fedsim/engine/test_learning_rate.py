"""Learning rates that change from round to round, or are a pass's own.

What one learning rate does is compared with torch.optim in test_local.py; here others are compared
with runs that have them from the start. They are told apart by rounding alone: 1e-5 of a value.
"""

from unittest.mock import patch

import pytest
import torch

import fedsim
from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.sgd import run_stacked
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import LocalSGD, Upload, sgd
from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.small import cnn, mlp


def make_trainer(federation, model, stacked=False, **settings):
    training = LocalTraining(**{"epochs": 3, "batch_size": 4, "lr": 0.4, **settings})
    torch.manual_seed(0)
    net = Net(model())
    trainer = LocalTrainer(
        net, federation, Statistics.of(federation), training, seed=7, stacked=stacked
    )
    return trainer, net.initial_weights()


def perceptron():
    return mlp((1, 4, 4), 3, hidden=(6,))


PLAIN = LocalSGD()  # one for all rounds, as in a run: its steps are known from the first on


def trained(trainer, w, round, update=PLAIN):
    """Return the weights of all clients after a round."""
    found = trainer.update_all(update, w, trainer.clients(round, range(4)))
    assert not any(isinstance(one, Exception) for one in found), found
    return [upload.arrays["arrays"] for upload, _ in found]


def assert_close(some, others):
    for one, other in zip(some, others, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.5, 0.1)])
def test_each_round_has_its_own_however_often_a_step_was_taken(
    federation, stacked, momentum, weight_decay
):
    settings = {"momentum": momentum, "weight_decay": weight_decay}
    trainer, w = make_trainer(federation, perceptron, stacked, lr_decay=0.5, **settings)
    for round, lr in enumerate((0.4, 0.2, 0.1, 0.05), start=1):
        constant, _ = make_trainer(federation, perceptron, stacked, lr=lr, **settings)
        assert_close(trained(trainer, w, round), trained(constant, w, round))


def test_buffers_follow_as_always(federation):
    def model():
        return cnn((1, 4, 4), 3, channels=(4,), norm="batch")

    trainer, w = make_trainer(federation, model, stacked=True, lr_decay=0.5)
    constant, _ = make_trainer(federation, model, stacked=True, lr=0.1)
    assert_close(trained(trainer, w, 3), trained(constant, w, 3))


def test_a_cosine_falls_to_nothing_after_the_last_round():
    training = LocalTraining(
        epochs=1, batch_size=1, lr=2.0, lr_schedule="cosine", lr_decay=0.9, rounds=3
    )
    # (1 + cos 0) / 2, (1 + cos 60°) / 2, (1 + cos 120°) / 2
    expected = [2 * 1.0, 2 * 0.9 * 0.75, 2 * 0.81 * 0.25]
    assert [training.in_round(t).lr for t in (1, 2, 3)] == pytest.approx(expected)
    assert training.in_round(4).lr == pytest.approx(0)
    assert training.in_round(9).lr == pytest.approx(0)
    again = training.in_round(2)
    assert again.in_round(3) == again


class Slow(LocalSGD):
    """A pass with a learning rate of its own, and one with the experiment's."""

    def update(self, w, client):
        w, _ = yield from sgd(self.loss, w, client.labelled, lr=client.training.lr / 4)
        w, log = yield from sgd(self.loss, w, client.labelled)
        return Upload({"arrays": w}, 1, log)


class Each(LocalSGD):
    """Clients with learning rates that differ, of which some are tensors."""

    def update(self, w, client):
        lr = torch.tensor(0.1) if client.id % 2 == 0 else 0.2
        w, log = yield from sgd(self.loss, w, client.labelled, lr=lr)
        return Upload({"arrays": w}, 1, log)


class TestPasses:
    @pytest.mark.parametrize("stacked", [False, True])
    def test_a_pass_may_have_its_own(self, federation, stacked):
        trainer, w = make_trainer(federation, perceptron, stacked, lr_decay=0.5)
        slow, _ = make_trainer(federation, perceptron, stacked, lr=0.2 / 4)
        usual, _ = make_trainer(federation, perceptron, stacked, lr=0.2)

        class First(LocalSGD):
            def update(self, w, client):
                w, _ = yield from sgd(self.loss, w, client.labelled)
                yield from sgd(self.loss, w, client.labelled, steps=0)
                return Upload({"arrays": w}, 1)

        class Second(LocalSGD):
            def update(self, w, client):
                yield from sgd(self.loss, w, client.labelled, steps=0)
                w, _ = yield from sgd(self.loss, w, client.labelled)
                return Upload({"arrays": w}, 1)

        halves = trained(slow, w, 2, First())
        expected = [trained(usual, half, 2, Second())[k] for k, half in enumerate(halves)]
        assert_close(trained(trainer, w, 2, Slow()), expected)

    def test_clients_with_others_train_side_by_side_with_their_likes(self, federation):
        together, w = make_trainer(federation, perceptron, stacked=True)
        alone, _ = make_trainer(federation, perceptron)
        with patch("fedsim.engine.local.run_stacked", side_effect=run_stacked) as side_by_side:
            found = trained(together, w, 1, Each())
        assert [len(call.args[1]) for call in side_by_side.call_args_list] == [2, 2]
        assert_close(found, trained(alone, w, 1, Each()))
        for lr, first in ((0.1, 0), (0.2, 1)):
            constant, _ = make_trainer(federation, perceptron, lr=lr)
            assert_close(found[first::2], trained(constant, w, 1)[first::2])

    @pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
    def test_one_that_is_none_is_refused(self, federation, lr):
        class Wrong(LocalSGD):
            def update(self, w, client):
                yield from sgd(self.loss, w, client.labelled, lr=lr)

        trainer, w = make_trainer(federation, perceptron)
        with pytest.raises(ValueError, match=f"lr = {lr}: must be at least 0"):
            trainer.update(Wrong(), w, client=0, round=1)


def test_client_updates_see_their_rounds(federation):
    trainer, _ = make_trainer(federation, perceptron, lr_decay=0.5)
    assert [trainer.clients(t, [0])[0].training.lr for t in (1, 2, 3)] == [0.4, 0.2, 0.1]


class TestExperiments:
    @pytest.mark.parametrize(("key", "value", "allowed"), [
        ("lr_decay", 0.0, "greater than 0"),
        ("lr_decay", 1.5, "less than or equal to 1"),
        ("lr_schedule", "linear", "'constant' or 'cosine'"),
    ])  # fmt: skip
    def test_mistakes_are_named(self, key, value, allowed):
        with pytest.raises(ConfigError, match=rf"training\.{key} = .*{allowed}"):
            fedsim.Experiment(training={key: value})

    def test_a_run_slows_down(self, tmp_path):
        losses = []
        for lr_decay in (1.0, 1e-9):
            experiment = fedsim.Experiment(
                clients={"count": 5},
                model={"name": "linear"},
                training={"rounds": 3, "lr": 0.05, "lr_decay": lr_decay},
                engine={"backend": "inline"},
            )
            run = fedsim.simulate(experiment, out=tmp_path / str(lr_decay))
            losses.append(run.rounds["train_loss"].tolist())
        usual, slowing = losses
        # The first round is the same; then one learns on, and the other stands still.
        assert slowing[0] == pytest.approx(usual[0], rel=1e-5)
        assert usual[2] < 0.95 * usual[1]
        assert slowing[2] == pytest.approx(slowing[1], rel=1e-4)

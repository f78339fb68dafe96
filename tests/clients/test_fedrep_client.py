"""FedRep's client against a plain loop, and which part each of its passes leaves alone."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from clients.fedrep import FedRep
from fedsim.errors import ConfigError
from fedsim.models import Net, parts
from fedsim.models.small import linear


@dataclass(frozen=True, kw_only=True)
class Watched(FedRep):
    """FedRep whose passes are noted as they are made."""

    passes: list = field(default_factory=list)

    def update(self, w, client):
        steps, answer = super().update(w, client), None
        while True:
            try:
                request = steps.send(answer)
            except StopIteration as finished:
                return finished.value
            answer = yield request
            self.passes.append(answer.w)


@pytest.fixture
def head():
    """A head that a client may have kept."""
    draw = torch.Generator().manual_seed(1)
    return {
        "head.weight": torch.randn(3, 4, generator=draw),
        "head.bias": torch.randn(3, generator=draw),
    }


def test_update_equals_a_plain_loop_over_the_head_and_then_the_backbone(bench, head):
    upload = bench.update(FedRep(head_epochs=2), bench.w, head)
    module = bench.module(bench.w, head)
    head_loss = bench.fit(module, [module.head], "pass 0.0", epochs=2)
    loss = bench.fit(module, [module.backbone], "pass 1.0")
    trained = module.state_dict()
    bench.assert_weights(upload.arrays["arrays"], parts(trained, ["backbone"]))
    bench.assert_weights(upload.state, parts(trained, ["head"]))
    assert list(upload.arrays) == ["arrays"]
    assert upload.num_examples == 12
    assert upload.metrics["head_loss"] == pytest.approx(head_loss, rel=1e-5)
    assert upload.metrics["train_loss"] == pytest.approx(loss, rel=1e-5)


def test_each_pass_leaves_the_other_part_alone(bench, head):
    method = Watched(head_epochs=1)
    bench.update(method, bench.w, head)
    begin = {**bench.w, **head}
    after_head, after_backbone = method.passes

    def same(one, other):
        return {name for name in begin if torch.equal(one[name], other[name])}

    buffers = Net(bench.model).buffers
    assert len(buffers) == 4  # a running mean and variance of two layers
    backbone = {name for name in begin if name.startswith("backbone")}
    # BatchNorm's statistics follow the inputs, though nothing else of the backbone moves.
    assert same(after_head, begin) == backbone - buffers
    assert same(after_backbone, after_head) == set(head)


def test_the_head_has_ten_epochs_by_default(bench):
    upload = bench.update(FedRep(), bench.w)
    module = bench.module(bench.w)
    bench.fit(module, [module.head], "pass 0.0", epochs=10)
    bench.assert_weights(upload.state, parts(module.state_dict(), ["head"]))


def test_a_later_round_starts_from_the_kept_head(bench, head):
    later, first = bench.update(FedRep(), bench.w, head), bench.update(FedRep(), bench.w)
    assert not torch.equal(later.state["head.bias"], first.state["head.bias"])


def test_the_only_view_is_the_kept_head_on_the_global_backbone(bench, head):
    scores = bench.test(FedRep(), bench.w, head)
    assert list(scores) == ["personal"] == list(FedRep.views)
    bench.assert_scores(scores, "personal", bench.logits(bench.module(bench.w, head)))


class TestFedRepFailure:
    @pytest.mark.parametrize("epochs", [0, -1])
    def test_the_head_needs_an_epoch(self, epochs):
        with pytest.raises(ConfigError, match=rf"method\.head_epochs = {epochs}: must be at least"):
            FedRep(head_epochs=epochs)

    def test_a_model_that_is_all_head(self):
        net = Net(linear((1, 4, 4), 3))
        with pytest.raises(ConfigError, match="FedRep shares the layers before the head"):
            FedRep().initial(net, net.initial_weights(), np.random.default_rng(0))

"""FedBN's client against a plain loop, and which arrays leave it."""

import numpy as np
import pytest
import torch

from clients.fedbn import FedBN
from fedsim.engine.update import Inputs, LocalSGD
from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.small import cnn, linear

METHOD = FedBN()
SENT = {"backbone.0.weight", "backbone.4.weight", "head.weight", "head.bias"}
KEPT = {
    f"backbone.{layer}.{name}"
    for layer in (2, 6)
    for name in ("weight", "bias", "running_mean", "running_var")
}


@pytest.fixture
def layers(bench):
    """BatchNorm layers that a client may have kept."""
    draw = torch.Generator().manual_seed(1)
    return {name: 0.5 + torch.rand(bench.w[name].shape, generator=draw) for name in KEPT}


def test_update_equals_a_plain_loop_from_the_kept_layers(bench, layers):
    upload = bench.update(METHOD, bench.w, layers)
    module = bench.module(bench.w, layers)
    loss = bench.fit(module, [module], "pass 0.0")
    trained = module.state_dict()
    assert set(trained) == SENT | KEPT
    bench.assert_weights(upload.arrays["arrays"], {name: trained[name] for name in SENT})
    bench.assert_weights(upload.state, {name: trained[name] for name in KEPT})
    assert list(upload.arrays) == ["arrays"]
    assert upload.num_examples == 12
    assert upload.metrics["train_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_first_round_is_that_of_fedavg_whose_batch_norm_stays(bench):
    upload, plain = bench.update(METHOD, bench.w), bench.update(LocalSGD(), bench.w)
    assert set(upload.arrays["arrays"]) == SENT
    assert set(upload.state) == KEPT
    for name, tensor in (upload.arrays["arrays"] | upload.state).items():
        assert torch.equal(plain.arrays["arrays"][name], tensor)


def test_the_kept_layers_count_and_the_servers_do_not(bench, layers):
    upload = bench.update(METHOD, bench.w, layers)
    other_server = {name: t + 1 if name in KEPT else t for name, t in bench.w.items()}
    same = bench.update(METHOD, other_server, layers)
    first = bench.update(METHOD, bench.w)
    assert set(upload.state) == KEPT
    for name, tensor in upload.state.items():
        assert torch.equal(same.state[name], tensor)
        assert not torch.equal(first.state[name], tensor)


def test_the_only_view_is_the_global_model_with_the_kept_layers(bench, layers):
    scores = bench.test(METHOD, bench.w, layers)
    assert list(scores) == ["personal"] == list(METHOD.views)
    bench.assert_scores(scores, "personal", bench.logits(bench.module(bench.w, layers)))


def test_its_logits_by_hand(bench):
    """Of one image through one convolution with a single weight that isn't 0."""
    net = Net(cnn((1, 2, 2), 3, channels=(1,), norm="batch"))
    w = {name: torch.zeros_like(tensor) for name, tensor in net.initial_weights().items()}
    w["backbone.0.weight"][0, 0, 1, 1] = 3.0  # the centre: the image times 3
    own = {"weight": 2.0, "bias": -1.0, "running_mean": 4.0, "running_var": 25.0 - 1e-5}
    own = {f"backbone.2.{name}": torch.tensor([value]) for name, value in own.items()}
    w |= {"head.weight": torch.tensor([[1.0], [-2.0], [0.5]]), "head.bias": torch.ones(3)}
    x = torch.tensor([[[[1.0, 2.0], [3.0, 8.0]]]])
    inputs = Inputs(torch.full((1, 1), torch.nan), lambda: x)
    found = METHOD.personal(net, {**w, **own}, bench.client(), inputs)["personal"]
    f = 2 * (3 * 8 - 4) / 5 - 1  # the largest pixel survives the pooling
    np.testing.assert_allclose(found.numpy(), [[f + 1, -2 * f + 1, 0.5 * f + 1]], rtol=1e-5)


def test_a_client_that_never_trained_has_the_initial_layers(bench):
    scores = bench.test(METHOD, bench.w)
    bench.assert_scores(scores, "personal", bench.logits(bench.module(bench.w)))


class TestFedBNFailure:
    @pytest.mark.parametrize(
        "model", [linear((1, 4, 4), 3), cnn((1, 4, 4), 3), cnn((1, 4, 4), 3, norm="group")]
    )
    def test_a_model_without_batch_norm(self, model):
        net = Net(model)
        with pytest.raises(ConfigError, match=r"'fedbn' .* with model\.norm = 'batch'"):
            METHOD.initial(net, net.initial_weights(), np.random.default_rng(0))

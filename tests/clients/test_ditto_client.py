"""Ditto's client against a plain loop, and its special cases."""

import numpy as np
import pytest
import torch

from clients.ditto import Ditto
from fedsim.data.federate import federate
from fedsim.data.partition import iid
from fedsim.engine.update import Batch, Inputs, LocalSGD
from fedsim.errors import ConfigError
from fedsim.models import Net


@pytest.fixture
def v(bench):
    """A personal model that a client may have kept."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.3 * torch.rand(tensor.shape, generator=draw)
        for name, tensor in bench.w.items()
    }


@pytest.mark.parametrize("kept", [False, True])
def test_the_personal_model_equals_a_plain_loop(bench, v, kept):
    """From the last personal model, or in a first round from the global one."""
    upload = bench.update(Ditto(lam=0.7), bench.w, v if kept else None)
    module, anchor = bench.module(bench.w, v if kept else {}), bench.module(bench.w)

    def penalty():
        pairs = zip(module.parameters(), anchor.parameters(), strict=True)
        return 0.7 / 2 * sum((own - other.detach()).square().sum() for own, other in pairs)

    loss = bench.fit(module, [module], "pass 1.0", penalty=penalty)
    bench.assert_weights(upload.state, module.state_dict())
    assert upload.metrics["personal_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_the_upload_is_fedavgs(bench, v, kept):
    upload = bench.update(Ditto(lam=0.7), bench.w, v if kept else None)
    plain = bench.update(LocalSGD(), bench.w)
    assert list(upload.arrays) == ["arrays"]
    assert set(upload.arrays["arrays"]) == set(plain.arrays["arrays"])
    for name, tensor in plain.arrays["arrays"].items():
        assert torch.equal(upload.arrays["arrays"][name], tensor)
    assert upload.num_examples == plain.num_examples == 12
    assert upload.metrics["train_loss"] == plain.metrics["train_loss"]


def test_the_upload_equals_a_plain_loop(bench, v):
    module = bench.module(bench.w)
    bench.fit(module, [module], "pass 0.0")
    upload = bench.update(Ditto(), bench.w, v)
    bench.assert_weights(upload.arrays["arrays"], module.state_dict())


def test_lambda_zero_is_local_training_alone(bench, v):
    upload = bench.update(Ditto(lam=0.0), bench.w, v)
    module = bench.module(v)
    bench.fit(module, [module], "pass 1.0")
    bench.assert_weights(upload.state, module.state_dict())
    # Whatever the server sends.
    other = bench.update(Ditto(lam=0.0), {name: t + 1 for name, t in bench.w.items()}, v)
    for name, tensor in upload.state.items():
        assert torch.equal(other.state[name], tensor)


def test_the_loss_adds_half_lambda_times_the_squared_distance_of_the_parameters(bench):
    net, w = Net(bench.model), bench.w
    batch = Batch(torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2]), torch.ones(6))
    v = {name: tensor + 0.5 for name, tensor in w.items()}
    far, _ = Ditto(lam=3.0).personal_loss(net, dict(v), batch, w)
    near, _ = Ditto(lam=3.0).personal_loss(net, dict(v), batch, v)
    # Every parameter is 0.5 away; buffers don't count.
    num_parameters = sum(p.numel() for p in bench.model.parameters())
    assert (far - near).item() == pytest.approx(3.0 / 2 * 0.25 * num_parameters, rel=1e-5)


def test_the_views_are_the_global_and_the_kept_model(bench, v):
    scores = bench.test(Ditto(), bench.w, v)
    assert list(scores) == ["generic", "personal"] == list(Ditto.views)
    bench.assert_scores(scores, "generic", bench.logits(bench.module(bench.w)))
    bench.assert_scores(scores, "personal", bench.logits(bench.module(v)))


def test_the_generic_logits_by_hand(bench):
    f = torch.randn(7, 4, generator=torch.Generator().manual_seed(5))
    inputs = Inputs(f, lambda: pytest.fail("the inputs aren't needed"))
    found = Ditto().generic(Net(bench.model), bench.w, inputs)["generic"]
    expected = f.numpy() @ bench.w["head.weight"].numpy().T + bench.w["head.bias"].numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_client_without_labels_has_the_global_model(bench, source):
    """Its untrained personal model isn't kept, so that it stays the current global one."""
    bench = type(bench)(bench.model, federate(source, num_clients=4, partition=iid, labelled=0.0))
    upload = bench.update(Ditto(), bench.w)
    assert upload.num_examples == 0
    assert upload.state == {}
    scores = bench.test(Ditto(), bench.w, upload.state)
    bench.assert_scores(scores, "personal", bench.logits(bench.module(bench.w)))


class TestDittoFailure:
    @pytest.mark.parametrize("lam", [-0.1, float("nan"), float("inf")])
    def test_lambda_must_not_be_negative(self, lam):
        with pytest.raises(ConfigError, match=r"method\.lam = .*: must be at least 0"):
            Ditto(lam=lam)

"""FedPer's client against a plain loop, and what is shared and what stays."""

import numpy as np
import pytest
import torch

from clients.fedper import FedPer
from fedsim.engine.update import Inputs, LocalSGD
from fedsim.errors import ConfigError
from fedsim.models import Net, parts
from fedsim.models.small import linear

METHOD = FedPer()


@pytest.fixture
def head():
    """A head that a client may have kept."""
    draw = torch.Generator().manual_seed(1)
    return {
        "head.weight": torch.randn(3, 4, generator=draw),
        "head.bias": torch.randn(3, generator=draw),
    }


def test_update_equals_a_plain_loop_from_the_kept_head(bench, head):
    upload = bench.update(METHOD, bench.w, head)
    module = bench.module(bench.w, head)
    loss = bench.fit(module, [module], "pass 0.0")
    trained = module.state_dict()
    bench.assert_weights(upload.arrays["arrays"], parts(trained, ["backbone"]))
    bench.assert_weights(upload.state, parts(trained, ["head"]))
    assert list(upload.arrays) == ["arrays"]
    assert upload.num_examples == 12
    assert upload.metrics["train_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_first_round_is_that_of_fedavg_whose_head_stays(bench):
    upload, plain = bench.update(METHOD, bench.w), bench.update(LocalSGD(), bench.w)
    together = upload.arrays["arrays"] | upload.state
    assert set(upload.state) == {"head.weight", "head.bias"}
    assert set(upload.arrays["arrays"]).isdisjoint(upload.state)
    assert set(together) == set(plain.arrays["arrays"])
    for name, tensor in plain.arrays["arrays"].items():
        assert torch.equal(together[name], tensor)


def test_the_kept_head_counts_and_the_servers_does_not(bench, head):
    upload = bench.update(METHOD, bench.w, head)
    other_server = {**bench.w, "head.weight": bench.w["head.weight"] + 1}
    same = bench.update(METHOD, other_server, head)
    first = bench.update(METHOD, bench.w)
    assert set(upload.state) == set(head)
    for name, tensor in upload.state.items():
        assert torch.equal(same.state[name], tensor)
        assert not torch.equal(first.state[name], tensor)


def test_the_only_view_is_the_kept_head_on_the_global_backbone(bench, head):
    scores = bench.test(METHOD, bench.w, head)
    assert list(scores) == ["personal"] == list(METHOD.views)
    bench.assert_scores(scores, "personal", bench.logits(bench.module(bench.w, head)))


def test_its_logits_by_hand(bench, head):
    f = torch.randn(7, 4, generator=torch.Generator().manual_seed(5))
    inputs = Inputs(f, lambda: pytest.fail("the inputs aren't needed"))
    client = bench.client(state=head)
    found = METHOD.personal(Net(bench.model), METHOD.begin(bench.w, client), client, inputs)
    expected = f.numpy() @ head["head.weight"].numpy().T + head["head.bias"].numpy()
    np.testing.assert_allclose(found["personal"].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_client_that_never_trained_has_the_servers_initial_head(bench):
    scores = bench.test(METHOD, bench.w)
    bench.assert_scores(scores, "personal", bench.logits(bench.module(bench.w)))


class TestFedPerFailure:
    def test_a_model_that_is_all_head(self):
        net = Net(linear((1, 4, 4), 3))
        with pytest.raises(ConfigError, match="FedPer shares the layers before the head"):
            METHOD.initial(net, net.initial_weights(), np.random.default_rng(0))

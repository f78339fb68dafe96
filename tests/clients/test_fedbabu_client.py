"""FedBABU's client against a plain loop: a head that never moves, and models made for the test."""

import numpy as np
import pytest
import torch

from clients.fedbabu import FedBABU
from fedsim.engine.update import Inputs
from fedsim.errors import ConfigError
from fedsim.models import Net, parts
from fedsim.models.small import linear


def test_update_equals_a_plain_loop_over_the_body(bench):
    upload = bench.update(FedBABU(), bench.w)
    module = bench.module(bench.w)
    loss = bench.fit(module, [module.backbone], "pass 0.0")
    bench.assert_weights(upload.arrays["arrays"], parts(module.state_dict(), ["backbone"]))
    assert list(upload.arrays) == ["arrays"]
    assert upload.state == {}
    assert upload.num_examples == 12
    assert upload.metrics["train_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_head_is_the_initial_one_after_training(bench):
    """Nobody uploads a head, so that what the server drew is what everybody trains against."""
    server = FedBABU().initial(Net(bench.model), bench.w, np.random.default_rng(0))
    after = server | bench.update(FedBABU(), server).arrays["arrays"]
    for name, tensor in bench.w.items():
        assert torch.equal(after[name], tensor) == name.startswith("head.")


def test_the_views_are_the_global_model_and_its_fine_tuned_copy(bench):
    scores = bench.test(FedBABU(finetune_epochs=2), bench.w)
    module = bench.module(bench.w)
    assert list(scores) == ["generic", "personal"] == list(FedBABU.views)
    bench.assert_scores(scores, "generic", bench.logits(module))
    bench.fit(module, [module], "personalise 0.0", epochs=2)
    bench.assert_scores(scores, "personal", bench.logits(module))


def test_five_epochs_of_fine_tuning_by_default(bench):
    module = bench.module(bench.w)
    bench.fit(module, [module], "personalise 0.0", epochs=5)
    bench.assert_scores(bench.test(FedBABU(), bench.w), "personal", bench.logits(module))


def test_a_fine_tuned_head_is_tested_on_the_global_body(bench):
    scores = bench.test(FedBABU(finetune="head"), bench.w)
    module = bench.module(bench.w)
    bench.fit(module, [module.head], "personalise 0.0", epochs=5)
    # Of the module, whose BatchNorm statistics followed the fine-tuning, only the head counts.
    mixed = bench.module(bench.w, parts(module.state_dict(), ["head"]))
    bench.assert_scores(scores, "personal", bench.logits(mixed))
    assert not torch.equal(mixed.head.bias, bench.module(bench.w).head.bias)


def test_the_head_s_logits_by_hand(bench):
    f = torch.randn(7, 4, generator=torch.Generator().manual_seed(5))
    inputs = Inputs(f, lambda: pytest.fail("the inputs aren't needed"))
    net, w = Net(bench.model), bench.w
    expected = f.numpy() @ w["head.weight"].numpy().T + w["head.bias"].numpy()
    generic = FedBABU().generic(net, w, inputs)["generic"]
    personal = FedBABU(finetune="head").personal(net, w, bench.client(), inputs)["personal"]
    np.testing.assert_allclose(generic.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(personal.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("finetune", ["full", "head"])
def test_without_fine_tuning_the_personal_model_is_the_generic_one(bench, finetune):
    scores = bench.test(FedBABU(finetune=finetune, finetune_epochs=0), bench.w)
    np.testing.assert_array_equal(scores["personal"][0], scores["generic"][0])
    np.testing.assert_allclose(scores["personal"][1], scores["generic"][1], rtol=1e-5)


class TestFedBABUFailure:
    def test_epochs_must_not_be_negative(self):
        with pytest.raises(ConfigError, match=r"method\.finetune_epochs = -1: must be at least 0"):
            FedBABU(finetune_epochs=-1)

    def test_a_model_that_is_all_head(self):
        net = Net(linear((1, 4, 4), 3))
        with pytest.raises(ConfigError, match="FedBABU shares the layers before the head"):
            FedBABU().initial(net, net.initial_weights(), np.random.default_rng(0))

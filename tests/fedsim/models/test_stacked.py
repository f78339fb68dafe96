"""Layers of clients side by side: padding has no effect, and what can't leave it out says so."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from fedsim.data.statistics import Statistics
from fedsim.engine.local import LocalTrainer
from fedsim.engine.training import LocalTraining
from fedsim.engine.update import LocalSGD, Upload, cross_entropy, sgd
from fedsim.models import Model, Net
from fedsim.models.layers import channels_last, quicken
from fedsim.models.small import cnn
from fedsim.models.stacked import (
    Padding,
    PaddingUnknownError,
    StackedBatchNorm,
    StackedGroupNorm,
    StackedMean2d,
    to_stacked,
)

SHAPES = {nn.BatchNorm1d: (6, 5), nn.BatchNorm2d: (6, 5, 3, 4), nn.BatchNorm3d: (6, 5, 2, 3, 2)}


def make(layer, channels=5, **options):
    torch.manual_seed(0)
    made = layer(channels, **options)
    nn.init.uniform_(made.weight)
    nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("layer", SHAPES)
def test_batch_norm_is_that_of_the_examples_alone(layer):
    x = torch.randn(SHAPES[layer]) * 2 + 3
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    plain, stacked = make(layer, momentum=0.3), to_stacked(make(layer, momentum=0.3))
    assert isinstance(stacked, StackedBatchNorm)
    stacked.mask = mask

    y = stacked(x)

    torch.testing.assert_close(y[mask > 0], plain(x[mask > 0]))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(stacked.get_buffer(name), buffer, msg=name)
    torch.testing.assert_close(stacked.eval()(x), plain.eval()(x))


def test_each_of_many_clients_has_its_own():
    x, layer = torch.randn(3, 6, 5, 2, 2), to_stacked(make(nn.BatchNorm2d))
    weights = {n: t.expand(3, *t.shape).clone() for n, t in layer.state_dict().items()}
    masks = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2, [1.0] + [0.0] * 5])

    def of_one(w, x, mask):
        layer.mask = mask
        return functional_call(layer, w, (x,))

    y = vmap(of_one)(weights, x, masks)

    for k, count in enumerate((6, 4, 1)):
        plain = make(nn.BatchNorm2d)
        torch.testing.assert_close(y[k, :count], plain(x[k, :count]), rtol=1e-4, atol=1e-5)
        mean = weights["running_mean"][k]
        torch.testing.assert_close(mean, plain.running_mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 2), (4, 6, 2, 3, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(shape, affine):
    torch.manual_seed(0)
    x, plain = torch.randn(shape) * 2 + 3, nn.GroupNorm(3, 6, eps=0.1, affine=affine)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    stacked = to_stacked(deepcopy(plain))
    assert isinstance(stacked, StackedGroupNorm)
    torch.testing.assert_close(stacked(x), plain(x))
    x = channels_last(x.expand(2, *shape).reshape(-1, *shape[1:])).unflatten(0, (2, -1))
    torch.testing.assert_close(vmap(stacked)(x), plain(x[0]).expand(2, *shape))


def test_an_average_over_all_pixels():
    x, pool = torch.randn(2, 3, 4, 5), nn.AdaptiveAvgPool2d((1, 1))
    assert isinstance(to_stacked(nn.AdaptiveAvgPool2d(1)), StackedMean2d)
    torch.testing.assert_close(to_stacked(nn.Sequential(pool))(x), nn.AdaptiveAvgPool2d(1)(x))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_are_rounded_to_bfloat16_where_asked(channels, bias):
    torch.manual_seed(0)
    x = torch.randn(2, 4, channels, 6, 5)
    plain = nn.Conv2d(channels, 12, 3, stride=2, padding=1, bias=bias)
    stacked = to_stacked(quicken(deepcopy(plain)))
    weights = {n: torch.stack([w, -2 * w]) for n, w in plain.state_dict().items()}

    def of_one(w, x):
        return functional_call(stacked, w, (x,))

    with torch.autocast("cpu", torch.bfloat16):
        found = vmap(of_one)(weights, x)

    assert found.dtype == torch.float32  # for layers that autocast doesn't reach either
    for k, factor in enumerate((1, -2)):
        # Products of rounded numbers, summed in float32, are rounded; the bias is added to that.
        rounded = deepcopy(plain).bfloat16().double()
        expected = factor * rounded(x[k].bfloat16().double())
        most = 2**-7 if bias else 1e-6
        torch.testing.assert_close(found[k].double(), expected, rtol=2**-8, atol=most)
        assert (found[k] - factor * plain(x[k])).abs().max() > 1e-3


def test_layers_that_are_not_ours_follow_them_in_bfloat16():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(4, 4, 3, groups=4))
    weights = {n: torch.stack([w, w]) for n, w in model.state_dict().items()}
    to_stacked(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = vmap(lambda w, x: functional_call(model, w, (x,)))(weights, torch.ones(2, 1, 3, 6, 6))
    assert y.isfinite().all()


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=4), nn.Conv1d(4, 2, 3), nn.ConvTranspose2d(4, 2, 3), nn.PReLU()],
)
def test_a_layer_of_another_kind_takes_what_a_kernel_has_rounded(layer):
    shape = (2, 4, 6) if isinstance(layer, nn.Conv1d) else (2, 4, 6, 6)
    x = torch.randn(shape).bfloat16()
    expected = deepcopy(layer)(x.float())
    torch.testing.assert_close(to_stacked(deepcopy(layer))(x), expected)


class TestFailure:
    def test_a_tensor_of_unknown_padding(self):
        known, mask, padding = torch.ones(2, 1), torch.ones(2), Padding()
        with padding.of([(known, mask)]):
            assert padding.mask(known) is mask
            with pytest.raises(PaddingUnknownError, match=r"batch\.x or batch\.strong"):
                padding.mask(known + 0)
        with pytest.raises(PaddingUnknownError):
            padding.mask(known)

    @pytest.mark.parametrize(
        "layer",
        [
            nn.InstanceNorm2d(5, track_running_stats=True),
            nn.BatchNorm2d(5, momentum=None),
            nn.BatchNorm2d(5, affine=False),
        ],
    )
    def test_a_layer_that_cannot_leave_padding_out(self, layer):
        with pytest.raises(PaddingUnknownError, match="running statistics"):
            to_stacked(nn.Sequential(layer))

    @pytest.mark.parametrize("odd", ["inputs of its own", "a layer of its own"])
    def test_clients_then_go_one_by_one(self, federation, odd):
        class Doubling(LocalSGD):
            def double(self, net, w, batch):
                return cross_entropy(net(w, 2 * batch.x), batch), {}

            def update(self, w, client):
                w_k, _ = yield from sgd(self.double, w, client.labelled)
                return Upload({"arrays": w_k}, len(client.labelled))

        torch.manual_seed(0)
        model, method = cnn((1, 4, 4), 3, channels=(4,), norm="batch"), Doubling()
        if odd == "a layer of its own":
            norm = nn.BatchNorm2d(4, momentum=None)
            model = Model(nn.Sequential(norm, model.backbone), model.features, 3)
            norm.num_features, method = 1, LocalSGD()
            norm.weight, norm.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
            norm.running_mean, norm.running_var = torch.zeros(1), torch.ones(1)
        net = Net(model)
        training = LocalTraining(epochs=1, batch_size=5, lr=0.1)

        def run(stacked):
            statistics = Statistics.of(federation)
            trainer = LocalTrainer(net, federation, statistics, training, 1, stacked)
            clients = trainer.clients(1, range(federation.num_clients))
            return [u for u, _ in trainer.update_all(method, net.initial_weights(), clients)]

        with pytest.warns(UserWarning, match="clients go one by one"):
            found = run(True)
        for one, other in zip(found, run(False), strict=True):
            for name, tensor in one.arrays["arrays"].items():
                np.testing.assert_array_equal(tensor, other.arrays["arrays"][name])

"""The architectures, and the functional view of them."""

import pytest
import torch

from fedsim.errors import ConfigError
from fedsim.models import Net
from fedsim.models.resnet import resnet8, resnet18, resnet34
from fedsim.models.small import cnn, linear, mlp


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_linear_is_logistic_regression():
    model = linear((1, 28, 28), 10)
    assert num_parameters(model) == 784 * 10 + 10
    x = torch.rand(3, 1, 28, 28)
    expected = x.flatten(1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)


def test_mlp_counts_its_parameters():
    model = mlp((64,), 10, hidden=(32, 16))
    assert num_parameters(model) == (64 * 32 + 32) + (32 * 16 + 16) + (16 * 10 + 10)
    assert model.features == 16


def test_cnn_pools_before_the_relu_with_the_same_result():
    torch.manual_seed(0)
    model = cnn((1, 28, 28), 10)
    assert num_parameters(model) == (9 * 16 + 16) + (9 * 16 * 32 + 32) + (32 * 7 * 7 * 10 + 10)
    conv1, conv2 = (m for m in model.backbone if isinstance(m, torch.nn.Conv2d))
    x = torch.rand(2, 1, 28, 28)
    maps = torch.max_pool2d(torch.relu(conv1(x)), 2)
    maps = torch.max_pool2d(torch.relu(conv2(maps)), 2)
    # Pixel by pixel: the channels of the first pixel come first.
    features = maps.permute(0, 2, 3, 1).reshape(2, -1)
    torch.testing.assert_close(model(x), model.head(features))


# He et al. (2016) give 0.27 M parameters for ResNet-20 of this family and 11.2 M / 21.3 M are the
# usual counts of ResNet-18/34 with the CIFAR stem and 10 classes; ResNet-8 by hand below.
@pytest.mark.parametrize(
    ("build", "parameters", "features"),
    [(resnet8, 78_042, 64), (resnet18, 11_173_962, 512), (resnet34, 21_282_122, 512)],
)
def test_resnets_have_the_published_size(build, parameters, features):
    model = build((3, 32, 32), 10)
    assert num_parameters(model) == parameters
    assert model.features == features
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_resnet8_size_by_hand():
    def block(fan_in, fan_out):
        projection = fan_in * fan_out + 2 * fan_out if fan_in != fan_out else 0
        return 9 * fan_in * fan_out + 2 * fan_out + 9 * fan_out * fan_out + 2 * fan_out + projection

    stem = 9 * 3 * 16 + 2 * 16
    assert stem + block(16, 16) + block(16, 32) + block(32, 64) + 64 * 10 + 10 == 78_042


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_net_is_the_module_as_a_function_of_its_weights(norm):
    torch.manual_seed(0)
    model = resnet8((1, 8, 8), 4, norm=norm, width=4)
    net = Net(model)
    w = net.initial_weights()
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(net.predict(w, x), model.eval()(x))
    torch.testing.assert_close(net(w, x), model.train()(x))
    # In training mode the running statistics in w moved as the module's own.
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(w[name], buffer)
    assert set(w) == set(model.state_dict())
    assert net.trainable == {name for name, _ in model.named_parameters()}


def test_batch_norm_has_no_step_counter():
    assert all(t.is_floating_point() for t in resnet8((3, 8, 8), 4).state_dict().values())


class TestModelFailure:
    def test_vectors_are_no_images(self):
        with pytest.raises(ConfigError, match=r"needs images .* shape \(64,\)"):
            cnn((64,), 10)

    def test_too_small_for_the_poolings(self):
        with pytest.raises(ConfigError, match="at least 16 x 16 pixels"):
            resnet18((1, 8, 8), 10)

    @pytest.mark.parametrize("hidden", [(), (0,), (8, -1), (2**70,), (8, 10**6 + 1)])
    def test_mlp_widths(self, hidden):
        with pytest.raises(ConfigError, match=r"model\.hidden = \[.*widths from 1 to 1000000$"):
            mlp((4,), 2, hidden=hidden)

    @pytest.mark.parametrize("width", [-1, 10**6 + 1, 2**70])
    def test_cnn_widths(self, width):
        with pytest.raises(ConfigError, match=r"model\.channels = .*widths from 1 to 1000000$"):
            cnn((1, 8, 8), 2, channels=(width,))
        with pytest.raises(ConfigError, match=r"model\.hidden = .*width of at most 1000000$"):
            cnn((1, 8, 8), 2, hidden=width)

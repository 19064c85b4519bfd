"""The networks against the slides' shapes, published parameter counts and formulas written out by hand."""
import math

import pytest
import torch
import torch.nn.functional as F

from CIFAR10_configuration import Configuration
from CIFAR10_evaluation import build_model
from LeNet5_model import LeNet5_model
from MLP_model import ACTIVATIONS, MLP_model
from ResNet_model import BLOCKS, ResidualBlock, ResNet, ResNet32_model

CPU = torch.device('cpu')


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_mlp_and_lenet5_have_the_slides_numbers_of_parameters():
    assert parameters(MLP_model((1024, 512))) == (3072 + 1) * 1024 + (1024 + 1) * 512 + (512 + 1) * 10
    assert parameters(LeNet5_model()) == 62_006


# 0.27, 0.46, 0.66, 0.85 and 1.7 million in table 6 of He et al. 2016
@pytest.mark.parametrize('depth, count', [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018),
                                          (110, 1_727_962)])
@pytest.mark.parametrize('block', BLOCKS)
def test_resnets_have_the_published_numbers_of_layers_and_parameters(depth, count, block):
    model = build_model(Configuration(depth=depth, block=block), CPU)
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == depth and parameters(model) == count


def test_resnet32_has_the_slides_layers_and_feature_maps():
    model, shapes = ResNet32_model(), {}
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda _, __, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:])))
    model(torch.randn(2, 3, 32, 32))
    assert shapes == dict(conv1=(16, 32, 32), bn1=(16, 32, 32), relu=(16, 32, 32), layers_2n=(16, 32, 32),
                          layers_4n=(32, 16, 16), layers_6n=(64, 8, 8), pool=(64, 1, 1), fc_out=(10,))
    assert parameters(model) == 464_154
    assert ResNet(3, ResidualBlock, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize('channels, stride', [(16, 1), (32, 2)])
@pytest.mark.parametrize('block', BLOCKS)
def test_a_block_is_relu_of_shortcut_plus_two_convolutions(block, channels, stride):
    torch.manual_seed(0)
    made = BLOCKS[block](16, channels, stride, stride == 2).eval()
    x = torch.randn(2, 16, 8, 8)

    def batch_norm(x, bn):
        return (x - bn.running_mean.view(-1, 1, 1)) / (bn.running_var.view(-1, 1, 1) + bn.eps).sqrt()

    y = F.relu(batch_norm(F.conv2d(x, made.conv1.weight, stride=stride, padding=1), made.bn1))
    y = batch_norm(F.conv2d(y, made.conv2.weight, padding=1), made.bn2)
    shortcut = x if stride == 1 else torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 16, 4, 4)], 1)
    if block == 'plain':
        shortcut = 0
    torch.testing.assert_close(made(x), F.relu(y + shortcut))


FORMULAS = dict(sigmoid=lambda x: 1 / (1 + math.exp(-x)), tanh=math.tanh, relu=lambda x: max(0, x),
                leaky_relu=lambda x: max(0.1 * x, x), elu=lambda x: x if x >= 0 else math.exp(x) - 1)


@pytest.mark.parametrize('name', FORMULAS)
def test_activations_follow_the_slides(name):
    x = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(ACTIVATIONS[name]()(x), torch.tensor([FORMULAS[name](v) for v in x.tolist()]))


def test_maxout_is_the_larger_of_two_linear_functions():
    model = MLP_model(hidden=(5,), activation='maxout')
    weight, bias = model.layers[1].weight, model.layers[1].bias.detach().normal_()
    x = torch.randn(4, 3, 32, 32)
    halves = [x.flatten(1) @ weight[part].T + bias[part] for part in (slice(0, 5), slice(5, 10))]
    torch.testing.assert_close(model.layers[:3](x), torch.maximum(*halves))


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_lenet5_gives_what_the_slides_order_of_convolution_activation_pooling_gives(name):
    model, x = LeNet5_model(name), torch.randn(4, 3, 32, 32)
    activation = ACTIVATIONS[name]()
    y = F.max_pool2d(activation(F.conv2d(x, model.conv1.weight, model.conv1.bias)), 2)
    y = F.max_pool2d(activation(F.conv2d(y, model.conv2.weight, model.conv2.bias)), 2).flatten(1)
    for layer in (model.fc1, model.fc2):
        y = activation(F.linear(y, layer.weight, layer.bias))
    torch.testing.assert_close(model(x), F.linear(y, model.fc3.weight, model.fc3.bias))


def test_a_hidden_layer_is_linear_batch_norm_activation_dropout_and_testing_has_no_dropout():
    model, x = MLP_model((50, 40), normalization='batch', dropout=0.3), torch.rand(8, 3, 32, 32)
    assert [type(layer).__name__ for layer in model.layers[1:]] == [
        'Linear', 'BatchNorm1d', 'ReLU', 'Dropout'] * 2
    assert parameters(model) == parameters(MLP_model((50, 40))) + 2 * (50 + 40)
    y = model.layers[1](x.flatten(1))
    y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(model.layers[:4](x), y.clamp(min=0))
    assert model.layers[4].p == 0.3 and not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize('make, variance', [
    (lambda: MLP_model((1024,), initialization='he_normal').layers[1], 2 / 3072),
    (lambda: MLP_model((1024,), initialization='xavier_normal').layers[1], 2 / (3072 + 1024)),
    (lambda: LeNet5_model('maxout', 'xavier_normal').fc1, 2 / (400 + 240)),
    (lambda: ResNet32_model().layers_6n[4].conv2, 2 / (64 * 9))])
def test_weights_start_normal_with_the_slides_standard_deviation_and_biases_at_zero(make, variance):
    torch.manual_seed(0)
    layer = make()
    weight = layer.weight.detach()
    assert weight.std().item() == pytest.approx(variance ** 0.5, rel=0.02)
    assert abs(weight.mean()) < 0.02 * weight.std()
    assert (weight / weight.std()).pow(4).mean().item() == pytest.approx(3, abs=0.15)  # of a uniform one 1.8
    assert layer.bias is None or not layer.bias.any()

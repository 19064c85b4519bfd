"""A multi-layer perceptron, and the activations and weight initializations that it shares with LeNet-5."""
import torch
from torch import nn


class Maxout(nn.Module):
    """max(w1 x + b1, w2 x + b2): the layer before gives the two as halves, (N, 2 C, ...) -> (N, C, ...)."""

    def forward(self, x):
        return torch.maximum(*x.chunk(2, 1))


# The activation functions of the slides, by name.
ACTIVATIONS = {
    'sigmoid': nn.Sigmoid,
    'tanh': nn.Tanh,
    'relu': nn.ReLU,
    'leaky_relu': lambda: nn.LeakyReLU(0.1),  # max(0.1 x, x)
    'maxout': Maxout,
    'elu': nn.ELU
}

# The slides' formulas: sqrt(2 / n_in) for He, sqrt(2 / (n_in + n_out)) for Xavier. They call it a variance,
# but it is the standard deviation.
INITIALIZATIONS = {'he_normal': nn.init.kaiming_normal_, 'xavier_normal': nn.init.xavier_normal_}


def initialize(model, initialization):
    """Draw all weights of a model's layers by the named initialization and set its biases to zero."""
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            INITIALIZATIONS[initialization](m.weight)
            nn.init.zeros_(m.bias)


class MLP_model(nn.Module):
    """Fully connected layers, batch norm, dropout; images (N, 3, 32, 32) -> logits (N, 10)."""

    def __init__(self, hidden=(1024, 512), activation='relu', initialization='he_normal', dropout=0.0,
                 normalization='none'):
        super().__init__()
        k = 2 if activation == 'maxout' else 1  # inputs of the activation for each output
        layers = [nn.Flatten()]
        in_features = 3072  # 3 x 32 x 32 values of an image
        for units in hidden:
            layers.append(nn.Linear(in_features, units * k))
            if normalization == 'batch':
                layers.append(nn.BatchNorm1d(units * k))
            layers += [ACTIVATIONS[activation](), nn.Dropout(dropout)]
            in_features = units
        self.layers = nn.Sequential(*layers)
        self.fc_out = nn.Linear(in_features, 10)
        initialize(self, initialization)

    def forward(self, x):
        return self.fc_out(self.layers(x))

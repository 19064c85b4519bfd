"""A multi-layer perceptron, and the activations and weight initializations that it shares with LeNet-5."""
import torch.nn as nn


class Maxout(nn.Module):
    """max(w1 x + b1, w2 x + b2): the layer before gives both halves, (N, 2 C, ...) -> (N, C, ...)."""

    def forward(self, x):
        return x.unflatten(1, (-1, 2)).amax(2)


# The activation functions of the slides, by name.
ACTIVATIONS = {'sigmoid': nn.Sigmoid, 'tanh': nn.Tanh, 'relu': nn.ReLU, 'maxout': Maxout, 'elu': nn.ELU,
               'leaky_relu': lambda: nn.LeakyReLU(0.1)}  # max(0.1 x, x)


def widening(activation):
    """How many values a layer must give for each one that the activation returns."""
    return 2 if activation == 'maxout' else 1


# The slides' formulas: standard deviation sqrt(2 / n_in) for He, sqrt(2 / (n_in + n_out)) for Xavier.
INITIALIZATIONS = {'he_normal': nn.init.kaiming_normal_, 'xavier_normal': nn.init.xavier_normal_}


def initialize(model, initialization):
    """Draw all weights of a model's layers by the named initialization and set its biases to zero."""
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            INITIALIZATIONS[initialization](m.weight)
            nn.init.zeros_(m.bias)


class MLP_model(nn.Module):
    """Fully connected layers only; images (N, 3, 32, 32) -> logits (N, num_classes)."""

    def __init__(self, hidden=(1024, 512), activation='relu', initialization='he_normal', dropout=0.0, normalization='none',
                 num_classes=10):
        super().__init__()
        layers, width = [nn.Flatten()], 3 * 32 * 32
        for units in hidden:
            wide = units * widening(activation)
            layers += [nn.Linear(width, wide), *([nn.BatchNorm1d(wide)] if normalization == 'batch' else []),
                       ACTIVATIONS[activation](), nn.Dropout(dropout)]
            width = units
        self.layers = nn.Sequential(*layers)
        self.fc_out = nn.Linear(width, num_classes)
        initialize(self, initialization)

    def forward(self, x):
        return self.fc_out(self.layers(x))

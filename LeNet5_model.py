"""LeNet-5 (LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition") as on the slides."""
import torch.nn as nn
import torch.nn.functional as F

from MLP_model import ACTIVATIONS, initialize


class LeNet5_model(nn.Module):
    """Two convolutions and three linear layers; images (N, 3, 32, 32) -> logits (N, 10).

    It has 62,006 parameters; with maxout 123,162, as each layer but the last has twice the outputs.
    """

    def __init__(self, activation='relu', initialization='he_normal'):
        super().__init__()
        k = 2 if activation == 'maxout' else 1  # inputs of the activation for each output
        self.conv1 = nn.Conv2d(3, 6 * k, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16 * k, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120 * k)
        self.fc2 = nn.Linear(120, 84 * k)
        self.fc3 = nn.Linear(84, 10)
        self.activation = ACTIVATIONS[activation]()
        initialize(self, initialization)

    def forward(self, x):
        # Pooling comes before the activation, for a quarter of the work: as activations increase, and maxout
        # is a maximum itself, the result is the same. Shapes with maxout's doubled outputs left out:
        # [3, 32, 32] -> [6, 28, 28] -> [6, 14, 14]
        x = self.activation(F.max_pool2d(self.conv1(x), 2))
        # [6, 14, 14] -> [16, 10, 10] -> [16, 5, 5]
        x = self.activation(F.max_pool2d(self.conv2(x), 2))

        x = self.activation(self.fc1(x.flatten(1)))
        x = self.activation(self.fc2(x))
        return self.fc3(x)

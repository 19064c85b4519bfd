"""ResNet-32 for CIFAR-10, and its kin of other depths and blocks.

He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.

X1 to X10 are the values that the slides leave open.
"""
import torch.nn as nn
import torch.nn.functional as F


class IdentityPadding(nn.Module):
    """Shortcut where the shape changes, without parameters (option A): fewer pixels, and channels of zeros.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)
    """

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.pooling = nn.MaxPool2d(kernel_size=1, stride=stride)
        self.add_channels = out_channels - in_channels

    def forward(self, x):
        # Pooling over one pixel only skips pixels. F.pad wants a pair of widths for W, for H, for channels.
        return F.pad(self.pooling(x), [0, 0, 0, 0, 0, self.add_channels])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions that learn what to add to their input: relu(x + f(x)).

    The shortcut lets the gradient pass unchanged, so that many blocks can be stacked.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)
    """

    def __init__(self, in_channels, out_channels, stride=1, down_sample=False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels,
                               kernel_size=3,   # X1
                               stride=stride,   # X2
                               padding=1,       # X3
                               bias=False)      # batch norm adds its own
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels,
                               kernel_size=3,   # X4
                               stride=1,        # X5
                               padding=1,       # X6
                               bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        # Where the shape changes, the shortcut has to follow.
        self.down_sample = IdentityPadding(in_channels, out_channels, stride) if down_sample else None

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)

        x = self.conv2(x)
        x = self.bn2(x)

        if self.down_sample is not None:
            shortcut = self.down_sample(shortcut)

        x += shortcut
        x = self.relu(x)
        return x


class PlainBlock(ResidualBlock):
    """A ResidualBlock without its shortcut: relu(f(x))."""

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


BLOCKS = {'residual': ResidualBlock, 'plain': PlainBlock}


class ResNet(nn.Module):
    """A ResNet of 6 * num_layers + 2 weighted layers; images (N, 3, 32, 32) -> logits (N, num_classes).

    The names are the slides': num_layers is n, the blocks of two layers in each of the three groups, after
    which the net has 2n, 4n and 6n layers beside the first one.
    """

    def __init__(self, num_layers, block, num_classes=10):
        super().__init__()
        self.num_layers = num_layers
        self.conv1 = nn.Conv2d(in_channels=3,    # X7: red, green, blue
                               out_channels=16,  # X8
                               kernel_size=3,    # X9
                               padding=1,        # X10
                               bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)

        # feature map size = [16, 32, 32]
        self.layers_2n = self.get_layers(block, 16, 16, stride=1)
        # feature map size = [32, 16, 16]
        self.layers_4n = self.get_layers(block, 16, 32, stride=2)
        # feature map size = [64, 8, 8]
        self.layers_6n = self.get_layers(block, 32, 64, stride=2)

        # output layers
        self.pool = nn.AvgPool2d(8, stride=1)
        self.fc_out = nn.Linear(64, num_classes)

        # He's initialization, by the number of outputs as in torchvision's ResNet. Batch norm starts with
        # weight 1 and bias 0 by itself.
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    def get_layers(self, block, in_channels, out_channels, stride):
        """num_layers blocks in a row; the first one changes the shape where stride is 2."""
        first = block(in_channels, out_channels, stride, down_sample=stride == 2)
        others = (block(out_channels, out_channels) for _ in range(self.num_layers - 1))
        return nn.Sequential(first, *others)

    def forward(self, x):
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.layers_2n(x)
        x = self.layers_4n(x)
        x = self.layers_6n(x)
        x = self.pool(x)
        x = x.view(x.size(0), -1)
        x = self.fc_out(x)
        return x


def ResNet32_model():
    """ResNet-32: a convolution, 3 x 5 blocks of 2 convolutions, a linear layer: 464,154 parameters."""
    return ResNet(5, ResidualBlock)

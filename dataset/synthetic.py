"""Ten classes of small images made by the program: stripes of five widths, across and down."""
import torch

WIDTHS = (2, 3, 4, 6, 9)  # pixels of a stripe
CLASSES = tuple(f'{direction}, {width} wide' for direction in ('across', 'down') for width in WIDTHS)


def generate(train):
    """5,000 training or 1,000 test images (N, 3, 32, 32) uint8 and labels (N,) int64, always the same ones.

    Start, colours and noise are random, so neither colour nor mean gives a class away.
    """
    count = 5000 if train else 1000
    generator = torch.Generator().manual_seed(count)  # training and test images differ

    def random(*shape):
        return torch.rand(count, *shape, generator=generator)

    # Rows (N, 1, 32, 1) that are 0 and 1 in turn, from a random start; in the last five classes columns
    labels = torch.randperm(count, generator=generator) % 10
    of_image = labels.view(-1, 1, 1, 1)
    place = torch.arange(32).view(32, 1) + 32 * random(1, 1, 1)
    stripes = place // torch.tensor(WIDTHS)[of_image % 5] % 2
    stripes = torch.where(of_image < 5, stripes, stripes.mT)

    # A dark colour, a bright one on it, and noise
    images = 80 * random(3, 1, 1) + (20 + 40 * random(3, 1, 1)) * stripes + 115 * random(3, 32, 32)
    return images.byte(), labels

"""Ten classes of small images made by the program, two shapes in five textures, told apart by form only."""
import numpy as np
import torch

TEXTURES = ('plain', 'barred', 'pillared', 'checked', 'ringed')
CLASSES = tuple(f'{texture} {shape}' for shape in ('disc', 'cross') for texture in TEXTURES)


def generate(train):
    """5,000 training or 1,000 test images (N, 3, 32, 32) uint8 and labels (N,) int64, always the same ones.

    Place, size, phase, noise and both colours are random, so neither colour nor mean gives a class away.
    """
    count = 5000 if train else 1000
    rng = np.random.default_rng(0 if train else 1)
    labels = rng.permutation(count) % 10

    def uniform(low, high):  # one random number for each image
        return rng.uniform(low, high, (count, 1, 1))

    # Each pixel's distance from the shape's centre.
    x = np.arange(32) - uniform(12, 20)
    y = np.arange(32)[:, None] - uniform(12, 20)
    radius = uniform(9, 12)
    distance = np.hypot(x, y)

    # The shape: classes 0 to 4 are discs, 5 to 9 crosses; choose takes for each image the one of its number.
    disc = distance < radius
    cross = (np.minimum(abs(x), abs(y)) < radius / 3) & (np.maximum(abs(x), abs(y)) < radius)
    shape = np.choose((labels // 5)[:, None, None], [disc, cross])

    # The texture, of waves of 4 to 5.5 pixels; checks are where just one of bars and pillars is.
    frequency = 2 * np.pi / uniform(4, 5.5)
    phase = uniform(0, 2 * np.pi)
    bars, pillars, rings = (np.sin(frequency * axis + phase) > 0 for axis in (y, x, distance))
    plain = np.ones_like(bars)
    texture = np.choose((labels % 5)[:, None, None], [plain, bars, pillars, bars ^ pillars, rings])

    # The colours: a bright one on a dark one, with noise.
    dark = rng.uniform(0, 130, (count, 3, 1, 1))
    bright = dark + rng.uniform(40, 125, (count, 3, 1, 1))
    images = np.where((shape & texture)[:, None], bright, dark) + rng.normal(0, 15, (count, 3, 32, 32))
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)

"""Ten classes of small images drawn by the program: two shapes in five textures, which only their form tells apart."""
import numpy as np
import torch

TEXTURES = ('plain', 'barred', 'pillared', 'checked', 'ringed')
CLASSES = tuple(f'{texture} {shape}' for shape in ('disc', 'cross') for texture in TEXTURES)


def draw(train):
    """5,000 training or 1,000 test images (N, 3, 32, 32) uint8 with labels (N,) int64, the same ones every time.

    Place, size, phase, noise and both colours are drawn at random, so neither colour nor mean gives a class away.
    """
    count, rng = (5000, np.random.default_rng(0)) if train else (1000, np.random.default_rng(1))
    labels = rng.permutation(count) % 10

    def each(low, high):  # one random number for each image
        return rng.uniform(low, high, (count, 1, 1))

    x, y = np.arange(32) - each(12, 20), np.arange(32)[:, None] - each(12, 20)  # pixels from the shape's centre
    radius, distance = each(9, 12), np.hypot(x, y)
    cross = (np.minimum(abs(x), abs(y)) < radius / 3) & (np.maximum(abs(x), abs(y)) < radius)
    shape = np.choose((labels // 5)[:, None, None], [distance < radius, cross])
    frequency, phase = 2 * np.pi / each(4, 5.5), each(0, 2 * np.pi)
    bars, pillars, rings = (np.sin(frequency * axis + phase) > 0 for axis in (y, x, distance))
    texture = np.choose((labels % 5)[:, None, None], [np.ones_like(bars), bars, pillars, bars ^ pillars, rings])

    background = rng.uniform(0, 130, (count, 3, 1, 1))
    foreground = background + rng.uniform(40, 125, (count, 3, 1, 1))
    images = np.where((shape & texture)[:, None], foreground, background) + rng.normal(0, 15, (count, 3, 32, 32))
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)

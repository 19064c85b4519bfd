"""Ten classes of small images made by the program: stripes and checks of several widths."""
import numpy as np
import torch

# How many stripes of each colour go across and down an image
STRIPES = ((3, 0), (5, 0), (8, 0), (0, 3), (0, 5), (0, 8), (4, 4), (8, 8), (4, 8), (8, 4))
CLASSES = tuple(f'{across} across, {down} down' for across, down in STRIPES)


def generate(train):
    """5,000 training or 1,000 test images (N, 3, 32, 32) uint8 and labels (N,) int64, always the same ones.

    Place, noise and both colours are random, so neither colour nor mean gives a class away.
    """
    count = 5000 if train else 1000
    rng = np.random.default_rng(0 if train else 1)
    labels = rng.permutation(count) % 10

    # A disc somewhere
    x, y = np.arange(32), np.arange(32)[:, None]
    disc = np.hypot(x - rng.uniform(10, 22, (count, 1, 1)), y - rng.uniform(10, 22, (count, 1, 1))) < 10

    # In it a wave across and one down, each with a random start. Where their product is positive are checks,
    # or stripes where one of them has no waves.
    across, down = 2 * np.pi * (np.array(STRIPES)[labels].T[..., None, None] / 32)
    start = rng.uniform(0, 32, (2, count, 1, 1))
    checks = np.cos(across * (x - start[0])) * np.cos(down * (y - start[1])) > 0

    # The colours: a bright one on a dark one, with noise
    dark = rng.uniform(0, 130, (count, 3, 1, 1))
    bright = dark + rng.uniform(40, 125, (count, 3, 1, 1))
    images = np.where((disc & checks)[:, None], bright, dark) + rng.normal(0, 15, (count, 3, 32, 32))
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)

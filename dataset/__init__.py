"""Where images come from: CIFAR-10 or drawn ones, held whole on the device and augmented a batch at a time."""
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.datasets
import torchvision.transforms.functional as TF
from torch.utils.data import TensorDataset

from CIFAR10_configuration import CLASSES, MIRRORS, UserError
from dataset import synthetic
from dataset.download import ensure_cifar10

# Mean and standard deviation of the training images' red, green and blue, in [0, 1] (the slides' figures).
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

CLASS_NAMES = {'cifar10': CLASSES, 'synthetic': synthetic.CLASSES}


def data_load(dataset='cifar10', data_dir='./dataset/', holdout=0, seed=0, device='cpu', urls=MIRRORS):
    """Load the training and the validation images.

    Args:
        dataset (str): 'cifar10' (50,000 training and 10,000 test images) or 'synthetic' (5,000 and 1,000).
        data_dir (str or Path): folder that holds, or gets, CIFAR-10.
        holdout (int): so many class-balanced training images, drawn by seed, are the validation images;
            with 0 the test images are.
        urls (sequence of str): where CIFAR-10's archive is fetched from, if data_dir lacks it; none: from nowhere.

    Returns:
        Two TensorDatasets of images (N, 3, 32, 32) uint8 and labels (N,) int64, on the device.

    Raises:
        UserError: CIFAR-10 is not to be had, or holdout leaves nothing to train on.
    """
    read = synthetic.draw if dataset == 'synthetic' else lambda train: read_cifar10(Path(data_dir), train, urls)
    images, labels = read(train=True)
    if holdout == 0:
        return TensorDataset(images.to(device), labels.to(device)), TensorDataset(*(t.to(device) for t in read(train=False)))
    if holdout >= len(images):
        raise UserError(f"--holdout {holdout} leaves nothing of the {len(images)} training images: choose a smaller one.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)].view(10, -1)  # a row of image numbers for each class
    order = by_class.T.flatten()                                       # one image of each class in turn
    return tuple(TensorDataset(images[part].to(device), labels[part].to(device)) for part in (order[holdout:], order[:holdout]))


def read_cifar10(data_dir, train, urls):
    """CIFAR-10's images (N, 3, 32, 32) uint8 and labels (N,), their MD5 sums checked by torchvision, fetched where they fail."""
    try:
        data = torchvision.datasets.CIFAR10(data_dir, train=train)
    except RuntimeError:
        ensure_cifar10(data_dir, urls)
        data = torchvision.datasets.CIFAR10(data_dir, train=train)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)


def crop_and_flip(images, offsets, flips, padding=4):
    """torchvision's RandomCrop(32, padding=4) and RandomHorizontalFlip, for a whole batch and with given draws.

    Args:
        images (Tensor): (N, 3, H, W).
        offsets (Tensor): (N, 2), each crop's top and left in the image padded with zeros, from 0 to 2 * padding.
        flips (Tensor): (N,) bool.
    """
    height, width = images.shape[2:]
    crops = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view of every possible crop
    images = crops[torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]]
    images[flips] = images[flips].flip(3)
    return images


def normalize(images):
    """ToTensor and Normalize for a whole batch: (N, 3, H, W) uint8 of 0 to 255 -> float32 of mean 0, deviation 1."""
    return TF.normalize(images.float().div(255), MEAN, STD)


def training_batches(data, batch_size, seed, first=0, rank=0, world=1):
    """Yield one epoch of augmented batches from the first on: (N, 3, 32, 32) float32 and labels (N,); seed decides all.

    Of world processes each gets, by its rank, every world-th image of a batch.
    """
    images, labels = data.tensors
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    offsets = torch.randint(0, 9, (len(images), 2), generator=generator).to(images.device)
    flips = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    for i in order.split(batch_size)[first:]:
        i = i[rank::world]
        yield normalize(crop_and_flip(images[i], offsets[i], flips[i])), labels[i]

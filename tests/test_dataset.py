"""Images and augmentation against torchvision's own transforms, and what the synthetic images promise."""
import os

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10

from CIFAR10_configuration import Configuration, UserError
from dataset import MEAN, crop_and_flip, data_load, normalize, synthetic, training_batches

SLIDES = T.Compose([T.ToTensor(), T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))])


def test_validation_images_and_an_augmented_batch_equal_torchvision_pixel_for_pixel():
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 9, (200, 2)), torch.rand(200) < 0.5
    plain, augmented = normalize(images), normalize(crop_and_flip(images, offsets, flips))
    for i, (top, left) in enumerate(offsets.tolist()):
        image = TF.to_pil_image(images[i])
        crop = TF.crop(TF.pad(image, 4), top, left, 32, 32)
        assert torch.equal(plain[i], SLIDES(image))
        assert torch.equal(augmented[i], SLIDES(TF.hflip(crop) if flips[i] else crop))


def test_each_image_comes_once_an_epoch_with_offsets_and_flips_that_are_uniform_and_independent():
    # An image all of whose crops and flips differ, and an epoch over copies of it
    ramp = torch.arange(32).expand(32, 32) + 1
    image = torch.stack([torch.arange(1, 1025).view(32, 32) % 251 + 1, ramp, ramp.T]).byte()
    data = TensorDataset(image.expand(16_200, -1, -1, -1), torch.arange(16_200))
    versions = {}
    for top, left in np.ndindex(9, 9):
        crop = TF.crop(TF.pad(image, [4]), top, left, 32, 32)
        for flip, version in enumerate((crop, TF.hflip(crop))):
            versions[version.numpy().tobytes()] = top, left, flip
    assert len(versions) == 162
    drawn, order = [], []
    for images, labels in training_batches(data, Configuration(standardization='off'), seed=3):
        drawn += [versions[pixels.numpy().tobytes()] for pixels in (images * 255).round().byte()]
        order += labels.tolist()
    assert sorted(order) == list(range(16_200)) and order != sorted(order)
    drawn, counts = np.array(drawn), np.zeros((9, 9, 2))
    np.add.at(counts, tuple(drawn.T), 1)
    chi2 = ((counts - 100) ** 2 / 100).sum()  # 162 equally likely outcomes: 161 degrees of freedom
    assert abs(chi2 - 161) < 4 * (2 * 161) ** 0.5
    following = np.corrcoef(drawn[:-1].T, drawn[1:].T)
    assert abs(following[np.triu_indices(6, 1)]).max() < 0.04


def test_the_seed_decides_the_order():
    data = TensorDataset(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100))
    config = Configuration(batch_size=32)
    orders = [torch.cat([labels for _, labels in training_batches(data, config, seed)]) for seed in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert [len(labels) for _, labels in training_batches(data, config, 0)] == [32, 32, 32, 4]


@pytest.mark.parametrize('standardization', ['on', 'off'])
def test_without_augmentation_the_images_are_what_torchvision_makes_of_them(standardization):
    images, labels = data_load('synthetic')[0][:50]
    config = Configuration(augmentation='off', standardization=standardization)
    [(batch, batch_labels)] = training_batches(TensorDataset(images, labels), config, seed=1)
    [(_, order)] = training_batches(TensorDataset(images, torch.arange(50)), config, seed=1)
    assert torch.equal(batch_labels, labels[order]) and order.tolist() != list(range(50))
    transform = SLIDES if standardization == 'on' else T.ToTensor()
    torch.testing.assert_close(batch, torch.stack([transform(TF.to_pil_image(images[i])) for i in order]))


def test_holdout_is_balanced_disjoint_and_decided_by_the_seed():
    def sums(*sets):  # one number of each image, which tells it from the others
        images = torch.cat([data.tensors[0] for data in sets]).flatten(1).double()
        return (images @ torch.arange(3072).double()).sort().values

    everything, _ = data_load('synthetic')
    train, held = data_load('synthetic', holdout=500, seed=1)
    assert held.tensors[1].bincount().tolist() == [50] * 10 and len(train) == 4500
    assert torch.equal(sums(train, held), sums(everything))
    again, other = (data_load('synthetic', holdout=500, seed=seed)[1].tensors[0] for seed in (1, 2))
    assert torch.equal(held.tensors[0], again) and not torch.equal(held.tensors[0], other)
    with pytest.raises(UserError, match='holdout 5000'):
        data_load('synthetic', holdout=5000)


def test_synthetic_images_are_balanced_and_colour_does_not_give_the_class_away():
    (images, labels), (val_images, val_labels) = (data.tensors for data in data_load('synthetic'))
    assert labels.bincount().tolist() == [500] * 10 and val_labels.bincount().tolist() == [100] * 10
    assert torch.equal(images, synthetic.generate.__wrapped__(True)[0])  # not the cached ones

    def features(images):  # mean and deviation of each colour
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2), torch.ones(len(images), 1)], 1)

    targets = torch.nn.functional.one_hot(labels).float()
    linear = torch.linalg.lstsq(features(images), targets).solution
    assert ((features(val_images) @ linear).argmax(1) == val_labels).float().mean() < 0.3


def test_cifar10_is_read_as_torchvision_reads_it(small_cifar10):
    train, val = data_load('cifar10', small_cifar10, urls=())
    assert len(train) == 100 and len(val) == 20
    image, label = CIFAR10(small_cifar10, train=True)[37]
    assert torch.equal(train[37][0], TF.pil_to_tensor(image)) and train[37][1] == label


@pytest.mark.skipif('CIFAR10_DIR' not in os.environ, reason="set CIFAR10_DIR to the real images' folder")
def test_real_cifar10_has_the_slides_sizes():
    train, val = data_load('cifar10', os.environ['CIFAR10_DIR'], urls=())
    assert train.tensors[0].shape == (50_000, 3, 32, 32) and val.tensors[0].shape == (10_000, 3, 32, 32)
    assert train.tensors[0].float().mean((0, 2, 3)).div(255).tolist() == pytest.approx(MEAN, abs=1e-3)

"""Images and augmentation against torchvision's own transforms, and what the synthetic images promise."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from torch.utils.data import TensorDataset

from CIFAR10_configuration import SETTINGS, UserError
from dataset import MEAN, STD, crop_and_flip, data_load, normalize, synthetic, training_batches


def test_augmented_batch_equals_torchvision_pixel_for_pixel():
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 9, (200, 2)), torch.rand(200) < 0.5
    batch = normalize(crop_and_flip(images, offsets, flips))
    slides = T.Compose([T.ToTensor(), T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))])
    for image, (top, left), flip, ours in zip(images, offsets.tolist(), flips, batch, strict=False):
        image = TF.crop(TF.pad(TF.to_pil_image(image), 4), top, left, 32, 32)
        assert torch.equal(slides(TF.hflip(image) if flip else image), ours)


def test_validation_images_equal_torchvision():
    images = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    to_tensor = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    assert torch.equal(
        normalize(images), torch.stack([to_tensor(TF.to_pil_image(image)) for image in images])
    )


@pytest.fixture(scope='module')
def epoch():
    """An epoch over 16,200 copies of an image all of whose crops and flips differ: the draws, the order."""
    image = torch.arange(1, 1025).view(32, 32) % 251 + 1
    image = torch.stack(
        [image, torch.arange(32).expand(32, 32) + 1, torch.arange(32).view(-1, 1).expand(32, 32) + 1]
    )
    data = TensorDataset(image.byte().expand(16_200, -1, -1, -1), torch.arange(16_200))
    versions = {}
    for top in range(9):
        for left in range(9):
            for flip in (0, 1):
                crop = TF.crop(TF.pad(image.byte(), [4]), top, left, 32, 32)
                versions[(TF.hflip(crop) if flip else crop).numpy().tobytes()] = top, left, flip
    assert len(versions) == 162
    scale = (torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1))
    drawn, order = [], []
    for images, labels in training_batches(data, SETTINGS['resnet32'], seed=3):
        pixels = ((images * scale[0] + scale[1]) * 255).round().byte()
        drawn += [versions[p.numpy().tobytes()] for p in pixels]
        order += labels.tolist()
    return np.array(drawn), order


def test_offsets_and_flips_are_uniform_and_independent_for_each_image(epoch):
    drawn, _ = epoch
    counts = np.zeros((9, 9, 2))
    np.add.at(counts, tuple(drawn.T), 1)
    chi2 = ((counts - 100) ** 2 / 100).sum()  # 162 equally likely outcomes: 161 degrees of freedom
    assert 161 - 4 * (2 * 161) ** 0.5 < chi2 < 161 + 4 * (2 * 161) ** 0.5
    following = np.corrcoef(drawn[:-1].T, drawn[1:].T)
    assert abs(following[np.triu_indices(6, 1)]).max() < 0.04


def test_every_image_comes_once_an_epoch_in_an_order_that_the_seed_decides(epoch):
    _, order = epoch
    assert sorted(order) == list(range(16_200)) and order != sorted(order)
    data = TensorDataset(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100))
    config = replace(SETTINGS['resnet32'], batch_size=32)
    orders = [torch.cat([labels for _, labels in training_batches(data, config, seed)]) for seed in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    assert [len(labels) for _, labels in training_batches(data, config, 0)] == [32, 32, 32, 4]


@pytest.mark.parametrize('standardization', ['on', 'off'])
def test_without_augmentation_the_images_are_what_torchvision_makes_of_them(standardization):
    data = TensorDataset(*data_load('synthetic')[0][:50])
    config = replace(SETTINGS['lenet5'], augmentation='off', standardization=standardization)
    [(images, labels)] = training_batches(data, config, seed=1)
    [(_, order)] = training_batches(TensorDataset(data.tensors[0], torch.arange(50)), config, seed=1)
    assert torch.equal(labels, data.tensors[1][order]) and order.tolist() != list(range(50))
    steps = [T.ToPILImage(), T.ToTensor(), *([T.Normalize(MEAN, STD)] if standardization == 'on' else [])]
    wanted = torch.stack([T.Compose(steps)(data[i][0]) for i in order])
    torch.testing.assert_close(images, wanted)


def test_holdout_is_balanced_disjoint_and_decided_by_the_seed():
    everything, _ = data_load('synthetic')
    train, held = data_load('synthetic', holdout=500, seed=1)
    assert held.tensors[1].bincount().tolist() == [50] * 10 and len(train) == 4500
    both = torch.cat([train.tensors[0], held.tensors[0]]).flatten(1).double() @ torch.arange(3072).double()
    assert torch.equal(
        both.sort().values,
        (everything.tensors[0].flatten(1).double() @ torch.arange(3072).double()).sort().values,
    )
    assert torch.equal(held.tensors[0], data_load('synthetic', holdout=500, seed=1)[1].tensors[0])
    assert not torch.equal(held.tensors[0], data_load('synthetic', holdout=500, seed=2)[1].tensors[0])
    with pytest.raises(UserError, match='holdout 5000'):
        data_load('synthetic', holdout=5000)


def test_synthetic_images_are_balanced_and_colour_does_not_give_the_class_away():
    train, val = data_load('synthetic')
    assert len(train) == 5000 and len(val) == 1000
    assert train.tensors[1].bincount().tolist() == [500] * 10
    assert torch.equal(train.tensors[0], synthetic.generate.__wrapped__(True)[0])  # not the cached ones

    def features(images):  # mean and deviation of each colour
        pixels = images.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2), torch.ones(len(images), 1)], 1)

    targets = torch.nn.functional.one_hot(train.tensors[1]).float()
    linear = torch.linalg.lstsq(features(train.tensors[0]), targets).solution
    guessed = (features(val.tensors[0]) @ linear).argmax(1)
    assert (guessed == val.tensors[1]).float().mean() < 0.3


def test_cifar10_is_read_as_torchvision_reads_it(small_cifar10):
    train, val = data_load('cifar10', small_cifar10, urls=())
    assert len(train) == 100 and len(val) == 20
    image, label = torchvision.datasets.CIFAR10(small_cifar10, train=True)[37]
    assert torch.equal(train[37][0], TF.pil_to_tensor(image)) and train[37][1] == label


@pytest.mark.skipif(
    'CIFAR10_DIR' not in os.environ, reason="set CIFAR10_DIR to the folder of the real images"
)
def test_real_cifar10_has_the_slides_sizes():
    train, val = data_load('cifar10', os.environ['CIFAR10_DIR'], urls=())
    assert train.tensors[0].shape == (50_000, 3, 32, 32) and val.tensors[0].shape == (10_000, 3, 32, 32)
    assert train.tensors[0].float().mean((0, 2, 3)).div(255).tolist() == pytest.approx(MEAN, abs=1e-3)

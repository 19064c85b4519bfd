"""Images and augmentation against torchvision's own, the synthetic images, and how CIFAR-10 arrives."""
import os
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from conftest import script
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10

import dataset
from CIFAR10_configuration import Configuration, UserError, parse_configuration
from dataset import crop_and_flip, data_load, normalize, synthetic, training_batches
from LeNet5_model import LeNet5_model

SLIDES = T.Compose([T.ToTensor(), T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))])
BAD = ['error', 'wrong', 'short', 'silent']


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
    ramp = torch.arange(32).expand(32, 32) + 1
    # All crops and flips of this image differ.
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


@pytest.mark.parametrize('standardization, transform', [('on', SLIDES), ('off', T.ToTensor())])
def test_without_augmentation_an_epoch_has_torchvisions_images_in_the_seeds_order(standardization, transform):
    images, _ = data_load('synthetic')[0][:100]
    data = TensorDataset(images, torch.arange(100))
    config = Configuration(augmentation='off', standardization=standardization, batch_size=32)
    epochs = [list(training_batches(data, config, seed)) for seed in (1, 1, 2)]
    assert [len(labels) for _, labels in epochs[0]] == [32, 32, 32, 4]
    batches, (order, again, other) = zip(*(map(torch.cat, zip(*epoch)) for epoch in epochs))
    assert torch.equal(order, again) and not torch.equal(order, other)
    wanted = torch.stack([transform(TF.to_pil_image(images[i])) for i in order])
    torch.testing.assert_close(batches[0], wanted)


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


def test_cifar10_is_read_as_torchvision_reads_it_and_lies_channel_by_channel(small_cifar10):
    wanted = CIFAR10(small_cifar10)
    train, val = data_load('cifar10', small_cifar10)
    assert len(train) == 100 and len(val) == 20 and train.tensors[1].tolist() == wanted.targets
    assert torch.equal(train.tensors[0], torch.stack([TF.pil_to_tensor(image) for image, _ in wanted]))
    batches = list(training_batches(train, Configuration(batch_size=10), seed=0))
    assert all(images.is_contiguous() for images, _ in [train.tensors, val.tensors, *batches])


@pytest.fixture
def server(small_cifar10, monkeypatch):
    """A server on loopback with good and bad paths; half a second of silence is enough to give it up."""
    data = (small_cifar10 / CIFAR10.filename).read_bytes()
    bodies = dict(good=data, error=data, wrong=bytes(len(data)), short=data[:-1], silent=b'')

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path[1:]
            server.asked.append(name)
            self.send_response(503 if name == 'error' else 200)
            self.send_header('Content-Length', len(data))
            self.end_headers()
            self.wfile.write(bodies[name])
            if name == 'silent':
                time.sleep(9)
                self.wfile.write(data)  # who waits long enough gets all

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.asked = []
    server.handle_error = lambda *_: None  # of a client that goes away
    server.urls = lambda *names: [f'http://127.0.0.1:{server.server_port}/{name}' for name in names]
    server.mirrors = lambda *names: monkeypatch.setattr(dataset, 'MIRRORS', server.urls(*names))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, 'setdefaulttimeout', lambda seconds: set_timeout(seconds / 40))
    yield server
    set_timeout(None)
    server.shutdown()
    server.server_close()


def test_mirrors_are_tried_in_turn_until_one_gives_the_images(server, small_cifar10, tmp_path):
    server.mirrors(*BAD)
    done = script(tmp_path, 'CIFAR10_train.py --data-dir new/folder')
    said = [line for line in done.stderr.splitlines() if line and '%' not in line]  # no progress
    assert done.returncode == 2 and len(said) == 1 and '--dataset synthetic' in said[0]
    torch.save(LeNet5_model().state_dict(), tmp_path / 'w.pt')
    server.mirrors(*BAD, 'good', 'another')
    done = script(tmp_path, 'CIFAR10_evaluation.py --model lenet5 --weights w.pt --data-dir new/folder')
    assert done.returncode == 0 and 'of the 20 test images of cifar10' in done.stdout, done.stderr
    assert list(dict.fromkeys(server.asked)) == [*BAD, 'good']
    said = [line.split(': ')[0] for line in done.stdout.splitlines() if line.startswith('No images from')]
    assert said == [f'No images from {url}' for url in server.urls(*BAD)]
    folders = tmp_path / 'new' / 'folder', small_cifar10
    assert torch.equal(*(data_load('cifar10', folder)[0].tensors[0] for folder in folders))


@pytest.mark.parametrize('bad', [b'', b'<html>', bytes(62_000)])
def test_a_damaged_batch_is_taken_from_the_archive_and_that_from_a_server(bad, small_cifar10, server):
    archive, batch = small_cifar10 / CIFAR10.filename, small_cifar10 / CIFAR10.base_folder / 'data_batch_3'
    good = batch.read_bytes()
    server.mirrors('good')
    for damaged in [batch], [batch, archive]:
        for file in damaged:
            file.write_bytes(bad)
        data_load('cifar10', small_cifar10)
        assert batch.read_bytes() == good and bool(server.asked) == (archive in damaged)


def test_all_that_need_the_images_at_once_get_whole_ones_with_no_network(small_cifar10, monkeypatch):
    monkeypatch.setattr(dataset, 'MIRRORS', ['http://127.0.0.1:9/closed'])
    monkeypatch.setattr(socket.socket, 'connect', None)
    wanted = [data.tensors[0] for data in data_load('cifar10', small_cifar10)]
    shutil.rmtree(small_cifar10 / CIFAR10.base_folder)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(data_load, ['cifar10'] * 20, [small_cifar10] * 20):
            assert all(map(torch.equal, [data.tensors[0] for data in found], wanted))
    (small_cifar10 / CIFAR10.filename).unlink()
    assert len(data_load('cifar10', small_cifar10)[1]) == 20


def test_data_dir_may_be_in_the_home_folder_or_the_images_or_a_link_to_them(small_cifar10, monkeypatch):
    for name in 'HOME', 'USERPROFILE':
        monkeypatch.setenv(name, str(small_cifar10.parent))
    images, link = small_cifar10 / CIFAR10.base_folder, small_cifar10.parent / CIFAR10.base_folder
    monkeypatch.chdir(images)
    os.name == 'nt' or link.symlink_to(images)  # where links need rights
    for folder in f'~/{small_cifar10.name}', '.', link if link.exists() else images:
        _, options = parse_configuration(['--data-dir', str(folder)])
        assert len(data_load('cifar10', options.data_dir)[0]) == 100

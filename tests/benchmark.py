"""How much faster this is than the assignment's own loop: python tests/benchmark.py --data-dir DIR

Times an epoch with its validation. The plain loop is that of the slides: torchvision's transforms image by
image, a DataLoader without workers and with two, float32, the layers in their order. Each measurement is a
process of its own, plain and ours in turn; nothing else should run.
"""
import argparse
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from CIFAR10_configuration import SETTINGS  # noqa: E402
from CIFAR10_evaluation import build_model, choose_device, describe_machine, evaluate  # noqa: E402
from CIFAR10_train import build_optimizer, choose_precision, train_epoch  # noqa: E402
from dataset import MEAN, STD, data_load  # noqa: E402
from ResNet_model import IdentityPadding  # noqa: E402

ROWS = {config.title: config for config in SETTINGS.values()}
WAYS = {'plain, no workers': 0, 'plain, 2 workers': 2, 'ours': None}  # and their DataLoaders' workers


def slides_lenet5(model, x):
    """LeNet-5 in the order of the slides: convolution, activation, pooling."""
    x = F.max_pool2d(model.activation(model.conv1(x)), 2)
    x = F.max_pool2d(model.activation(model.conv2(x)), 2)
    x = model.activation(model.fc1(x.flatten(1)))
    return model.fc3(model.activation(model.fc2(x)))


def slides_model(config):
    """The network as the slides have it: padding before pooling too, and the usual layout in memory."""
    model = build_model(config, torch.device('cpu')).to(memory_format=torch.contiguous_format)
    if config.model == 'lenet5':
        model.forward = partial(slides_lenet5, model)
    for m in model.modules():
        if isinstance(m, IdentityPadding):
            m.forward = lambda x, m=m: m.pooling(F.pad(x, [0, 0, 0, 0, 0, m.add_channels]))
    return model


def plain_epoch(config, data_dir, workers, device, limit=None):
    """Seconds of an epoch and its validation by the slides' loop; limit cuts it short for warming up."""
    normalize = [T.ToTensor(), T.Normalize(MEAN, STD)]
    augment = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()]
    train_data = CIFAR10(data_dir, train=True, transform=T.Compose(augment + normalize))
    val_data = CIFAR10(data_dir, train=False, transform=T.Compose(normalize))
    model = slides_model(config).to(device)
    optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, config.momentum,
                                weight_decay=config.weight_decay, nesterov=config.optimizer == 'nesterov')
    began = time.time()
    batches = DataLoader(train_data, config.batch_size, shuffle=True, num_workers=workers)
    for step, (images, labels) in enumerate(batches):
        images, labels = images.to(device), labels.to(device)
        loss = nn.CrossEntropyLoss()(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if step == limit:
            return
    model.eval()
    with torch.no_grad():
        for images, labels in DataLoader(val_data, config.batch_size, num_workers=workers):
            (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()
    return time.time() - began


def our_epoch(config, data, device):
    """Seconds of an epoch and its validation by CIFAR10_train.py's functions."""
    model = build_model(config, device)
    optimizer, bf16 = build_optimizer(model, config), choose_precision('auto', device) == 'bf16'
    autocast, began = torch.autocast(device.type, torch.bfloat16, enabled=bf16), time.time()
    train_epoch(model, optimizer, data[0], config, 0, autocast)
    evaluate(model, data[1])
    return time.time() - began


def measure(row, way, data_dir):
    """Seconds of an epoch with its validation, after a few steps to warm up."""
    config, device = ROWS[row], choose_device()
    if way == 'ours':
        data = data_load('cifar10', data_dir, device=device)
        our_epoch(config, [TensorDataset(*part[:1280]) for part in data], device)
        return our_epoch(config, data, device)
    plain_epoch(config, data_dir, WAYS[way], device, limit=9)
    return plain_epoch(config, data_dir, WAYS[way], device)


def compare(rows, data_dir):
    """Print a table of seconds and ratios, each the median of three measurements in turn."""
    print(describe_machine(choose_device(), choose_precision('auto', choose_device())))
    print("\n| an epoch and its validation | plain, no workers, s | plain, 2 workers, s | ours, s | faster |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for row in rows:
        seconds = {way: [] for way in WAYS}
        for turn in range(3):
            for way in [*WAYS, *WAYS][turn : turn + 3]:
                command = [sys.executable, __file__, '--data-dir', data_dir, '--measure', row, way]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds[way].append(float(output.splitlines()[-1]))
        *both, ours = seconds.values()
        ratios = sorted(a / b for a, b in zip(min(both, key=statistics.median), ours))
        cells = [f'{statistics.median(s):.1f} ({min(s):.1f} to {max(s):.1f})' for s in (*both, ours)]
        print(f"| {row} | {' | '.join(cells)} | {ratios[1]:.2f} × ({ratios[0]:.2f} to {ratios[2]:.2f}) |",
              flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--data-dir', default='dataset', help="folder of CIFAR-10")
    parser.add_argument('--rows', nargs='+', default=list(ROWS), choices=list(ROWS))
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(*options.measure, options.data_dir))
    else:
        compare(options.rows, options.data_dir)

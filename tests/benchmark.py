"""How much faster this is than the assignment's own loop: python tests/benchmark.py --data-dir DIR

The plain loop is that of the slides: torchvision's transforms image by image, a DataLoader without workers and with two,
the model run eagerly in float32. Each row is measured in its own processes, plain and ours in turn; nothing else should run.
"""
import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms as T
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from CIFAR10_configuration import SETTINGS  # noqa: E402
from CIFAR10_train import (accelerate, build_model, build_optimizer, choose_device, describe_machine, evaluate,  # noqa: E402
                           train_epoch)
from dataset import MEAN, STD, data_load  # noqa: E402
from LeNet5_model import LeNet5_model  # noqa: E402

ROWS = {'ResNet-32': dict(model='resnet32'), 'LeNet-5': dict(model='lenet5'), 'MLP 1024-512': dict(model='mlp', hidden=(1024, 512))}
if SETTINGS['mlp'].hidden != (1024, 512):
    ROWS[f"MLP {'-'.join(map(str, SETTINGS['mlp'].hidden))}"] = dict(model='mlp')
STEPS = {'resnet32': 30, 'lenet5': 150, 'mlp': 150}
WAYS = {'plain, no workers': 0, 'plain, 2 workers': 2, 'ours': None}


def peak_memory():
    """The most memory that this process has held so far, in MB; NaN on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)


class SlidesLeNet5(LeNet5_model):
    """LeNet-5 in the order of the slides: convolution, activation, pooling."""

    def forward(self, x):
        x = F.max_pool2d(self.activation(self.conv1(x)), 2)
        x = F.max_pool2d(self.activation(self.conv2(x)), 2)
        x = self.activation(self.fc1(x.flatten(1)))
        return self.fc3(self.activation(self.fc2(x)))


def plain(config, data_dir, workers, began):
    """The slides' loop, written out; returns what it measured."""
    normalize = [T.ToTensor(), T.Normalize(MEAN, STD)]
    train_data = CIFAR10(data_dir, train=True, transform=T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *normalize]))
    val_data = CIFAR10(data_dir, train=False, transform=T.Compose(normalize))
    device = choose_device('auto')
    model = SlidesLeNet5(config.activation, config.initialization) if config.model == 'lenet5' else build_model(config)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
    criterion = nn.CrossEntropyLoss()
    model.train()
    for step, (images, labels) in enumerate(DataLoader(train_data, config.batch_size, shuffle=True, num_workers=workers)):
        images, labels = images.to(device), labels.to(device)
        outputs = model(images)
        loss = criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if step == 0:
            first = time.time()
        if step == 5:
            start = time.time()
        if step == 5 + STEPS[config.model]:
            break
    speed = STEPS[config.model] * config.batch_size / (time.time() - start)

    start, correct = time.time(), 0
    model.eval()
    with torch.no_grad():
        for images, labels in DataLoader(val_data, config.batch_size, num_workers=workers):
            correct += (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()
    return dict(speed=speed, start=first - began, evaluation=time.time() - start, memory=peak_memory(), compiling=0)


def ours(config, data_dir, began):
    """What CIFAR10_train.py does, one call after the other; returns what it measured."""
    device = choose_device('auto')
    train_data, val_data = data_load('cifar10', data_dir, device=device, urls=())
    model = build_model(config).to(device)
    optimizer = build_optimizer(model, config)

    def epoch(forward, steps):
        few = TensorDataset(*(tensor[:steps * config.batch_size] for tensor in train_data.tensors))
        train_epoch(model, forward, optimizer, few, config, dict(epoch=0, step=0, loss_sum=0.0, correct=0))

    eager = accelerate(model, dataclasses.replace(config, compile='off'), device, steps=1)
    epoch(eager, 1)
    first = time.time()
    epoch(eager, 5)
    start = time.time()
    evaluate(model, val_data)
    evaluation, memory = time.time() - start, peak_memory()
    forward = accelerate(model, config, device, steps=config.epochs * math.ceil(len(train_data) / config.batch_size))
    start = time.time()
    epoch(forward, 5)
    middle = time.time()
    epoch(forward, 5)
    start, compiling = time.time(), 2 * middle - start - time.time()
    epoch(forward, STEPS[config.model])
    return dict(speed=STEPS[config.model] * config.batch_size / (time.time() - start), start=first - began, evaluation=evaluation,
                memory=memory, compiling=max(0, compiling))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', default='dataset', help="folder of CIFAR-10")
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--rows', nargs='+', default=list(ROWS), choices=list(ROWS))
    parser.add_argument('--measure', nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        row, way, began = options.measure
        config = dataclasses.replace(SETTINGS[ROWS[row]['model']], batch_size=128, **ROWS[row])
        if way == 'ours':
            found = ours(config, options.data_dir, float(began))
        else:
            found = plain(config, options.data_dir, WAYS[way], float(began))
        return print(json.dumps(found))

    print(describe_machine(choose_device('auto')))
    print("\n| batch 128 | training, images/s | faster | evaluation of 10,000 images, s | start to first step, s | peak memory, MB "
          "| compiling, s |\n| --- | --- | --- | --- | --- | --- | --- |")
    for row in options.rows:
        found = {way: [] for way in WAYS}
        for turn in range(options.repeats):
            for way in [*WAYS, *WAYS][turn % 3:turn % 3 + 3]:
                command = [sys.executable, __file__, '--data-dir', options.data_dir, '--measure', row, way, str(time.time())]
                with tempfile.TemporaryDirectory() as cache:  # an empty one, so that it compiles as on a new machine
                    output = subprocess.run(command, check=True, capture_output=True, text=True,
                                            env={**os.environ, 'TORCHINDUCTOR_CACHE_DIR': cache}).stdout
                found[way].append(json.loads(output.splitlines()[-1]))
        speeds = {way: [run['speed'] for run in runs] for way, runs in found.items()}
        plain_speeds = max((speeds[way] for way in WAYS if way != 'ours'), key=statistics.median)
        for way, runs in found.items():
            ratios = sorted(a / b for a, b in zip(speeds[way], plain_speeds))
            middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            print(f"| {row}, {way} | {middle['speed']:,.0f} ({min(speeds[way]):,.0f} to {max(speeds[way]):,.0f}) "
                  f"| {statistics.median(ratios):.2f} × ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {middle['evaluation']:.1f} "
                  f"| {middle['start']:.1f} | {middle['memory']:,.0f} | {round(middle['compiling']) or '–'} |", flush=True)


if __name__ == '__main__':
    main()

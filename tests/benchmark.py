"""How much faster this is than the assignment's own loop: python tests/benchmark.py --data-dir DIR

Times an epoch with its validation. The plain loop is that of the slides: torchvision's transforms image by
image, a DataLoader without workers and with two, float32, the layers in their order. Each measurement is a
process of its own, plain and ours in turn; nothing else should run. With --precision it compares accuracies
instead: bf16 with float32.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
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
from LeNet5_model import LeNet5_model  # noqa: E402
from ResNet_model import IdentityPadding, ResNet32_model  # noqa: E402

ROWS = {'ResNet-32': SETTINGS['resnet32'], 'LeNet-5': SETTINGS['lenet5'],
        'MLP 1024-512': replace(SETTINGS['mlp'], hidden=(1024, 512))}
WAYS = {'plain, no workers': 0, 'plain, 2 workers': 2, 'ours': None}  # and their DataLoaders' workers


class SlidesLeNet5(LeNet5_model):
    """LeNet-5 in the order of the slides: convolution, activation, pooling."""

    def forward(self, x):
        x = F.max_pool2d(self.activation(self.conv1(x)), 2)
        x = F.max_pool2d(self.activation(self.conv2(x)), 2)
        x = self.activation(self.fc1(x.flatten(1)))
        return self.fc3(self.activation(self.fc2(x)))


def slides_model(config):
    """The network as the slides have it: padding before pooling."""
    if config.model == 'lenet5':
        return SlidesLeNet5(config.activation, config.initialization)
    model = build_model(config, torch.device('cpu')) if config.model == 'mlp' else ResNet32_model()
    for m in list(model.modules()):
        if isinstance(m, IdentityPadding):
            m.forward = lambda x, m=m: m.pooling(F.pad(x, [0, 0, 0, 0, 0, m.add_channels]))
    return model


def plain_epoch(config, data_dir, workers, device, limit=None):
    """Seconds of an epoch and its validation by the slides' loop; limit cuts it short for warming up."""
    normalize = [T.ToTensor(), T.Normalize(MEAN, STD)]
    train_transform = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *normalize])
    train_data = CIFAR10(data_dir, train=True, transform=train_transform)
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


def our_epoch(config, data, device, precision='auto', epochs=1):
    """Seconds of so many epochs with validation by CIFAR10_train.py's functions, and the last accuracy."""
    torch.manual_seed(config.seed)
    model = build_model(config, device)
    optimizer, bf16 = build_optimizer(model, config), choose_precision(precision, device) == 'bf16'
    autocast, began = torch.autocast(device.type, torch.bfloat16, enabled=bf16), time.time()
    for epoch in range(epochs):
        train_epoch(model, optimizer, data[0], config, epoch, autocast)
        accuracy = evaluate(model, data[1])[1]
    return time.time() - began, accuracy


def measure(row, way, data_dir):
    """Seconds of an epoch with its validation, after a few steps to warm up."""
    config, device = ROWS[row], choose_device()
    if way == 'ours':
        data = data_load('cifar10', data_dir, device=device, urls=())
        our_epoch(config, [TensorDataset(*part[:1280]) for part in data], device)
        return our_epoch(config, data, device)[0]
    plain_epoch(config, data_dir, WAYS[way], device, limit=9)
    return plain_epoch(config, data_dir, WAYS[way], device)


def compare_speed(rows, repeats, data_dir):
    """Print a table of seconds and ratios, each the median of so many measurements in turn."""
    print(describe_machine(choose_device(), choose_precision('auto', choose_device())))
    print("\n| an epoch and its validation | plain, no workers, s | plain, 2 workers, s | ours, s | faster |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for row in rows:
        seconds = {way: [] for way in WAYS}
        for turn in range(repeats):
            for way in [*WAYS, *WAYS][turn % 3 : turn % 3 + 3]:
                command = [sys.executable, __file__, '--data-dir', data_dir, '--measure', row, way]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds[way].append(json.loads(output.splitlines()[-1]))
        plain = min((seconds[way] for way in list(WAYS)[:2]), key=statistics.median)
        ratios = sorted(a / b for a, b in zip(plain, seconds['ours'], strict=True))
        cells = [f'{statistics.median(s):.1f} ({min(s):.1f} to {max(s):.1f})' for s in seconds.values()]
        print(f"| {row} | {' | '.join(cells)} | {statistics.median(ratios):.2f} × "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |", flush=True)


def compare_precision(data_dir, epochs, seeds=3):
    """Print mean and standard deviation over seeds of the accuracy in float32 and in bf16."""
    device = choose_device()
    data = data_load('cifar10', data_dir, device=device, urls=())
    for row, config in ROWS.items():
        for precision in 'fp32', 'bf16':
            config = replace(config, epochs=epochs, learning_rate_decay='cosine')
            found = [our_epoch(replace(config, seed=seed), data, device, precision, epochs)[1]
                     for seed in range(seeds)]
            print(f"{row}, {precision}, {epochs} epochs: {statistics.mean(found):.2f} ± "
                  f"{statistics.stdev(found):.2f} %", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add('--data-dir', default='dataset', help="folder of CIFAR-10")
    add('--repeats', type=int, default=3)
    add('--rows', nargs='+', default=list(ROWS), choices=list(ROWS))
    add('--precision', type=int, metavar='EPOCHS', help="compare bf16 with float32, three seeds each")
    add('--measure', nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.data_dir)))
    elif options.precision:
        compare_precision(options.data_dir, options.precision)
    else:
        compare_speed(options.rows, options.repeats, options.data_dir)


if __name__ == '__main__':
    main()

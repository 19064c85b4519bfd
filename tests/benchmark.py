"""How much faster this is than the assignment's own loop: python tests/benchmark.py --data-dir DIR

Times an epoch with its validation. The plain loop is that of the slides: torchvision's transforms image by
image, a DataLoader without workers and with two, float32, the layers in their order. Each measurement is a
process of its own, plain and ours in turn; nothing else should run. With --precision it compares accuracies
instead: bf16 with float32.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
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
from CIFAR10_train import build_optimizer, train_epoch, use_bf16  # noqa: E402
from dataset import MEAN, STD, data_load  # noqa: E402
from LeNet5_model import LeNet5_model  # noqa: E402
from ResNet_model import IdentityPadding, ResNet32_model  # noqa: E402

ROWS = {
    'ResNet-32': SETTINGS['resnet32'],
    'LeNet-5': SETTINGS['lenet5'],
    'MLP 1024-512': dataclasses.replace(SETTINGS['mlp'], hidden=(1024, 512)),
}
WAYS = ('plain, no workers', 'plain, 2 workers', 'ours')


class SlidesLeNet5(LeNet5_model):
    """LeNet-5 in the order of the slides: convolution, activation, pooling."""

    def forward(self, x):
        x = F.max_pool2d(self.activation(self.conv1(x)), 2)
        x = F.max_pool2d(self.activation(self.conv2(x)), 2)
        x = self.activation(self.fc1(x.flatten(1)))
        return self.fc3(self.activation(self.fc2(x)))


class SlidesPadding(IdentityPadding):
    """IdentityPadding in the order of the slides: padding, then pooling."""

    def forward(self, x):
        return self.pooling(F.pad(x, [0, 0, 0, 0, 0, self.add_channels]))


def slides_model(config):
    """The network as the slides have it, its dropout PyTorch's."""
    if config.model == 'lenet5':
        return SlidesLeNet5(config.activation, config.initialization)
    if config.model == 'resnet32':
        model = ResNet32_model()
        for m in model.modules():
            if isinstance(m, IdentityPadding):
                m.__class__ = SlidesPadding
        return model
    model = build_model(config, torch.device('cpu'))
    for i, layer in enumerate(model.layers):
        if isinstance(layer, nn.Dropout):
            model.layers[i] = nn.Dropout(layer.p)
    return model


def plain_epoch(config, data_dir, workers, device, limit=None):
    """Seconds of an epoch and its validation by the slides' loop; limit cuts it short for warming up."""
    normalize = [T.ToTensor(), T.Normalize(MEAN, STD)]
    train_transform = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), *normalize])
    train_data = CIFAR10(data_dir, train=True, transform=train_transform)
    val_data = CIFAR10(data_dir, train=False, transform=T.Compose(normalize))
    model = slides_model(config).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.optimizer == 'nesterov',
    )
    criterion = nn.CrossEntropyLoss()
    began = time.time()
    model.train()
    for step, (images, labels) in enumerate(
        DataLoader(train_data, config.batch_size, shuffle=True, num_workers=workers)
    ):
        images, labels = images.to(device), labels.to(device)
        outputs = model(images)
        loss = criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if step == limit:
            return
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in DataLoader(val_data, config.batch_size, num_workers=workers):
            correct += (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()
    return time.time() - began


def our_epoch(config, data, device, precision='auto', epochs=1):
    """Seconds of so many epochs with validation by CIFAR10_train.py's functions, and the last accuracy."""
    torch.manual_seed(config.seed)
    model = build_model(config, device)
    optimizer = build_optimizer(model, config)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device))
    began = time.time()
    for epoch in range(epochs):
        train_epoch(model, optimizer, data[0], config, epoch, autocast)
        accuracy = evaluate(model, data[1])[1]
    return time.time() - began, accuracy


def measure(config, way, data_dir):
    """Seconds of an epoch with its validation, after a few steps to warm up."""
    device = choose_device()
    if way == 'ours':
        data = data_load('cifar10', data_dir, device=device, urls=())
        few = [TensorDataset(*tensors[:1280]) for tensors in data]
        our_epoch(config, few, device)
        return our_epoch(config, data, device)[0]
    workers = 2 if way == 'plain, 2 workers' else 0
    plain_epoch(config, data_dir, workers, device, limit=9)
    return plain_epoch(config, data_dir, workers, device)


def compare_speed(rows, repeats, data_dir):
    """Print a table of seconds and ratios, each the median of so many measurements in turn."""
    print(describe_machine(choose_device()))
    print(
        "\n| an epoch and its validation | plain, no workers, s | plain, 2 workers, s | ours, s | faster |\n"
        "| --- | --- | --- | --- | --- |",
        flush=True,
    )
    for row in rows:
        seconds = {way: [] for way in WAYS}
        for turn in range(repeats):
            for way in [*WAYS, *WAYS][turn % 3 : turn % 3 + 3]:
                command = [sys.executable, __file__, '--data-dir', data_dir, '--measure', row, way]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds[way].append(json.loads(output.splitlines()[-1]))
        plain = min((seconds[way] for way in WAYS[:2]), key=statistics.median)
        ratios = sorted(a / b for a, b in zip(plain, seconds['ours'], strict=True))
        cells = [f'{statistics.median(s):.1f} ({min(s):.1f} to {max(s):.1f})' for s in seconds.values()]
        print(
            f"| {row} | {' | '.join(cells)} | {statistics.median(ratios):.2f} × "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
            flush=True,
        )


def compare_precision(data_dir, epochs, seeds=3):
    """Print mean and standard deviation over seeds of the accuracy in float32 and in bf16."""
    device = choose_device()
    data = data_load('cifar10', data_dir, device=device, urls=())
    for row, config in ROWS.items():
        for precision in 'fp32', 'bf16':
            configs = [
                dataclasses.replace(config, seed=seed, epochs=epochs, learning_rate_decay='cosine')
                for seed in range(seeds)
            ]
            found = [our_epoch(config, data, device, precision, epochs)[1] for config in configs]
            print(
                f"{row}, {precision}, {epochs} epochs: {statistics.mean(found):.2f} ± "
                f"{statistics.stdev(found):.2f} %",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data-dir', default='dataset', help="folder of CIFAR-10")
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--rows', nargs='+', default=list(ROWS), choices=list(ROWS))
    parser.add_argument(
        '--precision', type=int, metavar='EPOCHS', help="compare bf16 with float32, three seeds each"
    )
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        row, way = options.measure
        print(json.dumps(measure(ROWS[row], way, options.data_dir)))
    elif options.precision:
        compare_precision(options.data_dir, options.precision)
    else:
        compare_speed(options.rows, options.repeats, options.data_dir)


if __name__ == '__main__':
    main()

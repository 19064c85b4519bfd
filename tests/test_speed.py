"""What makes training faster leaves its results alone: own dropout, compilation, several processes."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, after_first_epoch, process, rows, script
from test_training import FLOAT32, first

from CIFAR10_configuration import SETTINGS
from CIFAR10_evaluation import build_model
from CIFAR10_train import build_optimizer, train_epoch
from dataset import crop_and_flip, training_batches
from MLP_model import Dropout

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2']


def test_dropout_silences_its_share_scales_the_rest_and_leaves_testing_alone():
    layer, x = Dropout(0.3), torch.randn(333, 1001, requires_grad=True)
    torch.manual_seed(0)
    y = layer(x)
    kept = y != 0
    assert (~kept).float().mean() == pytest.approx(0.3, abs=0.004)  # 5 standard deviations
    for dim in 0, 1:  # no unit and no image is preferred
        assert (~kept).float().mean(dim).std() < 1.2 * (0.21 / kept.shape[dim]) ** 0.5
    assert abs((kept[:, :-1] == kept[:, 1:]).float().mean() - 0.58) < 0.01  # neighbours are independent
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.7)
    assert not torch.equal(layer(x), y)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)


def test_random_crops_do_not_change_the_images_they_are_taken_from():
    images = first(20).tensors[0]
    before = images.clone()
    crop_and_flip(images, torch.full((20, 2), 4), torch.ones(20, dtype=bool))
    assert torch.equal(images, before)


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'cl'))), reason="needs a C++ compiler")
def test_a_compiled_epoch_learns_what_an_eager_one_learns():
    losses = []
    for compiled in False, True:
        torch.manual_seed(0)
        config = dataclasses.replace(SETTINGS['mlp'], hidden=(16,), dropout=0.0, batch_size=40, warmup=0.0)
        model = build_model(config, torch.device('cpu'))
        optimizer = build_optimizer(model, config)
        training_model = model
        if compiled:
            training_model = torch.compile(model, dynamic=False, mode='reduce-overhead')
        losses.append(
            [
                train_epoch(training_model, optimizer, first(40), config, epoch, FLOAT32)[0]
                for epoch in range(2)
            ]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_failing_compiler_is_named_and_leaving_it_out_advised(tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    done = process(
        tmp_path,
        'CIFAR10_train.py',
        '--model',
        'lenet5',
        '--dataset',
        'synthetic',
        '--epochs',
        1,
        '--compile',
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('--compile failed')
    assert 'leave it out' in done.stderr and 'Traceback' not in done.stderr


def test_processes_together_see_each_batch_once():
    data = first(130)
    config = dataclasses.replace(SETTINGS['lenet5'], batch_size=32)
    whole = list(training_batches(data, config, seed=5))
    shares = [list(training_batches(data, config, 5, rank, 3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for rank, (images, labels) in enumerate(parts):
            assert torch.equal(images, batch[0][rank::3]) and torch.equal(labels, batch[1][rank::3])
        assert sum(len(labels) for _, labels in parts) == len(batch[1])


def torchrun(folder, *command):
    return subprocess.run(
        [*TORCHRUN, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300
    )


WORKER = f"""
import dataclasses, os, sys, torch, torch.distributed as dist
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from test_training import *
dist.init_process_group()
rank = dist.get_rank()
def train(name):  # a function, so that the parallel model is gone before its processes part
    config = dataclasses.replace(SETTINGS[name], batch_size=40, epochs=1)
    torch.manual_seed(rank)  # the first process's weights must reach the second one
    model = build_model(config, CPU)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    if sys.argv[1] == 'dies' and rank == 1:
        os._exit(9)
    loss, accuracy = train_epoch(parallel, build_optimizer(model, config), first(190), config, 0, FLOAT32)
    torch.save(dict(model.named_parameters(), loss=loss, accuracy=accuracy), f'{{name}}{{rank}}.pt')
for name in SETTINGS:
    train(name)
dist.destroy_process_group()
"""


def test_two_processes_end_with_identical_weights_and_the_same_loss(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    done = torchrun(tmp_path, 'worker.py', 'lives')
    assert done.returncode == 0, done.stderr
    for model in SETTINGS:
        one, two = (torch.load(tmp_path / f'{model}{rank}.pt') for rank in range(2))
        for key, value in one.items():
            assert torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key]


def test_a_process_that_dies_ends_the_run_with_an_error(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    began = time.time()
    assert torchrun(tmp_path, 'worker.py', 'dies').returncode != 0
    assert time.time() - began < 120 and not list(tmp_path.glob('*.pt'))


def test_without_batch_norm_two_processes_train_as_one_also_after_a_kill(tmp_path):
    options = [
        '--model',
        'lenet5',
        '--dataset',
        'synthetic',
        '--epochs',
        2,
        '--batch-size',
        120,
        '--precision',
        'fp32',
        # Smooth and slow, as rounding differs between one process and two
        '--activation',
        'elu',
        '--learning-rate',
        0.005,
    ]
    alone = script(tmp_path, 'CIFAR10_train.py', *options, '--name', 'alone')
    command = [ROOT / 'CIFAR10_train.py', *options, '--name', 'together']
    training = after_first_epoch(tmp_path, [*TORCHRUN, *command])
    training.terminate()
    training.communicate(timeout=120)
    assert training.returncode != 0
    together = torchrun(tmp_path, *command)
    assert alone.returncode == 0 and together.returncode == 0, together.stderr
    assert together.stdout.count('Continuing together at epoch') == 1
    assert (
        together.stdout.count('epoch 2/2') == together.stdout.count('The report is') == 1
    )  # only one process prints
    for a, b in zip(*(rows(tmp_path / 'results' / name) for name in ('alone', 'together')), strict=True):
        for column in ('train_loss', 'val_loss', 'learning_rate'):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=2e-3)
        for column in ('train_accuracy', 'val_accuracy'):
            assert float(a[column]) == pytest.approx(float(b[column]), abs=1.0)


def test_a_batch_that_does_not_reach_every_process_is_refused(tmp_path):
    done = torchrun(
        tmp_path, ROOT / 'CIFAR10_train.py', '--model', 'mlp', '--dataset', 'synthetic', '--batch-size', 4999
    )
    assert done.returncode != 0 and done.stderr.count('--batch-size 4999 leaves a batch') == 1
    assert not (tmp_path / 'results').exists()


@pytest.mark.skipif(os.name == 'nt' or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_together(tmp_path):
    done = torchrun(
        tmp_path, ROOT / 'CIFAR10_train.py', '--model', 'resnet32', '--dataset', 'synthetic', '--epochs', 2
    )
    assert done.returncode == 0 and 'Device: cuda' in done.stdout, done.stderr

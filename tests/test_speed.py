"""What makes training faster leaves its results alone: cropping at once, compilation, several processes."""
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, after_first_epoch, process, rows, script
from test_training import FLOAT32, first, in_double, learn

from CIFAR10_configuration import SETTINGS
from dataset import crop_and_flip, training_batches

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2']
TRAIN = f'{shlex.quote(str(ROOT / "CIFAR10_train.py"))} --dataset synthetic'


def torchrun(folder, command):
    command = TORCHRUN + shlex.split(command)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_random_crops_do_not_change_the_images_they_are_taken_from():
    images = first(20).tensors[0]
    before = images.clone()
    crop_and_flip(images, torch.full((20, 2), 4), torch.ones(20, dtype=bool))
    assert torch.equal(images, before)


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'cl'))), reason="needs a C++ compiler")
def test_a_compiled_epoch_learns_what_an_eager_one_learns():
    eager, compiled = (learn('mlp', FLOAT32, first(40), 2, prepare, hidden=(16,), dropout=0, batch_size=40)[0]
                       for prepare in (lambda model: model,
                                       partial(torch.compile, dynamic=False, mode='reduce-overhead')))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_a_failing_compiler_is_named_and_leaving_it_out_advised(tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    done = process(tmp_path, 'CIFAR10_train.py --dataset synthetic --model mlp --hidden 8 --compile')
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('--compile failed')
    assert 'leave it out' in done.stderr and 'Traceback' not in done.stderr


def test_processes_together_see_each_batch_once():
    data, config = first(130), replace(SETTINGS['lenet5'], batch_size=32)
    whole = list(training_batches(data, config, seed=5))
    shares = [list(training_batches(data, config, 5, rank, 3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for rank, (images, labels) in enumerate(parts):
            assert torch.equal(images, batch[0][rank::3]) and torch.equal(labels, batch[1][rank::3])
        assert sum(len(labels) for _, labels in parts) == len(batch[1])


# Parts of two images and of one, and a last batch of two
UNEVEN = dict(batch_size=3, learning_rate=0.01, clip=1.0)
# It ends with a command whose batches are too small for two.
WORKER = f"""
import sys, torch.distributed as dist
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from test_training import *
import CIFAR10_train
dist.init_process_group()
rank = dist.get_rank()
def train(name):  # a function, so that the parallel model is gone before its processes part
    config = replace(SETTINGS[name], batch_size=40, epochs=1, hidden=(64, 32), depth=8)
    torch.manual_seed(rank)  # the first process's weights must reach the second one
    model = build_model(config, CPU)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    loss, accuracy = train_epoch(parallel, build_optimizer(model, config), first(190), config, 0, FLOAT32)
    torch.save(dict(model.named_parameters(), loss=loss, accuracy=accuracy), f'{{name}}{{rank}}.pt')
for name in SETTINGS:
    train(name)
def parallel(model):
    return torch.nn.parallel.DistributedDataParallel(in_double(model))
torch.save(learn('lenet5', FLOAT32, first(32), 1, parallel, **{UNEVEN})[1].state_dict(), f'uneven{{rank}}.pt')
dist.init_process_group = lambda **_: None  # they have met
sys.argv = 'CIFAR10_train.py --model mlp --dataset synthetic --batch-size 4999'.split()
CIFAR10_train.run_script(CIFAR10_train.main)
"""


def test_two_processes_end_alike_also_with_uneven_parts_and_refuse_a_batch_that_does_not_reach_both(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    done = torchrun(tmp_path, 'worker.py')
    for model in SETTINGS:
        one, two = (torch.load(tmp_path / f'{model}{rank}.pt') for rank in range(2))
        for key, value in one.items():
            assert torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key]
    _, alone = learn('lenet5', FLOAT32, first(32), prepare=in_double, **UNEVEN)
    for name, tensor in alone.state_dict().items():
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f'uneven{rank}.pt')[name], tensor)
    assert done.returncode != 0 and done.stderr.count('--batch-size 4999 leaves a batch') == 1
    assert not (tmp_path / 'results').exists()


FAILING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import CIFAR10_train
def train_epoch(*_):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
if CIFAR10_train.RANK == 1:
    CIFAR10_train.train_epoch = train_epoch
CIFAR10_train.run_script(CIFAR10_train.main)
"""


def test_where_only_the_second_process_fails_its_reason_is_told_once(tmp_path):
    (tmp_path / 'failing.py').write_text(FAILING)
    done = torchrun(tmp_path, 'failing.py --model mlp --hidden 8 --dataset synthetic --device cpu')
    assert done.returncode != 0 and done.stderr.count('too little memory') == 1, done.stderr


@pytest.mark.skipif(not shutil.which('pgrep'), reason="finds the processes by it")
def test_without_batch_norm_two_processes_train_as_one_also_after_one_dies(tmp_path):
    # Smooth and slow, as rounding differs between one process and two
    options = ('--model mlp --hidden 256 --normalization none --dropout 0 --activation elu --epochs 2 '
               '--batch-size 50 --learning-rate 0.001 --precision fp32')
    alone = script(tmp_path, f'CIFAR10_train.py --dataset synthetic {options} --name alone')
    command = f'{TRAIN} {options} --name together'
    training = after_first_epoch(tmp_path, TORCHRUN + shlex.split(command))
    workers = subprocess.check_output(['pgrep', '-P', str(training.pid)], text=True).split()
    os.kill(int(workers[1]), signal.SIGKILL)
    training.communicate(timeout=120)
    assert training.returncode != 0 and len(workers) == 2
    together = torchrun(tmp_path, command)
    assert alone.returncode == 0 and together.returncode == 0, together.stderr
    # Only one process prints
    for text in ('Continuing together after epoch', 'epoch 2/2', 'The report is'):
        assert together.stdout.count(text) == 1
    for a, b in zip(*(rows(tmp_path / 'results' / name) for name in ('alone', 'together')), strict=True):
        for column in ('train_loss', 'val_loss', 'learning_rate'):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=2e-3)
        for column in ('train_accuracy', 'val_accuracy'):
            assert float(a[column]) == pytest.approx(float(b[column]), abs=1.0)


@pytest.mark.skipif(os.name == 'nt' or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_together(tmp_path):
    done = torchrun(tmp_path, f'{TRAIN} --model resnet32 --epochs 2')
    assert done.returncode == 0 and 'Device: cuda' in done.stdout, done.stderr

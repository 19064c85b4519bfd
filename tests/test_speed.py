"""What makes training faster leaves its results alone: cropping at once, compilation, several processes."""
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, after_first_epoch, process, rows, script
from test_training import FLOAT32, first, in_double, learn

from CIFAR10_configuration import SETTINGS
from dataset import training_batches

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node']
TRAIN = f'{shlex.quote(str(ROOT / "CIFAR10_train.py"))} --dataset synthetic'


def torchrun(folder, command):
    """Run a command, whose first word is the number of processes, that imports from here and from tests/."""
    path = os.pathsep.join([str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')])
    return subprocess.run(TORCHRUN + shlex.split(command), cwd=folder, env={**os.environ, 'PYTHONPATH': path},
                          capture_output=True, text=True, timeout=300)


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


def test_processes_together_see_each_batch_once_and_leave_the_images_alone():
    data, config = first(130), replace(SETTINGS['lenet5'], batch_size=32)
    before = data.tensors[0].clone()
    whole = list(training_batches(data, config, seed=5))
    shares = [list(training_batches(data, config, 5, rank, 3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for rank, (images, labels) in enumerate(parts):
            assert torch.equal(images, batch[0][rank::3]) and torch.equal(labels, batch[1][rank::3])
    assert torch.equal(data.tensors[0], before)


# Parts of two images and of one, and a last batch of two
UNEVEN = dict(batch_size=3, learning_rate=0.01, clip=1.0)
CASES = dict(lenet5=UNEVEN, mlp=dict(batch_size=8, hidden=(16,)), resnet32=dict(batch_size=8, depth=8))
WORKER = f"""
import sys, CIFAR10_train, torch.distributed as dist
from test_training import *
def parallel(model):
    return torch.nn.parallel.DistributedDataParallel(in_double(model))
dist.init_process_group()
for name, changes in {CASES}.items():
    losses, model = learn(name, FLOAT32, first(32), 1, parallel, **changes)
    torch.save(dict(model.named_parameters(), losses=torch.tensor(losses)), f'{{name}}{{dist.get_rank()}}.pt')
    del model  # the parallel one is gone before its processes part
dist.init_process_group = lambda **_: None  # they have met
sys.argv = 'CIFAR10_train.py --model mlp --dataset synthetic --batch-size 4999'.split()  # the last has one
CIFAR10_train.run_script(CIFAR10_train.main)
"""


def test_two_processes_end_alike_also_with_uneven_parts_and_refuse_a_batch_that_does_not_reach_both(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    done = torchrun(tmp_path, '2 worker.py')
    _, alone = learn('lenet5', FLOAT32, first(32), prepare=in_double, **UNEVEN)
    for model in CASES:
        one, two = (torch.load(tmp_path / f'{model}{rank}.pt') for rank in range(2))
        for name, value in one.items():
            assert torch.equal(value, two[name])
            if model == 'lenet5' and name != 'losses':
                torch.testing.assert_close(value, alone.get_parameter(name))
    assert done.returncode != 0 and done.stderr.count('at least 4 for the last batch') == 1
    assert not (tmp_path / 'results').exists()


def test_where_only_the_second_process_fails_its_reason_is_told_once(tmp_path):
    (tmp_path / 'failing.py').write_text("""
import CIFAR10_train
if CIFAR10_train.RANK == 1:
    CIFAR10_train.train_epoch = lambda *_: bytes(1 << 60)
CIFAR10_train.run_script(CIFAR10_train.main)
""")
    done = torchrun(tmp_path, '2 failing.py --model mlp --hidden 8 --dataset synthetic --device cpu')
    assert done.returncode != 0 and done.stderr.count('too little memory') == 1, done.stderr


@pytest.mark.skipif(not shutil.which('pgrep'), reason="finds the processes by it")
def test_without_batch_norm_two_processes_train_as_one_also_after_one_dies(tmp_path):
    # Smooth and slow, as rounding differs between one process and two
    options = ('--model mlp --hidden 256 --normalization none --dropout 0 --activation elu --epochs 2 '
               '--batch-size 50 --learning-rate 0.001 --precision fp32')
    alone = script(tmp_path, f'CIFAR10_train.py --dataset synthetic {options} --name alone')
    command = f'2 {TRAIN} {options} --name together'
    training = after_first_epoch(tmp_path, TORCHRUN + shlex.split(command))
    workers = subprocess.check_output(['pgrep', '-P', str(training.pid)], text=True).split()
    os.kill(int(workers[1]), signal.SIGKILL)
    training.communicate(timeout=120)
    assert training.returncode != 0 and len(workers) == 2
    together = torchrun(tmp_path, command)
    assert alone.returncode == 0 and together.returncode == 0, together.stderr
    for text in 'Continuing together after epoch', 'epoch 2/2', 'The report is':  # only one process prints
        assert together.stdout.count(text) == 1
    for a, b in zip(*(rows(tmp_path / 'results' / name) for name in ('alone', 'together')), strict=True):
        for column in 'train_loss', 'val_loss', 'learning_rate', 'train_accuracy', 'val_accuracy':
            margin = dict(abs=1.0) if 'accuracy' in column else dict(rel=2e-3)
            assert float(a[column]) == pytest.approx(float(b[column]), **margin)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize('processes, options', [(1, '--holdout 500'), (1, '--compile'), (2, '')])
def test_training_on_gpus(processes, options, tmp_path):
    if processes > torch.cuda.device_count() or options == '--compile' and not find_spec('triton'):
        pytest.skip("needs more GPUs or triton")
    done = torchrun(tmp_path, f'{processes} {TRAIN} --model lenet5 --epochs 2 --device cuda {options}')
    assert done.returncode == 0 and 'Device: cuda' in done.stdout, done.stderr

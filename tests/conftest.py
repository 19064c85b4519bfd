"""What several tests share: scripts run as a user runs them, runs that are killed, small data, short runs."""
import contextlib
import csv
import functools
import hashlib
import importlib
import io
import os
import pickle
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# BF16=1 and BF16=0 make the program believe that the processor multiplies bf16 natively, or does not; each
# Python that a test starts believes it too, as it begins with the sitecustomize.py in its path.
if 'BF16' in os.environ:
    BELIEVE = """import os, torch
real = getattr(torch.cpu, 'get_capabilities', dict)()
torch.cpu.get_capabilities = lambda: {**real, 'avx512_bf16': os.environ['BF16'] == '1'}
"""
    PATH = tempfile.TemporaryDirectory()
    Path(PATH.name, 'sitecustomize.py').write_text(BELIEVE)
    os.environ['PYTHONPATH'] = os.pathsep.join([PATH.name, os.environ.get('PYTHONPATH', '')])
    exec(BELIEVE)

import dataset  # noqa: E402
from CIFAR10_configuration import print_once, run_script  # noqa: E402
from dataset import synthetic  # noqa: E402

synthetic.generate = functools.cache(synthetic.generate)  # it gives the same images each time, after a second
dataset.MIRRORS.clear()  # no test asks a server


def rows(folder):
    """The rows of a run's history.csv, as dicts of texts."""
    return list(csv.DictReader((folder / 'history.csv').read_text().splitlines()))


def process(folder, command, **options):
    """Run a script in a folder as a user does: 'CIFAR10_train.py --model mlp'. Returns the process."""
    name, *arguments = shlex.split(command)
    return subprocess.run([sys.executable, ROOT / name, *arguments], cwd=folder, text=True, encoding='utf-8',
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=600, **options)


def script(folder, command):
    """The same within this process, for a new one takes seconds to import PyTorch."""
    name, *arguments = shlex.split(command)
    module, output, errors, code = importlib.import_module(Path(name).stem), io.StringIO(), io.StringIO(), 0
    print_once.cache_clear()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(errors)):
        patch.chdir(folder)
        patch.setattr(sys, 'argv', [name, *arguments])
        try:
            run_script(module.main)
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(sys.argv, code, output.getvalue(), errors.getvalue())


def after_first_epoch(folder, command):
    """Start a training (a list of words) and return its process as soon as it has printed its first epoch."""
    pipe = subprocess.PIPE
    training = subprocess.Popen(command, cwd=folder, text=True, stdout=pipe, stderr=pipe)
    next((line for line in training.stdout if line.startswith('epoch 1/')), None)
    return training


class Killed(BaseException):
    """Ends a training where it stands, as a kill does: nothing in the program catches it."""


def killed(moment, folder, options):
    """Train, unevaluated, and be killed at that loss, or flush or renaming of a file (0: never). Was it?"""
    left = moment

    def dies(function):
        def call(*arguments, **keywords):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return function(*arguments, **keywords)
        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((F, 'cross_entropy'), (os, 'fsync'), (os, 'replace')):
            patch.setattr(module, name, dies(getattr(module, name)))
        patch.setattr('CIFAR10_train.evaluate_and_report', lambda *_: False)
        try:
            done = script(folder, f'CIFAR10_train.py {options}')
        except Killed:
            return True
    assert done.returncode == 0, done.stderr
    return False


def assert_same_run(a, b):
    """Two runs' folders hold the same weights, momentum and history, to the last bit, but for the seconds."""
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
    (last, best), (last_b, best_b) = ([torch.load(folder / name, weights_only=True)
                                       for name in ('last.pt', 'best.pt')] for folder in (a, b))
    same(last['model'], last_b['model'])
    same(last['optimizer']['state'], last_b['optimizer']['state'])
    same(best['model_state_dict'], best_b['model_state_dict'])
    assert best['epoch'] == best_b['epoch']
    history, history_b = ([{**row, 'seconds': None} for row in rows(folder)] for folder in (a, b))
    assert history == history_b


def use_few_images(patch):
    """130 synthetic images to train, two batches of the settings, and 100 to validate."""
    sets = {train: tuple(tensor[:count] for tensor in synthetic.generate(train))
            for train, count in ((True, 130), (False, 100))}
    patch.setattr(synthetic, 'generate', sets.get)


@pytest.fixture
def few_images(monkeypatch):
    use_few_images(monkeypatch)


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A folder in which all settings were trained on synthetic images, ResNet-32 on a few, and the output."""
    folder, output = tmp_path_factory.mktemp('trained'), {}
    for model, options in dict(mlp='--hidden 64', lenet5='', resnet32='--batch-size 10').items():
        with pytest.MonkeyPatch.context() as patch:
            if model == 'resnet32':  # it takes its time
                use_few_images(patch)
            options = f'--dataset synthetic --epochs 2 {options}'
            done = script(folder, f'CIFAR10_train.py --model {model} {options}')
        assert done.returncode == 0, done.stderr
        output[model] = done.stdout
    return folder, output


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """A folder with batch files like CIFAR-10's but of 20 images, and their archive, taken as official."""
    folder, rng = tmp_path / 'images' / CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir(parents=True)

    def write(name, **content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in 'train_list', 'test_list':
        sums = [[name, write(name, data=rng.integers(0, 256, (20, 3072), np.uint8), labels=2 * [*range(10)])]
                for name, _ in getattr(CIFAR10, attribute)]
        monkeypatch.setattr(CIFAR10, attribute, sums)
    names = write('batches.meta', label_names=list('abcdefghij'))
    monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': names})
    archive = folder.parent / CIFAR10.filename
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(CIFAR10, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    return folder.parent

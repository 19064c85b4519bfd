"""What several tests share: the scripts run as a user runs them, and two short runs on the synthetic images."""
import contextlib
import gc
import hashlib
import importlib
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from CIFAR10_configuration import run_script  # noqa: E402


@pytest.fixture(scope='session')
def process():
    """Call process(folder, 'CIFAR10_train.py', *options): runs it in that folder as a user does; returns the finished process."""
    def call(folder, name, *options):
        return subprocess.run([sys.executable, ROOT / name, *map(str, options)], cwd=folder, text=True, encoding='utf-8',
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    return call


@pytest.fixture(scope='session')
def script():
    """The same within this process, for a new one takes seconds to import PyTorch."""
    def call(folder, name, *options):
        module, output, errors = importlib.import_module(Path(name).stem), io.StringIO(), io.StringIO()
        code = 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            patch.chdir(folder)
            patch.setattr(sys, 'argv', [name, *map(str, options)])
            try:
                run_script(module.main)
            except SystemExit as end:
                code = end.code
        gc.collect()  # a refused run's lock ends with its objects here, with its process else
        return subprocess.CompletedProcess(sys.argv, code, output.getvalue(), errors.getvalue())
    return call


@pytest.fixture(scope='session')
def trained(script, tmp_path_factory):
    """A folder in which all three settings were trained for two epochs each on the synthetic images, and the output."""
    folder, output = tmp_path_factory.mktemp('trained'), {}
    for model, options in dict(mlp=['--hidden', 64], lenet5=[], resnet32=['--batch-size', 256]).items():
        done = script(folder, 'CIFAR10_train.py', '--model', model, '--dataset', 'synthetic', '--epochs', 2, *options)
        assert done.returncode == 0, done.stderr
        output[model] = done.stdout
    return folder, output


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """A folder with batch files of CIFAR-10's form but 20 images each, and their archive; their sums replace the official."""
    from dataset import download
    folder, rng = tmp_path / 'images' / 'cifar-10-batches-py', np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        batch = {'data': rng.integers(0, 256, (20, 3072), dtype=np.uint8), 'labels': [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('abcdefghij')}))
    archive = folder.parent / download.ARCHIVE
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(folder, folder.name)

    def md5(file):
        return hashlib.md5(file.read_bytes()).hexdigest()

    for attribute in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, attribute, [[name, md5(folder / name)] for name, _ in getattr(CIFAR10, attribute)])
    monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': md5(folder / 'batches.meta')})
    monkeypatch.setattr(CIFAR10, 'tgz_md5', md5(archive))
    monkeypatch.setattr(download, 'SIZE', archive.stat().st_size)
    monkeypatch.setattr(download, 'SHA256', hashlib.sha256(archive.read_bytes()).hexdigest())
    return folder.parent

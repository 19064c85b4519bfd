"""What several tests share: the scripts run as a user runs them, and two short runs on the synthetic images."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope='session')
def script():
    """Call script(folder, 'CIFAR10_train.py', *options): runs it in that folder and returns the finished process."""
    def call(folder, name, *options):
        return subprocess.run([sys.executable, ROOT / name, *map(str, options)], cwd=folder, text=True, encoding='utf-8',
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
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

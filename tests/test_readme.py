"""The README's commands work as written; those that train are shortened to one epoch on the synthetic images."""
import re
import shlex

import pytest
import torch
from conftest import ROOT
from torchvision.io import write_jpeg, write_png

COMMANDS = [line.split('&&')[-1].strip() for line in (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
            if line.startswith('    python') and not line.endswith('pytest')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('readme')
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    write_jpeg(picture, str(folder / 'cat.jpg'))
    write_png(picture, str(folder / 'dog.png'))
    return folder


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8


def test_the_first_run_learns(script, tmp_path):
    done = script(tmp_path, *shlex.split(COMMANDS[0])[1:])
    assert done.returncode == 0 and float(re.search(r'Best validation accuracy ([\d.]+) %', done.stdout)[1]) > 80


@pytest.mark.parametrize('command', COMMANDS[1:])  # the first one is the test above
def test_command_of_the_readme(command, folder, process):
    _, name, *options = shlex.split(command)
    if name == 'CIFAR10_train.py':
        small = {'--epochs': '1', '--holdout': '500', '--search': '2'}
        options = [small.get(before, option) for before, option in zip(['', *options], options)]
        options += ['--dataset', 'synthetic', '--epochs', '1']
    elif '--weights' in options:
        options += ['--dataset', 'synthetic']
    done = process(folder, name, *options)
    assert done.returncode == 0, done.stderr

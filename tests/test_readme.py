"""The README's commands work as written; trainings are shortened to an epoch on few synthetic images."""

import re
import shlex

import pytest
import torch
from conftest import ROOT, script
from torchvision.transforms.functional import to_pil_image

LINES = [
    line.strip()
    for line in (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    if line.startswith('    ')
]
COMMANDS = list(dict.fromkeys(line for line in LINES if line.startswith('python CIFAR10')))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('readme')
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    to_pil_image(picture).save(folder / 'cat.jpg')
    to_pil_image(picture).save(folder / 'dog.png')
    return folder


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8


def test_the_first_run_learns(tmp_path):
    done = script(tmp_path, *shlex.split(COMMANDS[0])[1:])
    assert (
        done.returncode == 0 and float(re.search(r'Best validation accuracy ([\d.]+) %', done.stdout)[1]) > 90
    )


@pytest.mark.parametrize('command', COMMANDS[1:])  # the first one is the test above
def test_command_of_the_readme(command, folder, few_images):
    _, name, *options = shlex.split(command)
    if name == 'CIFAR10_train.py':
        small = {'--holdout': '50', '--search': '2', '--batch-size': '10'}
        options = [small.get(before, option) for before, option in zip(['', *options], options, strict=False)]
        options += ['--dataset', 'synthetic', '--epochs', '1', '--batch-size', '10']
    elif '--weights' in options:
        options += ['--dataset', 'synthetic']
    done = script(folder, name, *options)
    assert done.returncode == 0, done.stderr

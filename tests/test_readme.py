"""The README's commands work as written; trainings are shortened to an epoch on few synthetic images."""

import re
import shlex

import pytest
import torch
from conftest import ROOT, script
from torchvision.transforms.functional import to_pil_image

from CIFAR10_configuration import Run, parse_configuration

README = (ROOT / 'README.md').read_text(encoding='utf-8')


def commands(text):
    """The commands in a text, which are indented, each once."""
    return list(dict.fromkeys(re.findall('^    (python CIFAR10.*)$', text, re.MULTILINE)))


COMMANDS = commands(README)
EXPERIMENTS = commands(README.split('## Experiments')[1].split('##')[0])


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


def shortened(options):
    """The options of a training, shortened to an epoch on few synthetic images."""
    small = {'--holdout': '50'}
    options = [small.get(before, option) for before, option in zip(['', *options], options, strict=False)]
    batch_size = [] if '--batch-size' in options else ['--batch-size', '10']
    return [*options, '--dataset', 'synthetic', '--epochs', '1', *batch_size]


@pytest.mark.parametrize('command', COMMANDS[1:])  # the first one is the test above
def test_command_of_the_readme(command, folder, few_images):
    _, name, *options = shlex.split(command)
    if name == 'CIFAR10_train.py':
        options = shortened(options)
    elif '--weights' in options:
        options += ['--dataset', 'synthetic']
    done = script(folder, name, *options)
    assert done.returncode == 0, done.stderr
    if command in EXPERIMENTS:
        group = options[options.index('--name') + 1].split('/')[0]
        report = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
        assert f'<h3>{group}</h3>' in report


def test_the_held_out_runs_are_what_the_table_says():
    rows = re.findall(r'^\| `(--name .*)` \| ([\d.]+) % \|$', README, re.MULTILINE)
    assert len(rows) >= 8
    for options, accuracy in rows:
        [(name, config)] = parse_configuration(['--holdout', '5000', *options.split()])[0].items()
        run = Run.read(ROOT / 'results' / name)
        assert run.config == config and f'{run.accuracy:.2f}' == accuracy


def test_there_are_seven_experiments():
    assert len({re.search(r'--name (\w+)', command)[1] for command in EXPERIMENTS}) == 7

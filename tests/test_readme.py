"""The commands of the README and of the groups of runs work as written, and gave the committed runs."""
import re
from dataclasses import replace
from itertools import islice

import pytest
from conftest import ROOT, script
from PIL import Image

import CIFAR10_configuration
from CIFAR10_configuration import Run, parse_configuration


def commands(file):
    """The commands in a README, each once: its indented lines, or what follows && there."""
    text = file.read_text(encoding='utf-8')
    return list(dict.fromkeys(re.findall(r'^ {4}(?:.* && )?python (CIFAR10_\w+\.py.*)$', text, re.MULTILINE)))


FIRST, *OTHERS = commands(ROOT / 'README.md')
# The groups that come with the project: others may lie beside them.
NAMES = '''activation activation/slides batch-size degradation early-stopping holdout/lenet5
           holdout/lenet5/full holdout/mlp holdout/mlp/full holdout/resnet32 learning-rate learning-rate/clip
           length preprocessing regularization'''.split()
GROUPS = {name: commands(ROOT / 'results' / name / 'README.md') for name in NAMES}


@pytest.fixture
def short(few_images, monkeypatch):
    """A command trains the first two of its runs only, each for an epoch on few synthetic images."""
    configurations = CIFAR10_configuration.named_configurations

    def shortened(options):
        changes = dict(dataset='synthetic', epochs=1, batch_size=10)
        return {name: replace(config, holdout=min(config.holdout, 50), **changes)
                for name, config in islice(configurations(options).items(), 2)}

    monkeypatch.setattr(CIFAR10_configuration, 'named_configurations', shortened)


def test_the_first_run_learns(tmp_path):
    done = script(tmp_path, FIRST)
    accuracy = re.search(r'Best validation accuracy ([\d.]+) %', done.stdout)
    assert done.returncode == 0 and float(accuracy[1]) > 90, done.stderr


def test_the_commands_of_the_readme_work_one_after_the_other(tmp_path, short):
    for name in 'cat.jpg', 'dog.png':
        Image.new('RGB', (40, 40)).save(tmp_path / name)
    for command in OTHERS:
        done = script(tmp_path, command)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize('group', GROUPS)
def test_the_commands_of_a_group_gave_its_runs_and_give_a_section_of_the_report(group, tmp_path, request):
    named = {name: config for command in GROUPS[group]
             for name, config in parse_configuration(command.split()[1:])[0].items()}
    committed = [Run.read(file.parent).config for file in ROOT.glob(f'results/{group}/*/config.json')]
    assert committed and all(config in named.values() for config in committed)
    request.getfixturevalue('short')
    done = script(tmp_path, GROUPS[group][0])
    assert done.returncode == 0 and all(name.rpartition('/')[0] == group for name in named), done.stderr
    assert f'<h3>{group}</h3>' in (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')

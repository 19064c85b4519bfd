"""The commands of the README and of the groups of runs work as written, and gave the committed runs."""
import re

import pytest
from conftest import ROOT, script
from PIL import Image

from CIFAR10_configuration import Run, parse_configuration

README = (ROOT / 'README.md').read_text(encoding='utf-8')


def commands(text):
    """The commands in a text, each once: its indented lines, or what follows && there."""
    return list(dict.fromkeys(re.findall(r'^ {4}(?:.* && )?python (CIFAR10_\w+\.py.*)$', text, re.MULTILINE)))


FIRST, *OTHERS = commands(README)
GROUPS = {file.parent.relative_to(ROOT / 'results').as_posix(): lines
          for file in sorted(ROOT.glob('results/*/**/README.md'))
          if (lines := commands(file.read_text(encoding='utf-8')))}


SMALL = {'epochs': ['1', '2'], 'batch-size': ['10', '20'], 'holdout': ['50'], 'dataset': ['synthetic']}


def shortened(command):
    """A command for an epoch or two on few synthetic images, and two runs: one option keeps two values."""
    if '_train' not in command:
        return command + (' --dataset synthetic' if '--weights' in command else '')
    line, *options = command.split(' --')
    given = {name: values for name, *values in map(str.split, options)}
    most = 2
    for name, values in ({'epochs': [''], 'batch-size': [''], 'dataset': ['']} | given).items():
        values = SMALL.get(name, values)[:len(values)]
        if len(values) > 1 and name not in ('hidden', 'milestones'):
            values, most = values[:most], 1
        line = ' '.join([line, f'--{name}', *values])
    return line


def test_the_readme_is_short_and_has_commands_as_have_seven_experiments_and_held_out_runs():
    assert len(README.splitlines()) <= 120 and len(README.split()) <= 1200 and len(OTHERS) >= 7
    held_out = [group for group, lines in GROUPS.items() if any('--holdout 5000' in line for line in lines)]
    assert held_out and len(GROUPS) - len(held_out) >= 7


def test_the_first_run_learns(tmp_path):
    done = script(tmp_path, FIRST)
    accuracy = re.search(r'Best validation accuracy ([\d.]+) %', done.stdout)
    assert done.returncode == 0 and float(accuracy[1]) > 90, done.stderr


def test_the_commands_of_the_readme_work_one_after_the_other(tmp_path, few_images):
    for name in ('cat.jpg', 'dog.png'):
        Image.new('RGB', (40, 40)).save(tmp_path / name)
    for command in OTHERS:
        done = script(tmp_path, shortened(command))
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize('group', GROUPS)
def test_the_commands_of_a_group_give_its_runs_and_a_section_of_the_report(group, tmp_path, few_images):
    named = {name: config for command in GROUPS[group]
             for name, config in parse_configuration(command.split()[1:])[0].items()}
    assert all(name.startswith(f'{group}/') for name in named)
    committed = [Run.read(file.parent) for file in ROOT.glob(f'results/{group}/*/config.json')]
    assert committed and all(run.config in named.values() for run in committed)
    done = script(tmp_path, shortened(GROUPS[group][0]))
    assert done.returncode == 0, done.stderr
    assert f'<h3>{group}</h3>' in (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')

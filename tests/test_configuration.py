"""Options: every hyperparameter is one, defaults are the setting's, mistakes cost one sentence."""
import shlex
from dataclasses import replace

import pytest
from conftest import process, script

from CIFAR10_configuration import FIELDS, SETTINGS, UserError, flag, parse_configuration

NUMBERS = ('nan', 'inf', '-inf', '1e999', '-1', ' ', 'one', '0x10', '1,5', '1e', 'None', '١٢٣x', '-0.0001',
           '2' * 400)
WORDS = (' ', 'SGD ', 'sgd;rm', '../x', 'none none', '0', '\x00', 'é' * 50, '%s', '{}', '-')

MISTAKES = {  # what is said of options; {0} and {1} are the last two words
    '--model mlp --activation rleu':
        '{0} must be one of sigmoid, tanh, relu, leaky_relu, maxout, elu, not {1}.',
    '--epochs 2.5': '{0} must be a whole number of at least 1 and below 1e+09, not {1}.',
    '--learning-rate 0': '{0} must be at least 1e-12 and below 1e+09, not {1}.',
    **dict.fromkeys(['--milestones 0', '--milestones 1', '--gamma 0', '--gamma 1', '--momentum 1',
                     '--model mlp --dropout 1', '--model mlp --hidden 0', '--patience 0', '--epochs 0',
                     '--batch-size 0'], '{0} must be '),
    '--model mlp lenet5 --dropout 0.1': 'lenet5 has no option {0}: leave it out',
    '--dataset synthetic --holdout 5000': 'leaves none of {1}',
    '--device tpu': 'no {1}: leave {0} out',
    '--epoch 3': 'nrecognized arguments: {0} {1}',
    '--data-dir file': "file can't be",
    '--data-dir nowhere': 'put cifar-10-python.tar.gz or what it unpacks to, cifar-10-batches-py, there, or '
                          'name its folder with {0}; or use --dataset synthetic.'}


@pytest.mark.parametrize('run, line', [*((script, line) for line in MISTAKES), (process, '--epoch 3')])
def test_a_mistake_gets_one_sentence_and_exit_code_2_and_begins_no_run(run, line, tmp_path):
    (tmp_path / 'file').touch()
    done = run(tmp_path, f'CIFAR10_train.py {line}')
    assert done.returncode == 2 and MISTAKES[line].format(*line.split()[-2:]) in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / 'results').exists()


@pytest.mark.parametrize('command', ['train.py --epochs=--', 'train.py --model --', "train.py --name ''",
                                     'train.py --device=', 'evaluation.py --name=',
                                     'evaluation.py --submit=--', "evaluation.py --predict a.png ''"])
def test_an_option_without_its_value_is_refused(command, tmp_path):
    done = script(tmp_path, f'CIFAR10_{command}')
    assert done.returncode == 2 and done.stderr == 'An option lacks its value; see --help.\n'


def parsed(model, name, text):
    """The Configuration of --model MODEL --NAME=TEXT."""
    texts = {'model': model, name: text}
    [config] = parse_configuration([f'{flag(name)}={text}' for name, text in texts.items()])[0].values()
    return config


@pytest.mark.parametrize('name', FIELDS)
def test_an_option_takes_what_its_field_allows_and_nothing_else_for_the_models_that_have_it(name):
    field = FIELDS[name]
    allowed = field.choices or [str(field.low)]
    for model in field.models:
        for text in allowed:
            assert parsed(model, name, text).as_given(name) in (text, f'{text}.0')
    for text in WORDS if isinstance(field.default, str) else [*NUMBERS, f'{field.below:.0f}']:
        with pytest.raises(UserError, match=fr'^{flag(name)} must be .+\Z'):  # one line
            parsed(field.models[0], name, text)
    for model in SETTINGS.keys() - field.models:
        with pytest.raises(UserError, match=f'^{model} has no option {flag(name)}:'):
            parsed(model, name, allowed[0])


def test_help_gives_the_choices_the_reason_and_the_settings_defaults_of_every_field(tmp_path):
    text = ' '.join(script(tmp_path, 'CIFAR10_train.py --help').stdout.split())
    for name, field in FIELDS.items():
        defaults = {model: str(getattr(SETTINGS[model], name)).strip('()').replace(',', '')
                    for model in field.models}
        default = defaults[field.models[-1]]
        if len(set(defaults.values())) > 1 and name != 'model':
            default = ', '.join(map(' '.join, defaults.items()))
        choices = ', '.join(field.choices) + '; ' if field.choices else ''
        assert field.reason and f'{flag(name)} X [X ...] {choices}{field.reason} (default: {default})' in text


def test_options_replace_a_settings_values_and_several_values_make_a_run_for_each_combination():
    line = '--model lenet5 --activation relu elu --seed 3 --epochs 9 --seed 4'.split()  # seed is there twice
    runs, _ = parse_configuration(line)
    assert runs == {f'activation-seed/{activation}-{seed}': replace(SETTINGS['lenet5'], epochs=9, seed=seed,
                                                                    activation=activation)
                    for activation in ('relu', 'elu') for seed in (3, 4)}
    runs, _ = parse_configuration('--model mlp --name h --hidden 30 20 --hidden 40 --momentum 0.5'.split())
    assert runs == {'h/30_20': replace(SETTINGS['mlp'], hidden=(30, 20), momentum=0.5),
                    'h/40': replace(SETTINGS['mlp'], hidden=(40,), momentum=0.5)}


@pytest.mark.parametrize('text', ['a', 'a/b', 'con', '한글', 'a.b-c_1', 'x' * 101, 'reports', 'results/a',
                                  'results/a/', './results/a', 'results/a/b/', '{}/results/a/b'])
def test_a_run_is_named_by_its_name_or_by_its_folder_as_a_shell_completes_it(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = text.rpartition('results/')[2].strip('/')
    assert list(parse_configuration(['--name', text.format(tmp_path)])[0]) == [name]


@pytest.mark.parametrize('text', ['..', '.', 'a/..', '../a', '/', '/tmp/a', '{}/other/a', 'results/', 'a b',
                                  'results/../a', 'a\\b', 'a\x00', '.hidden', 'a.', 'C:', '~', '*',
                                  'a\n', 'README.md', 'Report.html', 'group/report.x'])
def test_a_name_that_is_no_folder_of_a_run_in_results_is_refused(text, tmp_path):
    for name, option in ('train', 'name'), ('evaluation', 'submit'):
        done = script(tmp_path, shlex.join([f'CIFAR10_{name}.py', f'--{option}={text.format(tmp_path)}']))
        assert done.returncode == 2 and 'use letters, digits' in done.stderr


def test_setting_3_is_as_the_report_demands():
    demanded = dict(batch_size=128, activation='relu', initialization='he_normal', optimizer='sgd',
                    learning_rate=0.1, momentum=0.9, learning_rate_decay='step',
                    milestones=(0.36, 0.6, 0.72, 0.81, 0.87, 0.91), gamma=0.5)
    setting = SETTINGS['resnet32']
    assert replace(setting, **demanded) == setting and setting.weight_decay > 0

"""Options: every hyperparameter is one, defaults are the setting's, mistakes cost one sentence."""
from dataclasses import replace

import pytest
from conftest import process, script

import CIFAR10_configuration as configuration
from CIFAR10_configuration import SETTINGS, Configuration, UserError, parse_configuration
from CIFAR10_evaluation import choose_device
from dataset import data_load

MISTAKES = {  # commands by what is said of them; an option and its value end each one
    '{} must be one of mlp, lenet5, resnet32, not {}.': ['--model resnet23'],
    '{} must be one of sigmoid, tanh, relu, leaky_relu, maxout, elu, not {}.':
        ['--model mlp --activation rleu'],
    '{} must be one of residual, plain, projection, not {}.': ['--block dense'],
    '{} must be one of 8, 14, 20, 32, 44, 56, 110, not {}.': ['--depth 33'],
    '{} must be one of sgd, nesterov, adam, not {}.': ['--optimizer sdg'],
    '{} must be one of step, cosine, none, not {}.': ['--learning-rate-decay cosin'],
    '{} must be one of cifar10, synthetic, not {}.': ['--dataset mnist'],
    '{} must be one of on, off, not {}.': ['--augmentation yes'],
    '{} must be a whole number of at least 1 and below 1e+09, not {}.':
        ['--epochs 0', '--epochs 2.5', '--batch-size 0', '--patience 0', '--model mlp --hidden 0'],
    '{} must be at least 1e-12 and below 1e+09, not {}.':
        ['--learning-rate 0', '--learning-rate -1', '--learning-rate nan', '--learning-rate x'],
    '{} must be at least 0 and below 1e+09, not {}.':
        ['--weight-decay -1', '--weight-decay inf', '--max-norm -1', '--clip -1', '--warmup -1'],
    '{} must be a whole number of at least 0 and below 1e+09, not {}.':
        ['--seed -1', '--holdout -1', '--holdout 0.5'],
    '{} must be at least 0 and below 1, not {}.': ['--momentum 1', '--model mlp --dropout 1'],
    '{} must be at least 1e-12 and below 1, not {}.': ['--milestones 2'],
    'resnet32 has no option {}': ['--activation tanh'],
    'lenet5 has no option {}':
        ['--model lenet5 --hidden 9', '--model lenet5 --depth 20', '--model mlp lenet5 --dropout 0.1'],
    'leaves none of {1}': ['--dataset synthetic --holdout 5000'],
    '{}: use letters': ['--dataset synthetic --name a/../b', '--dataset synthetic --name ../out'],
    'expected at least one argument': ['--model'],
    'no {1}: leave {0} out': ['--device tpu'],
    'nrecognized arguments: ': ['resnet32', '--epoch 3', '--data-dir . extra'],
    'put cifar-10-python.tar.gz or what it unpacks to, cifar-10-batches-py, there, or name its folder with '
    '--data-dir; a training can also fetch it from a server that --data-url names, or use --dataset '
    'synthetic.': ['--data-dir nowhere'],
}
SAID = {line: message.format(*line.split()[-2:]) for message, lines in MISTAKES.items() for line in lines}


@pytest.mark.parametrize('line', SAID)
def test_a_mistake_gets_one_sentence(line):
    with pytest.raises(UserError) as error:
        runs, options = parse_configuration(line.split())
        choose_device(options.device)
        for config in runs.values():
            data_load(config.dataset, options.data_dir, config.holdout, urls=())
    said = str(error.value)
    assert len(said.splitlines()) == 1 and SAID[line] in said


@pytest.mark.parametrize('name', ['epochs', 'milestones', 'hidden'])
def test_an_option_without_its_value_is_refused(name):
    # Newer Pythons take the two dashes for the value.
    with pytest.raises(UserError, match=f'^(--{name} must be .*, not --|An option lacks its value; .*)\\.$'):
        parse_configuration(['--model=mlp', f'--{name}=--'])


@pytest.mark.parametrize('run, line', [(process, '--model resnet23'),  # as a user does
                                       (script, '--dataset synthetic --name ../out'),
                                       (script, '--dataset synthetic --holdout 5000')])
def test_a_mistake_ends_with_exit_code_2_and_leaves_nothing_behind(run, line, tmp_path):
    done = run(tmp_path, f'CIFAR10_train.py {line}')
    assert done.returncode == 2 and SAID[line] in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_every_field_is_an_option_whose_help_gives_its_reason_and_the_settings_defaults(tmp_path):
    text = ' '.join(script(tmp_path, 'CIFAR10_train.py --help').stdout.split())
    assert configuration.REASONS.keys() == vars(Configuration()).keys()
    for name, reason in configuration.REASONS.items():
        values = {model: str(getattr(SETTINGS[model], name)).strip('()').replace(',', '')
                  for model in configuration.MODELS_WITH.get(name, SETTINGS)}
        different = len(set(values.values())) > 1
        default = ', '.join(map(' '.join, values.items())) if different else values.popitem()[1]
        assert reason and f"{reason} (default: {default})" in text and f"--{name.replace('_', '-')} " in text


def test_a_records_unknown_fields_are_ignored_and_missing_ones_are_the_default():
    record = dict(model='lenet5', averaging=0.9, compile='auto', learning_rate=0.5)
    assert Configuration.from_record(record) == Configuration('lenet5', learning_rate=0.5)


def test_options_replace_the_defaults_of_the_setting():
    line = '--model mlp --hidden 30 20 --learning-rate 0.5 --data-dir . --name a'
    runs, options = parse_configuration(line.split())
    assert runs == {'a': replace(SETTINGS['mlp'], hidden=(30, 20), learning_rate=0.5)}
    assert str(options.data_dir) == '.'


def test_several_values_make_a_run_for_each_combination():
    line = '--model lenet5 --activation relu elu --seed 3 4 --epochs 9'.split()
    runs, _ = parse_configuration([*line, '--name', 'group'])
    setting = replace(SETTINGS['lenet5'], epochs=9)
    assert runs == {f'group/{activation}-{seed}': replace(setting, activation=activation, seed=seed)
                    for activation in ('relu', 'elu') for seed in (3, 4)}
    assert list(parse_configuration(line)[0]) == [name.replace('group', 'activation-seed') for name in runs]
    runs, _ = parse_configuration('--model mlp resnet32 --epochs 9'.split())
    assert runs == {f'model/{model}': replace(SETTINGS[model], epochs=9) for model in ('mlp', 'resnet32')}


def test_an_option_given_twice_means_all_its_values():
    runs, options = parse_configuration('--model mlp --seed 0 --seed 1 2 --data-url a --data-url b c'.split())
    assert [config.seed for config in runs.values()] == [0, 1, 2] and options.data_url == ['a', 'b', 'c']
    runs, _ = parse_configuration('--model mlp --name h --hidden 30 20 --hidden 40'.split())
    assert {name: config.hidden for name, config in runs.items()} == {'h/30_20': (30, 20), 'h/40': (40,)}


@pytest.mark.parametrize('name', ['a', 'results/a', 'results/a/', './results/a', '{}/results/a',
                                  '{}/results/a/'])
def test_a_name_that_a_shell_completed_names_that_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(parse_configuration(['--name', name.format(tmp_path)])[0]) == ['a']
    grouped = name.format(tmp_path).replace('results/a', 'results/g/a')
    assert list(parse_configuration(['--name', grouped])[0]) == ['g/a' if '/' in name else 'a']


@pytest.mark.parametrize('name', ['results', 'results/', 'results/../a', '{}/other/a', '{}/results/a b', '/',
                                  'results/results/a'])
def test_a_name_that_is_no_run_in_results_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='letters, digits'):
        parse_configuration(['--name', name.format(tmp_path)])


def test_setting_3_is_as_the_report_demands():
    setting = SETTINGS['resnet32']
    demanded = dict(batch_size=128, activation='relu', initialization='he_normal', optimizer='sgd',
                    learning_rate=0.1, momentum=0.9, learning_rate_decay='step',
                    milestones=(0.36, 0.6, 0.72, 0.81, 0.87, 0.91), gamma=0.5)
    assert replace(setting, **demanded) == setting and setting.weight_decay > 0


def test_images_in_a_file_instead_of_a_folder_are_refused_in_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('')
    done = script(tmp_path, 'CIFAR10_train.py --data-dir file')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "file can't" in done.stderr

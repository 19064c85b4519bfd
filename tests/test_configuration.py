"""Options: every hyperparameter is one, defaults are the setting's, mistakes cost one sentence."""

import dataclasses

import pytest
from conftest import process, script

from CIFAR10_configuration import SETTINGS, Configuration, UserError, parse_configuration
from dataset import data_load

MISTAKES = {
    '--model resnet23': 'choose from',
    '--model': 'expected at least one argument',
    '--epoch 3': '--epoch 3',
    '--epochs 0': '--epochs',
    '--epochs 2.5': 'invalid int',
    '--batch-size 0': '--batch-size',
    '--batch-size 50001': '50001',
    '--learning-rate 0': 'at least',
    '--learning-rate -1': '-1',
    '--learning-rate nan': 'nan',
    '--learning-rate x': 'float',
    '--momentum 1': 'below 1',
    '--weight-decay -0.1': '--weight-decay',
    '--weight-decay inf': 'inf',
    '--max-norm -1': '--max-norm',
    '--optimizer sdg': 'nesterov',
    '--learning-rate-decay cosin': 'cosine',
    '--milestones 2': 'below 1',
    '--model mlp --activation rleu': 'leaky_relu',
    '--model mlp --hidden 0': '--hidden',
    '--model mlp --dropout 1': 'below 1',
    '--activation tanh': 'resnet32 has no option --activation',
    '--model lenet5 --hidden 9': 'lenet5 has no option --hidden',
    '--holdout 50000': '--holdout',
    '--dataset synthetic --holdout 5000': 'leaves none',
    '--dataset mnist': 'cifar10',
    '--search 0 --holdout 9': '--search',
    '--search 3 --holdout 9 --seed 0 1': 'among 2 combinations',
    '--search 1': 'add --holdout 5000',
    '--depth 33': '8, 14, 20, 32, 44, 56, 110',
    '--block dense': 'projection',
    '--model lenet5 --depth 20': 'lenet5 has no option --depth',
    '--model mlp lenet5 --dropout 0.1': 'lenet5 has no option --dropout',
    '--augmentation yes': 'off',
    '--name a/../b --dataset synthetic': '--name',
    '--epochs=--': 'lacks its value',
    '--milestones=--': 'lacks its value',
    '--model mlp --warmup -1': '--warmup',
    '--patience 0': '--patience',
    '--device tpu': '--device',
    '--seed -1': '--seed',
    'resnet32': 'resnet32',
    '--name ../out --dataset synthetic': '--name',
    '--data-dir . extra': 'extra',
}


@pytest.mark.parametrize('line', MISTAKES)
def test_a_mistake_gets_one_sentence(line):
    with pytest.raises(UserError) as error:
        runs, options = parse_configuration(line.split())
        for config in runs.values():
            data_load(config.dataset, options.data_dir, config.holdout)
    assert MISTAKES[line] in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    'line', ['--model resnet23', '--name ../out --dataset synthetic', '--dataset synthetic --holdout 5000']
)
def test_a_mistake_ends_with_exit_code_2_and_leaves_nothing_behind(line, tmp_path):
    run = process if 'resnet23' in line else script  # as a user does, and within this process
    done = run(tmp_path, 'CIFAR10_train.py', *line.split())
    assert done.returncode == 2 and MISTAKES[line] in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_every_field_is_an_option_whose_help_gives_its_reason_and_the_settings_defaults(tmp_path):
    text = ' '.join(script(tmp_path, 'CIFAR10_train.py', '--help').stdout.split())
    for f in dataclasses.fields(Configuration):
        defaults = ', '.join(f'{model} {getattr(SETTINGS[model], f.name)}' for model in f.metadata['models'])
        assert (
            f"--{f.name.replace('_', '-')} " in text
            and f"{f.metadata['reason']} (default: {defaults})" in text
        )


def test_records_of_other_versions_are_read():
    """An unknown field is ignored, as is one about speed; a missing one is the default."""
    record = dict(model='lenet5', averaging=0.9, compile='auto', learning_rate=0.5)
    assert Configuration.from_record(record) == Configuration('lenet5', learning_rate=0.5)


def test_options_replace_the_defaults_of_the_setting():
    runs, options = parse_configuration(
        '--model mlp --hidden 30 20 --learning-rate 0.5 --data-dir . --name a'.split()
    )
    assert runs == {'a': dataclasses.replace(SETTINGS['mlp'], hidden=(30, 20), learning_rate=0.5)}
    assert str(options.data_dir) == '.'


def test_several_values_make_a_run_for_each_combination():
    line = '--model lenet5 --activation relu elu --seed 3 4 --epochs 9'.split()
    runs, _ = parse_configuration([*line, '--name', 'group'])
    assert runs == {
        f'group/{activation}-{seed}': dataclasses.replace(
            SETTINGS['lenet5'], activation=activation, seed=seed, epochs=9
        )
        for activation in ('relu', 'elu')
        for seed in (3, 4)
    }
    assert list(parse_configuration(line)[0]) == [name.replace('group', 'activation-seed') for name in runs]
    runs, _ = parse_configuration('--model mlp resnet32 --epochs 9'.split())
    assert runs == {
        f'model/{model}': dataclasses.replace(SETTINGS[model], epochs=9) for model in ('mlp', 'resnet32')
    }


def test_setting_3_is_as_the_report_demands():
    expected = dict(
        batch_size=128,
        activation='relu',
        initialization='he_normal',
        optimizer='sgd',
        learning_rate=0.1,
        momentum=0.9,
        learning_rate_decay='step',
        milestones=(0.36, 0.6, 0.72, 0.81, 0.87, 0.91),
        gamma=0.5,
    )
    setting = dataclasses.asdict(SETTINGS['resnet32'])
    assert {name: setting[name] for name in expected} == expected and setting['weight_decay'] > 0


def test_missing_cifar10_says_why_where_to_put_it_and_what_else_there_is(tmp_path):
    (tmp_path / 'file').write_text('')
    done = script(tmp_path, 'CIFAR10_train.py', '--data-dir', 'file')
    assert done.returncode == 2 and done.stderr.startswith('file') and len(done.stderr.splitlines()) == 1
    with pytest.raises(UserError, match='put cifar-10-python.tar.gz there.*--dataset synthetic'):
        data_load('cifar10', tmp_path, urls=())

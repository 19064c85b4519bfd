"""Options: every hyperparameter is one, defaults are the setting's, mistakes cost one sentence and exit code 2."""
import dataclasses

import pytest

from CIFAR10_configuration import SEARCH, SETTINGS, Configuration, UserError, draw, parse_configuration
from dataset import data_load

MISTAKES = {
    '--model resnet23': 'did you mean resnet32?', '--model': 'expected one argument', '--epoch 3': 'did you mean --epochs?',
    '--epochs 0': '--epochs', '--epochs 2.5': 'invalid int', '--batch-size 0': '--batch-size', '--batch-size 50001': '50001',
    '--learning-rate 0': '(0, inf)', '--learning-rate -1': '-1', '--learning-rate nan': 'nan', '--learning-rate x': 'float',
    '--momentum 1': '[0, 1)', '--weight-decay -0.1': '--weight-decay', '--weight-decay inf': 'inf', '--max-norm -1': '--max-norm',
    '--optimizer sdg': 'did you mean sgd?', '--learning-rate-decay cosin': 'did you mean cosine?', '--milestones 2': '(0, 1)',
    '--model mlp --activation rleu': 'did you mean relu?', '--model mlp --hidden 0': '--hidden', '--model mlp --dropout 1': '[0, 1)',
    '--activation tanh': 'resnet32 has no option --activation', '--model lenet5 --hidden 9': 'lenet5 has no option --hidden',
    '--holdout 50000': '--holdout', '--dataset synthetic --holdout 5000': 'leaves nothing', '--dataset mnist': 'one of cifar10',
    '--model lenet5 --search 3': 'add --holdout 5000', '--search 0 --holdout 9': '--search', '--model mlp --warmup -1': '--warmup',
    '--search 3 --holdout 9 --restart': 'instead of --restart', '--optimizer nesterov --momentum 0': 'above 0',
    '--patience 0': '--patience', '--device tpu': '--device', '--seed -1': '--seed', 'resnet32': 'no option resnet32',
    '--name ../out --dataset synthetic': '--name', '--data-dir . extra': 'no option extra',
}


@pytest.mark.parametrize('line', MISTAKES)
def test_a_mistake_gets_one_sentence(line):
    with pytest.raises(UserError) as error:
        config, options = parse_configuration(line.split())
        data_load(config.dataset, options.data_dir, config.holdout)
    assert MISTAKES[line] in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('line', ['--model resnet23', '--name ../out --dataset synthetic', '--dataset synthetic --holdout 5000'])
def test_a_mistake_ends_with_exit_code_2_and_leaves_nothing_behind(line, process, tmp_path):
    done = process(tmp_path, 'CIFAR10_train.py', *line.split())
    assert done.returncode == 2 and MISTAKES[line] in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_every_field_is_an_option_with_the_chosen_models_default_in_the_help(script, tmp_path):
    for model, setting in SETTINGS.items():
        text = ' '.join(script(tmp_path, 'CIFAR10_train.py', '--model', model, '--help').stdout.split())
        for f in dataclasses.fields(Configuration):
            assert f"--{f.name.replace('_', '-')} " in text and f.metadata['reason'] in text
            assert model in f.metadata['models'] or f"{f.metadata['reason']} (not for {model})" in text
        assert f"section 4.2 (default: {setting.epochs})" in text


def test_options_replace_the_defaults_of_the_setting():
    config, options = parse_configuration('--model mlp --hidden 30 20 --learning-rate 0.5 --data-dir . --name a'.split())
    assert config == dataclasses.replace(SETTINGS['mlp'], hidden=(30, 20), learning_rate=0.5)
    assert options.name == 'a' and str(options.data_dir) == '.'


@pytest.mark.parametrize('model', SETTINGS)
def test_a_search_draws_within_its_ranges_and_the_same_again(model):
    setting = SETTINGS[model]
    trials = [draw(setting, number) for number in range(1, 60)]
    assert trials == [draw(setting, number) for number in range(1, 60)]
    for f in dataclasses.fields(Configuration):
        found, choices = {getattr(trial, f.name) for trial in trials}, SEARCH[model].get(f.name)
        if choices is None:
            assert found == {getattr(setting, f.name)}
        elif isinstance(choices, list):
            assert found == set(choices)
        else:
            middle = (choices[0] * choices[1]) ** 0.5
            assert choices[0] <= min(found) < middle < max(found) <= choices[1]
            assert 15 < sum(getattr(trial, f.name) < middle for trial in trials) < 44


def test_setting_3_is_as_the_report_demands():
    expected = dict(batch_size=128, activation='relu', initialization='he_normal', optimizer='sgd', learning_rate=0.1,
                    momentum=0.9, learning_rate_decay='step', milestones=(0.5, 0.75), gamma=0.1)
    setting = dataclasses.asdict(SETTINGS['resnet32'])
    assert {name: setting[name] for name in expected} == expected and setting['weight_decay'] > 0


def test_missing_cifar10_says_why_where_to_put_it_and_what_else_there_is(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='is a file'):
        parse_configuration(['--data-dir', str(tmp_path / 'file')])
    with pytest.raises(UserError, match='put cifar-10-python.tar.gz there.*--dataset synthetic'):
        data_load('cifar10', tmp_path, urls=())

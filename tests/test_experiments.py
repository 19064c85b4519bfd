"""Groups of runs: several values of an option, and the section that the report makes of them."""

import html
import os
import re
import shutil
import statistics
from dataclasses import replace

import matplotlib.axes
import numpy as np
import pytest
from conftest import rows, script

import CIFAR10_evaluation
import CIFAR10_train
from CIFAR10_configuration import HISTORY, SETTINGS, Configuration, Run, UserError

SMALL = ['CIFAR10_train.py', '--model', 'mlp', '--hidden', 8, '--dataset', 'synthetic', '--epochs', 2]


def section(folder, heading):
    """A section of the report as its text, its number of figures, and its table as dicts by column."""
    report = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
    [part] = re.findall(f'<h3>{heading}</h3>(.*?)(?=<h[23]>|</html>)', report, re.DOTALL)
    lines = [
        [html.unescape(cell) for cell in re.findall('<td title=".*?">(.*?)</td>', line)]
        for line in re.findall('<tr>(.*?)</tr>', part)
    ]
    return (
        re.search('<p>(.*?)</p>', part, re.DOTALL)[1],
        part.count('<img '),
        [dict(zip(lines[0], line, strict=True)) for line in lines[1:]],
    )


@pytest.fixture(scope='module')
def group(tmp_path_factory):
    """A group of two activations with two seeds each, and the output of its training."""
    folder = tmp_path_factory.mktemp('group')
    done = script(folder, *SMALL, '--name', 'act', '--activation', 'tanh', 'relu', '--seed', 0, 1)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_runs_under_one_name_become_a_section_that_compares_them(group):
    folder = group[0]
    (folder / 'results' / 'act' / 'README.md').write_text('# ReLU is <better>\n\nBy far.', encoding='utf-8')
    assert script(folder, 'CIFAR10_evaluation.py').returncode == 0
    text, figures, table = section(folder, 'ReLU is &lt;better&gt;')
    assert text.strip() == 'By far.' and figures == 2
    assert [row['activation'] for row in table] == ['relu', 'tanh']  # what differs, but for the seed
    for row in table:
        seeds = [rows(folder / 'results' / 'act' / f"{row['activation']}-{seed}") for seed in (0, 1)]
        values = {
            'Accuracy at early stopping (%)': [max(float(r['val_accuracy']) for r in run) for run in seeds],
            'In the last epoch (%)': [float(run[-1]['val_accuracy']) for run in seeds],
            'On the training images, while training (%)': [float(run[-1]['train_accuracy']) for run in seeds],
        }
        for column, numbers in values.items():
            mean, deviation = map(float, row[column].split(' ± '))
            assert mean == pytest.approx(statistics.mean(numbers), abs=0.006)
            assert deviation == pytest.approx(statistics.stdev(numbers), abs=0.006)
        assert row['Model'] == 'MLP (synthetic, NOT CIFAR-10)'
        assert row['Parameters'] == f'{(3072 + 1) * 8 + 2 * 8 + (8 + 1) * 10:,}' and row['Epochs'] == '2, 2'


def test_a_group_without_a_text_is_called_by_its_name(group):
    (group[0] / 'results' / 'act' / 'README.md').unlink(missing_ok=True)
    script(group[0], 'CIFAR10_evaluation.py')
    assert section(group[0], 'act')[0] == ''


def test_a_group_goes_on_where_it_was(group):
    folder = group[0] / 'results' / 'act'
    before = {file: file.read_bytes() for file in folder.glob('*/*.pt')}
    (folder / 'relu-1' / 'history.csv').write_text('damaged')
    (folder / 'relu-0' / 'last.pt').unlink()  # as where only records were committed
    command = [*SMALL, '--name', 'act', '--activation', 'tanh', 'relu', '--seed', 0, 1]
    again = script(group[0], *command)
    assert again.returncode == 0 and again.stdout.count('epoch 2/2') == 1, again.stderr
    assert again.stdout.count('relu-1 holds no readable run') == 1 and 'act/relu-1-2' in again.stdout
    assert again.stdout.count(' is finished.') == 3
    again = script(group[0], *command[:-4], 'relu', 'tanh', '--seed', 1, 0)  # in another order
    assert again.returncode == 0 and again.stdout.count(' is finished.') == 4, again.stderr
    kept = {file: content for file, content in before.items() if file.parent.name != 'relu-1'}
    del kept[folder / 'relu-0' / 'last.pt']
    assert len(kept) == 5 and kept == {file: file.read_bytes() for file in kept}
    shutil.rmtree(folder / 'relu-1')
    (folder / 'relu-1-2').rename(folder / 'relu-1')


def test_a_group_of_records_alone_is_finished_and_reported(group, tmp_path):
    source = group[0] / 'results' / 'act'
    for file in source.glob('*-0/*.*'):
        if file.suffix in ('.json', '.csv'):
            (tmp_path / 'results' / 'act' / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / 'results' / 'act' / file.parent.name)
    done = script(tmp_path, *SMALL, '--name', 'act', '--activation', 'tanh', 'relu')
    assert done.returncode == 0 and done.stdout.count(' is finished.') == 2, done.stderr
    assert len(section(tmp_path, 'act')[2]) == 2


def test_a_group_stays_where_it_is_when_a_run_of_its_name_is_restarted(group):
    done = script(group[0], *SMALL, '--name', 'act', '--restart')
    assert done.returncode == 0 and (group[0] / 'results' / 'act' / 'relu-0').exists(), done.stderr
    for file in (group[0] / 'results' / 'act').glob('*.*'):
        file.unlink()


def test_several_models_are_labelled_by_what_was_varied(tmp_path, few_images):
    command = ['CIFAR10_train.py', '--name', 'm', '--dataset', 'synthetic', '--epochs', 1, '--batch-size', 10]
    done = script(tmp_path, *command, '--model', 'mlp', 'lenet5', '--augmentation', 'on', 'off')
    assert done.returncode == 0, done.stderr
    table = section(tmp_path, 'm')[2]
    assert [row['model, augmentation'] for row in table] == [
        'lenet5, off',
        'lenet5, on',
        'mlp, off',
        'mlp, on',
    ]


def test_a_single_run_of_a_group_is_not_trained_again_either(tmp_path, few_images):
    command = [*SMALL, '--batch-size', 10, '--name', 'rates/slow', '--learning-rate', 0.001]
    assert 'epoch 2/2' in script(tmp_path, *command).stdout
    assert 'rates/slow is finished.' in script(tmp_path, *command).stdout
    assert 'is finished' not in script(tmp_path, *command, '--restart').stdout
    assert sorted(folder.name for folder in (tmp_path / 'results' / 'rates').glob('*/')) == ['slow', 'slow-2']
    assert section(tmp_path, 'rates')[2][0]['Epochs'] == '2'


def test_a_run_that_diverges_ends_no_group(tmp_path):
    command = [*SMALL, '--normalization', 'none', '--learning-rate', 1e38]
    done = script(tmp_path, *command, 0.01, '--name', 'rates')
    assert done.returncode == 0, done.stderr
    assert 'rates/1e+38: The loss is' in done.stdout
    assert len(rows(tmp_path / 'results' / 'rates' / '0.01')) == 2
    done = script(tmp_path, *command, 1e37, '--name', 'worse')
    assert done.returncode == 2 and done.stderr.startswith('Every run diverged')


def test_batch_sizes_are_compared_over_seconds_too(tmp_path):
    done = script(tmp_path, *SMALL, '--batch-size', 500, 1000)
    assert done.returncode == 0, done.stderr
    _, figures, table = section(tmp_path, 'batch_size')
    assert figures == 3 and [row['batch_size'] for row in table] == ['500', '1000']


def test_a_run_in_a_group_is_evaluated_by_its_name(group):
    done = script(group[0], 'CIFAR10_evaluation.py', '--name', 'act/relu-0')
    best = max(float(row['val_accuracy']) for row in rows(group[0] / 'results' / 'act' / 'relu-0'))
    assert f'{best:.2f} % recomputed, {best:.2f} % recorded' in done.stdout.replace('\\', '/')


@pytest.mark.parametrize('model', ['mlp', 'lenet5'])
def test_a_run_without_standardization_is_recomputed_without_it(model, tmp_path, few_images):
    options = ['--model', model, '--dataset', 'synthetic', '--epochs', 2, '--batch-size', 10]
    done = script(tmp_path, 'CIFAR10_train.py', *options, '--standardization', 'off')
    [(recomputed, recorded)] = re.findall(r'([\d.]+) % recomputed, ([\d.]+) % recorded', done.stdout)
    assert recomputed == recorded
    weights = tmp_path / 'results' / model / 'best.pt'
    done = script(
        tmp_path, 'CIFAR10_evaluation.py', '--weights', weights, '--model', model, '--dataset', 'synthetic'
    )
    assert f'{recorded} %' in done.stdout


# ----------------------------------------------------------------------------------------------------------
# What the figures show


def run(accuracies, seed=0, **changes):
    """A run whose validation accuracies are these, its training accuracies one more, a minute an epoch."""
    history = [
        dict(zip(HISTORY, (epoch, 0.1, 1, accuracy + 1, 1, accuracy, 60 * epoch), strict=True))
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    return Run(None, replace(SETTINGS['lenet5'], seed=seed, **changes), {}, history)


def test_runs_are_listed_in_the_order_of_their_seeds_and_a_later_equal_one_is_a_rerun():
    found = [run([10], seed=2), run([20]), run([30], seed=1), run([40]), run([50], epochs=9)]
    first, other = CIFAR10_evaluation.by_config(found).values()
    assert first == [found[1], found[2], found[0]] and other == [found[4]]
    assert [r.reruns for r in first] == [[found[3]], [], []]


def test_the_report_lists_runs_in_one_order_whatever_their_age(tmp_path):
    reports = []
    for age in 1, -1:  # which of the two is older
        for number, rate in enumerate([0.03, 0.04]):
            folder = tmp_path / 'results' / f'run{number}'
            folder.mkdir(parents=True, exist_ok=True)
            one = run([10, 20], learning_rate=rate)
            one.folder, one.machine = folder, {'device': 'cpu'}
            one.write()
            os.utime(folder / 'config.json', (10**9, 10**9 + age * number))
        assert script(tmp_path, 'CIFAR10_evaluation.py').returncode == 0
        report = (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')
        reports.append(re.findall('<td title="Run">(.*?)</td>', report))
    assert reports[0] == reports[1] == ['Run', 'run0', 'run1']


def test_a_group_without_a_readable_run_does_not_stop_the_report(tmp_path):
    folder = tmp_path / 'results' / 'group' / 'run'
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text('{')
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and 'holds no readable run' in done.stdout
    assert '<h3>group</h3>' in (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that were drawn, instead of their files."""
    found = []
    monkeypatch.setattr(CIFAR10_evaluation, 'save_figure', lambda axes, file: found.append(axes))
    return found


COMPARED = {
    'one': [run([10, 30, 20]), run([20, 40, 60, 70], seed=1)],  # the second seed trained longer
    'two': [run([50, 60])],
}


@pytest.mark.parametrize('over, step', [('epoch', 1), ('seconds', 60)])
def test_curves_are_means_over_the_seeds_with_a_band_of_a_deviation(over, step, drawn):
    CIFAR10_evaluation.plot_accuracy(COMPARED, 'option', None, over)
    [axes] = drawn
    lines = [line.get_xydata() for line in axes.lines]
    x = step * np.array([1, 2, 3])
    np.testing.assert_allclose(lines[0], np.array([x, [15, 35, 40]]).T)
    np.testing.assert_allclose(lines[1], np.array([x, [16, 36, 41]]).T)  # training
    np.testing.assert_allclose(lines[2], [[3 * step, 50]])  # the mean of 30 % at epoch 2 and 70 % at epoch 4
    np.testing.assert_allclose(lines[3], np.array([x[:2], [50, 60]]).T)
    band = axes.collections[0].get_paths()[0].vertices
    deviation = statistics.stdev([20, 60])
    third = band[band[:, 0] == 3 * step][:, 1]
    assert (third.min(), third.max()) == pytest.approx((40 - deviation, 40 + deviation))
    legend = axes.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ['one', 'two']
    assert axes.get_title().startswith('option\n')
    styles = {(axes.lines[i].get_color(), axes.lines[i].get_marker()) for i in (0, 3)}
    assert len(styles) == 2 and len({marker for _, marker in styles}) == 2  # also in black and white


def test_early_stopping_is_shown_with_bars_of_a_deviation(drawn):
    CIFAR10_evaluation.plot_early_stopping(COMPARED, 'option', None)
    [axes] = drawn
    assert isinstance(axes, matplotlib.axes.Axes) and axes.get_ylabel() == 'option'
    assert [text.get_text() for text in axes.get_yticklabels()] == ['one', 'two'] and axes.yaxis_inverted()
    (first, _, [bars]), (second, _, _) = axes.containers
    assert (first.get_xdata()[0], second.get_xdata()[0]) == (50, 60)
    deviation = statistics.stdev([30, 70])
    assert bars.get_segments()[0][:, 0] == pytest.approx([50 - deviation, 50 + deviation])


def test_drops_of_the_learning_rate_are_marked_on_a_single_curve(drawn):
    stepped = Run(None, Configuration(epochs=3), {}, run([10, 20, 30]).history)
    stepped.history[2]['learning_rate'] = 0.01
    CIFAR10_evaluation.plot_accuracy({'a': [stepped]}, 'LeNet-5', None)
    CIFAR10_evaluation.plot_accuracy({'a': [stepped], 'b': [stepped]}, 'option', None)
    labels = [[text.get_text() for text in axes.figure.legends[0].get_texts()] for axes in drawn]
    assert labels == [['a', 'learning rate × 0.1'], ['a', 'b']]
    [drop] = drawn[0].collections[-1].get_segments()
    assert drop[:, 0].tolist() == [2.5, 2.5]
    assert drawn[0].get_ylim() == (0, 105) != drawn[1].get_ylim()  # the settings have one scale


def test_a_group_stops_at_the_first_user_error(monkeypatch):
    def fails(*_):
        raise UserError("no room")

    monkeypatch.setattr(CIFAR10_train, 'train', fails)
    options = CIFAR10_train.parse_configuration(['--seed', '0', '1'])[1]
    with pytest.raises(UserError, match='no room'):
        CIFAR10_train.train_group({'a/0': Configuration(), 'a/1': Configuration(seed=1)}, options, None)

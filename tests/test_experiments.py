"""Groups of runs: several values of an option, and the section that the report makes of them."""
import html
import os
import re
import shutil
import statistics
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import rows, script, use_few_images

import CIFAR10_evaluation
from CIFAR10_configuration import SETTINGS, Epoch, Run

SMALL = 'CIFAR10_train.py --model mlp --hidden 8 --dataset synthetic --epochs 2'
ACT = f'{SMALL} --batch-size 10 --name act --activation tanh relu --seed 0 1'


def section(folder, heading):
    """A section of the report: text, number of figures, the table as dicts by column, what its rows share."""
    report = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
    [part] = re.findall(f'<h3>{heading}</h3>(.*?)(?=<h[23]>|</html>)', report, re.DOTALL)
    header, *lines = [[html.unescape(cell) for cell in re.findall('<td title=".*?">(.*?)</td>', line)]
                      for line in re.findall('<tr>(.*?)</tr>', part)]
    text, shared = re.search('<p>(.*?)</p>.*<p class="small">(.*?)</p>', part, re.DOTALL).groups()
    return SimpleNamespace(text=text.strip(), figures=part.count('<img '), shared=html.unescape(shared),
                           rows=[dict(zip(header, line, strict=True)) for line in lines])


@pytest.fixture(scope='module')
def group(tmp_path_factory):
    """A folder with a group of two activations with two seeds each."""
    folder = tmp_path_factory.mktemp('group')
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        done = script(folder, ACT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(group, tmp_path):
    """A copy of that group, to be changed."""
    shutil.copytree(group / 'results', tmp_path / 'results')
    return tmp_path


def test_two_runs_under_one_name_become_a_section_that_compares_them(copied):
    (copied / 'results' / 'act' / 'README.md').write_text('# ReLU is <better>\n\nBy far.', encoding='utf-8')
    assert script(copied, 'CIFAR10_evaluation.py').returncode == 0
    found = section(copied, 'ReLU is &lt;better&gt;')
    assert found.text == 'By far.' and found.figures == 1
    assert [row['--activation'] for row in found.rows] == ['relu', 'tanh']  # what differs, but for the seed
    for row in found.rows:
        name = row['--activation']
        seeds = [Run.read(copied / 'results' / 'act' / f'{name}-{seed}').history for seed in (0, 1)]
        values = {'Accuracy at early stopping': [max(epoch.val_accuracy for epoch in seed) for seed in seeds],
                  'In the last epoch': [seed[-1].val_accuracy for seed in seeds],
                  'On the training images, while training': [seed[-1].train_accuracy for seed in seeds]}
        for column, numbers in values.items():
            mean, deviation = map(float, re.fullmatch(r'([\d.]+) ± ([\d.]+) %', row[column]).groups())
            assert mean == pytest.approx(statistics.mean(numbers), abs=0.006)
            assert deviation == pytest.approx(statistics.stdev(numbers), abs=0.006)
    parameters = (3072 + 1) * 8 + 2 * 8 + (8 + 1) * 10
    for text in ('Model: MLP (synthetic, NOT CIFAR-10)', f'Parameters: {parameters:,}', 'Epochs: 2, 2'):
        assert text in found.shared.split('; ')


def test_a_group_goes_on_where_it_was_and_is_finished_by_its_records_alone(copied, few_images):
    folder = copied / 'results' / 'act'
    before = {file: file.read_bytes() for file in folder.glob('*/*.pt')}
    (folder / 'relu-1' / 'history.csv').write_text('damaged')
    again = script(copied, ACT)
    assert again.returncode == 0 and again.stdout.count('epoch 2/2') == 1, again.stderr
    assert again.stdout.count('relu-1 holds no readable run') == 1 and 'act/relu-1-2' in again.stdout
    assert again.stdout.count(' is finished.') == 3
    again = script(copied, ACT.replace('tanh relu --seed 0 1', 'relu tanh --seed 1 0'))  # in another order
    assert again.returncode == 0 and again.stdout.count(' is finished.') == 4, again.stderr
    kept = {file: content for file, content in before.items() if file.parent.name != 'relu-1'}
    assert len(kept) == 6 and kept == {file: file.read_bytes() for file in kept}
    for file in folder.rglob('*.pt'):  # as where only records were committed
        file.unlink()
    again = script(copied, ACT)
    assert again.returncode == 0 and again.stdout.count(' is finished.') == 4, again.stderr
    assert len(section(copied, 'act').rows) == 2


def test_options_are_columns_and_batch_sizes_compared_over_seconds_too(tmp_path, few_images):
    done = script(tmp_path, 'CIFAR10_train.py --name m --dataset synthetic --epochs 1 --model mlp lenet5 '
                            '--batch-size 50 100')
    assert done.returncode == 0, done.stderr
    found = section(tmp_path, 'm')
    labels = [(row['--model'], row['--batch-size']) for row in found.rows]
    assert labels == [(model, size) for model in ('lenet5', 'mlp') for size in ('50', '100')]
    assert found.figures == 2


def test_a_single_run_of_a_group_is_not_trained_again_either(tmp_path, few_images):
    command = f'{SMALL} --name rates/slow --learning-rate 0.001'
    assert 'epoch 2/2' in script(tmp_path, command).stdout
    assert 'rates/slow is finished.' in script(tmp_path, command).stdout
    assert 'is finished' not in script(tmp_path, f'{command} --epochs 1').stdout
    assert sorted(folder.name for folder in (tmp_path / 'results' / 'rates').glob('*/')) == ['slow', 'slow-2']
    assert [row['Epochs'] for row in section(tmp_path, 'rates').rows] == ['1', '2']


def test_a_run_that_diverges_ends_no_group(tmp_path, few_images):
    command = f'{SMALL} --normalization none --batch-size 10 --optimizer sgd --warmup 0 --learning-rate 9e8'
    done = script(tmp_path, f'{command} 0.01 --name rates')
    assert done.returncode == 0, done.stderr
    assert 'rates/900000000.0: The loss is' in done.stdout
    assert len(rows(tmp_path / 'results' / 'rates' / '0.01')) == 2
    done = script(tmp_path, f'{command} 8e8 --name worse')
    assert done.returncode == 2 and done.stderr.startswith('Every run diverged')


def test_a_run_in_a_group_is_evaluated_by_its_name(group, few_images):
    done = script(group, 'CIFAR10_evaluation.py --name act/relu-0')
    best = max(float(row['val_accuracy']) for row in rows(group / 'results' / 'act' / 'relu-0'))
    assert f'{best:.2f} % recomputed, {best:.2f} % recorded' in done.stdout
    assert section(group, 'act').text == ''  # it has none, and is called by its name


@pytest.mark.parametrize('model', ['mlp', 'lenet5'])
def test_a_run_without_standardization_is_recomputed_without_it(model, tmp_path, few_images):
    done = script(tmp_path, f'CIFAR10_train.py --model {model} --dataset synthetic --epochs 2 '
                            '--batch-size 10 --standardization off')
    [(recomputed, recorded)] = re.findall(r'([\d.]+) % recomputed, ([\d.]+) % recorded', done.stdout)
    assert recomputed == recorded
    weights = f'--model {model} --weights results/{model}/best.pt'
    assert f'{recorded} %' in script(tmp_path, f'CIFAR10_evaluation.py {weights} --dataset synthetic').stdout


def run(accuracies, seed=0, **changes):
    """A run with these accuracies, one percent more in training, a minute an epoch, a drop after two."""
    history = [Epoch(epoch, 0.1 if epoch < 3 else 0.01, 1, accuracy + 1, 1, accuracy, 60 * epoch)
               for epoch, accuracy in enumerate(accuracies, 1)]
    return Run(None, replace(SETTINGS['lenet5'], seed=seed, **changes), {}, history)


def test_the_report_is_the_same_whatever_the_age_of_its_files(copied):
    folder, reports = copied / 'results', []
    for name in ('relu-1', 'tanh-0'):  # two of them are no group too
        shutil.copytree(folder / 'act' / name, folder / name, ignore=shutil.ignore_patterns('*.pt'))
    for age in 1, -1:  # which of them are older
        for number, file in enumerate(sorted(folder.rglob('config.json'))):
            os.utime(file, (10**9, 10**9 + age * number))
        assert script(copied, 'CIFAR10_evaluation.py').returncode == 0
        reports.append((folder / 'report.html').read_text(encoding='utf-8'))
    assert reports[0] == reports[1] and re.findall('<td title="Run">(.*?)</td>', reports[0])[1:]


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


STEP = dict(learning_rate_decay='step')
SEEDS = [run([10, 30, 20], **STEP), run([20, 40, 60, 70], 1, **STEP)]  # the second seed trained longer


@pytest.mark.parametrize('over, step', [('epoch', 1), ('seconds', 60)])
def test_curves_are_means_over_the_seeds_with_a_band_of_a_deviation(over, step, drawn):
    CIFAR10_evaluation.plot_accuracy({'one': SEEDS, 'two': [run([50, 60])]}, 'option', None, over)
    [axes] = drawn
    one, two = axes.lines  # nothing else is drawn where curves are compared, but for two bands
    assert len(axes.collections) == 2 and axes.get_ylim() != (0, 105)
    x = step * np.array([1, 2, 3])
    np.testing.assert_allclose(one.get_xydata(), np.array([x, [15, 35, 40]]).T)
    np.testing.assert_allclose(two.get_xydata(), np.array([x[:2], [50, 60]]).T)
    band = axes.collections[0].get_paths()[0].vertices
    third, deviation = band[band[:, 0] == 3 * step][:, 1], statistics.stdev([20, 60])
    assert (third.min(), third.max()) == pytest.approx((40 - deviation, 40 + deviation))
    assert axes.get_legend_handles_labels()[1] == ['one', 'two']
    assert len(axes.figure.legends) == 1 and axes.get_title() == 'option' and axes.get_xlabel() == over
    assert one.get_color() != two.get_color()


def test_a_single_curve_also_shows_training_early_stopping_and_drops_of_the_learning_rate(drawn):
    CIFAR10_evaluation.plot_accuracy({'one': SEEDS}, 'LeNet-5', None)
    [axes] = drawn
    one, training, star = axes.lines
    np.testing.assert_allclose(one.get_ydata(), [15, 35, 40])
    np.testing.assert_allclose(training.get_xydata(), [[1, 16], [2, 36], [3, 41]])
    np.testing.assert_allclose(star.get_xydata(), [[3, 50]])  # the mean of 30 % at 2 and of 70 % at 4
    [[[x, _], _]] = axes.collections[-1].get_segments()
    assert 2 <= x < 3 and axes.get_ylim() == (0, 105)  # the settings have one scale
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ['one', 'training', 'early stopping', 'the learning rate drops']


def test_a_group_stops_at_the_first_user_error(tmp_path):
    done = script(tmp_path, f'{SMALL} --seed 0 1 --batch-size 4999')
    assert done.returncode == 2 and 'leaves a batch of 1' in done.stderr
    assert done.stdout.count('Training images') == 1

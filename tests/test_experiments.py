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
import torch
from conftest import rows, script, use_few_images
from PIL import Image

import CIFAR10_evaluation
from CIFAR10_configuration import SETTINGS, Epoch, Run

SMALL = 'CIFAR10_train.py --model mlp --hidden 8 --dataset synthetic --epochs 2'
ACT = f'{SMALL} --batch-size 10 --name act --activation tanh relu --seed 0 1'


def section(folder, heading):
    """A section of the report: text, number of figures, the table as dicts by column, what its rows share."""
    report = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
    [part] = re.findall(f'<h3>{heading}</h3>(.*?)(?=<h[23]>|</html>)', report, re.DOTALL)
    header, *lines = [[html.unescape(cell) for cell in re.findall('<td title=".*?">(.*?)</td>', line)]
                      for line in re.findall('<tr.*?>(.*?)</tr>', part)]
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
        values = {'Validation (%)': [max(epoch.val_accuracy for epoch in seed) for seed in seeds],
                  'Last epoch (%)': [seed[-1].val_accuracy for seed in seeds],
                  'Training (%)': [seed[-1].train_accuracy for seed in seeds]}
        for column, numbers in values.items():
            mean, deviation = map(float, re.fullmatch(r'([\d.]+) ± ([\d.]+)', row[column]).groups())
            assert mean == pytest.approx(statistics.mean(numbers), abs=0.006)
            assert deviation == pytest.approx(statistics.stdev(numbers), abs=0.006)
    parameters = (3072 + 1) * 8 + 2 * 8 + (8 + 1) * 10
    for text in ('Model: MLP (NOT CIFAR-10)', f'Parameters: {parameters:,}', '--epochs: 2',
                 'Seeds: 2'):
        assert text in found.shared.split('; ') and text.split(': ')[0] not in found.rows[0]


def test_a_group_goes_on_where_it_was_and_is_finished_by_its_records_alone(copied, few_images):
    folder = copied / 'results' / 'act'
    before = {file: file.read_bytes() for file in folder.glob('*/*.pt')}
    (folder / 'relu-1' / 'history.csv').write_text('damaged')
    again = script(copied, ACT)
    assert again.returncode == 0 and 'epoch 2/2' not in again.stdout, again.stderr
    # Its checkpoint restores the record
    assert again.stdout.count('relu-1 holds no readable run') == 1
    assert not (folder / 'relu-1-2').exists() and len(rows(folder / 'relu-1')) == 2
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


def test_options_are_columns_and_models_come_first(tmp_path, few_images):
    done = script(tmp_path, 'CIFAR10_train.py --name m --dataset synthetic --epochs 1 --model mlp lenet5 '
                            '--batch-size 50 100')
    assert done.returncode == 0, done.stderr
    found = section(tmp_path, 'm')
    labels = [(row['Model'].split()[0], row['--batch-size']) for row in found.rows]
    assert labels == [(model, size) for model in ('LeNet-5', 'MLP') for size in ('50', '100')]
    assert found.figures == 1


def test_a_single_run_of_a_group_is_not_trained_again_either(tmp_path, few_images):
    command = f'{SMALL} --name rates/slow --learning-rate 0.001'
    assert 'epoch 2/2' in script(tmp_path, command).stdout
    assert 'rates/slow is finished.' in script(tmp_path, command).stdout
    assert 'is finished' not in script(tmp_path, command.replace('--epochs 2', '--epochs 1')).stdout
    assert {file.parent.name for file in tmp_path.glob('results/rates/*/best.pt')} == {'slow', 'slow-2'}
    assert [row['--epochs'] for row in section(tmp_path, 'rates').rows] == ['1', '2']


def test_a_group_named_as_a_run_hides_none(tmp_path, few_images):
    for seeds in '7', '0 1':
        done = script(tmp_path, f'{SMALL} --name both --seed {seeds}')
        assert done.returncode == 0, done.stderr
    sections = (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8').split('<h3>both</h3>')[1:]
    accuracies = [re.findall(r'<td title="Validation \(%\)"[^>]*>([\d.]+)', text)[-1] for text in sections]
    best = max(float(row['val_accuracy']) for row in rows(tmp_path / 'results' / 'both'))
    assert len(accuracies) == 2 and accuracies[0] == f'{best:.2f}'


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
    assert reports[0] == reports[1] and '<h3>relu-1</h3>' in reports[0]


def test_a_group_without_a_readable_run_does_not_stop_the_report(copied):
    folder = copied / 'results' / 'group' / 'run'
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text('{')
    done = script(copied, 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and done.stdout.count('holds no readable run') == 1, done.stderr
    shutil.rmtree(copied / 'results' / 'act')
    done = script(copied, 'CIFAR10_evaluation.py')
    assert done.returncode == 2 and done.stderr.startswith('There are no readable runs')


def test_where_one_option_of_a_setting_varies_the_setting_is_compared_too(copied):
    for name, changes in {'lenet5': {}, 'long/100': {'epochs': 100}, 'long/120': {'epochs': 120},
                          'slow': {'epochs': 100, 'learning_rate': 0.01}}.items():
        epochs = changes.get('epochs', SETTINGS['lenet5'].epochs)
        made = run([50] * (epochs - 1) + [60], **changes)
        (copied / 'results' / name).mkdir(parents=True)
        replace(made, folder=copied / 'results' / name).write()
    assert script(copied, 'CIFAR10_evaluation.py').returncode == 0
    assert len(section(copied, 'long').rows) == 3
    report = (copied / 'results' / 'report.html').read_text(encoding='utf-8')
    assert report.index('<h3>slow</h3>') < report.index('<h3>act</h3>')  # single runs come first
    part = report[report.index('<h3>slow</h3>'):].split('</section>')[0]
    assert part.count('<tr') == 2 and '<td title="--learning-rate">0.01</td>' in part
    assert 'alt="validation, LeNet-5: 60.0 % in 100 epochs"' in part


def test_the_best_row_is_bold_and_a_bar_as_long_as_its_accuracy(copied):
    assert script(copied, 'CIFAR10_evaluation.py').returncode == 0
    part = (copied / 'results' / 'report.html').read_text(encoding='utf-8').split('<h3>act</h3>')[1]
    bars = re.findall(r'<td title="Validation \(%\)" style="--bar: ([\d.]+)%">([\d.]+) ±', part)
    assert len(bars) == 2 and all(bar == mean for bar, mean in bars)
    [best] = re.findall(r'<tr class="best">.*?"--bar: ([\d.]+)%', part)
    assert float(best) == max(float(bar) for bar, _ in bars)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that were drawn, instead of their files."""
    found = []
    monkeypatch.setattr(CIFAR10_evaluation, 'save_figure', lambda axes, file: found.append(axes))
    return found


STEP = dict(learning_rate_decay='step')
SEEDS = [run([10, 30, 20], **STEP), run([20, 40, 60, 70], 1, **STEP)]  # the second seed trained longer


def test_curves_are_means_over_the_seeds_in_the_first_options_colour_and_the_others_dashes(drawn):
    compared = {('relu', 'he'): SEEDS, ('relu', 'xavier'): [run([50, 60])], ('tanh', 'he'): [run([5, 6])]}
    CIFAR10_evaluation.plot_accuracy(compared, None, ['activation', 'initialization'])
    [axes] = drawn
    one, two, three = (line for line in axes.lines if len(line.get_xdata()))  # nothing else is drawn
    np.testing.assert_allclose(one.get_xydata(), [[1, 15], [2, 35], [3, 40]])
    np.testing.assert_allclose(two.get_xydata(), [[1, 50], [2, 60]])
    assert one.get_color() == two.get_color() != three.get_color()
    assert one.get_linestyle() == three.get_linestyle() != two.get_linestyle()
    assert axes.get_legend_handles_labels()[1] == ['relu', 'tanh', 'he', 'xavier']
    [legend] = axes.figure.legends
    assert legend.get_title().get_text() == 'colour: activation\ndashes: initialization'
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('epoch', 'accuracy (%)')


def test_a_single_curve_also_shows_training_early_stopping_and_drops_of_the_learning_rate(drawn):
    CIFAR10_evaluation.plot_accuracy({('validation',): SEEDS}, None)
    [axes] = drawn
    one, training, star = (line for line in axes.lines if len(line.get_xdata()))
    np.testing.assert_allclose(one.get_ydata(), [15, 35, 40])
    np.testing.assert_allclose(training.get_xydata(), [[1, 16], [2, 36], [3, 41]])
    np.testing.assert_allclose(star.get_xydata(), [[3, 50]])  # the mean of 30 % at 2 and of 70 % at 4
    [[[x, _], _]] = axes.collections[-1].get_segments()
    assert 2 <= x < 3 and axes.get_ylim() == (0, 105)  # the settings have one scale
    labels = axes.get_legend_handles_labels()[1]
    assert [label for label in labels if label] == ['validation', 'training', 'early stopping',
                                                    'learning rate drops']
    assert axes.get_title() == 'LeNet-5: 50.0 % in 3 epochs'


def test_losses_and_the_learning_rate_have_an_axis_each(drawn, tmp_path):
    history = [Epoch(1, 0.1, 2.2, 0, 2.1, 0, 9), Epoch(2, 0.01, 1.2, 0, 1.1, 0, 9)]
    CIFAR10_evaluation.plot_loss(Run(tmp_path, SETTINGS['mlp'], {}, history))
    left, right = drawn[0].figure.axes
    found = {line.get_label(): list(line.get_ydata()) for line in [*left.lines, *right.lines]}
    assert found == {'validation': [2.1, 1.1], 'training': [2.2, 1.2], 'learning rate': [0.1, 0.01]}
    assert (left.get_ylabel(), right.get_ylabel()) == ('loss', 'learning rate') and len(right.lines) == 1


@pytest.mark.parametrize('model', SETTINGS)
def test_the_first_layers_weights_are_pictures_from_their_lowest_to_their_highest(model, trained):
    folder = trained[0] / 'results' / model
    first = next(iter(torch.load(folder / 'best.pt')['model_state_dict'].values()))
    side = dict(mlp=32, lenet5=5, resnet32=3)[model]
    weights = first.reshape(-1, 3, side, side)[1]  # the second one is the second picture in the first row
    picture = np.asarray(Image.open(folder / 'weights.png'))[2:96, 98:192]
    for y, x in (0, 0), (side - 1, 0), (side // 2, side - 1):
        place = (int((y + 0.5) * 94 / side), int((x + 0.5) * 94 / side))
        wanted = (weights[:, y, x] - weights.min()) / (weights.max() - weights.min()) * 255
        np.testing.assert_allclose(picture[place], wanted, atol=2)


def test_a_group_stops_at_the_first_user_error(tmp_path):
    done = script(tmp_path, f'{SMALL} --seed 0 1 --batch-size 4999')
    assert done.returncode == 2 and 'leaves a batch of 1' in done.stderr
    assert done.stdout.count('Training images') == 1

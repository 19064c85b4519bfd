"""Groups of runs: several values of an option, and the section that the report makes of them."""
import base64
import html
import re
import shutil
import statistics
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import killed, rows, script, use_few_images
from matplotlib.figure import Figure
from test_evaluation import predicted, read_report, record
from torchvision.transforms.functional import crop, hflip, pad

import CIFAR10_evaluation
from CIFAR10_configuration import SETTINGS, Epoch, Run
from dataset import synthetic
from LeNet5_model import LeNet5_model

SMALL = 'CIFAR10_train.py --model mlp --hidden 8 --dataset synthetic --epochs 2'
ACT = f'{SMALL} --batch-size 10 --name act --activation tanh relu --seed 0 1'


def section(folder, heading):
    """A section of the report: its HTML, text, the table's rows as dicts by column, what the rows share."""
    report, tables = read_report(folder)
    before, part = re.split(f'<h3>{re.escape(html.escape(heading))}</h3>', report)
    part = part.split('</section>')[0]
    shared = re.search('<p class="small">(.*?)</p>', part, re.DOTALL)[1]
    text = ' '.join(re.findall('<p>(.*?)</p>', part, re.DOTALL))
    return SimpleNamespace(html=part, text=text, rows=tables[before.count('<table>')],
                           shared=html.unescape(shared).split('; '))


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


def test_several_values_of_an_option_become_a_section_that_compares_them(copied, few_images):
    (copied / 'results' / 'act' / 'README.md').write_text('# ReLU is better\n\nBy far.', encoding='utf-8')
    done = script(copied, 'CIFAR10_evaluation.py --name act/relu-0')
    best = Run.read(copied / 'results' / 'act' / 'relu-0').accuracy
    assert f'{best:.2f} % recomputed, {best:.2f} % recorded' in done.stdout
    found = section(copied, 'ReLU is better')
    assert found.text.strip() == 'By far.' and found.html.count('<img ') == 1
    assert [row['--activation'] for row in found.rows] == ['relu', 'tanh']  # what differs, but for the seed
    for row in found.rows:
        name = row['--activation']
        seeds = [Run.read(copied / 'results' / 'act' / f'{name}-{seed}').history for seed in (0, 1)]
        values = {'Validation (%)': [max(epoch.val_accuracy for epoch in seed) for seed in seeds],
                  'Last epoch (%)': [seed[-1].val_accuracy for seed in seeds],
                  'Training (%)': [seed[-1].train_accuracy for seed in seeds]}
        for column, numbers in values.items():
            assert row[column] == ', '.join(f'{number:.2f}' for number in numbers)  # no deviation of two
    parameters = (3072 + 1) * 8 + 2 * 8 + (8 + 1) * 10
    for text in 'Model: MLP (NOT CIFAR-10)', f'Parameters: {parameters:,}', '--epochs: 2', 'Seeds: 2':
        assert text in found.shared and text.split(': ')[0] not in found.rows[0]
    # The setting's row is bold, and each bar as long as the mean
    bars = re.findall(r'<tr class="(.*?)">.*?"--bar: ([\d.]+)%"', found.html)
    assert [kind for kind, _ in bars] == ['chosen', '']
    for (_, bar), row in zip(bars, found.rows):
        assert float(bar) == pytest.approx(
            statistics.mean(map(float, row['Validation (%)'].split(', '))), abs=0.011)


def test_a_killed_group_goes_on_in_the_run_that_it_was_at(group, tmp_path, few_images):
    assert killed(100, tmp_path, ACT.split(' ', 1)[1])
    done = script(tmp_path, ACT)
    assert done.returncode == 0 and done.stdout.count(' is finished.') == 2, done.stderr
    for folder in (group / 'results' / 'act').glob('*-*'):
        whole, continued = rows(folder), rows(tmp_path / 'results' / 'act' / folder.name)
        assert [{**row, 'seconds': ''} for row in continued] == [{**row, 'seconds': ''} for row in whole]
    checkpoints = list(map(torch.load, tmp_path.rglob('last.pt')))
    assert len(checkpoints) == 4 and not any('optimizer' in checkpoint for checkpoint in checkpoints)


def test_a_finished_group_stays_also_without_weights_but_a_damaged_record_is_trained_anew(copied, few_images):
    folder = copied / 'results' / 'act'
    for file in folder.rglob('*.pt'):  # as where only records were committed
        file.unlink()
    for command, count in ((ACT.replace('tanh relu --seed 0 1', 'relu tanh --seed 1 0'), 4),  # reversed
                           (f'{SMALL} --batch-size 10 --activation relu --name act/relu-0', 1)):
        again = script(copied, command)
        assert again.returncode == 0 and again.stdout.count(' is finished.') == count, again.stderr
    assert len(list(folder.rglob('history.csv'))) == 4 and len(section(copied, 'act').rows) == 2
    (folder / 'relu-1' / 'history.csv').write_text('damaged')
    best = Run.read(folder / 'relu-0')  # has no weights
    best.history[0] = best.history[0]._replace(val_accuracy=99)
    best.write()
    again = script(copied, ACT)
    assert 'optimizer' not in torch.load(folder / 'relu-1-2' / 'last.pt')  # the same command begins another
    assert again.returncode == 0 and again.stdout.count(' is finished.') == 3, again.stderr
    assert 'relu-1 holds no readable run' in again.stdout and len(rows(folder / 'relu-1-2')) == 2
    assert (folder / 'relu-1' / 'history.csv').read_text() == 'damaged'


def test_options_are_columns_and_models_come_first(tmp_path, few_images):
    script(tmp_path, 'CIFAR10_train.py --name m --dataset synthetic --epochs 1 --model mlp lenet5 '
                     '--batch-size 100 20')
    labels = [(row['Model'].split()[0], row['--batch-size']) for row in section(tmp_path, 'm').rows]
    assert labels == [(model, size) for model in ('LeNet-5', 'MLP') for size in ('20', '100')]


def test_a_group_and_a_run_of_one_name_both_stay(tmp_path, few_images):
    for options in ('--name run --seed 7', '--name run --seed 0 1',  # a group in a run's folder
                    '--name group --activation elu tanh', '--name group --warmup 1'):  # and the reverse
        done = script(tmp_path, f'{SMALL} {options}')
        assert done.returncode == 0, done.stderr
    results = tmp_path / 'results'
    assert {file.parent.relative_to(results).as_posix() for file in results.rglob('best.pt')} == {
        'run', 'run/0', 'run/1', 'group/elu', 'group/tanh', 'group-2'}
    single, _ = re.findall(r'<h3>run</h3>.*?--bar: ([\d.]+)', read_report(tmp_path)[0], re.DOTALL)
    assert single == f'{Run.read(results / "run").accuracy:.2f}'


def test_a_group_of_seeds_alone_has_a_figure(tmp_path, few_images):
    assert script(tmp_path, f'{SMALL} --batch-size 10 --seed 0 1').returncode == 0
    assert section(tmp_path, 'seed').html.count('<img ') == 1


def test_where_the_checkpoint_of_an_unfinished_run_is_missing_it_is_trained_anew(copied, few_images):
    run = Run.read(copied / 'results' / 'act' / 'relu-1')
    del run.history[1:]
    run.write()
    (run.folder / 'last.pt').unlink()  # as in an archive, which has records alone
    again = script(copied, ACT)
    assert again.stdout.count(' is finished.') == 3 and len(rows(run.folder)) == 1, again.stderr
    assert len(rows(copied / 'results' / 'act' / 'relu-1-2')) == 2


def test_a_resumed_run_says_that_it_had_another_machine_and_finished_ones_keep_theirs(tmp_path, few_images):
    assert killed(70, tmp_path, ACT.split(' ', 1)[1])
    runs = [Run.read(file.parent) for file in sorted(tmp_path.rglob('config.json'))]
    assert [len(run.history) for run in runs] == [2, 1]
    for run in runs:
        run.machine['processor'] = 'another'
        run.write()
    checkpoint = torch.load(runs[1].folder / 'last.pt')
    torch.save({**checkpoint, 'machine': runs[1].machine}, runs[1].folder / 'last.pt')
    assert script(tmp_path, ACT).returncode == 0
    finished, resumed = (Run.read(run.folder).machine['processor'] for run in runs)
    assert finished == 'another' and resumed.endswith('; others before')


def test_a_run_that_diverges_ends_no_group(tmp_path, few_images):
    command = f'{SMALL} --normalization none --batch-size 10 --optimizer sgd --warmup 0 --learning-rate 9e8'
    done = script(tmp_path, f'{command} 0.01 --name rates')
    assert done.returncode == 0 and 'rates/900000000.0: The loss is' in done.stdout, done.stderr
    assert len(rows(tmp_path / 'results' / 'rates' / '0.01')) == 2
    done = script(tmp_path, f'{command} 8e8 --name worse')
    assert done.returncode == 2 and f'worse/800000000.0: {done.stderr}' in done.stdout


def test_where_one_option_of_a_setting_varies_the_setting_is_compared_too(tmp_path):
    for name, changes in {'lenet5': {}, 'long/100': {'epochs': 100}, 'long/120': {'epochs': 120},
                          'slow': {'epochs': 100, 'learning_rate': 0.01}}.items():
        config = replace(SETTINGS['lenet5'], **changes)
        record(tmp_path / 'results' / name, config, [50] * (config.epochs - 1) + [60])
    script(tmp_path, 'CIFAR10_evaluation.py')
    assert [row['--epochs'] for row in section(tmp_path, 'long').rows] == ['100', '120', '300']
    report, slow = read_report(tmp_path)[0], section(tmp_path, 'slow')
    assert report.index('<h3>slow</h3>') < report.index('<h3>long</h3>')  # single runs come first
    assert len(slow.rows) == 1 and '--learning-rate: 0.01' in slow.shared
    assert '--epochs: 100' in slow.shared and slow.html.count('<img ') == 1


def test_an_unfinished_run_has_its_own_row_and_changes_no_other(tmp_path):
    setting = SETTINGS['lenet5']
    for name, activation, epochs in (('0', 'elu', 9), ('1', 'elu', 90), ('2', 'elu', 90), ('3', 'maxout', 9)):
        config = replace(setting, activation=activation, epochs=epochs)
        record(tmp_path / 'results' / 'g' / name, config, [60.0] * 9)
    stopped = replace(setting, activation='maxout', epochs=9, patience=5, seed=1)
    for seed, accuracies in enumerate(([60.0, *range(61, 69)], [60.0] * 6)):  # the second one stopped early
        record(tmp_path / 'results' / 'early' / str(seed), replace(stopped, seed=seed), accuracies)
    record(tmp_path / 'results' / 'lenet5', setting, [70.0] * 9)
    script(tmp_path, 'CIFAR10_evaluation.py')
    found = section(tmp_path, 'g')
    assert [(row['Model'], row['--activation'], row['--epochs']) for row in found.rows] == [
        ('LeNet-5', 'elu', '9'), ('LeNet-5 (unfinished)', 'elu', '9 of 90'), ('LeNet-5', 'maxout', '9')]
    assert '--epochs: 7.5 of 9' in section(tmp_path, 'early').shared
    report, (slides, *_) = read_report(tmp_path)
    assert slides[1]['Model'] == 'LeNet-5 (unfinished)' and slides[1]['Accuracy'] == '70.00 %'
    assert 'LeNet-5 (unfinished) 70.00 %' in report


def test_a_group_in_a_settings_folder_leaves_its_figure(tmp_path):
    folder, setting = tmp_path / 'results' / 'lenet5', SETTINGS['lenet5']
    record(folder, setting, [70.0] * setting.epochs)
    script(tmp_path, 'CIFAR10_evaluation.py')
    figure = (folder / 'accuracy.png').read_bytes()
    record(folder / 'slow', replace(setting, learning_rate=0.01), [60.0] * setting.epochs)
    script(tmp_path, 'CIFAR10_evaluation.py')
    assert section(tmp_path, 'lenet5').html.count('<img ') == 1
    assert (folder / 'accuracy.png').read_bytes() == figure
    assert base64.b64encode(figure).decode() in read_report(tmp_path)[0]


@pytest.mark.parametrize('written, heading, text, commands', [
    ('    python a.py\n    python b.py', 'g', '', 'python a.py\npython b.py'),
    ('# Head\n    python a.py', 'Head', '', 'python a.py'),
    ('Head\n\nText\n\n\tpython a.py\n\nmore', 'Head', 'Text more', 'python a.py'),
    (b'\xff', 'g', '', ''), (None, 'g', '', '')])
def test_a_groups_text_has_heading_and_commands_wherever(written, heading, text, commands, tmp_path):
    # A text shows a group of a setting's seed alone, too.
    record(tmp_path / 'results' / 'g' / '0', SETTINGS['lenet5'], [60.0] * SETTINGS['lenet5'].epochs)
    file = tmp_path / 'results' / 'g' / 'README.md'
    if written is None:
        file.mkdir()  # what can't be read stops no report
    else:
        file.write_bytes(written if isinstance(written, bytes) else written.encode())
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    found = section(tmp_path, heading)
    assert done.returncode == 0 and found.text.split() == text.split()
    assert re.search('<pre>(.*?)</pre>', found.html, re.DOTALL)[1] == commands


@pytest.mark.parametrize('machines, shown', [('aa', True), ('ab', False), (['ab', 'ab'], False)])
def test_minutes_are_compared_on_one_machine_only(machines, shown, tmp_path):
    for rate, processors in zip((0.01, 0.1), machines):
        epochs = int(rate * 1000)
        for seed, processor in enumerate(processors):
            config = replace(SETTINGS['lenet5'], epochs=epochs, seed=seed, clip=1.0)
            record(tmp_path / 'results' / 'g' / f'{rate}-{seed}', config, [60.0] * epochs,
                   {'processor': processor})
    script(tmp_path, 'CIFAR10_evaluation.py')
    assert ('Minutes' in section(tmp_path, 'g').html) == shown


def run(accuracies, seed=0):
    """A run with these accuracies, one percent more in training, and a drop after two epochs."""
    history = [Epoch(epoch, 0.1 if epoch < 3 else 0.01, 4 - epoch, accuracy + 1, 3 - epoch, accuracy, epoch)
               for epoch, accuracy in enumerate(accuracies, 1)]
    return Run(None, replace(SETTINGS['lenet5'], seed=seed, learning_rate_decay='step'), {}, history)


SEEDS = [run([10, 30, 20]), run([20, 40, 60, 70], 1)]  # the second seed trained longer


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, instead of their files."""
    found = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_: found.append(figure))
    monkeypatch.setattr(CIFAR10_evaluation, 'atomic_write', lambda *_: None)
    return found


def test_a_group_is_drawn_as_means_over_the_seeds_each_with_a_colour_and_a_label(drawn, tmp_path):
    curves = {'activation relu': SEEDS, 'activation elu': [run([50, 60])], 'activation tanh': [run([5])]}
    CIFAR10_evaluation.plot_group(curves, tmp_path / 'group.png')
    [axes], [legend] = drawn[0].axes, drawn[0].legends
    one, two, point = axes.lines
    np.testing.assert_allclose(one.get_xydata(), [[1, 15], [2, 35], [3, 40]])
    np.testing.assert_allclose(two.get_xydata(), [[1, 50], [2, 60]])
    assert one.get_color() != two.get_color() and point.get_marker() == '.' != one.get_marker()
    assert [text.get_text() for text in legend.texts] == list(curves)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('epoch', 'validation accuracy (%)')


@pytest.mark.parametrize('counts, figures', [((6,), 1), ((7,), 0), ((2, 3), 1), ((2, 2, 2), 0), ((1, 1), 1)])
def test_a_group_of_many_curves_is_a_table_alone(counts, figures, tmp_path, monkeypatch):
    labels, plot_group = [], CIFAR10_evaluation.plot_group
    monkeypatch.setattr(CIFAR10_evaluation, 'plot_group',
                        lambda curves, file: [labels.extend(curves), plot_group(curves, file)])
    for values in product(*map(range, counts)):
        changes = dict(zip(('warmup', 'clip', 'weight_decay'), map(float, values)), epochs=1, gamma=0.5)
        record(tmp_path / 'results' / 'g' / '-'.join(map(str, values)),
               replace(SETTINGS['lenet5'], **changes), [50.0])
    script(tmp_path, 'CIFAR10_evaluation.py')
    assert section(tmp_path, 'g').html.count('<img ') == figures
    assert (tmp_path / 'results' / 'g' / 'group.png').exists() == bool(figures)
    if figures and max(counts) > 1:
        assert all(f'{name} 1' in str(labels) for name, count in zip(('warmup', 'clip'), counts) if count > 1)


def test_a_settings_figures_show_accuracies_early_stopping_losses_and_learning_rate(drawn, tmp_path):
    runs = [replace(seed, folder=tmp_path) for seed in SEEDS]
    CIFAR10_evaluation.plot_runs(runs, tmp_path / 'accuracy.png')
    axes, left, right = drawn[0].axes
    one, training, star = axes.lines
    np.testing.assert_allclose(one.get_ydata(), [15, 35, 40])
    np.testing.assert_allclose(training.get_xydata(), [[1, 16], [2, 36], [3, 41]])
    np.testing.assert_allclose(star.get_xydata(), [[3, 50]])  # the mean of 30 % at 2 and of 70 % at 4
    assert axes.get_title() == 'LeNet-5 (unfinished): 50.0 % in 3.5 epochs' and axes.get_ylim() == (0, 100)
    assert [list(line.get_ydata()) for line in left.lines] == [[2, 1, 0], [3, 2, 1]]
    np.testing.assert_allclose(right.lines[0].get_ydata(), [0.1, 0.1, 0.01])
    assert [line.get_color() for line in left.lines] == [one.get_color(), training.get_color()]
    assert [line.get_linewidth() for line in left.lines] == [one.get_linewidth(), training.get_linewidth()]
    assert [text.get_text() for text in drawn[0].legends[0].texts] == [
        'validation', 'training', 'early stopping', 'learning rate']
    assert [part.get_ylabel() for part in drawn[0].axes] == ['accuracy (%)', 'loss', 'learning rate']


def test_the_images_are_one_of_each_class_and_their_crops_and_hardest_are_those_least_believed(
        trained, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(CIFAR10_evaluation, 'plot_images',
                        lambda images, titles, file: drawn.update({file.name: (images, titles)}))
    shutil.copytree(trained[0] / 'results', tmp_path / 'results')
    assert script(tmp_path, 'CIFAR10_evaluation.py --name lenet5').returncode == 0
    (images, titles), (mistakes, pairs) = drawn['images.png'], drawn['mistakes.png']
    training, labels = synthetic.generate(True)
    for image, augmented, title in zip(images[:10], images[10:], synthetic.CLASSES, strict=True):
        [i] = (training == image).flatten(1).all(1).nonzero().flatten()
        assert synthetic.CLASSES[labels[i]] == title == titles[labels[i]]
        crops = [crop(pad(image, [4] * 4), top, left, 32, 32) for top in range(9) for left in range(9)]
        assert any(torch.equal(augmented, shown) for one in crops for shown in (one, hflip(one)))
    model = LeNet5_model('maxout')
    model.load_state_dict(torch.load(tmp_path / 'results' / 'lenet5' / 'best.pt')['model_state_dict'])
    logits, labels = predicted(model)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction='none')
    hardest = losses.argsort(descending=True)[:10]
    assert torch.equal(mistakes, synthetic.generate(False)[0][hardest])
    names = synthetic.CLASSES
    assert pairs == [f'{names[labels[i]]}\nas {names[logits[i].argmax()]}' for i in hardest]

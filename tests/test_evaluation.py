"""The report, weights from elsewhere, predictions and the archive to hand in."""

import html
import json
import re
import shutil
import statistics
import zipfile

import pytest
import torch
from conftest import script
from torchvision.transforms.functional import to_pil_image

from CIFAR10_configuration import HISTORY, SETTINGS
from dataset import synthetic
from dataset.synthetic import generate
from LeNet5_model import LeNet5_model
from MLP_model import MLP_model
from ResNet_model import ResNet32_model


@pytest.fixture(scope='module')
def report(trained):
    return (trained[0] / 'results' / 'report.html').read_text(encoding='utf-8')


def table(report):
    return [
        [html.unescape(cell) for cell in re.findall('<td title=".*?">(.*?)</td>', row)]
        for row in re.findall('<tr>(.*?)</tr>', report)
    ]


def accuracy_on_test_images(model):
    images, labels = generate(train=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    return (model((images / 255 - mean) / std).argmax(1) == labels).float().mean() * 100


# The columns of the slides' table
COLUMNS = (
    'Model',
    'GPU (O/X)',
    'Batch_size',
    'Activation function',
    'Weight initialization',
    'Optimizer',
    'Learning rate',
    'Momentum',
    'Weight decay',
    'LR decay',
    'training time (m)',
    'Early stopping epoch',
    'Accuracy',
)


def test_report_holds_the_slides_table(report, trained):
    header, *settings = table(report)[:4]
    assert header[1:] == list(COLUMNS)
    assert [row[0] for row in settings] == ['Setting #1', 'Setting #2', 'Setting #3']
    resnet = dict(zip(header, settings[2], strict=False))
    assert [resnet[name] for name in COLUMNS[:10]] == [
        'ResNet-32 (synthetic, NOT CIFAR-10)',
        'X' if not torch.cuda.is_available() else 'O',
        '10',
        'ReLU',
        'He_normal',
        'SGD',
        '0.1',
        '0.9',
        f"{SETTINGS['resnet32'].weight_decay:g}",
        '×0.5 after epoch 1',
    ]
    for model, row in zip(('mlp', 'lenet5', 'resnet32'), settings, strict=False):
        best = re.search(r'Best validation accuracy ([\d.]+ %) at epoch (\d)', trained[1][model])
        assert (row[-1], row[-2]) == best.groups()


def test_report_is_one_file_that_says_it_is_not_cifar10(report):
    assert not re.search(r'(src|href)=.(?!data:)', report) and report.count('data:image/png;base64,') >= 6
    first = re.search('<p>Validation accuracy: (.*)</p>', report)[1]
    assert first.count('(synthetic, NOT CIFAR-10)') == first.count(' %') == 3 and '[결과 정리]' in report
    assert report.count('%, agrees') == 3 and 'DISAGREES' not in report
    dropped = 'title="The epoch after a drop of the learning rate"'
    assert re.search(rf'<td {dropped}>[\d.]+ % to [\d.]+ % at epoch 2</td>', report)


def test_a_setting_that_has_not_run_is_an_empty_row(tmp_path):
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0, done.stderr
    rows = table((tmp_path / 'results' / 'report.html').read_text(encoding='utf-8'))
    assert [row[1] for row in rows[1:]] == ['MLP', 'LeNet-5', 'ResNet-32'] and not any(
        cell for row in rows[1:] for cell in row[2:]
    )


def test_holdout_run_is_told_apart_and_looks_at_the_test_images_once(tmp_path):
    script(
        tmp_path,
        'CIFAR10_train.py',
        '--model',
        'mlp',
        '--hidden',
        8,
        '--dataset',
        'synthetic',
        '--epochs',
        1,
        '--holdout',
        500,
    )
    report = (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')
    row = dict(zip(*table(report)[-2:], strict=True))
    assert row['Validated on'] == '500 held-out training images' and row['Epochs'] == '1'
    model = MLP_model((8,), normalization='batch')
    model.load_state_dict(torch.load(tmp_path / 'results' / 'mlp' / 'best.pt')['model_state_dict'])
    test_accuracy = accuracy_on_test_images(model.eval())
    recomputed = next(cell for column, cell in row.items() if column.startswith('Recomputed'))
    assert recomputed.endswith(f'agrees; {test_accuracy:.2f} % of the test images')


def test_runs_that_differ_only_in_their_seed_are_one_row_of_mean_and_deviation(trained, tmp_path):
    accuracies = [60.0, 62.5, 61.0]
    for seed, accuracy in enumerate(accuracies):
        folder = tmp_path / 'results' / f'lenet5-{seed}'
        folder.mkdir(parents=True)
        record = json.loads((trained[0] / 'results' / 'lenet5' / 'config.json').read_text())
        record['configuration']['seed'] = seed
        (folder / 'config.json').write_text(json.dumps(record))
        rows = [HISTORY, (1, 0.1, 1, 50, 1, accuracy, 60), (2, 0.01, 1, 50, 1, accuracy - 1, 120)]
        (folder / 'history.csv').write_text(''.join(','.join(map(str, row)) + '\n' for row in rows))
    shutil.copytree(folder, folder.with_name('other'))
    (folder.with_name('other') / 'config.json').write_text(
        json.dumps(record).replace('"warmup": 2.0', '"warmup": 3.0')
    )
    (tmp_path / 'results' / 'README.md').write_text('Written <by hand>.')
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0, done.stderr
    report = (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')
    row = next(row for row in table(report) if row[1].startswith('LeNet-5'))
    assert row[-3:] == [
        '2.0, 2.0, 2.0',
        '1, 1, 1',
        f'{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} % (3 seeds)',
    ]
    other = next(row for row in table(report) if row[0] == 'other')
    assert '--dataset synthetic --seed 2 --epochs 2 --warmup 3.0' in other
    assert 'Written &lt;by hand&gt;.' in report


@pytest.mark.parametrize('form', ['bare', 'assignment', 'data_parallel', 'compiled'])
def test_weights_saved_by_the_assignments_code_evaluate(form, tmp_path):
    torch.manual_seed(0)
    model = LeNet5_model()
    state = model.state_dict()
    prefix = {'data_parallel': 'module.', 'compiled': '_orig_mod.'}.get(form, '')
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({'epoch': 3, 'model_state_dict': state} if form == 'assignment' else state, tmp_path / 'w.pth')
    done = script(
        tmp_path, 'CIFAR10_evaluation.py', '--model', 'lenet5', '--weights', 'w.pth', '--dataset', 'synthetic'
    )
    assert (
        done.returncode == 0
        and f'{accuracy_on_test_images(model):.2f} % of the 1,000 validation images' in done.stdout
    ), done.stderr


def test_weights_of_another_network_than_the_slides_bring_their_configuration(trained, tmp_path):
    file = shutil.copy(
        trained[0] / 'results' / 'mlp' / 'best.pt', tmp_path / 'mine.pt'
    )  # hidden 64, batch norm
    best = re.search(r'Best validation accuracy ([\d.]+ %)', trained[1]['mlp'])[1]
    done = script(
        tmp_path, 'CIFAR10_evaluation.py', '--model', 'mlp', '--weights', file, '--dataset', 'synthetic'
    )
    assert done.returncode == 0 and best in done.stdout, done.stderr


def test_wrong_architecture_names_the_first_mismatch(tmp_path):
    state = ResNet32_model().state_dict()
    torch.save(state, tmp_path / 'resnet.pt')
    state['layers_4n.0.conv1.weight'] = torch.zeros(32, 16, 5, 5)
    torch.save(state, tmp_path / 'wide.pt')
    for file, model, wrong in (
        ('resnet.pt', 'lenet5', 'conv1.bias'),
        ('wide.pt', 'resnet32', 'layers_4n.0.conv1.weight'),
    ):
        done = script(
            tmp_path, 'CIFAR10_evaluation.py', '--model', model, '--weights', file, '--dataset', 'synthetic'
        )
        assert done.returncode == 2 and wrong in done.stderr and len(done.stderr.splitlines()) == 1


class Malicious:
    def __reduce__(self):
        return open, ('owned', 'w')


def test_files_without_safe_weights_are_refused(tmp_path):
    torch.save({'model_state_dict': Malicious()}, tmp_path / 'evil.pt')
    (tmp_path / 'empty.pt').write_bytes(b'')
    for file in ('evil.pt', 'empty.pt', 'missing.pt'):
        done = script(
            tmp_path,
            'CIFAR10_evaluation.py',
            '--model',
            'lenet5',
            '--weights',
            file,
            '--dataset',
            'synthetic',
        )
        assert done.returncode == 2 and file in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / 'owned').exists()


def test_predict_names_the_class_of_any_picture(trained, tmp_path):
    picture = generate(train=False)[0][0].repeat_interleave(5, 1).repeat_interleave(7, 2)
    to_pil_image(picture).save(tmp_path / 'a b.png')
    to_pil_image(picture[:1]).save(tmp_path / 'grey.jpg')
    (tmp_path / 'text.png').write_text('no picture')
    done = script(
        trained[0],
        'CIFAR10_evaluation.py',
        '--predict',
        *(tmp_path / name for name in ('a b.png', 'text.png', 'grey.jpg')),
    )
    first, second, third = done.stdout.splitlines()
    assert any(name in first for name in synthetic.CLASSES) and '% sure' in first and 'NOT CIFAR-10' in third
    assert 'text.png' in second and 'not a picture' in second


def test_submit_writes_the_whole_code_and_the_report_once(trained):
    done = script(trained[0], 'CIFAR10_evaluation.py', '--name', 'lenet5', '--submit', '2020123456_Kim')
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(trained[0] / '2020123456_Kim.zip').namelist()
    assert {
        f'2020123456_Kim/{name}'
        for name in (
            'CIFAR10_train.py',
            'ResNet_model.py',
            'dataset/__init__.py',
            'report.html',
            'README.md',
            'requirements.txt',
            'tests/test_models.py',
        )
    } <= set(names)
    again = script(trained[0], 'CIFAR10_evaluation.py', '--name', 'lenet5', '--submit', '2020123456_Kim')
    assert again.returncode == 2 and 'already' in again.stderr

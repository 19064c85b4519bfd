"""The report, weights from elsewhere, predictions and the archive to hand in."""
import base64
import html
import io
import json
import os
import re
import shlex
import shutil
import statistics
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import process, script
from PIL import Image
from torchvision.transforms import Normalize
from torchvision.transforms.functional import to_pil_image

from CIFAR10_configuration import SETTINGS, Epoch, Run
from dataset import CLASSES, synthetic
from LeNet5_model import LeNet5_model
from ResNet_model import ResNet32_model


def read_report(folder):
    """The report's text, and its tables: of each a list of its rows, dicts by column."""
    text, tables = (folder / 'results' / 'report.html').read_text(encoding='utf-8'), []
    for table in re.findall('<table>.*?</table>', text, re.DOTALL):
        header, *lines = [[' '.join(html.unescape(cell).split())  # spaces and lines as a browser shows them
                           for cell in re.findall('<td.*?>(.*?)</td>', row, re.DOTALL)]
                          for row in re.findall('<tr.*?</tr>', table, re.DOTALL)]
        tables.append([dict(zip(header, line, strict=True)) for line in lines])
    return text, tables


def record(folder, config, accuracies, machine=()):
    """Write the record of a run with these validation accuracies, one more in training, a second an epoch."""
    folder.mkdir(parents=True)
    history = [Epoch(epoch, 0.1, 1, accuracy + 1, 1, accuracy, epoch)
               for epoch, accuracy in enumerate(accuracies, 1)]
    Run(folder, config, dict(machine), history).write()


def predicted(model, count=1000, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)):
    """The logits of so many synthetic test images by a model, and their classes."""
    images, labels = synthetic.generate(False)
    return model.eval()(Normalize(mean, std)(images[:count] / 255)), labels[:count]


def accuracy_of(model, *options):
    logits, labels = predicted(model, *options)
    return f'{(logits.argmax(1) == labels).float().mean() * 100:.2f}'


def test_report_holds_the_slides_table_and_the_recomputed_accuracies(trained):
    _, (slides, measured, *_) = read_report(trained[0])
    assert '|'.join(slides[0]) == (
        '|Model|GPU (O/X)|Batch_size|Activation function|Weight initialization|Optimizer|Learning rate|'
        'Momentum|Weight decay|LR decay|training time (m)|Early stopping epoch|Accuracy')
    assert [row[''] for row in slides] == ['Setting #1', 'Setting #2', 'Setting #3']
    gpu = 'O' if torch.cuda.is_available() else 'X'
    assert list(slides[2].values())[1:11] == ['ResNet-32 (NOT CIFAR-10)', gpu, '10', 'ReLU', 'He_normal',
                                              'SGD', '0.1', '0.9', '0.0005', '×0.5 after epoch 1']
    for model, row, again in zip(SETTINGS, slides, measured, strict=True):
        best = f"Best validation accuracy {row['Accuracy']} at epoch {row['Early stopping epoch']},"
        assert best in trained[1][model] and f"{row['Accuracy']} recomputed" in trained[1][model]
        assert row['Accuracy'] == f"{again['Validation (%)']} %"


def test_the_report_is_one_file_with_pictures_inside_that_says_it_is_not_cifar10(trained):
    text, _ = read_report(trained[0])
    first = re.search('<p>Validation accuracy(.*?)</p>', text, re.DOTALL)[1]
    assert first.count('(NOT CIFAR-10)') == first.count(' %') == 3 and '[결과 정리]' in text
    pictures = re.findall(r'<img src="data:image/png;base64,(.*?)"\s+width="(\d+)" alt="[^"]+">', text)
    assert len(pictures) == len(re.findall('(?:src|href)=', text)) == 3 * 2 + 2  # and nothing else is loaded
    for png, width in pictures:
        with Image.open(io.BytesIO(base64.b64decode(png))) as image:  # a CSS pixel has two of a dense screen
            assert int(width) == image.width // 2 > 100


def test_the_report_tells_of_each_class_how_often_it_is_taken_for_each(trained):
    (text, (_, _, table, *_)), names, right = read_report(trained[0]), synthetic.CLASSES, {}
    assert [row['Class'] for row in table] == list(names)
    model = ResNet32_model()
    model.load_state_dict(torch.load(trained[0] / 'results' / 'resnet32' / 'best.pt')['model_state_dict'])
    logits, labels = predicted(model, 100)  # it saw these alone
    classes = logits.argmax(1)
    for true, row in enumerate(table):
        shares = [f'{(classes[labels == true] == other).float().mean() * 100:.2f}' for other in range(10)]
        assert list(row.items())[1:] == [(f'as {name} (%)', share) for name, share in zip(names, shares)]
        right[true] = float(shares[true])
    worst = min(right, key=right.get)
    assert f'{names[worst]}: {right[worst]:.1f} % of these images are right' in text


def test_a_damaged_evaluation_leaves_its_table_out(trained, tmp_path):
    folder = shutil.copytree(trained[0] / 'results', tmp_path / 'results') / 'resnet32'
    no_truck = json.dumps({'accuracy': 10, 'confusion': [1] * 90 + [0] * 10})
    for bad in '{', '[]', '{"accuracy": "", "confusion": 5}', '{"confusion": [[1], [2]]}', no_truck:
        (folder / 'evaluation.json').write_text(bad)
        assert script(tmp_path, 'CIFAR10_evaluation.py --name lenet5').returncode == 0
        assert '>Class<' not in read_report(tmp_path)[0]


def test_a_holdout_run_says_so_and_settings_that_have_not_run_are_empty(tmp_path):
    script(tmp_path, 'CIFAR10_train.py --model mlp --hidden 8 --dataset synthetic --epochs 1 --holdout 500')
    text, (slides, *_, [row]) = read_report(tmp_path)
    assert [list(line.values())[1:] for line in slides[1:]] == [
        [name] + [''] * 12 for name in ('LeNet-5', 'ResNet-32')]
    facts = [fact for fact in re.findall('(--.*?: .*?)[;<]', text.split('<h3>')[1]) if '--bar' not in fact]
    assert facts == ['--dataset: synthetic', '--holdout: 500', '--hidden: 8', '--epochs: 1']  # not as set
    assert slides[0]['Accuracy'] == f"{row['Validation (%)']} %"
    assert slides[0]['Model'] == (
        'MLP (held-out images) (NOT CIFAR-10) (hidden 8, normalization batch, dropout 0.2)')
    assert slides[0]['LR decay'] == 'cosine (warmup of 2 epochs)'


def test_runs_that_differ_only_in_their_seed_are_one_row_wherever_they_lie_and_stop(tmp_path):
    results, bests, setting = tmp_path / 'results', [60.0, 62.5, 61.0], SETTINGS['lenet5']
    # The whole training, and two that early stopping ended
    for seed, (name, epochs) in enumerate([('lenet5', setting.epochs), ('deep/er/x', 51),
                                            ('seeds/lenet5-1', 90)]):
        record(results / name, replace(setting, seed=seed), [bests[seed]] + [5.0] * (epochs - 1))
    record(results / 'other', replace(setting, seed=2, warmup=3.0, epochs=9), [61.0] * 9)
    record(results / 'lenet5-2', setting, [10.0] * 50)  # it is not finished: no seed, and no rerun
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and 'repeats' not in done.stdout, done.stderr
    text, tables = read_report(tmp_path)
    mean, deviation = statistics.mean(bests), statistics.stdev(bests)
    assert list(tables[0][1].values())[-3:] == ['5.0, 0.8, 1.5', '1, 1, 1',
                                                f'{mean:.2f} ± {deviation:.2f} % (3 seeds)']
    assert re.findall('<h3>(.*?)</h3>', text) == ['lenet5-2', 'other']  # and no group of the settings'
    assert '--warmup: 3.0; ' in text


def test_a_run_by_the_name_of_its_model_is_in_the_slides_table_whatever_repeats_it(tmp_path):
    for name in 'a', 'mlp':
        record(tmp_path / 'results' / name, replace(SETTINGS['mlp'], epochs=1), [50.0])
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert f"{Path('results/a')} repeats {Path('results/mlp')}" in done.stdout
    assert read_report(tmp_path)[1][0][0]['Accuracy'] == '50.00 %'


@pytest.mark.skipif("os.name == 'nt'", reason="it allows no such names")
def test_markup_in_texts_and_names_stays_text(tmp_path):
    for name, hidden in {'mlp': 8, 'rerun <b>&': 8, 'other <b>&': 9, 'group <b>&/x': 9, 'read/x': 9}.items():
        record(tmp_path / 'results' / name, replace(SETTINGS['mlp'], epochs=1, hidden=(hidden,)), [50.0])
    (tmp_path / 'results' / 'README.md').write_text('Summary <b>&')
    (tmp_path / 'results' / 'read' / 'README.md').write_text('# Head <b>&\n\nText <b>&\n\n    command <b>&')
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0, done.stderr
    text, _ = read_report(tmp_path)
    assert '<b>' not in text and not re.search('&(?!amp;|lt;|gt;|#x27;|quot;)', text)
    for word in 'rerun', 'other', 'group', 'Summary', 'Head', 'Text', 'command':
        assert f'{word} &lt;b&gt;&amp;' in text


def test_a_run_without_standardization_is_measured_without_it(tmp_path, few_images):
    done = script(tmp_path, 'CIFAR10_train.py --model lenet5 --dataset synthetic --epochs 2 --batch-size 10 '
                            '--activation relu --standardization off')
    model = LeNet5_model()
    model.load_state_dict(torch.load(tmp_path / 'results' / 'lenet5' / 'best.pt')['model_state_dict'])
    assert f'{accuracy_of(model, 100, (0, 0, 0), (1, 1, 1))} % recomputed' in done.stdout


@pytest.mark.parametrize('form', ['bare', 'assignment', 'data_parallel'])
def test_weights_saved_by_the_assignments_code_evaluate(form, tmp_path):
    model = LeNet5_model()
    prefix = 'module.' if form == 'data_parallel' else ''
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({'epoch': 3, 'model_state_dict': state} if form == 'assignment' else state, tmp_path / 'w.pth')
    done = script(tmp_path, 'CIFAR10_evaluation.py --model lenet5 --weights w.pth --dataset synthetic')
    wanted = f'{accuracy_of(model)} % of the 1,000 test images'
    assert done.returncode == 0 and wanted in done.stdout, done.stderr


class Malicious:
    def __reduce__(self):
        return open, ('owned', 'w')


def test_weights_that_do_not_fit_or_are_not_safe_are_refused_in_one_sentence(tmp_path):
    resnet = ResNet32_model().state_dict()
    wide = {**resnet, 'layers_4n.0.conv1.weight': torch.zeros(32, 16, 5, 5)}
    for file, content in (('resnet.pt', resnet), ('wide.pt', wide), ('evil.pt', [Malicious()])):
        torch.save(content, tmp_path / file)
    (tmp_path / 'empty.pt').write_bytes(b'')
    for model, file, said in (('lenet5', 'resnet.pt', 'conv1.bias'),  # the first that does not fit
                              ('resnet32', 'wide.pt', 'layers_4n.0.conv1.weight'), ('lenet5', 'evil.pt', ''),
                              ('lenet5', 'empty.pt', ''), ('lenet5', 'missing.pt', '')):
        done = script(tmp_path, f'CIFAR10_evaluation.py --model {model} --weights {file} --dataset synthetic')
        assert done.returncode == 2 and file in done.stderr and said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / 'owned').exists()


def test_predict_names_the_class_of_each_picture_by_the_weights_that_are_asked(trained, tmp_path):
    shutil.copy(trained[0] / 'results' / 'lenet5' / 'best.pt', tmp_path / 'mine.pt')
    torch.save(LeNet5_model().state_dict(), tmp_path / 'bare.pt')
    picture = synthetic.generate(train=False)[0][0].repeat_interleave(5, 1).repeat_interleave(7, 2)
    to_pil_image(picture).save(tmp_path / 'a b.png')
    to_pil_image(picture[:1]).save(tmp_path / 'grey.jpg')
    (tmp_path / 'text.png').write_text('no picture')
    own, bare = (script(tmp_path, f'CIFAR10_evaluation.py --model lenet5 --weights {weights} '
                                  '--predict "a b.png" text.png --predict grey.jpg').stdout.splitlines()
                 for weights in ('mine.pt', 'bare.pt'))
    assert [line.split(': ')[0] for line in own] == ['a b.png', 'text.png', 'grey.jpg']
    assert 'not a picture that can be read' in own[1] and not (tmp_path / 'results').exists()
    for line, names in (*((own[i], synthetic.CLASSES) for i in (0, 2)), (bare[0], CLASSES['cifar10'])):
        assert any(f': {name}, ' in line for name in names) and '% sure' in line
    named = script(trained[0], f'CIFAR10_evaluation.py --name lenet5 --predict "{tmp_path / "a b.png"}"')
    assert named.stdout.split(': ')[1].split(' (')[0] == own[0].split(': ')[1].split(' (')[0]
    assert named.returncode == 0


@pytest.mark.parametrize('options', [
    '--weights w.pt --name lenet5', '--weights w.pt --submit 1_Kim', '--predict a.png --submit 1_Kim'])
def test_options_that_cannot_go_together_are_refused(options, tmp_path):
    done = script(tmp_path, f'CIFAR10_evaluation.py {options}')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
    assert any(option in done.stderr for option in options.split() if option.startswith('--'))


def test_weights_that_do_not_give_the_recorded_accuracy_end_with_exit_code_1(trained, tmp_path):
    folder = shutil.copytree(trained[0] / 'results' / 'lenet5', tmp_path / 'results' / 'lenet5')
    for name in 'lenet5', 'results/lenet5/', folder:
        command = f'CIFAR10_evaluation.py --name {shlex.quote(str(name))}'
        done = script(tmp_path, command)
        assert done.returncode == 0 and done.stdout.count(' % recomputed') == 1, done.stderr
    saved = torch.load(folder / 'best.pt')
    saved['model_state_dict']['fc3.weight'].neg_()
    torch.save(saved, folder / 'best.pt')
    for asked in command, 'CIFAR10_evaluation.py', 'CIFAR10_evaluation.py --submit 1_Kim':
        done = script(tmp_path, asked)
        assert done.returncode == 1 and done.stdout.count('which DIFFER') == 1 and 'report' in done.stdout
    (folder / 'best.pt').write_bytes(b'damaged')
    done = script(tmp_path, command)
    assert done.returncode == 1 and 'Not every run is evaluated' in done.stdout


def test_what_is_handed_in_evaluates_and_trains_elsewhere(trained, tmp_path):
    shutil.copytree(trained[0] / 'results', tmp_path / 'own' / 'results')
    results = tmp_path / 'own' / 'results'
    shutil.copytree(results / 'mlp', results / '.ipynb_checkpoints')  # an editor's copy is no run
    if os.name == 'posix':
        (results / 'mlp').rename(tmp_path / 'mlp')
        (results / 'mlp').symlink_to(tmp_path / 'mlp')  # on a larger disk
    command = 'CIFAR10_evaluation.py --name lenet5 --submit 2020123456_Kim'
    done, again = script(tmp_path / 'own', command), script(tmp_path / 'own', f'{command}.zip')
    assert done.returncode == 0 and 'repeats' not in done.stdout, done.stderr
    assert again.returncode == 2 and 'already' in again.stderr
    assert script(tmp_path / 'own', f'{command}/part').returncode == 2
    if os.name == 'posix':
        (results / os.fsdecode(b'\xff.md')).touch()  # of a machine whose names are not in UTF-8
        done = script(tmp_path / 'own', command.replace('Kim', 'Lee'))
        assert done.returncode == 2 and 'rename it' in done.stderr and not list(tmp_path.rglob('*Lee.zip'))
    zipfile.ZipFile(tmp_path / 'own' / '2020123456_Kim.zip').extractall(tmp_path)
    folder = tmp_path / '2020123456_Kim'
    assert not list(folder.rglob('last.pt')) and not (folder / 'results' / '.ipynb_checkpoints').exists()
    for part in ('requirements.txt', 'tests/test_models.py', '.gitignore', '.ci/run', 'results/report.html',
                 'results/mlp/accuracy.png', 'results/mlp/config.json', 'results/mlp/best.pt'):
        assert (folder / part).exists()
    for command in 'evaluation.py --name lenet5', 'train.py --model mlp --dataset synthetic --epochs 1':
        done = process(folder, f"{shlex.quote(str(folder / 'CIFAR10_'))}{command}")  # its own code
        assert done.returncode == 0 and ' % recomputed' in done.stdout, done.stderr
    assert (folder / 'results' / 'mlp-2' / 'history.csv').exists()  # its record is there: it is taken

"""The report, weights from elsewhere, predictions and the archive to hand in."""
import base64
import html
import io
import re
import shlex
import shutil
import statistics
import zipfile
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from conftest import script
from PIL import Image
from torchvision.transforms import Normalize
from torchvision.transforms.functional import to_pil_image

from CIFAR10_configuration import SETTINGS, Epoch, Run
from dataset import CLASSES, synthetic
from LeNet5_model import LeNet5_model
from MLP_model import MLP_model
from ResNet_model import ResNet32_model


def read_report(folder):
    """The report's text, and the cells of each row of its tables."""
    text = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
    return text, [[html.unescape(cell) for cell in re.findall('<td title=".*?">(.*?)</td>', row)]
                  for row in re.findall('<tr.*?>(.*?)</tr>', text)]


def accuracy_on_test_images(model):
    images, labels = synthetic.generate(train=False)
    images = Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))(images / 255)
    return (model(images).argmax(1) == labels).float().mean() * 100


def evaluate_weights(folder, model, file):
    return script(folder, f'CIFAR10_evaluation.py --model {model} --weights {file} --dataset synthetic')


def best(output):
    return re.search(r'Best validation accuracy ([\d.]+ %) at epoch (\d)', output).groups()


def test_report_holds_the_slides_table(trained):
    header, *settings = read_report(trained[0])[1][:4]
    assert header == ['', 'Model', 'GPU (O/X)', 'Batch_size', 'Activation function', 'Weight initialization',
                      'Optimizer', 'Learning rate', 'Momentum', 'Weight decay', 'LR decay',
                      'training time (m)', 'Early stopping epoch', 'Accuracy']
    assert [row[0] for row in settings] == ['Setting #1', 'Setting #2', 'Setting #3']
    gpu, weight_decay = 'O' if torch.cuda.is_available() else 'X', f"{SETTINGS['resnet32'].weight_decay:g}"
    assert settings[2][1:11] == ['ResNet-32 (NOT CIFAR-10)', gpu, '10', 'ReLU', 'He_normal', 'SGD',
                                 '0.1', '0.9', weight_decay, '×0.5 after epoch 1']
    assert [(row[-1], row[-2]) for row in settings] == [best(trained[1][model]) for model in SETTINGS]


def test_report_is_one_file_that_says_it_is_not_cifar10(trained):
    report, _ = read_report(trained[0])
    assert not re.search(r'(src|href)=.(?!data:)', report) and report.count('data:image/png;base64,') >= 6
    first = re.search('<p>Validation accuracy(.*?)</p>', report, re.DOTALL)[1]
    assert first.count('(NOT CIFAR-10)') == first.count(' %') == 3 and '[결과 정리]' in report
    _, *recomputed = re.findall('<td title="Recomputed[^>]*>([^<]*)</td>', report)
    assert [f'{number} %' for number in recomputed] == [best(trained[1][model])[0] for model in SETTINGS]


class Pictures(HTMLParser):
    def handle_starttag(self, tag, attributes):
        if tag == 'img':
            self.found = [*getattr(self, 'found', []), dict(attributes)]


def test_every_picture_has_its_png_in_src_at_half_its_size(trained):
    parser = Pictures()
    parser.feed(read_report(trained[0])[0])
    assert len(parser.found) >= 6
    for picture in parser.found:
        png = base64.b64decode(picture['src'].removeprefix('data:image/png;base64,'))
        with Image.open(io.BytesIO(png)) as image:  # a CSS pixel has two of a dense screen
            assert int(picture['width']) == image.width // 2 > 100
        assert picture['alt'] and 'srcset' not in picture and 'height' not in picture


def test_a_report_without_any_runs_is_refused(tmp_path):
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 2 and done.stderr.startswith('There are no readable runs in ')
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_holdout_run_looks_at_the_test_images_once_and_settings_that_have_not_run_are_empty(tmp_path):
    script(tmp_path, 'CIFAR10_train.py --model mlp --hidden 8 --dataset synthetic --epochs 1 --holdout 500')
    rows = read_report(tmp_path)[1]
    assert [row[1:] for row in rows[2:4]] == [[name] + [''] * 12 for name in ('LeNet-5', 'ResNet-32')]
    row = dict(zip(*rows[-2:], strict=True))  # of the run's own section: what it has other than its setting
    assert {name: value for name, value in row.items() if name.startswith('--')} == {
        '--dataset': 'synthetic', '--holdout': '500', '--hidden': '8', '--epochs': '1'}
    model = MLP_model((8,), normalization='batch')
    model.load_state_dict(torch.load(tmp_path / 'results' / 'mlp' / 'best.pt')['model_state_dict'])
    test_accuracy = accuracy_on_test_images(model.eval())
    assert row['Test (%)'] == f'{test_accuracy:.2f}' and f"{row['Validation (%)']} %" == rows[1][-1]


def record(folder, config, accuracy, epochs=None):
    """Write the record of a finished run, or of so many epochs, of a second each; the first is the best."""
    folder.mkdir(parents=True)
    history = [Epoch(epoch, 0.1, 1, 50, 1, accuracy - (epoch > 1), epoch)
               for epoch in range(1, (epochs or config.epochs) + 1)]
    Run(folder, config, {}, history).write()


def test_runs_that_differ_only_in_their_seed_are_one_row_wherever_they_lie(tmp_path):
    results, accuracies, setting = tmp_path / 'results', [60.0, 62.5, 61.0], SETTINGS['lenet5']
    for seed, name in enumerate(['lenet5', 'seeds/lenet5-1', 'deep/er/x']):
        record(results / name, replace(setting, seed=seed), accuracies[seed])
    record(results / 'other', replace(setting, seed=2, warmup=3.0, epochs=9), 61.0)
    record(results / 'lenet5-2', setting, 10.0, epochs=3)  # it is not finished: no seed, and no rerun
    (results / 'README.md').write_text('Written <by hand>.')
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0, done.stderr
    report, rows = read_report(tmp_path)
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert rows[2][-3:] == ['2.5, 2.5, 2.5', '1, 1, 1', f'{mean:.2f} ± {deviation:.2f} % (3 seeds)']
    assert re.findall('<h3>(.*?)</h3>', report) == ['lenet5-2', 'other']  # and no group of the settings'
    assert dict(zip(*rows[-2:]))['--warmup'] == '3.0' and 'Written &lt;by hand&gt;.' in report
    assert f'alt="accuracy, LeNet-5: {mean:.1f} % in 150 epochs"' in report


def test_the_report_tells_of_each_class_how_often_it_is_taken_for_each(trained):
    rows, names = read_report(trained[0])[1], synthetic.CLASSES
    start = next(i for i, row in enumerate(rows) if row[0] == 'Class')
    table = [dict(zip(rows[start], row, strict=True)) for row in rows[start + 1:start + 11]]
    assert [row['Class'] for row in table] == list(names)
    weights = torch.load(trained[0] / 'results' / 'resnet32' / 'best.pt')['model_state_dict']
    (model := ResNet32_model()).load_state_dict(weights)
    images, labels = (tensor[:100] for tensor in synthetic.generate(train=False))  # it saw these alone
    images = Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))(images / 255)
    predicted = model.eval()(images).argmax(1)
    for true, row in enumerate(table):
        for other, name in enumerate(names):
            share = (predicted[labels == true] == other).float().mean() * 100
            assert row[f'as {name} (%)'] == f'{share:.2f}'
            if other == true:
                assert row['ResNet-32 (NOT CIFAR-10) (%)'] == f'{share:.2f}'


@pytest.mark.parametrize('form', ['bare', 'assignment', 'data_parallel', 'compiled'])
def test_weights_saved_by_the_assignments_code_evaluate(form, tmp_path):
    model = LeNet5_model()
    prefix = {'data_parallel': 'module.', 'compiled': '_orig_mod.'}.get(form, '')
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({'epoch': 3, 'model_state_dict': state} if form == 'assignment' else state, tmp_path / 'w.pth')
    done = evaluate_weights(tmp_path, 'lenet5', 'w.pth')
    wanted = f'{accuracy_on_test_images(model):.2f} % of the 1,000 validation images'
    assert done.returncode == 0 and wanted in done.stdout, done.stderr


def test_weights_of_another_network_than_the_slides_bring_their_configuration(trained, tmp_path):
    shutil.copy(trained[0] / 'results' / 'mlp' / 'best.pt', tmp_path / 'mine.pt')  # hidden 64, batch norm
    done = evaluate_weights(tmp_path, 'mlp', 'mine.pt')
    assert done.returncode == 0 and best(trained[1]['mlp'])[0] in done.stdout, done.stderr


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
        done = evaluate_weights(tmp_path, model, file)
        assert done.returncode == 2 and file in done.stderr and said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / 'owned').exists()


def test_predict_names_the_class_of_any_picture(trained):
    picture = synthetic.generate(train=False)[0][0].repeat_interleave(5, 1).repeat_interleave(7, 2)
    to_pil_image(picture).save(trained[0] / 'a b.png')
    to_pil_image(picture[:1]).save(trained[0] / 'grey.jpg')
    (trained[0] / 'text.png').write_text('no picture')
    done = script(trained[0], 'CIFAR10_evaluation.py --predict "a b.png" text.png grey.jpg')
    first, second, third = done.stdout.splitlines()
    assert any(name in first for name in synthetic.CLASSES) and '% sure' in first and 'NOT CIFAR-10' in third
    assert 'text.png: not a picture that can be read' in second


def test_predict_asks_the_weights_that_are_named_and_all_pictures_of_several_options(trained, tmp_path):
    shutil.copy(trained[0] / 'results' / 'lenet5' / 'best.pt', tmp_path / 'mine.pt')
    torch.save(LeNet5_model().state_dict(), tmp_path / 'bare.pt')
    for name in 'a.png', 'b.png':
        to_pil_image(synthetic.generate(train=False)[0][0]).save(tmp_path / name)
    own = script(tmp_path, 'CIFAR10_evaluation.py --model lenet5 --weights mine.pt '
                           '--predict a.png --predict b.png')
    lines = own.stdout.splitlines()
    assert [line[:7] for line in lines] == ['a.png: ', 'b.png: '] and not (tmp_path / 'results').exists()
    assert all('mine.pt' in line and any(name in line for name in synthetic.CLASSES) for line in lines)
    by_name = script(trained[0], f'CIFAR10_evaluation.py --name lenet5 --predict "{tmp_path / "a.png"}"')
    assert by_name.stdout.split(': ')[1].split(' (')[0] == lines[0].split(': ')[1].split(' (')[0]
    bare = script(tmp_path, 'CIFAR10_evaluation.py --model lenet5 --weights bare.pt --predict a.png')
    assert any(f': {name}, ' in bare.stdout for name in CLASSES['cifar10'])


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
        assert 'DIFFER' not in done.stdout
    saved = torch.load(folder / 'best.pt')
    saved['model_state_dict']['fc3.weight'].neg_()
    torch.save(saved, folder / 'best.pt')
    for asked in command, 'CIFAR10_evaluation.py', 'CIFAR10_evaluation.py --submit 1_Kim':
        done = script(tmp_path, asked)
        assert done.returncode == 1 and done.stdout.count('which DIFFER') == 1 and 'report' in done.stdout
    (folder / 'best.pt').write_bytes(b'damaged')
    done = script(tmp_path, command)
    assert done.returncode == 1 and 'Not every run is evaluated' in done.stdout


def test_submit_writes_the_whole_code_and_the_report_once(trained):
    command = 'CIFAR10_evaluation.py --name lenet5 --submit 2020123456_Kim'
    done, again = script(trained[0], command), script(trained[0], command)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(trained[0] / '2020123456_Kim.zip').namelist()
    for file in ('CIFAR10_train.py', 'ResNet_model.py', 'dataset/__init__.py', 'report.html', 'README.md',
                 'requirements.txt', 'tests/test_models.py'):
        assert f'2020123456_Kim/{file}' in names
    assert again.returncode == 2 and 'already' in again.stderr

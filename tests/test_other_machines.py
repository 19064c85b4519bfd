"""Files, disks, consoles and habits of other people: what works here also works with theirs."""
import argparse
import errno
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, process, rows, script
from PIL import Image
from torchvision.datasets import CIFAR10

import CIFAR10_configuration
import CIFAR10_evaluation
from CIFAR10_configuration import SETTINGS, Run, UserError, parse_configuration
from CIFAR10_evaluation import read_picture
from dataset import CLASSES, data_load, read_cifar10
from LeNet5_model import LeNet5_model

SMALL = 'CIFAR10_train.py --model mlp --hidden 8 --dataset synthetic'


@pytest.fixture
def red(tmp_path):
    """A red picture in JPEG whose name ends in .png."""
    Image.new('RGB', (50, 40), (200, 10, 10)).save(tmp_path / 'a.jpg')
    return (tmp_path / 'a.jpg').rename(tmp_path / 'a.png')


def test_the_content_of_a_picture_decides_not_its_name(red):
    r, g, b = read_picture(red).float().mean((1, 2))
    assert r > 190 and g < 20 and b < 20


def icon(mode):
    """A black square on a transparent ground, which is black or pink where the transparency is ignored."""
    image = Image.new('RGBA', (64, 64), (255, 0, 255, 0))
    image.paste((0, 0, 0, 255), (16, 16, 48, 48))
    if mode == 'RGB':  # one colour that means transparent
        return image.convert('RGB'), dict(transparency=(255, 0, 255))
    if mode.startswith('P'):  # one colour of the palette, or a transparency for each of them
        palette = image.convert('RGB').quantize(2)
        clear = palette.getpixel((0, 0))
        return palette, dict(transparency=clear if mode == 'P' else bytes([255 * clear, 255 - 255 * clear]))
    return image.convert(mode), {}


@pytest.mark.parametrize('mode, suffix', [*((mode, 'png') for mode in ('RGBA', 'LA', 'P', 'P bytes', 'RGB')),
                                          *(('RGBA', suffix) for suffix in ('webp', 'gif', 'tif'))])
def test_transparency_is_shown_over_white_as_a_viewer_does(mode, suffix, tmp_path):
    image, options = icon(mode)
    image.save(tmp_path / f'icon.{suffix}', lossless=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = read_picture(tmp_path / f'icon.{suffix}')
    assert found[:, 0, 0].min() > 250 and found[:, 16, 16].max() < 5


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK', 'YCbCr', 'I'])
def test_every_mode_shows_the_same_ramp(mode, tmp_path):
    ramp = np.tile(np.linspace(0, 255, 320), (320, 1))
    image = Image.fromarray(ramp.astype('u1')).convert(mode)
    file = tmp_path / ('ramp.jpg' if mode == 'YCbCr' else 'ramp.tif')
    image.save(file)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = read_picture(file).float().mean((0, 1))
    assert found.numpy() == pytest.approx(np.linspace(4, 251, 32), abs=20 if mode == '1' else 4)


def run(folder, source, name, accuracy, age=0, processor=None, **changes):
    """A copy of the run in source under that name, with another accuracy, age, processor and options."""
    made = Run.read(shutil.copytree(source, folder / 'results' / name))
    made.config, made.machine = replace(made.config, **changes), {**made.machine, 'processor': processor}
    made.history = [made.history[0]._replace(epoch=epoch, val_accuracy=accuracy)
                    for epoch in range(1, made.config.epochs + 1)]  # all of them, as it is finished
    made.write()
    os.utime(made.folder / 'config.json', (1e9 - age, 1e9 - age))


@pytest.fixture
def lenet5(trained, tmp_path):
    """A folder of its own with a trained LeNet-5 in it, and the run's."""
    return tmp_path, shutil.copytree(trained[0] / 'results' / 'lenet5', tmp_path / 'results' / 'lenet5')


def test_predict_finds_what_a_pattern_matches_and_names_what_is_missing(lenet5, red):
    for name in ('b.png', 'c[1].png', 'c1.png'):
        shutil.copy(red, red.with_name(name))
    done = script(lenet5[0], 'CIFAR10_evaluation.py --predict [ab].png c[1].png no.png n*.jpg')
    lines = done.stdout.splitlines()
    assert [line.split(': ')[0] for line in lines] == ['a.png', 'b.png', 'c[1].png', 'no.png', 'n*.jpg']
    assert all('% sure' in line for line in lines[:3])
    assert all('not a picture that can be read' in line and 'No such file' in line for line in lines[3:])


def test_predict_asks_the_best_run_on_cifar10_and_a_synthetic_one_only_by_name(lenet5, red):
    run(*lenet5, 'real', 0.5, dataset='cifar10')
    weights = lenet5[0] / 'results' / 'real' / 'best.pt'
    saved = torch.load(weights)
    saved['configuration']['dataset'] = 'cifar10'
    torch.save(saved, weights)
    done = script(lenet5[0], 'CIFAR10_evaluation.py --predict a.png')
    assert done.stdout.split(': ')[1].split(',')[0] in CLASSES['cifar10']
    done = script(lenet5[0], 'CIFAR10_evaluation.py --predict a.png --name lenet5')
    assert 'NOT CIFAR-10' in done.stdout


STATE = LeNet5_model().state_dict()
ADAM = torch.optim.Adam([torch.ones(3, requires_grad=True)]).state_dict()
FORMS = {
    'kuangliu': dict(net=STATE, acc=90.5, epoch=3),
    'imagenet': dict(optimizer=ADAM, best_prec1=torch.tensor(9.0),
                     state_dict={f'module.{name}': value for name, value in STATE.items()}),
    'lightning': dict(state_dict={f'model.{name}': value for name, value in STATE.items()}),
    'name of the net': dict(net='lenet5', state_dict=None, model=STATE),
    'lightly': dict(state_dict={f'backbone.{name}': value for name, value in STATE.items()}),
    'configuration None': dict(configuration=None, model_state_dict=STATE),
    'configuration list': dict(configuration=['lenet5'], model_state_dict=STATE),
    'configuration wrong': dict(configuration=dict(activation=3), model_state_dict=STATE)}


@pytest.mark.parametrize('form', FORMS)
def test_weights_are_found_wherever_a_file_has_them(form, tmp_path, monkeypatch, few_images):
    torch.save(STATE, tmp_path / 'plain.pt')
    torch.save(FORMS[form], tmp_path / 'other.pt')
    command = 'CIFAR10_evaluation.py --model lenet5 --dataset synthetic --weights'
    plain = script(tmp_path, f'{command} plain.pt')
    loads, load = [], torch.load
    monkeypatch.setattr(torch, 'load', lambda file, **options: loads.append(file) or load(file, **options))
    other = script(tmp_path, f'{command} other.pt')
    assert other.returncode == 0 and len(loads) == 1, other.stderr
    assert other.stdout == plain.stdout.replace('plain', 'other')


SPOILED = {'whole model': LeNet5_model(), 'arguments': dict(net=STATE, args=argparse.Namespace(lr=0.1)),
           'numpy': dict(net=STATE, losses=np.array([1.0])), 'path': dict(net=STATE, file=Path('x'))}


@pytest.mark.parametrize('form', [*SPOILED, 'protocol 4', 'list', 'text'])
def test_more_than_weights_in_a_file_is_told_with_how_to_save_them(form, tmp_path, few_images):
    content = SPOILED | {'protocol 4': STATE, 'list': [STATE], 'text': 'x'}
    torch.save(content[form], tmp_path / 'w.pt', pickle_protocol=4 if form == 'protocol 4' else 2)
    done = script(tmp_path, 'CIFAR10_evaluation.py --model lenet5 --dataset synthetic --weights w.pt')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert 'w.pt' in done.stderr and 'torch.save(model.state_dict(), ' in done.stderr


def test_our_own_last_checkpoint_is_measured(lenet5):
    done = script(lenet5[0], 'CIFAR10_evaluation.py --model lenet5 --dataset synthetic '
                             '--weights results/lenet5/last.pt')
    accuracy = float(rows(lenet5[1])[-1]['val_accuracy'])
    assert done.returncode == 0 and f'{accuracy:.2f} %' in done.stdout, done.stderr


@pytest.mark.skipif(os.name == 'nt', reason="POSIX locks")
@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF])
def test_training_goes_on_where_the_file_system_has_no_locks(number, tmp_path, monkeypatch, few_images):
    monkeypatch.setattr('fcntl.flock', Mock(side_effect=OSError(number, os.strerror(number))))
    file = tmp_path / 'results' / 'mlp' / 'lock'
    file.parent.mkdir(parents=True)
    file.write_text("somebody's own")
    done = script(tmp_path, f'{SMALL} --epochs 1')
    assert done.returncode == 0 and file.read_text() == "somebody's own", done.stderr


def refuse(monkeypatch, name, times):
    """Let os.replace refuse a file of that name so many times, as Windows does while it is open."""
    replace, left = os.replace, [times]

    def refused(source, target):
        if Path(target).name == name and left[0] > 0:
            left[0] -= 1
            raise PermissionError(errno.EACCES, 'Access is denied')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', refused)
    monkeypatch.setattr(CIFAR10_configuration.time, 'sleep', lambda _: None)


@pytest.mark.usefixtures('few_images')
@pytest.mark.parametrize('name', ['best.pt', 'last.pt', 'history.csv', 'config.json'])
def test_a_file_open_elsewhere_is_tried_again(name, tmp_path, monkeypatch):
    refuse(monkeypatch, name, 30)
    done = script(tmp_path, f'{SMALL} --epochs 2')
    assert done.returncode == 0 and not list(tmp_path.rglob('*.part')), done.stderr
    assert [row['epoch'] for row in rows(tmp_path / 'results' / 'mlp')] == ['1', '2']


def test_a_file_open_for_longer_is_named_and_the_same_command_goes_on(tmp_path, few_images):
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, 'history.csv', 1000)
        done = script(tmp_path, f'{SMALL} --epochs 2')
    assert done.returncode == 2 and 'history.csv' in done.stderr and len(done.stderr.splitlines()) == 1
    done = script(tmp_path, f'{SMALL} --epochs 2')
    assert done.returncode == 0 and 'Continuing mlp after epoch 0' in done.stdout
    assert len(rows(tmp_path / 'results' / 'mlp')) == 2 and not (tmp_path / 'results' / 'mlp-2').exists()


def test_data_dir_may_be_in_the_home_folder_or_the_images_or_a_link_to_them(small_cifar10, monkeypatch):
    for name in ('HOME', 'USERPROFILE'):
        monkeypatch.setenv(name, str(small_cifar10.parent))
    _, options = parse_configuration(['--data-dir', f'~/{small_cifar10.name}'])
    assert Path(options.data_dir) == small_cifar10
    images, forms = small_cifar10 / 'cifar-10-batches-py', ['../cifar-10-batches-py/', '.']
    monkeypatch.chdir(images)
    if os.name != 'nt':  # where links need rights
        forms.append(small_cifar10.parent / 'cifar-10-batches-py')
        forms[-1].symlink_to(images)
    for itself in [images, *forms]:
        assert len(data_load('cifar10', itself, urls=())[0]) == 100


def test_several_first_runs_over_one_archive_each_get_whole_images(small_cifar10):
    shutil.rmtree(small_cifar10 / 'cifar-10-batches-py')
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda train: read_cifar10(small_cifar10, train, ()), [True, False] * 20))
    assert [len(images) for images, _ in found] == [100, 20] * 20
    # Nothing is left of the unpacking
    assert {file.name for file in small_cifar10.iterdir()} == {'cifar-10-batches-py', CIFAR10.filename}


def test_a_zip_takes_files_from_before_1980_but_no_hidden_ones_and_leaves_no_part(lenet5, monkeypatch):
    folder, submit = lenet5[0], 'CIFAR10_evaluation.py --name lenet5 --submit 2020123456_Kim'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, 'write', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script(folder, submit)
    assert not list(folder.glob('2020*'))
    (folder / 'code' / 'dataset').mkdir(parents=True)
    (folder / 'code' / '._x.py').write_bytes(b'')
    (folder / 'code' / 'dataset' / '._y.py').write_bytes(b'')
    if os.name != 'nt':  # where links need rights: an editor's lock
        (folder / 'code' / '.#CIFAR10_train.py').symlink_to('me@host.1:17')
    os.utime(shutil.copy(ROOT / 'README.md', folder / 'code'), (0, 0))  # the start of 1970
    monkeypatch.setattr(CIFAR10_evaluation, '__file__', str(folder / 'code' / 'CIFAR10_evaluation.py'))
    done = script(folder, submit)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(folder / '2020123456_Kim.zip').namelist()
    assert sorted(names) == ['2020123456_Kim/README.md', '2020123456_Kim/report.html']


@pytest.mark.parametrize('name', ['con', 'NUL', 'aux', 'prn', 'com1', 'LPT9', 'com¹', 'nul.txt', 'aux.a.b',
                                  'README.md', 'report.html'])
def test_names_that_windows_or_the_report_reserve_are_refused(name, tmp_path):
    for command in (f'CIFAR10_train.py --name {name}', f'CIFAR10_evaluation.py --submit {name}'):
        done = script(tmp_path, command)
        assert done.returncode == 2 and 'use letters, digits' in done.stderr and not list(tmp_path.iterdir())


def test_names_that_only_look_reserved_are_allowed():
    for name in ('console', 'com', 'com10', 'nullo', 'a.con', '한글', 'lpt'):
        assert parse_configuration(['--name', name])[1].name == name


EDITED = {
    'blank lines': lambda text: f'{text}\n\n', 'quotes': lambda text: re.sub(r'([^,\n]+)', r'"\1"', text),
    'a mark': lambda text: '\ufeff' + text, "Windows' lines": lambda text: text.replace('\n', '\r\n')}


@pytest.mark.parametrize('change', EDITED)
def test_a_history_is_read_as_an_editor_or_a_spreadsheet_leaves_it(change, lenet5):
    before, history, config = Run.read(lenet5[1]), lenet5[1] / 'history.csv', lenet5[1] / 'config.json'
    text = EDITED[change](history.read_text())
    history.write_bytes(text.encode())
    config.write_bytes(('\ufeff' + config.read_text()).encode())
    assert Run.read(lenet5[1]) == before and all(type(number) is float for number in before.history[0])


@pytest.mark.parametrize('name, change', [('history.csv', lambda text: text.replace(',', ';')),
                                          ('history.csv', lambda text: 'x,' + text.replace('\n', '\nx,')),
                                          ('config.json', lambda text: text.replace('"', '”'))])
def test_a_record_that_a_spreadsheet_or_an_editor_spoiled_is_named(name, change, lenet5):
    file = lenet5[1] / name
    file.write_text(change(file.read_text()), encoding='utf-8')
    with pytest.raises(UserError, match=f'^.*{re.escape(str(lenet5[1]))}.*{name}.*$'):
        Run.read(lenet5[1])


@pytest.mark.parametrize('encoding', ['ascii', 'cp949'])
def test_a_name_that_the_console_lacks_ends_no_run_and_warns_nobody(encoding, tmp_path):
    environment = dict(os.environ, PYTHONIOENCODING=encoding, PYTHONUTF8='0', PYTHONWARNINGS='always')
    command = f'{SMALL} --epochs 1 --name 한글-é'.split()
    done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, env=environment,
                          capture_output=True, timeout=300)
    assert done.returncode == 0 and b'Glyph' not in done.stderr and b'Error' not in done.stderr, done.stderr
    text = done.stdout.decode(encoding)
    assert '1/1' in text and 'report.html' in text and ('한글' in text) == (encoding == 'cp949')
    assert '한글-é' in (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')
    assert (tmp_path / 'results' / '한글-é' / 'accuracy.png').exists()


@pytest.mark.parametrize('encoding, read', [('cp949', False), ('utf-16', False), ('utf-8-sig', True)])
def test_a_text_not_in_utf_8_is_named_and_left_out_as_is_windows_mark(encoding, read, lenet5):
    (lenet5[0] / 'results' / 'README.md').write_text('정확도 Words', encoding=encoding)
    done = script(lenet5[0], 'CIFAR10_evaluation.py')
    assert done.returncode == 0, done.stderr
    text = (lenet5[0] / 'results' / 'report.html').read_text(encoding='utf-8')
    assert ('README.md is left out' in done.stdout) == ('UTF-8' in done.stdout) != read
    assert ('<p>정확도 Words</p>' in text) == ('Words' in text) == read


def test_the_run_with_a_settings_options_is_shown_and_a_rerun_is_no_seed_but_stands_beside_it(lenet5):
    folder, source, epochs = lenet5[0], lenet5[0] / 'source', SETTINGS['lenet5'].epochs
    shutil.move(lenet5[1], source)
    for age, (name, accuracy, seed, changes) in enumerate([
            ('lenet5', 77.0, 0, {}), ('lenet5-2', 77.0, 0, {}), ('lenet5-seed1', 77.4, 1, {}),
            ('lenet5-seed1-2', 70.4, 1, {'processor': 'other'}), ('a-quick-one', 99.0, 0, {'epochs': 3}),
            ('seeds/lenet5-1', 77.5, 1, {})]):
        changes = dict(dataset='cifar10', epochs=epochs, seed=seed) | changes
        run(folder, source, name, accuracy, age, **changes)
    done = script(folder, 'CIFAR10_evaluation.py')
    assert done.returncode == 1 and done.stdout.count('CIFAR-10 is missing') == 1  # it is said once
    text = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
    accuracies, reruns = (re.findall(f'<td title="{title}">([^<]+)</td>', text)[1:]
                          for title in ('Accuracy', 'Reruns'))
    assert accuracies == ['77.20 ± 0.28 % (2 seeds)'] and '<h3>a-quick-one</h3>' in text
    assert reruns[0] == ('lenet5-2 77.00 % (+0.00), lenet5-seed1-2 70.40 % (-7.00), '
                         'seeds/lenet5-1 77.50 % (+0.10)')
    assert f"lenet5 was repeated: {reruns[0]}.\n" in done.stdout


def test_a_users_matplotlibrc_and_a_notebooks_backend_change_no_figure(lenet5, monkeypatch):
    figure = lenet5[1] / 'loss.png'
    process(lenet5[0], 'CIFAR10_evaluation.py')
    before = figure.read_bytes()
    (lenet5[0] / 'rc').write_text('lines.linewidth: 9\nsavefig.dpi: 50')
    monkeypatch.setenv('MATPLOTLIBRC', 'rc')
    monkeypatch.setenv('MPLBACKEND', 'one of a notebook that is not here')
    done = process(lenet5[0], 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and figure.read_bytes() == before, done.stderr


@pytest.mark.parametrize('name', ['accuracy.png', 'loss.png'])
def test_a_figure_that_is_open_elsewhere_costs_no_report(name, lenet5, monkeypatch):
    refuse(monkeypatch, name, 1000)
    done = script(lenet5[0], 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and name in done.stdout, done.stderr
    assert (lenet5[0] / 'results' / 'report.html').exists()


def test_a_class_without_validation_images_has_no_accuracy(tmp_path, few_images):
    done = script(tmp_path, f'{SMALL} --batch-size 5 --epochs 1 --holdout 5')
    text = (tmp_path / 'results' / 'mlp' / 'evaluation.json').read_text()
    assert done.returncode == 0 and text.count('NaN') == 10 * 5, done.stderr


def test_three_epochs_at_chance_are_told_once(tmp_path):
    done = script(tmp_path, f'{SMALL} --activation sigmoid --normalization none --learning-rate 1e-9 '
                            '--epochs 4')
    before, _ = done.stdout.split('no better than chance')  # it is there once
    assert done.returncode == 0 and 'epoch 3/4' in before and 'epoch 4/4  train' not in before


def test_an_nvidia_gpu_that_pytorch_cannot_use_is_told(tmp_path, monkeypatch, few_images):
    monkeypatch.setattr(shutil, 'which', {'nvidia-smi': '/usr/bin/nvidia-smi'}.get)
    monkeypatch.setattr(torch.version, 'cuda', None)
    done = script(tmp_path, f'{SMALL} --epochs 1')
    assert done.returncode == 0 and done.stdout.count('built without CUDA') == 1
    monkeypatch.setattr(shutil, 'which', lambda _: None)
    assert 'CUDA' not in script(tmp_path, f'{SMALL} --epochs 2').stdout


def test_more_processes_than_gpus_get_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(UserError, match='--nproc-per-node 1'):
        CIFAR10_evaluation.choose_device('cuda')

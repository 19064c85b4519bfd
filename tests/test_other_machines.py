"""Files, disks, consoles and habits of other people: what works here also works with theirs."""

import csv
import errno
import html
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, killed, rows, script
from matplotlib.figure import Figure
from PIL import Image

import CIFAR10_configuration
import CIFAR10_evaluation
from CIFAR10_configuration import SETTINGS, Run, UserError, parse_configuration
from dataset import CLASSES, data_load, download, read_cifar10
from LeNet5_model import LeNet5_model
from ResNet_model import ResNet32_model

SMALL = ['--model', 'mlp', '--hidden', 8, '--dataset', 'synthetic', '--batch-size', 1000]

# ----------------------------------------------------------------------------------------------------------
# Pictures


def test_the_content_of_a_picture_decides_not_its_name(tmp_path):
    Image.new('RGB', (50, 40), (200, 10, 10)).save(tmp_path / 'a.jpg')
    os.rename(tmp_path / 'a.jpg', tmp_path / 'a.png')
    red, green, blue = CIFAR10_evaluation.read_picture(tmp_path / 'a.png').float().mean((1, 2))
    assert red > 190 and green < 20 and blue < 20


def icon(mode):
    """A black square on a transparent ground, which is black or pink where the transparency is ignored."""
    image = Image.new('RGBA', (64, 64), (255, 0, 255, 0))
    image.paste((0, 0, 0, 255), (16, 16, 48, 48))
    if mode == 'RGB':  # one colour that means transparent
        return image.convert('RGB'), dict(transparency=(255, 0, 255))
    if mode.startswith('P'):  # one colour of the palette, or a transparency for each of them
        palette = image.convert('RGB').quantize(2)
        clear = palette.getpixel((0, 0))
        each = bytes([0, 255] if clear == 0 else [255, 0])
        return palette, dict(transparency=clear if mode == 'P' else each)
    return image.convert(mode), {}


@pytest.mark.parametrize(
    'mode, suffix',
    [(mode, 'png') for mode in ('RGBA', 'LA', 'P', 'P bytes', 'RGB')]
    + [('RGBA', 'webp'), ('RGBA', 'gif'), ('RGBA', 'tif')],
)
def test_transparency_is_shown_over_white_as_a_viewer_does(mode, suffix, tmp_path):
    image, options = icon(mode)
    image.save(tmp_path / f'icon.{suffix}', lossless=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = CIFAR10_evaluation.read_picture(tmp_path / f'icon.{suffix}')
    assert found[:, 0, 0].min() > 250 and found[:, 16, 16].max() < 5


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK', 'YCbCr', 'I', 'I;16', 'I;16B', 'F'])
def test_every_mode_shows_the_same_ramp(mode, tmp_path):
    ramp = np.tile(np.linspace(0, 255, 320), (320, 1))
    if mode in ('I;16', 'I;16B', 'F'):
        image = Image.fromarray((ramp * 257).astype({'I;16': '<u2', 'I;16B': '>u2', 'F': '<f4'}[mode]))
    else:
        image = Image.fromarray(ramp.astype('u1')).convert(mode)
    image.save(tmp_path / 'ramp.tif')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = CIFAR10_evaluation.read_picture(tmp_path / 'ramp.tif').float().mean((0, 1))
    assert found.numpy() == pytest.approx(np.linspace(4, 251, 32), abs=20 if mode == '1' else 4)


@pytest.mark.skipif(sys.platform != 'linux', reason="reads the memory's peak from /proc")
def test_a_huge_photo_takes_less_than_a_gigabyte_and_no_warning(tmp_path):
    file = tmp_path / 'photo.jpg'
    Image.new('RGB', (12_000, 9_000), (10, 200, 10)).save(file)
    code = (
        'from CIFAR10_evaluation import read_picture;'
        f'assert read_picture({str(file)!r})[1].min() > 190;'
        'print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert int(done.stdout) * 1024 < 1e9


def test_predict_finds_what_a_pattern_matches_and_names_what_is_missing(trained, tmp_path, monkeypatch):
    for name in ('a.jpg', 'b.jpg', 'c[1].jpg', 'c1.jpg'):
        Image.new('RGB', (9, 9)).save(tmp_path / name)
    shutil.copytree(trained[0] / 'results', tmp_path / 'results')
    done = script(tmp_path, 'CIFAR10_evaluation.py', '--predict', '[ab].jpg', 'c[1].jpg', 'no.jpg', 'n*.png')
    lines = done.stdout.splitlines()
    assert [line.split(': ')[0] for line in lines] == ['a.jpg', 'b.jpg', 'c[1].jpg', 'no.jpg', 'n*.png']
    assert all('% sure' in line for line in lines[:3]) and all('missing' in line for line in lines[3:])


def test_a_damaged_exif_record_turns_nothing(tmp_path):
    Image.new('RGB', (50, 40), (200, 10, 10)).save(tmp_path / 'a.jpg', exif=b'Exif\0\0no record at all')
    assert CIFAR10_evaluation.read_picture(tmp_path / 'a.jpg')[0].min() > 190


def real(folder, source, name, accuracy, **changes):
    """A run like that in source, but on CIFAR-10 and with that accuracy in both epochs."""
    target = folder / 'results' / name
    shutil.copytree(source, target)
    record = json.loads((target / 'config.json').read_text())
    record['configuration'].update(dataset='cifar10', **changes)
    (target / 'config.json').write_text(json.dumps(record))
    history = [{**row, 'val_accuracy': accuracy} for row in rows(target)]
    with open(target / 'history.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)
    return target


def test_predict_asks_the_best_run_on_cifar10_and_a_synthetic_one_only_by_name(trained, tmp_path):
    shutil.copytree(trained[0] / 'results' / 'lenet5', tmp_path / 'results' / 'synthetic')
    Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
    real(tmp_path, trained[0] / 'results' / 'lenet5', 'real', 0.5)
    done = script(tmp_path, 'CIFAR10_evaluation.py', '--predict', 'a.png')
    assert done.stdout.split(': ')[1].split(',')[0] in CLASSES['cifar10']
    done = script(tmp_path, 'CIFAR10_evaluation.py', '--predict', 'a.png', '--name', 'synthetic')
    assert 'NOT CIFAR-10' in done.stdout


# ----------------------------------------------------------------------------------------------------------
# Weights


def old_numpy(file):
    """Rename NumPy's function in a file to what it was called before NumPy 2."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, 'w') as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))


FORMS = {
    'kuangliu': lambda state: dict(net=state, acc=np.float64(90.5), epoch=3),
    'old NumPy': lambda state: dict(net=state, acc=np.float64(90.5), epoch=3),
    'numbers': lambda state: dict(a=np.float32(1), b=np.int64(2), c=np.bool_(True), d=np.uint8(1), net=state),
    'imagenet': lambda state: dict(
        optimizer=torch.optim.Adam([torch.ones(3, requires_grad=True)]).state_dict(),
        best_prec1=torch.tensor(9.0),
        state_dict={f'module.{name}': value for name, value in state.items()},
    ),
    'lightning': lambda state: dict(state_dict={f'model.{name}': value for name, value in state.items()}),
    'deep': lambda state: dict(checkpoint=dict(models=[dict(weights=state), 3])),
    'list': lambda state: [[torch.ones(1)] * 99, state, 3],
    'a teacher and a log': lambda state: dict(
        teacher=ResNet32_model().state_dict(), log={f'{i}': torch.ones(1) for i in range(99)}, student=state
    ),
    'lightly': lambda state: dict(state_dict={f'backbone.{name}': value for name, value in state.items()}),
    'configuration None': lambda state: dict(configuration=None, model_state_dict=state),
    'configuration list': lambda state: dict(configuration=['lenet5'], model_state_dict=state),
    'configuration wrong': lambda state: dict(configuration=dict(activation=3), model_state_dict=state),
}


@pytest.mark.parametrize('form', FORMS)
def test_weights_are_found_wherever_a_file_has_them(form, tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = LeNet5_model().state_dict()
    weights = ['--model', 'lenet5', '--dataset', 'synthetic', '--weights']
    torch.save(state, tmp_path / 'plain.pt')
    torch.save(FORMS[form](state), tmp_path / 'other.pt')
    if form == 'old NumPy':
        old_numpy(tmp_path / 'other.pt')
    plain = script(tmp_path, 'CIFAR10_evaluation.py', *weights, 'plain.pt')
    loads, load = [], torch.load
    monkeypatch.setattr(torch, 'load', lambda file, **options: loads.append(file) or load(file, **options))
    other = script(tmp_path, 'CIFAR10_evaluation.py', *weights, 'other.pt')
    assert other.returncode == 0 and len(loads) == 1, other.stderr
    assert other.stdout == plain.stdout.replace('plain', 'other')


def test_our_own_last_checkpoint_is_measured(trained, tmp_path):
    last = trained[0] / 'results' / 'mlp' / 'last.pt'
    done = script(
        tmp_path, 'CIFAR10_evaluation.py', '--model', 'mlp', '--dataset', 'synthetic', '--weights', last
    )
    accuracy = float(rows(last.parent)[-1]['val_accuracy'])
    assert done.returncode == 0 and f'{accuracy:.2f} %' in done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------
# Disks


@pytest.mark.skipif(os.name == 'nt', reason="POSIX locks")
@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF])
def test_training_goes_on_where_the_file_system_has_no_locks(number, tmp_path, monkeypatch, few_images):
    import fcntl

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    (tmp_path / 'results' / 'mlp').mkdir(parents=True)
    (tmp_path / 'results' / 'mlp' / 'lock').write_text("somebody's own")
    done = script(tmp_path, 'CIFAR10_train.py', *SMALL, '--epochs', 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'results' / 'mlp' / 'lock').read_text() == "somebody's own"


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


@pytest.mark.parametrize('name', ['best.pt', 'last.pt', 'history.csv'])
def test_a_file_that_is_open_elsewhere_is_tried_again(name, tmp_path, monkeypatch, few_images):
    refuse(monkeypatch, name, 5)
    done = script(tmp_path, 'CIFAR10_train.py', *SMALL, '--epochs', 1)
    assert done.returncode == 0 and not list(tmp_path.rglob('*.part')), done.stderr
    assert "can't be written now" not in done.stdout


def test_a_history_that_stays_open_is_said_once_and_written_later(tmp_path, monkeypatch, few_images):
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, 'history.csv', 62)  # two epochs of 31 tries
        done = script(tmp_path, 'CIFAR10_train.py', *SMALL, '--epochs', 3)
    assert done.returncode == 0 and done.stdout.count('can\'t be written now') == 1, done.stderr
    assert [row['epoch'] for row in rows(tmp_path / 'results' / 'mlp')] == ['1', '2', '3']


def test_a_history_that_is_open_at_the_end_is_named_and_the_same_command_writes_it(
    tmp_path, monkeypatch, few_images
):
    command = ['CIFAR10_train.py', *SMALL, '--epochs', 2]
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, 'history.csv', 1000)
        done = script(tmp_path, *command)
    assert done.returncode == 2 and 'history.csv' in done.stderr and len(done.stderr.splitlines()) == 1
    done = script(tmp_path, *command)
    assert done.returncode == 0 and 'Continuing mlp at epoch 2' in done.stdout
    assert len(rows(tmp_path / 'results' / 'mlp')) == 2 and not (tmp_path / 'results' / 'mlp-2').exists()


def test_data_dir_may_be_the_home_folder_or_the_images_themselves(small_cifar10, monkeypatch):
    for name in ('HOME', 'USERPROFILE'):
        monkeypatch.setenv(name, str(small_cifar10.parent))
    _, options = parse_configuration(['--data-dir', f'~/{small_cifar10.name}'])
    assert Path(options.data_dir) == small_cifar10
    monkeypatch.chdir(small_cifar10 / 'cifar-10-batches-py')
    for itself in (small_cifar10 / 'cifar-10-batches-py', '../cifar-10-batches-py/', '.'):
        assert len(data_load('cifar10', itself, urls=())[0]) == 100


@pytest.mark.skipif(os.name == 'nt', reason="links need rights on Windows")
def test_data_dir_may_be_a_link_to_the_images(small_cifar10, tmp_path):
    os.rename(small_cifar10 / 'cifar-10-batches-py', tmp_path / 'elsewhere')
    (small_cifar10 / 'cifar-10-batches-py').symlink_to(tmp_path / 'elsewhere')
    assert len(data_load('cifar10', small_cifar10 / 'cifar-10-batches-py', urls=())[0]) == 100


@pytest.mark.parametrize('locks', [True, False])
def test_several_first_runs_over_one_archive_each_get_whole_images(locks, small_cifar10, monkeypatch):
    if not locks:
        monkeypatch.setattr(download, 'lock', lambda *_, **__: io.StringIO())
    shutil.rmtree(small_cifar10 / 'cifar-10-batches-py')
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda train: read_cifar10(small_cifar10, train, ()), [True, False] * 20))
    assert [len(images) for images, _ in found] == [100, 20] * 20
    names = {file.name for file in small_cifar10.iterdir()}
    assert names == {'cifar-10-batches-py', download.ARCHIVE}  # nothing is left of the unpacking


def test_a_zip_takes_files_from_before_1980_and_leaves_no_part(trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0] / 'results', tmp_path / 'results')
    submit = ['CIFAR10_evaluation.py', '--name', 'lenet5', '--submit', '2020123456_Kim']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, 'write', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script(tmp_path, *submit)
    assert not list(tmp_path.glob('2020*'))
    code = tmp_path / 'code'
    code.mkdir()
    shutil.copy(ROOT / 'README.md', code)
    os.utime(code / 'README.md', (0, 0))  # the start of 1970
    monkeypatch.setattr(CIFAR10_evaluation, '__file__', str(code / 'CIFAR10_evaluation.py'))
    done = script(tmp_path, *submit)
    assert done.returncode == 0, done.stderr
    assert '2020123456_Kim/README.md' in zipfile.ZipFile(tmp_path / '2020123456_Kim.zip').namelist()


@pytest.mark.parametrize('name', ['con', 'NUL', 'aux', 'prn', 'com1', 'LPT9', 'com¹', 'nul.txt', 'aux.a.b'])
def test_names_that_windows_reserves_are_refused(name):
    with pytest.raises(UserError, match='use letters, digits'):
        parse_configuration(['--name', name])
    with pytest.raises(UserError, match='use letters, digits'):
        CIFAR10_evaluation.main(['--submit', name])


def test_names_that_only_look_reserved_are_allowed():
    for name in ('console', 'com', 'com10', 'nullo', 'a.con', '한글', 'lpt'):
        assert parse_configuration(['--name', name])[1].name == name


# ----------------------------------------------------------------------------------------------------------
# Consoles and texts


@pytest.mark.parametrize('encoding', ['ascii', 'cp949'])
def test_a_name_that_the_console_lacks_ends_no_run_and_warns_nobody(encoding, tmp_path):
    environment = {**os.environ, 'PYTHONIOENCODING': encoding, 'PYTHONUTF8': '0', 'PYTHONWARNINGS': 'always'}
    done = subprocess.run(
        [sys.executable, ROOT / 'CIFAR10_train.py', *map(str, SMALL), '--epochs', '1', '--name', '한글-é'],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0 and b'Glyph' not in done.stderr and b'Error' not in done.stderr, done.stderr
    text = done.stdout.decode(encoding)
    assert '1/1' in text and 'report.html' in text and ('한글' in text) == (encoding == 'cp949')
    assert '한글-é' in (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')
    assert (tmp_path / 'results' / '한글-é' / 'accuracy.png').exists()


@pytest.mark.parametrize('encoding', ['cp949', 'utf-16'])
def test_a_text_in_another_encoding_is_named_and_left_out(encoding, trained, tmp_path):
    shutil.copytree(trained[0] / 'results' / 'lenet5', tmp_path / 'results' / 'lenet5')
    (tmp_path / 'results' / 'README.md').write_text('정확도 Words', encoding=encoding)
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and 'README.md' in done.stdout and 'UTF-8' in done.stdout
    assert 'Words' not in (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')


def test_the_mark_that_windows_puts_before_utf_8_is_not_shown(trained, tmp_path):
    shutil.copytree(trained[0] / 'results' / 'lenet5', tmp_path / 'results' / 'lenet5')
    (tmp_path / 'results' / 'README.md').write_text('정확도', encoding='utf-8-sig')
    script(tmp_path, 'CIFAR10_evaluation.py')
    assert '<p>정확도</p>' in (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')


def test_missing_images_are_said_once(trained, tmp_path):
    for seed in range(3):
        real(tmp_path, trained[0] / 'results' / 'lenet5', f'run{seed}', 50 + seed, seed=seed)
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and done.stdout.count('CIFAR-10 is not in') == 1


# ----------------------------------------------------------------------------------------------------------
# Runs


def report_of(folder):
    """The output of an evaluation, the row of LeNet-5's setting and the table of how it was measured."""
    done = script(folder, 'CIFAR10_evaluation.py')
    assert done.returncode == 0, done.stderr
    text = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
    lines = [
        [html.unescape(cell) for cell in re.findall('<td title=".*?">(.*?)</td>', row, re.DOTALL)]
        for row in re.findall('<tr>(.*?)</tr>', text, re.DOTALL)
    ]
    setting = next(line for line in lines if line[0] == 'Setting #2')
    return done.stdout, setting, {line[0]: line for line in lines if line[0].startswith('lenet5')}


def test_a_rerun_is_no_seed_and_stands_beside_the_run_that_it_repeats(trained, tmp_path):
    source = trained[0] / 'results' / 'lenet5'
    for name, accuracy, seed in (('lenet5', 77.0, 0), ('lenet5-seed1', 77.4, 1), ('lenet5-2', 77.0, 0)):
        real(tmp_path, source, name, accuracy, seed=seed)
    # Another rerun, of the second seed, on another kind of machine
    other = real(tmp_path, source, 'lenet5-3', 77.3, seed=1)
    record = json.loads((other / 'config.json').read_text())
    record['machine']['processor'] = 'another one'
    (other / 'config.json').write_text(json.dumps(record))
    for age, name in enumerate(('lenet5-3', 'lenet5-2', 'lenet5-seed1', 'lenet5')):
        os.utime(tmp_path / 'results' / name / 'config.json', (1e9 - age, 1e9 - age))
    output, setting, measured = report_of(tmp_path)
    assert setting[-1] == '77.20 ± 0.28 % (2 seeds)'
    assert list(measured) == ['lenet5']
    assert measured['lenet5'][-1] == (
        'lenet5-2 repeats lenet5: 77.00 % in 2 of 2 epochs, +0.00 points, the same to the digit, '
        'on the same kind of machine.\n'
        'lenet5-3 repeats lenet5-seed1: 77.30 % in 2 of 2 epochs, -0.10 points, within two deviations of '
        'the seeds (77.20 ± 0.28 %), on another kind of machine or precision.\n'
    )
    assert measured['lenet5'][-1] in output


def test_a_restarted_run_is_the_rerun_of_the_one_that_was_there(tmp_path):
    options = [*SMALL, '--epochs', 2]
    script(tmp_path, 'CIFAR10_train.py', *options)
    assert killed(19, tmp_path, *options, '--restart')  # in its second epoch
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert 'mlp repeats mlp-2: ' in done.stdout and ' in 1 of 2 epochs' in done.stdout, done.stdout
    report = (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')
    assert 'seeds)' not in report


def test_a_setting_is_shown_by_the_run_with_its_options_whenever_that_was_made(trained, tmp_path):
    source = trained[0] / 'results' / 'lenet5'
    config = {name: v for name, v in vars(SETTINGS['lenet5']).items() if name != 'dataset'}
    for age, (name, changes) in enumerate(dict(lenet5=config, quick={**config, 'epochs': 3}).items()):
        file = real(tmp_path, source, name, 70 + age, **changes) / 'config.json'
        os.utime(file, (1e9 - age, 1e9 - age))
    _, setting, _ = report_of(tmp_path)
    assert setting[-1] == '70.00 %'


@pytest.mark.parametrize('name', ['accuracy.png', 'confusion.png'])
def test_a_figure_that_is_open_elsewhere_costs_no_report(name, trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0] / 'results', tmp_path / 'results')
    (tmp_path / 'results' / 'report.html').unlink()
    save = Figure.savefig

    def refuse(figure, file):
        if Path(file).match(f'lenet5/{name}'):
            raise PermissionError(errno.EACCES, 'Permission denied', str(file))
        save(figure, file)

    monkeypatch.setattr(Figure, 'savefig', refuse)
    done = script(tmp_path, 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and name in done.stdout, done.stderr
    assert (tmp_path / 'results' / 'report.html').exists()


def test_a_rerun_that_differs_by_more_than_seeds_do_is_told(trained, tmp_path):
    source = trained[0] / 'results' / 'lenet5'
    for name, accuracy, seed in (('lenet5', 77.0, 0), ('lenet5-2', 70.0, 0), ('lenet5-seed1', 77.4, 1)):
        real(tmp_path, source, name, accuracy, seed=seed)
    output, setting, _ = report_of(tmp_path)
    assert '-7.00 points, NOT within' in output
    assert setting[-1] == '77.20 ± 0.28 % (2 seeds)'


def test_training_again_says_that_the_accuracy_is_the_same(tmp_path):
    command = ['CIFAR10_train.py', *SMALL, '--epochs', 1, '--precision']
    script(tmp_path, *command, 'fp32')
    output = script(tmp_path, *command, 'fp32').stdout
    assert 'mlp-2 repeats mlp' in output and 'the same to the digit, on the same kind of machine.' in output
    output = script(tmp_path, *command, 'bf16').stdout
    assert re.search('mlp-3 repeats mlp:.* on another kind of machine or precision', output)


def test_classes_without_training_images_are_left_out_of_the_figures(tmp_path):
    done = script(
        tmp_path, 'CIFAR10_train.py', *SMALL[:-1], 5, '--epochs', 1, '--holdout', 4995, '--name', 'few'
    )
    assert done.returncode == 0 and (tmp_path / 'results' / 'few' / 'samples.png').exists(), done.stderr


def test_a_validation_loss_that_is_not_finite_is_told_and_never_kept(tmp_path):
    options = [
        '--model',
        'mlp',
        '--hidden',
        8,
        '--dataset',
        'synthetic',
        '--normalization',
        'none',
        '--warmup',
        0,
    ]
    done = script(
        tmp_path, 'CIFAR10_train.py', *options, '--batch-size', 5000, '--learning-rate', 1e38, '--epochs', 2
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert 'the validation of epoch 1' in done.stderr and 'smaller --learning-rate' in done.stderr
    assert not list(tmp_path.rglob('best.pt'))


@pytest.mark.parametrize('epochs, said', [(2, 0), (4, 1)])
def test_three_epochs_at_chance_are_told_once(epochs, said, tmp_path):
    options = ['--model', 'lenet5', '--dataset', 'synthetic', '--activation', 'sigmoid', '--batch-size', 500]
    done = script(tmp_path, 'CIFAR10_train.py', *options, '--epochs', epochs)
    assert done.returncode == 0 and done.stdout.count('no better than chance') == said, done.stdout


def test_an_nvidia_gpu_that_pytorch_cannot_use_is_told(tmp_path, monkeypatch, few_images):
    monkeypatch.setattr(shutil, 'which', {'nvidia-smi': '/usr/bin/nvidia-smi'}.get)
    monkeypatch.setattr(torch.version, 'cuda', None)
    done = script(tmp_path, 'CIFAR10_train.py', *SMALL, '--epochs', 1)
    assert done.returncode == 0 and done.stdout.count('built without CUDA') == 1
    monkeypatch.setattr(shutil, 'which', lambda _: None)
    assert 'CUDA' not in script(tmp_path, 'CIFAR10_train.py', *SMALL, '--epochs', 2).stdout


def test_more_processes_than_gpus_get_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(UserError, match='--nproc-per-node 1'):
        CIFAR10_evaluation.choose_device('cuda')


def test_a_certificate_that_cannot_be_checked_is_named_at_the_end(tmp_path, monkeypatch):
    def fails(*_, **__):
        error = ssl.SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed')
        raise urllib.error.URLError(error)

    monkeypatch.setattr('urllib.request.urlopen', fails)
    done = script(tmp_path, 'CIFAR10_train.py', '--data-dir', 'new')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert 'certificate verify failed' in done.stderr


def test_a_run_with_search_in_its_name_is_no_trial(trained, tmp_path):
    for name in ('my-search-x', 'my-search-01'):
        shutil.copytree(trained[0] / 'results' / 'lenet5', tmp_path / 'results' / name)
    assert {run.folder.name for run in map(Run.read, (tmp_path / 'results').iterdir())} == {
        'my-search-x',
        'my-search-01',
    }
    output, setting, _ = report_of(tmp_path)
    assert 'my-search-x: ' in output and 'my-search-01: ' in output and setting[-1]


def test_a_killed_download_of_another_process_is_waited_for(small_cifar10):
    """The lock of the download is held by one process at a time, and let go when it ends."""
    file = small_cifar10 / 'cifar.lock'
    held = CIFAR10_configuration.lock(file)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(CIFAR10_configuration.lock, file, wait=True)
        with pytest.raises(UserError, match='another process'):
            CIFAR10_configuration.lock(file)
        assert not waiting.done()
        held.close()
        waiting.result(timeout=10).close()

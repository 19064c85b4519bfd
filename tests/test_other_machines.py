"""Files, disks, consoles and habits of other people work, or are refused in one sentence."""
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, rows, script
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import CIFAR10_evaluation
from CIFAR10_configuration import SETTINGS, Configuration, Run, UserError
from CIFAR10_evaluation import build_model, choose_device, load_file, load_model, read_picture
from CIFAR10_train import build_optimizer, continue_run, save_checkpoint
from dataset import CLASSES

SMALL = 'CIFAR10_train.py --model mlp --hidden 8 --dataset synthetic --epochs'


def damaged(good, count):
    """Versions of a file's bytes: empty, zeros, HTML, cut short, and with bytes changed anywhere."""
    draw, half = random.Random(0), len(good) // 2
    yield from (b'', bytes(len(good)), b'<html>404</html>', good[:1], good[:half], good[:-1], good[::-1])
    for _ in range(count - 7):
        cut = draw.randrange(len(good))
        yield good[:cut] + draw.randbytes(draw.randrange(1, 40)) + good[cut + draw.randrange(200):]


def refusals(file, versions, read):
    """How many versions of a file are refused, in one line that says where it is; nothing else is raised."""
    refused = 0
    for version in versions:
        file.write_bytes(version)
        try:
            read()
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and str(file.parent) in str(error), version
    return refused


def test_weights_are_found_by_their_usual_keys_and_damaged_or_strange_files_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, config, device = Path('results', 'run'), Configuration('lenet5'), choose_device('cpu')
    folder.mkdir(parents=True)
    model = build_model(config, device)
    optimizer, state = build_optimizer(model, config), model.state_dict()
    save_checkpoint(Run(folder, config, {}, []), model, optimizer)
    renamed = {f'module.{name}': state[name] for name in state}
    for key in 'net', 'state_dict', 'model_state_dict':
        torch.save({key: renamed, 'configuration': [3]}, folder / 'w.pt')
        found = load_model(folder / 'w.pt', 'lenet5', device)
        assert all(map(torch.equal, found.parameters(), model.parameters()))
    def read_last():
        continue_run(folder, load_file(folder / 'last.pt'), config, model, optimizer)

    def read_weights():
        return load_model(folder / 'w.pt', 'lenet5', device)

    for name, load in ('last.pt', read_last), ('w.pt', read_weights):
        load()
        file = folder / name
        assert refusals(file, damaged(file.read_bytes(), 40), load) >= 25
        for strange in (None, 3, 'text', model, {}, [state], {'mine': state}, {'net': state, 'file': folder},
                        {'net': {f'other.{name}': state[name] for name in state}}, {'conv1.weight': 'text'},
                        {3: torch.zeros(1)}, {'model_state_dict': None, 'configuration': {'activation': 3}}):
            torch.save(strange, file)
            assert refusals(file, [file.read_bytes()], load) == 1


def test_a_record_is_read_as_editors_leave_it_and_a_damaged_one_refused_and_left_out(trained, lenet5):
    folder = shutil.copytree(trained[0] / 'results' / 'mlp', lenet5[0] / 'results' / 'mlp')
    config, history = folder / 'config.json', folder / 'history.csv'
    text, run = history.read_text(), Run.read(folder)
    # An unknown field means nothing, a missing one is the default; \ufeff is Windows' mark.
    fields = {name: value for name, value in vars(run.config).items() if name != 'seed'} | {'averaging': 0.9}
    record = json.dumps(dict(configuration=fields, machine=run.machine))
    config.write_bytes(f'\ufeff{record}'.encode())
    quoted = re.sub(r'([^,\n]+)', r'"\1"', text)
    for edited in text + '\n\n', '\ufeff' + text.replace('\n', '\r\n'), quoted:
        history.write_bytes(edited.encode())
        assert Run.read(folder) == run
    header, numbers = text.split('\n', 1)
    bad = {config: ['[]', '3', 'null', '{"configuration": {}}', '[' * 100_000, "{'a': 1}"],
           history: ['\x00', header, 'epoch\n1', text.replace(',', ';'), f'{header}\nx,{numbers}']}
    for change in dict(epochs=None), dict(hidden=3), dict(depth='x'), dict(model=[]), dict(seed={}):
        bad[config].append(json.dumps(dict(configuration=fields | change, machine={})))
    for row in '1,2,3', 'nan,' * 6 + '1', 'x,' * 6 + '1', '1,' * 7:
        bad[history].append(f'{header}\n{row}')
    for file, versions in bad.items():
        good = file.read_bytes()
        assert refusals(file, map(str.encode, versions), lambda: Run.read(folder)) == len(versions)
        assert refusals(file, damaged(good, 30), lambda: Run.read(folder)) >= 18
        file.write_bytes(good)
    config.write_bytes(b'{')
    done = script(lenet5[0], 'CIFAR10_evaluation.py')
    assert done.returncode == 0 and str(folder.relative_to(lenet5[0])) in done.stdout, done.stderr
    assert 'LeNet-5' in (lenet5[0] / 'results' / 'report.html').read_text(encoding='utf-8')


def test_bad_pictures_are_named_and_the_others_predicted(lenet5, tmp_path):
    good = {'p.png': (3, 40, 60), 'one.png': (3, 1, 1), 'grey.png': (1, 33, 31), 'long.jpg': (3, 2, 900)}
    for name, shape in good.items():
        to_pil_image(torch.randint(0, 256, shape, dtype=torch.uint8)).save(tmp_path / name)
    for number, content in enumerate(damaged((tmp_path / 'p.png').read_bytes(), 40)):
        (tmp_path / f'bad{number}.png').write_bytes(content)
    names = ['missing.png', '.', *(f'bad{number}.png' for number in range(40)), *good]
    done = script(tmp_path, f"CIFAR10_evaluation.py --predict {' '.join(names)}")
    lines = done.stdout.splitlines()
    assert done.returncode == 2
    assert all(line.startswith(f'{name}: ') for name, line in zip(names, lines, strict=True))
    refused = ['not a picture that can be read' in line for line in lines]
    assert all(refused[:2]) and 'No such file' in lines[0] and sum(refused) >= 35
    assert all('% sure' in line for line in lines[-len(good):])


@pytest.mark.parametrize('mode, suffix', [('LA', 'png'), ('P', 'png'), ('RGBA', 'png'), ('RGBA', 'webp'),
                                          ('RGBA', 'gif'), ('RGBA', 'tif')])
def test_transparency_is_shown_over_white_as_a_viewer_does(mode, suffix, tmp_path):
    image = Image.new('RGBA', (64, 64), (255, 0, 255, 0))  # pink where the transparency is ignored
    image.paste((0, 0, 0, 255), (16, 16, 48, 48))
    image = image.quantize() if mode == 'P' else image.convert(mode)
    image.save(tmp_path / f'icon.{suffix}', lossless=True)
    found = read_picture(tmp_path / f'icon.{suffix}')
    assert found[:, 0, 0].min() > 250 and found[:, 16, 16].max() < 5


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK', 'YCbCr', 'I'])
def test_every_mode_shows_the_same_ramp_upright_whatever_the_files_name(mode, tmp_path):
    ramp = np.tile(np.linspace(255, 0, 320), (320, 1))
    exif = Image.Exif()
    exif[0x112] = 3  # a camera that was upside down
    Image.fromarray(ramp.astype('u1')).convert(mode).save(
        tmp_path / 'ramp.png', 'JPEG' if mode == 'YCbCr' else 'TIFF', exif=exif)
    found = read_picture(tmp_path / 'ramp.png').float().mean((0, 1))
    assert found.numpy() == pytest.approx(np.linspace(4, 251, 32), abs=20 if mode == '1' else 4)


@pytest.fixture
def lenet5(trained, tmp_path):
    """A folder of its own with a trained LeNet-5 in it, and the run's."""
    return tmp_path, shutil.copytree(trained[0] / 'results' / 'lenet5', tmp_path / 'results' / 'lenet5')


def copied(source, folder, accuracy, **changes):
    """The folder of a copy of a run, finished, with another accuracy and other options."""
    run = Run.read(shutil.copytree(source, folder))
    run.config = replace(run.config, **changes)
    run.history = [run.last._replace(epoch=epoch, val_accuracy=accuracy)
                   for epoch in range(1, run.config.epochs + 1)]
    run.write()
    return run.folder


def test_predict_takes_patterns_and_asks_the_best_run_on_cifar10_or_the_one_that_is_named(lenet5):
    for name in ('a.png', 'b.png', 'c[1].png', 'c1.png'):
        Image.new('RGB', (50, 40)).save(lenet5[0] / name)
    weights = copied(lenet5[1], lenet5[1].with_name('real'), 0.5, dataset='cifar10') / 'best.pt'
    saved = torch.load(weights)
    saved['configuration']['dataset'] = 'cifar10'
    torch.save(saved, weights)
    for option, classes in ('', CLASSES['cifar10']), ('--name lenet5', CLASSES['synthetic']):
        done = script(lenet5[0], f'CIFAR10_evaluation.py {option} --predict [ab].png c[1].png no.png n*.jpg')
        names, said = zip(*(line.split(': ', 1) for line in done.stdout.splitlines()))
        assert names == ('a.png', 'b.png', 'c[1].png', 'no.png', 'n*.jpg')
        assert all(text.startswith(tuple(classes)) for text in said[:3])
        assert all('No such file' in text for text in said[3:])


@pytest.mark.skipif(os.name == 'nt', reason="POSIX locks")
@pytest.mark.filterwarnings('ignore:flock not supported')
@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF])
def test_training_goes_on_where_the_file_system_has_no_locks(number, tmp_path, monkeypatch, few_images):
    monkeypatch.setattr('fcntl.flock', Mock(side_effect=OSError(number, os.strerror(number))))
    assert script(tmp_path, f'{SMALL} 1').returncode == 0


@pytest.mark.parametrize('name', ['best.pt', 'last.pt', 'history.csv', 'config.json', 'accuracy.png'])
def test_a_file_that_is_open_elsewhere_is_tried_again_then_named(name, tmp_path, monkeypatch, few_images):
    def refused(source, target):  # as Windows does it
        nonlocal left
        left -= Path(target).name == name
        if left >= 0 and Path(target).name == name:
            raise PermissionError(errno.EACCES, 'Access is denied')
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, 'replace', refused)
    monkeypatch.setattr('time.sleep', lambda _: None)
    for left in 1000, 30:  # the second command goes on where the first one failed
        code = 2 if left == 1000 and name != 'accuracy.png' else 0  # a figure costs no report
        done = script(tmp_path, f'{SMALL} 2')
        assert done.returncode == code and (name in done.stderr + done.stdout) == (left > 30), done.stderr
        assert len(done.stderr.splitlines()) == bool(code) and not list(tmp_path.rglob('*.part'))
    assert [row['epoch'] for row in rows(tmp_path / 'results' / 'mlp')] == ['1', '2']


def test_a_zip_takes_files_from_before_1980_but_no_hidden_ones(lenet5, monkeypatch):
    code = lenet5[0] / 'code'
    for name in '._x.py', 'dataset/._x.py', 'tests/._x.py':
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).touch()
    (lenet5[1] / '._x.csv').touch()
    os.utime(shutil.copy(ROOT / 'README.md', code), (0, 0))  # the start of 1970
    monkeypatch.setattr(CIFAR10_evaluation, '__file__', str(code / 'CIFAR10_evaluation.py'))
    assert script(lenet5[0], 'CIFAR10_evaluation.py --name lenet5 --submit Kim').returncode == 0
    run = ('accuracy.png best.pt config.json evaluation.json group.png history.csv images.png '
           'mistakes.png').split()
    assert sorted(zipfile.ZipFile(lenet5[0] / 'Kim.zip').namelist()) == [
        'Kim/README.md', *(f'Kim/results/lenet5/{file}' for file in run), 'Kim/results/report.html']


@pytest.mark.parametrize('encoding', ['ascii', 'cp949'])
def test_a_name_that_the_console_lacks_ends_no_run_and_warns_nobody(encoding, tmp_path):
    environment = dict(os.environ, PYTHONIOENCODING=encoding, PYTHONUTF8='0', PYTHONWARNINGS='always')
    name, *options = f'{SMALL} 1 --name 한글-é'.split()
    done = subprocess.run([sys.executable, ROOT / name, *options], cwd=tmp_path, env=environment,
                          capture_output=True, timeout=300)
    assert done.returncode == 0 and b'Glyph' not in done.stderr and b'Error' not in done.stderr, done.stderr
    text = done.stdout.decode(encoding)
    assert '1/1' in text and 'report.html' in text and ('한글' in text) == (encoding == 'cp949')
    assert '한글-é' in (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')


@pytest.mark.parametrize('encoding, read', [('cp949', False), ('utf-16', False), ('utf-8-sig', True)])
def test_a_text_not_in_utf_8_is_named_and_left_out_as_is_windows_mark(encoding, read, lenet5):
    (lenet5[0] / 'results' / 'README.md').write_text('정확도 Words', encoding=encoding)
    done = script(lenet5[0], 'CIFAR10_evaluation.py')
    text = (lenet5[0] / 'results' / 'report.html').read_text(encoding='utf-8')
    assert done.returncode == 0 and ('README.md is left out' in done.stdout) != read, done.stderr
    assert ('<p>정확도 Words</p>' in text) == ('Words' in text) == read


def test_the_runs_with_a_settings_options_are_its_seeds_and_a_rerun_is_told(lenet5):
    source = lenet5[1].rename(lenet5[0] / 'source')
    for name, accuracy, seed in ('a', 77.0, 0), ('a-2', 77.0, 0), ('b', 77.4, 1), ('seeds/b', 70.4, 1):
        copied(source, lenet5[0] / 'results' / name, accuracy, seed=seed, dataset='cifar10',
               epochs=SETTINGS['lenet5'].epochs)
    done = script(lenet5[0], 'CIFAR10_evaluation.py')
    assert done.returncode == 1 and done.stdout.count('CIFAR-10 is missing') == 1  # it is said once
    told = [text.replace('/', os.sep) for text in ('results/a-2 repeats results/a: 77.00 % (+0.00)',
                                                   'results/seeds/b repeats results/b: 70.40 % (-7.00)')]
    assert [line for line in done.stdout.splitlines() if ' repeats ' in line] == told
    text = (lenet5[0] / 'results' / 'report.html').read_text(encoding='utf-8')
    assert '<td>77.00, 77.40 % (2 seeds)</td>' in text and f'>{"; ".join(told)}</p>' in text

"""Hundreds of bad options, checkpoints, records, pictures and archives, each refused in one sentence."""
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import CIFAR10_evaluation
from CIFAR10_configuration import SETTINGS, Run, UserError, parse_configuration
from CIFAR10_evaluation import choose_device, load_model, predict_pictures, read_picture
from CIFAR10_train import load_checkpoint
from dataset import CLASSES, data_load
from LeNet5_model import LeNet5_model

NUMBERS = ('nan', 'inf', '-inf', '1e999', '-1', '', ' ', 'one', '0x10', '1,5', '--', '1e', 'None', '١٢٣x',
           '-0.0001', '2' * 400)
WORDS = ('', ' ', 'SGD ', 'sgd;rm', '../x', 'none none', '0', '\x00', 'é' * 50, '%s', '{}', '-')
NAMES = ('..', '.', 'a/', 'a/..', '../a', '/tmp/a', 'a\\b', 'a\x00', 'a b', '', '.hidden', 'a.', 'C:', '~',
         '*', 'a\n', 'x' * 101)


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


@pytest.mark.parametrize('name', vars(SETTINGS['mlp']))
def test_options(name):
    for value in WORDS if isinstance(getattr(SETTINGS['mlp'], name), str) else NUMBERS:
        with pytest.raises(UserError, match=r'^.+\Z'):  # one line
            parse_configuration(['--model', 'mlp', f"--{name.replace('_', '-')}={value}"])


@pytest.mark.parametrize('name', NAMES)
def test_run_names_stay_in_results(name, monkeypatch):
    with pytest.raises(UserError, match='letters, digits'):
        parse_configuration([f'--name={name}'])
    monkeypatch.setattr('sys.argv', ['CIFAR10_evaluation.py', f'--submit={name}'])
    with pytest.raises(UserError, match='letters, digits'):
        CIFAR10_evaluation.main()


def test_checkpoints(tmp_path):
    file, device = tmp_path / 'w.pt', choose_device('cpu')
    torch.save({'epoch': 1, 'model_state_dict': LeNet5_model().state_dict()}, file)
    good = file.read_bytes()
    load_model(file, 'lenet5', device)
    for load in (lambda: load_model(file, 'lenet5', device), lambda: load_checkpoint(file)):
        assert refusals(file, damaged(good, 40), load) >= 25
        for strange in (None, 3, [1], 'text', {}, {'conv1.weight': 'text'}, {3: torch.zeros(1)},
                        {'model_state_dict': None}):
            torch.save(strange, file)
            assert refusals(file, [file.read_bytes()], load) == 1


def test_records(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for model, name in dict(lenet5='good', mlp='mlp').items():
        shutil.copytree(trained[0] / 'results' / model, f'results/{name}')
    kept = {file: file.read_bytes() for file in Path('results/good').iterdir()}
    config, history = Path('results/mlp/config.json'), Path('results/mlp/history.csv')
    fields, header = json.loads(config.read_text())['configuration'], history.read_text().splitlines()[0]
    bad = {config: [b'[]', b'3', b'null', b'{"configuration": {}}', b'[' * 100_000, b'\xff\xfe'],
           history: [b'\x00', header.encode(), header.encode() * 2, b'epoch\n1\n']}
    for name, value in (('epochs', None), ('hidden', 3), ('hidden', ['<b>']), ('activation', '<script>'),
                        ('model', ['mlp']), ('learning_rate', {}), ('milestones', [5])):
        bad[config].append(json.dumps(dict(configuration={**fields, name: value}, machine={})).encode())
    for row in ('1,2,3', 'nan,' * 6 + '1', 'x,' * 6 + '1', '1,' * 7):
        bad[history].append(f'{header}\n{row}'.encode())
    for file, versions in bad.items():
        good = file.read_bytes()
        assert refusals(file, versions, lambda: Run.read(config.parent)) == len(versions)
        assert refusals(file, damaged(good, 30), lambda: Run.read(config.parent)) >= 18
        file.write_bytes(good)
    assert {file: file.read_bytes() for file in Path('results/good').iterdir()} == kept
    config.write_bytes(b'{')
    CIFAR10_evaluation.write_report()
    assert str(config.parent) in capsys.readouterr().out
    assert 'Setting #2' in Path('results/report.html').read_text(encoding='utf-8')


def noise(*shape):
    return to_pil_image(torch.randint(0, 256, shape, dtype=torch.uint8))


def test_pictures(trained, tmp_path, monkeypatch, capsys):
    weights = trained[0] / 'results' / 'lenet5' / 'best.pt'
    model = load_model(weights, 'lenet5', choose_device('cpu'))
    monkeypatch.chdir(tmp_path)
    good = {'p.png': noise(3, 40, 60), 'one.png': noise(3, 1, 1), 'grey.png': noise(1, 33, 31),
            'long.png': noise(3, 2, 900), 'grey.jpg': noise(1, 50, 50)}
    for name, picture in good.items():
        picture.save(name)
    Path('folder').mkdir()
    for number, content in enumerate(damaged(Path('p.png').read_bytes(), 40)):
        Path(f'bad{number}.png').write_bytes(content)
    names = ['missing.png', 'folder', *(f'bad{number}.png' for number in range(40)), *good]
    predict_pictures(names, weights, model, CLASSES['synthetic'], choose_device('cpu'))
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f'{name}: ') for name, line in zip(names, lines, strict=True))
    refused = [line for line in lines if 'not a picture that can be read' in line]
    assert lines[:2] == refused[:2] and 'No such file' in lines[0] and len(refused) >= 35
    assert all('% sure' in line for line in lines[-len(good):])


def test_pictures_that_are_turned_look_right(tmp_path):
    file, picture, exif = tmp_path / 'turned.jpg', noise(3, 32, 32), Image.Exif()
    for orientation in range(1, 9):
        exif[0x112] = orientation
        picture.save(file, exif=exif)
        assert torch.equal(read_picture(file), pil_to_tensor(ImageOps.exif_transpose(Image.open(file))))


def test_archives(small_cifar10):
    archive, batches = small_cifar10 / CIFAR10.filename, small_cifar10 / CIFAR10.base_folder
    shutil.rmtree(batches)
    for bad in damaged(archive.read_bytes(), 20):
        assert refusals(archive, [bad], lambda: data_load('cifar10', small_cifar10, urls=())) == 1
        assert archive.read_bytes() == bad and not batches.exists()

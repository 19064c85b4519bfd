"""Hundreds of bad options, checkpoints, records, pictures and archives, each refused in one sentence."""

import json
import random
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import CIFAR10_evaluation
from CIFAR10_configuration import SETTINGS, Run, UserError, parse_configuration
from CIFAR10_evaluation import build_model, choose_device, load_file, load_weights
from CIFAR10_train import load_checkpoint
from dataset import data_load, download

NUMBERS = (
    'nan',
    'inf',
    '-inf',
    '1e999',
    '-1',
    '',
    ' ',
    'one',
    '0x10',
    '1,5',
    '--',
    '1e',
    'None',
    '١٢٣x',
    '-0.0001',
    '2' * 400,
)
WORDS = ('', ' ', 'SGD ', 'sgd;rm', '../x', 'none none', '0', '\x00', 'é' * 50, '%s', '{}', '-')
NUMERIC = [name for name, value in vars(SETTINGS['mlp']).items() if isinstance(value, (int, float, tuple))]
CHOICES = [name for name, value in vars(SETTINGS['mlp']).items() if isinstance(value, str)]


def snapshot(folder):
    return {
        file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob('*')) if file.is_file()
    }


def damaged(good, count):
    """Versions of a file's bytes: empty, zeros, HTML, cut short, and with bytes changed anywhere."""
    draw = random.Random(0)
    yield from (
        b'',
        bytes(len(good)),
        b'<html>404</html>',
        good[:1],
        good[: len(good) // 2],
        good[:-1],
        good[::-1],
    )
    for _ in range(count - 7):
        cut = draw.randrange(len(good))
        yield good[:cut] + draw.randbytes(draw.randrange(1, 40)) + good[cut + draw.randrange(200) :]


@pytest.mark.parametrize('name', NUMERIC + CHOICES)
def test_options(name):
    refused = 0
    for value in NUMBERS if name in NUMERIC else WORDS:
        try:
            runs, _ = parse_configuration(['--model', 'mlp', f"--{name.replace('_', '-')}={value}"])
            assert all(
                number == number and abs(number) != float('inf')
                for config in runs.values()
                for number in vars(config).values()
                if isinstance(number, float)
            )
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused >= (len(NUMBERS) - 3 if name in NUMERIC else len(WORDS))


@pytest.mark.parametrize(
    'name',
    [
        '..',
        '.',
        'a/',
        'a/..',
        '../a',
        '/tmp/a',
        'a\\b',
        'a\x00',
        'a b',
        '',
        '.hidden',
        'a.',
        'C:',
        'x' * 101,
        '~',
        '*',
        'a\n',
    ],
)
def test_run_names_stay_in_results(name):
    if name:
        with pytest.raises(UserError, match='letters, digits'):
            parse_configuration([f'--name={name}'])
        with pytest.raises(UserError, match='letters, digits'):
            CIFAR10_evaluation.main([f'--submit={name}'])


def test_checkpoints(tmp_path):
    file, model = tmp_path / 'w.pt', build_model(SETTINGS['lenet5'], choose_device('cpu'))
    torch.save({'epoch': 1, 'model_state_dict': model.state_dict()}, file)
    good, refused = file.read_bytes(), 0
    for bad in damaged(good, 40):
        file.write_bytes(bad)
        for load in (
            lambda: load_weights(model, load_file(file, ''), file),
            lambda: load_checkpoint(file, SETTINGS['lenet5']),
        ):
            try:
                load()
            except UserError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1
    assert refused >= 40
    for strange in (
        None,
        3,
        [1],
        'text',
        {},
        {'conv1.weight': 'text'},
        {3: torch.zeros(1)},
        {'model_state_dict': None},
    ):
        torch.save(strange, file)
        with pytest.raises(UserError):
            load_weights(model, load_file(file, ''), file)


def test_records(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0] / 'results', 'results')
    shutil.copytree('results/mlp', 'results/good')
    config, history = (Path('results/mlp') / name for name in ('config.json', 'history.csv'))
    before, good = (
        snapshot(Path('results/good')),
        {config: config.read_bytes(), history: history.read_bytes()},
    )
    record, lines = json.loads(good[config]), good[history].decode().splitlines()
    bad_configs = [
        b'[]',
        b'3',
        b'null',
        b'{"configuration": {}}',
        b'[' * 100_000,
        b'\xff\xfe',
        *damaged(good[config], 30),
    ]
    for name, value in (
        ('epochs', '8'),
        ('epochs', None),
        ('hidden', 3),
        ('hidden', ['<b>']),
        ('activation', '<script>'),
        ('new', 1),
        ('model', ['mlp']),
        ('learning_rate', {}),
        ('milestones', [5]),
    ):
        bad_configs.append(
            json.dumps({**record, 'configuration': {**record['configuration'], name: value}}).encode()
        )
    bad_histories = [
        b'\x00',
        ''.join(lines).encode(),
        lines[0].encode(),
        b'epoch\n1\n',
        (lines[0] + '\n1,2,3').encode(),
        (lines[0] + '\n' + 'nan,' * 7).encode(),
        (lines[0] + '\n' + 'x,' * 7).encode(),
        *damaged(good[history], 30),
    ]
    refused = 0
    for file, versions in ((config, bad_configs), (history, bad_histories)):
        for bad in versions:
            file.write_bytes(bad)
            try:
                Run.read(file.parent)
            except UserError as error:
                refused += 1
                assert 'mlp' in str(error) and len(str(error).splitlines()) == 1
        assert CIFAR10_evaluation.read_runs()
        file.write_bytes(good[file])
    assert refused >= 55 and snapshot(Path('results/good')) == before
    config.write_bytes(b'{')
    CIFAR10_evaluation.write_report(CIFAR10_evaluation.read_runs())
    report = Path('results/report.html').read_text(encoding='utf-8')
    assert 'Setting #2' in report and 'results/mlp' in capsys.readouterr().out.replace('\\', '/')


def png16(height, width):
    """A 16-bit grey PNG, written by hand."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    rows = b''.join(
        b'\0' + struct.pack(f'>{width}H', *(x * 65535 // width for x in range(width))) for _ in range(height)
    )
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 16, 0, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


def test_pictures(trained, tmp_path, capsys):
    run = Run.read(trained[0] / 'results' / 'lenet5')
    to_pil_image(torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)).save(tmp_path / 'p.png')
    good = (tmp_path / 'p.png').read_bytes()
    for number, bad in enumerate(damaged(good, 40)):
        (tmp_path / f'bad{number}.png').write_bytes(bad)
    (tmp_path / 'folder').mkdir()
    sizes = {'one.png': (3, 1, 1), 'grey.png': (1, 33, 31), 'long.png': (3, 2, 900), 'grey.jpg': (1, 50, 50)}
    for name, shape in sizes.items():
        to_pil_image(torch.randint(0, 256, shape, dtype=torch.uint8)).save(tmp_path / name)
    (tmp_path / 'deep.png').write_bytes(png16(40, 50))
    names = [
        *sizes,
        'deep.png',
        'missing.png',
        'folder',
        *(f'bad{number}.png' for number in range(40)),
        'p.png',
    ]
    CIFAR10_evaluation.predict_pictures([str(tmp_path / name) for name in names], run, choose_device('cpu'))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names) and all(name in line for name, line in zip(names, lines, strict=False))
    assert all('% sure' in line for line in lines[:5]) and '% sure' in lines[-1]
    assert sum('not a picture' in line for line in lines[5:]) >= 35


def test_pictures_deep_and_turned_ones_look_right(tmp_path):
    (tmp_path / 'deep.png').write_bytes(png16(32, 32))
    image = CIFAR10_evaluation.read_picture(tmp_path / 'deep.png')
    assert image.dtype == torch.uint8 and image[0, 0, 0] < 10 and image[0, 0, -1] > 240
    to_pil_image(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)).save(tmp_path / 'a.jpg')
    plain = (tmp_path / 'a.jpg').read_bytes()
    for orientation in range(1, 9):
        exif = b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0' + bytes([orientation]) + bytes(7)
        (tmp_path / 'b.jpg').write_bytes(
            plain[:2] + b'\xff\xe1' + struct.pack('>H', len(exif) + 2) + exif + plain[2:]
        )
        upright = pil_to_tensor(ImageOps.exif_transpose(Image.open(tmp_path / 'b.jpg')))
        assert torch.equal(CIFAR10_evaluation.read_picture(tmp_path / 'b.jpg'), upright)


def test_archives(small_cifar10):
    archive = small_cifar10 / download.ARCHIVE
    good, batches = archive.read_bytes(), small_cifar10 / 'cifar-10-batches-py'
    shutil.rmtree(batches)
    for bad in damaged(good, 20):
        archive.write_bytes(bad)
        with pytest.raises(UserError):
            data_load('cifar10', small_cifar10, urls=())
        assert archive.read_bytes() == bad and not batches.exists()

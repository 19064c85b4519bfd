"""No run is lost: kills, Ctrl-C, a second process, a full disk, bad losses. KILLS=20 is the long version."""

import os
import random
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, after_first_epoch, assert_same_run, killed, process, rows, script

import CIFAR10_train
import dataset
from CIFAR10_configuration import SETTINGS, UserError, lock

KILLS = int(os.environ.get('KILLS', 4))
OPTIONS = [
    '--model',
    'mlp',
    '--dataset',
    'synthetic',
    '--epochs',
    '2',
    '--hidden',
    '32',
    '--dropout',
    '0.3',
    '--batch-size',
    '500',
]


def check_kills(folder, model, moments, *options):
    """Train whole, and killed KILLS times, each time within so many moments; both must end the same."""
    # An epoch has 19 to 27 moments: a loss a step, one of the validation, and 8 to write four files.
    whole, other = folder / 'whole', folder / 'other'
    whole.mkdir()
    other.mkdir()
    assert not killed(0, whole, *options)
    draw, last = random.Random(1), other / 'results' / model / 'last.pt'
    kills = 0
    epochs = len(torch.load(whole / 'results' / model / 'last.pt')['history'])
    while not last.exists() or len(torch.load(last)['history']) < epochs:
        kills += killed(draw.randint(1, moments) if kills < KILLS else 0, other, *options)
    assert kills and not (other / 'results' / f'{model}-2').exists()
    assert_same_run(whole / 'results' / model, other / 'results' / model)


def report(folder):
    """The report of the runs in a folder, without the minutes that they took."""
    done = script(folder, 'CIFAR10_evaluation.py')
    assert done.returncode == 0, done.stderr
    text = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
    return re.sub(r'<td title="training time \(m\)">[\d.]+</td>', '', text)


@pytest.mark.parametrize('model', SETTINGS)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(model, tmp_path, few_images):
    check_kills(
        tmp_path,
        model,
        30,
        '--model',
        model,
        '--dataset',
        'synthetic',
        '--epochs',
        3,
        '--batch-size',
        10,
        '--learning-rate',
        0.01,
    )
    assert report(tmp_path / 'whole') == report(tmp_path / 'other')


@pytest.mark.skipif(
    'CIFAR10_DIR' not in os.environ or KILLS < 20, reason="set CIFAR10_DIR and KILLS=20; takes minutes"
)
@pytest.mark.parametrize('model', SETTINGS)
def test_runs_on_real_images_killed_at_random_moments(model, tmp_path, monkeypatch):
    read = dataset.read_cifar10
    monkeypatch.setattr(
        dataset, 'read_cifar10', lambda *options: [tensor[:1000] for tensor in read(*options)]
    )
    options = ['--model', model, '--data-dir', os.environ['CIFAR10_DIR'], '--epochs', 8, '--batch-size', 100]
    check_kills(tmp_path, model, 40, *options, '--learning-rate', 0.01)


@pytest.mark.skipif(os.name == 'nt', reason="sends POSIX signals")
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_keeps_the_finished_epochs_and_the_same_command_continues(number, code, tmp_path):
    command = [
        '--model',
        'mlp',
        '--dataset',
        'synthetic',
        '--epochs',
        '2',
        '--hidden',
        '256',
        '--batch-size',
        '50',
    ]
    whole = tmp_path / 'whole'
    whole.mkdir()
    assert not killed(0, whole, *command)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    training = after_first_epoch(tmp_path, [sys.executable, ROOT / 'CIFAR10_train.py', *command])
    training.send_signal(number)
    output, errors = training.communicate(timeout=60)
    assert training.returncode == code and not errors
    assert ('the same command continues' in output) == (number == signal.SIGINT)
    done = script(tmp_path, 'CIFAR10_train.py', *command)
    assert done.returncode == 0 and 'Continuing mlp at epoch 2 of 2' in done.stdout
    assert_same_run(tmp_path / 'results' / 'mlp', whole / 'results' / 'mlp')


@pytest.fixture(scope='module')
def unfinished(tmp_path_factory):
    """A folder with a run of two epochs that was killed in its second one."""
    folder = tmp_path_factory.mktemp('unfinished')
    assert killed(25, folder, *OPTIONS) and len(rows(folder / 'results' / 'mlp')) == 1
    return folder


def content(folder):
    return {file: file.read_bytes() for file in folder.iterdir() if file.name != 'lock'}


def test_a_changed_option_is_named_and_nothing_changes(unfinished):
    before = content(unfinished / 'results' / 'mlp')
    for option, shown in (('--learning-rate', '0.5'), ('--epochs', '9'), ('--hidden', '31')):
        done = script(unfinished, 'CIFAR10_train.py', *OPTIONS, option, shown)
        assert done.returncode == 2 and option in done.stderr and '--restart' in done.stderr
    assert content(unfinished / 'results' / 'mlp') == before


def test_options_that_only_change_the_speed_may_change(unfinished):
    # Refused, it would not live to see a step.
    assert killed(15, unfinished, *OPTIONS, '--precision', 'fp32', '--device', 'cpu')
    assert len(rows(unfinished / 'results' / 'mlp')) == 1


def test_a_second_process_is_refused(unfinished):
    held = lock(unfinished / 'results' / 'mlp' / 'lock')
    done = process(unfinished, 'CIFAR10_train.py', *OPTIONS)
    held.close()
    assert done.returncode == 2 and 'another process is writing' in done.stderr


def test_a_damaged_checkpoint_is_named_and_kept(unfinished):
    last = unfinished / 'results' / 'mlp' / 'last.pt'
    good = last.read_bytes()
    for bad in (b'', b'\0' * 1000, good[:5000], b'<html>no</html>'):
        last.write_bytes(bad)
        done = script(unfinished, 'CIFAR10_train.py', *OPTIONS)
        assert done.returncode == 2 and "last.pt can't be loaded" in done.stderr and last.read_bytes() == bad
    last.write_bytes(good)


def test_restart_begins_anew_and_keeps_the_old_run(unfinished):
    before = {file.name: data for file, data in content(unfinished / 'results' / 'mlp').items()}
    done = script(unfinished, 'CIFAR10_train.py', *OPTIONS, '--restart')
    assert done.returncode == 0 and 'epoch 1/2' in done.stdout
    after = {file.name: data for file, data in content(unfinished / 'results' / 'mlp-2').items()}
    assert {name: after[name] for name in before} == before


def test_a_finished_run_stays_as_it_is_whatever_the_options(tmp_path):
    base = ['--model', 'mlp', '--dataset', 'synthetic', '--hidden', '8', '--batch-size', '1000']
    for name, epochs in (('mlp', 1), ('mlp-2', 2), ('mlp-3', 1)):
        done = script(tmp_path, 'CIFAR10_train.py', *base, '--epochs', epochs)
        assert done.returncode == 0 and len(rows(tmp_path / 'results' / name)) == epochs, done.stderr


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_rate(tmp_path):
    done = script(
        tmp_path,
        'CIFAR10_train.py',
        '--model',
        'lenet5',
        '--dataset',
        'synthetic',
        '--optimizer',
        'sgd',
        '--learning-rate',
        '1e9',
        '--warmup',
        '0',
        '--learning-rate-decay',
        'none',
        '--epochs',
        '2',
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert all(text in done.stderr for text in ('epoch 1/2', 'step', 'learning rate 1e+09'))


def test_results_that_cannot_be_written_are_found_before_training(tmp_path):
    (tmp_path / 'results').write_text('a file')
    done = script(tmp_path, 'CIFAR10_train.py', *OPTIONS)
    assert done.returncode == 2 and 'results' in done.stderr and 'epoch 1' not in done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_too_small_a_disk_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['CIFAR10_train.py', *OPTIONS])
    monkeypatch.setattr('shutil.disk_usage', lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match='too little room'):
        CIFAR10_train.main()
    assert not list(tmp_path.rglob('*.pt'))


@pytest.mark.skipif(os.name == 'nt', reason="limits the size of files as POSIX does")
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path):
    import resource

    assert killed(25, tmp_path, *OPTIONS)
    last = tmp_path / 'results' / 'mlp' / 'last.pt'
    before = last.read_bytes()
    done = subprocess.run(
        [sys.executable, ROOT / 'CIFAR10_train.py', *OPTIONS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2 and '.pt could not be written' in done.stderr and last.read_bytes() == before
    assert not list(last.parent.glob('*.part'))

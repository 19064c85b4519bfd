"""No run is lost: kills, signals, a second process, a full disk and bad losses. KILLS=20 makes the long version."""
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_training import rows

import CIFAR10_train
from CIFAR10_configuration import UserError, lock

KILLS = int(os.environ.get('KILLS', 3))
SMALL = dict(mlp=['--hidden', '32', '--dropout', '0.3', '--batch-size', '500'], lenet5=['--batch-size', '500', '--averaging', '0.9'],
             resnet32=['--batch-size', '40', '--holdout', '4800'])


def state_of(folder):
    """All that two runs must share to the last bit."""
    last, best = (torch.load(folder / name, weights_only=True) for name in ('last.pt', 'best.pt'))
    tensors = {**last['model'], **{f'averaged {name}': t for name, t in last.get('averaged', {}).items()},
               **{f'best {name}': t for name, t in best['model_state_dict'].items()}}
    for number, state in last['optimizer']['state'].items():
        tensors.update({f'{number} {name}': torch.as_tensor(value) for name, value in state.items() if value is not None})
    return tensors, [{**row, 'seconds': None} for row in rows(folder)]


def assert_same(a, b):
    (tensors, history), (others, other_history) = state_of(a), state_of(b)
    assert history == other_history and tensors.keys() == others.keys()
    for name in tensors:
        assert torch.equal(tensors[name], others[name]), name


def options(model):
    return ['--model', model, '--dataset', 'synthetic', '--epochs', '2', *SMALL[model]]


def check_kills(model, command, moments, folder):
    """Train whole, and killed KILLS times at a random one of so many moments and continued; both must end the same."""
    def run(moment, folder):
        folder.mkdir(exist_ok=True)
        return subprocess.run([sys.executable, ROOT / 'tests' / 'kill.py', str(moment), *command], cwd=folder, text=True,
                              capture_output=True, timeout=1800)

    assert run(0, folder / 'whole').returncode == 0
    draw = random.Random(1)
    for _ in range(KILLS):
        assert run(draw.randint(1, moments), folder / 'killed').returncode in (-9, 137)
    done = run(0, folder / 'killed')
    assert done.returncode == 0 and 'Continuing' in done.stdout, done.stderr
    assert_same(folder / 'whole' / 'results' / model, folder / 'killed' / 'results' / model)
    reports = []
    for name in ('whole', 'killed'):
        subprocess.run([sys.executable, ROOT / 'CIFAR10_evaluation.py'], cwd=folder / name, check=True, capture_output=True)
        report = (folder / name / 'results' / 'report.html').read_text(encoding='utf-8')
        report = re.sub(r'trained for [\d.]+ minutes', '', report)
        reports.append(re.sub(r'<td>[\d.]+</td>(<td>\d+</td><td>[\d.]+ %</td>)', r'\1', report))  # training time (m)
    assert reports[0] == reports[1]


@pytest.mark.parametrize('model', SMALL)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(model, tmp_path):
    check_kills(model, [*options(model), '--epochs', str(KILLS)], 36, tmp_path)  # an epoch has 14 to 19 moments


@pytest.mark.skipif('CIFAR10_DIR' not in os.environ or KILLS < 20, reason="set CIFAR10_DIR and KILLS=20; takes half an hour")
def test_resnet32_on_real_images_killed_at_random_moments(tmp_path):
    check_kills('resnet32', ['--model', 'resnet32', '--data-dir', os.environ['CIFAR10_DIR'], '--holdout', '42000', '--epochs', '10',
                             '--learning-rate', '0.05', '--patience', '99'], 120, tmp_path)  # an epoch has 72


@pytest.mark.skipif(os.name == 'nt', reason="sends POSIX signals")
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_within_the_epoch_and_the_same_command_continues(number, code, tmp_path):
    command = [sys.executable, ROOT / 'CIFAR10_train.py', '--model', 'mlp', '--dataset', 'synthetic', '--epochs', '3', '--hidden',
               '256', '--batch-size', '20', '--dropout', '0.2']
    whole = tmp_path / 'whole'
    whole.mkdir()
    subprocess.run(command, cwd=whole, check=True, capture_output=True)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('epoch 1/'):
            break
    time.sleep(0.2)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code and 'the same command continues' in output
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'Continuing mlp at epoch 2 of 3' in done.stdout
    assert_same(tmp_path / 'results' / 'mlp', whole / 'results' / 'mlp')


@pytest.fixture(scope='module')
def unfinished(tmp_path_factory):
    """A folder with a run of two epochs that was killed in its second one."""
    folder = tmp_path_factory.mktemp('unfinished')
    subprocess.run([sys.executable, ROOT / 'tests' / 'kill.py', '30', *options('mlp')], cwd=folder, capture_output=True)
    assert len(rows(folder / 'results' / 'mlp')) == 1
    return folder


def content(folder):
    return {file: file.read_bytes() for file in folder.iterdir() if file.name != 'lock'}


def test_a_changed_option_is_named_and_nothing_changes(unfinished, script):
    before = content(unfinished / 'results' / 'mlp')
    for option, shown in (('--learning-rate', '0.5'), ('--epochs', '9'), ('--hidden', '31')):
        done = script(unfinished, 'CIFAR10_train.py', *options('mlp'), option, shown)
        assert done.returncode == 2 and option in done.stderr and '--restart' in done.stderr
    assert content(unfinished / 'results' / 'mlp') == before


def test_a_second_process_is_refused(unfinished, process):
    held = lock(unfinished / 'results' / 'mlp')
    done = process(unfinished, 'CIFAR10_train.py', *options('mlp'))
    held.close()
    assert done.returncode == 2 and 'another process is writing' in done.stderr


def test_a_damaged_checkpoint_is_named_and_kept(unfinished, script, tmp_path):
    last = unfinished / 'results' / 'mlp' / 'last.pt'
    good = last.read_bytes()
    for bad in (b'', b'\0' * 1000, good[:5000], b'<html>no</html>'):
        last.write_bytes(bad)
        done = script(unfinished, 'CIFAR10_train.py', *options('mlp'))
        assert done.returncode == 2 and "last.pt can't be loaded" in done.stderr and last.read_bytes() == bad
    last.write_bytes(good)


def test_restart_begins_anew_and_keeps_the_old_run(unfinished, script):
    before = {file.name: data for file, data in content(unfinished / 'results' / 'mlp').items()}
    done = script(unfinished, 'CIFAR10_train.py', *options('mlp'), '--restart')
    assert done.returncode == 0 and 'epoch 1/2' in done.stdout
    after = {file.name: data for file, data in content(unfinished / 'results' / 'mlp-2').items()}
    assert {name: after[name] for name in before} == before


def test_more_epochs_continue_a_finished_run_only_where_the_schedule_stays(script, tmp_path):
    base = ['--model', 'mlp', '--dataset', 'synthetic', '--hidden', '8', '--batch-size', '1000']
    for decay, code in (('none', 0), ('cosine', 2)):
        for epochs in (1, 2):
            done = script(tmp_path, 'CIFAR10_train.py', *base, '--learning-rate-decay', decay, '--epochs', epochs, '--name', decay)
        assert done.returncode == code, done.stderr
    assert 'has finished its 1 epochs' in done.stderr and len(rows(tmp_path / 'results' / 'none')) == 2


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_rate(script, tmp_path):
    done = script(tmp_path, 'CIFAR10_train.py', '--model', 'lenet5', '--dataset', 'synthetic', '--optimizer', 'sgd',
                  '--learning-rate', '1e9', '--warmup', '0', '--learning-rate-decay', 'none', '--epochs', '2')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert all(text in done.stderr for text in ('epoch 1/2', 'step', 'learning rate 1e+09'))


def test_results_that_cannot_be_written_are_found_before_training(script, tmp_path):
    (tmp_path / 'results').write_text('a file')
    done = script(tmp_path, 'CIFAR10_train.py', *options('mlp'))
    assert done.returncode == 2 and 'results' in done.stderr and 'epoch 1' not in done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_too_small_a_disk_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['CIFAR10_train.py', *options('mlp')])
    monkeypatch.setattr('shutil.disk_usage', lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match='too little room'):
        CIFAR10_train.main()
    assert not list(tmp_path.rglob('*.pt'))


@pytest.mark.skipif(os.name == 'nt', reason="limits the size of files as POSIX does")
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path):
    import resource
    command = [sys.executable, ROOT / 'tests' / 'kill.py', '0', *options('mlp')]
    subprocess.run([*command[:2], '30', *command[3:]], cwd=tmp_path, capture_output=True)
    last = tmp_path / 'results' / 'mlp' / 'last.pt'
    before = last.read_bytes()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and 'last.pt could not be written' in done.stderr and last.read_bytes() == before
    assert not last.with_name('last.pt.part').exists()

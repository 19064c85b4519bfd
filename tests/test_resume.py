"""No run is lost: kills, Ctrl-C, a second process, a full disk, bad losses. KILLS=20 is the long version."""
import contextlib
import errno
import os
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Killed, after_first_epoch, assert_same_run, killed, process, rows, script

from CIFAR10_configuration import Configuration, UserError, atomic_write
from CIFAR10_evaluation import build_model
from CIFAR10_train import build_optimizer, open_run

KILLS = int(os.environ.get('KILLS', 4))
MLP = '--model mlp --dataset synthetic --epochs 2'
OPTIONS = f'{MLP} --hidden 32 --dropout 0.3 --batch-size 10'  # on 130 images, 13 steps an epoch
COMMAND = f'CIFAR10_train.py {OPTIONS}'
TRAIN = [sys.executable, str(ROOT / 'CIFAR10_train.py')]


def refusing(error):
    """A function that raises an error, whatever it is given."""
    def refuse(*_, **__):
        raise error
    return refuse


@pytest.mark.parametrize('model, smaller', [('mlp', '--hidden 64 32'), ('lenet5', ''),
                                            ('resnet32', '--depth 8')])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(model, smaller, tmp_path, few_images,
                                                                   monkeypatch):
    monkeypatch.setattr('CIFAR10_train.perf_counter', lambda: 0.0)  # the report has the minutes too
    options = f'--model {model} --learning-rate 0.01 --dataset synthetic --epochs 3 --batch-size 10 {smaller}'
    for name in 'whole', 'other':
        (tmp_path / name).mkdir()
    whole, other = (tmp_path / name / 'results' / model for name in ('whole', 'other'))
    assert not killed(0, tmp_path / 'whole', options)
    # An epoch has 20 to 22 moments: a loss a step, one of the validation, and 6 or 8 to write the files.
    draw, kills = random.Random(1), 0
    while not (other / 'last.pt').exists() or len(torch.load(other / 'last.pt')['history']) < 3:
        kills += killed(draw.randint(1, 30) if kills < KILLS else 0, tmp_path / 'other', options)
    assert kills and not other.with_name(f'{model}-2').exists()
    assert_same_run(whole, other)
    for folder in whole.parent, other.parent:
        assert script(folder.parent, 'CIFAR10_evaluation.py').returncode == 0
    assert (whole.parent / 'report.html').read_bytes() == (other.parent / 'report.html').read_bytes()


@pytest.mark.skipif(os.name == 'nt', reason="sends POSIX signals")
def test_a_signal_keeps_the_finished_epochs_and_the_same_command_continues(tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    monkeypatch.setattr('CIFAR10_train.evaluate_and_report', lambda *_: False)  # last.pt stays
    options = f'{MLP} --hidden 256 --batch-size 50'
    for name in 'whole', 'interrupted', 'killed':
        if name != 'whole':
            training = after_first_epoch(tmp_path, [*TRAIN, *options.split(), '--name', name])
            training.send_signal(signal.SIGINT if name == 'interrupted' else signal.SIGKILL)
            output, errors = training.communicate(timeout=60)
            assert training.returncode == dict(interrupted=130, killed=-9)[name] and not errors
            assert ('the same command continues' in output) == (name == 'interrupted')
        done = script(tmp_path, f'CIFAR10_train.py {options} --name {name}')
        assert (f'Continuing {name} after epoch 1.' in done.stdout) == (name != 'whole')
        assert_same_run(tmp_path / 'results' / name, tmp_path / 'results' / 'whole')


@pytest.fixture
def unfinished(tmp_path, few_images):
    """The folder of a run of two epochs that was killed in its second one."""
    assert killed(30, tmp_path, OPTIONS) and len(rows(tmp_path / 'results' / 'mlp')) == 1
    return tmp_path / 'results' / 'mlp'


def content(folder):
    """The files in a folder and its folders, without their locks."""
    return {file: file.read_bytes() for file in folder.rglob('*.*') if file.is_file()}


def test_an_opened_run_has_the_weights_the_momentum_and_the_epochs_of_its_checkpoint(
        unfinished, tmp_path, monkeypatch):
    saved = torch.load(unfinished / 'last.pt')
    config = Configuration.from_record(saved['configuration'])
    model = build_model(config, torch.device('cpu'))
    optimizer = build_optimizer(model, config)
    (unfinished / 'last.pt.0123.part').write_bytes(b'half')  # left by a write that was killed
    monkeypatch.chdir(tmp_path)
    with open_run('mlp', config, model, optimizer) as run:
        assert [row._asdict() for row in run.history] == saved['history'] and len(run.history) == 1
    assert not list(unfinished.glob('*.part'))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved['model'][name])
    for weight, state in zip(model.parameters(), saved['optimizer']['state'].values(), strict=True):
        momentum = optimizer.state[weight]['momentum_buffer']
        assert momentum.any() and torch.equal(momentum, state['momentum_buffer'])


@pytest.mark.parametrize('old, new', [('--epochs 2', '--epochs 9'), ('--hidden 32', '--hidden 31'),
                                      ('--model mlp', '--model mlp --learning-rate 0.5')])
def test_a_changed_option_is_named_and_nothing_changes(old, new, unfinished, tmp_path):
    before = content(tmp_path)
    done = script(tmp_path, COMMAND.replace(old, new))
    assert done.returncode == 2 and new.split()[-2] in done.stderr and 'another --name' in done.stderr
    assert content(tmp_path) == before


@pytest.mark.parametrize('option', ['--precision fp32', '--precision bf16', '--device cpu', '--patience 7'])
def test_options_that_do_not_change_what_an_epoch_learns_may_change(option, unfinished, tmp_path):
    done = script(tmp_path, f'{COMMAND} {option}')
    assert done.returncode == 0 and 'Continuing mlp after epoch 1.' in done.stdout, done.stderr
    assert len(rows(unfinished)) == 2 and not (tmp_path / 'results' / 'mlp-2').exists()


def test_a_second_process_is_refused_before_it_reads_anything(unfinished, tmp_path, monkeypatch):
    def second_process(*_):
        (unfinished / 'last.pt').write_bytes(b'half')  # as if the first one were just writing
        (unfinished / 'last.pt.0123.part').write_bytes(b'half')
        before = content(tmp_path)
        done = script(tmp_path, COMMAND)
        assert done.returncode == 2 and 'Another process writes' in done.stderr
        assert content(tmp_path) == before
        raise Killed

    monkeypatch.setattr('CIFAR10_train.train_epoch', second_process)
    with pytest.raises(Killed):
        script(tmp_path, COMMAND)


@pytest.mark.parametrize('change', [
    b'', 5000, b'<html>no</html>', lambda saved: saved['model'].pop('fc_out.bias'),
    lambda saved: saved.pop('model'), lambda saved: saved['optimizer']['param_groups'].clear()])
def test_a_damaged_checkpoint_or_one_of_another_network_is_named_and_kept(change, unfinished, tmp_path):
    last = unfinished / 'last.pt'
    if callable(change):
        change(saved := torch.load(last))
        torch.save(saved, last)
    else:
        last.write_bytes(last.read_bytes()[:change] if change == 5000 else change)
    before = content(tmp_path)
    done = script(tmp_path, COMMAND)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and content(tmp_path) == before
    assert ("another network's run" if callable(change) else "can't be loaded") in done.stderr
    assert 'last.pt' in done.stderr and 'another --name' in done.stderr


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(errno.ENOSPC, 'full')])
@pytest.mark.parametrize('moment', ['load_model', 'plot_images', 'plot_runs', 'write_report'])
def test_a_run_is_finished_once_it_is_evaluated_and_reported(moment, error, unfinished, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f'CIFAR10_evaluation.{moment}', refusing(error))
        script(tmp_path, COMMAND)
    before = content(unfinished)
    assert len(rows(unfinished)) == 2 and 'optimizer' in torch.load(unfinished / 'last.pt')
    done = script(tmp_path, COMMAND)  # it is evaluated, and not trained again
    assert done.returncode == 0 and 'Continuing mlp after epoch 2.' in done.stdout, done.stderr
    assert 'epoch 2/2' not in done.stdout and (unfinished / 'evaluation.json').exists()
    for name in 'best.pt', 'history.csv':
        assert before[unfinished / name] == (unfinished / name).read_bytes()
    assert 'optimizer' not in torch.load(unfinished / 'last.pt')
    script(tmp_path, COMMAND)  # from now on it is a rerun
    assert len(rows(tmp_path / 'results' / 'mlp-2')) == 2


def test_a_finished_run_stays_as_it_is_whatever_the_options(tmp_path, few_images):
    before = {}
    for name, epochs in (('mlp', 1), ('mlp-2', 2), ('mlp-3', 1)):
        done = script(tmp_path, COMMAND.replace('--epochs 2', f'--epochs {epochs}'))
        folder = tmp_path / 'results' / name
        assert done.returncode == 0 and len(rows(folder)) == epochs and name in done.stdout, done.stderr
        assert before == {file: file.read_bytes() for file in before}
        (folder / 'best.pt').unlink()  # it is finished also without its weights
        before |= {folder / file: (folder / file).read_bytes() for file in ('history.csv', 'config.json')}
    first, again = (Path('results', name) for name in ('mlp', 'mlp-3'))
    assert re.search(rf'{re.escape(f"{again} repeats {first}")}: [\d.]+ % \(\+0.00\)', done.stdout)


def test_a_second_writer_of_a_file_does_not_disturb_the_first(tmp_path, monkeypatch):
    def second_writer(_):
        monkeypatch.setattr(os, 'fsync', lambda _: None)
        atomic_write(tmp_path / 'file', b'second')

    monkeypatch.setattr(os, 'fsync', second_writer)
    atomic_write(tmp_path / 'file', b'first')
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b'first']


@pytest.mark.parametrize('options, where', [
    ('--model lenet5 --batch-size 5', 'epoch 1/2  step'),
    ('--model mlp --hidden 8 8 8 8 --activation leaky_relu --normalization none --batch-size 130',
     'the validation of epoch 1')])
def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_rate(options, where, tmp_path, few_images):
    done = script(tmp_path, f'CIFAR10_train.py {options} --dataset synthetic --optimizer sgd --epochs 2 '
                            '--warmup 0 --learning-rate 9e8 --learning-rate-decay none')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert all(text in done.stderr for text in (where, 'learning rate 9e+08', 'smaller --learning-rate'))
    assert not list(tmp_path.rglob('best.pt'))


def test_results_that_cannot_be_written_are_found_before_training(tmp_path):
    (tmp_path / 'results').write_text('a file')
    done = script(tmp_path, COMMAND)
    assert done.returncode == 2 and re.fullmatch('.*results.*\n', done.stderr) and 'epoch' not in done.stdout


@pytest.mark.parametrize('name', ['best.pt', 'last.pt', 'history.csv', 'config.json', 'evaluation.json',
                                  'report.html'])
@pytest.mark.parametrize('full', [False, True], ids=['killed', 'full'])
def test_a_kill_or_a_full_disk_after_opening_a_file_leaves_it_as_it_was(full, name, unfinished, tmp_path,
                                                                         monkeypatch):
    file = unfinished.parent / name if name == 'report.html' else unfinished / name
    if not file.exists():
        file.write_text('an old one')
    before, real = file.read_bytes(), open

    def opens(path, mode='r', *arguments, **keywords):
        stream = real(path, mode, *arguments, **keywords)
        if 'w' in mode and Path(path).name.startswith(name):
            stream.write(b'half')
            stream.close()
            raise OSError(errno.ENOSPC, 'No space left on device', str(path)) if full else Killed
        return stream

    monkeypatch.setattr('CIFAR10_train.evaluate', lambda *_: (0.1, 100))  # the second epoch is the best
    monkeypatch.setattr('builtins.open', opens)
    if full:
        done = script(tmp_path, COMMAND)
        assert f'{name} could not be written (No space left' in done.stdout + done.stderr
    else:
        with pytest.raises(Killed):
            script(tmp_path, COMMAND)
    assert file.read_bytes() == before and (not full or not list(tmp_path.rglob('*.part')))


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO, errno.ENOSPC])
def test_a_folder_that_cannot_flush_is_written_but_a_real_error_is_told(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'fsync', refusing(OSError(number, os.strerror(number))))
    told = pytest.raises(UserError, match=f'could not be written .{os.strerror(number)}.')
    with told if number in (errno.EIO, errno.ENOSPC) else contextlib.nullcontext():
        atomic_write(tmp_path / 'file', b'text')
    written = [] if number in (errno.EIO, errno.ENOSPC) else [b'text']
    assert [file.read_bytes() for file in tmp_path.iterdir()] == written


def test_too_little_memory_is_one_sentence_and_a_fault_in_the_program_none(unfinished, tmp_path, monkeypatch):
    before = (unfinished / 'history.csv').read_bytes()
    texts = ("std::bad_alloc", "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity",
             "DefaultCPUAllocator: can't allocate memory: you tried to allocate 327680000 bytes. Error",
             "alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried to allocate",
             "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in MemoryError(), OSError(errno.ENOMEM, 'Cannot allocate memory'), *map(RuntimeError, texts):
        monkeypatch.setattr('CIFAR10_train.train_epoch', refusing(error))
        done = script(tmp_path, COMMAND)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert 'too little memory' in done.stderr and '--batch-size' in done.stderr
    for text in ("mat1 and mat2 shapes cannot be multiplied", "an illegal memory access was encountered",
                 "more than one element of the written-to tensor refers to a single memory location",
                 "libgomp.so.1: cannot allocate memory in static TLS block",
                 "could not create a primitive descriptor for an allocator", "view size is not compatible"):
        monkeypatch.setattr('CIFAR10_train.train_epoch', refusing(RuntimeError(text)))
        with pytest.raises(RuntimeError, match=re.escape(text)):  # it keeps its traceback
            script(tmp_path, COMMAND)
    assert (unfinished / 'history.csv').read_bytes() == before


@pytest.mark.skipif(os.name == 'nt', reason="pipes break otherwise there")
def test_whoever_stops_reading_ends_the_program_quietly(tmp_path):
    training = after_first_epoch(tmp_path, [*TRAIN, *MLP.replace('2', '900').split(), '--hidden', '8'])
    training.stdout.close()
    assert training.stderr.read() == '' and training.wait(60) == 1


@pytest.mark.skipif(os.name == 'nt', reason="closes a descriptor as a shell does")
def test_a_clusters_variables_and_a_closed_output_change_nothing_and_no_file_stays_open(tmp_path):
    variables = dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', PYTHONWARNINGS='error::ResourceWarning')
    done = process(tmp_path, f'CIFAR10_train.py {MLP} --hidden 8', env={**os.environ, **variables},
                   preexec_fn=lambda: os.close(1))
    assert done.returncode == 0 and not done.stderr and len(rows(tmp_path / 'results' / 'mlp')) == 2
    assert (tmp_path / 'results' / 'mlp' / 'accuracy.png').exists()

"""No run is lost: kills, Ctrl-C, a second process, a full disk, bad losses. KILLS=20 is the long version."""
import errno
import itertools
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    Killed,
    after_first_epoch,
    assert_same_run,
    killed,
    process,
    rows,
    script,
    use_few_images,
)

import dataset
from CIFAR10_configuration import SETTINGS, atomic_write
from CIFAR10_train import lock

KILLS = int(os.environ.get('KILLS', 4))
MLP = '--model mlp --dataset synthetic --epochs 2'
OPTIONS = f'{MLP} --hidden 32 --dropout 0.3 --batch-size 10'  # on 130 images, 13 steps an epoch
TRAIN = [sys.executable, str(ROOT / 'CIFAR10_train.py')]


def check_kills(folder, model, moments, options):
    """Train whole, and killed KILLS times, each time within so many moments; both must end the same."""
    # An epoch has 20 to 22 moments: a loss a step, one of the validation, and 6 or 8 to write the files.
    whole, other = folder / 'whole', folder / 'other'
    whole.mkdir()
    other.mkdir()
    options = f'--model {model} --learning-rate 0.01 {options}'
    assert not killed(0, whole, options)
    draw, last = random.Random(1), other / 'results' / model / 'last.pt'
    kills = 0
    epochs = len(torch.load(whole / 'results' / model / 'last.pt')['history'])
    while not last.exists() or len(torch.load(last)['history']) < epochs:
        kills += killed(draw.randint(1, moments) if kills < KILLS else 0, other, options)
    assert kills and not (other / 'results' / f'{model}-2').exists()
    assert_same_run(whole / 'results' / model, other / 'results' / model)


def report(folder):
    """The report of the runs in a folder, without the minutes that they took."""
    done = script(folder, 'CIFAR10_evaluation.py')
    assert done.returncode == 0, done.stderr
    text = (folder / 'results' / 'report.html').read_text(encoding='utf-8')
    return re.sub(r'<td title="(training time \(m\)|Minutes)">[\d.]+</td>', '', text)


@pytest.mark.parametrize('model', SETTINGS)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(model, tmp_path, few_images):
    smaller = dict(mlp='--hidden 64 32', lenet5='', resnet32='--depth 8')[model]
    check_kills(tmp_path, model, 30, f'--dataset synthetic --epochs 3 --batch-size 10 {smaller}')
    assert report(tmp_path / 'whole') == report(tmp_path / 'other')


@pytest.mark.skipif('CIFAR10_DIR' not in os.environ or KILLS < 20, reason="set CIFAR10_DIR and KILLS=20")
@pytest.mark.parametrize('model', SETTINGS)
def test_runs_on_real_images_killed_at_random_moments(model, tmp_path, monkeypatch):
    read = dataset.read_cifar10
    monkeypatch.setattr(dataset, 'read_cifar10', lambda *given: [tensor[:1000] for tensor in read(*given)])
    images = shlex.quote(os.environ['CIFAR10_DIR'])
    check_kills(tmp_path, model, 40, f'--data-dir {images} --epochs 8 --batch-size 100')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The options of a run of two epochs on all synthetic images, and its folder."""
    folder, options = tmp_path_factory.mktemp('whole'), f'{MLP} --hidden 256 --batch-size 50'
    assert not killed(0, folder, options)
    return options, folder / 'results' / 'mlp'


@pytest.mark.skipif(os.name == 'nt', reason="sends POSIX signals")
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_keeps_the_finished_epochs_and_the_same_command_continues(number, code, whole, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    training = after_first_epoch(tmp_path, TRAIN + whole[0].split())
    training.send_signal(number)
    output, errors = training.communicate(timeout=60)
    assert training.returncode == code and not errors
    assert ('the same command continues' in output) == (number == signal.SIGINT)
    done = script(tmp_path, f'CIFAR10_train.py {whole[0]}')
    assert done.returncode == 0 and 'Continuing mlp after epoch 1' in done.stdout
    assert_same_run(tmp_path / 'results' / 'mlp', whole[1])


@pytest.fixture(scope='module')
def unfinished(tmp_path_factory):
    """The folder of a run of two epochs that was killed in its second one."""
    folder = tmp_path_factory.mktemp('unfinished')
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        assert killed(30, folder, OPTIONS) and len(rows(folder / 'results' / 'mlp')) == 1
    return folder


def content(folder, name='mlp'):
    """The files of a run that its evaluation leaves alone."""
    folder, files = folder / 'results' / name, ('best.pt', 'last.pt', 'history.csv', 'config.json')
    return {folder / file: (folder / file).read_bytes() for file in files}


def test_what_is_left_of_a_deleted_run_does_not_hinder_a_new_one(unfinished, tmp_path, few_images):
    folder = shutil.copytree(unfinished / 'results', tmp_path / 'results') / 'mlp'
    for name in 'reported', 'evaluation.json':
        (folder / name).write_text('')
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    assert done.returncode == 0 and 'Continuing mlp after epoch 1' in done.stdout and len(rows(folder)) == 2


@pytest.mark.parametrize('old, new', [('--epochs 2', '--epochs 9'), ('--hidden 32', '--hidden 31'),
                                      ('--model mlp', '--model mlp --learning-rate 0.5')])
def test_a_changed_option_is_named_and_nothing_changes(old, new, unfinished, few_images):
    before = content(unfinished)
    done = script(unfinished, f'CIFAR10_train.py {OPTIONS.replace(old, new)}')
    assert done.returncode == 2 and new.split()[-2] in done.stderr and 'another --name' in done.stderr
    assert content(unfinished) == before and not (unfinished / 'results' / 'mlp-2').exists()


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_options_that_only_change_the_speed_may_change(precision, unfinished, tmp_path, few_images):
    shutil.copytree(unfinished / 'results', tmp_path / 'results')
    # Refused, it would not live to see a step.
    assert killed(15, tmp_path, f'{OPTIONS} --precision {precision} --device cpu')
    assert len(rows(tmp_path / 'results' / 'mlp')) == 1


def test_a_second_process_is_refused(unfinished, few_images):
    before = content(unfinished)
    with lock(unfinished / 'results' / 'mlp'):
        done = script(unfinished, f'CIFAR10_train.py {OPTIONS}')
    assert done.returncode == 2 and 'Another process writes' in done.stderr
    assert content(unfinished) == before


@pytest.mark.parametrize('bad', [b'', b'\0' * 1000, 5000, b'<html>no</html>'])
def test_a_damaged_checkpoint_is_named_and_kept(bad, unfinished, tmp_path, few_images):
    last = shutil.copytree(unfinished / 'results', tmp_path / 'results') / 'mlp' / 'last.pt'
    bad = last.read_bytes()[:bad] if bad == 5000 else bad
    last.write_bytes(bad)
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    assert done.returncode == 2 and "last.pt can't be loaded" in done.stderr and last.read_bytes() == bad
    assert 'another --name' in done.stderr


@pytest.mark.parametrize('change', [
    lambda saved: saved['model'].update({'layers.1.weight': torch.zeros(9, 9)}),
    lambda saved: saved['model'].pop('fc_out.bias'), lambda saved: saved.pop('optimizer'),
    lambda saved: saved['optimizer']['param_groups'].clear()])
def test_a_checkpoint_of_another_network_is_named_and_kept(change, unfinished, tmp_path, few_images):
    last = shutil.copytree(unfinished / 'results', tmp_path / 'results') / 'mlp' / 'last.pt'
    saved = torch.load(last)
    change(saved)
    torch.save(saved, last)
    before = content(tmp_path)
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    assert done.returncode == 2 and "another network's run" in done.stderr and 'another --name' in done.stderr
    assert content(tmp_path) == before


@pytest.mark.parametrize('moment', ['CIFAR10_evaluation.predict', 'CIFAR10_train.plot_accuracy',
                                    'CIFAR10_evaluation.write_report'])
def test_whatever_interrupts_the_evaluation_no_finished_run_is_trained_again(moment, tmp_path, few_images):
    for error in KeyboardInterrupt(), OSError(errno.ENOSPC, 'full'):
        with pytest.MonkeyPatch.context() as patch:
            if moment.endswith('predict'):  # which validation calls too
                patch.setattr('CIFAR10_train.evaluate', lambda *_: (1, 50))
            patch.setattr(moment, refusing(error))
            script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
        assert (tmp_path / 'results' / 'mlp' / 'evaluation.json').exists() == ('report' in moment)
    before = content(tmp_path)
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    assert done.returncode == 0 and 'epoch 2/2' not in done.stdout, done.stderr
    assert (tmp_path / 'results' / 'mlp' / 'evaluation.json').exists()
    assert not (tmp_path / 'results' / 'mlp-2').exists()
    assert {file: text for file, text in before.items() if file.suffix != '.pt'} == {
        file: text for file, text in content(tmp_path).items() if file.suffix != '.pt'}
    assert len(rows(tmp_path / 'results' / 'mlp')) == 2
    script(tmp_path, f'CIFAR10_train.py {OPTIONS}')  # from now on it is a rerun
    assert len(rows(tmp_path / 'results' / 'mlp-2')) == 2


def test_a_finished_run_without_its_weights_stays_and_the_same_command_trains_anew(tmp_path, few_images):
    for evaluated in False, True:
        folder = tmp_path / f'{evaluated}'
        folder.mkdir()
        command = f'CIFAR10_train.py {OPTIONS}'
        assert script(folder, command).returncode == 0 if evaluated else not killed(0, folder, OPTIONS)
        (folder / 'results' / 'mlp' / 'best.pt').unlink()
        for number in 2, 3:
            done = script(folder, command)
            assert done.returncode == 0 and 'Continuing' not in done.stdout, done.stderr
            assert (folder / 'results' / f'mlp-{number}' / 'best.pt').exists()


def test_a_single_run_named_as_a_group_is_refused_and_leaves_the_group_alone(tmp_path, few_images):
    assert script(tmp_path, f'CIFAR10_train.py {OPTIONS} --name s --seed 0 1').returncode == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob('*') if file.is_file()}
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS} --name s --seed 3')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and 'GROUP/RUN' in done.stderr
    assert {file: file.read_bytes() for file in tmp_path.rglob('*') if file.is_file()} == before
    assert script(tmp_path, f'CIFAR10_train.py {OPTIONS} --name s/3 --seed 3').returncode == 0


def test_what_a_killed_write_left_goes_with_the_next_training(unfinished, tmp_path, few_images):
    folder = shutil.copytree(unfinished / 'results', tmp_path / 'results') / 'mlp'
    (folder / 'last.pt.0123.part').write_bytes(b'half')
    assert script(tmp_path, f'CIFAR10_train.py {OPTIONS}').returncode == 0
    assert not list(tmp_path.rglob('*.part'))


def test_writers_of_one_file_at_once_all_write_it_whole(tmp_path):
    file = tmp_path / 'report.html'

    def write(letter):
        for size in range(1, 200_000, 5000):
            atomic_write(file, letter * size)
            assert len(set(file.read_bytes())) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, [b'a', b'b', b'c', b'd']))
    assert list(tmp_path.iterdir()) == [file]


def test_a_finished_run_stays_as_it_is_whatever_the_options(tmp_path, few_images):
    before = {}
    for name, epochs in (('mlp', 1), ('mlp-2', 2), ('mlp-3', 1)):
        options = MLP.replace('--epochs 2', f'--epochs {epochs}')
        done = script(tmp_path, f'CIFAR10_train.py {options} --hidden 8 --precision fp32')
        assert done.returncode == 0 and len(rows(tmp_path / 'results' / name)) == epochs, done.stderr
        assert name in done.stdout and before == {file: file.read_bytes() for file in before}
        before |= content(tmp_path, name)
    assert re.search(r'mlp was repeated: mlp-3 [\d.]+ % \(\+0.00\)\.', done.stdout)


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
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    assert done.returncode == 2 and 'results' in done.stderr and 'epoch 1' not in done.stdout
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('name', ['best.pt', 'last.pt', 'history.csv', 'config.json', 'evaluation.json',
                                  'report.html'])
@pytest.mark.parametrize('full', [False, True], ids=['killed', 'full'])
def test_a_kill_or_a_full_disk_after_opening_a_file_leaves_it_as_it_was(full, name, unfinished, tmp_path,
                                                                         few_images, monkeypatch):
    results = shutil.copytree(unfinished / 'results', tmp_path / 'results')
    file = results / name if name == 'report.html' else results / 'mlp' / name
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
        done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
        assert done.returncode == (0 if name == 'evaluation.json' else 2)
        assert f'{name} could not be written (No space left' in done.stdout + done.stderr
        assert ('% recomputed' in done.stdout) == (name in ('evaluation.json', 'report.html'))
    else:
        with pytest.raises(Killed):
            script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    assert file.read_bytes() == before and (not full or not list(results.rglob('*.part')))


@pytest.mark.skipif(os.name == 'nt', reason="limits the size of files as POSIX does")
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(unfinished, tmp_path):
    import resource

    shutil.copytree(unfinished / 'results', tmp_path / 'results')
    last = tmp_path / 'results' / 'mlp' / 'last.pt'
    before = last.read_bytes()
    done = process(tmp_path, f'CIFAR10_train.py {OPTIONS}',
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and '.pt could not be written' in done.stderr and last.read_bytes() == before
    assert not list(last.parent.glob('*.part'))


CANNOT_FLUSH = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS]


@pytest.mark.parametrize('number', [*CANNOT_FLUSH, errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_flush_is_written_but_a_real_error_is_told(number, tmp_path, few_images,
                                                                        monkeypatch):
    monkeypatch.setattr(os, 'fsync', refusing(OSError(number, os.strerror(number))))
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    if number in CANNOT_FLUSH:
        assert done.returncode == 0 and len(rows(tmp_path / 'results' / 'mlp')) == 2, done.stderr
    else:
        assert done.returncode == 2 and f'could not be written ({os.strerror(number)})' in done.stderr


def refusing(error):
    """A function that raises an error, whatever it is given."""
    def refuse(*_, **__):
        raise error
    return refuse


NO_MEMORY = [RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                          "memory: you tried to allocate 327680000 bytes. Error code 12"),
             torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total of"),
             RuntimeError("std::bad_alloc"), MemoryError(), OSError(errno.ENOMEM, 'Cannot allocate memory'),
             RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
             RuntimeError("[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory"),
             MemoryError("Unable to allocate 1.5 GiB for an array")]


@pytest.mark.parametrize('error', NO_MEMORY, ids=range(len(NO_MEMORY)))
@pytest.mark.parametrize('name', ['CIFAR10_train.train_epoch', 'CIFAR10_train.evaluate',
                                  'CIFAR10_evaluation.predict'])
def test_too_little_memory_is_one_sentence_and_keeps_the_finished_epochs(name, error, unfinished, tmp_path,
                                                                         few_images, monkeypatch):
    shutil.copytree(unfinished / 'results', tmp_path / 'results')
    before = content(tmp_path)
    monkeypatch.setattr(name, refusing(error))
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert 'too little memory' in done.stderr and '--batch-size' in done.stderr
    if 'predict' not in name:
        assert {file: text for file, text in content(tmp_path).items() if file.name != 'last.pt'} == {
            file: text for file, text in before.items() if file.name != 'last.pt'}
    # An error in the program keeps its traceback
    for text in ("mat1 and mat2 shapes cannot be multiplied", "an illegal memory access was encountered",
                 "more than one element of the written-to tensor refers to a single memory location",
                 "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL version 2.27.5\n"
                 "ncclSystemError: System call (e.g. socket, malloc) or external library call failed.",
                 "libgomp.so.1: cannot allocate memory in static TLS block",
                 "could not create a primitive descriptor for an allocator", "view size is not compatible"):
        monkeypatch.setattr(name, refusing(RuntimeError(text)))
        with pytest.raises(RuntimeError, match=re.escape(text)):
            script(tmp_path, f'CIFAR10_train.py {OPTIONS} --name other')


@pytest.mark.parametrize('times', [itertools.repeat(5.0), itertools.count(step=1e-9)])
def test_a_clock_that_stands_still_stops_nothing(times, unfinished, tmp_path, few_images, monkeypatch):
    shutil.copytree(unfinished / 'results', tmp_path / 'results')
    monkeypatch.setattr('CIFAR10_train.monotonic', lambda: next(times))
    done = script(tmp_path, f'CIFAR10_train.py {OPTIONS}')
    assert done.returncode == 0, done.stderr
    first, second = (float(row['seconds']) for row in rows(tmp_path / 'results' / 'mlp'))
    assert second >= first > 0


@pytest.mark.skipif(os.name == 'nt', reason="pipes break otherwise there")
@pytest.mark.parametrize('lines', [0, 1])
def test_whoever_stops_reading_ends_the_program_quietly(lines, tmp_path):
    options = MLP.replace('--epochs 2', '--epochs 900 --hidden 8')
    training = subprocess.Popen([*TRAIN, *options.split()], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, 'PYTHONUNBUFFERED': ''})
    for _ in range(lines):
        training.stdout.readline()
    training.stdout.close()
    assert training.stderr.read() == '' and training.wait(60) == 1


@pytest.mark.skipif(os.name == 'nt', reason="closes a descriptor as a shell does")
def test_a_closed_output_stops_no_training(tmp_path):
    done = process(tmp_path, f'CIFAR10_train.py {MLP} --hidden 8', preexec_fn=lambda: os.close(1))
    assert done.returncode == 0 and len(rows(tmp_path / 'results' / 'mlp')) == 2, done.stderr


def test_a_clusters_variables_change_nothing_and_no_file_stays_open(tmp_path):
    variables = dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', PYTHONWARNINGS='error::ResourceWarning')
    done = process(tmp_path, f'CIFAR10_train.py {MLP} --hidden 8', env={**os.environ, **variables})
    assert done.returncode == 0 and not done.stderr and len(rows(tmp_path / 'results' / 'mlp')) == 2
    assert (tmp_path / 'results' / 'mlp' / 'accuracy.png').exists()

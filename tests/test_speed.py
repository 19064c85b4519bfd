"""What makes training faster leaves its results alone: precision, compilation, several processes."""
import copy
import dataclasses
import os
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_training import fresh, rows
from torch.utils.data import TensorDataset

from CIFAR10_configuration import SETTINGS
from CIFAR10_train import accelerate, batch_norm, build_model, build_optimizer, evaluate, train_epoch
from dataset import crop_and_flip, data_load, training_batches

CPU = torch.device('cpu')
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2']
SLOW = dict(precision='fp32', compile='off')


def first(images):
    """The first images of the synthetic training set."""
    return TensorDataset(*(tensor[:images] for tensor in data_load('synthetic')[0].tensors))


@pytest.mark.parametrize('name', SETTINGS)
def test_the_first_20_losses_equal_those_of_a_plain_loop(name):
    """In double precision, for batch norm soon magnifies the roundings of single precision."""
    config = dataclasses.replace(SETTINGS[name], batch_size=40, optimizer='sgd', learning_rate=0.01, epochs=1, momentum=0.9,
                                 learning_rate_decay='none', weight_decay=1e-3, warmup=0.0, dropout=0.0, **SLOW)
    data = first(790)  # the last batch is a smaller one
    torch.manual_seed(0)
    model = build_model(config).double()
    plain, losses, expected = copy.deepcopy(model), [], []
    forward = accelerate(model, config, CPU, steps=20)

    def watched(images, labels):
        loss, logits = forward(images.double(), labels)
        losses.append(loss.item())
        return loss, logits

    train_epoch(model, watched, build_optimizer(model, config), data, config, fresh())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3, foreach=False)
    for images, labels in training_batches(data, 40, seed=0):
        loss = torch.nn.CrossEntropyLoss()(plain(images.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert len(losses) == 20 and losses == pytest.approx(expected, rel=1e-6)


def test_the_modules_that_are_compiled_give_the_same_values_gradients_and_running_means():
    """In double precision, for batch norm soon magnifies the roundings of single precision."""
    model = build_model(SETTINGS['resnet32']).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    other = copy.deepcopy(model)
    accelerate(other, dataclasses.replace(SETTINGS['resnet32'], compile='on'), CPU, steps=1)
    assert other.bn1.forward.__func__ is batch_norm
    features = torch.randn(2, 16, 32, 32)
    assert torch.equal(*(net.layers_4n[0].down_sample(features) for net in (model, other)))
    images = torch.randn(8, 3, 32, 32).double() + 1
    for images in images, -images:
        outputs = [net(images) for net in (model, other)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(model.state_dict(), other.state_dict())
    tested = copy.deepcopy(other).eval()
    other.bn1.running_mean.add_(1)
    torch.testing.assert_close(tested(images), model.eval()(images))


def test_dropout_silences_its_share_scales_the_rest_and_leaves_testing_alone():
    config = dataclasses.replace(SETTINGS['mlp'], dropout=0.3, **SLOW)
    model = build_model(config)
    accelerate(model, config, CPU, steps=1)
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
    x = torch.randn(333, 1001, requires_grad=True)  # no multiple of four
    torch.manual_seed(0)
    y = layer(x)
    kept = y != 0
    assert (~kept).float().mean() == pytest.approx(0.3, abs=0.004)  # 5 standard deviations
    for dim in 0, 1:  # no unit and no image is preferred
        assert (~kept).float().mean(dim).std() < 1.2 * (0.21 / kept.shape[dim]) ** 0.5
    assert not torch.equal(kept[:, :-4], kept[:, 4:]) and abs((kept[:, :-1] == kept[:, 1:]).float().mean() - 0.58) < 0.01
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    y.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.7)
    assert not torch.equal(layer(x), y)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x)


def accuracies(name, epochs, images, **speed):
    """Validation accuracy on the synthetic images with each of three seeds, after 50 steps an epoch."""
    data, val_data = first(images), data_load('synthetic')[1]
    for seed in range(3):
        config = dataclasses.replace(SETTINGS[name], epochs=epochs, batch_size=images // 50, seed=seed, learning_rate_decay='cosine',
                                     optimizer='sgd', learning_rate=0.02, **speed)
        torch.manual_seed(seed)
        model = build_model(config)
        forward, optimizer = accelerate(model, config, CPU, steps=1), build_optimizer(model, config)
        for epoch in range(epochs):
            train_epoch(model, forward, optimizer, data, config, fresh(epoch))
        yield evaluate(model, val_data)[1]


@pytest.mark.parametrize('name, epochs, images, faster', [('lenet5', 6, 5000, ['off', 'on']), ('resnet32', 2, 2500, ['on'])])
def test_bf16_and_compiled_runs_are_as_accurate_as_float32_within_seed_noise(name, epochs, images, faster):
    plain = list(accuracies(name, epochs, images, **SLOW))
    assert statistics.mean(plain) > 50  # they learned something
    for way in faster:
        found = list(accuracies(name, epochs, images, precision='bf16', compile=way))
        noise = (statistics.variance(plain) + statistics.variance(found)) ** 0.5
        assert abs(statistics.mean(found) - statistics.mean(plain)) < 2.5 * noise + 0.5, (plain, found)


def test_a_failing_compiler_is_named_and_training_goes_on_without(process, tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    done = process(tmp_path, 'CIFAR10_train.py', '--model', 'lenet5', '--dataset', 'synthetic', '--epochs', 1, '--compile', 'on')
    assert done.returncode == 0 and done.stdout.count('without compilation') == 1 and 'epoch 1/1' in done.stdout


def test_a_failing_compiler_leaves_the_model_as_it_was(monkeypatch, capsys):
    def failing(*_, **__):
        def fail(*_):
            raise RuntimeError
        return fail

    monkeypatch.setattr(torch, 'compile', failing)
    config = dataclasses.replace(SETTINGS['resnet32'], compile='on', batch_size=8)
    model = build_model(config)
    forward = accelerate(model, config, CPU, steps=1)
    assert any('forward' in vars(m) for m in model.modules())
    forward(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))
    assert not any('forward' in vars(m) for m in model.modules())
    assert 'without compilation, which failed (RuntimeError)' in capsys.readouterr().out


def test_processes_together_see_each_batch_once():
    data = first(130)
    whole = list(training_batches(data, 32, seed=5))
    shares = [list(training_batches(data, 32, 5, rank=rank, world=3)) for rank in range(3)]
    for batch, *parts in zip(whole, *shares):
        for rank, (images, labels) in enumerate(parts):
            assert torch.equal(images, batch[0][rank::3]) and torch.equal(labels, batch[1][rank::3])
        assert sum(len(labels) for _, labels in parts) == len(batch[1])


def torchrun(folder, *command):
    return subprocess.run([*TORCHRUN, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=300)


WORKER = f"""
import os, sys, torch, torch.distributed as dist
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from test_speed import *
dist.init_process_group()
rank = dist.get_rank()
def train():  # a function, so that the parallel model is gone before its processes part
    config = dataclasses.replace(SETTINGS[sys.argv[1]], batch_size=40, epochs=1, **SLOW)
    torch.manual_seed(rank)  # the first process's weights must reach the second one
    model = build_model(config)
    forward = accelerate(model, config, CPU, steps=5)
    def dying(images, labels):
        if sys.argv[2] == 'dies' and rank == 1:
            os._exit(9)
        return forward(images, labels)
    train_epoch(model, dying, build_optimizer(model, config), first(190), config, fresh())
    torch.save(dict(model.named_parameters()), f'{{rank}}.pt')
train()
dist.destroy_process_group()
"""


@pytest.mark.parametrize('name', ['lenet5', 'resnet32'])
def test_two_processes_end_with_identical_weights(name, tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    done = torchrun(tmp_path, 'worker.py', name, 'lives')
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert one and all(torch.equal(one[name], two[name]) for name in one)


def test_a_process_that_dies_ends_the_run_with_an_error(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    began = time.time()
    assert torchrun(tmp_path, 'worker.py', 'lenet5', 'dies').returncode != 0
    assert time.time() - began < 120 and not (tmp_path / '0.pt').exists()


def test_without_batch_norm_two_processes_train_as_one(script, tmp_path):
    options = ['--model', 'lenet5', '--dataset', 'synthetic', '--epochs', 2, '--batch-size', 120, '--precision', 'fp32']
    alone = script(tmp_path, 'CIFAR10_train.py', *options, '--name', 'alone')
    together = torchrun(tmp_path, ROOT / 'CIFAR10_train.py', *options, '--name', 'together')
    assert alone.returncode == 0 and together.returncode == 0, together.stderr
    assert together.stdout.count('epoch 1/2') == together.stdout.count('The report is') == 1  # only one process prints
    for a, b in zip(*(rows(tmp_path / 'results' / name) for name in ('alone', 'together'))):
        for column in ('train_loss', 'val_loss', 'learning_rate'):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=2e-3)
        for column in ('train_accuracy', 'val_accuracy'):
            assert float(a[column]) == pytest.approx(float(b[column]), abs=1.0)


@pytest.mark.skipif(os.name == 'nt', reason="sends POSIX signals")
def test_two_processes_are_interrupted_saved_and_continued(tmp_path):
    command = [*TORCHRUN, str(ROOT / 'CIFAR10_train.py'), '--model', 'lenet5', '--dataset', 'synthetic', '--epochs', '6', '--name', 'two']
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith('epoch 1/'):
            break
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and output.count('the same command continues') == 1
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and 'Continuing two at epoch 2' in done.stdout and len(rows(tmp_path / 'results' / 'two')) == 6


def test_a_batch_that_does_not_reach_every_process_is_refused(tmp_path):
    done = torchrun(tmp_path, ROOT / 'CIFAR10_train.py', '--model', 'mlp', '--dataset', 'synthetic', '--batch-size', 4999)
    assert done.returncode != 0 and done.stderr.count('--batch-size 4999 leaves a batch') == 1
    assert not (tmp_path / 'results').exists()


def test_random_crops_do_not_change_the_images_they_are_taken_from():
    images = first(20).tensors[0]
    before = images.clone()
    crop_and_flip(images, torch.full((20, 2), 4), torch.ones(20, dtype=bool))
    assert torch.equal(images, before)

"""Devices that are not here: a processor with and without bf16, Apple's GPU, a GPU that PyTorch can't use."""
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
from conftest import process, script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dataset
from CIFAR10_configuration import Run, UserError, configure
from CIFAR10_evaluation import build_model, choose_device
from CIFAR10_train import build_optimizer, choose_precision
from dataset import data_load, training_batches

CPU = torch.device('cpu')
SMALL = '--dataset synthetic --epochs 1'


@pytest.mark.skipif('BF16' not in os.environ, reason="set BF16=0 or BF16=1, see conftest.py")
def test_the_switch_decides_what_every_process_believes_of_the_processor(tmp_path):
    believed = {'0': 'fp32', '1': 'bf16'}[os.environ['BF16']]
    assert choose_precision('auto', CPU) == believed
    process(tmp_path, f'CIFAR10_train.py --model mlp --hidden 8 {SMALL} --name run')
    assert Run.read(tmp_path / 'results' / 'run').machine['precision'] == believed


class NoFloat64(TorchDispatchMode):
    """Refuses every result in float64, as Apple's GPU does."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if any(torch.is_tensor(t) and t.dtype == torch.float64 for t in tree_leaves(result)):
            raise TypeError(f"no float64 here: {function}")
        return result


def test_what_refuses_float64_refuses_it():
    with NoFloat64(), pytest.raises(TypeError, match='no float64'):
        torch.ones(2).double()


@pytest.mark.parametrize('options', [
    '--model mlp --hidden 8 --optimizer sgd --max-norm 1 --holdout 50 --dropout 0.1',
    '--model lenet5 --optimizer nesterov --clip 1 --holdout 50',
    '--model resnet32 --depth 8 --optimizer adam --learning-rate 0.001 --max-norm 2 --clip 1 --holdout 50'])
def test_everything_runs_where_there_is_no_float64(options, tmp_path, few_images):
    with NoFloat64():
        done = script(tmp_path, f'CIFAR10_train.py {options} {SMALL} --batch-size 10 --name run')
        assert done.returncode == 0 and '% recomputed' in done.stdout, done.stdout + done.stderr
        done = script(tmp_path, 'CIFAR10_evaluation.py')
        assert done.returncode == 0 and '% recomputed' in done.stdout, done.stdout + done.stderr
        done = script(tmp_path, 'CIFAR10_evaluation.py --predict results/run/mistakes.png')
    assert done.returncode == 0 and '% sure' in done.stdout, done.stdout + done.stderr


def test_images_and_batches_lie_channel_by_channel_however_torchvision_keeps_them(small_cifar10, monkeypatch):
    class PixelByPixel(dataset.CIFAR10):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            self.data = np.ascontiguousarray(self.data)

    before, _ = data_load('cifar10', small_cifar10, urls=())
    monkeypatch.setattr(dataset, 'CIFAR10', PixelByPixel)
    for holdout in 0, 10:
        for data in data_load('cifar10', small_cifar10, holdout=holdout, urls=()):
            assert data.tensors[0].is_contiguous()
            for augmentation in 'on', 'off':
                config = configure('lenet5', augmentation=augmentation, batch_size=10)
                assert all(images.is_contiguous() for images, _ in training_batches(data, config, seed=0))
    assert torch.equal(data_load('cifar10', small_cifar10, urls=())[0].tensors[0], before.tensors[0])


@pytest.mark.parametrize('device, wanted', [('mps', []), ('cpu', [torch.channels_last])])
def test_weights_are_not_moved_to_channels_last_for_apples_gpu(device, wanted, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, 'to', lambda self, *_, **options: calls.append(options) or self)
    build_model(configure('lenet5'), torch.device(device))
    assert [options['memory_format'] for options in calls if options] == wanted


class OnDevice(torch.Tensor):
    """A tensor of a device that sorts unstably, of equals the last first."""

    def argsort(self, *_, **__):
        return torch.from_numpy(np.lexsort((-np.arange(len(self)), self.numpy())))

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_the_held_out_images_are_the_same_on_a_device_that_sorts_unstably(monkeypatch):
    wanted = [data.tensors[0] for data in data_load('synthetic', holdout=500, seed=3)]
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, device: self.as_subclass(OnDevice))
    found = [data.tensors[0] for data in data_load('synthetic', holdout=500, seed=3)]
    assert all(type(images) is OnDevice for images in found)
    for images, same in zip(found, wanted, strict=True):
        assert torch.equal(images.cpu(), same)


@pytest.mark.parametrize('name', ['sgd', 'adam'])
def test_a_state_saved_in_another_layout_belongs_to_the_same_weights(name):
    config = configure('lenet5', optimizer=name, momentum=0.9, weight_decay=0)
    ends = []
    for layout in torch.contiguous_format, torch.channels_last:
        torch.manual_seed(0)
        model = build_model(config, CPU)
        optimizer = build_optimizer(model, config)
        weights = list(model.parameters())
        before = [p.detach().clone() for p in weights]
        buffers = [torch.rand(p.shape) for p in weights]
        saved = [b.contiguous(memory_format=layout) if b.dim() == 4 else b for b in buffers]
        keys = dict(sgd=['momentum_buffer'], adam=['exp_avg', 'exp_avg_sq'])[name]
        state = {i: {key: buffer.clone() for key in keys} | {'step': torch.tensor(9.0)}
                 for i, buffer in enumerate(saved)}
        optimizer.load_state_dict({**optimizer.state_dict(), 'state': state})
        for p in weights:
            p.grad = torch.full_like(p, 0.1)
        optimizer.param_groups[0]['lr'] = 0.01
        optimizer.step()
        ends.append([p.detach() for p in weights])
        if name == 'sgd':
            for old, buffer, new in zip(before, buffers, weights, strict=True):
                torch.testing.assert_close(new, old - 0.01 * (0.9 * buffer + 0.1))
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_every_network_of_a_group_is_compiled(tmp_path, few_images, monkeypatch):
    widths, compile = [], torch.compile

    def backend(graph, inputs):
        widths.extend(x.shape[0] for x in inputs if torch.is_tensor(x) and x.shape[1:] == (3072,))
        return graph.forward

    monkeypatch.setattr(torch, 'compile', lambda model, **_: compile(model, dynamic=False, backend=backend))
    done = script(tmp_path, f'CIFAR10_train.py --model mlp {SMALL} --compile --name c '
                            '--hidden 3 --hidden 4 --hidden 5 --hidden 6 --hidden 7')
    assert done.returncode == 0 and set(widths) >= {3, 4, 5, 6, 7}, done.stderr


def test_several_processes_on_apples_gpu_get_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert choose_device('mps').type == 'mps'
    monkeypatch.setattr('CIFAR10_evaluation.WORLD_SIZE', 2)
    with pytest.raises(UserError, match='--device cpu'):
        choose_device('mps')


def test_processes_wait_for_a_download_of_hours(tmp_path, monkeypatch):
    given = {}

    def start(**options):
        given.update(options)
        raise UserError("enough")

    monkeypatch.setattr('CIFAR10_train.WORLD_SIZE', 2)
    monkeypatch.setattr('torch.distributed.init_process_group', start)
    script(tmp_path, f'CIFAR10_train.py --model mlp {SMALL}')
    assert given['timeout'] >= timedelta(hours=12)


UNUSABLE = ["CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might",
            "HIP error: invalid device function", "cuDNN error: CUDNN_STATUS_ARCH_MISMATCH",
            "The operator 'aten::x' is not currently implemented for the MPS device. If you want"]


@pytest.mark.parametrize('text', UNUSABLE)
@pytest.mark.parametrize('name', ['train', 'evaluation'])
def test_a_gpu_that_pytorch_cannot_use_gets_one_sentence(name, text, tmp_path, monkeypatch, few_images):
    def refuse(*_):
        raise NotImplementedError(text) if 'MPS' in text else RuntimeError(text)

    torch.save({}, tmp_path / 'x.pt')
    monkeypatch.setattr(f'CIFAR10_{name}.build_model', refuse)
    done = script(tmp_path, f'CIFAR10_{name}.py ' + dict(train=SMALL, evaluation='--weights x.pt')[name])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and '--device cpu' in done.stderr


def test_both_scripts_have_device(trained):
    for command in 'train --model mlp --epochs 1', 'evaluation --name lenet5':
        name, _, options = command.partition(' ')
        done = script(trained[0], f'CIFAR10_{name}.py {options} --device tpu')
        assert done.returncode == 2 and 'no tpu: leave --device out' in done.stderr

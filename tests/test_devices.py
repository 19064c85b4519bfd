"""Devices that are not here: a processor with and without bf16, Apple's GPU, a GPU that PyTorch can't use."""
import shutil
from unittest.mock import Mock

import pytest
import torch
from conftest import script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from CIFAR10_configuration import Run, UserError, configure
from CIFAR10_evaluation import build_model, choose_device
from CIFAR10_train import build_optimizer

SMALL = 'CIFAR10_train.py --model mlp --hidden 8 --dataset synthetic --epochs 1 --name run'


@pytest.mark.parametrize('native, precision', [(True, 'bf16'), (False, 'fp32')])
def test_a_processor_trains_in_bf16_if_it_multiplies_it(native, precision, tmp_path, monkeypatch, few_images):
    monkeypatch.setattr('torch.cpu.get_capabilities', lambda: {'avx512_bf16': native}, raising=False)
    script(tmp_path, f'{SMALL} --device cpu')
    assert Run.read(tmp_path / 'results' / 'run').machine['precision'] == precision


class NoFloat64(TorchDispatchMode):
    """Refuses every result in float64, as Apple's GPU does."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if any(torch.is_tensor(t) and t.dtype == torch.float64 for t in tree_leaves(result)):
            raise TypeError(f"no float64 here: {function}")
        return result


@pytest.mark.parametrize('options', [
    '--name run --model mlp --hidden 8 --optimizer sgd --max-norm 1 --dropout 0.1',
    '--name run --model lenet5 --optimizer nesterov --clip 1',
    '--name run --model resnet32 --depth 8 --optimizer nesterov --learning-rate 0.001 --max-norm 2 --clip 1'])
def test_everything_runs_where_there_is_no_float64(options, tmp_path, few_images):
    with NoFloat64():
        with pytest.raises(TypeError, match='no float64'):
            torch.ones(2).double()
        for command in (f'train.py --dataset synthetic --epochs 1 --batch-size 10 --holdout 50 {options}',
                        'evaluation.py', 'evaluation.py --predict results/run/mistakes.png'):
            done = script(tmp_path, f'CIFAR10_{command}')
            said = '% sure' if 'predict' in command else '% recomputed'
            assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize('device, wanted', [('mps', []), ('cpu', [torch.channels_last])])
def test_weights_are_not_moved_to_channels_last_for_apples_gpu(device, wanted, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, 'to', lambda self, *_, **options: calls.append(options) or self)
    build_model(configure('lenet5'), torch.device(device))
    assert [options['memory_format'] for options in calls if options] == wanted


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_momentum_saved_in_any_layout_belongs_to_its_weights(layout):
    config = configure('lenet5', optimizer='sgd', momentum=0.9, weight_decay=0)
    model = build_model(config, torch.device('cpu'))
    optimizer = build_optimizer(model, config)
    state, wanted = {}, []
    for number, weight in enumerate(model.parameters()):
        weight.grad, momentum = torch.rand_like(weight), torch.rand(weight.shape)
        wanted.append(weight.detach() - 0.01 * (0.9 * momentum + weight.grad))
        if weight.dim() == 4:
            momentum = momentum.contiguous(memory_format=layout)
        state[number] = {'momentum_buffer': momentum}
    optimizer.load_state_dict({**optimizer.state_dict(), 'state': state})
    optimizer.param_groups[0]['lr'] = 0.01
    optimizer.step()
    torch.testing.assert_close(list(model.parameters()), wanted)


def test_more_processes_than_gpus_get_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert choose_device('mps').type == 'mps'
    monkeypatch.setattr('CIFAR10_evaluation.WORLD_SIZE', 2)
    with pytest.raises(UserError, match='--device cpu'):
        choose_device('mps')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(UserError, match='--nproc-per-node 1'):
        choose_device('cuda')


@pytest.mark.parametrize('text', ["CUDA error: no kernel image is available for execution on the device\nCU",
                                  "HIP error: invalid device function", "cuDNN: CUDNN_STATUS_ARCH_MISMATCH",
                                  "The operator 'aten::x' is not currently implemented for the MPS device"])
def test_a_gpu_that_pytorch_cannot_use_is_told(text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr(shutil, 'which', {'nvidia-smi': '/usr/bin/nvidia-smi'}.get)
    error = NotImplementedError(text) if 'MPS' in text else RuntimeError(text)
    monkeypatch.setattr('CIFAR10_train.build_model', Mock(side_effect=error))
    done = script(tmp_path, SMALL)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and '--device cpu' in done.stderr
    assert 'is built without CUDA' in done.stdout

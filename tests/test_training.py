"""A training run: what it prints and leaves in results/, and the parts of the loop against PyTorch's own."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from conftest import rows, script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from CIFAR10_configuration import HISTORY, SETTINGS, Configuration, parse_configuration
from CIFAR10_evaluation import build_model, evaluate, load_file, load_weights, predict
from CIFAR10_train import (
    apply_max_norm,
    build_optimizer,
    get_learning_rate,
    should_stop,
    train_epoch,
)
from dataset import data_load, training_batches

CPU = torch.device('cpu')
FLOAT32 = torch.autocast('cpu', enabled=False)
BF16 = torch.autocast('cpu', torch.bfloat16)


def first(images):
    """The first images of the synthetic training set."""
    return TensorDataset(*data_load('synthetic')[0][:images])


class InDouble(torch.nn.Module):
    """A model in double precision, for batch norm soon magnifies the roundings of single precision."""

    def __init__(self, model):
        super().__init__()
        self.model = model.double()

    def forward(self, images):
        return self.model(images.double())


@pytest.mark.parametrize('model', SETTINGS)
def test_a_run_leaves_its_record_and_says_what_it_did(model, trained):
    folder, output = trained[0] / 'results' / model, trained[1][model]
    history = rows(folder)
    assert tuple(history[0]) == HISTORY and [float(row['epoch']) for row in history] == [1, 2]
    assert 0 < float(history[0]['seconds']) < float(history[1]['seconds'])
    config = json.loads((folder / 'config.json').read_text())['configuration']
    assert config['model'] == model and config['dataset'] == 'synthetic' and config['epochs'] == 2
    best = max(history, key=lambda row: float(row['val_accuracy']))
    saved = torch.load(folder / 'best.pt', weights_only=True)
    assert saved['epoch'] == float(best['epoch'])
    sizes = ('100', '100') if model == 'resnet32' else ('5,000', '1,000')
    for text in (
        'GPU available:',
        'Device:',
        'NOT CIFAR-10',
        f'Training images: {sizes[0]}',
        f'Validation images: {sizes[1]}',
        '[3, 32, 32]',
        'epoch 2/2',
        f"{float(best['val_accuracy']):.2f} %",
        str(folder.relative_to(trained[0])),
        'report.html',
    ):
        assert text in output
    assert '\r' not in output
    for name in ('accuracy', 'confusion', 'samples'):
        assert (folder / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_best_weights_give_the_recorded_accuracy_again(trained):
    file = trained[0] / 'results' / 'lenet5' / 'best.pt'
    model = build_model(SETTINGS['lenet5'], CPU)
    load_weights(model, load_file(file, ''), file)
    images, labels = data_load('synthetic')[1].tensors
    accuracy = (predict(model, images).argmax(1) == labels).float().mean().item() * 100
    assert accuracy == pytest.approx(max(float(row['val_accuracy']) for row in rows(file.parent)))


def test_training_again_leaves_the_finished_run_as_it_is(trained):
    folder = trained[0] / 'results' / 'lenet5'
    before = {file: file.read_bytes() for file in folder.iterdir() if file.suffix in ('.pt', '.csv')}
    done = script(
        trained[0], 'CIFAR10_train.py', '--model', 'lenet5', '--dataset', 'synthetic', '--epochs', 1
    )
    assert (
        done.returncode == 0
        and 'lenet5-2' in done.stdout
        and (trained[0] / 'results' / 'lenet5-2' / 'best.pt').exists()
    )
    assert before == {file: file.read_bytes() for file in before}


def test_a_convolutional_net_learns_the_synthetic_images_and_beats_an_mlp():
    data, val = data_load('synthetic')
    accuracy = {}
    for name in ('lenet5', 'mlp'):
        config = dataclasses.replace(SETTINGS[name], epochs=4)
        torch.manual_seed(0)
        model = build_model(config, CPU)
        optimizer = build_optimizer(model, config)
        for epoch in range(4):
            train_epoch(model, optimizer, data, config, epoch, BF16)
        accuracy[name] = evaluate(model, val)[1]
    assert accuracy['lenet5'] > 60 and accuracy['lenet5'] > accuracy['mlp'] + 15


@pytest.mark.parametrize('name', SETTINGS)
def test_an_epoch_equals_a_loop_written_out_by_hand(name):
    """PyTorch's loss on the same batches, the update of SGD with momentum as on the slides."""
    config = dataclasses.replace(
        SETTINGS[name],
        optimizer='sgd',
        learning_rate=0.01,
        weight_decay=1e-3,
        epochs=1,
        learning_rate_decay='none',
        batch_size=50,
        warmup=0.0,
        dropout=0.0,
    )
    config = dataclasses.replace(config, hidden=(32,)) if name == 'mlp' else config
    data = first(180)  # the last batch is a smaller one
    torch.manual_seed(0)
    ours = InDouble(build_model(config, CPU))
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    loss, accuracy = train_epoch(ours, build_optimizer(ours, config), data, config, 0, FLOAT32)
    velocity = {p: torch.zeros_like(p) for p in theirs.parameters()}
    losses, correct = 0, 0
    for images, labels in training_batches(data, config, seed=0):
        theirs.zero_grad()
        logits = theirs(images)
        mean = torch.nn.CrossEntropyLoss()(logits, labels)
        mean.backward()
        losses, correct = (
            losses + mean.item() * len(labels),
            correct + (logits.argmax(1) == labels).sum().item(),
        )
        for p in theirs.parameters():
            velocity[p] = 0.9 * velocity[p] + p.grad + 1e-3 * p.data
            p.data -= 0.01 * velocity[p]
    for a, b, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() < 1e-6 * (a - before).norm() + 1e-12  # a bias before batch norm stays
    assert loss == pytest.approx(losses / 180) and accuracy == pytest.approx(correct / 1.8)


def test_nesterov_equals_a_loop_written_out_by_hand():
    """Nesterov's update as in Sutskever et al. 2013."""
    config = dataclasses.replace(
        SETTINGS['lenet5'],
        optimizer='nesterov',
        learning_rate=0.01,
        weight_decay=1e-3,
        epochs=1,
        warmup=0.0,
        learning_rate_decay='none',
        batch_size=50,
    )
    data = first(150)
    ours = InDouble(build_model(config, CPU))
    theirs = copy.deepcopy(ours)
    train_epoch(ours, build_optimizer(ours, config), data, config, 0, FLOAT32)
    velocity = {p: torch.zeros_like(p) for p in theirs.parameters()}
    for images, labels in training_batches(data, config, seed=0):
        theirs.zero_grad()
        torch.nn.CrossEntropyLoss()(theirs(images), labels).backward()
        for p in theirs.parameters():
            gradient = p.grad + 1e-3 * p.data
            velocity[p] = 0.9 * velocity[p] + gradient
            p.data -= 0.01 * (gradient + 0.9 * velocity[p])
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


class Readings(TorchDispatchMode):
    """Counts what makes a GPU wait: numbers read from it, and masks whose number of trues decides a shape."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        indices = arguments[1] if function.name() == 'aten::index.Tensor' else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += by_mask or function.name() in ('aten::_local_scalar_dense', 'aten::nonzero')
        return function(*arguments, **keywords or {})


def test_a_gpu_waits_for_fewer_than_one_reading_in_two_steps():
    with Readings() as readings:
        torch.ones(3)[torch.ones(3) > 0].sum().item()
    assert readings.count == 2  # the counter counts
    config = dataclasses.replace(SETTINGS['lenet5'], batch_size=16)
    model = build_model(config, CPU)
    optimizer = build_optimizer(model, config)
    with Readings() as readings:
        train_epoch(model, optimizer, first(640), config, 0, BF16)  # 40 steps
    assert readings.count < 20


@pytest.mark.parametrize('name', SETTINGS)
def test_20_steps_in_bf16_learn_what_20_in_float32_learn(name):
    data = first(200)
    config = dataclasses.replace(
        SETTINGS[name],
        batch_size=50,
        learning_rate=0.005,
        warmup=0.0,
        dropout=0.0,
        learning_rate_decay='none',
    )
    losses = []
    for autocast in FLOAT32, BF16:
        torch.manual_seed(0)
        model = build_model(config, CPU)
        optimizer = build_optimizer(model, config)
        losses.append([train_epoch(model, optimizer, data, config, epoch, autocast)[0] for epoch in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[1] != losses[0]
    assert losses[0][4] < 0.97 * losses[0][0]


def schedule(make, epochs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    scheduler, rates = make(optimizer), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rates_are_those_of_pytorchs_schedulers():
    step = Configuration()  # He et al.'s
    assert [get_learning_rate(step, epoch) for epoch in range(164)] == pytest.approx(
        schedule(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [82, 123], 0.1), 164)
    )
    cosine = dataclasses.replace(step, learning_rate_decay='cosine', epochs=10)
    assert [get_learning_rate(cosine, epoch) for epoch in range(10)] == pytest.approx(
        schedule(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10), 10)
    )
    assert get_learning_rate(dataclasses.replace(step, learning_rate_decay='none'), 160) == 0.1
    warm = dataclasses.replace(step, warmup=4.0)
    assert [get_learning_rate(warm, epoch) for epoch in range(10)] == pytest.approx(
        schedule(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1e-9, total_iters=4), 10), abs=1e-9
    )
    assert get_learning_rate(step, 81.99) == 0.1  # a step's rate never drops within an epoch


def test_patience_counts_only_after_the_last_drop():
    config = Configuration(epochs=100, patience=5)  # drops after 50 and 75
    history = [
        dict(epoch=epoch, val_accuracy=50.0 + epoch if epoch <= 10 else 50.0) for epoch in range(1, 101)
    ]
    stops = [epoch for epoch in range(101) if should_stop(config, history[:epoch])]
    assert stops[0] == 80 and stops[-1] == 100
    history[77]['val_accuracy'] = 91.0
    assert [epoch for epoch in range(101) if should_stop(config, history[:epoch])][0] == 83
    no_decay = dataclasses.replace(config, learning_rate_decay='none')
    assert [epoch for epoch in range(101) if should_stop(no_decay, history[:epoch])][0] == 15
    cosine = dataclasses.replace(config, learning_rate_decay='cosine')
    assert [epoch for epoch in range(101) if should_stop(cosine, history[:epoch])] == [100]


def test_early_stopping_ends_the_run_and_keeps_the_best_epoch(tmp_path):
    done = script(
        tmp_path,
        'CIFAR10_train.py',
        '--model',
        'mlp',
        '--hidden',
        8,
        '--dataset',
        'synthetic',
        '--epochs',
        30,
        '--learning-rate',
        1e-9,
        '--learning-rate-decay',
        'none',
        '--patience',
        2,
        '--name',
        'stuck',
    )
    history = rows(tmp_path / 'results' / 'stuck')
    best = max(history, key=lambda row: float(row['val_accuracy']))
    assert 'Stopped early' in done.stdout and len(history) == float(best['epoch']) + 2 < 30


def test_weight_restriction_bounds_every_unit_and_leaves_small_ones_alone():
    model = build_model(SETTINGS['lenet5'], CPU)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    before = [p.clone() for p in model.parameters()]
    apply_max_norm(model, 3.0)
    for old, new in zip(before, model.parameters(), strict=True):
        if new.dim() > 1:
            norms, wanted = new.flatten(1).pow(2).sum(1), old.flatten(1).pow(2).sum(1).clamp(max=3.0)
            torch.testing.assert_close(norms, wanted)
        else:
            assert torch.equal(old, new)


GRID = '--model lenet5 --learning-rate 0.01 0.02 0.05 --activation relu elu tanh --holdout 4900'.split()


def test_a_search_draws_some_of_the_combinations_and_the_same_again():
    everything = parse_configuration(GRID)[0].values()
    names, drawn = zip(*parse_configuration([*GRID, '--search', '7'])[0].items(), strict=True)
    assert names == tuple(f'lenet5-search/0{number}' for number in range(1, 8))
    assert len(set(drawn)) == 7 and set(drawn) < set(everything)
    assert list(drawn) != [config for config in everything if config in drawn]  # not in their order
    longer = tuple(parse_configuration([*GRID, '--search', '9'])[0].values())
    assert longer[:7] == drawn and set(longer) == set(everything)


def test_a_search_repeats_no_finished_trial_and_returns_to_its_best(tmp_path):
    command = [
        'CIFAR10_train.py',
        *GRID,
        '--dataset',
        'synthetic',
        '--epochs',
        1,
        '--search',
    ]
    done = script(tmp_path, *command, 2)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / 'results').glob('lenet5-search/*/'))
    before = {
        file: file.read_bytes()
        for folder in folders
        for file in folder.glob('*.*')
        if file.suffix in ('.csv', '.pt')
    }
    again = script(tmp_path, *command, 3)
    assert again.returncode == 0 and again.stdout.count('epoch 1/1') == 1 and len(before) == 6
    assert before == {file: file.read_bytes() for file in before}
    best = max(
        float(row['val_accuracy'])
        for folder in (tmp_path / 'results').glob('lenet5-search/*/')
        for row in rows(folder)
    )
    assert f'{best:.2f} % recomputed' in again.stdout
    report = (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')
    assert '<h3>lenet5-search</h3>' in report and 'activation, learning_rate</td>' in report


@pytest.mark.parametrize(
    'options',
    [
        '--optimizer adam --activation maxout --initialization xavier_normal --batch-size 5000',
        '--optimizer nesterov --momentum 0 --batch-size 5 --holdout 4900',
        '--max-norm 2 --activation elu --learning-rate-decay none --batch-size 4 --holdout 4900',
    ],
)
def test_the_slides_choices_train(options, tmp_path):
    done = script(
        tmp_path,
        'CIFAR10_train.py',
        '--model',
        'lenet5',
        '--dataset',
        'synthetic',
        '--epochs',
        1,
        *options.split(),
    )
    assert done.returncode == 0 and '1/1' in done.stdout, done.stderr
    assert all(math.isfinite(float(row['train_loss'])) for row in rows(tmp_path / 'results' / 'lenet5'))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize('speed', [[], ['--compile']])
def test_training_on_a_gpu(speed, tmp_path):
    if speed:
        pytest.importorskip('triton')
    done = script(
        tmp_path,
        'CIFAR10_train.py',
        '--model',
        'lenet5',
        '--dataset',
        'synthetic',
        '--epochs',
        2,
        '--holdout',
        500,
        '--device',
        'cuda',
        *speed,
    )
    assert done.returncode == 0 and 'Device: cuda' in done.stdout, done.stderr

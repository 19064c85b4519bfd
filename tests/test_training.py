"""A training run: what it prints, what it leaves in results/, and the parts of the loop against PyTorch's own."""
import csv
import dataclasses
import json

import pytest
import torch

from CIFAR10_configuration import HISTORY, SETTINGS
from CIFAR10_train import (accelerate, average, build_model, build_optimizer, is_finished, learning_rate, load_weights, predict,
                           restrict_weights, train_epoch)
from dataset import data_load, training_batches


def rows(folder):
    with open(folder / 'history.csv', newline='') as file:
        return list(csv.DictReader(file))


def fresh(epoch=0):
    return dict(epoch=epoch, step=0, loss_sum=0.0, correct=0)


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
    for text in ('GPU available:', 'Device:', 'NOT CIFAR-10', 'Training images: 5,000', 'Validation images: 1,000', '[3, 32, 32]',
                 'epoch 2/2', f"{float(best['val_accuracy']):.2f} %", str(folder.relative_to(trained[0])), 'report.html'):
        assert text in output
    assert '\r' not in output
    for name in ('accuracy', 'confusion', 'samples'):
        assert (folder / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_best_weights_give_the_recorded_accuracy_again(trained):
    folder = trained[0] / 'results' / 'lenet5'
    model = build_model(SETTINGS['lenet5'])
    load_weights(model, folder / 'best.pt')
    images, labels = data_load('synthetic')[1].tensors
    accuracy = (predict(model, images).argmax(1) == labels).float().mean().item() * 100
    assert accuracy == pytest.approx(max(float(row['val_accuracy']) for row in rows(folder)))


def test_training_again_leaves_the_finished_run_as_it_is(trained, script):
    folder = trained[0] / 'results' / 'lenet5'
    before = {file: file.read_bytes() for file in folder.iterdir() if file.suffix in ('.pt', '.csv')}
    done = script(trained[0], 'CIFAR10_train.py', '--model', 'lenet5', '--dataset', 'synthetic', '--epochs', 1)
    assert done.returncode == 0 and 'lenet5-2' in done.stdout and (trained[0] / 'results' / 'lenet5-2' / 'best.pt').exists()
    assert before == {file: file.read_bytes() for file in before}


def test_a_convolutional_net_learns_the_synthetic_images_and_beats_an_mlp():
    data, val = data_load('synthetic')
    accuracy = {}
    for name, setting in (('lenet5', SETTINGS['lenet5']), ('mlp', SETTINGS['mlp'])):
        config = dataclasses.replace(setting, epochs=4)
        torch.manual_seed(0)
        model = build_model(config)
        optimizer = build_optimizer(model, config)
        for epoch in range(4):
            train_epoch(model, accelerate(model, config, torch.device('cpu'), 1), optimizer, data, config, fresh(epoch))
        accuracy[name] = (predict(model, val.tensors[0]).argmax(1) == val.tensors[1]).float().mean()
    assert accuracy['lenet5'] > 0.6 and accuracy['lenet5'] > accuracy['mlp'] + 0.15


@pytest.mark.parametrize('name', SETTINGS)
def test_an_epoch_equals_a_loop_written_out_by_hand(name):
    """PyTorch's optimizer and loss on the same batches, the update of SGD with momentum as on the slides."""
    config = dataclasses.replace(SETTINGS[name], optimizer='sgd', learning_rate=0.01, weight_decay=1e-3, epochs=1,
                                 learning_rate_decay='none', batch_size=50, warmup=0.0, dropout=0.0, precision='fp32')
    config = dataclasses.replace(config, hidden=(32,)) if name == 'mlp' else config
    data = torch.utils.data.TensorDataset(*(t[:150] for t in data_load('synthetic')[0].tensors))
    torch.manual_seed(0)
    ours, theirs, first = (build_model(config).double() for _ in range(3))  # for batch norm magnifies float32's roundings
    theirs.load_state_dict(ours.state_dict())
    first.load_state_dict(ours.state_dict())
    forward = accelerate(ours, config, torch.device('cpu'), 3)
    train_epoch(ours, lambda images, labels: forward(images.double(), labels), build_optimizer(ours, config), data, config, fresh())
    velocity = {p: torch.zeros_like(p) for p in theirs.parameters()}
    for images, labels in training_batches(data, 50, seed=0):
        theirs.zero_grad()
        torch.nn.CrossEntropyLoss()(theirs(images.double()), labels).backward()
        for p in theirs.parameters():
            velocity[p] = 0.9 * velocity[p] + p.grad + 1e-3 * p.data
            p.data -= 0.01 * velocity[p]
    for a, b, start in zip(ours.parameters(), theirs.parameters(), first.parameters()):
        assert (a - b).norm() < 1e-6 * (a - start).norm() + 1e-12  # a bias before batch norm stays


def test_nesterov_label_smoothing_and_averaging_equal_a_loop_written_out_by_hand():
    """Nesterov's update as in Sutskever et al. 2013, smoothed labels as in Szegedy et al. 2016, in double precision."""
    config = dataclasses.replace(SETTINGS['lenet5'], optimizer='nesterov', learning_rate=0.01, weight_decay=1e-3, epochs=1, warmup=0.0,
                                 learning_rate_decay='none', batch_size=50, label_smoothing=0.2, precision='fp32')
    data = torch.utils.data.TensorDataset(*(t[:150] for t in data_load('synthetic')[0].tensors))
    ours, theirs = build_model(config).double(), build_model(config).double()
    theirs.load_state_dict(ours.state_dict())
    optimizer, forward = build_optimizer(ours, config), accelerate(ours, config, torch.device('cpu'), 3)
    averaged = average(ours, optimizer, decay=0.6)
    train_epoch(ours, lambda images, labels: forward(images.double(), labels), optimizer, data, config, fresh())
    velocity, mean = {p: torch.zeros_like(p) for p in theirs.parameters()}, {}
    for images, labels in training_batches(data, 50, seed=0):
        theirs.zero_grad()
        wanted = torch.full((len(labels), 10), 0.02).double().scatter(1, labels[:, None], 0.82)
        (-wanted * theirs(images.double()).log_softmax(1)).sum(1).mean().backward()
        for p in theirs.parameters():
            gradient = p.grad + 1e-3 * p.data
            velocity[p] = 0.9 * velocity[p] + gradient
            p.data -= 0.01 * (gradient + 0.9 * velocity[p])
            mean[p] = 0.6 * mean[p] + 0.4 * p.data if p in mean else p.data.clone()
    for p, q, a in zip(theirs.parameters(), ours.parameters(), averaged.module.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(a, mean[p], rtol=1e-6, atol=1e-9, check_dtype=False)


def schedule(make, epochs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    scheduler, rates = make(optimizer), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rates_are_those_of_pytorchs_schedulers():
    step = dataclasses.replace(SETTINGS['resnet32'], epochs=164)
    assert [learning_rate(step, epoch) for epoch in range(164)] == pytest.approx(
        schedule(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [82, 123], 0.1), 164))
    cosine = dataclasses.replace(step, learning_rate_decay='cosine', epochs=10)
    assert [learning_rate(cosine, epoch) for epoch in range(10)] == pytest.approx(
        schedule(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10), 10))
    assert learning_rate(dataclasses.replace(step, learning_rate_decay='none'), 160) == 0.1
    warm = dataclasses.replace(step, warmup=4.0)
    assert [learning_rate(warm, epoch) for epoch in range(10)] == pytest.approx(
        schedule(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1e-9, total_iters=4), 10), abs=1e-9)
    assert learning_rate(step, 81.99) == 0.1  # a step's rate never drops within an epoch


def test_patience_counts_only_after_the_last_drop():
    config = dataclasses.replace(SETTINGS['resnet32'], epochs=100, patience=5)  # drops after 50 and 75
    history = [dict(epoch=epoch, val_accuracy=50.0 + epoch if epoch <= 10 else 50.0) for epoch in range(1, 101)]
    stops = [epoch for epoch in range(1, 101) if is_finished(config, epoch, history[:epoch])]
    assert stops[0] == 80
    history[77]['val_accuracy'] = 91.0
    assert [epoch for epoch in range(1, 101) if is_finished(config, epoch, history[:epoch])][0] == 83
    no_decay = dataclasses.replace(config, learning_rate_decay='none')
    assert [epoch for epoch in range(1, 101) if is_finished(no_decay, epoch, history[:epoch])][0] == 15


def test_early_stopping_ends_the_run_and_keeps_the_best_epoch(script, tmp_path):
    done = script(tmp_path, 'CIFAR10_train.py', '--model', 'mlp', '--hidden', 8, '--dataset', 'synthetic', '--epochs', 30,
                  '--learning-rate', 1e-9, '--learning-rate-decay', 'none', '--patience', 2, '--name', 'stuck')
    history = rows(tmp_path / 'results' / 'stuck')
    best = max(history, key=lambda row: float(row['val_accuracy']))
    assert 'Stopped early' in done.stdout and len(history) == float(best['epoch']) + 2 < 30


def test_weight_restriction_bounds_every_unit_and_leaves_small_ones_alone():
    model = build_model(SETTINGS['lenet5'])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    before = [p.clone() for p in model.parameters()]
    restrict_weights(model, 3.0)
    for old, new in zip(before, model.parameters()):
        if new.dim() > 1:
            norms, wanted = new.flatten(1).pow(2).sum(1), old.flatten(1).pow(2).sum(1).clamp(max=3.0)
            torch.testing.assert_close(norms, wanted)
        else:
            assert torch.equal(old, new)


def test_a_search_goes_on_with_the_better_half_and_repeats_nothing(script, tmp_path):
    command = ['CIFAR10_train.py', '--model', 'lenet5', '--dataset', 'synthetic', '--epochs', 4, '--holdout', 500, '--search', 4]
    done = script(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / 'results').glob('lenet5-search-*'))
    histories = [[float(row['val_accuracy']) for row in rows(folder)] for folder in folders]
    assert sorted(map(len, histories)) == [1, 1, 2, 4]
    for length, after in ((1, 1), (2, 2)):  # who was given up was no better than who went on
        assert max(max(h) for h in histories if len(h) == length) <= min(max(h[:after]) for h in histories if len(h) > length)
    before = {file: file.read_bytes() for folder in folders for file in folder.glob('*.*') if file.suffix in ('.csv', '.pt')}
    again = script(tmp_path, *command)
    assert again.returncode == 0 and 'epoch 1/' not in again.stdout
    assert before == {file: file.read_bytes() for file in before}
    report = (tmp_path / 'results' / 'report.html').read_text(encoding='utf-8')
    assert '4 random trials of up to 4 epochs' in report and all(folder.name in report for folder in folders)
    assert (tmp_path / 'results' / 'search.png').exists() and 'Additional experiments' not in report


@pytest.mark.parametrize('options', ['--optimizer adam --activation maxout --initialization xavier_normal --batch-size 5000',
                                     '--max-norm 2 --activation elu --learning-rate-decay none --batch-size 4 --holdout 4900'])
def test_the_slides_choices_train(options, script, tmp_path):
    done = script(tmp_path, 'CIFAR10_train.py', '--model', 'lenet5', '--dataset', 'synthetic', '--epochs', 1, *options.split())
    assert done.returncode == 0 and '1/1' in done.stdout, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu(script, tmp_path):
    done = script(tmp_path, 'CIFAR10_train.py', '--model', 'lenet5', '--dataset', 'synthetic', '--epochs', 2, '--device', 'cuda')
    assert done.returncode == 0 and 'Device: cuda' in done.stdout

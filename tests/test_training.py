"""A training run: what it prints and leaves in results/, and the parts of the loop against PyTorch's own."""
import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import rows, script
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR
from torch.utils.data import TensorDataset

import CIFAR10_train
from CIFAR10_configuration import SETTINGS, Configuration, Epoch
from CIFAR10_evaluation import build_model, evaluate, load_model, predict
from CIFAR10_train import Diverged, apply_max_norm, build_optimizer, get_learning_rate, train_epoch
from dataset import data_load, training_batches

CPU = torch.device('cpu')
FLOAT32 = torch.autocast('cpu', enabled=False)
BF16 = torch.autocast('cpu', torch.bfloat16)


def first(images):
    """The first images of the synthetic training set."""
    return TensorDataset(*data_load('synthetic')[0][:images])


def in_double(model):
    """A model in double precision, for batch norm soon magnifies the roundings of single precision."""
    model.double().register_forward_pre_hook(lambda _, images: images[0].double())
    return model


@pytest.mark.parametrize('model', SETTINGS)
def test_a_run_leaves_its_record_and_best_weights_and_says_what_it_did(model, trained):
    folder, output = trained[0] / 'results' / model, trained[1][model]
    first, second = history = rows(folder)
    assert tuple(first) == Epoch._fields and [float(row['epoch']) for row in history] == [1, 2]
    assert 0 < float(first['seconds']) < float(second['seconds'])
    best = max(history, key=lambda row: float(row['val_accuracy']))
    accuracy, count = float(best['val_accuracy']), 100 if model == 'resnet32' else 1000
    for text in ('GPU available:', 'Device:', 'NOT CIFAR-10', 'Training images: ', '[3, 32, 32]', 'epoch 2/2',
                 f'Validation images: {count:,}\n', f'{accuracy:.2f} %', str(folder),
                 str(trained[0] / 'results' / 'report.html')):
        assert text in output
    assert '\r' not in output and torch.load(folder / 'best.pt')['epoch'] == float(best['epoch'])
    images, labels = (tensor[:count] for tensor in data_load('synthetic')[1].tensors)
    right = predict(load_model(folder / 'best.pt', model, CPU), images).argmax(1) == labels
    assert right.float().mean().item() * 100 == pytest.approx(accuracy)


def learn(name, autocast, data, epochs=1, prepare=lambda model: model, **changes):
    """The training losses of so many epochs of a setting, at one learning rate, and its model."""
    config = replace(SETTINGS[name], learning_rate_decay='none', warmup=0, **changes)
    torch.manual_seed(0)
    model = build_model(config, CPU)
    step = partial(train_epoch, prepare(model), build_optimizer(model, config), data, config)
    return [step(epoch, autocast)[0] for epoch in range(epochs)], model


def test_a_clipped_gradient_keeps_lenet5_learning_where_it_diverges_without():
    data, val = data_load('synthetic')
    steep = partial(learn, 'lenet5', FLOAT32, data, learning_rate=4 * SETTINGS['lenet5'].learning_rate)
    assert evaluate(steep(epochs=4, clip=1)[1], val)[1] > 90
    with pytest.raises(Diverged):
        steep(epochs=2, clip=0)


@pytest.mark.parametrize('name, optimizer, clip', [
    ('mlp', 'sgd', 0), ('resnet32', 'sgd', 0), ('lenet5', 'sgd', 1.5), ('lenet5', 'nesterov', 0)])
def test_an_epoch_equals_a_loop_written_out_by_hand(name, optimizer, clip):
    """PyTorch's loss on the same batches, the slides' update, and Nesterov's as in Sutskever et al. 2013."""
    config = replace(SETTINGS[name], hidden=(32,), dropout=0, depth=8, batch_size=50, optimizer=optimizer,
                     learning_rate=0.01, weight_decay=1e-3, epochs=1, warmup=0, learning_rate_decay='none',
                     clip=clip)
    data = first(180)  # the last batch is a smaller one
    torch.manual_seed(0)
    ours = in_double(build_model(config, CPU))
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    loss, accuracy = train_epoch(ours, build_optimizer(ours, config), data, config, 0, FLOAT32)
    velocity = {p: torch.zeros_like(p) for p in theirs.parameters()}
    losses = correct = 0
    for images, labels in training_batches(data, config, seed=0):
        theirs.zero_grad()
        logits = theirs(images)
        mean = torch.nn.CrossEntropyLoss()(logits, labels)
        mean.backward()
        losses += mean.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        norm = sum(p.grad.square().sum() for p in theirs.parameters()).sqrt()
        cut = bool(0 < clip < norm)  # then the whole gradient is shortened to that norm
        for p in theirs.parameters():
            gradient = p.grad * (clip / (norm + 1e-6) if cut else 1) + 1e-3 * p.data
            velocity[p] = 0.9 * velocity[p] + gradient
            p.data -= 0.01 * (velocity[p] if optimizer == 'sgd' else gradient + 0.9 * velocity[p])
    assert cut == bool(clip)
    for a, b, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() < 1e-6 * (a - before).norm() + 1e-12  # a bias before batch norm stays
    assert loss == pytest.approx(losses / 180) and accuracy == pytest.approx(correct / 1.8)


@pytest.mark.parametrize('name', SETTINGS)
def test_20_steps_in_bf16_learn_what_20_in_float32_learn(name):
    small = dict(batch_size=10, learning_rate=0.005, dropout=0, hidden=(256,), depth=8)
    one, other = (learn(name, autocast, first(40), 5, **small)[0] for autocast in (FLOAT32, BF16))
    assert one == pytest.approx(other, rel=0.1) and one != other and one[4] < 0.97 * one[0]


def schedule(kind, epochs, *options, **keywords):
    """The learning rates of one of PyTorch's schedulers, from 0.1 on."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    scheduler, rates = kind(optimizer, *options, **keywords), []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates


STEP = Configuration()  # He et al.'s


@pytest.mark.parametrize('config, theirs', [
    (STEP, schedule(MultiStepLR, 164, [82, 123], 0.1)),
    # 0.55 * 100 is a little more than 55
    (replace(STEP, epochs=100, milestones=(0.07, 0.55)), schedule(MultiStepLR, 100, [7, 55], 0.1)),
    (replace(STEP, learning_rate_decay='cosine', epochs=10), schedule(CosineAnnealingLR, 10, 10)),
    (replace(STEP, learning_rate_decay='none'), [0.1] * 164),
    (replace(STEP, warmup=4.0), schedule(LinearLR, 10, 1e-9, total_iters=4)),
    (replace(STEP, warmup=4.0, epochs=8, learning_rate_decay='none'),
     schedule(LinearLR, 8, 1e-9, total_iters=2))])  # a warmup takes at most a quarter of the training
def test_learning_rates_are_those_of_pytorchs_schedulers(config, theirs):
    ours = [get_learning_rate(config, epoch) for epoch in range(len(theirs))]
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert get_learning_rate(STEP, 81.99) == 0.1  # a step's rate never drops within an epoch


class Recorder(torch.nn.Module):
    """A network that keeps the images that it is given and the masks that its dropout draws."""

    def __init__(self):
        super().__init__()
        self.dropout, self.layer = torch.nn.Dropout(0.5), torch.nn.Linear(3072, 10)
        self.images, self.masks = [], []

    def forward(self, images):
        self.images.append(images)
        self.masks.append(self.dropout(torch.ones(50)))
        return self.layer(images.flatten(1))


def recorded(epoch, **changes):
    """The batches of an epoch over 60 images, and the dropout masks."""
    model, config = Recorder(), replace(SETTINGS['mlp'], batch_size=20, learning_rate=1e-9, **changes)
    train_epoch(model, build_optimizer(model, config), first(60), config, epoch, FLOAT32)
    return torch.cat(model.images), torch.cat(model.masks)


def test_every_epoch_and_process_has_an_order_crops_flips_and_masks_of_its_own(monkeypatch):
    plain = {epoch: recorded(epoch, augmentation='off') for epoch in (0, 1)}
    orders = [[image.numpy().tobytes() for image in plain[epoch][0]] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert not torch.equal(plain[0][1], plain[1][1])
    # The same image in both epochs, by the places that their orders give it
    augmented = [recorded(epoch)[0] for epoch in (0, 1)]
    places = [orders[1].index(image) for image in orders[0]]
    alike = [torch.equal(augmented[0][i], augmented[1][place]) for i, place in enumerate(places)]
    assert sum(alike) < 10  # by chance one of 162
    again, masks = recorded(1)
    assert torch.equal(again, augmented[1]) and torch.equal(masks, plain[1][1])
    monkeypatch.setattr('CIFAR10_train.RANK', 1)
    assert not torch.equal(recorded(1)[1], masks)


@pytest.mark.parametrize('options, rule', [
    ('lenet5 --batch-size 131', 'at most 130'), ('lenet5 --batch-size 99999999', 'at most 130'),
    ('mlp --batch-size 129', 'at least 2'), ('mlp --batch-size 1 --seed 0 1', 'at least 2')])  # batch norm
def test_batches_that_cannot_be_trained_are_refused_in_one_sentence(options, rule, tmp_path, few_images):
    done = script(tmp_path, f'CIFAR10_train.py --dataset synthetic --model {options}')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and rule in done.stderr
    assert done.stdout.count('Training images') == 1 and not list(tmp_path.iterdir())  # a group stops too


@pytest.mark.parametrize('columns', [20, 200])
def test_the_progress_line_fits_the_window(columns, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    CIFAR10_train.print_step(SETTINGS['resnet32'], 99, 100, 391, 1.234, 0.1, 9.0)
    shown = capsys.readouterr().out
    assert shown.startswith('\repoch 100/164') and len(shown[1:]) == columns - 1 and '\n' not in shown


@pytest.mark.parametrize('schedule', ['step', 'cosine', 'none'])
def test_a_training_ends_after_patience_epochs_without_a_better_one(schedule, tmp_path, few_images,
                                                                    monkeypatch):
    accuracies = iter([50, 60, 60, 55, 59, 90])  # of equal epochs the first is the best
    monkeypatch.setattr('CIFAR10_train.evaluate', lambda *_: (1.0, next(accuracies)))
    folder = tmp_path / 'results' / 'mlp'
    config = replace(SETTINGS['mlp'], epochs=30, learning_rate_decay=schedule)
    for expected in 'epoch 5/30', 'Continuing mlp after epoch 5':  # resumed, it ends right away
        done = script(tmp_path, 'CIFAR10_train.py --model mlp --hidden 8 --epochs 30 --dataset synthetic '
                                f'--patience 3 --batch-size 65 --learning-rate-decay {schedule}')
        assert done.returncode == 0 and expected in done.stdout, done.stderr
        assert 'Stopped early: no epoch since number 2 was better' in done.stdout
        assert torch.load(folder / 'best.pt')['epoch'] == 2
        assert [float(row['learning_rate']) for row in rows(folder)] == pytest.approx(
            [get_learning_rate(config, epoch + 0.5) for epoch in range(5)])  # at the second of two steps


def test_weight_restriction_bounds_every_unit_and_leaves_small_ones_alone():
    model = build_model(SETTINGS['lenet5'], CPU)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    before = [p.clone() for p in model.parameters()]
    apply_max_norm(model, 3.0)
    for old, new in zip(before, model.parameters(), strict=True):
        if new.dim() == 1:
            assert torch.equal(old, new)
        else:
            norms, wanted = (w.flatten(1).pow(2).sum(1) for w in (new, old))
            torch.testing.assert_close(norms, wanted.clamp(max=3.0))


@pytest.mark.parametrize('options', [
    '--optimizer nesterov --activation maxout --initialization xavier_normal --batch-size 130',
    '--optimizer nesterov --momentum 0 --batch-size 5 --holdout 50',
    '--max-norm 1 --activation elu --learning-rate-decay none --batch-size 4 --holdout 50'])
def test_the_slides_choices_train(options, tmp_path, few_images):
    done = script(tmp_path, f'CIFAR10_train.py --model lenet5 --dataset synthetic --epochs 1 {options}')
    assert done.returncode == 0 and 'epoch 1/1  train loss' in done.stdout, done.stderr
    weights = torch.load(tmp_path / 'results' / 'lenet5' / 'best.pt')['model_state_dict'].values()
    norms = [weight.flatten(1).norm(dim=1).max() for weight in weights if weight.dim() > 1]
    assert max(norms) < 1.0001 or '--max-norm 1' not in options

"""Train one of the three settings: python CIFAR10_train.py --model resnet32

A run in the order it happens: configuration, images, model, epochs of steps, results/<name>/, evaluation.
"""
import math
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from CIFAR10_configuration import RESULTS, Run, UserError, parse_configuration, run_script
from dataset import data_load, normalize, training_batches
from LeNet5_model import LeNet5_model
from MLP_model import MLP_model
from ResNet_model import ResNet32_model


def choose_device(name):
    """The torch.device of that name; 'auto' is CUDA, MPS or the CPU, the first there is."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    name = next(d for d in there if there[d]) if name == 'auto' else name
    if not there[name]:
        raise UserError(f"This machine or this PyTorch has no {name}: leave --device out to use what there is.")
    return torch.device(name)


def describe_machine(device):
    """What the report says of the machine: device, processor, threads and PyTorch version."""
    processor = torch.cuda.get_device_name() if device.type == 'cuda' else platform.processor() or platform.machine()
    return dict(device=device.type, processor=processor, threads=torch.get_num_threads(), torch=torch.__version__)


def build_model(config):
    """The configured network with freshly drawn weights; images (N, 3, 32, 32) -> logits (N, 10)."""
    if config.model == 'mlp':
        return MLP_model(config.hidden, config.activation, config.initialization, config.dropout)
    if config.model == 'lenet5':
        return LeNet5_model(config.activation, config.initialization)
    return ResNet32_model()


def load_weights(model, file):
    """Load a state dict, bare or under 'model_state_dict', saved also by DataParallel or from a compiled model.

    Raises UserError where the file holds none that is safe to load, or names the first layer that does not fit.
    """
    try:
        state = torch.load(file, map_location='cpu', weights_only=True)
        state = state.get('model_state_dict', state)
        state = {re.sub(r'^((module|_orig_mod)\.)+', '', name): tensor for name, tensor in state.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # whatever a damaged or malicious file makes torch.load raise
        raise UserError(f"{file} holds no weights that can be loaded safely ({type(error).__name__}): "
                        "give a file that torch.save(model.state_dict(), FILE) wrote.") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise UserError(f"{file} does not fit {type(model).__name__}: {name} is {found.get(name, 'missing')} in the file "
                            f"and {wanted.get(name, 'missing')} in the model; choose the --model that the weights belong to.")
    model.load_state_dict(state)


def build_optimizer(model, config):
    """SGD with momentum or Adam over all weights, with the L2 penalty of weight decay."""
    if config.optimizer == 'adam':
        return torch.optim.Adam(model.parameters(), config.learning_rate, (config.momentum, 0.999),
                                weight_decay=config.weight_decay)
    return torch.optim.SGD(model.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay)


def learning_rate(config, epoch):
    """The learning rate after so many epochs (float) of the whole training."""
    if config.learning_rate_decay == 'step':  # drops between epochs, by gamma at each milestone passed
        return config.learning_rate * config.gamma ** sum(int(epoch) >= m * config.epochs for m in config.milestones)
    if config.learning_rate_decay == 'cosine':
        return config.learning_rate * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return config.learning_rate


def stops_early(config, history):
    """Whether `patience` epochs, counted only after the last learning-rate drop, brought nothing better."""
    last_drop = {'step': math.ceil(max(config.milestones) * config.epochs), 'cosine': config.epochs, 'none': 0}
    best = max(history, key=lambda row: row['val_accuracy'])['epoch']
    return len(history) - max(best, last_drop[config.learning_rate_decay]) >= config.patience


@torch.no_grad()
def predict(model, images):
    """Logits (N, 10) of uint8 images (N, 3, 32, 32), by the model as it is at test time."""
    model.eval()
    return torch.cat([model(normalize(part)).float() for part in images.split(500)])


def evaluate(model, data):
    """Mean cross-entropy loss and accuracy in percent on a data set."""
    images, labels = data.tensors
    logits = predict(model, images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).sum().item() / len(labels) * 100


@torch.no_grad()
def restrict_weights(model, max_norm):
    """Scale the weights of every unit with |w|^2 >= max_norm down to that norm (weight restriction of the slides)."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.copy_(weight.renorm(2, 0, max_norm ** 0.5))


def show(line, done=False):
    """Rewrite the progress line on a terminal; elsewhere print the lines that are done."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print('\r' + line[:width].ljust(width), end='\n' if done else '', flush=True)
    elif done:
        print(line, flush=True)


def train_epoch(model, optimizer, data, config, epoch):
    """Take the steps of an epoch, counted from 0; returns mean training loss and accuracy in percent."""
    model.train()
    seed = config.seed * 100_000 + epoch  # all that is random in an epoch follows from these two
    torch.manual_seed(seed)
    steps, loss_sum, correct, seen, began, shown = math.ceil(len(data) / config.batch_size), 0, 0, 0, time.time(), 0
    for step, (images, labels) in enumerate(training_batches(data, config.batch_size, seed)):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(config, epoch + step / steps)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if config.max_norm:
            restrict_weights(model, config.max_norm)

        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        if time.time() - shown > 0.2:
            shown, rate = time.time(), seen / (time.time() - began)
            left = (len(data) * (config.epochs - epoch) - seen) / rate / 60
            show(f"epoch {epoch + 1}/{config.epochs}  step {step + 1}/{steps}  loss {loss.item():.3f}  "
                 f"learning rate {group['lr']:.2g}  {rate:,.0f} images/s  {left:.1f} min left")
    return loss_sum.item() / len(data), correct.item() / len(data) * 100


def new_folder(name):
    """Make and return results/<name>/, or results/<name>-2/, -3/ ... where a run has that name already."""
    RESULTS.mkdir(exist_ok=True)
    number = 1
    while True:
        folder = RESULTS / (name if number == 1 else f'{name}-{number}')
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    if number > 1:
        print(f"{RESULTS / name} holds a run already, which stays as it is: this one goes to {folder}.")
    return folder


def main():
    config, options = parse_configuration()
    device = choose_device(config.device)
    train_data, val_data = data_load(config.dataset, options.data_dir, config.holdout, config.seed, device)
    run = Run(new_folder(options.name), config, describe_machine(device))
    print(f"GPU available: {torch.cuda.is_available()}\nDevice: {device}")
    if config.dataset != 'cifar10':
        print("These are synthetic images, NOT CIFAR-10.")
    print(f"Training images: {len(train_data):,}\nValidation images: {len(val_data):,}"
          f"\nShape of an image: {list(train_data[0][0].shape)}")

    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    optimizer = build_optimizer(model, config)
    began = time.time()
    for epoch in range(config.epochs):
        train_loss, train_accuracy = train_epoch(model, optimizer, train_data, config, epoch)
        val_loss, val_accuracy = evaluate(model, val_data)
        run.history.append(dict(epoch=epoch + 1, learning_rate=optimizer.param_groups[0]['lr'], train_loss=train_loss,
                                train_accuracy=train_accuracy, val_loss=val_loss, val_accuracy=val_accuracy,
                                seconds=time.time() - began))
        if run.best['epoch'] == epoch + 1:  # early stopping: the weights of the best epoch are kept
            torch.save({'epoch': epoch + 1, 'model_state_dict': model.state_dict()}, run.folder / 'best.pt')
        run.write()
        show(f"epoch {epoch + 1}/{config.epochs}  train loss {train_loss:.3f}  validation accuracy {val_accuracy:.2f} %  "
             f"best {run.best['val_accuracy']:.2f} % (epoch {run.best['epoch']})", done=True)
        if stops_early(config, run.history):
            print(f"Stopped early: nothing better than epoch {run.best['epoch']} in {config.patience} epochs.")
            break
    print(f"Best validation accuracy {run.best['val_accuracy']:.2f} % at epoch {run.best['epoch']}, after "
          f"{run.history[-1]['seconds'] / 60:.1f} minutes; weights and history are in {run.folder}.")
    subprocess.run([sys.executable, Path(__file__).with_name('CIFAR10_evaluation.py'), '--name', run.folder.name,
                    '--data-dir', options.data_dir])


if __name__ == '__main__':
    run_script(main)

"""Train one of the three settings: python CIFAR10_train.py --model resnet32

A run in the order it happens: configuration, images, model, epochs of steps, results/<name>/, evaluation.
"""
import dataclasses
import io
import math
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from CIFAR10_configuration import (RESULTS, Configuration, Run, UserError, lock, option, parse_configuration, run_script, show,
                                   write_whole)
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


def load_file(file, hint):
    """The content of a file that torch.save wrote. Raises UserError, ending with the hint, where it isn't safe or whole."""
    try:
        return torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a damaged or malicious file makes torch.load raise
        raise UserError(f"{file} can't be loaded ({type(error).__name__}): {hint}.") from None


def load_weights(model, file):
    """Load a state dict, bare or under 'model_state_dict', saved also by DataParallel or from a compiled model.

    Raises UserError where the file is damaged or unsafe, or names the first layer that does not fit.
    """
    state = load_file(file, "give a file that torch.save(model.state_dict(), FILE) wrote")
    state = state.get('model_state_dict', state) if isinstance(state, dict) else None
    state = {re.sub(r'^((module|_orig_mod)\.)+', '', str(name)): tensor for name, tensor in dict(state or {}).items()}
    shapes, wanted = ({name: tuple(getattr(tensor, 'shape', ['no tensor'])) for name, tensor in tensors.items()}
                      for tensors in (state, model.state_dict()))
    for name in [*wanted, *shapes]:
        if wanted.get(name) != shapes.get(name):
            raise UserError(f"{file} does not fit {type(model).__name__}: {name} is {shapes.get(name, 'missing')} in the file and "
                            f"{wanted.get(name, 'missing')} in the model; choose the --model that the weights belong to.")
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


def is_finished(config, epoch, history):
    """Whether all epochs are done, or `patience` of them, counted after the last learning-rate drop, brought nothing better."""
    if epoch == 0 or epoch >= config.epochs:
        return epoch > 0
    last_drop = {'step': math.ceil(max(config.milestones) * config.epochs), 'cosine': config.epochs, 'none': 0}
    best = max(history, key=lambda row: row['val_accuracy'])['epoch']
    return epoch - max(best, last_drop[config.learning_rate_decay]) >= config.patience


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


def write_torch(file, content):
    """torch.save, but whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(file, buffer.getbuffer())


def save(run, model, optimizer, state):
    """Write the run's record and last.pt, all that it needs to continue; learning rates and orders follow from the step."""
    write_torch(run.folder / 'last.pt', dict(
        state, configuration=dataclasses.asdict(run.config), history=run.history, model=model.state_dict(),
        optimizer=optimizer.state_dict(), random=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all()))
    run.write()


def train_epoch(model, optimizer, data, config, state, interrupted=()):
    """Take the steps of an epoch from state['step'] on; ends early, after a whole step, once interrupted is not empty.

    state counts what is done: epochs, steps of the present epoch, its summed loss and its correct answers.
    """
    model.train()
    seed = config.seed * 100_000 + state['epoch']  # with the step, it decides all that is random
    if state['step'] == 0:
        torch.manual_seed(seed)
    steps, began, first, shown = math.ceil(len(data) / config.batch_size), time.time(), state['step'], 0
    for images, labels in training_batches(data, config.batch_size, seed, first):
        rate = learning_rate(config, state['epoch'] + state['step'] / steps)
        for group in optimizer.param_groups:
            group['lr'] = rate
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        where = f"epoch {state['epoch'] + 1}/{config.epochs}  step {state['step'] + 1}/{steps}"
        if not math.isfinite(loss.item()):
            raise UserError(f"The loss is {loss.item()} at {where}, learning rate {rate:.2g}: begin anew with --restart and a "
                            "smaller --learning-rate; the best weights so far are kept.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if config.max_norm:
            restrict_weights(model, config.max_norm)

        state['step'] += 1
        state['loss_sum'] += loss.item() * len(labels)
        state['correct'] += (logits.argmax(1) == labels).sum().item()
        if time.time() - shown > 0.2:
            shown = time.time()
            speed = (state['step'] - first) / (shown - began)  # steps a second
            left = (steps * (config.epochs - state['epoch']) - state['step']) / speed / 60
            show(f"{where}  loss {loss.item():.3f}  learning rate {rate:.2g}  {speed * config.batch_size:,.0f} images/s  "
                 f"{left:.1f} min left")
        if interrupted:
            break


def load_checkpoint(folder, config):
    """The content of last.pt where this run is to be continued, else None: there is none, or it is finished.

    Raises UserError where it is damaged, or unfinished and of another configuration.
    """
    if not (folder / 'last.pt').exists():
        return None
    hint = "begin anew with --restart, which keeps what is there, or under another --name"
    checkpoint = load_file(folder / 'last.pt', hint)
    if not isinstance(checkpoint, dict) or 'configuration' not in checkpoint:
        raise UserError(f"{folder / 'last.pt'} is no checkpoint: {hint}.")
    old = Configuration(**checkpoint['configuration'])
    changed = [f for f in dataclasses.fields(config) if f.name != 'device' and getattr(old, f.name) != getattr(config, f.name)]
    if not is_finished(old, checkpoint['epoch'], checkpoint['history']):
        if changed:
            before, now = getattr(old, changed[0].name), getattr(config, changed[0].name)
            raise UserError(f"{folder} is unfinished and was begun with {option(changed[0])} {before}, not {now}: repeat its "
                            f"options to continue it, or {hint}.")
        return checkpoint
    if [f.name for f in changed] == ['epochs'] and config.epochs > old.epochs:
        if config.learning_rate_decay == 'none':
            return checkpoint
        raise UserError(f"{folder} has finished its {old.epochs} epochs, and for {config.epochs} its learning rate would have "
                        f"fallen otherwise: {hint}.")


def open_run(name, config, restart):
    """The folder of the run to continue, or of a new one; its checkpoint or None; and the lock to hold.

    What is finished stays as it is: the new run goes to <name>-2, -3 ..., or with restart the old one does.
    """
    RESULTS.mkdir(exist_ok=True)
    folders = [RESULTS / name, *(RESULTS / f'{name}-{number}' for number in range(2, 1000))]
    if restart and folders[0].exists():
        lock(folders[0]).close()
        aside = next(folder for folder in folders if not folder.exists())
        folders[0].rename(aside)
        print(f"The run that was in {folders[0]} is now in {aside}.")
    for folder in folders:
        folder.mkdir(exist_ok=True)
        held, checkpoint = lock(folder), load_checkpoint(folder, config)
        if checkpoint:
            print(f"Continuing {folder.name} at epoch {checkpoint['epoch'] + 1} of {config.epochs}.")
            return folder, checkpoint, held
        if not any((folder / kept).exists() for kept in ('best.pt', 'last.pt')):
            if folder != folders[0]:
                print(f"{folders[0]} holds a finished run, which stays as it is: this one goes to {folder}.")
            return folder, None, held
        held.close()


def train(run, model, optimizer, train_data, val_data, state):
    """Train to the last epoch or the early stop; SIGINT and SIGTERM end it after the present step, saved."""
    config, interrupted = run.config, []

    def interrupt(number, _):
        interrupted.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    began = time.time() - state['seconds']
    while not is_finished(config, state['epoch'], run.history):
        if interrupted:
            show(f"Interrupted in epoch {state['epoch'] + 1}, step {state['step']}, and saved: the same command continues.", True)
            sys.exit(128 + interrupted[0])
        train_epoch(model, optimizer, train_data, config, state, interrupted)
        if state['step'] == math.ceil(len(train_data) / config.batch_size):
            val_loss, val_accuracy = evaluate(model, val_data)
            state['epoch'] += 1
            run.history.append(dict(
                epoch=state['epoch'], learning_rate=optimizer.param_groups[0]['lr'],
                train_loss=state['loss_sum'] / len(train_data), train_accuracy=state['correct'] / len(train_data) * 100,
                val_loss=val_loss, val_accuracy=val_accuracy, seconds=time.time() - began))
            best = run.best
            if best['epoch'] == state['epoch']:  # early stopping keeps the weights of the best epoch
                write_torch(run.folder / 'best.pt', {'epoch': state['epoch'], 'model_state_dict': model.state_dict()})
            show(f"epoch {state['epoch']}/{config.epochs}  train loss {run.history[-1]['train_loss']:.3f}  validation accuracy "
                 f"{val_accuracy:.2f} %  best {best['val_accuracy']:.2f} % (epoch {best['epoch']})", done=True)
            state.update(step=0, loss_sum=0.0, correct=0)
        state['seconds'] = time.time() - began
        save(run, model, optimizer, state)
    if state['epoch'] < config.epochs:
        print(f"Stopped early: nothing better than epoch {run.best['epoch']} in {config.patience} epochs.")


def main():
    config, options = parse_configuration()
    device = choose_device(config.device)
    train_data, val_data = data_load(config.dataset, options.data_dir, config.holdout, config.seed, device, options.data_url)
    print(f"GPU available: {torch.cuda.is_available()}\nDevice: {device}")
    if config.dataset != 'cifar10':
        print("These are synthetic images, NOT CIFAR-10.")
    print(f"Training images: {len(train_data):,}\nValidation images: {len(val_data):,}"
          f"\nShape of an image: {list(train_data[0][0].shape)}", flush=True)

    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    optimizer = build_optimizer(model, config)
    folder, checkpoint, held = open_run(options.name, config, options.restart)
    if shutil.disk_usage(folder).free < 32 * sum(p.numel() for p in model.parameters()):  # last.pt and best.pt, old and new
        raise UserError(f"There is too little room on the disk of {folder} for two checkpoints: make some before training.")
    run = Run(folder, config, describe_machine(device))
    state = dict(epoch=0, step=0, loss_sum=0.0, correct=0, seconds=0.0)
    if checkpoint:
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        torch.set_rng_state(checkpoint['random'])
        torch.cuda.set_rng_state_all(checkpoint['cuda'])
        run.history = checkpoint['history']
        state = {name: checkpoint[name] for name in state}
    save(run, model, optimizer, state)  # finds a folder that can't be written before any training
    train(run, model, optimizer, train_data, val_data, state)
    held.close()
    print(f"Best validation accuracy {run.best['val_accuracy']:.2f} % at epoch {run.best['epoch']}, after "
          f"{run.history[-1]['seconds'] / 60:.1f} minutes; weights and history are in {run.folder}.")
    subprocess.run([sys.executable, Path(__file__).with_name('CIFAR10_evaluation.py'), '--name', run.folder.name,
                    '--data-dir', options.data_dir])


if __name__ == '__main__':
    run_script(main)

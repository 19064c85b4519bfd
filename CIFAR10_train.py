"""Train one of the three settings: python CIFAR10_train.py --model resnet32

A run in the order it happens: configuration, images, model, epochs of steps, results/<name>/, evaluation.
"""
import copy
import ctypes
import dataclasses
import io
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import types

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from CIFAR10_configuration import (ONLY_SPEED, RESULTS, Configuration, Run, UserError, draw, lock, option,
                                   parse_configuration, run_script, show, write_whole)
from dataset import data_load, normalize, training_batches
from LeNet5_model import LeNet5_model
from MLP_model import MLP_model
from ResNet_model import IdentityPadding, ResNet32_model


def choose_device(name):
    """The torch.device of that name; 'auto' is CUDA, MPS or the CPU, the first there is. torchrun gives each process its GPU."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    name = next(d for d in there if there[d]) if name == 'auto' else name
    if not there[name]:
        raise UserError(f"This machine or this PyTorch has no {name}: leave --device out to use what there is.")
    if name == 'cuda':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    return torch.device(name)


def describe_machine(device):
    """What the report says of the machine: device, processor, threads and PyTorch version."""
    processor = capabilities().get('cpu_name') or platform.processor() or platform.machine()
    return dict(device=device.type, processor=torch.cuda.get_device_name() if device.type == 'cuda' else processor,
                processes=process()[1], threads=torch.get_num_threads(), torch=torch.__version__)


def capabilities():
    """What the CPU can do, as PyTorch 2.10 and newer tell it."""
    return getattr(torch.cpu, 'get_capabilities', dict)()


def build_model(config):
    """The configured network with freshly drawn weights; images (N, 3, 32, 32) -> logits (N, 10)."""
    if config.model == 'mlp':
        return MLP_model(config.hidden, config.activation, config.initialization, config.dropout, config.normalization)
    if config.model == 'lenet5':
        return LeNet5_model(config.activation, config.initialization)
    return ResNet32_model()


def keep_pages():
    """Let the memory that every step uses stay mapped."""
    if sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'mallopt'):
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: keep freed activations instead of faulting them in anew
            ctypes.CDLL(None).mallopt(threshold, 1 << 30)
    torch.expm1(torch.tensor(-0.0))  # reads a constant that ELU's AVX-512 code masks out, which stalls it until the page is mapped


def batch_norm(self, x):
    """What nn.BatchNorm2d does, (N, C, H, W) -> (N, C, H, W), with sums over each image and then over the images.

    torch.compile takes the long sums of nn.BatchNorm2d's own code by a slower algorithm, forward and backward.
    """
    if not self.training:
        return nn.BatchNorm2d.forward(self, x)
    y, count = x.to(self.weight.dtype), x.numel() / x.shape[1]
    mean, square = (t.mean((2, 3), keepdim=True).mean(0, keepdim=True) for t in (y, y * y))
    variance = (square - mean * mean).clamp(min=0)
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.flatten(), self.momentum)
        self.running_var.lerp_(variance.flatten() * count / (count - 1), self.momentum)
    scale = self.weight.view(1, -1, 1, 1) * (variance + self.eps).rsqrt()
    shift = self.bias.view(1, -1, 1, 1) - mean * scale
    return (y * scale.expand(len(x), -1, 1, 1) + shift.expand(len(x), -1, 1, 1)).to(x.dtype)


def identity_padding(self, x):
    """What IdentityPadding does, as a convolution: torch.compile would mask out three of four places in every backward kernel."""
    channels = x.shape[1]
    eye = torch.eye(channels + self.add_channels, channels, dtype=x.dtype)
    return F.conv2d(x, eye[..., None, None], stride=self.pooling.stride)


def dropout(self, x):
    """What nn.Dropout does, with four of its draws, of 16 bits, from one random number."""
    if not self.training or self.p == 0:
        return x
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)[:x.numel()].view_as(x)
    return x * (draws >= int(self.p * 2 ** 16) - 2 ** 15).to(x.dtype).div_(1 - self.p)


def quicken(model, replacements):
    """Let a model's layers of the given types compute the same values and gradients by other, faster functions."""
    for m in model.modules():
        if type(m) in replacements:
            m.forward = types.MethodType(replacements[type(m)], m)


def accelerate(model, config, device, steps):
    """Everything that only makes training faster, by what the machine has and how many steps it will take.

    Returns:
        A function of images (N, 3, 32, 32) and labels (N,) that returns their mean loss and logits (N, 10).
    """
    keep_pages()
    model.to(memory_format=torch.channels_last)  # the layout in which convolutions compute; nothing to a linear layer
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == 'cuda' else
              device.type == 'cpu' and (capabilities().get('avx512_bf16') or capabilities().get('amx_bf16')))
    bf16 = native if config.precision == 'auto' else config.precision == 'bf16'
    if device.type == 'cpu':
        quicken(model, {nn.Dropout: dropout})
    parallel = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model

    def forward(images, labels):
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(bf16)):
            logits = parallel(images)
            return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing), logits

    compiler = any(map(shutil.which, ('g++', 'clang++', 'cl'))) and device.type != 'mps'
    pays = any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) and steps > 3000  # it fuses what is between convolutions
    if config.compile == 'off' or config.compile == 'auto' and not (compiler and pays):
        return forward
    if device.type == 'cpu':
        quicken(model, {nn.BatchNorm2d: batch_norm, IdentityPadding: identity_padding})
    # In place, a store of 16 bf16 numbers stalls the next load, as both touch a register of 32: BN's backward took twice as long.
    compiled = torch.compile(forward, dynamic=False, options={'inplace_buffers': False})

    def forward_compiled(images, labels):
        nonlocal compiled
        try:
            return (compiled if len(images) == config.batch_size // process()[1] else forward)(images, labels)
        except Exception as error:  # whatever a compiler can fail with
            print(f"Training goes on without compilation, which failed ({type(error).__name__}): install a C++ compiler, or give "
                  "--compile off.")
            compiled = forward
            for m in model.modules():
                vars(m).pop('forward', None)  # as they were before quicken
            return forward(images, labels)

    return forward_compiled


def process():
    """The number of this process and how many train together: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_all_processes(*numbers):
    """The sum of each number (float or scalar tensor) over the processes that train together."""
    sums = torch.tensor([torch.as_tensor(number).item() for number in numbers], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


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
                                weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(model.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay,
                           nesterov=config.optimizer == 'nesterov', fused=True)


def average(model, optimizer, decay):
    """A model of the exponential moving average of a model's weights, updated after each step of its optimizer."""
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    return averaged


def learning_rate(config, epoch):
    """The learning rate after so many epochs (float) of the whole training."""
    peak = config.learning_rate * min(1, epoch / config.warmup if config.warmup else 1)
    if config.learning_rate_decay == 'step':  # drops between epochs, by gamma at each milestone passed
        return peak * config.gamma ** sum(int(epoch) >= m * config.epochs for m in config.milestones)
    if config.learning_rate_decay == 'cosine':
        return peak * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return peak


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
    """Mean cross-entropy loss and accuracy in percent on a data set, in float32; every process takes its share of it."""
    rank, world = process()
    images, labels = (tensor[rank::world] for tensor in data.tensors)
    logits = predict(model, images)
    loss_sum, correct = over_all_processes(F.cross_entropy(logits, labels, reduction='sum'), (logits.argmax(1) == labels).sum())
    return loss_sum / len(data), correct / len(data) * 100


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


def save(run, parts, state, best=None):
    """Write best.pt if there are better weights, last.pt with all that the run needs to continue, and its record."""
    if process()[0] > 0:
        return
    configuration = dataclasses.asdict(run.config)
    if best:
        write_torch(run.folder / 'best.pt', dict(epoch=state['epoch'], model_state_dict=best, configuration=configuration))
    write_torch(run.folder / 'last.pt', dict(state, configuration=configuration, history=run.history,
                                             **{name: part.state_dict() for name, part in parts.items()}))
    run.write()


def train_epoch(model, forward, optimizer, data, config, state, interrupted=()):
    """Take the steps of an epoch from state['step'] on; forward is what accelerate returns.

    state counts what is done: epochs, steps of the present epoch, its summed loss and its correct answers.
    Returns True where a process was interrupted: it then ends early, after a whole step.
    """
    model.train()
    rank, world = process()
    seed = config.seed * 100_000 + state['epoch']  # with step and process, it decides all that is random
    steps, began, first, shown = math.ceil(len(data) / config.batch_size), time.time(), state['step'], 0
    for images, labels in training_batches(data, config.batch_size, seed, first, rank, world):
        if config.dropout:
            torch.manual_seed((seed * 50_000 + state['step']) * 1000 + rank)
        rate = learning_rate(config, state['epoch'] + state['step'] / steps)
        for group in optimizer.param_groups:
            group['lr'] = rate
        loss, logits = forward(images, labels)
        batch_size = min(config.batch_size, len(data) - state['step'] * config.batch_size)
        optimizer.zero_grad()
        (loss * (len(labels) * world / batch_size)).backward()  # the mean over processes is then that over the batch's images
        loss_sum, correct, stop = over_all_processes(loss * len(labels), (logits.argmax(1) == labels).sum(), len(interrupted))
        where = f"epoch {state['epoch'] + 1}/{config.epochs}  step {state['step'] + 1}/{steps}"
        if not math.isfinite(loss_sum):
            raise UserError(f"The loss is {loss_sum} at {where}, learning rate {rate:.2g}: begin anew with --restart and a "
                            "smaller --learning-rate; the best weights so far are kept.")
        optimizer.step()
        if config.max_norm:
            restrict_weights(model, config.max_norm)

        state['step'] += 1
        state['loss_sum'] += loss_sum
        state['correct'] += correct
        if time.time() - shown > 0.2:
            shown = time.time()
            speed = (state['step'] - first) / (shown - began)  # steps a second
            left = (steps * (config.epochs - state['epoch']) - state['step']) / speed / 60
            show(f"{where}  loss {loss_sum / batch_size:.3f}  learning rate {rate:.2g}  {speed * config.batch_size:,.0f} images/s  "
                 f"{left:.1f} min left")
        if stop:
            return True


def load_checkpoint(folder, config):
    """The content of last.pt where this run is to be continued, else None: there is none, or it is finished.

    Raises UserError where it is damaged, or unfinished and of another configuration.
    """
    if not (folder / 'last.pt').exists():
        return None
    hint = "begin anew with --restart, which keeps what is there, or under another --name"
    checkpoint = load_file(folder / 'last.pt', hint)
    try:
        old = Configuration(**checkpoint['configuration'])
        finished = is_finished(old, checkpoint['epoch'], checkpoint['history'])
    except (TypeError, KeyError, ValueError, UserError):
        raise UserError(f"{folder / 'last.pt'} is no checkpoint of this program: {hint}.") from None
    changed = [f for f in dataclasses.fields(config)
               if f.name not in ONLY_SPEED and getattr(old, f.name) != getattr(config, f.name)]
    longer = finished and [f.name for f in changed] == ['epochs'] and config.epochs > old.epochs
    if changed and not finished:
        before, now = getattr(old, changed[0].name), getattr(config, changed[0].name)
        raise UserError(f"{folder} is unfinished and was begun with {option(changed[0])} {before}, not {now}: repeat its "
                        f"options to continue it, or {hint}.")
    if longer and config.learning_rate_decay != 'none':
        raise UserError(f"{folder} has finished its {old.epochs} epochs, and for {config.epochs} its learning rate would have "
                        f"fallen otherwise: {hint}.")
    return checkpoint if longer or not finished else None


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
        if not any((folder / kept).exists() for kept in ('config.json', 'best.pt', 'last.pt')):
            if folder != folders[0]:
                print(f"{folders[0]} holds a finished run, which stays as it is: this one goes to {folder}.")
            return folder, None, held
        held.close()


def train(run, parts, forward, train_data, val_data, state, until=math.inf):
    """Train to the last epoch, the early stop or epoch `until`; SIGINT and SIGTERM end it after the present step, saved.

    parts are what changes in training and continues it: model, optimizer and, with averaging, averaged.
    """
    config, model, optimizer, interrupted = run.config, parts['model'], parts['optimizer'], []

    def interrupt(number, _):
        interrupted.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    validated = copy.deepcopy(model)
    began, stop = time.time() - state['seconds'], False
    while not is_finished(config, state['epoch'], run.history) and state['epoch'] < until:
        if stop:
            show(f"Interrupted in epoch {state['epoch'] + 1}, step {state['step']}, and saved: the same command continues.", True)
            sys.exit(128 + (interrupted or [signal.SIGTERM])[0])
        stop, best_weights = train_epoch(model, forward, optimizer, train_data, config, state, interrupted), None
        if state['step'] == math.ceil(len(train_data) / config.batch_size):
            weights = (parts['averaged'].module if config.averaging else model).state_dict()
            weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
            validated.load_state_dict(weights)  # as compact as they are kept, so that the file gives the same accuracy again
            val_loss, val_accuracy = evaluate(validated, val_data)
            state['epoch'] += 1
            run.history.append(dict(
                epoch=state['epoch'], learning_rate=optimizer.param_groups[0]['lr'],
                train_loss=state['loss_sum'] / len(train_data), train_accuracy=state['correct'] / len(train_data) * 100,
                val_loss=val_loss, val_accuracy=val_accuracy, seconds=time.time() - began))
            best = run.best  # early stopping keeps the weights of this epoch
            best_weights = weights if best['epoch'] == state['epoch'] else None
            show(f"epoch {state['epoch']}/{config.epochs}  train loss {run.history[-1]['train_loss']:.3f}  validation accuracy "
                 f"{val_accuracy:.2f} %  best {best['val_accuracy']:.2f} % (epoch {best['epoch']})", done=True)
            state.update(step=0, loss_sum=0.0, correct=0)
        state['seconds'] = time.time() - began
        save(run, parts, state, best_weights)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if state['epoch'] < min(config.epochs, until):
        print(f"Stopped early: nothing better than epoch {run.best['epoch']} in {config.patience} epochs.")


def load_images(config, options, device):
    """data_load's training and validation images; of several processes the first one loads, or downloads, before the others."""
    rank, world = process()
    if rank:
        dist.barrier()
    data = data_load(config.dataset, options.data_dir, config.holdout, config.seed, device, options.data_url)
    if rank == 0 and world > 1:
        dist.barrier()
    needed = world * (2 if config.normalization == 'batch' else 1)  # a single image has no variance
    if (len(data[0]) % config.batch_size or config.batch_size) < needed:
        raise UserError(f"--batch-size {config.batch_size} leaves a batch of fewer than the {needed} images that this training "
                        "needs: choose another.")
    return data


def train_run(name, config, options, device, data, until=math.inf):
    """Begin or continue the run of that name, to epoch `until` at most; data are the training and the validation images."""
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    optimizer = build_optimizer(model, config)
    opened, held = [None, None], None
    if process()[0] == 0:
        *opened, held = open_run(name, config, options.restart)
    if dist.is_initialized():
        dist.broadcast_object_list(opened)
    folder, checkpoint = opened
    if shutil.disk_usage(folder).free < 32 * sum(p.numel() for p in model.parameters()):  # last.pt and best.pt, old and new
        raise UserError(f"There is too little room on the disk of {folder} for two checkpoints: make some before training.")
    run = Run(folder, config, describe_machine(device))
    state = dict(epoch=0, step=0, loss_sum=0.0, correct=0, seconds=0.0)
    forward = accelerate(model, config, device, config.epochs * math.ceil(len(data[0]) / config.batch_size))
    parts = dict(model=model, optimizer=optimizer)
    if config.averaging:
        parts['averaged'] = average(model, optimizer, config.averaging)
    if checkpoint:
        run.history, state = checkpoint['history'], {name: checkpoint[name] for name in state}
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    save(run, parts, state)  # finds a folder that can't be written before any training
    train(run, parts, forward, *data, state, until)
    print(f"Best validation accuracy {run.best['val_accuracy']:.2f} % at epoch {run.best['epoch']}, after "
          f"{run.history[-1]['seconds'] / 60:.1f} minutes; weights and history are in {run.folder}.", flush=True)
    if held:
        held.close()
    return run


def search(config, options, device, data):
    """Train runs of random hyperparameters; the better half goes on after each round (Jamieson & Talwalkar 2016).

    The trials are runs like any other, so that the same command continues an interrupted search. Returns the best one.
    """
    trials = {number: draw(config, number) for number in range(1, options.search + 1)}
    for until in (math.ceil(config.epochs * part) for part in (0.25, 0.5, 1)):
        runs = {}
        for number, trial in trials.items():
            name = f'{options.name}-search-{number:02}'
            try:
                run = Run.read(RESULTS / name)
                done = run.config == trial and (len(run.history) >= until or is_finished(trial, len(run.history), run.history))
            except UserError:
                done = False
            runs[number] = run if done else train_run(name, trial, options, device, data, until)
        best = sorted(trials, key=lambda number: -max(row['val_accuracy'] for row in runs[number].history[:until]))
        print(f"After {until} epochs: " + ', '.join(f"{number} {runs[number].best['val_accuracy']:.2f} %" for number in best))
        trials = {number: trials[number] for number in best[:math.ceil(len(best) / 2)]}
    return runs[best[0]]


def main():
    config, options = parse_configuration()
    device = choose_device(config.device)
    if 'RANK' in os.environ:  # set by torchrun
        dist.init_process_group()
        sys.stdout = sys.stdout if process()[0] == 0 else open(os.devnull, 'w')
    data = load_images(config, options, device)
    print(f"GPU available: {torch.cuda.is_available()}\nDevice: {device.type}")
    if config.dataset != 'cifar10':
        print("These are synthetic images, NOT CIFAR-10.")
    print(f"Training images: {len(data[0]):,}\nValidation images: {len(data[1]):,}"
          f"\nShape of an image: {list(data[0][0][0].shape)}", flush=True)
    run = search(config, options, device, data) if options.search else train_run(options.name, config, options, device, data)
    rank = process()[0]
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        import CIFAR10_evaluation  # here, as it imports this file: a run hands over to it and gets nothing back
        CIFAR10_evaluation.main(['--name', run.folder.name, '--data-dir', str(options.data_dir)])


if __name__ == '__main__':
    run_script(main)

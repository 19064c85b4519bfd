"""Train a setting, or a group of runs that differ from it: python CIFAR10_train.py --model resnet32

A run is kept in results/<name>/. Whatever interrupts it, the same command continues it after its
last whole epoch.
"""
import contextlib
import io
import itertools
import math
import shutil
import sys
from datetime import timedelta
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F

from CIFAR10_configuration import (RANK, RESULTS, WORLD_SIZE, Configuration, Epoch, Run, UserError,
                                   atomic_write, flag, lock, parse_configuration, read_runs,
                                   run_script)
from CIFAR10_evaluation import (build_model, choose_device, cpu_capabilities, describe_machine,
                                evaluate, evaluate_and_report, load_file)
from dataset import data_load, training_batches

# --------------------------------------------------------------------------------------------------
# Optimizer, schedule


def build_optimizer(model, config):
    """SGD with momentum, with weight decay as L2 penalty.

    The learning rate is missing here, as train_epoch sets it at each step.
    """
    # Without momentum Nesterov's is plain SGD. fused: one call updates all weights
    nesterov = config.optimizer == 'nesterov' and config.momentum > 0
    optimizer = torch.optim.SGD(model.parameters(), momentum=config.momentum, nesterov=nesterov,
                                weight_decay=config.weight_decay, fused=True)
    optimizer.register_load_state_dict_post_hook(match_layout)
    return optimizer


def match_layout(optimizer):
    """Give a loaded state its weight's layout in memory (channels_last), as fused updates expect it."""
    for weight, state in optimizer.state.items():
        state.update({name: torch.empty_like(weight).copy_(value)
                      for name, value in state.items() if value is not None})


def get_learning_rate(config, epochs_done):
    """The learning rate after so many epochs, 2.5 for instance; a warmup begins at 0."""
    warmup = min(1, epochs_done / min(config.warmup, config.epochs / 4)) if config.warmup else 1
    # Step: it drops by gamma at each milestone, but not within an epoch (int). The epochs are divided,
    # as 0.55 * 100 is a little more than 55.
    passed = sum(int(epochs_done) / config.epochs >= part for part in config.milestones)
    decay = {'step': config.gamma ** passed,
             'cosine': (1 + math.cos(math.pi * epochs_done / config.epochs)) / 2,
             'none': 1}[config.learning_rate_decay]
    return config.learning_rate * warmup * decay


@torch.no_grad()
def apply_max_norm(model, max_norm):
    """Scale units with |w|^2 > max_norm down to it: the weight restriction of the slides."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.renorm_(2, 0, max_norm ** 0.5)  # each row's norm, as max_norm bounds its square


# --------------------------------------------------------------------------------------------------
# Checkpoint
#
# After each epoch last.pt has all that a run needs to go on: model, optimizer, history. While it has
# the optimizer's state, the run is open: Ctrl-C or a kill costs the epoch that has begun, and the same
# command goes on from last.pt. That state is taken out, and so the run closed, when it is in the report.


def save(file, run, **content):
    """Write a file for torch.load, whole or not at all, with the run's configuration."""
    buffer = io.BytesIO()
    torch.save(dict(content, configuration=vars(run.config)), buffer)
    atomic_write(file, buffer.getvalue())


def save_checkpoint(run, model, optimizer):
    """Write last.pt, the record if there is an epoch, and best.pt if the last is the best; by process 0."""
    if RANK > 0:
        return
    if run.history:
        if run.best is run.last:
            save(run.folder / 'best.pt', run, epoch=len(run.history),
                 model_state_dict=model.state_dict())
        run.write()
    # It comes last: if the program dies before it, this epoch is trained and written once more.
    save(run.folder / 'last.pt', run, machine=run.machine, history=list(map(Epoch._asdict, run.history)),
         model=model.state_dict(), optimizer=optimizer.state_dict())


def read_checkpoint(folder):
    """What last.pt holds, if the run is not closed; else None."""
    if (folder / 'last.pt').exists():
        checkpoint = load_file(folder / 'last.pt')
        return checkpoint if 'optimizer' in checkpoint else None


@contextlib.contextmanager
def open_run(name, config, model, optimizer):
    """Find and lock a run's folder, within a with block that gets its Run.

    An open run gives model and optimizer the state of its checkpoint. A closed one stays as it is: the
    new one goes to <name>-2, -3 ...
    """
    # The first folder that has an open run, or no file but its lock
    for number in itertools.count(1):
        folder = RESULTS / (name if number == 1 else f'{name}-{number}')
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, timeout=0):
            for part in folder.glob('*.part'):  # left by a write that was killed
                part.unlink()
            if checkpoint := read_checkpoint(folder):
                yield continue_run(folder, checkpoint, config, model, optimizer)
                return
            if not any(folder.glob('*.*')):
                if number > 1:
                    print(f"{RESULTS / name} is taken, and stays: this run goes to {folder}.")
                yield Run(folder, config, {}, [])
                return


def continue_run(folder, checkpoint, config, model, optimizer):
    """Give model and optimizer the state in a folder's checkpoint, and return its Run.

    Raises UserError where it is damaged, or was begun with other options.
    """
    try:
        begun = Configuration.from_record(checkpoint['configuration'])
        # The patience may change, as it only decides when to stop.
        changed = [name for name in config.differences(begun) if name != 'patience']
        if not changed:
            model.load_state_dict(checkpoint['model'])
            optimizer.load_state_dict(checkpoint['optimizer'])
        machine = checkpoint.get('machine', {})
        run = Run(folder, config, machine, [Epoch(**row) for row in checkpoint['history']])
    except Exception:  # whatever it lacks, or has in another shape
        raise UserError(f"{folder}/last.pt is another network's run, or damaged: use another --name."
                        ) from None
    if changed:
        raise UserError(f"{folder} is unfinished, with {flag(changed[0])} {begun.as_given(changed[0])}: "
                        "repeat its options to continue it, or choose another --name.")
    print(f"Continuing {folder.relative_to(RESULTS)} after epoch {len(run.history)}.")
    return run


def close_run(run):
    """Take the optimizer's state out of last.pt: from now on the same command begins a new run."""
    if checkpoint := read_checkpoint(run.folder):
        del checkpoint['optimizer']
        save(run.folder / 'last.pt', run, **checkpoint)


# --------------------------------------------------------------------------------------------------
# What a training says


def print_progress(line, done=False):
    """Rewrite the progress line on a terminal; elsewhere print the lines that are done."""
    if sys.stdout and sys.stdout.isatty():  # it can be closed
        # Padded, to hide a longer line before; cut while it changes, as a line that wraps can't be rewritten.
        width = shutil.get_terminal_size().columns - 1
        print(f'\r{line:{width}}\n' if done else f'\r{line:{width}.{width}}', end='')
    elif done:
        print(line)


def print_step(config, epoch, step, steps, loss, rate, seconds):
    """Show how far the training is, after so many seconds of its epoch, which counts from 0."""
    minutes_left = seconds / step * (steps * (config.epochs - epoch) - step) / 60
    print_progress(f"epoch {epoch + 1}/{config.epochs}  step {step}/{steps}  loss {loss:.3f}  "
                   f"{minutes_left:.0f} min left  lr {rate:.2g}")


def print_epoch(run):
    """Print the results of the last epoch and of the best one."""
    print_progress(f"epoch {run.last.epoch}/{run.config.epochs}  train loss {run.last.train_loss:.3f}  "
                   f"validation accuracy {run.last.val_accuracy:.2f} %  best {run.accuracy:.2f} % "
                   f"(epoch {run.best.epoch})", done=True)


def print_end(run):
    """Print why the training ended and what came out."""
    if run.last.epoch < run.config.epochs:
        print(f"Stopped early: no epoch since number {run.best.epoch:.0f} was better.")
    print(f"Best validation accuracy {run.accuracy:.2f} % at epoch {run.best.epoch:.0f}, after "
          f"{run.last.seconds / 60:.1f} minutes; weights and history are in {run.folder.absolute()}.")


# --------------------------------------------------------------------------------------------------
# Precision, processes, images


def choose_precision(name, device):
    """'bf16' or 'fp32': as --precision says, by default bf16 where the hardware multiplies it natively."""
    if name != 'auto':
        return name
    if device.type == 'cuda':
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_capabilities().get('avx512_bf16')  # a CPU with AMX has it too
    return 'bf16' if native else 'fp32'


def from_process_0(value):
    """The value that process 0 has, on every process."""
    values = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(values)
    return values[0]


def sum_over_processes(tensor):
    """The sum of the processes' tensors, on every process."""
    total = tensor.clone()  # all_reduce writes into it
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return total


def load_images(config, options, device):
    """data_load's training and validation images. Raises UserError if --batch-size does not fit."""
    train_data, val_data = data_load(config.dataset, options.data_dir, config.holdout, config.seed, device)
    if config.dataset != 'cifar10':
        print("These are synthetic images, NOT CIFAR-10.")
    print(f"Training images: {len(train_data):,}\nValidation images: {len(val_data):,}\n"
          f"Shape of an image: {list(train_data.tensors[0].shape[1:])}")

    # Every process needs an image of a batch, and batch norm of an MLP two, as one has no variance.
    smallest = len(train_data) % config.batch_size or config.batch_size
    needed = WORLD_SIZE * (2 if config.normalization == 'batch' else 1)
    if config.batch_size > len(train_data) or smallest < needed:
        raise UserError(f"--batch-size {config.batch_size} must be at most {len(train_data)}, the number of "
                        f"training images, and leave at least {needed} for the last batch.")
    return train_data, val_data


def share_work(model, compiled):
    """The model as it trains, with the same weights: on all processes, and compiled if asked."""
    if WORLD_SIZE > 1:
        # It sends process 0's weights to the others, and takes the mean of their gradients.
        model = torch.nn.parallel.DistributedDataParallel(model)
    if compiled:
        torch.compiler.reset()  # it keeps only a few graphs, those of a group's earlier runs too
        # A graph for the batches and one for the last, smaller one; on a GPU each starts as a whole.
        model = torch.compile(model, dynamic=False, mode='reduce-overhead')
    return model


# --------------------------------------------------------------------------------------------------
# Training


class Diverged(UserError):
    """The loss is not finite any more."""


def check_loss(loss, where, rate):
    """Raise Diverged unless a loss is finite."""
    if not math.isfinite(loss):
        raise Diverged(f"The loss is {loss} at {where}, learning rate {rate:.2g}: train under another --name "
                       "with a smaller --learning-rate or a --clip of 1; the finished epochs are kept.")


def train_epoch(model, optimizer, data, config, epoch, autocast):
    """Train for an epoch, whose number counts from 0. Returns mean cross-entropy and accuracy in percent.

    Raises Diverged.
    """
    model.train()
    # Each epoch seeds itself: order, augmentation and dropout. So a run resumes with no random state
    # saved. Runs, epochs and processes have seeds of their own.
    seed = config.seed * 100_000 + epoch
    torch.manual_seed(seed * 1000 + RANK)
    steps = math.ceil(len(data) / config.batch_size)
    began = perf_counter()
    sums = torch.zeros(2, device=data.tensors[0].device)  # of the losses and of the correct answers
    for step, (images, labels) in enumerate(training_batches(data, config, seed, RANK, WORLD_SIZE), 1):
        rate = optimizer.param_groups[0]['lr'] = get_learning_rate(config, epoch + (step - 1) / steps)
        # Forward, backward, update
        with autocast:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        # The weight is 1, but for several processes: of their gradients the mean is taken.
        in_batch = min(config.batch_size, len(data) - (step - 1) * config.batch_size)
        weight = len(labels) * WORLD_SIZE / in_batch
        (loss * weight).backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if config.max_norm:
            apply_max_norm(model, config.max_norm)

        # The rest changes no weights. A GPU has to stop to be read: each tenth step and the last do so.
        sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        if step % 10 == 0 or step == steps:
            seen = min(step * config.batch_size, len(data))
            mean_loss, accuracy = (sum_over_processes(sums) / seen).tolist()
            check_loss(mean_loss, f"epoch {epoch + 1}/{config.epochs}  step {step}/{steps}", rate)
            print_step(config, epoch, step, steps, mean_loss, rate, perf_counter() - began)
    return mean_loss, accuracy * 100


def train(name, config, options, device):
    """Begin or continue the run of that name, up to its last epoch or early stop. Returns its Run.

    Raises UserError if there are no images, or the run can't be continued; Diverged.
    """
    train_data, val_data = load_images(config, options, device)
    torch.manual_seed(config.seed)
    model = build_model(config, device)
    optimizer = build_optimizer(model, config)
    precision = choose_precision(options.precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16')

    # Process 0 opens the run. The others get it, the optimizer's state, and in share_work the weights.
    opened = open_run(name, config, model, optimizer) if RANK == 0 else contextlib.nullcontext()
    with opened as run:
        run, state = from_process_0((run, optimizer.state_dict()))
        optimizer.load_state_dict(state)
        machine = describe_machine(device, precision)
        if run.machine not in ({}, machine):
            machine['processor'] += '; others before'
        run.machine = machine
        training_model = share_work(model, options.compile)  # model itself is validated and saved
        save_checkpoint(run, model, optimizer)  # a disk that can't be written fails before it trains

        began = perf_counter() - (run.last.seconds if run.history else 0)  # the clock goes on, too
        # Up to the last epoch, or early stopping
        while not run.finished:
            epoch = len(run.history)
            trained = train_epoch(training_model, optimizer, train_data, config, epoch, autocast)
            validated = evaluate(model, val_data)
            rate, seconds = optimizer.param_groups[0]['lr'], perf_counter() - began
            # Process 0's numbers, as batch norm's running means differ a little between processes
            row = from_process_0(Epoch(epoch + 1, rate, *trained, *validated, seconds))
            check_loss(row.val_loss, f"the validation of epoch {row.epoch}", rate)
            run.history.append(row)
            save_checkpoint(run, model, optimizer)
            print_epoch(run)  # what is printed is saved
    print_end(run)
    return run


# --------------------------------------------------------------------------------------------------
# The command


def train_group(configs, options, device):
    """Train a run, or the runs of a group that are not finished yet; configs has them by name.

    Where one of a group diverges, the others are trained. Raises Diverged where none is left.
    """
    # The finished runs of the group, if it is one, by configuration; all names lie in one folder.
    group = next(iter(configs)).rpartition('/')[0]
    found = {run.config: run for run in read_runs(f'{group}/*') if run.finished} if group else {}
    runs = []
    for name, config in configs.items():
        if run := from_process_0(found.get(config)):
            print(f"{run.folder} is finished.")
            runs.append(run)
            continue
        try:
            runs.append(train(name, config, options, device))
        except Diverged as error:
            if not group:
                raise
            print(f"{name}: {error}")
            diverged = error
    if not runs:
        raise diverged
    return runs


def main():
    configs, options = parse_configuration()
    device = choose_device(options.device)
    if WORLD_SIZE > 1:
        # The others wait for a day before they fail, as one may have images to download.
        dist.init_process_group(timeout=timedelta(days=1))
    if RANK > 0:
        sys.stdout = None  # it prints nothing, as one speaks for all
    print(f"GPU available: {torch.cuda.is_available()}\nDevice: {device.type}")
    if shutil.which('nvidia-smi') and not torch.version.cuda:
        print(f"PyTorch {torch.__version__} is built without CUDA: pytorch.org has one for your NVIDIA GPU.")

    runs = train_group(configs, options, device)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        # Runs are closed when the report has them, and the weights of the best one are confirmed; otherwise
        # the same command tries it again. Of runs from elsewhere there may be no weights.
        measured = [run for run in runs if (run.folder / 'best.pt').exists()]
        measured.sort(key=lambda run: run.accuracy)
        if evaluate_and_report(measured[-1:], options.data_dir, device):
            for run in runs:
                close_run(run)


if __name__ == '__main__':
    run_script(main)

"""Train a setting, or a group of runs that differ from it: python CIFAR10_train.py --model resnet32

A run is kept in results/<name>/. Whatever interrupts it, the same command continues it after its last whole
epoch.
"""
import contextlib
import io
import itertools
import math
import os
import shutil
import sys
from datetime import timedelta
from time import monotonic

import torch
import torch.distributed as dist
import torch.nn.functional as F

from CIFAR10_configuration import (
    RANK,
    RESULTS,
    WORLD_SIZE,
    Configuration,
    Epoch,
    Run,
    UserError,
    atomic_write,
    flag,
    parse_configuration,
    print_once,
    read_runs,
    run_script,
)
from CIFAR10_evaluation import (
    build_model,
    choose_device,
    cpu_capabilities,
    describe_machine,
    evaluate,
    evaluate_and_report,
    load_file,
    plot_accuracy,
)
from dataset import data_load, training_batches

if os.name == 'nt':
    import msvcrt
else:
    import fcntl

# ----------------------------------------------------------------------------------------------------------
# Optimizer, schedule


def build_optimizer(model, config):
    """SGD with momentum or Adam, with the L2 penalty of weight decay; train_epoch sets the learning rate."""
    # fused: one call updates all weights
    common = dict(params=model.parameters(), weight_decay=config.weight_decay, fused=True)
    if config.optimizer == 'adam':
        optimizer = torch.optim.Adam(betas=(config.momentum, 0.999), **common)
    else:
        nesterov = config.optimizer == 'nesterov' and config.momentum > 0  # without momentum it is plain SGD
        optimizer = torch.optim.SGD(momentum=config.momentum, nesterov=nesterov, **common)
    optimizer.register_load_state_dict_post_hook(match_layout)
    return optimizer


def match_layout(optimizer):
    """Give a loaded state the layout of its weight in memory, which fused updates take for granted."""
    for weight, state in optimizer.state.items():
        state.update({name: torch.empty_like(weight).copy_(value)
                      for name, value in state.items() if name != 'step'})


def get_learning_rate(config, epoch):
    """The learning rate after so many epochs, parts of one included; a warmup begins at 0."""
    warmup = min(1, epoch / min(config.warmup, config.epochs / 4)) if config.warmup else 1
    # By gamma at each milestone passed; int: a drop waits for the next whole epoch. The epoch is divided, as
    # 0.55 * 100 is a little more than 55.
    passed = sum(int(epoch) / config.epochs >= part for part in config.milestones)
    decay = {'step': config.gamma ** passed,
             'cosine': (1 + math.cos(math.pi * epoch / config.epochs)) / 2,
             'none': 1}[config.learning_rate_decay]
    return config.learning_rate * warmup * decay


@torch.no_grad()
def apply_max_norm(model, max_norm):
    """Scale the weights of units with |w|^2 > max_norm down to it, the weight restriction of the slides."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.renorm_(2, 0, max_norm ** 0.5)  # each row's 2-norm, as max_norm bounds its square


# ----------------------------------------------------------------------------------------------------------
# Checkpoint


def save(file, run, **content):
    """Write a file for torch.load, whole or not at all, with the run's configuration."""
    buffer = io.BytesIO()
    torch.save(dict(content, configuration=vars(run.config)), buffer)
    atomic_write(file, buffer.getvalue())


def save_checkpoint(run, model, optimizer):
    """Write last.pt, the record if there is an epoch, and best.pt if it is the best; process 0 does it."""
    if RANK > 0:
        return
    if run.history:
        if run.best is run.last:
            save(run.folder / 'best.pt', run, epoch=len(run.history), model_state_dict=model.state_dict())
        run.write()
    # It comes last: if the program dies before it, this epoch is lost, trained again and written again.
    save(run.folder / 'last.pt', run, history=list(map(Epoch._asdict, run.history)),
         model=model.state_dict(), optimizer=optimizer.state_dict())


@contextlib.contextmanager
def reading(file):
    """Raise UserError within a with block for whatever a checkpoint lacks, or has in another shape."""
    try:
        yield
    except Exception:
        raise UserError(f"{file} is another network's run, or damaged: use another --name.") from None


def load_checkpoint(file):
    """The Run that last.pt tells of, and all that it holds. Raises UserError where it is damaged."""
    checkpoint = load_file(file)
    with reading(file):
        return Run(file.parent, Configuration.from_record(checkpoint['configuration']), {},
                   [Epoch(**row) for row in checkpoint['history']]), checkpoint


def find_run(name, config):
    """The run to continue and its checkpoint, or a new run and None.

    What is finished and in the report stays as it is: the new run goes to <name>-2, -3 ...
    Raises UserError where an unfinished run has other options.
    """
    for number in itertools.count(1):
        folder = RESULTS / (name if number == 1 else f'{name}-{number}')
        files = {file.name for file in folder.glob('*')}
        if 'last.pt' in files:
            run, checkpoint = load_checkpoint(folder / 'last.pt')
            changed = config.differences(run.config)
            # A finished run with weights may still have to be evaluated and put into the report.
            nothing_left = files >= {'evaluation.json', 'reported'} or 'best.pt' not in files
            if not (changed or run.is_finished and nothing_left):
                print(f"Continuing {folder.relative_to(RESULTS)} after epoch {len(run.history)}.")
                return run, checkpoint
            if not run.is_finished:
                raise UserError(
                    f"{folder} is unfinished, with {flag(changed[0])} {run.config.as_given(changed[0])}: "
                    "repeat its options to continue it, or choose another --name.")
        elif not files & {'config.json', 'best.pt'}:
            if any(folder.glob('*/*')):
                raise UserError(f"{folder} is a group: choose another --name, or GROUP/RUN for a run in it.")
            if number > 1:
                print(f"{RESULTS / name} holds a run already, which stays: this one goes to {folder}.")
            return Run(folder, config, {}, []), None


@contextlib.contextmanager
def lock(folder):
    """Be the only process that writes in a folder, within a with block. A disk without locks lets all in.

    Raises UserError where another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'lock', 'a') as file:  # the operating system unlocks it when the process ends, however
        try:
            if RANK > 0:
                pass  # process 0 has it for all
            elif os.name == 'nt':
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"Another process writes in {folder}: wait, or use another --name.") from None
        except OSError:
            pass  # the disk has no locks
        yield


# ----------------------------------------------------------------------------------------------------------
# What a training says


def print_progress(line, done=False):
    """Rewrite the progress line on a terminal; elsewhere print the lines that are done."""
    if sys.stdout and sys.stdout.isatty():  # it can be closed
        # Padded, to hide a longer line before; cut while it changes, as a line that wraps can't be rewritten.
        width = shutil.get_terminal_size().columns - 1
        print(f'\r{line:{width}}\n' if done else f'\r{line:{width}.{width}}', end='')
    elif done:
        print(line)


class Diverged(UserError):
    """The loss is not finite any more."""


def check_loss(loss, where, rate):
    """Raise Diverged unless a loss is finite."""
    if not math.isfinite(loss):
        raise Diverged(f"The loss is {loss} at {where}, learning rate {rate:.2g}: train under another --name "
                       "with a smaller --learning-rate or a --clip up to 10; the finished epochs are kept.")


def print_step(config, epoch, step, steps, loss, rate, seconds):
    """Show how far the training is. Raises Diverged where its loss is not finite."""
    where = f"epoch {epoch + 1}/{config.epochs}  step {step}/{steps}"
    check_loss(loss, where, rate)
    minutes_left = seconds / step * (steps * (config.epochs - epoch) - step) / 60
    print_progress(f"{where}  loss {loss:.3f}  {minutes_left:.0f} min left  lr {rate:.2g}  "
                   f"{step * config.batch_size / seconds:,.0f} images/s")


def print_epoch(run):
    """Print the results of the last epoch and of the best one, and advice where nothing is learned."""
    print_progress(f"epoch {run.last.epoch}/{run.config.epochs}  train loss {run.last.train_loss:.3f}  "
                   f"validation accuracy {run.last.val_accuracy:.2f} %  best {run.accuracy:.2f} % "
                   f"(epoch {run.best.epoch})", done=True)
    if run.last.epoch >= 3 and max(row.train_accuracy for row in run.history[-3:]) < 11:
        print_once("Three epochs were no better than chance, 10 %: usually a --learning-rate ten times "
                   "smaller or larger helps, or --activation relu for MLP and LeNet-5.")


def print_end(run):
    """Print why the training ended and what came out."""
    if run.last.epoch < run.config.epochs:
        print(f"Stopped early: no epoch since number {run.best.epoch:.0f} was better.")
    print(f"Best validation accuracy {run.accuracy:.2f} % at epoch {run.best.epoch:.0f}, after "
          f"{run.last.seconds / 60:.1f} minutes; weights and history are in {run.folder.absolute()}.")


# ----------------------------------------------------------------------------------------------------------
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


def load_images(config, options, device):
    """data_load's training and validation images, which process 0 fetches before the others look for them."""
    if RANK > 0:
        dist.barrier()  # where they wait for process 0
    train_data, val_data = data_load(config.dataset, options.data_dir, config.holdout, config.seed, device,
                                     options.data_url)
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    if config.dataset != 'cifar10':
        print("These are synthetic images, NOT CIFAR-10.")
    print(f"Training images: {len(train_data):,}\nValidation images: {len(val_data):,}\n"
          f"Shape of an image: {list(train_data.tensors[0].shape[1:])}")

    if config.batch_size > len(train_data):
        raise UserError(f"--batch-size must be at most {len(train_data)}, the number of training images.")
    # Every process needs an image of each batch, and an MLP's batch norm two, as one has no variance.
    smallest = len(train_data) % config.batch_size or config.batch_size
    needed = WORLD_SIZE * (2 if config.normalization == 'batch' else 1)
    if smallest < needed:
        raise UserError(
            f"--batch-size {config.batch_size} leaves a batch of {smallest}: let the last one have {needed}.")
    return train_data, val_data


# ----------------------------------------------------------------------------------------------------------
# Training


def train_epoch(model, optimizer, data, config, epoch, autocast):
    """Train for one epoch, whose number counts from 0. Returns training loss and accuracy in percent."""
    model.train()
    # Each epoch seeds itself: order, augmentation and dropout. So a run resumes with no random state saved.
    # Runs, epochs and processes have seeds of their own.
    seed = config.seed * 100_000 + epoch
    torch.manual_seed(seed * 1000 + RANK)
    steps = math.ceil(len(data) / config.batch_size)
    began = monotonic()
    sums = torch.zeros(2, device=data.tensors[0].device)  # of the losses and of the correct answers
    for step, (images, labels) in enumerate(training_batches(data, config, seed, RANK, WORLD_SIZE), 1):
        rate = get_learning_rate(config, epoch + (step - 1) / steps)
        optimizer.param_groups[0]['lr'] = rate

        # Forward, backward, update
        with autocast:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        # Of several processes the mean gradient is taken, so that each loss is weighted by its images.
        in_batch = min(config.batch_size, len(data) - (step - 1) * config.batch_size)
        (loss * (len(labels) * WORLD_SIZE / in_batch)).backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if config.max_norm:
            apply_max_norm(model, config.max_norm)

        # What follows only watches. A GPU has to stop to be read: every tenth step and the last one do so.
        sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        if step % 10 == 0 or step == steps:
            total = sums.clone()  # all_reduce writes into it
            if WORLD_SIZE > 1:
                dist.all_reduce(total)
            mean_loss, accuracy = (total / min(step * config.batch_size, len(data))).tolist()
            # A millisecond more, as a clock may stand still for a while
            print_step(config, epoch, step, steps, mean_loss, rate, monotonic() - began + 1e-3)
    return mean_loss, accuracy * 100


def train(name, config, options, device):
    """Begin or continue the run of that name, up to its last epoch or its early stop. Returns its Run."""
    # Images, model and optimizer
    train_data, val_data = load_images(config, options, device)
    torch.manual_seed(config.seed)
    model = build_model(config, device)
    optimizer = build_optimizer(model, config)

    # The run's folder, which process 0 finds for all; an unfinished run goes on from its checkpoint
    run, checkpoint = from_process_0(RANK == 0 and find_run(name, config))
    precision = choose_precision(options.precision, device)
    run.machine = describe_machine(device, precision)
    if checkpoint:
        with reading(run.folder / 'last.pt'):
            model.load_state_dict(checkpoint['model'])
            optimizer.load_state_dict(checkpoint['optimizer'])

    # Speed: training_model shares its weights with model, which is saved, and validated in float32.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16')
    training_model = torch.nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    if options.compile:
        torch.compiler.reset()  # it keeps only a few graphs, those of a group's earlier runs too
        # One graph for the batches and one for the last, smaller one; on a GPU each starts as a whole.
        training_model = torch.compile(training_model, dynamic=False, mode='reduce-overhead')

    # Epochs, up to the last one or early stopping; the clock goes on where the run was interrupted.
    began = monotonic() - (run.last.seconds if run.history else 0)
    with lock(run.folder):
        if RANK == 0:
            for part in run.folder.glob('*.part'):  # left by a write that was killed
                part.unlink()
        save_checkpoint(run, model, optimizer)  # a folder that can't be written fails before any training
        while not run.is_finished:
            epoch = len(run.history)
            trained = train_epoch(training_model, optimizer, train_data, config, epoch, autocast)
            validated = evaluate(model, val_data)
            row = Epoch(epoch + 1, optimizer.param_groups[0]['lr'], *trained, *validated, monotonic() - began)
            row = from_process_0(row)  # batch norm's running means differ a little between processes
            check_loss(row.val_loss, f"the validation of epoch {row.epoch}", row.learning_rate)
            run.history.append(row)
            save_checkpoint(run, model, optimizer)
            print_epoch(run)  # what is printed is saved
    print_end(run)
    return run


# ----------------------------------------------------------------------------------------------------------
# The command


def main():
    configs, options = parse_configuration()
    device = choose_device(options.device)
    if WORLD_SIZE > 1:
        # The others wait for a day before they fail, as process 0 may have images to download.
        dist.init_process_group(timeout=timedelta(days=1))
    if RANK > 0:
        sys.stdout = None  # it prints nothing, as one speaks for all
    print(f"GPU available: {torch.cuda.is_available()}\nDevice: {device.type}")
    if shutil.which('nvidia-smi') and not torch.version.cuda:
        print(f"PyTorch {torch.__version__} is built without CUDA: pytorch.org has one for your NVIDIA GPU.")

    # The finished runs of the group, if it is one (all names lie in one folder), by their configuration
    group = (RESULTS / next(iter(configs))).parent
    found = read_runs(group) if group != RESULTS else []
    finished = from_process_0({run.config: run for run in found if run.is_finished})
    # The others are trained, also where one of a group diverges.
    runs = []
    for name, config in configs.items():
        if config in finished:
            print(f"{finished[config].folder} is finished.")
            runs.append(finished[config])
            continue
        try:
            runs.append(train(name, config, options, device))
        except Diverged as error:
            if group == RESULTS:
                raise
            print(f"{name}: {error}")
    if not runs:
        raise UserError("Every run diverged: choose smaller learning rates.")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        for run in runs:
            plot_accuracy({('validation',): [run]}, run.folder / 'accuracy.png')
        best = max(runs, key=lambda run: run.accuracy)
        evaluate_and_report([best], options.data_dir, device)
        (best.folder / 'reported').touch()  # from now on the same command begins a new run


if __name__ == '__main__':
    run_script(main)

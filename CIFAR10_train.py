"""Train one of the three settings: python CIFAR10_train.py --model resnet32

The run is kept in results/<name>/. Whatever ends it, the same command continues it after its last epoch.
"""
import io
import math
import os
import shutil
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import CIFAR10_evaluation
from CIFAR10_configuration import (
    HISTORY,
    RESULTS,
    Configuration,
    Run,
    UserError,
    atomic_write,
    flag,
    lock,
    parse_configuration,
    print_once,
    print_progress,
    run_script,
)
from CIFAR10_evaluation import build_model, choose_device, describe_machine, evaluate, load_file, read_runs
from dataset import data_load, training_batches

# torchrun tells each process its rank, its rank on this machine, and how many there are; alone it is 0 of 1.
RANK = int(os.environ.get('RANK', 0))
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))
WORLD_SIZE = int(os.environ.get('WORLD_SIZE', 1))

# ----------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def build_optimizer(model, config):
    """SGD with momentum or Adam over all weights, with the L2 penalty of weight decay."""
    common = dict(weight_decay=config.weight_decay, fused=True)  # fused: all weights in one call
    if config.optimizer == 'adam':
        return torch.optim.Adam(model.parameters(), betas=(config.momentum, 0.999), **common)
    nesterov = config.optimizer == 'nesterov' and config.momentum > 0  # without momentum it is plain SGD
    return torch.optim.SGD(model.parameters(), momentum=config.momentum, nesterov=nesterov, **common)


def get_learning_rate(config, epoch):
    """The learning rate after so many epochs (float) of the whole training."""
    warmup = min(1, epoch / config.warmup) if config.warmup else 1
    decay = 1
    if config.learning_rate_decay == 'step':
        # It drops between epochs, by gamma at each milestone passed.
        decay = config.gamma ** sum(int(epoch) >= part * config.epochs for part in config.milestones)
    if config.learning_rate_decay == 'cosine':
        decay = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return config.learning_rate * warmup * decay


@torch.no_grad()
def apply_max_norm(model, max_norm):
    """Scale the weights of units with |w|^2 > max_norm down to it, the weight restriction of the slides."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.renorm_(2, 0, max_norm ** 0.5)


def should_stop(config, history):
    """Whether all epochs are done, or `patience` of them after the last drop brought nothing better."""
    if not history:
        return False
    if len(history) == config.epochs:
        return True
    # Patience counts from the last drop on, as every drop brings a better epoch.
    last_drop = {'step': math.ceil(max(config.milestones) * config.epochs),
                 'cosine': config.epochs,  # it falls to the end: no early stop
                 'none': 0}[config.learning_rate_decay]
    best = max(history, key=lambda row: row['val_accuracy'])['epoch']
    return len(history) - max(best, last_drop) >= config.patience


# ----------------------------------------------------------------------------------------------------------
# Checkpoint


def save_checkpoint(run, model, optimizer):
    """Write best.pt if the last epoch was the best one, the record, and last.pt."""
    def save(name, **content):
        buffer = io.BytesIO()
        torch.save(dict(content, configuration=asdict(run.config)), buffer)
        atomic_write(run.folder / name, buffer.getbuffer())

    if RANK > 0:
        return
    if run.history:
        if run.best is run.last:  # the same row of the history
            save('best.pt', epoch=len(run.history), model_state_dict=model.state_dict())
        try:
            run.write()
        except UserError:  # a spreadsheet may have history.csv open
            if should_stop(run.config, run.history):  # there is no later epoch to write it
                raise
            print_once(f"\nThe record in {run.folder} can't be written now, as another program may have it "
                       "open: training goes on, and tries it again after the next epoch.")
    # It comes last: if the program dies before it, this epoch is trained again and all is written again.
    save('last.pt', history=run.history, model=model.state_dict(), optimizer=optimizer.state_dict())


def load_checkpoint(file, config):
    """The content of last.pt, and whether its run is finished.

    Raises UserError where it is damaged, or unfinished and of another configuration.
    """
    hint = "begin anew with --restart, which keeps what is there, or under another --name"
    checkpoint = load_file(file, hint)
    try:
        old = Configuration.from_record(checkpoint['configuration'])
        finished = should_stop(old, checkpoint['history'])
    except Exception:  # whatever the file of another program lacks
        raise UserError(f"{file} is no checkpoint of this program: {hint}.") from None
    changed = config.differences(old)
    if changed and not finished:
        name = changed[0]
        raise UserError(f"{file.parent} is unfinished and was begun with {flag(name)} {getattr(old, name)}, "
                        f"not {getattr(config, name)}: repeat its options to continue it, or {hint}.")
    return checkpoint, finished


def open_run(name, config, restart):
    """The folder of the run to continue, or of a new one; its checkpoint or None; and the lock to hold.

    What is finished stays as it is: the new run goes to <name>-2, -3 ..., or with restart the old one does.
    """
    def holds_run(folder):
        return any((folder / file).exists() for file in ('config.json', 'best.pt', 'last.pt'))

    folders = [RESULTS / name, *(RESULTS / f'{name}-{number}' for number in range(2, 1000))]
    if restart and holds_run(folders[0]):
        lock(folders[0] / 'lock').close()  # nobody is writing there
        aside = next(folder for folder in folders if not folder.exists())
        folders[0].rename(aside)
        print(f"The run that was in {folders[0]} is now in {aside}.")
    # The first folder that is new, or holds an unfinished run
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / 'lock')
        if (folder / 'last.pt').exists():
            checkpoint, finished = load_checkpoint(folder / 'last.pt', config)
            if not finished:
                epoch = len(checkpoint['history']) + 1
                print(f"Continuing {folder.relative_to(RESULTS)} at epoch {epoch} of {config.epochs}.")
                return folder, checkpoint, held
        elif not holds_run(folder):
            if folder != folders[0]:
                print(f"{folders[0]} holds a finished run, which stays: this one goes to {folder}.")
            return folder, None, held
        held.close()


def resume(run, model, optimizer, checkpoint):
    """Go on from a checkpoint, if there is one. Raises UserError where the disk has no room for the next."""
    if checkpoint:
        run.history = checkpoint['history']
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
    # 4 bytes a weight: once in best.pt, up to three times in last.pt (Adam has two averages); old and new
    needed = 32 * sum(p.numel() for p in model.parameters())
    if RANK == 0 and shutil.disk_usage(run.folder).free < needed:
        raise UserError(f"The disk of {run.folder} has too little room for two checkpoints: make some first.")


# ----------------------------------------------------------------------------------------------------------
# One epoch


def train_epoch(model, optimizer, data, config, epoch, autocast):
    """Take the steps of an epoch, counted from 0. Returns training loss and accuracy in percent."""
    model.train()
    # Each epoch seeds itself: order, augmentation and dropout. So a run resumes with no random state saved.
    seed = config.seed * 100_000 + epoch
    torch.manual_seed(seed * 1000 + RANK)
    batches = training_batches(data, config, seed, RANK, WORLD_SIZE)
    steps = math.ceil(len(data) / config.batch_size)
    began = time.time()
    sums = torch.zeros(2, device=data.tensors[0].device)  # of the losses and of the correct answers
    for step, (images, labels) in enumerate(batches, 1):
        rate = get_learning_rate(config, epoch + (step - 1) / steps)
        optimizer.param_groups[0]['lr'] = rate

        # Forward, backward, update
        with autocast:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if config.max_norm:
            apply_max_norm(model, config.max_norm)

        # The sums stay on the device and are read at every tenth step, as a GPU has to stop to be read.
        sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        if step % 10 == 0 or step == steps:
            total = sums.clone()  # all_reduce writes into it
            if WORLD_SIZE > 1:
                dist.all_reduce(total)
            mean_loss, accuracy = (total / min(step * config.batch_size, len(data))).tolist()
            print_step(config, epoch, step, steps, mean_loss, rate, time.time() - began)
    return mean_loss, accuracy * 100


class Diverged(UserError):
    """The loss is not finite any more."""


def check_loss(loss, where, rate):
    """Raise Diverged unless a loss is finite."""
    if not math.isfinite(loss):
        raise Diverged(f"The loss is {loss} at {where}, learning rate {rate:.2g}: begin anew with --restart "
                       "and a smaller --learning-rate; the best weights so far are kept.")


def print_step(config, epoch, step, steps, loss, rate, seconds):
    """Show how far the training is. Raises Diverged where its loss is not finite."""
    where = f"epoch {epoch + 1}/{config.epochs}  step {step}/{steps}"
    check_loss(loss, where, rate)
    minutes_left = seconds / step * (steps * (config.epochs - epoch) - step) / 60
    print_progress(f"{where}  loss {loss:.3f}  learning rate {rate:.2g}  "
                   f"{step * config.batch_size / seconds:,.0f} images/s  {minutes_left:.1f} min left")


# ----------------------------------------------------------------------------------------------------------
# One run


def use_bf16(precision, device):
    """Whether to multiply in bf16: as --precision says, by default where the hardware does so natively."""
    if precision != 'auto':
        return precision == 'bf16'
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = CIFAR10_evaluation.cpu_capabilities()
    return device.type == 'cpu' and bool(cpu.get('avx512_bf16') or cpu.get('amx_bf16'))


def load_images(config, options, device):
    """data_load's training and validation images; on each machine one process fetches them for the others."""
    if LOCAL_RANK > 0:
        dist.barrier()
    data = data_load(config.dataset, options.data_dir, config.holdout, config.seed, device, options.data_url)
    if LOCAL_RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    if config.dataset != 'cifar10':
        print("These are synthetic images, NOT CIFAR-10.")
    print(f"Training images: {len(data[0]):,}\nValidation images: {len(data[1]):,}\n"
          f"Shape of an image: {list(data[0][0][0].shape)}", flush=True)

    # Every process needs an image of each batch, and batch norm two, as one has no variance.
    smallest = len(data[0]) % config.batch_size or config.batch_size
    needed = WORLD_SIZE * (2 if config.normalization == 'batch' else 1)
    if smallest < needed:
        raise UserError(f"--batch-size {config.batch_size} leaves a batch of {smallest}, but this training "
                        f"needs {needed} images in each: choose another.")
    return data


def from_process_0(*values):
    """The values that process 0 has, on every process."""
    values = list(values)
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(values)
    return values


def print_epoch(run):
    """Print the results of the last epoch and of the best one, and advice where nothing is learned."""
    last, best = run.last, run.best
    print_progress(f"epoch {last['epoch']}/{run.config.epochs}  train loss {last['train_loss']:.3f}  "
                   f"validation accuracy {last['val_accuracy']:.2f} %  best {best['val_accuracy']:.2f} % "
                   f"(epoch {best['epoch']})", done=True)
    if last['epoch'] >= 3 and max(row['train_accuracy'] for row in run.history[-3:]) < 11:
        print_once("Three epochs were no better than chance, 10 %: usually a --learning-rate ten times "
                   "smaller or larger helps, or --activation relu for MLP and LeNet-5.")


def print_end(run):
    """Print why the training ended and what came out."""
    if run.last['epoch'] < run.config.epochs:
        print(f"Stopped early: no epoch since number {run.best['epoch']} was better.")
    print(f"Best validation accuracy {run.accuracy:.2f} % at epoch {run.best['epoch']}, after "
          f"{run.last['seconds'] / 60:.1f} minutes; weights and history are in {run.folder}.")


def train(name, config, options, device):
    """Begin or continue the run of that name, up to its last epoch or its early stop. Returns its Run."""
    # Images
    train_data, val_data = load_images(config, options, device)

    # Model and optimizer
    torch.manual_seed(config.seed)
    model = build_model(config, device)
    optimizer = build_optimizer(model, config)

    # Resume: process 0 finds the run's folder and checkpoint, and tells the others.
    # The lock is held until this function returns.
    folder, checkpoint, _held = open_run(name, config, options.restart) if RANK == 0 else [None] * 3
    folder, checkpoint = from_process_0(folder, checkpoint)
    bf16 = use_bf16(options.precision, device)
    machine = dict(describe_machine(device), precision='bf16' if bf16 else 'fp32')
    run = Run(folder, config, machine, [])
    resume(run, model, optimizer, checkpoint)

    # Speed: training_model shares its weights with model, which is saved, and validated in float32.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    training_model = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    if options.compile:
        # One graph for the batches and one for the last, smaller one; on a GPU each starts as a whole.
        training_model = torch.compile(training_model, dynamic=False, mode='reduce-overhead')

    # Epochs, up to the last one or early stopping; the clock goes on where the run was interrupted.
    began = time.time() - (run.last['seconds'] if run.history else 0)
    save_checkpoint(run, model, optimizer)  # a folder that can't be written fails here, before any training
    while not should_stop(config, run.history):
        train_results = train_epoch(training_model, optimizer, train_data, config, len(run.history), autocast)
        # All go by the results of process 0, as batch norm's running means differ a little.
        results = from_process_0(len(run.history) + 1, optimizer.param_groups[0]['lr'], *train_results,
                                 *evaluate(model, val_data), time.time() - began)
        row = dict(zip(HISTORY, results, strict=True))
        check_loss(row['val_loss'], f"the validation of epoch {row['epoch']}", row['learning_rate'])
        run.history.append(row)
        save_checkpoint(run, model, optimizer)
        print_epoch(run)  # what is printed is saved
    print_end(run)
    return run


# ----------------------------------------------------------------------------------------------------------
# A group of runs


def train_group(configs, options, device):
    """Train the runs of a group, but those that are finished. Returns the best one."""
    # Of equal ones the oldest counts, which is the last to enter the dict.
    found = reversed(read_runs((RESULTS / next(iter(configs))).parent))
    [finished] = from_process_0({run.config: run for run in found if should_stop(run.config, run.history)})
    runs = []
    for name, config in configs.items():
        if config in finished and not options.restart:
            print(f"{name} is finished.")
            runs.append(finished[config])
            continue
        try:
            runs.append(train(name, config, options, device))
        except Diverged as error:  # the others may learn
            print(f"{name}: {error}")
    if not runs:
        raise UserError("Every run diverged: choose smaller learning rates.")
    return max(runs, key=lambda run: run.accuracy)


# ----------------------------------------------------------------------------------------------------------
# The command


def main():
    configs, options = parse_configuration()
    device = choose_device(options.device)
    if WORLD_SIZE > 1:
        dist.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # one speaks for all
    print(f"GPU available: {torch.cuda.is_available()}\nDevice: {device.type}")
    if shutil.which('nvidia-smi') and not torch.version.cuda:
        print(f"PyTorch {torch.__version__} is built without CUDA, so this machine's NVIDIA GPU is not used: "
              "pytorch.org has the command that installs one with it.")
    try:
        name, config = next(iter(configs.items()))
        if '/' in name:
            run = train_group(configs, options, device)
        else:
            run = train(name, config, options, device)
    except KeyboardInterrupt:
        print("\nInterrupted: the finished epochs are kept, and the same command continues after them.")
        raise
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"--compile failed ({type(error).__name__}): leave it out.") from None
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        trained = (run.folder / 'best.pt').exists()  # a committed run of a group may lack its weights
        only = ['--name', str(run.folder.relative_to(RESULTS))] if trained else []
        CIFAR10_evaluation.main([*only, '--data-dir', options.data_dir])


if __name__ == '__main__':
    run_script(main)

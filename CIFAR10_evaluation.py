"""From weights to accuracies, from results/ to figures and the report.

    python CIFAR10_evaluation.py                                  results/report.html from all runs
    python CIFAR10_evaluation.py --model lenet5 --weights FILE    accuracy of any weights
    python CIFAR10_evaluation.py --predict FILE ...               class of any picture
    python CIFAR10_evaluation.py --submit StudentID_Name          StudentID_Name.zip to hand in
"""
import base64
import contextlib
import io
import json
import os
import platform
import re
import statistics
import zipfile
from dataclasses import replace
from glob import glob
from html import escape
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib import cycler, rcParams, style
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from CIFAR10_configuration import (
    FIELDS,
    MODELS,
    RESULTS,
    SETTINGS,
    Configuration,
    Epoch,
    Parser,
    Run,
    UserError,
    add_data_options,
    atomic_write,
    flag,
    path_of_run,
    print_once,
    run_script,
)
from dataset import CLASSES, crop_and_flip, data_load, normalize
from LeNet5_model import LeNet5_model
from MLP_model import MLP_model
from ResNet_model import BLOCKS, ResNet

Image.MAX_IMAGE_PIXELS = 500_000_000  # no warning of a large photo

# ----------------------------------------------------------------------------------------------------------
# Measuring a model: device, network, weights, predictions, accuracy


def choose_device(name='auto'):
    """The torch.device of that name; 'auto' is the first of CUDA, MPS and CPU that this machine has."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        name = next(name for name in there if there[name])
    if not there.get(name):
        raise UserError(f"This machine or its PyTorch has no {name}: leave --device out to use what it has.")
    if name == 'cuda':
        # torchrun starts a process for each GPU, and gives it a number.
        gpus = torch.cuda.device_count()
        if int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > gpus:
            raise UserError(f"There are more processes than GPUs: start {gpus} with --nproc-per-node {gpus}.")
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    return torch.device(name)


def cpu_capabilities():
    """What the CPU can do, by name, as PyTorch 2.10 and newer tell it."""
    return getattr(torch.cpu, 'get_capabilities', dict)()


def describe_machine(device, precision):
    """What the report says of the machine. On machines that differ in it, results differ a little."""
    processor = cpu_capabilities().get('cpu_name', platform.machine())
    return dict(device=device.type,
                processor=torch.cuda.get_device_name() if device.type == 'cuda' else processor,
                instructions=torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512, ...
                threads=torch.get_num_threads(),
                torch=torch.__version__,
                precision=precision)


def build_model(config, device):
    """The configured network with fresh weights, on the device; images (N, 3, 32, 32) -> logits (N, 10)."""
    if config.model == 'mlp':
        model = MLP_model(config.hidden, config.activation, config.initialization, config.dropout,
                          config.normalization)
    elif config.model == 'lenet5':
        model = LeNet5_model(config.activation, config.initialization)
    else:
        model = ResNet((config.depth - 2) // 6, BLOCKS[config.block])
    model.standardization = config.standardization  # how predict prepares its images
    # The layout in which convolutions are fastest; on MPS it spoils the gradients (PyTorch issue 175189).
    if device.type != 'mps':
        model.to(memory_format=torch.channels_last)
    return model.to(device)


# What weights_only=True may make beside tensors: NumPy's numbers, as many files have one for the accuracy
MAKE_NUMBER = np.float64().__reduce__()[0]  # the function that their pickles call
NUMBERS = [MAKE_NUMBER, (MAKE_NUMBER, 'numpy.core.multiarray.scalar'),  # its name before NumPy 2
           np.dtype, *map(type, map(np.dtype, '?bhilqBHILQefdg'))]  # booleans, integers and floats


def load_file(file):
    """What torch.save wrote to a file. Raises UserError where it is unsafe or damaged."""
    try:
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a damaged or malicious file makes torch.load raise
        raise UserError(f"{file} can't be loaded ({type(error).__name__}): give a file that torch.save "
                        "wrote, or train under another --name.") from None


def state_dicts(saved):
    """Yield the tensors of each dict in what a file held, by their names, however deep it stands."""
    if isinstance(saved, dict):
        # DataParallel, torch.compile, Lightning and others put a word of theirs before each name.
        words = r'^((module|_orig_mod|model|net|network|backbone|_forward_module)\.)+'
        yield {re.sub(words, '', str(name)): value for name, value in saved.items() if torch.is_tensor(value)}
        saved = list(saved.values())
    if isinstance(saved, (list, tuple)):
        for value in saved:
            yield from state_dicts(value)


def load_model(file, name, device):
    """The network of that name with the weights in a file: a state dict, or anything that has one in it.

    Raises UserError that names the first layer that does not fit.
    """
    saved = load_file(file)
    try:
        config = Configuration.from_record({**saved['configuration'], 'model': name})
    except Exception:  # only our own files tell the network's hyperparameters; else it is that of the slides
        config = Configuration(name)
    model = build_model(config, device)
    # The dict that has most of the model's names; of an optimizer's or a teacher's it has few.
    names = model.state_dict().keys()
    state = max(state_dicts(saved), key=lambda state: len(state.keys() & names), default={})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # Its second line is the first complaint, of which the first name is enough.
        first = str(error).splitlines()[1].split(', "')[0].strip()
        raise UserError(f"{file} does not fit {type(model).__name__} ({first}): choose the --model that the "
                        "weights belong to.") from None
    return model


@torch.no_grad()
def predict(model, images):
    """Logits (N, 10) of uint8 images (N, 3, 32, 32), by the model as it is at test time."""
    model.eval()
    # A hundred at a time, as the feature maps of more don't fit a CPU's cache.
    return torch.cat([model(normalize(batch, model.standardization)) for batch in images.split(100)])


def evaluate(model, data):
    """Mean cross-entropy loss and accuracy in percent on a data set, in float32."""
    images, labels = data.tensors
    logits = predict(model, images)
    correct = (logits.argmax(1) == labels).sum().item()
    return torch.nn.functional.cross_entropy(logits, labels).item(), correct / len(labels) * 100


def evaluate_run(run, data_dir, device):
    """Recompute a run's accuracies from best.pt into evaluation.json, and draw its figures of images."""
    # The images that the run was validated on, and its weights
    config = run.config
    train_data, val_data = data_load(config.dataset, data_dir, config.holdout, config.seed, device, urls=())
    model = load_model(run.folder / 'best.pt', config.model, device)

    # What the model takes each of them for, and how sure it is
    images, labels = val_data.tensors
    confidence, predicted = predict(model, images).softmax(1).max(1)
    found = {'accuracy': (predicted == labels).sum().item() / len(labels) * 100}
    if config.holdout:
        # The test images were used to choose neither these weights nor the hyperparameters.
        test_data = data_load(config.dataset, data_dir, device=device, urls=())[1]
        found['test_accuracy'] = evaluate(model, test_data)[1]
    atomic_write(run.folder / 'evaluation.json', json.dumps(found).encode())
    print(f"{run.folder.relative_to(RESULTS)}: {found['accuracy']:.2f} % recomputed, "
          f"{run.accuracy:.2f} % recorded.")

    plot_confusion(run, labels, predicted)
    plot_mistakes(run, images, labels, predicted, confidence)
    plot_samples(run, *train_data.tensors)


# ----------------------------------------------------------------------------------------------------------
# Figures

# Ten colours that the colour-blind tell apart; the next ten curves are dashed.
style.use(['tableau-colorblind10', {'axes.titlesize': 'medium', 'figure.figsize': (5.5, 4.5),
                                    'figure.dpi': 130, 'figure.constrained_layout.use': True}])
rcParams['axes.prop_cycle'] = cycler(linestyle=['-', '--']) * rcParams['axes.prop_cycle']


def drop_epochs(run):
    """The epochs after which the learning rate dropped by a step."""
    return [before.epoch for before, after in pairwise(run.history)
            if run.config.learning_rate_decay == 'step' and after.learning_rate < before.learning_rate]


def save_figure(axes, file):
    """Write the figure that axes belong to; where another program has the file open, it stays as it was."""
    try:
        axes.figure.savefig(file)
    except OSError as error:
        print_once(f"{file} stays as it was ({error.strerror}): close it elsewhere and evaluate again.")


def plot_accuracy(compared, heading, file, over='epoch'):
    """Plot validation accuracy over epochs or seconds; of a single curve also what else there is to see.

    compared has the runs of each curve, which differ only in their seed, by its label.
    """
    axes = Figure().subplots()
    for label, runs in compared.items():
        # The mean over the seeds with a band of one deviation, for the epochs that all of them have
        values = np.array(list(zip(*(run.history for run in runs))))  # (epochs, seeds, columns)
        mean = Epoch(*values.mean(1).T)
        deviation = Epoch(*values.std(1, ddof=len(runs) > 1).T).val_accuracy  # a single seed has none
        x, y = getattr(mean, over), mean.val_accuracy
        axes.plot(x, y, label=label)
        axes.fill_between(x, y - deviation, y + deviation, alpha=0.2)
    # Of a single curve there is room for training, early stopping and drops of the learning rate.
    if len(compared) == 1:
        axes.plot(x, mean.train_accuracy, 'C0-', linewidth=0.6, label='training')
        best = Epoch(*np.mean([run.best for run in runs], 0))
        axes.plot(getattr(best, over), best.val_accuracy, 'k*', label='early stopping')
        axes.set_ylim(0, 105)  # the settings are compared on one scale
        drops = drop_epochs(runs[0])
        if drops:
            axes.vlines(drops, 0, 105, 'grey', 'dotted', label='the learning rate drops')
    # Axes in whole numbers, and the legend below, where it hides no curve
    axes.set(xlabel=over, ylabel='accuracy (%)', title=heading)
    axes.locator_params('x', integer=True)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc='outside lower center', fontsize='small',
                       ncols=1 if max(map(len, compared)) > 30 else 2)  # long labels don't fit side by side
    save_figure(axes, file)


def plot_confusion(run, labels, predicted):
    """Plot how many images of each true class (rows) were taken for each class (columns)."""
    count = (labels * 10 + predicted).bincount(minlength=100).view(10, 10).cpu()
    names = CLASSES[run.config.dataset]
    axes = Figure(figsize=(6.5, 6)).subplots()
    # The root shows rare confusions too; half transparent it is no darker than black digits need.
    axes.imshow(count.sqrt().numpy(), cmap='Blues', alpha=0.5)
    axes.set_xticks(range(10), names, rotation=45, ha='right')
    axes.set_yticks(range(10), names)
    axes.set(xlabel='predicted class', ylabel='true class', title=f"{run.config.title}, validation images")
    # The numbers, but for the zeros
    for y, x in count.nonzero().tolist():
        axes.text(x, y, f'{count[y, x]}', ha='center', va='center', fontsize=8)
    save_figure(axes, run.folder / 'confusion.png')


def plot_images(run, name, images, columns, heading):
    """Plot uint8 images (N, 3, 32, 32) in rows, with a text below each column, to <name>.png."""
    grid = make_grid(images, nrow=len(columns), pad_value=255).cpu()  # with white borders of 2 pixels
    _, height, width = grid.shape
    axes = Figure(figsize=(width / 30, height / 30 + 1)).subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy())
    axes.set_xticks(range(18, width, 34), columns, fontsize=8)  # the middle of each image
    axes.set(yticks=[], title=f"{run.config.title}, {heading}")
    save_figure(axes, run.folder / f'{name}.png')


def plot_mistakes(run, images, labels, predicted, confidence):
    """Plot the validation images of which the model was surest and wrong, at most eight."""
    names = CLASSES[run.config.dataset]
    # The surest ones first, of these the wrong ones
    surest = confidence.argsort(descending=True)
    wrong = surest[(predicted != labels)[surest]][:8]
    texts = [f"{names[labels[i]]},\ntaken for\n{names[predicted[i]]}\n({confidence[i]:.0%} sure)"
             for i in wrong]
    if texts:
        plot_images(run, 'mistakes', images[wrong], texts, "its surest mistakes")


def plot_samples(run, images, labels):
    """Plot a training image of each class, and three augmented versions of it."""
    # The first image of each class that there is, and each of them three times
    classes, first = np.unique(labels.cpu(), return_index=True)
    samples = images[first].cpu()
    copies = samples.repeat(3, 1, 1, 1)
    torch.manual_seed(0)  # the same figure each time
    augmented = crop_and_flip(copies, torch.randint(0, 9, (len(copies), 2)), torch.rand(len(copies)) < 0.5)
    plot_images(run, 'samples', torch.cat([samples, augmented]),
                [CLASSES[run.config.dataset][label] for label in classes],
                f"training images; below them crops and flips (augmentation {run.config.augmentation})")


# ----------------------------------------------------------------------------------------------------------
# The report

HTML_HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>CIFAR-10 Evaluation Report</title>
<style>
body { font: 15px/1.45 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; width: 100%; font-size: 13px }
.small table { font-size: 11px }
p.small { font-size: 12px; color: #555; margin: 4px 0 }
pre { font-size: 11px; white-space: pre-wrap; margin: 4px 0 2em }
td { border: 1px solid #888; padding: 4px; text-align: center }
thead { background: #eee }
h1 { margin: 0 }
h1 + p, thead, td:first-child, td[title^=Accuracy] { font-weight: bold }
.row { display: flex; flex-wrap: wrap; gap: 8px }
figure { flex: 1 1 300px; margin: 8px 0 } .row figure { max-width: 560px } img { max-width: 100% }
@media screen and (max-width: 800px) { /* a row is a card, with the column's title beside each cell */
  thead, td:empty { display: none }
  table, tbody, tr { display: block; margin-bottom: 1em }
  td { display: flex; justify-content: space-between; gap: 2em; text-align: right }
  td::before { content: attr(title); font-weight: normal; text-align: left }
}
@page { size: A4 landscape; margin: 1cm }
@media print {
  body { font-size: 11px; margin: 0 } table { font-size: 9px } .small table { font-size: 8px }
  pre + h3, p.small + h3 { break-before: page } /* each experiment on its own page */
  h2, h3 { break-after: avoid } img, figure, tr { break-inside: avoid }
  img { max-height: 6.3cm } div.small ~ .row img { max-height: 9cm }
}
</style>
"""


def read_runs(folder=RESULTS):
    """The runs in a folder, by name; those that can't be read are named and left out."""
    runs = []
    for file in sorted(folder.glob('*/config.json')):
        try:
            runs.append(Run.read(file.parent))
        except UserError as error:
            print_once(f"{error}")
    return runs


def group_seeds(runs):
    """Lists of the runs that differ only in their seed, by their configuration.

    Those that repeat an earlier one are in the list `repetitions` of that one, after itself.
    """
    groups = {}
    for run in runs:
        seeds = groups.setdefault(replace(run.config, seed=0), {})
        seeds.setdefault(run.config.seed, run).repetitions.append(run)
    return {config: list(seeds.values()) for config, seeds in groups.items()}


def read_text(file):
    """A text that a person wrote, or ''. One that is not in UTF-8 is named and left out."""
    try:
        return file.read_text(encoding='utf-8-sig') if file.exists() else ''  # Windows puts a mark before it
    except UnicodeDecodeError:
        print(f"{file} is left out of the report: save it as UTF-8.")
        return ''


def mean_std(numbers):
    """The mean of numbers as text, with the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{spread}"


def minutes(runs):
    """The minutes that each run took, as text."""
    return ', '.join(f'{run.last.seconds / 60:.1f}' for run in runs)


def setting_cells(runs):
    """The row of the slides' table, a dict by column, of runs that differ only in their seed."""
    run = runs[0]
    config = run.config
    drops = ', '.join(f'{epoch:.0f}' for epoch in drop_epochs(run))
    return {
        'Model': config.title,
        'GPU (O/X)': 'X' if run.machine.get('device') == 'cpu' else 'O',
        'Batch_size': config.batch_size,
        'Activation function': {'relu': 'ReLU', 'elu': 'ELU'}.get(config.activation, config.activation),
        'Weight initialization': config.initialization.capitalize(),
        'Optimizer': 'SGD (Nesterov)' if config.optimizer == 'nesterov' else config.optimizer.upper(),
        'Learning rate': f'{config.learning_rate:g}',
        'Momentum': f'{config.momentum:g}',
        'Weight decay': config.weight_decay or 'X',
        'LR decay': f'×{config.gamma:g} after epoch {drops}' if drops else config.learning_rate_decay,
        'training time (m)': minutes(runs),
        'Early stopping epoch': ', '.join(f'{run.best.epoch:.0f}' for run in runs),
        'Accuracy': f"{mean_std([run.accuracy for run in runs])} %"
                    f"{f' ({len(runs)} seeds)' if len(runs) > 1 else ''}",
    }


def recomputed(run):
    """What evaluate_run found, as text: the accuracy, of held-out runs also that on the test images."""
    try:
        found = json.loads((run.folder / 'evaluation.json').read_text())
        return ' and '.join(f'{name} {value:.2f} %' for name, value in found.items())
    except Exception:  # it was not evaluated yet, or its record is damaged
        return "not yet"


def result_cells(runs, columns=()):
    """How runs that differ only in their seed were made and what came out, a dict by column.

    The fields in columns have one of their own; the other options are those that differ from the setting's.
    """
    config = runs[0].config
    return {
        **{flag(name): config.as_given(name) for name in columns},
        'Model': config.title,
        'Parameters': f'{sum(p.numel() for p in build_model(config, choose_device("cpu")).parameters()):,}',
        'Other options': ' '.join(
            f'{flag(name)} {config.as_given(name)}'
            for name in config.differences(SETTINGS[config.model]) if name not in columns),
        # Each machine once
        'Machine': '; '.join(dict.fromkeys(', '.join(map(str, run.machine.values())) for run in runs)),
        'Minutes': minutes(runs),
        'Epochs': ', '.join(f'{len(run.history)}' for run in runs),
        'Accuracy at early stopping': f'{mean_std([run.accuracy for run in runs])} %',
        'In the last epoch': f'{mean_std([run.last.val_accuracy for run in runs])} %',
        'On the training images, while training': f'{mean_std([run.last.train_accuracy for run in runs])} %',
        'Recomputed from the best weights': ', '.join(map(recomputed, runs)),
        'Reruns': ', '.join(
            f'{rerun.folder.name} {rerun.accuracy:.2f} % ({rerun.accuracy - run.accuracy:+.2f})'
            for run in runs for rerun in run.repetitions[1:]),
    }


def html_table(rows, hidden=()):
    """HTML of a table from its rows, dicts by column; each cell has its column as its title."""
    header = {column: column for row in rows for column in row if column not in hidden}

    def html_row(row):
        cells = (f'<td title="{escape(column)}">{escape(str(row.get(column, "")))}</td>' for column in header)
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table><thead>{html_row(header)}</thead>{''.join(map(html_row, rows))}</table>"


def html_picture(file):
    """HTML that holds a PNG file itself; nothing where there is none."""
    if not file.exists():
        return ''
    data = base64.b64encode(file.read_bytes()).decode()
    return f"<figure><img src='data:image/png;base64,{data}'></figure>"


def html_comparison(rows):
    """HTML of a table with the columns in which the rows differ; what all share stands once below it."""
    shared = [column for column in rows[0] if len(rows) > 1 and len({row[column] for row in rows}) == 1]
    return f"""{html_table(rows, shared)}
<p class="small">{escape('; '.join(f'{name}: {rows[0][name]}' for name in shared if rows[0][name]))}</p>"""


def varied_fields(configs):
    """The fields in which configurations of one model differ, and 'model' where there are several models."""
    return [name for name in FIELDS
            if any(getattr(one, name) != getattr(other, name) for one, other in combinations(configs, 2)
                   if name == 'model' or one.model == other.model)]


def experiment_section(folder):
    """HTML on a group of runs: the text in its README.md, a figure, and a table of what differs."""
    groups = group_seeds(read_runs(folder))
    # A curve and a row for each combination of the options that vary, in their order
    columns = varied_fields(groups)
    order = sorted(groups, key=lambda config: [getattr(config, name) for name in columns])
    compared = {', '.join(config.as_given(name) for name in columns): groups[config] for config in order}
    plotted = f"validation accuracy by\n{', '.join(columns)}"
    if compared:
        plot_accuracy(compared, plotted, folder / 'accuracy.png')
    if 'batch_size' in columns:  # it decides how long an epoch takes
        plot_accuracy(compared, plotted, folder / 'seconds.png', over='seconds')
    heading, _, text = read_text(folder / 'README.md').strip().partition('\n')
    text, _, commands = text.partition('\n\n    ')  # the commands are indented
    return f"""
<h3>{escape(heading.strip('# ') or folder.name)}</h3>
<p>{escape(text)}</p>
<div class="row">{html_picture(folder / 'accuracy.png')}{html_picture(folder / 'seconds.png')}</div>
{html_comparison([result_cells(runs, columns) for runs in compared.values()]) if compared else ''}
{f'<pre>    {escape(commands)}</pre>' if commands else ''}
"""


def report_order(config):
    """By model; of each first what is nearest to its setting, and real images before synthetic ones."""
    differences = config.differences(SETTINGS[config.model])
    return MODELS.index(config.model), config.dataset, len(differences), str(config)


def write_report():
    """Write results/report.html, a single file with all figures inside, of all that is in results/."""
    # The runs nearest to each setting are its row in the slides' table; all runs are in the last table.
    groups = group_seeds(read_runs())
    shown, measured = {}, []
    for config in sorted(groups, key=report_order):
        runs = groups[config]
        shown.setdefault(config.model, runs)
        plot_accuracy({'validation': runs}, config.title, runs[0].folder / 'accuracy.png')
        cells = {'Run': runs[0].folder.name, **result_cells(runs)}
        measured.append(cells)
        if cells['Reruns']:
            print(f"{cells['Run']} was repeated: {cells['Reruns']}.")
    settings = [{'': f'Setting #{MODELS.index(model) + 1}',
                 **(setting_cells(shown[model]) if model in shown else {'Model': SETTINGS[model].title})}
                for model in MODELS]
    folders = [RESULTS, *(runs[0].folder for runs in shown.values())]
    # The texts that people wrote, and the folders of folders with runs
    paragraphs = read_text(RESULTS / 'README.md').split('\n\n')
    experiments = sorted({file.parent.parent for file in RESULTS.glob('*/*/**/config.json')})
    if not measured and not experiments:
        raise UserError(f"There are no runs in {RESULTS.absolute()}: train one, or go where they are.")
    # The pictures at the end are of the last one, the deepest net.
    atomic_write(RESULTS / 'report.html', f"""{HTML_HEAD}
<h1>CIFAR-10 Evaluation Report</h1>
<p>Validation accuracy, of several seeds the mean ± standard deviation:
{', '.join(f"{row['Model']} {row['Accuracy']}" for row in settings if 'Accuracy' in row)}</p>
{html_table(settings)}
<h2>Validation dataset accuracy plot</h2>
<div class="row">{''.join(html_picture(folder / 'accuracy.png') for folder in folders)}</div>
<h2>Summary [결과 정리]</h2>
{''.join(f'<p>{escape(paragraph)}</p>' for paragraph in paragraphs if paragraph)}
{'<h2>Additional experiments</h2>' if experiments else ''}
{''.join(map(experiment_section, experiments))}
{'<h2>How the accuracies were measured</h2>' if measured else ''}
{f'<div class="small">{html_comparison(measured)}</div>' if measured else ''}
<div class="row">{html_picture(folders[-1] / 'confusion.png')}
{html_picture(folders[-1] / 'samples.png')}</div>
{html_picture(folders[-1] / 'mistakes.png')}</html>
""".encode(errors='replace'))


# ----------------------------------------------------------------------------------------------------------
# Pictures and hand-in


def read_picture(file):
    """Any picture as a viewer shows it, upright and over white: its middle square as (3, 32, 32) uint8."""
    with Image.open(file) as image:
        image.draft(None, (256, 256))  # a huge JPEG is decoded at down to an eighth of its size
        if image.mode[0] in 'IF':  # integers or floats of more than 8 bits
            image = image.convert('I')
            image = image.point(lambda value: value / 256) if image.getextrema()[1] > 255 else image
        # The middle square, upright, over white
        image = ImageOps.fit(image.convert('RGBA'), (32, 32))
        with contextlib.suppress(Exception):  # a damaged EXIF record turns nothing
            image = ImageOps.exif_transpose(image)
        white = Image.new('RGBA', image.size, 'white')
        return pil_to_tensor(Image.alpha_composite(white, image).convert('RGB'))


def predict_pictures(names, run, device):
    """Print the class of each picture and its probability, by a run's best weights."""
    model = load_model(run.folder / 'best.pt', run.config.model, device)
    for name in names:
        # Windows leaves it to the program to find the files that *.jpg means.
        for file in [name] if os.path.exists(name) else sorted(glob(name)) or [name]:
            # One that can't be read is named, and the others go on.
            try:
                image = read_picture(file).to(device)
            except Exception as error:  # it is missing, or damaged, whatever makes the decoders raise
                print(f"{file}: not a picture that can be read ({error})")
                continue
            probability, label = predict(model, image[None])[0].softmax(0).max(0)
            print(f"{file}: {CLASSES[run.config.dataset][label]}, {probability:.1%} sure "
                  f"({run.config.title}: {run.folder.name})")


def submit(name):
    """Write <name>.zip with the whole code and the report."""
    root = Path(__file__).parent
    content = io.BytesIO()
    # Files of a date that a zip can't have get the nearest one.
    with zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        # In a folder of that name
        for pattern in '*.py *.md *.txt *.toml LICENSE dataset/*.py tests/*.py'.split():
            for part in sorted(root.glob(pattern)):
                archive.write(part, name / part.relative_to(root))
        archive.write(RESULTS / 'report.html', Path(name, 'report.html'))
    atomic_write(Path(f'{name}.zip'), content.getbuffer())
    print(f"{name}.zip holds the code and the report.")


# ----------------------------------------------------------------------------------------------------------
# The command


def evaluate_and_report(runs, data_dir, device):
    """Recompute the accuracies of runs from their weights, then write the report of all runs in results/."""
    for run in runs:
        try:
            evaluate_run(run, data_dir, device)
        except (UserError, OSError) as error:  # no images, or weights that can't be read
            print_once(f"Not every run is evaluated: {error}")
    write_report()
    print(f"The report is {(RESULTS / 'report.html').absolute()}.")


def main():
    parser = Parser("""python CIFAR10_evaluation.py [OPTION VALUE ...]

  Recompute the accuracies of all runs in results/ and write results/report.html:
    python CIFAR10_evaluation.py
  Print the class of any picture:
    python CIFAR10_evaluation.py --predict cat.jpg dog.png""")
    add_data_options(parser)
    parser.add_argument('--name', help="evaluate this run only, or ask it with --predict")
    parser.add_argument('--weights', metavar='FILE', help="print the accuracy of these weights")
    parser.add_argument('--model', choices=MODELS, default='resnet32', help="the network of --weights")
    parser.add_argument('--dataset', choices=CLASSES, default='cifar10', help="the images for --weights")
    parser.add_argument('--predict', nargs='+', metavar='FILE', help="print the class of each picture")
    parser.add_argument('--submit', type=path_of_run, metavar='StudentID_Name', help="write a zip to hand in")
    options = parser.parse_args()
    if options.submit and Path(f'{options.submit}.zip').exists():
        raise UserError(f"{options.submit}.zip is there already: move it, or submit under another name.")
    device = choose_device()
    if options.weights:
        model = load_model(options.weights, options.model, device)
        _, data = data_load(options.dataset, options.data_dir, device=device, urls=options.data_url)
        return print(f"{options.weights}: {evaluate(model, data)[1]:.2f} % of the {len(data):,} validation "
                     f"images of {options.dataset}")

    # The runs asked for that have weights
    asked = [Run.read(RESULTS / options.name)] if options.name else read_runs()
    trained = [run for run in asked if (run.folder / 'best.pt').exists()]
    if not trained and (options.name or options.predict):
        raise UserError(f"{RESULTS / (options.name or '')} has no run with weights: train one first.")
    if options.predict:
        # Synthetic images taught nothing about real ones.
        best = max(trained, key=lambda run: (run.config.dataset == 'cifar10', run.accuracy))
        return predict_pictures(options.predict, best, device)
    evaluate_and_report(trained, options.data_dir, device)
    if options.submit:
        submit(options.submit)


if __name__ == '__main__':
    run_script(main)

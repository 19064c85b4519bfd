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
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
    Parser,
    Run,
    UserError,
    atomic_write,
    flag,
    print_once,
    run_name,
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
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        name = max(available, key=available.get)  # the first True
    if not available[name]:
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
    """What the CPU can do, as PyTorch 2.10 and newer tell it."""
    return getattr(torch.cpu, 'get_capabilities', dict)()


def describe_machine(device):
    """What the report says of the machine. On machines that differ in it, results differ a little."""
    processor = cpu_capabilities().get('cpu_name', platform.machine())
    return dict(device=device.type,
                processor=torch.cuda.get_device_name() if device.type == 'cuda' else processor,
                instructions=torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512, ...
                threads=torch.get_num_threads(),
                torch=torch.__version__)


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


def load_file(file, hint):
    """What torch.save wrote to a file. Raises UserError, ending with the hint, if it is unsafe or damaged."""
    try:
        with torch.serialization.safe_globals(NUMBERS):
            return torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a damaged or malicious file makes torch.load raise
        raise UserError(f"{file} can't be loaded ({type(error).__name__}): {hint}.") from None


def state_dicts(saved):
    """Yield for each dict in what a file held, however deep it stands, its tensors by their names."""
    if isinstance(saved, dict):
        # DataParallel, torch.compile, Lightning and others put a word of theirs before each name.
        words = r'^((module|_orig_mod|model|net|network|backbone|_forward_module)\.)+'
        yield {re.sub(words, '', str(name)): value for name, value in saved.items() if torch.is_tensor(value)}
        saved = list(saved.values())
    if isinstance(saved, (list, tuple)):
        for value in saved:
            yield from state_dicts(value)


def load_weights(model, saved, file):
    """Load what a file held into a model: a state dict, or anything that has one in it.

    Raises UserError that names the first layer that does not fit.
    """
    # The dict that has most of the model's names; of an optimizer's or a teacher's it has few.
    wanted = model.state_dict().keys()
    state = max(state_dicts(saved), key=lambda state: len(state.keys() & wanted), default={})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # Its second line is the first complaint, of which the first name is enough.
        first = str(error).splitlines()[1].split(', "')[0].strip()
        raise UserError(f"{file} does not fit {type(model).__name__} ({first}): choose the --model that the "
                        "weights belong to.") from None


def load_best(run, device):
    """The network of a run with the weights of its early-stopping epoch."""
    model = build_model(run.config, device)
    file = run.folder / 'best.pt'
    load_weights(model, load_file(file, "train the run again"), file)
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
    return F.cross_entropy(logits, labels).item(), correct / len(labels) * 100


def evaluate_run(run, data_dir, device):
    """Recompute a run's accuracies from best.pt into evaluation.json, and draw its figures of images."""
    # The images that the run was validated on, and its weights
    config = run.config
    train_data, val_data = data_load(config.dataset, data_dir, config.holdout, config.seed, device, urls=())
    model = load_best(run, device)

    # What the model takes each of them for, and how sure it is
    images, labels = val_data.tensors
    confidence, predicted = predict(model, images).softmax(1).max(1)
    found = {'accuracy': (predicted == labels).sum().item() / len(labels) * 100}
    if config.holdout:
        # By the test images neither these weights nor the hyperparameters were chosen.
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

# As the papers write them
TITLES = {'mlp': 'MLP', 'lenet5': 'LeNet-5', 'resnet32': 'ResNet-32'}

# Ten colours that the colour-blind tell apart, each with a marker; the next ten curves are dashed.
style.use(['tableau-colorblind10', {'axes.titlesize': 'medium', 'figure.figsize': (5.5, 4.5),
                                    'figure.dpi': 130, 'figure.constrained_layout.use': True}])
markers = cycler(marker=list('osD^vPX<>d'))
rcParams['axes.prop_cycle'] = cycler(linestyle=['-', '--']) * (rcParams['axes.prop_cycle'] + markers)


def title(run):
    """What figures and texts call a run's model; synthetic images are told apart from CIFAR-10."""
    config = run.config
    name = f'ResNet-{config.depth}' if config.model == 'resnet32' else TITLES[config.model]
    return name if config.dataset == 'cifar10' else f"{name} (synthetic, NOT CIFAR-10)"


def learning_rate_drops(run):
    """The pairs of successive history rows between which the learning rate dropped by a step."""
    return [(before, after) for before, after in pairwise(run.history)
            if run.config.learning_rate_decay == 'step' and after['learning_rate'] < before['learning_rate']]


def save_figure(axes, file):
    """Write the figure that axes belong to; where another program has the file open, it stays as it was."""
    try:
        axes.figure.savefig(file)
    except OSError as error:
        print_once(f"{file} stays as it was ({error.strerror}): close it elsewhere and evaluate again.")


def plot_accuracy(compared, heading, file, over='epoch'):
    """Plot accuracy over epochs or seconds; of a single curve also where the learning rate dropped.

    compared has the runs of each curve, which differ only in their seed, by its label.
    """
    axes = Figure().subplots()
    for label, runs in compared.items():
        # Of each epoch that all seeds have, what is plotted of each seed: (epochs, seeds, 3)
        values = np.array([[[row[over], row['train_accuracy'], row['val_accuracy']] for row in rows]
                           for rows in zip(*(run.history for run in runs), strict=False)])
        x, training, validation = values.mean(1).T
        deviation = values[:, :, 2].std(1, ddof=len(runs) > 1)  # a single seed has none
        # Validation with a band of one deviation, training thin, a star at the mean of early stopping
        [line] = axes.plot(x, validation, label=label, markevery=0.1)
        thin = dict(color=line.get_color(), linestyle=line.get_linestyle(), linewidth=0.6)
        axes.fill_between(x, validation - deviation, validation + deviation, alpha=0.2, **thin)
        axes.plot(x, training, marker='', **thin)
        axes.plot(np.mean([run.best[over] for run in runs]), np.mean([run.accuracy for run in runs]),
                  'k*', zorder=3)
        drops = [after['epoch'] - 0.5 for _, after in learning_rate_drops(runs[0])]
        if drops and len(compared) == 1:
            axes.vlines(drops, 0, 1, 'grey', 'dotted', transform=axes.get_xaxis_transform(),
                        label=f"learning rate × {runs[0].config.gamma:g}")
    axes.set(xlabel=over, ylabel='accuracy (%)',
             title=f"{heading}\nvalidation (thick), training (thin), early stopping (star)")
    if len(compared) == 1:
        axes.set_ylim(0, 105)  # the settings are compared on one scale
    axes.locator_params('x', integer=True)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc='outside lower center', ncols=2, fontsize='small')
    save_figure(axes, file)


def plot_early_stopping(compared, option_names, file):
    """Plot the accuracies at early stopping, with bars of one deviation, of what plot_accuracy plots."""
    axes = Figure().subplots()
    for label, runs in compared.items():
        accuracies = [run.accuracy for run in runs]
        axes.errorbar(np.mean(accuracies), label, xerr=np.std(accuracies, ddof=len(runs) > 1), capsize=5)
    axes.invert_yaxis()  # in the order of the table
    axes.set(xlabel='validation accuracy at early stopping (%)', ylabel=option_names)
    axes.grid(alpha=0.3)
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
    axes.set(xlabel='predicted class', ylabel='true class', title=f"{title(run)}, validation images")
    # The numbers, but for the zeros
    for y, x in count.nonzero().tolist():
        axes.text(x, y, f'{count[y, x]}', ha='center', va='center', fontsize=8)
    save_figure(axes, run.folder / 'confusion.png')


def plot_images(images, columns, heading, file):
    """Plot uint8 images (N, 3, 32, 32) in rows, with a text below each column."""
    grid = make_grid(images, nrow=len(columns), pad_value=255)  # with white borders of 2 pixels
    axes = Figure(figsize=(grid.shape[2] / 30, grid.shape[1] / 30 + 1)).subplots()
    axes.imshow(grid.permute(1, 2, 0).cpu().numpy())
    axes.set_xticks(range(18, grid.shape[2], 34), columns, fontsize=8)  # the middle of each image
    axes.set(yticks=[], title=heading)
    save_figure(axes, file)


def plot_mistakes(run, images, labels, predicted, confidence):
    """Plot the validation images of which the model was surest and wrong, at most eight."""
    names = CLASSES[run.config.dataset]
    # The wrong ones, the surest first
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:8]
    texts = [f"{names[labels[i]]},\ntaken for\n{names[predicted[i]]}\n({confidence[i]:.0%} sure)"
             for i in wrong]
    if texts:
        plot_images(images[wrong], texts, f"{title(run)}, its surest mistakes", run.folder / 'mistakes.png')


def plot_samples(run, images, labels):
    """Plot a training image of each class, and three augmented versions of it."""
    # The first image of each class that there is, and each of them three times
    classes, first = np.unique(labels.cpu(), return_index=True)
    samples = images[first].cpu()
    copies = samples.repeat(3, 1, 1, 1)
    torch.manual_seed(0)  # the same figure each time
    augmented = crop_and_flip(copies, torch.randint(0, 9, (len(copies), 2)), torch.rand(len(copies)) < 0.5)
    plot_images(torch.cat([samples, augmented]),
                [CLASSES[run.config.dataset][label] for label in classes],
                f"{title(run)}, training images; below them crops and flips (augmentation "
                f"{run.config.augmentation})",
                run.folder / 'samples.png')


# ----------------------------------------------------------------------------------------------------------
# The report

HTML_HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>CIFAR-10 Evaluation Report</title>
<style>
body { font: 15px/1.45 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; width: 100%; font-size: 13px }
.small table { font-size: 11px }
td { border: 1px solid #888; padding: 4px; text-align: center }
thead { background: #eee }
h1 { margin: 0 }
h1 + p, thead, td:first-child, td[title^=Accuracy] { font-weight: bold }
.row { display: flex; flex-wrap: wrap; gap: 8px }
figure { flex: 1 1 300px; margin: 8px 0 } img { max-width: 100% }
@media screen and (max-width: 800px) { /* a row is a card, with the column's title beside each cell */
  thead, td:empty { display: none }
  table, tbody, tr { display: block; margin-bottom: 1em }
  td { display: flex; justify-content: space-between; gap: 2em; text-align: right }
  td::before { content: attr(title); font-weight: normal; text-align: left }
}
@page { size: A4 landscape; margin: 1cm }
@media print {
  body { font-size: 11px; margin: 0 } table { font-size: 9px } .small table { font-size: 8px }
  table + h3 { break-before: page } /* each experiment on its own page */
  h2, h3 { break-after: avoid } img, figure, tr { break-inside: avoid }
  img { max-height: 6.3cm } .small ~ .row img { max-height: 9cm }
}
</style>
"""


def read_runs(folder=RESULTS):
    """The runs in a folder, the oldest first; those that can't be read are named and left out."""
    runs = []
    for file in sorted(sorted(folder.glob('*/config.json')), key=os.path.getmtime):
        try:
            runs.append(Run.read(file.parent))
        except UserError as error:
            print_once(str(error))
    return runs


def by_config(runs):
    """Lists of the runs that differ only in their seed, ordered by it, by their configuration.

    A run that repeats an earlier one, with the same seed, is among the reruns of that one.
    """
    found = {}
    for run in runs:
        seeds = found.setdefault(replace(run.config, seed=0), {})
        first = seeds.setdefault(run.config.seed, run)
        if first is not run:
            first.reruns.append(run)
    return {config: [seeds[seed] for seed in sorted(seeds)] for config, seeds in found.items()}


def read_text(file):
    """A text that a person wrote, or ''. One that is not in UTF-8 is named and left out."""
    try:
        return file.read_text(encoding='utf-8-sig') if file.exists() else ''  # Windows puts a mark before it
    except UnicodeDecodeError:
        print(f"{file} is left out of the report: save it as UTF-8.")
        return ''


def mean_std(numbers, digits=2):
    """The mean of numbers as text, with the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def minutes(runs):
    """The minutes that each run took, as text."""
    return ', '.join(f"{run.last['seconds'] / 60:.1f}" for run in runs)


def setting_cells(runs):
    """The row of the slides' table, a dict by column, of runs that differ only in their seed."""
    run, config = runs[0], runs[0].config
    drops = ', '.join(f"{before['epoch']:.0f}" for before, _ in learning_rate_drops(run))
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    return {
        'Model': title(run),
        'GPU (O/X)': 'X' if run.machine.get('device') == 'cpu' else 'O',
        'Batch_size': config.batch_size,
        'Activation function': {'relu': 'ReLU', 'elu': 'ELU'}.get(config.activation, config.activation),
        'Weight initialization': config.initialization.capitalize(),
        'Optimizer': {'sgd': 'SGD', 'nesterov': 'SGD (Nesterov)', 'adam': 'Adam'}[config.optimizer],
        'Learning rate': f'{config.learning_rate:g}',
        'Momentum': f'{config.momentum:g}',
        'Weight decay': config.weight_decay or 'X',
        'LR decay': f'×{config.gamma:g} after epoch {drops}' if drops else config.learning_rate_decay,
        'training time (m)': minutes(runs),
        'Early stopping epoch': ', '.join(f"{run.best['epoch']:.0f}" for run in runs),
        'Accuracy': f"{mean_std([run.accuracy for run in runs])} %{seeds}",
    }


def result_cells(runs):
    """What came out of runs that differ only in their seed, a dict by column."""
    model = build_model(runs[0].config, torch.device('cpu'))
    return {
        'Model': title(runs[0]),
        'Parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'Epochs': ', '.join(str(len(run.history)) for run in runs),
        'Accuracy at early stopping (%)': mean_std([run.accuracy for run in runs]),
        'In the last epoch (%)': mean_std([run.last['val_accuracy'] for run in runs]),
        'On the training images, while training (%)': mean_std([run.last['train_accuracy'] for run in runs]),
        'Minutes': minutes(runs),
    }


def compare_reruns(runs):
    """A line on each rerun of runs that differ only in their seed: whether it gave the same again."""
    accuracies = [run.accuracy for run in runs]
    lines = ''
    for first in runs:
        for rerun in first.reruns:
            difference = rerun.accuracy - first.accuracy
            within = f"within two deviations of the seeds ({mean_std(accuracies)} %)"
            if abs(difference) < 0.005:
                verdict = "the same to the digit"
            elif len(runs) == 1:
                verdict = "with no other seed to compare"
            else:
                verdict = within if abs(difference) <= 2 * statistics.stdev(accuracies) else f"NOT {within}"
            same = rerun.machine == first.machine
            machine = "the same kind of machine" if same else "another kind of machine or precision"
            lines += (f"{rerun.folder.name} repeats {first.folder.name}: {rerun.accuracy:.2f} % in "
                      f"{len(rerun.history)} of {rerun.config.epochs} epochs, {difference:+.2f} points, "
                      f"{verdict}, on {machine}.\n")
    return lines


def recomputed(run):
    """What evaluate_run found, as text: whether the accuracy agrees, and that on the test images."""
    try:
        found = json.loads((run.folder / 'evaluation.json').read_text(encoding='utf-8'))
        # The two decimals that are printed
        agrees = "agrees" if abs(found['accuracy'] - run.accuracy) < 0.005 else "DISAGREES"
        test = f"; {found['test_accuracy']:.2f} % of the test images" if run.config.holdout else ""
        return f"{found['accuracy']:.2f} %, {agrees}{test}"
    except Exception:  # it was not evaluated yet, or its record is damaged
        return "not yet"


def protocol_cells(runs):
    """How runs that differ only in their seed were measured, and what came out, a dict by column."""
    config = runs[0].config
    # As they are given on the command line
    options = [f'{flag(name)} {str(getattr(config, name)).strip("()").replace(",", "")}'
               for name in config.differences(SETTINGS[config.model])]
    drops = [f"{before['val_accuracy']:.2f} % to {after['val_accuracy']:.2f} % at epoch {after['epoch']:.0f}"
             for before, after in learning_rate_drops(runs[0])]
    machines = [', '.join(f'{name} {value}' for name, value in run.machine.items()) for run in runs]
    return {
        **result_cells(runs),
        'Machine': '; '.join(dict.fromkeys(machines)),  # each once
        'Other options': ' '.join(options),
        'Validated on': (f"{config.holdout:,} held-out training images" if config.holdout
                         else "the test images, as on the slides"),
        'The epoch after a drop of the learning rate': '; '.join(drops),
        'Recomputed from the best weights; of held-out runs also on the test images':
            ', '.join(map(recomputed, runs)),
        'Reruns': compare_reruns(runs),
    }


def html_table(rows):
    """HTML of a table from its rows, dicts by column; each cell has its column as its title."""
    header = {column: column for row in rows for column in row}
    lines = [''.join(f'<td title="{escape(column)}">{escape(str(row.get(column, "")))}</td>'
                     for column in header) for row in [header, *rows]]
    return f"<table><thead><tr>{lines[0]}</tr></thead><tr>{'</tr><tr>'.join(lines[1:])}</tr></table>"


def html_picture(file):
    """HTML that holds a PNG file itself; nothing where there is none."""
    if not file.exists():
        return ''
    data = base64.b64encode(file.read_bytes()).decode()
    return f"<figure><img src='data:image/png;base64,{data}'></figure>"


def experiment_section(folder):
    """HTML on a group of runs: the text in its README.md, its figures, and a table of what differs."""
    groups = by_config(read_runs(folder))
    # The options whose values differ among the runs of one model; these values are the labels.
    models = {config.model for config in groups}
    names = [name for name in FIELDS if len({(config.model, getattr(config, name)) for config in groups})
             > (1 if name == 'model' else len(models))]
    compared = {}
    for config in sorted(groups, key=lambda config: [getattr(config, name) for name in names]):
        label = ', '.join(str(getattr(config, name)) for name in names)
        compared[label or config.model] = groups[config]

    option_names = ', '.join(names)
    figures = [folder / 'accuracy.png']
    plot_accuracy(compared, option_names, figures[-1])
    if 'batch_size' in names:  # it decides how long an epoch takes
        figures.append(folder / 'seconds.png')
        plot_accuracy(compared, option_names, figures[-1], over='seconds')
    figures.append(folder / 'early-stopping.png')
    plot_early_stopping(compared, option_names, figures[-1])
    heading, _, text = read_text(folder / 'README.md').strip().partition('\n')
    return (f"<h3>{escape(heading.strip('# ') or folder.name)}</h3><p>{escape(text)}</p>"
            f"<div class='row'>{''.join(map(html_picture, figures))}</div>"
            + html_table([{option_names: label, **result_cells(runs)} for label, runs in compared.items()]))


def write_report(runs):
    """Write results/report.html, a single file with all figures inside, of a list of runs and all groups."""
    RESULTS.mkdir(exist_ok=True)
    # By model; first those with the options nearest to its setting, of 'cifar10' before 'synthetic'.
    # The text of the configuration settles ties, so that the order is the same in every clone.
    groups = by_config(runs)
    order = sorted(groups, key=lambda config: (MODELS.index(config.model), config.dataset,
                                               len(config.differences(SETTINGS[config.model])), str(config)))
    shown, measured = {}, []
    for config in order:
        seeds = groups[config]
        shown.setdefault(config.model, seeds)
        measured.append({'Run': seeds[0].folder.name, **protocol_cells(seeds)})
        plot_accuracy({'validation': seeds}, title(seeds[0]), seeds[0].folder / 'accuracy.png')
    print(*(cells['Reruns'] for cells in measured), sep='', end='')
    accuracies = ', '.join(f"{title(seeds[0])} {mean_std([run.accuracy for run in seeds])} %"
                           for seeds in shown.values())
    settings = [{'': f'Setting #{number}',
                 **(setting_cells(shown[model]) if model in shown else {'Model': TITLES[model]})}
                for number, model in enumerate(MODELS, 1)]
    folders = [seeds[0].folder for seeds in shown.values()] or [RESULTS]
    # The last one is of the deepest net.
    confusion, samples, mistakes = [html_picture(folders[-1] / f'{name}.png')
                                    for name in ('confusion', 'samples', 'mistakes')]
    paragraphs = read_text(RESULTS / 'README.md').split('\n\n')
    experiments = sorted({file.parent.parent for file in RESULTS.glob('*/*/**/config.json')})
    atomic_write(RESULTS / 'report.html', f"""{HTML_HEAD}
<h1>CIFAR-10 Evaluation Report</h1>
<p>Validation accuracy: {accuracies} (of several seeds the mean ± standard deviation).</p>
{html_table(settings)}
<h2>Validation dataset accuracy plot</h2>
<div class="row">{''.join(html_picture(folder / 'accuracy.png') for folder in folders)}</div>
<h2>Summary [결과 정리]</h2>
{''.join(f'<p>{escape(paragraph)}</p>' for paragraph in paragraphs if paragraph)}
{'<h2>Additional experiments</h2>' if experiments else ''}
{''.join(map(experiment_section, experiments))}
{'<h2>How the accuracies were measured</h2>' if measured else ''}
{f'<div class="small">{html_table(measured)}</div>' if measured else ''}
<div class="row">{confusion}{samples}</div>
{mistakes}
</html>
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
    model = load_best(run, device)
    # Windows leaves it to the program to find the files that *.jpg means.
    files = [file for name in names
             for file in ([name] if os.path.exists(name) else sorted(glob(name)) or [name])]
    for file in files:
        try:
            image = read_picture(file).to(device)
        except FileNotFoundError:
            print(f"{file}: missing")
        except Exception as error:  # whatever a damaged file makes the decoders raise
            print(f"{file}: not a picture that can be read ({error})")
        else:
            probability, label = predict(model, image[None])[0].softmax(0).max(0)
            print(f"{file}: {CLASSES[run.config.dataset][label]}, {probability:.1%} sure "
                  f"({title(run)}: {run.folder.name})")


def evaluate_weights(options, device):
    """Print the accuracy of --weights on the validation images."""
    saved = load_file(options.weights, "give a file that torch.save(model.state_dict(), FILE) wrote")
    try:
        config = Configuration.from_record({**saved['configuration'], 'model': options.model})
    except Exception:  # only our own files tell the network's hyperparameters; else it is that of the slides
        config = Configuration(options.model)
    model = build_model(config, device)
    load_weights(model, saved, options.weights)
    # The validation images of the slides
    _, data = data_load(options.dataset, options.data_dir, device=device, urls=options.data_url)
    print(f"{options.weights}: {evaluate(model, data)[1]:.2f} % of the {len(data):,} validation images of "
          f"{options.dataset}")


def submit(name):
    """Write <name>.zip with the whole code and the report."""
    root = Path(__file__).parent
    content = io.BytesIO()
    # Files of a date that a zip can't have get the nearest one.
    with zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        # In a folder of that name
        for pattern in ('*.py', '*.md', '*.txt', '*.toml', 'LICENSE', 'dataset/*.py', 'tests/*.py'):
            for part in sorted(root.glob(pattern)):
                archive.write(part, name / part.relative_to(root))
        archive.write(RESULTS / 'report.html', Path(name, 'report.html'))
    atomic_write(Path(f'{name}.zip'), content.getbuffer())
    print(f"{name}.zip holds the code and the report.")


# ----------------------------------------------------------------------------------------------------------
# The command


def main(arguments=None):
    parser = Parser("Write the figures and the report of the runs in results/.")
    parser.add_argument('--name', help="evaluate this run only, or ask it with --predict")
    parser.add_argument('--weights', metavar='FILE', help="print the accuracy of these weights")
    parser.add_argument('--model', choices=MODELS, default='resnet32', help="the network of --weights")
    parser.add_argument('--dataset', choices=CLASSES, default='cifar10', help="the images for --weights")
    parser.add_argument('--predict', nargs='+', metavar='FILE', help="print the class of each picture")
    parser.add_argument('--submit', type=run_name, metavar='StudentID_Name', help="write a zip to hand in")
    options = parser.parse_args(arguments)
    if options.submit and Path(f'{options.submit}.zip').exists():
        raise UserError(f"{options.submit}.zip is there already: move it, or submit under another name.")
    device = choose_device()
    if options.weights:
        return evaluate_weights(options, device)

    # The runs asked for
    runs = read_runs()
    asked = [Run.read(RESULTS / options.name)] if options.name else runs
    trained = [run for run in asked if (run.folder / 'best.pt').exists()]
    if not trained and (options.name or options.predict):
        raise UserError(f"{RESULTS / (options.name or '')} has no run with weights: train one first.")
    if options.predict:
        # Synthetic images taught nothing about real ones.
        best = max(trained, key=lambda run: (run.config.dataset == 'cifar10', run.accuracy))
        return predict_pictures(options.predict, best, device)

    # Figures and accuracies of each run, then the report
    for run in trained:
        try:
            evaluate_run(run, options.data_dir, device)
        except (UserError, OSError) as error:  # no images, or weights that can't be read
            print_once(f"Not every run is evaluated: {error}")
    write_report(runs)
    print(f"The report is {RESULTS / 'report.html'}.")
    if options.submit:
        submit(options.submit)


if __name__ == '__main__':
    run_script(main)

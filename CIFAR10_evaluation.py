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
import math
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

os.environ['MPLBACKEND'] = 'agg'  # figures need no window, and a notebook's backend may not be here
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

from CIFAR10_configuration import (
    FIELDS,
    MODELS,
    RESULTS,
    SETTINGS,
    WORLD_SIZE,
    Configuration,
    Epoch,
    Parser,
    Run,
    UserError,
    add_common_options,
    atomic_write,
    flag,
    name_in_results,
    name_of_new_run,
    print_once,
    read_runs,
    run_script,
)
from dataset import CLASSES, data_load, normalize
from LeNet5_model import LeNet5_model
from MLP_model import MLP_model
from ResNet_model import BLOCKS, ResNet

# ----------------------------------------------------------------------------------------------------------
# Measuring a model: device, network, weights, predictions, accuracy


def choose_device(name='auto'):
    """The torch.device of that name; 'auto' is the first of CUDA, MPS and CPU that this machine has."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        name = next(name for name in there if there[name])
    if not there.get(name):
        raise UserError(f"This machine or its PyTorch has no {name}: leave --device out to use what it has.")
    if name == 'mps' and WORLD_SIZE > 1:
        raise UserError("Several processes can't share Apple's GPU: add --device cpu, or leave out torchrun.")
    if name == 'cuda':
        # torchrun starts a process for each GPU, and gives it a number.
        gpus = torch.cuda.device_count()
        if int(os.environ['LOCAL_WORLD_SIZE']) > gpus:
            raise UserError(f"There are more processes than GPUs: start {gpus} with --nproc-per-node {gpus}.")
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
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
    model.config = config  # it says how predict prepares its images
    # The layout in which convolutions are fastest; on MPS it spoils the gradients (PyTorch issue 175189).
    if device.type != 'mps':
        model.to(memory_format=torch.channels_last)
    return model.to(device)


def load_file(file):
    """What torch.save wrote to a file. Raises UserError where it is damaged, or has objects of any class."""
    try:
        return torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a damaged or malicious file makes torch.load raise
        raise UserError(f"{file} can't be loaded ({type(error).__name__}): check its name, save weights by "
                        "torch.save(model.state_dict(), FILE), or train under another --name.") from None


def load_model(file, name, device):
    """The network of that name with the weights in a file: a state dict, or a dict with one by a usual key.

    Raises UserError that names the first layer that does not fit.
    """
    saved = load_file(file)
    try:
        config = Configuration.from_record({**saved['configuration'], 'model': name})
    except Exception:  # only our own files tell the network's hyperparameters; else it is that of the slides
        config = Configuration(name)
    model = build_model(config, device)
    try:
        state = next((saved[key] for key in ('model_state_dict', 'state_dict', 'net', 'model')
                      if isinstance(saved.get(key), dict)), saved)
        # DataParallel, torch.compile, Lightning and others put a word of theirs before each name.
        model.load_state_dict({re.sub(r'^((module|_orig_mod|model|net|backbone)\.)+', '', key): tensor
                               for key, tensor in state.items()})
    except Exception as error:  # whatever a file without a state dict makes it raise, too
        # PyTorch's second line is the first complaint, of which the first name is enough.
        first = str(error).split('\n\t')[:2][-1].split(', "')[0]
        raise UserError(f"{file} does not fit {type(model).__name__} ({first}): change --model, or save the "
                        "weights by torch.save(model.state_dict(), FILE).") from None
    return model


@torch.no_grad()
def predict(model, images):
    """Logits (N, 10) of uint8 images (N, 3, 32, 32), by the model as it is at test time."""
    model.eval()
    # A hundred at a time, as the feature maps of more don't fit a CPU's cache; a GPU likes more.
    part = 100 if images.device.type == 'cpu' else 2000
    return torch.cat([model(normalize(batch, model.config.standardization)) for batch in images.split(part)])


def evaluate(model, data):
    """Mean cross-entropy loss and accuracy in percent on a data set, in float32."""
    images, labels = data.tensors
    logits = predict(model, images)
    correct = (logits.argmax(1) == labels).sum().item()
    return torch.nn.functional.cross_entropy(logits, labels).item(), correct / len(labels) * 100


def evaluate_run(run, data_dir, device):
    """Recompute a run's accuracies from best.pt into evaluation.json, and write pictures of what it sees.

    Returns whether the accuracy is the recorded one, but for 0.1 points, as machines round differently.
    """
    # The images that the run was validated on, and its weights
    config = run.config
    _, val_data = data_load(config.dataset, data_dir, config.holdout, config.seed, device, urls=())
    model = load_model(run.folder / 'best.pt', config.model, device)

    # Confusion matrix: the percentage of each true class that is taken for each class
    images, labels = val_data.tensors
    probability = predict(model, images).softmax(1)
    predicted, names = probability.argmax(1), CLASSES[config.dataset]
    found = {'accuracy': (predicted == labels).sum().item() / len(labels) * 100}
    counts = (labels * 10 + predicted).cpu().bincount(minlength=100).view(10, 10)
    for name, row in zip(names, counts.tolist()):
        for taken, count in zip(names, row):
            found[f'{name} as {taken}'] = count / sum(row) * 100 if any(row) else math.nan
    if config.holdout:
        # The test images were used to choose neither these weights nor the hyperparameters.
        _, test_data = data_load(config.dataset, data_dir, device=device, urls=())
        found['test_accuracy'] = evaluate(model, test_data)[1]
    # The images to whose class it gives the lowest probability
    hardest = probability[range(len(labels)), labels].argsort()[:8]
    found['mistakes'] = ', '.join(f'{names[predicted[i]]} ({names[labels[i]]})' for i in hardest)
    agree = abs(found['accuracy'] - run.accuracy) <= 0.1
    print(f"{run.folder}: {found['accuracy']:.2f} % recomputed, {run.accuracy:.2f} % recorded"
          f"{'' if agree else ', which DIFFER'}.")
    atomic_write(run.folder / 'evaluation.json', json.dumps(found).encode())

    # Pictures: the weights of the first layer's units or filters, 32 at most, show what it looks for.
    weights = next(model.parameters()).detach()[:32]
    side = math.isqrt(weights[0].numel() // 3)
    save_images(weights.reshape(-1, 3, side, side), run.folder / 'weights.png')
    save_images(images[hardest], run.folder / 'mistakes.png')
    return agree


# ----------------------------------------------------------------------------------------------------------
# Figures

# Drawn at the size at which the report shows it, in colours that differ in grey print too
style.use(['default', {
    'figure.constrained_layout.use': True, 'figure.dpi': 192, 'font.size': 9, 'axes.titlesize': 'medium',
    'legend.fontsize': 8, 'legend.title_fontsize': 8,
    'axes.prop_cycle': "cycler('color', ['1b2f6b', 'e8590c', '7fc8f8', '2b8a3e', 'b46bd6', 'b59f00'])"}])


def drop_epochs(run):
    """The epochs after which the learning rate dropped by a step."""
    return [before.epoch for before, after in pairwise(run.history)
            if run.config.learning_rate_decay == 'step' and after.learning_rate < before.learning_rate]


def save_figure(axes, file):
    """Write the figure that axes belong to; where another program has the file open, go on without."""
    png = io.BytesIO()
    axes.figure.savefig(png)
    try:
        atomic_write(file, png.getvalue())
    except UserError as error:
        print_once(f"{error}")


def finish(axes, file, title, ylabel, heading=None):
    """Label a plot over epochs, put its legend below, or at the right if it has a heading, and save it."""
    axes.set(xlabel='epoch', ylabel=ylabel, title=title)
    axes.locator_params('x', integer=True)  # no epoch 1.5
    axes.grid(alpha=0.3)
    axes.figure.legend(title=heading, ncols=1 if heading else 3,
                       loc='outside right upper' if heading else 'outside lower center')
    save_figure(axes, file)


def plot_accuracy(compared, file, options=()):
    """Plot validation accuracy over epochs; of a single curve also what else there is to see.

    compared has the runs of each curve, which differ only in their seed, by its label: a tuple of texts, the
    values of the options, of which the first decides the colour and the others decide the dashes.
    """
    single = len(compared) == 1
    axes = Figure(figsize=(4, 3.3) if single else (4.7, 2.4)).subplots()
    colours, dashes = {}, {}
    for (first, *others), runs in compared.items():
        # The mean over the seeds of each epoch's rows; zip ends with the shortest run.
        epochs = zip(*(run.history for run in runs))
        mean = Epoch(*np.mean(list(epochs), 1).T)
        # A value that is new gets the next colour, or the next dashes, black (k) in the legend only.
        colour = colours.setdefault(first, f'C{len(colours)}')
        dash = dashes.setdefault(', '.join(others), 'k- k-- k: k-.'.split()[len(dashes) % 4])
        axes.plot(mean.epoch, mean.val_accuracy, colour + dash[1:])
    # The legend has each colour and each kind of dashes once.
    for label, look in [*colours.items(), *dashes.items()]:
        axes.plot([], [], look, label=label)
    if not single:
        # The legend's heading says which option is which.
        return finish(axes, file, 'validation accuracy', 'accuracy (%)',
                      'colour: ' + '\ndashes: '.join(options))
    # Of a single curve there is room for training, early stopping and drops of the learning rate.
    axes.plot(mean.epoch, mean.train_accuracy, 'C0', linewidth=0.6, label='training')
    best = Epoch(*np.mean([run.best for run in runs], 0))
    axes.plot(best.epoch, best.val_accuracy, 'k*', label='early stopping')
    if drops := drop_epochs(runs[0]):
        axes.vlines(drops, 0, 105, 'grey', 'dotted', label='learning rate drops')
    axes.set_ylim(0, 105)  # the settings are compared on one scale
    finish(axes, file, describe(runs), 'accuracy (%)')


def plot_loss(run):
    """Plot a run's losses, and on an axis of its own the learning rate, to loss.png."""
    history = Epoch(*zip(*run.history))
    axes = Figure(figsize=(4, 2.3)).subplots()
    # The learning rate has an axis of its own, at the right.
    rate = axes.twinx()
    rate.plot(history.epoch, history.learning_rate, 'k:', label='learning rate')
    rate.set_ylabel('learning rate')
    # Thick and thin as in the plot of the accuracy
    axes.plot(history.epoch, history.val_loss, label='validation')
    axes.plot(history.epoch, history.train_loss, 'C0', linewidth=0.6, label='training')
    finish(axes, run.folder / 'loss.png', run.config.title, 'loss')


def save_images(images, file):
    """Write images (N, 3, S, S), each from its lowest value to its highest, to a PNG file, eight in a row."""
    # 94 pixels and a border of 2 make a row of eight as wide as a plot.
    large = torch.nn.functional.interpolate(images.float(), 94)
    save_image(large, file, normalize=True, scale_each=True, pad_value=1)


# ----------------------------------------------------------------------------------------------------------
# The report

HTML_HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>CIFAR-10 Evaluation Report</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.4 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em;
  overflow-wrap: break-word }
table { border-collapse: collapse; width: 100%; font-size: 13px }
td { border: 1px solid #888; padding: 4px; text-align: center }
thead { background: #eee }
thead, h1 + p, h1 + p + table td:is(:first-child, :last-child), .best:not(:only-child) { font-weight: bold }
p:empty, pre:empty { display: none }
h1, figure { margin: 0 }
h3 { margin: 12px 0 0 } h3 + p { margin: 2px 0 6px } section h2 { margin: 20px 0 8px }
.small { font-size: 12px } pre { font-size: 11px; white-space: pre-wrap }
pre, .small { color: #555; margin: 2px 0 }
img { max-width: 100% }
figcaption { display: none; font-size: 12px } .pixels figcaption { display: block }
.row { display: flex; flex-wrap: wrap; gap: 16px; align-items: start; margin-bottom: 4px }
/* tables of results: lines only, numbers aligned, a bar from 0 to 100 % behind each accuracy */
.results { flex: 1 0 340px; max-width: 100% }
.results table { font-size: 12px; font-variant-numeric: tabular-nums }
.results td { border-width: 0 0 1px; padding: 3px 4px; text-align: right }
.results tbody td, td[title^='--'] { white-space: nowrap }
.results td[style] { background: linear-gradient(90deg, #cfe3f3 var(--bar), transparent 0) content-box;
  text-align: left; padding: 2px 3px 2px 9px; print-color-adjust: exact }
@media screen and (max-width: 800px) { /* the slides' rows as cards: beside each cell its column's title */
  p + table thead, p + table td:empty { display: none }
  p + table, p + table tbody, p + table tr { display: block; margin-bottom: 1em }
  p + table td { display: flex; justify-content: space-between; gap: 2em; text-align: right }
  p + table td::before { content: attr(title); font-weight: normal; text-align: left }
  .results { overflow-x: auto; flex-basis: 100% }
}
@page { size: A4 landscape; margin: 1cm }
@media print {
  body { font-size: 11px; margin: 0 } table, .results table { font-size: 9px } pre, .small { font-size: 8px }
  h2, h3 { break-after: avoid } section, figure, tr { break-inside: avoid } .results td { padding: 1px 4px }
  img { width: auto; max-height: 6.3cm } section img { max-height: 4cm } .pixels img { max-width: 7cm }
}
</style>
"""


def seedless(run):
    """The key of runs that differ only in their seed; an unfinished run has the epochs that it did so far."""
    return replace(run.config, seed=0, epochs=run.config.epochs if run.is_finished else len(run.history))


def group_seeds(runs):
    """Lists of the runs that differ only in their seed, by their configuration.

    Those that repeat an earlier one are in the list `repetitions` of that one, after itself.
    """
    groups = {}
    for run in runs:
        seeds = groups.setdefault(seedless(run), {})
        seeds.setdefault(run.config.seed, replace(run, repetitions=[])).repetitions.append(run)
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
        'training time (m)': ', '.join(f'{run.last.seconds / 60:.1f}' for run in runs),
        'Early stopping epoch': ', '.join(f'{run.best.epoch:.0f}' for run in runs),
        'Accuracy': f"{mean_std([run.accuracy for run in runs])} %"
                    f"{f' ({len(runs)} seeds)' if len(runs) > 1 else ''}"
    }


def recomputed(runs, name, join=mean_std):
    """The mean of what evaluate_run found of that name, as text; '' where it has not seen all runs yet."""
    with contextlib.suppress(Exception):  # there is no such record, or a damaged one
        return join([json.loads((run.folder / 'evaluation.json').read_text())[name] for run in runs])
    return ''


def reruns(runs):
    """The later runs of the same configuration and seed, and by how many points they differ, as text."""
    return ', '.join(f'{rerun.folder.relative_to(RESULTS).as_posix()} {rerun.accuracy:.2f} % '
                     f'({rerun.accuracy - run.accuracy:+.2f})'
                     for run in runs for rerun in run.repetitions[1:])


def result_cells(runs, options):
    """How runs that differ only in their seed were made and what came out, a dict by column."""
    config = runs[0].config
    return {
        'Model': config.title,
        **{flag(name): config.as_given(name) for name in options},
        'Parameters': f'{sum(p.numel() for p in build_model(config, torch.device("cpu")).parameters()):,}',
        'Seeds': len(runs),
        '--epochs': f'{statistics.mean(len(run.history) for run in runs):g}',
        'Machine': ', '.join(dict.fromkeys(f"{run.machine.get('processor', '')}" for run in runs)),
        'Minutes': f'{statistics.median(run.last.seconds for run in runs) / 60:.1f}',
        'Validation (%)': mean_std([run.accuracy for run in runs]),
        'Last epoch (%)': mean_std([run.last.val_accuracy for run in runs]),
        'Training (%)': mean_std([run.last.train_accuracy for run in runs]),
        'Test (%)': recomputed(runs, 'test_accuracy'),
        'Reruns': reruns(runs)
    }


def html_cell(column, value):
    """HTML of a cell, which has its column as its title; behind an accuracy the style sheet draws a bar."""
    bar = f' style="--bar: {value.partition(" ")[0]}%"' if column.endswith('(%)') else ''
    return f'<td title="{escape(column)}"{bar}>{escape(str(value))}</td>'


def html_table(rows, hidden=(), best=None):
    """HTML of a table from its rows, dicts by column, without the hidden columns; the best row is bold."""
    # A setting that was not trained yet has few cells, the others have all.
    columns = [column for column in max(rows, key=len) if column not in hidden]

    def html_row(row):
        cells = ''.join(html_cell(column, row.get(column, '')) for column in columns)
        return f'<tr class="{"best" if row is best else ""}">{cells}</tr>'

    return f"""<table><thead>{html_row(dict(zip(columns, columns)))}</thead>
{''.join(map(html_row, rows))}</table>"""


def html_comparison(rows):
    """HTML of a table with the columns in which the rows differ; what all share stands once below it."""
    # The columns with one value; of a single row these are the empty ones.
    first = rows[0]
    shared = [column for column in first
              if len({row[column] for row in rows}) == 1 and (rows[1:] or not first[column])]
    facts = '; '.join(f'{column}: {first[column]}' for column in shared if first[column])
    # "93.40 ± 0.14" begins with the mean.
    best = max(rows, key=lambda row: float(row['Validation (%)'].split()[0]))
    return f"""<div class="results">{html_table(rows, shared, best)}
<p class="small">{escape(facts)}</p></div>"""


def describe(runs):
    """Model, accuracy and epochs of runs that differ only in their seed."""
    return (f"{runs[0].config.title}: {statistics.mean(run.accuracy for run in runs):.1f} % "
            f"in {len(runs[0].history)} epochs")


def html_picture(file, words):
    """HTML that holds a PNG file itself, and tells in words what it shows; nothing where there is none."""
    if not file.exists():
        return ''
    png = file.read_bytes()
    # It is shown half as wide as its pixels, whose number PNG has here, as dense screens draw two for one.
    return f"""<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}"
width="{int.from_bytes(png[16:20], 'big') // 2}" alt="{escape(words)}">
<figcaption>{escape(words)}</figcaption></figure>"""


def html_pictures(shown, name):
    """HTML of the pictures of that name, side by side, that the settings shown have."""
    pictures = [html_picture(runs[0].folder / f'{name}.png', f'{name}, {describe(runs)}') for runs in shown]
    return f'<div class="row">{"".join(pictures)}</div>'


def experiment_section(folder, groups, top):
    """HTML on groups of runs: the text in their folder's README.md, a figure, and a table of what differs.

    groups and top have lists of runs, which differ only in their seed, by their configuration.
    """
    # What differs from the settings; where it is one option, the settings themselves belong to the group.
    settings = [SETTINGS[config.model] for config in groups]
    options = [name for name in FIELDS
               if any(name in config.differences(setting) for config, setting in zip(groups, settings))]
    if len(options) == 1:
        groups = groups | {setting: top[setting] for setting in settings if setting in top}

    # A curve and a row for each combination of values, in their order
    names = ['model', *options]
    order = sorted(groups, key=lambda config: [getattr(config, name) for name in names])
    varied = [name for name in names if len({getattr(config, name) for config in groups}) > 1]
    compared = {tuple(map(config.as_given, varied)) or ('validation',): groups[config] for config in order}
    plot_accuracy(compared, folder / 'accuracy.png', varied)
    # What the figure shows, for those who can't see it
    words = '; '.join(f"{', '.join(label)}, {describe(runs)}" for label, runs in compared.items())
    rows = [result_cells(runs, options) for runs in compared.values()]

    # A line with the finding, a text, and the commands that train the group
    heading, _, text = read_text(folder / 'README.md').strip().partition('\n')
    text, _, commands = text.partition('\n\n    ')  # they are indented
    return f"""<section>
<h3>{escape(heading.strip('# ') or folder.relative_to(RESULTS).as_posix())}</h3>
<p>{escape(text)}</p>
<div class="row">{html_picture(folder / 'accuracy.png', words)}{html_comparison(rows)}</div>
<pre>{escape(commands.replace('    ', ''))}</pre>
</section>
"""


def html_models(shown):
    """HTML on how the settings were measured, how they learned, what they look for and where they are wrong.

    shown has a list of runs, which differ only in their seed, for each setting.
    """
    # The slides' table has no room for parameters, last epochs and recomputed accuracies.
    measured = [result_cells(runs, []) | {'Recomputed (%)': recomputed(runs, 'accuracy')} for runs in shown]
    # Of each class how often each model is right, and what the last one, the deepest net, takes it for
    last = shown[-1][:1]
    names = CLASSES[last[0].config.dataset]
    classes = [{'Class': name,
                **{f'{runs[0].config.title} (%)': recomputed(runs[:1], f'{name} as {name}')
                   for runs in shown},
                **{f'as {other} (%)': recomputed(last, f'{name} as {other}') for other in names}}
               for name in names]
    return f"""
<section><h2>How the accuracies were measured</h2>
{html_comparison(measured)}
<p class="small">Validation: accuracy in the best epoch (early stopping), on the test images, or with
--holdout on so many training images that were held out. Training: while it learns, in the last epoch, on
the augmented images and with dropout, so that it can be lower. Recomputed: from the best weights. Of
several seeds the mean ± standard deviation and the median of the minutes.</p></section>
<section><h2>How the models learned, and what their first layers look for</h2>
{html_pictures(shown, 'loss')}
<p class="small">Above, the losses and the learning rate. Below, the weights of the first layer as pictures,
red, green and blue: a unit of an MLP looks at a whole image, a filter of a convolution at a few pixels,
everywhere in the image. Each picture goes from its lowest weight to its highest; a black one has no weights
left.</p>
<div class="pixels">{html_pictures(shown, 'weights')}</div></section>
<section><h2>Which classes are hard</h2>
<p class="small">The share of each class that the first seed of each model gets right, and, in the columns
"as", what {last[0].config.title} takes the class for (confusion matrix)</p>
<div class="results">{html_table(classes)}</div>
<div class="row pixels">{html_pictures(shown[-1:], 'mistakes')}</div>
<p class="small">What it takes them for (and what they are):
{escape(recomputed(last, 'mistakes', ''.join))}</p>
</section>
"""


def html_settings(shown):
    """HTML on the three settings: table and plots as the slides want them, summary, and what else is known.

    shown has a list of runs, which differ only in their seed, for each model that was trained.
    """
    # A row for each setting, which is empty before it is trained
    table = [{'': f'Setting #{number}',
              **(setting_cells(shown[model]) if model in shown else {'Model': SETTINGS[model].title})}
             for number, model in enumerate(MODELS, 1)]
    shown = [shown[model] for model in MODELS if model in shown]
    # Plots of their runs, and whether one that was repeated came out the same
    for runs in shown:
        plot_accuracy({('validation',): runs}, runs[0].folder / 'accuracy.png')
        plot_loss(runs[0])
        if reruns(runs):
            print(f"{runs[0].folder.name} was repeated: {reruns(runs)}.")
    # The summary that a person wrote
    paragraphs = read_text(RESULTS / 'README.md').split('\n\n')
    return f"""
<h1>CIFAR-10 Evaluation Report</h1>
<p>Validation accuracy, of several seeds the mean ± standard deviation:
{', '.join(f"{row['Model']} {row['Accuracy']}" for row in table if 'Accuracy' in row) or 'see below'}</p>
{html_table(table)}
{'<h2>Validation dataset accuracy plot</h2>' if shown else ''}
{html_pictures(shown, 'accuracy')}
<h2>Summary [결과 정리]</h2>
{''.join(f'<p>{escape(paragraph)}</p>' for paragraph in paragraphs if paragraph)}
{html_models(shown) if shown else ''}"""


def write_report():
    """Write results/report.html, a single file with all figures inside, of all that is in results/."""
    # found: the runs in each folder, those in results/ itself first
    found = {folder: read_runs(folder)
             for folder in sorted({file.parent.parent for file in RESULTS.glob('*/**/config.json')})}
    # top: the runs in results/ by their configuration, and the settings' other seeds, wherever they lie
    settings = SETTINGS.values()
    top = group_seeds(run for folder, runs in found.items() for run in runs
                      if folder == RESULTS or seedless(run) in settings)
    # shown: the runs in the slides' table by their model, those of its setting or else of its plain name
    shown = {config.model: runs for config, runs in top.items()
             if config in settings or runs[0].folder == RESULTS / config.model}
    # experiments: a folder and what its section shows, each run in results/ and each group, by configuration
    experiments = [(runs[0].folder, {config: runs}) for config, runs in top.items()]
    experiments += [(folder, group_seeds(runs)) for folder, runs in found.items() if folder != RESULTS]
    if not any(found.values()):
        raise UserError(f"There are no readable runs in {RESULTS.absolute()}: train one, or go to them.")
    sections = [experiment_section(folder, groups, top) for folder, groups in experiments
                if groups.keys() - settings]
    atomic_write(RESULTS / 'report.html', f"""{HTML_HEAD}{html_settings(shown)}
{'<h2>Additional experiments</h2>' if sections else ''}{''.join(sections)}</html>
""".encode(errors='replace'))


# ----------------------------------------------------------------------------------------------------------
# Pictures and hand-in


def read_picture(file):
    """A picture of 8 bits a colour, upright and over white: its middle square as (3, 32, 32) uint8."""
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(ImageOps.fit(image.convert('RGBA'), (32, 32)))
        white = Image.new('RGBA', image.size, 'white')
        return pil_to_tensor(Image.alpha_composite(white, image).convert('RGB'))


def predict_pictures(names, weights, model, classes, device):
    """Print the class of each picture and its probability, by a model; weights is the file it came from."""
    for name in names:
        # Windows leaves it to the program to find the files that *.jpg means.
        for file in [name] if os.path.exists(name) else sorted(glob(name)) or [name]:
            # One that can't be read is named, and the others go on.
            try:
                image = read_picture(file).to(device)
            except Exception as error:  # it is missing, or damaged, whatever makes the decoders raise
                print(f"{file}: not a picture that can be read ({str(error) or type(error).__name__})")
                continue
            probability, label = predict(model, image[None])[0].softmax(0).max(0)
            print(f"{file}: {classes[label]}, {probability:.1%} sure ({model.config.title}: {weights})")


def submit(name):
    """Write <name>.zip with the whole code and the report."""
    root = Path(__file__).parent
    content = io.BytesIO()
    # Files of a date that a zip can't have get the nearest one.
    with zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        # In a folder of that name; what editors keep in hidden files stays out.
        for pattern in ('[!.]*.py README.md requirements.txt pyproject.toml LICENSE dataset/[!.]*.py '
                        'tests/[!.]*.py').split():
            for part in sorted(root.glob(pattern)):
                archive.write(part, f'{name}/{part.relative_to(root)}')
        archive.write(RESULTS / 'report.html', f'{name}/report.html')
    atomic_write(Path(f'{name}.zip'), content.getvalue())
    print(f"{name}.zip holds the code and the report.")


# ----------------------------------------------------------------------------------------------------------
# The command


def evaluate_and_report(runs, data_dir, device):
    """Recompute the accuracies of runs from their weights, then write the report of all runs in results/.

    Returns whether each accuracy is the recorded one.
    """
    agree = True
    for run in runs:
        try:
            agree &= evaluate_run(run, data_dir, device)
        except (UserError, OSError) as error:  # no images, or weights that can't be read
            agree = False
            print_once(f"Not every run is evaluated: {error}")
    write_report()
    print(f"The report is {(RESULTS / 'report.html').absolute()}.")
    return agree


def main():
    parser = Parser("""python CIFAR10_evaluation.py [OPTION VALUE ...]

  Recompute the accuracies of the runs right in results/ and write results/report.html:
    python CIFAR10_evaluation.py
  Print the class of any picture:
    python CIFAR10_evaluation.py --predict cat.jpg dog.png""")
    add_common_options(parser)
    source, task = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    source.add_argument('--name', type=name_in_results, help="evaluate only this run, or --predict by it")
    source.add_argument('--weights', metavar='FILE', help="tell the accuracy of these, or --predict by them")
    parser.add_argument('--model', choices=MODELS, help="the network of --weights (default: resnet32)")
    parser.add_argument('--dataset', choices=CLASSES, help="images for --weights (default: as trained)")
    task.add_argument('--predict', nargs='+', action='extend', metavar='FILE',
                      help="print the class of each picture")
    task.add_argument('--submit', type=name_of_new_run, metavar='StudentID_Name', help="zip code and report")
    options = parser.parse_args()
    if options.submit and options.weights:
        parser.error("--submit goes without --weights")
    if options.submit and Path(f'{options.submit}.zip').exists():
        raise UserError(f"{options.submit}.zip is there already: move it, or submit under another name.")
    device = choose_device(options.device)

    if not options.weights:
        # The runs asked for that have weights
        asked = [Run.read(RESULTS / options.name)] if options.name else read_runs()
        trained = [run for run in asked if (run.folder / 'best.pt').exists()]
        if not trained and (options.name or options.predict):
            raise UserError(f"{RESULTS / (options.name or '')} has no run with weights: train, or name one.")
        if options.predict:
            # The best one; synthetic images taught nothing about real ones.
            best = max(trained, key=lambda run: (run.config.dataset == 'cifar10', run.accuracy))
            options.weights, options.model = best.folder / 'best.pt', best.config.model
    if options.weights:
        model = load_model(options.weights, options.model or 'resnet32', device)
        dataset = options.dataset or model.config.dataset
        if options.predict:
            return predict_pictures(options.predict, options.weights, model, CLASSES[dataset], device)
        _, data = data_load(dataset, options.data_dir, device=device, urls=options.data_url)
        return print(f"{options.weights}: {evaluate(model, data)[1]:.2f} % of the {len(data):,} validation "
                     f"images of {dataset}")
    agree = evaluate_and_report(trained, options.data_dir, device)
    if options.submit:
        submit(options.submit)
    raise SystemExit(not agree)  # exit code 0 or 1, for a grader's script


if __name__ == '__main__':
    run_script(main)

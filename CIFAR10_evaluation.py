"""From weights to accuracies, from results/ to figures and the report.

    python CIFAR10_evaluation.py                                  results/report.html from all runs
    python CIFAR10_evaluation.py --model lenet5 --weights FILE    accuracy of any weights
    python CIFAR10_evaluation.py --predict FILE ...               class of any picture
    python CIFAR10_evaluation.py --submit StudentID_Name          StudentID_Name.zip to hand in
"""
import base64
import io
import json
import os
import platform
import re
import zipfile
from collections import defaultdict
from dataclasses import replace
from glob import glob
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch

os.environ['MPLBACKEND'] = 'agg'  # figures need no window, and a notebook's backend may not be here
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from CIFAR10_configuration import (FIELDS, RESULTS, SETTINGS, WORLD_SIZE, Configuration, Parser,
                                   Run, UserError, add_common_options, atomic_write, flag,
                                   print_once, read_runs, run_name, run_script)
from dataset import CLASSES, crop_and_flip, data_load, normalize
from LeNet5_model import LeNet5_model
from MLP_model import MLP_model
from ResNet_model import BLOCKS, ResNet

# --------------------------------------------------------------------------------------------------
# Measuring a model: device, network, weights, predictions, accuracy


def choose_device(name='auto'):
    """The torch.device of that name; 'auto' is the first of CUDA, MPS and CPU that there is."""
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
        torch.backends.cudnn.allow_tf32 = False  # which rounds float32 more coarsely
    return torch.device(name)


def cpu_capabilities():
    """What the CPU can do, by name, as PyTorch 2.10 and newer tell it."""
    return getattr(torch.cpu, 'get_capabilities', dict)()


def describe_machine(device, precision):
    """What is recorded of the machine."""
    # On machines that differ in this, results differ a little.
    return dict(device=device.type,
                processor=(torch.cuda.get_device_name() if device.type == 'cuda' else
                           cpu_capabilities().get('cpu_name', platform.machine())),
                instructions=torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512, ...
                threads=torch.get_num_threads(),
                processes=WORLD_SIZE,
                torch=str(torch.__version__),
                precision=precision)


def build_model(config, device):
    """The configured network, with fresh weights: images (N, 3, 32, 32) -> logits (N, 10)."""
    if config.model == 'mlp':
        model = MLP_model(config.hidden, config.activation, config.initialization, config.dropout,
                          config.normalization)
    elif config.model == 'lenet5':
        model = LeNet5_model(config.activation, config.initialization)
    else:
        model = ResNet((config.depth - 2) // 6, BLOCKS[config.block])
    model.config = config  # it says how predict prepares its images
    # Convolutions are fastest in this layout; on MPS it spoils the gradients (PyTorch issue 175189).
    if device.type != 'mps':
        model.to(memory_format=torch.channels_last)
    return model.to(device)


def load_file(file):
    """What torch.save wrote to a file. Raises UserError if it is damaged, or has more than tensors."""
    try:
        return dict(torch.load(file, map_location='cpu', weights_only=True))
    except Exception as error:  # whatever a damaged or malicious file makes torch.load raise
        raise UserError(f"{file} can't be loaded ({type(error).__name__}): check its name, save weights by "
                        "torch.save(model.state_dict(), FILE), or train under another --name.") from None


def load_model(file, name, device):
    """The network of that name with the weights in a file: a state dict, or a dict that holds one.

    Raises UserError that names the first layer that does not fit.
    """
    saved = load_file(file)
    try:
        config = Configuration.from_record({**saved['configuration'], 'model': name})
    except Exception:  # other people's files don't tell the hyperparameters: the slides' network
        config = Configuration(name)
    model = build_model(config, device)
    try:
        keys = ('model_state_dict', 'state_dict', 'net')
        state = next((saved[key] for key in keys if key in saved), saved)
        # DataParallel puts 'module.' before each name.
        model.load_state_dict({key.removeprefix('module.'): tensor for key, tensor in state.items()})
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
    parts = images.split(100 if images.device.type == 'cpu' else 2000)
    return torch.cat([model(normalize(part, model.config.standardization)) for part in parts])


def evaluate(model, data):
    """Mean cross-entropy and accuracy in percent on a TensorDataset, as of data_load, in float32."""
    images, labels = data.tensors
    logits = predict(model, images)
    correct = (logits.argmax(1) == labels).sum().item()
    return torch.nn.functional.cross_entropy(logits, labels).item(), correct / len(labels) * 100


def evaluate_run(run, data_dir, device):
    """Recompute a run's accuracy from best.pt: evaluation.json, mistakes.png and images.png.

    Returns whether the accuracy is the recorded one, within 0.1 points, as machines round differently.
    """
    # The images that the run was trained and validated on, and its weights
    config = run.config
    train_data, val_data = data_load(config.dataset, data_dir, config.holdout, config.seed, device)
    images, labels = val_data.tensors
    model = load_model(run.folder / 'best.pt', config.model, device)
    run = Run.read(run.folder)  # anew, as it may be in training
    logits = predict(model, images)
    predicted = logits.argmax(1)

    # Confusion matrix: a row for each true class, with the number that is taken for each class
    confusion = (labels * 10 + predicted).cpu().bincount(minlength=100).view(10, 10)
    accuracy = confusion.trace().item() / len(labels) * 100
    atomic_write(run.folder / 'evaluation.json',
                 json.dumps(dict(accuracy=accuracy, confusion=confusion.tolist())).encode())

    # The images to whose class it gives the lowest probability
    names = CLASSES[config.dataset]
    hardest = logits.softmax(1)[range(len(labels)), labels].argsort()[:10]
    plot_images(images[hardest], [f'{names[labels[i]]}\nas {names[predicted[i]]}' for i in hardest],
                run.folder / 'mistakes.png')
    # The first training image of each class; below them fixed crops of them, about half of them flipped
    images = train_data.tensors[0][np.unique(train_data.tensors[1].cpu(), return_index=True)[1]]
    offsets = torch.arange(2 * len(images), device=device).view(-1, 2) % 9
    augmented = crop_and_flip(images, offsets, offsets[:, 0] > 3)
    plot_images(torch.cat([images, augmented]), names, run.folder / 'images.png')
    agree = abs(accuracy - run.accuracy) <= 0.1
    print(f"{run.folder}: {accuracy:.2f} % recomputed, {run.accuracy:.2f} % recorded"
          f"{'' if agree else ', which DIFFER'}.")
    return agree


# --------------------------------------------------------------------------------------------------
# Figures

# Drawn at the size at which the report shows it, in colours that differ in grey print too
style.use(['default', {
    'figure.constrained_layout.use': True, 'figure.dpi': 192, 'font.size': 9, 'axes.titlesize': 'medium',
    'legend.fontsize': 8,
    'axes.prop_cycle': "cycler('color', ['1b2f6b', 'e8590c', '7fc8f8', '2b8a3e', 'b46bd6', 'b59f00'])"}])


def save_figure(figure, file):
    """Write a figure as PNG; where that can't be, as another program has the file open, say so."""
    png = io.BytesIO()
    figure.savefig(png)
    try:
        atomic_write(file, png.getvalue())
    except UserError as error:
        print_once(f"{error}")


def save_plot(axes, file, ylabel, columns=2):
    """Label a plot over epochs, add a legend of so many columns, and save it."""
    axes.set(xlabel='epoch', ylabel=ylabel)
    axes.locator_params('x', integer=True, min_n_ticks=1)  # no epoch 1.5
    axes.grid(alpha=0.3)
    axes.figure.legend(loc='outside lower center', ncols=columns)
    save_figure(axes.figure, file)


def draw_curve(axes, runs, column, *look, **options):
    """Draw a column of the records over the epochs: the mean of runs, as far as all of them go."""
    # zip ends with the shortest run.
    means = [mean(getattr(row, column) for row in rows) for rows in zip(*(run.history for run in runs))]
    # A single epoch makes no line.
    axes.plot(range(1, len(means) + 1), means, *look, marker='' if means[1:] else '.', **options)


def plot_runs(runs, file):
    """Plot accuracies with early stopping, and below them losses with the learning rate: means over seeds.

    Both have the legend's colours and widths; the star is at the mean of the seeds' best epochs.
    """
    upper, lower = Figure(figsize=(4, 4.6)).subplots(2, sharex=True, height_ratios=[3, 2])
    draw_curve(upper, runs, 'val_accuracy', label='validation')
    draw_curve(upper, runs, 'train_accuracy', 'C0', linewidth=0.6, label='training')
    draw_curve(lower, runs, 'val_loss')
    draw_curve(lower, runs, 'train_loss', 'C0', linewidth=0.6)
    # The learning rate has an axis of its own, at the right.
    rate = lower.twinx()
    draw_curve(rate, runs, 'learning_rate', 'k:', label='learning rate')
    rate.set_ylabel('learning rate')
    best = np.mean([(run.best.epoch, run.accuracy) for run in runs], 0)
    upper.plot(*best, 'k*', label='early stopping')
    # The settings are compared on one scale; a run that learns little needs all of it.
    upper.set(ylim=(40 if best[1] > 50 else 0, 100), ylabel='accuracy (%)', title=describe(runs))
    upper.grid(alpha=0.3)
    save_plot(lower, file, 'loss')


def plot_group(curves, file):
    """Plot validation accuracies: a curve, the mean over seeds, for each list of runs, by its label."""
    columns = 1 if max(map(len, curves)) > 30 else 2  # of the legend, whose rows are 1/6 inch high
    axes = Figure(figsize=(4.7, 2.2 + len(curves) / columns / 6)).subplots()
    for label, runs in curves.items():
        # Each lies below the one before: the start of a longer training may be the same.
        draw_curve(axes, runs, 'val_accuracy', label=label, zorder=9 - len(axes.lines))
    save_plot(axes, file, 'validation accuracy (%)', columns)


def plot_images(images, titles, file):
    """Plot uint8 images (N, 3, 32, 32) in rows, with a title for each column."""
    axes = Figure(figsize=(10, 0.5 + len(images) / 11)).subplots()
    # A border of 2 pixels is around each image.
    axes.imshow(make_grid(images.cpu(), len(titles), pad_value=255).permute(1, 2, 0).numpy())
    axes.set_xticks(range(17, 34 * len(titles), 34), titles)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelleft=False)
    axes.set_frame_on(False)
    save_figure(axes.figure, file)


# --------------------------------------------------------------------------------------------------
# The report

HTML_HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>CIFAR-10 Evaluation Report</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.4 sans-serif; max-width: 1200px; margin: 1em auto; padding: 0 1em;
  overflow-wrap: break-word }
table { border-collapse: collapse; width: 100%; font-size: 13px }
td { border: 1px solid #888; padding: 4px; text-align: center }
thead { background: #eee }
thead, h1 + p, .slides td:is(:first-child, :last-child), .chosen { font-weight: bold }
p:empty, pre:empty { display: none }
h1, h1 + p { margin: 0 0 12px }
h3 { margin: 10px 0 2px } .row p { margin: 0 0 6px } h2 { margin: 18px 0 6px }
.text { flex: 1 1 300px } img + .table { flex: 1 1 340px } .table { flex: 2 0 auto; max-width: 100% }
.small { font-size: 12px } pre { font-size: 11px; line-height: 1.2; white-space: pre-wrap }
pre, .small { color: #555; margin: 2px 0 }
img { max-width: 100% } .slides img { max-width: none } /* it may be scrolled */
h2:has(+ .slides:empty) { display: none } /* there is no picture */
.row { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: start }
.slides, .results { overflow-x: auto } /* on a narrow screen */
/* tables of results: lines only, numbers aligned, a bar from 0 to 100 % behind each accuracy */
.results table { font-size: 12px; font-variant-numeric: tabular-nums }
.results td { border-width: 0 0 1px; padding: 2px 4px; text-align: left; white-space: nowrap }
img + .table tbody td:not([style]) { white-space: normal } /* beside a picture there is less room */
.results td[style] { background: linear-gradient(#cfe3f3, #cfe3f3) 0 / var(--bar) no-repeat content-box;
  print-color-adjust: exact }
@page { size: A4 landscape; margin: 1cm }
@media print {
  body { font-size: 11px; margin: 0 } table, .results table { font-size: 9px }
  pre, .small { font-size: 8px } .results td { padding: 1px 4px }
  h2, h3 { break-after: avoid } img, tr { break-inside: avoid }
  img, .slides img { width: auto; max-width: 100%; max-height: 6.3cm } section img { max-height: 4cm }
}
</style>
"""


class Unfinished(Configuration):
    """The configuration of an unfinished run. It equals no finished one's, as that has another class."""


def key_without_seed(run):
    """What the seeds of a configuration have in common, finished ones or unfinished ones: it with seed 0."""
    config = replace(run.config, seed=0)
    return config if run.finished else Unfinished(**vars(config))


def group_runs():
    """Read all runs below results/, and put those that differ only in their seed into one list.

    Returns groups[folder][configuration], the lists; groups[RESULTS] has the seeds of the settings too,
    wherever they lie. And texts on runs that repeat one of their list with its seed, and are not in it.
    """
    groups, repeated = defaultdict(lambda: defaultdict(list)), []
    # Folder by folder; a run by the plain name of its model comes first, as the slides' table shows it.
    for run in sorted(read_runs('*/**'),
                      key=lambda run: (run.folder.parent, run.folder.name != run.config.model)):
        key = key_without_seed(run)
        group = run.folder.parent
        # A run of a setting belongs to the setting, too.
        for folder in {group, RESULTS} if key in SETTINGS.values() else {group}:
            runs = groups[folder][key]
            first = next((first for first in runs if first.config.seed == run.config.seed), None)
            if first:
                repeated.append(f"{run.folder} repeats {first.folder}: {run.accuracy:.2f} % "
                                f"({run.accuracy - first.accuracy:+.2f})")
                print_once(repeated[-1])
            else:
                runs.append(run)
    if not groups:
        raise UserError(f"There are no readable runs in {RESULTS.absolute()}: train one, or go to a folder "
                        "whose results/ has some.")
    return groups, repeated


def read_text(file):
    """A text that a person wrote, or ''. One that can't be read is named and left out."""
    try:
        return file.read_text(encoding='utf-8-sig') if file.exists() else ''  # sig: Windows' mark
    except Exception as error:  # its access rights, its encoding
        print(f"{file} is left out of the report ({error}): give read access, and save it as UTF-8.")
        return ''


def read_group_text(folder):
    """Of a group's README.md the first line, a list of paragraphs, and the indented commands, a line each."""
    text = read_text(folder / 'README.md')
    commands = re.findall(r'(?m)^(?: {4}|\t)(.*)', text)
    heading, _, text = re.sub(r'(?m)^(?: {4}|\t).*', '', text).strip().partition('\n')
    return heading.strip('# '), text.split('\n\n'), '\n'.join(commands)


def mean_std(numbers):
    """Numbers as text: one or two themselves, of more the mean with the standard deviation."""
    if len(numbers) < 3:
        return ', '.join(f'{number:.2f}' for number in numbers)
    return f"{mean(numbers):.2f} ± {stdev(numbers):.2f}"


def accuracy_text(runs):
    """The accuracy of runs that differ only in their seed."""
    return f"{mean_std([run.accuracy for run in runs])} %{f' ({len(runs)} seeds)' if len(runs) > 1 else ''}"


def drop_epochs(run):
    """The epochs after which the learning rate dropped by a step."""
    return [before.epoch for before, after in pairwise(run.history)
            if run.config.learning_rate_decay == 'step'
            and after.learning_rate < before.learning_rate]


def html_setting(number, setting, runs):
    """HTML of a row of the slides' table, which is empty before the setting is trained."""
    if not runs:
        return f"""<tr><td>Setting #{number}</td><td>{setting.title}</td>{'<td></td>' * 12}</tr>"""
    config = runs[0].config
    # What the table has no column for
    mlp = (f"(hidden {config.as_given('hidden')}, normalization {config.normalization}, "
           f"dropout {config.dropout:g})")
    drops = ', '.join(f'{epoch:.0f}' for epoch in drop_epochs(runs[0]))
    return f"""<tr><td>Setting #{number}</td>
<td>{runs[0].title} {mlp if config.model == 'mlp' else ''}
{f'(clip {config.clip:g})' if config.clip else ''}</td>
<td>{'X' if runs[0].machine.get('device') == 'cpu' else 'O'}</td>
<td>{config.batch_size}</td>
<td>{dict(relu='ReLU', elu='ELU').get(config.activation, config.activation)}</td>
<td>{config.initialization.capitalize()}</td>
<td>{'SGD (Nesterov)' if config.optimizer == 'nesterov' else config.optimizer.upper()}</td>
<td>{config.learning_rate:g}</td>
<td>{config.momentum:g}</td>
<td>{config.weight_decay or 'X'}</td>
<td>{f'×{config.gamma:g} after epoch {drops}' if drops else config.learning_rate_decay}
{f'(warmup of {config.warmup:g} epochs)' if config.warmup else ''}</td>
<td>{', '.join(f'{run.last.seconds / 60:.1f}' for run in runs)}</td>
<td>{', '.join(f'{run.best.epoch:.0f}' for run in runs)}</td>
<td>{accuracy_text(runs)}</td></tr>"""


def html_slides(found):
    """HTML of the slides' table and answers; found has the runs of the settings by model."""
    return f"""<div class="slides"><table><thead><tr><td></td><td>Model</td><td>GPU (O/X)</td>
<td>Batch_size</td><td>Activation function</td><td>Weight initialization</td><td>Optimizer</td>
<td>Learning rate</td><td>Momentum</td><td>Weight decay</td><td>LR decay</td><td>training time (m)</td>
<td>Early stopping epoch</td><td>Accuracy</td></tr></thead>
{''.join(html_setting(number, setting, found.get(setting.model))
         for number, setting in enumerate(SETTINGS.values(), 1))}</table></div>
<p class="small">ResNet-32: X1 = 3, X2 = stride, X3 = 1, X4 = 3, X5 = 1, X6 = 1, X7 = 3, X8 = 16, X9 = 3,
X10 = 1</p>"""


def result_row(runs, options=()):
    """What tables say of runs that differ only in their seed: texts, and tuples of accuracies in percent.

    Epochs are those that were trained, on average, and of how many; minutes are the median.
    """
    config = runs[0].config
    weights = build_model(config, torch.device('cpu')).parameters()
    epochs = [len(run.history) for run in runs]
    return {
        'Model': runs[0].title,
        **{flag(name): config.as_given(name) for name in options if name != 'epochs'},
        'Parameters': f'{sum(map(torch.numel, weights)):,}',
        'Seeds': len(runs),
        '--epochs': f"{mean(epochs):g}{'' if min(epochs) == config.epochs else f' of {config.epochs}'}",
        'Machine': '; '.join(sorted({
            f"{run.machine.get('processor')}, threads: {run.machine.get('threads')}, "
            f"{run.machine.get('precision', 'precision unknown')}" for run in runs})),
        'Minutes': f'{median(run.last.seconds for run in runs) / 60:.1f}',
        'Validation (%)': tuple(run.accuracy for run in runs),
        'Last epoch (%)': tuple(run.last.val_accuracy for run in runs),
        'Training (%)': tuple(run.last.train_accuracy for run in runs)
    }


def html_cell(value):
    """HTML of a table's cell: a text, or a tuple of accuracies in percent, before a bar."""
    if isinstance(value, tuple):
        return f'<td style="--bar: {mean(value):.2f}%">{mean_std(value)}</td>'
    return f'<td>{escape(str(value))}</td>'


def html_table(rows, hidden=(), chosen=()):
    """HTML of a table of rows, dicts by column, without hidden columns; chosen are the bold rows' numbers."""
    columns = [column for column in rows[0] if column not in hidden]
    head = (f'<td>{column}</td>' for column in columns)
    lines = (f"""<tr class="{'chosen' if number in chosen else ''}">{''.join(
        html_cell(row[column]) for column in columns)}</tr>""" for number, row in enumerate(rows))
    return f"<table><thead><tr>{''.join(head)}</tr></thead>{''.join(lines)}</table>"


def html_comparison(rows, chosen=()):
    """HTML of a table with the columns in which rows differ; what all share stands once below it."""
    # Minutes are compared on one machine only.
    if ';' in '; '.join({row['Machine'] for row in rows}):
        for row in rows:
            del row['Minutes']
    # Accuracies, which are tuples, always stay.
    hidden = [column for column, value in rows[0].items()
              if all(row[column] == value for row in rows) and not isinstance(value, tuple)]
    facts = '; '.join(f'{column}: {rows[0][column]}' for column in hidden)
    return f"""<div class="results">{html_table(rows, hidden, chosen)}
<p class="small">{escape(facts)}</p></div>"""


def describe(runs):
    """Model, accuracy and epochs of runs that differ only in their seed."""
    return (f"{runs[0].title}: {mean(run.accuracy for run in runs):.1f} % in "
            f"{mean(len(run.history) for run in runs):g} epochs")


def html_picture(file, words):
    """HTML that holds a PNG file itself, and tells in words what it shows; '' where there is none."""
    if not file.exists():
        return ''
    png = file.read_bytes()
    # Bytes 16 to 19 of a PNG are its width in pixels; it is shown at half of that, sharp on dense screens.
    return f"""<img src="data:image/png;base64,{base64.b64encode(png).decode()}"
width="{int.from_bytes(png[16:20], 'big') // 2}" alt="{escape(words)}">"""


def html_group(folder, group, top):
    """HTML on a group: the text in its folder's README.md, a figure, and a table of what differs.

    group and top, which has the settings, have lists of runs by configuration, as of group_runs.
    """
    # What differs from the settings; where it is one option, they themselves belong to the group.
    settings = [SETTINGS[config.model] for config in group]
    changed = sum(map(Configuration.differences, group, settings), [])
    options = [name for name in FIELDS if name in changed]
    if len(options) == 1:
        group = group | {setting: top[setting] for setting in settings if setting in top}

    # The values that vary, in their order; a row and, if they are few, a curve for each combination
    varied = [name for name in ['model', *options]
              if len({getattr(config, name) for config in group}) > 1]
    group = dict(sorted(group.items(), key=lambda item: [getattr(item[0], name) for name in varied]))
    curves = {(', '.join(f'{name} {config.as_given(name)}' for name in varied) or config.title)
              + ('' if runs[0].finished else ' (unfinished)'): runs for config, runs in group.items()}
    file = folder / 'group.png'  # as a run in this folder may have accuracy.png
    if len(sum(curves.values(), [])) == 1:  # a single run
        plot_runs(*curves.values(), file)
    elif len(curves) <= 6 and len(varied) <= 2:
        plot_group(curves, file)
    else:  # it would be a tangle: a table alone
        file.unlink(missing_ok=True)
    # Bold is the row in which what varies is as in the setting.
    chosen = [number for number, config in enumerate(group)
              if varied and set(varied).isdisjoint(config.differences(SETTINGS[config.model]))]

    heading, paragraphs, commands = read_group_text(folder)
    text = ''.join(f'<p>{escape(text)}</p>' for text in paragraphs if text.strip())
    picture = html_picture(file, "The curves of the runs in the table")
    # Beside the table stands the picture, or else the text.
    return f"""<section>
<h3>{escape(heading or folder.relative_to(RESULTS).as_posix())}</h3>
<div class="row">{picture or f'<div class="text">{text}</div>'}<div class="table">{text if picture else ''}
{html_comparison([result_row(runs, options) for runs in group.values()], chosen)}
</div></div><pre>{escape(commands)}</pre></section>
"""


def html_classes(runs):
    """HTML of the first run's confusion matrix in percent, and of its mistakes."""
    try:
        record = json.loads((runs[0].folder / 'evaluation.json').read_text())
        matrix = torch.Tensor(record['confusion']).view(10, 10)
        assert matrix.sum(1).all()
    except Exception:  # there is no such record yet, a damaged one, or no image of a class
        return ''
    # Its rows in percent
    shares = matrix / matrix.sum(1, keepdim=True) * 100
    names = CLASSES[runs[0].config.dataset]
    # The class of which fewest images are right, and the wrong class that most of it are taken for
    worst = shares.diag().argmin()
    wrong = shares.clone().fill_diagonal_(0)[worst]
    rows = [{'Class': name, **{f'as {other} (%)': (share,) for other, share in zip(names, line)}}
            for name, line in zip(names, shares.tolist())]
    return f"""
<section><h2>Hardest for {runs[0].config.title} is
{names[worst]}: {shares[worst, worst]:.1f} % of these images are right;
{wrong.max():.1f} % are taken for {names[wrong.argmax()]}</h2>
<div class="results">{html_table(rows)}</div>
<p class="small">Confusion matrix of the first seed: what it takes the images of each class for. Below, the
images that it is most wrong about.</p>
<div class="slides">{html_picture(runs[0].folder / 'mistakes.png',
                                   "Images with what they are and what they are taken for")}</div>
</section>"""


def html_details(shown):
    """HTML on how the settings were measured, how they learned, and where they are wrong."""
    rows = [result_row(runs) for runs in shown]
    lost = max(run.accuracy - run.last.val_accuracy for runs in shown for run in runs)
    fitted = ', '.join(f"{row['Model']} {mean(row['Training (%)']):.1f} %" for row in rows)
    return f"""
<section><h2>Last epoch: at most {lost:.1f} points below a run's best; training: {fitted}</h2>
{html_comparison(rows)}
<p class="small">Validation: accuracy in the best epoch (early stopping), which is chosen, on the test images,
or with --holdout on so many training images that were held out. Training: while it learns, in the last
epoch, on the augmented images and with dropout, so that it can be lower. Of three seeds or more the mean ±
standard deviation. In the tables below the rows are bold in which what varies is as in the setting.</p>
</section>
<section><h2>The images, and what augmentation makes of them</h2>
<div class="slides">{html_picture(shown[-1][0].folder / 'images.png',
                                   "An image of each class, cropped and flipped below")}</div>
</section>
{html_classes(shown[-1])}
"""


def write_report():
    """Write results/report.html, a single file with its figures inside, of all that is in results/."""
    groups, repeated = group_runs()
    settings, top = SETTINGS.values(), groups.pop(RESULTS, {})
    # The runs in the slides' table, by model: of the setting, else those of the plain name
    found = {config.model: runs for config, runs in top.items()
             if runs[0].folder == RESULTS / config.model}
    found |= {setting.model: top[setting] for setting in settings if setting in top}
    shown = [found[model] for model in SETTINGS if model in found]
    pictures = ''
    for runs in shown:
        file = runs[0].folder / 'accuracy.png'
        plot_runs(runs, file)
        pictures += html_picture(file, describe(runs))
    # A section for each run in results/ that is no whole setting, and for each group of others or with a text
    sections = [html_group(runs[0].folder, {config: runs}, top) for config, runs in top.items()
                if config not in settings]
    sections += [html_group(folder, group, top) for folder, group in groups.items()
                 if group.keys() - settings or (folder / 'README.md').exists()]
    summary = read_text(RESULTS / 'README.md').split('\n\n')
    atomic_write(RESULTS / 'report.html', f"""{HTML_HEAD}
<h1>CIFAR-10 Evaluation Report</h1>
<p>Validation accuracy, mean ± standard deviation:
{', '.join(f"{runs[0].title} {accuracy_text(runs)}" for runs in shown) or 'see below'}</p>
{html_slides(found)}
{'<h2>Validation dataset accuracy plot</h2>' if shown else ''}
<div class="row">{pictures}</div>
<p class="small">{escape('; '.join(dict.fromkeys(repeated)))}</p>
<h2>Summary [결과 정리]</h2>
{''.join(f'<p>{escape(paragraph)}</p>' for paragraph in summary if paragraph)}
{html_details(shown) if shown else ''}
{'<h2>Additional experiments</h2>' if sections else ''}{''.join(sections)}</html>
""".encode(errors='replace'))


# --------------------------------------------------------------------------------------------------
# Pictures and hand-in


def read_picture(file):
    """The middle square of a picture, upright and over white, as (3, 32, 32) uint8."""
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(ImageOps.fit(image.convert('RGBA'), (32, 32)))
        white = Image.new('RGBA', image.size, 'white')
        return pil_to_tensor(Image.alpha_composite(white, image).convert('RGB'))


def predict_pictures(names, weights, model, classes, device):
    """Print the class of each picture and its probability, by a model whose weights are of that file.

    Returns whether each picture could be read.
    """
    all_read = True
    for name in names:
        # Windows leaves it to the program to find the files that *.jpg means.
        for file in [name] if os.path.exists(name) else glob(name) or [name]:
            # One that can't be read is named, and the others go on.
            try:
                image = read_picture(file).to(device)
            except Exception as error:  # it is missing, or damaged, whatever makes the decoders raise
                print(f"{file}: not a picture that can be read ({str(error) or type(error).__name__})")
                all_read = False
                continue
            probability, label = predict(model, image[None])[0].softmax(0).max(0)
            print(f"{file}: {classes[label]}, {probability:.1%} sure ({model.config.title}: {weights})")
    return all_read


def submit(name):
    """Write <name>.zip, in which README's commands work: code, tests, records, figures, report, weights."""
    content = io.BytesIO()
    # What editors keep in hidden files stays out, as glob leaves them out.
    code = '*.py *.md requirements.txt pyproject.toml LICENSE dataset/*.py tests/*.py .gitignore .ci/run'
    records = (f'{RESULTS}/**/*.md {RESULTS}/**/*.json {RESULTS}/**/*.csv {RESULTS}/**/*.png '
               f'{RESULTS}/*.html {RESULTS}/*/best.pt')  # weights that the evaluation measures
    # Files of a date that a zip can't have get the nearest one.
    with zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for root, patterns in (Path(__file__).parent, code), (Path(), records):
            for pattern in patterns.split():
                for file in glob(pattern, root_dir=root, recursive=True):
                    archive.write(root / file, f'{name}/{file}')
    atomic_write(Path(f'{name}.zip'), content.getvalue())
    print(f"{name}.zip holds code, records, report, and the weights of "
          f"{len(glob(f'{RESULTS}/*/best.pt'))} runs.")


# --------------------------------------------------------------------------------------------------
# The command


def evaluate_and_report(runs, data_dir, device):
    """Recompute the accuracies of runs from their weights, then write the report of all runs.

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


def parse_options():
    """The options of this script."""
    parser = Parser(allow_abbrev=False, usage="""python CIFAR10_evaluation.py [OPTION VALUE ...]

  Recompute the accuracies of the runs directly in results/ and write results/report.html:
    python CIFAR10_evaluation.py
  Print the class of any picture:
    python CIFAR10_evaluation.py --predict cat.jpg dog.png""")
    add_common_options(parser)
    source, task = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    source.add_argument('--name', type=run_name, help="evaluate only this run, or --predict by it")
    source.add_argument('--weights', metavar='FILE', help="tell the accuracy of these, or --predict by them")
    parser.add_argument('--model', choices=SETTINGS, default='resnet32', help="the network of --weights")
    parser.add_argument('--dataset', choices=CLASSES, help="images for --weights (default: as trained)")
    task.add_argument('--predict', nargs='+', action='extend', metavar='FILE',
                      help="print the class of each picture")
    task.add_argument('--submit', metavar='StudentID_Name', help="zip code and report",
                      type=lambda text: run_name(text.removesuffix('.zip')))  # it may be given
    options = parser.parse_args()
    if options.submit and (options.weights or '/' in options.submit):
        parser.error("--submit goes without --weights, and takes a name without a folder")
    if options.submit and Path(f'{options.submit}.zip').exists():
        raise UserError(f"{options.submit}.zip is there already: move it, or submit under another name.")
    return options


def main():
    options = parse_options()
    device = choose_device(options.device)
    weights, name = options.weights, options.model
    if not weights:
        # The runs asked for that have weights
        asked = [Run.read(RESULTS / options.name)] if options.name else read_runs()
        runs = [run for run in asked if (run.folder / 'best.pt').exists()]
        if not runs and (options.name or options.predict):
            folder = RESULTS.absolute() / (options.name or '')
            raise UserError(f"{folder} has no run with weights: train one.")
        if not options.predict:
            agree = evaluate_and_report(runs, options.data_dir, device)
            if options.submit:
                submit(options.submit)
            raise SystemExit(not agree)  # exit code 0 or 1, for a grader's script
        # The best one; synthetic images taught nothing about real ones.
        best = max(runs, key=lambda run: (run.config.dataset == 'cifar10', run.accuracy))
        weights, name = best.folder / 'best.pt', best.config.model

    model = load_model(weights, name, device)
    dataset = options.dataset or model.config.dataset
    if options.predict:
        all_read = predict_pictures(options.predict, weights, model, CLASSES[dataset], device)
        raise SystemExit(0 if all_read else 2)
    else:
        _, data = data_load(dataset, options.data_dir, device=device)
        print(f"{weights}: {evaluate(model, data)[1]:.2f} % of the {len(data):,} test images of "
              f"{dataset}")


if __name__ == '__main__':
    run_script(main)

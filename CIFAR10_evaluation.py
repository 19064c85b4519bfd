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
from torchvision.utils import save_image

from CIFAR10_configuration import (FIELDS, RESULTS, SETTINGS, WORLD_SIZE, Configuration, Parser,
                                   Run, UserError, add_common_options, atomic_write, flag,
                                   print_once, read_runs, run_name, run_script)
from dataset import CLASSES, data_load, normalize
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
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    return torch.device(name)


def cpu_capabilities():
    """What the CPU can do, by name, as PyTorch 2.10 and newer tell it."""
    return getattr(torch.cpu, 'get_capabilities', dict)()


def describe_machine(device, precision):
    """What the report says of the machine."""
    processor = cpu_capabilities().get('cpu_name', platform.machine())
    # On machines that differ in this, results differ a little.
    return dict(device=device.type,
                processor=torch.cuda.get_device_name() if device.type == 'cuda' else processor,
                instructions=torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512, ...
                threads=torch.get_num_threads(),
                processes=WORLD_SIZE,
                torch=torch.__version__,
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
        # DataParallel puts a word before each name.
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
    """Mean cross-entropy loss and accuracy in percent on a data set, in float32."""
    images, labels = data.tensors
    logits = predict(model, images)
    correct = (logits.argmax(1) == labels).sum().item()
    return torch.nn.functional.cross_entropy(logits, labels).item(), correct / len(labels) * 100


def evaluate_run(run, data_dir, device):
    """Recompute a run's accuracies from best.pt: evaluation.json, weights.png and mistakes.png.

    Returns whether the accuracy is the recorded one, within 0.1 points, as machines round differently.
    """
    # The images that the run was validated on, and its weights
    config = run.config
    _, val_data = data_load(config.dataset, data_dir, config.holdout, config.seed, device)
    images, labels = val_data.tensors
    model = load_model(run.folder / 'best.pt', config.model, device)
    probability = predict(model, images).softmax(1)
    predicted = probability.argmax(1)

    # Confusion matrix: a row for each true class, with the number that is taken for each class
    confusion = (labels * 10 + predicted).cpu().bincount(minlength=100).view(10, 10)
    accuracy = confusion.trace().item() / len(labels) * 100
    found = dict(accuracy=accuracy, confusion=confusion.tolist())
    if config.holdout:
        # The test images were used to choose neither these weights nor the hyperparameters.
        _, test_data = data_load(config.dataset, data_dir, device=device)
        found['test_accuracy'] = evaluate(model, test_data)[1]
    # The images to whose class it gives the lowest probability
    hardest = probability[range(len(labels)), labels].argsort()[:8]
    names = CLASSES[config.dataset]
    found['mistakes'] = ', '.join(f'{names[predicted[i]]} ({names[labels[i]]})' for i in hardest)
    atomic_write(run.folder / 'evaluation.json', json.dumps(found).encode())

    # The weights of the first layer's units or filters, 32 at most, show what it looks for.
    weights = next(model.parameters()).detach()[:32]
    side = math.isqrt(weights[0].numel() // 3)
    save_images(weights.reshape(-1, 3, side, side), run.folder / 'weights.png')
    save_images(images[hardest], run.folder / 'mistakes.png')
    agree = abs(accuracy - run.accuracy) <= 0.1
    print(f"{run.folder}: {accuracy:.2f} % recomputed, {run.accuracy:.2f} % recorded"
          f"{'' if agree else ', which DIFFER'}.")
    return agree


# --------------------------------------------------------------------------------------------------
# Figures

# Drawn at the size at which the report shows it, in colours that differ in grey print too
style.use(['default', {
    'figure.constrained_layout.use': True, 'figure.dpi': 192, 'font.size': 9, 'axes.titlesize': 'medium',
    'legend.fontsize': 8, 'legend.title_fontsize': 8,
    'axes.prop_cycle': "cycler('color', ['1b2f6b', 'e8590c', '7fc8f8', '2b8a3e', 'b46bd6', 'b59f00'])"}])


def drop_epochs(run):
    """The epochs after which the learning rate dropped by a step."""
    return [before.epoch for before, after in pairwise(run.history)
            if run.config.learning_rate_decay == 'step'
            and after.learning_rate < before.learning_rate]


def finish(axes, file, title, ylabel, loc='outside lower center', ncols=3, heading=None):
    """Label a plot over epochs, add a legend, and save it unless another program has the file open."""
    axes.set(xlabel='epoch', ylabel=ylabel, title=title)
    axes.locator_params('x', integer=True)  # no epoch 1.5
    axes.grid(alpha=0.3)
    axes.figure.legend(loc=loc, ncols=ncols, title=heading)
    png = io.BytesIO()
    axes.figure.savefig(png)
    try:
        atomic_write(file, png.getvalue())
    except UserError as error:
        print_once(f"{error}")


def draw_curve(axes, runs, column, *look, **options):
    """Draw a column of the records over the epochs: the mean of runs, as far as all of them go."""
    epochs = zip(*(run.history for run in runs))  # it ends with the shortest
    means = [mean(getattr(row, column) for row in rows) for rows in epochs]
    axes.plot(range(1, len(means) + 1), means, *look, **options)


def plot_setting(runs, file):
    """Plot the accuracies of runs that differ only in their seed, early stopping and drops."""
    axes = Figure(figsize=(4, 3.3)).subplots()
    draw_curve(axes, runs, 'val_accuracy', label='validation')
    draw_curve(axes, runs, 'train_accuracy', 'C0', linewidth=0.6, label='training')
    best = np.mean([(run.best.epoch, run.accuracy) for run in runs], 0)
    axes.plot(*best, 'k*', label='early stopping')
    if drops := drop_epochs(runs[0]):
        axes.vlines(drops, 0, 105, 'grey', 'dotted', label='learning rate drops')
    axes.set_ylim(0, 105)  # the settings are compared on one scale
    finish(axes, file, describe(runs), 'accuracy (%)')


def plot_group(compared, options, file):
    """Plot the validation accuracies of several combinations of options.

    compared has the runs of a curve, which differ only in their seed, by the values of the options.
    """
    axes = Figure(figsize=(4.7, 2.4)).subplots()
    colours, dashes = {}, {}
    for (first, *others), runs in compared.items():
        # The first option decides the colour, the others decide the dashes.
        colour = colours.setdefault(first, f'C{len(colours)}')
        dash = dashes.setdefault(tuple(others), ['-', '--', ':', '-.'][len(dashes) % 4])
        draw_curve(axes, runs, 'val_accuracy', colour + dash, label=', '.join([first, *others]))
    finish(axes, file, 'validation accuracy', 'accuracy (%)', 'outside right upper', 1,
           '\n'.join(options))


def plot_loss(run):
    """Plot a run's losses, and on an axis of its own the learning rate, to loss.png."""
    axes = Figure(figsize=(4, 2.3)).subplots()
    # The learning rate has an axis of its own, at the right.
    rate = axes.twinx()
    draw_curve(rate, [run], 'learning_rate', 'k:', label='learning rate')
    rate.set_ylabel('learning rate')
    # Thick and thin as in the plot of the accuracy
    draw_curve(axes, [run], 'val_loss', label='validation')
    draw_curve(axes, [run], 'train_loss', 'C0', linewidth=0.6, label='training')
    finish(axes, run.folder / 'loss.png', run.config.title, 'loss')


def save_images(images, file):
    """Write images (N, 3, S, S), each from its lowest value to its highest, eight in a row, as PNG."""
    # 94 pixels and a border of 2 make a row of eight as wide as a plot.
    large = torch.nn.functional.interpolate(images.float(), 94)
    save_image(large, file, normalize=True, scale_each=True, pad_value=1)


# --------------------------------------------------------------------------------------------------
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
thead, h1 + p, .slides td:is(:first-child, :last-child), .best:not(:only-child) { font-weight: bold }
p:empty, pre:empty { display: none }
h1, figure { margin: 0 }
h3 { margin: 12px 0 0 } h3 + p { margin: 2px 0 6px } section h2 { margin: 20px 0 8px }
.small { font-size: 12px } pre { font-size: 11px; white-space: pre-wrap }
pre, .small { color: #555; margin: 2px 0 }
img { max-width: 100% }
figcaption { display: none; font-size: 12px } .pixels figcaption { display: block }
.row { display: flex; flex-wrap: wrap; gap: 16px; align-items: start; margin-bottom: 4px }
.slides, .results { overflow-x: auto } /* on a narrow screen */
/* tables of results: lines only, numbers aligned, a bar from 0 to 100 % behind each accuracy */
.results { flex: 1 0 340px; max-width: 100% }
.results table { font-size: 12px; font-variant-numeric: tabular-nums }
.results td { border-width: 0 0 1px; padding: 3px 4px; text-align: right }
.results tbody td, .option { white-space: nowrap }
.results td[style] { background: linear-gradient(90deg, #cfe3f3 var(--bar), transparent 0) content-box;
  text-align: left; padding: 2px 3px 2px 9px; print-color-adjust: exact }
@page { size: A4 landscape; margin: 1cm }
@media print {
  body { font-size: 11px; margin: 0 } table, .results table { font-size: 9px }
  pre, .small { font-size: 8px } .results td { padding: 1px 4px }
  h2, h3 { break-after: avoid } section, figure, tr { break-inside: avoid }
  img { width: auto; max-height: 6.3cm } section img { max-height: 4cm } .pixels img { max-width: 7cm }
}
</style>
"""


def key_without_seed(run):
    """What runs that differ only in their seed have in common: a configuration with seed 0."""
    # One that was interrupted is another run than one of full length: it has the epochs so far.
    stopped_early = run.epochs_since_best >= run.config.patience
    return replace(run.config, seed=0, epochs=run.config.epochs if stopped_early else len(run.history))


def group_runs():
    """Read all runs below results/, and put those that differ only in their seed into one list.

    Returns groups[folder][configuration], the lists; groups[RESULTS] has the seeds of the settings,
    wherever they lie. And texts: a run that repeats an earlier one with its seed is only told.
    """
    groups, repeated = defaultdict(lambda: defaultdict(list)), []
    for run in sorted(read_runs('*/**'), key=lambda run: run.folder.parent):
        key = key_without_seed(run)
        group = run.folder.parent
        for folder in {group, RESULTS if key in SETTINGS.values() else group}:
            runs = groups[folder][key]
            for first in runs:
                if first.config.seed == run.config.seed:
                    repeated.append(f"{run.folder} repeats {first.folder}: {run.accuracy:.2f} % "
                                    f"({run.accuracy - first.accuracy:+.2f})")
                    print_once(repeated[-1])
                    break
            else:  # none has this seed yet
                runs.append(run)
    if not groups:
        raise UserError(f"There are no readable runs in {RESULTS.absolute()}: train one, or go to them.")
    return groups, repeated


def read_text(file):
    """A text that a person wrote, or ''. One that is not in UTF-8 is named and left out."""
    try:
        return file.read_text(encoding='utf-8-sig') if file.exists() else ''  # sig: Windows' mark
    except UnicodeDecodeError:
        print(f"{file} is left out of the report: save it as UTF-8.")
        return ''


def recomputed(runs, name, kind=float):
    """What evaluate_run found of that name for each run; () where it has not seen all of them."""
    with contextlib.suppress(Exception):  # there is no such record, or a damaged one
        return tuple(kind(json.loads((run.folder / 'evaluation.json').read_text())[name])
                     for run in runs)
    return ()


def mean_std(numbers):
    """The mean of numbers as text, with the standard deviation where there are several."""
    spread = f" ± {stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.2f}{spread}"


def accuracy_text(runs):
    """The accuracy of runs that differ only in their seed."""
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    return f"{mean_std([run.accuracy for run in runs])} %{seeds}"


def html_setting(number, setting, runs):
    """HTML of a row of the slides' table, which is empty before the setting is trained."""
    if not runs:
        return f"""<tr><td>Setting #{number}</td><td>{setting.title}</td>{'<td></td>' * 12}</tr>"""
    config = runs[0].config
    drops = ', '.join(f'{epoch:.0f}' for epoch in drop_epochs(runs[0]))
    return f"""<tr><td>Setting #{number}</td>
<td>{config.title}</td>
<td>{'X' if runs[0].machine.get('device') == 'cpu' else 'O'}</td>
<td>{config.batch_size}</td>
<td>{dict(relu='ReLU', elu='ELU').get(config.activation, config.activation)}</td>
<td>{config.initialization.capitalize()}</td>
<td>{'SGD (Nesterov)' if config.optimizer == 'nesterov' else config.optimizer.upper()}</td>
<td>{config.learning_rate:g}</td>
<td>{config.momentum:g}</td>
<td>{config.weight_decay or 'X'}</td>
<td>{f'×{config.gamma:g} after epoch {drops}' if drops else config.learning_rate_decay}</td>
<td>{', '.join(f'{run.last.seconds / 60:.1f}' for run in runs)}</td>
<td>{', '.join(f'{run.best.epoch:.0f}' for run in runs)}</td>
<td>{accuracy_text(runs)}</td></tr>"""


def result_row(runs, options=()):
    """What tables say of runs that differ only in their seed: texts, accuracies in percent."""
    config = runs[0].config
    model = build_model(config, torch.device('cpu'))
    return {
        'Model': config.title,
        **{flag(name): config.as_given(name) for name in options},
        'Parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'Seeds': len(runs),
        '--epochs': f'{mean(len(run.history) for run in runs):g}',
        'Machine': ', '.join(dict.fromkeys(str(run.machine.get('processor', '')) for run in runs)),
        'Minutes': f'{median(run.last.seconds for run in runs) / 60:.1f}',
        'Validation (%)': tuple(run.accuracy for run in runs),
        'Last epoch (%)': tuple(run.last.val_accuracy for run in runs),
        'Training (%)': tuple(run.last.train_accuracy for run in runs),
        'Test (%)': recomputed(runs, 'test_accuracy')
    }


def html_cell(value):
    """HTML of a table's cell: a text, or a tuple of accuracies in percent, before a bar."""
    if value and isinstance(value, tuple):
        return f'<td style="--bar: {mean(value):.2f}%">{mean_std(value)}</td>'
    return f'<td>{escape(str(value or ""))}</td>'


def html_table(rows, hidden=(), best=None):
    """HTML of a table of rows, dicts by column, without hidden columns; the best row is bold."""
    columns = [column for column in rows[0] if column not in hidden]
    head = (f'<td class="{"option" if "--" in column else ""}">{column}</td>' for column in columns)
    lines = (f"""<tr class="{'best' if row is best else ''}">{''.join(
        html_cell(row[column]) for column in columns)}</tr>""" for row in rows)
    return f"<table><thead><tr>{''.join(head)}</tr></thead>{''.join(lines)}</table>"


def html_comparison(rows):
    """HTML of a table with the columns in which rows differ; what all share stands once below it."""
    # Columns that are empty, or of several rows have the same text; accuracies always stay.
    shared = [column for column, value in rows[0].items()
              if all(row[column] == value for row in rows)
              and (not value or rows[1:] and not isinstance(value, tuple))]
    facts = '; '.join(f'{column}: {rows[0][column]}' for column in shared if rows[0][column])
    best = max(rows, key=lambda row: mean(row['Validation (%)']))
    return f"""<div class="results">{html_table(rows, shared, best)}
<p class="small">{escape(facts)}</p></div>"""


def describe(runs):
    """Model, accuracy and epochs of runs that differ only in their seed."""
    return (f"{runs[0].config.title}: {mean(run.accuracy for run in runs):.1f} % "
            f"in {len(runs[0].history)} epochs")


def html_picture(file, words):
    """HTML that holds a PNG file itself, and tells in words what it shows; '' where there is none."""
    if not file.exists():
        return ''
    png = file.read_bytes()
    # Half as wide as its pixels, whose number PNG has here, as dense screens draw two for one
    return f"""<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}"
width="{int.from_bytes(png[16:20], 'big') // 2}" alt="{escape(words)}">
<figcaption>{escape(words)}</figcaption></figure>"""


def html_pictures(shown, name):
    """HTML of the pictures of that name, side by side, that the settings shown have."""
    return ''.join(html_picture(runs[0].folder / f'{name}.png', f'{name}, {describe(runs)}')
                   for runs in shown)


def html_group(folder, group, top):
    """HTML on a group: the text in its folder's README.md, a figure, and a table of what differs.

    group and top, which has the settings, have lists of runs by configuration, as of group_runs.
    """
    # What differs from the settings; where it is one option, they themselves belong to the group.
    settings = [SETTINGS[config.model] for config in group]
    options = [name for name in FIELDS
               if any(name in config.differences(setting) for config, setting in zip(group, settings))]
    if len(options) == 1:
        group = group | {setting: top[setting] for setting in settings if setting in top}

    # A curve and a row for each combination of the values that vary, in their order
    varied = [name for name in ['model', *options]
              if len({getattr(config, name) for config in group}) > 1]
    order = sorted(group, key=lambda config: [getattr(config, name) for name in varied])
    compared = {tuple(map(config.as_given, varied)): group[config] for config in order}
    if varied:
        plot_group(compared, varied, folder / 'accuracy.png')
    else:
        plot_setting(*group.values(), folder / 'accuracy.png')
    # What the figure shows, for those who can't see it
    words = '; '.join(', '.join([*label, describe(runs)]) for label, runs in compared.items())

    # A line with the finding, a text, and the commands that train the group
    heading, _, text = read_text(folder / 'README.md').strip().partition('\n')
    text, _, commands = text.partition('\n\n    ')  # they are indented
    return f"""<section>
<h3>{escape(heading.strip('# ') or folder.relative_to(RESULTS).as_posix())}</h3>
<p>{escape(text)}</p>
<div class="row">{html_picture(folder / 'accuracy.png', words)}
{html_comparison([result_row(runs, options) for runs in compared.values()])}</div>
<pre>{escape(commands.replace('    ', ''))}</pre>
</section>
"""


def html_classes(shown):
    """HTML of a table: how often each setting is right on each class, what the last takes it for."""
    # The confusion matrix (10, 10) of each setting's first seed, and its rows in percent
    matrices = [matrix for runs in shown for matrix in recomputed(
        runs[:1], 'confusion', lambda lists: torch.Tensor(lists).view(10, 10))]
    if len(matrices) < len(shown):
        return ''  # not all of them are evaluated yet
    shares = [matrix / matrix.sum(1, keepdim=True) * 100 for matrix in matrices]
    names = CLASSES[shown[-1][0].config.dataset]
    columns = [f'{runs[0].config.title} (%)' for runs in shown]
    columns += [f'as {name} (%)' for name in names]
    numbers = torch.column_stack([*map(torch.diag, shares), shares[-1]])
    return html_table([{'Class': name, **dict(zip(columns, zip(row)))}  # tuples of a single number
                       for name, row in zip(names, numbers.tolist())])


def html_details(shown):
    """HTML on how the settings were measured, how they learned, and where they are wrong."""
    measured = [result_row(runs) | {'Recomputed (%)': recomputed(runs, 'accuracy')} for runs in shown]
    return f"""
<section><h2>How the accuracies were measured</h2>
{html_comparison(measured)}
<p class="small">Validation: accuracy in the best epoch (early stopping), on the test images, or with
--holdout on so many training images that were held out. Training: while it learns, in the last epoch, on
the augmented images and with dropout, so that it can be lower. Recomputed: from the best weights. Of
several seeds the mean ± standard deviation and the median of the minutes.</p></section>
<section><h2>How the models learned, and what their first layers look for</h2>
<div class="row">{html_pictures(shown, 'loss')}</div>
<p class="small">Above, the losses and the learning rate. Below, the weights of the first layer as pictures,
red, green and blue: a unit of an MLP looks at a whole image, a filter of a convolution at a few pixels,
everywhere in the image. Each picture goes from its lowest weight to its highest; a black one has no weights
left.</p>
<div class="row pixels">{html_pictures(shown, 'weights')}</div></section>
<section><h2>Which classes are hard</h2>
<p class="small">The share of each class that the first seed of each model gets right, and, in the columns
"as", what {shown[-1][0].config.title} takes the class for (confusion matrix)</p>
<div class="results">{html_classes(shown)}</div>
<div class="row pixels">{html_pictures(shown[-1:], 'mistakes')}</div>
<p class="small">What it takes them for (and what they are):
{escape(''.join(recomputed(shown[-1][:1], 'mistakes', str)))}</p>
</section>
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
    for runs in shown:  # their figures
        plot_setting(runs, runs[0].folder / 'accuracy.png')
        plot_loss(runs[0])
    # A section for each other run in results/, and for each group
    sections = [html_group(runs[0].folder, {config: runs}, top) for config, runs in top.items()
                if config not in settings]
    sections += [html_group(folder, group, top) for folder, group in groups.items()
                 if group.keys() - settings]
    summary = read_text(RESULTS / 'README.md').split('\n\n')
    atomic_write(RESULTS / 'report.html', f"""{HTML_HEAD}
<h1>CIFAR-10 Evaluation Report</h1>
<p>Validation accuracy, of several seeds the mean ± standard deviation:
{', '.join(f"{runs[0].config.title} {accuracy_text(runs)}" for runs in shown) or 'see below'}</p>
<div class="slides"><table><thead><tr><td></td><td>Model</td><td>GPU (O/X)</td><td>Batch_size</td>
<td>Activation function</td><td>Weight initialization</td><td>Optimizer</td><td>Learning rate</td>
<td>Momentum</td><td>Weight decay</td><td>LR decay</td><td>training time (m)</td>
<td>Early stopping epoch</td><td>Accuracy</td></tr></thead>
{''.join(html_setting(number, setting, found.get(setting.model))
         for number, setting in enumerate(settings, 1))}</table></div>
{'<h2>Validation dataset accuracy plot</h2>' if shown else ''}
<div class="row">{html_pictures(shown, 'accuracy')}</div>
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
    """Print the class of each picture and its probability, by a model and the file of its weights."""
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

  Recompute the accuracies of the runs right in results/ and write results/report.html:
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
    task.add_argument('--submit', type=run_name, metavar='StudentID_Name', help="zip code and report")
    options = parser.parse_args()
    if options.submit and options.weights:
        parser.error("--submit goes without --weights")
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
            raise UserError(f"{RESULTS / (options.name or '')} has no run with weights: train one.")
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
        predict_pictures(options.predict, weights, model, CLASSES[dataset], device)
    else:
        _, data = data_load(dataset, options.data_dir, device=device)
        print(f"{weights}: {evaluate(model, data)[1]:.2f} % of the {len(data):,} validation images of "
              f"{dataset}")


if __name__ == '__main__':
    run_script(main)

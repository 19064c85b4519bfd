"""From results/ to figures and the report, from weights to accuracies and predictions.

    python CIFAR10_evaluation.py                                  results/report.html from all runs
    python CIFAR10_evaluation.py --model lenet5 --weights FILE    accuracy of any weights
    python CIFAR10_evaluation.py --predict FILE ...               class of any picture
    python CIFAR10_evaluation.py --submit StudentID_Name          StudentID_Name.zip to hand in
"""
import base64
import dataclasses
import html
import json
import statistics
import zipfile
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogLocator
from torchvision.datasets.folder import pil_loader

from CIFAR10_configuration import (ONLY_SPEED, RESULTS, SEARCH, SETTINGS, Configuration, Parser, Run, UserError, check,
                                   check_name, option, run_script, write_whole)
from CIFAR10_train import build_model, choose_device, evaluate, load_file, load_weights, predict
from dataset import CLASS_NAMES, crop_and_flip, data_load

TITLES = {'mlp': 'MLP', 'lenet5': 'LeNet-5', 'resnet32': 'ResNet-32'}
COLOURS = {'mlp': 'tab:green', 'lenet5': 'tab:orange', 'resnet32': 'tab:blue'}
COLUMNS = ('Model', 'GPU (O/X)', 'Batch_size', 'Activation function', 'Weight initialization', 'Optimizer', 'Learning rate',
           'Momentum', 'Weight decay', 'LR decay', 'training time (m)', 'Early stopping epoch', 'Accuracy')  # as on the slide
PROTOCOL = ('Epochs', 'Validated on', 'Best accuracy', 'Accuracy of the last epoch', 'Recomputed from the best weights',
            'Test images, looked at once')
STYLE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>CIFAR-10 Evaluation Report</title>
<style>
body { font: 15px/1.45 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; width: 100%; font-size: 13px }
td, th { border: 1px solid #888; padding: 4px; text-align: center } th { background: #eee }
td:nth-child(-n+2), td:last-child { font-weight: bold } td:nth-child(-n+2) { white-space: nowrap }
.row { display: flex; gap: 8px } figure { flex: 1; margin: 0; min-width: 0 } img { max-width: 100% }
@page { size: A4 landscape; margin: 1cm } @media print { img, figure, tr { break-inside: avoid; max-height: 17cm } }
</style>
"""


def learning_rate_drops(run):
    """The pairs of successive history rows between which the learning rate dropped by a step."""
    return [(before, after) for before, after in zip(run.history, run.history[1:])
            if run.config.learning_rate_decay == 'step' and after['learning_rate'] < before['learning_rate']]


def caution(runs):
    """What stands before every title that speaks of a run on drawn images."""
    return "NOT CIFAR-10 (synthetic): " if any(run.config.dataset != 'cifar10' for run in runs) else ""


def plot_accuracy(runs, file):
    """Draw validation accuracy over epochs; of a single run also its early-stopping epoch and learning-rate drops."""
    figure = Figure(figsize=(5, 3.8) if len(runs) == 1 else (8, 4.5), layout='constrained')
    axes = figure.subplots()
    for run in runs:
        best = run.best
        axes.plot([row['epoch'] for row in run.history], [row['val_accuracy'] for row in run.history], marker='.',
                  color=COLOURS[run.config.model], label=f"{TITLES[run.config.model]} ({run.folder.name})")
        axes.plot(best['epoch'], best['val_accuracy'], 'k*', label=f"{best['val_accuracy']:.2f} % at epoch {best['epoch']:.0f}")
    for before, after in learning_rate_drops(runs[0]) if len(runs) == 1 else []:
        axes.axvline(after['epoch'] - 0.5, color='grey', linestyle=':',
                     label=f"learning rate {before['learning_rate']:.2g} to {after['learning_rate']:.2g}")
    title = TITLES[runs[0].config.model] + ', ' if len(runs) == 1 else ''
    axes.set(xlabel='epoch', ylabel='validation accuracy (%)')
    axes.set_title(f"{caution(runs)}{title}validation accuracy", fontsize='medium')  # fits beside the caution too
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right', fontsize=8)
    figure.savefig(file, dpi=150)


def plot_images(images, titles, title, file):
    """Draw uint8 images (rows, columns, 3, 32, 32) in a grid; titles holds a list of texts for each row."""
    rows, columns = images.shape[:2]
    figure = Figure(figsize=(max(6, 1.3 * columns), 1.6 * rows + 0.8), layout='constrained')
    figure.suptitle(title)
    for axes, image, text in zip(figure.subplots(rows, columns, squeeze=False).flat, images.flatten(0, 1), sum(titles, [])):
        axes.imshow(image.permute(1, 2, 0).cpu())
        axes.set_title(text, fontsize=8)
        axes.axis('off')
    figure.savefig(file, dpi=120)


def plot_confusion(matrix, names, title, file):
    """Draw how many images of each true class (rows) were taken for each class (columns), from a (10, 10) count."""
    figure = Figure(figsize=(6.5, 6), layout='constrained')
    axes = figure.subplots()
    axes.imshow(matrix.float().sqrt(), cmap='Blues')  # the square root shows rare confusions too
    axes.set_xticks(range(10), names, rotation=45, ha='right')
    axes.set_yticks(range(10), names)
    axes.set(xlabel='predicted class', ylabel='true class', title=title)
    for y, x in matrix.nonzero().tolist():
        axes.text(x, y, matrix[y, x].item(), ha='center', va='center', fontsize=8,
                  color='white' if matrix[y, x] > matrix.max() / 3 else 'black')
    figure.savefig(file, dpi=120)


def plot_search(searches, file):
    """Draw validation accuracy over learning rate and weight decay, from a list of the trials of each model."""
    figure = Figure(figsize=(max(5, 4 * len(searches)), 3.6), layout='constrained')
    for axes, trials in zip(figure.subplots(1, len(searches), squeeze=False)[0], searches):
        accuracies = [run.best['val_accuracy'] for run in trials]
        for marker, label, ended in (('o', "trained to the end", True), ('X', "given up before", False)):
            some = [run for run in trials if (len(run.history) == run.config.epochs) == ended]
            points = axes.scatter([run.config.learning_rate for run in some], [run.config.weight_decay for run in some], s=70,
                                  c=[run.best['val_accuracy'] for run in some], marker=marker, label=label, edgecolors='black',
                                  vmin=min(accuracies), vmax=max(accuracies))
        axes.set(xscale='log', yscale='log', xlabel='learning rate', ylabel='weight decay',
                 title=caution(trials) + TITLES[trials[0].config.model])
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter('{x:g}')
        figure.colorbar(points, label='held-out accuracy (%)')
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2)  # the same in all
    figure.savefig(file, dpi=120)


def examine(run, data_dir, device):
    """Recompute a run's accuracies from best.pt into evaluation.json; draw its images, confusions and worst mistakes."""
    config, names = run.config, CLASS_NAMES[run.config.dataset]
    train_data, val_data = data_load(config.dataset, data_dir, config.holdout, config.seed, device, urls=())
    model = build_model(config)
    load_weights(model, run.folder / 'best.pt')
    images, labels = val_data.tensors
    confidence, predicted = predict(model.to(device), images).softmax(1).max(1)
    found = {'accuracy': (predicted == labels).sum().item() / len(labels) * 100}
    if config.holdout:  # the one look at the test images, after every choice was made
        test_data = data_load(config.dataset, data_dir, device=device, urls=())[1]
        found['test_accuracy'] = evaluate(model, test_data)[1]
    write_whole(run.folder / 'evaluation.json', json.dumps(found).encode())

    title = caution([run]) + TITLES[config.model]
    count = torch.zeros(10, 10, dtype=int).index_put_((labels.cpu(), predicted.cpu()), torch.tensor(1), accumulate=True)
    plot_confusion(count, names, f"{title}, validation images", run.folder / 'confusion.png')
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:8]
    if len(wrong):
        titles = [f"{names[labels[i]]},\ntaken for\n{names[predicted[i]]}\n({confidence[i]:.0%} sure)" for i in wrong]
        plot_images(images[wrong][None], [titles], f"{title}, its most confident mistakes", run.folder / 'mistakes.png')
    images, labels = train_data.tensors
    samples = images[[(labels == c).nonzero()[0].item() for c in range(10)]].cpu()
    torch.manual_seed(0)
    versions = [samples] + [crop_and_flip(samples, torch.randint(0, 9, (10, 2)), torch.rand(10) < 0.5) for _ in range(3)]
    plot_images(torch.stack(versions), [list(names)] + [["augmented"] * 10] * 3,
                caution([run]) + "Training images, and as random crops and flips change them", run.folder / 'samples.png')
    return found


def read_runs():
    """All runs in results/; those that can't be read are named and left out."""
    runs = []
    for folder in sorted(folder for folder in RESULTS.glob('*') if folder.is_dir()):
        try:
            runs.append(Run.read(folder))
        except UserError as error:
            print(error)
    return runs


def is_trial(run):
    """Whether a run is one of a search's."""
    return '-search-' in run.folder.name


def alike(run, runs):
    """Of a list the runs that differ from this one only in their seed, or in what makes training faster; itself first."""
    same = {f.name: f.default for f in dataclasses.fields(Configuration) if f.name in ('seed', *ONLY_SPEED)}
    return sorted((other for other in runs if dataclasses.replace(other.config, **same) == dataclasses.replace(run.config, **same)),
                  key=lambda other: other is not run)


def in_short(numbers, digits):
    """The mean of numbers as text, with the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def report_row(*seeds):
    """The cells under COLUMNS, as text; of runs that differ only in their seed mean and standard deviation."""
    run, config = seeds[0], seeds[0].config
    drops = ', '.join(f"{before['epoch']:.0f}" for before, _ in learning_rate_drops(run))
    decay = f'×{config.gamma:g} after epoch {drops}' if drops else config.learning_rate_decay.replace('none', 'X')
    return [TITLES[config.model], 'X' if run.machine['device'] == 'cpu' else 'O', config.batch_size,
            {'relu': 'ReLU', 'elu': 'ELU'}.get(config.activation, config.activation), config.initialization.capitalize(),
            {'sgd': 'SGD', 'nesterov': 'SGD (Nesterov)', 'adam': 'Adam'}[config.optimizer],
            f'{config.learning_rate:g}', f'{config.momentum:g}', f'{config.weight_decay:g}' if config.weight_decay else 'X',
            decay, in_short([run.history[-1]['seconds'] / 60 for run in seeds], 1),
            ', '.join(f"{run.best['epoch']:.0f}" for run in seeds),
            in_short([run.best['val_accuracy'] for run in seeds], 2) + ' %' + (f' ({len(seeds)} seeds)' if len(seeds) > 1 else '')]


def in_words(value):
    """A hyperparameter as text, of several values as on the command line."""
    return ' '.join(map(str, value)) if isinstance(value, tuple) else str(value)


def settings_beside(run):
    """A sentence on the hyperparameters that differ from the defaults and have no column."""
    shown = ('model', 'dataset', 'seed', 'batch_size', 'activation', 'initialization', 'optimizer', 'learning_rate', 'momentum',
             'weight_decay', 'learning_rate_decay', 'holdout', *ONLY_SPEED)
    values = [(option(f), getattr(run.config, f.name)) for f in dataclasses.fields(run.config)
              if f.name not in shown and (getattr(run.config, f.name) != f.default or f.name == 'epochs')]
    return f"{TITLES[run.config.model]}, beside the table: {', '.join(f'{name} {in_words(value)}' for name, value in values)}."


def protocol(run):
    """The cells under PROTOCOL, as text: on which images a run was validated, and whether its weights give the accuracy again."""
    try:
        found = json.loads((run.folder / 'evaluation.json').read_text(encoding='utf-8'))
        agrees = "agrees" if abs(found['accuracy'] - run.best['val_accuracy']) < 0.005 else "DISAGREES"
        again, test = f"{found['accuracy']:.2f} %, {agrees}", f"{found['test_accuracy']:.2f} %" if run.config.holdout else 'X'
    except (OSError, ValueError, TypeError, KeyError):
        again = test = "not yet"
    return [caution([run]) + run.folder.name, f"{len(run.history)} of {run.config.epochs}",
            f"{run.config.holdout:,} held-out training images" if run.config.holdout else "the test images, as on the slides",
            f"{run.best['val_accuracy']:.2f} % (epoch {run.best['epoch']:.0f})", f"{run.history[-1]['val_accuracy']:.2f} %",
            again, test]


def summary(runs):
    """Sentences on what won, by how much, and when the learning rate dropped and what that brought."""
    first, *others = sorted(runs, key=lambda run: -run.best['val_accuracy'])
    yield (f"{caution(runs)}{TITLES[first.config.model]} wins with {first.best['val_accuracy']:.2f} %" + ''.join(
        f", {first.best['val_accuracy'] - run.best['val_accuracy']:.2f} points ahead of {TITLES[run.config.model]} "
        f"({run.best['val_accuracy']:.2f} %)" for run in others) + ".")
    for run in [first, *others]:
        best, title = run.best, TITLES[run.config.model]
        yield (f"{title} was best at epoch {best['epoch']:.0f} of {len(run.history)}, with {best['train_accuracy']:.2f} % on "
               f"the augmented training images; it trained for {run.history[-1]['seconds'] / 60:.1f} minutes.")
        for before, after in learning_rate_drops(run):
            old, new = (max(row['val_accuracy'] for row in run.history if row['learning_rate'] == stage['learning_rate'])
                        for stage in (before, after))
            yield (f"{title}'s learning rate dropped to {after['learning_rate']:.2g} after epoch {before['epoch']:.0f}: its best "
                   f"accuracy went from {old:.2f} % to {new:.2f} % ({new - old:+.2f} points).")


def table(rows, columns=COLUMNS):
    """HTML of a table: a row for each list of cells, whose first one names the row."""
    cells = [''.join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table><tr><th></th><th>{'</th><th>'.join(columns)}</th></tr><tr>{'</tr><tr>'.join(cells)}</tr></table>"


def bullets(lines):
    """HTML of a list."""
    return '<ul>' + ''.join(f"<li>{html.escape(line)}</li>" for line in lines) + '</ul>'


def picture(file):
    """HTML that holds a PNG file itself; nothing where there is none."""
    data = base64.b64encode(file.read_bytes()).decode() if file.exists() else ''
    return f"<figure><img src='data:image/png;base64,{data}'></figure>" if data else ''


def search_section(trials):
    """HTML on how the hyperparameters were found: a plot, and for each model its compute and a table of its trials."""
    searches = [[run for run in trials if run.config.model == model] for model in SETTINGS]
    searches = [sorted(some, key=lambda run: (-len(run.history), -run.best['val_accuracy'])) for some in searches if some]
    if not searches:
        return ''
    plot_search(searches, RESULTS / 'search.png')
    text = f"<h2>Search of the hyperparameters</h2>{picture(RESULTS / 'search.png')}"
    for some in searches:
        config, names = some[0].config, SEARCH[some[0].config.model]
        minutes, machine = sum(run.history[-1]['seconds'] for run in some) / 60, some[0].machine
        ended = "" if len(some[0].history) == config.epochs else ", and was broken off"
        text += bullets([
            f"{caution(some)}{TITLES[config.model]}: {len(some)} random trials of up to {config.epochs} epochs, chosen by "
            f"{config.holdout:,} held-out training images, never by the test images; the better half went on after a quarter and "
            f"a half. It took {minutes:.0f} minutes{ended} ({', '.join(f'{name} {value}' for name, value in machine.items())})."])
        text += table([[run.folder.name, *(in_words(getattr(run.config, name)) for name in names), len(run.history),
                        f"{run.best['val_accuracy']:.2f} %"] for run in some],
                      [*(name.replace('_', ' ') for name in names), 'epochs', 'held-out accuracy'])
    return text


def write_report(runs):
    """Write results/report.html, a single file with all of it and the runs' plots inside, from a list of runs."""
    RESULTS.mkdir(exist_ok=True)
    trials, runs = [run for run in runs if is_trial(run)], [run for run in runs if not is_trial(run)]
    settings = {model: min((run for run in runs if run.config.model == model), default=None,  # on CIFAR-10, named like the model
                           key=lambda run: (run.config.dataset != 'cifar10', run.folder.name != model, run.folder.name))
                for model in SETTINGS}
    rows = [[f"Setting #{number}", *(report_row(*alike(run, runs)) if run else [TITLES[model]] + [''] * 12)]
            for number, (model, run) in enumerate(settings.items(), 1)]
    own = [run for run in settings.values() if run]
    others = [run for run in runs if not any(run in alike(first, runs) for first in own)]
    if len(own) > 1:
        plot_accuracy(own, RESULTS / 'accuracy.png')
    winner = max(own, key=lambda run: run.best['val_accuracy']).folder if own else RESULTS
    written = (RESULTS / 'summary.txt').read_text(encoding='utf-8') if (RESULTS / 'summary.txt').exists() else ''
    more = f"<h2>Additional experiments</h2>{table([run.folder.name, *report_row(run)] for run in others)}" if others else ''
    measured = f"<h2>How the accuracies were measured</h2>{table(map(protocol, runs), PROTOCOL)}" if runs else ''
    write_whole(RESULTS / 'report.html', f"""{STYLE}
<h1>{caution(own)}CIFAR-10 Evaluation Report</h1>
{table(rows)}
<h2>Validation dataset accuracy plot</h2>
<div class="row">{''.join(picture(run.folder / 'accuracy.png') if run else '<figure></figure>' for run in settings.values())}</div>
<h2>Summary [결과 정리]</h2>
{''.join(f'<p>{html.escape(part)}</p>' for part in written.split(chr(10) * 2) if part.strip())}
{bullets([*summary(own), *map(settings_beside, own)] if own else ["No run yet."])}
<div class="row">{picture(RESULTS / 'accuracy.png') if len(own) > 1 else ''}{picture(winner / 'confusion.png')}</div>
{picture(winner / 'mistakes.png')}{picture(winner / 'samples.png')}
{measured}{search_section(trials)}{more}
</html>
""".encode())


def read_picture(file):
    """Any picture, of any depth and turned upright: its middle square as (3, 32, 32) uint8."""
    pixels = imread(file)  # (H, W) or (H, W, 3 or 4); torchvision's decode_image can crash on damaged PNGs
    pixels = pixels if pixels.dtype.kind == 'f' else pixels / np.iinfo(pixels.dtype).max
    image = torch.from_numpy(np.atleast_3d(pixels)[..., :3]).permute(2, 0, 1).expand(3, -1, -1)
    orientation = pil_loader(file).getexif().get(0x0112, 1)  # EXIF: 2, 4, 5 and 7 are mirrored, most are turned
    image = image.flip(2) if orientation in (2, 4, 5, 7) else image
    image = image.rot90({3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0), (1, 2))
    return TF.resize(TF.center_crop(image, min(image.shape[1:])), [32, 32]).mul(255).round().byte()


def predict_pictures(files, run, device):
    """Print the class of each picture and its probability, by a run's best weights; unreadable files are named."""
    model = build_model(run.config)
    load_weights(model, run.folder / 'best.pt')
    for file in files:
        try:
            image = read_picture(file).to(device)
        except Exception as error:  # whatever a damaged file makes the decoders raise
            print(f"{file}: not a picture that can be read ({type(error).__name__})")
            continue
        probability, label = predict(model.to(device), image[None])[0].softmax(0).max(0)
        print(f"{file}: {caution([run])}{CLASS_NAMES[run.config.dataset][label]}, {probability:.1%} sure ({run.folder.name})")


def evaluate_weights(options, device):
    """Print the accuracy of --weights on the validation images."""
    check('--model', options.model, tuple(SETTINGS))
    check('--dataset', options.dataset, tuple(CLASS_NAMES))
    saved = load_file(options.weights, "give a file that torch.save(model.state_dict(), FILE) wrote")
    own = saved.get('configuration') if isinstance(saved, dict) else None  # what CIFAR10_train.py keeps; else the slides' network
    model = build_model(Configuration(**own) if own and own['model'] == options.model else Configuration(options.model))
    load_weights(model, options.weights)
    _, data = data_load(options.dataset, options.data_dir, device=device, urls=options.data_url)
    print(f"{options.weights}: {evaluate(model.to(device), data)[1]:.2f} % of the {len(data):,} validation images"
          + (" (synthetic, NOT CIFAR-10)" if options.dataset != 'cifar10' else ""))


def submit(name):
    """Write <name>.zip in the current folder: the whole code and the report. Raises UserError where it exists."""
    check_name('--submit', name)
    root, file = Path(__file__).parent, Path(f'{name}.zip')
    if file.exists():
        raise UserError(f"{file} is there already: move it away, or submit under another name.")
    with zipfile.ZipFile(file, 'x', zipfile.ZIP_DEFLATED) as archive:
        parts = (root.glob(pattern) for pattern in ('*.py', '*.md', '*.txt', 'dataset/*.py', 'tests/*.py'))
        for part in sorted(part for some in parts for part in some):
            archive.write(part, Path(name) / part.relative_to(root))
        archive.write(RESULTS / 'report.html', Path(name) / 'report.html')
    print(f"{file} holds the code and the report.")


def main(arguments=None):
    parser = Parser("Write the plots and the report of the runs in results/, or evaluate weights, or classify pictures.")
    parser.add_argument('--name', help="recompute and draw only this run; with --predict: ask this run, not the best one")
    parser.add_argument('--model', help=f"the setting that --weights belongs to: {', '.join(SETTINGS)}")
    parser.add_argument('--weights', type=Path, metavar='FILE', help="print the accuracy of these weights")
    parser.add_argument('--dataset', default='cifar10', help="images for --weights: cifar10 (default) or synthetic")
    parser.add_argument('--predict', nargs='+', metavar='FILE', help="print the class of each picture")
    parser.add_argument('--submit', metavar='StudentID_Name', help="write StudentID_Name.zip with the code and the report")
    options = parser.parse_args(arguments)
    device = choose_device('auto')
    if options.weights:
        return evaluate_weights(options, device)

    runs = read_runs()
    asked = [run for run in runs if run.folder.name == options.name or not options.name and not is_trial(run)]  # a trial only chose
    trained = [run for run in asked if (run.folder / 'best.pt').exists()]
    if not trained and (options.name or options.predict):
        raise UserError(f"No run {options.name or ''} with weights is in {RESULTS}: train one, or see --help.")
    if options.predict:
        return predict_pictures(options.predict, max(trained, key=lambda run: run.best['val_accuracy']), device)
    for run in asked:
        plot_accuracy([run], run.folder / 'accuracy.png')
    for run in trained:
        try:
            found = examine(run, options.data_dir, device)
            print(f"{run.folder.name}: {found['accuracy']:.2f} % recomputed, {run.best['val_accuracy']:.2f} % recorded.")
        except UserError as error:
            print(f"{run.folder.name} was not recomputed. {error}")
    write_report(runs)
    print(f"The report is {RESULTS / 'report.html'}.")
    if options.submit:
        submit(options.submit)


if __name__ == '__main__':
    run_script(main)

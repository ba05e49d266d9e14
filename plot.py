"""Ledgers, and what they say as tables and pictures; the picture of a search. Pictures need matplotlib."""
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from activation import Activation
from models import STANDARD

# Student's t with 1, 2, 3 ... degrees of freedom has 95 % of its mass in [-t, t].
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')  # for all eyes
STYLES = ('-', '--', '-.', ':')
ROW = {'expression', 'clip', 'curve'}  # what every row of a ledger has, and what tables show

def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line of JSON in one write, so that processes may share the file; never behind a cut line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a+b', buffering=0) as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        line = b'\n' * (file.read() not in (b'\n', b'')) + json.dumps(row).encode() + b'\n'
        if file.write(line) != len(line):
            raise OSError(28, 'the disk is full', str(path))

def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The rows of a ledger. A line that is cut, or is no row, is skipped with a warning; no file: no rows."""
    if path.exists() and not path.is_file():
        raise ValueError(f'{path} is no ledger: give a file')
    rows, content = [], path.read_bytes() if path.exists() else b''
    if content.startswith((b'\xff\xfe', b'\xfe\xff')):
        raise ValueError(f'{path} is a text in UTF-16: save it as UTF-8')
    for k, line in enumerate(content.splitlines(), 1):
        try:
            if line:
                row = json.loads(line)
                report([row]), [row[key] for key in ROW]  # fails where something lacks
                rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            print(f'warning: {path}, line {k} is cut or no row of a ledger; skipped', file=sys.stderr)
    return rows

def compare(values: dict[int, float], reference: dict[int, float]) -> tuple[int, float, float]:
    """How many seeds both have, the mean of their differences, half of its 95 % interval (inf for one)."""
    d = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if len(d) < 2:
        return len(d), d[0] if d else math.nan, math.inf
    k = len(d) - 1
    t = T95[k - 1] if k <= len(T95) else 1.96 + 2.37 / k + 2.9 / k ** 2  # within 0.002
    return len(d), statistics.fmean(d), t * statistics.stdev(d) / math.sqrt(len(d))

def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """The rows by name and seed."""
    names = dict.fromkeys(row['name'] for row in rows)
    return {name: {row['seed']: row for row in rows if row['name'] == name} for name in names}

def table(rows: list[dict[str, Any]], reference: str, metric: str) -> str:
    """The table of comparable rows, the best first, as text that is also Markdown."""
    groups, key = by_name(rows), f'test_{metric}'
    other, sign = ('loss', 1) if metric == 'accuracy' else ('accuracy', -1)  # sign: more is better, or less

    def column(name: str, key: str) -> dict[int, float]:
        return {seed: row[key] for seed, row in groups.get(name, {}).items() if not row['diverged']}
    def spread(name: str, key: str) -> str:
        values = list(column(name, key).values())
        mean = f'{statistics.fmean(values):.4f}' if values else '-'
        return f'{mean} +- {statistics.stdev(values):.4f}' if len(values) > 1 else mean
    def place(name: str) -> float:  # the best first, last where all diverged
        return -sign * statistics.fmean(column(name, key).values() or [-sign * math.inf])

    lines = [['activation', 'seeds', f'test {metric}', f'minus {reference}', '95 % interval', 'wins',
              f'test {other}', 'train loss', 'ms/step', 'diverged']]
    for name in sorted(groups, key=place):
        mine, base, group = column(name, key), column(reference, key), groups[name].values()
        n, mean, half = compare(mine, base)
        wins = sum(sign * (mine[seed] - base[seed]) > 0 for seed in mine.keys() & base.keys())
        interval = f'{mean - half:+.4f} to {mean + half:+.4f}' if n > 1 else '-'
        judged = [f'{mean:+.4f}' if n else '-', interval, f'{wins}/{n}'] if name != reference else 3 * ['']
        lines.append([name, str(len(group)), spread(name, key), *judged, spread(name, f'test_{other}'),
                      spread(name, 'train_loss'), f"{statistics.median(row['ms_step'] for row in group):.0f}",
                      str(sum(row['diverged'] for row in group))])
    widths = [max(map(len, words)) for words in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join('| ' + ' | '.join(map(str.ljust, line, widths)) + ' |' for line in lines)

def report(rows: list[dict[str, Any]]) -> str:
    """A table for every group of rows with the same settings."""
    groups, text = {}, []
    for row in rows:
        groups.setdefault(json.dumps(row['settings'], sort_keys=True), []).append(row)
    for group in groups.values():
        s = group[0]['settings']
        metric = 'loss' if s['data'].startswith('tinystories') else 'accuracy'
        text += [f"{s['model']} on {s['data']}, preset {s['preset']}, {s['steps']} steps of "
                 f"{s['batch_size'] * s['accumulate']}, lr {s['lr']:g}",
                 table(group, STANDARD.get(s['model'], 'own'), metric)]
    return '\n\n'.join(text)

def pyplot() -> Any:
    """matplotlib.pyplot, set up to draw into files."""
    import matplotlib.pyplot as plt  # optional: evaluate.one_line_errors says how to get it
    plt.switch_backend('Agg')
    plt.rcParams.update({'font.size': 12, 'axes.spines.top': False, 'axes.spines.right': False})
    return plt

def card(f: Activation) -> str:
    """What a function is like, and its time for a million elements, forward and backward, beside ReLU."""
    x = ((torch.arange(10001, dtype=torch.float64) - 5000) / 1000).requires_grad_()  # 0 is among them
    y = f(x)
    slope, = torch.autograd.grad(y.sum() + 0 * x.sum(), x)
    p = torch.softmax(-x.square() / 2, 0)
    way = 'rising' if (y.diff() >= 0).all() else 'falling' if (y.diff() <= 0).all() else 'not monotone'
    sample, times = torch.randn(1 << 20, requires_grad=True), ([], [])
    for k in 9 * [0, 1]:  # in turn, so that a busy moment of the machine hits both
        begin = time.perf_counter()
        (f, torch.relu)[k](sample).sum().backward()
        times[k].append(1e3 * (time.perf_counter() - begin))
    mine, relu = map(statistics.median, times)
    return '\n'.join([f'f(x) = {f.formula}', f'expression       {f.expression}',
                      f'on [-5, 5]       {y.min():.4g} to {y.max():.4g}, {way}',
                      f'slope            {slope.min():.4g} to {slope.max():.4g}',
                      f'under N(0, 1)    mean {(p * y).sum():.4g}, second moment {(p * y * y).sum():.4g}',
                      f'a million inputs {mine:.2f} ms, {mine / relu:.1f} x relu'])

def curve(f: Activation) -> tuple[list[float], list[float]]:
    x = torch.linspace(-4, 4, 401)
    with torch.no_grad():
        return x.tolist(), f(x).tolist()

def search(folder: Path) -> Path:
    """Draw search.png of a run from its log: the function over the steps, the losses, the weights."""
    plt, result, found = pyplot(), folder / 'activation.json', None
    try:
        lines = (folder / 'log.jsonl').read_text(encoding='utf-8').splitlines()
        rows = [json.loads(line) for line in lines if line.endswith('}')]  # the last may be cut
        config, steps = rows[0]['config'], [row for row in rows if 'weights' in row]
        standard = Activation(rows[0].get('standard', 'relu(x)'), None)
        if result.exists():
            found = Activation(json.loads(result.read_text(encoding='utf-8'))['expression'], config['clip'])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f'{folder}: log.jsonl or activation.json is not that of a run ({error!r})') from None
    if not steps:
        raise ValueError(f'{folder}/log.jsonl holds no step yet; wait a little')
    title = f"{Path(config['model']).name} on {config['data']}, seed {config['seed']}"
    title += f':  f(x) = {found.formula}' if found else f":  step {steps[-1]['step']} of {config['steps']}"
    figure = plt.figure(figsize=(12, 11), layout='constrained')
    figure.suptitle(title, fontsize=min(15, 1400 / len(title)))
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 2))
    functions, losses = above.subplots(1, 2)

    colours = plt.get_cmap('viridis_r')  # its lightness falls from first to last: it survives print in grey
    for row in steps[::max(1, len(steps) // 14)]:
        x = torch.linspace(-4, 4, len(row['curve']))
        functions.plot(x, row['curve'], color=colours(row['step'] / config['steps']), linewidth=1.5)
    functions.plot(*curve(standard), 'k:', linewidth=1.8, label=f'{standard.formula}, the standard')
    if found:
        functions.plot(*curve(found), 'k--', linewidth=2.2, label='found')
    functions.set(xlabel='x', ylabel='f(x)', ylim=(-2, 4), title='the relaxed function over the search')
    functions.legend(loc='upper left')
    scale = plt.cm.ScalarMappable(plt.Normalize(0, config['steps']), colours)
    above.colorbar(scale, ax=functions, label='step')

    for k, name in enumerate(('train_loss', 'val_loss')):
        points = [(row['step'], row[name]) for row in steps if row[name] is not None] or [(0, math.nan)]
        losses.plot(*zip(*points), label=name.replace('_', ' '), color=COLOURS[k], linestyle=STYLES[k])
    losses.set(xlabel='step', ylabel='squared error' if config['teacher'] else 'nats', title='losses')
    losses.legend()

    choices = steps[0]['weights']
    for axis, choice in zip(below.subplots(math.ceil(len(choices) / 3), 3).flat, choices):
        weights = {name: [(row['step'], row['weights'][choice][name]) for row in steps
                          if name in row['weights'][choice]] for name in choices[choice]}
        order = sorted(weights, key=lambda name: (len(weights[name]), weights[name][-1][1]), reverse=True)
        for rank, name in enumerate(order):
            strong = dict(color=COLOURS[rank % 7], linestyle=STYLES[rank % 4], linewidth=2, label=name)
            look = strong if rank < 5 else dict(color='0.75', linewidth=0.8, zorder=1)
            axis.plot(*zip(*weights[name]), **look)
            if len(weights[name]) < len(steps):  # a cross where it was dropped
                axis.plot(*weights[name][-1], 'x', color=look['color'], markersize=5)
        axis.set(xlabel='step', ylabel='weight', title=choice, yscale='log', ylim=(0.008, 1.4))
        axis.legend(fontsize=11, loc='upper left')
    figure.savefig(folder / 'search.png', dpi=100)
    plt.close(figure)
    return folder / 'search.png'

def comparison(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw the functions of an evaluation, their training curves, and their differences to the reference."""
    plt, groups = pyplot(), by_name([row for row in rows if not row['diverged']])
    model = rows[0]['settings']['model']
    reference = STANDARD.get(model, 'own')
    mean = {name: statistics.fmean(row['test_loss'] for row in groups[name].values()) for name in groups}
    names = sorted(groups, key=lambda name: (name != reference, mean[name]))[:7]  # more cannot be told apart
    figure, (functions, curves, differences) = plt.subplots(1, 3, figsize=(15, 4.6), layout='constrained')
    for k, name in enumerate(names):
        group, look = list(groups[name].values()), dict(color=COLOURS[k], linestyle=STYLES[k % 4])
        if group[0]['expression'] != 'own':
            f = Activation(group[0]['expression'], group[0]['clip'])
            functions.plot(*curve(f), label=f.formula if len(f.formula) < 40 else name[:40], **look)
        columns = zip(*(row['curve'] for row in group))
        points = [(column[0][0], statistics.fmean(loss for _, loss in column)) for column in columns]
        curves.plot(*zip(*points), **look)
        base = groups.get(reference, {})
        d = [row['test_loss'] - base[seed]['test_loss'] for seed, row in groups[name].items() if seed in base]
        differences.plot(d, [k] * len(d), 'o', color=COLOURS[k])
    functions.set(xlabel='x', ylabel='f(x)', ylim=(-2, 4), title='functions')
    if len(functions.lines):
        functions.legend(fontsize=10, loc='upper left')
    curves.set(xlabel='step', ylabel='training loss (nats)', title=f'{model}, mean over seeds')
    differences.axvline(0, color='0.6', linewidth=1)
    differences.set(xlabel=f'test loss minus that of {reference}, a dot a seed', title='left is better')
    differences.set_yticks(range(len(names)), [name[:24] for name in names])
    differences.invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path

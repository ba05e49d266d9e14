"""Pictures, all of them. Only this file knows matplotlib, which is optional: without it one line says what to install.

    draw('runs/toy-teacher-seed0')      search.png and search.gif of a run, also while it is going on
    evaluation(rows, ...)               functions, seeds and curves of a ledger
    text_plot(f, g)                     two functions as text, for the terminal; needs nothing
"""
import json
import math
import statistics
from pathlib import Path
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from activation import Activation, named
from cell import CHOICES
from models_own import standard_of
from ops import select

MISSING = 'none; pip install matplotlib to have them'
# Colours of Okabe and Ito, which the colour-blind can tell apart; line styles and markers for print in grey.
COLOURS = ('#000000', '#E69F00', '#56B4E9', '#009E73', '#0072B2', '#D55E00', '#CC79A7')
STYLES = ('-', '--', ':', '-.')


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


# ---------------------------------------------------------------------------------------------------------------------
# A search.

def history(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], Optional[dict[str, Any]]]:
    """The settings of a run, the steps in its log, and its result if there is one. Raises ValueError, one line.

    A last line that is still being written, or was cut by a kill, is left out.
    """
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        lines = (folder / 'log.jsonl').read_bytes().split(b'\n')
        result = folder / 'activation.json'
        found = json.loads(result.read_text(encoding='utf-8')) if result.exists() else None
    except OSError as error:
        raise ValueError(f'--plot {folder}: there is no run to draw ({Path(error.filename).name}: {error.strerror})') from None
    except ValueError as error:
        raise ValueError(f'--plot {folder}: config.json or activation.json is damaged ({error})') from None
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    rows = [row for row in rows if isinstance(row, dict) and {'step', 'restart', 'alpha', 'curve', 'temperature'} <= row.keys()]
    rows = [row for row in rows if row['restart'] == rows[-1]['restart']]  # of several searches the last
    if len(rows) < 2:
        raise ValueError(f'--plot {folder}: log.jsonl has fewer than two steps so far; try again in a minute')
    return config, rows, found


def weights_of(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """For each choice point: name of the operation -> its mean weight at each row of the log, nan once it is dropped."""
    unary, binary = select(config['ops'])
    weights = []
    for k, choice in enumerate(CHOICES):
        names = [op.name for op in (binary if choice[0] == 'B' else unary)]
        active, series = torch.ones(len(names), dtype=torch.bool), []
        for row in rows:
            for dropped in row['dropped']:
                if dropped.startswith(choice + ':'):
                    active[names.index(dropped.split(':')[1])] = False
            alpha = torch.tensor(row['alpha'][k])
            w = (F.elu(alpha) + 1).clamp(min=1e-2)  # as Cell.weights
            if config['sampler'] == 'softmax':
                w = (alpha.where(active, -math.inf) / row['temperature']).softmax(0)
            series.append(torch.where(active, w / w[active].sum(), math.nan).tolist())
        weights.append(dict(zip(names, map(list, zip(*series)))))
    return weights


def draw(folder: Path) -> str:
    """Write search.png and search.gif into the run folder; one line that says so. Raises ValueError."""
    plt = pyplot()
    if plt is None:
        return MISSING
    config, rows, result = history(folder)
    found = Activation(result['expression'], result['clip']) if result else None
    standard = named(standard_of(config['model']))
    with plt.rc_context({'font.size': 13}):  # so that half the size is still legible
        search_picture(plt, config, rows, found, standard, folder / 'search.png')
        search_film(plt, config, rows, found, standard, folder / 'search.gif')
    return f'{folder}/search.png, {folder}/search.gif'


def values(f: Callable[[Tensor], Tensor], limit: float = 4.0, points: int = 401) -> tuple[list[float], list[float]]:
    with torch.no_grad():
        x = torch.linspace(-limit, limit, points)
        return x.tolist(), f(x).expand(x.shape).tolist()


def window(curves: list[list[float]]) -> tuple[float, float]:
    """A range of y that shows these curves, at most from -4 to 8, so that one steep end does not flatten the rest."""
    low, high = min(map(min, curves)), max(map(max, curves))
    low, high = max(low, -4.0), min(high, 8.0)
    margin = 0.05 * max(high - low, 0.5)
    return low - margin, high + margin


def fitting(text: str, room: int) -> float:
    """The font size at which a title fits, `room`: how many characters of size 15 there is room for."""
    return min(15.0, max(5.0, 15.0 * room / len(text)))


def search_picture(plt: Any, config: dict[str, Any], rows: list[dict[str, Any]], found: Optional[Activation],
                   standard: Activation, path: Path) -> None:
    """The function over the search, the losses, and the weights at the six choice points."""
    steps = [row['step'] for row in rows]
    figure = plt.figure(figsize=(12, 11), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 2))
    formula = found.simplified().formula if found else f"{rows[-1]['operations']} operations left at step {steps[-1]}"
    where = f"{Path(config['model']).name} on {config['data']}, seed {config['seed']}"
    title = f"{where}:  {'f(x) = ' if found else ''}{formula}"
    figure.suptitle(title, fontsize=fitting(title, 95))

    axis, losses = above.subplots(1, 2)
    colours = plt.get_cmap('viridis_r')  # its lightness falls from first to last: it survives print in grey
    shown = rows[::max(1, len(rows) // 14)]
    shown = shown if shown[-1] is rows[-1] else [*shown, rows[-1]]
    x = torch.linspace(-4, 4, len(rows[0]['curve'])).tolist()
    for row in shown:
        axis.plot(x, row['curve'], color=colours(row['step'] / steps[-1]), linewidth=1.5)
    axis.plot(*values(standard), 'k:', linewidth=1.8, label=f'{standard.expression[:-3]}, the standard')
    if found:
        axis.plot(*values(found), 'k--', linewidth=2.2, label='found, f(x)')
    curves = [row['curve'] for row in shown] + [values(f)[1] for f in (standard, found) if f]
    axis.set(xlabel='input x', ylabel='output', ylim=window(curves), title='relaxed function over the search')
    axis.legend(loc='upper left', fontsize=11)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, steps[-1]), colours)
    above.colorbar(scale, ax=axis, label='step')

    axis, lowest, highest = losses, math.inf, 0.0
    for name, style, label in (('train_loss', dict(color='#E69F00', linestyle='-'), 'training batch'),
                               ('val_loss', dict(color='#0072B2', linestyle='--'), 'validation batch')):
        points = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axis.plot(*zip(*points), label=label, linewidth=1.8, **style)
            lowest, highest = min(lowest, *(loss for _, loss in points)), max(highest, *(loss for _, loss in points))
    if highest > 30 * lowest > 0:
        axis.set_yscale('log')
    unit = 'squared error' if config.get('teacher') else 'cross-entropy, nats'
    phases = {name: share * config['steps'] if (share := config[name]) < 1 else share
              for name in ('warmstart', 'shrink_from', 'shrink_until')}
    for label, at in (('warm start ends', phases['warmstart']), ('drops begin', phases['shrink_from']),
                      ('drops end', phases['shrink_until'])):
        if 0 < at <= steps[-1]:
            axis.axvline(at, color='0.6', linewidth=1)
            axis.annotate(label, (at, 0.98), xycoords=('data', 'axes fraction'), rotation=90, va='top', ha='right',
                          fontsize=11, color='0.35')
    axis.set(xlabel='step', ylabel=f'loss ({unit})', title='losses')
    axis.legend(fontsize=11, loc='center right' if axis.get_yscale() == 'linear' else 'lower left')

    for axis, choice, weights in zip(below.subplots(2, 3).flat, CHOICES, weights_of(config, rows)):
        choice_panel(axis, choice, steps, weights)
    figure.savefig(path, dpi=100)
    plt.close(figure)


PLACES = {'U0': 'U0 (x)', 'U1': 'U1 (x)', 'B0': 'B0 (U0, U1)', 'U2': 'U2 (B0)', 'U3': 'U3 (x)',
          'B1': 'B1 (U2, U3), the output'}


def choice_panel(axis: Any, choice: str, steps: list[int], weights: dict[str, list[float]]) -> None:
    """Weights of one choice point: the operations that lasted longest in colour, with their names, the others in grey.
    A cross marks the moment at which an operation was dropped."""
    def lasts(name: str) -> tuple[int, float]:
        alive = [w for w in weights[name] if not math.isnan(w)]
        return len(alive), alive[-1] if alive else 0.0

    order = sorted(weights, key=lasts, reverse=True)
    for rank, name in reversed(list(enumerate(order))):
        points = [(s, w) for s, w in zip(steps, weights[name]) if not math.isnan(w)]
        if not points:
            continue
        top = rank < 5
        look = dict(color=COLOURS[rank] if top else '0.75', linestyle=STYLES[rank % 4] if top else '-',
                    linewidth=2 if top else 0.8)
        axis.plot(*zip(*points), label=name if top else None, **look)
        if len(points) < len(steps):
            axis.plot(*points[-1], 'x', color=look['color'], markersize=6 if top else 3.5)
    axis.set(xlabel='step', ylabel='weight', title=PLACES[choice], ylim=(0.7 / len(weights) / 2, 1.4), yscale='log')
    axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ['0.02', '0.05', '0.1', '0.2', '0.5', '1'])
    axis.minorticks_off()
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=11, loc='upper left', handlelength=1.6, borderpad=0.3,
                labelspacing=0.25)


def search_film(plt: Any, config: dict[str, Any], rows: list[dict[str, Any]], found: Optional[Activation],
                standard: Activation, path: Path) -> None:
    """The relaxed function step by step, at last the one found."""
    from matplotlib.animation import PillowWriter
    frames = rows[::math.ceil(len(rows) / 34)]
    frames = frames if frames[-1] is rows[-1] else [*frames, rows[-1]]
    figure, axis = plt.subplots(figsize=(6, 4.2), layout='constrained')
    x = torch.linspace(-4, 4, len(rows[0]['curve'])).tolist()
    axis.plot(*values(standard), color='0.5', linestyle='--', linewidth=2,
              label=f'{standard.expression[:-3]}, the standard')
    curve, = axis.plot(x, frames[0]['curve'], color='#0072B2', linewidth=3, label='relaxed function')
    axis.set(xlabel='input x', ylabel='output', xlim=(-4, 4),
             ylim=window([row['curve'] for row in frames] + [values(f)[1] for f in (standard, found) if f]))
    legend = axis.legend(loc='upper left', fontsize=12)
    title = axis.set_title(' ')
    figure.draw_without_rendering()
    figure.set_layout_engine('none')  # the layout stays as it is now, which saves most of the time
    writer = PillowWriter(fps=8)
    with writer.saving(figure, path, dpi=80):
        for row in frames:
            curve.set_data(x, row['curve'])
            title.set_text(f"step {row['step']} of {config['steps']}, {row['operations']} operations left")
            writer.grab_frame()
        if found:
            curve.set_data(*values(found))
            curve.set_color('#D55E00')
            legend.get_texts()[1].set_text('found')
            legend.legend_handles[1].set_color('#D55E00')
            title.set_text(text := f'f(x) = {found.simplified().formula}')
            title.set_fontsize(fitting(text, 45))
            for _ in range(16):
                writer.grab_frame()
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The terminal.

def text_plot(found: Activation, standard: Activation, width: int = 60, height: int = 15, limit: float = 4.0) -> str:
    """Both functions for x from -limit to limit in `height` lines of `width` characters: * found, . standard."""
    columns = width - 7  # room for the numbers of the y axis
    curves = [(values(f, limit, columns)[1], mark) for f, mark in ((standard, '.'), (found, '*'))]
    low, high = window([[y if math.isfinite(y) else 0.0 for y in curve] for curve, _ in curves])
    row_of = lambda y: round((high - y) / (high - low) * (height - 2))
    lines = [[' '] * columns for _ in range(height - 1)]
    zero = row_of(0.0)
    if 0 <= zero < height - 1:
        lines[zero] = ['-'] * columns
    for line in lines:
        line[columns // 2] = '|'
    for curve, mark in curves:
        for column, y in enumerate(curve):
            if math.isfinite(y) and 0 <= row_of(y) < height - 1:
                lines[row_of(y)][column] = mark
    numbers = {0: f'{high:.2g}', height - 2: f'{low:.2g}', zero: '0'}
    text = [f'{numbers.get(k, ""):>5} ' + ''.join(line).rstrip() for k, line in enumerate(lines)]
    text.append(f'{"x":>5} {-limit:<{columns // 2}g}0{limit:>{columns - columns // 2 - 1}g}')
    return '\n'.join(text) + f'\n      * found   . {standard.expression[:-3]}'


# ---------------------------------------------------------------------------------------------------------------------
# An evaluation.

def evaluation(rows: list[dict[str, Any]], reference: str, folder: Path) -> str:
    """functions, seeds and curves as PNG and SVG in `folder`; what was done, in one line.

    Of more than ten activations the reference and the nine of lowest mean test loss are drawn: more cannot be told apart.
    """
    plt = pyplot()
    if plt is None:
        return MISSING
    losses: dict[str, list[float]] = {}
    for row in rows:
        losses.setdefault(row['name'], []).append(math.inf if row['diverged'] else row['test_loss'])
    names = sorted(losses, key=lambda name: (name != reference, statistics.fmean(losses[name])))[:10]
    look = {name: dict(color=COLOURS[k % 7], linestyle=STYLES[k % 4], marker='osv^Dx+*<>'[k])
            for k, name in enumerate(names)}
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        for kind in 'png', 'svg':
            figure.savefig(folder / f'{name}.{kind}', dpi=150)
        plt.close(figure)

    x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9))
    for name in names:
        row = next(row for row in rows if row['name'] == name)
        y = Activation(row['expression'], row['clip']).double()(x)
        slope, = torch.autograd.grad(y.sum() + 0 * x.sum(), x)
        for axis, curve in zip(axes, (y.detach(), slope)):
            axis.plot(x.detach(), curve, label=name, **look[name], markevery=80, markersize=4)
    for name in {'relu', 'gelu', 'silu'} - set(names):  # to compare with, also where they were not trained
        y = named(name).double()(x)
        slope, = torch.autograd.grad(y.sum(), x)
        for axis, curve in zip(axes, (y.detach(), slope)):
            axis.plot(x.detach(), curve, color='0.7', linewidth=1, zorder=0)
            axis.annotate(name, (x[-1].item(), curve[-1].item()), color='0.5', fontsize=7)
    for axis, what in zip(axes, ('f(x)', "f'(x)")):
        axis.set(xlabel='x', ylabel=what, ylim=(-3, 4))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc='upper left')
    save(figure, 'functions')

    figure, axis = plt.subplots(figsize=(6.5, 3.9))
    for name in names:
        points = sorted((row['seed'], row['test_loss']) for row in rows if row['name'] == name and not row['diverged'])
        axis.plot(*zip(*points) if points else ([], []), label=name, **look[name], markersize=5)
    axis.set(xlabel='seed', ylabel='test loss (nats)')
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=9)
    save(figure, 'seeds')

    figure, axis = plt.subplots(figsize=(6.5, 3.9))
    for name in names:
        curves = [row['curve'] for row in rows if row['name'] == name and not row['diverged']]
        means = [(points[0][0], statistics.fmean(p[1] for p in points)) for points in zip(*curves)]
        axis.plot(*zip(*means) if means else ([], []), label=name, **look[name], markersize=4, markevery=4)
    axis.set(xlabel='step', ylabel='training loss, mean over seeds (nats)')
    axis.legend(fontsize=9)
    save(figure, 'curves')
    return f'figures: {folder}/functions, seeds, curves (.png and .svg), {reference} is the reference'

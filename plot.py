"""What is kept and shown: run folders, ledgers, tables, pictures (with matplotlib), errors in one line."""
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, Optional

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from activation import Activation, distance, formula, named
from models import STANDARD

# Student's t with 1, 2, 3 ... degrees of freedom has 95 % of its mass in [-t, t].
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')  # for all eyes
LOOKS = [dict(color=color, linestyle=style) for color, style in zip(COLOURS, 2 * ('-', '--', '-.', ':'))]
LOG = 'log.jsonl'
FILES = ('activation.json', 'found.py', LOG, 'checkpoint.pt', 'search.png')  # what a run folder holds
X = torch.linspace(-4, 4, 81)  # where the log of a search has the curve of its cell

# ---- errors and ledgers ----

@contextlib.contextmanager
def one_line_errors(hint: Callable[[], str]) -> Iterator[None]:
    """Around a whole program. A user's mistake (ValueError, OSError) is one line and exit code 2, Ctrl-C 130.
    A mistake of ours keeps its traceback. hint: how to go on."""
    try:
        yield
        return sys.stdout.flush()  # subtle: a pipe that was closed shows here, not after the last handler
    except KeyboardInterrupt:
        line, code = f'stopped; {hint()}', 130
    except (ValueError, OSError, ModuleNotFoundError, MemoryError, RuntimeError) as error:
        line, code = f'error: {error}', 2
        if isinstance(error, OSError):
            line = f"error: {error.filename or 'output'}: {error.strerror or error}; {hint()}"
        elif getattr(error, 'name', None) in ('matplotlib', 'scipy', 'tiktoken', 'torchvision'):
            line = f'error: this needs {error.name}: pip install {error.name}'
        elif isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            line = 'error: out of memory; try a smaller --batch-size'
        elif isinstance(error, RuntimeError) and re.search('compiler|Triton', str(error)):
            line = 'error: --compile finds no compiler here; leave it out'
        elif not isinstance(error, ValueError):
            raise
        if isinstance(error, BrokenPipeError):  # nothing may be written at exit either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(' '.join(line.split())[:600], file=sys.stderr)
    sys.exit(code)

def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line of JSON in one write: processes may share the file. After a cut line it begins a new one."""
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
                report([row]), row['expression'], row['clip'], row['curve']  # fails where something lacks
                rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            print(f'warning: {path}, line {k} is cut or no row of a ledger; skipped', file=sys.stderr)
    return rows

# ---- the run folder ----

class Everything:
    """Weights and all buffers of a network, also those that its own state_dict leaves out, and that grow."""
    def __init__(self, model: nn.Module):
        self.model = model
        own = {}  # a buffer made by expand() has no memory of its own; one of two modules stays one
        for module in model.modules():
            for name, b in list(module._buffers.items()):
                if b is not None:
                    module._buffers[name] = own.setdefault(id(b), b.clone())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return itertools.chain(self.model.named_parameters(), self.model.named_buffers())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors():
            if name in state and tensor.shape == state[name].shape:
                tensor.copy_(state[name])  # others may share its memory
            elif name in state:
                tensor.data = state[name].to(tensor.device, copy=True)

def numpy_state() -> list:
    """As plain numbers: the checkpoint holds no pickled classes."""
    return [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]

GENERATORS = (  # of random numbers: how their state is read, and restored
    (random.getstate, random.setstate), (torch.get_rng_state, torch.set_rng_state),
    (lambda: [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of the device in use
     lambda states: [torch.cuda.set_rng_state(state) for state in states[:torch.cuda.is_available()]]),
    (numpy_state, lambda state: np.random.set_state(tuple(state))))

class Run:
    """Log, checkpoint and progress line of a search; without a folder nothing is kept.
    log.jsonl: the settings, then lines each 1 % of the steps, for drops, skipped steps, and functions tried.
    checkpoint.pt: everything needed to go on exactly, replaced every minute. resumed: its content."""
    def __init__(self, config: Any, folder: Optional[Path] = None, resumed: Optional[dict] = None):
        self.config, self.folder, self.resumed = config, folder, resumed
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LOG).touch()
        new = dict(step=0, skipped=0, results={}, seconds=0.0, log_size=0)
        self.state, self.saved = resumed['state'] if resumed else new, time.monotonic()
        self.started = self.saved - self.state['seconds']

    def hold(self, **parts: Any) -> None:
        """Keep the state of these in the checkpoint; in a run that goes on, restore it."""
        self.parts = parts
        if self.resumed:
            for name, part in parts.items():
                part.load_state_dict(self.resumed['parts'][name])
            for (_, restore), state in zip(GENERATORS, self.resumed['random']):
                restore(state)
        else:
            self.save()
        if not self.state['log_size']:
            standard = parts['cell'].standard.expression
            self.log({'config': dataclasses.asdict(self.config), 'standard': standard})

    def save(self) -> None:
        if self.folder:
            self.saved, content = time.monotonic(), io.BytesIO()
            size = (self.folder / LOG).stat().st_size
            self.state.update(seconds=self.saved - self.started, log_size=size)
            torch.save({'parts': {name: part.state_dict() for name, part in self.parts.items()},
                        'state': self.state, 'config': dataclasses.asdict(self.config),
                        'random': [state() for state, _ in GENERATORS]}, content)
            write_whole(self.folder / 'checkpoint.pt', content.getbuffer())

    def log(self, row: dict[str, Any], line: str = '', last: bool = True) -> None:
        """A row of log.jsonl, and a line of progress; on a terminal it is rewritten until the last."""
        if self.folder:
            append(self.folder / LOG, row)
            if line and sys.stdout.isatty():
                line = '\r\x1b[K' + line[:os.get_terminal_size().columns - 1]
                print(line, end='\n' * last, flush=True)
            elif line:
                print(line, flush=True)

    def after(self, step: int, train_loss: Tensor, val_loss: Optional[Tensor], dropped: list[str],
              trouble: Optional[dict[str, Any]]) -> None:
        """Log, progress and checkpoint after a step. Raises ValueError after 20 skipped steps in a row."""
        state, config, ended = self.state, self.config, step == self.config.steps
        state.update(step=step, skipped=state['skipped'] + 1 if trouble else 0)
        if dropped or trouble:
            self.log({'step': step, 'dropped': dropped} | (trouble or {}))
        if state['skipped'] == 20:
            advice = 'a smaller --lr or --clip, or --normalise scale' if config.clip else '--clip 10'
            raise ValueError(f"20 steps in a row were not finite, last at site {trouble['site']}, operation "
                             f"{trouble['op']}; try {advice}")
        if self.folder and (ended or step % max(1, config.steps // 100) == 0):  # here losses leave the device
            cell, minutes = self.parts['cell'], (time.monotonic() - self.started) / 60
            losses = [v if v is None else v.item() * config.accumulate for v in (train_loss, val_loss)]
            curve = cell.curve(X.to(cell.grid))
            row = {'step': step, 'train_loss': losses[0], 'val_loss': losses[1],
                   'curve': [round(v, 4) for v in curve.tolist()], 'weights': cell.named_weights()}
            shown = ' '.join(f'{v:.3f}' for v in losses if v is not None)
            line = (f'step {step}/{config.steps} {100 * step // config.steps:3d}% | train, val {shown} | '
                    f'{cell.operations()} ops left | {formula(cell.tree(), config.clip)} | '
                    f'{minutes * (config.steps / step - 1):.1f} min of the descent left')
            self.log(row, line, last=ended)
        if ended or time.monotonic() - self.saved > 60:
            self.save()

    def finish(self, found: Activation, validation: dict[str, float]) -> None:
        """Write found.py and activation.json; print what was found and what to run next."""
        config, folder, f = self.config, self.folder, found.shortened(self.config.ops)
        seconds = round(time.monotonic() - self.started, 1)
        versions = {'python': sys.version, 'torch': torch.__version__, 'threads': torch.get_num_threads()}
        result = dict(expression=f.expression, formula=f.formula, scalars=[s.item() for s in f.scalars],
                      model=config.model, data=config.data, seed=config.seed, validation=validation,
                      seconds=seconds, versions=versions, config=dataclasses.asdict(config))
        print(f'\n    f(x) = {f.formula}\n')
        if config.teacher:
            result['distance'] = distance(f.double(), named(config.teacher))
            print(f"planted:     {named(config.teacher).formula}, {100 * result['distance']:.2f} % away")
        note = f'Found by search.py: {config.model} on {config.data}, seed {config.seed}.'
        write_whole(folder / 'found.py', f.float().module(note).encode())
        write_whole(folder / 'activation.json', json.dumps(result, indent=1).encode())
        place = str(folder) if folder.parts[1:] else f'./{folder}'  # a name alone may be that of a function
        command = ['python', os.path.join(os.path.dirname(sys.argv[0]), 'evaluate.py'), place]
        names = ['model', 'preset', 'data', 'data_dir', 'only']
        names += ['tokens', 'context'] if config.data.startswith('tinystories') else ['side']
        usual = ('', 'quick', 'teacher') + ('0', 'bytes') * (config.preset == 'quick')
        for name in names:
            if (value := str(getattr(config, name))) not in usual:
                command += ['--' + name.replace('_', '-'), value]
        join = subprocess.list2cmdline if os.name == 'nt' else shlex.join
        scores = ', '.join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in validation.items())
        print(f'validation:  {scores}\ntime:        {seconds / 60:.1f} minutes\n'
              f'files:       {folder}/{", ".join(FILES[:4])}\nnext:        {join(command)}', flush=True)

def open_log(path: Path, checkpoint: Optional[dict]) -> BinaryIO:
    """The log of a run as far as its checkpoint knows it: what came later is done again. Keeps other
    processes out until this one ends, however it ends (not on Windows)."""
    log, size = open(path, 'ab'), checkpoint['state']['log_size'] if checkpoint else 0
    try:
        import fcntl
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        log.close()
        raise ValueError(f'{path}: another process is there; choose another --out') from None
    if log.tell() < size:
        print(f'note: {path} has been cut, rows are lost', file=sys.stderr)
        checkpoint['state']['log_size'] = size = 0
    log.truncate(size)
    return log

def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it, down to the disk, then in its place."""
    with open(f'{path}.tmp', 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f'{path}.tmp', path)

# ---- tables ----

def compare(values: dict[int, float], reference: dict[int, float]) -> tuple[int, float, float]:
    """How many seeds both have, the mean of their differences, half of its 95 % interval (inf for one)."""
    d = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if len(d) < 2:
        return len(d), d[0] if d else math.nan, math.inf
    k = len(d) - 1
    t = T95[k - 1] if k <= len(T95) else 1.96 + 2.37 / k + 2.9 / k ** 2  # within 0.002
    return len(d), statistics.fmean(d), t * statistics.stdev(d) / math.sqrt(len(d))

def column(rows: list[dict[str, Any]], name: str, key: str) -> dict[int, Any]:
    """By seed what the runs of that name hold under `key`, without those that diverged."""
    return {row['seed']: row[key] for row in rows if row['name'] == name and not row['diverged']}

def table(rows: list[dict[str, Any]], reference: str, metric: str) -> str:
    """The table of comparable rows, the best first, as text that is also Markdown."""
    key, base = f'test_{metric}', column(rows, reference, f'test_{metric}')
    other, sign = ('loss', 1) if metric == 'accuracy' else ('accuracy', -1)  # sign: more is better, or less
    def place(name: str) -> float:  # the best first, last where all diverged
        return -sign * statistics.fmean(column(rows, name, key).values() or [-sign * math.inf])
    def spread(name: str, key: str) -> str:
        values = list(column(rows, name, key).values())
        mean = f'{statistics.fmean(values):.4f}' if values else '-'
        return f'{mean} +- {statistics.stdev(values):.4f}' if len(values) > 1 else mean

    lines = [['activation', 'seeds', f'test {metric}', f'minus {reference}', '95 % interval', 'wins',
              f'test {other}', 'train loss', 'ms/step', 'diverged']]
    for name in sorted(dict.fromkeys(row['name'] for row in rows), key=place):
        mine, speeds = column(rows, name, key), {r['seed']: r['ms_step'] for r in rows if r['name'] == name}
        n, mean, half = compare(mine, base)
        wins = sum(sign * (mine[seed] - base[seed]) > 0 for seed in mine.keys() & base.keys())
        interval = f'{mean - half:+.4f} to {mean + half:+.4f}' if n > 1 else '-'
        judged = [f'{mean:+.4f}' if n else '-', interval, f'{wins}/{n}'] if name != reference else 3 * ['']
        lines.append([name, str(len(speeds)), spread(name, key), *judged, spread(name, f'test_{other}'),
                      spread(name, 'train_loss'), f'{statistics.median(speeds.values()):.0f}',
                      str(len(speeds) - len(mine))])
    widths = [max(map(len, words)) for words in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join('| ' + ' | '.join(map(str.ljust, line, widths)) + ' |' for line in lines)

def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; where functions share a name, as after a run folder was made anew, their names get expression
    and clip as well."""
    functions = {(row['name'], row['expression'], row['clip']) for row in rows}
    shared = [name for name, *_ in functions]
    return [row if shared.count(row['name']) == 1 else
            row | {'name': f"{row['name']} = {row['expression']}, clip {row['clip']}"} for row in rows]

def report(rows: list[dict[str, Any]]) -> str:
    """A table for every group of rows with the same settings."""
    groups, text = {}, []
    for row in distinct(rows):
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
    import matplotlib.pyplot as plt  # optional: one_line_errors says how to get it
    plt.switch_backend('Agg')
    plt.rcParams['font.size'] = 12
    return plt

def card(f: Activation) -> str:
    """Shape and running cost of a function: forward and backward on a million elements, beside ReLU."""
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

def picture(folder: Path) -> Path:
    """Draw search.png of a run from its log: the function over the steps, the losses, the weights."""
    plt, result = pyplot(), folder / 'activation.json'
    try:
        lines = (folder / LOG).read_text(encoding='utf-8').splitlines()
        first, *rows = [json.loads(line) for line in lines if line.endswith('}')]  # the last may be cut
        config, rows = first['config'], [row for row in rows if 'weights' in row]
        steps, choices = [row['step'] for row in rows], rows[0]['weights']
        known = [('k:', Activation(first['standard'], None))]
        if result.exists():
            known.append(('k--', Activation(json.loads(result.read_bytes())['expression'], config['clip'])))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f'{folder}: log.jsonl is not of a run, or has no step yet ({error!r})') from None
    figure = plt.figure(figsize=(12, 11), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 2))
    functions, losses = above.subplots(1, 2)
    for row in rows[::max(1, len(rows) // 14)]:
        functions.plot(X, row['curve'], color=plt.cm.viridis_r(row['step'] / config['steps']))
    for look, f in known:
        functions.plot(X, f(X).detach(), look, linewidth=2, label=f.formula)
    title = f"{Path(config['model']).name} on {config['data']}: the relaxed function, from light to dark"
    functions.set(xlabel='x', ylim=(-2, 4), title=title)
    functions.legend(loc='upper left', title='dotted: standard, dashed: found')
    for name, look in zip(('train_loss', 'val_loss'), LOOKS):
        losses.plot(steps, [row[name] for row in rows], label=name, **look)
    losses.set(xlabel='step', title='losses')
    losses.legend()
    for axis, choice in zip(below.subplots(math.ceil(len(choices) / 3), 3).flat, choices):
        shares = {name: [row['weights'][choice].get(name, 0) for row in rows] for name in choices[choice]}
        order = sorted(shares, key=lambda name: shares[name][::-1], reverse=True)  # the last to be dropped
        colours = [*COLOURS[:5], *['0.85'] * len(order)]
        axis.stackplot(steps, [shares[name] for name in order], labels=order[:5], colors=colours)
        axis.set(xlabel='step', title=f'weights at {choice}')
        axis.legend(loc='upper left')
    figure.savefig(folder / 'search.png', dpi=100)
    return folder / 'search.png'

def comparison(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw the functions of an evaluation, their training curves, and their differences to the reference: the
    reference, what was given first, and the five best others, by loss. Of several evaluations: the first."""
    settings = rows[0]['settings']
    rows = [row for row in distinct(rows) if row['settings'] == settings and not row['diverged']]
    reference = STANDARD.get(settings['model'], 'own')
    losses = {name: column(rows, name, 'test_loss') for name in dict.fromkeys(row['name'] for row in rows)}
    best = sorted(losses, key=lambda name: statistics.fmean(losses[name].values()))
    names = [name for name in dict.fromkeys([reference, *[*losses][:2], *best]) if name in losses][:7]
    figure, axes = pyplot().subplots(1, 3, figsize=(15, 4.6), layout='constrained')
    for k, (name, look) in enumerate(zip(names, LOOKS)):
        group = [row for row in rows if row['name'] == name]
        if group[0]['expression'] != 'own':
            axes[0].plot(X, Activation(group[0]['expression'], group[0]['clip'])(X).detach(), **look)
        axes[1].plot(*torch.tensor([row['curve'] for row in group]).mean(0).T, **look)
        base = losses.get(reference, {})
        d = [loss - base[seed] for seed, loss in losses[name].items() if seed in base]
        axes[2].plot(d, [-k] * len(d), marker='o', **look)
    axes[0].set(xlabel='x', ylim=(-2, 4), title='functions')
    axes[1].set(xlabel='step', title=f"training loss of {settings['model']}, mean over seeds")
    axes[2].set(title=f'test loss minus that of {reference}, a dot a seed')
    axes[2].set_yticks([-k for k in range(len(names))], [name[:24] for name in names])
    figure.savefig(path, dpi=100)
    return path

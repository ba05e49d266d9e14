"""Is an activation any good? `python evaluate.py runs/minigpt-tinystories_sample-seed0 --model minigpt --seeds 5`.

Every activation is trained from scratch under the same settings; for a seed all of them get the same initial weights
and the same batches, so that differences are paired. The last step counts, never the best one, and the test set is
touched once a run. Each finished run is one line in a ledger, so that an evaluation goes on where it was stopped, and
ledgers of several machines are joined by `cat` and read by `--report`.
"""
import dataclasses
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import torch
import torch.nn as nn

import data
import figures
from activation import NAMED, Activation, gallery, named
from cell import random_expression
from models import STANDARD
from models_own import network, standard_of
from ops import valid
from table import Tabulated
from training import (Parser, Training, bytes_kept, check_memory, configure, cross_entropy, json_line, learning_rate,
                      memory_needed, one_line_errors, option, options, parse_json, read_json, weight_optimizer,
                      write_line)


@dataclass
class Config(Training):
    """The options of a retraining."""
    out: str = option('results.jsonl', 'ledger: one line a finished run; a run that is there is not repeated')
    freeze: bool = option(False, 'keep the learned scalars of a function as they are; else they are trained on')
    table: bool = option(False, 'look the activation up in a table instead of computing it op by op')

    def check(self) -> None:
        super().check()
        valid('--data', self.data, data.DATA)


# laptop: about a minute a run on two cores, built-in data. paper: the retraining of the paper's appendix, in steps;
# its TrivialAugment for vit_tiny is left out: crops and mirrors here.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    'laptop': {
        'resnet20': dict(data='cifar10_16', steps=800, batch_size=64, optimizer='sgd', lr=0.1, lr_end=0.0, warmup=0.05,
                         weight_decay=5e-4),
        'vit_tiny': dict(data='cifar10_16', steps=300, batch_size=16, lr=5e-4, lr_end=0.0, warmup=0.1, weight_decay=0.05),
        # lr: the best of 1, 2, 3 and 4 e-3 for GELU by a margin (at 1e-3 the loss hardly leaves the plateau at 2.1)
        'minigpt': dict(data='tinystories_sample', steps=400, batch_size=8, context=64, lr=3e-3, lr_end=0.1, warmup=0.1,
                        weight_decay=0.1),
        'toy': dict(data='cifar10_16', steps=2000, batch_size=64, lr=1e-3, lr_end=0.1),
    },
    'paper': {
        'resnet20': dict(data='cifar10', steps=78_000, batch_size=128, optimizer='sgd', lr=0.1, weight_decay=1e-4,
                         drops='0.5,0.75', grad_clip=0.0),
        'vit_tiny': dict(data='cifar10', steps=48_500, batch_size=512, lr=1e-3, lr_end=0.0, weight_decay=0.0, grad_clip=0.0),
        'minigpt': dict(data='tinystories', steps=10_000, batch_size=64, accumulate=10, context=256, tokens='gpt2', lr=1e-3,
                        lr_end=0.1, warmup=100, weight_decay=0.1, dropout=0.2),
        'toy': dict(data='cifar10', steps=20_000, batch_size=128, lr=1e-3, lr_end=0.1),
    },
}
BASELINES = {'image': 'relu,leaky_relu,elu,silu,gelu', 'text': 'relu,leaky_relu,elu,silu,gelu,relu2'}


# ---------------------------------------------------------------------------------------------------------------------
# Which activations.

class Candidate(NamedTuple):
    """name: as in the table. searched: 'model/data' of the search that found it, or ''."""
    name: str
    activation: Activation
    searched: str = ''


def resolve(text: str) -> Candidate:
    """A run folder, a path to activation.json, a known name or one of the gallery, random_0, random_1 ..., an expression.

    Raises ValueError, one line, for what is none of these.
    """
    path = Path(text)
    # a text of over 1,000 characters is no path, and some systems balk at it
    if text.strip() and text not in NAMED and len(text) < 1000 and (path.is_dir() or path.suffix == '.json' or '/' in text):
        return from_file(path if path.suffix == '.json' else path / 'activation.json')
    if match := re.fullmatch(r'random_(\d{1,9})', text):
        return Candidate(text, Activation(random_expression(torch.Generator().manual_seed(int(match[1])))))
    activation, name = named(text), text.replace(' ', '')
    entry = gallery().get(name) if name not in NAMED and re.fullmatch(r'[\w-]+', name) else None
    return Candidate(name, activation, f'{entry.model}/{entry.data}' if entry else '')


def from_file(path: Path) -> Candidate:
    """The activation that a search wrote."""
    try:
        content = read_json(path)
        expression, clip = content['expression'], content['clip']
        if not isinstance(expression, str) or not (clip is None or isinstance(clip, (int, float)) and 0 < clip < 1e12):
            raise TypeError('expression must be a text, clip a number above 0 or null')
        name = path.resolve().parent.name if path.name == 'activation.json' else path.stem
        return Candidate(name, Activation(expression, clip), f"{content.get('model', '?')}/{content.get('data', '?')}")
    except OSError as error:
        raise ValueError(f'cannot read {path}: {error.strerror}; a finished search leaves it in its run folder') from None
    except (ValueError, KeyError, TypeError) as error:
        what = f'it lacks {error}' if isinstance(error, KeyError) else str(error).split('\n')[0]
        raise ValueError(f'{path} is not an activation.json of a search: {what}') from None


# ---------------------------------------------------------------------------------------------------------------------
# One run.

def retrain(candidate: Candidate, config: Config, dataset: data.Dataset, seed: int) -> dict[str, Any]:
    """Train the network from scratch with this activation; the row of the ledger."""
    torch.manual_seed(seed)
    cuda = config.device.startswith('cuda')
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    activation = Activation(candidate.activation.expression, candidate.activation.clip)
    activation.requires_grad_(not config.freeze)
    module = Tabulated(activation) if config.table else activation
    # One module in all sites: the result is one function, its scalars too. It draws no random numbers, so the weights
    # that follow are the same for all activations of a seed.
    model = network(config, lambda: module, dataset).to(config.device)
    batches = data.Batches(dataset, data.whole(dataset), config.batch_size, seed, augment=True, context=config.context,
                           device=config.device)
    check_memory(memory_needed(model, batches, cross_entropy, config), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = weight_optimizer(parameters, config)
    started, paces, curve, diverged = time.monotonic(), [], [], False
    mark, total, kept = started, torch.zeros((), device=config.device), 0
    every = max(1, config.steps // 20)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, config)
        for _ in range(config.accumulate):
            x, y = next(batches)
            if step == 0:
                kept, loss = bytes_kept(lambda: cross_entropy(model(x), y), model.parameters())
            else:
                loss = cross_entropy(model(x), y)
            (loss / config.accumulate).backward()
            total += loss.detach() / config.accumulate
        if config.grad_clip:
            nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            # The only place where a value leaves the device. The curve is the mean over the steps in between.
            mean, now = total.item() / every, time.monotonic()
            paces.append((now - mark) / every)
            mark, total = now, torch.zeros_like(total)
            if not math.isfinite(mean):
                diverged = True
                break
            curve.append([step + 1, round(mean, 5)])
    metrics = dict(test_loss=math.inf, test_accuracy=0.0) if diverged else test(model, dataset, config)
    # A network that knows nothing scores log(classes): a loss ten times as high is no result either, though finite.
    diverged = diverged or not metrics['test_loss'] <= 10 * math.log(dataset.classes)
    return {'name': candidate.name, 'expression': candidate.activation.expression, 'clip': candidate.activation.clip,
            'searched': candidate.searched, 'seed': seed, 'settings': settings(config),
            **{key: None if not math.isfinite(value) else value for key, value in metrics.items()},
            'train_loss': curve[-1][1] if curve and not diverged else None, 'diverged': diverged,
            'learned': [round(s.item(), 6) for s in activation.scalars], 'curve': curve,
            'seconds': round(time.monotonic() - started, 1), 'ms_step': round(1e3 * statistics.median(paces or [0]), 2),
            'mb_kept': round(kept / 1e6, 2),
            'mb_peak': round(torch.cuda.max_memory_allocated() / 1e6, 2) if cuda else None,
            'python': sys.version.split()[0], 'torch': torch.__version__, 'device': device_name(config.device),
            'threads': torch.get_num_threads()}


@torch.no_grad()
def test(model: nn.Module, dataset: data.Dataset, config: Config) -> dict[str, float]:
    model.eval()
    losses, hits, count = 0.0, 0.0, 0
    for x, y in data.test_batches(dataset, config.batch_size, config.context, config.device):
        output = model(x)
        losses += cross_entropy(output, y).item() * y.numel()
        hits += (output.argmax(-1) == y).sum().item()
        count += y.numel()
    return {'test_loss': losses / count, 'test_accuracy': hits / count}


def settings(config: Config) -> dict[str, Any]:
    """What makes two runs comparable: everything but where files lie and which machine it is."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in ('data_dir', 'out', 'device')}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith('cuda') else device


# ---------------------------------------------------------------------------------------------------------------------
# The ledger.

def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The rows of a ledger. A line that is cut or no row is skipped with a warning; no ledger is an empty one."""
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_bytes().split(b'\n')
    except OSError as error:
        raise ValueError(f'cannot read {path}: {error.strerror}') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            fits(row, ROW)
            fits(row['settings'], SETTINGS)
            fits(row, {key: None if row['diverged'] else float for key in ('test_loss', 'test_accuracy', 'train_loss')})
            rows.append(row)
        except (ValueError, KeyError):
            print(f'warning: {path}, line {number} is cut or no row of a ledger; skipped', file=sys.stderr)
    return rows


# What the tables read of a row; None: anything.
ROW = dict(name=str, expression=str, clip=None, searched=str, seed=int, settings=dict, diverged=bool, curve=list,
           ms_step=float, mb_kept=float)
SETTINGS = dict(model=str, data=str, steps=int, batch_size=int, accumulate=int, lr=float)


def fits(content: dict[str, Any], kinds: dict[str, Optional[type]]) -> None:
    """Raise KeyError or ValueError where `content` lacks a key or holds another kind of value there."""
    for key, kind in kinds.items():
        value = content[key]
        right = kind is None or isinstance(value, (int, float) if kind is float else kind)
        if not right or isinstance(value, bool) != (kind is bool) or isinstance(value, str) and not value.isprintable():
            raise ValueError(key)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line, in one write, so that several processes may share a ledger. An empty row only tries whether that
    will be possible, which is better known before an hour of training."""
    line = json_line(row) if row else b''
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, 'a+b', buffering=0) as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b'\n':
                line = b'\n' + line  # a kill cut the last line; do not write on behind it
            write_line(file, line, path)
        if new and not row:
            path.unlink()
    except OSError as error:
        raise ValueError(f'cannot write {path}: {error.strerror}; choose another ledger with --out') from None


def identity(row: dict[str, Any]) -> str:
    """Two rows with the same identity are the same run."""
    return json.dumps([row[key] for key in ('name', 'expression', 'clip', 'seed', 'settings')], sort_keys=True)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics.

def t_quantile(freedom: int, share: float = 0.95) -> float:
    """t such that Student's distribution with `freedom` degrees has `share` of its mass in [-t, t].

    The mass has a closed form for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4); its inverse by bisection.

    >>> round(t_quantile(4), 3)
    2.776
    """
    def mass(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        odd = freedom % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for k in range(1 + odd, freedom, 2):  # cos^(k-1) with the ratios 1/2, 3/4 ... or 2/3, 4/5 ...
            total += term
            term *= math.cos(angle) ** 2 * k / (k + 1)
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < share else (low, middle)
    return high


class Comparison(NamedTuple):
    """Paired differences to the reference: over n seeds, mean, half the width of the 95 % interval, seeds won."""
    n: int
    mean: float
    half: float
    wins: int


def compare(values: dict[int, float], reference: dict[int, float], higher: bool) -> Comparison:
    """values, reference: metric by seed; only seeds that both have count. higher: whether more is better."""
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    n = len(differences)
    wins = sum(d > 0 if higher else d < 0 for d in differences)
    mean = statistics.fmean(differences) if n else math.nan
    half = t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return Comparison(n, mean, half, wins)


def verdict(c: Comparison, higher: bool, diverged: int, reference_diverged: int) -> str:
    if diverged > reference_diverged:
        return f'worse: {diverged} diverged'
    if diverged < reference_diverged:
        return 'better: the reference diverged more often'
    if c.n < 2 or abs(c.mean) <= c.half:
        return f"cannot tell with {c.n} seed{'s' * (c.n != 1)}" if c.mean != 0 or c.half else 'the same'
    return 'better' if (c.mean > 0) == higher else 'worse'


def table(rows: list[dict[str, Any]], against: str, metric: str) -> str:
    """The table of one group of comparable rows, the best first, as text that is also Markdown."""
    higher, key = metric == 'accuracy', f'test_{metric}'
    groups: dict[str, list[dict[str, Any]]] = {}
    functions: dict[str, list[Any]] = {}
    for row in rows:  # a joined ledger may call two functions by one name: the second is told apart by its expression
        function = [row['expression'], row['clip']]
        same = functions.setdefault(row['name'], function) == function
        groups.setdefault(row['name'] if same else f"{row['name']} = {row['expression']}", []).append(row)
    place = f"{rows[0]['settings']['model']}/{rows[0]['settings']['data']}"

    def finite(group: list[dict[str, Any]], field: str) -> list[float]:
        return [row[field] for row in group if not row['diverged']]

    def spread(values: list[float]) -> str:
        if not values:
            return '-'
        return f'{statistics.fmean(values):.4f}' + (f' +- {statistics.stdev(values):.4f}' if len(values) > 1 else '')

    reference = groups.get(against, [])
    by_seed = {row['seed']: row[key] for row in reference if not row['diverged']}
    worst = -math.inf if higher else math.inf
    order = sorted(groups, key=lambda name: statistics.fmean(finite(groups[name], key) or [worst]), reverse=higher)
    memory = 'mb_peak' if all(row.get('mb_peak') for row in rows) else 'mb_kept'  # a CPU does not count its peak
    lines = [['activation', 'seeds', f'test {metric}', f'minus {against}', '95 % interval', 'wins', 'verdict', 'test loss' if
              higher else 'test accuracy', 'train loss', 'ms/step', memory.replace('mb_', 'MB '), 'diverged']]
    for name in order:
        group = groups[name]
        c = compare({row['seed']: row[key] for row in group if not row['diverged']}, by_seed, higher)
        diverged = sum(row['diverged'] for row in group)
        judged = [f'{c.mean:+.4f}' if c.n else '-', f'{c.mean - c.half:+.4f} to {c.mean + c.half:+.4f}' if c.n > 1 else '-',
                  f'{c.wins}/{c.n}', verdict(c, higher, diverged, sum(row['diverged'] for row in reference))]
        if name == against:
            judged = ['', '', '', 'the reference']
        origin = next((row['searched'] for row in group if row.get('searched')), '')
        label = name + (f' (found on {origin})' if origin and origin != place else '')
        lines.append([label, str(len(group)), spread(finite(group, key)), *judged,
                      spread(finite(group, 'test_loss' if higher else 'test_accuracy')), spread(finite(group, 'train_loss')),
                      f"{statistics.median(row['ms_step'] for row in group):.0f}",
                      f"{statistics.median(row[memory] for row in group):.1f}", str(diverged)])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(line, widths)) + ' |' for line in lines)


def report(rows: list[dict[str, Any]], against: Optional[str], metric: Optional[str]) -> str:
    """One table for each group of rows with the same settings."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:  # a run that two ledgers share counts once
        groups.setdefault(json.dumps(row['settings'], sort_keys=True), {}).setdefault(identity(row), row)
    text = []
    for group in groups.values():
        runs = list(group.values())
        s = runs[0]['settings']
        model = s['model']
        devices = ', '.join(sorted({f"{row.get('device')}, {row.get('threads')} threads" for row in runs}))
        text.append(f"{model} on {s['data']}, {s['steps']} steps of {s['batch_size'] * s['accumulate']}, lr {s['lr']:g}"
                    f"{', scalars frozen' if s.get('freeze') else ''}{', by table' if s.get('table') else ''}; "
                    f"{len(runs)} runs on {devices}\n\n"
                    + table(runs, against or STANDARD.get(model, 'relu'), metric or ('loss' if s['data'].startswith('tinystories') else 'accuracy')))
    return '\n\n'.join(text)


# ---------------------------------------------------------------------------------------------------------------------
# The cost card.

def card(candidate: Candidate) -> str:
    """What a function is like and what it costs: forward and backward of a million elements against ReLU."""
    f = candidate.activation
    x = (torch.arange(-5000, 5001, dtype=torch.float64) / 1000).requires_grad_()  # 0 is among them, exactly
    f64 = Activation(f.expression, f.clip).double()
    y = f64(x)
    slope, = torch.autograd.grad(y.sum() + 0 * x.sum(), x)  # 0 * x: a constant does not depend on x
    rising, falling = bool((y.diff() >= 0).all()), bool((y.diff() <= 0).all())
    weight = torch.softmax(-x.detach().square() / 2, 0)
    moments = [(weight * y.detach() ** k).sum().item() for k in (1, 2)]
    size = 1 << 20
    sample = torch.randn(size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    contestants = {'op by op': f, 'by table': Tabulated(f), 'relu': torch.relu}
    times: dict[str, list[list[float]]] = {name: [[], []] for name in contestants}
    for _ in range(9):  # interleaved, so that a busy moment of the machine hits all of them
        for name, function in contestants.items():
            begin = time.perf_counter()
            output = function(sample) + 0 * sample if not f.expression.count('x') else function(sample)
            middle = time.perf_counter()
            output.backward(output.detach())
            times[name][0].append(middle - begin)
            times[name][1].append(time.perf_counter() - middle)
    ms = {name: [1e3 * statistics.median(t) for t in both] for name, both in times.items()}
    # of the sum with x, for functions that keep nothing
    kept = {name: bytes_kept(lambda: function(sample), [sample])[0] / size for name, function in contestants.items()}
    lines = [f'expression       {f.expression}', f'formula          {f.formula}',
             f'range            {y.min().item():.4g} to {y.max().item():.4g} on [-5, 5]',
             f'slope            {slope.min().item():.4g} to {slope.max().item():.4g}',
             f"monotone         {'constant' if rising and falling else 'rising' if rising else 'falling' if falling else 'no'}",
             f'under N(0, 1)    mean {moments[0]:.4g}, second moment {moments[1]:.4g}',
             'a million inputs    forward     backward    kept for backward']
    lines += [f'{name:18s}{ms[name][0]:6.2f} ms   {ms[name][1]:6.2f} ms   {kept[name]:5.1f} bytes an element   '
              f"{sum(ms[name]) / sum(ms['relu']):.1f} x relu" for name in contestants]
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def seeds_of(text: str) -> range:
    """'5' is 0 to 4; '10:20' is 10 to 19, so that several machines can share the work."""
    match = re.fullmatch(r'(?:(\d{1,9}):)?(\d{1,9})', text)
    seeds = range(int(match[1] or 0), int(match[2])) if match else range(0)
    if not seeds:
        raise ValueError(f"--seeds '{text}': a number above 0 such as 5, or a range such as 10:20")
    return seeds


def evaluate(candidates: list[Candidate], config: Config, seeds: range, against: str, metric: Optional[str],
             show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train what the ledger lacks, seed by seed so that every moment has a fair table, which is shown after each; the
    rows of this comparison."""
    dataset, ledger = data.load(config.data, config.data_dir, config.tokens), Path(config.out)
    done = {identity(row): row for row in read_ledger(ledger)}
    append(ledger, {})
    rows = []
    total, count, spent = len(seeds) * len(candidates), 0, []
    for seed in seeds:
        before = len(spent)
        for candidate in candidates:
            count += 1
            key = identity({'name': candidate.name, 'expression': candidate.activation.expression,
                            'clip': candidate.activation.clip, 'seed': seed, 'settings': settings(config)})
            if key not in done:
                done[key] = retrain(candidate, config, dataset, seed)
                append(ledger, done[key])
                spent.append(done[key]['seconds'])
            row = done[key]
            rows.append(row)
            left = f', {statistics.fmean(spent) * (total - count) / 60:.0f} min left' if spent else ', from the ledger'
            result = 'diverged' if row['diverged'] else f"test loss {row['test_loss']:.4f}  accuracy {row['test_accuracy']:.4f}"
            show(f"{count}/{total}  seed {seed}  {candidate.name:24s} {result}  {row['ms_step']:.0f} ms/step{left}")
        if len(spent) > before and seed != seeds[-1]:
            show(f'\n{report(rows, against, metric)}\n')
    return rows


def main(arguments: Optional[list[str]] = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument('activations', nargs='*', metavar='ACTIVATION', help=resolve.__doc__.split('\n')[0])
    parser.add_argument('--seeds', default='3', help='how many, or a range such as 10:20')
    parser.add_argument('--baselines', help='names with commas between, or none (default: the usual ones)')
    parser.add_argument('--random', type=int, default=0, metavar='N', help='add N random cells: any search must beat them')
    parser.add_argument('--against', help="reference of the differences (default: the model's standard activation)")
    parser.add_argument('--metric', choices=['loss', 'accuracy'], help='(default: loss for text, accuracy for images)')
    parser.add_argument('--report', nargs='+', metavar='LEDGER', help='print the table of these ledgers, train nothing')
    parser.add_argument('--card', metavar='ACTIVATION', help='print what a function is like and costs, train nothing')
    parser.add_argument('--figures', metavar='FOLDER', help='draw functions, seeds and curves there (needs matplotlib)')
    with one_line_errors(lambda: 'the same command goes on where it was'):
        chosen, given = options(Config, parser, arguments)
        config = configure(Config, PRESETS, chosen)
        if given.card is not None:
            print(card(resolve(given.card)))
            return
        if given.report:
            if missing := [path for path in given.report if not Path(path).exists()]:
                raise ValueError(f"cannot read {', '.join(missing)}: no such file; --report takes ledgers that exist")
            rows = [row for path in given.report for row in read_ledger(Path(path))]
            if not rows:
                raise ValueError(f"no runs in {', '.join(given.report)}; a ledger is the file that --out names")
            against = given.against and Path(given.against.replace(' ', '')).name  # a run folder is called by its name
            if against:
                valid('activation in --against', against, dict.fromkeys(row['name'] for row in rows))
            print(report(rows, against, given.metric))
            reference_name = against or STANDARD.get(rows[0]['settings'].get('model'), 'relu')
        else:
            reference = resolve(standard_of(config.model) if given.against is None else given.against)
            reference_name = reference.name
            if not 0 <= given.random <= 10_000:
                raise ValueError(f'--random {given.random}: from 0 to 10,000')
            kind = 'text' if config.data.startswith('tinystories') else 'image'
            names = (given.baselines if given.baselines is not None else BASELINES[kind]).split(',')
            names = [name for name in names if name not in ('none', '')] + [f'random_{k}' for k in range(given.random)]
            candidates: dict[str, Candidate] = {}
            for c in [reference, *map(resolve, [*given.activations, *names])]:
                one = candidates.setdefault(c.name, c)
                if (one.activation.expression, one.activation.clip) != (c.activation.expression, c.activation.clip):
                    raise ValueError(f'two different functions are called {c.name}: rename one of the run folders')
            rows = evaluate(list(candidates.values()), config, seeds_of(given.seeds), reference_name, given.metric,
                            lambda line: print(line, flush=True))
            print('\n' + report(rows, reference_name, given.metric))
            print(f'\nledger: {config.out}   the table again: python evaluate.py --report {config.out}')
        if given.figures is not None:
            print(figures.evaluation(rows, reference_name, Path(given.figures)))


if __name__ == '__main__':
    main()

"""The ledger of retrainings, a line a run, and the statistics that `evaluate.py` prints from it.

Differences are paired: for a seed all activations had the same initial weights and the same batches. Intervals are
Student's t, 95 %, over seeds; where whole searches are compared, over searches.
"""
import functools
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional

from activation import NAMED, Activation
from models import STANDARD
from training import json_line, parse_json, write_line


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


@functools.lru_cache(maxsize=None)
def acts(expression: str, clip: Optional[float]) -> Optional[float]:
    """The clip bound, or None where nothing in the function is clipped, so that the bound makes no difference."""
    return clip if 'clip(' in Activation(expression, clip).formula else None


def nameless(row: dict[str, Any]) -> str:
    """Two rows of which this is the same are the same run of one function, whatever it is called."""
    return identity(row | {'name': '', 'clip': acts(row['expression'], row['clip'])})


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


def together(rows: list[dict[str, Any]], against: str, metric: str) -> str:
    """All the functions that searches found for this very network and data, as one: their mean paired difference to the reference, the
    best of the named functions, and the best of the random cells. '' for less than two functions.

    Two intervals, since there are two sources of chance: over searches (each with its mean over training seeds), and over training
    seeds (each with its mean over searches). Where all searches find one function there is no first. Runs that
    diverged are left out, and counted.
    """
    higher, key = metric == 'accuracy', f'test_{metric}'
    place = f"{rows[0]['settings']['model']}/{rows[0]['settings']['data']}"
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if not row['diverged']:
            values.setdefault(row['name'], {})[row['seed']] = row[key]
    found = sorted({row['name'] for row in rows if row['searched'] == place})
    if len(found) < 2:
        return ''
    diverged = sum(row['diverged'] for row in rows if row['searched'] == place)
    mean = {name: statistics.fmean(by_seed.values()) for name, by_seed in values.items()}
    kinds = {'the reference': [against],
             'the best of the baselines': [name for name in values if name in NAMED and not name.startswith('grafs')],
             'the best of the random cells': [name for name in values if name.startswith('random_')]}
    lines = [f'The {len(found)} functions that searches on {place} found, together'
             + (f' ({diverged} of their runs diverged and are left out):' if diverged else ':')]
    for kind, names in kinds.items():
        names = [name for name in names if name in values]
        if not names:
            continue
        other = values[best := (max if higher else min)(names, key=mean.get)]
        paired = {name: values[name] for name in found if values.get(name, {}).keys() & other.keys()}
        by_search = {k: compare(by_seed, other, higher).mean for k, by_seed in enumerate(paired.values())}
        by_seed = {seed: statistics.fmean(v[seed] - other[seed] for v in paired.values() if seed in v)
                   for seed in other if any(seed in v for v in paired.values())}
        if not paired:
            continue
        a, b = (compare(differences, dict.fromkeys(differences, 0.0), higher) for differences in (by_search, by_seed))
        seeds = f'{b.mean - b.half:+.4f} to {b.mean + b.half:+.4f}' if b.n > 1 else 'unknown (one seed)'
        one = len(paired) > 1 and len(set(by_search.values())) == 1
        searches = 'none (all found one function)' if one else f'{a.mean - a.half:+.4f} to {a.mean + a.half:+.4f}'
        lines.append(f'- minus {best}, {kind}: {a.mean:+.4f}; {a.wins} of {a.n} better on average; 95 % interval over searches '
                     f'{searches}, over training seeds {seeds}')
    return '\n'.join(lines)


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
        chosen = against or STANDARD.get(model, 'relu'), metric or ('loss' if s['data'].startswith('tinystories') else 'accuracy')
        text.append(f"{model} on {s['data']}, {s['steps']} steps of {s['batch_size'] * s['accumulate']}, lr {s['lr']:g}"
                    f"{', scalars frozen' if s.get('freeze') else ''}{', by table' if s.get('table') else ''}; "
                    f"{len(runs)} runs on {devices}\n\n"
                    + table(runs, *chosen) + (f'\n\n{summary}' if (summary := together(runs, *chosen)) else ''))
    return '\n\n'.join(text)

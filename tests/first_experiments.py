"""The first experiments to do with the method: what do warm start, clipping, shrinking and sampling do? On planted functions.

    python tests/first_experiments.py --out results/first.jsonl        resumable; a search is a line
    python tests/first_experiments.py --report results/first.jsonl

Each search is `python search.py --model toy --preset paper --steps 400 --teacher FUNCTION --seed SEED` with one option changed: the
paper's descent alone, neither restarts nor refinement. Two functions, ten seeds, so twenty searches a line.
"""
import itertools
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planted import CLOSE, add, ledger, measured
from search import PRESETS, Config, prepare, search
from training import Failed, configure

TEACHERS = ('mul(sigmoid(x), x)', 'square(x)')
MEASURED = ('loss', 'found', 'distance', 'strict', 'diverged', 'skipped', 'seconds')
WARM = [('0', 0.0), ('1/8', 0.125), ('1/4', 0.25), ('1/2', 0.5)]
# experiment: {setting: options that differ from the basic search}
EXPERIMENTS: dict[str, dict[str, dict[str, Any]]] = {
    'basic search': {'as it is': {}},
    'warm start, share of the steps': {name: dict(warmstart=w, shrink_from=max(w, 0.14)) for name, w in WARM},
    'clip bound': {str(bound): dict(clip=bound) for bound in (2.0, 5.0, 10.0, 50.0, None)},
    'shrinking': {name: dict(shrink=name) for name in ('log', 'linear', 'none')},
    'sampling': {name: dict(sampler=name) for name in ('dirichlet', 'shared', 'mean', 'softmax')},
}


def effective(options: dict[str, Any]) -> dict[str, Any]:
    """Without what is as in the basic search."""
    basic = PRESETS['paper']['toy'] | dict(clip=Config.clip)
    return {key: value for key, value in options.items() if basic.get(key) != value}


def run(options: dict[str, Any], teacher: str, seed: int) -> dict[str, Any]:
    config = configure(Config, PRESETS, dict(model='toy', preset='paper', steps=400, teacher=teacher, seed=seed, device='cpu', **options))
    model, train, val, loss = prepare(config)
    started, skipped = time.monotonic(), []
    try:
        found, scores = search(model, train, val, loss, config,
                               lambda row, snapshot: skipped.append(1) if row.get('trouble') else None)
        row = {'loss': scores['loss'], **measured(found, teacher)}
    except Failed:
        row = {'loss': math.nan, 'found': None, 'distance': math.nan, 'strict': math.nan}
    return {**row, 'diverged': not math.isfinite(row['loss']), 'skipped': len(skipped), 'seconds': round(time.monotonic() - started, 1)}


def report(rows: list[dict[str, Any]]) -> str:
    """won, lost: searches within 2 % where the basic one of the same function and seed is not, and the other way round."""
    lines = ['| experiment | setting | searches | median validation loss | median distance | within 2 % | won, lost | diverged | steps skipped |',
             '|---|---|---|---|---|---|---|---|---|']
    close = {(r['experiment'], r['setting'], r['teacher'], r['seed']): not r['diverged'] and r['distance'] < CLOSE for r in rows}
    for name, settings in EXPERIMENTS.items():
        for setting in settings:
            group = [r for r in rows if (r['experiment'], r['setting']) == (name, setting)]
            sound = [r for r in group if not r['diverged']]
            if not group:
                continue
            middle = [statistics.median(r[key] for r in sound) if sound else math.nan for key in ('loss', 'distance')]
            here, basic = ([close.get((*line, r['teacher'], r['seed']), False) for r in group] for line in ((name, setting), ('basic search', 'as it is')))
            won, lost = (sum(a > b for a, b in pairs) for pairs in (zip(here, basic), zip(basic, here)))
            lines.append(f"| {name} | {setting} | {len(group)} | {middle[0]:.4f} | {100 * middle[1]:.1f} % | {sum(here)} | {won}, {lost} | "
                         f"{len(group) - len(sound)} | {sum(r['skipped'] for r in group)} |")
    return '\n'.join(lines)


if __name__ == '__main__':
    given, path, rows = ledger(__doc__, 'results/first.jsonl', '0:10')
    done = {(r['experiment'], r['setting'], r['teacher'], r['seed']) for r in rows}
    for seed, name in itertools.product(given.seeds, () if given.report else EXPERIMENTS):
        for (setting, options), teacher in itertools.product(EXPERIMENTS[name].items(), TEACHERS):
            if (name, setting, teacher, seed) in done:
                continue
            # the basic search stands in several experiments and runs once
            same = next((r for r in rows if effective(r['options']) == effective(options) and (r['teacher'], r['seed']) == (teacher, seed)), None)
            result = {key: same[key] for key in MEASURED} if same else run(options, teacher, seed)
            add(path, rows, {'experiment': name, 'setting': setting, 'options': options, 'teacher': teacher, 'seed': seed, **result})
            print(f"{name}, {setting}: {teacher} seed {seed}: loss {result['loss']:.4f}, distance {100 * result['distance']:.1f} %, "
                  f"{result['seconds']:.0f} s  {result['found']}", flush=True)
    print(report(rows))

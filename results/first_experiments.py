"""The first experiments with the method: what do warm start, clipping, shrinking and sampling do?

    python results/first_experiments.py --seeds 0:10         35 minutes on one core, 8 seconds a search
    python results/first_experiments.py --report LEDGER...   prints the table of ledgers, searches nothing

Each search is `python search.py --model toy --preset paper --steps 400 --teacher FUNCTION --seed SEED`, the
paper's descent on a planted function, with one option changed. Two functions and ten seeds.
"""
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from activation import distance, named
from evaluate import append, configure
from planted import CLOSE, command_line, share
from search import PRESETS, Config, Run, prepare, search

TEACHERS = ('mul(sigmoid(x), x)', 'square(x)')
BASIC = 'as it is: warm start 0.07, clip 10, shrinking log, sampler dirichlet'
SETTINGS: dict[str, dict[str, Any]] = {  # what differs from the basic search
    BASIC: {},
    'no warm start': dict(warmstart=0.0),
    'warm start, an eighth of the steps': dict(warmstart=0.125),
    'warm start, a quarter': dict(warmstart=0.25, shrink_from=0.25),
    'warm start, half': dict(warmstart=0.5, shrink_from=0.5),
    **{f'clip {clip}': dict(clip=clip) for clip in (2.0, 5.0, 50.0, None)},
    **{f'shrinking {pace}': dict(shrink=pace) for pace in ('linear', 'none')},
    **{f'sampler {sampler}': dict(sampler=sampler) for sampler in ('shared', 'mean', 'softmax')},
}


class Counting(Run):
    """Keeps nothing but the number of steps that were skipped, since something was not finite."""
    skipped = 0

    def after(self, step, train_loss, val_loss, dropped, trouble) -> None:
        self.skipped += trouble is not None
        super().after(step, train_loss, val_loss, dropped, trouble)


def run(setting: str, teacher: str, seed: int) -> dict[str, Any]:
    """The row of a search; its loss is None when it diverged."""
    given = dict(model='toy', preset='paper', steps=400, teacher=teacher, seed=seed, device='cpu')
    config = configure(Config, PRESETS, given | SETTINGS[setting])
    counting, started = Counting(config), time.process_time()
    row = {'setting': setting, 'teacher': teacher, 'seed': seed, 'loss': None, 'distance': 1.0, 'found': ''}
    try:
        found, scores = search(*prepare(config), config, counting)
        if math.isfinite(scores['loss']):
            found = found.shortened()
            row |= {'loss': scores['loss'], 'distance': distance(found.double(), named(teacher).double()),
                    'found': found.expression}
    except ValueError as error:  # 20 steps in a row were skipped
        print('failed:', error)
    return row | {'skipped': counting.skipped, 'seconds': round(time.process_time() - started, 1)}


def report(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = ['Medians; searches within 2 % of the planted function; won, lost: within 2 % where the basic',
             'search of the same function and seed is not, and the reverse; steps skipped as not finite.', '',
             '| setting | searches | loss | distance | within 2 % | won, lost | diverged | skipped |',
             '|---|---|---|---|---|---|---|---|']
    close = {(row['setting'], row['teacher'], row['seed']): row['distance'] < CLOSE for row in rows}
    for setting in SETTINGS:
        if group := [row for row in rows if row['setting'] == setting]:
            sound = [row for row in group if row['loss'] is not None]
            loss, away = (statistics.median([row[key] for row in sound] or [math.nan])
                          for key in ('loss', 'distance'))
            pairs = [tuple(close.get((s, row['teacher'], row['seed'])) for s in (setting, BASIC))
                     for row in group]
            won, lost = pairs.count((True, False)), pairs.count((False, True))
            lines.append(f'| {setting} | {len(group)} | {loss:.4f} | {100 * away:.1f} % | '
                         f'{sum(here for here, _ in pairs)} | {won}, {lost} | {len(group) - len(sound)} | '
                         f"{sum(row['skipped'] for row in group)} |")
    return '\n'.join(lines)


def main() -> None:
    given, rows = command_line(__doc__, 'results/first.jsonl')
    done = {(row['setting'], row['teacher'], row['seed']) for row in rows}
    for seed, setting, teacher in share(given, SETTINGS, TEACHERS):
        if (setting, teacher, seed) not in done:
            rows.append(run(setting, teacher, seed))
            append(Path(given.out), rows[-1])
            print(*rows[-1].values(), sep='  ', flush=True)
    print(report(rows))


if __name__ == '__main__':
    main()

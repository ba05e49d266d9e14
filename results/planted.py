"""Does the searcher search? Plants known functions in a teacher network and measures how close searches come.

    python results/planted.py --seeds 0:10         2.5 hours on one core, a minute a function and seed
    python results/planted.py --report LEDGER...   prints the table of ledgers, searches nothing

A search is a line of the ledger and is not repeated; `--part 0/2` and `--part 1/2` are for two processes.

    project   `python search.py --model toy --teacher FUNCTION --seed SEED`
    shrink    the same, but operations are dropped until one a choice point is left (paper, section 3.2)
    argmax    the highest alphas at the end of the descent of `project`, without a search of its own
    random    functions drawn at random, each trained for 60 steps and judged on validation batches, in the
              time that `project` took

Seconds are CPU seconds of one thread, so that other work on the machine does not count.
"""
import argparse
import copy
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from activation import Activation, distance, named
from evaluate import append, configure, random_function, score, seeds_of, space_of, train
from search import PRESETS, Config, prepare, search

PLANTED = {
    'SiLU': 'mul(sigmoid(x), x)',
    'square': 'square(x)',
    'tanh': 'tanh(x)',
    '|x|': 'abs(x)',
    'ReLU^2': 'square(relu(x))',
    'tanh(x)^2': 'square(tanh(x))',
    'sigmoid(-x^2)': 'sigmoid(neg(square(x)))',
    'sin(x)': 'sin(x)',
    'Mish': 'mul(tanh(softplus(x)), x)',
    # these need both stages of the cell: no function of one stage is within 9 % of them
    'sigmoid(x^2 - x) x': 'mul(sigmoid(sub(square(x), x)), x)',
    'ReLU(x) - exp(x - x^2)': 'sub(relu(x), exp(sub(x, square(x))))',
    'max(GELU(x) - tanh(x), erf(x))': 'max(sub(gelu(x), tanh(x)), erf(x))',
    'tanh(x exp(x)) - erf(x)': 'sub(tanh(mul(x, exp(x))), erf(x))',
    'sqrt(max(x, x^2)) - softplus(x)': 'sub(sqrt(max(x, square(x))), softplus(x))',
    'tanh(x^2 - x) atan(x)': 'mul(tanh(sub(square(x), x)), atan(x))',
}
METHODS = ('project', 'shrink', 'argmax', 'random')
SHRINK = dict(discretise='shrink', candidates=0, shrink='linear', temperature=0.1)
CLOSE = 0.02  # counts as found: RMS difference under N(0, 1), as a share of the planted standard deviation


def standardised(f: Activation) -> Callable[[Tensor], Tensor]:
    """f at mean 0 and variance 1 under N(0, 1), the inputs of the sites: as a search normalises its cell."""
    x = torch.linspace(-5, 5, 2001)
    p, y = torch.softmax(-x.square() / 2, 0), f(x).detach()
    deviation = (p @ (y - p @ y).square()).sqrt()
    return lambda x: (f(x) - p @ y) / deviation


def at_random(setting: tuple, config: Config, seconds: float) -> Activation:
    """The best of the functions that can be drawn and tried in so many seconds. setting: of `prepare`."""
    model, cell, train_batches, val_batches, loss = setting
    space = space_of(config.ops)  # its time does not count
    trial, initial = dataclasses.replace(config, steps=60), copy.deepcopy(model.state_dict())
    batches = list(itertools.islice(train_batches, trial.steps))
    judge = list(itertools.islice(val_batches, config.judge))
    best, lowest, started, tried = Activation('x'), math.inf, time.process_time(), 0
    while time.process_time() - started < seconds:
        candidate = Activation(random_function(space, 1000 * config.seed + tried), config.clip)
        tried += 1
        model.load_state_dict(initial)
        cell.use(standardised(candidate))
        train(model, iter(batches), loss, trial)
        if (val_loss := score(model, judge, loss)['loss']) < lowest:
            best, lowest = candidate, val_loss
    return best


def run(name: str, seed: int, method: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Rows by method: for `project` that of `argmax`, too. seconds: for random search."""
    given = dict(model='toy', teacher=PLANTED[name], seed=seed, device='cpu')
    given |= dict(ops='base,periodic') if 'sin' in name else {}
    config = configure(Config, PRESETS, given | SHRINK if method == 'shrink' else given)
    setting, started, found = prepare(config), time.process_time(), {method: Activation('x')}
    if method == 'random':
        found[method] = at_random(setting, config, seconds)
    else:
        try:
            found[method], _ = search(*setting, config)
        except ValueError as error:  # it diverged: a straight line is its answer
            print('failed:', error)
    if method == 'project':
        found = {'argmax': Activation(setting[1].tree(), config.clip), **found}
    seconds, target, rows = time.process_time() - started, named(PLANTED[name]).double(), {}
    for method, f in found.items():
        f = f.shortened().double()
        rows[method] = {'found': f.expression, 'distance': distance(f, target),
                        'strict': distance(f, target, rescale=False), 'seconds': round(seconds, 1)}
    return rows


def within(rows: list[dict[str, Any]], measure: str) -> int:
    return sum(row[measure] < CLOSE for row in rows)


def report(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    head = ['planted', 'searches', *METHODS, 'distance of project, %', 'largest', 'CPU seconds', 'most']
    lines = ['Within 2 % of the planted function: at the best input scale, at its own. Medians.', '',
             f"| {' | '.join(head)} |", '|---' * len(head) + '|']
    for name in [*PLANTED, 'all']:
        group = {m: [r for r in rows if r['method'] == m and name in (r['planted'], 'all')] for m in METHODS}
        if project := group['project']:
            cells = [name.replace('|', '\\|'), len(project)]
            cells += [f"{within(group[m], 'distance')}, {within(group[m], 'strict')}" for m in METHODS]
            cells += [f"{100 * f(row['distance'] for row in project):.2f}" for f in (statistics.median, max)]
            cells += [f"{f(row['seconds'] for row in project):.0f}" for f in (statistics.median, max)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return '\n'.join(lines)


def command_line(description: str, out: str) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """The options of an experiment with a ledger, and the rows that are there."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=seeds_of, default='0:10', help='a range (0:10)')
    parser.add_argument('--part', default='0/1', metavar='K/N', help='every N-th search, from the K-th on')
    parser.add_argument('--out', default=out, help=f'the ledger ({out})')
    parser.add_argument('--report', nargs='+', metavar='LEDGER', help='print the table of these ledgers')
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = [path for path in map(Path, given.report or [given.out]) if path.exists()]
    return given, [json.loads(line) for path in files for line in path.read_text().splitlines()]


def share(given: argparse.Namespace, *work: Any) -> list[tuple]:
    """What this process has to do of all combinations with the seeds: nothing for a report."""
    part, parts = map(int, given.part.split('/'))
    return [] if given.report else list(itertools.product(given.seeds, *work))[part::parts]


def main() -> None:
    given, rows = command_line(__doc__, 'results/planted.jsonl')
    done = {(row['planted'], row['seed'], row['method']): row for row in rows}
    for method, (seed, name) in itertools.product(('project', 'shrink', 'random'), share(given, PLANTED)):
        if (name, seed, method) not in done:
            seconds = done[name, seed, 'project']['seconds'] if method == 'random' else 0.0
            for kind, row in run(name, seed, method, seconds).items():
                done[name, seed, kind] = row = {'planted': name, 'seed': seed, 'method': kind, **row}
                append(Path(given.out), row)
                print(f"{name}, seed {seed}, {kind}: {100 * row['distance']:.2f} %, at its own input scale "
                      f"{100 * row['strict']:.2f} %, {row['seconds']:.0f} s  {row['found']}", flush=True)
    print(report(list(done.values())))


if __name__ == '__main__':
    main()

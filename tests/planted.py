"""Does the searcher search? Plants functions in a teacher network, searches them, and writes down how close it came.

    python tests/planted.py --seeds 0:10 --out results/planted.jsonl      by hand; a search is a line, none is repeated
    python tests/planted.py --report results/planted.jsonl

Every search is that of `python search.py --model toy --teacher FUNCTION --seed SEED`. Beside it stands random search at
equal cost: cells drawn at random, each with the student trained on it for 60 steps (which ranks them well enough) and
scored on validation batches, for as many seconds as the search took; the best on validation is its answer.
"""
import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from activation import Activation, distance, named
from cell import random_expression
from runoff import score
from search import PRESETS, Config, cell_of, prepare, search
from training import configure, weight_optimizer

# name: (expression, operations)
PLANTED = {
    'SiLU': ('mul(sigmoid(x), x)', 'base'),
    'square': ('square(x)', 'base'),
    'tanh': ('tanh(x)', 'base'),
    '|x|': ('abs(x)', 'base'),
    'ReLU^2': ('square(relu(x))', 'base'),
    'bump tanh(x)^2': ('square(tanh(x))', 'base'),  # 1 - sech(x)^2: a bump, but for sign and shift
    'bump sigmoid(-x^2)': ('gate(neg(square(x)), const(1))', 'base'),
    'sine': ('sin(x)', 'base,periodic'),
    'Mish, two stages': ('mul(tanh(softplus(x)), x)', 'base'),
}
CLOSE = 0.02  # RMS difference under N(0, 1) as a share of the planted function's standard deviation


def measured(found: Activation, planted: str) -> dict[str, Any]:
    """How far the found function is: at the best input scale, and (strict) at the very scale that was planted."""
    distances = [distance(found.double(), named(planted), rescale) for rescale in (True, False)]
    return {'found': found.float().expression, 'distance': distances[0], 'strict': distances[1]}


def searched(name: str, seed: int) -> dict[str, Any]:
    expression, ops = PLANTED[name]
    config = configure(Config, PRESETS, dict(model='toy', teacher=expression, ops=ops, seed=seed, device='cpu'))
    model, train, val, loss = prepare(config)
    started = time.monotonic()
    restarts = set()
    found, _ = search(model, train, val, loss, config, lambda row, snapshot: restarts.add(row.get('restart', 0)))
    return {'method': 'search', **measured(found, expression), 'restarts': len(restarts), 'seconds': round(time.monotonic() - started, 1)}


def at_random(name: str, seed: int, seconds: float) -> dict[str, Any]:
    expression, ops = PLANTED[name]
    config = configure(Config, PRESETS, dict(model='toy', teacher=expression, ops=ops, seed=seed, device='cpu'))
    model, train, val, loss = prepare(config)
    cell, draw, initial = cell_of(model), torch.Generator().manual_seed(seed), {k: v.clone() for k, v in model.state_dict().items()}
    batches, judge = list(itertools.islice(train, 60)), list(itertools.islice(val, 8))
    started, best, tried = time.monotonic(), (float('inf'), 'x'), 0
    while time.monotonic() - started < seconds:
        candidate = random_expression(draw, ops)
        with torch.no_grad():
            table = Activation(candidate, config.clip)(cell.grid)[None].expand(cell.sites, -1)
            cell.use(cell.normalised(table))  # mean 0 and the variance of the standard, as in the search
        model.load_state_dict(initial)
        optimizer = weight_optimizer([p for p in model.parameters() if p.requires_grad], config)
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        result, tried = score(model, judge, loss)['loss'], tried + 1
        best = min(best, (result, candidate)) if result == result else best
    return {'method': 'random', **measured(Activation(best[1]), expression), 'tried': tried, 'seconds': round(time.monotonic() - started, 1)}


def report(rows: list[dict[str, Any]]) -> str:
    lines = ['| planted | searches | within 2 % | at the same input scale | median distance | worst | seconds, median and most | '
             'random search within 2 % | at the same input scale |', '|---|---|---|---|---|---|---|---|---|']
    for name in PLANTED:
        mine, random = ([r for r in rows if (r['planted'], r['method']) == (name, method)] for method in ('search', 'random'))
        if not mine:
            continue
        seconds, distances = [r['seconds'] for r in mine], [r['distance'] for r in mine]
        cell = name.replace('|', r'\|')  # else a column more
        lines.append(f"| {cell} | {len(mine)} | {within(mine, 'distance')} | {within(mine, 'strict')} | {100 * statistics.median(distances):.2f} % | "
                     f"{100 * max(distances):.2f} % | {statistics.median(seconds):.0f}, {max(seconds):.0f} | "
                     f"{within(random, 'distance')} of {len(random)} | {within(random, 'strict')} |")
    lines.append('')
    for method, who in (('search', 'searches'), ('random', 'random searches')):
        if group := [r for r in rows if r['method'] == method]:
            close = within(group, 'distance')
            lines.append(f"{close} of {len(group)} {who} came within 2 %: {100 * close / len(group):.0f} %; {within(group, 'strict')} at the same input scale")
    return '\n'.join(lines)


def within(rows: list[dict[str, Any]], measure: str) -> int:
    return sum(r[measure] < CLOSE for r in rows)


def ledger(description: str, out: str, seeds: str) -> tuple[argparse.Namespace, Path, list[dict[str, Any]]]:
    """The command line of an experiment that keeps a ledger; where that is, and what it holds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', default=seeds, help='a range such as 0:10')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', default=out, help='the ledger; what is there is not repeated')
    parser.add_argument('--report', metavar='LEDGER', help='print its table, search nothing')
    given = parser.parse_args()
    given.seeds = range(*map(int, given.seeds.split(':')))
    torch.set_num_threads(given.threads)
    path = Path(given.report or given.out)
    return given, path, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    with open(path, 'a') as file:
        file.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    given, path, rows = ledger(__doc__, 'results/planted.jsonl', '0:10')
    done = {(r['planted'], r['seed'], r['method']) for r in rows}
    for method, seed, name in itertools.product(('search', 'random'), given.seeds, () if given.report else PLANTED):
        if (name, seed, method) in done:
            continue
        seconds = next((r['seconds'] for r in rows if (r['planted'], r['seed'], r['method']) == (name, seed, 'search')), 0)
        row = searched(name, seed) if method == 'search' else at_random(name, seed, seconds)
        add(path, rows, {'planted': name, 'seed': seed, **row, 'threads': given.threads, 'torch': torch.__version__})
        print(f"{name:20s} seed {seed} {method}: {100 * row['distance']:6.2f} % (strict {100 * row['strict']:6.2f} %)  "
              f"{row['seconds']:.0f} s  {row['found']}", flush=True)
    print(report(rows))

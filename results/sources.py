"""Where should the functions that a search tries come from? Four sources after the same descent.

    python results/sources.py --seeds 30:35 --models minigpt,resnet20,vit_tiny     a third of an hour a search
    python results/sources.py --report

Quick searches, one a network and seed, that try the proposals of all sources; all on validation data. Runs
are resumed, a finished one is a line of results/sources.jsonl. Of each source as many functions as the
default tries beside what is left of the cell (`own`):

    gradient   the best scores by one gradient: the default
    alphas     the standard activation joined to one operation, in the order of the alphas
    project    the formulas nearest to the curve of the relaxed cell: the front, then the next best
    random     drawn from the functions that `gradient` chooses from: same trust region, same lengths
"""
import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Callable, Iterable

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import torch

import search
from activation import Activation, Node, Tree, distance, nonlinearity, write
from cell import Cell
from evaluate import append, seeds_of
from plot import compare
from space import Match, Space

LEDGER, RUNS = HERE / 'sources.jsonl', HERE.parent / 'runs'
SOURCES = ('gradient', 'alphas', 'project', 'random')
gradient = search.proposals  # the default's; `main` puts `union` in its place

def by_alphas(cell: Cell) -> list[Tree]:
    """The standard joined to one operation of x, the largest alphas first."""
    standard = cell.standard.tree
    unary, binary = (sorted(zip(alpha.tolist(), ops), key=lambda pair: -pair[0])
                     for alpha, ops in zip(cell.alpha[-2:], cell.ops[-2:]))
    pairs = sorted(itertools.product(unary, binary), key=lambda pair: -pair[0][0] - pair[1][0])
    return [Node(join, (standard, Node(op, ('x',), op.scalar) if op.code != 'a' else 'x'), join.scalar)
            for (_, op), (_, join) in pairs
            if op.name not in ('const', 'scale') and join.code not in ('a', 'b')]

def by_curve(cell: Cell, space: Space) -> list[Tree]:
    seen = torch.from_numpy(np.interp(space.x, cell.grid[cell.bins].cpu(), cell.seen.mean(0).cpu()))
    front, best = space.nearest(cell.curve(space.x), seen, 50)
    return [match.tree for match in front[::-1] + best]

def at_random(cell: Cell, config: search.Config, space: Space) -> list[Tree]:
    """As `search.proposals` for the gradient, with a random number in the place of the score."""
    draw, scan = torch.Generator().manual_seed(config.seed), space.scan
    def blind(score: Callable, shift: bool) -> list[Match]:
        def number(f: torch.Tensor) -> torch.Tensor:
            return torch.where(score(f).isfinite(), torch.rand(len(f), generator=draw).double(), torch.inf)
        return scan(number, shift)
    space.scan = blind
    matches = sorted(search.steepest(space, cell, config.trust), key=lambda match: match.score)
    space.scan = scan
    if config.around:
        matches = [match for match in matches if cell.standard.expression in write(match.tree)]
    rows = [[match.tree for match in matches if match.length == n] for n in config.lengths]
    return [tree for row in itertools.zip_longest(*rows) for tree in row if tree]

def union(cell: Cell, config: search.Config) -> list[Activation]:
    """The proposals of all sources, each once; which came from where stands in the run's sources.json."""
    own = Activation(cell.tree(), config.clip)
    count, space = config.candidates - 1, Space(config.ops, config.clip, config.cell)
    def usable(trees: Iterable[Tree]) -> list[Activation]:
        found = {f.expression: f for f in (Activation(tree, config.clip) for tree in trees)
                 if f.expression != own.expression and distance(f, cell.standard, False) > 0.01
                 and nonlinearity(f) > 0.15}
        return list(found.values())[:count]
    default = gradient(cell, dataclasses.replace(config, candidates=100))
    chosen = {'gradient': [f for f in default if f.expression != own.expression][:count],
              'alphas': usable(itertools.islice(by_alphas(cell), 60)),
              'project': usable(by_curve(cell, space)),
              'random': usable(itertools.islice(at_random(cell, config, space), 60))}
    chosen['own'] = [own] if own.expression != cell.standard.expression else []
    names = {source: [f.expression for f in functions] for source, functions in chosen.items()}
    Path(config.out, 'sources.json').write_text(json.dumps(names, indent=1))
    every = {f.expression: f for f in itertools.chain(*chosen.values())}
    return [f.to(cell.grid.device) for f in every.values()]

def run(model: str, seed: int) -> None:
    """One search that tries all of them, as a line of the ledger."""
    folder = RUNS / f'sources-{model}-{seed}'
    new = ['--model', model, '--seed', str(seed), '--out', str(folder)]
    if not (folder / 'activation.json').exists():
        search.main(['--resume', str(folder)] if (folder / 'checkpoint.pt').exists() else new)
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
    losses = {row['tried']: row['loss'] for row in rows if 'tried' in row}  # the standard was the first
    sources = {'standard': list(losses)[:1], **json.loads((folder / 'sources.json').read_text())}
    judged = {source: [(name, losses[name]) for name in names] for source, names in sources.items()}
    append(LEDGER, {'model': model, 'seed': seed, **judged})

def report(rows: list[dict]) -> str:
    """By network: the best of each source minus the standard, validation loss, and what the default finds."""
    text = []
    for model in dict.fromkeys(row['model'] for row in rows):
        mine = {row['seed']: row for row in rows if row['model'] == model}
        best = {source: {seed: min(np.nan_to_num(loss, nan=99) for _, loss in row[source] or row['standard'])
                         for seed, row in mine.items()} for source in ('standard', 'own', *SOURCES)}
        text += ['', f'| {model} | best minus standard | better of {len(mine)} | all: mean, better |',
                 '|---|---|---|---|']
        for source in ('own', *SOURCES):
            n, mean, half = compare(best[source], best['standard'])
            every = [loss - best['standard'][seed] for seed, row in mine.items() for _, loss in row[source]]
            wins = sum(best[source][seed] < best['standard'][seed] for seed in mine)
            average = statistics.fmean(every or [np.nan])
            text.append(f'| {source} | {mean:+.4f} +- {half:.4f} | {wins} | {average:+.4f}, '
                        f'{sum(d < 0 for d in every)} of {len(every)} |')
        for seed, row in mine.items():
            name, loss = min(row['own'] + row['gradient'], key=lambda pair: pair[1])
            text.append(f"seed {seed}: standard {best['standard'][seed]:.4f}, default {name} {loss:.4f}")
    return '\n'.join(text)

if __name__ == '__main__':
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=look)
    parser.add_argument('--models', default='minigpt,resnet20,vit_tiny', help='of the list, in this order')
    parser.add_argument('--seeds', type=seeds_of, default='30:35', help='of the searches (30:35)')
    parser.add_argument('--report', action='store_true', help='print the tables, search nothing')
    given = parser.parse_args()
    search.proposals = union
    ended = [json.loads(line) for line in LEDGER.read_text().splitlines()] if LEDGER.exists() else []
    for seed, model in itertools.product(given.seeds, given.models.split(',') if not given.report else ()):
        if (model, seed) not in [(row['model'], row['seed']) for row in ended]:
            run(model, seed)
    if given.report:
        print(report(ended))

"""Searches on real networks with one setting changed, and what they find from scratch. Two groups:

    paper    the paper's descent (--method paper), 400 steps: warm start, clipping, and how sensitive it is
    spaces   the default, with other operations and cells; what is left of the descent, with one cell for all
             sites and with a cell of its own for each

    python results/variations.py --seeds 0:3 --part 0/2    and 1/2 beside it: four hours on two cores
    python results/variations.py --report LEDGER...        the tables

Networks, data and trainings are those of the preset quick. A search with seed s is followed by one training
of what it found, with seed s, tested once, beside the standard activation. Rows are not repeated.
"""
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
from torch import Tensor

import data
import evaluate
import search
from activation import Activation, Tree, cell_tree, named
from cell import Cell
from first_experiments import Counting
from models import STANDARD
from planted import command_line, share
from plot import compare

MODELS, ITSELF = ('minigpt', 'resnet20'), ('standard', 'itself')
PAPER = dict(search.PAPER, steps=400)
OWN = dict(discretise='shrink', candidates=0, shrink='none')  # the highest alphas after the default's descent
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {  # (group, name) -> options
    ('paper', 'as it is: warm start 0.02, clip 10, arch lr 6e-4'): {},
    **{('paper', f'warm start {part:g}'): dict(warmstart=part, shrink_from=max(part, 0.04))
       for part in (0.0, 0.125, 0.5)},
    **{('paper', f'clip {clip}'): dict(clip=clip) for clip in (2.0, None)},
    **{('paper', f'arch lr {rate:g}'): dict(arch_lr=rate) for rate in (2e-4, 1.8e-3)},
    **{('paper', f'{steps} steps'): dict(steps=steps) for steps in (200, 800)},
    **{('paper', f'sampler {sampler}'): dict(sampler=sampler) for sampler in ('shared', 'mean', 'softmax')},
    **{('paper', f'shrinking {pace}'): dict(shrink=pace) for pace in ('linear', 'none')},
    ('spaces', 'the default: cell paper, operations base'): {},
    **{('spaces', f'cell {shape}'): dict(cell=shape) for shape in ('core', 'deep')},
    **{('spaces', f'operations {ops}'): dict(ops=ops) for ops in ('no-composites', 'base,periodic',
                                                                  'base,swish')},
    ('spaces', 'descent alone, one cell'): OWN,
    ('spaces', 'descent alone, a cell a site'): OWN,
}

class PerSite(Cell):
    """A cell of its own for each site: alphas are (sites, operations), the weights softmax."""
    def split(self) -> None:
        """Once all sites are there."""
        self.alpha = nn.ParameterList(alpha.detach().repeat(self.sites, 1) for alpha in self.alpha)

    @torch.no_grad()
    def reset(self, *arguments: float) -> None:
        mine, self.alpha = self.alpha, nn.ParameterList(torch.empty(len(ops)) for ops in self.ops)
        super().reset(*arguments)
        for own, one in zip(mine, self.alpha):
            own.copy_(one)
        self.alpha = mine

    def sample(self, noise: bool = True) -> list[Tensor]:
        return [(alpha[:, active] / self.temperature).softmax(1)
                for alpha, active in zip(self.alpha, self.active)]

    def trees(self) -> list[Tree]:
        """Of each site: its highest alphas. Scalars are shared."""
        found = []
        for row in zip(*(alpha.argmax(1).tolist() for alpha in self.alpha)):
            scalars = [scalars[j].item() for scalars, j in zip(self.scalars, row)]
            found.append(cell_tree(self.shape, [ops[j] for ops, j in zip(self.ops, row)], scalars))
        return found

    def tree(self) -> Tree:
        return self.trees()[0]

    def drop(self) -> str:
        """Called when the descent is over, to leave one a choice point: `trees` is what counts."""
        return str(max(self.active, key=len).pop())

class InTurn(nn.Module):
    """Stands at all sites: the k-th call of a pass gets the k-th function. Ours call them in order."""
    def __init__(self, functions: list[Activation]):
        super().__init__()
        self.functions, self.turn = nn.ModuleList(functions), -1

    def forward(self, x: Tensor) -> Tensor:
        self.turn = (self.turn + 1) % len(self.functions)
        return self.functions[self.turn](x)

@functools.cache
def scratch(expressions: tuple[str, ...], clip: Optional[float], model: str, seed: int) -> dict[str, Any]:
    """Test loss and accuracy from scratch, None when it diverges; one expression, or one a site."""
    config = evaluate.configure(evaluate.Training, evaluate.PRESETS, dict(model=model, device='cpu'))
    f = InTurn([Activation(expression, clip) for expression in expressions])
    row = evaluate.retrain(f, config, data.load(config.data), seed)
    return {'scratch': row['test_loss'], 'accuracy': row['test_accuracy']}

def descend(key: tuple[str, str], model: str, seed: int) -> dict[str, Any]:
    """What a search found, one expression or one a site, its own loss, and what it cost."""
    options = (PAPER if key[0] == 'paper' else {}) | SETTINGS[key]
    config = search.new_config(dict(model=model, seed=seed, device='cpu') | options)
    row = {'found': [], 'clip': config.clip, 'loss': None}
    each, original = 'a cell a site' in key[1], search.Cell
    search.Cell = PerSite if each else Cell
    net, cell, *rest = search.prepare(config)
    search.Cell = original
    if each:
        cell.split()
    counting, started = Counting(config), time.process_time()
    try:
        found, scores = search.search(net, cell, *rest, config, counting)
        functions = [Activation(tree, config.clip) for tree in cell.trees()] if each else [found]
        row |= {'loss': None if each else scores['loss'],  # it has judged one cell
                'found': [f.shortened(config.ops).expression for f in functions]}
    except ValueError as error:  # 20 steps in a row were skipped
        print('failed:', error)
    return row | {'skipped': counting.skipped, 'seconds': round(time.process_time() - started, 1)}

def run(key: tuple[str, str], model: str, seed: int) -> dict[str, Any]:
    """The row of a search, or of the standard activation, and the training that follows."""
    own = {'found': [named(STANDARD[model]).expression], 'clip': None}
    row = {'group': key[0], 'setting': key[1], 'model': model, 'seed': seed}
    row |= own if key == ITSELF else descend(key, model, seed)
    if not row['found']:
        return row | {'scratch': None}
    return row | scratch(tuple(row['found']), row['clip'], model, seed)

def cells(rows: list[dict[str, Any]], setting: str, base: dict[int, float]) -> list[str]:
    """The table's cells for one setting on one network. base: the standard's test loss by seed."""
    here = [row for row in rows if row['setting'] == setting]
    sound = {row['seed']: row['scratch'] for row in here if row['scratch'] is not None}
    n, mean, half = compare(sound, base)
    loss = [row['loss'] for row in here if row['loss'] is not None]
    return [f'{statistics.median(loss):.3f}' if loss else '-', f'{mean:+.3f} +- {half:.3f}' if n > 1 else '-',
            f'{sum(sound[seed] < base[seed] for seed in sound.keys() & base.keys())} of {len(here)}',
            f"{len(here) - len(sound)}, {sum(row['skipped'] for row in here)}",
            f"{statistics.median(row['seconds'] for row in here):.0f}"] if here else ['-'] * 5

def report(rows: list[dict[str, Any]]) -> str:
    """The tables, in Markdown."""
    text = ['Loss: median of the searches, on validation data. From scratch: mean test loss minus that of',
            'the standard activation, half of the 95 % interval; how many were better; how many failed, the',
            'search or the training; how many steps of the searches were skipped; CPU seconds of a search.']
    base = {model: {row['seed']: row['scratch'] for row in rows
                    if (row['model'], row['group']) == (model, ITSELF[0])} for model in MODELS}
    head = [f'{model}: {name}' for model in MODELS
            for name in ('loss', 'from scratch', 'better', 'failed, skipped', 'seconds')]
    for group in ('paper', 'spaces'):
        text += ['', f"| {group} | {' | '.join(head)} |", '|---' * (1 + len(head)) + '|']
        for setting in (name for kind, name in SETTINGS if kind == group):
            of = [cells([row for row in rows if (row['model'], row['group']) == (model, group)], setting,
                        base[model]) for model in MODELS]
            text.append(f"| {setting} | {' | '.join(itertools.chain(*of))} |")
    return '\n'.join(text)

def main() -> None:
    given, rows = command_line(__doc__, 'results/variations.jsonl')
    done = {(row['group'], row['setting'], row['model'], row['seed']) for row in rows}
    for seed, model, key in share(given, MODELS, [ITSELF, *SETTINGS]):
        if (*key, model, seed) not in done:
            rows.append(run(key, model, seed))
            evaluate.append(Path(given.out), rows[-1])
            print(*rows[-1].values(), sep='  ', flush=True)
    print(report(rows))

if __name__ == '__main__':
    main()

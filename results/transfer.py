"""What carries over? Functions found on three networks, trained on larger ones, other families, other data.

    python results/transfer.py --data-dir FOLDER --part 0/2      and 1/2 beside it: two evenings on two cores
    python results/transfer.py --report                          the table

Three functions of each network on which a search found them, beside five usual ones. All trainings are those
of `python evaluate.py --model TARGET`, preset quick, three seeds (mobilenet_v2: 1,000 steps of 64, lr 1e-3,
for a GPU: a step takes a second on one core). A finished one is a line of results/transfer.jsonl; the same
command goes on. FOLDER holds CIFAR-100, of which images of side 16 are made; without it that target is left
out, and so is torchvision's where torchvision is not installed.
"""
import argparse
import functools
import importlib.util
import itertools
import os
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, Iterable

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch

import data
from activation import Activation
from evaluate import PRESETS, Training, configure, evaluate, read_ledger, resolve
from models import STANDARD
from plot import column, compare

LEDGER, RUNS = HERE / 'transfer.jsonl', HERE / 'evening'
FOUND = {  # network -> what searches found there: the evening's (results/evening/), and quick ones
    'resnet20': ['elu', 'resnet20-paper-0.json', 'resnet20-paper-1.json'],
    'vit_tiny': ['vit_tiny-ours-0.json', 'square(gelu(x))', 'vit_tiny-paper-0.json'],
    'minigpt': ['minigpt-ours-1.json', 'minigpt-ours-0.json',
                'add(relu(x), min0(sub(square(x), sigmoid(x))))']}
USUAL = ['relu', 'gelu', 'silu', 'elu', 'relu2']
TARGETS: dict[str, dict[str, Any]] = {  # name -> settings of the training
    'resnet32': dict(model='resnet32'),
    'resnet20, CIFAR-100': dict(model='resnet20', data='cifar100', side=16),
    'vit_small': dict(model='vit_small'), 'tinygpt': dict(model='tinygpt', lr=1e-3),
    'elman': dict(model='elman'),
    'mobilenet_v2': dict(model='torchvision:mobilenet_v2', steps=1000, batch_size=64, lr=1e-3)}

def by_name(names: Iterable[str]) -> dict[str, Activation]:
    return dict(resolve(str(RUNS / name) if name.endswith('.json') else name) for name in names)

FUNCTIONS = by_name(itertools.chain(*FOUND.values(), USUAL))

def standard(target: str) -> str:
    return STANDARD.get(TARGETS[target]['model'], 'own')

def run(target: str, name: str, seed: int, data_dir: str) -> None:
    """One training, if the ledger lacks it. name: of a function, or own: what the network comes with."""
    settings = TARGETS[target] | ({'data_dir': data_dir} if 'CIFAR' in target else {})
    config = configure(Training, PRESETS, settings | {'out': str(LEDGER)})
    f = None if name == 'own' else FUNCTIONS.get(name) or resolve(name)[1]
    evaluate({name: f}, config, [seed])

def report() -> str:
    """A row a function: its mean test loss minus that of the standard, by target, with half its interval;
    bold: the lowest mean of a target."""
    rows, text = read_ledger(LEDGER), ['| function | found on |', '|---|---|']
    origin = {name: network for network, names in FOUND.items() for name in by_name(names)}
    cells: dict[str, list[str]] = {name: [] for name in FUNCTIONS}
    for target, settings in TARGETS.items():
        mine = [row for row in rows if settings.items() <= row['settings'].items()]
        base = column(mine, standard(target), 'test_loss')
        text[0] += f' {target}: {standard(target)} {fmean(base.values()):.3f} |' if base else f' {target} |'
        text[1] += '---|'
        pairs = {name: compare(column(mine, name, 'test_loss'), base) for name in cells}
        best = min((mean for n, mean, _ in pairs.values() if n > 1), default=0.0)
        for name, (n, mean, half) in pairs.items():
            gone = any(row['diverged'] for row in mine if row['name'] == name)
            mark = '**' if mean == best else ''
            cells[name].append('the standard' if name == standard(target) else 'diverges' if gone else
                               f'{mark}{mean:+.3f}{mark} +- {half:.3f}' if n > 1 else '-')
    text += [f"| {name} | {origin.get(name, '')} | {' | '.join(row)} |" for name, row in cells.items()]
    return '\n'.join(text)

if __name__ == '__main__':
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=look)
    parser.add_argument('--data-dir', default='', help='folder of CIFAR-100')
    parser.add_argument('--part', default='0/1', metavar='K/N', help='every N-th training, from the K-th on')
    parser.add_argument('--report', action='store_true', help='print the table, train nothing')
    given = parser.parse_args()
    if given.report:
        print(report())
    else:
        torch.set_num_threads(1)
        data.load, (part, parts) = functools.cache(data.load), map(int, given.part.split('/'))
        targets = [target for target in TARGETS if given.data_dir or 'CIFAR' not in target]
        if not importlib.util.find_spec('torchvision'):
            targets.remove('mobilenet_v2')
        work = [(target, name, seed) for seed in range(3) for target in targets
                for name in dict.fromkeys([standard(target), *FUNCTIONS])]
        for job in work[part::parts]:
            run(*job, given.data_dir)

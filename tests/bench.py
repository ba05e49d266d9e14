"""What a search costs: run by hand, `python tests/bench.py`, a few minutes on two cores.

    python tests/bench.py                      the three networks, and the price of functions found; last line: JSON
    python tests/bench.py --only resnet20      one network
    python tests/bench.py --growth             how the cost of a bi-level step grows, on resnet20

All contestants of one network are measured in turn, round after round, so that whatever else the machine does meets
all of them alike; times are medians over the rounds. Steps are whole steps as search.py makes them (batch, drawing,
forward, backward, clipping of the gradient, optimiser), with the settings of the laptop preset (weights at their mean,
each site's table scaled), on random data of the size of CIFAR-10 or of byte-level text.
Memory is the growth of the peak resident size of a process of its own, over what it is after a step at batch 2 of
another such network; there glibc is told to give every large block back when it is freed, so that the peak is what was
needed and not how the heap happened to be cut up.
"""
import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
from torch import Tensor

import data
from activation import named
from cell import Cell
from models import STANDARD
from models_own import network
from search import PRESETS, Config, frozen, new_cell, search
from table import Tabulated, dense, in_memory_order
from training import bound, configure, cross_entropy, weight_optimizer

# batch: the stated one; few: that of the cell op by op, which would need minutes and tens of GB at the stated one
SIZES = {'resnet20': dict(batch=64, few=4), 'vit_tiny': dict(batch=32, few=4), 'minigpt': dict(batch=16, few=2)}
EXPENSIVE = 'grafs_gpt_2'  # seven operations, the most among the named functions


def dataset_for(model: str) -> data.Dataset:
    """Random data of the size of CIFAR-10 (32x32) or of a byte-level text: contents do not matter here."""
    draw = torch.Generator().manual_seed(0)
    if model == 'minigpt':
        text = torch.randint(256, (400_000,), generator=draw, dtype=torch.uint8)
        return data.Dataset('random', 'text', text, text, classes=256)
    part = (torch.randint(256, (2048, 3, 32, 32), generator=draw, dtype=torch.uint8),
            torch.randint(10, (2048,), generator=draw))
    return data.Dataset('random', 'image', part, part, classes=10, channels=3, side=32, mirror=True)


class Reference(nn.Module):
    """A site that runs the cell op by op on its inputs, as DARTS and the paper do; without normalisation."""

    def __init__(self, cell: Cell):
        super().__init__()
        self._cell = (cell,)  # in a tuple, as in cell.Site

    def forward(self, x: Tensor) -> Tensor:
        cell, x = self._cell[0], dense(x)
        y = cell.evaluate(in_memory_order(x), [w[:1] for w in cell.weights()])
        return y[0].as_strided(x.shape, x.stride())


class Bench:
    """A network with one kind of activation, and its steps as in search.search.

    kind: 'plain' (standard activation), 'table' (the cell through tables), 'one site' (of it), 'opbyop', or anything
    that `named` takes, op by op or, after a 'table:', through a table.
    """

    def __init__(self, model: str, kind: str, batch: int, **options: Any):
        torch.manual_seed(0)
        self.config = configure(Config, PRESETS, dict(model=model, batch_size=batch, device='cpu', lr=1e-3, **options))
        self.cell = new_cell(self.config)
        dataset = dataset_for(model)
        make: Callable[[], nn.Module] = {
            'plain': {'relu': nn.ReLU, 'gelu': nn.GELU}[STANDARD[model]], 'table': self.cell.site,
            'opbyop': lambda: Reference(self.cell), 'one site': one_site(self.cell),
        }.get(kind, lambda: Tabulated(named(kind[6:])) if kind.startswith('table:') else named(kind))
        self.model = network(self.config, make, dataset).train()
        train, val = data.split(dataset, 0)
        self.train, self.val = (data.Batches(dataset, part, batch, seed, augment=augment, context=self.config.context)
                                for part, seed, augment in ((train, 0, True), (val, 1, False)))
        self.weights, self.architecture = list(self.model.parameters()), list(self.cell.parameters())
        self.weight_opt = weight_optimizer(self.weights, self.config)
        self.arch_opt = torch.optim.Adam(self.architecture, lr=1e-4, betas=(0.5, 0.999))

    def arch_step(self) -> None:
        x, y = next(self.val)
        self.cell.draw()
        with frozen(self.model):
            loss = cross_entropy(self.model(x), y)
            gradients = torch.autograd.grad(loss, self.architecture, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(self.architecture, gradients)]
        bound(gradients, self.config.grad_clip)
        for p, g in zip(self.architecture, gradients):
            p.grad = g
        self.arch_opt.step()
        self.arch_opt.zero_grad()

    def weight_step(self) -> None:
        x, y = next(self.train)
        with torch.no_grad():
            self.cell.draw()
        self.descend(x, y)

    def plain_step(self) -> None:
        self.descend(*next(self.train))

    def descend(self, x: Tensor, y: Tensor) -> None:
        cross_entropy(self.model(x), y).backward()
        bound([p.grad for p in self.weights if p.grad is not None], self.config.grad_clip)
        self.weight_opt.step()
        self.weight_opt.zero_grad()

    def bilevel_step(self) -> None:
        self.arch_step()
        self.weight_step()

    def opbyop_step(self) -> None:
        """Both steps of the cell op by op: as arch_step and weight_step, with nothing to draw."""
        draw, self.cell.draw = self.cell.draw, lambda: None
        self.bilevel_step()
        self.cell.draw = draw

    def drawing(self) -> None:
        """All that tables cost apart from lookups: drawn for both steps, and their gradient taken to the alphas."""
        with torch.no_grad():
            self.cell.draw()
        self.cell.draw()
        torch.autograd.grad(sum(table.sum() for table in self.cell.tables), self.architecture, allow_unused=True)

    def batching(self) -> None:
        next(self.train), next(self.val)


def medians(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Milliseconds of each: the median over the rounds, in each of which every contestant has its turn."""
    for step in contestants.values():  # the first two times are slower: memory, buffers, kernels chosen
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak() -> float:
    """MB: the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != 'darwin' else 1024 ** 2)


def memory(model: str, kind: str, batch: int, step: str) -> float:
    """MB that three steps need at their peak, in a process of its own."""
    arguments = [sys.executable, __file__, '--memory', model, kind, str(batch), step]
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
    return float(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def own_memory(model: str, kind: str, batch: int, step: str) -> float:
    """What `memory` runs. subtle: the peak of a process is never below what its parent used when starting it."""
    getattr(Bench(model, kind, 2), step)()
    bench = Bench(model, kind, batch)
    before = peak()
    for _ in range(3):
        getattr(bench, step)()
    return peak() - before


def loop(model: str, batch: int) -> float:
    """Milliseconds of a step of search.search itself, its median: a check that the steps above are the real ones."""
    bench = Bench(model, 'table', batch, steps=20, warmstart=0, shrink='none', shrink_from=17, shrink_until=18,
                  runoff=0)
    stamps: list[float] = []
    search(bench.model, bench.train, bench.val, cross_entropy, bench.config,
           lambda row, snapshot: stamps.append(time.perf_counter()))
    return statistics.median(1000 * (b - a) for a, b in zip(stamps[2:16], stamps[3:17]))


def table(head: list[str], rows: list[list[Any]]) -> None:
    """Print a table in markdown; floats with two or three digits."""
    for cells in [head, ['---'] * len(head), *rows]:
        words = [str(c) if not isinstance(c, float) else f'{c:.2f}' if c < 10 else f'{c:.0f}' for c in cells]
        print('| ' + ' | '.join(words) + ' |', flush=True)


def compare(model: str, rounds: int, mb: dict[str, float]) -> dict[str, float]:
    """Plain, weight and architecture step, and the cell op by op, of one network. mb: peaks, see `peaks`."""
    batch, few = SIZES[model]['batch'], SIZES[model]['few']
    plain, table, slow = Bench(model, 'plain', batch), Bench(model, 'table', batch), Bench(model, 'opbyop', few)
    ms = medians({'plain': plain.plain_step, 'weight': table.weight_step, 'arch': table.arch_step,
                  'opbyop': slow.opbyop_step, 'draw': table.drawing, 'batch': table.batching}, rounds)
    bilevel = ms['weight'] + ms['arch']
    result = dict(plain_ms=ms['plain'], weight_ms=ms['weight'], arch_ms=ms['arch'],
                  bilevel_over_plain=bilevel / ms['plain'],
                  opbyop_over_table=ms['opbyop'] * batch / few / bilevel,
                  memory_over_plain=mb['table'] / mb['plain'], plain_mb=mb['plain'], bilevel_mb=mb['table'],
                  draw_share=ms['draw'] / bilevel, batch_share=ms['batch'] / bilevel,
                  search_ms=loop(model, batch))
    return {key: round(value, 3) for key, value in result.items()}


KINDS = {'relu': 'plain', f'{EXPENSIVE}, op by op': EXPENSIVE, f'{EXPENSIVE}, by table': f'table:{EXPENSIVE}'}


def found(rounds: int, mb: dict[str, float]) -> None:
    """A training step of resnet20 with an expensive function, as in retraining: op by op, by table, and with ReLU."""
    ms = medians({name: Bench('resnet20', kind, 64).plain_step for name, kind in KINDS.items()}, rounds)
    print(f'\nTraining step of resnet20, batch 64; {EXPENSIVE} is {named(EXPENSIVE).formula}\n')
    table(['activation', 'ms', 'MB'], [[name, ms[name], mb[name]] for name in KINDS])


def one_site(cell: Cell) -> Callable[[], nn.Module]:
    """Makes one site of the cell, the first, and ReLU after that."""
    made = itertools.count()
    return lambda: cell.site() if next(made) == 0 else nn.ReLU()


def growth(rounds: int) -> None:
    """How the cost of a bi-level step of resnet20 grows with what a search may vary; one thing at a time."""
    every = 'base,periodic,swish'
    settings: dict[str, dict[str, dict[str, Any]]] = {
        'unary and binary operations': {f'{len(Cell(ops).ops[0])} and {len(Cell(ops).ops[2])}': dict(ops=ops)
                                        for ops in ('identity,relu,tanh,add,mul', 'base', every)},
        'sites (the other 18 are ReLU)': {'1': dict(kind='one site'), '19': {}},
        'grid points': {f'{24 * k + 1:,}': dict(points=24 * k + 1) for k in (43, 171, 512, 1365)},
        'sampler': {name: dict(sampler=name) for name in ('mean', 'dirichlet')},
        'batch': {str(n): dict(batch=n) for n in (16, 64, 256)},
    }
    for what, variants in settings.items():
        benches = {name: Bench(**{'model': 'resnet20', 'kind': 'table', 'batch': 64, **options})
                   for name, options in variants.items()}
        ms = medians({name: bench.bilevel_step for name, bench in benches.items()}, rounds)
        drawing = medians({name: bench.drawing for name, bench in benches.items()}, rounds)
        print()
        table([what, 'bi-level step, ms', 'of it drawing, ms'], [[name, ms[name], drawing[name]] for name in variants])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=SIZES, help='this network alone')
    parser.add_argument('--growth', action='store_true', help='how the cost grows, instead')
    parser.add_argument('--rounds', type=int, default=9, help='of interleaved measurements')
    parser.add_argument('--memory', nargs=4, metavar='WORD', help=argparse.SUPPRESS)  # what `memory` starts
    given = parser.parse_args()
    if given.memory:
        model, kind, batch, step = given.memory
        print(own_memory(model, kind, int(batch), step))
        return
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {given.rounds} rounds\n')
    if given.growth:
        growth(given.rounds)
        return
    models = [given.only] if given.only else list(SIZES)
    mb = {model: {kind: memory(model, kind, SIZES[model]['batch'], step)  # first, while this process is small itself
                  for kind, step in (('plain', 'plain_step'), ('table', 'bilevel_step'))} for model in models}
    mb_found = {} if given.only else {name: memory('resnet20', kind, 64, 'plain_step') for name, kind in KINDS.items()}
    results = {model: compare(model, given.rounds, mb[model]) for model in models}
    table(['network', 'batch', 'plain step, ms', 'weight step, ms', 'architecture step, ms',
           '(weight + architecture) / plain', 'op by op / table *', 'memory / plain', 'drawing', 'batching',
           'step of search.py, ms'],
          [[model, SIZES[model]['batch'], r['plain_ms'], r['weight_ms'], r['arch_ms'], r['bilevel_over_plain'],
            r['opbyop_over_table'], r['memory_over_plain'], f"{100 * r['draw_share']:.1f} %",
            f"{100 * r['batch_share']:.1f} %", r['search_ms']] for model, r in results.items()])
    print('\n* measured at batch', ', '.join(f"{SIZES[model]['few']} ({model})" for model in models), 'and scaled')
    if not given.only:
        found(given.rounds, mb_found)
    print()
    print(json.dumps(results))


if __name__ == '__main__':
    main()

"""What a search costs, in steps of plain training.

    python results/bench.py                    ten minutes on two quiet cores; a table, then a line of JSON
    python results/bench.py --only resnet20    one network
    python results/bench.py --device cuda --dtype bfloat16
    python results/bench.py --scaling          larger networks of each family: a bi-level step and a plain one
    python results/bench.py --profile          what the time of a bi-level step goes to
    python results/bench.py --paper            how long a search with the preset paper takes
    python results/bench.py --replaced         a forward pass through `replaced` (needs torchvision)

The loop of search.py itself is timed, in the preset quick, on random images of 32 x 32 or random text. After
each of its steps all others have their turn, so that other work on the machine meets all alike; times are
medians. A plain step is one of evaluate.py, with the standard activation: same batches, clipping, optimiser.
"""
import argparse
import copy
import gc
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
from cell import LIMIT, Cell, Lookup, Site, lines, uniform_grid
from evaluate import configure, cross_entropy, precision, weight_optimizer
from models import STANDARD, network, replaced
from search import PRESETS, Config, Run, search
from space import Space

# the batch, and that of the cell op by op, which at the full one would need minutes and tens of GB
SIZES = {'resnet20': (64, 4), 'vit_tiny': (32, 4), 'minigpt': (16, 2)}
LARGE = {'resnet20': (64, 16), 'vit_tiny': (128, 16), 'minigpt': (64, 4)}  # on a GPU
DESCENT = dict(warmstart=0.0, shrink='none', discretise='shrink', candidates=0, judge=1)

class OpByOp(Cell):
    """The cell as DARTS and the paper compute it: every operation on every activation. Not normalised."""
    forward = Cell.evaluate

    def tabulate(self, weights: Optional[list[Tensor]] = None, standard: bool = False) -> None:
        """values: all weights and scalars, where the gradient that the search asks for ends."""
        parts = [*self.sample(), *self.scalars]
        self.values = torch.cat([part.flatten() for part in parts])
        pieces = self.values.split([part.numel() for part in parts])
        pieces = [piece.view_as(part) for piece, part in zip(pieces, parts)]
        weights, scalars = pieces[:6], {f'scalars.{k}': piece for k, piece in enumerate(pieces[6:])}
        self.functions = [lambda x: torch.func.functional_call(
            self, scalars, (x.flatten(), weights))[0].view(x.shape)] * self.sites
        self.learns = torch.is_grad_enabled()

class Setting:
    """A network, its batches and plain steps. cell: Cell or OpByOp; None for the standard activation."""
    def __init__(self, model: str, batch: int, cell: Optional[type[Cell]], rounds: int, **options: Any):
        draw = torch.Generator().manual_seed(0)
        if model.endswith('gpt'):
            tokens = 50257 if options.get('preset') == 'paper' else 256
            text = torch.randint(tokens, (400_000,), generator=draw, dtype=torch.int32)
            dataset = data.Dataset('random', 'text', text, text, tokens)
        else:
            part = (torch.randint(256, (2048, 3, 32, 32), generator=draw, dtype=torch.uint8),
                    torch.randint(10, (2048,), generator=draw))
            dataset = data.Dataset('random', 'image', part, part, 10, channels=3, side=32, mirror=True)
        given = dict(model=model, batch_size=batch, steps=rounds + 2)
        self.config = c = configure(Config, PRESETS, given | DESCENT | options)
        standard = {'relu': nn.ReLU, 'gelu': nn.GELU}[STANDARD[model]]
        self.cell = cell and cell(c.ops, c.clip, c.sampler, STANDARD[model], c.normalise)
        self.model = network(c, self.cell.site if cell else standard, dataset).to(c.device)
        self.cell = self.cell and self.cell.to(c.device)
        self.train, self.val = (data.Batches(dataset, part, batch, 0, augment, c.context, c.device)
                                for part, augment in zip(data.split(dataset, 0), (True, False)))
        self.optimizer = weight_optimizer(list(self.model.parameters()), c)

    def plain_step(self) -> None:
        x, y = next(self.train)
        with precision(self.config, self.model):
            loss = cross_entropy(self.model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tables(self) -> None:
        """What tables cost apart from lookups: made for both halves of a step, and the gradient to alphas."""
        with torch.no_grad():
            self.cell.tabulate()
        self.cell.tabulate()
        torch.autograd.grad(self.cell.values.sum(), list(self.cell.parameters()), allow_unused=True)

class Stopwatch(Run):
    """Times the halves of each step of the search, and after it each of the others. milliseconds: by name."""
    def __init__(self, config: Config, others: dict[str, Callable[[], None]]):
        super().__init__(config)
        self.others, self.milliseconds, self.begin = others, defaultdict(list), 0.0

    def lap(self, name: str) -> None:
        if self.config.device != 'cpu':
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.milliseconds[name].append(1000 * (now - self.begin))
        self.begin = now

    def watched(self, batches: Iterator) -> Iterator:
        """The training batches. The weight step begins where its batch is asked for."""
        while True:
            self.lap('architecture')
            yield next(batches)

    def after(self, *arguments: Any) -> None:
        super().after(*arguments)
        self.lap('weight')
        for name, step in self.others.items():
            step()
            self.lap(name)

def timed(setting: Setting, **others: Callable[[], None]) -> dict[str, float]:
    """Milliseconds by name: medians over the steps of a search, without the first two."""
    watch = Stopwatch(setting.config, others)
    batches = watch.watched(setting.train), setting.val
    search(setting.model, setting.cell, *batches, cross_entropy, setting.config, watch)
    return {name: statistics.median(times[2:]) for name, times in watch.milliseconds.items()}

def both_ways(function: Callable[[Tensor], Tensor], *inputs: Tensor) -> None:
    """Forward, and backward to all inputs."""
    torch.autograd.grad(function(inputs[0]), inputs, torch.ones_like(inputs[0]))

def compare(model: str, rounds: int, memory_over_plain: float, **options: Any) -> dict[str, float]:
    """The figures of one network."""
    batch, few = (SIZES if options['device'] == 'cpu' else LARGE)[model]
    plain, setting = (Setting(model, batch, kind, rounds, **options) for kind in (None, Cell))
    seen, site = [], next(module for module in setting.model.modules() if isinstance(module, Site))
    hook = site.register_forward_hook(lambda site, inputs, output: seen.append(inputs[0].detach()))
    setting.cell.tabulate()
    setting.model.forward(next(setting.val)[0])  # not compiled
    hook.remove()
    x = seen[0].requires_grad_()
    values = F.gelu(uniform_grid()).to(x.device).requires_grad_()
    fixed, learning = ((v, lines(v), LIMIT) for v in (values.detach(), values))  # weight, architecture step
    ms = timed(setting, plain=plain.plain_step, tables=setting.tables, gelu=lambda: both_ways(F.gelu, x),
               fixed=lambda: both_ways(lambda x: Lookup.apply(*fixed, x), x),
               learning=lambda: both_ways(lambda x: Lookup.apply(*learning, x), x, values))
    bilevel = (ms['weight'] + ms['architecture']) / ms['plain']
    result = dict(plain_ms=ms['plain'], weight_ms=ms['weight'], architecture_ms=ms['architecture'],
                  bilevel_over_plain=bilevel)
    if options['compile']:
        return result
    slow = timed(Setting(model, few, OpByOp, max(4, rounds // 2), **options), plain=plain.plain_step)
    slow_bilevel = (slow['weight'] + slow['architecture']) / slow['plain']
    compiled = compare(model, rounds, 0.0, **options | {'compile': True})
    return result | dict(bilevel_compiled_over_plain=compiled['bilevel_over_plain'],
                         compiled_plain_ms=compiled['plain_ms'], memory_over_plain=memory_over_plain,
                         opbyop_over_table=slow_bilevel / bilevel * batch / few,
                         draw_share=ms['tables'] / ms['plain'] / bilevel,
                         lookup_over_gelu=(ms['fixed'] + ms['learning']) / 2 / ms['gelu'])

def scaling(rounds: int, device: str) -> None:
    """Prints a table of the families by size, at small batches."""
    models = {**{f'resnet{depth}': 32 for depth in (20, 32, 44, 56, 110)},
              'vit_tiny': 16, 'vit_small': 16, 'vit_base': 4, 'minigpt': 8, 'tinygpt': 8, 'smallgpt': 4}
    print('| network | weights | batch | plain, ms | bi-level, ms | ratio | plain, MB | bi-level, MB |')
    print('|---|---|---|---|---|---|---|---|')
    for model, batch in models.items():
        plain, setting = (Setting(model, batch, kind, rounds, device=device) for kind in (None, Cell))
        ms = timed(setting, plain=plain.plain_step)
        bilevel, weights = ms['weight'] + ms['architecture'], sum(p.numel() for p in plain.model.parameters())
        mb = [memory(model, batch, kind) for kind in (None, Cell)] if device == 'cpu' else [math.nan] * 2
        print(f"| {model} | {weights:,} | {batch} | {ms['plain']:.0f} | {bilevel:.0f} "
              f"| {bilevel / ms['plain']:.2f} | {mb[0]:.0f} | {mb[1]:.0f} |", flush=True)

class Pace(Run):
    """times: when each step of a search ended."""
    def __init__(self, config: Config):
        super().__init__(config)
        self.times: list[float] = []

    def after(self, *arguments: Any) -> None:
        super().after(*arguments)
        if self.config.device != 'cpu':
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

def paper(models: list[str], rounds: int, device: str) -> None:
    """Prints what a step of the preset paper takes, with all operations, and a search at this pace."""
    print('| network | --dtype | --compile | to the second step, s | step, ms | whole search, minutes |')
    print('|---|---|---|---|---|---|')
    for compiled, dtype, model in itertools.product((False, True), ('float32', 'bfloat16'), models):
        c = configure(Config, PRESETS, dict(model=model, preset='paper', device=device))
        setting = Setting(model, c.batch_size, Cell, rounds, preset='paper', device=device, dtype=dtype,
                          compile=compiled)
        pace, begin = Pace(setting.config), time.perf_counter()
        search(setting.model, setting.cell, setting.train, setting.val, cross_entropy, setting.config, pace)
        step = statistics.median(b - a for a, b in itertools.pairwise(pace.times[1:]))
        print(f"| {model} | {dtype} | {'yes' if compiled else 'no'} | {pace.times[1] - begin:.1f} "
              f"| {1000 * step:.0f} | {step * c.steps / 60:.1f} |", flush=True)

def catching(rounds: int) -> None:
    """Prints what `replaced` with the original calls costs a forward pass, one thread."""
    from torchvision import models  # pip install torchvision
    torch.set_num_threads(1)
    x, seconds = torch.randn(8, 3, 224, 224), defaultdict(list)
    for name in ('resnet18', 'mobilenet_v2'):
        plain = models.get_model(name, weights=None).eval()
        both = {'plain': plain, 'replaced': replaced(copy.deepcopy(plain), lambda call: call, x).eval()}
        with torch.no_grad():
            for _, (kind, model) in itertools.product(range(rounds + 2), both.items()):
                begin = time.perf_counter()
                model(x)
                seconds[name, kind].append(time.perf_counter() - begin)
        before, after = (statistics.median(seconds[name, kind][2:]) for kind in both)
        print(f'{name}: {1000 * before:.0f} ms, replaced {1000 * after:.0f} ms, ratio {after / before:.2f}')

def peak() -> float:
    """MB: the largest resident size of this process so far."""
    unit = 1024 ** 2 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def alone(*arguments: str) -> dict[str, float]:
    """What this script prints, in a process of its own with one thread."""
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)

def steps(setting: Setting, count: int) -> None:
    """So many steps, of the search where there is a cell, else of plain training."""
    if setting.cell:
        timed(setting)
    for _ in range(0 if setting.cell else count):
        setting.plain_step()

def memory(model: str, batch: int, kind: Optional[type[Cell]]) -> float:
    """MB: all tensors at the peak of three steps, as PyTorch counts them: weights and data, too."""
    gc.collect()  # subtle: what is freed meanwhile must not count
    with torch.profiler.profile(profile_memory=True) as record:
        steps(Setting(model, batch, kind, 1, device='cpu'), 3)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 2 ** 20

# The outermost operation that has one of these words in its name says which part a time belongs to.
PARTS = {'convolutions': 'conv', 'matrix products': 'mm', 'attention': 'attention', 'normalisation': 'norm',
         'optimiser': 'Optimizer', 'lookups': 'Lookup'}

def profile(model: str, rounds: int) -> dict[str, float]:
    """Share of a bi-level step by part, in per cent of its CPU time."""
    setting = Setting(model, SIZES[model][0], Cell, rounds, device='cpu')
    real = setting.cell.tabulate
    def tabulate(*arguments: Any, **options: Any) -> None:
        with torch.profiler.record_function('drawing'):
            real(*arguments, **options)
    setting.cell.tabulate = tabulate
    with torch.profiler.profile() as record:
        timed(setting)
    times: dict[str, float] = defaultdict(float)
    def walk(event: Any, part: str) -> None:
        own = [name for name, word in {**PARTS, 'drawing': 'drawing'}.items() if word in event.name]
        part = part if part != 'rest' or not own else own[0]
        children = event.cpu_children
        times[part] += event.cpu_time_total - sum(child.cpu_time_total for child in children)
        for child in children:
            walk(child, part)
    for event in record.events():
        if event.cpu_parent is None:
            walk(event, 'rest')
    total = sum(times.values())
    return {name: round(100 * times[name] / total, 1) for name in (*PARTS, 'drawing', 'rest')}

def whole_space() -> dict[str, float]:
    """Seconds and MB of a process that looks through the paper's space for those nearest to a curve."""
    start, cpu = time.perf_counter(), time.process_time()
    Space().nearest(lambda x: F.gelu(x) + 0.1 * torch.sin(x))
    return {'seconds': time.perf_counter() - start, 'cpu_seconds': time.process_time() - cpu, 'mb': peak()}

def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--only', choices=SIZES, help='this network alone')
    parser.add_argument('--rounds', type=int, default=11, help='steps that are timed (11)')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument('--dtype', default='float32', help='float32 or bfloat16')
    parser.add_argument('--scaling', action='store_true', help='larger networks instead')
    parser.add_argument('--profile', action='store_true', help='what a bi-level step spends time on instead')
    parser.add_argument('--paper', action='store_true', help='how long a search of the preset paper takes')
    parser.add_argument('--replaced', action='store_true', help='what `replaced` costs a forward pass')
    parser.add_argument('--space', action='store_true', help=argparse.SUPPRESS)  # what `alone` starts
    given = parser.parse_args()
    if given.scaling:
        return scaling(given.rounds, given.device)
    if given.replaced:
        return catching(given.rounds)
    if given.space:
        return print(json.dumps(whole_space()))
    models = [given.only] if given.only else list(SIZES)
    if given.paper:
        return paper(models, given.rounds, given.device)
    if given.profile:
        shares = {model: profile(model, given.rounds) for model in models}
        for cells in (['network', *PARTS, 'drawing', 'rest'], 8 * ['---'],
                      *([model, *row.values()] for model, row in shares.items())):
            print(f"| {' | '.join(map(str, cells))} |")
        return
    options, space = dict(device=given.device, dtype=given.dtype, compile=False), {}
    mb = {m: (0.0, 1.0) for m in models}
    if given.device == 'cpu':
        space = {'space': alone('--space')}  # subtle: a process starts with its parent's peak, small here
        mb = {m: [memory(m, SIZES[m][0], kind) for kind in (Cell, None)] for m in models}
    results = {m: compare(m, given.rounds, mb[m][0] / mb[m][1], **options) for m in models} | space
    results = {name: {key: round(value, 3) for key, value in row.items()} for name, row in results.items()}
    name = torch.cuda.get_device_name() if given.device == 'cuda' else f'{torch.get_num_threads()} threads'
    print(f'torch {torch.__version__}, {name}, {given.dtype}\n')
    head = ['network', 'batch', *results[models[0]]]
    for cells in [head, ['---'] * len(head), *([m, (SIZES if given.device == 'cpu' else LARGE)[m][0],
                                            *results[m].values()] for m in models)]:
        print(f"| {' | '.join(map(str, cells))} |")
    if space:
        print('\nSpace: {seconds} s, of CPU {cpu_seconds} s, and {mb} MB'.format(**results['space']))
    print('\n' + json.dumps(results))

if __name__ == '__main__':
    main()

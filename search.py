"""Search an activation function: `python search.py --model resnet20`.

The loop is in `search`, and it is the lesson. A step has two halves that are strictly separated:

    1. architecture step   alphas and scalars of the cell, on a validation batch
    2. weight step         weights of the network, on a training batch

while operations are dropped one by one (paper: arXiv 2408.06820, sections 3.2 and 3.3). Then a few functions
are trained for a while, and the best of them on validation data is the result.
"""
import collections
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import data
import plot
from activation import NAMED, SHAPES, Activation, distance, named, nonlinearity, write
from cell import NORMALISERS, SAMPLERS, Cell, blame
from evaluate import (Parser, Presets, Training, append, average, check_device, configure, cosine,
                      cross_entropy, learning_rate, number, one_line_errors, option, precision, score,
                      seed_everything, space_of, train, weight_optimizer)
from models import STANDARD, network, teacher_and_student
from space import Match, Space

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, target) -> scalar

def bound(text: str) -> Optional[float]:
    return None if text == 'none' else number(1e-3, float)(text)

@dataclasses.dataclass
class Config(Training):
    """The settings of a search. warmstart and the shrink_* are shares of the steps."""
    out: str = option('', 'run folder; default runs/<model>-<data>-seed<seed>')
    teacher: str = option('', 'of --model toy: plant this function in a teacher network; is it found?')
    seed: int = option(0, 'of the split, the initial weights, the batches and the sampling', number(0))
    method: str = option('ours', 'paper: DrNAS, no normalisation, logarithmic shrinking, nothing afterwards',
                         choices=('ours', 'paper'))
    steps: int = option(500, 'bi-level steps: an architecture step and a weight step each', number(2))
    cell: str = option('paper', 'shape of the cell', choices=tuple(SHAPES))
    ops: str = option('base', 'base, periodic, swish, no-composites, names; a minus takes one out')
    clip: Optional[float] = option(10.0, "the paper's l, bound on unbounded operations; or none", bound)
    sampler: str = option('softmax', 'dirichlet is DrNAS, softmax DARTS', choices=SAMPLERS)
    normalise: str = option('scale', "of each site's table: its gain, its mean (centre)", choices=NORMALISERS)
    arch_lr: float = option(0.03, 'learning rate of alphas and scalars (Adam)', number(0, float))
    warmstart: float = option(0.15, 'share of the steps, with the standard activation', number(0, float))
    shrink: str = option('linear', 'pace of the drops: log has most early', choices=('linear', 'log', 'none'))
    discretise: str = option('gradient', 'functions to try: shrink, what is left of the cell; project, '
                             'formulas nearest to its curve; gradient, what is left, and the best scores',
                             choices=('shrink', 'project', 'gradient'))
    candidates: int = option(8, 'functions to try; 0: what the descent ends with is the result', number(0))
    trial_steps: float = option(1.0, 'length of a trial, as a multiple of --steps', number(0, float))
    arch_lr_end: float = option(1.0)      # share of arch_lr left at the end of the cosine
    warm_alphas: bool = option(False)     # whether the alphas learn during the warm start already
    shrink_from: float = option(0.3)      # the first drop
    shrink_until: float = option(0.92)    # the last drop
    temperature: float = option(0.1)      # of the softmax at shrink_until; 1 in the warm start
    start: float = option(0.5)            # weight of the standard when the cell takes over (softmax)
    trust: float = option(0.8)            # largest relative distance to the standard of a proposal, and
    lengths: tuple = option((3, 4, 5))    # the lengths of which the best are proposed,
    around: bool = option(True)           # and whether only those made with the standard activation
    trials_from: str = option('scratch')  # or trained: the weights of the descent
    judge: int = option(10)               # validation batches that judge a trial

    def at(self, share: float) -> int:
        """The step at a share of the steps; the last step is always after it."""
        return min(round(share * self.steps), self.steps - 1)

PAPER = dict(method='paper', sampler='dirichlet', normalise='none', shrink='log', shrink_until=0.98,
             arch_lr=6e-4, warmstart=0.02, shrink_from=0.04, warm_alphas=True, start=0.0, temperature=1.0,
             discretise='shrink', candidates=0)  # of --method paper

PLANTED = dict(data='teacher', teacher='mul(sigmoid(x), x)', steps=600, batch_size=256, lr=0.03, lr_end=0.0,
               weight_decay=0.0, arch_lr=0.1, arch_lr_end=0.0, warmstart=0.05, shrink='none',
               normalise='centre', start=0.0, temperature=1.0, discretise='project', trial_steps=0.15,
               trials_from='trained')

# What differs from evaluate.PRESETS. paper: its appendix; an epoch is the 75 % of the data that train the
# weights, one epoch is warm start, dropping begins in the third.
PRESETS: Presets = {
    'quick': {
        'resnet20': dict(steps=150, lr_end=0.1, trust=0.5, lengths=(2,), around=False),
        'vit_tiny': dict(steps=120, lr_end=0.1, arch_lr=0.1, judge=24, warmstart=0.6, shrink_from=0.65,
                         candidates=5, trial_steps=1.3),
        'minigpt': dict(steps=240, arch_lr=0.3, warmstart=0.6, shrink_from=0.65, candidates=7,
                        trial_steps=1.3),
        'toy': dict(PLANTED),
    },
    'evening': {
        'resnet20': dict(steps=1500, lr_end=0.1, arch_lr=0.003, trust=0.5, lengths=(2,), around=False, judge=40,
                         candidates=6),
        'vit_tiny': dict(steps=600, lr_end=0.1, arch_lr=0.03, judge=40, warmstart=0.3, shrink_from=0.35),
        'minigpt': dict(steps=1000, arch_lr=0.1, judge=40, warmstart=0.3, shrink_from=0.35),
        'toy': dict(PLANTED, steps=1500),
    },
    'paper': {
        'resnet20': dict(PAPER, steps=14650, batch_size=64, accumulate=2, lr_milestones=(), grad_clip=5.0),
        'vit_tiny': dict(PAPER, steps=3650, batch_size=128, accumulate=4, grad_clip=5.0),
        'minigpt': dict(PAPER, steps=1000, warmup=0.0, arch_lr=1e-3, warmstart=0.1, shrink_from=0.2),
        'toy': dict(PAPER, data='teacher', teacher='mul(sigmoid(x), x)', steps=1500, batch_size=256, lr=1e-2,
                    lr_end=1.0, weight_decay=0.0, grad_clip=5.0, arch_lr=1e-2),
    },
}

# ---- the search ----

def held(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network for an architecture step, its weights as constants and its buffers as copies: a validation
    batch leaves no trace in gradients or running statistics, a leak that is easy to miss."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return lambda x: functional_call(model, state, (x,))

def clip_gradients(gradients: list[Tensor], limit: float, *others: Tensor) -> bool:
    """Scale the gradients in place to a common norm of at most `limit` (0: leave them). Whether they and the
    others are finite; if not, do not take the step. To ask makes a GPU wait, once in a half-step."""
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if limit:
        torch._foreach_mul_(gradients, (limit / norm.clamp(min=1e-12)).clamp(max=1.0))
    return bool(torch.stack(torch._foreach_norm([norm, *others])).isfinite().all())

def operations_left(step: int, config: Config, first: int, last: int) -> int:
    """How many operations may be left after so many steps: `first` at shrink_from, `last` at shrink_until. The
    warm start, in which the alphas know nothing, drops none before its last step."""
    begin = config.at(max(config.shrink_from, config.warmstart))
    end = max(config.at(max(config.shrink_until, config.warmstart)), 1)
    if config.shrink == 'none' or step < min(begin + 1, end):
        return first
    share = min((step - begin) / max(end - begin, 1), 1.0) if step < end else 1.0
    if config.shrink == 'log' and share < 1:  # the k-th drop at step begin + (end - begin)^(k / drops)
        share = math.log(step - begin) / math.log(end - begin)
    return first - int((first - last) * share + 1e-9)

def search(model: nn.Module, cell: Cell, train_batches: Iterator, val_batches: Iterator, loss: Loss,
           config: Config, run: Optional['Run'] = None) -> tuple[Activation, dict[str, float]]:
    """Search an activation for `model`, whose activations are sites of `cell`.

    train_batches, val_batches: endless iterators of (input, target), disjoint data on the model's device.
    Returns the function found and its scores on validation batches.
    """
    for module in model.modules():  # a buffer made by expand() could not be restored
        module._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
    weights, architecture = [p for p in model.parameters() if p.requires_grad], list(cell.parameters())
    assert not {id(p) for p in weights} & {id(p) for p in architecture}, 'weights and architecture overlap'
    score(model, repeatable(val_batches, 1)(), loss)  # what does not fit shows now, not after the descent
    initial = copy.deepcopy(model.state_dict())
    cell.reset(1e-3, config.start)
    weight_opt = weight_optimizer(weights, config)
    arch_opt = torch.optim.Adam(architecture, lr=config.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    run = run or Run(config)
    run.hold(model=model, cell=cell, weight_opt=weight_opt, arch_opt=arch_opt, train=train_batches,
             val=val_batches)
    all_operations, warmstart = sum(map(len, cell.ops)), config.at(config.warmstart)
    # running statistics; a mask of -inf is none
    running = [b for b in model.buffers() if b.is_floating_point() and b.isfinite().all()]
    model.train()

    for step in range(run.state['step'], config.steps):
        warm, val_loss, dropped, trouble = step < warmstart, None, [], None
        collect = warm and config.discretise == 'gradient'
        cooled = (step - warmstart) / max(config.at(config.shrink_until) - warmstart, 1)
        cell.temperature = config.temperature ** min(max(cooled, 0.0), 1.0)
        arch_opt.param_groups[0]['lr'] = config.arch_lr * cosine(step / config.steps, config.arch_lr_end)

        # 1. Architecture step: alphas and scalars, on validation batches. autograd.grad hands the gradient
        #    over without writing a .grad anywhere, and the weights are constants.
        if collect or config.warm_alphas or not warm:
            gradients = [torch.zeros_like(p) for p in architecture]
            slopes = torch.zeros((), device=gradients[0].device)
            for _ in range(config.accumulate):
                x, y = next(val_batches)
                cell.tabulate(standard=collect)
                if not cell.learns:
                    break  # one operation a choice point is left, and none with a scalar
                with precision(config, x):
                    val_loss = loss(held(model)(x), y) / config.accumulate
                if collect:  # dL/df, which will score all functions of the space
                    slopes = slopes + torch.autograd.grad(val_loss, cell.values)[0]
                else:
                    found = torch.autograd.grad(val_loss, architecture, allow_unused=True)
                    gradients = [g if f is None else g + f for g, f in zip(gradients, found)]
            for p, g in zip(architecture, gradients):
                p.grad = g
            average([*gradients, slopes])
            others = [slopes] if val_loss is None else [slopes, val_loss.detach()]
            if not clip_gradients(gradients, config.grad_clip, *others):
                trouble = blame(model, cell, x) | {'skipped': 'architecture'}
            elif collect:  # the first inputs are counted when the histograms have seen some
                cell.collect(slopes, early=warmstart // 8 <= step <= warmstart // 4)
            else:
                arch_opt.step()
            arch_opt.zero_grad()

        # 2. Weight step: the weights, on training batches. The tables are made without a graph, so that
        #    nothing leads back to the alphas.
        for group in weight_opt.param_groups:
            group['lr'] = learning_rate(step, config)
        before = [b.clone() for b in running]
        for _ in range(config.accumulate):
            x, y = next(train_batches)
            with torch.no_grad():
                cell.use_standard() if warm else cell.tabulate()
            with precision(config, x):
                train_loss = loss(model(x), y) / config.accumulate
            train_loss.backward()
        gradients = [p.grad for p in weights if p.grad is not None]
        average([*gradients, cell.seen, *running])
        if clip_gradients(gradients, config.grad_clip, train_loss.detach(), *running):
            weight_opt.step()
        else:
            trouble = blame(model, cell, x) | {'skipped': 'weights'}
            torch._foreach_copy_(running, before)
        weight_opt.zero_grad()

        # 3. Progressive shrinking: drop what the alphas like least, until each choice point has one left.
        while cell.operations() > operations_left(step + 1, config, all_operations, len(cell.choices)):
            dropped.append(cell.drop())

        # 4. Log and checkpoint.
        run.after(step + 1, train_loss, val_loss, dropped, trouble)

    return candidates(model, cell, initial, train_batches, val_batches, loss, config, run)

def repeatable(batches: Iterator, count: int) -> Callable[[], Iterator]:
    """The next `count` batches, as often as wanted. Those of data.py are made again; others are kept."""
    if hasattr(batches, 'state_dict'):
        start = copy.copy(batches)
        return lambda: itertools.islice(copy.copy(start), count)
    kept = list(itertools.islice(batches, count))
    return lambda: iter(kept)

def steepest(space: Space, cell: Cell, trust: float) -> list[Match]:
    """The functions that lower the loss most, to first order, when one of them replaces the standard at its
    second moment: from the gradient that `cell` has collected, no function is trained.

    Only functions at a distance from the standard, sqrt(2 - 2 cos), between 0.1 and trust, that do not stand
    still on the first inputs: 0.6 of the second moment is variance, a quarter of the inputs has a slope.
    """
    def pool(values: Tensor, grid: Tensor) -> Tensor:  # spread linearly onto the points of the space
        away = (grid.cpu().double().clamp(-limit, limit)[:, None] - space.x).abs() / step
        return values.cpu().double() @ (1 - away).clamp(min=0)
    limit, step, bins = space.x[-1].item(), (space.x[1] - space.x[0]).item(), cell.grid[cell.bins]
    gradient, density, early = pool(cell.gradient, cell.grid), pool(cell.inputs, bins), pool(cell.early, bins)
    density, early = density / density.sum(), early / early.sum()
    standard = cell.standard(space.x).detach()
    power = density @ standard.square()

    def change(f: Tensor) -> Tensor:
        f = f * (power / (f.square() @ density)).sqrt()[:, None]
        far = (2 - 2 * (f @ (density * standard)) / power).clamp(min=0).sqrt()
        moves = (f @ early).square() < 0.4 * (f.square() @ early)
        alive = (f.diff(dim=1).abs() > 0.01 * step).double() @ early[1:] > 0.25
        fine = (far > 0.1) & (far < trust) & moves & alive
        return torch.where(fine, (f - standard) @ gradient, torch.inf)
    return space.scan(change, shift=False)

def proposals(cell: Cell, config: Config) -> list[Activation]:
    """The functions to try, see --discretise: neither nearly straight lines nor the standard activation."""
    trees = [cell.tree()]
    if config.discretise != 'shrink':
        space = Space(config.ops, config.clip, config.cell)
    if config.discretise == 'project':
        seen = torch.from_numpy(np.interp(space.x, cell.grid[cell.bins].cpu(), cell.seen.mean(0).cpu()))
        trees = [match.tree for match in space.nearest(cell.curve(space.x), seen, 0)[0]][::-1]
    elif config.discretise == 'gradient':
        matches = sorted(steepest(space, cell, config.trust), key=lambda match: match.score)
        if config.around:
            matches = [match for match in matches if cell.standard.expression in write(match.tree)]
        of_length = [[match.tree for match in matches if match.length == n] for n in config.lengths]
        trees += [tree for row in itertools.zip_longest(*of_length) for tree in row if tree]
    found, bend = [], 0.01 if config.teacher else 0.15  # how far from a straight line
    for f in (Activation(tree, config.clip) for tree in trees):
        new = len(found) < config.candidates and distance(f, cell.standard, False) > 0.01
        found += [f] if new and nonlinearity(f) > bend else []
    return [f.to(cell.grid.device) for f in found or [Activation(cell.tree(), config.clip)]]

def in_its_place(f: Activation, cell: Cell) -> Callable[[Tensor], Tensor]:
    """f at the output scale and shift that come closest to the relaxed cell, which the weights are used to."""
    with torch.no_grad():
        cell.tabulate(cell.sample(noise=False))
        p, y = cell.seen.mean(0).double(), f(cell.grid[cell.bins]).double()
        relaxed = cell.values.mean(0)[cell.bins].double()
        y_mean, mean = (p * y).sum(), (p * relaxed).sum()  # subtle: a product @ is not the same bit for bit
        gain = ((p * (y - y_mean) * relaxed).sum() / (p * (y - y_mean).square()).sum().clamp(min=1e-12)).float()
        shift = (mean - gain * y_mean).float()
    return lambda x: gain * f(x) + shift

def candidates(model: nn.Module, cell: Cell, initial: dict[str, Tensor], train_batches: Iterator,
               val_batches: Iterator, loss: Loss, config: Config, run: 'Run',
               ) -> tuple[Activation, dict[str, float]]:
    """The best of the proposals on validation data, trained on the same batches from the same weights.

    A large weight in the mixture does not mean that an operation works alone, and a function that suits
    weights already trained can be useless from scratch.
    """
    functions, judge = proposals(cell, config), repeatable(val_batches, config.judge)
    if not config.candidates:
        cell.use(functions[0])
        if config.discretise != 'project':
            with torch.no_grad():
                cell.tabulate()  # as the weights know it, normalised
        return functions[0], score(model, judge(), loss)
    trial = dataclasses.replace(config, steps=max(2, round(config.trial_steps * config.steps)))
    batches = repeatable(train_batches, trial.steps * config.accumulate)
    start = initial if config.trials_from == 'scratch' else copy.deepcopy(model.state_dict())
    results, seen = run.state['results'], cell.seen.clone()
    for f in [cell.standard, *functions]:
        if f.expression not in results:
            model.load_state_dict(start)
            if f is cell.standard:
                cell.use_standard()
            else:
                cell.use(f if start is initial else in_its_place(f, cell))
            train(model, batches(), loss, trial)
            results[f.expression] = score(model, judge(), loss)
            model.load_state_dict(start)  # what is saved now must propose the same functions again
            cell.seen.copy_(seen)
            run.tried(f, results[f.expression])
    finite = [f for f in functions if math.isfinite(results[f.expression]['loss'])] or functions
    best = min(finite, key=lambda f: results[f.expression]['loss'])
    return best, results[best.expression] | {'standard_loss': results[cell.standard.expression]['loss']}

# ---- the run folder ----

class Run:
    """Log, checkpoint and progress line of a search; without a folder nothing is kept.

    log.jsonl: the settings, a line each 1 % of the steps, for each skipped step, and for each function tried.
    checkpoint.pt: everything needed to go on exactly, replaced every minute.
    """

    def __init__(self, config: Config, folder: Optional[Path] = None, resumed: Optional[dict] = None):
        self.config, self.folder, self.resumed = config, folder, resumed
        self.state: dict[str, Any] = {'step': 0, 'seconds': 0.0, 'log_size': 0, 'skipped': 0, 'dropped': [],
                                      'results': {}}
        if resumed:
            self.state = {key: resumed[key] for key in self.state}
        self.first, self.started = self.state['step'], time.monotonic()
        self.saved = self.shown = self.started
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / 'log.jsonl', 'ab')
            try:
                import fcntl  # keeps other processes out until this one ends, however it ends
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows
                pass
            except BlockingIOError:
                self.file.close()
                raise ValueError(f'{folder}: another process is there; choose another --out') from None
            self.file.truncate(self.state['log_size'])  # what came after the checkpoint is done again

    def hold(self, **holders: Any) -> None:
        """What a checkpoint holds; in a run that goes on, restored from it."""
        self.holders = {name: holder for name, holder in holders.items() if hasattr(holder, 'state_dict')}
        if self.resumed:
            for name, holder in self.holders.items():
                holder.load_state_dict(self.resumed[name])
            random.setstate(self.resumed['python'])
            torch.set_rng_state(self.resumed['random'])
            if self.resumed['cuda']:
                torch.cuda.set_rng_state_all(self.resumed['cuda'])
        elif self.folder:
            self.save()
        if self.folder and not self.state['log_size']:
            append(self.folder / 'log.jsonl', {'config': dataclasses.asdict(self.config)})

    def after(self, step: int, train_loss: Tensor, val_loss: Optional[Tensor], dropped: list[str],
              trouble: Optional[dict[str, Any]]) -> None:
        """Log, progress and checkpoint after a step. Raises ValueError after 20 skipped steps in a row."""
        state, config = self.state, self.config
        skipped = state['skipped'] + 1 if trouble else 0
        state.update(step=step, dropped=state['dropped'] + dropped, skipped=skipped)
        if state['skipped'] == 20:
            raise ValueError(f"20 steps in a row were not finite, most at site {trouble['site']}, operation "
                             f"{trouble['op']}; try a smaller --lr, a smaller --clip, or --normalise scale")
        if not self.folder:
            return
        if trouble:
            append(self.folder / 'log.jsonl', {'step': step, **trouble})
        if step % max(1, config.steps // 100) == 0 or step == config.steps:  # here losses leave the device
            cell = self.holders['cell']
            losses = [v if v is None else v.item() * config.accumulate for v in (train_loss, val_loss)]
            curve = cell.curve(torch.linspace(-4, 4, 81, device=cell.grid.device))
            append(self.folder / 'log.jsonl', {
                'step': step, 'train_loss': losses[0], 'val_loss': losses[1], 'dropped': state['dropped'],
                'curve': [round(v, 4) for v in curve.tolist()], 'weights': cell.named_weights()})
            state['dropped'] = []
            left = (time.monotonic() - self.started) / (step - self.first) * (config.steps - step) / 60
            shown = ' '.join(f'{v:.3f}' for v in losses if v is not None)
            self.show(f'step {step}/{config.steps} {100 * step // config.steps:3d}% | train, val {shown} | '
                      f'{cell.operations()} ops left | {Activation(cell.tree(), config.clip).formula} | '
                      f'{left:.1f} min left', step == config.steps)
        if time.monotonic() - self.saved > 60 or step == config.steps:
            self.save()

    def tried(self, f: Activation, result: dict[str, float]) -> None:
        if self.folder:
            append(self.folder / 'log.jsonl', {'tried': f.expression, **result})
            self.show(f"tried: validation loss {result['loss']:.4f}  {f.formula}", True)
            self.save()

    def close(self) -> None:
        if self.folder:
            self.file.close()

    def elapsed(self) -> float:
        return self.state['seconds'] + time.monotonic() - self.started

    def save(self) -> None:
        content, size = io.BytesIO(), (self.folder / 'log.jsonl').stat().st_size
        torch.save({**{name: holder.state_dict() for name, holder in self.holders.items()}, **self.state,
                    'seconds': self.elapsed(), 'log_size': size, 'random': torch.get_rng_state(),
                    'python': random.getstate(), 'cuda': torch.cuda.get_rng_state_all(),
                    'config': dataclasses.asdict(self.config)}, content)
        write_whole(self.folder / 'checkpoint.pt', content.getbuffer())
        self.saved = time.monotonic()

    def show(self, line: str, important: bool) -> None:
        """On a terminal one line, rewritten in place; into a pipe a plain line every ten seconds."""
        if sys.stdout.isatty():
            print('\r\x1b[K' + line[:os.get_terminal_size().columns - 1], end='\n' * important, flush=True)
        elif important or time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            print(line, flush=True)

    def finish(self, found: Activation, validation: dict[str, float]) -> None:
        """Write activation.json and found.py, and say what was found, where it is, and what to run next."""
        config, folder, short = self.config, self.folder, found.shortened()
        result = {'expression': short.expression, 'formula': short.formula, 'latex': short.latex,
                  'scalars': [s.item() for s in short.scalars], 'model': config.model, 'data': config.data,
                  'seed': config.seed, 'validation': validation, 'seconds': round(self.elapsed(), 1),
                  'config': dataclasses.asdict(config),
                  'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                               'threads': torch.get_num_threads()}}
        lines = ['', f'    f(x) = {short.formula}', '']
        if not nonlinearity(short) > 0.01:
            lines.append('warning:     a straight line: a network learns little with it; try another --seed')
        if config.teacher:
            result['distance'] = distance(short.double(), named(config.teacher))
            away = f"{100 * result['distance']:.2f} % away"
            lines.append(f'planted:     {named(config.teacher).formula}, {away}')
        note = f'Found by search.py: {config.model} on {config.data}, seed {config.seed}.'
        write_whole(folder / 'found.py', short.float().module(note).encode())
        write_whole(folder / 'activation.json', json.dumps(result, indent=1).encode())
        command = ['python', os.path.join(os.path.dirname(sys.argv[0]), 'evaluate.py'), str(folder)]
        names = ['model', 'preset', 'data', 'data_dir', 'side', 'only']
        for name in names + ['tokens', 'context'] * config.data.startswith('tinystories'):
            if (value := str(getattr(config, name))) not in ('', '0', 'quick', 'teacher', 'bytes'):
                command += ['--' + name.replace('_', '-'), value]
        scores = ', '.join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in validation.items())
        lines += [f'validation:  {scores}', f'time:        {self.elapsed() / 60:.1f} minutes',
                  f'files:       {folder}/activation.json, found.py, log.jsonl, checkpoint.pt',
                  f'next:        {shlex.join(command)}']
        print('\n'.join(lines), flush=True)

def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it, down to the disk, then in its place."""
    with open(f'{path}.tmp', 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f'{path}.tmp', path)

# ---- the command line ----

def prepare(config: Config) -> tuple[nn.Module, Cell, Iterator, Iterator, Loss]:
    """The network with the sites of a new cell in it, the cell, training and validation batches, the loss."""
    seed_everything(config.seed)
    standard, seeds = STANDARD.get(config.model, 'relu'), (2 * config.seed, 2 * config.seed + 1)
    cell = Cell(config.ops, config.clip, config.sampler, standard, config.normalise, config.cell)
    if config.teacher:
        teacher, model = teacher_and_student(lambda: named(config.teacher), cell.site)
        teacher, loss = teacher.to(config.device), F.mse_loss
        batches = [data.TeacherBatches(teacher, config.batch_size, seed, config.device) for seed in seeds]
    else:
        dataset = data.load(config.data, config.data_dir or None, config.tokens, config.side or None)
        model, loss = network(config, cell.site, dataset), cross_entropy
        if ':' in config.model:  # not ours: proposals are compared with its most frequent activation
            name = collections.Counter(key[-2] for key in model.index).most_common(1)[0][0]
            cell.standard = named(name) if name in NAMED else cell.standard
        batches = [data.Batches(dataset, part, config.batch_size, seed, seed % 2 == 0, config.context,
                                config.device) for part, seed in zip(data.split(dataset, config.seed), seeds)]
    return model.to(config.device), cell.to(config.device), *batches, loss

def resume(folder: Path, given: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Configuration and checkpoint of a run. Only --data-dir and --device may differ; else ValueError."""
    try:
        checkpoint = torch.load(folder / 'checkpoint.pt', map_location='cpu', weights_only=True)
        config = Config(**{**checkpoint['config'], 'out': str(folder)})
    except Exception as error:  # torch.load raises a dozen kinds on files that are something else
        raise ValueError(f'--resume {folder}: no checkpoint of a run ({type(error).__name__})') from None
    for name in vars(config).keys() & given.keys() - {'out'}:
        if name == 'device':
            config.device = check_device(given[name])
        elif name == 'data_dir':
            config.data_dir = os.path.abspath(given[name])
        elif given[name] != getattr(config, name):
            raise ValueError(f'--resume keeps the settings of the run: {name} is {getattr(config, name)}')
    return config, checkpoint

def main(arguments: Optional[list[str]] = None) -> None:
    parser, folder = Parser(description=__doc__, allow_abbrev=False), None
    parser.add_argument('--resume', metavar='RUN', help='go on with the run in this folder, exactly')
    parser.add_argument('--plot', metavar='RUN', help='draw search.png of a run (needs matplotlib)')
    parser.add_settings(Config, PRESETS)
    with one_line_errors(lambda: f'go on with --resume {folder}' if folder else 'nothing was written'):
        given, checkpoint = vars(parser.parse_args(arguments)), None
        if given['plot']:
            print(plot.search(Path(given['plot'])))
            return
        if given['resume']:
            config, checkpoint = resume(Path(given['resume']), given)
        else:
            given = {**(PAPER if given.get('method') == 'paper' else {}), **given}
            config = configure(Config, PRESETS, given)
            name = Path(config.model).name.replace('.py:', '-').replace(':', '-')
            config.out = config.out or f'runs/{name}-{config.data}-seed{config.seed}'
            planted = config.data == 'teacher'
            if planted and config.data_dir or not planted and given.get('teacher'):
                raise ValueError('--teacher makes the data of --model toy: leave out --data and --data-dir')
            config.teacher = config.teacher if planted else ''
            if planted and math.isnan(nonlinearity(named(config.teacher))):
                raise ValueError(f'--teacher {config.teacher} is a constant: plant a function of x')
        first = not (dist.is_initialized() and dist.get_rank())  # of torchrun's ranks: it alone writes
        files = ('activation.json', 'found.py', 'search.png', 'checkpoint.pt', 'log.jsonl')
        paths = [Path(config.out) / name for name in files[:1 if checkpoint else 5]]
        if there := [path for path in paths if first and path.exists() and path.stat().st_size]:
            raise ValueError(f'{there[0]} already exists; choose another --out, or go on with an '
                             f'unfinished run by --resume {config.out}')
        model, cell, train_batches, val_batches, loss = prepare(config)
        folder, weights = Path(config.out), sum(p.numel() for p in model.parameters())
        spellings = math.prod(map(len, cell.ops))
        print(f'searching {spellings:,} spellings for {config.model} ({weights:,} weights, {cell.sites} '
              f'sites), data {config.data}: {config.steps} steps, then {config.candidates} functions tried; '
              f'run folder {config.out}', flush=True)
        with contextlib.closing(Run(config, folder if first else None, checkpoint)) as run:
            found = search(model, cell, train_batches, val_batches, loss, config, run)
            if first:
                run.finish(*found)

if __name__ == '__main__':
    main()

"""Search an activation function: `python search.py --model resnet20`.

The loop is in `search`, and it is the lesson. Each step has two halves that are strictly separated:

    1. architecture step   alphas and scalars of the cell, one Adam step on a validation batch
    2. weight step         weights of the network, one step on a training batch

while operations are dropped one by one until one function is left (paper: arXiv 2408.06820, sections 3.2 and 3.3).
"""
import contextlib
import copy
import dataclasses
import io
import itertools
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional, get_type_hints

try:
    import fcntl
    import resource
except ImportError:  # Windows: nothing keeps two processes out of one run folder there
    fcntl = resource = None

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import figures
from activation import Activation, bend, distance, named
from cell import NORMALISERS, SAMPLERS, Cell, Site, blame
from models import (Failed, Parser, Training, check_memory, choose_device, configure, cross_entropy, json_line,
                    learning_rate, memory_needed, network, one_line_errors, option, options, read_json, standard_of,
                    teacher_and_student, weight_optimizer, within, write_line, write_whole)
from ops import valid


class ConfigError(ValueError):
    """An option that cannot be. The message names it, and what can be."""


@dataclass
class Config(Training):
    """The options of a search. warmstart, shrink_from and shrink_until are steps, or below 1 a share of all steps, so
    that --steps alone rescales a search. Each departure from the paper is an option; 'paper' says its value."""
    seed: int = option(0, 'of the split, the initial weights, the batches and the sampling')
    out: str = option('', 'run folder; default runs/<model>-<data>-seed<seed>')
    teacher: str = option('', 'for --model toy: plant this function in a teacher network and see whether it is found')
    steps: int = option(500, 'bi-level steps; one is an architecture step and a weight step')
    # the cell
    arch_lr: float = option(0.03, 'of alphas and scalars (Adam, betas 0.5 and 0.999)')
    arch_weight_decay: float = option(1e-3, 'of alphas and scalars')
    warmstart: float = option(0.15, 'first steps, in which the weights train with the standard activation')
    warm_alphas: bool = option(False, 'the alphas learn during the warm start already (paper); else they rest')
    shrink_from: float = option(0.3, 'step at which dropping operations starts')
    shrink_until: float = option(0.92, 'step at which one operation a choice point is left')
    shrink: str = option('linear', 'pace of the drops: linear, log (paper: most of them early) or none (all at the end)')
    sampler: str = option('softmax', f'how alphas become weights: {", ".join(SAMPLERS)} (paper: dirichlet)')
    temperature: float = option(0.1, 'of the softmax at shrink_until, falling from 1: the cell is nearly discrete by then')
    normalise: str = option('scale', "take gain out of each site's table: none (paper), scale or centre")
    ops: str = option('base', 'operations: base, periodic, swish, no-composites, names; a minus takes one out')
    clip: Optional[float] = option(10.0, "the paper's l, bound on the output of unbounded operations; 'none' for none")
    points: int = option(8193, 'of the grid on which the cell is tabulated; best an odd number, at most 32,767')
    # after the descent (ours)
    refine: int = option(0, 'weight steps for each neighbour of the discrete cell, one operation changed; 0: none (paper)')
    start: float = option(0.5, 'weight of the standard activation when the relaxed cell takes over; 0: none (paper)')
    restarts: int = option(1, 'searches from fresh alphas and weights; their functions meet in the run-off')
    target: float = option(0.0, 'no restart once the validation loss is below this')
    runoff: int = option(24, 'candidates trained from scratch and judged on validation; 0: none (paper)')
    runoff_steps: float = option(0.12, 'steps of the first round; each further one takes a third of the field for twice as long')
    # the log
    checkpoint_every: float = option(60.0, 'seconds between checkpoints')

    def check(self) -> None:
        super().check()
        valid('--sampler', self.sampler, SAMPLERS)
        valid('--normalise', self.normalise, NORMALISERS)
        valid('--shrink', self.shrink, ('linear', 'log', 'none'))
        valid('--data', self.data, data.DATA if not self.teacher else ('teacher',))
        within(self, 0, 'runoff', 'seed', 'arch_weight_decay', 'warmstart', 'shrink_from', 'shrink_until', 'arch_lr',
               'shrink_until', 'runoff_steps', 'checkpoint_every', 'refine', 'target')
        within(self, 20, 'steps')
        within(self, 1, 'restarts')
        if not 0 <= self.start < 1:
            raise ConfigError(f'--start {self.start}: it must be a share, 0 up to below 1')
        within(self, 1e-3, 'temperature')
        within(self, 64, 'points')
        if self.points > 32768:
            raise ConfigError(f'--points {self.points}: at most 32768, the index of a lookup has 16 bits')
        if self.clip is not None and not 0 < self.clip < 1e12:
            raise ConfigError(f"--clip {self.clip}: it must be above 0, or 'none'")
        warmstart, first, last = (self.at(v) for v in (self.warmstart, self.shrink_from, self.shrink_until))
        if not warmstart <= first < last < self.steps:
            raise ConfigError(f'--warmstart {warmstart}, --shrink-from {first}, --shrink-until {last} and --steps '
                              f'{self.steps} must come in this order, with steps left after the last drop')


# The settings that depend on the model. laptop: chosen on the built-in samples, see results/README.md. paper: its
# appendix; epochs are counted in steps of the 75 % of the data that trains the weights.
_PAPER = dict(sampler='dirichlet', normalise='none', warm_alphas=True, shrink='log', shrink_until=0.98,
              grad_clip=5.0, start=0.0, runoff=0)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    'laptop': {
        'resnet20': dict(data='cifar10_16', steps=250, batch_size=64, optimizer='sgd', lr=0.1, lr_end=0.1, warmup=0.05,
                         weight_decay=5e-4, runoff_steps=0.14),
        'vit_tiny': dict(data='cifar10_16', steps=120, batch_size=32, lr=5e-4, lr_end=0.1, warmup=0.1,
                         weight_decay=0.05),
        'minigpt': dict(data='tinystories_sample', steps=150, batch_size=8, context=64, lr=3e-3, lr_end=0.1, warmup=0.1,
                        weight_decay=0.1, runoff_steps=0.12),
        # a search takes some 6 s; the first is mostly enough
        'toy': dict(data='teacher', teacher='mul(sigmoid(x), x)', steps=600, batch_size=256, lr=0.03, lr_end=0.0,
                    weight_decay=0.0, arch_lr=0.1, warmstart=0.05, shrink_until=0.9, normalise='centre', points=1024,
                    start=0.0, runoff=0, refine=10, restarts=8, target=2e-4),
    },
    'paper': {
        # 293 steps an epoch: 37,500 images in batches of 64, two accumulated. 50 epochs, one of them warm
        # start, shrinking from the second on: shares, so that --steps rescales the search.
        'resnet20': dict(data='cifar10', steps=14650, batch_size=64, accumulate=2, optimizer='sgd', lr=0.1,
                         weight_decay=1e-4, arch_lr=6e-4, warmstart=0.02, shrink_from=0.04, **_PAPER),
        # 73 steps an epoch: batches of 128, four accumulated
        'vit_tiny': dict(data='cifar10', steps=3650, batch_size=128, accumulate=4, lr=1e-3, lr_end=0.0,
                         weight_decay=0.0, arch_lr=6e-4, warmstart=0.02, shrink_from=0.04, **_PAPER),
        'minigpt': dict(data='tinystories', steps=1000, batch_size=64, accumulate=10, context=256, tokens='gpt2', lr=1e-3, lr_end=0.1,
                        weight_decay=0.1, dropout=0.2, arch_lr=1e-3, warmstart=0.1, shrink_from=0.2,
                        **{**_PAPER, 'grad_clip': 1.0}),
        'toy': dict(data='teacher', teacher='mul(sigmoid(x), x)', steps=1500, batch_size=256, lr=1e-2, weight_decay=0.0,
                    arch_lr=1e-2, warmstart=0.07, shrink_from=0.14, **_PAPER),
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# The search.

@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """For the architecture step: no gradient for the weights, which also saves their third of the backward pass, and
    no trace of a validation batch in running statistics (batch norm's, or any layer's), a leak that is easy to miss."""
    weights, buffers = [p for p in model.parameters() if p.requires_grad], list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
        if buffers:
            torch._foreach_copy_(buffers, kept)


MAX_SKIPPED = 20  # steps in a row that may be skipped before the search ends


def bound(gradients: list[Tensor], limit: float, *others: Tensor) -> bool:
    """Scale the gradients in place to a common norm of at most `limit` (0: leave them). Returns whether they and the
    `others` (the loss, running statistics) are finite: if not, the step must not be taken.

    Asking for that makes a GPU wait, for some 20 microseconds of a half-step; in return nothing that is not finite gets
    anywhere, and is seen where it happens.
    """
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    finite = bool(torch.stack(torch._foreach_norm([norm, *others])).isfinite().all())
    if finite and limit:
        torch._foreach_mul_(gradients, (limit / norm.clamp(min=1e-12)).clamp(max=1.0))
    return finite


def drops_due(step: int, config: Config, drops: int) -> int:
    """How many of all `drops` are due by the end of `step`: 0 before shrink_from, all of them at shrink_until.

    >>> [drops_due(s, Config(steps=10, shrink_from=4, shrink_until=8), 104) for s in (3, 4, 5, 6, 7, 8)]
    [0, 0, 26, 52, 78, 104]
    """
    first, last = config.at(config.shrink_from), config.at(config.shrink_until)
    if config.shrink == 'none':
        return drops if step >= last else 0
    done = min(max(step - first, 0), last - first)
    if config.shrink == 'linear':
        return drops * done // max(last - first, 1) if step < last else drops
    # log (paper): the k-th drop at step first + (last - first)^(k / drops), so that most come early
    if step >= last:
        return drops
    return 0 if done < 1 else int(drops * math.log(done + 1e-9) / math.log(last - first)) if last - first > 1 else drops


def cell_of(model: nn.Module) -> Cell:
    """The one cell whose sites stand in `model`. Raises ConfigError when there is none, or more than one."""
    cells = {id(m.cell): m.cell for m in model.modules() if isinstance(m, Site)}
    if len(cells) != 1:
        raise ConfigError(f'the model holds sites of {len(cells)} cells; build it with activation=cell.site of one Cell')
    return cells.popitem()[1]


def search(model: nn.Module, train_batches: Iterator, val_batches: Iterator, loss: Callable[[Tensor, Tensor], Tensor],
           config: Config, report: Callable[..., None] = lambda row, snapshot: None,
           resumed: Optional[dict[str, Any]] = None) -> tuple[Activation, dict[str, float]]:
    """Search an activation for `model`, whose activations are sites of one relaxed `Cell`.

    train_batches, val_batches: endless iterators of (input, target) on the model's device, from disjoint data.
    loss: (output, target) -> scalar tensor. report: called after every step with what happened in it, and a function
    whose value is everything that `resumed` needs to go on from there, exactly.
    Returns the activation found, and how it scored on validation batches.
    """
    cell = cell_of(model)
    weights, architecture = [p for p in model.parameters() if p.requires_grad], list(cell.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in architecture}, 'weights and architecture overlap'
    drops, warmstart, discrete = cell.operations() - 6, config.at(config.warmstart), config.at(config.shrink_until)
    # What is neither in a module nor in an optimiser. skipped: steps that were not finite, in all and in a row just now.
    state: dict[str, Any] = {'step': 0, 'restart': 0, 'runoff': None, 'initial': copy.deepcopy(model.state_dict()),
                             'proposals': [cell.standard.expression], 'found': [], 'skipped': 0, 'in_a_row': 0}
    # What a forward pass changes besides: running statistics of batch norm, and the cell's histograms of inputs.
    running = [b for b in [*model.buffers(), cell.seen] if b.is_floating_point()]
    holders = {'model': model, 'cell': cell, 'train_batches': train_batches, 'val_batches': val_batches,
               **optimizers(weights, architecture, config)}
    if resumed:
        state = restore(resumed, holders)
    else:
        cell.reset(1e-3, config.start)

    def snapshot() -> dict[str, Any]:
        return {'state': state, **{name: holder.state_dict() for name, holder in holders.items()},
                'random': torch.get_rng_state(),
                'random_cuda': torch.cuda.get_rng_state() if cell.grid.is_cuda else None}

    def bilevel(rate: float, warm: bool) -> dict[str, Any]:
        """One step of both levels at this learning rate of the weights; what is to be reported of it."""
        weight_opt, arch_opt, row = holders['weight_opt'], holders['arch_opt'], {}

        # 1. Architecture step: alphas and scalars, on validation batches. autograd.grad hands the gradients over
        #    without writing a .grad anywhere; the weights do not even ask for one.
        if not warm or config.warm_alphas:
            gradients = [torch.zeros_like(p) for p in architecture]
            for _ in range(config.accumulate):
                x, y = next(val_batches)
                cell.draw()
                if not cell.learns:
                    break  # one operation a choice point, and none with a scalar: nothing left to learn here
                with frozen(model):
                    val_loss = loss(model(x), y)
                    found = torch.autograd.grad(val_loss, architecture, allow_unused=True)
                used = [(g, f) for g, f in zip(gradients, found) if f is not None]
                torch._foreach_add_([g for g, _ in used], [f for _, f in used], alpha=1 / config.accumulate)
                row['val_loss'] = val_loss.detach()
            for p, g in zip(architecture, gradients):
                p.grad = g
            if bound(gradients, config.grad_clip, row.get('val_loss', cell.grid)):
                arch_opt.step()
            else:
                with frozen(model):
                    row['trouble'] = {'skipped': 'architecture', 'loss': val_loss.item(), **blame(model, cell, x)}
            arch_opt.zero_grad()

        # 2. Weight step: the weights, on training batches. The tables are drawn without a graph, so that nothing
        #    leads back to the alphas.
        for group in weight_opt.param_groups:
            group['lr'] = rate
        before = [b.clone() for b in running]
        for _ in range(config.accumulate):
            x, y = next(train_batches)
            if warm:
                cell.use_standard()
            else:
                with torch.no_grad():
                    cell.draw()
            train_loss = loss(model(x), y)
            (train_loss / config.accumulate).backward()
        row['train_loss'] = train_loss.detach()
        if bound([p.grad for p in weights if p.grad is not None], config.grad_clip, row['train_loss'], *running):
            weight_opt.step()
        else:
            row['trouble'] = {'skipped': 'weights', 'loss': train_loss.item(), **blame(model, cell, x)}
            for b, old in zip(running, before):
                b.copy_(old)
        weight_opt.zero_grad()
        return row

    model.train()
    while state['runoff'] is None:
        for step in range(state['step'], config.steps):
            cell.temperature = config.temperature ** min(1.0, step / discrete)
            row = {'step': step + 1, 'restart': state['restart']} | bilevel(learning_rate(step, config), step < warmstart)

            # 3. Progressive shrinking: drop what the alphas like least, until one operation a choice point is left.
            while drops + 6 - cell.operations() < drops_due(step + 1, config, drops):
                row.setdefault('dropped', []).append(cell.drop())
            # Proposals for the run-off: neighbours of the standard activation, then what the alphas say, now and then.
            if config.runoff and step == warmstart:
                state['proposals'] += [cell.sample() for _ in range(config.runoff)]
            if config.runoff and step >= warmstart and (step + 1 - warmstart) % max(1, (discrete - warmstart) // config.runoff) == 0:
                state['proposals'] += [cell.expression(), cell.sample(), cell.sample()]
            state['step'] = step + 1
            trouble = row.get('trouble')
            state['in_a_row'] = state['in_a_row'] + 1 if trouble else 0
            state['skipped'] += bool(trouble)
            report(row, snapshot)
            if state['in_a_row'] >= MAX_SKIPPED:
                raise Failed(f'{MAX_SKIPPED} steps in a row were skipped, the last at step {step + 1}: {said(trouble)}; try '
                             f'a smaller --lr, a smaller --clip, or --normalise scale')

        assert cell.operations() == 6, 'the shrinking schedule did not end with one operation a choice point'
        if config.refine:
            refine(model, train_batches, val_batches, loss, config, bilevel, report, snapshot)
        with torch.no_grad():
            cell.draw()
        result = score(model, itertools.islice(val_batches, 20), loss)
        state['found'].append([result['loss'] if math.isfinite(result['loss']) else math.inf, cell.expression(), result])
        state['restart'] += 1
        if state['restart'] == config.restarts or result['loss'] < config.target:
            break
        # Once more, from other alphas: far enough from uniform not to end in the same place.
        state['step'] = 0
        model.load_state_dict(state['initial'])
        cell.reset(0.3, config.start)
        holders.update(optimizers(weights, architecture, config))
        report({'restarting': state['restart']}, snapshot)

    if not config.runoff:
        best = min(state['found'], key=lambda entry: entry[0])
        return Activation(best[1], config.clip), best[2]
    if state['runoff'] is None:
        found, (standard, *proposals) = [entry[1] for entry in state['found']], state['proposals']
        spread = [proposals[int(k)] for k in torch.randperm(len(proposals))]
        state['runoff'] = {'field': different([*found, standard, *spread], config.clip)[:config.runoff],
                           'steps': max(2, config.at(config.runoff_steps))}
    return runoff(model, state, train_batches, val_batches, loss, config, report, snapshot)


def optimizers(weights: list[Tensor], architecture: list[Tensor], config: Config) -> dict[str, torch.optim.Optimizer]:
    return {'weight_opt': weight_optimizer(weights, config),
            'arch_opt': torch.optim.Adam(architecture, lr=config.arch_lr, betas=(0.5, 0.999),
                                         weight_decay=config.arch_weight_decay)}


def restore(resumed: dict[str, Any], holders: dict[str, Any]) -> dict[str, Any]:
    """Put a checkpoint back into all its holders; the rest of its state. Raises ConfigError when it does not fit."""
    try:
        for name, holder in holders.items():
            holder.load_state_dict(resumed[name])
        torch.set_rng_state(resumed['random'].cpu())
        if resumed['random_cuda'] is not None:
            torch.cuda.set_rng_state(resumed['random_cuda'].cpu())
        return resumed['state']
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f'the checkpoint does not fit the run ({type(error).__name__}); start the search again with '
                          f'another --out') from None


def refine(model: nn.Module, train_batches: Iterator, val_batches: Iterator, loss: Callable, config: Config,
           bilevel: Callable, report: Callable[..., None], snapshot: Callable) -> None:
    """Move from the discrete cell to its best neighbour, until no neighbour is better (ours).

    The last drops jump: what the alphas preferred in a mixture need not be best alone. So each neighbour, one of the six
    operations changed, is judged on the same validation batches after the same few weight steps from the same weights.
    """
    cell, rate = cell_of(model), 0.3 * config.lr
    for sweep in range(1, 11):
        report({'refine': sweep, 'formula': cell.activation().formula}, snapshot)
        for _ in range(4 * config.refine):
            bilevel(rate, warm=False)  # weights and scalars settle
        train, judge = list(itertools.islice(train_batches, config.refine)), list(itertools.islice(val_batches, 4))
        kept, here = copy.deepcopy(model.state_dict()), [active[0] for active in cell.active]
        neighbours = [here] + [[*here[:k], j, *here[k + 1:]] for k in range(6) for j in range(len(cell.ops[k])) if j != here[k]]
        losses: dict[tuple[float, ...], float] = {}  # by values of the function: many neighbours are one and the same
        best, first = math.inf, math.inf
        for chosen in neighbours:
            cell.active = [[j] for j in chosen]
            with torch.no_grad():
                cell.draw()
            key = tuple(torch.cat(cell.tables)[::64].tolist())
            if key in losses:
                continue
            optimizer = weight_optimizer([p for p in model.parameters() if p.requires_grad],
                                         dataclasses.replace(config, lr=rate))
            for x, y in train:
                loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            losses[key] = score(model, judge, loss)['loss']
            model.load_state_dict(kept)
            if chosen is here:
                first = losses[key]
            if losses[key] < best:
                best, winner = losses[key], chosen
        better = best < 0.97 * first
        cell.active = [[j] for j in (winner if better else here)]
        if not better:
            return


@torch.no_grad()
def different(expressions: list[str], clip: Optional[float]) -> list[str]:
    """Those that are functions of their own: neither the same as one before, up to 1 %, nor a straight line, nor a
    constant, nor without a value somewhere on [-5, 5]."""
    x, kept = torch.linspace(-5, 5, 101), []
    for expression in dict.fromkeys(expressions):
        f = Activation(expression, clip)
        y = f(x).expand(x.shape)
        same = any((y - other).norm() <= 0.01 * other.norm() for _, other in kept)
        if y.isfinite().all() and bend(f) > 0.01 and not same:
            kept.append((expression, y))
    return [expression for expression, _ in kept]


def runoff(model: nn.Module, state: dict[str, Any], train_batches: Iterator, val_batches: Iterator, loss: Callable,
           config: Config, report: Callable[..., None], snapshot: Callable) -> tuple[Activation, dict[str, float]]:
    """Which of the proposed functions is best when trained from scratch? Successive halving (ours).

    The search rewards a function that suits weights already trained; this judges what a user will do with it. All
    candidates start from the same initial weights and see the same batches: training batches train, validation batches
    judge. The best third goes on to a round of twice the steps.
    """
    cell = cell_of(model)
    while True:
        field, steps = state['runoff']['field'], state['runoff']['steps']
        report({'runoff': len(field), 'runoff_steps': steps}, snapshot)
        train, judge = list(itertools.islice(train_batches, steps)), list(itertools.islice(val_batches, 10))
        ranking = []
        for expression in field:
            activation = Activation(expression, config.clip).to(cell.grid.device)
            with torch.no_grad():
                cell.use(activation(cell.grid)[None])
            model.load_state_dict(state['initial'])
            optimizer = weight_optimizer([p for p in model.parameters() if p.requires_grad], config)
            schedule = dataclasses.replace(config, steps=steps)
            for step, (x, y) in enumerate(train):
                for group in optimizer.param_groups:
                    group['lr'] = learning_rate(step, schedule)
                train_loss = loss(model(x), y)
                train_loss.backward()
                finite = bound([p.grad for p in model.parameters() if p.grad is not None], config.grad_clip, train_loss)
                if not finite:
                    break  # a function that cannot be trained is none to recommend, however it stands now
                optimizer.step()
                optimizer.zero_grad()
            model.zero_grad()
            result = score(model, judge, loss) if finite else {'loss': math.nan}
            ranking.append((result['loss'] if math.isfinite(result['loss']) else math.inf, expression, result))
            report({'candidate': expression, 'formula': activation.formula, 'runoff_steps': steps, **result}, None)
        ranking.sort(key=lambda entry: entry[0])
        if len(ranking) <= 2:
            return Activation(ranking[0][1], config.clip), ranking[0][2]
        state['runoff'] = {'field': [entry[1] for entry in ranking[:math.ceil(len(ranking) / 3)]], 'steps': 2 * steps}


@torch.no_grad()
def score(model: nn.Module, batches: Iterable, loss: Callable) -> dict[str, float]:
    """Mean loss (and accuracy, for classes) of the network as it stands over these batches."""
    model.eval()
    losses, hits = [], []
    for x, y in batches:
        output = model(x)
        losses.append(loss(output, y))
        if not y.is_floating_point():
            hits.append((output.argmax(-1) == y).float().mean())
    model.train()
    result = {'loss': torch.stack(losses).mean().item()}
    return result | ({'accuracy': torch.stack(hits).mean().item()} if hits else {})


def said(skipped: dict[str, Any]) -> str:
    """Why a step was skipped, from what `search` reports of it."""
    low, high = skipped['inputs']
    what = skipped['gradient'] and f"gradient of {skipped['gradient']}" or 'running statistics'
    return (f"{what if math.isfinite(skipped['loss']) else 'loss'} not finite in the {skipped['skipped']} step (loss "
            f"{skipped['loss']:.3g}), most at site {skipped['site']}: inputs {low:.3g} to {high:.3g}, largest operation "
            f"{skipped['op']} with {skipped['output']:.3g}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def new_cell(config: Config) -> Cell:
    return Cell(config.ops, config.clip, config.sampler, standard_of(config.model), config.normalise, config.points)


def prepare(config: Config) -> tuple[nn.Module, Iterator, Iterator, Callable[[Tensor, Tensor], Tensor]]:
    """The network with the sites of a new cell in it, training batches, validation batches, the loss."""
    torch.manual_seed(config.seed)
    cell = new_cell(config)
    if config.teacher:
        teacher, model = teacher_and_student(lambda: named(config.teacher), cell.site)
        batches = [data.TeacherBatches(teacher.to(config.device), config.batch_size, seed, config.device)
                   for seed in (2 * config.seed, 2 * config.seed + 1)]
        cell.to(config.device)
        return model.to(config.device), batches[0], batches[1], F.mse_loss
    dataset = data.load(config.data, config.data_dir, config.tokens)
    train, val = data.split(dataset, config.seed)
    model = network(config, cell.site, dataset)
    batches = [data.Batches(dataset, part, config.batch_size, seed, augment=augment, context=config.context,
                            device=config.device)
               for part, seed, augment in ((train, 2 * config.seed, True), (val, 2 * config.seed + 1, False))]
    cell.to(config.device)
    return model.to(config.device), batches[0], batches[1], cross_entropy


FILES = ('config.json', 'log.jsonl', 'checkpoint.pt', 'activation.json')
BILEVEL = 2.2  # what a step with both halves costs against one of the warm start, until that is known


def unused(folder: Path) -> None:
    """Raise ConfigError where a new search would write over another."""
    if any((folder / name).exists() and (folder / name).stat().st_size for name in FILES):
        raise ConfigError(f'{folder} holds a run already; go on with it by --resume {folder}, or choose another --seed or '
                          f'--out')


class Run:
    """The run folder and the progress line. `report` is called after every step.

    config.json   the settings, written first
    log.jsonl     one line each 1 % of the steps, for each step that was skipped, and for each candidate of the run-off
    checkpoint.pt everything needed to go on (--resume), replaced every minute
    activation.py     the result as a module of its own
    activation.json   the result; after it only search.png and search.gif
    """

    def __init__(self, config: Config, cell: Cell, resumed: Optional[dict] = None, fresh: bool = True):
        self.config, self.cell, self.folder = config, cell, Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = open(self.folder / 'log.jsonl', 'ab', buffering=0)
        try:
            self.take_folder(resumed['log_size'] if resumed else 0, fresh)
        except BaseException:
            self.log.close()
            raise
        self.started = self.printed = self.saved = self.mark = time.monotonic()
        self.seconds = resumed['seconds'] if resumed else 0.0
        self.dropped: list[str] = resumed['dropped'] if resumed else []
        self.skipped = resumed['state']['skipped'] if resumed else 0
        self.timed = 0  # steps in this process
        self.pace = {True: 0.0, False: 0.0}  # seconds a step, a running mean: in the warm start, and after it
        self.val_loss = math.nan
        self.stop = False  # set by Ctrl-C: save after the step, then stop
        self.terminal = sys.stdout.isatty()

    def take_folder(self, log_size: int, fresh: bool) -> None:
        """Keep other processes out of the run folder; cut the log to where the checkpoint was, or begin with config.json."""
        try:
            if fcntl:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
        except BlockingIOError:
            raise ConfigError(f'{self.folder}: another process is at work there; wait, or choose another --out') from None
        if fresh:
            unused(self.folder)  # once more, now that nobody else can be at it
            write_whole(self.folder / 'config.json', json_line(dataclasses.asdict(self.config), indent=1))
        if (size := self.log.tell()) < log_size:
            print(f'note: {self.folder}/log.jsonl has lost its end; the search itself goes on exactly', file=sys.stderr)
        self.log.truncate(min(size, log_size))  # what was written after the checkpoint is done again
        self.log.seek(0, os.SEEK_END)  # subtle: truncate leaves the position, which `save` asks for, where it was

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def interrupt(self, *_: Any) -> None:
        """Ctrl-C. The first one saves after the step, or the candidate of the run-off, that is under way."""
        if self.stop:
            os._exit(130)
        self.stop = True
        os.write(2, b'\nstopping as soon as this step is done and saved; Ctrl-C again: at once\n')  # print is not safe here

    def report(self, row: dict[str, Any], snapshot: Optional[Callable[[], dict]]) -> None:
        if 'refine' in row:
            self.write(row)
            self.show(f"neighbours, round {row['refine']}: {row['formula']}", True)
            self.save(snapshot)
        elif 'candidate' in row:
            self.write(row)
            self.show(f"run-off, {row['runoff_steps']} steps each: validation {row['loss']:.4f}  {row['formula']}", True)
            if self.stop:
                raise KeyboardInterrupt  # saved when the round began, which begins again
        elif 'runoff' in row or 'restarting' in row:
            self.save(snapshot)
        else:
            self.dropped += row.get('dropped', [])
            step, steps = row['step'], self.config.steps
            self.clock_in(step)
            if trouble := row.pop('trouble', None):
                self.skipped += 1
                self.write({'step': step, **trouble})
            if step % max(1, steps // 100) == 0 or step == steps:
                self.progress(row)
            if self.stop or time.monotonic() - self.saved > self.config.checkpoint_every or step == steps:
                self.save(snapshot)

    def clock_in(self, step: int) -> None:
        """Keep the pace, and say after ten steps how long it will take."""
        now, warm = time.monotonic(), step <= self.config.at(self.config.warmstart)
        seconds, self.mark, self.timed = now - self.mark, now, self.timed + 1
        if self.timed > 1:  # the first step sets things up
            self.pace[warm] = 0.9 * self.pace[warm] + 0.1 * seconds if self.pace[warm] else seconds
        if self.timed == 10 and step < self.config.steps:
            self.show(f'after ten steps: about {self.left(step) / 60:.1f} minutes to go', True)

    def left(self, step: int) -> float:
        """Seconds that the search will still take: weight steps, bi-level steps, and the rounds of the run-off."""
        config, warm, both = self.config, self.pace[True], self.pace[False]
        warm, both = warm or both / BILEVEL, both or warm * BILEVEL
        cold, field, length = max(config.at(config.warmstart) - step, 0), config.runoff, config.at(config.runoff_steps)
        runoff = 0
        while field:
            runoff, field, length = runoff + field * length, 0 if field <= 2 else math.ceil(field / 3), 2 * length
        return warm * (cold + runoff) + both * (config.steps - max(step, config.at(config.warmstart)))

    def progress(self, row: dict[str, Any]) -> None:
        """The only place where losses leave the device: once in a hundred steps."""
        step, steps = row['step'], self.config.steps
        numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}
        self.val_loss = numbers.get('val_loss', self.val_loss)
        numbers.update(temperature=self.cell.temperature, operations=self.cell.operations(), expression=self.cell.expression(), dropped=self.dropped,
                       bad=self.skipped, alpha=[[round(v, 4) for v in a.tolist()] for a in self.cell.alpha],
                       curve=[round(v, 4) for v in self.cell.curve()])
        self.dropped = []
        self.write(numbers)
        skipped = f' | {self.skipped} steps skipped, not finite: see log.jsonl' if self.skipped else ''
        pace = self.pace[step <= self.config.at(self.config.warmstart)]
        search = f"search {row['restart'] + 1} of up to {self.config.restarts}, " if self.config.restarts > 1 else ''
        self.show(f"{search}step {step}/{steps} {100 * step // steps:3d}% | train {numbers['train_loss']:.3f} val "
                  f"{self.val_loss:.3f} | {numbers['operations']} ops left | {self.cell.activation().formula}{skipped} | "
                  f"{pace:.2f} s/step | {clock(self.left(step))} left",
                  time.monotonic() - self.printed > 10 or step in (1, steps))

    def save(self, snapshot: Callable[[], dict]) -> None:
        """Replace the checkpoint, atomically: a kill leaves the old one or the new one."""
        state = {**snapshot(), 'seconds': self.elapsed(), 'log_size': self.log.tell(), 'dropped': self.dropped,
                 'config': dataclasses.asdict(self.config), 'versions': versions()}
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(self.folder / 'checkpoint.pt', content.getbuffer())
        self.saved = time.monotonic()
        if self.stop:
            raise KeyboardInterrupt

    def write(self, row: dict[str, Any]) -> None:
        write_line(self.log, json_line(row), self.folder / 'log.jsonl')

    def show(self, line: str, due: bool) -> None:
        """On a terminal one line, rewritten in place; into a pipe a plain line when it is due."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print('\r' + line[:width].ljust(width), end='', flush=True)
        elif due:
            print(line, flush=True)
            self.printed = time.monotonic()

    def finish(self, found: Activation, validation: dict[str, float], plot: bool = True) -> None:
        """Write activation.json and say what was found, where it is, and what to run next. plot: draw it as well."""
        config, folder = self.config, self.folder
        result = {'expression': found.expression, 'clip': found.clip, 'formula': found.formula,
                  'scalars': [s.item() for s in found.scalars], 'model': config.model, 'data': config.data,
                  'seed': config.seed, 'validation': validation, 'seconds': round(self.elapsed(), 1),
                  'skipped': self.skipped, 'config': dataclasses.asdict(config), 'versions': versions()}
        lines, bent = [], bend(found)
        if not bent > 0.01:  # nan for a constant
            result['warning'] = f"the function found is {'constant' if math.isnan(bent) else 'a straight line'}: " \
                                f"a network cannot learn much with it; try another --seed, or a smaller --arch-lr"
            lines.append(f"warning:     {result['warning']}")
        if config.teacher:
            result['planted'] = {'teacher': config.teacher, 'distance': distance(found.double(), named(config.teacher))}
            lines.append(f"planted:     {named(config.teacher).formula}, RMS difference "
                         f"{100 * result['planted']['distance']:.2f} % of its standard deviation")
        if not math.isfinite(validation['loss']):
            result['warning'] = 'its validation loss is not finite: nothing that was tried could be trained; try a smaller ' \
                                '--lr, a smaller --clip, or --normalise scale'
            lines.append(f"warning:     {result['warning']}")
        if self.skipped:
            lines.append(f'skipped:     {self.skipped} steps were not finite; log.jsonl says which, and why')
        short = found.float().simplified()
        result.update(simplified=short.expression, formula=short.formula, latex=short.latex)
        module = write_module(folder, config, short)
        write_whole(folder / 'activation.json', json_line(result, indent=1))
        scores = ', '.join(f'{key} {value:.4f}' for key, value in validation.items())
        clipped = f"   with clip(y) = max(-{found.clip:g}, min({found.clip:g}, y))" if 'clip(' in short.formula else ''
        print('\n' * self.terminal + '\n'.join([
            '', f'    f(x) = {short.formula}{clipped}', '',
            *([figures.text_plot(short, named(standard_of(config.model))), ''] if plot else []),
            f'validation:  {scores}   ({clock(self.elapsed())} in all)', *lines,
            f'files:       {folder}/activation.json, {module}, log.jsonl, checkpoint.pt',
            f'next:        python evaluate.py {folder} --model {config.model}   # retrain it and compare']), flush=True)
        if plot:
            print(f'pictures:    {figures.draw(folder)}')  # last: it takes seconds, and all else is safe by now


def write_module(folder: Path, config: Config, found: Activation) -> str:
    """Write the function as activation.py, a file of its own; its name, or why there is none."""
    clip = 'none' if config.clip is None else f'{config.clip:g}'
    note = (f'Found by search.py --model {config.model} --data {config.data} --seed {config.seed} --steps {config.steps} '
            f'--clip {clip}\nas {found.expression}')
    try:
        write_whole(folder / 'activation.py', found.module(note).encode())
    except ValueError as error:  # an operation that was added without a line in CODE
        return f'no activation.py ({error})'
    return 'activation.py'


def clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def versions() -> dict[str, Any]:
    """What a result depends on besides its settings. commit: where there is git and a repository."""
    try:
        commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'commit': commit,
            'threads': torch.get_num_threads(), 'machine': platform.machine()}


def read_config(folder: Path) -> Config:
    """The settings of the run in `folder`. Raises ConfigError."""
    path = folder / 'config.json'
    try:
        content = read_json(path)
        types = get_type_hints(Config)
        if difference := types.keys() ^ content.keys():
            raise ValueError(f"{'it lacks' if difference - content.keys() else 'it has an unknown'} {min(difference)}")
        for name, value in content.items():
            kinds = {Optional[float]: (float, int, type(None)), Optional[str]: (str, type(None)), float: (float, int)}
            if isinstance(value, bool) != (types[name] is bool) or not isinstance(value, kinds.get(types[name], types[name])):
                raise ValueError(f'{name} is {str(value)[:40]!r}')
        config = Config(**content)
        config.check()
        return config
    except OSError as error:
        raise ConfigError(f'--resume {folder}: there is no run ({path}: {error.strerror})') from None
    except ValueError as error:
        raise ConfigError(f'{path} is damaged ({error}); put it back as it was, or start the search again') from None


def resume(folder: Path, given: dict[str, Any]) -> tuple[Config, Optional[dict[str, Any]]]:
    """The configuration of the run in `folder`, and its checkpoint if it wrote one. Raises ConfigError."""
    config = read_config(folder)
    same = {'device': choose_device, 'out': lambda out: config.out if Path(out).resolve() == folder.resolve() else out}
    contradicted = [f"--{name.replace('_', '-')} {value} (the run has {getattr(config, name)})"
                    for name, value in given.items()
                    if same.get(name, lambda value: value)(value) != getattr(config, name)]
    if contradicted:
        raise ConfigError(f"--resume {folder} goes on with the run's own settings, not with {', '.join(contradicted)}")
    choose_device(config.device)
    path = folder / 'checkpoint.pt'
    begun = dataclasses.asdict(config)
    if Path(config.out).resolve() != folder.resolve():
        config.out = str(folder)  # it was moved
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about files that are something else: that is said below
            checkpoint = torch.load(path, map_location=config.device, weights_only=True)
        kinds = {'state': dict, 'model': dict, 'seconds': float, 'log_size': int, 'dropped': list, 'config': dict,
                 'versions': dict, 'random': Tensor}
        if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint[name], kind) for name, kind in kinds.items()):
            raise TypeError('it is something else')
        checkpoint['state']['step'] + checkpoint['state']['skipped']
    except FileNotFoundError:
        return config, None  # killed before the first checkpoint: from the start, which is exact as well
    except Exception as error:  # torch.load raises a dozen kinds on files that are something else
        raise ConfigError(f'{path} is damaged ({type(error).__name__}); start the search again with another --out') from None
    if {**checkpoint['config'], 'out': ''} != {**begun, 'out': ''}:
        raise ConfigError(f'{path} and {folder}/config.json are of different runs; put the right one back, or start the '
                          f'search again with another --out')
    for name, value in versions().items():
        if (then := checkpoint['versions'].get(name)) != value:
            print(f'note: {name} was {then} and is {value}; the search goes on, perhaps not to the last bit', file=sys.stderr)
    return config, checkpoint


def plan(config: Config, model: nn.Module, cell: Cell, needed: int, resumed: bool) -> str:
    """What is about to happen, in words, before it does."""
    weights, space = sum(p.numel() for p in model.parameters()), math.prod(map(len, cell.ops))
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) if resource else 0
    return (f"{'going on with the search of' if resumed else 'searching'} {space:,} functions for {config.model} ({weights:,} "
            f"weights, {cell.sites} sites) on {config.data}\n"
            f"plan: {config.steps} steps ({config.at(config.warmstart)} of warm start), a run-off of {config.runoff} on "
            f"{config.device}; peak memory about {(now + needed) / 1e9:.1f} GB; run folder {config.out}")


def main(arguments: Optional[list[str]] = None) -> None:
    parser, run = Parser(__doc__), None
    parser.add_argument('--resume', metavar='RUN', help='go on with the run in this folder, exactly')
    parser.add_argument('--plot', metavar='RUN', help='draw search.png and search.gif of a run, finished or going on')
    parser.add_argument('--no-plot', action='store_true', help='neither the plot in the terminal nor the pictures at the end')
    with one_line_errors(lambda: f'go on with: python search.py --resume {run.folder}' if run else 'nothing was written'):
        given, other = options(Config, parser, arguments)
        if other.plot:
            print(figures.draw(Path(other.plot)))
            return
        if other.resume is not None:
            config, resumed = resume(Path(other.resume), given)
            if (Path(config.out) / 'activation.json').exists():
                print(f'{config.out} is finished: its result is {config.out}/activation.json')
                return
        else:
            config, resumed = configure(Config, PRESETS, given), None
            name = Path(config.model).name.replace('.py:', '-')  # of nets/mine.py:make only mine-make
            config.out = config.out or f'runs/{name}-{config.data}-seed{config.seed}'
            unused(Path(config.out))
        model, train_batches, val_batches, loss = prepare(config)
        needed = memory_needed(model, train_batches, loss, config)
        check_memory(needed, config)
        print(plan(config, model, cell_of(model), needed, bool(resumed)), flush=True)
        run = Run(config, cell_of(model), resumed, fresh=other.resume is None)
        handler = signal.signal(signal.SIGINT, run.interrupt)
        try:
            found, validation = search(model, train_batches, val_batches, loss, config, run.report, resumed)
        finally:
            signal.signal(signal.SIGINT, handler)
            run.log.close()
        run.finish(found, validation, not other.no_plot)


if __name__ == '__main__':
    main()

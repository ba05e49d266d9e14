"""Search an activation function: `python search.py --model resnet20`.

The loop is in `search`, and it is the lesson. Each step has two halves that are strictly separated:

    1. architecture step   alphas and scalars of the cell, one Adam step on a validation batch
    2. weight step         weights of the network, one step on a training batch

while operations are dropped one by one until one function is left (paper: arXiv 2408.06820, sections 3.2 and 3.3).
"""
import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import figures
from activation import Activation, bend, distance, named
from cell import NORMALISERS, SAMPLERS, Cell, Site
from models import (Training, configure, cross_entropy, learning_rate, network, option, options, standard_of,
                    teacher_and_student, weight_optimizer, within)
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
    arch_lr: float = option(0.01, 'of alphas and scalars (Adam, betas 0.5 and 0.999)')
    arch_weight_decay: float = option(1e-3, 'of alphas and scalars')
    warmstart: float = option(0.15, 'first steps, in which the weights train with the standard activation')
    warm_alphas: bool = option(False, 'the alphas learn during the warm start already (paper); else they rest')
    shrink_from: float = option(0.3, 'step at which dropping operations starts')
    shrink_until: float = option(0.92, 'step at which one operation a choice point is left')
    shrink: str = option('linear', 'pace of the drops: linear, log (paper: most of them early) or none (all at the end)')
    sampler: str = option('mean', f'how alphas become weights: {", ".join(SAMPLERS)} (paper: dirichlet)')
    normalise: str = option('scale', "take gain out of each site's table: none (paper), scale or centre")
    ops: str = option('base', 'operations: base, periodic, swish, no-composites, names; a minus takes one out')
    clip: Optional[float] = option(10.0, "the paper's l, bound on the output of unbounded operations; 'none' for none")
    points: int = option(4096, 'of the grid on which the cell is tabulated, at most 32,768')
    # the run-off (ours)
    runoff: int = option(12, 'candidates trained from scratch and judged on validation; 0: none (paper)')
    runoff_steps: float = option(0.04, 'steps of the first round; each further round halves the field and doubles them')
    # the log
    checkpoint_every: float = option(60.0, 'seconds between checkpoints')

    def check(self) -> None:
        super().check()
        valid('--sampler', self.sampler, SAMPLERS)
        valid('--normalise', self.normalise, NORMALISERS)
        valid('--shrink', self.shrink, ('linear', 'log', 'none'))
        valid('--data', self.data, data.DATA if not self.teacher else ('teacher',))
        within(self, 0, 'runoff', 'seed', 'arch_weight_decay', 'warmstart', 'shrink_from', 'shrink_until', 'arch_lr',
               'runoff_steps', 'checkpoint_every')
        within(self, 20, 'steps')
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
              grad_clip=5.0, runoff=0)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    'laptop': {
        'resnet20': dict(data='cifar10_16', steps=500, batch_size=64, optimizer='sgd', lr=0.1, lr_end=0.1, warmup=0.05,
                         weight_decay=5e-4),
        'vit_tiny': dict(data='cifar10_16', steps=300, batch_size=32, lr=5e-4, lr_end=0.1, warmup=0.1,
                         weight_decay=0.05),
        'minigpt': dict(data='tinystories_sample', steps=400, batch_size=8, lr=1e-3, lr_end=0.1, warmup=0.1,
                        weight_decay=0.1),
        'toy': dict(data='teacher', teacher='mul(sigmoid(x), x)', steps=1500, batch_size=256, lr=1e-2, weight_decay=0.0,
                    warmstart=0.05, shrink_until=0.9, normalise='centre', runoff=0),
    },
    'paper': {
        # 293 steps an epoch: 37,500 images in batches of 64, two accumulated. 50 epochs; shrinking from epoch 2.
        'resnet20': dict(data='cifar10', steps=14650, batch_size=64, accumulate=2, optimizer='sgd', lr=0.1,
                         weight_decay=1e-4, arch_lr=6e-4, warmstart=293, shrink_from=586, **_PAPER),
        # 73 steps an epoch: batches of 128, four accumulated
        'vit_tiny': dict(data='cifar10', steps=3650, batch_size=128, accumulate=4, lr=1e-3, lr_end=0.0,
                         weight_decay=0.0, arch_lr=6e-4, warmstart=73, shrink_from=146, **_PAPER),
        'minigpt': dict(data='tinystories', steps=1000, batch_size=64, accumulate=10, context=256, tokens='gpt2', lr=1e-3, lr_end=0.1,
                        weight_decay=0.1, dropout=0.2, arch_lr=1e-3, warmstart=100, shrink_from=200,
                        **{**_PAPER, 'grad_clip': 1.0}),
        'toy': dict(data='teacher', teacher='mul(sigmoid(x), x)', steps=1500, batch_size=256, lr=1e-2, weight_decay=0.0,
                    arch_lr=1e-2, warmstart=100, shrink_from=200, **_PAPER),
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# The search.

@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """For the architecture step: no gradient for the weights, which also saves their third of the backward pass, and
    no validation batch in the running statistics of batch norm, a leak that is easy to miss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    norms = [m for m in model.modules() if getattr(m, 'track_running_stats', False)]
    for p in weights:
        p.requires_grad_(False)
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
        for m in norms:
            m.track_running_stats = True


def bound(gradients: list[Tensor], limit: float) -> Tensor:
    """Scale the gradients in place to a common norm of at most `limit` (0: leave them). A gradient that is not finite
    becomes zero. Returns whether it was finite, as a tensor: asking for its value would make a GPU wait."""
    norm = torch.stack([g.norm() for g in gradients]).norm()
    finite = norm.isfinite()
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1.0) if limit else torch.ones_like(norm)
    torch._foreach_mul_(gradients, torch.where(finite, factor, 0.0))
    for g in gradients:
        g.nan_to_num_(0.0, 0.0, 0.0)  # subtle: 0 * inf is NaN
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
    weight_opt = weight_optimizer(weights, config)
    arch_opt = torch.optim.Adam(architecture, lr=config.arch_lr, betas=(0.5, 0.999),
                                weight_decay=config.arch_weight_decay)
    drops, warmstart = cell.operations() - 6, config.at(config.warmstart)
    # What is neither in a module nor in an optimiser. bad: non-finite steps in all, and in a row just now.
    state: dict[str, Any] = {'step': 0, 'runoff': None, 'initial': copy.deepcopy(model.state_dict()),
                             'proposals': [cell.standard.expression], 'bad': torch.zeros(2, device=cell.grid.device)}
    holders = {'model': model, 'cell': cell, 'weight_opt': weight_opt, 'arch_opt': arch_opt,
               'train_batches': train_batches, 'val_batches': val_batches}
    if resumed:
        for name, holder in holders.items():
            holder.load_state_dict(resumed[name])
        state = resumed['state']
        torch.set_rng_state(resumed['random'])
        if resumed['random_cuda'] is not None:
            torch.cuda.set_rng_state(resumed['random_cuda'])

    def snapshot() -> dict[str, Any]:
        return {'state': state, **{name: holder.state_dict() for name, holder in holders.items()},
                'random': torch.get_rng_state(),
                'random_cuda': torch.cuda.get_rng_state() if cell.grid.is_cuda else None}

    model.train()
    for step in range(state['step'], config.steps):
        warm = step < warmstart
        row: dict[str, Any] = {'step': step + 1}
        finite = torch.ones((), dtype=torch.bool, device=cell.grid.device)

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
            finite = finite & bound(gradients, config.grad_clip)
            for p, g in zip(architecture, gradients):
                p.grad = g
            arch_opt.step()
            arch_opt.zero_grad()

        # 2. Weight step: the weights, on training batches. The tables are drawn without a graph, so that nothing
        #    leads back to the alphas.
        for group in weight_opt.param_groups:
            group['lr'] = learning_rate(step, config)
        for _ in range(config.accumulate):
            x, y = next(train_batches)
            if warm:
                cell.use_standard()
            else:
                with torch.no_grad():
                    cell.draw()
            train_loss = loss(model(x), y)
            (train_loss / config.accumulate).backward()
        finite = finite & bound([p.grad for p in weights if p.grad is not None], config.grad_clip)
        weight_opt.step()
        weight_opt.zero_grad()
        row['train_loss'] = train_loss.detach()

        # 3. Progressive shrinking: drop what the alphas like least, until one operation a choice point is left.
        while drops + 6 - cell.operations() < drops_due(step + 1, config, drops):
            row.setdefault('dropped', []).append(cell.drop())
        # Proposals for the run-off: what the alphas say at moments spread over the search.
        if not warm and (step + 1 - warmstart) % max(1, (config.steps - warmstart) // max(config.runoff, 1)) == 0:
            state['proposals'].append(cell.expression())
        state['step'] = step + 1
        bad = 1 - finite.float()
        state['bad'] = torch.stack([state['bad'][0] + bad, (state['bad'][1] + 1) * bad])
        report(row | {'bad': state['bad']}, snapshot)

    assert cell.operations() == 6, 'the shrinking schedule did not end with one operation a choice point'
    if not config.runoff:
        with torch.no_grad():
            cell.draw()
        return cell.activation(), score(model, itertools.islice(val_batches, 20), loss)
    if state['runoff'] is None:
        field = [cell.expression(), *reversed(state['proposals'])]  # without duplicates, the latest first
        state['runoff'] = {'field': list(dict.fromkeys(field))[:config.runoff], 'steps': max(2, config.at(config.runoff_steps))}
    return runoff(model, state, train_batches, val_batches, loss, config, report, snapshot)


def runoff(model: nn.Module, state: dict[str, Any], train_batches: Iterator, val_batches: Iterator, loss: Callable,
           config: Config, report: Callable[..., None], snapshot: Callable) -> tuple[Activation, dict[str, float]]:
    """Which of the proposed functions is best when trained from scratch? Successive halving (ours).

    The search rewards a function that suits weights already trained; this judges what a user will do with it. All
    candidates start from the same initial weights and see the same batches: training batches train, validation batches
    judge. The better half goes on to a round of twice the steps.
    """
    cell = cell_of(model)
    while True:
        field, steps = state['runoff']['field'], state['runoff']['steps']
        report({'runoff': len(field), 'runoff_steps': steps}, snapshot)
        train, judge = list(itertools.islice(train_batches, steps)), list(itertools.islice(val_batches, 20))
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
                loss(model(x), y).backward()
                bound([p.grad for p in model.parameters() if p.grad is not None], config.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
            result = score(model, judge, loss)
            ranking.append((result['loss'] if math.isfinite(result['loss']) else math.inf, expression, result))
            report({'candidate': expression, 'formula': activation.formula, 'runoff_steps': steps, **result}, None)
        ranking.sort(key=lambda entry: entry[0])
        if len(ranking) <= 3:
            return Activation(ranking[0][1], config.clip), ranking[0][2]
        state['runoff'] = {'field': [entry[1] for entry in ranking[:math.ceil(len(ranking) / 2)]], 'steps': 2 * steps}


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


class SearchFailed(RuntimeError):
    """The search cannot go on. One line: why, and what to try."""


class Run:
    """The run folder and the progress line. `report` is called after every step.

    config.json   the settings, written first
    log.jsonl     one line each 1 % of the steps, and one for each candidate of the run-off
    checkpoint.pt everything needed to go on (--resume), replaced every minute
    activation.py     the result as a module of its own
    activation.json   the result; after it only search.png and search.gif
    """

    def __init__(self, config: Config, cell: Cell, resumed: Optional[dict] = None):
        self.config, self.cell, self.folder = config, cell, Path(config.out)
        self.started = self.printed = self.saved = time.monotonic()
        self.first = resumed['state']['step'] if resumed else 0
        self.seconds = resumed['seconds'] if resumed else 0.0
        self.dropped: list[str] = resumed['dropped'] if resumed else []
        self.val_loss = math.nan
        self.stop = False  # set by Ctrl-C: save after the step, then stop
        self.log = open(self.folder / 'log.jsonl', 'r+b' if resumed else 'wb', buffering=0)
        self.log.truncate(resumed['log_size'] if resumed else 0)
        self.log.seek(0, os.SEEK_END)
        self.terminal = sys.stdout.isatty()

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def report(self, row: dict[str, Any], snapshot: Optional[Callable[[], dict]]) -> None:
        if 'candidate' in row:
            self.write(row)
            self.show(f"run-off, {row['runoff_steps']} steps each: validation {row['loss']:.4f}  {row['formula']}", True)
        elif 'runoff' in row:
            self.save(snapshot)
        else:
            self.dropped += row.get('dropped', [])
            step, steps = row['step'], self.config.steps
            if step % max(1, steps // 100) == 0 or step == steps:
                self.progress(row)
            if self.stop or time.monotonic() - self.saved > self.config.checkpoint_every or step == steps:
                self.save(snapshot)

    def progress(self, row: dict[str, Any]) -> None:
        """The only place where values leave the device: once in a hundred steps."""
        step, steps = row['step'], self.config.steps
        bad, in_a_row = row.pop('bad').long().tolist()
        numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}
        self.val_loss = numbers.get('val_loss', self.val_loss)
        numbers.update(operations=self.cell.operations(), expression=self.cell.expression(), dropped=self.dropped, bad=bad,
                       alpha=[[round(v, 4) for v in a.tolist()] for a in self.cell.alpha],
                       curve=[round(v, 4) for v in self.cell.curve()])
        self.dropped = []
        self.write({key: value if not isinstance(value, float) or math.isfinite(value) else None
                    for key, value in numbers.items()})
        if in_a_row >= max(10, steps // 100):
            raise SearchFailed(f'{in_a_row} steps in a row had a loss or gradient that is not finite, the last at step {step}; '
                               f'try a smaller --lr, a smaller --clip, or --normalise scale')
        pace = (time.monotonic() - self.started) / (step - self.first)
        skipped = f' | {bad} steps skipped, not finite' if bad else ''
        self.show(f"step {step}/{steps} {100 * step // steps:3d}% | train {numbers['train_loss']:.3f} val {self.val_loss:.3f} | "
                  f"{numbers['operations']} ops left | {self.cell.activation().formula}{skipped} | {pace:.2f} s/step | "
                  f"{clock(pace * (steps - step))} left", time.monotonic() - self.printed > 10 or step in (1, steps))

    def save(self, snapshot: Callable[[], dict]) -> None:
        """Replace the checkpoint, atomically: a kill leaves the old one or the new one."""
        state = {**snapshot(), 'seconds': self.elapsed(), 'log_size': self.log.tell(), 'dropped': self.dropped}
        torch.save(state, self.folder / 'checkpoint.tmp')
        os.replace(self.folder / 'checkpoint.tmp', self.folder / 'checkpoint.pt')
        self.saved = time.monotonic()
        if self.stop:
            raise KeyboardInterrupt

    def write(self, row: dict[str, Any]) -> None:
        self.log.write((json.dumps(row) + '\n').encode())

    def show(self, line: str, due: bool) -> None:
        """On a terminal one line, rewritten in place; into a pipe a plain line when it is due."""
        if self.terminal:
            width = os.get_terminal_size().columns - 1
            print('\r' + line[:width].ljust(width), end='', flush=True)
        elif due:
            print(line, flush=True)
            self.printed = time.monotonic()

    def finish(self, found: Activation, validation: dict[str, float], plot: bool = True) -> None:
        """Write activation.json and say what was found, where it is, and what to run next. plot: draw it as well."""
        self.log.close()
        config, folder = self.config, self.folder
        result = {'expression': found.expression, 'clip': found.clip, 'formula': found.formula,
                  'scalars': [s.item() for s in found.scalars], 'model': config.model, 'data': config.data,
                  'seed': config.seed, 'validation': validation, 'seconds': round(self.elapsed(), 1),
                  'config': dataclasses.asdict(config),
                  'versions': {'python': sys.version.split()[0], 'torch': torch.__version__, 'commit': commit(),
                               'threads': torch.get_num_threads()}}
        lines, bent = [], bend(found)
        if not bent > 0.01:  # nan for a constant
            result['warning'] = f"the function found is {'constant' if math.isnan(bent) else 'a straight line'}: " \
                                f"a network cannot learn much with it; try another --seed, or a smaller --arch-lr"
            lines.append(f"warning:     {result['warning']}")
        if config.teacher:
            result['planted'] = {'teacher': config.teacher, 'distance': distance(found.double(), named(config.teacher))}
            lines.append(f"planted:     {named(config.teacher).formula}, RMS difference "
                         f"{100 * result['planted']['distance']:.2f} % of its standard deviation")
        short = found.float().simplified()
        result.update(simplified=short.expression, formula=short.formula, latex=short.latex)
        module = write_module(folder, config, short)
        write_json(folder / 'activation.json', result)
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
        (folder / 'activation.py').write_text(found.module(note), encoding='utf-8')
    except ValueError as error:  # an operation that was added without a line in CODE
        return f'no activation.py ({error})'
    return 'activation.py'


def clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def commit() -> Optional[str]:
    """The commit that this file is from, where there is git and a repository."""
    try:
        return subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    os.replace(temporary, path)


def resume(folder: Path, given: dict[str, Any]) -> tuple[Config, Optional[dict[str, Any]]]:
    """The configuration of the run in `folder`, and its checkpoint if it wrote one. Raises ConfigError."""
    try:
        config = Config(**json.loads((folder / 'config.json').read_text(encoding='utf-8')))
    except OSError as error:
        raise ConfigError(f'--resume {folder}: there is no run ({folder}/config.json: {error.strerror})') from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f'{folder}/config.json is damaged ({error}); start the search again') from None
    contradicted = [f"--{name.replace('_', '-')} {value} (the run has {getattr(config, name)})" for name, value in given.items()
                    if value != getattr(config, name) and name != 'out']
    if contradicted:
        raise ConfigError(f"--resume {folder} goes on with the run's own settings, not with {', '.join(contradicted)}")
    config.check()
    config.out = str(folder)
    path = folder / 'checkpoint.pt'
    try:
        return config, torch.load(path, map_location=config.device, weights_only=True) if path.exists() else None
    except Exception as error:  # torch.load raises a dozen kinds on files that are something else
        raise ConfigError(f'{path} is damaged ({type(error).__name__}); start the search again with another --out') from None


def main(arguments: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--resume', metavar='RUN', help='go on with the run in this folder, exactly')
    parser.add_argument('--plot', metavar='RUN', help='draw search.png and search.gif of a run, finished or going on')
    parser.add_argument('--no-plot', action='store_true', help='neither the plot in the terminal nor the pictures at the end')
    run = None
    try:
        given, other = options(Config, parser, arguments)
        if other.plot:
            print(figures.draw(Path(other.plot)))
            return
        if other.resume:
            config, resumed = resume(Path(other.resume), given)
            if (Path(config.out) / 'activation.json').exists():
                print(f'{config.out} is finished: its result is {config.out}/activation.json')
                return
        else:
            config, resumed = configure(Config, PRESETS, given), None
            name = Path(config.model).name.replace('.py:', '-')  # of nets/mine.py:make only mine-make
            config.out = config.out or f'runs/{name}-{config.data}-seed{config.seed}'
            if (Path(config.out) / 'config.json').exists():
                raise ConfigError(f'{config.out} holds a run already; go on with it by --resume {config.out}, or choose '
                                  f'another --seed or --out')
        model, train_batches, val_batches, loss = prepare(config)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(config.out) / 'config.json', dataclasses.asdict(config))
        run = Run(config, cell_of(model), resumed)
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if run.stop else setattr(run, 'stop', True))
        weights = sum(p.numel() for p in model.parameters())
        space = math.prod(map(len, run.cell.ops))
        print(f"{'going on with' if resumed else 'searching'} {space:,} functions for {config.model} ({weights:,} weights, "
              f'{run.cell.sites} sites) on {config.data}, {config.steps} steps on {config.device}; run folder {config.out}',
              flush=True)
        found, validation = search(model, train_batches, val_batches, loss, config, run.report, resumed)
        run.finish(found, validation, not other.no_plot)
    except KeyboardInterrupt:
        where = f'; go on with: python search.py --resume {run.folder}' if run else ''
        print(f'\nstopped{where}', file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, SearchFailed) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()

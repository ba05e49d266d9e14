"""Search an activation function: `python search.py --model resnet20`.

The loop is in `search`, and it is the lesson. Each step has two halves that are strictly separated:

    1. architecture step   alphas and scalars of the cell, one Adam step on a validation batch
    2. weight step         weights of the network, one step on a training batch

while operations are dropped one by one until one function is left (paper: arXiv 2408.06820, sections 3.2 and 3.3).
"""
import contextlib
import copy
import itertools
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import figures
from activation import Activation, named
from cell import NORMALISERS, SAMPLERS, Cell, Site, blame
from models import teacher_and_student
from models_own import network, standard_of
from ops import valid
from run import Run, plan, resume, unused
from runoff import refine, runoff, score, worth
from training import (ConfigError, Failed, Parser, Training, bound, check_memory, configure, cross_entropy, learning_rate,
                      memory_needed, one_line_errors, option, options, weight_optimizer, within)


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
    start: float = option(0.5, 'weight of the standard activation when the relaxed cell takes over (softmax only); 0: none (paper)')
    normalise: str = option('scale', "take gain out of each site's table: none (paper), scale or centre")
    ops: str = option('base', 'operations: base, periodic, swish, no-composites, names; a minus takes one out')
    clip: Optional[float] = option(10.0, "the paper's l, bound on the output of unbounded operations; 'none' for none")
    points: int = option(8193, 'of the grid on which the cell is tabulated; best an odd number, at most 32,768')
    # after the descent (ours)
    refine: int = option(0, 'cells tried on the trained weights, proposals of the alphas and their mutations; 0: none (paper)')
    restarts: int = option(1, 'descents from fresh alphas and weights; what they end with meets in the run-off')
    target: float = option(0.0, 'validation loss below which nothing is refined and no restart follows')
    runoff: int = option(24, 'cells trained from scratch, proposals and their mutations, judged on validation; 0: none (paper)')
    runoff_field: str = option('near', 'tried first, after what the descent ended with, in the order of the alphas: plain, each operation '
                                       'alone; or near, the standard activation joined to another operation')
    runoff_mutants: float = option(0.5, 'share of the cells that are mutations of the best so far')
    runoff_steps: float = option(0.12, 'steps of the first round; each further one takes a quarter of the field for twice as long')
    runoff_batches: int = option(10, 'validation batches that judge a candidate')
    # the log
    checkpoint_every: float = option(60.0, 'seconds between checkpoints')

    def check(self) -> None:
        super().check()
        valid('--sampler', self.sampler, SAMPLERS)
        valid('--normalise', self.normalise, NORMALISERS)
        valid('--shrink', self.shrink, ('linear', 'log', 'none'))
        valid('--runoff-field', self.runoff_field, ('plain', 'near'))
        valid('--data', self.data, data.DATA if not self.teacher else ('teacher',))
        within(self, 0, 'runoff', 'seed', 'arch_weight_decay', 'warmstart', 'shrink_from', 'shrink_until', 'arch_lr',
               'runoff_steps', 'checkpoint_every', 'refine', 'target')
        within(self, 20, 'steps')
        within(self, 1, 'restarts', 'runoff_batches')
        if not 0 <= self.start < 1:
            raise ConfigError(f'--start {self.start}: it must be a share, 0 up to below 1')
        if not 0 <= self.runoff_mutants <= 1:
            raise ConfigError(f'--runoff-mutants {self.runoff_mutants}: it must be a share, 0 to 1')
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
              grad_clip=5.0, start=0.0, temperature=1.0, runoff=0)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    'laptop': {
        'resnet20': dict(data='cifar10_16', steps=150, batch_size=64, optimizer='sgd', lr=0.1, lr_end=0.1, warmup=0.05,
                         weight_decay=5e-4, runoff=16, runoff_steps=0.32, runoff_field='plain'),
        'vit_tiny': dict(data='cifar10_16', steps=60, batch_size=16, lr=5e-4, lr_end=0.1, warmup=0.1,
                         weight_decay=0.05, arch_lr=0.1, temperature=0.3, runoff=4, runoff_mutants=0.0, runoff_steps=160, runoff_batches=24),
        'minigpt': dict(data='tinystories_sample', steps=80, batch_size=8, context=64, lr=3e-3, lr_end=0.1, warmup=0.1,
                        weight_decay=0.1, arch_lr=0.3, temperature=0.3, runoff=2, runoff_mutants=0.0, runoff_steps=360),
        # a descent takes some 5 s, a thousand cells 7; the first descent is mostly enough
        'toy': dict(data='teacher', teacher='mul(sigmoid(x), x)', steps=600, batch_size=256, lr=0.03, lr_end=0.0,
                    weight_decay=0.0, arch_lr=0.1, warmstart=0.05, shrink_until=0.9, normalise='centre', points=1024,
                    start=0.0, runoff=0, refine=1000, restarts=4, target=3e-4),
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
                             'proposals': [], 'found': [], 'skipped': 0, 'in_a_row': 0}
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
            # Cells to try afterwards: what the alphas say, some 200 times on the way.
            often = max(1, (discrete - warmstart) // 200)
            if (config.refine or config.runoff) and warmstart <= step < discrete and step % often == 0:
                state['proposals'].append(cell.sample())
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
            refine(model, cell, state['proposals'], train_batches, val_batches, loss, config, bilevel, report, snapshot)
        with torch.no_grad():
            cell.draw()
        result = score(model, itertools.islice(val_batches, 20), loss)
        state['found'].append([worth(result), cell.expression(), result, [active[0] for active in cell.active]])
        state['restart'] += 1
        if state['restart'] == config.restarts or result['loss'] < config.target:
            break
        # Once more, from other alphas: far enough from uniform not to end in the same place.
        state['step'], state['proposals'] = 0, []
        model.load_state_dict(state['initial'])
        cell.reset(0.3, config.start)
        holders.update(optimizers(weights, architecture, config))
        report({'restarting': state['restart']}, snapshot)

    if not config.runoff:
        _, expression, result, _ = min(state['found'], key=lambda entry: entry[0])
        return Activation(expression, config.clip), result
    if state['runoff'] is None:
        # Where the descents ended, the last one first; then simple cells in the order of the alphas; then samples of the alphas.
        simple = cell.plain() if config.runoff_field == 'plain' else cell.near()
        samples = [state['proposals'][int(k)] for k in torch.randperm(len(state['proposals']))]
        state['proposals'] = [*(end for *_, end in reversed(state['found'])), *simple, *samples]
        state['runoff'] = {'field': [], 'steps': max(2, config.at(config.runoff_steps))}
    return runoff(model, cell, state, train_batches, val_batches, loss, config, report, snapshot)


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
            config, resumed = resume(Path(other.resume), Config, given)
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

"""Search an activation function: `python search.py --model resnet20`.

The loop is in `search`: an architecture step (alphas and scalars of the cell, on validation data) and a
weight step (weights of the network, on training data), strictly separated, while operations are dropped one
by one (arXiv 2408.06820, sections 3.2 and 3.3). Then a few functions are trained, and the best is the result.
"""
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import data
from activation import NAMED, SHAPES, Activation, distance, named, nodes, nonlinearity
from cell import NORMALISERS, SAMPLERS, Cell, blame
from data import average, cross_entropy, is_first, seed_everything
from evaluate import (Loss, Parser, Training, call, check_device, configure, cosine, learning_rate, number,
                      option, precision, score, train, weight_optimizer)
from models import STANDARD, network, replaced, teacher_and_student
from plot import FILES, LOG, Everything, Run, one_line_errors, open_log, picture
from space import Match, Space

Result = tuple[Activation, dict[str, float]]  # the function found, its scores on validation batches

def bound(text: str) -> Optional[float]:
    return None if text == 'none' else number(1e-3, float)(text)

@dataclasses.dataclass
class Config(Training):
    """The settings of a search. warmstart and the shrink_* are shares of the steps."""
    out: str = option('', 'run folder; default runs/<model>-<data>-seed<seed>')
    teacher: str = option('', 'of --model toy: plant this function in a teacher network; is it found?')
    seed: int = option(0, 'of the split, the initial weights, the batches and the sampling', number(0))
    method: str = option('ours', 'paper: DrNAS, no normalisation, no trials', choices=('ours', 'paper'))
    steps: int = option(500, 'bi-level steps: an architecture step and a weight step each', number(2))
    cell: str = option('paper', 'shape of the cell', choices=tuple(SHAPES))
    ops: str = option('base', 'base, periodic, swish, no-composites, names; a minus takes one out')
    clip: Optional[float] = option(10.0, "the paper's l, bound on unbounded operations; or none", bound)
    sampler: str = option('softmax', 'dirichlet is DrNAS, softmax DARTS', choices=SAMPLERS)
    normalise: str = option('scale', "of each site's table: its gain, its mean (centre)", choices=NORMALISERS)
    arch_lr: float = option(0.03, 'learning rate of alphas and scalars (Adam)', number(0, float))
    warmstart: float = option(0.15, 'share of the steps with the standard activation, whose gradient scores '
                              'the proposals', number(0, float, 1))
    shrink: str = option('linear', 'pace of the drops: log has most early', choices=('linear', 'log', 'none'))
    discretise: str = option('gradient', 'functions to try: shrink, what is left of the cell; project, those '
                             'near its curve; gradient, those of best score by the collected gradient',
                             choices=('shrink', 'project', 'gradient'))
    candidates: int = option(8, 'functions to try; 0: what the descent ends with is the result', number(0))
    trial_steps: float = option(1.0)      # length of a trial, as a multiple of the steps
    arch_lr_end: float = option(1.0)      # share of arch_lr left at the end of the cosine
    warm_alphas: bool = option(False)     # whether the alphas learn during the warm start already
    shrink_from: float = option(0.3)      # the first drop
    shrink_until: float = option(0.92)    # the last drop
    free_from: float = option(1.0)        # project: from here on a free curve is added to the cell
    temperature: float = option(0.1)      # of the softmax at shrink_until; 1 in the warm start
    start: float = option(0.5)            # weight of the standard when the cell takes over (softmax)
    trust: float = option(0.8)            # gradient: largest relative distance of a proposal to the standard
    lengths: tuple = option((3, 4, 5))    # gradient: the best of each of these lengths in turn
    around: bool = option(True)           # gradient: only functions that contain the standard activation
    trials_from: str = option('scratch')  # trials begin with the initial weights; trained: the descent's
    judge: int = option(10)               # validation batches that score a trial; at most the steps
    digest: str = option('')              # of data, network, operations: a run goes on with the same

    def at(self, share: float) -> int:
        """The step at a share of the steps; at least one comes after it."""
        return min(round(share * self.steps), self.steps - 1)

    def operations_left(self, step: int, first: int, last: int) -> int:
        """How many operations may be left after so many steps: `first` until shrink_from, `last` at
        shrink_until. The warm start, in which the alphas know nothing, drops none before its last step."""
        begin, end = (self.at(max(share, self.warmstart)) for share in (self.shrink_from, self.shrink_until))
        if step >= end and self.shrink != 'none':
            return last
        if step <= begin or self.shrink == 'none':
            return first
        share = (step - begin) / (end - begin)
        if self.shrink == 'log':  # the k-th drop at step begin + (end - begin)^(k / drops)
            share = math.log(step - begin) / math.log(end - begin)
        return first - int((first - last) * share + 1e-9)

# What differs from evaluate.PRESETS. paper: its appendix; an epoch is the 75 % of the data that train the
# weights, one epoch is warm start, dropping begins in the third.
PAPER = dict(method='paper', sampler='dirichlet', normalise='none', shrink='log', shrink_until=0.98,
             arch_lr=6e-4, warmstart=0.02, shrink_from=0.04, warm_alphas=True, start=0.0, temperature=1.0,
             discretise='shrink', candidates=0)  # of --method paper
TEACHER = dict(data='teacher', teacher='mul(sigmoid(x), x)', batch_size=256, weight_decay=0.0)
TOY = dict(TEACHER, steps=600, lr=0.03, lr_end=0.0, arch_lr=0.1, arch_lr_end=0.0, start=0.95,
           shrink='none', normalise='centre', temperature=1.0, discretise='project',
           free_from=0.7, trial_steps=0.15, trials_from='trained')
LATE = dict(warmstart=0.6, shrink_from=0.65, trial_steps=1.3)  # short runs: the first phase collects most
RESNET = dict(lr_end=0.1, trust=0.5, lengths=(2,), around=False)
PRESETS = {
    'quick': {
        'resnet20': dict(RESNET, steps=150),
        'vit_tiny': dict(LATE, steps=120, lr_end=0.1, arch_lr=0.1, judge=24, candidates=5),
        'minigpt': dict(LATE, steps=240, arch_lr=0.3, candidates=7),
        'toy': TOY},
    'evening': {
        'resnet20': dict(RESNET, steps=1500, arch_lr=0.003, judge=40, candidates=6),
        'vit_tiny': dict(steps=600, lr_end=0.1, arch_lr=0.03, judge=40, warmstart=0.3, shrink_from=0.35),
        'minigpt': dict(steps=1000, arch_lr=0.1, judge=40, warmstart=0.3, shrink_from=0.35),
        'toy': dict(TOY, steps=1500)},
    'paper': {
        'resnet20': dict(PAPER, steps=14650, batch_size=64, accumulate=2, lr_milestones=(), grad_clip=5.0),
        'vit_tiny': dict(PAPER, steps=3650, batch_size=128, accumulate=4, grad_clip=5.0),
        'minigpt': dict(PAPER, steps=1000, warmup=0.0, arch_lr=1e-3, warmstart=0.1, shrink_from=0.2),
        'toy': dict(PAPER | TEACHER, steps=1500, lr=1e-2, lr_end=1.0, grad_clip=5.0, arch_lr=1e-2,
                    warmstart=0.07, shrink_from=0.14)}}

# ---- the search ----

def held(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network for an architecture step, its weights as constants and its buffers as copies: a validation
    batch leaves no trace in gradients or running statistics, a leak that is easy to miss."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return lambda *x: torch.func.functional_call(model, state, x)

def clip_gradients(gradients: list[Tensor], limit: float, *others: Tensor) -> bool:
    """Bound the common norm of the gradients by `limit`, in place (0: leave them). Returns whether they and
    the others are finite; if not, the step must be skipped. Asking makes a GPU wait, once in a half-step."""
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if limit:
        torch._foreach_mul_(gradients, (limit / norm.clamp(min=1e-12)).clamp(max=1.0))
    return bool(torch.stack(torch._foreach_norm([norm, *others], math.inf)).isfinite().all())

def search(model: nn.Module, cell: Cell, train_batches: Iterator, val_batches: Iterator, loss: Loss,
           config: Config, run: Optional[Run] = None) -> Result:
    """The best function for `model` and its scores. The model's activations are sites of `cell`, which has
    config's ops, clip and shape. Batches: endless (input, target), disjoint; with state_dict to resume."""
    weights, architecture = [p for p in model.parameters() if p.requires_grad], cell.architecture
    assert not {id(p) for p in weights} & {id(p) for p in architecture}, 'weights and architecture overlap'
    if not weights:
        raise ValueError('the network has no weight that learns: unfreeze some (requires_grad_)')
    score(model, data.repeatable(val_batches, 1)(), loss)  # shows what does not fit before the descent
    everything = Everything(model)
    initial = everything.state_dict()
    cell.to(weights[0].device)  # one of a user's may have stayed on the CPU
    cell.original = None
    if isinstance(model, replaced):  # the standard: its most frequent activation, or the known one like it
        calls = list(model.index)
        names = [name for *_, name, _ in calls]
        usual = max(names, key=names.count)
        cell.original = model.now[calls[names.index(usual)]]
        like = functools.partial(distance, target=cell.typical, rescale=False)
        cell.standard = named(usual) if usual in NAMED else min(map(named, NAMED), key=like)
    cell.reset(1e-3, config.start)
    weight_opt = weight_optimizer(weights, config)
    weight_opt.zero_grad()  # what a user's training has left
    arch_opt = torch.optim.Adam(architecture, lr=config.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    run = run or Run(config)
    run.hold(model=everything, cell=cell, weight_opt=weight_opt, arch_opt=arch_opt, train=train_batches,
             val=val_batches)
    all_operations, warmstart = sum(map(len, cell.ops)), config.at(config.warmstart)
    buffers = ((name, b) for name, b in model.named_buffers() if b.is_floating_point() and b.numel())
    statistics = {name for name, b in buffers if b.isfinite().all()}  # running ones, no mask of -inf
    model.train()

    for step in range(run.state['step'], config.steps):
        warm, val_loss, dropped, trouble = step < warmstart, None, [], None
        collect = warm and config.discretise == 'gradient'
        cooled = (step - warmstart) / max(config.at(config.shrink_until) - warmstart, 1)
        cell.temperature = config.temperature ** min(max(cooled, 0.0), 1.0)  # from 1, geometrically
        cell.freed = config.discretise == 'project' and step >= config.free_from * config.steps
        arch_opt.param_groups[0]['lr'] = config.arch_lr * cosine(step / config.steps, config.arch_lr_end)

        # 1. Architecture step: alphas and scalars, on validation batches. The weights are constants.
        #    collect: dL/df of the standard activations, which will score all functions of the space.
        if collect or config.warm_alphas or not warm:
            cell.tabulate(standard=collect)
            slopes = 0.0  # (sites, points), dL/df, the same draw of the tables for all batches of a step
            for _ in range(config.accumulate * cell.learns):  # else one operation is left, and no scalar
                x, y = next(val_batches)
                with precision(config, model):
                    val_loss = loss(call(held(model), x), y) / config.accumulate
                slopes += torch.autograd.grad(val_loss, cell.values)[0]
            if cell.learns:
                gradients = [slopes] if collect else torch.autograd.grad(
                    cell.values, architecture, slopes, allow_unused=True, materialize_grads=True)
                average([*gradients, val_loss.detach()])  # the loss, too: all ranks skip a step, or none
                if not clip_gradients(gradients, 0.0 if collect else config.grad_clip, val_loss.detach()):
                    trouble = blame(model, cell, x) | {'skipped': 'architecture'}
                elif collect:  # the first inputs are counted when the histograms have seen some
                    cell.collect(gradients[0], early=warmstart // 8 <= step <= warmstart // 4)
                else:
                    for p, gradient in zip(architecture, gradients):
                        p.grad = gradient
                    arch_opt.step()

        # 2. Weight step: the weights, on training batches. No graph leads from the tables to the alphas.
        for group in weight_opt.param_groups:
            group['lr'] = learning_rate(step, config)
        before = {name: b.clone() for name, b in model.named_buffers() if name in statistics}
        with torch.no_grad():
            cell.use_standard() if warm else cell.tabulate()
        for _ in range(config.accumulate):
            x, y = next(train_batches)
            with precision(config, model):
                train_loss = loss(call(model, x), y) / config.accumulate
            train_loss.backward()
        gradients = [p.grad for p in weights if p.grad is not None]
        running = [b for name, b in model.named_buffers() if name in statistics]  # perhaps new tensors
        average([*gradients, train_loss.detach(), cell.seen, *running])
        if clip_gradients(gradients, config.grad_clip, train_loss.detach(), *running):
            weight_opt.step()
        else:
            trouble = blame(model, cell, x) | {'skipped': 'weights'}
            everything.load_state_dict(before)
        weight_opt.zero_grad()

        # 3. Progressive shrinking: drop what the alphas like least, until each choice point has one left.
        while cell.operations() > config.operations_left(step + 1, all_operations, len(cell.choices)):
            dropped.append(cell.drop())

        # 4. Log and checkpoint.
        run.after(step + 1, train_loss, val_loss, dropped, trouble)

    cell.temperature = config.temperature  # a run resumed after its last step has not set them
    cell.freed = config.discretise == 'project' and config.free_from < 1
    return trials(model, cell, initial, train_batches, val_batches, loss, config, run)

# ---- the functions to try ----

def steepest(space: Space, cell: Cell, trust: float) -> list[Match]:
    """The functions that lower the loss most, to first order, if one of them, scaled to the standard's second
    moment, replaces the standard: by the gradient that `cell` has collected. Left out: those at a relative
    distance, sqrt(2 - 2 cos), under 0.1 or over trust, and those hardly alive on the first inputs: 0.6 of the
    second moment must be variance, and a quarter of the inputs must have a slope over 0.01."""
    def pool(values: Tensor, grid: Tensor) -> Tensor:  # spread linearly onto the points of the space
        away = (grid.cpu().double().clamp(-limit, limit)[:, None] - space.x).abs() / step
        return values.cpu().double() @ (1 - away).clamp(min=0)
    limit, step, bins = space.x[-1].item(), (space.x[1] - space.x[0]).item(), cell.grid[cell.bins]
    gradient, density, early = pool(cell.gradient, cell.grid), pool(cell.inputs, bins), pool(cell.early, bins)
    density, early = density / density.sum(), early / early.sum()
    standard = cell.typical(space.x).detach()
    power = density @ standard.square()
    def change(f: Tensor) -> Tensor:  # (functions, points) -> (functions,)
        f = f * (power / (f.square() @ density)).sqrt()[:, None]
        far = (2 - 2 * (f @ (density * standard)) / power).clamp(min=0).sqrt()
        moves = (f @ early).square() < 0.4 * (f.square() @ early)
        alive = (f.diff(dim=1).abs() > 0.01 * step).double() @ early[1:] > 0.25
        return torch.where((far > 0.1) & (far < trust) & moves & alive, (f - standard) @ gradient, torch.inf)
    return space.scan(change, shift=False)

def proposals(cell: Cell, config: Config) -> list[Activation]:
    """What to try, see --discretise: no nearly straight line; the standard only in a planted search."""
    trees = [cell.tree()]
    if config.candidates and config.discretise == 'project':
        space = Space(config.ops, config.clip, config.cell)
        seen = torch.from_numpy(np.interp(space.x, cell.grid[cell.bins].cpu(), cell.seen.mean(0).cpu()))
        curve = torch.from_numpy(np.interp(space.x, cell.grid.cpu(), cell.mean_table().cpu()))
        front, best = space.nearest(curve, seen, config.candidates)
        trees = [match.tree for match in front[::-1] + best]
    elif config.candidates and config.discretise == 'gradient':
        space = Space(config.ops, config.clip, config.cell)
        matches = sorted(steepest(space, cell, config.trust), key=lambda match: match.score)
        if config.around:  # all, where these operations cannot spell the standard
            matches = [match for match in matches if cell.standard.tree in nodes(match.tree)] or matches
        of_length = [[match.tree for match in matches if match.length == n] for n in config.lengths]
        trees += [tree for row in itertools.zip_longest(*of_length) for tree in row if tree]
    functions = (Activation(tree, config.clip) for tree in trees)
    functions = (f for f in functions if nonlinearity(f) > (0.01 if config.teacher else 0.15)
                 and (config.teacher or distance(f, cell.typical, False) > 0.01))
    best = list(itertools.islice(functions, config.candidates)) or [Activation(cell.tree(), config.clip)]
    return [f.to(cell.grid.device) for f in best]

def trials(model: nn.Module, cell: Cell, initial: dict[str, Tensor], train_batches: Iterator,
           val_batches: Iterator, loss: Loss, config: Config, run: Run) -> Result:
    """Train the proposals on the same batches from the same weights; the best on validation data."""
    functions = proposals(cell, config)
    judge = data.repeatable(val_batches, min(config.judge, config.steps))
    if not config.candidates:
        cell.freed = False  # the free curve is no part of the function
        while cell.operations() > len(cell.choices):
            cell.drop()
        with torch.no_grad():
            cell.tabulate()  # the discrete cell as the weights know it, normalised
        return functions[0], score(model, judge(), loss)
    short = dataclasses.replace(config, steps=max(2, round(config.trial_steps * config.steps)))
    batches, everything = data.repeatable(train_batches, short.steps * config.accumulate), Everything(model)
    start = initial if config.trials_from == 'scratch' else everything.state_dict()
    results, seen = run.state['results'], cell.seen.clone()
    for k, f in enumerate([cell.standard, *functions]):
        name = 'own' if f is cell.standard and isinstance(model, replaced) else f.expression
        if name not in results:
            begun = time.monotonic()
            everything.load_state_dict(start)
            cell.use_standard() if f is cell.standard else cell.use(f if start is initial else cell.fitted(f))
            train(model, batches(), loss, short)
            results[name] = result = score(model, judge(), loss)
            everything.load_state_dict(start)  # what is saved now must propose the same functions again
            cell.seen[:len(seen)].copy_(seen)
            minutes = (len(functions) - k) * (time.monotonic() - begun) / 60
            run.log({'tried': name, **result},
                    f"tried: loss {result['loss']:.4f}  {'own' if name == 'own' else f.formula}   "
                    f'{minutes:.1f} min left')
            run.save()
    best = min(functions, key=lambda f: np.nan_to_num(results[f.expression]['loss'], nan=math.inf))
    best.zero_grad()  # its scalars stood at the sites of a trial
    if not math.isfinite(results[best.expression]['loss']):
        raise ValueError('all trials end with a loss that is not finite; try a smaller --lr')
    standard = results['own' if isinstance(model, replaced) else cell.standard.expression]
    return best, results[best.expression] | {'standard_loss': standard['loss']}

# ---- the command line ----

def prepare(config: Config) -> tuple[nn.Module, Cell, Iterator, Iterator, Loss]:
    """The network with the sites of a new cell in it, the cell, training and validation batches, the loss."""
    seed_everything(config.seed)
    # weights take their signs in the warm start: an even function leaves open whether the planted one rises
    standard = 'abs(x)' if config.teacher else STANDARD.get(config.model, 'relu')
    seeds = 2 * config.seed, 2 * config.seed + 1
    cell = Cell(config.ops, config.clip, config.sampler, standard, config.normalise, config.cell)
    if config.teacher:
        teacher, model = teacher_and_student(lambda: named(config.teacher), cell.site)
        teacher, loss, digest = teacher.to(config.device), nn.functional.mse_loss, ''
        batches = [data.TeacherBatches(teacher, config.batch_size, seed, config.device) for seed in seeds]
    else:
        dataset = data.load(config.data, config.data_dir or None, config.tokens, config.side or None)
        model, loss = network(config, cell.site, dataset), cross_entropy
        digest = dataset.digest + getattr(model, 'source', '')
        parts = data.split(dataset, config.seed)
        batches = [data.Batches(dataset, part, config.batch_size, seed, augment, config.context,
                                config.device) for part, seed, augment in zip(parts, seeds, (True, False))]
    kinds = f'{cell.ops}, {data.ranks()} processes'  # a resumed run needs the same of these, too
    config.digest = f'{digest}{zlib.crc32(kinds.encode()):08x}'
    return model.to(config.device), cell.to(config.device), *batches, loss

def new_config(given: dict[str, Any]) -> Config:
    """The settings of a new run. Raises ValueError for options that do not fit together."""
    method, preset = given.get('method'), given.get('preset')
    if method == 'ours' and preset == 'paper':
        raise ValueError('--preset paper has the method of the paper: leave one of --preset and --method out')
    config = configure(Config, PRESETS, (PAPER if method == 'paper' != preset else {}) | given)
    planted = config.data == 'teacher'
    others = {'data_dir', 'side', 'only', 'tokens', 'context', 'compile'}
    if given.keys() & (others if planted else {'teacher'}):
        raise ValueError('--teacher is of --model toy and makes its data: leave out --data, --data-dir, '
                         '--side, --only, --tokens, --context and --compile')
    config.teacher = config.teacher if planted else ''
    if planted and not nonlinearity(named(config.teacher)) > 0.01:
        raise ValueError(f'--teacher {config.teacher} is a constant or a straight line: plant a curve')
    name = Path(config.model).name.replace('.py:', '-').replace(':', '-')
    config.out = config.out or f'runs/{name}-{config.data}-seed{config.seed}'
    return config

def resume(folder: Path, given: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Configuration and checkpoint of a run. Only --data-dir and --device may differ; else ValueError."""
    try:
        checkpoint = torch.load(folder / 'checkpoint.pt', map_location='cpu', weights_only=True)
        config = Config(**{**checkpoint['config'], 'out': str(folder)})
        checkpoint['random'], checkpoint['parts'], int(checkpoint['state']['log_size'])
    except Exception as error:  # torch.load raises a dozen kinds on files that are something else
        raise ValueError(f'--resume {folder}: no checkpoint of a run ({type(error).__name__})') from None
    for name in vars(config).keys() & given.keys() - {'data_dir', 'device'}:
        if given[name] != getattr(config, name):
            raise ValueError(f'--resume keeps the settings of the run: {name} is {getattr(config, name)}; '
                             f"leave --{name.replace('_', '-')} out")
    config.device = check_device(given.get('device', config.device))
    if 'data_dir' in given:
        config.data_dir = os.path.abspath(os.path.expanduser(given['data_dir']))
    return config, checkpoint

def main(arguments: Optional[list[str]] = None) -> None:
    parser, folder = Parser(__doc__), None
    parser.add_argument('--resume', metavar='RUN', help='go on with the run in this folder, exactly')
    parser.add_argument('--plot', metavar='RUN', help='draw search.png of a run (needs matplotlib)')
    parser.add_settings(Config, PRESETS)
    with one_line_errors(lambda: f'go on with --resume {folder}' if folder else 'nothing was written'):
        given = parser.given(arguments, {'plot': ()})
        if 'plot' in given:
            return print(picture(Path(given['plot'])))
        new = 'resume' not in given
        config, checkpoint = (new_config(given), None) if new else resume(Path(given['resume']), given)
        place, digest = Path(config.out), config.digest
        for file in [place / name for name in FILES[:None if new else 1] if is_first()]:
            if file.exists() and file.stat().st_size:
                advice = f'choose another --out, or go on by --resume {place}'
                if file.name == FILES[0]:  # the result
                    advice = f'the search is finished: python evaluate.py {place}, or choose another --out'
                raise ValueError(f'{file} already exists; {advice}')
        model, cell, train_batches, val_batches, loss = prepare(config)
        if checkpoint and config.digest != digest:
            raise ValueError(f'--resume {place}: data, network, operations or number of processes are '
                             'not those of the run; give them back, or search anew')
        sites = model.describe() if isinstance(model, replaced) else f'{cell.sites} sites'
        print(f'{config.model} with {sites} on {config.data}: {config.steps} steps; run folder {place}',
              flush=True)
        place.mkdir(parents=True, exist_ok=True)
        with open_log(place / LOG, checkpoint) if is_first() else contextlib.nullcontext():
            folder = place
            run = Run(config, folder if is_first() else None, checkpoint)
            found, validation = search(model, cell, train_batches, val_batches, loss, config, run)
            if is_first():
                run.finish(found, validation)

if __name__ == '__main__':
    main()

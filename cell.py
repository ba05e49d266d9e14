"""The relaxed cell, a weighted sum of operations at each choice point, and the table that makes it cheap.

The paper's cell (figure 2) has six choice points: b0 = B0(U0(x), U1(x)); f = B1(U2(b0), U3(x)). The alphas
weigh the operations; gradient descent learns them. For given weights the cell is a function of ONE number. So
`Cell.tabulate` evaluates it on a grid, and the millions of activations of a network are looked up there."""
import functools
import math
from typing import Any, Callable, Iterator, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from activation import SHAPES, Tree, cell_tree, named
from ops import CLIP, check_choice, select

# 99.6 % of 1,000 random cells keep |table - op by op| <= 1e-3 away from kinks. 0 is a point: ReLU is exact.
POINTS, LIMIT = 8193, 12.0
PIECE = 1 << 18  # elements that a CPU looks up at a time: what one operation writes, the next finds in cache
# Scratch of all CPU lookups, as fresh memory costs more than the arithmetic: a piece's indices, then over
# them its lines. So no two threads may look up at a time.
INDEX = torch.empty(PIECE, dtype=torch.int64)

def uniform_grid(points: int = POINTS) -> Tensor:
    """(points,) from -LIMIT to LIMIT, symmetric."""
    return (torch.arange(points) - (points - 1) / 2) * (2 * LIMIT / (points - 1))

@torch.no_grad()
def lines(values: Tensor, limit: float = LIMIT) -> Tensor:
    """(..., points) values -> (..., points - 1) complex: intercept + i * slope, so one gather gets both."""
    rise, steps = values.diff(), values.shape[-1] - 1
    left = torch.arange(steps, device=values.device) - steps / 2  # end of an interval, in steps from 0
    return torch.complex(values[..., :-1] - rise * left, rise * (steps / (2 * limit)))

@functools.lru_cache(256)  # subtle: a list as index would make a GPU wait for it each time
def as_index(active: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(active, device=device)

def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views in the order of memory, piece by piece (one on a GPU), all laid out as the last tensor."""
    to = tensors[-1]
    size = PIECE if to.device.type == 'cpu' else max(to.numel(), 1)
    same = (x if x.stride() == to.stride() else torch.empty_like(to, dtype=x.dtype).copy_(x) for x in tensors)
    return zip(*(x.as_strided((x.numel(),), (1,)).split(size) for x in same))

def in_rows(index: Tensor) -> Tensor:
    """(n,) int16 -> (up to 16, the rest) int64: gather and scatter are parallel along rows."""
    long = INDEX[:len(index)].copy_(index) if index.is_cpu else index.long()
    return long.view(math.gcd(len(index), 16), -1)

class Lookup(torch.autograd.Function):
    """f(x) for a function f known by its values on a uniform grid: linear in between, extrapolated beyond.
    values: (points,), at most 32,768; lines: of them; x: any shape, the dtype of the values. The gradient to
    the values is approximate: half an interval's sum of dL/dy to either end, so 2 bytes an x are kept."""

    @staticmethod
    def forward(ctx, values: Tensor, lines: Tensor, limit: float, x: Tensor) -> Tensor:
        y, index = torch.empty_like(x), torch.empty_like(x, dtype=torch.int16)
        last, middle = len(lines) - 1, torch.tensor(len(lines) / 2, dtype=values.dtype)
        for x_, y_, index_ in pieces(x, y, index):
            torch.add(middle, x_, alpha=len(lines) / (2 * limit), out=y_).clamp_(0, last)
            i = in_rows(index_.copy_(y_).clamp_(0, last))  # a NaN became any number; x makes y NaN
            # subtle: a line takes as many bytes as its index, and is written over it
            over = i.view(lines.dtype) if lines.is_cpu and lines.dtype == torch.complex64 else None
            line = torch.gather(lines.expand(len(i), -1), 1, i, out=over).view(-1)
            torch.addcmul(line.real, line.imag, x_, out=y_)
        ctx.save_for_backward(index, lines)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        if torch.is_grad_enabled():  # create_graph: it would be 0, without a word
            raise ValueError('a cell has no second derivative: neither loss nor network may need one')
        index, lines = ctx.saved_tensors
        slope, to_values = lines.imag.contiguous(), ctx.needs_input_grad[0]
        dx = torch.empty_like(index, dtype=g.dtype)
        sums = torch.zeros(16 * to_values, len(slope), dtype=slope.dtype, device=g.device)
        for g_, dx_, index_ in pieces(g, dx, index):
            i = in_rows(index_)
            torch.gather(slope.expand(len(i), -1), 1, i, out=dx_.view(i.shape)).mul_(g_.view(i.shape))
            if to_values:
                sums[:len(i)].scatter_add_(1, i, g_.view(i.shape))
        half = sums.sum(0) / 2
        return F.pad(half, (0, 1)) + F.pad(half, (1, 0)) if to_values else None, None, None, dx

SAMPLERS, NORMALISERS = ('dirichlet', 'shared', 'mean', 'softmax'), ('none', 'scale', 'centre')
BINS, SAMPLE = 256, 2048  # the histogram of a site's inputs: its bins, and how many inputs a step adds

class Cell(nn.Module):
    """The relaxed cell, shared by all sites, the places in a network where an activation stands; `cell.site`
    makes one. `architecture` is what is searched: alphas, scalars, (operations,) by choice point, and free.

    ops: see ops.select. clip: the paper's l, or None. shape: see SHAPES. standard: of sites made without one.
    sampler: 'dirichlet': weights drawn anew for each site and step (DrNAS; paper, variance reduction);
        'shared': one draw for all sites (DrNAS as published); 'mean' of that Dirichlet; 'softmax' (DARTS).
    normalise: 'none' (paper); 'scale': a site's table gets the second moment that its standard activation has
        under its inputs: gain, which outweighs shape, earns nothing; 'centre': the variance, at mean 0."""

    architecture = property(lambda self: [self.free, *self.alpha, *self.scalars])  # no scalars of `standard`

    def __init__(self, ops: str = 'base', clip: Optional[float] = CLIP, sampler: str = 'dirichlet',
                 standard: str = 'relu', normalise: str = 'none', shape: str = 'paper', points: int = POINTS):
        super().__init__()
        check_choice('sampler', sampler, SAMPLERS)
        check_choice('normalise', normalise, NORMALISERS)
        self.shape, self.clip, self.sampler, self.normalise = shape, clip, sampler, normalise
        self.choices = tuple(choice for choice, *_ in SHAPES[shape])
        self.ops = tuple(select(ops)[len(inputs) - 1] for _, *inputs in SHAPES[shape])  # unary or binary ones
        self.alpha = nn.ParameterList(torch.empty(len(ops)) for ops in self.ops)
        self.scalars = nn.ParameterList(torch.empty(len(ops)) for ops in self.ops)
        self.kept = None, {}  # the grid, and by name what operations make of it
        self.free, self.freed = nn.Parameter(torch.zeros(97)), False  # see `tabulate`
        self.temperature = 1.0  # of the softmax sampler: towards 0 all weight goes to the highest alpha
        self.standard, self.standards, self.sites = named(standard), [], 0
        self.original: Optional[Callable] = None  # what most sites had in a network that is not ours
        self.register_buffer('grid', uniform_grid(points), persistent=False)
        self.register_buffer('bins', ((torch.arange(BINS) + 0.5) * points / BINS).long(), persistent=False)
        self.register_buffer('seen', torch.empty(0, BINS))  # (sites, BINS) running histograms of the inputs
        self.register_buffer('usual', torch.empty(0, BINS), persistent=False)  # the standards at the bins
        for name, size in ('gradient', points), ('inputs', BINS), ('early', BINS):  # see `collect`
            self.register_buffer(name, torch.zeros(size))
        self.reset()
        self.use_standard()

    def site(self, standard: Optional[Callable[[Tensor], Tensor]] = None) -> 'Site':
        """A site for one more place in a network; standard: the function of a tensor that stood there."""
        self.sites += 1
        self.standards.append(standard or self.standard)
        if self.functions is not self.standards:  # a branch of the network that is taken later
            late = self.functions[-1:] if self.values is None else self.standards[-1:]  # until the next table
            self.functions = [*self.functions, *late]
        x = self.grid[self.bins]
        self.seen = torch.cat([self.seen, torch.softmax(-x.square() / 2, 0)[None]])  # N(0, 1) at first
        self.usual = torch.cat([self.usual, self.standards[-1](x).detach()[None]])
        return Site(self, self.sites - 1)

    @torch.no_grad()
    def reset(self, spread: float = 1e-3, start: float = 0.0) -> None:
        """All operations, first scalars, alphas ~ N(0, spread^2), nothing collected. start, for softmax only:
        weight of the standard in the last U and of `right` in the last B, so that f is near it; 0: none."""
        self.active = [list(range(len(ops))) for ops in self.ops]  # operations not dropped, by choice point
        for alpha, scalars, ops in zip(self.alpha, self.scalars, self.ops):
            alpha.normal_(0.0, spread)
            scalars.copy_(torch.tensor([op.scalar or 0.0 for op in ops]))
        for collected in (self.free, self.gradient, self.inputs, self.early):
            collected.zero_()
        first = (self.standard.expression.removesuffix('(x)'), 'right')  # every shape ends in U(x), B(..., U)
        names = [[op.name for op in ops] for ops in self.ops[-2:]]
        if start and self.sampler == 'softmax' and first[0] in names[0] and first[1] in names[1]:
            for alpha, name, every in zip(self.alpha[-2:], first, names):  # odds to one of the others
                alpha[every.index(name)] += math.log(start / (1 - start) * max(len(every) - 1, 1))

    def sample(self, noise: bool = True) -> list[Tensor]:
        """Weights from the alphas: a (rows, active operations) tensor a choice point, rows that sum to 1.
        rows: sites, or 1 for all. noise: False for the mean weights, one row."""
        weights, rows = [], max(self.sites, 1) if self.sampler == 'dirichlet' else 1
        for alpha, active in zip(self.alpha, self.active):
            alpha = alpha.index_select(0, as_index(tuple(active), alpha.device))
            c = (F.elu(alpha) + 1).clamp(min=1e-2)  # the concentrations; torch's sampler is wrong below 1e-3
            if self.sampler == 'softmax':
                weights.append((alpha / self.temperature).softmax(0)[None])
            elif self.sampler == 'mean' or not noise or len(active) == 1:
                weights.append((c / c.sum())[None])
            else:
                weights.append(torch.distributions.Dirichlet(c, validate_args=False).rsample((rows,)))
        return weights

    def evaluate(self, x: Tensor, weights: list[Tensor], watch: Optional[Callable] = None) -> Tensor:
        """(rows, points) the relaxed cell op by op: the reference, and what fills the tables. x: (points,).
        weights: as of `sample`. watch: gets each operation's name, 'U2:exp', and its unclipped output."""
        if self.kept[0] is not self.grid:  # what does not change is computed once: no scalar, same input
            self.kept = self.grid, {op.name: op(self.grid, clip=self.clip) for op in self.ops[0]
                                    if op.scalar is None}
        outputs = {'x': x}
        for k, (choice, *names) in enumerate(SHAPES[self.shape]):
            inputs, ops = torch.broadcast_tensors(*(outputs[name] for name in names)), self.ops[k]
            known = self.kept[1] if x is self.grid and names == ['x'] else {}
            scalars = {j: self.scalars[k][j] for j in self.active[k] if ops[j].scalar is not None}
            values = [known[ops[j].name] if ops[j].name in known else
                      ops[j](*inputs, p=scalars.get(j), clip=self.clip) for j in self.active[k]]
            for j in self.active[k] if watch else ():
                watch(f'{choice}:{ops[j].name}', ops[j](*inputs, p=scalars.get(j), clip=None))
            if len(values) > 1:
                stack = torch.stack(values, -2)  # ([rows,] operations, points)
                values = [(weights[k][:, None, :] @ stack).squeeze(-2)]    # (rows, points)
            outputs[choice] = values[0]
        return outputs[choice].reshape(-1, len(x))

    def normalised(self, values: Tensor) -> Tensor:
        """(rows, points) -> (sites, points), as `normalise` says. Differentiable: the part of the gradient
        that would only change the gain is taken out."""
        seen = self.seen.clone()  # the sites go on counting while autograd still needs it
        f = torch.stack(torch.broadcast_tensors(values[:, self.bins], self.usual))  # (2, sites, BINS)
        mean = (seen * f).sum(-1, keepdim=True) * (self.normalise == 'centre')
        moment = (seen * (f - mean).square()).sum(-1, keepdim=True).clamp(min=1e-6)
        # at most 20 times, so that a function that vanishes on the inputs is not blown up to noise
        return (values - mean[0]) * (moment[1] / moment[0]).sqrt().clamp(max=20.0)

    def tabulate(self, weights: Optional[list[Tensor]] = None, standard: bool = False) -> None:
        """Make `values`, (sites, points) or (1, points) for all: from now on the sites look their inputs up.
        Gradients flow from `values` to alphas and scalars, except under no_grad. weights: None draws them.
        Where `freed`, the curve `free` is added, which learns what the operations cannot draw (ours).
        standard: the sites' standard activations, as a (sites, points) leaf whose gradient is dL/df."""
        with torch.autocast(self.grid.device.type, enabled=False):
            if standard:
                values = torch.stack([f(self.grid.clone()) for f in self.standards]).detach().requires_grad_()
            else:
                values = self.evaluate(self.grid, weights or self.sample())
                values = values if self.normalise == 'none' else self.normalised(values)
                if self.freed:
                    values = values + F.interpolate(self.free[None, None], len(self.grid), mode='linear',
                                                    align_corners=True)[0]
        tables = zip(*(t.expand(self.sites, -1).unbind() for t in (values, lines(values))))
        self.functions = [lambda x, t=t: Lookup.apply(*t, LIMIT, x.to(t[0])).to(x) for t in tables]
        self.values, self.learns = values, values.requires_grad  # False under no_grad: weight steps

    @torch.no_grad()
    def collect(self, slopes: Tensor, early: bool) -> None:
        """Add dL/df at the standards, (sites, points), to `gradient`, the inputs' histogram to `inputs` and,
        if early, to `early`. What adding a + b x to f would gain is left out, the layers around can do it:
        (a + b x) times the density of the inputs is subtracted, so that the sums with 1 and x are 0."""
        points = len(self.grid)  # slopes: without a site that has come since the tables were made
        shares = self.seen[:len(slopes), torch.arange(points) * BINS // points] * (BINS / points)
        line = torch.stack([torch.ones_like(self.grid), self.grid])                # (2, points)
        moments = torch.linalg.pinv((line * shares[:, None]) @ line.T)             # (sites, 2, 2)
        fit = (slopes @ line.T)[:, None] @ moments @ line                          # (sites, 1, points)
        self.gradient += (slopes - shares * fit.squeeze(1)).sum(0)
        self.inputs += self.seen.mean(0)
        self.early += self.seen.mean(0) * early

    def use(self, activation: Callable[[Tensor], Tensor]) -> None:
        """Put one activation at every site, without a table."""
        self.functions, self.values, self.learns = [activation] * self.sites, None, False

    def use_standard(self) -> None:
        """Put its own standard activation at every site, without a table (warm start)."""
        self.functions, self.values, self.learns = self.standards, None, False

    def typical(self, x: Tensor) -> Tensor:
        """What most sites have in the warm start, as the network calls it."""
        return self.original(x.to(self.grid.device)).to(x) if self.original else self.standard(x)

    def curve(self, x: Tensor) -> Tensor:
        """(points,) the relaxed function at its mean weights, op by op, not normalised."""
        return self.evaluate(x.to(self.grid), self.sample(noise=False))[0].detach().to(x)

    @torch.no_grad()
    def mean_table(self) -> Tensor:
        """(points,) the mean of all sites' tables at the mean weights."""
        self.tabulate(self.sample(noise=False))
        return self.values.mean(0)

    @torch.no_grad()
    def fitted(self, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """f at the output scale and shift closest to the relaxed cell, which trained weights are used to."""
        p, y = self.seen.mean(0).double(), f(self.grid[self.bins]).double()
        relaxed = self.mean_table()[self.bins].double()
        y_mean, mean = (p * y).sum(), (p * relaxed).sum()  # subtle: a product @ is not the same bit for bit
        gain = (p * (y - y_mean) * relaxed).sum() / (p * (y - y_mean).square()).sum().clamp(min=1e-12)
        gain, shift = gain.float(), (mean - gain.float() * y_mean).float()
        return lambda x: gain * f(x) + shift

    def operations(self) -> int:
        """How many operations are left at all choice points: 110 at first with the base set, 6 at last."""
        return sum(map(len, self.active))

    def drop(self) -> str:
        """Drop the lowest alpha of a choice point with most operations (paper, section 3.2); its name."""
        k = max(range(len(self.ops)), key=lambda k: len(self.active[k]))
        worst = min(self.active[k], key=self.alpha[k].tolist().__getitem__)
        self.active[k].remove(worst)
        return f'{self.choices[k]}:{self.ops[k][worst].name}'

    def tree(self) -> Tree:
        """The discrete cell: at each choice point the operation of highest alpha, with its scalar."""
        best = [max(active, key=alpha.tolist().__getitem__) for active, alpha in zip(self.active, self.alpha)]
        scalars = [scalars[j].item() for scalars, j in zip(self.scalars, best)]
        return cell_tree(self.shape, [ops[j] for ops, j in zip(self.ops, best)], scalars)

    def named_weights(self) -> dict[str, dict[str, float]]:
        """{'U0': {'tanh': 0.05, ...}, ...}: the mean weights, for the log."""
        rows = zip(self.choices, self.ops, self.active, self.sample(noise=False))
        return {choice: {ops[j].name: round(w, 4) for j, w in zip(active, weights[0].tolist())}
                for choice, ops, active, weights in rows}

    def load_state_dict(self, state: dict, strict: bool = True) -> Any:
        """Sites that came during the run are not there yet: they will come again, with a new histogram."""
        return super().load_state_dict({**state, 'seen': state['seen'][:self.sites]}, strict)

    def get_extra_state(self) -> list[list[int]]:
        return [list(active) for active in self.active]

    def set_extra_state(self, state: list[list[int]]) -> None:
        self.active = [list(active) for active in state]

class Site(nn.Module):
    """One place in the network where the activation stands. Any shape in, the same shape out."""
    def __init__(self, cell: Cell, index: int):
        super().__init__()
        self.index = index
        object.__setattr__(self, 'cell', cell)  # not registered: its parameters are not the network's

    @torch.compiler.disable  # with --compile, what stands between the sites is compiled
    def forward(self, x: Tensor) -> Tensor:
        cell = self.cell
        # in weight steps only: the batches of architecture steps and evaluations leave no trace
        if self.training and torch.is_grad_enabled() and not cell.learns and x.numel():
            # subtle: places by the golden ratio, since a regular step could meet the same few channels only
            places = torch.arange(SAMPLE, dtype=torch.float64, device=x.device) * 0.6180339887 % 1 * x.numel()
            sample = (x.detach().take(places.long()).to(cell.seen) / LIMIT + 1) * (BINS / 2)
            bins = sample.nan_to_num(0.0).clamp(0, BINS - 1).long()
            cell.seen[self.index].mul_(0.9).scatter_add_(0, bins, torch.full_like(sample, 0.1 / SAMPLE))
        return cell.functions[self.index](x)

@torch.no_grad()
def blame(model: nn.Module, cell: Cell, x: Any) -> dict[str, Any]:
    """Where numbers go wrong on the batch x, by one more forward pass; buffers and torch's random state stay.
    site: the first whose output is not finite, else that with the largest; inputs: their range. op: the first
    operation that is not finite there, as 'U2:exp', else that with the largest output; size: of that output,
    before clipping. gradient: the first weight whose .grad is not finite, or None."""
    def size(y: Tensor) -> float:
        return y.abs().amax().nan_to_num(math.inf, math.inf).item() if y.numel() else 0.0
    sites, ops = [], []
    hooks = [module.register_forward_hook(lambda site, x, y: sites.append((size(y), site.index, x[0])))
             for module in model.modules() if isinstance(module, Site)]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng([cell.grid.device] if cell.grid.is_cuda else []):
        torch.func.functional_call(model, buffers, tuple(x) if isinstance(x, list) else x)
    for hook in hooks:
        hook.remove()
    largest, site, inputs = max(sites, key=lambda entry: entry[0])  # the first of equals
    ends = torch.stack(inputs.nan_to_num(0.0, 0.0, 0.0).aminmax())
    # else the cell has no part in it: the standard activations stand there, perhaps as a table that learns
    if cell.values is not None and not (cell.values.is_leaf and cell.values.requires_grad):
        grid = torch.linspace(*ends.clamp(-LIMIT, LIMIT).tolist(), 1001).to(cell.grid)
        cell.evaluate(grid, cell.sample(noise=False), lambda name, y: ops.append((size(y), name)))
    largest, op = max(ops, key=lambda entry: entry[0], default=(largest, 'standard activation'))
    bad = (name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
    return {'site': site, 'inputs': ends.tolist(), 'op': op, 'size': largest, 'gradient': next(bad, None)}

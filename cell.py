"""The cell: six choice points that make one activation function, relaxed (`Cell`) and discrete (`Activation`).

    b0 = B0(U0(x), U1(x));   f = B1(U2(b0), U3(x))          U: unary, B: binary   (paper, figure 2)

With 23 unary and 9 binary operations these are 23^4 * 9^2 = 22,667,121 functions. The relaxed cell replaces every
choice by a weighted sum over its operations; the weights come from the alphas, which gradient descent can learn.

It is evaluated on a grid of a few thousand points only, and what the network needs is looked up there: see table.py, and
`Cell.draw`.
"""
import dataclasses
import itertools
import math
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from activation import Activation, named
from ops import CLIP, Op, arity, select, valid
from table import LIMIT, POINTS, Lookup, dense, in_memory_order, lines, uniform_grid

CHOICES = ('U0', 'U1', 'B0', 'U2', 'U3', 'B1')  # the order in which a cell is evaluated
NORMALISERS = ('none', 'scale', 'centre')
BINS = 256  # of the histogram of a site's inputs
SAMPLERS = ('dirichlet', 'shared', 'mean', 'softmax')


def cell_expression(chosen: tuple[Op, ...], scalars: tuple[Optional[float], ...] = (None,) * 6) -> str:
    """The text of the discrete cell with these six operations (and scalars), in the order of CHOICES."""
    def text(k: int, *inputs: str) -> str:
        op = chosen[k]
        if op.name in ('identity', 'left', 'right'):
            return inputs[op.name == 'right']
        words = list(inputs[:arity(op)])
        if op.scalar is not None:
            words.append(f'{op.scalar if scalars[k] is None else scalars[k]:.9g}')
        return f'{op.name}({", ".join(words)})'
    u0, u1 = text(0, 'x'), text(1, 'x')
    return text(5, text(3, text(2, u0, u1)), text(4, 'x'))


def random_expression(generator: torch.Generator, ops: str = 'base') -> str:
    """One cell of the search space, uniformly over its functions' spellings: the control any search must beat."""
    unary, binary = select(ops)
    kinds = [binary if name[0] == 'B' else unary for name in CHOICES]
    return cell_expression(tuple(kind[torch.randint(len(kind), (), generator=generator)] for kind in kinds))


# ---------------------------------------------------------------------------------------------------------------------
# The relaxed cell.

class Cell(nn.Module):
    """The relaxed cell, shared by every site of a network. `activation=cell.site` makes the network's activations.

    Parameters: alpha[k] (operations of choice k,) and scalars[k] (learnable scalars of choice k,), k in the order of
    CHOICES. They are the architecture; no site holds them, so `network.parameters()` are the weights and only those.

    ops: see ops.select. clip: the paper's l, None for none.
    sampler: how the alphas become weights. 'dirichlet': DrNAS, drawn anew for every site and step (paper, variance
        reduction); 'shared': one draw for all sites (DrNAS as published); 'mean': the mean of that Dirichlet, no noise
        (ours); 'softmax': DARTS.
    standard: name of the activation that `use_standard` puts in the cell's place (warm start).
    normalise: 'none' (paper); 'scale': scale each site's table so that its second moment, under the inputs that the
        site really sees, is that of the standard activation (ours): it takes away the reward for gain, which otherwise
        outweighs shape; 'centre': subtract each table's mean as well.
    points, limit: the grid, `points` values on [-limit, limit].
    """

    def __init__(self, ops: str = 'base', clip: Optional[float] = CLIP, sampler: str = 'dirichlet',
                 standard: str = 'relu', normalise: str = 'none', points: int = POINTS, limit: float = LIMIT):
        super().__init__()
        valid('sampler', sampler, SAMPLERS)
        valid('normalise', normalise, NORMALISERS)
        unary, binary = select(ops)
        self.ops = tuple(binary if name[0] == 'B' else unary for name in CHOICES)
        self.clip, self.sampler, self.standard, self.normalise = clip, sampler, named(standard), normalise
        self.alpha = nn.ParameterList([nn.Parameter(torch.empty(len(ops))) for ops in self.ops])
        self.scalars = nn.ParameterList([nn.Parameter(torch.empty(sum(op.scalar is not None for op in ops)))
                                         for ops in self.ops])
        self.temperature = 1.0  # of the softmax sampler: towards 0 all weight goes to the highest alpha
        self.reset(1e-3)  # alphas near 0: elu(alpha) + 1 near 1, the Dirichlet uniform over the simplex
        self.register_buffer('grid', uniform_grid(points, limit))
        self.limit = limit
        # Histogram of the inputs of each site, a running mean; N(0, 1) until something is seen.
        self.register_buffer('bins', ((torch.arange(BINS) + 0.5) * points / BINS).long())  # grid index of bin centres
        centres = self.grid[self.bins]
        self.register_buffer('normal', torch.softmax(-centres.square() / 2, 0))
        self.register_buffer('seen', torch.empty(0, BINS))
        self.sites = 0
        self.tables: Optional[tuple[Tensor, ...]] = None  # values on the grid, one a site; None: the standard activation
        self.lines: tuple[Tensor, ...] = ()               # the same as intercepts and slopes

    def site(self) -> 'Site':
        """A module for the next place in the network where the activation stands."""
        self.sites += 1
        self.seen = torch.cat([self.seen, self.normal[None]])
        return Site(self, self.sites - 1)

    @torch.no_grad()
    def reset(self, spread: float, start: float = 0.0) -> None:
        """Start anew: all operations, scalars at their first values, alphas ~ N(0, spread^2).

        start: weight given to the standard activation, so that the relaxed cell begins not far from it (ours): to U3,
        its operation, and to B1, right(a, b) = b. 0: none, all operations alike (paper). Nothing is done for a standard
        activation that is no operation of the cell, and with the other samplers: half of a Dirichlet's weight takes an alpha
        above 20, which Adam does not bring down again.
        """
        self.active = [list(range(len(ops))) for ops in self.ops]  # operations not yet dropped, by choice point
        self.dropped: list[list[int]] = [[] for _ in self.ops]     # the others, in the order in which they went
        for alpha, scalars, ops in zip(self.alpha, self.scalars, self.ops):
            alpha.normal_(0.0, spread)
            scalars.copy_(torch.tensor([op.scalar for op in ops if op.scalar is not None]))
        names = [[op.name for op in ops] for ops in self.ops]
        first = {4: self.standard.expression.removesuffix('(x)'), 5: 'right'}
        if start and self.sampler == 'softmax' and all(name in names[k] for k, name in first.items()):
            for k, name in first.items():
                odds = start / (1 - start) * (len(names[k]) - 1)  # to one of the others
                self.alpha[k][names[k].index(name)] += math.log(odds)

    # -- from alphas to weights

    def concentration(self, k: int) -> Tensor:
        """(active operations,) the Dirichlet parameters elu(alpha) + 1; torch's sampler is wrong below 1e-3."""
        return (F.elu(self.alpha[k][self.active[k]]) + 1).clamp(min=1e-2)

    def weights(self) -> list[Tensor]:
        """One (rows, active operations) tensor a choice point, each row summing to 1; rows: sites, or 1 when shared."""
        drawn = []
        for k in range(6):
            c = self.concentration(k)
            if len(self.active[k]) == 1:
                w = torch.ones_like(c)[None]
            elif self.sampler == 'dirichlet':
                w = torch.distributions.Dirichlet(c, validate_args=False).rsample((max(self.sites, 1),))
            elif self.sampler == 'shared':
                w = torch.distributions.Dirichlet(c, validate_args=False).rsample((1,))
            elif self.sampler == 'mean':
                w = (c / c.sum())[None]
            else:
                w = (self.alpha[k][self.active[k]] / self.temperature).softmax(0)[None]
            drawn.append(w)
        return drawn

    # -- the cell itself

    def evaluate(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The relaxed cell, op by op. x: (points,); weights as of `weights()`; returns (rows, points).

        Both the readable reference and what draws the tables: there x is the grid.
        """
        once: dict[str, Tensor] = {}  # U0, U1 and U3 all have x for input: operations without a scalar are shared

        def output(op: Op, scalar: Optional[Tensor], *inputs: Tensor) -> Tensor:
            if len(inputs) == 2 or inputs[0] is not x or scalar is not None:
                return op(*inputs, scalar=scalar, clip=self.clip)
            if op.name not in once:
                once[op.name] = op(x, clip=self.clip)
            return once[op.name]

        def mixture(k: int, *inputs: Tensor) -> Tensor:
            outputs, position = [], 0
            scalars = self.scalars[k].unbind()
            for j, op in enumerate(self.ops[k]):
                scalar = None if op.scalar is None else scalars[position]
                position += op.scalar is not None
                if j in self.active[k]:
                    outputs.append(output(op, scalar, *inputs))
            if len(outputs) == 1:
                return outputs[0]
            stack = torch.stack(torch.broadcast_tensors(*outputs), -2)  # (operations, points) or (rows, operations, points)
            return (weights[k][:, None, :] @ stack).squeeze(-2)        # (rows, points)

        b0 = mixture(2, mixture(0, x), mixture(1, x))
        f = mixture(5, mixture(3, b0), mixture(4, x))
        return f.expand(max(w.shape[0] for w in weights), -1) if f.dim() == 1 else f

    def draw(self) -> None:
        """Draw weights for all sites and tabulate the cell: from now on every site looks its inputs up.

        The tables carry gradient to alphas and scalars; inside torch.no_grad() they do not.
        """
        values = self.evaluate(self.grid, self.weights())  # (rows, points)
        if self.normalise != 'none':
            values = self.normalised(values)
        self.use(values)

    def use(self, values: Tensor) -> None:
        """Make every site look its inputs up in these tables: (sites, points), or (1, points) the same for all."""
        self.tables = values.expand(self.sites, -1).unbind(0)
        self.lines = lines(values, self.grid).expand(self.sites, -1, -1).unbind(0)

    @torch.no_grad()
    def observe(self, index: int, x: Tensor) -> None:
        """Add a sample of the inputs of site `index` to its histogram: some 2,000, which over the 20 steps that the
        running mean looks back is plenty for a moment. More would cost: each of them is a cache line of its own."""
        x = in_memory_order(dense(x.detach()))
        x = x[::x.numel() // 2048 | 1].float()  # an odd stride, or it would see the same few channels only
        bin = ((x + self.limit) * (BINS / (2 * self.limit))).nan_to_num(0.0).clamp(0, BINS - 1).long()
        self.seen[index].mul_(0.95).scatter_add_(0, bin, torch.full_like(x, 0.05 / x.numel()))

    def normalised(self, values: Tensor) -> Tensor:
        """(rows, points) tables -> (sites, points), each scaled to the standard activation's second moment under its
        site's inputs. Differentiable: the part of the gradient that would only change the gain is taken out."""
        seen = self.seen.clone()  # the forward pass goes on counting while autograd still needs this

        def moments(f: Tensor) -> tuple[Tensor, Tensor]:
            f = f[..., self.bins]
            mean = (seen * f).sum(-1, keepdim=True) if self.normalise == 'centre' else torch.zeros_like(seen[:, :1])
            return mean, (seen * (f - mean).square()).sum(-1, keepdim=True).clamp(min=1e-6)

        mean, moment = moments(values)
        _, standard = moments(self.standard(self.grid))
        # at most 20 times, so that a function that vanishes on the inputs is not blown up to noise
        return (values - mean) * (standard / moment).sqrt().clamp(max=20.0)

    @property
    def learns(self) -> bool:
        """Whether the tables drawn last depend on an alpha or a scalar: not so for a discrete cell without scalars."""
        return self.tables is not None and self.tables[0].requires_grad

    def use_standard(self) -> None:
        """Put the standard activation in the place of the cell (warm start)."""
        self.tables = None

    # -- shrinking

    def operations(self) -> int:
        """How many operations are left in the six choice points: 110 at first with the base set, 6 when discrete."""
        return sum(map(len, self.active))

    def drop(self) -> str:
        """Drop the operation of lowest alpha from a choice point with the most operations left (paper, section 3.2).

        Returns 'U2:tanh', the choice point and the name. Raises RuntimeError when every choice point has one left.
        """
        k = max(range(6), key=lambda k: len(self.active[k]))
        if len(self.active[k]) == 1:
            raise RuntimeError('the cell is discrete: every choice point has one operation left')
        alpha = self.alpha[k].tolist()
        worst = min(self.active[k], key=lambda j: alpha[j])
        self.active[k].remove(worst)
        self.dropped[k].append(worst)
        return f'{CHOICES[k]}:{self.ops[k][worst].name}'

    def expression(self, chosen: Optional[list[int]] = None) -> str:
        """The discrete cell with the operations of highest alpha (or the chosen ones), as text with its scalars."""
        if chosen is None:
            alpha = [a.tolist() for a in self.alpha]
            chosen = [max(self.active[k], key=lambda j: alpha[k][j]) for k in range(6)]
        picked = tuple(self.ops[k][j] for k, j in enumerate(chosen))
        scalars = []
        for k, j in enumerate(chosen):
            position = sum(op.scalar is not None for op in self.ops[k][:j])
            scalars.append(self.scalars[k][position].item() if picked[k].scalar is not None else None)
        return cell_expression(picked, tuple(scalars))

    @torch.no_grad()
    def means(self) -> list[Tensor]:
        """One (active operations,) tensor a choice point: the mean weights, without the noise of a sampler."""
        means = []
        for k in range(6):
            if self.sampler == 'softmax':
                means.append((self.alpha[k][self.active[k]] / self.temperature).softmax(0))
            else:
                means.append(self.concentration(k) / self.concentration(k).sum())
        return means

    def sample(self) -> list[int]:
        """A discrete cell, each operation drawn by its mean weight: their places in `ops`, one a choice point."""
        weights = torch.cat(self.means()).cpu().split([len(active) for active in self.active])  # waits for a GPU once
        return [active[int(torch.multinomial(w, 1))] for active, w in zip(self.active, weights)]

    def mutated(self, chosen: list[int]) -> list[int]:
        """A discrete cell near this one: of its six operations one, at times two, drawn anew from all.

        Before that, at times, a cell that is one unary operation is moved inside, from U3 or U2 to U0, where it is the same
        function: only there can it be wrapped, as |x| into tanh(|x|).
        """
        unary, binary = ([op.name for op in self.ops[k]] for k in (0, 2))
        cell = list(chosen)
        if {'left', 'right'} <= set(binary) and 'identity' in unary and torch.rand(()) < 0.3:
            same, left, right = unary.index('identity'), binary.index('left'), binary.index('right')
            u0, u1, b0, u2, u3, b1 = chosen
            if b1 == right or (u0, b0, b1) == (same, left, left):
                cell = [u3 if b1 == right else u2, u1, left, same, u3, left]
        for k in torch.randperm(6)[:1 + int(torch.rand(()) < 0.33)].tolist():
            cell[k] = int(torch.randint(len(self.ops[k]), ()))
        return cell

    def preferred(self, k: int) -> list[int]:
        """All operations of choice point k, those first that the alphas like best: what is left, then what was dropped, the last
        one first."""
        alpha = self.alpha[k].tolist()
        return sorted(self.active[k], key=lambda j: -alpha[j]) + self.dropped[k][::-1]

    def plain(self) -> list[list[int]]:
        """The cells that are one unary operation, U3, those that the alphas kept longest first; the rest, of no effect until it
        is mutated, is what the descent ended with. Empty without right, which lets U3 through."""
        binary = [op.name for op in self.ops[5]]
        if 'right' not in binary:
            return []
        rest = [self.preferred(k)[0] for k in range(4)]
        return [[*rest, j, binary.index('right')] for j in self.preferred(4)]

    def near(self) -> list[list[int]]:
        """Simple functions around the standard activation g, which stands at U3: B1(u(x), g(x)) with one of three u of U2 and a B1
        that joins, then other U3 alone; those first that the alphas kept longest (u and B1: the sum of both places counts).
        Empty where the cell cannot write them so."""
        unary, binary = ([op.name for op in self.ops[k]] for k in (4, 5))
        standard = self.standard.expression.removesuffix('(x)')
        if not {standard, 'identity'} <= set(unary) or not {'left', 'right'} <= set(binary):
            return []
        same, left, right, g = unary.index('identity'), binary.index('left'), binary.index('right'), unary.index(standard)
        b1 = [j for j in self.preferred(5) if j not in (left, right)]
        u1, u2 = self.preferred(1)[0], [j for j in self.preferred(3) if self.ops[3][j].name != 'const']  # joins nothing
        pairs = sorted(itertools.product(range(min(3, len(u2))), range(len(b1))), key=sum)
        joined = [[same, u1, left, u2[u], g, b1[b]] for u, b in pairs]
        return joined + [[same, u1, left, u2[0], j, right] for j in self.preferred(4) if j != g]

    @torch.no_grad()
    def curve(self, points: int = 81, limit: float = 4.0) -> list[float]:
        """The relaxed function at its mean weights, at `points` inputs from -limit to limit: for the log and figures."""
        x = torch.linspace(-limit, limit, points, device=self.grid.device)
        return self.evaluate(x, [w[None] for w in self.means()]).flatten().tolist()

    def activation(self) -> Activation:
        """The discrete cell as a module of its own."""
        return Activation(self.expression(), self.clip)

    def get_extra_state(self) -> list[list[list[int]]]:
        return [self.active, self.dropped]

    def set_extra_state(self, state: list[list[list[int]]]) -> None:
        self.active, self.dropped = ([list(row) for row in rows] for rows in state)


class Site(nn.Module):
    """One place in the network where the activation stands. Any shape in, the same shape out."""

    def __init__(self, cell: Cell, index: int):
        super().__init__()
        self.index = index
        self._cell = (cell,)  # in a tuple, so that the cell's parameters are not registered as the network's

    @property
    def cell(self) -> Cell:
        return self._cell[0]

    def forward(self, x: Tensor) -> Tensor:
        cell = self.cell
        if self.training and cell.normalise != 'none' and not cell.learns:  # in weight steps: the training inputs
            cell.observe(self.index, x)
        if cell.tables is None:
            return cell.standard(x)
        table = cell.tables[self.index]
        return Lookup.apply(x.to(table.dtype), table, cell.lines[self.index], cell.limit).to(x.dtype)

    def extra_repr(self) -> str:
        return f'site {self.index} of {self.cell.sites}'


# ---------------------------------------------------------------------------------------------------------------------
# When numbers go wrong.

@torch.no_grad()
def blame(model: nn.Module, cell: Cell, x: Tensor) -> dict[str, Any]:
    """Where a network with this cell goes wrong on the batch `x`, by one more forward pass; random generators stay.

    site: the first whose inputs or outputs are not finite, else the one with the largest output. inputs: range of its
    finite inputs. op: 'U2:exp', the first operation of the relaxed cell that is not finite on such inputs (as far as the
    table goes), else the one with the largest output before clipping; output: that size. gradient: the first parameter
    whose .grad is not finite, or None.
    """
    sites: list[tuple[float, int, float, float]] = []

    def watch(site: Site, inputs: tuple[Tensor], output: Tensor) -> None:
        values, finite = inputs[0], inputs[0][inputs[0].isfinite()]
        size = largest(output) if len(finite) == values.numel() else math.inf
        sites.append((size, site.index, *(m.item() for m in finite.aminmax())) if len(finite)
                     else (math.inf, site.index, math.nan, math.nan))

    def probed(k: int, op: Op) -> Op:
        def function(*inputs: Tensor) -> Tensor:
            y = op.function(*inputs)
            sizes.append((largest(y), f'{CHOICES[k]}:{op.name}'))
            return y
        return dataclasses.replace(op, function=function)

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, Site)]
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        model(x)
    for hook in hooks:
        hook.remove()
    _, site, low, high = max(sites, key=lambda entry: entry[0])  # the first of equals: nothing is worse than infinite
    sizes: list[tuple[float, str]] = []
    if cell.tables is None:
        sizes.append((largest(cell.standard(torch.tensor([low, high], device=x.device))), cell.standard.expression))
    else:
        ops, reach = cell.ops, max(abs(low), abs(high))
        try:
            cell.ops = tuple(tuple(probed(k, op) for op in ops[k]) for k in range(6))
            cell.curve(1001, min(reach, cell.limit) if math.isfinite(reach) else cell.limit)
        finally:
            cell.ops = ops
    output, op = max(sizes, key=lambda entry: entry[0])
    gradient = next((name for name, p in [*model.named_parameters(), *cell.named_parameters()]
                     if p.grad is not None and not p.grad.norm().isfinite()), None)
    return {'site': site, 'inputs': [low, high], 'op': op, 'output': output, 'gradient': gradient}


def largest(values: Tensor) -> float:
    """The largest size in there; infinite where one is not finite."""
    size = values.abs().max().item()
    return size if math.isfinite(size) else math.inf

"""All functions of a search space on one grid: which formula draws this curve?

Functions of one number are cheap to compare: 97 values say all there is to know. And there are few: the
22,667,121 spellings of the paper's cell are 3,956,560 functions. So nothing is searched for, all are seen.
Three sums, over f, f^2 and f * curve, give the distance from a curve, for thousands in one matrix product.

A cell is a chain: U(x), joined to another U(x) by B, U of that, joined again. The functions of each stage
are kept, once each. Those of the last join are far more: they are made in chunks, scored and forgotten.
"""
from itertools import chain
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor

from activation import SHAPES, Tree, cell_tree, evaluate, nonlinearity
from ops import CLIP, Op, select

CHUNK, KEEP = 4096, 200  # functions made at a time, 3 MB; functions of each length that a scan keeps


class Match(NamedTuple):
    score: float  # lower is better
    length: int
    tree: Tree
    front: bool   # better than all shorter ones


class Functions(NamedTuple):
    values: Tensor  # (functions, points)
    ops: Tensor     # (functions, choices so far): the operation at each choice point
    length: Tensor  # (functions,)
    score: Tensor   # (functions,)

    def at(self, index: Union[Tensor, np.ndarray]) -> 'Functions':
        return Functions(*(field[index] for field in self))


def keys(f: Tensor, scale: bool = False, shift: bool = False) -> np.ndarray:
    """(functions,) a number that equal rows of f share: equal to 1e-6, up to output scale, or up to shift."""
    f = f - f.mean(1, keepdim=True) if shift else f
    size, step = f.abs().amax(1).clamp(min=1e-6), 1.0471e-6  # subtle: no round number lies between two steps
    weights = torch.randint(2 ** 25, f.shape[1:], generator=torch.Generator().manual_seed(0)).double()
    key = (f / size[:, None] / step).round() @ weights  # whole numbers below 2^53: exact
    return (key.abs() if scale else key + (size.log() / step).round() * weights[0]).numpy()


def best(parts: Iterable[Functions], keep: int = 10 ** 9, **equal: bool) -> Functions:
    """The `keep` best of each length, by length and score. Of equal ones the shortest."""
    found = Functions(*map(torch.cat, zip(*parts)))
    order = np.lexsort((found.score, found.length))
    order = order[np.sort(np.unique(keys(found.values, **equal)[order], return_index=True)[1])]
    length = found.length[order].numpy()
    return found.at(order[np.arange(len(order)) - np.searchsorted(length, length) < keep])


class Space:
    """All functions of a cell shape and a set of operations, scalars at their initial values.

    x: (points,) float64. whole: all are looked at. The shape 'deep' has too many: the best of each length are
    found among its functions of two stages, and only these are joined once more.
    """

    def __init__(self, ops: str = 'base', clip: Optional[float] = CLIP, shape: str = 'paper',
                 points: int = 97, limit: float = 5.0):
        (self.unary, self.binary), self.clip, self.shape = select(ops), clip, shape
        self.kinds = [self.unary if choice[0] == 'U' else self.binary for choice, *_ in SHAPES[shape]]
        self.whole = self.kinds.count(self.binary) < 3
        self.x = torch.linspace(-limit, limit, points, dtype=torch.float64)
        self.input = Functions(self.x[None], torch.zeros(1, 0).long(), torch.ones(1).long(), torch.zeros(1))
        self.first = self.rows = best(self.made(self.unary, self.input))  # U(x)
        if len(self.kinds) > 3:  # U(B(U(x), U(x)))
            self.rows = best(self.made(self.unary, best(self.made(self.binary, self.first))))

    def made(self, ops: Sequence[Op], f: Functions, score: Optional[Callable] = None) -> Iterator[Functions]:
        """U(f) for each unary, or B(f, U(x)) for each binary operation, in chunks."""
        u = self.first if ops is self.binary else self.input  # a unary operation does not look at it
        for pair in torch.arange(len(f.ops) * len(u.ops)).split(CHUNK):
            a, b = f.at(pair // len(u.ops)), u.at(pair % len(u.ops))
            for index, op in enumerate(ops):
                values = op(a.values, b.values, torch.tensor(op.scalar or 0.0), self.clip)
                spelling = torch.cat([a.ops, b.ops, torch.full((len(pair), 1), index)], 1)
                length = a.length * (op.name not in ('right', 'const'))
                length = length + b.length * (ops is self.binary and op.name != 'left')
                length = length + (op.name not in ('identity', 'left', 'right'))
                yield Functions(values, spelling, length, score(values) if score else length)

    def tree(self, ops: Iterable[int]) -> Tree:
        return cell_tree(self.shape, [kind[index] for kind, index in zip(self.kinds, ops)])

    def scan(self, score: Callable[[Tensor], Tensor], shift: bool, count: int) -> list[Match]:
        """The front, shortest first, then the best `count` others, each once up to output scale (and shift).

        score: (functions, points) -> (functions,).
        """
        for rows in [self.rows] if self.whole else [self.rows, None]:
            parts, limit = [], torch.full((100,), torch.inf)  # limit: the worst score that is kept, by length
            for part in self.made(self.binary, rows or best(self.made(self.unary, found)), score):
                parts.append(part.at(part.score < limit[part.length]))  # neither inf nor nan
                if len(parts) > 20:
                    parts = [best(parts, KEEP, scale=True, shift=shift)]
                    size = parts[0].length.bincount(minlength=100)
                    limit = torch.where(size < KEEP, torch.inf, parts[0].score[size.cumsum(0) - 1])
            found = best(parts, KEEP, scale=True, shift=shift)
        front, others = [], []
        for ops, length, value in zip(found.ops, found.length.tolist(), found.score.tolist()):
            better = not front or value < front[-1].score - 1e-6
            (front if better else others).append(Match(value, length, self.tree(ops), better))
        return front + sorted(others, key=lambda match: match.score)[:count]

    def nearest(self, curve: Union[Tensor, Callable[[Tensor], Tensor]], density: Optional[Tensor] = None,
                count: int = 20) -> list[Match]:
        """By RMS difference from the curve after the best output scale and shift, in its standard deviations.

        curve: a function or its values at x. density: of the inputs at x; None: N(0, 1). Raises ValueError.
        """
        density = torch.exp(-self.x.square() / 2) if density is None else density
        density = density.double() / density.sum()
        curve = (curve(self.x) if callable(curve) else curve).detach().double()
        curve = curve - density @ curve
        if not density @ curve.square() > 1e-18:
            raise ValueError('the curve is constant where its inputs lie, so every function draws it')

        def distance(f: Tensor) -> Tensor:
            f = f - (f @ density)[:, None]
            explained = (f @ (density * curve)).square() / (f.square() @ density) / (density @ curve.square())
            return (1 - explained).clamp(min=0).sqrt()
        return self.scan(distance, True, count)

    def steepest(self, gradient: Tensor, density: Tensor, early: Tensor, standard: Callable[[Tensor], Tensor],
                 trust: float = 0.8, count: int = 20) -> list[Match]:
        """By the change of the loss, to first order, when f replaces the standard at its second moment.

        gradient: sums of dL/df, density: of the inputs, early: of those of the first steps; (points,) at x.
        Only functions at a distance from the standard, sqrt(2 - 2 cos), between 0.1 and trust, that do not
        stand still at the start: 0.6 of the second moment is variance, a quarter of the inputs has a slope.
        """
        gradient, (density, early) = gradient.double(), (d.double() / d.sum() for d in (density, early))
        standard = standard(self.x).detach()
        power = density @ standard.square()

        def change(f: Tensor) -> Tensor:
            f = f * (power / (f.square() @ density)).sqrt()[:, None]
            far = (2 - 2 * (f @ (density * standard)) / power).clamp(min=0).sqrt()
            moves = (f @ early).square() < 0.4 * (f.square() @ early)
            alive = (f.diff(dim=1).abs() > 0.01 * (self.x[1] - self.x[0])).double() @ early[1:] > 0.25
            fine = (far > 0.1) & (far < trust) & moves & alive
            return torch.where(fine, (f - standard) @ gradient, torch.inf)
        return self.scan(change, False, count)

    def pool(self, values: Tensor, grid: Tensor) -> Tensor:
        """(..., points) values of a finer grid spread linearly onto x; what is outside goes to the ends."""
        away = (grid.double().clamp(self.x[0], self.x[-1])[:, None] - self.x).abs() / (self.x[1] - self.x[0])
        return values.double() @ (1 - away).clamp(min=0)

    def count(self, free: bool = False) -> int:
        """How many functions there are; free: up to output scale and shift."""
        found = (keys(part.values, free, free) for part in self.made(self.binary, self.rows))
        return len(np.unique(np.fromiter(chain.from_iterable(found), float)))

    def random_function(self, generator: torch.Generator) -> Tree:
        """No constant and no straight line: the control that a search has to beat.

        Each pair of distinct functions at the last join is equally likely; what several pairs make, likelier.
        """
        sizes = len(self.rows.ops), len(self.first.ops), *map(len, self.kinds[self.rows.ops.shape[1] + 1:])
        for _ in range(1000):
            i, j, *rest = (int(torch.randint(size, (1,), generator=generator)) for size in sizes)
            tree = self.tree([*self.rows.ops[i], *self.first.ops[j], *rest])
            again = {'left': j, 'right': i}.get(self.binary[rest[0]].name)  # left is the same for every j
            if not again and nonlinearity(lambda x: evaluate(tree, x, self.clip)) > 0.01:  # constant: nan
                return tree
        raise ValueError('these operations make nothing but constants and straight lines')

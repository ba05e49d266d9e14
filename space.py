"""All functions of a search space on one grid: which formula draws this curve?

Functions of one number are cheap to compare: 97 values say all there is to know. And there are few: the
22,667,121 spellings of the paper's cell are 3,956,560 functions. So nothing is searched for, all are looked at.
Three sums each, over f, f^2 and f * curve, give the distance from a curve, for thousands in one product.

A cell is a chain: U(x), joined to another U(x) by B, U of that, joined again. The functions of each stage are
kept, once each. Those of the last join are far more: they are made in chunks, scored and forgotten.
"""
from itertools import chain
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor

from activation import SHAPES, Tree, cell_tree, evaluate, nonlinearity
from ops import CLIP, Op, select


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
    """(functions,) a number that rows of f share when equal to 1e-6; or up to output scale, or up to shift."""
    f = f - f.mean(1, keepdim=True) if shift else f
    size, step = f.abs().amax(1).clamp(min=1e-6), 1.0471e-6  # subtle: no round number lies between two steps
    weights = torch.randint(2 ** 25, f.shape[1:], generator=torch.Generator().manual_seed(0)).double()
    key = (f / size[:, None] / step).round() @ weights  # whole numbers below 2^53: exact
    return (key.abs() if scale else key + (size.log() / step).round() * weights[0]).numpy()


def best(parts: Iterable[Functions], keep: int = 10 ** 9, **equal: bool) -> Functions:
    """The `keep` best of each length, in this order. The shortest of equal ones, see `keys`; none that overflows."""
    found = Functions(*map(torch.cat, zip(*parts)))
    found = found.at(found.values.isfinite().all(1))
    order = np.lexsort((found.score, found.length))
    order = order[np.sort(np.unique(keys(found.values, **equal)[order], return_index=True)[1])]
    length = found.length[order].numpy()
    return found.at(order[np.arange(len(order)) - np.searchsorted(length, length) < keep])


class Space:
    """All functions of a cell shape and a set of operations, scalars at their initial values.

    x: (points,) float64. whole: all are looked at. The shape 'deep' has too many: the best of each length of its
    functions of two stages are found first, and only these are joined once more.
    """

    def __init__(self, ops: str = 'base', clip: Optional[float] = CLIP, shape: str = 'paper', points: int = 97,
                 limit: float = 5.0):
        (self.unary, self.binary), self.clip, self.shape = select(ops), clip, shape
        self.kinds = [self.unary if choice[0] == 'U' else self.binary for choice, *_ in SHAPES[shape]]
        self.whole = self.kinds.count(self.binary) < 3
        self.x = torch.linspace(-limit, limit, points, dtype=torch.float64)
        self.input = Functions(self.x[None], torch.zeros(1, 0).long(), torch.ones(1).long(), torch.zeros(1))
        self.first = self.rows = best(self.made(self.unary, self.input))  # U(x)
        if len(self.kinds) > 3:  # U(B(U(x), U(x)))
            self.rows = best(self.made(self.unary, best(self.made(self.binary, self.first))))

    def made(self, ops: Sequence[Op], f: Functions, score: Optional[Callable] = None) -> Iterator[Functions]:
        """U(f) for each unary, or B(f, U(x)) for each binary operation, in chunks of 3 MB."""
        u = self.first if ops is self.binary else self.input  # a unary operation does not look at it
        for pair in torch.arange(len(f.ops) * len(u.ops)).split(4096):
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

    def scan(self, score: Callable[[Tensor], Tensor], shift: bool, count: int, keep: int = 200) -> list[Match]:
        """The front, shortest first, then the best `count` others. Equal up to scale (shift: and shift) is equal.

        score: (functions, points) -> (functions,). Of each length the best `keep` are kept on the way.
        """
        for rows in [self.rows] if self.whole else [self.rows, None]:
            parts, limit = [], torch.full((100,), torch.inf)  # by length: the worst score that is kept
            for part in self.made(self.binary, rows or best(self.made(self.unary, found)), score):
                parts.append(part.at(part.score < limit[part.length]))  # neither inf nor nan
                if len(parts) > 20:
                    parts = [best(parts, keep, scale=True, shift=shift)]
                    size = parts[0].length.bincount(minlength=100)
                    limit = torch.where(size < keep, torch.inf, parts[0].score[size.cumsum(0) - 1])
            found = best(parts, keep, scale=True, shift=shift)
        front, others = [], []
        for ops, length, value in zip(found.ops, found.length.tolist(), found.score.tolist()):
            better = not front or value < front[-1].score - 1e-6  # less is rounding
            (front if better else others).append(Match(value, length, self.tree(ops), better))
        return front + sorted(others, key=lambda match: match.score)[:count]

    @torch.no_grad()
    def nearest(self, curve: Union[Tensor, Callable[[Tensor], Tensor]], density: Optional[Tensor] = None,
                count: int = 20) -> list[Match]:
        """By RMS difference from the curve after the best output scale and shift, in its standard deviations.

        curve: a function, or its values at x. density: of the inputs, at x; None: N(0, 1). Raises ValueError.
        """
        p = torch.softmax(-self.x.square() / 2, 0) if density is None else density.double() / density.sum()
        curve = (curve(self.x) if callable(curve) else curve).double()
        curve = curve - p @ curve
        if not p @ curve.square() > 1e-18:
            raise ValueError('the curve is constant where its inputs lie, so every function draws it')

        def distance(f: Tensor) -> Tensor:
            f = f - (f @ p)[:, None]
            explained = (f @ (p * curve)).square() / (f.square() @ p) / (p @ curve.square())
            return (1 - explained).clamp(min=0).sqrt()
        return self.scan(distance, True, count)

    @torch.no_grad()
    def steepest(self, gradient: Tensor, density: Tensor, standard: Callable[[Tensor], Tensor],
                 trust: float = 0.6, count: int = 20) -> list[Match]:
        """By the change of the loss, to first order, when f replaces the standard at its second moment.

        gradient: sum of dL/df at x, density: of the inputs, see `pool`. Only functions whose relative distance
        from the standard, sqrt(2 - 2 cos), is between 0.05 and trust.
        """
        p, s, gradient = density.double() / density.sum(), standard(self.x), gradient.double()

        def change(f: Tensor) -> Tensor:
            f = f * ((p @ s.square()) / (f.square() @ p)).sqrt()[:, None]
            far = (2 - 2 * (f @ (p * s)) / (p @ s.square())).clamp(min=0).sqrt()
            return torch.where((far > 0.05) & (far < trust), (f - s) @ gradient, torch.inf)
        return self.scan(change, False, count)

    def pool(self, values: Tensor, grid: Tensor) -> Tensor:
        """(points,) values of a finer grid spread linearly onto x. The sum stays, the ends take what is outside."""
        away = (grid.double().clamp(self.x[0], self.x[-1])[:, None] - self.x).abs() / (self.x[1] - self.x[0])
        return values.double() @ (1 - away).clamp(min=0)

    def count(self, free: bool = False) -> int:
        """How many functions there are; free: up to output scale and shift. Takes a minute."""
        found = (keys(part.values, free, free) for part in self.made(self.binary, self.rows))
        return len(np.unique(np.fromiter(chain.from_iterable(found), float)))

    def random_function(self, generator: torch.Generator) -> Tree:
        """No constant and no straight line: the control that a search has to beat. Each pair of distinct functions
        at the last join is equally likely, so that a function that several pairs make is likelier."""
        sizes = len(self.rows.ops), len(self.first.ops), *map(len, self.kinds[self.rows.ops.shape[1] + 1:])
        for _ in range(1000):
            i, j, *rest = (int(torch.randint(size, (1,), generator=generator)) for size in sizes)
            tree = self.tree([*self.rows.ops[i], *self.first.ops[j], *rest])
            again = {'left': j, 'right': i}.get(self.binary[rest[0]].name)  # left is the same for all j
            if not again and nonlinearity(lambda x: evaluate(tree, x, self.clip)) > 0.01:  # nan for a constant
                return tree
        raise ValueError('these operations make nothing but constants and straight lines')

"""All functions of a search space on one grid: which formula draws this curve?

Functions of one number are cheap to compare: 97 values say all there is to know. And there are few: the
22,667,121 spellings of the paper's cell are 3,956,560 functions. So nothing is searched for, all are seen.

A cell is a chain: U(x), joined to another U(x) by B, U of that, joined again. The functions of each stage
are kept, once each. Those of the last join are far more: they are made in chunks, scored and forgotten.
"""
from typing import Callable, Iterable, Iterator, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from activation import SHAPES, Activation, Tree, cell_tree
from ops import CLIP, Op, select

CHUNK, KEEP = 4096, 200  # functions made at a time, 3 MB; functions of each length that a scan keeps
COUNTS = {'left': (1, 0, 0), 'right': (0, 1, 0), 'identity': (1, 0, 0), 'const': (0, 0, 1)}  # see `made`

class Match(NamedTuple):
    score: float  # lower is better
    length: int
    tree: Tree

class Functions(NamedTuple):
    values: Tensor  # (functions, points)
    ops: Tensor     # (functions, choices so far): the operation at each choice point
    length: Tensor  # (functions,)
    score: Tensor   # (functions,)

    def at(self, index: Tensor | np.ndarray) -> 'Functions':
        return Functions(*(field[index] for field in self))

def keys(f: Tensor, scale: bool = False, shift: bool = False) -> np.ndarray:
    """(functions,) a number that equal rows of f share: equal to 1e-6, up to output scale, or up to shift."""
    f = f - f.mean(1, keepdim=True) * shift
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

def front(matches: Iterable[Match]) -> list[Match]:
    """Those that are better than all shorter ones, the shortest first."""
    found = []
    for match in sorted(matches, key=lambda match: (match.length, match.score)):
        found += [match] if not found or match.score < found[-1].score - 1e-6 else []
    return found

class Space:
    """All functions of a cell shape and a set of operations, scalars at their initial values. x: (points,).
    The shape 'deep' has too many: one more function is joined to the best of each length of two stages."""
    def __init__(self, ops: str = 'base', clip: Optional[float] = CLIP, shape: str = 'paper'):
        (self.unary, self.binary), self.clip, self.shape = select(ops), clip, shape
        self.kinds = [self.unary if choice[0] == 'U' else self.binary for choice, *_ in SHAPES[shape]]
        self.x = torch.linspace(-5, 5, 97, dtype=torch.float64)
        self.input = Functions(self.x[None], torch.zeros(1, 0).long(), torch.ones(1).long(), torch.zeros(1))
        self.first = self.rows = best(self.made(self.unary, self.input))  # U(x)
        if shape != 'core':                                               # U(B(U(x), U(x)))
            self.rows = best(self.made(self.unary, best(self.made(self.binary, self.first))))

    def made(self, ops: Sequence[Op], f: Functions, score: Optional[Callable] = None) -> Iterator[Functions]:
        """U(f) for each unary, or B(f, U(x)) for each binary operation, in chunks."""
        u = self.first if ops is self.binary else self.input  # a unary operation does not look at it
        for pair in torch.arange(len(f.ops) * len(u.ops)).split(CHUNK):
            a, b = f.at(pair // len(u.ops)), u.at(pair % len(u.ops))
            for k, op in enumerate(ops):
                values = op(a.values, b.values, torch.tensor(op.scalar or 0.0), self.clip)
                of_a, of_b, own = COUNTS.get(op.name, (1, ops is self.binary, 1))
                length = of_a * a.length + of_b * b.length + own
                spelling = torch.cat([a.ops, b.ops, torch.full((len(pair), 1), k)], 1)
                yield Functions(values, spelling, length, score(values) if score else length)

    def tree(self, ops: Iterable[int]) -> Tree:
        return cell_tree(self.shape, [kind[index] for kind, index in zip(self.kinds, ops)])

    def scan(self, score: Callable[[Tensor], Tensor], shift: bool) -> list[Match]:
        """The best of each length, each once up to output scale (and shift).
        score: (functions, points) -> (functions,); inf or nan for what is left out."""
        for stage in range(2 if self.shape == 'deep' else 1):
            rows = best(self.made(self.unary, found)) if stage else self.rows
            parts, limit = [], torch.full((100,), torch.inf)  # limit: the worst score that is kept, by length
            for part in self.made(self.binary, rows, score):
                parts.append(part.at(part.score < limit[part.length]))
                if len(parts) > 20 and any(len(part.ops) for part in parts):
                    parts = [best(parts, KEEP, scale=True, shift=shift)]
                    size = parts[0].length.bincount(minlength=100)
                    limit = torch.where(size < KEEP, torch.inf, parts[0].score[size.cumsum(0) - 1])
            found = best(parts, KEEP, scale=True, shift=shift)
        return [Match(score, length, self.tree(ops)) for score, length, ops
                in zip(found.score.tolist(), found.length.tolist(), found.ops)]

    def nearest(self, curve: Tensor | Callable, density: Optional[Tensor] = None,
                count: int = 20) -> tuple[list[Match], list[Match]]:
        """The front, scalars fitted, and the best `count`, by RMS difference from the curve after the best
        output scale and shift, in standard deviations of the curve. curve: a function or its values at x.
        density: of the inputs at x; None: N(0, 1). Raises ValueError for a constant."""
        density = torch.exp(-self.x.square() / 2) if density is None else density
        density = density.double() / density.sum()
        curve = (curve(self.x) if callable(curve) else curve).detach().double()
        curve = curve - density @ curve
        if not density @ curve.square() > 1e-18:
            raise ValueError('the curve is constant where its inputs lie; take one that bends there')
        def unexplained(f: Tensor) -> Tensor:  # (functions,) share of the curve's variance
            f = f - (f @ density)[:, None]
            explained = (f @ (density * curve)).square() / (f.square() @ density) / (density @ curve.square())
            return (1 - explained).clamp(min=0)
        def fitted(match: Match) -> Match:
            f = Activation(match.tree, self.clip).double()
            if f.scalars:
                descent = torch.optim.LBFGS(f.parameters(), line_search_fn='strong_wolfe')
                def loss() -> Tensor:
                    descent.zero_grad()
                    value = unexplained(f(self.x)[None]).sum()
                    value.backward()
                    return value
                descent.step(loss)
            score = unexplained(f(self.x)[None]).sqrt().item()
            return match._replace(score=score, tree=f.valued) if score < match.score else match
        found = self.scan(lambda f: unexplained(f).sqrt(), shift=True)
        return front(map(fitted, front(found))), sorted(found, key=lambda match: match.score)[:count]

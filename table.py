"""The table: a function of one number, known by its values on a grid, looked up millions of times.

The idea that makes the search fast (ours): whatever its 110 operations do, the relaxed cell is a function of ONE number. So
it is evaluated op by op only on a grid of a few thousand points, and the millions of activations of the network are
looked up there, piecewise linear in between. `Lookup` does that, and its gradient, to x and to the values.
"""
import math
from typing import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

POINTS, LIMIT = 8193, 12.0
# 8,192 steps of 3/1024. Of 1,000 random cells 99.6 % keep |table - op by op| <= 1e-3 at every x in [-12, 12] that is
# more than a step from a kink or jump; with 4,097 points 94 %, with 6,145 95 % (sqrt alone misses it), with 24,577
# 99.9 %. More would make drawing, whose cost is proportional, dearer. An odd number puts a grid point on 0, where most kinks
# are: ReLU and its like are exact. A step that is a short binary number leaves no rounding in the grid.

CHUNK = 1 << 18  # elements that a CPU looks up at a time: what stands between two operations stays in its cache
SCRATCH: dict[torch.device, Tensor] = {}  # fresh memory costs more than all the arithmetic of a lookup


def uniform_grid(points: int, limit: float) -> Tensor:
    """(points,) from -limit to limit, symmetric; 0 is among them when their number is odd."""
    return (torch.arange(points) - (points - 1) / 2) * (2 * limit / (points - 1))


def dense(x: Tensor) -> Tensor:
    """x itself where it fills its memory, contiguous or channels_last; else a contiguous copy."""
    whole = x.is_contiguous() or x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if whole else x.contiguous()


def in_memory_order(x: Tensor) -> Tensor:
    """(numel,) view of a dense tensor as it lies in memory; for channels_last, flatten() would copy."""
    return x.as_strided((x.numel(),), (1,))


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Dense tensors of one layout, flat, piece by piece; on a GPU in one piece."""
    size = CHUNK if tensors[0].device.type == 'cpu' else max(tensors[0].numel(), 1)
    return zip(*(in_memory_order(x).split(size) for x in tensors))


def as_rows(index: Tensor) -> Tensor:
    """(n,) int16 -> (up to 16, the rest) int64, in memory that the next call uses again. In rows because gather and
    scatter run in parallel along those."""
    if index.device not in SCRATCH or SCRATCH[index.device].numel() < index.numel():
        SCRATCH[index.device] = torch.empty(index.numel(), dtype=torch.int64, device=index.device)
    return SCRATCH[index.device][:index.numel()].copy_(index).view(math.gcd(index.numel(), 16), -1)


class Lookup(torch.autograd.Function):
    """y = f(x) for a function f known by its values on a uniform grid: linear in between, extrapolated at the ends.

    x: any shape. values (points,) on the grid from -limit to limit. lines (points - 1, 2): intercept and slope of each
    interval, see `lines`. Gradient to x: the slope. Gradient to the values: a histogram of the incoming gradient over
    the intervals, half of it to either end. Exact for x in the middle of an interval, else off by half a step of x in
    the function that it weighs, with either sign: nothing, in a sum over thousands; and x need not be kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, lines: Tensor, limit: float) -> Tensor:
        x = dense(x)
        y, index = torch.empty_like(x), torch.empty_like(x, dtype=torch.int16)  # 2 bytes an element to keep
        scale, last = len(lines) / (2 * limit), len(lines) - 1
        middle = torch.tensor(len(lines) / 2, dtype=x.dtype)
        for x_, y_, i_ in chunks(x, y, index):
            # A NaN may become any index; the result is NaN all the same, by x below.
            i_.copy_(torch.add(middle, x_, alpha=scale, out=y_).clamp_(0, last)).clamp_(min=0)
            i = as_rows(i_)
            if lines.dtype == torch.float32 and x.device.type == 'cpu':
                # One gather fetches intercept and slope: as 8 bytes they are one int64. It may overwrite its own index.
                # On a CPU twice as fast as the plain way below.
                torch.gather(lines.view(torch.int64).view(1, -1).expand(len(i), -1), 1, i, out=i)
                line = i.view(-1).view(torch.float32).view(-1, 2)
            else:
                line = lines[i.view(-1)]
            torch.addcmul(line[:, 0], line[:, 1], x_, out=y_)
        ctx.save_for_backward(index, lines)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        index, lines = ctx.saved_tensors
        if g.stride() != index.stride():
            g = torch.empty_like(index, dtype=g.dtype).copy_(g)
        dx, slope = torch.empty_like(g), lines[:, 1].contiguous()
        to_x, to_values = ctx.needs_input_grad[:2]  # no x at the first site of a network whose weights are frozen
        sums = torch.zeros(16 if to_values else 0, len(lines), dtype=g.dtype, device=g.device)
        for g_, dx_, i_ in chunks(g, dx, index):
            i = as_rows(i_)
            if to_values:
                sums[:len(i)].scatter_add_(1, i, g_.view(i.shape))
            if to_x:
                torch.gather(slope.expand(len(i), -1), 1, i, out=dx_.view(i.shape))
                dx_.mul_(g_)
        half = sums.sum(0) / 2
        return dx if to_x else None, F.pad(half, (0, 1)) + F.pad(half, (1, 0)) if to_values else None, None, None


@torch.no_grad()
def lines(values: Tensor, grid: Tensor) -> Tensor:
    """(..., points) values of functions on the grid -> (..., points - 1, 2): y = intercept + slope * x by interval."""
    # subtle: the step is not grid[1] - grid[0], whose last digits are rounding
    slope = values.diff() * ((len(grid) - 1) / (grid[-1] - grid[0]))
    return torch.stack([values[..., :-1] - slope * grid[:-1], slope], -1)


class Tabulated(nn.Module):
    """An activation through a table: what `evaluate.py --table` trains. Its scalars learn as usual, through the table.

    For functions that are expensive op by op; activation: any function of one number, exact to about step^2 / 8 times
    its curvature, and 2 bytes an element are kept for the backward pass.
    """

    def __init__(self, activation: nn.Module, points: int = POINTS, limit: float = LIMIT):
        super().__init__()
        self.activation, self.limit = activation, limit
        self.register_buffer('grid', uniform_grid(points, limit), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        values = self.activation(self.grid)
        return Lookup.apply(x.to(values.dtype), values, lines(values, self.grid), self.limit).to(x.dtype)

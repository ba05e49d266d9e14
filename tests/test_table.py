"""The lookup table: values and gradients against interpolation written out, against op by op, at kinks, memory let go."""
import gc
import weakref

import pytest
import torch
import torch.nn as nn

from activation import Activation, named
from cell import Cell, random_expression
from table import LIMIT, POINTS, Lookup, Tabulated, lines, uniform_grid


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed', 'expanded', 'scalar', 'empty', 'odd'])
def test_lookup_is_linear_interpolation(layout):
    """Values and the gradient to x, for every memory layout, against numpy-like interpolation written out."""
    torch.manual_seed(0)
    x = {'contiguous': torch.randn(4, 6), 'channels_last': torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
         'transposed': torch.randn(6, 4).t(), 'expanded': torch.randn(5, 1).expand(5, 3), 'scalar': torch.randn(()),
         'empty': torch.randn(0, 3), 'odd': 20 * torch.randn(7)}[layout]
    x = x.clone(memory_format=torch.preserve_format).requires_grad_() if layout != 'expanded' else x.requires_grad_()
    grid = torch.linspace(-3, 3, 13)
    values = torch.randn(13)
    y = Lookup.apply(x, values, lines(values, grid), 3.0)
    left = ((x.detach() + 3) / 0.5).floor().clamp(0, 11).long()
    slope = (values[left + 1] - values[left]) / 0.5
    assert torch.allclose(y, values[left] + slope * (x - grid[left]), atol=1e-4)
    g = torch.randn(y.shape)
    assert torch.allclose(torch.autograd.grad(y, x, g)[0], slope * g, atol=1e-5)


def test_lookup_gradcheck():
    """Float64 finite differences: to x anywhere between grid points, to the values at the middle of intervals."""
    torch.manual_seed(0)
    grid = torch.linspace(-2, 2, 9, dtype=torch.float64)
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-2.3, -1.1, 0.2, 0.9, 2.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Lookup.apply(x, values.detach(), lines(values, grid), 2.0), x)
    middle = torch.tensor([-1.75, -0.25, -0.25, 0.75, 1.75], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: Lookup.apply(middle, v, lines(v, grid), 2.0), values)


def test_lookup_keeps_nan_and_half_precision():
    """A NaN input stays a NaN, and is not an index; half precision comes back as half precision."""
    f = Tabulated(named('silu'))
    y = f(torch.tensor([float('nan'), 1.0, 1e30]))
    assert y[0].isnan() and torch.allclose(y[1], torch.tensor(0.731059), atol=1e-4) and y[2].isfinite()
    assert f(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def branches(f: Activation, x: torch.Tensor) -> torch.Tensor:
    """(len(x) - 1,) whether a kink or jump of f lies between neighbours of x, because inside f an operation goes over to
    another branch: the sign of an input of relu and its like, the larger input of max, whether a clip is active."""
    found = torch.zeros(len(x) - 1, dtype=torch.bool)

    def value(tree) -> torch.Tensor:
        if tree == 'x':
            return x
        inputs = [value(node) for node in tree.inputs] or [x]
        scalar = None if tree.scalar is None else f.scalars[tree.scalar]
        y = tree.op(*inputs, scalar=scalar, clip=None)
        states = []
        if tree.op.name in ('abs', 'relu', 'min0', 'elu', 'leaky_relu', 'sqrt'):
            states.append(inputs[0] > 0)
        elif tree.op.name in ('max', 'min'):
            states.append(inputs[0] > inputs[1])
        elif tree.op.clips:
            states += [y > f.clip, y < -f.clip]
            y = y.clamp(-f.clip, f.clip)
        for state in states:
            found.logical_or_(state[1:] != state[:-1])
        return y
    with torch.no_grad():
        value(f.tree)
    return found


@pytest.mark.parametrize('cells', [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_table_against_op_by_op_on_random_cells(cells):
    """Float32 tables against float64 mathematics: |table - op by op| <= 1e-3 at every x in [-12, 12] that is more than
    a grid step from a kink or jump, for 98 % of random cells (of 1,000, 99.6 %).

    The rest bend faster than the grid can follow, x^27 on its way to the clip for one; theirs holds for 99 % of x.
    """
    draw = torch.Generator().manual_seed(0)
    fine = 8  # inputs to a grid step
    x = (torch.arange((POINTS - 1) * fine) + 0.37) / ((POINTS - 1) * fine) * 2 * LIMIT - LIMIT
    close = 0
    for _ in range(cells):
        f = Activation(random_expression(draw))
        with torch.no_grad():
            by_table = Tabulated(f)(x)
        kinks = branches(f.double(), x.double())
        near = nn.functional.max_pool1d(kinks.float()[None], 2 * fine + 4, 1, fine + 2)[0, :len(x)] > 0
        with torch.no_grad():
            error = (by_table - f(x.double())).abs()[~near]
        assert (error <= 1e-3).double().mean() >= 0.99 or not len(error), f.expression
        close += bool((error <= 1e-3).all())
    assert close >= 0.98 * cells


@pytest.mark.parametrize('expression', ['relu(x)', 'abs(x)', 'leaky_relu(x)', 'min0(x)', 'max(x, scale(x, 0.25))', 'x'])
def test_kinks_at_zero_are_exact(expression):
    """0 is a grid point, so that a function with its only kink there is its own table, values and slopes, also next to
    0 and far beyond the grid."""
    f = Activation(expression)
    x = torch.tensor([-1e4, -13.0, -12.0, -3.3, -1e-3, -2e-6, 2e-6, 1e-3, 3.3, 12.0, 13.0, 1e4], requires_grad=True)
    y, expected = Tabulated(f)(x), f(x)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-9)  # float32 values, a step apart, give a slope to 5 digits
    assert torch.allclose(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('points', [64, 4096, POINTS, 32768])
def test_index_of_every_interval(points):
    """The middle of each interval finds its own line, and so does anything beyond the ends: no overflow of the 16 bits,
    no rounding into the neighbour, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        grid = uniform_grid(points, LIMIT).to(dtype)
        line = torch.stack([torch.arange(points - 1), torch.zeros(points - 1)], 1).to(dtype)  # y: the interval's number
        middle = (grid[1:] + grid[:-1]) / 2
        x = torch.cat([torch.tensor([-1e30, -LIMIT - 1]), middle, torch.tensor([LIMIT, 1e30])]).to(dtype)
        y = Lookup.apply(x, grid, line, LIMIT)
        assert torch.equal(y[2:-2], line[:, 0]) and y[:2].eq(0).all() and y[-2:].eq(points - 2).all()


def test_chunks_change_nothing(monkeypatch):
    """A CPU looks up piece by piece; the last piece is smaller and of an odd number of elements."""
    torch.manual_seed(0)
    grid = uniform_grid(65, LIMIT)
    x, values = torch.randn(7, 11, 3, requires_grad=True), torch.randn(65, requires_grad=True)
    g = torch.randn(7, 11, 3)
    results = []
    for chunk in (1 << 20, 50):
        monkeypatch.setattr('table.CHUNK', chunk)
        y = Lookup.apply(x, values, lines(values, grid), LIMIT)
        results.append((y, *torch.autograd.grad(y, (x, values), g)))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


@pytest.mark.parametrize('make', [lambda: Activation('mul(sigmoid(x), x)'), lambda: Tabulated(named('gelu')),
                                  lambda: Cell(points=65).site()])
def test_inputs_are_let_go(make):
    """Nothing but autograd may hold on to an activation's input: reference cycles here once cost half of the memory of a
    training step, until the garbage collector came by."""
    f = make()
    gc.disable()
    try:
        x = torch.randn(8)
        alive = weakref.ref(x)
        with torch.no_grad():
            f(x)
        del x
        assert alive() is None
    finally:
        gc.enable()

"""The cell and its table against the op-by-op reference, numpy, finite differences and numbers by hand."""
import io
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from activation import Activation, named, parse, write
from cell import BINS, LIMIT, SAMPLERS, Cell, Lookup, blame, lines

SMOOTH = 'base,-abs,-sqrt,-relu,-min0,-elu,-leaky_relu,-max,-min,-square,-cube,-exp,-sinh,-mul'  # no kink

def random_cell(seed: int = 0, sites: int = 1, **options) -> tuple[Cell, nn.ModuleList]:
    """A cell with alphas ~ N(0, 1) and scalars off their first values, and its sites."""
    torch.manual_seed(seed)
    cell = Cell(**{'sampler': 'mean', **options})
    cell.reset(1.0)
    for scalars in cell.scalars:
        scalars.data += 0.3 * torch.randn_like(scalars)
    return cell, nn.ModuleList(cell.site() for _ in range(sites))

def shrunk(seed: int, shape: str = 'paper') -> Cell:
    cell, _ = random_cell(seed, shape=shape)
    while cell.operations() > len(cell.choices):
        cell.drop()
    return cell

LAYOUTS = {
    'contiguous': lambda x: x, 'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(1, 3), 'gaps': lambda x: x[:, ::2, :, 1:], 'empty': lambda x: x[:0],
    'expanded': lambda x: x[:1].expand(5, -1, -1, -1), 'scalar': lambda x: x[0, 0, 0, 0]}

@pytest.mark.parametrize('piece', [1 << 18, 50])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_lookup_is_linear_interpolation(layout, piece, monkeypatch):
    """Values, gradients to x and to the values against numpy, in every layout, which stays, and in pieces.
    Two bytes an input are kept, and code behind the activation may work in place."""
    monkeypatch.setattr('cell.PIECE', piece)
    torch.manual_seed(0)
    x = LAYOUTS[layout](2 * torch.randn(4, 6, 2, 3)).requires_grad_()
    values = torch.randn(13, requires_grad=True)
    y, at, v = Lookup.apply(values, lines(values, 3.0), 3.0, x), x.detach().numpy(), values.detach().numpy()
    left = np.floor((at + 3) / 0.5).clip(0, 11).astype(int)
    slope = np.diff(v)[left] / 0.5
    assert np.allclose(y.detach(), v[left] + slope * (at + 3 - 0.5 * left), atol=1e-5)
    assert y.stride() == x.stride() or layout in ('gaps', 'expanded')
    g = torch.randn(y.shape[::-1]).permute(tuple(range(y.dim()))[::-1])  # in another layout than y
    assert [t.dtype for t in y.grad_fn.saved_tensors] == [torch.int16, torch.complex64]
    to_x, to_values = torch.autograd.grad(y.mul_(2.0), (x, values), g / 2)
    halves = np.bincount(left.ravel(), g.numpy().ravel() / 2, 12)
    assert np.allclose(to_x, slope * g.numpy(), atol=1e-5)
    assert np.allclose(to_values, np.append(halves, 0) + np.append(0, halves), atol=1e-5)

def by_table(f, x):
    """One function looked up as the sites of a cell do it."""
    cell = Cell()
    site = cell.site(f)
    cell.tabulate(standard=True)
    return site.eval()(x)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_strange_numbers(dtype):
    """The dtype of x comes back, rounded once from float32; NaN stays NaN; the last line goes on; and a kink
    at 0, which is a grid point, is exact."""
    x = torch.tensor([math.nan, 1.0, -2.5, 0.1, 1e4, -1e4, math.inf], dtype=dtype, requires_grad=True)
    y, rtol = by_table(named('gelu'), x), max(1e-4, torch.finfo(dtype).eps)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == dtype and x.grad[1:].isfinite().all()
    assert y[0].isnan() and y[-1] == math.inf
    assert torch.allclose(y[1:-1], F.gelu(x[1:-1].float()).to(dtype), rtol=rtol, atol=1e-5)
    x = torch.tensor([-1e4, -1e-3, -2e-6, 2e-6, 1e-3, 1e4], dtype=dtype)
    assert torch.allclose(by_table(named('leaky_relu'), x), F.leaky_relu(x), rtol=rtol, atol=1e-9)

@pytest.mark.parametrize('seed', range(40))
def test_table_against_op_by_op(seed):
    """Float32 tables, float64 mathematics, random cells: within 1e-3 at 99 % of the inputs in [-12, 12]."""
    f, x = Activation(shrunk(seed).tree()), torch.rand(20_000) * 24 - 12
    with torch.no_grad():
        error = (by_table(f, x) - f.double()(x.double())).abs()
    assert (error <= 1e-3).double().mean() >= 0.99 and error.median() < 2e-5, f.expression

def test_cell_by_hand():
    """Two unary and two binary operations, every weight 1/2, x = 2."""
    cell = Cell('identity,square,add,mul', sampler='mean')
    cell.reset(0.0)
    # U0 = U1 = (2 + 4) / 2 = 3, B0 = (3 + 3 + 3 * 3) / 2 = 7.5, U2 = (7.5 + clip(56.25)) / 2 = 8.75, U3 = 3,
    # B1 = (8.75 + 3 + clip(26.25)) / 2 = 10.875
    assert cell.evaluate(torch.tensor([2.0]), cell.sample()).tolist() == [[10.875]]

@pytest.mark.parametrize('sampler', ['mean', 'softmax', 'dirichlet'])
@pytest.mark.parametrize('shape', ['core', 'paper', 'deep'])
def test_network_by_table_against_op_by_op(sampler, shape):
    """Loss, gradient of the weights, gradient of alphas and scalars: by tables and op by op, to 1e-3."""
    cell, sites = random_cell(sampler=sampler, ops=SMOOTH, shape=shape, sites=2)
    model = nn.ModuleList([nn.Linear(8, 64), nn.Linear(64, 64)]).double()
    x, weights = torch.randn(256, 8, dtype=torch.float64), cell.double().sample()
    cell.tabulate(weights)
    rows = [[w[k % len(w), None] for w in weights] for k in range(2)]
    op_by_op = [lambda x, row=row: cell.evaluate(x.flatten(), row).view(x.shape) for row in rows]
    results = []
    for f, g in (sites, op_by_op):
        loss = g(model[1](f(model[0](x)))).sin().sum()
        parts = [torch.autograd.grad(loss, [*m.parameters()], retain_graph=True, materialize_grads=True)
                 for m in (model, cell)]
        results.append([loss, *(torch.cat([p.flatten() for p in part]) for part in parts)])
    assert all((table - exact).norm() <= 1e-3 * exact.norm() for table, exact in zip(*results))

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('shape', ['core', 'paper', 'deep'])
def test_one_operation_left_is_the_activation_of_its_tree(shape, seed):
    """The shrunk cell, its Activation and the parsed text of that are one function, scalars included."""
    cell, x = shrunk(seed, shape), torch.linspace(-6, 6, 501)
    with torch.no_grad():
        for f in (cell.curve, Activation(cell.tree()), Activation(parse(write(cell.tree())))):
            assert torch.equal(f(x), cell.evaluate(x, cell.sample())[0])
    cell.tabulate()
    assert cell.learns == (len(Activation(cell.tree()).scalars) > 0)

@pytest.mark.parametrize('sampler, different', [*zip(SAMPLERS, (6, 2, 1, 1))])
def test_weights(sampler, different):
    """Rows of what is active sum to 1; dirichlet draws for each site, shared once, mean and softmax never."""
    cell, _ = random_cell(sampler=sampler, sites=3)
    cell.drop()
    weights, again = cell.sample(), cell.sample()
    assert [w.shape for w in weights] == [(3 if sampler == 'dirichlet' else 1, len(a)) for a in cell.active]
    assert all(torch.allclose(w.sum(1), torch.ones(len(w))) and (w >= 0).all() for w in weights)
    assert len(torch.cat([weights[0], again[0]]).unique(dim=0)) == different

def test_moments_of_the_samplers():
    """Dirichlet with c = elu(alpha) + 1, at least 0.01, s = sum(c): mean c / s, variance
    c (s - c) / s^2 (s + 1); the gradient reaches alpha. The temperature sharpens softmax."""
    cell, _ = random_cell(sampler='dirichlet')
    cell.sites, alpha = 20_000, cell.alpha[0].detach().double().numpy()
    draws, c = cell.sample()[0], np.where(alpha > 0, alpha + 1, np.exp(np.minimum(alpha, 0)))
    assert np.allclose(draws.detach().mean(0), c / c.sum(), atol=3e-3)
    assert np.allclose(draws.detach().var(0), c * (c.sum() - c) / c.sum() ** 2 / (c.sum() + 1), rtol=0.12)
    assert torch.autograd.grad(draws[:, 0].sum(), cell.alpha[0])[0][0] > 0
    cell.alpha[0].data = torch.tensor([0.0] + 22 * [-50.0])
    assert cell.sample(noise=False)[0][0, 1].item() == pytest.approx(0.01 / 1.22)
    cell.sampler, cell.temperature = 'softmax', 0.5
    assert torch.allclose(cell.sample()[1][0], torch.softmax(2 * cell.alpha[1], 0))

@pytest.mark.parametrize('shape, unary, binary', [('core', 2, 1), ('paper', 4, 2), ('deep', 6, 3)])
def test_start(shape, unary, binary):
    """`start` weighs the standard activation and right, with softmax only, and only if the cell has both."""
    cell = Cell(sampler='softmax', standard='gelu', shape=shape)
    cell.reset(0.0, start=0.5)
    assert cell.operations() == 23 * unary + 9 * binary and write(cell.tree()) == 'gelu(x)'
    weights = cell.named_weights()
    assert weights[f'U{unary - 1}']['gelu'] == weights[f'B{binary - 1}']['right'] == 0.5
    for options in ({'standard': 'gelu'}, {'ops': 'identity,tanh,right', 'sampler': 'softmax'}):
        cell = Cell(**options, shape=shape)
        cell.reset(0.0, start=0.5)
        assert not any(alpha.any() for alpha in cell.alpha)
    with pytest.raises(ValueError, match='did you mean dirichlet'):
        Cell(sampler='dirichlett')

@pytest.mark.parametrize('shape, ops', [('core', 'base,periodic'), ('deep', 'base'), ('deep', 'relu,add')])
def test_drops(shape, ops):
    """Each drop takes the lowest alpha of a fullest choice point, until one operation a choice point is left.
    What was dropped weighs nothing: NaN there does not matter."""
    cell, _ = random_cell(ops=ops, shape=shape)
    while cell.operations() > len(cell.choices):
        before = [list(active) for active in cell.active]
        choice, name = cell.drop().split(':')
        k = cell.choices.index(choice)
        gone, = set(before[k]) - set(cell.active[k])
        assert len(before[k]) == max(map(len, before)) and cell.ops[k][gone].name == name
        assert cell.alpha[k][gone] == min(cell.alpha[k][j] for j in before[k])
        cell.alpha[k].data[gone] = cell.scalars[k].data[gone] = math.nan
        assert cell.curve(torch.ones(2)).isfinite().all()
    assert set(map(len, cell.active)) == {1}

@pytest.mark.parametrize('normalise', ['scale', 'centre'])
def test_normalised_tables_have_the_moments_of_each_standard(normalise):
    """Under a site's own inputs its output has the second moment (centre: variance, and mean 0) of its own
    standard activation, which may work in place; by numpy."""
    torch.manual_seed(0)
    cell = Cell(normalise=normalise, standard='gelu')
    sites = [cell.site(), cell.site(lambda x: F.hardswish(x, inplace=True))]
    for _ in range(100):
        inputs = [torch.randn(64, 512), 2 * torch.randn(64, 512) - 1]
        for site, x in zip(sites, inputs):
            site(x.clone())
    cell.tabulate()
    for site, x, standard in zip(sites, inputs, (F.gelu, F.hardswish)):
        y, usual = (f(x).detach().double().numpy() for f in (site, standard))
        if normalise == 'centre':
            assert abs(y.mean()) < 0.03 * y.std()
            usual = usual - usual.mean()
        assert np.isclose((y ** 2).mean(), (usual ** 2).mean(), rtol=0.04)

def test_histograms_match_the_inputs():
    """`seen` against numpy's histogram, with one channel in ten unlike the others; then numbers that are not
    finite, an empty tensor, half precision, one made by expand."""
    cell, (site,) = random_cell()
    other = torch.arange(512) % 10 == 3
    batches = torch.randn(100, 64, 512) * (1 + 0.5 * other) + 3 * other
    for x in batches:
        site(x)
    expected = np.histogram(batches.numpy(), BINS, (-LIMIT, LIMIT))[0] / batches.numel()
    assert np.abs((cell.seen[0].numpy() - expected).cumsum()).max() < 0.01
    strange = [torch.tensor([math.nan, math.inf]), torch.zeros(0, 3), torch.zeros((), dtype=torch.half)]
    for x in strange + 300 * [torch.ones(1, 1).expand(64, 10)]:
        assert site(x).shape == x.shape and cell.seen.sum().item() == pytest.approx(1, abs=2e-3)
    assert cell.seen[0].argmax() == int((1 + LIMIT) * BINS / (2 * LIMIT)) and cell.seen[0].max() > 0.99

@pytest.mark.parametrize('draw, training, gradient, seen', [
    (torch.no_grad()(Cell.tabulate), True, True, True), (Cell.use_standard, True, True, True),
    (Cell.use_standard, False, True, False), (Cell.use_standard, True, False, False),
    (Cell.tabulate, True, True, False)])
def test_inputs_are_observed_in_weight_steps_only(draw, training, gradient, seen):
    """Evaluation mode, no_grad and tables with a gradient (architecture steps) leave no trace."""
    cell, (site, _) = random_cell(sites=2)
    before = cell.seen.clone()
    draw(cell)
    with torch.set_grad_enabled(gradient):
        site.train(training)(torch.full((40, 3), 2.0))
    assert [not torch.equal(a, b) for a, b in zip(before, cell.seen)] == [seen, False]

def test_tables_of_the_standard_activations():
    """tabulate(standard=True): each site its own, also one that works in place; `values` has a gradient."""
    cell = Cell(standard='gelu')
    sites, grid = (cell.site(), cell.site(torch.tanh_)), cell.grid.clone()
    cell.tabulate(standard=True)
    for k, (site, f) in enumerate(zip(sites, (F.gelu, torch.tanh))):
        assert torch.allclose(site(grid), f(cell.grid), atol=1e-4) and torch.equal(cell.grid, grid)
        gradient, = torch.autograd.grad(site(grid)[7], cell.values)
        assert gradient[k].sum() == 1 and gradient[1 - k].count_nonzero() == 0

def test_the_free_curve():
    """It is added where it is set free, linear between its 97 points; its gradient is a hat around each."""
    cell, (site,) = random_cell()
    cell.free.data[48], x, y = 1.0, torch.tensor([0.0, 0.125, 0.25, 1.0]), []
    for cell.freed in (False, True):
        cell.tabulate()
        y.append(site(x))
    torch.testing.assert_close(y[1] - y[0], torch.tensor([1.0, 0.5, 0.0, 0.0]), atol=5e-3, rtol=0)
    gradient, = torch.autograd.grad(y[1][1], cell.free)
    torch.testing.assert_close(gradient[47:51], torch.tensor([0.0, 0.5, 0.5, 0.0]), atol=0.02, rtol=0)

def test_sites_hold_no_architecture_and_the_state_comes_back():
    """A network's parameters are its weights. Alphas, drops and histograms survive torch.save without pickled
    classes."""
    cell, sites = random_cell(sites=2)
    assert not list(sites.parameters()) and not sites.state_dict()
    sites[0](torch.randn(100))
    assert all(cell.drop() for _ in range(40))
    torch.save(cell.state_dict(), file := io.BytesIO())
    file.seek(0)
    other, _ = random_cell(1, sites=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.active == cell.active and torch.equal(other.seen, cell.seen) and other.tree() == cell.tree()
    assert cell.drop() == other.drop()

def test_blame():
    """The first site that is not finite is named, then the operation that is largest there, by hand; a scalar
    and a gradient that became NaN are named. Buffers, histograms, random state and hooks stay."""
    cell, sites = random_cell(ops='identity,exp,scale,add', clip=None, sites=2)
    cell.reset(0.0)
    first, last, norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
    first.weight.data, first.bias.data, last.weight.data = torch.eye(4), torch.zeros(4), torch.zeros(4, 4)
    model = nn.Sequential(first, sites[0], norm, nn.Dropout(), last, sites[1])
    x = torch.tensor([[-3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.no_grad()(cell.tabulate)()
    state = [t.clone() for t in (*model.state_dict().values(), cell.seen, torch.get_rng_state())]
    u = (2 + math.exp(2) + 2) / 3  # U0(2) = U1(2); B0 adds them up, then comes exp
    assert blame(model, cell, x) == {'site': 0, 'inputs': [-3.0, 2.0], 'op': 'U2:exp', 'gradient': None,
                                     'size': pytest.approx(math.exp(2 * u), rel=1e-4)}
    assert all(map(torch.equal, state, (*model.state_dict().values(), cell.seen, torch.get_rng_state())))
    last.bias.data[1] = math.nan
    cell.scalars[3].data.fill_(math.nan)
    norm.bias.grad = torch.tensor([0.0, math.inf, 0.0, 0.0])
    found = blame(model, cell, x)  # the tables are still finite
    assert [found[key] for key in ('site', 'op', 'size', 'gradient')] == [1, 'U2:scale', math.inf, '2.bias']
    cell.use_standard()
    assert blame(model, cell, x)['op'] == 'standard activation' and not sites[0]._forward_hooks

"""The cell and its table against the op-by-op reference, numpy, finite differences and numbers by hand."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from activation import Activation, parse, write
from cell import BINS, LIMIT, SAMPLERS, Cell, Lookup, blame, lines, uniform_grid

SMOOTH = 'base,-abs,-sqrt,-relu,-min0,-elu,-leaky_relu,-max,-min,-square,-cube,-exp,-sinh,-mul'  # no kink

def random_cell(seed: int = 0, sites: int = 1, **options) -> tuple[Cell, nn.ModuleList]:
    """A cell with alphas ~ N(0, 1) and scalars off their first values, and its sites."""
    torch.manual_seed(seed)
    cell = Cell(**{'sampler': 'mean', **options})
    cell.reset(1.0)
    for scalars in cell.scalars:
        scalars.data += 0.3 * torch.randn_like(scalars)
    return cell, nn.ModuleList(cell.site() for _ in range(sites))

@pytest.mark.parametrize('layout', [
    lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(1, 3),
    lambda x: x[:, ::2, :, 1:], lambda x: x[:1].expand(5, -1, -1, -1), lambda x: x[:0], torch.mean])
def test_lookup_is_linear_interpolation(layout, monkeypatch):
    """Values, gradients to x and to the values against numpy, in pieces, in every layout, which stays.
    Two bytes an input are kept, and code behind the activation may work in place."""
    monkeypatch.setattr('cell.PIECE', 50)
    torch.manual_seed(0)
    x = layout(2 * torch.randn(4, 6, 2, 3)).requires_grad_()
    values = torch.randn(13, requires_grad=True)
    y, at, v = Lookup.apply(values, lines(values, 3.0), 3.0, x), x.detach().numpy(), values.detach().numpy()
    left = np.floor((at + 3) / 0.5).clip(0, 11).astype(int)
    slope = np.diff(v)[left] / 0.5
    assert np.allclose(y.detach(), v[left] + slope * (at + 3 - 0.5 * left), atol=1e-5)
    assert y.stride() == torch.empty_like(x).stride()
    g = torch.randn(y.shape[::-1]).permute(tuple(range(y.dim()))[::-1])  # in another layout than y
    assert [t.dtype for t in y.grad_fn.saved_tensors] == [torch.int16, torch.complex64]
    to_x, to_values = torch.autograd.grad(y.mul_(2.0), (x, values), g / 2)
    halves = np.bincount(left.ravel(), g.numpy().ravel() / 2, 12)
    assert np.allclose(to_x, slope * g.numpy(), atol=1e-5)
    assert np.allclose(to_values, np.append(halves, 0) + np.append(0, halves), atol=1e-5)

def test_a_second_derivative_is_refused():
    """It would be 0, as a line has none, and the alphas would not see it."""
    cell, sites = random_cell()
    cell.tabulate()
    x = torch.randn(9, requires_grad=True)
    with pytest.raises(ValueError, match='no second derivative'):
        torch.autograd.grad(sites[0](x).sum(), x, create_graph=True)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tables_of_the_standard_activations(dtype):
    """Each site has its own, also one that works in place; `values` has a gradient. The dtype of x comes
    back, rounded once from float32; NaN stays NaN; the last line goes on; a kink at 0, a point, is exact."""
    cell, rtol = Cell(standard='gelu'), max(1e-4, torch.finfo(dtype).eps)
    sites = [cell.site(), cell.site(torch.tanh_), cell.site(F.leaky_relu)]
    cell.tabulate(standard=True)
    x = torch.tensor([math.nan, -1e4, -2.5, -2e-6, 2e-6, 1.0, 1e4, math.inf], dtype=dtype).requires_grad_()
    for k, (f, atol) in enumerate([(F.gelu, 1e-5), (torch.tanh, 1e-5), (F.leaky_relu, 1e-9)]):
        y = sites[k](x)
        to_x, to_values = torch.autograd.grad(y.sum(), (x, cell.values))
        assert y.dtype == to_x.dtype == dtype and to_x[1:].isfinite().all()
        assert torch.allclose(y[1:-1], f(x[1:-1].float()).to(dtype), rtol=rtol, atol=atol)
        assert y[0].isnan() and (y[-1] == math.inf or k == 1)
        assert to_values.sum(1).tolist() == [len(x) * (k == row) for row in range(3)]
    assert torch.equal(cell.grid, uniform_grid())

def test_cell_by_hand():
    """Two unary and two binary operations, every weight 1/2, x = 2: U0 = U1 = U3 = (2 + 4) / 2 = 3,
    B0 = (3 + 3 + 3 * 3) / 2 = 7.5, U2 = (7.5 + clip(56.25)) / 2 = 8.75, B1 = (8.75 + 3 + clip(26.25)) / 2."""
    cell = Cell('identity,square,add,mul', sampler='mean')
    cell.reset(0.0)
    assert cell.evaluate(torch.tensor([2.0]), cell.sample()).tolist() == [[10.875]]

@pytest.mark.parametrize('sampler, shape', [('mean', 'core'), ('softmax', 'paper'), ('dirichlet', 'deep')])
def test_network_by_table_against_op_by_op(sampler, shape):
    """Loss, gradient of the weights, gradient of alphas and scalars: by tables and op by op, to 1e-3."""
    cell, sites = random_cell(sampler=sampler, ops=SMOOTH, shape=shape, sites=2)
    model = nn.ModuleList([nn.Linear(8, 64), nn.Linear(64, 64)]).double()
    x, weights = torch.randn(256, 8, dtype=torch.float64), cell.double().sample()
    cell.tabulate(weights)
    rows = [[w[k % len(w), None] for w in weights] for k in range(2)]
    op_by_op = [lambda x, row=row: cell.evaluate(x.flatten(), row).view(x.shape) for row in rows]
    every, results = [*model.parameters(), *cell.parameters()], []
    for f, g in (sites, op_by_op):
        loss = g(model[1](f(model[0](x)))).sin().sum()
        gradients = torch.autograd.grad(loss, every, retain_graph=True, materialize_grads=True)
        results.append([loss, *map(nn.utils.parameters_to_vector, (gradients[:4], gradients[4:]))])
    assert all((table - exact).norm() <= 1e-3 * exact.norm() for table, exact in zip(*results))

@pytest.mark.parametrize('sampler, rows, different', [*zip(SAMPLERS, (20_000, 1, 1, 1), (40_000, 2, 1, 1))])
def test_weights(sampler, rows, different):
    """Rows of what is active sum to 1; dirichlet draws for each site, shared once, mean and softmax never.
    With c = elu(alpha) + 1, at least 0.01, s = sum(c): mean c / s, variance c (s - c) / s^2 (s + 1)."""
    cell, _ = random_cell(sampler=sampler)
    cell.sites, cell.temperature, cell.alpha[0].data[3:5] = 20_000, 0.5, -5.0
    assert cell.drop().startswith('U0')
    weights, again, alpha = cell.sample(), cell.sample(), cell.alpha[0].detach()[cell.active[0]]
    assert [w.shape for w in weights] == [(rows, len(active)) for active in cell.active]
    assert all(torch.allclose(w.sum(1), torch.ones(rows)) and (w >= 0).all() for w in weights)
    assert len(torch.cat([weights[0], again[0]]).unique(dim=0)) == different
    assert torch.autograd.grad(weights[0][:, 0].sum(), cell.alpha[0])[0][0] > 0
    c = torch.where(alpha > 0, alpha + 1, alpha.exp()).clamp(min=0.01)
    s, mean = c.sum(), torch.softmax(2 * alpha, 0) if sampler == 'softmax' else c / c.sum()
    assert torch.allclose(cell.sample(noise=False)[0], mean)
    if sampler == 'dirichlet':
        assert torch.allclose(weights[0].mean(0), mean, atol=3e-3)
        assert torch.allclose(weights[0].var(0), c * (s - c) / s ** 2 / (s + 1), rtol=0.12, atol=1e-5)

@pytest.mark.parametrize('shape, operations', [('core', 55), ('paper', 110), ('deep', 165)])
def test_start(shape, operations):
    """`start` weighs the standard activation and right, with softmax only, and only if the cell has both."""
    cell = Cell(sampler='softmax', standard='gelu', shape=shape)
    cell.reset(0.0, start=0.5)
    assert cell.operations() == operations and write(cell.tree()) == 'gelu(x)'
    *_, last_unary, last_binary = cell.named_weights().values()
    assert last_unary['gelu'] == last_binary['right'] == 0.5
    for ops, sampler in ('base', 'mean'), ('identity,tanh,right', 'softmax'), ('relu,right', 'softmax'):
        cell = Cell(ops, sampler=sampler, shape=shape)
        cell.reset(0.0, start=0.5)
        assert not any(alpha.any() for alpha in cell.alpha)
    with pytest.raises(ValueError, match='did you mean dirichlet'):
        Cell(sampler='dirichlett')

@pytest.mark.parametrize('seed', range(10))
@pytest.mark.parametrize('shape, ops', [('core', 'base,periodic'), ('paper', 'base'),
                                        ('deep', 'bias,scale,square,exp,gelu,leaky_relu,mul,mix')])
def test_drops_leave_the_activation_of_the_tree(shape, ops, seed, tmp_path):
    """Each drop takes the lowest alpha of a fullest choice point, and NaN in what was dropped does no harm.
    What is left, its Activation, the parsed text of that, and another cell that loads the state (no pickled
    class) are one function; the float32 table is within 1e-3 of float64 at 99 % of the inputs."""
    (other, _), (cell, (site,)) = (random_cell(k, ops=ops, shape=shape) for k in (99, seed))
    while cell.operations() > len(cell.choices):
        before = [list(active) for active in cell.active]
        choice, name = cell.drop().split(':')
        k = cell.choices.index(choice)
        gone, = set(before[k]) - set(cell.active[k])
        assert len(before[k]) == max(map(len, before)) and cell.ops[k][gone].name == name
        assert cell.alpha[k][gone] == min(cell.alpha[k][j] for j in before[k])
        cell.alpha[k].data[gone] = cell.scalars[k].data[gone] = math.nan
        assert cell.curve(torch.ones(2)).isfinite().all()
    torch.save(cell.state_dict(), tmp_path / 'state')
    other.load_state_dict(torch.load(tmp_path / 'state', weights_only=True))
    x, f = torch.rand(20_000) * 24 - 12, Activation(cell.tree())
    cell.tabulate()
    assert cell.learns == (len(f.scalars) > 0) and other.tree() == cell.tree()
    with torch.no_grad():
        for same in (cell.curve, other.curve, f, Activation(parse(write(cell.tree())))):
            assert torch.equal(same(x), cell.evaluate(x, cell.sample())[0])
        error = (site(x) - f.double()(x.double())).abs()
    assert (error <= 1e-3).double().mean() >= 0.99 and error.median() < 2e-5, f.expression

@torch.no_grad()
def test_what_is_kept_for_the_grid():
    """It is what any other input gives, bit for bit, with another bound and after a change of type."""
    cell, _ = random_cell(clip=2.0)
    for dtype in (torch.float32, torch.float64):
        cell.to(dtype)
        assert torch.equal(*(cell.evaluate(x, cell.sample()) for x in (cell.grid, cell.grid.clone())))

@pytest.mark.parametrize('normalise', ['scale', 'centre'])
def test_histograms_and_the_tables_normalised_by_them(normalise):
    """`seen` against numpy's histogram, with one channel in ten unlike the others, after strange inputs.
    Under these inputs the output has the second moment (centre: variance, and mean 0) of the site's own
    standard activation, which may work in place."""
    torch.manual_seed(0)
    cell, other = Cell(normalise=normalise, standard='gelu'), torch.arange(512) % 10 == 3
    sites = [cell.site(), cell.site(lambda x: F.hardswish(x, inplace=True))]
    inputs = torch.randn(2, 100, 64, 512) * (1 + 0.5 * other) + 3 * other - torch.arange(2).view(2, 1, 1, 1)
    for x in torch.tensor([math.nan, math.inf]), torch.zeros(0, 3), torch.ones(1).half().expand(64, 10):
        assert sites[0](x).shape == x.shape
    for site, batches in zip(sites, inputs.clone()):
        for x in batches:
            site(x)
    torch.no_grad()(cell.tabulate)()
    for site, x, seen, standard in zip(sites, inputs, cell.seen, (F.gelu, F.hardswish)):
        expected = np.histogram(x.numpy(), BINS, (-LIMIT, LIMIT))[0] / x.numel()
        assert np.abs((seen.numpy() - expected).cumsum()).max() < 0.01
        y, usual = site.eval()(x).numpy(), standard(x).numpy()
        moment = usual.var() if normalise == 'centre' else (usual ** 2).mean()
        assert np.isclose((y ** 2).mean(), moment, rtol=0.04)
        assert abs(y.mean()) < 0.03 * y.std() or normalise == 'scale'
    values = torch.randn(1, len(cell.grid)).requires_grad_()  # gain earns nothing: no slope along the values
    slope, = torch.autograd.grad((cell.normalised(values) * torch.randn(len(cell.grid))).sum(), values)
    assert (slope * values).sum().abs() < 1e-4 * slope.norm() * values.norm()

@pytest.mark.parametrize('draw, training, gradient, seen', [
    (torch.no_grad()(Cell.tabulate), True, True, True), (Cell.tabulate, True, True, False),
    (Cell.use_standard, False, True, False), (Cell.use_standard, True, False, False)])
def test_inputs_are_observed_in_weight_steps_only(draw, training, gradient, seen):
    """Evaluation mode, no_grad and tables with a gradient (architecture steps) leave no trace."""
    cell, (site, _) = random_cell(sites=2)
    before = cell.seen.clone()
    draw(cell)
    with torch.set_grad_enabled(gradient):
        site.train(training)(torch.full((40, 3), 2.0))
    assert [not torch.equal(a, b) for a, b in zip(before, cell.seen)] == [seen, False]

def test_a_site_that_comes_later():
    """It has its standard activation until the next table; the others keep theirs. `reset` forgets what was
    collected, to which a site without a table adds nothing."""
    cell, (site,) = random_cell()
    cell.tabulate()
    x = torch.randn(9)
    y, late = site(x), cell.site(torch.sin)
    assert torch.equal(late(x), torch.sin(x)) and torch.equal(site(x), y)
    cell.tabulate()
    assert torch.equal(late(x), site(x)) and len(cell.functions) == 2
    cell.site()
    cell.collect(torch.randn(2, len(cell.grid)), early=True)
    cell.free.data.fill_(1.0)
    collected = cell.gradient, cell.inputs, cell.early, cell.free
    assert all(t.any() for t in collected)
    cell.reset()
    assert not any(t.any() for t in collected)

def test_what_is_collected():
    """dL/df without what a + b x would change, weighted by the inputs: against numpy's least squares."""
    cell, _ = random_cell()
    x, g = cell.double().grid.numpy(), torch.randn(1, len(cell.grid)).double()
    cell.collect(g, early=False)
    w = cell.seen[0, torch.arange(len(x)) * BINS // len(x)].sqrt().numpy()
    for h in np.ones_like(x), x, x ** 2, np.tanh(x):
        rest = h - np.polyval(np.polyfit(x, h, 1, w=w), x)
        assert cell.gradient.numpy() @ h == pytest.approx(g[0].numpy() @ rest, abs=1e-6)
    assert torch.equal(cell.inputs, cell.seen[0]) and not cell.early.any()

def test_the_free_curve():
    """It is added where it is set free, linear between its 97 points, a quarter apart: a hat around each."""
    cell, _ = random_cell()
    cell.tabulate()
    before, cell.freed, cell.free.data[48], hat = cell.values, True, 1.0, 1 - 4 * cell.grid.abs()
    cell.tabulate()
    torch.testing.assert_close(cell.values - before, hat.clamp(min=0)[None], atol=1e-5, rtol=0)
    gradient, = torch.autograd.grad(cell.values[0] @ (cell.grid == 0.09375).float(), cell.free)
    torch.testing.assert_close(gradient[47:51], torch.tensor([0.0, 0.625, 0.375, 0.0]), atol=1e-5, rtol=0)

def test_blame():
    """The first site that is not finite is named, then the operation that is largest there, by hand; a scalar
    and a gradient that became NaN are named. Buffers, histograms, random state and hooks stay."""
    cell, sites = random_cell(ops='identity,exp,scale,add', clip=100.0, sites=2)
    cell.reset(0.0)
    model = nn.Sequential(sites[0], nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), sites[1])
    nn.init.zeros_(model[3].weight)
    x = torch.tensor([[-3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.no_grad()(cell.tabulate)()
    state = [t.clone() for t in (*model.state_dict().values(), cell.seen, torch.get_rng_state())]
    u = (2 + math.exp(2) + 2) / 3  # U0(2) = U1(2); B0 adds them up, then comes exp
    assert blame(model, cell, x) == {'site': 0, 'inputs': [-3.0, 2.0], 'op': 'U2:exp', 'gradient': None,
                                     'size': pytest.approx(math.exp(2 * u), rel=1e-4)}
    assert all(map(torch.equal, state, (*model.state_dict().values(), cell.seen, torch.get_rng_state())))
    model[3].bias.data[1] = cell.scalars[3].data[:] = math.nan
    model[1].bias.grad = torch.tensor([0.0, math.inf, 0.0, 0.0])
    found = blame(model, cell, x)  # the tables are still finite
    assert [found[key] for key in ('site', 'op', 'size', 'gradient')] == [1, 'U2:scale', math.inf, '1.bias']
    cell.use_standard()
    assert blame(model, cell, x)['op'] == 'standard activation' and not sites[0]._forward_hooks

"""The cell: tables against the op-by-op reference, gradients against finite differences, shrinking, text round trips."""
import pytest
import torch
import torch.nn as nn

from cell import CHOICES, SAMPLERS, Cell, Lookup, Tabulated, cell_expression, lines, random_expression
from activation import Activation, named
from models import build
from ops import ALL, select


def small(sampler: str = 'mean', ops: str = 'base', sites: int = 1, **options) -> tuple[Cell, nn.ModuleList]:
    torch.manual_seed(0)
    cell = Cell(ops, sampler=sampler, **options)
    with torch.no_grad():
        for alpha in cell.alpha:
            alpha.normal_()
    return cell, nn.ModuleList(cell.site() for _ in range(sites))


# -- lookup

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


def test_table_against_op_by_op_on_random_cells():
    """At every x more than a grid step from a kink or jump, |table - op by op| <= 1e-3, gently sloped cells or steep.

    A steep cell such as x^18 bends by more than a grid of 4,096 points can follow; the bound there is the textbook one
    for linear interpolation, step^2 / 8 times the second derivative.
    """
    draw = torch.Generator().manual_seed(0)
    step = 24 / 4095
    x = (torch.rand(20_000, generator=draw, dtype=torch.float64) * 24 - 12)
    close = 0
    for _ in range(60):
        f = Activation(random_expression(draw)).double()
        with torch.no_grad():
            error = (Tabulated(f).double()(x) - f(x)).abs()
            # second differences three grid steps wide: huge at a kink or jump, the curvature elsewhere
            around = torch.stack([f(x + k * step) for k in (-2, -1, 0, 1, 2)])
        second = around.diff(dim=0).diff(dim=0)
        kink = (second.amax(0) - second.amin(0)) > 0.2 * second.abs().amax(0) + 1e-9
        smooth = error[~kink]
        assert (smooth <= 1e-3 + second.abs().amax(0)[~kink]).all()
        close += bool((smooth <= 1e-3).all())
    assert close >= 57


# -- the relaxed cell

@pytest.mark.parametrize('sampler', SAMPLERS)
def test_weights_are_distributions(sampler):
    """Rows sum to one over the active operations; per-site draws differ only where they should."""
    cell, _ = small(sampler, sites=3)
    weights = cell.weights()
    assert [w.shape[0] for w in weights] == [3 if sampler == 'dirichlet' else 1] * 6
    for k, w in enumerate(weights):
        assert w.shape[1] == len(cell.active[k]) and torch.allclose(w.sum(1), torch.ones(len(w)), atol=1e-5) and (w >= 0).all()
    again = cell.weights()
    assert torch.equal(weights[0], again[0]) == (sampler in ('mean', 'softmax'))


def test_dirichlet_weights_have_the_mean_of_the_mean_sampler():
    """Many draws average to concentration / sum, which `mean` uses without noise; the gradient reaches alpha."""
    cell, _ = small('dirichlet', sites=4000)
    draws = cell.weights()[0]
    c = cell.concentration(0)
    assert torch.allclose(draws.mean(0), c / c.sum(), atol=0.01)
    assert torch.autograd.grad(draws[:, 0].sum(), cell.alpha[0])[0].abs().sum() > 0


def test_cell_by_hand():
    """A cell of two unary and two binary operations, worked out by hand."""
    cell, _ = small('mean', 'identity,square,add,mul')
    with torch.no_grad():
        for alpha in cell.alpha:
            alpha.zero_()  # every operation weighs 1/2
    x = torch.tensor([2.0])
    # U0 = U1 = (2 + 4) / 2 = 3, b0 = (3 + 3 + 3 * 3) / 2 = 7.5, U2 = (7.5 + clip(56.25)) / 2 = 8.75, U3 = 3,
    # f = (8.75 + 3 + clip(26.25)) / 2 = 10.875
    assert torch.allclose(cell.evaluate(x, cell.weights()), torch.tensor([[10.875]]))


def test_relaxed_cell_gradcheck():
    """Alphas and scalars, float64, op by op, against finite differences."""
    cell, _ = small('mean', 'base', points=64)
    cell.double()
    x = torch.tensor([-1.3, -0.2, 0.4, 1.7], dtype=torch.float64)
    for parameters in (cell.alpha, cell.scalars):
        tensors = [p.detach().clone().requires_grad_() for p in parameters]

        def f(*values):
            old = list(parameters)
            saved = [p.data for p in old]
            out = torch.func.functional_call(Evaluated(cell), {f'cell.{name}.{k}': v for k, v in enumerate(values)}, (x,))
            assert all(p.data is s for p, s in zip(old, saved)) or True
            return out
        name = 'alpha' if parameters is cell.alpha else 'scalars'
        assert torch.autograd.gradcheck(f, tensors, atol=1e-5)


class Evaluated(nn.Module):
    def __init__(self, cell: Cell):
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell.evaluate(x, self.cell.weights())


@pytest.mark.parametrize('sampler', ['mean', 'softmax', 'dirichlet'])
def test_whole_network_table_against_op_by_op(sampler):
    """One step of a network: the loss and all gradients, through tables and op by op, agree to 1e-3 relative."""
    torch.manual_seed(0)
    cell = Cell('base', sampler=sampler, points=32768)
    with torch.no_grad():
        for alpha in cell.alpha:
            alpha.normal_()
    model = build('resnet20', cell.site).double()
    cell.double()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(10, (4,))
    parameters = [*model.parameters(), *cell.parameters()]

    def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(1)  # the same Dirichlet draws
        cell.draw()
        loss = nn.functional.cross_entropy(model(x), y)
        return loss, list(torch.autograd.grad(loss, parameters, allow_unused=True))
    loss, by_table = gradients()
    weights: list[torch.Tensor] = []

    class Reference(nn.Module):
        def __init__(self, index: int):
            super().__init__()
            self.index = index

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            row = [w[min(self.index, len(w) - 1)][None] for w in weights]
            return cell.evaluate(x.flatten(), row).view_as(x)
    sites = [(m, name) for m in model.modules() for name, child in m.named_children() if type(child).__name__ == 'Site']
    for m, name in sites:
        setattr(m, name, Reference(getattr(m, name).index))
    torch.manual_seed(1)
    weights += cell.weights()
    expected = nn.functional.cross_entropy(model(x), y)
    op_by_op = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert torch.allclose(loss, expected, rtol=1e-3)
    for name, found in (('weights', slice(0, -12)), ('architecture', slice(-12, None))):
        a = torch.cat([g.flatten() for g in by_table[found] if g is not None])
        b = torch.cat([g.flatten() for g in op_by_op[found] if g is not None])
        assert (a - b).norm() <= 1e-3 * b.norm(), f'{name}: {(a - b).norm() / b.norm():.1e}'


# -- sites and normalisation

def test_scale_gives_every_site_the_moment_of_the_standard():
    """Under the inputs that a site has seen its table has the standard activation's second moment."""
    cell, sites = small('mean', sites=2, normalise='scale', standard='gelu')
    inputs = [torch.randn(64, 512), 2.5 * torch.randn(64, 512) - 1]
    for _ in range(100):
        for site, x in zip(sites, inputs):
            site(x)
    cell.draw()
    for site, x in zip(sites, inputs):
        site.eval()
        assert torch.allclose(site(x).square().mean(), named('gelu')(x).square().mean(), rtol=0.03)


def test_sites_hold_no_architecture():
    """The network's parameters are the weights and only those."""
    cell = Cell()
    model = build('toy', cell.site)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in cell.parameters()}
    assert sum(p.numel() for p in model.parameters()) == 16 * 64 + 64 + 64 + 1


# -- shrinking and text

@pytest.mark.parametrize('ops', ['base', 'base,periodic,swish', 'no-composites', 'relu,add'])
def test_drops_end_with_one_operation_each(ops):
    """Each drop takes the lowest alpha of a fullest choice point; a dropped operation never comes back."""
    cell, _ = small(ops=ops)
    unary, binary = select(ops)
    assert cell.operations() == 4 * len(unary) + 2 * len(binary)
    while cell.operations() > 6:
        sizes = [len(active) for active in cell.active]
        before = [list(active) for active in cell.active]
        k = CHOICES.index(cell.drop().split(':')[0])
        assert sizes[k] == max(sizes)
        gone, = set(before[k]) - set(cell.active[k])
        assert cell.alpha[k][gone] == min(cell.alpha[k][j] for j in before[k])
    assert [len(active) for active in cell.active] == [1] * 6
    with pytest.raises(RuntimeError, match='discrete'):
        cell.drop()


def test_a_dropped_operation_weighs_exactly_nothing():
    """Its alpha gets no gradient and its value cannot matter: NaN there changes nothing."""
    cell, _ = small(points=256)
    dropped = cell.drop()
    k, name = CHOICES.index(dropped.split(':')[0]), dropped.split(':')[1]
    j = [op.name for op in cell.ops[k]].index(name)
    cell.draw()
    before = cell.tables[0].detach().clone()
    gradient, = torch.autograd.grad(cell.tables[0].sum(), cell.alpha[k])
    assert gradient[j] == 0 and gradient.abs().sum() > 0
    with torch.no_grad():
        cell.alpha[k][j] = float('nan')
    cell.draw()
    assert torch.equal(cell.tables[0], before)


@pytest.mark.parametrize('seed', range(5))
def test_one_op_left_equals_activation_equals_its_text(seed):
    """The shrunk cell, the Activation it becomes, and the parsed text of that are one function, scalars included."""
    cell, (site,) = small()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in cell.parameters():
            p.normal_()
    while cell.operations() > 6:
        cell.drop()
    x = torch.linspace(-6, 6, 501)
    with torch.no_grad():
        relaxed = cell.evaluate(x, cell.weights()).view(-1)
        discrete = cell.activation()(x)
        parsed = Activation(cell.activation().expression, cell.clip)(x)
    assert torch.equal(relaxed, discrete) and torch.equal(discrete, parsed)


def test_state_round_trip():
    """alphas, scalars, dropped operations and histograms survive a state_dict."""
    cell, _ = small(sites=2)
    for _ in range(40):
        cell.drop()
    other = Cell()
    other.site(), other.site()
    other.load_state_dict(cell.state_dict())
    assert other.expression() == cell.expression() and other.active == cell.active


def test_random_expressions_cover_the_space():
    """Every operation of the set turns up, every expression parses, and one generator gives one sequence."""
    draw = torch.Generator().manual_seed(3)
    texts = [random_expression(draw) for _ in range(600)]
    assert len(set(texts)) > 500
    for text in texts:
        Activation(text)
    used = {word for text in texts for word in text.replace('(', ' ').replace(')', ' ').replace(',', ' ').split()}
    assert {op.name for ops in select('base') for op in ops} - {'identity', 'left', 'right'} <= used
    assert random_expression(torch.Generator().manual_seed(3)) == texts[0]


def test_cell_expression_by_hand():
    """The six choices in their places, with scalars."""
    chosen = tuple(ALL[name] for name in ('sigmoid', 'scale', 'mul', 'tanh', 'identity', 'mix'))
    assert cell_expression(chosen, (None, 0.5, None, None, None, -1.0)) == 'mix(tanh(mul(sigmoid(x), scale(x, 0.5))), x, -1)'


def test_unknown_sampler_names_the_nearest():
    with pytest.raises(ValueError, match='did you mean dirichlet'):
        Cell(sampler='dirichlett')

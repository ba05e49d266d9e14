"""space.py against all spellings of a small space one by one, finer grids and finite differences."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from activation import cell_tree, distance, evaluate, length, nonlinearity
from ops import select
from space import Space

SMALL = 'identity,relu,tanh,square,add,mul,max,left,right'
X = torch.linspace(-5, 5, 97, dtype=torch.float64)
P = torch.softmax(-X.square() / 2, 0)
CURVES = {'mish': F.mish, 'hardswish': F.hardswish, 'softsign': F.softsign, 'relu': F.relu,
          'snake': lambda x: x + torch.sin(x) ** 2}
SPACE = Space(SMALL)


@pytest.fixture(scope='module')
def spellings():
    """Every spelling of the small space by itself: lengths (spellings,) and values (spellings, points)."""
    unary, binary = select(SMALL)
    trees = {cell_tree('paper', ops) for ops in itertools.product(unary, unary, binary, unary, unary, binary)}
    return np.array([length(tree) for tree in trees]), torch.stack([evaluate(tree, X) for tree in trees])


def residual(f, curve):
    """What weighted least squares of the curve on f and 1 leaves, as a share of its standard deviation."""
    basis = (torch.stack([f, torch.ones_like(f)], 1) * P.sqrt()[:, None]).numpy()
    target = ((curve - P @ curve) * P.sqrt()).numpy()
    rest = target - basis @ np.linalg.lstsq(basis, target, rcond=1e-12)[0]
    return np.linalg.norm(rest) / np.linalg.norm(target)


def front(lengths, scores):
    """[(length, score)], each better than all shorter ones."""
    found = [(0, np.inf)]
    for n in np.unique(lengths):
        if (score := scores[lengths == n].min()) < found[-1][1] - 1e-6:
            found.append((n, score))
    return found[1:]


def check(matches, expected):
    """The front is the expected one, it comes first, and nothing is found twice."""
    found = [match for match in matches if match.front]
    assert [match.length for match in found] == [n for n, _ in expected]
    assert [match.score for match in found] == pytest.approx([score for _, score in expected], abs=1e-6)
    assert matches[:len(found)] == found and [match.length for match in matches] == [length(m.tree) for m in matches]
    others = [match.score for match in matches[len(found):]]
    assert others == sorted(others)
    shapes = torch.stack([evaluate(match.tree, X) for match in matches])
    shapes = F.normalize(shapes - shapes.mean(1, keepdim=True), dim=1)
    assert ((shapes @ shapes.T).abs() > 1 - 1e-11).sum() == len(matches)


@pytest.mark.parametrize('name', CURVES)
def test_nearest_is_what_brute_force_finds(name, spellings):
    """Front and best others: the dedupe, the chunks, the lengths and the three sums lose nothing."""
    lengths, values = spellings
    scores = np.array([residual(f, CURVES[name](X)) for f in values])
    matches = SPACE.nearest(CURVES[name], count=10)
    check(matches, front(lengths, scores))
    for match in matches:
        assert match.score == pytest.approx(residual(evaluate(match.tree, X), CURVES[name](X)), abs=1e-6)
    shapes = np.unique(scores[scores < matches[-1].score + 1e-6].round(7))  # the front may hold worse ones
    assert len(shapes) <= sum(match.score < matches[-1].score + 1e-6 for match in matches)


@pytest.mark.parametrize('name', CURVES)
def test_distances_hold_on_a_finer_grid(name):
    """97 points are enough."""
    for match in SPACE.nearest(CURVES[name]):
        fine = distance(lambda x: evaluate(match.tree, x), CURVES[name], rescale=False)
        assert match.score == pytest.approx(fine, abs=4e-3)


def test_a_function_of_the_space_is_found_whatever_its_scale_and_shift():
    for seed in range(10):
        tree = SPACE.random_function(torch.Generator().manual_seed(seed))
        found = [m for m in SPACE.nearest(lambda x: -3 * evaluate(tree, x) + 7) if m.front][-1]
        assert found.score < 1e-6 and found.length <= length(tree)


def test_the_number_of_functions(spellings):
    """Equal are values that differ by less than 1e-6 of the largest, and shapes whose correlation is +-1."""
    values = spellings[1]
    values = values[np.unique(values.numpy().round(12), axis=0, return_index=True)[1]]
    sizes, functions = values.abs().amax(1), []
    for k in range(len(values)):
        near = (values[functions] - values[k]).abs().amax(1) < 1e-6 * sizes[k] if functions else torch.zeros(1)
        functions += [] if near.any() else [k]
    shapes = F.normalize(values[functions] - values[functions].mean(1, keepdim=True), dim=1)
    same = (shapes @ shapes.T).abs() > 1 - 1e-12
    assert SPACE.count() == len(functions)
    assert SPACE.count(free=True) == int((same.float().argmax(1) == torch.arange(len(same))).sum())


def test_steepest_is_what_brute_force_finds(spellings):
    lengths, values = spellings
    gradient = torch.randn(97, generator=torch.Generator().manual_seed(0)).double() * P
    s, norm = F.gelu(X), (P @ F.gelu(X).square()).sqrt()
    f = values * (norm / (values.square() @ P).sqrt())[:, None]
    far = ((f - s).square() @ P).sqrt() / norm
    scores = torch.where((far > 0.05) & (far < 0.5), (f - s) @ gradient, torch.inf).numpy()
    matches = SPACE.steepest(gradient, 1000 * P, F.gelu, trust=0.5, count=10)
    check(matches, front(lengths, scores))
    best = np.unique(scores.round(9))[:10]
    assert sorted(match.score for match in matches)[:10] == pytest.approx(best, abs=1e-8)


def test_the_score_of_steepest_is_the_slope_of_the_loss():
    """Loss: half the squared difference from a wanted curve; a step of 1e-6 from the standard towards f."""
    wanted, s = torch.tanh(X) * X.square() / 3, F.silu(X)
    def loss(f):
        return P @ (f - wanted).square() / 2
    for match in SPACE.steepest(P * (s - wanted), P, F.silu, count=5):
        f = evaluate(match.tree, X)
        f = f * ((P @ s.square()) / (P @ f.square())).sqrt()
        assert match.score == pytest.approx(((loss(s + 1e-6 * (f - s)) - loss(s)) / 1e-6).item(), abs=1e-5)
        assert loss(s + 0.05 * (f - s)) < loss(s) or match.score > -0.01  # lower is better


def test_pool_keeps_the_sum_and_the_centre():
    grid = torch.linspace(-8, 8, 2049).double()
    values, inside = torch.rand(2049, generator=torch.Generator().manual_seed(0)).double(), grid.abs() <= 5
    pooled = SPACE.pool(values, grid)
    assert pooled.sum().item() == pytest.approx(values.sum().item())
    assert (SPACE.pool(values * inside, grid) @ X).item() == pytest.approx(((values * inside) @ grid).item())
    assert pooled[0] > values[grid < -5].sum() and pooled[-1] > values[grid > 5].sum()


def test_deep_goes_on_from_the_best_of_two_stages():
    deep = Space(SMALL, shape='deep')
    assert SPACE.whole and not deep.whole
    for name in ('mish', 'hardswish'):
        shallow, found = SPACE.nearest(CURVES[name], count=0), deep.nearest(CURVES[name], count=0)
        for match in shallow:
            assert min(m.score for m in found if m.length <= match.length) <= match.score + 1e-6
        assert found[-1].score < 0.6 * shallow[-1].score


@pytest.mark.parametrize('ops, clip, shape, curve', [
    ('base', 10.0, 'core', F.silu), ('base', None, 'core', lambda x: x ** 5),
    ('base,periodic', None, 'core', lambda x: torch.sin(x) / x.where(x != 0, 1) + (x == 0)),
    ('base,swish', 10.0, 'core', lambda x: torch.exp(-x * x)),
    ('exp,sinh,cube,mul,sub', None, 'paper', lambda x: x ** 21),
    ('const,bias,mix,gate', 10.0, 'paper', lambda x: torch.sigmoid(x + 1))])
def test_every_shape_and_set_of_operations(ops, clip, shape, curve):
    """A function of the space is found; functions that overflow without a bound do not spoil the others."""
    found = [match for match in Space(ops, clip, shape).nearest(curve) if match.front][-1]
    assert found.score < 1e-6


def test_random_functions():
    """Reproducible by seed, no constant or line, and left and right do not count once for each input they ignore."""
    space = Space('identity,const,relu,tanh,add,left,right')
    draw = torch.Generator().manual_seed(0)
    trees = [space.random_function(draw) for _ in range(500)]
    draw.manual_seed(0)
    assert trees[:20] == [space.random_function(draw) for _ in range(20)]
    assert all(nonlinearity(lambda x: evaluate(tree, x)) > 0.01 for tree in trees) and len(set(trees)) > 50
    assert 0.02 < sum(tree == 'x' or tree.op.name != 'add' for tree in trees) / 500 < 0.25


@pytest.mark.parametrize('wrong, message', [
    (lambda: Space('identity,add').random_function(torch.Generator()), 'straight lines'),
    (lambda: SPACE.nearest(lambda x: 0 * x + 3), 'constant'),
    (lambda: SPACE.nearest(F.relu, density=P * (X < 0)), 'constant')])
def test_what_has_no_answer(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()

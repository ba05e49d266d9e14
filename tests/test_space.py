"""space.py against all spellings of a small space one by one, finer grids and finite differences."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import space
from activation import cell_tree, distance, evaluate, length, nonlinearity
from evaluate import random_function
from ops import select
from search import steepest
from space import Space, front, keys

SMALL = 'identity,relu,tanh,square,add,mul,max,left,right'
X = torch.linspace(-5, 5, 97, dtype=torch.float64)
P = torch.softmax(-X.square() / 2, 0)
CURVES = {'mish': F.mish, 'relu': F.relu, 'snake': lambda x: x + torch.sin(x) ** 2}
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

def correlations(f):
    f = f - f.mean(1, keepdim=True)
    return F.normalize(f, dim=1) @ F.normalize(f, dim=1).T

def best_by_length(lengths, scores):
    """What brute force says is the front: (length, score) pairs."""
    rows = [(0, np.inf)]
    for n in np.unique(lengths):
        if (score := scores[lengths == n].min()) < rows[-1][1] - 1e-6:
            rows.append((n, score))
    return np.array(rows[1:])

@pytest.mark.parametrize('name', CURVES)
def test_nearest_is_what_brute_force_finds(name, spellings, monkeypatch):
    """The stages, the chunks and the lengths lose nothing, and the distances are those of least squares."""
    monkeypatch.setattr(space, 'CHUNK', 50)
    monkeypatch.setattr(space, 'KEEP', 15)
    scores = np.array([residual(f, CURVES[name](X)) for f in spellings[1]])
    ahead, best = SPACE.nearest(CURVES[name], count=10)
    expected = best_by_length(spellings[0], scores)
    assert [match[:2][::-1] for match in ahead] == [pytest.approx(row, abs=1e-6) for row in expected]
    assert [match.score for match in best] == sorted(match.score for match in best) and len(best) == 10
    better = scores[scores < best[-1].score - 1e-6, None]
    assert (abs(better - [match.score for match in best]).min(1) < 1e-6).all()
    for match in ahead + best:
        assert match.length == length(match.tree)
        assert match.score == pytest.approx(residual(evaluate(match.tree, X), CURVES[name](X)), abs=1e-6)
        fine = distance(lambda x: evaluate(match.tree, x), CURVES[name], rescale=False)  # 2,001 points
        assert match.score == pytest.approx(fine, abs=4e-3)

def test_a_function_of_the_space_is_found_whatever_its_scale_and_shift():
    for seed in range(5):
        tree = random_function(SPACE, seed)
        found = SPACE.nearest(-3 * evaluate(tree, X) + 7)[0][-1]
        assert found.score < 1e-6 and found.length <= length(tree)

def test_scalars_are_fitted():
    """tanh(x + 1) is what the scan sees of tanh(bias(x))."""
    found, best = Space('identity,bias,tanh,left,add').nearest(lambda x: torch.tanh(x + 0.6))
    assert found[-1].score < 1e-4 < 0.05 < best[0].score

def test_the_density_says_where_a_curve_counts():
    """Where inputs are positive only, |x| is x."""
    (positive, *_), (everywhere, *_) = SPACE.nearest(torch.abs, P * (X > 0))[0], SPACE.nearest(torch.abs)[0]
    assert positive.score < 1e-6 < 0.1 < everywhere.score

def test_a_gain_below_1e_6_is_none():
    """2 * softplus(x), clipped where hardly an input lies, is no progress over softplus(x)."""
    matches = Space('identity,const,softplus,add,mul').nearest(lambda x: (x + torch.sqrt(x * x + 4)) / 2)[0]
    assert np.diff([match.score for match in matches]).max() < -1e-6

def test_keys_are_equal_for_what_is_equal_to_1e_6():
    f = torch.randn(100, 97, generator=torch.Generator().manual_seed(0)).double()
    key = keys(f)
    assert len(set(key)) == 100 and (key == keys(f * (1 + 1e-13))).all()
    for other in (f + 1e-5, -f, 2 * f):
        assert not (key == keys(other)).any()
    assert (keys(f, scale=True) == keys(-3 * f, scale=True)).all()
    assert (keys(f, scale=True, shift=True) == keys(7 - 3 * f, scale=True, shift=True)).all()
    assert len(set(keys(5 + 1e-15 * f, True, True))) == 1  # constants

def test_the_number_of_functions(spellings):
    """One by one: equal to 1e-6 of the largest value, and for shapes, correlated by +-1."""
    values = spellings[1][np.unique(spellings[1].numpy().round(12), axis=0, return_index=True)[1]]
    functions = values[:1]
    for f in values[1:]:
        if ((functions - f).abs().amax(1) > 1e-6 * f.abs().max()).all():
            functions = torch.cat([functions, f[None]])
    same = correlations(functions).abs() > 1 - 1e-12
    made = torch.cat([part.values for part in SPACE.made(SPACE.binary, SPACE.rows)])
    assert len(set(keys(made))) == len(functions)
    assert len(set(keys(made, True, True))) == (same.int().argmax(1) == torch.arange(len(same))).sum()

def collected(gradient, density, early, standard):
    """What a cell has collected, at the points of the space."""
    return SimpleNamespace(grid=X, bins=torch.arange(97), gradient=gradient, inputs=density, early=early,
                           standard=standard)

@pytest.mark.parametrize('seed, early', [(0, None), (3, None), (0, torch.softmax(X - X.square(), 0))])
def test_steepest_is_what_brute_force_finds(seed, early, spellings):
    """The trust region and the rules against functions that stand still are what the docstring says."""
    noise, s = torch.randn(97, generator=torch.Generator().manual_seed(seed)).double(), F.relu(X)
    f = spellings[1] * ((P @ s.square()) / (spellings[1].square() @ P)).sqrt()[:, None]
    far = ((f - s).square() @ P / (P @ s.square())).sqrt()
    p = P if early is None else early
    varies = (f - (f @ p)[:, None]).square() @ p > 0.6 * (f.square() @ p)
    moves = (torch.gradient(f, spacing=10 / 96, dim=1)[0].abs() > 0.01).double() @ p > 0.25
    slope = (f - s) @ (P * noise)
    scores = torch.where((far > 0.1) & (far < 0.8) & varies & moves, slope, torch.inf).numpy()
    matches = steepest(SPACE, collected(P * noise, P, p, F.relu), 0.8)
    expected = best_by_length(spellings[0], scores)
    assert [m[:2][::-1] for m in front(matches)] == [pytest.approx(row, abs=1e-6) for row in expected]

def test_steepest_of_nothing_is_nothing():
    """--warmstart 0 collects no gradient, and no function fits statistics of nothing."""
    assert steepest(Space('base', shape='core'), collected(0 * P, 0 * P, 0 * P, F.relu), 0.8) == []
    assert steepest(SPACE, collected(P, P, 0 * P, F.relu), 0.8) == []

def test_the_score_of_steepest_is_the_slope_of_the_loss():
    """Loss: half the squared difference from a wanted curve. Step: 1e-6 from the standard towards f."""
    s, wanted = F.silu(X), torch.tanh(X) * X.square() / 3
    def loss(f):
        return P @ (f - wanted).square() / 2
    for match in steepest(SPACE, collected(P * (s - wanted), P, P, F.silu), 0.8)[:20]:
        f = evaluate(match.tree, X)
        f = f * ((P @ s.square()) / (P @ f.square())).sqrt()
        assert match.score == pytest.approx(((loss(s + 1e-6 * (f - s)) - loss(s)) / 1e-6).item(), abs=1e-5)

def test_deep_goes_on_from_the_best_of_two_stages():
    shallow, found = (space.nearest(F.hardswish)[0] for space in (SPACE, Space(SMALL, shape='deep')))
    for match in shallow:
        assert min(m.score for m in found if m.length <= match.length) <= match.score + 1e-6
    assert found[-1].score < 0.6 * shallow[-1].score

@pytest.mark.parametrize('ops, clip, shape, curve', [
    ('base', 10.0, 'core', F.silu), ('base', None, 'core', lambda x: x ** 5),
    ('base,periodic', None, 'core', lambda x: torch.sinc(x / torch.pi)),
    ('base,swish', 10.0, 'core', lambda x: torch.exp(-x * x)),
    ('exp,sinh,cube,mul,sub', None, 'paper', lambda x: x ** 21),
    ('const,bias,mix,gate', 10.0, 'paper', lambda x: torch.sigmoid(x + 1)),
    ('relu,tanh,add,right', 10.0, 'paper', torch.tanh)])
def test_every_shape_and_set_of_operations(ops, clip, shape, curve):
    """A function of the space is found, also where nothing bounds the others."""
    ahead, best = Space(ops, clip, shape).nearest(curve)
    assert min(match.score for match in ahead) < 1e-6
    values = torch.stack([evaluate(match.tree, X, clip) for match in best])
    assert (correlations(values).abs() > 1 - 1e-13).tril(-1).sum() == 0  # none twice, with another shift

def test_random_functions():
    """Reproducible by seed, no constant, no line."""
    few = Space('identity,const,relu,tanh,add,left,right')
    trees = [random_function(few, seed) for seed in range(100)]
    assert trees[:20] == [random_function(few, seed) for seed in range(20)] and len(set(trees)) > 30
    assert all(nonlinearity(lambda x: evaluate(tree, x)) > 0.01 for tree in trees)

@pytest.mark.parametrize('wrong, message', [
    (lambda: random_function(Space('identity,add'), 0), 'straight lines'),
    (lambda: SPACE.nearest(lambda x: 0 * x + 3), 'constant'),
    (lambda: SPACE.nearest(F.relu, density=P * (X < 0)), 'constant')])
def test_what_has_no_answer(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()

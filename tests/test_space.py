"""space.py against all spellings of a small space one by one, finer grids and finite differences."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from activation import cell_tree, distance, evaluate, length, nonlinearity
from evaluate import random_function
from ops import select
from search import steepest
from space import Space, front, keys

SMALL = 'identity,relu,tanh,square,add,mul,max,left,right'
X = torch.linspace(-5, 5, 97, dtype=torch.float64)
P = torch.softmax(-X.square() / 2, 0)
SPACE = Space(SMALL)

@pytest.fixture(scope='module')
def spellings():
    """Every spelling of the small space by itself: lengths (spellings,) and values (spellings, points)."""
    unary, binary = select(SMALL)
    trees = {cell_tree('paper', ops) for ops in itertools.product(unary, unary, binary, unary, unary, binary)}
    return np.array([length(tree) for tree in trees]), torch.stack([evaluate(tree, X) for tree in trees])

def residual(f, curve):
    """What weighted least squares of the curve on f and 1 leaves, as a share of its standard deviation."""
    f, y, w = f.numpy(), curve.numpy(), P.sqrt().numpy()
    rest = w * (y - np.polyval(np.polyfit(f, y, 1, w=w), f))
    return np.linalg.norm(rest) / np.linalg.norm(w * (y - np.average(y, weights=w * w)))

def best_by_length(lengths, scores):
    """What brute force says is the front: (score, length) pairs."""
    rows = [(np.inf, 0)]
    for n in np.unique(lengths):
        if (score := scores[lengths == n].min()) < rows[-1][0] - 1e-6:
            rows.append((score, n))
    return [pytest.approx(row, abs=1e-6) for row in rows[1:]]

@pytest.mark.parametrize('curve', [F.mish, F.relu, lambda x: x + torch.sin(x) ** 2])
def test_nearest_is_what_brute_force_finds(curve, spellings, monkeypatch):
    """The stages, the chunks and the lengths lose nothing, and the distances are those of least squares."""
    monkeypatch.setattr('space.CHUNK', 50)
    monkeypatch.setattr('space.KEEP', 15)
    scores = np.array([residual(f, curve(X)) for f in spellings[1]])
    ahead, best = SPACE.nearest(curve, count=10)
    assert [match[:2] for match in ahead] == best_by_length(spellings[0], scores)
    assert [match.score for match in best] == sorted(match.score for match in best) and len(best) == 10
    better = scores[scores < best[-1].score - 1e-6, None]
    assert (abs(better - [match.score for match in best]).min(1) < 1e-6).all()
    for m in ahead + best:  # distance: at 2,001 points
        assert m.length == length(m.tree)
        assert m.score == pytest.approx(distance(lambda x: evaluate(m.tree, x), curve, False), abs=4e-3)

def test_what_a_curve_is_near_to():
    """tanh(x + 1) is what the scan sees of tanh(bias(x)); then its scalar is fitted. For positive inputs |x|
    is x and relu(-x) constant. 2 * softplus(x), clipped where hardly an input lies, gains less than 1e-6."""
    found, best = Space('identity,bias,tanh,left,add').nearest(lambda x: torch.tanh(x + 0.6))
    assert found[-1].score < 1e-4 < 0.05 < best[0].score
    (positive, *_), (everywhere, *_) = SPACE.nearest(torch.abs, P * (X > 0))[0], SPACE.nearest(torch.abs)[0]
    assert positive.score < 1e-6 < 0.1 < everywhere.score
    with pytest.raises(ValueError, match='constant'):
        SPACE.nearest(F.relu(-X), P * (X > 0))
    matches = Space('identity,const,softplus,add,mul').nearest(lambda x: (x + torch.sqrt(x * x + 4)) / 2)[0]
    assert np.diff([match.score for match in matches]).max() < -1e-6

def test_keys_are_equal_for_what_is_equal_to_1e_6(spellings):
    """As many as there are functions, compared one by one; also up to scale and shift, correlated by +-1."""
    f = spellings[1][np.unique(spellings[1].numpy().round(12), axis=0, return_index=True)[1]]
    made = torch.cat([part.values for part in SPACE.made(SPACE.binary, SPACE.rows)])
    equal, alike = torch.cdist(f, f, p=np.inf) <= 1e-6 * f.abs().amax(1), torch.corrcoef(f).abs() > 1 - 1e-12
    for same, ways, other in (equal, (), f * (1 + 1e-13)), (alike, (True, True), 7 - 3 * f):
        assert len(set(keys(made, *ways))) == (same.int().argmax(1) == torch.arange(len(f))).sum()
        assert (keys(f, *ways) == keys(other, *ways)).all()
    assert not any((keys(f) == keys(other)).any() for other in (f + 1e-5 * X, -f, 2 * f))
    assert (keys(f, scale=True) == keys(-3 * f, scale=True)).all()
    assert len(set(keys(5 + 1e-15 * f, True, True))) == 1  # constants

def proposed(grid=X, **collected):
    """By `steepest`, from what a cell with ReLU has collected, at the space's points or on another grid."""
    cell = SimpleNamespace(grid=grid, bins=torch.arange(len(grid)), typical=F.relu, **collected)
    return steepest(SPACE, cell, 0.8)

def spread(v):
    """(97,) values -> (193,) with the same sums over functions that are linear between the points."""
    return torch.cat([v - F.pad(v[1:], (0, 1)) / 2 - F.pad(v[1:], (1, 0)) / 2, v[1:]])

@pytest.mark.parametrize('seed, early', [(0, P), (3, P), (0, torch.softmax(X - X.square(), 0))])
def test_steepest_is_what_brute_force_finds(seed, early, spellings):
    """The score is the slope of a loss, half the squared difference from some curve, by a step of 1e-7. Trust
    region and rules against what stands still are what the docstring says. Of nothing nothing is proposed."""
    noise, s = torch.randn(97, generator=torch.Generator().manual_seed(seed)).double(), F.relu(X)
    f = spellings[1] * ((P @ s.square()) / (spellings[1].square() @ P)).sqrt()[:, None]
    far = ((f - s).square() @ P / (P @ s.square())).sqrt()
    varies = (f - (f @ early)[:, None]).square() @ early > 0.6 * (f.square() @ early)
    moves = (torch.gradient(f, spacing=10 / 96, dim=1)[0].abs() > 0.01).double() @ early > 0.25
    slope = ((noise + 1e-7 * (f - s)).square() @ P - noise.square() @ P) / 2e-7
    scores = torch.where((far > 0.1) & (far < 0.8) & varies & moves, slope, torch.inf).numpy()
    found = front(proposed(gradient=P * noise, inputs=P, early=early))
    assert [match[:2] for match in found] == best_by_length(spellings[0], scores)
    wide = torch.cat([X * (1 + (X.abs() == 5)), X[1:] - 5 / 96])
    other = front(proposed(wide, gradient=spread(P * noise), inputs=spread(P), early=spread(early)))
    assert [match[:2] for match in other] == [pytest.approx(match[:2], abs=1e-9) for match in found]
    assert not any(proposed(gradient=p, inputs=p, early=0 * P) for p in (P, 0 * P))

def test_deep_goes_on_from_the_best_of_two_stages():
    shallow, found = (space.nearest(F.hardswish)[0] for space in (SPACE, Space(SMALL, shape='deep')))
    for match in shallow:
        assert min(m.score for m in found if m.length <= match.length) <= match.score + 1e-6
    assert found[-1].score < 0.6 * shallow[-1].score

@pytest.mark.parametrize('ops, clip, shape, curve', [
    ('base,swish', 10.0, 'core', lambda x: torch.exp(-x * x)), ('relu,tanh,right', 10.0, 'paper', torch.tanh),
    ('base,periodic', None, 'core', lambda x: torch.sinc(x / torch.pi)),
    ('exp,sinh,cube,mul,sub', None, 'paper', lambda x: x ** 21),
    ('const,bias,mix,gate', 10.0, 'paper', lambda x: torch.sigmoid(x + 1))])
def test_every_shape_and_set_of_operations(ops, clip, shape, curve):
    """A function of the space is found, also where nothing bounds the others."""
    ahead, best = Space(ops, clip, shape).nearest(curve)
    assert min(match.score for match in ahead) < 1e-6
    values = torch.stack([evaluate(match.tree, X, clip) for match in best])
    assert (torch.corrcoef(values).abs() > 1 - 1e-13).tril(-1).sum() == 0  # none twice, with another shift

def test_random_functions():
    """Reproducible by seed, no constant, no line; each is found whatever its scale and shift."""
    few = Space('identity,const,relu,tanh,add,left,right')
    trees = [random_function(few, seed) for seed in range(100)]
    assert trees[:20] == [random_function(few, seed) for seed in range(20)] and len(set(trees)) > 30
    assert all(nonlinearity(lambda x: evaluate(tree, x)) > 0.01 for tree in trees)
    for tree in trees[:5]:
        found = few.nearest(-3 * evaluate(tree, X) + 7)[0][-1]
        assert found.score < 1e-6 and found.length <= length(tree)
    with pytest.raises(ValueError, match='straight lines'):
        random_function(Space('identity,add'), 0)

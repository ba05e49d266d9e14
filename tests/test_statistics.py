"""evaluate.py's statistics against hand-worked numbers, a printed table, numpy and scipy."""
import math

import numpy as np
import pytest

from ledger import compare, nameless, t_quantile, together, verdict


@pytest.mark.parametrize('freedom, t', [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228),
                                        (29, 2.045), (120, 1.980)])
def test_t_quantile_against_the_printed_table(freedom, t):
    """The table of Student's t in every textbook, column 0.975."""
    assert round(t_quantile(freedom), 3) == t


@pytest.mark.parametrize('share', [0.5, 0.9, 0.95, 0.99])
def test_t_quantile_against_scipy(share):
    """All degrees of freedom that a comparison of up to 60 seeds has."""
    stats = pytest.importorskip('scipy.stats')
    for freedom in range(1, 60):
        assert t_quantile(freedom, share) == pytest.approx(stats.t.ppf((1 + share) / 2, freedom), rel=1e-6)


def test_compare_by_hand():
    """Differences 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, half width 4.303 * 0.1 / sqrt(3) = 0.2484."""
    c = compare({0: 1.1, 1: 1.2, 2: 1.3}, {0: 1.0, 1: 1.0, 2: 1.0, 7: 5.0}, higher=True)
    assert (c.n, c.wins) == (3, 3) and c.mean == pytest.approx(0.2) and c.half == pytest.approx(0.24841, abs=1e-4)
    assert compare({0: 1.1, 1: 1.2, 2: 1.3}, {0: 1.0, 1: 1.0, 2: 1.4}, higher=False).wins == 1  # a lower loss wins


def test_compare_against_numpy():
    """Ten seeds, paired by seed and not by their place; the interval is that of scipy's paired t test."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 0.1, 10), rng.normal(1.05, 0.1, 10)
    c = compare({k: a[k] for k in reversed(range(10))}, {k: b[k] for k in range(10)}, higher=False)
    d = a - b
    assert c.mean == pytest.approx(d.mean()) and c.wins == (d < 0).sum()
    assert c.half == pytest.approx(2.26216 * d.std(ddof=1) / math.sqrt(10), rel=1e-5)
    low, high = pytest.importorskip('scipy.stats').ttest_rel(a, b).confidence_interval()
    assert (c.mean - c.half, c.mean + c.half) == pytest.approx((low, high))


@pytest.mark.parametrize('differences, higher, diverged, expected', [
    ([0.1, 0.11, 0.12], True, (0, 0), 'better'), ([0.1, 0.11, 0.12], False, (0, 0), 'worse'),
    ([-0.1, -0.11, -0.12], False, (0, 0), 'better'), ([0.1, -0.1, 0.05], True, (0, 0), 'cannot tell with 3 seeds'),
    ([0.1], True, (0, 0), 'cannot tell with 1 seed'), ([0.0], True, (0, 0), 'cannot tell with 1 seed'),
    ([], True, (0, 0), 'cannot tell with 0 seeds'), ([0.0, 0.0], True, (0, 0), 'the same'),
    ([0.1, 0.11, 0.12], True, (2, 0), 'worse: 2 diverged'), ([0.1, -0.1], True, (1, 1), 'cannot tell with 2 seeds'),
    ([0.1, -0.1], True, (0, 3), 'better: the reference diverged more often')])
def test_verdict(differences, higher, diverged, expected):
    """In words; better only when the 95 % interval leaves out zero, and never with one seed."""
    c = compare(dict(enumerate(differences)), {k: 0.0 for k in range(len(differences))}, higher)
    assert verdict(c, higher, *diverged) == expected


def test_searches_taken_together():
    """Two found functions, means by hand; a third from elsewhere does not count."""
    settings = dict(model='toy', data='cifar10_16')

    def rows(name, searched, *losses):
        return [dict(name=name, searched=searched, seed=seed, settings=settings, diverged=loss is None, test_loss=loss)
                for seed, loss in enumerate(losses)]
    ledger = [*rows('relu', '', 1.0, 1.2), *rows('gelu', '', 0.8, 1.0), *rows('grafs_gpt_2', '', 0.1, 0.1),
              *rows('random_0', '', 2.0, 2.0), *rows('random_1', '', None, 2.0),
              *rows('a', 'toy/cifar10_16', 0.9, 1.0), *rows('b', 'toy/cifar10_16', 1.1, 1.2), *rows('c', 'resnet20/cifar10', 0.0, 0.0)]
    head, reference, best, random = together(ledger, 'relu', 'loss').splitlines()
    assert 'The 2 functions' in head
    # a: -0.1 and -0.2, so -0.15; b: 0.1 and 0, so 0.05: mean -0.05, standard deviation 0.1414, half 12.706 * 0.1.
    # Seed 0: -0.1 and 0.1, so 0; seed 1: -0.2 and 0, so -0.1: the same mean, half 12.706 * 0.05.
    assert 'minus relu' in reference and '-0.0500; 1 of 2 better' in reference
    assert 'over searches -1.3206 to +1.2206, over training seeds -0.6853 to +0.5853' in reference
    assert 'minus gelu' in best and '+0.1500' in best and '0 of 2' in best
    assert 'minus random_0' in random and '2 of 2' in random
    assert together([row for row in ledger if row['name'] != 'b'], 'relu', 'loss') == ''
    # One function under two names: chance between searches is not seen.
    same = [row | {'name': name} for row in ledger for name in ([row['name']] if row['name'] != 'a' else ['a', 'b']) if row['name'] != 'b']
    assert '-0.1500; 2 of 2 better on average; 95 % interval over searches none (all found one function)' in together(same, 'relu', 'loss')
    # A diverged run counts as such and in no mean; a function that diverged on all seeds has none.
    worse = [*ledger, *rows('d', 'toy/cifar10_16', None, 1.3), *rows('e', 'toy/cifar10_16', None)]
    head, reference, *_ = together(worse, 'relu', 'loss').splitlines()
    assert 'The 4 functions' in head and '2 of their runs diverged' in head
    assert '+0.0000; 1 of 3 better' in reference  # -0.15, 0.05 and 0.1 on seed 1


def test_one_function_whatever_its_name_and_bound():
    """The name never matters; the clip bound matters where something is clipped; function, seed and settings always do."""
    def key(**changes):
        return nameless(dict(name='a', expression='elu(x)', clip=10.0, seed=0, settings={'lr': 0.1}) | changes)
    assert key() == key(name='b') == key(clip=None) == key(clip=2.0)
    assert key(expression='square(x)') == key(expression='square(x)', name='b') != key(expression='square(x)', clip=None)
    assert len({key(), key(expression='silu(x)'), key(seed=1), key(settings={'lr': 0.2})}) == 4

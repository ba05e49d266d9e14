"""evaluate.py's statistics against hand-worked numbers, a printed table, numpy and scipy."""
import math

import numpy as np
import pytest

from evaluate import compare, t_quantile, verdict


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

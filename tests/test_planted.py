"""Does the searcher search? Two planted functions come back; tests/planted.py does it for many, with the statistics."""
import pytest

import first_experiments
import planted
from activation import named


@pytest.mark.parametrize('name', ['|x|', 'SiLU'])
def test_a_planted_function_is_found(name):
    """Equal up to output scale and shift, within 2 % of its standard deviation: stricter than the table's measure, which
    allows for an input scale too, and by which SiLU is close to GELU."""
    row = planted.searched(name, seed=0)
    assert row['strict'] < planted.CLOSE, row


def test_the_measure_tells_functions_apart():
    """2 % is close: at one input scale the nearest two of the planted functions are further from each other."""
    functions = [named(expression) for expression, _ in planted.PLANTED.values()]
    gaps = [planted.distance(f, g, rescale=False) for f in functions for g in functions if f is not g]
    assert min(gaps) > planted.CLOSE


def test_report_counts():
    """Hits, medians and the share, by hand."""
    rows = [{'planted': 'SiLU', 'method': method, 'distance': d, 'strict': 2 * d, 'seconds': s}
            for method, d, s in (('search', 0.01, 10), ('search', 0.03, 20), ('search', 0.0, 60), ('random', 0.5, 10))]
    text = planted.report(rows)
    assert '| SiLU | 3 | 2 | 1 | 1.00 % | 3.00 % | 20, 60 | 0 of 1 | 0 |' in text and '2 of 3 searches came within 2 %: 67 %; 1 at' in text
    assert text.endswith('0 of 1 random searches came within 2 %: 0 %; 0 at the same input scale')
    assert planted.report([{**rows[0], 'planted': '|x|'}]).splitlines()[2].startswith(r'| \|x\| | 1 |')  # else a column too many


def test_report_of_the_first_experiments():
    """Medians over what did not diverge, pairs by function and seed, by hand."""
    def row(setting, teacher, seed, distance):
        return {'experiment': 'basic search' if setting == 'as it is' else 'clip bound', 'setting': setting, 'teacher': teacher, 'seed': seed,
                'loss': 2 * distance, 'distance': distance, 'diverged': distance != distance, 'skipped': 3}
    rows = [row('as it is', 'a', 0, 0.01), row('as it is', 'a', 1, 0.5), row('as it is', 'b', 0, 0.0), row('as it is', 'b', 1, 0.01),
            row('2.0', 'b', 1, float('nan')), row('2.0', 'b', 0, 0.4), row('2.0', 'a', 1, 0.0), row('2.0', 'a', 0, 0.01)]
    lines = first_experiments.report(rows).splitlines()[2:]
    assert lines == ['| basic search | as it is | 4 | 0.0200 | 1.0 % | 3 | 0, 0 | 0 | 12 |', '| clip bound | 2.0 | 4 | 0.0200 | 1.0 % | 2 | 1, 2 | 1 | 12 |']

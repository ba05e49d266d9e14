"""ops.py: every operation against Python's own mathematics, written a second time."""
import math

import pytest
import torch

from ops import ALL, BINARY, UNARY, select

P = 0.7  # the scalar
REFERENCE = {  # without the clip
    'identity': 'a', 'neg': '-a', 'abs': 'abs(a)', 'square': 'a ** 2', 'cube': 'a ** 3', 'bias': 'a + P',
    'scale': 'P * a', 'const': 'P', 'sqrt': 'sqrt(a) if a > 1e-8 else 0', 'exp': 'exp(min(a, 80))',
    'sinh': 'sinh(max(-80, min(a, 80)))', 'tanh': 'tanh(a)', 'asinh': 'asinh(a)', 'atan': 'atan(a)',
    'relu': 'max(a, 0)', 'min0': 'min(a, 0)', 'sigmoid': '1 / (1 + exp(-a))', 'erf': 'erf(a)',
    'softplus': 'max(a, 0) + log1p(exp(-abs(a)))', 'silu': 'a / (1 + exp(-a))', 'add': 'a + b',
    'gelu': 'a * erfc(-a / 2 ** 0.5) / 2', 'elu': 'a if a > 0 else expm1(a)', 'sub': 'a - b',
    'leaky_relu': 'max(a, 0.01 * a)', 'mul': 'a * b', 'max': 'max(a, b)', 'min': 'min(a, b)', 'left': 'a',
    'gate': 'b / (1 + exp(-a))', 'right': 'b', 'mix': 'a / (1 + exp(-P)) + b / (1 + exp(P))', 'sin': 'sin(a)',
    'cos': 'cos(a)', 'sinc': 'sin(a) / a', 'log_abs': 'log(max(abs(a), 1e-4))',
    'cosh': 'cosh(max(-80, min(a, 80)))', 'gauss': 'exp(-a ** 2)',
    'div': 'a / (b - 1e-3 if b < 0 else b + 1e-3)', 'laplace': 'exp(-abs(a - b))',
    'rbf': 'exp(-(a - b) ** 2)'}
PAIRS = [(a, b) for a in (0.3, -0.4, 1e-3, 3.0, -3.1, 12.0, 100.0, -100.0) for b in (0.2, -0.7, 2.9, -90.0)]

@pytest.mark.parametrize('name', REFERENCE)
def test_values_and_slopes(name):
    """Values as the reference's, with the clip; slopes as differences of values: 0 where the clip acts. In
    float32 both are finite at 0, at the threshold of sqrt and far out."""
    function, op = eval(f'lambda a, b: {REFERENCE[name]}', {**vars(math), 'P': P}), ALL[name]
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in zip(*PAIRS))
    for clip in (10.0, 2.0, None):
        def apply(a, b):
            return op(a, b, torch.tensor(P).double(), clip=clip) + 0 * (a + b)
        bound = clip if op.clips and clip else math.inf
        want = [float(max(-bound, min(function(*pair), bound))) for pair in PAIRS]
        torch.testing.assert_close(apply(a, b).tolist(), want, rtol=1e-7, atol=1e-12)
        torch.autograd.gradcheck(apply, (a, b), atol=1e-6, rtol=1e-5)
    x, p = torch.tensor([0.0, 1e-8, -1e-8, 88.0, -88.0, 1e4, -1e4], requires_grad=True), torch.tensor(P)
    y = op(x, x.flip(0), p.requires_grad_()) + 0 * x
    gradients = torch.autograd.grad(y.sum(), (x, p), allow_unused=True)
    assert all(value.isfinite().all() for value in (y, *gradients) if value is not None)
    assert (gradients[1] is not None) == (op.scalar is not None)  # the scalar learns

def test_select():
    """Sets, single operations and a minus. The paper has 23 unary and 9 binary operations."""
    assert set(REFERENCE) == set(ALL) and (len(UNARY), len(BINARY)) == (23, 9)
    unary, binary = ([op.name for op in ops] for ops in select('base,periodic,-sinh'))
    assert {'sin', 'sinc'} < set(unary) and 'sinh' not in unary and (len(unary), len(binary)) == (25, 9)
    assert not {'silu', 'gelu', 'elu', 'leaky_relu'} & {op.name for op in select('no-composites')[0]}
    assert [op.name for op in select('tanh, add,relu')[0]] == ['tanh', 'relu']
    assert select('-sinh,base') == select('base,-sinh')
    for text, word in ('base,tahn', 'mean tanh.*one of: base,'), ('tanh', 'no binary'), ('', 'no unary'):
        with pytest.raises(ValueError, match=word):
            select(text)

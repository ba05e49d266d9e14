"""ops.py: every operation against mathematics written a second time."""
import math

import numpy as np
import pytest
import torch

import ops
from ops import ALL, OpError, select

POINTS = [0.0, 1e-6, -1e-6, 0.5, -0.5, 3.0, -3.0, 100.0, -100.0]
SIGMOID = lambda x: float(1 / (1 + np.exp(-np.float64(x))))
PHI = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))
NORMAL = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def clipped(value, slope):
    """The paper's rule with l = 10: held at +-10 with slope 0 where the value is larger."""
    return lambda x: (value(x), slope(x)) if abs(value(x)) <= 10 else (math.copysign(10, value(x)), 0.0)


# name -> x -> (value, slope), by hand; p = 0.7 is the scalar where there is one
UNARY = {
    'identity': lambda x: (x, 1), 'neg': lambda x: (-x, -1), 'abs': lambda x: (abs(x), np.sign(x)),
    'square': clipped(lambda x: x * x, lambda x: 2 * x), 'cube': clipped(lambda x: x ** 3, lambda x: 3 * x * x),
    'sqrt': lambda x: (math.sqrt(x), 0.5 / math.sqrt(x)) if x > 1e-8 else (0, 0),
    'bias': lambda x: (x + 0.7, 1), 'scale': lambda x: (0.7 * x, 0.7), 'const': lambda x: (0.7, 0),
    'exp': clipped(lambda x: math.exp(x), lambda x: math.exp(x)),
    'sinh': clipped(lambda x: math.sinh(x), lambda x: math.cosh(x)),
    'tanh': lambda x: (math.tanh(x), 1 - math.tanh(x) ** 2), 'asinh': lambda x: (math.asinh(x), 1 / math.hypot(x, 1)),
    'atan': lambda x: (math.atan(x), 1 / (1 + x * x)), 'relu': lambda x: (max(x, 0), float(x > 0)),
    'min0': lambda x: (min(x, 0), float(x <= 0)), 'sigmoid': lambda x: (SIGMOID(x), SIGMOID(x) * SIGMOID(-x)),
    'softplus': lambda x: (np.logaddexp(0, x), SIGMOID(x)),
    'erf': lambda x: (math.erf(x), 2 / math.sqrt(math.pi) * math.exp(-x * x)),
    'silu': lambda x: (x * SIGMOID(x), SIGMOID(x) * (1 + x * SIGMOID(-x))),
    'gelu': lambda x: (x * PHI(x), PHI(x) + x * NORMAL(x)),
    'elu': lambda x: (x, 1) if x > 0 else (math.expm1(x), math.exp(x)),
    'leaky_relu': lambda x: (x, 1) if x > 0 else (0.01 * x, 0.01),
    'sin': lambda x: (math.sin(x), math.cos(x)), 'cos': lambda x: (math.cos(x), -math.sin(x)),
    'sinc': lambda x: (math.sin(x) / x, (x * math.cos(x) - math.sin(x)) / x ** 2) if abs(x) > 1e-3 else (1, -x / 3),
    'log_abs': lambda x: (math.log(max(abs(x), 1e-4)), 1 / x if abs(x) > 1e-4 else 0),
    'cosh': clipped(lambda x: math.cosh(x), lambda x: math.sinh(x)),
    'gauss': lambda x: (math.exp(-x * x), -2 * x * math.exp(-x * x)),
}
G = SIGMOID(0.7)
BINARY = {  # name -> (a, b) -> (value, d/da, d/db)
    'add': lambda a, b: (a + b, 1, 1), 'sub': lambda a, b: (a - b, 1, -1),
    'mul': lambda a, b: (a * b, b, a) if abs(a * b) <= 10 else (math.copysign(10, a * b), 0, 0),
    'max': lambda a, b: (max(a, b), float(a > b), float(b > a)), 'min': lambda a, b: (min(a, b), float(a < b), float(b < a)),
    'gate': lambda a, b: (SIGMOID(a) * b, SIGMOID(a) * SIGMOID(-a) * b, SIGMOID(a)),
    'mix': lambda a, b: (G * a + (1 - G) * b, G, 1 - G), 'left': lambda a, b: (a, 1, 0), 'right': lambda a, b: (b, 0, 1),
    'div': lambda a, b: ((a / (d := b + math.copysign(1e-3, b)), 1 / d, -a / d ** 2) if abs(a / (b + math.copysign(1e-3, b))) <= 10
                         else (math.copysign(10, a / (b + math.copysign(1e-3, b))), 0, 0)),
    'laplace': lambda a, b: ((e := math.exp(-abs(a - b))), -np.sign(a - b) * e, np.sign(a - b) * e),
    'rbf': lambda a, b: ((e := math.exp(-(a - b) ** 2)), -2 * (a - b) * e, 2 * (a - b) * e),
}


def test_every_operation_is_checked():
    assert set(UNARY) | set(BINARY) == set(ALL)
    assert (len(ops.UNARY), len(ops.BINARY)) == (23, 9)  # the paper's counts


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', UNARY)
def test_unary_value_and_slope(name, dtype):
    op = ALL[name]
    x = torch.tensor(POINTS, dtype=dtype, requires_grad=True)
    y = op(x, scalar=torch.tensor(0.7, dtype=dtype) if op.scalar is not None else None) + 0 * x
    slope, = torch.autograd.grad(y.sum(), x)
    expected = np.array([UNARY[name](p) for p in POINTS], float)
    assert np.isfinite(y.detach().numpy()).all() and np.isfinite(slope.numpy()).all()
    rtol = 1e-4 if dtype == torch.float32 else 1e-6
    np.testing.assert_allclose(y.detach().numpy(), expected[:, 0], rtol=rtol, atol=2e-5 if dtype == torch.float32 else 1e-9)
    # at 0 itself kinks have no slope; torch and these tables may take either side's
    kinks = {'abs', 'relu', 'min0', 'leaky_relu', 'elu'}
    keep = [k for k, p in enumerate(POINTS) if not (name in kinks and p == 0)]
    np.testing.assert_allclose(slope.numpy()[keep], expected[keep, 1], rtol=1e-3 if dtype == torch.float32 else 1e-5,
                               atol=2e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize('name', BINARY)
def test_binary_value_and_slopes(name):
    op = ALL[name]
    pairs = [(a, b) for a in (0.3, -0.4, 3.0, -3.1, 100.0, -100.0) for b in (0.2, -0.7, 2.9, -3.0, 99.0, -99.0)]
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in zip(*pairs))
    y = op(a, b, scalar=torch.tensor(0.7, dtype=torch.float64) if op.scalar is not None else None) + 0 * (a + b)
    da, db = torch.autograd.grad(y.sum(), (a, b))
    expected = np.array([BINARY[name](*pair) for pair in pairs], float)
    for got, want in zip((y.detach(), da, db), expected.T):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)
    zeros = torch.zeros(1, requires_grad=True)
    value = op(zeros, zeros, scalar=torch.tensor(0.7) if op.scalar is not None else None) + zeros
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), zeros)[0].isfinite().all()


@pytest.mark.parametrize('clip', [2.0, 50.0, None])
def test_clip_is_an_option(clip):
    y = ALL['square'](torch.tensor([1.0, 5.0, 20.0]), clip=clip)
    assert y.tolist() == [1.0, min(25.0, clip or 25.0), min(400.0, clip or 400.0)]
    assert ALL['neg'](torch.tensor([100.0]), clip=clip).item() == -100.0  # linear growth is never clipped


def test_scalars_get_gradient():
    b = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([1.0, 2.0])
    assert torch.autograd.grad(ALL['scale'](x, scalar=b).sum(), b)[0] == 3.0
    assert torch.autograd.grad(ALL['const'](x, scalar=b).sum(), b)[0] == 2.0


def test_select():
    unary, binary = select('base,periodic,-sinh')
    assert {'sin', 'cos', 'sinc'} < {op.name for op in unary} and 'sinh' not in {op.name for op in unary}
    assert len(unary) == 25 and len(binary) == 9
    assert not {'silu', 'gelu', 'elu', 'leaky_relu'} & {op.name for op in select('no-composites')[0]}
    assert [op.name for op in select('tanh,add,relu')[0]] == ['tanh', 'relu']
    for text, word in (('base,tahn', 'did you mean tanh?'), ('tanh', 'no binary'), ('add', 'no unary'), ('', 'no unary')):
        with pytest.raises(OpError, match=word.replace('?', r'\?')):
            select(text)

"""The operations a cell is built from: 23 unary and 9 binary ones, and optional sets.

Paper: Strack, Safari, Hutter, 'Efficient Search for Customized Activation Functions with Gradient Descent',
arXiv 2408.06820 (GRAFS), section 3.1. The optional sets follow Ramachandran et al., arXiv 1710.05941 (Swish).

TO ADD AN OPERATION, add one line to UNARY or BINARY below (or to one of the optional sets) and nothing else:

    Op('softsign', torch.nn.functional.softsign, 'softsign({a})'),

The name is what expressions use, the function takes one tensor (two for a binary operation), the last text is what a
formula prints. A fourth word, `scalar=1.0`, gives it a learnable scalar; `clips=True` bounds its output.
"""
import difflib
from dataclasses import dataclass
from typing import Callable, Iterable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 10.0  # the paper's bound l on the output of operations that grow faster than linearly


class OpError(ValueError):
    """A name that is no operation and no set of operations. The message lists the valid ones."""


@dataclass(frozen=True)
class Op:
    """One elementary operation.

    name:     as written in an expression, e.g. 'tanh'
    function: takes the input tensor(s), then the learnable scalar if there is one
    formula:  text with {a}, {b} for the inputs and {p} for the scalar
    scalar:   initial value of the learnable scalar (the paper's beta or gamma); None: it has none
    clips:    unbounded beyond linear, so that its output is clipped at l
    level:    how tightly the formula binds: 1 a sum, 2 a product, 3 a power, 4 a function call
    needs:    the level below which each input is put in brackets; the default suits 'name({a})'
    """
    name: str
    function: Callable[..., Tensor]
    formula: str
    scalar: Optional[float] = None
    clips: bool = False
    level: int = 4
    needs: tuple[int, ...] = (0, 0)

    def __call__(self, *inputs: Tensor, scalar: Optional[Tensor] = None, clip: Optional[float] = CLIP) -> Tensor:
        """Apply the operation; the inputs broadcast, the result has their common shape.

        clip: the paper's l: an output y with |y| > l becomes l*sign(y), with gradient 0. None: no clipping.
        """
        y = self.function(*inputs) if self.scalar is None else self.function(*inputs, scalar)
        # clamp is that very rule: the value is held at +-l, and no gradient passes where it is.
        return y.clamp(-clip, clip) if self.clips and clip is not None else y


# subtle: a clipped output has gradient 0, but 0 * inf is NaN. These two keep the inner gradient finite, in float32,
# for every x: exp(80) = 5.5e34 is beyond any bound anyone sets, and below the largest float32, 3.4e38.
def _exp(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=80))


def _hyperbolic(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.clamp(-80, 80))


def _sqrt(x: Tensor) -> Tensor:
    # The slope of sqrt is infinite at 0; below 1e-8 the function is taken as 0, which bounds the slope by 5,000.
    return torch.where(x > 1e-8, torch.sqrt(x.clamp(min=1e-8)), torch.zeros_like(x))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    # a / (b + eps) with eps taking the sign of b, so that the denominator is never 0.
    return a / torch.where(b < 0, b - 1e-3, b + 1e-3)


UNARY = (
    Op('identity', lambda x: x, '{a}'),
    Op('neg', torch.neg, '-{a}', level=1, needs=(2,)),
    Op('abs', torch.abs, '|{a}|'),
    Op('square', torch.square, '{a}^2', clips=True, level=3, needs=(4,)),
    Op('cube', lambda x: x * x * x, '{a}^3', clips=True, level=3, needs=(4,)),
    Op('sqrt', _sqrt, 'sqrt({a})'),
    Op('bias', lambda x, b: x + b, '{a} + {p}', scalar=1.0, level=1, needs=(1,)),
    Op('scale', lambda x, b: b * x, '{p} * {a}', scalar=1.0, level=2, needs=(2,)),
    Op('const', lambda x, b: torch.zeros_like(x) + b, '{p}', scalar=1.0),
    Op('exp', _exp, 'exp({a})', clips=True),
    Op('sinh', _hyperbolic(torch.sinh), 'sinh({a})', clips=True),
    Op('tanh', torch.tanh, 'tanh({a})'),
    Op('asinh', torch.asinh, 'asinh({a})'),
    Op('atan', torch.atan, 'atan({a})'),
    Op('relu', F.relu, 'relu({a})'),
    Op('min0', lambda x: x.clamp(max=0), 'min({a}, 0)'),
    Op('sigmoid', torch.sigmoid, 'sigmoid({a})'),
    Op('softplus', F.softplus, 'softplus({a})'),
    Op('erf', torch.erf, 'erf({a})'),
    Op('silu', F.silu, 'silu({a})'),
    Op('gelu', F.gelu, 'gelu({a})'),
    Op('elu', F.elu, 'elu({a})'),
    Op('leaky_relu', F.leaky_relu, 'leaky_relu({a})'),
)

BINARY = (
    Op('add', torch.add, '{a} + {b}', level=1, needs=(1, 2)),
    Op('sub', torch.sub, '{a} - {b}', level=1, needs=(1, 2)),
    Op('mul', torch.mul, '{a} * {b}', clips=True, level=2, needs=(2, 2)),
    Op('max', torch.maximum, 'max({a}, {b})'),
    Op('min', torch.minimum, 'min({a}, {b})'),
    Op('gate', lambda a, b: torch.sigmoid(a) * b, 'sigmoid({a}) * {b}', level=2, needs=(0, 2)),
    Op('mix', lambda a, b, g: b + torch.sigmoid(g) * (a - b), 'mix({a}, {b}, {p})', scalar=0.0),
    Op('left', lambda a, b: a, '{a}'),
    Op('right', lambda a, b: b, '{b}'),
)

# The optional sets, off by default: each is (more unary operations, more binary operations).
PERIODIC = ((
    Op('sin', torch.sin, 'sin({a})'),
    Op('cos', torch.cos, 'cos({a})'),
    Op('sinc', lambda x: torch.sinc(x / torch.pi), 'sinc({a})'),  # sin(x) / x, and 1 at 0
), ())

SWISH = ((
    Op('log_abs', lambda x: torch.log(x.abs().clamp(min=1e-4)), 'log|{a}|', clips=True),
    Op('cosh', _hyperbolic(torch.cosh), 'cosh({a})', clips=True),
    Op('gauss', lambda x: torch.exp(-x * x), 'exp(-{a}^2)', needs=(4,)),
), (
    Op('div', _divide, '{a} / ({b} +- 0.001)', clips=True, level=2, needs=(2, 0)),
    Op('laplace', lambda a, b: torch.exp(-(a - b).abs()), 'exp(-|{a} - {b}|)', needs=(1, 2)),
    Op('rbf', lambda a, b: torch.exp(-(a - b).square()), 'exp(-({a} - {b})^2)', needs=(1, 2)),
))

COMPOSITES = ('silu', 'gelu', 'elu', 'leaky_relu')  # known activations, left out by the set 'no-composites'

SETS: dict[str, tuple[tuple[Op, ...], tuple[Op, ...]]] = {
    'base': (UNARY, BINARY),
    'periodic': PERIODIC,
    'swish': SWISH,
    'no-composites': (tuple(op for op in UNARY if op.name not in COMPOSITES), BINARY),
}

# Every operation by name: what the parser of expressions knows.
ALL: dict[str, Op] = {op.name: op for unary, binary in SETS.values() for op in unary + binary}
BINARY_NAMES = {op.name for _, binary in SETS.values() for op in binary}


def arity(op: Op) -> int:
    """How many inputs an expression gives to `op`: 2 for binary operations, 1 for unary ones, 0 for the constant."""
    return 2 if op.name in BINARY_NAMES else int('{a}' in op.formula)


def nearest(name: str, valid: Iterable[str]) -> str:
    """' (did you mean tanh?)' for the valid name closest to `name`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f' (did you mean {close[0]}?)' if close else ''


def valid(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError, one line with the valid choices and the nearest, when `value` is none of them."""
    if value not in choices:
        raise ValueError(f"unknown {what} '{value}'{nearest(value, choices)}; valid: {', '.join(choices)}")


def select(text: str = 'base') -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The unary and binary operations that `text` names, each once, in the order of ALL.

    text: sets and operations with commas between: 'base', 'base,periodic', 'no-composites', 'base,-sinh,-cube' (a
        minus takes one out), or a list of operations such as 'identity,relu,tanh,add,mul'.
    Raises OpError for an unknown name, and when no unary or no binary operation is left.
    """
    chosen: set[str] = set()
    for word in filter(None, (w.strip() for w in text.split(','))):
        name = word.removeprefix('-')
        if name in SETS:
            names = {op.name for ops in SETS[name] for op in ops}
        elif name in ALL:
            names = {name}
        else:
            raise OpError(f"unknown operation or set '{name}' in --ops{nearest(name, [*SETS, *ALL])}; "
                          f"sets: {', '.join(SETS)}; operations: {', '.join(ALL)}")
        chosen = chosen - names if word.startswith('-') else chosen | names
    unary = tuple(op for op in ALL.values() if op.name in chosen and op.name not in BINARY_NAMES)
    binary = tuple(op for op in ALL.values() if op.name in chosen and op.name in BINARY_NAMES)
    if not unary or not binary:
        raise OpError(f"--ops '{text}' leaves no {'binary' if unary else 'unary'} operation; "
                      f"a cell needs at least one of each kind, e.g. --ops base")
    return unary, binary

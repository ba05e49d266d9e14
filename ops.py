"""The operations a cell is built from, 23 unary and 9 binary ones and optional sets, and expressions made of them.

Paper: Strack, Safari, Hutter, 'Efficient Search for Customized Activation Functions with Gradient Descent',
arXiv 2408.06820 (GRAFS), section 3.1. The optional sets follow Ramachandran et al., arXiv 1710.05941 (Swish).

TO ADD AN OPERATION, add one line to UNARY or BINARY below (or to one of the optional sets) and nothing else:

    Op('softsign', torch.nn.functional.softsign, 'softsign({a})'),

The name is what expressions use, the function takes one tensor (two for a binary operation), the last text is what a
formula prints. A fourth word, `scalar=1.0`, gives it a learnable scalar; `clips=True` bounds its output.
"""
import difflib
import math
import re
from dataclasses import dataclass
from typing import Callable, Iterable, NamedTuple, Optional, Union

import torch
import torch.nn as nn
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


# ---------------------------------------------------------------------------------------------------------------------
# Expressions: a result is text, `mul(sigmoid(x), scale(x, 0.5))`. Parsed here, never by eval.

class ExpressionError(ValueError):
    """A text that is no expression. The message says what is wrong, where, and what would be right."""


class Node(NamedTuple):
    """One operation in an expression. inputs: Nodes or 'x'; scalar: index into the activation's scalars, or None."""
    op: Op
    inputs: tuple
    scalar: Optional[int]


Tree = Union[Node, str]
MAX_LENGTH, MAX_DEPTH, MAX_NODES = 10_000, 50, 500  # far beyond any cell; bounds what a hostile file can cost
TOKEN = re.compile(r'\s*(?:([A-Za-z_]\w*)|([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|([(),]))')


def simple(op: Op, inputs: tuple, scalar: Optional[int]) -> Tree:
    """A Node, or the input itself where the operation only passes it on: identity(a) and left(a, b) are a."""
    if op.name in ('identity', 'left', 'right'):
        return inputs[op.name == 'right']
    return Node(op, inputs, scalar)


def parse(text: str) -> tuple[Tree, list[float]]:
    """The tree of an expression and its scalars, in the order in which they stand in the text.

    >>> parse('mul(sigmoid(x), scale(x, 0.5))')[1]
    [0.5]

    A scalar that is not written takes its initial value. Raises ExpressionError, and nothing else, for any text.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f'the expression has {len(text)} characters; the limit is {MAX_LENGTH}')
    tokens, position = [], 0
    while text[position:].strip():
        match = TOKEN.match(text, position)
        if not match:
            here = text[position:].lstrip()
            raise ExpressionError(f"unexpected {here[:12]!r} at character {len(text) - len(here) + 1} of the expression; "
                                  f"an expression looks like mul(sigmoid(gelu(x)), elu(x))")
        tokens.append((match.group(match.lastindex), match.lastindex, match.start(match.lastindex) + 1))
        position = match.end()
    tokens.append(('the end', 3, len(text) + 1))
    scalars: list[float] = []
    at = nodes = 0

    def take(expected: str) -> None:
        nonlocal at
        token, _, place = tokens[at]
        if token != expected:
            raise ExpressionError(f"expected '{expected}' but found '{token[:40]}' at character {place} of the expression")
        at += 1

    def expression(depth: int) -> Tree:
        nonlocal at, nodes
        (name, kind, place), nodes = tokens[at], nodes + 1
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise ExpressionError(f'the expression is too large: more than {MAX_DEPTH} levels or {MAX_NODES} operations')
        if kind != 1:
            hint = '; a number stands last in scale, bias, mix, or in const(2)' if kind == 2 else ''
            raise ExpressionError(f"expected x or an operation but found '{name[:40]}' at character {place}{hint}")
        at += 1
        if name == 'x':
            return 'x'
        if name not in ALL:
            raise ExpressionError(f"unknown operation '{name[:40]}' at character {place}{nearest(name, ALL)}; "
                                  f"valid: {', '.join(ALL)}")
        op, inputs, scalar = ALL[name], [], None
        take('(')
        for k in range(arity(op)):
            if k:
                take(',')
            inputs.append(expression(depth + 1))
        if op.scalar is not None:
            value = op.scalar
            if inputs and tokens[at][0] == ',':
                at += 1
            if tokens[at][1] == 2:
                value, at = float(tokens[at][0]), at + 1
            if not abs(value) < 1e30:  # also refuses a literal that overflows to infinity
                raise ExpressionError(f'the scalar of {name} at character {place} is {value}; its size must be below 1e30')
            scalar = len(scalars)
            scalars.append(value)
        take(')')
        return simple(op, tuple(inputs), scalar)

    tree = expression(1)
    take('the end')
    return tree, scalars


class Activation(nn.Module):
    """A discrete activation function: an expression with its learnable scalars as parameters.

    >>> f = Activation('mul(sigmoid(gelu(x)), elu(x))')
    >>> f.formula
    'clip(sigmoid(gelu(x)) * elu(x))'
    >>> f(torch.zeros(1))               # sigmoid(0) * 0
    tensor([0.])

    expression: see `parse`. clip: the paper's l, the bound on outputs of operations that grow faster than linearly;
    None for none. Takes and returns any shape. Raises ExpressionError for a text that is no expression.
    """

    def __init__(self, expression: str, clip: Optional[float] = CLIP):
        super().__init__()
        self.tree, values = parse(expression)
        self.scalars = nn.ParameterList([nn.Parameter(torch.tensor(value)) for value in values])
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        def value(tree: Tree) -> Tensor:
            if tree == 'x':
                return x
            # a constant has no input of its own; x gives it its shape
            inputs = [value(node) for node in tree.inputs] or [x]
            scalar = None if tree.scalar is None else self.scalars[tree.scalar].to(x.dtype)
            return tree.op(*inputs, scalar=scalar, clip=self.clip)
        return value(self.tree)

    @property
    def expression(self) -> str:
        """The expression with the current scalars. `Activation(f.expression, f.clip)` is the same function, exactly."""
        def text(tree: Tree) -> str:
            if tree == 'x':
                return 'x'
            words = [text(node) for node in tree.inputs]
            if tree.scalar is not None:
                words.append(f'{self.scalars[tree.scalar].item():.9g}')  # 9 digits hold a float32 without loss
            return f'{tree.op.name}({", ".join(words)})'
        return text(self.tree)

    @property
    def formula(self) -> str:
        """Ordinary mathematical notation, scalars to 3 digits; clip(y) stands for max(-l, min(l, y))."""
        def text(tree: Tree) -> tuple[str, int]:
            if tree == 'x':
                return 'x', 4
            words = {}
            for key, node, need in zip('ab', tree.inputs, tree.op.needs):
                word, level = text(node)
                words[key] = word if level >= need else f'({word})'
            if tree.scalar is not None:
                words['p'] = f'{self.scalars[tree.scalar].item():.3g}'
            word = tree.op.formula.format(**words).replace('+ -', '- ')
            return (f'clip({word})', 4) if tree.op.clips and self.clip is not None else (word, tree.op.level)
        return text(self.tree)[0]

    def extra_repr(self) -> str:
        return self.expression


# Known activations by name: (expression, clip). The standard ones are not clipped.
NAMED: dict[str, tuple[str, Optional[float]]] = {
    **{name: (f'{name}(x)', None) for name in ('relu', 'leaky_relu', 'elu', 'silu', 'gelu', 'tanh', 'sigmoid', 'softplus')},
    'identity': ('x', None),
    'relu2': ('square(relu(x))', None),
    'mish': ('mul(x, tanh(softplus(x)))', None),
    # Found by the paper's authors and left in their released code, without a word on which run they came from.
    'grafs_resnet_1': ('mul(sigmoid(relu(x)), gelu(x))', CLIP),
    'grafs_resnet_2': ('mul(sigmoid(relu(x)), elu(x))', CLIP),
    'grafs_resnet_3': ('mul(sigmoid(gelu(x)), gelu(x))', CLIP),
    'grafs_resnet_4': ('mul(sigmoid(leaky_relu(gelu(x))), leaky_relu(x))', CLIP),
    'grafs_vit': ('mul(sigmoid(gelu(square(silu(x)))), silu(x))', CLIP),
    'grafs_gpt_1': ('mul(silu(mul(sigmoid(relu(x)), gelu(x))), silu(x))', CLIP),
    # 0.43 * silu(sigmoid(silu(x)) * x^2) + 0.57 * silu(x): the weight is sigmoid(gamma), gamma = log(0.43 / 0.57)
    'grafs_gpt_2': ('mix(silu(mul(sigmoid(silu(x)), square(x))), silu(x), -0.28185115)', CLIP),
}


def named(text: str) -> Activation:
    """The activation of a known name or of an expression. Raises ExpressionError, naming the nearest known name."""
    text = text.strip()
    if text in NAMED:
        return Activation(*NAMED[text])
    if re.fullmatch(r'\w+', text) and text != 'x':
        raise ExpressionError(f"unknown activation '{text[:40]}'{nearest(text, NAMED)}; known: {', '.join(NAMED)}; "
                              f"or give an expression such as 'mul(sigmoid(x), x)'")
    return Activation(text)


@torch.no_grad()
def distance(found: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor]) -> float:
    """How far `found` is from `target`: the RMS difference under N(0, 1), as a share of the target's standard
    deviation, after the best input scale, output scale and output shift (a network can make up for those)."""
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    p = torch.softmax(-x.square() / 2, 0)
    y = target(x)
    y = y - (p * y).sum()
    best = 1.0
    for scale in [sign * 2 ** (k / 8) for k in range(-16, 17) for sign in (1, -1)]:
        f = found(scale * x)
        f = f - (p * f).sum()
        gain = (p * f * y).sum() / (p * f * f).sum().clamp(min=1e-12)
        best = min(best, ((p * (gain * f - y).square()).sum() / (p * y * y).sum()).sqrt().item())
    return best


@torch.no_grad()
def bend(f: Callable[[Tensor], Tensor]) -> float:
    """How far `f` is from a straight line: what the best line leaves of its standard deviation under N(0, 1), from 0
    for a line to 1. A network with a line for its activation is a linear map; nan for a constant."""
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    p = torch.softmax(-x.square() / 2, 0)
    y = f(x).double().expand(x.shape)
    y = y - (p * y).sum()
    variance = (p * y * y).sum()
    slope = (p * x * y).sum() / (p * x * x).sum()
    return ((p * (y - slope * x).square()).sum() / variance).sqrt().item() if variance > 1e-12 else math.nan

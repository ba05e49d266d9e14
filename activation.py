"""An activation function as text: parsed, printed, evaluated, compared. It is what a search finds.

    f = Activation('mul(sigmoid(gelu(x)), elu(x))')      a module; its learned scalars are parameters
    f.expression, f.formula                              the text again, and mathematics
    named('gelu'), named('relu2'), named('grafs_vit')    known functions

A result is text, `mul(sigmoid(x), scale(x, 0.5))`: parsed here, never by eval, never pickled, and printed without loss.
This room split off from ops.py, which had become two things: the operations, and what is built from them.
"""
import math
import re
from typing import Callable, NamedTuple, Optional, Union

import torch
import torch.nn as nn
from torch import Tensor

from ops import ALL, CLIP, Op, arity, nearest


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
        return self.value(self.tree, x)

    def value(self, tree: Tree, x: Tensor) -> Tensor:
        """Of a part of the tree. subtle: a method, because a nested function that calls itself is a reference cycle,
        which would keep every x alive until the garbage collector comes by: half as much memory again in training."""
        if tree == 'x':
            return x
        # a constant has no input of its own; x gives it its shape
        inputs = [self.value(node, x) for node in tree.inputs] or [x]
        scalar = None if tree.scalar is None else self.scalars[tree.scalar].to(x.dtype)
        return tree.op(*inputs, scalar=scalar, clip=self.clip)

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

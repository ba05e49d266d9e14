"""An activation function as text: parsed, printed, evaluated, compared. It is what a search finds.

    f = Activation('mul(sigmoid(gelu(x)), elu(x))')      a module; its learned scalars are parameters
    f.expression, f.formula                              the text again, and mathematics
    named('gelu'), named('relu2'), named('grafs_vit')    known functions

A result is text, `mul(sigmoid(x), scale(x, 0.5))`: parsed here, never by eval, never pickled, and printed without loss.
This room split off from ops.py, which had become two things: the operations, and what is built from them.
"""
import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
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
    >>> Activation('sub(add(x, x), neg(max(x, const(0))))').simplified().formula
    '2 * x + relu(x)'

    expression: see `parse`. clip: the paper's l, the bound on outputs of operations that grow faster than linearly;
    None for none. Takes and returns any shape. Raises ExpressionError for a text that is no expression.
    """

    def __init__(self, expression: str, clip: Optional[float] = CLIP):
        super().__init__()
        self.tree, values = parse(expression)
        self.scalars = nn.ParameterList([nn.Parameter(torch.tensor(value)) for value in values])
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        # half precision in, half precision out, but float32 inside: exp overflows float16 from 11.1 on
        inside = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.value(self.tree, inside).to(x.dtype)

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
    def valued(self) -> Tree:
        """The tree with the current values of the scalars in it."""
        return with_values(self.tree, [scalar.item() for scalar in self.scalars])

    @property
    def expression(self) -> str:
        """The expression with the current scalars. `Activation(f.expression, f.clip)` is the same function, exactly."""
        return write(self.valued, digits=9)

    @property
    def formula(self) -> str:
        """Ordinary notation, scalars to 3 digits; clip(y) stands for max(-l, min(l, y)), written only where it can act."""
        return mathematics(self.valued, self.clip)

    @property
    def latex(self) -> str:
        """The formula for LaTeX's mathematics mode; needs amsmath for \\operatorname."""
        return mathematics(self.valued, self.clip, latex=True)

    def simplified(self) -> 'Activation':
        """The shortest equal function that the rules of `rewritten` find. Scalars that meet are merged into one, and a
        rule may bring in a scalar that was none, x + x = 2 * x: it is learnable like any other."""
        tree = shortest(self.valued, self.clip)
        try:
            found = Activation(write(tree), self.clip)
        except ExpressionError:  # merged scalars beyond 1e30
            return Activation(self.expression, self.clip)
        if len(self.scalars):
            found.to(self.scalars[0])
        for scalar, value in zip(found.scalars, parse(write(tree))[1]):
            scalar.data.fill_(value)  # float64 scalars have more digits than the constructor keeps
        return found

    def module(self, note: str = '') -> str:
        """The text of a Python file with this function as `Found`, a module that needs torch alone. note: its origin."""
        return module_text(self.valued, self.formula, self.clip, note)

    def extra_repr(self) -> str:
        return self.expression


# ---------------------------------------------------------------------------------------------------------------------
# Writing. From here on a tree carries the values of its scalars where `parse` leaves their indices.

def with_values(tree: Tree, values: list[float]) -> Tree:
    """The tree with the index of each scalar replaced by its value."""
    if tree == 'x':
        return tree
    scalar = None if tree.scalar is None else values[tree.scalar]
    return Node(tree.op, tuple(with_values(node, values) for node in tree.inputs), scalar)


def write(tree: Tree, digits: int = 17) -> str:
    """The expression as text; 9 digits hold a float32 without loss, 17 a float64."""
    if tree == 'x':
        return 'x'
    words = [write(node, digits) for node in tree.inputs]
    if tree.scalar is not None:
        words.append(f'{tree.scalar:.{digits}g}')
    return f'{tree.op.name}({", ".join(words)})'


def length(tree: Tree) -> int:
    """How many words an expression has: its operations and its x."""
    return 1 if tree == 'x' else 1 + sum(map(length, tree.inputs))


def mathematics(tree: Tree, clip: Optional[float], latex: bool = False) -> str:
    """Ordinary notation, scalars to 3 digits; clip(y) stands for max(-l, min(l, y)), written only where it can act."""
    def number(value: float) -> str:
        word = f'{value:.3g}'
        return re.sub(r'e\+?(-?)0*(\d+)', r' \\cdot 10^{\1\2}', word) if latex else word

    def bracket(word: str) -> str:
        return rf'\left({word}\right)' if latex else f'({word})'

    def text(tree: Tree) -> tuple[str, int]:
        if tree == 'x':
            return 'x', 4
        op, words = tree.op, {}
        template, level, needs = op.formula, op.level, op.needs
        if op.name == 'mix':  # its two weights themselves, not the gamma that makes them
            weight = sigmoid(tree.scalar)
            template, level, needs = '{p} * {a} + {q} * {b}', 1, (2, 2)
            words = {'p': number(weight), 'q': number(1 - weight)}
        elif tree.scalar is not None:
            words['p'] = number(tree.scalar)
            level = 1 if op.name == 'const' and words['p'].startswith('-') else level
        for key, node, need in zip('ab', tree.inputs, needs):
            word, inner = text(node)
            words[key] = word if inner >= need else bracket(word)
        template = latex_template(template) if latex else template
        word = template.format(**words).replace('+ -', '- ').replace('- -', '+ ')
        if can_clip(tree, clip):
            return (r'\operatorname{clip}' if latex else 'clip') + bracket(word), 4
        return word, level
    return text(tree)[0]


LATEX = {'sigmoid': r'\sigma', 'relu': r'\operatorname{{ReLU}}', '*': r'\cdot', '+-': r'\pm', '(': r'\left(',
         ')': r'\right)',
         **{name: '\\' + name for name in ('exp', 'sinh', 'cosh', 'tanh', 'sin', 'cos', 'max', 'min', 'log')}}


def latex_template(template: str) -> str:
    r"""'sigmoid({a}) * {b}' -> '\sigma\left({a}\right) \cdot {b}', still to be filled in by str.format."""
    if template == 'sqrt({a})':
        return r'\sqrt{{{a}}}'
    bars = iter((r'\left|', r'\right|'))  # no operation's formula has more than one pair

    def token(match: re.Match) -> str:
        word = match[0]
        if word == '|' or word.startswith('{'):
            return next(bars) if word == '|' else word
        return LATEX.get(word, r'\operatorname{{' + word.replace('_', r'\_') + '}}')
    return re.sub(r'\{\w\}|[A-Za-z_]{2,}|\+-|[|*()]', token, template)


# ---------------------------------------------------------------------------------------------------------------------
# Simplifying: rewriting rules that hold for every x, each makes the expression shorter or puts it in a standard order.
# Where a rule needs to know that a clip is idle or a sign is fixed, it asks for the range that a node's values can take.

ODD = ('sinh', 'tanh', 'asinh', 'atan', 'erf', 'cube')           # f(-a) = -f(a), rising
RISING = (*ODD, 'sqrt', 'exp', 'relu', 'min0', 'sigmoid', 'softplus', 'elu', 'leaky_relu')
EVEN = ('abs', 'square', 'cosh', 'log_abs', 'gauss', 'cos', 'sinc')   # f(-a) = f(a)
LINEAR = ('neg', 'scale', 'bias', 'add', 'sub', 'mix')
COMMUTATIVE = ('add', 'mul', 'max', 'min', 'laplace', 'rbf')
MONOMIALS = {2: ('square',), 3: ('cube',), 4: ('square', 'square'), 6: ('square', 'cube'), 8: ('square',) * 3,
             9: ('cube', 'cube'), 12: ('square', 'square', 'cube'), 18: ('square', 'cube', 'cube'), 27: ('cube',) * 3}
# Straight on both sides of 0, so that each is a sum of two others
PIECEWISE = {'relu': ({'identity': 1, 'min0': -1}, {'identity': 0.5, 'abs': 0.5}, {'abs': 1, 'min0': 1}),
             'min0': ({'identity': 1, 'relu': -1}, {'identity': 0.5, 'abs': -0.5}, {'relu': 1, 'abs': -1}),
             'abs': ({'relu': 2, 'identity': -1}, {'identity': 1, 'min0': -2}, {'relu': 1, 'min0': -1}),
             'leaky_relu': ({'identity': 0.01, 'relu': 0.99}, {'identity': 1, 'min0': -0.99})}
# name -> operations that are nowhere below it, on the same input
BELOW = {'min0': 'identity elu leaky_relu relu abs silu gelu softplus', 'identity': 'elu leaky_relu relu abs softplus',
         'elu': 'relu abs softplus', 'leaky_relu': 'relu abs softplus', 'relu': 'abs softplus',
         'silu': 'relu abs softplus', 'gelu': 'relu abs softplus', 'neg': 'abs', 'tanh': 'elu relu abs softplus',
         'atan': 'abs relu softplus', 'asinh': 'abs relu softplus'}


def sigmoid(p: float) -> float:
    return torch.sigmoid(torch.tensor(p, dtype=torch.float64)).item()


def make(name: str, *inputs: Tree, scalar: Optional[float] = None) -> Tree:
    return simple(ALL[name], inputs, scalar)


def is_op(tree: Tree, *names: str) -> bool:
    return tree != 'x' and tree.op.name in names


def value_of(tree: Tree) -> Optional[float]:
    """The value of a constant; None for anything else."""
    return tree.scalar if is_op(tree, 'const') else None


# Ranges are proved piece by piece of the real line: interval arithmetic is sharp where the pieces are short.
EDGES = torch.tensor([-math.inf, -100, -30, *range(-16, -6), *(k / 8 for k in range(-48, 49)), *range(7, 17), 30, 100,
                      math.inf], dtype=torch.float64)


@functools.lru_cache(20_000)
def ranges(tree: Tree, clip: Optional[float]) -> tuple[Tensor, Tensor]:
    """(pieces,) lowest and highest values, for x between EDGES; intervals that hold them, not always the narrowest."""
    if tree == 'x':
        return EDGES[:-1], EDGES[1:]
    op, inputs = tree.op, [ranges(node, clip) for node in tree.inputs]
    if op.name == 'const':
        return (torch.full_like(EDGES[1:], tree.scalar),) * 2
    if op.name in LINEAR:
        terms, constant = linear(tree)
        low = high = torch.full_like(EDGES[1:], constant)
        for base, k in terms.items():
            ends = [k * end for end in ranges(base, clip)]
            low, high = low + ends[k < 0], high + ends[k > 0]
        return low.nan_to_num(-math.inf, math.inf, -math.inf), high.nan_to_num(math.inf, math.inf, -math.inf)

    def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # subtle: 0 * inf is 0 here
        ends = torch.stack([(u * v).nan_to_num(0.0, math.inf, -math.inf) for u in a for v in b])
        return ends.amin(0), ends.amax(0)

    if inputs and all(torch.equal(low, high) for low, high in inputs):  # constants: any operation, also one of your own
        scalar = None if tree.scalar is None else torch.tensor(tree.scalar, dtype=torch.float64)
        return (op(*(low for low, _ in inputs), scalar=scalar, clip=clip),) * 2
    limit = clip if op.clips and clip is not None else math.inf
    (low, high), other = inputs[0], inputs[-1]
    if op.name in RISING:
        low, high = op(low, clip=None), op(high, clip=None)
    elif op.name in ('silu', 'gelu'):  # falls to a dip, then rises
        dip, left, right = (-0.27847, -1.279, -1.278) if op.name == 'silu' else (-0.17, -0.752, -0.7517)
        at = op(low).nan_to_num(0.0), op(high).nan_to_num(0.0, math.inf)
        low, high = torch.where(high <= left, at[1], torch.where(low >= right, at[0], dip)), torch.maximum(*at)
    elif op.name in ('abs', 'square', 'cosh', 'log_abs', 'gauss'):
        near = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
        ends = op(near, clip=None), op(torch.maximum(low.abs(), high.abs()), clip=None)
        low, high = torch.minimum(*ends), torch.maximum(*ends)
    elif op.name in ('max', 'min'):
        low, high = op(low, other[0]), op(high, other[1])
    elif op.name == 'mul':
        low, high = product((low, high), other)
    elif op.name == 'gate':
        low, high = product((torch.sigmoid(low), torch.sigmoid(high)), other)
    elif op.name == 'div' and bool((low == 0).all() and (high == 0).all()):
        pass
    else:
        ends = {'sin': (-1, 1), 'cos': (-1, 1), 'sinc': (-0.218, 1), 'laplace': (0, 1), 'rbf': (0, 1)}
        low, high = (torch.full_like(low, end) for end in ends.get(op.name, (-math.inf, math.inf)))
    return low.clamp(-limit, limit), high.clamp(-limit, limit)


def bounds(tree: Tree, clip: Optional[float]) -> tuple[float, float]:
    """An interval that holds every value of the tree, for all real x."""
    low, high = ranges(tree, clip)
    return low.min().item(), high.max().item()


def can_clip(tree: Node, clip: Optional[float]) -> bool:
    """Whether the bound on the output of this operation can ever act."""
    if clip is None or not tree.op.clips:
        return False
    if is_op(tree, 'mul') and tree.inputs[0] == tree.inputs[1]:
        tree = make('square', tree.inputs[0])
    low, high = bounds(Node(dataclasses.replace(tree.op, clips=False), tree.inputs, tree.scalar), clip)
    return not (-clip <= low and high <= clip)


@functools.lru_cache(20_000)
def linear(tree: Tree) -> tuple[dict[Tree, float], float]:
    """The tree as a sum: {base: factor, ...} and a constant; 2 * x - tanh(x) + 1 is {x: 2, tanh(x): -1} and 1."""
    name = '' if tree == 'x' else tree.op.name
    if name == 'const':
        return {}, tree.scalar
    if name not in LINEAR:
        return {tree: 1.0}, 0.0
    p = tree.scalar
    weight = sigmoid(p) if name == 'mix' else 0.0
    factors = {'neg': (-1.0,), 'scale': (p,), 'bias': (1.0,), 'add': (1.0, 1.0), 'sub': (1.0, -1.0),
               'mix': (weight, 1.0 - weight)}[name]
    terms, constant = {}, p if name == 'bias' else 0.0
    for factor, node in zip(factors, tree.inputs):
        terms, constant = plus(terms, constant, factor, *linear(node))
    return terms, constant


def plus(terms: dict[Tree, float], constant: float, factor: float, more: dict[Tree, float], more_constant: float,
         ) -> tuple[dict[Tree, float], float]:
    """terms + constant + factor * (more + more_constant)."""
    def added(a: float, b: float) -> float:
        return 0.0 if abs(a + b) <= 1e-13 * (abs(a) + abs(b)) else a + b  # what rounding leaves of a zero is a zero
    total = dict(terms)
    for base, k in more.items():
        total[base] = added(total.get(base, 0.0), factor * k)
    return {base: k for base, k in total.items() if k != 0}, added(constant, factor * more_constant)


def scaled(k: float, tree: Tree) -> Tree:
    if abs(abs(k) - 1) < 1e-13:
        return tree if k > 0 else make('neg', tree)
    return make('scale', tree, scalar=k)


def pair(k: float, a: Tree, m: float, b: Tree) -> Tree:
    """The shortest way to write k*a + m*b, for k and m that are not 0."""
    ways = [make('add', scaled(k, a), scaled(m, b)), make('sub', scaled(k, a), scaled(-m, b)),
            make('sub', scaled(m, b), scaled(-k, a))]  # of ways of the same length the first counts
    if abs(k - m) <= 1e-13 * abs(k):
        ways.append(scaled(k, make('add', a, b)))
    if abs(k + m) <= 1e-13 * abs(k):
        ways += [scaled(k, make('sub', a, b)), scaled(m, make('sub', b, a))]
    if k * m > 0:
        ways.append(scaled(k + m, make('mix', a, b, scalar=math.log(k / m))))
    return min(ways, key=length)


def total(terms: list[tuple[float, Tree]]) -> Tree:
    """The shortest way to write the sum of these terms, as far as sums of two at a time go."""
    if len(terms) == 1:
        return scaled(*terms[0])
    ways = []
    for i, (m, b) in enumerate(terms):
        rest = terms[:i] + terms[i + 1:]
        for k in {1.0, rest[0][0], sum(k for k, _ in rest)} - {0.0} if len(rest) > 1 else {rest[0][0]}:
            ways.append(pair(k, total([(factor / k, base) for factor, base in rest]), m, b))
    return min(ways, key=length)


def other_forms(base: Tree) -> list[tuple[dict[Tree, float], float]]:
    """Sums that equal this base: relu(a) is a - min(a, 0) and (a + |a|) / 2, silu(a) is silu(-a) + a, ..."""
    if not is_op(base, 'relu', 'min0', 'abs', 'leaky_relu', 'silu', 'gelu', 'softplus', 'sigmoid'):
        return []
    name, a = base.op.name, base.inputs[0]
    if name in PIECEWISE:
        sums = []
        for way in PIECEWISE[name]:
            form: tuple[dict[Tree, float], float] = {}, 0.0
            for function, k in way.items():
                form = plus(*form, k, *linear(make(function, a)))
            sums.append(form)
        return sums
    minus_a = a.inputs[0] if is_op(a, 'neg') else make('neg', a)
    mirrored = {make(name, minus_a): 1.0 if name != 'sigmoid' else -1.0}
    return [(mirrored, 1.0) if name == 'sigmoid' else plus(mirrored, 0.0, 1.0, *linear(a))]


def shortest_sum(tree: Tree) -> Tree:
    """The shortest sum that equals this one; the tree itself where none is shorter."""
    def written(terms: dict[Tree, float], constant: float) -> Tree:
        if not terms:
            return make('const', scalar=constant)
        body = total([(k, base) for base, k in terms.items()])
        return body if constant == 0 else make('bias', body, scalar=constant)

    terms, constant = linear(tree)
    if len(terms) > 5:
        return tree  # only in expressions far larger than a cell
    forms = [(terms, constant)]
    for base, k in terms.items():
        rest = {other: m for other, m in terms.items() if other != base}
        forms += [plus(rest, constant, k, *form) for form in other_forms(base)]
    return min([tree, *(written(*form) for form in forms)], key=length)


def at_least(a: Tree, b: Tree, clip: Optional[float]) -> bool:
    """Whether a >= b is certain for every x."""
    if a == b or is_op(a, 'max') and b in a.inputs or is_op(b, 'min') and a in b.inputs:
        return True
    def readings(tree: Tree) -> list[tuple[str, Tree]]:
        unary = tree != 'x' and len(tree.inputs) == 1
        return [('identity', tree)] + ([(tree.op.name, tree.inputs[0])] if unary else [])
    for name_a, of_a in readings(a):
        for name_b, of_b in readings(b):
            if of_a == of_b and name_a in BELOW.get(name_b, '').split():
                return True
    if is_op(a, 'abs') and a.inputs[0] in larger(b, clip):
        return True
    if is_op(b, 'neg') and is_op(b.inputs[0], 'abs') and b.inputs[0].inputs[0] in larger(a, clip):
        return True
    return bool((ranges(make('sub', a, b), clip)[0] >= 0).all())


def larger(tree: Tree, clip: Optional[float]) -> list[Tree]:
    """Trees s, the tree itself among them, such that |tree| <= |s| for every x."""
    found = [tree]
    if is_op(tree, 'tanh', 'asinh', 'atan', 'sin', 'leaky_relu', 'silu', 'gelu', 'elu', 'relu', 'min0', 'abs', 'neg', 'gate'):
        found += larger(tree.inputs[-1], clip)
    if is_op(tree, 'mul'):
        for small, other in (tree.inputs, tree.inputs[::-1]):
            if max(map(abs, bounds(small, clip))) <= 1:
                found += larger(other, clip)
    return found


def power(tree: Tree) -> tuple[Tree, int]:
    """(a, n) where the tree is a to the n by squares and cubes."""
    if not is_op(tree, 'square', 'cube'):
        return tree, 1
    base, n = power(tree.inputs[0])
    return base, n * (2 if is_op(tree, 'square') else 3)


def rewritten(tree: Node, clip: Optional[float]) -> Tree:
    """The tree after one rule at its root; the same tree where none applies. Its inputs are simplified already."""
    name, p = tree.op.name, tree.scalar
    low, high = bounds(tree, clip)
    if low == high and math.isfinite(low):
        return make('const', scalar=low + 0.0)
    if name in LINEAR and (shorter := shortest_sum(tree)) and length(shorter) < length(tree):
        return shorter
    if name in LINEAR and name not in COMMUTATIVE:
        if name == 'mix' and in_order(*tree.inputs) is False:
            return make('mix', tree.inputs[1], tree.inputs[0], scalar=0.0 - p)  # 0.0 - p is never -0.0
        return tree
    if len(tree.inputs) == 1:
        return unary_rule(tree, clip)
    if len(tree.inputs) == 2:
        for a, b in (tree.inputs, tree.inputs[::-1]) if name in COMMUTATIVE else (tree.inputs,):
            if (found := binary_rule(name, a, b, clip)) is not None:
                return found
        if name in COMMUTATIVE and not in_order(*tree.inputs):
            return make(name, *tree.inputs[::-1])
    return tree


def in_order(a: Tree, b: Tree) -> bool:
    """The order in which inputs stand whose order does not matter."""
    return (length(a), write(a)) <= (length(b), write(b))


def unary_rule(tree: Node, clip: Optional[float]) -> Tree:
    name, a = tree.op.name, tree.inputs[0]
    low, high = bounds(a, clip)
    # what the range of the input decides
    if low >= 0 and name in ('abs', 'relu', 'leaky_relu', 'elu') or high <= 0 and name == 'min0':
        return a
    if high <= 0 and name in ('abs', 'leaky_relu'):
        return scaled(-1.0 if name == 'abs' else 0.01, a)
    if a == 'x' or not a.inputs:
        return tree
    inner, b = a.op.name, a.inputs[0]
    # signs and factors move outwards, where they meet others
    if inner == 'abs' and name in EVEN:
        return make(name, b)
    if inner == 'neg' and name in EVEN:
        return make(name, b)
    if inner == 'neg' and name in (*ODD, 'sin'):
        return make('neg', make(name, b))
    if inner in ('neg', 'scale') and name in ('relu', 'min0', 'abs', 'leaky_relu'):
        k = -1.0 if inner == 'neg' else a.scalar
        if name == 'abs':
            return scaled(abs(k), make('abs', b))
        if k > 0 or name != 'leaky_relu':
            return scaled(k, make(name if k > 0 else {'relu': 'min0', 'min0': 'relu'}[name], b))
    if inner == 'scale' and name in EVEN and a.scalar < 0:
        return make(name, scaled(-a.scalar, b))
    # relu(f(a)) = f(relu(a)) for f with the sign of its input; here relu stands outside
    if inner in ('relu', 'min0') and name in (*ODD, 'silu', 'gelu') or inner == 'abs' and name in ODD:
        return make(inner, make(name, b))
    if name == 'relu' and inner in ('elu', 'leaky_relu'):
        return make('relu', b)
    if name == 'min0' and inner == 'leaky_relu':
        return scaled(0.01, make('min0', b))
    if name == 'sqrt' and inner in ('relu', 'leaky_relu', 'elu'):
        return make('sqrt', b)
    if name == 'square' and inner == 'cube' and (clip is None or clip >= 1):
        return make('cube', make('square', b))
    if name == 'asinh' and inner == 'sinh' and not can_clip(a, clip) and max(map(abs, bounds(b, clip))) <= 80:
        return b
    return tree


def binary_rule(name: str, a: Tree, b: Tree, clip: Optional[float]) -> Optional[Tree]:
    """What `name` of a and b can be rewritten to; None where no rule applies. Commutative operations are asked twice."""
    if name in ('max', 'min'):
        return extreme_rule(name, a, b, clip)
    if name in ('mul', 'div', 'gate'):
        # signs and factors move outwards
        if is_op(b, 'neg') and name != 'div':
            return make('neg', make(name, a, b.inputs[0]))
        if name == 'div' and is_op(a, 'neg'):
            return make('neg', make(name, a.inputs[0], b))
        if name == 'gate' and is_op(b, 'scale'):
            return make('scale', make('gate', a, b.inputs[0]), scalar=b.scalar)
    if name == 'mul':
        return product_rule(a, b, clip)
    if name == 'gate':
        if a == b:
            return make('silu', a)
        if value_of(a) is not None:
            return scaled(sigmoid(value_of(a)), b)
        if value_of(b) is not None:
            return scaled(value_of(b), make('sigmoid', a))
    if name in ('laplace', 'rbf') and a == b:
        return make('const', scalar=1.0)
    if name == 'rbf' and value_of(b) == 0:
        return make('gauss', a)
    return None


def extreme_rule(name: str, a: Tree, b: Tree, clip: Optional[float]) -> Optional[Tree]:
    other = 'min' if name == 'max' else 'max'
    if at_least(a, b, clip):
        return a if name == 'max' else b
    if value_of(b) == 0:
        return make('relu' if name == 'max' else 'min0', a)
    if b == make('neg', a):
        return make('abs', a) if name == 'max' else make('neg', make('abs', a))
    if name == 'max' and is_op(a, 'relu', 'elu', 'leaky_relu') and b == make('neg', a.inputs[0]):
        return make('abs', a.inputs[0])
    if is_op(a, 'neg') and is_op(b, 'neg'):
        return make('neg', make(other, a.inputs[0], b.inputs[0]))
    if is_op(a, *RISING) and is_op(b, a.op.name):
        return make(a.op.name, make(name, a.inputs[0], b.inputs[0]))
    if is_op(a, 'scale') and is_op(b, 'scale') and a.scalar == b.scalar:
        return make('scale', make(name if a.scalar > 0 else other, a.inputs[0], b.inputs[0]), scalar=a.scalar)
    if is_op(a, 'bias') and is_op(b, 'bias') and a.scalar == b.scalar:
        return make('bias', make(name, a.inputs[0], b.inputs[0]), scalar=a.scalar)
    low, high = bounds(b, clip)
    if name == 'max' and is_op(a, 'relu') and low >= 0 or name == 'min' and is_op(a, 'min0') and high <= 0:
        return make(name, a.inputs[0], b)
    return None


def product_rule(a: Tree, b: Tree, clip: Optional[float]) -> Optional[Tree]:
    """a * b, clipped. `fits`: the bound on the product is idle, so that an operation without a bound can stand for it."""
    fits = not can_clip(make('mul', a, b), clip)
    if is_op(a, 'scale') and is_op(b, 'scale'):
        return make('mul', make('scale', a.inputs[0], scalar=a.scalar * b.scalar), b.inputs[0])
    if value_of(b) is not None and fits:
        return scaled(value_of(b), a)
    if value_of(b) is not None and is_op(a, 'scale'):
        return make('mul', a.inputs[0], make('const', scalar=a.scalar * b.scalar))
    if a == b:
        return make('square', a)
    (base, m), (other, n) = power(a), power(b)
    if base == other and m + n in MONOMIALS and (clip is None or clip >= 1):
        result = base
        for step in MONOMIALS[m + n]:
            result = make(step, result)
        return result
    if is_op(a, 'abs') and is_op(b, 'abs'):
        return make('abs', make('mul', a.inputs[0], b.inputs[0]))
    if is_op(a, 'relu', 'min0') and a.inputs[0] == b:
        return make('square', a)
    if is_op(a, 'relu', 'min0') and is_op(b, 'abs') and a.inputs == b.inputs:
        return make('square', a) if is_op(a, 'relu') else make('neg', make('square', a))
    if is_op(a, 'relu') and is_op(b, 'min0') and a.inputs == b.inputs:
        return make('const', scalar=0.0)
    if is_op(a, 'sigmoid') and fits:
        return make('gate', a.inputs[0], b)
    return None


@functools.lru_cache(20_000)
def shortest(tree: Tree, clip: Optional[float]) -> Tree:
    """The tree after all rules, from the inputs up, until none applies."""
    if tree == 'x':
        return tree
    tree = make(tree.op.name, *(shortest(node, clip) for node in tree.inputs), scalar=tree.scalar)
    better = tree if tree == 'x' else rewritten(tree, clip)
    return tree if better == tree else shortest(better, clip)


# ---------------------------------------------------------------------------------------------------------------------
# Exporting: the function as a Python file of its own.

# How an operation is written where it is not simply a function of torch: {a}, {b} inputs, {p} the scalar, {x} the input.
CODE = {
    'neg': '-{a}', 'cube': '{a} * {a} * {a}', 'bias': '{a} + {p}', 'scale': '{p} * {a}',
    'const': 'torch.zeros_like({x}) + {p}',
    'sqrt': 'torch.where({a} > 1e-8, torch.sqrt({a}.clamp(min=1e-8)), torch.zeros_like({a}))',
    'exp': 'torch.exp({a}.clamp(max=80.0))', 'sinh': 'torch.sinh({a}.clamp(-80.0, 80.0))',
    'cosh': 'torch.cosh({a}.clamp(-80.0, 80.0))', 'min0': '{a}.clamp(max=0.0)', 'add': '{a} + {b}', 'sub': '{a} - {b}',
    'mul': '{a} * {b}', 'gate': 'torch.sigmoid({a}) * {b}', 'mix': '{b} + torch.sigmoid({p}) * ({a} - {b})',
    'sinc': f'torch.sinc({{a}} / {math.pi})', 'log_abs': 'torch.log({a}.abs().clamp(min=1e-4))',
    'gauss': 'torch.exp(-{a} * {a})', 'div': '{a} / torch.where({b} < 0, {b} - 1e-3, {b} + 1e-3)',
    'laplace': 'torch.exp(-({a} - {b}).abs())', 'rbf': 'torch.exp(-({a} - {b}).square())',
}

MODULE = '''"""f(x) = {formula}
{clip}{note}
    from activation import Found          # this file is self-contained, copy it anywhere
    model = Network(activation=Found)     # or wherever nn.ReLU() stood: Found()

The scalars are parameters and learn along. Half precision is computed in float32 inside.
"""
import torch
import torch.nn as nn
{imports}

class Found(nn.Module):
    """Any shape in, the same shape out."""

    def __init__(self) -> None:
        super().__init__()
{parameters}
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if x.dtype == torch.float64 else x.float()
{lines}        return {result}.to(x.dtype)
'''


def call_of(op: Op) -> str:
    """'torch.tanh({a})': how a program that has only torch calls this operation. Raises ExpressionError."""
    if op.name in CODE:
        return CODE[op.name]
    name = getattr(op.function, '__name__', '')
    for prefix, namespace in (('torch', torch), ('F', F)):
        if getattr(namespace, name, None) is op.function:
            return f"{prefix}.{name}({{a}}{', {b}' * (arity(op) == 2)}{', {p}' * (op.scalar is not None)})"
    raise ExpressionError(f"operation {op.name} is no function of torch's own: to export it, add a line for it to CODE "
                          f"in activation.py")


def module_text(tree: Tree, formula: str, clip: Optional[float], note: str) -> str:
    lines, parameters, known = [], [], {}

    def value(tree: Tree) -> str:
        """The variable that holds this subtree; a line of its own, written once, computes it."""
        if tree == 'x':
            return 'y'
        words = dict(zip('ab', [value(node) for node in tree.inputs]), x='y')
        if tree.scalar is not None:
            name = f'{tree.op.name}_{len(parameters) + 1}'
            parameters.append(f'        self.{name} = nn.Parameter(torch.tensor({tree.scalar!r}))\n')
            words['p'] = f'self.{name}.to(y.dtype)'
        code = call_of(tree.op).format(**words)
        if can_clip(tree, clip):
            code = f'({code}).clamp({-clip!r}, {clip!r})' if ' ' in code else f'{code}.clamp({-clip!r}, {clip!r})'
        if code not in known:  # the same code is the same value; scalars have names of their own
            known[code] = f'y{len(lines) + 1}'
            lines.append(f'        {known[code]} = {code}\n')
        return known[code]

    result = value(tree)
    clips = f'with clip(y) = max(-{clip:g}, min({clip:g}, y))\n' if 'clip(' in formula else ''
    imports = 'import torch.nn.functional as F\n' if any('F.' in line for line in lines) else ''
    return MODULE.format(formula=formula, imports=imports, clip=clips, note=f'\n{note}\n' if note else '', result=result,
                         parameters=''.join(parameters), lines=''.join(lines))


# ---------------------------------------------------------------------------------------------------------------------
# Known functions, and how to compare them.

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


GALLERY = Path(__file__).resolve().parent / 'results' / 'gallery.json'


class Entry(NamedTuple):
    """A function of the gallery: what a search found, on which model and data, and where it is documented."""
    expression: str
    clip: Optional[float]
    model: str
    data: str
    source: str


def gallery(path: Path = GALLERY) -> dict[str, Entry]:
    """The functions found so far, by name; none where there is no such file. Raises ExpressionError, one line, for a
    file that is damaged.

    The file is one object, name -> {"expression": ..., "clip": 10.0 or null, "model": ..., "data": ..., "from": ...}.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ExpressionError(f'cannot read the gallery {path}: {error}; restore it, or delete it to go on without') from None
    entries = {}
    try:
        for name, entry in content.items():
            entries[name] = Entry(*(entry[key] for key in ('expression', 'clip', 'model', 'data', 'from')))
            clip = entries[name].clip
            if not (clip is None or isinstance(clip, (int, float)) and 0 < clip < 1e12):
                raise TypeError(f'clip {clip} must be a number above 0, or null')
            parse(entries[name].expression)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f'it lacks {error}' if isinstance(error, KeyError) else error
        where = f"entry '{name}'" if entries or isinstance(content, dict) and content else 'it is no object of names'
        raise ExpressionError(f'the gallery {path} is damaged, {where}: {what}') from None
    return entries


def named(text: str) -> Activation:
    """The activation of a known name, of the gallery, or of an expression. Raises ExpressionError, naming the nearest
    known name."""
    text = text.strip()
    if text in NAMED:
        return Activation(*NAMED[text])
    if re.fullmatch(r'[\w-]+', text) and text != 'x':
        found = gallery()
        if text in found:
            return Activation(found[text].expression, found[text].clip)
        known = [*NAMED, *found]
        raise ExpressionError(f"unknown activation '{text[:40]}'{nearest(text, known)}; known: {', '.join(known)}; "
                              f"or give an expression such as 'mul(sigmoid(x), x)'")
    return Activation(text)


@torch.no_grad()
def distance(found: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor], rescale: bool = True) -> float:
    """How far `found` is from `target`: the RMS difference under N(0, 1), as a share of the target's standard
    deviation, after the best input scale (from 1/4 to 4, and their negatives; rescale=False: 1), output scale and output
    shift: a network can make up for those. subtle: with the input scale free, some known functions are close: SiLU is
    0.9 % from GELU, and softplus 1.1 % from SiLU."""
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    p = torch.softmax(-x.square() / 2, 0)
    y = target(x)
    y = y - (p * y).sum()
    best = 1.0
    for scale in [sign * 2 ** (k / 8) for k in range(-16, 17) for sign in (1, -1)] if rescale else [1]:
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

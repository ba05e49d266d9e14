"""Expressions: a function as text, `mul(sigmoid(x), scale(x, 0.5))`. Parsed here, never by eval, and printed without loss.

A tree is 'x' or a Node. `parse` gives a tree whose nodes hold the index of their scalar; the functions after it work on
trees that hold the scalars' values (`with_values`). This room split off from activation.py, which had become too long.
"""
import re
from typing import NamedTuple, Optional, Union

from ops import ALL, Op, arity, nearest


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

"""The shortest expression for a function: rewriting rules that hold for every x.

Most of the 22.7 million expressions are duplicates: max(a, a), -(-a), b * (c * a), sigmoid(a) * a, which is SiLU. Each rule
makes an expression shorter or puts it in a standard order. Where a rule needs to know that a clip is idle or a sign
is fixed, it asks for the range that a node's values can take. `shortest` applies them until none applies.
"""
import dataclasses
import functools
import math
from typing import Optional

import torch
from torch import Tensor

from expression import Node, Tree, length, simple, write
from ops import ALL

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

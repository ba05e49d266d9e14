"""The cell: six choice points that make one activation function, relaxed (`Cell`) and discrete (`Activation`).

    b0 = B0(U0(x), U1(x));   f = B1(U2(b0), U3(x))          U: unary, B: binary   (paper, figure 2)

With 23 unary and 9 binary operations these are 23^4 * 9^2 = 22,667,121 functions. The relaxed cell replaces every
choice by a weighted sum over its operations; the weights come from the alphas, which gradient descent can learn.

The idea that makes it fast (ours): whatever its 110 operations do, the cell is a function of ONE number. So it is
evaluated op by op only on a grid of a few thousand points, and the millions of activations of the network are looked
up in that table (`Lookup`). See `Cell.draw`.
"""
import re
from typing import Callable, NamedTuple, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ops import ALL, CLIP, Op, arity, nearest, select

CHOICES = ('U0', 'U1', 'B0', 'U2', 'U3', 'B1')  # the order in which a cell is evaluated
SAMPLERS = ('dirichlet', 'shared', 'mean', 'softmax')


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
            raise ExpressionError(f"unexpected '{here[:12]}' at character {len(text) - len(here) + 1} of the expression; "
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


def cell_expression(chosen: tuple[Op, ...], scalars: tuple[Optional[float], ...] = (None,) * 6) -> str:
    """The text of the discrete cell with these six operations (and scalars), in the order of CHOICES."""
    def text(k: int, *inputs: str) -> str:
        op = chosen[k]
        if op.name in ('identity', 'left', 'right'):
            return inputs[op.name == 'right']
        words = list(inputs[:arity(op)])
        if op.scalar is not None:
            words.append(f'{op.scalar if scalars[k] is None else scalars[k]:.9g}')
        return f'{op.name}({", ".join(words)})'
    u0, u1 = text(0, 'x'), text(1, 'x')
    return text(5, text(3, text(2, u0, u1)), text(4, 'x'))


def random_expression(generator: torch.Generator, ops: str = 'base') -> str:
    """One cell of the search space, uniformly over its functions' spellings: the control any search must beat."""
    unary, binary = select(ops)
    kinds = [binary if name[0] == 'B' else unary for name in CHOICES]
    return cell_expression(tuple(kind[torch.randint(len(kind), (), generator=generator)] for kind in kinds))


# ---------------------------------------------------------------------------------------------------------------------
# The table: piecewise linear between the points of a uniform grid.

class Lookup(torch.autograd.Function):
    """y = f(x) for a function f known by its values on a uniform grid, linear in between, extrapolated at the ends.

    values (points,) at low + step * (0, 1, ...); x any shape. Exact gradients of the interpolated function: to x the
    slope of its interval, to the values a histogram of the incoming gradient (only where the values ask for it).
    """

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, low: float, step: float) -> Tensor:
        t = (x - low) / step
        i = t.clamp(0, values.numel() - 2).to(torch.int32)
        slope = values[1:] - values[:-1]
        ctx.save_for_backward(x, i, slope)
        ctx.low, ctx.step, ctx.table_grad = low, step, values.requires_grad
        flat = i.flatten()
        return torch.addcmul(values.index_select(0, flat).view_as(x), slope.index_select(0, flat).view_as(x), t - i)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, i, slope = ctx.saved_tensors
        flat = i.flatten()
        dx = slope.index_select(0, flat).view_as(g) * g / ctx.step
        dv = None
        if ctx.needs_input_grad[1]:
            right = (((x - ctx.low) / ctx.step - i) * g).flatten()
            dv = torch.zeros(slope.numel() + 1, dtype=g.dtype, device=g.device)
            dv[:-1].index_add_(0, flat, g.flatten() - right)
            dv[1:].index_add_(0, flat, right)
        return dx, dv, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The relaxed cell.

class Cell(nn.Module):
    """The relaxed cell, shared by every site of a network. `activation=cell.site` makes the network's activations.

    Parameters: alpha[k] (operations of choice k,) and scalars[k] (learnable scalars of choice k,), k in the order of
    CHOICES. They are the architecture; no site holds them, so `network.parameters()` are the weights and only those.

    ops: see ops.select. clip: the paper's l, None for none.
    sampler: how the alphas become weights. 'dirichlet': DrNAS, drawn anew for every site and step (paper, variance
        reduction); 'shared': one draw for all sites (DrNAS as published); 'mean': the mean of that Dirichlet, no noise
        (ours); 'softmax': DARTS.
    standard: name of the activation that `use_standard` puts in the cell's place (warm start).
    normalise: scale each site's table so that its second moment, under the inputs that the site really sees, is that
        of the standard activation (ours): it takes away the reward for gain, which otherwise outweighs shape.
    points, limit: the grid, `points` values on [-limit, limit].
    """

    def __init__(self, ops: str = 'base', clip: Optional[float] = CLIP, sampler: str = 'dirichlet',
                 standard: str = 'relu', normalise: bool = False, points: int = 4096, limit: float = 12.0):
        super().__init__()
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler '{sampler}'{nearest(sampler, SAMPLERS)}; valid: {', '.join(SAMPLERS)}")
        unary, binary = select(ops)
        self.ops = tuple(binary if name[0] == 'B' else unary for name in CHOICES)
        self.clip, self.sampler, self.standard, self.normalise = clip, sampler, named(standard), normalise
        # alphas near 0: elu(alpha) + 1 near 1, the Dirichlet uniform over the simplex
        self.alpha = nn.ParameterList([nn.Parameter(1e-3 * torch.randn(len(ops))) for ops in self.ops])
        self.scalars = nn.ParameterList([nn.Parameter(torch.tensor([op.scalar for op in ops if op.scalar is not None]))
                                         for ops in self.ops])
        self.active = [list(range(len(ops))) for ops in self.ops]  # operations not yet dropped, by choice point
        self.register_buffer('grid', torch.linspace(-limit, limit, points))
        self.limit, self.step = limit, 2 * limit / (points - 1)
        self.sites = 0
        self.tables: Optional[tuple[Tensor, ...]] = None  # one a site; None: the standard activation

    def site(self) -> 'Site':
        """A module for the next place in the network where the activation stands."""
        self.sites += 1
        return Site(self, self.sites - 1)

    # -- from alphas to weights

    def concentration(self, k: int) -> Tensor:
        """(active operations,) the Dirichlet parameters elu(alpha) + 1; torch's sampler is wrong below 1e-3."""
        return (F.elu(self.alpha[k][self.active[k]]) + 1).clamp(min=1e-2)

    def weights(self) -> list[Tensor]:
        """One (rows, active operations) tensor a choice point, each row summing to 1; rows: sites, or 1 when shared."""
        drawn = []
        for k in range(6):
            c = self.concentration(k)
            if len(self.active[k]) == 1:
                w = torch.ones_like(c)[None]
            elif self.sampler == 'dirichlet':
                w = torch.distributions.Dirichlet(c, validate_args=False).rsample((max(self.sites, 1),))
            elif self.sampler == 'shared':
                w = torch.distributions.Dirichlet(c, validate_args=False).rsample((1,))
            elif self.sampler == 'mean':
                w = (c / c.sum())[None]
            else:
                w = self.alpha[k][self.active[k]].softmax(0)[None]
            drawn.append(w)
        return drawn

    # -- the cell itself

    def evaluate(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The relaxed cell, op by op. x: (points,); weights as of `weights()`; returns (rows, points).

        Both the readable reference and what draws the tables: there x is the grid.
        """
        def mixture(k: int, *inputs: Tensor) -> Tensor:
            outputs, position = [], 0
            scalars = self.scalars[k].unbind()
            for j, op in enumerate(self.ops[k]):
                scalar = None if op.scalar is None else scalars[position]
                position += op.scalar is not None
                if j in self.active[k]:
                    outputs.append(op(*inputs, scalar=scalar, clip=self.clip))
            if len(outputs) == 1:
                return outputs[0]
            stack = torch.stack(outputs, -2)                       # (operations, points) or (rows, operations, points)
            return (weights[k][:, None, :] @ stack).squeeze(-2)    # (rows, points)

        b0 = mixture(2, mixture(0, x), mixture(1, x))
        f = mixture(5, mixture(3, b0), mixture(4, x))
        return f.expand(max(w.shape[0] for w in weights), -1) if f.dim() == 1 else f

    def draw(self) -> None:
        """Draw weights for all sites and tabulate the cell: from now on every site looks its inputs up.

        The tables carry gradient to alphas and scalars; inside torch.no_grad() they do not.
        """
        values = self.evaluate(self.grid, self.weights())  # (rows, points)
        self.tables = values.expand(self.sites, -1).unbind(0)

    def use_standard(self) -> None:
        """Put the standard activation in the place of the cell (warm start)."""
        self.tables = None

    # -- shrinking

    def operations(self) -> int:
        """How many operations are left in the six choice points: 110 at first with the base set, 6 when discrete."""
        return sum(map(len, self.active))

    def drop(self) -> str:
        """Drop the operation of lowest alpha from a choice point with the most operations left (paper, section 3.2).

        Returns 'U2:tanh', the choice point and the name. Raises RuntimeError when every choice point has one left.
        """
        k = max(range(6), key=lambda k: len(self.active[k]))
        if len(self.active[k]) == 1:
            raise RuntimeError('the cell is discrete: every choice point has one operation left')
        alpha = self.alpha[k].tolist()
        worst = min(self.active[k], key=lambda j: alpha[j])
        self.active[k].remove(worst)
        return f'{CHOICES[k]}:{self.ops[k][worst].name}'

    def expression(self, chosen: Optional[list[int]] = None) -> str:
        """The discrete cell with the operations of highest alpha (or the chosen ones), as text with its scalars."""
        if chosen is None:
            alpha = [a.tolist() for a in self.alpha]
            chosen = [max(self.active[k], key=lambda j: alpha[k][j]) for k in range(6)]
        picked = tuple(self.ops[k][j] for k, j in enumerate(chosen))
        scalars = []
        for k, j in enumerate(chosen):
            position = sum(op.scalar is not None for op in self.ops[k][:j])
            scalars.append(self.scalars[k][position].item() if picked[k].scalar is not None else None)
        return cell_expression(picked, tuple(scalars))

    def activation(self) -> Activation:
        """The discrete cell as a module of its own."""
        return Activation(self.expression(), self.clip)

    def get_extra_state(self) -> list[list[int]]:
        return self.active

    def set_extra_state(self, state: list[list[int]]) -> None:
        self.active = [list(row) for row in state]


class Site(nn.Module):
    """One place in the network where the activation stands. Any shape in, the same shape out."""

    def __init__(self, cell: Cell, index: int):
        super().__init__()
        self.index = index
        self._cell = (cell,)  # in a tuple, so that the cell's parameters are not registered as the network's

    @property
    def cell(self) -> Cell:
        return self._cell[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.cell.tables is None:
            return self.cell.standard(x)
        return Lookup.apply(x, self.cell.tables[self.index], -self.cell.limit, self.cell.step)

    def extra_repr(self) -> str:
        return f'site {self.index} of {self.cell.sites}'

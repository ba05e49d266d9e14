"""An activation function as text, `mul(sigmoid(x), scale(x, 0.5))`: parsed, evaluated, shortened, exported.
A tree is 'x' or a Node: an operation, its inputs (trees) and the value of its scalar."""
import ast
import functools
import re
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence, Union

import torch
import torch.nn as nn
from torch import Tensor

from ops import ALL, CLIP, Op, arity, check_choice, select

# A cell is data: (choice, its inputs) in order of evaluation. U: unary, B: binary; the last is the output.
CELL = (('U0', 'x'), ('U1', 'x'), ('B0', 'U0', 'U1'), ('U2', 'B0'), ('U3', 'x'), ('B1', 'U2', 'U3'),
        ('U4', 'B1'), ('U5', 'x'), ('B2', 'U4', 'U5'))
SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {'core': CELL[:3], 'paper': CELL[:6], 'deep': CELL}
NUMBER = re.compile(r'-?\d{1,29}(\.\d+)?(e-\d+|e\+[12]\d)?')  # below 1e30, as Python prints it
Clip = Optional[float]  # the paper's l; None: no bound
Tree = Union['Node', str]

class Node(NamedTuple):
    op: Op
    inputs: tuple
    scalar: Optional[float] = None

def node(op: Op, inputs: Sequence[Tree], scalar: Optional[float] = None) -> Tree:
    """The Node; for identity, left and right the input itself. scalar: None for the initial value."""
    if op.code in ('a', 'b'):
        return inputs[op.code == 'b']
    scalar = op.scalar if scalar is None or op.scalar is None else scalar
    return Node(op, () if op.name == 'const' else tuple(inputs), scalar)

def cell_tree(shape: str, ops: Sequence[Op], scalars: Optional[Sequence[Optional[float]]] = None) -> Tree:
    """The cell of a shape in SHAPES with one operation, and one scalar or None, a choice point."""
    trees: dict[str, Tree] = {'x': 'x'}
    for (name, *inputs), op, scalar in zip(SHAPES[shape], ops, scalars or [None] * len(ops)):
        trees[name] = node(op, [trees[key] for key in inputs], scalar)
    return trees[name]

def fold(tree: Tree, x: Any, make: Callable[[Node, list], Any]) -> Any:
    """From the inside out: make(node, what was made of its inputs), and x for 'x'."""
    return x if tree == 'x' else make(tree, [fold(part, x, make) for part in tree.inputs])

def nodes(tree: Tree) -> list[Node]:
    """All nodes of the tree, itself last, in the order in which their scalars stand in the text."""
    return fold(tree, [], lambda node, inputs: sum(inputs, []) + [node])

def length(tree: Tree) -> int:
    """How many operations and x's: 1 for 'x', 4 for 'mul(sigmoid(x), x)'."""
    return fold(tree, 1, lambda node, lengths: 1 + sum(lengths))

def write(tree: Tree, digits: int = 9) -> str:
    """The expression as text; 9 digits hold a float32 without loss, 17 a float64."""
    def word(node: Node, words: list) -> str:
        scalar = [] if node.scalar is None else [f'{node.scalar:.{digits}g}']
        return f"{node.op.name}({', '.join(words + scalar)})"
    return fold(tree, 'x', word)

def parse(text: str) -> Tree:
    """The tree of an expression; a scalar that is not written takes its initial value. Python's grammar reads
    the text and nothing is evaluated. Raises ValueError, one line, for any text that is no expression."""
    def tree(part: ast.expr) -> Tree:
        if isinstance(part, ast.Name) and part.id == 'x':
            return 'x'
        if not (isinstance(part, ast.Call) and isinstance(part.func, ast.Name)):
            raise ValueError(f'character {part.col_offset + 1} begins neither x nor an operation')
        check_choice('operation', part.func.id, ALL)
        op, n = ALL[part.func.id], arity(ALL[part.func.id])
        scalars = [ast.unparse(given) for given in part.args[n:]]
        if not (n <= len(part.args) <= n + (op.scalar is not None) and all(map(NUMBER.fullmatch, scalars))):
            raise ValueError(f"expected {write(Node(op, ('x',) * n, op.scalar))}"
                             + ', any number below 1e30' * (op.scalar is not None))
        return node(op, [tree(given) for given in part.args[:n]], *map(float, scalars))
    text = ' '.join(text.split())
    try:
        if not re.fullmatch(r'[\w (),.+-]{1,10000}', text, re.ASCII) or text.count('(') > 60:  # a cell has 9
            raise ValueError('at most 10,000 letters, digits and _ (),.+- and 60 operations are allowed')
        return tree(ast.parse(text, mode='eval').body)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        why = f'{error.msg} at character {error.offset}' if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f'cannot read {text[:40]!a}: {why or "too deep"}; as in add(x, relu(x))') from None

def evaluate(tree: Tree, x: Tensor, clip: Clip = CLIP, scalars: Optional[Iterator[Tensor]] = None) -> Tensor:
    """The tree at x, in x's shape and type. scalars: in the order of the text; None: the values in it."""
    def value(node: Node, inputs: list) -> Tensor:
        p = None if node.scalar is None else next(scalars).to(x) if scalars else x.new_tensor(node.scalar)
        return node.op(*inputs or [x], p=p, clip=clip)  # x gives a constant its shape
    return fold(tree, x, value)

def fill(source: str, **names: str) -> str:
    """The Python expression with others in place of its names; ast writes exactly the brackets needed."""
    filled = re.sub(rf"\b({'|'.join(names)})\b", lambda name: f'({names[name[0]]})', source)
    return ast.unparse(ast.parse(filled))

def formula(tree: Tree, clip: Clip) -> str:
    """Ordinary notation, scalars to 3 digits. clip(y) is max(-l, min(l, y)), only where it can act."""
    def text(node: Node, words: list) -> str:
        source, p = node.op.formula, node.scalar
        if node.op.name == 'mix':  # its two weights, not the gamma that makes them
            p = torch.tensor(p).sigmoid().item()
            source = f'p * a + {1 - p:.3g} * b'
        source = fill(source, **dict(zip('ab', words)), p=f'{p or 0:.3g}')
        if node.op.clips and clip:
            y = node.op(*(evaluate(part, DENSE, clip) for part in node.inputs), p=node.scalar, clip=None)
            return f'clip({source})' if y.abs().max() > clip * (1 + 1e-9) else source
        return source
    result = fold(tree, 'x', text).replace(' ** ', '^').replace('--', '')
    return result.replace(' - -', ' + ').replace(' + -', ' - ')

# Two functions are equal when their values are. DENSE: dense at -1, 0 and 1; PROBES: to find candidates.
NEAR = 10 ** torch.linspace(-12, 4, 273).double()
DENSE = torch.cat([torch.linspace(-9, 9.01, 901), *(c + s * NEAR for c in (-1, 0, 1) for s in (-1, 1))])
PROBES = torch.linspace(-4.13, 4.17, 48).double()

def similar(tree: Tree, trees: list[Tree], ops: list[Op], clip: Clip) -> list[Tree]:
    """Those of `trees`, and of all unary and binary operations on them, that equal `tree` up to scale and
    shift: their values at PROBES, minus the mean, are parallel to the tree's."""
    unary, binary = ([op for op in ops if arity(op) == n] for n in (1, 2))
    y = torch.stack([evaluate(part, PROBES, clip) for part in trees])
    y = torch.cat([y, *(op(y, clip=clip) for op in unary),
                   *(op(y[:, None], y, clip=clip).flatten(0, 1) for op in binary)])  # (made, probes)
    made = [*trees, *(Node(op, (a,)) for op in unary for a in trees),
            *(Node(op, (a, b)) for op in binary for a in trees for b in trees)]
    v = evaluate(tree, PROBES, clip)
    cosine = nn.functional.cosine_similarity(y - y.mean(1, keepdim=True), v - v.mean())
    return [made[k] for k in (cosine.abs() > 1 - 1e-9).nonzero().flatten().tolist()]

@functools.lru_cache(100_000)
def shorten(tree: Tree, clip: Clip, ops: str = 'base') -> Tree:
    """The shortest tree found for the same function, up to 1e-7 of its value. From the inside out, a part
    becomes a constant, one of its parts or one operation on them. ops: see ops.select; no others come in."""
    if length(tree) == 1:
        return tree
    allowed = dict.fromkeys([*sum(select(ops), ()), *(part.op for part in nodes(tree))])
    usable = [op for op in allowed if op.scalar is None and op.code not in ('a', 'b')]
    v, single = evaluate(tree, DENSE, clip), evaluate(tree, DENSE.float(), clip)
    def adjusted(candidate: Tree) -> Tree:
        """The candidate scaled and shifted to the tree's values, if then equal and shorter; else the tree."""
        y = evaluate(candidate, DENSE, clip)
        low, high = y.abs().argmin(), y.abs().argmax()
        p = (v[high] - v[low]) / (y[high] - y[low])  # of a constant 0 / 0: with p, q nan it stays as it is
        p, q = p.float().item(), (v[low] - p * y[low]).float().item()  # float32, as parameters are
        if abs(p - 1) > 1e-6:
            candidate = Node(ALL['neg'], (candidate,)) if p == -1 else Node(ALL['scale'], (candidate,), p)
        candidate = Node(ALL['bias'], (candidate,), q) if abs(q) > 1e-6 else candidate
        same = ((evaluate(candidate, DENSE, clip) - v).abs() <= 1e-7 * v.abs() + 1e-10).all()
        same = same and (evaluate(candidate, DENSE.float(), clip).isfinite() | ~single.isfinite()).all()
        same = same and all(part.op in allowed for part in nodes(candidate))
        return candidate if same and length(candidate) < length(tree) else tree
    best = adjusted(tree._replace(inputs=tuple(shorten(part, clip, ops) for part in tree.inputs)))
    candidates = [Node(ALL['const'], (), single[0].item() + 0.0)]  # not -0
    candidates += similar(tree, list(dict.fromkeys(['x', *nodes(best)[:-1]])), usable, clip)
    return min([best, *(adjusted(c) for c in candidates if length(c) < length(best))], key=length)

class Activation(nn.Module):
    """A function; its scalars are parameters. Activation(f.expression, f.clip) is the same, bit for bit, as
    long as the scalars are float32."""
    expression = property(lambda self: write(self.valued))
    formula = property(lambda self: formula(self.valued, self.clip))
    extra_repr = expression.fget

    def __init__(self, expression: Tree, clip: Clip = CLIP):
        super().__init__()
        self.tree, self.clip = parse(expression) if isinstance(expression, str) else expression, clip
        values = [float(part.scalar) for part in nodes(self.tree) if part.scalar is not None]
        self.scalars = nn.ParameterList(map(nn.Parameter, map(torch.tensor, values)))
        # subtle: the result may be changed in place, but tanh needs it for its gradient, and x is not ours
        y = evaluate(self.tree, torch.ones(1, requires_grad=True), clip)
        self.copies = y.is_leaf or hasattr(y.grad_fn, '_saved_result')

    def forward(self, x: Tensor) -> Tensor:
        inside = x if x.dtype in (torch.float32, torch.float64) else x.float()  # exp(12) overflows float16
        y = evaluate(self.tree, inside, self.clip, iter(self.scalars))
        return (y.clone() if self.copies else y).to(x.dtype if x.is_floating_point() else y.dtype)

    @property
    def valued(self) -> Tree:
        """The tree with the current values of the scalars."""
        p = (scalar.item() for scalar in self.scalars)
        return fold(self.tree, 'x', lambda n, y: Node(n.op, tuple(y), None if n.scalar is None else next(p)))

    def shortened(self, ops: str = 'base') -> 'Activation':
        """The shortest equal function found. A scalar that comes in, as in x + x = 2 * x, is learnable."""
        return Activation(shorten(self.valued, self.clip, ops), self.clip)

    def module(self, note: str = '') -> str:
        """The text of a file that needs torch alone: the function as class `Found`. note: its origin."""
        lines, scalars = {}, []  # code -> the variable that holds it; source of the parameters
        def line(node: Node, inputs: list) -> str:
            names = dict(zip('ab', inputs or ['y']))
            if node.scalar is not None:
                names['p'] = f'p[{len(scalars)}].to(y.dtype)'
                scalars.append(f'nn.Parameter(torch.tensor({node.scalar!r}))')
            code = fill(node.op.code, **names)
            if node.op.clips and self.clip is not None:
                code = fill(f'y.clamp({-self.clip!r}, {self.clip!r})', y=code)
            return lines.setdefault(code, f'y{len(lines) + 1}')  # a shared part is computed once
        return MODULE.format(
            formula=self.formula, clip=self.clip, note=note.replace('\\', '/').replace('"', "'"),
            result=fold(self.valued, 'y', line) + '.clone()' * self.copies,
            lines=''.join(f'    {name} = {code}\n' for code, name in lines.items()),
            parameters=''.join(f'\n        self.p{k} = {value}' for k, value in enumerate(scalars)),
            scalars=', '.join(f'self.p{k}' for k in range(len(scalars))))

MODULE = '''"""f(x) = {formula}, with clip(y) = max(-l, min(l, y)), l = {clip}
{note}
Needs torch alone: copy it anywhere, write Found() where nn.ReLU() stood. Any shape; the scalars learn."""
import torch
import torch.nn as nn
import torch.nn.functional as F

def found(x: torch.Tensor, p: list[torch.Tensor]) -> torch.Tensor:
    y = x if x.dtype == torch.float32 or x.dtype == torch.float64 else x.float()
{lines}    return {result}.to(x.dtype if x.is_floating_point() else y.dtype)

try:
    torch.fx.wrap('found')  # one step for torch.fx
except RuntimeError:
    pass  # pasted into a notebook, where fx wraps nothing

class Found(nn.Module):
    def __init__(self) -> None:
        super().__init__(){parameters}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return found(x, [{scalars}])
'''

NAMED: dict[str, tuple[str, Clip]] = {  # name -> (expression, clip); grafs_*: in the paper's released code
    **{name: (f'{name}(x)', None) for name in 'relu leaky_relu elu silu gelu tanh sigmoid softplus'.split()},
    'identity': ('x', None), 'relu2': ('square(relu(x))', None), 'mish': ('mul(x, tanh(softplus(x)))', None),
    'relu6': ('min(relu(x), const(6))', None),
    'hardswish': ('mul(x, scale(min(relu(bias(x, 3)), const(6)), 0.166666667))', None),
    'grafs_resnet_1': ('mul(sigmoid(relu(x)), gelu(x))', CLIP),
    'grafs_resnet_2': ('mul(sigmoid(relu(x)), elu(x))', CLIP),
    'grafs_resnet_3': ('mul(sigmoid(gelu(x)), gelu(x))', CLIP),
    'grafs_resnet_4': ('mul(sigmoid(leaky_relu(gelu(x))), leaky_relu(x))', CLIP),
    'grafs_vit': ('mul(sigmoid(gelu(square(silu(x)))), silu(x))', CLIP),
    'grafs_gpt_1': ('mul(silu(mul(sigmoid(relu(x)), gelu(x))), silu(x))', CLIP),
    'grafs_gpt_2': ('mix(silu(mul(sigmoid(silu(x)), square(x))), silu(x), -0.28185115)', CLIP)}

def named(text: str) -> Activation:
    """The activation of a known name, or of an expression. Raises ValueError."""
    if re.fullmatch(r'\s*[\w-]+\s*', text) and text.strip() != 'x':
        check_choice('activation', text.strip(), NAMED)
    return Activation(*NAMED.get(text.strip(), (text,)))

def distance(f: Callable, target: Callable, rescale: bool = True) -> float:
    """The RMS difference under N(0, 1) as a share of the target's standard deviation, after the best scale
    and shift of the output and, with rescale, scale of the input: networks do those. nan for a constant."""
    x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    p = torch.softmax(-x.square() / 2, 0)
    y = target(x) - (p * target(x)).sum()
    variance, best = (p * y * y).sum(), 1.0
    for scale in [sign * 2 ** (k / 8) for k in range(-16, 17) for sign in (1, -1)] if rescale else [1]:
        z = f(scale * x) - (p * f(scale * x)).sum()
        gain = (p * z * y).sum() / (p * z * z).sum().clamp(min=1e-12)
        best = min(best, ((p * (gain * z - y).square()).sum() / variance).sqrt().item())
    return best if variance > 1e-12 else float('nan')

def nonlinearity(f: Callable) -> float:
    """What the best line leaves of f's standard deviation under N(0, 1): 0 for a line, nan for a constant."""
    return distance(lambda x: x, f, rescale=False)

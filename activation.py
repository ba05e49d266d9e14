"""An activation function as text: parsed, printed, evaluated, compared. It is what a search finds.

    f = Activation('mul(sigmoid(gelu(x)), elu(x))')      a module; its learned scalars are parameters
    f.expression, f.formula                              the text again, and mathematics
    named('gelu'), named('relu2'), named('grafs_vit')    known functions

A result is text, `mul(sigmoid(x), scale(x, 0.5))`: parsed here, never by eval, never pickled, and printed without loss.
This room split off from ops.py, which had become two things: the operations, and what is built from them.
"""
import json
import math
import re
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from expression import ExpressionError, Tree, parse, with_values, write
from ops import CLIP, Op, arity, nearest
from simplify import can_clip, shortest, sigmoid


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
# Mathematics.

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

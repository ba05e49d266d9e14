"""The operations that a cell is made of: 23 unary and 9 binary ones, and optional sets.

Paper: Strack, Safari, Hutter, 'Efficient Search for Customized Activation Functions with Gradient Descent'
(GRAFS), arXiv 2408.06820, section 3.1. The optional sets: Ramachandran et al., arXiv 1710.05941 (Swish).

TO ADD AN OPERATION, add one line to UNARY or BINARY (or to an optional set), and nothing else:

    Op('softsign', 'F.softsign(a)', 'softsign(a)'),

If you keep it, tell tests/test_ops.py its values: REFERENCE there has a line for each, and the counts.
"""
import difflib
from dataclasses import astuple, dataclass
from typing import Iterable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 10.0  # the paper's bound l on the output of operations that grow faster than linearly

@dataclass(frozen=True)
class Op:
    """One elementary operation; a and b are its inputs, p is its learnable scalar."""
    name: str                       # as written in an expression, such as 'tanh'
    code: str                       # Python source in a, b and p: what is run and what an export holds
    formula: str                    # the same as mathematics, a Python expression
    scalar: Optional[float] = None  # first value of p (the paper's beta or gamma); None: there is no p
    clips: bool = False             # its output is clipped at l

    def __post_init__(self) -> None:
        # our own text, compiled once, as collections.namedtuple does; text from outside is never evaluated
        function = eval(f'lambda a, b=None, p=None: {self.code}', {'torch': torch, 'F': F})
        object.__setattr__(self, 'function', function)

    def __reduce__(self) -> tuple:
        return Op, astuple(self)  # pickle stores no functions: another process compiles the text again

    def __call__(self, a: Tensor, b: Optional[Tensor] = None, p: Optional[Tensor] = None,
                 clip: Optional[float] = CLIP) -> Tensor:
        """Apply the operation; the inputs broadcast. clip: the paper's l, None for none."""
        y = self.function(a, b, p)
        # clamp is the paper's rule: |y| > l becomes l * sign(y), and no gradient passes there
        return y.clamp(-clip, clip) if self.clips and clip is not None else y

# subtle: a clipped output has gradient 0, but 0 * inf is NaN. The inner clamps of exp, sinh and cosh keep the
# inner gradient finite in float32: exp(80) = 5.5e34. The slope of sqrt is infinite at 0: 0 below 1e-8.
UNARY = (
    Op('identity', 'a', 'a'),
    Op('neg', '-a', '-a'),
    Op('abs', 'torch.abs(a)', 'abs(a)'),
    Op('square', 'a * a', 'a ** 2', clips=True),
    Op('cube', 'a * a * a', 'a ** 3', clips=True),
    Op('sqrt', 'torch.where(a > 1e-8, torch.sqrt(a.clamp(min=1e-8)), torch.zeros_like(a))', 'sqrt(a)'),
    Op('bias', 'a + p', 'a + p', scalar=1.0),
    Op('scale', 'p * a', 'p * a', scalar=1.0),
    Op('const', 'torch.zeros_like(a) + p', 'p', scalar=1.0),
    Op('exp', 'torch.exp(a.clamp(max=80.0))', 'exp(a)', clips=True),
    Op('sinh', 'torch.sinh(a.clamp(-80.0, 80.0))', 'sinh(a)', clips=True),
    Op('tanh', 'torch.tanh(a)', 'tanh(a)'),
    Op('asinh', 'torch.asinh(a)', 'asinh(a)'),
    Op('atan', 'torch.atan(a)', 'atan(a)'),
    Op('relu', 'F.relu(a)', 'relu(a)'),
    Op('min0', 'a.clamp(max=0.0)', 'min(a, 0)'),
    Op('sigmoid', 'torch.sigmoid(a)', 'sigmoid(a)'),
    Op('softplus', 'F.softplus(a)', 'softplus(a)'),
    Op('erf', 'torch.erf(a)', 'erf(a)'),
    Op('silu', 'F.silu(a)', 'silu(a)'),
    Op('gelu', 'F.gelu(a)', 'gelu(a)'),
    Op('elu', 'F.elu(a)', 'elu(a)'),
    Op('leaky_relu', 'F.leaky_relu(a)', 'leaky_relu(a)'),
)

BINARY = (
    Op('add', 'a + b', 'a + b'),
    Op('sub', 'a - b', 'a - b'),
    Op('mul', 'a * b', 'a * b', clips=True),
    Op('max', 'torch.maximum(a, b)', 'max(a, b)'),
    Op('min', 'torch.minimum(a, b)', 'min(a, b)'),
    Op('gate', 'torch.sigmoid(a) * b', 'sigmoid(a) * b'),
    Op('mix', 'b + torch.sigmoid(p) * (a - b)', 'sigmoid(p) * a + (1 - sigmoid(p)) * b', scalar=0.0),
    Op('left', 'a', 'a'),
    Op('right', 'b', 'b'),
)

# The optional sets, off by default: (more unary operations, more binary operations).
PERIODIC = ((
    Op('sin', 'torch.sin(a)', 'sin(a)'),
    Op('cos', 'torch.cos(a)', 'cos(a)'),
    Op('sinc', 'torch.sinc(a / torch.pi)', 'sinc(a)'),  # sin(x) / x, and 1 at 0
), ())

SWISH = ((
    Op('log_abs', 'torch.log(a.abs().clamp(min=1e-4))', 'log(abs(a))', clips=True),
    Op('cosh', 'torch.cosh(a.clamp(-80.0, 80.0))', 'cosh(a)', clips=True),
    Op('gauss', 'torch.exp(-a * a)', 'exp(-a ** 2)'),
), (
    # the paper's a / (b + eps), with eps taking the sign of b: the denominator is never 0
    Op('div', 'a / torch.where(b < 0, b - 1e-3, b + 1e-3)', 'a / b', clips=True),
    Op('laplace', 'torch.exp(-torch.abs(a - b))', 'exp(-abs(a - b))'),
    Op('rbf', 'torch.exp(-torch.square(a - b))', 'exp(-(a - b) ** 2)'),
))

# Without the known activations: can the search build them by itself?
SIMPLE = tuple(op for op in UNARY if op.name not in ('silu', 'gelu', 'elu', 'leaky_relu'))

SETS: dict[str, tuple[tuple[Op, ...], tuple[Op, ...]]] = {
    'base': (UNARY, BINARY), 'periodic': PERIODIC, 'swish': SWISH, 'no-composites': (SIMPLE, BINARY)}

ALL: dict[str, Op] = {op.name: op for unary, binary in SETS.values() for op in unary + binary}
BINARY_NAMES = {op.name for _, binary in SETS.values() for op in binary}

def arity(op: Op) -> int:
    """How many inputs an expression gives to `op`: 2 for a binary one, 1 for a unary one, 0 for const."""
    return 2 if op.name in BINARY_NAMES else int(op.name != 'const')

def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """' (did you mean tanh?)' for the choice closest to `name`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f' (did you mean {close[0]}?)' if close else ''

def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError, one line with all choices and the nearest, when `value` is none of them."""
    if value not in choices:
        raise ValueError(f"unknown {what} '{value[:40]}'{did_you_mean(value, choices)}; "
                         f"choose one of: {', '.join(choices)}")

def select(text: str = 'base') -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The unary and binary operations that `text` names, each once, in the order of ALL.

    text: sets and operations with commas between, such as 'base,periodic', 'base,-sinh' (a minus takes one
        out) or 'identity,relu,tanh,add,mul'. Raises ValueError for an unknown name or a kind left empty.
    """
    chosen: set[str] = set()
    words = filter(None, (w.strip() for w in text.split(',')))
    for word in sorted(words, key=lambda word: word[0] == '-'):  # what is taken out comes last
        name = word.removeprefix('-')
        check_choice('operation or set in --ops', name, [*SETS, *ALL])
        names = {op.name for ops in SETS[name] for op in ops} if name in SETS else {name}
        chosen = chosen - names if word.startswith('-') else chosen | names
    unary = tuple(op for op in ALL.values() if op.name in chosen and op.name not in BINARY_NAMES)
    binary = tuple(op for op in ALL.values() if op.name in chosen and op.name in BINARY_NAMES)
    if not unary or not binary:
        raise ValueError(f"--ops '{text}' leaves no {'binary' if unary else 'unary'} operation, "
                         f'and a cell needs both kinds')
    return unary, binary

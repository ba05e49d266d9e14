"""activation.py: reading, formulas, shortening, the module and its export."""
import gc
import importlib.util
import math
import random
import sys
import weakref

import pytest
import torch
import torch.nn as nn

from activation import (NAMED, SHAPES, Activation, Node, cell_tree, distance, evaluate, formula, latex,
                        length, named, nonlinearity, parse, shorten, write)
from ops import ALL, CLIP, Op, arity, select


def cells(count, seed=0, ops='base', shape='paper', scalars=False):
    """Random cells, uniform over spellings, with the initial scalars or with random ones."""
    unary, binary = select(ops)
    for k in range(seed, seed + count):
        rng = random.Random(k)
        chosen = [rng.choice(binary if name[0] == 'B' else unary) for name, *_ in SHAPES[shape]]
        yield cell_tree(shape, chosen, [rng.gauss(0, 1) for _ in chosen] if scalars else None)


def test_trees():
    """By hand: what a cell is, what passes through, how long it is, where its scalars stand."""
    tree = cell_tree('core', [ALL[name] for name in ('scale', 'identity', 'mul')], [0.5, 3.0, 4.0])
    assert tree == Node(ALL['mul'], (Node(ALL['scale'], ('x',), 0.5), 'x'), None)
    assert write(tree) == 'mul(scale(x, 0.5), x)' and length(tree) == 4
    ops = [ALL[name] for name in ('tanh', 'const', 'right', 'bias', 'exp', 'left')]
    assert write(cell_tree('paper', ops)) == 'bias(const(1), 1)' and SHAPES['deep'][-1] == ('B2', 'U4', 'U5')
    assert [p.item() for p in Activation('mix(scale(x, 2), bias(x, 3), 4)').scalars] == [2, 3, 4]


def test_text_loses_nothing():
    """A tree is its text; an Activation is its expression, bit for bit, with learned scalars too."""
    x = torch.linspace(-12, 12, 101)
    for tree in cells(100, ops='base,periodic,swish', shape='deep', scalars=True):
        f = Activation(tree, 3.0)
        assert parse(write(tree, 17)) == tree
        assert torch.equal(Activation(f.expression, 3.0)(x), f(x)), f.expression
    assert parse(' scale ( bias(x) ,\n -1_0.5e-1 )\t') == parse('scale(bias(x, 1), -1.05)')
    assert math.copysign(1, parse('bias(x, -0)').scalar) == -1


@pytest.mark.parametrize('text, word', [
    ('', 'cannot read'), ('y', 'character 1'), ('relu', 'brackets'),
    ('relu(x', 'never closed at character 5'), ('relu(x))', 'unmatched'), ('reluu(x)', 'did you mean relu?'),
    ('relu(x, x)', 'expected relu(x)'), ('tanh(relu())', 'relu(x)'), ('mul(x)', 'mul(x, x)'),
    ('scale(x, x)', 'scale(x, 1)'), ('()', 'expected x'), ('scale(x, 1e30)', 'below 1e30'),
    ('add(x, x, 1)', 'add(x, x)'), ('x + x', 'expected x'), ('2', 'expected x'), ('x.real', 'expected x'),
    ('const(True)', 'const(1)'), ('const(1j)', 'const(1)'), ('const(1e999)', 'const(1)'),
    ('const(-nan)', 'const(1)'), ('scale(x, p=2)', 'letters'), ('scale(x, "2")', 'letters'),
    ('relu(*x)', 'letters'), ('relu(x)\0', 'letters'), ('relu(\ud800)', 'letters'), ('ｒｅｌｕ(x)', 'letters'),
    ('1if x', 'character 1'), ('__import__(x)', 'unknown operation'),
    ('neg(' * 61 + 'x' + ')' * 61, '60 operations'), ('x' * 10_001, '10,000'),
    ('const(' + '-' * 9_900 + '1)', ''), ('const(' + '9' * 5_000 + ')', ''), ('not ' * 2_000 + 'x', '')])
def test_wrong_text(text, word):
    """One line that names the place or the operation; never another exception, never a warning."""
    with pytest.raises(ValueError) as error:
        parse(text)
    assert word in str(error.value) and str(error.value).isprintable() and type(error.value) is ValueError


def test_damaged_text():
    """5,000 damaged expressions: a tree that can be written, or a ValueError of one line."""
    rng, good = random.Random(0), [write(tree) for tree in cells(50, scalars=True)]
    words = [*ALL, *'(((()))),,,x.-_ 019\n#"\'[é=*:\0', 'e5', 'x', ' if ', 'lambda', 'None', '**']
    for _ in range(5_000):
        text = rng.choice(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(words) + text[at + rng.randint(0, 2):]
        try:
            assert parse(write(parse(text), 17)) == parse(text)
        except ValueError as error:
            assert type(error) is ValueError and str(error).isprintable(), text


@pytest.mark.parametrize('text, want', [
    ('mul(sigmoid(gelu(x)), elu(x))', 'clip(sigmoid(gelu(x)) * elu(x))'), ('min0(x)', 'min(x, 0)'),
    ('mul(add(x, x), x)', 'clip((x + x) * x)'), ('sub(x, sub(x, bias(x, -0.5)))', 'x - (x - (x - 0.5))'),
    ('bias(neg(neg(x)), -3)', 'x - 3'), ('add(x, scale(x, -0.25))', 'x - 0.25 * x'),
    ('square(x)', 'clip(x^2)'), ('sub(x, scale(x, -0.25))', 'x + 0.25 * x'),
    ('square(neg(tanh(x)))', '(-tanh(x))^2'), ('neg(square(tanh(x)))', '-tanh(x)^2'),
    ('mix(tanh(x), x, -0.28185115)', '0.43 * tanh(x) + 0.57 * x'), ('scale(const(-2), 1e-7)', '1e-07 * -2'),
    ('mul(sigmoid(x), square(x))', 'sigmoid(x) * clip(x^2)'),
    ('mul(tanh(x), sigmoid(x))', 'tanh(x) * sigmoid(x)'),
    ('cube(scale(tanh(x), 3))', 'clip((3 * tanh(x))^3)')])
def test_formula(text, want):
    """Brackets where they are needed, no double signs, clip only where it can act."""
    assert Activation(text).formula == want and Activation('square(x)', None).formula == 'x^2'


def test_formula_is_the_function():
    """Python evaluates the formula as text; at a few points it is the function."""
    words = {**vars(math), 'sqrt': lambda a: math.sqrt(max(a, 0)), 'clip': lambda a: max(-CLIP, min(a, CLIP))}
    for name in ('relu', 'sigmoid', 'softplus', 'silu', 'gelu', 'elu', 'leaky_relu', 'sinc'):
        words[name] = lambda a, op=ALL[name]: op(torch.tensor(a, dtype=torch.float64)).item()
    for tree in cells(200, ops='base,periodic,swish,-div'):
        text = formula(tree, CLIP)
        for x in (-2.3, -0.4, 0.7, 1.9):
            want = evaluate(tree, torch.tensor(x, dtype=torch.float64)).item()
            value = eval(text.replace('^', '**'), words, {'x': x})
            assert value == pytest.approx(want, rel=1e-9, abs=1e-9), text


def test_latex(monkeypatch):
    """sympy writes it, matplotlib can set every operation, and without sympy there is none."""
    assert latex(parse('min0(sqrt(square(x)))'), None) == r'\operatorname{min}{\left(\sqrt{x^{2}},0 \right)}'
    mathtext = pytest.importorskip('matplotlib.mathtext')  # optional, for the pictures
    for op in ALL.values():
        tree = Node(op, (parse('square(bias(x, -2))'),) * arity(op), op.scalar)
        mathtext.MathTextParser('path').parse(f'${latex(tree, CLIP)}$')
    monkeypatch.setitem(sys.modules, 'sympy', None)
    assert Activation('relu(x)').latex is None


def check_shortened(tree, clip):
    """Equal on a grid of its own, relative to the value or 1e-3; finite in float32. Returns the length."""
    short, ends = shorten(tree, clip), torch.logspace(-11, -2, 100)
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-4, 4, 2001),
                   *(centre + sign * ends for centre in (-1, 0, 1) for sign in (-1, 1))])
    y, z = evaluate(tree, x.double(), clip), evaluate(short, x.double(), clip)
    assert ((y - z).abs() <= 1e-6 * y.abs().clamp(min=1e-3))[y.isfinite()].all(), (write(tree), write(short))
    assert (evaluate(short, x, clip).isfinite() | ~evaluate(tree, x, clip).isfinite()).all(), write(tree)
    return length(short)


def test_shorten_random_cells():
    """300 cells of the paper's space are the same functions, and shorter: 6.9 before."""
    assert sum(check_shortened(tree, CLIP) for tree in cells(300)) / 300 < 5.9


@pytest.mark.parametrize('clip', [10.0, 0.7, None])
def test_shorten_other_cells(clip):
    """Learned scalars, the optional operations, deep cells, other bounds."""
    for tree in cells(40, seed=1_000, ops='base,periodic,swish', shape='deep', scalars=True):
        assert check_shortened(tree, clip) <= length(tree)


@pytest.mark.parametrize('text, want', [
    ('max(x, x)', 'x'), ('add(x, x)', 'scale(x, 2)'), ('neg(neg(x))', 'x'),
    ('scale(scale(x, 2), 3)', 'scale(x, 6)'), ('bias(bias(x, 1), -1)', 'x'), ('tanh(sub(x, x))', 'const(0)'),
    ('square(const(5))', 'const(10)'), ('exp(neg(const(0)))', 'const(1)'),
    ('gate(relu(x), relu(x))', 'relu(silu(x))'), ('mul(x, x)', 'square(x)'),
    ('mul(sigmoid(tanh(x)), tanh(x))', 'silu(tanh(x))'), ('mul(sigmoid(x), x)', 'mul(sigmoid(x), x)'),
    ('max(neg(x), x)', 'abs(x)'), ('sqrt(square(x))', 'sqrt(square(x))'), ('add(relu(x), min0(x))', 'x'),
    ('sub(add(x, tanh(x)), x)', 'tanh(x)'), ('add(x, silu(neg(x)))', 'silu(x)'),
    ('mul(min0(x), sqrt(x))', 'const(0)'), ('neg(sin(neg(x)))', 'sin(x)'),
    ('mix(x, bias(x, 1), 0)', 'bias(x, 0.5)'), ('sub(neg(x), neg(cosh(tanh(x))))', 'sub(cosh(tanh(x)), x)'),
    ('div(x, const(0))', 'div(x, const(0))')])
def test_shorten_by_hand(text, want):
    """What some expressions are; where a clip or the threshold of sqrt acts they stay."""
    assert write(shorten(parse(text), CLIP)) == want


def test_module_interface():
    """Values as the text says; scalars learn, also those of a shortened function."""
    f = Activation('mul(sigmoid(x), scale(x, 0.5))')
    assert f(torch.tensor([[2.0]])).item() == pytest.approx(2 * 0.5 / (1 + math.exp(-2)))
    f.scalars[0].data.fill_(4.0)
    assert f.expression == 'mul(sigmoid(x), scale(x, 4))' and f.expression in repr(f) and '4 * x' in f.formula
    g = Activation('bias(scale(scale(x, 2), 3), -1)').shortened()
    g(torch.ones(3)).sum().backward()
    assert [(p.item(), p.grad.item()) for p in g.scalars] == [(6, 3), (-1, 3)]


@pytest.mark.parametrize('text', ['mix(exp(x), tanh(scale(x, 0.3)), 0.2)', 'gate(bias(x, -1), asinh(x))'])
def test_gradient(text):
    """Of the input and the scalars, against float64 differences."""
    f, x = Activation(text).double(), torch.tensor([-1.3, -0.2, 0.4, 1.7]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *p: torch.func.functional_call(
        f, {f'scalars.{k}': value for k, value in enumerate(p)}, (x,)), (x, *f.scalars))


@pytest.mark.parametrize('text', ['x', *(write(Node(op, 'x' * arity(op), op.scalar)) for op in ALL.values())])
@pytest.mark.parametrize('clip', [CLIP, None])
def test_result_may_be_changed_in_place(text, clip, tmp_path):
    """h = act(x); h += x, as networks do, trains, also for constants; the input stays as it is."""
    for f in (Activation(text, clip), load(Activation(text, clip).module(), tmp_path)):
        x = torch.tensor([-0.5, 0.5, 2.0], requires_grad=True)
        start = 1 * x
        y = f(start)
        y += start
        y.sum().backward()
        assert y.shape == x.shape and torch.equal(start, x) and x.grad.isfinite().all()


def test_memory_is_given_back():
    """No reference cycle keeps an input alive until the garbage collector comes by."""
    gc.disable()
    start = 1 * torch.randn(10, requires_grad=True)
    seen, y = weakref.ref(start), Activation('mul(tanh(x), scale(x))')(start)
    del y, start
    gc.enable()
    assert seen() is None


def load(text, folder):
    """Found() of the exported file, imported as a stranger would."""
    (folder / 'found.py').write_text(text, encoding='utf-8')
    spec = importlib.util.spec_from_file_location('found', folder / 'found.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Found()


def test_export_is_the_activation(tmp_path):
    """Every operation, a user's own and random cells: values bit for bit in float32, and all gradients."""
    own = Op('own', 'F.relu(a - p) * torch.clamp(a, max=p)', 'own(a, p)', scalar=0.3, clips=True)
    trees = [Node(op, ('x', parse('tanh(x)'))[:arity(op)], op.scalar) for op in ALL.values()]
    trees += [Node(own, (Node(own, ('x',), 0.2),), 0.1), *cells(30, ops='base,swish', scalars=True)]
    x = torch.linspace(-12, 12, 301, requires_grad=True)
    for k, tree in enumerate(trees):
        f = Activation(tree, (CLIP, None)[k % 2])
        found = load(f.module(note='C:\\users """quoted'), tmp_path)
        assert torch.equal(f(x).nan_to_num(), found(x).nan_to_num()), f.expression
        a, b = (torch.autograd.grad((g(x) + 0 * x).sum(), (x, *g.parameters())) for g in (f, found))
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('text', ['mix(gate(asinh(x), scale(erf(x), 0.5)), atan(sqrt(x)), 0.2)', 'tanh(x)',
                                  'x', 'max(sinh(x), sinc(bias(min0(x), 2)))', 'const(0.5)'])
def test_export_in_tools(text, tmp_path):
    """torch.jit.script, torch.export and torch.fx take it, also at a shape that the tracing has not seen."""
    f = Activation(text)
    net = nn.Sequential(nn.Linear(4, 8), load(f.module(), tmp_path))
    x, other = torch.randn(4, 4), torch.randn(7, 4)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('n')},)).module()
    for g in (torch.jit.script(net), program, torch.fx.symbolic_trace(net)):
        torch.testing.assert_close(g(other), f(net[0](other)))
        assert len(list(g.parameters())) == 2 + len(f.scalars)


@pytest.mark.parametrize('text', ['mul(exp(x), tanh(x))', 'sinh(square(x))', 'mix(exp(x), x, 2)', 'x'])
def test_other_types(text, tmp_path):
    """Half precision is float32 inside, integers give floats, float64 stays."""
    want = Activation(text)
    for f in (Activation(text), load(want.module(), tmp_path)):
        whole = torch.tensor([-1, 1, 2])
        torch.testing.assert_close(f(whole), want(whole.float()))
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.tensor([-300, -20, -1, 0, 0.5, 3, 12, 20, 300], dtype=dtype, requires_grad=True)
            for g in (f, f.to(dtype)):
                y = g(x)
                assert y.dtype == dtype and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
                torch.testing.assert_close(y.float(), want(x.float()), rtol=1e-2, atol=1e-2)
        assert f.double()(torch.ones(2).double()).dtype == torch.float64


def test_named():
    """Against torch's own functions; wrong names say which are known."""
    x = torch.linspace(-6, 6, 101)
    for name in ('relu', 'leaky_relu', 'elu', 'silu', 'gelu', 'softplus', 'mish', 'tanh', 'sigmoid'):
        torch.testing.assert_close(named(name)(x), getattr(nn.functional, name)(x))
    assert torch.equal(named(' relu2 ')(x), torch.relu(x) ** 2) and torch.equal(named('identity')(x), x)
    assert named('grafs_gpt_2').formula == '0.43 * silu(sigmoid(silu(x)) * clip(x^2)) + 0.57 * silu(x)'
    assert all(named(name).expression for name in NAMED) and named('x').expression == 'x'
    with pytest.raises(ValueError, match='did you mean gelu'):
        named('gleu')


def test_distance_and_nonlinearity():
    """By hand, under N(0, 1): relu = x / 2 + |x| / 2 has variance 1/2 - 1/(2 pi); a line takes 1/4 of that
    away, and |x| leaves the line's 1/4."""
    variance = 0.5 - 0.5 / math.pi
    assert nonlinearity(torch.relu) == pytest.approx(math.sqrt(1 - 0.25 / variance), abs=1e-4)
    assert distance(torch.abs, torch.relu, False) == pytest.approx(math.sqrt(0.25 / variance), abs=1e-4)
    assert nonlinearity(named('bias(scale(x, -3), 7)')) < 1e-6 and nonlinearity(torch.square) > 0.9999
    assert math.isnan(nonlinearity(named('const(2)')))
    assert distance(named('scale(bias(tanh(scale(x, 2)), 5), -3)'), torch.tanh) < 1e-6
    assert distance(named('gelu'), named('silu')) == pytest.approx(0.009, abs=2e-3)

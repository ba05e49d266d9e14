"""activation.py: reading, formulas, shortening, the module and its export."""
import copy
import importlib.util
import itertools
import math
import random

import pytest
import torch
import torch.nn as nn

from activation import (NAMED, SHAPES, Activation, Node, cell_tree, distance, evaluate, formula, length,
                        named, nodes, nonlinearity, parse, shorten, write)
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
    assert write(cell_tree('paper', ops)) == 'bias(const(1), 1)'
    assert [part.scalar for part in nodes(parse('mix(scale(x, 2), bias(x, 3), 4)'))] == [2, 3, 4]

@pytest.mark.filterwarnings('ignore')  # of Python, for '1if x'
def test_text_loses_nothing():
    """A tree is its text; an Activation is its expression, bit for bit, with learned scalars too. A damaged
    text is a tree that can be written, or a ValueError of one line."""
    x, rng = torch.linspace(-12, 12, 101), random.Random(0)
    words = [*ALL, *'(((()))),,,x.-_ 019\n#"\'[é=*:\0', 'e5', ' if ', 'lambda', '**']
    for tree in cells(100, ops='base,periodic,swish', shape='deep', scalars=True):
        f = Activation(tree, 3.0)
        assert parse(write(tree, 17)) == tree
        assert torch.equal(Activation(f.expression, 3.0)(x), f(x)), f.expression
        for text in 50 * [f.expression]:
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(text) + 1)
                text = text[:at] + rng.choice(words) + text[at + rng.randint(0, 2):]
            try:
                assert parse(write(parse(text), 17)) == parse(text)
            except ValueError as error:
                assert type(error) is ValueError and str(error).isprintable(), text
    assert parse(' scale ( bias(x) ,\n -1_0.5e-1 )\t') == parse('scale(bias(x, 1), -1.05)')
    assert math.copysign(1, parse('bias(x, -0)').scalar) == -1

@pytest.mark.parametrize('text, word', [
    ('y', 'character 1'), ('relu', 'neither x nor'), ('relu(x', 'never closed at character 5'),
    ('reluu(x)', 'did you mean relu?'), ('__import__(x)', 'unknown operation'), ('mul(x)', 'mul(x, x)'),
    ('add(x, x, 1)', 'add(x, x)'), ('scale(x, x)', 'scale(x, 1)'), ('scale(x, 1e30)', 'below 1e30'),
    ('const(-nan)', 'const(1)'), ('x.real', 'character 1 begins'), ('scale(x, p=2)', 'letters'),
    ('relu(\ud800)', 'letters'), ('ｒelu(x)', 'letters'), ('neg(' * 61 + 'x' + ')' * 61, '60 operations'),
    ('x' * 10_001, '10,000'), ('const(' + '-' * 9_900 + '1)', ''), ('const(' + '9' * 5_000 + ')', '')])
def test_wrong_text(text, word):
    """One line that names the place or the operation; never another exception."""
    with pytest.raises(ValueError) as error:
        parse(text)
    assert word in str(error.value) and str(error.value).isprintable() and type(error.value) is ValueError

@pytest.mark.parametrize('text, want', [
    ('mul(add(x, x), x)', 'clip((x + x) * x)'), ('sub(x, sub(x, bias(x, -0.5)))', 'x - (x - (x - 0.5))'),
    ('sub(x, scale(x, -0.25))', 'x + 0.25 * x'), ('neg(square(neg(tanh(x))))', '-(-tanh(x))^2'),
    ('mix(neg(neg(x)), min0(x), -0.28185115)', '0.43 * x + 0.57 * min(x, 0)'),
    ('mul(sigmoid(x), square(x))', 'sigmoid(x) * clip(x^2)')])
def test_formula(text, want):
    """Brackets where they are needed, no double signs, clip only where it can act."""
    assert Activation(text).formula == want and Activation('square(x)', None).formula == 'x^2'

def test_formula_is_the_function():
    """Python evaluates the formula as text; at a few points it is the function."""
    words = {**vars(math), 'sqrt': lambda a: math.sqrt(max(a, 0)), 'clip': lambda a: max(-CLIP, min(a, CLIP))}
    for name in ('relu', 'sigmoid', 'softplus', 'silu', 'gelu', 'elu', 'leaky_relu', 'sinc'):
        words[name] = lambda a, op=ALL[name]: op(torch.tensor(a, dtype=torch.float64)).item()
    x = torch.tensor([-2.3, -0.4, 0.7, 1.9], dtype=torch.float64)
    for tree in cells(200, ops='base,periodic,swish,-div'):
        text = formula(tree, CLIP).replace('^', '**')
        values = [eval(text, words, {'x': point}) for point in x.tolist()]
        assert values == pytest.approx(evaluate(tree, x).tolist(), rel=1e-9, abs=1e-9), write(tree)

@pytest.mark.parametrize('clip, options, mean', [
    (CLIP, dict(count=300), 5.9), (CLIP, dict(count=60, ops='no-composites'), 6.0),  # 6.9 before
    *((clip, dict(count=40, seed=1_000, ops='base,periodic,swish', shape='deep', scalars=True), 13)
      for clip in (10.0, 0.7, None))])
def test_shorten(clip, options, mean):
    """On points of its own: equal, relative to the value or 1e-3; finite in float32; of what is allowed."""
    lengths, ops, ends = [], options.get('ops', 'base'), torch.logspace(-11, -2, 100)
    x = torch.cat([torch.linspace(-100, 100, 4001), *(k + s * ends for k in (-1, 0, 1) for s in (-1, 1))])
    for tree in cells(**options):
        short = shorten(tree, clip, ops)
        y, z = evaluate(tree, x.double(), clip), evaluate(short, x.double(), clip)
        assert ((y - z).abs() <= 1e-6 * y.abs().clamp(min=1e-3))[y.isfinite()].all(), write(tree)
        assert (evaluate(short, x, clip).isfinite() | ~evaluate(tree, x, clip).isfinite()).all(), write(tree)
        assert {part.op for part in nodes(short)} <= {op for kind in select(ops) for op in kind}
        lengths.append(length(short))
    assert sum(lengths) / len(lengths) < mean

@pytest.mark.parametrize('text, want', [
    ('max(x, x)', 'x'), ('scale(scale(x, 2), 3)', 'scale(x, 6)'), ('tanh(sub(x, x))', 'const(0)'),
    ('square(const(5))', 'const(10)'), ('mul(x, x)', 'square(x)'), ('sub(add(x, tanh(x)), x)', 'tanh(x)'),
    ('mul(sigmoid(x), x)', 'mul(sigmoid(x), x)'), ('sqrt(square(x))', 'sqrt(square(x))'),
    ('neg(sin(neg(x)))', 'sin(x)'), ('mix(x, bias(x, 1), 0)', 'bias(x, 0.5)'),
    ('sub(neg(x), neg(cosh(tanh(x))))', 'sub(cosh(tanh(x)), x)'), ('div(x, const(0))', 'div(x, const(0))')])
def test_shorten_by_hand(text, want):
    """What some expressions are; where a clip or the threshold of sqrt acts they stay."""
    assert write(shorten(parse(text), CLIP)) == want

def test_module(tmp_path):
    """Values as the text says; scalars learn, also those of a shortened function of what is allowed alone;
    torch.save and copies keep it, with an operation of the user's own too."""
    own = Op('own', 'F.relu(a - p)', 'own(a, p)', scalar=0.3)
    f, x = Activation('mul(sigmoid(x), scale(x, 0.5))'), torch.tensor([[2.0]])
    assert f(x).item() == pytest.approx(2 * 0.5 / (1 + math.exp(-2)))
    f.scalars[0].data.fill_(4.0)
    assert f.expression == 'mul(sigmoid(x), scale(x, 4))' and f.expression in repr(f) and '4 * x' in f.formula
    torch.save(net := nn.Sequential(f, Activation(Node(own, ('x',), 0.2))), tmp_path / 'net.pt')
    for other in (torch.load(tmp_path / 'net.pt', weights_only=False), copy.deepcopy(net)):
        assert torch.equal(other(x), net(x)) and other[0].expression == f.expression
    g = Activation('bias(scale(scale(x, 2), 3), -1)').shortened()
    g(torch.ones(3)).sum().backward()
    assert [(p.item(), p.grad.item()) for p in g.scalars] == [(6, 3), (-1, 3)]
    for ops, want in ('base', 'silu(tanh(x))'), ('no-composites', 'gate(tanh(x), tanh(x))'):
        assert Activation('mul(sigmoid(tanh(x)), tanh(x))').shortened(ops).expression == want

def load(text, folder):
    """Found() of the exported file, imported as a stranger would; it can be pasted into a notebook, too."""
    exec(compile(text, 'cell', 'exec').replace(co_name='<cell line: 1>'), {})
    (folder / 'found.py').write_text(text, encoding='utf-8')
    spec = importlib.util.spec_from_file_location('found', folder / 'found.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.Found()

def test_export_is_the_activation(tmp_path):
    """Every operation, a user's own and random cells: values bit for bit in float32, and all gradients, also
    where the network goes on in place (h = act(x); h += x). The input stays as it is."""
    own = Op('own', 'F.relu(a - p) * torch.clamp(a, max=p)', 'own(a, p)', scalar=0.3, clips=True)
    trees = ['x', *(Node(op, ('x', parse('tanh(x)'))[:arity(op)], op.scalar) for op in ALL.values())]
    trees += [Node(own, (Node(own, ('x',), 0.2),), 0.1), *cells(30, ops='base,swish', scalars=True)]
    x = torch.linspace(-12, 12, 301, requires_grad=True)
    for tree, clip in itertools.product(trees, (CLIP, None)):
        f = Activation(tree, clip)
        start, found = 1 * x, load(f.module(note='C:\\users """quoted'), tmp_path)
        assert torch.equal(f(x).nan_to_num(), found(x).nan_to_num()), f.expression
        a, b = (torch.autograd.grad(g(start).add_(x).sum(), (x, *g.parameters()), retain_graph=True)
                for g in (f, found))
        torch.testing.assert_close(a, b, equal_nan=True)
        assert torch.equal(start, x)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('text', ['mix(gate(asinh(x), scale(x)), atan(sqrt(x)), 0.25)', 'x', 'const(0.5)',
                                  'mul(exp(x), tanh(x))', 'mix(exp(x), x, 2)'])
def test_export_elsewhere(text, tmp_path):
    """torch.jit.script, torch.export and torch.fx take it, also at a shape that the tracing has not seen.
    Half precision is float32 inside, integers give floats, float64 stays."""
    want, f, found = Activation(text), Activation(text), load(Activation(text).module(), tmp_path)
    net, other = nn.Sequential(nn.Linear(4, 8), found), torch.randn(7, 4)
    shapes = ({0: torch.export.Dim('n')},)
    program = torch.export.export(net, (torch.randn(4, 4),), dynamic_shapes=shapes).module()
    for g in (torch.jit.script(net), program, torch.fx.symbolic_trace(net)):
        torch.testing.assert_close(g(other), f(net[0](other)))
        assert len(list(g.parameters())) == 2 + len(f.scalars)
    for f, dtype in itertools.product((f, found), (torch.half, torch.bfloat16)):
        x = torch.tensor([-300, -20, -1, 0, 0.5, 3, 12, 20, 300], dtype=dtype, requires_grad=True)
        for y in f(x), f.to(dtype)(x):
            assert y.dtype == dtype and torch.autograd.grad(y.sum() + 0 * x.sum(), x)[0].isfinite().all()
            torch.testing.assert_close(y.float(), want(x.float()), rtol=1e-2, atol=1e-2)
        assert f.double()(torch.ones(2).double()).dtype == torch.float64
        torch.testing.assert_close(f.float()(torch.tensor([-1, 1, 2])), want(torch.tensor([-1.0, 1.0, 2.0])))

def test_named():
    """Against torch's own functions; wrong names say which are known."""
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(named(' mish ')(x), nn.functional.mish(x))
    torch.testing.assert_close(named('relu2')(x), torch.relu(x) ** 2)
    for name in ('relu6', 'hardswish'):
        torch.testing.assert_close(named(name)(x), getattr(nn.functional, name)(x))
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

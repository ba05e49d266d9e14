"""activation.py: expressions that survive being printed, rules that keep the function, a file that is the function."""
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import activation
import expression
import simplify
import evaluate
from activation import NAMED, Activation, distance, gallery, named
from expression import ExpressionError, length, parse, with_values
from simplify import ranges
from cell import random_expression
from ops import ALL, BINARY_NAMES, CLIP, Op


@pytest.mark.parametrize('text, formula', [
    ('mul(sigmoid(gelu(x)), elu(x))', 'clip(sigmoid(gelu(x)) * elu(x))'),
    ('sub(x, sub(x, tanh(x)))', 'x - (x - tanh(x))'),
    ('square(add(x, neg(x)))', '(x + (-x))^2'), ('square(add(x, neg(abs(x))))', 'clip((x + (-|x|))^2)'),
    ('square(const(-0.5))', '(-0.5)^2'), ('sub(x, scale(relu(x), -0.5))', 'x + 0.5 * relu(x)'), ('cube(sigmoid(x))', 'sigmoid(x)^3'),
    ('mix(silu(x), tanh(x), -1)', '0.269 * silu(x) + 0.731 * tanh(x)'), ('mul(tanh(x), scale(atan(x), 7))', 'clip(tanh(x) * 7 * atan(x))'),
    ('mul(tanh(x), scale(atan(x), 6))', 'tanh(x) * 6 * atan(x)'),
    ('gate(bias(x, -0.25), scale(abs(x), 2))', 'sigmoid(x - 0.25) * 2 * |x|'),
    ('left(relu(x), tanh(x))', 'relu(x)'), ('identity(x)', 'x'), ('const(0.5)', '0.5'),
])
def test_formula(text, formula):
    assert Activation(text).formula == formula


def test_worked_by_hand():
    f = Activation('mul(sigmoid(x), scale(x, 0.5))')
    assert f(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([0.0, 1.0 / (1 + math.exp(-2))])


def tree(depth):
    """Random expressions, scalars included."""
    if depth == 0:
        return st.just('x')
    inner = tree(depth - 1)
    number = st.floats(-1e6, 1e6, width=32).map(lambda v: f'{v:.9g}')
    return st.one_of(st.just('x'), number.map('const({})'.format), *(
        st.tuples(inner, number).map(lambda t, n=n: f'{n}({t[0]}, {t[1]})') for n in ('scale', 'bias')),
        st.tuples(st.sampled_from(['mul', 'max', 'sub', 'div', 'gate']), inner, inner).map(lambda t: f'{t[0]}({t[1]}, {t[2]})'),
        st.tuples(inner, inner, number).map(lambda t: f'mix({t[0]}, {t[1]}, {t[2]})'),
        st.tuples(st.sampled_from(['tanh', 'square', 'sinh', 'neg', 'identity']), inner).map(lambda t: f'{t[0]}({t[1]})'))


@settings(deadline=None, max_examples=100)
@given(tree(4))
def test_print_and_parse_lose_nothing(text):
    f = Activation(text)
    again = Activation(f.expression)
    x = torch.linspace(-5, 5, 101)
    assert again.expression == f.expression
    assert torch.equal(again(x).nan_to_num(7.0), f(x).nan_to_num(7.0))


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(max_size=60), st.text('x(),mulgate 0.1e-', max_size=60)))
def test_parser_raises_nothing_but_its_own_error(text):
    try:
        parse(text)
    except ExpressionError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize('text, word', [
    ('', 'the end'), ('mul(x', "','"), ('silo(x)', 'did you mean silu?'), ('mul(x, 2)', 'a number stands last'), ('x x', 'the end'),
    ('__import__("os")', 'unexpected'), ('scale(x, nan)', 'expected'), ('scale(x, 1e999)', 'below 1e30'),
    ('tanh(' * 10_000 + 'x', 'limit'), ('tanh(' * 60 + 'x' + ')' * 60, 'too large'), ('x;x', 'unexpected')])
def test_wrong_expressions(text, word):
    with pytest.raises(ExpressionError) as caught:
        Activation(text)
    assert word in str(caught.value)


def test_named():
    x = torch.linspace(-12, 12, 241, dtype=torch.float64)
    for name, function in (('gelu', torch.nn.GELU()), ('mish', torch.nn.Mish()), ('relu2', lambda x: torch.relu(x) ** 2),
                           ('elu', torch.nn.ELU()), ('leaky_relu', torch.nn.LeakyReLU())):
        torch.testing.assert_close(named(name).double()(x), function(x))
    for name in NAMED:
        assert named(name)(x).isfinite().all()
    w = 0.43
    want = w * torch.nn.functional.silu(torch.sigmoid(torch.nn.functional.silu(x)) * x * x) + (1 - w) * torch.nn.functional.silu(x)
    inside = x.abs() < 3  # where nothing is clipped
    torch.testing.assert_close(named('grafs_gpt_2').double()(x)[inside], want[inside], rtol=1e-6, atol=1e-6)
    with pytest.raises(ExpressionError, match='did you mean gelu'):
        named('gulu')


def test_distance():
    silu, twice = named('silu'), lambda x: 3 * torch.nn.functional.silu(2 * x) - 1
    assert distance(twice, silu) < 1e-6       # equal up to input scale, output scale and output shift
    assert distance(named('relu'), silu) > 0.02
    assert distance(lambda x: 0 * x, silu) == 1.0


# -- simplifying

def cells(count: int, seed: int, clip=CLIP, ops: str = 'base') -> list[Activation]:
    """Random cells in float64, every second one with random scalars."""
    draw = torch.Generator().manual_seed(seed)
    found = [Activation(random_expression(draw, ops), clip).double() for _ in range(count)]
    for f in found[::2]:
        for scalar in f.scalars:
            scalar.data.copy_(2 * torch.randn((), generator=draw))
    return found


@pytest.fixture
def float64():
    """Scalars that a rule brings in are float64 like all others: rounding them would cost 1e-8."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_equal_functions(f, g):
    x = torch.linspace(-12, 12, 961, dtype=torch.float64)
    with torch.no_grad():
        before, after = f(x), g(x)
    finite = before.isfinite()  # without a clip x^27 overflows
    torch.testing.assert_close(after[finite], before[finite], rtol=1e-6, atol=1e-9,
                               msg=lambda m: f'{f.expression} -> {g.expression}: {m}')


def assert_simplified(f):
    g = f.simplified()
    assert_equal_functions(f, g)
    assert length(g.tree) <= length(f.tree) and len(g.scalars) <= len(f.scalars) + length(f.tree) - length(g.tree) + 1
    assert g.simplified().expression == g.expression, f.expression


@pytest.mark.parametrize('clip, ops', [(CLIP, 'base'), (0.7, 'base'), (None, 'base'), (CLIP, 'base,periodic,swish')])
def test_simplified_random_cells_are_the_same_functions(float64, clip, ops):
    """Equal on [-12, 12], never longer, and simplifying twice changes nothing."""
    for f in cells(150, seed=1, clip=clip, ops=ops):
        assert_simplified(f)


@pytest.mark.slow
def test_simplified_10_000_random_cells(float64):
    """The same for 10,000 cells."""
    for f in cells(10_000, seed=2):
        assert_simplified(f)


@settings(deadline=None, max_examples=40)
@given(tree(3), st.sampled_from([CLIP, 0.3, None]))
def test_simplified_deeper_expressions(text, clip):
    """Any expression, with huge scalars, comes out as something that parses, no longer than it was, and stays."""
    g = Activation(text, clip).simplified()
    assert length(g.tree) <= length(parse(text)[0])
    assert Activation(g.expression, clip).expression == g.expression


@pytest.mark.parametrize('text, short', [
    ('max(x, x)', 'x'), ('min(tanh(x), tanh(x))', 'tanh(x)'), ('add(x, x)', 'scale(x, 2)'), ('neg(neg(x))', 'x'),
    ('scale(scale(x, 2), 3)', 'scale(x, 6)'), ('scale(const(2), 3)', 'const(6)'), ('bias(bias(x, 1), -3)', 'bias(x, -2)'),
    ('bias(bias(x, 1), -1)', 'x'), ('tanh(sub(x, x))', 'const(0)'), ('square(const(5))', 'const(10)'),
    ('mix(exp(x), exp(x), 0.3)', 'exp(x)'), ('mix(const(0), x, 0)', 'scale(x, 0.5)'), ('gate(relu(x), relu(x))', 'relu(silu(x))'),
    ('gate(const(0), tanh(x))', 'scale(tanh(x), 0.5)'), ('mul(sigmoid(tanh(x)), tanh(x))', 'silu(tanh(x))'),
    ('mul(sigmoid(x), x)', 'mul(x, sigmoid(x))'),                     # silu does not clip: this stays
    ('mul(sigmoid(x), sin(x))', 'gate(x, sin(x))'), ('mul(x, x)', 'square(x)'), ('mul(x, square(x))', 'cube(x)'),
    ('relu(relu(x))', 'relu(x)'), ('relu(square(relu(x)))', 'square(relu(x))'), ('abs(square(x))', 'square(x)'),
    ('abs(abs(x))', 'abs(x)'), ('relu(abs(x))', 'abs(x)'), ('min0(abs(x))', 'const(0)'), ('max(x, const(0))', 'relu(x)'),
    ('min(const(0), x)', 'min0(x)'), ('max(const(0), square(x))', 'square(x)'), ('square(abs(x))', 'square(x)'),
    ('tanh(neg(x))', 'neg(tanh(x))'), ('max(neg(x), x)', 'abs(x)'), ('max(tanh(x), tanh(sin(x)))', 'tanh(max(x, sin(x)))'),
    ('add(relu(x), min0(x))', 'x'), ('sub(relu(x), min0(x))', 'abs(x)'), ('sub(x, relu(x))', 'min0(x)'),
    ('add(x, silu(neg(x)))', 'silu(x)'), ('max(silu(x), relu(x))', 'relu(x)'), ('min(tanh(x), softplus(abs(x)))', 'tanh(x)'),
    ('sub(add(x, tanh(x)), x)', 'tanh(x)'), ('mul(relu(x), x)', 'square(relu(x))'), ('mul(neg(x), neg(tanh(x)))', 'mul(x, tanh(x))'),
    ('max(sigmoid(x), const(-0.1))', 'sigmoid(x)'), ('leaky_relu(sigmoid(x))', 'sigmoid(x)'), ('sqrt(relu(x))', 'sqrt(x)'),
    ('mul(min0(x), sqrt(x))', 'const(0)'), ('max(abs(x), abs(leaky_relu(x)))', 'abs(x)'),
    ('max(abs(x), mul(sigmoid(relu(x)), gelu(x)))', 'abs(x)'), ('min(neg(abs(x)), silu(x))', 'neg(abs(x))'), ('mix(x, bias(x, 1), 0)', 'bias(x, 0.5)')])
def test_shortest(text, short):
    """One example a rule: what it must become, word for word."""
    assert Activation(text).simplified().expression == short
    assert_equal_functions(Activation(text).double(), Activation(short).double())


def test_rules_respect_the_clip():
    """The same text, different bounds: a rule that forgets a clip that acts changes the function."""
    for text in ('mul(square(x), x)', 'mul(sigmoid(scale(x, 3)), tanh(x))', 'mul(const(2), tanh(x))', 'square(cube(x))'):
        for clip in (0.3, 0.9, 1.1, CLIP, None):
            f = Activation(text, clip).double()
            assert_equal_functions(f, f.simplified())
    assert Activation('mul(const(2), tanh(x))', 3.0).simplified().expression == 'scale(tanh(x), 2)'
    assert Activation('mul(const(2), tanh(x))', 1.5).simplified().expression == 'mul(const(2), tanh(x))'


def test_ranges_hold_the_values():
    """The proofs rest on ranges: on every piece of the line, every value lies inside its interval."""
    x = torch.linspace(-14, 14, 28 * 64 + 1, dtype=torch.float64)
    for f in cells(200, seed=3, ops='base,periodic,swish'):
        low, high = ranges(with_values(f.tree, [s.item() for s in f.scalars]), f.clip)
        piece = torch.bucketize(x, simplify.EDGES[1:-1])
        with torch.no_grad():
            y = f(x)
        assert (y >= low[piece] - 1e-9).all() and (y <= high[piece] + 1e-9).all(), f.expression


def test_below_is_below():
    """Each pair of the table, on 200,001 points."""
    x = torch.linspace(-200, 200, 200_001, dtype=torch.float64)
    for name, above in simplify.BELOW.items():
        for other in above.split():
            assert (ALL[name](x) <= ALL[other](x) + 1e-12).all(), (name, other)


def test_simplified_keeps_learned_scalars_as_parameters():
    """Scalars of merged operations are merged; a function that can be simplified further still learns."""
    f = Activation('scale(scale(tanh(x), 0.25), 3)')
    f.scalars[1].data.fill_(4.0)
    g = f.simplified()
    assert [s.item() for s in g.scalars] == [1.0] or g.expression == 'tanh(x)'
    h = Activation('bias(scale(scale(x, 2), 3), -1)').simplified()
    h(torch.ones(3)).sum().backward()
    assert sorted((s.item(), s.grad.item()) for s in h.scalars) == [(-1.0, 3.0), (6.0, 3.0)]


@pytest.mark.parametrize('text, latex', [
    ('mul(sigmoid(gelu(x)), elu(x))',
     r'\operatorname{clip}\left(\sigma\left(\operatorname{gelu}\left(x\right)\right) \cdot \operatorname{elu}\left(x\right)\right)'),
    ('cube(tanh(x))', r'\tanh\left(x\right)^3'), ('sqrt(abs(x))', r'\sqrt{\left|x\right|}'),
    ('scale(relu(x), 1e-7)', r'1 \cdot 10^{-7} \cdot \operatorname{ReLU}\left(x\right)'),
    ('laplace(x, leaky_relu(x))', r'\exp\left(-\left|x - \operatorname{leaky\_relu}\left(x\right)\right|\right)')])
def test_latex(text, latex):
    assert Activation(text).latex == latex


def test_every_operation_has_latex_that_matplotlib_can_set():
    """matplotlib's own LaTeX parser is somebody else's judgement of the brackets and words."""
    mathtext = pytest.importorskip('matplotlib.mathtext')
    parser = mathtext.MathTextParser('path')
    for name, op in ALL.items():
        latex = Activation(f'{name}({", ".join(["square(bias(x, -2))"] * (2 if name in BINARY_NAMES else "{a}" in op.formula))})').latex
        parser.parse(f'${latex}$')


# -- the exported module

def load(text: str, folder: Path):
    """The exported file, imported as a stranger would."""
    path = folder / 'exported.py'
    path.write_text(text, encoding='utf-8')
    spec = importlib.util.spec_from_file_location('exported', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Found()


def test_exported_module_equals_the_activation():
    """50 random cells, values and gradients: exec'ed where torch is all that can be imported."""
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64, requires_grad=True)

    def only_torch(name, *rest):
        assert name.split('.')[0] == 'torch', f'the exported file imports {name}'
        return __import__(name, *rest)
    builtins = {**vars(__import__('builtins')), '__import__': only_torch}
    for f in [g for clip in (CLIP, None) for g in cells(25, seed=4, clip=clip, ops='base,periodic,swish')]:
        namespace = {'__builtins__': builtins, '__name__': 'exported'}
        exec(f.module(note='from a test'), namespace)
        found = namespace['Found']().double()
        for p, s in zip(found.parameters(), f.scalars):
            assert p.item() == pytest.approx(s.item(), rel=1e-6)
            p.data.copy_(s)
        torch.testing.assert_close(found(x), f(x), rtol=1e-9, atol=1e-12, equal_nan=True)
        if f.clip:
            gradients = [torch.autograd.grad((g(x) + 0 * x).sum(), [x, *g.parameters()], allow_unused=True) for g in (found, f)]
            torch.testing.assert_close(gradients[0][0], gradients[1][0])
            assert len(gradients[0]) == len(gradients[1])


def test_every_operation_can_be_exported():
    """One expression an operation; one that torch does not have says where to add it."""
    for name in ALL:
        f = Activation(f'{name}({"x, tanh(x)" if name in BINARY_NAMES else "x" if name != "const" else "2"})')
        namespace = {}
        exec(f.module(), namespace)
        x = torch.linspace(-3, 3, 101)
        torch.testing.assert_close(namespace['Found']()(x), f(x))
    own = expression.Node(Op('own', lambda a: a + 1, 'own({a})'), ('x',), None)
    with pytest.raises(ExpressionError, match='operation own .* CODE'):
        activation.module_text(own, 'own(x)', None, '')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_safe(dtype, tmp_path):
    """exp and sinh overflow float16 from 11.1 on; inside, nothing may: values and gradients stay finite."""
    for text in ('mul(exp(x), tanh(x))', 'sinh(square(x))', 'cube(cube(x))', 'softplus(scale(x, 30))', 'mix(exp(x), x, 2)'):
        f = Activation(text)
        for g in (f, f.to(dtype), load(f.module(), tmp_path), load(f.module(), tmp_path).to(dtype)):
            x = torch.tensor([-300, -20, -1, 0, 0.5, 3, 12, 20, 300], dtype=dtype, requires_grad=True)
            y = g(x)
            assert y.dtype == dtype and y.isfinite().all()
            torch.testing.assert_close(y.float(), Activation(text)(x.float()), rtol=1e-2, atol=1e-2)
            assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


TEXTS = ('mix(gate(asinh(x), scale(erf(x), 0.5)), atan(sqrt(x)), 0.2)', 'max(sinh(x), bias(min0(x), 2))', 'const(0.5)',
         'silu(mul(sigmoid(relu(x)), gelu(x)))')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('text', TEXTS)
def test_exported_module_scripts_and_exports(text, tmp_path):
    """torch.jit.script and torch.export, and a shape that the tracing has not seen."""
    f, found = Activation(text), load(Activation(text).module(), tmp_path)
    x, other = torch.randn(4, 3), torch.randn(7, 3)
    scripted = torch.jit.script(found)
    program = torch.export.export(found, (x,), dynamic_shapes=({0: torch.export.Dim('n')},)).module()
    for g in (scripted, program):
        torch.testing.assert_close(g(other), f(other))
    assert scripted(other.half()).dtype == torch.float16


@pytest.mark.filterwarnings('ignore')
def test_exported_module_to_onnx(tmp_path):
    """Where the exporter's packages are: the ONNX program, run by ONNX's own reference, is the function."""
    pytest.importorskip('onnxscript')
    evaluator = pytest.importorskip('onnx.reference').ReferenceEvaluator
    for text in TEXTS[:1]:
        x = torch.randn(4, 3)
        torch.onnx.export(load(Activation(text).module(), tmp_path), (x,), tmp_path / 'f.onnx', dynamo=True, verbose=False)
        y, = evaluator(str(tmp_path / 'f.onnx')).run(None, {evaluator(str(tmp_path / 'f.onnx')).input_names[0]: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), Activation(text)(x).detach(), rtol=1e-4, atol=1e-5)


# -- the gallery

ENTRY = {'expression': 'mul(relu(x), x)', 'clip': 5.0, 'model': 'minigpt', 'data': 'tinystories_sample', 'from': 'seed 0'}


def test_gallery(tmp_path, monkeypatch):
    """A name of the gallery is a function like any other, known ones come first, and none is no error."""
    path = tmp_path / 'gallery.json'
    monkeypatch.setattr(gallery, '__defaults__', (path,))
    assert gallery() == {}
    path.write_text(json.dumps({'bumps': ENTRY, 'gelu': ENTRY}))
    assert gallery()['bumps'].source == 'seed 0'
    assert (named('bumps').expression, named('bumps').clip) == ('mul(relu(x), x)', 5.0)
    assert named('gelu').expression == 'gelu(x)'
    with pytest.raises(ExpressionError, match='did you mean bumps'):
        named('bmps')


def test_evaluate_takes_names_of_the_gallery(tmp_path, monkeypatch):
    """With its clip, and with where it was found, so that the table can say so; expressions are not looked up."""
    path = tmp_path / 'gallery.json'
    path.write_text(json.dumps({'bumps-2': ENTRY}))
    monkeypatch.setattr(gallery, '__defaults__', (path,))
    candidate = evaluate.resolve('bumps-2')
    assert (candidate.name, candidate.activation.clip, candidate.searched) == ('bumps-2', 5.0, 'minigpt/tinystories_sample')
    path.write_text('{')
    assert evaluate.resolve('gelu').searched == '' and evaluate.resolve('mul(x, x)').activation.clip == CLIP
    with pytest.raises(ValueError, match='cannot read the gallery'):
        evaluate.resolve('bumps-2')


@pytest.mark.parametrize('text, word', [
    ('', 'cannot read'), ('[1]', 'no object'), ('{"a": 3}', "entry 'a'"), ('{"a": {"expression": "x"}}', "lacks 'clip'"),
    (json.dumps({'a': {**ENTRY, 'expression': 'silo(x)'}}), 'did you mean silu'), (json.dumps({'a': {**ENTRY, 'clip': -1}}), 'clip -1'),
    (json.dumps({'a': {**ENTRY, 'expression': 7}}), "entry 'a'"), (json.dumps({'b': ENTRY, 'a': {**ENTRY, 'clip': 'x'}}), "entry 'a'")])
def test_damaged_gallery(tmp_path, text, word):
    """One line that names the file and the entry."""
    path = tmp_path / 'gallery.json'
    path.write_text(text)
    with pytest.raises(ExpressionError) as caught:
        gallery(path)
    assert word in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_the_gallery_in_the_repository_is_sound():
    """Whatever has been put there can be used."""
    for name in gallery():
        assert named(name)(torch.linspace(-3, 3, 7)).isfinite().all()

"""models.py: our networks against published sizes and torch's layers; other networks against themselves."""
import copy
import functools
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import models
from models import MODELS, STANDARD, network, replaced, teacher_and_student

def checksum(model):
    x = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    return float(x @ torch.arange(len(x)).double().cos())

def size(model):
    return sum(p.numel() for p in model.parameters())

def same(call):
    return call

# ---- our networks ----

@pytest.mark.parametrize('name, value', [('resnet20', 40.85815155033102), ('minigpt', -13.70305407360004),
                                         ('toy', 2.6097724159066593)])
def test_initial_weights(name, value):
    """A seed goes on meaning what it means in the published results."""
    torch.manual_seed(0)
    assert checksum(MODELS[name](nn.ReLU)) == pytest.approx(value, rel=1e-6)

@pytest.mark.parametrize('name, shape, count, standard', [
    *((f'resnet{depth}', {}, count, 'relu') for depth, count in    # He et al.: 0.27 ... 1.7 million
      ((20, 269722), (32, 464154), (44, 658586), (56, 853018), (110, 1727962))),
    *((name, dict(classes=1000, side=224, patch=16), count, 'gelu') for name, count in    # DeiT, torchvision
      (('vit_tiny', 5717416), ('vit_small', 22050664), ('vit_base', 86567656))),
    *((name, dict(vocabulary=99, context=77), k * (12 * n ** 2 + 4 * n) + (99 + 77 + 2) * n, 'gelu')
      for name, k, n in (('minigpt', 3, 192), ('tinygpt', 6, 384), ('smallgpt', 9, 576))),
    ('toy', {}, 1153, 'relu')])
def test_parameter_counts(name, shape, count, standard):
    """The families have the published sizes; GPT that of nanoGPT with biases in the layer norms only."""
    with torch.device('meta'):
        assert size(MODELS[name](nn.ReLU, **shape)) == count
    assert STANDARD[name] == standard and set(STANDARD) == set(MODELS)

@pytest.mark.parametrize('name, theirs', [('elman', nn.RNN), ('gru', nn.GRU)])
def test_recurrent_networks_are_those_of_torch(name, theirs):
    """With tanh, elman and gru compute what nn.RNN and nn.GRU do."""
    ours, theirs = MODELS[name](nn.Tanh, vocabulary=11, width=8), theirs(8, 8, batch_first=True)
    theirs.load_state_dict({'weight_ih_l0': ours.input.weight, 'bias_ih_l0': ours.input.bias,
                            'weight_hh_l0': ours.hidden.weight, 'bias_hh_l0': ours.hidden.bias})
    tokens = torch.randint(11, (3, 9))
    torch.testing.assert_close(ours(tokens), ours.head(theirs(ours.embedding(tokens))[0]))
    assert STANDARD[name] == 'tanh'

def test_teacher_and_student():
    """The student has the teacher's first layer, frozen; targets have mean 0 and variance 1."""
    torch.manual_seed(0)
    teacher, student = teacher_and_student(nn.Tanh, nn.ReLU)
    assert [checksum(teacher), checksum(student)] == pytest.approx([-2.20266651912371, -1.61661270946157])
    assert torch.equal(teacher.first.weight, student.first.weight) and not student.first.weight.requires_grad
    y = teacher(torch.randn(20000, 16))
    assert student.last.weight.requires_grad and abs(y.mean()) < 0.05 and abs(y.std() - 1) < 0.05

# ---- any other network ----

class Net(nn.Module):
    """Linear, `middle`, batch norm, dropout and linear; a buffer made by expand (FAULTS 11)."""
    def __init__(self, middle):
        super().__init__()
        self.register_buffer('mask', torch.zeros(1).expand(4, 3), persistent=False)
        self.first, self.middle, self.norm = nn.Linear(6, 6), middle, nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.dropout(self.norm(self.middle(self.first(x))), 0.3, self.training))

def in_place(x):
    """Result ignored; input used again; a part changed: three sites."""
    shortcut = x
    y = F.relu_(x) * 1.5
    F.leaky_relu(y, 0.2, inplace=True)
    z = y * 1.5
    z[:, :3].relu_()
    return z + shortcut

CALLS = {
    'relu': nn.ReLU(), 'inplace': nn.ReLU(True), 'torch': torch.relu, 'made': lambda x: nn.ReLU()(x),
    'keyword': lambda x: torch.relu(input=x), 'aten': torch.ops.aten.relu, 'Tensor': torch.Tensor.relu,
    'relu6': nn.ReLU6(True), 'hardtanh': nn.Hardtanh(-2, 2), 'gelu': nn.GELU('tanh'), 'silu': nn.SiLU(True),
    'leaky_relu': functools.partial(F.leaky_relu, negative_slope=0.2), 'elu': nn.ELU(0.5, True),
    'softplus': nn.Softplus(2), 'threshold': nn.Threshold(0.1, 0.2), 'in place': in_place}

@pytest.mark.parametrize('name', CALLS)
def test_every_kind_of_call_is_a_site_and_the_original_call_changes_nothing(name):
    """Outputs, gradients and buffers are bit for bit those of the untouched network, in training and eval.
    FAULTS 4 and 9."""
    model, x = Net(CALLS[name]), torch.randn(5, 6)
    alone, random = copy.deepcopy(model), torch.get_rng_state()
    other = replaced(model, same, x)
    assert len(other.sites) == (3 if name == 'in place' else 1) and torch.equal(random, torch.get_rng_state())
    for training in (True, True, False):
        results = []
        for each in (alone.train(training), other.train(training)):
            torch.manual_seed(1)
            y = each(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(each.parameters()))])
        assert all(map(torch.equal, *results))
    assert all(map(torch.equal, model.buffers(), alone.buffers()))
    zero = replaced(model, lambda call: torch.zeros_like, x).eval()
    assert torch.equal(zero(x), zero(-x))    # nothing passes but through sites

@pytest.mark.parametrize('write', [lambda h: h.add_(torch.tanh(F.relu(h))), lambda h: F.relu(h) * h.mul_(2)])
def test_an_input_that_is_written_into_later(write):
    """ReLU keeps its result for backward, but the function in its place may keep its input. FAULTS 12."""
    model, x = Net(lambda h: write(1 * h)), torch.randn(5, 6)
    other = replaced(model, lambda call: lambda v: v * torch.sigmoid(v), x)
    other(x).sum().backward()
    assert len(other.changed) == len(other.sites) == 1

class Branches(nn.ModuleList):
    """One more call in eval, and the first layers skipped on demand."""
    def forward(self, x, skip=0):
        x = x if self.training else F.leaky_relu(x)
        for layer in self[skip:]:
            x = layer(x)
        return x

def test_a_call_keeps_its_site():
    """Also when a pass skips calls before it, or makes further ones: LayerDrop, heads for training only."""
    x, other = torch.randn(4), replaced(Branches([nn.CELU(0.5), nn.CELU(1.5)]), same, torch.randn(4))
    assert other.describe() == '3 sites: 2 celu, 1 leaky_relu'
    assert torch.equal(other(x, skip=1), F.celu(x, 1.5))
    assert torch.equal(other.eval()(x), F.celu(F.celu(F.leaky_relu(x), 0.5), 1.5)) and len(other.sites) == 3
    other.model.append(nn.CELU(2.5, inplace=True))    # never recorded
    assert torch.equal(other(x, skip=2), F.celu(F.leaky_relu(x), 2.5))
    assert len(other.sites) == 4 and not other.sites[3].training

@pytest.mark.filterwarnings('ignore:Using `torch.compile')
@pytest.mark.parametrize('make', [
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    lambda: torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend='eager')])
def test_short_cuts_of_pytorch(make):
    """In eval mode without gradient, too, the new function is called. FAULTS 1."""
    calls = []
    other = replaced(make(), lambda call: lambda x: calls.append(1) or call(x), torch.randn(2, 5, 8)).eval()
    with torch.no_grad():
        assert other(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    assert len(calls) == len(other.sites) > 0

RELU, SIGMOID = nn.ReLU(inplace=True), nn.Sigmoid()

@pytest.mark.filterwarnings('ignore:None of the inputs', 'ignore:.*torch.jit')
@pytest.mark.parametrize('layers, only, words', [
    ([RELU, SIGMOID, nn.PReLU()], None, '^1 site: 1 relu; left alone: 1 sigmoid, 1 prelu$'),
    ([RELU, SIGMOID], 'relu, sigmoid', '^2 sites: 1 relu, 1 sigmoid$'),
    ([RELU, nn.RNN(6, 6, nonlinearity='relu')], None, '^1 site: 1 relu; left alone: 1 rnn_relu$'),
    ([Net(lambda x: F.gelu(checkpoint(F.relu, x, use_reentrant=True)))], None,
     'incompatible with .grad'),
    ([Net(lambda x: F.gelu(torch.no_grad()(F.relu)(x)))], None,
     '^1 site: 1 gelu; left alone: 1 relu without gradient$'),
    ([Net(lambda x: F.gelu(checkpoint(F.relu, x, use_reentrant=False)))], None, 'checkpoint.* out of reach'),
    ([Net(lambda x: F.relu(torch._addmm_activation(x[0], x, torch.eye(6))))], None, 'reach: 2 addmm_act'),
    ([Net(torch.vmap(F.relu))], None, 'autograd.Function'), ([RELU], 'gelu', 'sites; left .*leave only out'),
    (['torch.jit', RELU], None, 'out of reach: 2 relu'), ([RELU], 'rleu', 'did you mean relu'),
    ([SIGMOID], None, 'calls no activation .*left alone: 1 sigmoid')])
def test_what_is_left_alone_and_what_is_refused(layers, only, words):
    """Left alone: gates, what `only` leaves out, calls whose gradient would not reach the site. Refused:
    activations that do not pass Python, or pass again in backward. FAULTS 1 and 4."""
    layers, x = [torch.jit.script(nn.ReLU()) if m == 'torch.jit' else m for m in layers], -torch.ones(2, 6)
    try:
        said = replaced(nn.Sequential(*layers), same, x, only).describe()
    except (ValueError, RuntimeError) as error:
        said = str(error)
    assert re.search(words, said) and '\n' not in said
    assert torch.equal(x, -torch.ones(2, 6))    # the example is not written into

def test_a_replaced_network_is_a_module():
    """One shared function counts once; copy, state, modes, empty batches."""
    shared, x, model = nn.PReLU(), torch.randn(5, 6), Net(nn.Sequential(nn.ReLU(), nn.GELU()))
    model.norm.eval()
    other = replaced(model, lambda call: shared, x)
    assert model.training and not model.norm.training
    twin = copy.deepcopy(other.eval())
    assert size(other) == size(other.model) + 1 and len(other.sites) == 2 and not twin.sites[0].training
    nn.init.constant_(shared.weight, 7)
    assert not torch.equal(other(x), twin(x))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(other(x), twin(x)) and other(x[:0]).shape == (0, 3)

# ---- --model ----

def config(model):
    return SimpleNamespace(model=model, context=8, dropout=0.0, compile=False, batch_size=2, only='')

def images(side=32, classes=5):
    return SimpleNamespace(name='pictures', kind='image', classes=classes, channels=3, side=side,
                           train=(torch.randint(256, (4, 3, side, side), dtype=torch.uint8), torch.zeros(4)))

TEXT = SimpleNamespace(name='letters', kind='text', classes=11, channels=0, side=0)

@pytest.mark.parametrize('name, side, sites', [('resnet20', 32, 19), ('vit_tiny', 16, 12), ('toy', 16, 1),
                                               ('minigpt', 0, 3), ('elman', 0, 1), ('gru', 0, 1)])
def test_our_networks_fit_the_data(name, side, sites):
    """Every site has its module; and in a text a later token does not change earlier logits."""
    model = network(config(name), nn.Mish, images(side) if side else TEXT)
    assert sum(isinstance(m, nn.Mish) for m in model.modules()) == sites
    if side:
        assert model(torch.randn(4, 3, side, side)).shape == (4, 5)
    else:
        before, after = model(torch.arange(8)[None]), model(torch.arange(8)[None] % 5)
        assert before.shape == (1, 8, 11) and not torch.equal(before[:, 5:], after[:, 5:])
        assert torch.equal(before[:, :5], after[:, :5])

OWN = 'import torch.nn as nn\nclass Own(nn.Flatten):\n    def forward(self, x):\n        return '

@pytest.mark.parametrize('place, source, message', [
    ('minigpt', '', '--model minigpt with --data pictures: this network reads text'),
    ('nowhere.py:make', '', 'there is no file .*nowhere.py'),
    ('own.py:make', 'import nothing', "own.py, line 1, ModuleNotFoundError: No module named 'nothing'"),
    ('own.py:make', 'raise SystemExit(3)', 'SystemExit'),
    ('own.py:make', 'def mike(): pass', "no function 'make' in it .did you mean mike"),
    ('own.py:make', 'make = dict', r'make\(\) returned dict, no network'),
    ('own.py:Own', OWN + 'x.relu().mean((2, 3)) if self.training else None',
     r"given \(2, 3, 32, 32\), it returns ..2, 3., 'NoneType'. in .*wanted: \(2, 5\)"),
    ('own.py:Own', OWN + 'x.relu() @ x[0, 0, 0, :2]', 'own.py, line 4, RuntimeError')])
def test_errors_are_one_line(place, source, message, tmp_path, monkeypatch):
    """The cause, where it is, and what is wanted. FAULTS 11."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.py').write_text(source)
    with pytest.raises(ValueError, match=message) as caught:
        network(config(place), same, images())
    assert '\n' not in str(caught.value) and place in str(caught.value)

NEIGHBOURS = {
    'models/small.py': 'import torch.nn as nn\ndef small():\n    return nn.LeakyReLU(0.2)\n',
    'models/__init__.py': 'from models.small import small as small_one\n',
    'data.py': 'CLASSES = 5\n',
    'my nets.py': 'import torch.nn as nn\nfrom models.small import small\n'
                  'class Net(nn.Sequential):\n    def forward(self, x):\n        import late_one\n'
                  '        return late_one.scale * super().forward(x)\n'
                  'def make():\n    import data, json, pathlib\n'
                  '    scale = json.loads((pathlib.Path(__file__).parent / "scale.json").read_text())\n'
                  '    return Net(nn.Flatten(), small(), nn.Linear(3072, data.CLASSES),\n'
                  '               nn.Softplus(scale))\n',
    'late_one.py': 'scale = 2.0\n', 'scale.json': '1.5'}

@pytest.mark.parametrize('package', [True, False])
def test_own_file_sees_its_neighbours(package, tmp_path, monkeypatch):
    """`models` and `data` beside the file are the user's, ours stay ours, changes count. FAULTS 6, 8, 9."""
    (tmp_path / 'models').mkdir()
    for name, source in NEIGHBOURS.items():
        if package or '__init__' not in name:
            (tmp_path / name).write_text(source)
    library = tmp_path / '.venv/site-packages'
    library.mkdir(parents=True)
    (library / f'installed{package}.py').write_text('x = 1\n')
    monkeypatch.syspath_prepend(library)
    with open(tmp_path / 'my nets.py', 'a') as file:
        file.write(f'import installed{package}\n')
    place = f'{tmp_path}/my nets.py:make'
    model = network(config(place), same, images())
    installed = __import__(f'installed{package}')
    assert model.sites[0](torch.tensor([-1.0])).item() == pytest.approx(-0.2)
    import data
    assert hasattr(data, 'load') and __import__('models') is models
    (tmp_path / 'unrelated.py').write_text('x = 1')
    assert len(model.source) == 8 and network(config(place), same, images()).source == model.source
    for name, *new in ('late_one.py', '2.0', '9'), ('scale.json', '1.5', '2'), ('data.py', '5', '60'):
        (tmp_path / name).write_text(NEIGHBOURS[name].replace(*new))
        other = network(config(place), same, images(classes=60 if name == 'data.py' else 5))
        assert other.source != model.source
        model = other
    assert __import__(f'installed{package}') is installed    # in a .venv beside the file

@pytest.mark.parametrize('name, described', [
    ('resnet18', '17 sites: 17 relu'), ('mobilenet_v2', '35 sites: 35 relu6'),
    ('googlenet', '57 sites: 57 relu'),
    ('mobilenet_v3_small', '33 sites: 19 hardswish, 14 relu; left alone: 9 hardsigmoid')])
def test_torchvision(name, described, capsys):
    """Networks of torchvision, untouched: all activations, bit for bit the same outputs, one note."""
    pytest.importorskip('torchvision', reason='torchvision is optional: pip install torchvision')
    model, _ = (network(config(f'torchvision:{name}'), same, images(classes=10)) for _ in range(2))
    x = torch.randn(2, 3, 32, 32)
    assert model.describe() == described and torch.equal(model.eval()(x), model.model(x))
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert capsys.readouterr().err.count('224') == 1

"""models.py: our networks against published sizes and torch's layers; other networks against themselves."""
import copy
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import models
from models import MODELS, STANDARD, build, network, replaced, source_digest, teacher_and_student

def checksum(model):
    x = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    return float(x @ torch.arange(len(x)).double().cos())

def size(model):
    return sum(p.numel() for p in model.parameters())

def same(call):
    return call

# ---- our networks ----

@pytest.mark.parametrize('name, value', [('resnet20', 40.85815155033102), ('vit_tiny', -49.52503006619015),
                                         ('minigpt', -13.70305407360004), ('toy', 2.6097724159066593)])
def test_initial_weights(name, value):
    """A seed goes on meaning what it means in the published results."""
    torch.manual_seed(0)
    if name == 'vit_tiny' and abs(nn.init.trunc_normal_(torch.empty(1)).item() - 1.5409961) > 1e-5:
        pytest.skip('this version of torch draws truncated normals in another way')
    torch.manual_seed(0)
    assert checksum(build(name, nn.ReLU)) == pytest.approx(value, rel=1e-6)

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
        assert size(build(name, nn.ReLU, **shape)) == count
    assert STANDARD[name] == standard and set(STANDARD) == set(MODELS)

@pytest.mark.parametrize('name, theirs', [('elman', nn.RNN), ('gru', nn.GRU)])
def test_recurrent_networks_are_those_of_torch(name, theirs):
    """With tanh, elman and gru compute what nn.RNN and nn.GRU do."""
    ours, theirs = build(name, nn.Tanh, vocabulary=11, width=8), theirs(8, 8, batch_first=True)
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
    assert abs(y.mean()) < 0.05 and abs(y.std() - 1) < 0.05

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
    """Result ignored; input used again; a part changed."""
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
    'celu': nn.CELU(1.3, True), 'softplus': nn.Softplus(2), 'threshold': nn.Threshold(0.1, 0.2)}

@pytest.mark.parametrize('name', [*CALLS, 'in place'])
def test_every_kind_of_call_is_a_site_and_the_original_call_changes_nothing(name):
    """Outputs, gradients and buffers are bit for bit those of the untouched network, in training and eval. A
    site writes into its input where the network reads that again, and only there. FAULTS 4 and 9."""
    model, x = Net(CALLS.get(name, in_place)), torch.randn(5, 6)
    alone, random = copy.deepcopy(model), torch.get_rng_state()
    other = replaced(model, same, x)
    assert (len(other.sites), other.reread) == ((3, True) if name == 'in place' else (1, False))
    assert torch.equal(random, torch.get_rng_state())
    for training in (True, True, False):
        results = []
        for each in (alone.train(training), other.train(training)):
            torch.manual_seed(1)
            y = each(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(each.parameters()))])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), alone.buffers()))
    zero = replaced(model, lambda call: torch.zeros_like, x).eval()
    assert torch.equal(zero(x), zero(-x))    # nothing passes but through sites

class Branches(nn.Module):
    """One more call in eval; the first ones skipped on demand; the last is made on the spot."""
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)])

    def forward(self, x, skip=0):
        x = x if self.training else F.leaky_relu(x)
        for layer in self.layers[skip:]:
            x = layer(x)
        return nn.Softplus()(x)

def test_a_call_keeps_its_site():
    """Also when a pass skips calls before it, or makes further ones: LayerDrop, heads for training only."""
    x, other = torch.randn(4), replaced(Branches(), same, torch.randn(4))
    assert other.describe() == '4 sites: 3 leaky_relu, 1 softplus'
    assert torch.equal(other(x, skip=1), F.softplus(F.leaky_relu(x, 0.2)))
    expected = F.softplus(F.leaky_relu(F.leaky_relu(F.leaky_relu(x), 0.1), 0.2))
    assert torch.equal(other.eval()(x), expected) and len(other.sites) == 4
    other.model.layers.append(nn.LeakyReLU(0.3, inplace=True))    # never recorded
    assert torch.equal(other(x, skip=2), F.softplus(F.leaky_relu(F.leaky_relu(x), 0.3)))
    assert len(other.sites) == 5 and not other.sites[4].training

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

@pytest.mark.filterwarnings('ignore:None of the inputs')
@pytest.mark.parametrize('layers, only, described', [
    ([RELU, SIGMOID, nn.PReLU()], None, '1 site: 1 relu; left alone: 1 sigmoid, 1 prelu'),
    ([RELU, SIGMOID], 'relu, sigmoid', '2 sites: 1 relu, 1 sigmoid'),
    ([RELU, nn.SiLU()], 'silu', '1 site: 1 silu; left alone: 1 relu'),
    ([RELU, nn.RNN(6, 6, nonlinearity='relu')], None, '1 site: 1 relu; left alone: 1 rnn_relu'),
    ([Net(lambda x: F.gelu(checkpoint(F.relu, x, use_reentrant=True)))], None,
     '1 site: 1 gelu; left alone: 1 relu without gradient')])
def test_what_is_left_alone_is_said(layers, only, described):
    """Gates, what `only` leaves out, and calls whose gradient would not reach the site. FAULTS 4."""
    x = -torch.ones(2, 6)
    assert replaced(nn.Sequential(*layers), same, x, only).describe() == described
    assert torch.equal(x, -torch.ones(2, 6))    # the example is not written into

def scripted(what):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')    # torch.jit is deprecated, but met
        return torch.jit.script(what)

@pytest.mark.parametrize('middle, only, message', [
    (SIGMOID, None, 'calls no activation .*left alone: 1 sigmoid'), (RELU, 'rleu', 'did you mean relu'),
    (scripted(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), None, 'out of reach: 2 relu'),
    (lambda x: F.relu(torch._addmm_activation(torch.zeros(6), x, torch.eye(6))), None, 'reach: 2 addmm_act'),
    (lambda x: F.gelu(checkpoint(F.relu, x, use_reentrant=False)), None, 'checkpoint.* out of reach')])
def test_what_cannot_be_replaced(middle, only, message):
    """Also activations that do not pass Python, or pass again in backward: an error, not a part. FAULTS 1."""
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        replaced(Net(middle), same, torch.randn(5, 6), only)
    assert '\n' not in str(caught.value)

def test_a_replaced_network_is_a_module():
    """One shared function counts once; copy, state, modes, empty batches, half and double precision."""
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
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        assert other(x).dtype == torch.bfloat16
    assert other.double()(x.double()).dtype == torch.float64

# ---- --model ----

def config(model, **more):
    return SimpleNamespace(**{**dict(model=model, context=8, dropout=0.0, compile=False), **more})

def images(side=32, classes=5):
    return SimpleNamespace(name='pictures', kind='image', classes=classes, channels=3, side=side,
                           train=(torch.randint(256, (4, 3, side, side), dtype=torch.uint8), torch.zeros(4)))

TEXT = SimpleNamespace(name='letters', kind='text', classes=11, train=torch.randint(11, (99,)).byte())

@pytest.mark.parametrize('name, side, sites', [('resnet20', 32, 19), ('vit_tiny', 16, 12), ('toy', 16, 1)])
def test_networks_for_images(name, side, sites):
    """Ours take the shape of the data; every site has its module."""
    model = network(config(name), nn.Mish, images(side))
    assert model(images(side).train[0].float()).shape == (4, 5)
    assert sum(isinstance(m, nn.Mish) for m in model.modules()) == sites

@pytest.mark.parametrize('name', ['minigpt', 'elman', 'gru'])
def test_networks_for_text(name):
    """A later token does not change earlier logits, else the network would see what it has to predict."""
    model, tokens = network(config(name), nn.GELU, TEXT), torch.arange(8)[None]
    before, after = model(tokens), model(tokens + torch.arange(8).ge(5))
    assert before.shape == (1, 8, 11)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])

OWN = """import torch.nn as nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.LazyLinear(5))
    def forward(self, x):
        return """

@pytest.mark.parametrize('place, source, message', [
    ('resnet21', '', 'unknown model .*did you mean resnet'), ('nowhere.py:make', '', 'no such file'),
    ('minigpt', '', '--model minigpt with --data pictures: this network reads text'),
    ('own.py:make', 'import nothing', "own.py, line 1, ModuleNotFoundError: No module named 'nothing'"),
    ('own.py:make', 'raise SystemExit(3)', 'SystemExit'),
    ('own.py:make', 'def mike(): pass', "no function 'make' in it .did you mean mike"),
    ('own.py:Own', OWN + 'self.f(x), 1', 'returns tuple in training mode; wanted: .2, 5'),
    ('own.py:Own', OWN + 'self.f(x) if self.training else None', 'returns NoneType in eval mode'),
    ('own.py:Own', OWN + 'self.f(x)[:, 1:]', r'given \(2, 3, 32, 32\), it returns \(2, 4\)'),
    ('own.py:Own', OWN + 'self.f(x) @ x', 'own.py, line 7, RuntimeError')])
def test_errors_are_one_line(place, source, message, tmp_path, monkeypatch):
    """The cause, where it is, and what is wanted. FAULTS 11."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.py').write_text(source)
    with pytest.raises(ValueError, match=message) as caught:
        network(config(place), same, images())
    assert '\n' not in str(caught.value) and place in str(caught.value)

@pytest.mark.parametrize('package', [True, False])
def test_own_file_sees_its_neighbours(package, tmp_path):
    """`models` and `data` beside the file are the user's, ours stay ours, changes count. FAULTS 6, 8, 9."""
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / 'small.py').write_text(
        'import torch.nn as nn\ndef small():\n    return nn.Sequential(nn.ReLU6(), nn.LeakyReLU(0.2))\n')
    if package:
        (tmp_path / 'models' / '__init__.py').write_text('from models.small import small as small_one\n')
    (tmp_path / 'data.py').write_text('CLASSES = 5\n')
    (tmp_path / 'my nets.py').write_text(
        'import torch.nn as nn\nfrom models.small import small\ndef make():\n    import data\n    return '
        'nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), small(), nn.Linear(48, data.CLASSES))\n')
    place = f'{tmp_path}/my nets.py:make'
    model, digest = network(config(place), same, images()), source_digest(place)
    assert model.describe() == '2 sites: 1 relu6, 1 leaky_relu'
    assert model.sites[1](torch.tensor([-1.0])).item() == pytest.approx(-0.2)
    import data
    assert hasattr(data, 'load') and __import__('models') is models
    (tmp_path / 'unrelated.py').write_text('x = 1')
    assert len(digest) == 8 and source_digest(place) == digest and source_digest('resnet20') == ''
    (tmp_path / 'data.py').write_text('CLASSES = 60\n')
    assert network(config(place), same, images(classes=60)) and source_digest(place) != digest

@pytest.mark.parametrize('name, described', [
    ('resnet18', '17 sites: 17 relu'), ('mobilenet_v2', '35 sites: 35 relu6'),
    ('googlenet', '57 sites: 57 relu'),
    ('mobilenet_v3_small', '33 sites: 19 hardswish, 14 relu; left alone: 9 hardsigmoid')])
def test_torchvision(name, described, capsys):
    """Networks of torchvision, untouched: all activations, one step, nothing written in place, one note."""
    pytest.importorskip('torchvision', reason='torchvision is optional: pip install torchvision')
    model, _ = (network(config(f'torchvision:{name}'), same, images(classes=10)) for _ in range(2))
    assert model.describe() == described and not model.reread
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert capsys.readouterr().err.count('224') == 1

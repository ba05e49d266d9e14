"""models.py: our networks against published sizes and torch's layers; other networks against themselves."""
import copy
import functools
import os
import random
import sys
import warnings
from types import SimpleNamespace

import numpy as np
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

@pytest.mark.parametrize('name, count, value', [
    ('resnet20', 269722, 40.85815155033102), ('vit_tiny', 5362762, -49.52503006619015),
    ('minigpt', 1403520, -13.70305407360004), ('toy', 1153, 2.6097724159066593)])
def test_initial_weights(name, count, value):
    """A seed goes on meaning what it means in the published results."""
    torch.manual_seed(0)
    if name == 'vit_tiny' and abs(nn.init.trunc_normal_(torch.empty(1)).item() - 1.5409961) > 1e-5:
        pytest.skip('this version of torch draws truncated normals in another way')
    torch.manual_seed(0)
    model = build(name, nn.ReLU)
    assert size(model) == count and checksum(model) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize('name, shape, count', [
    *((f'resnet{depth}', {}, count) for depth, count in    # He et al.: 0.27, 0.46, 0.66, 0.85, 1.7 million
      ((20, 269722), (32, 464154), (44, 658586), (56, 853018), (110, 1727962))),
    *((name, dict(classes=1000, side=224, patch=16), count) for name, count in    # DeiT, torchvision
      (('vit_tiny', 5717416), ('vit_small', 22050664), ('vit_base', 86567656))),
    *((name, dict(vocabulary=99, context=77), depth * (12 * width ** 2 + 4 * width) + (99 + 77 + 2) * width)
      for name, depth, width in (('minigpt', 3, 192), ('tinygpt', 6, 384), ('smallgpt', 9, 576)))])
def test_parameter_counts(name, shape, count):
    """The families have the published sizes; GPT that of nanoGPT with biases in the layer norms only."""
    with torch.device('meta'):
        assert size(build(name, nn.ReLU, **shape)) == count


@pytest.mark.parametrize('name, theirs', [('elman', nn.RNN), ('gru', nn.GRU)])
def test_recurrent_networks_are_those_of_torch(name, theirs):
    """With tanh, elman and gru compute what nn.RNN and nn.GRU do."""
    ours, theirs = build(name, nn.Tanh, vocabulary=11, width=8), theirs(8, 8, batch_first=True)
    theirs.load_state_dict({'weight_ih_l0': ours.input.weight, 'bias_ih_l0': ours.input.bias,
                            'weight_hh_l0': ours.hidden.weight, 'bias_hh_l0': ours.hidden.bias})
    tokens = torch.randint(11, (3, 9))
    torch.testing.assert_close(ours(tokens), ours.head(theirs(ours.embedding(tokens))[0]))


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
    """A linear layer, `middle`, batch norm, dropout and a linear layer."""
    def __init__(self, middle):
        super().__init__()
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
    'relu': nn.ReLU(), 'inplace': nn.ReLU(True), 'F': F.relu, 'torch': torch.relu,
    'made': lambda x: nn.ReLU()(x), 'keyword': lambda x: torch.relu(input=x), 'aten': torch.ops.aten.relu,
    'Tensor': torch.Tensor.relu, 'relu6': nn.ReLU6(True), 'F.relu6': F.relu6, 'hardtanh': nn.Hardtanh(-2, 2),
    'gelu': nn.GELU('tanh'), 'silu': nn.SiLU(True),
    'leaky_relu': functools.partial(F.leaky_relu, negative_slope=0.2),
    'elu': nn.ELU(0.5, True), 'selu': nn.SELU(), 'celu': nn.CELU(1.3, True), 'hardswish': nn.Hardswish(),
    'mish': F.mish, 'softplus': nn.Softplus(2), 'softsign': F.softsign, 'threshold': nn.Threshold(0.1, 0.2)}


@pytest.mark.parametrize('name', [*CALLS, 'in place'])
def test_every_kind_of_call_is_a_site_and_the_original_call_changes_nothing(name):
    """Outputs, gradients and buffers are bit for bit those of the untouched network, in training and eval. A
    site writes into its input where the network reads that again, and only there. FAULTS 4 and 9."""
    model, x = Net(CALLS.get(name, in_place)), torch.randn(5, 6)
    alone, other = copy.deepcopy(model), replaced(model, same, x)
    assert (len(other.sites), len(other.written)) == ((3, 3) if name == 'in place' else (1, 0))
    for training in (True, True, False):
        torch.manual_seed(1)
        expected = alone.train(training)(x)
        torch.manual_seed(1)
        got = other.train(training)(x)
        assert torch.equal(got, expected)
        for a, b in zip(torch.autograd.grad(got.square().sum(), list(model.parameters())),
                        torch.autograd.grad(expected.square().sum(), list(alone.parameters()))):
            assert torch.equal(a, b)
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
    lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation=nn.GELU(), batch_first=True),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    lambda: torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend='eager')])
def test_short_cuts_of_pytorch(make):
    """In eval mode without gradient, too, the new function is called. FAULTS 1."""
    calls = []
    other = replaced(make(), lambda call: lambda x: calls.append(1) or call(x), torch.randn(2, 5, 8)).eval()
    with torch.no_grad():
        assert other(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    assert len(calls) == len(other.sites) > 0


class Own(torch.autograd.Function):
    """An activation with a backward of its own."""
    @staticmethod
    def forward(ctx, x):
        return F.relu(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.filterwarnings('ignore:None of the inputs')
def test_what_is_left_alone_is_said():
    """Gates, what `only` leaves out, and calls whose gradient would not reach the site."""
    x, model = torch.randn(2, 6), nn.Sequential(nn.ReLU(), nn.SiLU(), nn.Sigmoid(), nn.PReLU())
    assert replaced(model, same, x).describe() == '2 sites: 1 relu, 1 silu; left alone: 1 sigmoid, 1 prelu'
    assert replaced(model, same, x, 'relu, sigmoid').describe().startswith('2 sites: 1 relu, 1 sigmoid; left')
    for hidden in (Own.apply, lambda x: checkpoint(F.relu, x, use_reentrant=True)):
        model = Net(lambda x: F.gelu(hidden(x)))
        assert replaced(model, same, x).describe() == '1 site: 1 gelu; left alone: 1 relu without gradient'
    recurrent = nn.Sequential(nn.ReLU(), nn.RNN(6, 6, nonlinearity='relu'))
    assert replaced(recurrent, same, x).describe() == '1 site: 1 relu; left alone: 1 rnn_relu'
    for only, message in (('rleu', 'did you mean relu'), ('gelu', 'no activation to .*left alone: 1 relu')):
        with pytest.raises(ValueError, match=message):
            replaced(recurrent, same, x, only)


def compiled(what):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')    # torch.jit is deprecated, but met
        return torch.jit.script(what)


@pytest.mark.parametrize('make', [
    lambda: Net(compiled(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))), lambda: Net(compiled(F.silu)),
    lambda: Net(lambda x: F.relu(torch._addmm_activation(torch.zeros(6), x, torch.eye(6)))),
    lambda: Net(lambda x: F.gelu(checkpoint(F.relu, x, use_reentrant=False)))])
def test_out_of_reach(make):
    """Activations that do not pass Python, or again in backward, cannot be replaced: an error, not a part."""
    with pytest.raises((ValueError, RuntimeError), match='out of reach'):
        replaced(make(), same, torch.randn(5, 6))


def test_recording_leaves_no_trace():
    """Buffers (also expanded ones), modes, attributes and all random numbers are as before."""
    class Odd(Net):
        def forward(self, x):
            self.calls = random.random() + np.random.rand()
            return super().forward(x) + self.mask[0]
    model, x = Odd(nn.ReLU()), torch.randn(5, 6)
    model.register_buffer('mask', torch.zeros(1).expand(4, 3))
    model.norm.eval()
    state, torchs, python = copy.deepcopy(model.state_dict()), torch.get_rng_state(), random.getstate()
    np.random.seed(0)
    replaced(model, same, x)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torchs, torch.get_rng_state()) and python == random.getstate()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert model.training and not model.norm.training and not hasattr(model, 'calls')


def test_a_replaced_network_is_a_module():
    """One shared function counts once; copy, state, modes, empty batches, half and double, lazy layers."""
    shared, x = nn.PReLU(), torch.randn(5, 6)
    other = replaced(Net(nn.Sequential(nn.ReLU(), nn.GELU())), lambda call: shared, x).eval()
    twin = copy.deepcopy(other)
    assert size(other) == size(other.model) + 1 and len(other.sites) == 2 and not twin.sites[0].training
    nn.init.constant_(shared.weight, 7)
    assert not torch.equal(other(x), twin(x))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(other(x), twin(x)) and other(x[:0]).shape == (0, 3)
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        assert other(x).dtype == torch.bfloat16
    assert other.double()(x.double()).dtype == torch.float64
    lazy = replaced(nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU()), same, x)
    assert lazy(x).shape == (5, 4) and size(lazy) == 36 and lazy.model[0].in_features == 6


# ---- --model ----

def config(model, **more):
    return SimpleNamespace(model=model, context=8, dropout=0.0, **more)


def images(side=32, classes=5):
    return SimpleNamespace(name='pictures', kind='image', classes=classes, channels=3, side=side,
                           train=(torch.randint(256, (4, 3, side, side), dtype=torch.uint8), torch.zeros(4)))


TEXT = SimpleNamespace(name='letters', kind='text', classes=11, train=torch.randint(11, (99,)).byte())


@pytest.mark.parametrize('side', [16, 32])
@pytest.mark.parametrize('name, sites', [('resnet20', 19), ('vit_tiny', 12), ('toy', 1)])
def test_networks_for_images(name, sites, side):
    """Ours take the shape of the data; text is refused in one line; every site has its module."""
    model = network(config(name), nn.Mish, images(side))
    assert model(images(side).train[0].float()).shape == (4, 5)
    assert sum(isinstance(m, nn.Mish) for m in model.modules()) == sites
    with pytest.raises(ValueError, match=f'--model {name} with --data letters: this network reads images'):
        network(config(name), nn.ReLU, TEXT)


@pytest.mark.parametrize('name', ['minigpt', 'elman', 'gru'])
def test_networks_for_text(name):
    """A later token does not change earlier logits, else the network would see what it has to predict."""
    model, tokens = network(config(name), nn.GELU, TEXT), torch.randint(11, (1, 8))
    other = tokens.clone()
    other[0, 5] = (other[0, 5] + 1) % 11
    before, after = model(tokens), model(other)
    assert before.shape == (1, 8, 11)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


OWN = """import torch.nn as nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.LazyLinear(5))
    def forward(self, x):
        """


@pytest.mark.parametrize('place, source, message', [
    ('resnet21', '', 'unknown model .*did you mean resnet'), ('nowhere.py:make', '', 'no such file'),
    ('minigpt', '', 'reads text'), ('own.py', '', 'no such file'),
    ('own.py:make', 'import nothing', "own.py, line 1, ModuleNotFoundError: No module named 'nothing'"),
    ('own.py:make', 'def make(: pass', 'SyntaxError'), ('own.py:make', 'raise SystemExit(3)', 'SystemExit'),
    ('own.py:make', 'def mike(): pass', "no function 'make' in it .did you mean mike"),
    ('own.py:make', 'def make():\n    return 1 / 0', 'own.py, line 2, ZeroDivisionError'),
    ('own.py:Own', OWN + 'return self.f(x), 1', 'returns tuple in training mode; wanted: .2, 5'),
    ('own.py:Own', OWN + 'return self.f(x) if self.training else None', 'returns NoneType in eval mode'),
    ('own.py:Own', OWN + 'return self.f(x)[:, 1:]', r'given \(2, 3, 32, 32\), it returns \(2, 4\)'),
    ('own.py:Own', OWN + 'return self.f(x) @ x', 'own.py, line 7, RuntimeError')])
def test_errors_are_one_line(place, source, message, tmp_path, monkeypatch):
    """The cause, where it is, and what is wanted. FAULTS 11."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.py').write_text(source)
    with pytest.raises(ValueError, match=message) as caught:
        network(config(place), same, images())
    assert '\n' not in str(caught.value) and place in str(caught.value)


@pytest.mark.parametrize('package', [True, False])
def test_own_file_sees_its_neighbours(package, tmp_path, monkeypatch):
    """`models` and `data` beside the file are the user's, ours stay ours, changes count. FAULTS 6, 8, 9."""
    monkeypatch.setattr(sys, 'dont_write_bytecode', False)
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
    time = (tmp_path / 'data.py').stat().st_mtime
    (tmp_path / 'data.py').write_text('CLASSES = 6\n')    # as long as before, within the same second
    os.utime(tmp_path / 'data.py', (time, time))
    assert network(config(place), same, images(classes=6)) and source_digest(place) != digest


@pytest.mark.parametrize('name, count, described', [
    ('resnet18', 11181642, '17 sites: 17 relu'), ('mobilenet_v2', 2236682, '35 sites: 35 relu6'),
    ('mobilenet_v3_small', 1528106, '33 sites: 19 hardswish, 14 relu; left alone: 9 hardsigmoid'),
    ('googlenet', 5610154, '57 sites: 57 relu')])
def test_torchvision(name, count, described, capsys):
    """Networks of torchvision, untouched: sizes with ten classes, all activations, one step, one note."""
    pytest.importorskip('torchvision', reason='torchvision is optional: pip install torchvision')
    model, _ = (network(config(f'torchvision:{name}'), same, images(classes=10)) for _ in range(2))
    assert size(model) == count and model.describe() == described
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert capsys.readouterr().err.count('224') == 1


def test_names():
    """Every network has a standard activation."""
    assert set(STANDARD) == set(MODELS)
    assert [STANDARD[name] for name in ('resnet56', 'vit_base', 'tinygpt', 'gru', 'toy')] == [
        'relu', 'gelu', 'gelu', 'tanh', 'relu']

"""models.py: our networks against published sizes and torch's own layers; other networks against themselves."""
import copy
import functools
import random
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

torch._dynamo  # imported here, lest its start be counted to the first test that needs it


def checksum(model):
    x = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    return float(x @ torch.arange(len(x)).double().cos())


def size(model):
    return sum(p.numel() for p in model.parameters())


# ---- our networks ----

@pytest.mark.parametrize('name, count, value', [
    ('resnet20', 269722, 40.85815155033102), ('vit_tiny', 5362762, -49.52503006619015),
    ('minigpt', 1403520, -13.70305407360004), ('toy', 1153, 2.6097724159066593)])
def test_initial_weights(name, count, value):
    """Seeds go on meaning what they mean in the published results: the first weights stay what they are."""
    torch.manual_seed(0)
    model = build(name, nn.ReLU)
    assert size(model) == count and checksum(model) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize('make, count', [
    *((lambda depth=depth: build(f'resnet{depth}', nn.ReLU), count) for depth, count in
      ((20, 269722), (32, 464154), (44, 658586), (56, 853018), (110, 1727962))),    # He et al.: 0.27M to 1.7M
    *((lambda name=name: build(name, nn.GELU, classes=1000, side=224, patch=16), count) for name, count in
      (('vit_tiny', 5717416), ('vit_small', 22050664), ('vit_base', 86567656))),    # DeiT; torchvision's vit_b_16
    *((lambda name=name: build(name, nn.GELU, vocabulary=99, context=77),           # nanoGPT, bias in norms only
       depth * (12 * width ** 2 + 4 * width) + (99 + 77 + 2) * width) for name, depth, width in
      (('minigpt', 3, 192), ('tinygpt', 6, 384), ('smallgpt', 9, 576)))])
def test_parameter_counts(make, count):
    """The families have the published sizes."""
    assert size(make()) == count


@pytest.mark.parametrize('name, theirs', [('elman', nn.RNN), ('gru', nn.GRU)])
def test_recurrent_networks_are_those_of_torch(name, theirs):
    """With tanh, elman and gru compute what nn.RNN and nn.GRU do."""
    ours, theirs = build(name, nn.Tanh, vocabulary=11, width=8), theirs(8, 8, batch_first=True)
    theirs.load_state_dict({'weight_ih_l0': ours.input.weight, 'bias_ih_l0': ours.input.bias,
                            'weight_hh_l0': ours.hidden.weight, 'bias_hh_l0': ours.hidden.bias})
    tokens = torch.randint(11, (3, 9))
    torch.testing.assert_close(ours(tokens), ours.head(theirs(ours.embedding(tokens))[0]))


@pytest.mark.parametrize('name', ['minigpt', 'elman', 'gru'])
def test_text_is_read_from_the_left(name):
    """A later token must not change earlier logits, else the network sees what it has to predict."""
    model = build(name, nn.GELU, vocabulary=11).eval()
    tokens = torch.randint(11, (1, 16))
    other = tokens.clone()
    other[0, 9] = (other[0, 9] + 1) % 11
    before, after = model(tokens), model(other)
    assert before.shape == (1, 16, 11)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize('side', [16, 32])
@pytest.mark.parametrize('name', ['resnet20', 'vit_tiny'])
def test_images_of_both_sizes(name, side):
    """Networks for images work at side 16 and 32, with other classes and channels; every site has its module."""
    shape = {'side': side} if name == 'vit_tiny' else {}
    model = build(name, nn.SiLU, classes=7, channels=1, **shape)
    assert model(torch.randn(2, 1, side, side)).shape == (2, 7)
    assert sum(isinstance(m, nn.SiLU) for m in model.modules()) == {'resnet20': 19, 'vit_tiny': 12}[name]


def test_teacher_and_student():
    """The student has the teacher's first layer, frozen; targets have mean 0, variance 1; the stream is the old."""
    torch.manual_seed(0)
    teacher, student = teacher_and_student(nn.Tanh, nn.ReLU)
    assert (checksum(teacher), checksum(student)) == pytest.approx((-2.20266651912371, -1.616612709461569), rel=1e-5)
    assert torch.equal(teacher.first.weight, student.first.weight) and not student.first.weight.requires_grad
    y = teacher(torch.randn(20000, 16))
    assert abs(y.mean()) < 0.05 and abs(y.std() - 1) < 0.05


def test_names():
    """Every network has a standard activation; an unknown name is one line that lists them."""
    assert set(STANDARD) == set(MODELS)
    assert (STANDARD['resnet56'], STANDARD['vit_base'], STANDARD['tinygpt'], STANDARD['gru']) == (
        'relu', 'gelu', 'gelu', 'tanh')
    with pytest.raises(ValueError, match='did you mean resnet20'):
        build('resnet21', nn.ReLU)


# ---- any other network ----

class Net(nn.Module):
    """A linear layer, `middle`, batch norm, dropout and a linear layer."""
    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.norm, self.last = nn.Linear(6, 6), middle, nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.dropout(self.norm(self.middle(self.first(x))), 0.3, self.training))


def residual(x):
    """All that in-place calls can do: result ignored, input used again, a part changed, twice in a row."""
    shortcut = x
    y = F.relu_(x)
    F.leaky_relu(y, 0.2, inplace=True)
    x = x * 1.5
    x[:, :3].relu_()
    return torch.cat([F.elu(x, 0.7, True)[:, :3], nn.ReLU(inplace=True)(shortcut + 1)[:, 3:]], 1)


CALLS = {
    'relu': nn.ReLU(), 'relu in place': nn.ReLU(True), 'F': F.relu, 'torch': torch.relu, 'Tensor': torch.Tensor.relu,
    'keyword': lambda x: torch.relu(input=x), 'aten': lambda x: torch.ops.aten.relu(x), 'made': lambda x: nn.ReLU()(x),
    'relu_': lambda x: F.relu_(x * 1), 'relu6': nn.ReLU6(), 'F.relu6': F.relu6, 'hardtanh': nn.Hardtanh(-2, 2),
    'gelu': nn.GELU('tanh'), 'silu': nn.SiLU(True), 'leaky_relu': functools.partial(F.leaky_relu, negative_slope=0.2),
    'elu': nn.ELU(0.5, True), 'selu': nn.SELU(), 'celu': nn.CELU(1.3, True), 'hardswish': nn.Hardswish(), 'mish': F.mish,
    'softplus': nn.Softplus(2), 'softsign': F.softsign, 'threshold': nn.Threshold(0.1, 0.2), 'residual': residual}


@pytest.mark.parametrize('name', CALLS)
def test_every_kind_of_call_is_a_site_and_the_original_call_changes_nothing(name):
    """Outputs, gradients and buffers are bit for bit those of the untouched network, in training and eval."""
    model, x = Net(CALLS[name]), torch.randn(5, 6)
    alone = copy.deepcopy(model)
    other = replaced(model, lambda call: call, x)
    expected = '4 sites: 2 relu, 1' if name == 'residual' else '1 site: 1 '
    assert other.describe().startswith(expected if name != 'residual' else '5 sites: 3 relu')
    for training in (True, True, False):
        torch.manual_seed(1)
        expected = alone.train(training)(x.clone())
        torch.manual_seed(1)
        got = other.train(training)(x.clone())
        assert torch.equal(got, expected)
        for a, b in zip(torch.autograd.grad(got.square().sum(), list(model.parameters())),
                        torch.autograd.grad(expected.square().sum(), list(alone.parameters()))):
            assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), alone.buffers()))
    zero = replaced(model, lambda call: torch.zeros_like, x).eval()
    assert torch.equal(zero(x)[:1], zero(-x)[:1]) or name == 'residual'    # the site alone decides


def test_in_place_only_where_it_shows():
    """A site writes into its input only where the network reads that again; else no copy is made."""
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 6), nn.ELU(inplace=True), nn.Linear(6, 2))
    assert not replaced(plain, lambda call: call, torch.randn(2, 6)).written
    assert len(replaced(Net(residual), lambda call: call, torch.randn(5, 6)).written) == 3


class Later(nn.Module):
    """Two calls in training, three in eval, one skipped on demand, the last made on the spot."""
    def __init__(self):
        super().__init__()
        self.a, self.b, self.skip = nn.ReLU(), nn.SiLU(), False

    def forward(self, x, skip=False):
        if not self.training:
            x = F.gelu(x)
        return nn.Softplus()(x if skip else self.b(self.a(x)))


def test_a_call_keeps_its_site():
    """Also when a pass skips calls before it, or makes further ones: LayerDrop, heads of training or eval only."""
    other, x = replaced(Later(), lambda call: call, torch.randn(4)), torch.randn(4)
    assert other.describe() == '4 sites: 1 relu, 1 silu, 1 softplus, 1 gelu'
    assert torch.equal(other(x, skip=True), F.softplus(x)) and len(other.sites) == 4
    assert torch.equal(other.eval()(x), F.softplus(F.silu(F.relu(F.gelu(x))))) and len(other.sites) == 4
    part = replaced(nn.Sequential(nn.ReLU()), lambda call: call, x)
    part.model.append(nn.LeakyReLU(0.3))    # never recorded
    assert torch.equal(part(x), F.leaky_relu(F.relu(x), 0.3)) and len(part.sites) == 2


@pytest.mark.parametrize('make', [
    lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation=nn.GELU(), batch_first=True),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, activation='relu', batch_first=True), 2),
    lambda: nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend='eager'))])
def test_short_cuts_of_pytorch(make):
    """FAULTS 1: in eval mode without gradient, too, the new function is called; the switch is put back."""
    calls = []
    other = replaced(make(), lambda call: lambda x: calls.append(1) or call(x), torch.randn(2, 5, 8)).eval()
    with torch.no_grad():
        assert other(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    assert len(calls) == len(other.sites) > 0 and torch.backends.mha.get_fastpath_enabled()


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.relu(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_left_alone():
    """What is no site is said: gates, what `only` leaves out, activations with a backward of their own."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Softmax(1), nn.PReLU())
    x = torch.randn(2, 6)
    assert replaced(model, lambda call: call, x).describe() == (
        '2 sites: 1 relu, 1 hardswish; left alone: 1 hardsigmoid, 1 softmax, 1 prelu')
    assert replaced(model, lambda call: call, x, only='relu').describe().startswith('1 site: 1 relu; left alone: 1 har')
    assert replaced(model, lambda call: call, x, only='relu, hardsigmoid').describe().startswith('2 sites')
    assert replaced(Net(lambda x: F.gelu(Swish.apply(x))), lambda call: call, x).describe() == (
        '1 site: 1 gelu; left alone: 1 relu without gradient')
    assert 'rnn_relu' in replaced(nn.Sequential(nn.ReLU(), nn.RNN(6, 6, nonlinearity='relu')), lambda call: call,
                                  x).describe()
    with pytest.raises(ValueError, match='did you mean relu'):
        replaced(model, lambda call: call, x, only='rleu')
    with pytest.raises(ValueError, match='calls no activation to replace .*1 tanh.*only'):
        replaced(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), lambda call: call, x)


def compiled(what):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')    # torch.jit is deprecated, and used
        return torch.jit.script(what)


def gelu(x):
    return torch.gelu(x) if hasattr(torch, 'gelu') else F.gelu(x)


@pytest.mark.parametrize('make', [
    lambda: Net(compiled(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))), lambda: Net(compiled(F.silu)),
    lambda: Net(lambda x: torch._addmm_activation(torch.zeros(6), F.relu(x), torch.eye(6)))])
def test_out_of_reach(make):
    """Activations that never pass Python cannot be replaced: an error says so, in place of a partial network."""
    with pytest.raises(ValueError, match='out of reach'):
        replaced(make(), lambda call: call, torch.randn(5, 6))


def test_recomputed_activations_are_out_of_reach():
    """torch.utils.checkpoint would call the old activation in backward: an error, or left alone."""
    for reentrant in (False, True):
        model = Net(lambda x: F.gelu(checkpoint(F.relu, x, use_reentrant=reentrant)))
        if reentrant:
            assert 'left alone: 1 relu' in replaced(model, lambda call: call, torch.randn(5, 6)).describe()
        else:
            with pytest.raises(RuntimeError, match='torch.utils.checkpoint'):
                replaced(model, lambda call: call, torch.randn(5, 6))


def test_recording_leaves_no_trace():
    """Buffers (also expanded ones), modes, attributes and all random numbers are as before."""
    class Odd(Net):
        def forward(self, x):
            self.calls = getattr(self, 'calls', 0) + 1
            random.random(), np.random.rand()
            return super().forward(x) + self.mask[0]
    model = Odd(nn.ReLU())
    model.register_buffer('mask', torch.zeros(1).expand(4, 3))
    model.norm.eval()
    before, state = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.random(), np.random.rand())
    random.seed(1), np.random.seed(1)
    replaced(model, lambda call: call, torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))
    after = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    assert after == (random.random(), np.random.rand()) and torch.equal(state[0], torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and not model.norm.training and not hasattr(model, 'calls')


def test_a_replaced_network_is_a_module():
    """Parameters of one shared function count once; copy, state, autocast, empty batches and half precision."""
    shared, x = nn.PReLU(), torch.randn(5, 6)
    other = replaced(Net(nn.Sequential(nn.ReLU(), nn.GELU())), lambda call: shared, x)
    assert size(other) == size(other.model) + 1 and len(other.sites) == 2
    twin = copy.deepcopy(other)
    with torch.no_grad():
        shared.weight.fill_(7)
    assert not torch.equal(other.eval()(x), twin.eval()(x))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(other(x), twin(x)) and not twin.training and not twin.sites[0].training
    assert other(x[:0]).shape == (0, 3)
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        assert other(x).dtype == torch.bfloat16
    assert other.double()(x.double()).dtype == torch.float64
    lazy = replaced(nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU()), lambda call: call, x)
    assert lazy(x).shape == (5, 4) and size(lazy) == 36


# ---- --model ----

def config(model, **more):
    return SimpleNamespace(model=model, context=8, dropout=0.0, **more)


IMAGES = SimpleNamespace(name='pictures', kind='image', classes=5, channels=3, side=32,
                         train=(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.zeros(4)))
TEXTS = SimpleNamespace(name='letters', kind='text', classes=11, train=torch.randint(11, (99,), dtype=torch.uint8))


@pytest.mark.parametrize('name', ['resnet20', 'vit_tiny', 'toy', 'minigpt', 'elman', 'gru'])
def test_our_networks_fit_the_data(name):
    """By name, in the data set's shape; text for images and the reverse is one line."""
    text = name in ('minigpt', 'elman', 'gru')
    model = network(config(name), nn.ReLU, TEXTS if text else IMAGES)
    x = TEXTS.train[:8].long()[None] if text else IMAGES.train[0].float()
    assert model(x).shape == ((1, 8, 11) if text else (4, 5))
    with pytest.raises(ValueError, match=f"--model {name} with --data .*reads {'text' if text else 'images'}"):
        network(config(name), nn.ReLU, IMAGES if text else TEXTS)
    with pytest.raises(ValueError, match='--only'):
        network(config(name, only='relu'), nn.ReLU, TEXTS if text else IMAGES)


OWN = '''
import torch.nn as nn
from models import Small, WIDTH

class Head(nn.Linear):
    pass

def make():
    import data
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), Small(), nn.Linear(WIDTH, data.CLASSES))

def tuples():
    class Aux(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return (y, y) if self.training else y
    return Aux(make())
'''


def test_own_file_sees_its_neighbours(tmp_path):
    """FAULTS 6 and 8: `models` and `data` beside the file are the user's, ours stay ours, and changes count."""
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / '__init__.py').write_text('from models.small import Small\nWIDTH = 7\n')
    (tmp_path / 'models' / 'small.py').write_text('import torch.nn as nn\ndef Small():\n    return nn.Sequential('
                                                  'nn.Linear(48, 7), nn.ReLU6(), nn.Linear(7, 7), nn.LeakyReLU(0.2))\n')
    (tmp_path / 'data.py').write_text('CLASSES = 5\n')
    (tmp_path / 'my nets.py').write_text(OWN)
    place = f'{tmp_path}/my nets.py:make'
    model = network(config(place), lambda call: call, IMAGES)
    assert model.describe() == '2 sites: 1 relu6, 1 leaky_relu' and model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert float(model.sites[1](torch.tensor(-1.0))) == pytest.approx(-0.2)    # FAULTS 9
    import data
    assert hasattr(data, 'load') and __import__('models') is models
    digest = source_digest(place)
    assert len(digest) == 8 and source_digest('resnet20') == '' == source_digest('torchvision:resnet18')
    (tmp_path / 'data.py').write_text('CLASSES = 6\n')    # as long, within the same second
    with pytest.raises(ValueError, match=r'given \(2, 3, 32, 32\), it returns \(2, 6\) in training mode; wanted: \(2, 5\)'):
        network(config(place), lambda call: call, IMAGES)
    assert source_digest(place) != digest
    (tmp_path / 'unrelated.py').write_text('x = 1')
    assert source_digest(place) == source_digest(place.replace(':make', ':tuples'))


@pytest.mark.parametrize('source, message', [
    ('import nothing_like_it', 'ModuleNotFoundError: .*nothing_like_it.*own.py, line 1'),
    ('def make(): return 1 / 0', 'ZeroDivisionError: .*own.py, line 1'), ('def make(): return 3', 'AttributeError'),
    ('def mike(): pass', "no function 'make' in it .did you mean mike"), ('import sys\nsys.exit(3)', 'SystemExit: 3'),
    ('import torch.nn as nn\ndef make(): return nn.Linear(5, 5)', 'RuntimeError: mat1 and mat2'),
    (OWN.replace('from models import Small, WIDTH', 'CLASSES, WIDTH = 5, 48').replace('import data', 'pass').replace(
        'Small()', 'nn.ReLU()').replace('data.', '') + '\nmake = tuples', r'returns tuple in training mode; wanted: .2, 5'),
])
def test_own_file_errors_are_one_line(tmp_path, source, message):
    """FAULTS 11: the cause, where it is, and what is wanted."""
    (tmp_path / 'own.py').write_text(source)
    with pytest.raises(ValueError, match=message) as caught:
        network(config(f'{tmp_path}/own.py:make'), lambda call: call, IMAGES)
    assert str(caught.value).startswith(f'--model {tmp_path}/own.py:make with --data pictures: ')
    assert '\n' not in str(caught.value)


def test_unknown_networks():
    """A file that is not there, and names that nobody has."""
    for name, message in (('nowhere.py:make', 'no such file'), ('resnet21', 'did you mean resnet2')):
        with pytest.raises(ValueError, match=message):
            network(config(name), nn.ReLU, IMAGES)


@pytest.mark.parametrize('name, count, described', [
    ('resnet18', 11181642, '17 sites: 17 relu'), ('mobilenet_v2', 2236682, '35 sites: 35 relu6'),
    ('mobilenet_v3_small', 1528106, '33 sites: 19 hardswish, 14 relu; left alone: 9 hardsigmoid'),
    ('googlenet', 5610154, '57 sites: 57 relu')])
def test_torchvision(name, count, described, capsys):
    """Networks of torchvision, untouched: sizes with ten classes, all activations, one step, one note."""
    pytest.importorskip('torchvision', reason='torchvision is optional: pip install torchvision')
    data = SimpleNamespace(**{**vars(IMAGES), 'classes': 10})
    model = network(config(f'torchvision:{name}'), lambda call: call, data)
    assert size(model) == count and model.describe() == described
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert capsys.readouterr().err.count('224') == 1
    with pytest.raises(ValueError, match='unknown network of torchvision'):
        network(config('torchvision:resnet19'), lambda call: call, data)

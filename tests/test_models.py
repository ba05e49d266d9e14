"""models.py: our networks against published sizes and torch's layers; other networks against themselves."""
import copy
import functools
import itertools
import math
import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import models
from cell import Cell
from data import cross_entropy
from models import MODELS, STANDARD, network, replaced, teacher_and_student
from search import Config, search

def checksum(model):
    x = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    return float(x @ torch.arange(len(x)).double().cos())

def same(call):
    site = nn.Module()
    site.forward = call
    return site

# ---- our networks ----

@pytest.mark.parametrize('name, value', [('resnet20', 40.85815155033102), ('minigpt', -13.70305407360004)])
def test_initial_weights(name, value):
    """A seed goes on meaning what it means in the published results."""
    torch.manual_seed(0)
    assert checksum(MODELS[name](nn.ReLU)) == pytest.approx(value, rel=1e-6)

@pytest.mark.parametrize('standard, shape, counts', [
    ('relu', {}, dict(resnet20=269722, resnet32=464154, resnet44=658586, resnet56=853018, resnet110=1727962)),
    ('gelu', dict(classes=1000, side=224, patch=16),
     dict(vit_tiny=5717416, vit_small=22050664, vit_base=86567656)),
    ('gelu', dict(vocabulary=99, context=77), {
        f'{name}gpt': k * (12 * n ** 2 + 4 * n) + (99 + 77 + 2) * n
        for name, k, n in (('mini', 3, 192), ('tiny', 6, 384), ('small', 9, 576))}),
    ('relu', {}, dict(toy=1153)), ('tanh', dict(width=8), dict(elman=4496, gru=4784))])
def test_parameter_counts(standard, shape, counts):
    """He et al.: 0.27 to 1.7 million; DeiT as in torchvision; nanoGPT with biases in layer norms only."""
    with torch.device('meta'):
        for name, count in counts.items():
            assert sum(p.numel() for p in MODELS[name](nn.ReLU, **shape).parameters()) == count
            assert STANDARD[name] == standard

@pytest.mark.parametrize('name, theirs', [('elman', nn.RNN), ('gru', nn.GRU)])
def test_recurrent_networks_are_those_of_torch(name, theirs):
    """With tanh, elman and gru compute what nn.RNN and nn.GRU do."""
    ours, theirs = MODELS[name](nn.Tanh, vocabulary=11, width=8), theirs(8, 8, batch_first=True)
    weights = ours.input.weight, ours.hidden.weight, ours.input.bias, ours.hidden.bias
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights)))
    tokens = torch.randint(11, (3, 9))
    torch.testing.assert_close(ours(tokens), ours.head(theirs(ours.embedding(tokens))[0]))

def test_teacher_and_student():
    """The student has the teacher's first layer, frozen; targets have mean 0 and variance 1."""
    torch.manual_seed(0)
    teacher, student = teacher_and_student(nn.Tanh, nn.ReLU)
    assert [checksum(teacher), checksum(student)] == pytest.approx([-2.20266651912371, -1.61661270946157])
    assert torch.equal(teacher.first.weight, student.first.weight) and not student.first.weight.requires_grad
    y = teacher(torch.randn(20000, 16))
    assert student.last.weight.requires_grad and abs(y.mean()) < 0.05 and abs(y.std() - 1) < 0.05

# ---- any other network ----

def net(middle):
    """A network with that module or function in its middle, and a buffer made by expand (FAULTS 11)."""
    middle = middle if isinstance(middle, nn.Module) else same(middle)
    model = nn.Sequential(nn.Linear(6, 6), middle, nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))
    model.register_buffer('mask', torch.zeros(1).expand(4, 3), persistent=False)
    return model

def in_place(x):
    """Result ignored; input used again; a part changed: three sites."""
    y = F.relu_(x) * 1.5
    F.leaky_relu(y, 0.2, inplace=True)
    z = y * 1.5
    z[:, :3].relu_()
    return z + x

CALLS = {
    'relu': nn.ReLU(), 'inplace': nn.ReLU(True), 'torch': torch.relu, 'made': lambda x: nn.ReLU()(x),
    'keyword': lambda x: torch.relu(input=x), 'aten': torch.ops.aten.relu, 'Tensor': torch.Tensor.relu,
    'relu6': nn.ReLU6(True), 'hardtanh': nn.Hardtanh(-2, 2), 'gelu': nn.GELU('tanh'), 'silu': nn.SiLU(True),
    'leaky_relu': functools.partial(F.leaky_relu, negative_slope=0.2), 'elu': nn.ELU(0.5, True),
    'softplus': nn.Softplus(2), 'threshold': nn.Threshold(0.1, 0.2), 'in place': in_place,
    'input written later': lambda h: F.relu(h) * h.mul_(2),
    'encoder': nn.Sequential(nn.Unflatten(0, (1, 5)), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
                             nn.Flatten(0, 1))}    # has a fast path in eval mode without gradient

@pytest.mark.parametrize('name', CALLS)
def test_every_kind_of_call_is_a_site_and_the_original_call_changes_nothing(name):
    """Outputs, gradients and buffers are bit for bit those of the untouched network, in training and eval.
    A function that keeps its input for backward, as ReLU does not, can stand there. FAULTS 1, 4, 9, 12."""
    model, x = net(CALLS[name]), torch.randn(5, 6)
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
    replaced(model, lambda call: lambda v: v * torch.sigmoid(v), x).train()(x).sum().backward()
    zero = replaced(model, lambda call: torch.zeros_like, x).eval()
    with torch.no_grad():    # nothing passes but through sites
        assert not torch.equal(zero(x), alone(x)) and (name == 'encoder' or torch.equal(zero(x), zero(-x)))

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
    assert torch.equal(other(x, skip=2), F.celu(F.leaky_relu(x), 2.5)) and not other.sites[3].training

def test_a_site_has_the_call_as_it_is_now():
    """A slope that changes, a bound that is a buffer."""
    class Changing(nn.Module):
        slope = 0.1

        def __init__(self):
            super().__init__()
            self.top = nn.Buffer(torch.ones(6))

        def forward(self, x):
            return F.leaky_relu(x, self.slope).clamp(-9 * self.top, self.top)
    x = torch.randn(5, 6)
    model, calls = Changing(), []
    other = replaced(model, lambda call: calls.append(call) or call, x, 'leaky_relu, clamp')
    model.slope, model.top = 0.7, nn.Buffer(torch.full((6,), 0.3))
    assert torch.equal(other(x), model(x)) and torch.equal(calls[0](x), F.leaky_relu(x, 0.7))

RELU, SIGMOID = nn.ReLU(inplace=True), nn.Sigmoid()

@pytest.mark.filterwarnings('ignore:None of the inputs', 'ignore:.*torch.jit')
@pytest.mark.parametrize('layers, only, words', [
    ([RELU, SIGMOID, nn.PReLU()], None, '^1 site: 1 relu; left alone: 1 sigmoid, 1 prelu$'),
    ([RELU, SIGMOID], 'relu, sigmoid', '^2 sites: 1 relu, 1 sigmoid$'),
    ([RELU, nn.RNN(6, 6, nonlinearity='relu')], None, '^1 site: 1 relu; left alone: 1 rnn_relu$'),
    ([RELU, nn.GRUCell(6, 6), nn.LogSigmoid()], None, '^1 site.* alone: 1 gru_cell, 1 log_sigmoid$'),
    ([net(lambda x: F.gelu(checkpoint(F.relu, x, use_reentrant=True)))], None, 'checkpoint.* out of reach'),
    ([net(lambda x: F.gelu(torch.no_grad()(F.relu)(x)))], None, '^1 site.* alone: 1 relu without gradient$'),
    ([net(lambda x: F.gelu(checkpoint(F.relu, x, use_reentrant=False)))], None, 'checkpoint.* out of reach'),
    ([net(lambda x: F.relu(torch._addmm_activation(x[0], x, torch.eye(6))))], None, 'reach: 1 addmm_act'),
    ([net(torch.vmap(F.relu))], None, 'reach: 1 relu, in .*torch.vmap'),
    (['torch.jit', RELU], None, 'out of reach: 1 relu'), ([RELU], 'rleu', 'did you mean relu'),
    ([RELU, SIGMOID], 'gelu', 'no activation .*0 sites; left alone: 1 relu, 1 sigmoid.*; leave only')])
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

@pytest.mark.filterwarnings('ignore:Using `torch.compile')
def test_a_replaced_network_is_a_module():
    """One shared function counts once; copy, state, modes, empty batches. Not compiled code, FAULTS 1."""
    compiled = torch.compile(nn.Sequential(nn.ReLU(), nn.GELU()), backend='eager')
    shared, x, model = nn.PReLU(), torch.randn(5, 6), net(compiled)
    model[2].eval()
    other = replaced(model, lambda call: shared, x)
    assert model.training and not model[2].training
    twin = copy.deepcopy(other.eval())
    assert set(other.parameters()) == {*model.parameters(), shared.weight} and len(other.sites) == 2
    nn.init.constant_(shared.weight, 7)
    with torch.no_grad():
        assert not torch.equal(other(x), twin(x))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(other(x), twin(x)) and other(x[:0]).shape == (0, 3)
    torch.testing.assert_close(torch.vmap(lambda v: other(v[None])[0])(x), other(x))
    assert torch.equal(torch.compile(other, backend='eager')(x), other(x))

@pytest.mark.parametrize('reentrant', [True, False])
def test_a_checkpoint_that_is_switched_on_later(reentrant):
    """In backward the network would call its own activations: refused, not done wrong. In eval it is well."""
    class Later(nn.Linear):
        on = False

        def forward(self, x):
            call = lambda v: F.gelu(super(Later, self).forward(v))
            return checkpoint(call, x, use_reentrant=reentrant) if self.on else call(x)
    model, x = Later(6, 6), torch.randn(5, 6, requires_grad=True)
    other = replaced(model, lambda call: nn.ReLU(), x)
    with torch.autograd.graph.save_on_cpu():
        before = other(x)
    model.on = True
    with pytest.raises(ValueError, match='checkpoint.*switch it off'):
        other(x)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), before)

def test_gradients_in_the_forward_pass():
    """Forces are the slope of an energy, in eval mode as well."""
    class Force(nn.Linear):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(F.silu(super().forward(x)).sum(), x, create_graph=True)[0]
    model, x = Force(6, 6).eval(), torch.randn(5, 6)
    other = replaced(model, same, x)
    assert torch.equal(other(x), model(x)) and torch.equal(other.train()(x), model(x))

def test_other_threads():
    """One that calls modules in the meantime, and two that share a network."""
    x, wrong, ended = torch.randn(5, 6), [], threading.Event()
    other = replaced(net(nn.Sequential(nn.GELU(), nn.ReLU())), same, x).eval()
    sites, y = len(other.sites), other(x)

    def meanwhile(call):
        while not ended.is_set():
            try:
                call(x)
            except Exception as error:
                wrong.append(error)
    threads = [threading.Thread(target=meanwhile, args=(call,), daemon=True)
               for call in (nn.Sequential(nn.Tanh()), other)]
    for thread in threads:
        thread.start()
    wrong += [1 for _ in range(300) if not torch.equal(other(x), y)]
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(other.sites) == sites

# ---- --model ----

def config(model):
    return SimpleNamespace(model=model, context=8, dropout=0.0, compile=False, batch_size=2, only='')

def images(side=32, classes=5):
    return SimpleNamespace(name='pictures', kind='image', classes=classes, channels=3, side=side,
                           train=(torch.randint(256, (4, 3, side, side), dtype=torch.uint8), torch.zeros(4)))

TEXT = SimpleNamespace(name='letters', kind='text', classes=11, channels=0, side=0)

@pytest.mark.parametrize('name, data, sites', [
    ('resnet20', images(), 19), ('vit_tiny', images(16), 12), ('toy', images(16), 1),
    ('minigpt', TEXT, 3), ('elman', TEXT, 1), ('gru', TEXT, 1)])
def test_our_networks_fit_the_data(name, data, sites):
    """Every site has its module; and in a text a later token does not change earlier logits."""
    model = network(config(name), nn.Mish, data)
    assert sum(isinstance(m, nn.Mish) for m in model.modules()) == sites
    if data is not TEXT:
        assert model(torch.randn(4, 3, data.side, data.side)).shape == (4, 5)
        return
    before, after = model(torch.arange(8)[None]), model(torch.arange(8)[None] % 5)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])

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

UNREAD = ['unrelated.py', '.venv/site-packages/installed.py']
NEIGHBOURS = dict.fromkeys([*UNREAD, 'late_one.py', 'models/__init__.py'], '') | {
    'models/small.py': """import torch.nn as nn
class Small(nn.LeakyReLU):
    def forward(self, x):
        import late_one
        return super().forward(x)""",
    'data.py': 'CLASSES = 5', 'scale.json': '1.5', 'my nets.py': """import installed, torch.nn as nn
from models.small import Small
def make():
    import data, json, pathlib
    scale = json.loads(pathlib.Path(__file__).with_name('scale.json').read_text())
    return nn.Sequential(nn.Flatten(), Small(), nn.Linear(3072, data.CLASSES), nn.Softplus(scale))"""}

@pytest.mark.parametrize('without, prefix', [('', None), ('models/__init__.py', 'compiled')])
def test_own_file_sees_its_neighbours(without, prefix, tmp_path, monkeypatch):
    """`models` and `data` beside the file are the user's, ours stay ours, changes count. FAULTS 6, 8, 9."""
    paths = {name: tmp_path / name for name in NEIGHBOURS if name != without}
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NEIGHBOURS[name])
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.syspath_prepend(paths[UNREAD[1]].parent)
    monkeypatch.setattr(sys, 'dont_write_bytecode', False)
    monkeypatch.setattr(sys, 'pycache_prefix', prefix and str(tmp_path / prefix))
    place = config(f'{tmp_path}/my nets.py:make')
    source = network(place, same, images()).source
    for name, path in paths.items():
        path.write_text(path.read_text() + '\n')    # what others read does not count
        before, source = source, network(place, same, images()).source
        assert (source == before) == (name in UNREAD)
    models.READ.clear()    # as in another process, which finds compiled files
    del sys.modules['late_one']
    assert network(place, same, images()).source == source
    import data
    assert len(source) == 8 and hasattr(data, 'load') and __import__('models') is models

@pytest.mark.parametrize('top, inside, alike', [('', '', False), ('torch.manual_seed(7)', '', False),
                                                ('', 'torch.manual_seed(7)', True)])
def test_a_file_that_seeds(top, inside, alike, tmp_path, capsys):
    """Seeds of ours are different networks, whatever the file does at its top; else it is said."""
    (tmp_path / 'own.py').write_text(f'''import torch
{top}
def make():
    {inside}
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 5), torch.nn.ReLU())''')
    sums = []
    for seed in 0, 1, 0:
        torch.manual_seed(seed)
        sums.append(checksum(network(config(f'{tmp_path}/own.py:make'), same, images())))
    assert sums[0] == sums[2] and (sums[0] == sums[1]) == alike == ('same weights' in capsys.readouterr().err)

@pytest.mark.parametrize('name, described, published', [
    ('resnet50', '49 sites: 49 relu', 25557032 - 990 * 2049),
    ('mobilenet_v2', '35 sites: 35 relu6', 3504872 - 990 * 1281),
    ('mobilenet_v3_small', '33 sites: 19 hardswish, 14 relu; left alone: 9 hardsigmoid',
     2542856 - 990 * 1025),
    ('efficientnet_b0', '49 sites: 49 silu; left alone: 16 sigmoid', 5288548 - 990 * 1281),
    ('convnext_tiny', '18 sites: 18 gelu', 28589128 - 990 * 769),
    pytest.param('vit_b_16', '12 sites: 12 gelu', 86567656 - 990 * 769 - 192 * 768, marks=pytest.mark.slow),
    ('googlenet', '57 sites: 57 relu', None)])
def test_torchvision(name, described, published, capsys):
    """Networks of torchvision, untouched: all activations, bit for bit the same outputs, one note; a search
    of two steps. Published sizes are of 1,000 classes, the ViT's of 196 patches and not 4."""
    pytest.importorskip('torchvision', reason='torchvision is optional: pip install torchvision')
    place, cell = config(f'torchvision:{name}'), Cell('relu,gelu,mul', sampler='softmax', normalise='scale')
    model, searched = (network(place, make, images(classes=10)) for make in (same, cell.site))
    x = torch.randn(2, 3, 32, 32)
    assert model.describe() == described and torch.equal(model.eval()(x), model.model(x))
    assert published in (None, sum(p.numel() for p in model.parameters()))
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    batches = itertools.repeat((x, torch.tensor([3, 7])))
    settings = Config(steps=2, warmstart=0.0, candidates=0, discretise='shrink')
    found, scores = search(searched, cell, batches, batches, cross_entropy, settings)
    assert found.expression and math.isfinite(scores['loss'])
    assert capsys.readouterr().err.count('224') == 1

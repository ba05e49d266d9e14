"""Any network: swap and what it cannot swap, the example of the README, --model file.py:function."""
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.functional import leaky_relu

import evaluate
import search
from cell import Cell, Site
from models import build, swap
from models_own import standard_of

README = Path(__file__).resolve().parent.parent / 'README.md'


class Two(nn.Module):
    """One ReLU at two names, one nested deeper, and a GELU that stays."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.ReLU()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({'act': nn.ReLU(inplace=True)})['act'], nn.GELU())

    def forward(self, x):
        return self.second(self.inner(self.first(x)))


def test_swap_gives_each_name_its_own_site():
    """Nested, shared and in-place ones too; every site is told apart, other kinds are left alone."""
    model, cell = Two(), Cell(points=64)
    assert swap(model, nn.ReLU, cell.site) == 3
    assert {site.index for site in (model.first, model.second, model.inner[1])} == {0, 1, 2} and isinstance(model.inner[2], nn.GELU)
    x = torch.randn(5, 4)
    cell.use_standard()
    torch.testing.assert_close(model(x), F.relu(F.gelu(F.relu(model.inner[0](F.relu(x))))))


def test_swapped_network_equals_one_built_with_sites():
    """resnet20 built with ReLU and swapped is resnet20 built with the cell: as many sites, the same output."""
    outputs = []
    for swapped in (False, True):
        torch.manual_seed(0)
        cell = Cell(points=256, sampler='mean')
        model = build('resnet20', nn.ReLU if swapped else cell.site)
        if swapped:
            assert swap(model, nn.ReLU, cell.site) == 19
        torch.manual_seed(1)
        cell.draw()
        outputs.append(model.eval()(torch.ones(2, 3, 8, 8)))
    torch.testing.assert_close(*outputs)


def test_swap_back():
    """Sites are activations like others: the function found takes their places."""
    model, cell = Two(), Cell(points=64)
    swap(model, nn.ReLU, cell.site)
    assert swap(model, Site, nn.Tanh) == 3 and not any(isinstance(m, Site) for m in model.modules())


def test_nothing_to_swap_lists_what_is_there():
    with pytest.raises(ValueError, match=r'no nn.SiLU to swap; its activation modules: ReLU \(2\), GELU \(1\)$'):
        swap(Two(), nn.SiLU, nn.Tanh)
    with pytest.raises(ValueError, match='its activation modules: none'):
        swap(nn.Linear(2, 2), nn.ReLU, nn.Tanh)
    with pytest.raises(ValueError, match='itself nn.ReLU'):
        swap(nn.ReLU(), nn.ReLU, nn.Tanh)


class Functional(nn.Module):
    """Every way to call an activation without a module, and look-alikes that are none."""

    def __init__(self):
        super().__init__()
        self.relu, self.layers = nn.ReLU(), nn.ModuleList([nn.Linear(4, 4)])
        F.relu(torch.zeros(1))  # not in a forward

    def forward(self, x):
        x = F.relu(x)
        x = torch.relu(x) + torch.nn.functional.relu(x)
        x = self.layers[0](x).relu()
        x = x.relu_()
        return self.helper(self.relu(x)) + torch.sigmoid(x)

    def helper(self, x):
        return nn.ReLU()(x) + leaky_relu(x)


def test_functional_uses_are_pointed_out():
    """File and line of each, and nothing is changed; look-alikes and other functions are not reported."""
    model = nn.Sequential(nn.ReLU(), Functional())
    with pytest.raises(ValueError) as caught:
        swap(model, nn.ReLU, nn.Tanh)
    source = Path(__file__).read_text().splitlines()
    found = {(int(line), what) for line, what in re.findall(r'test_own_model.py, line (\d+): ([^;]+?)\(\.\.\.\)', str(caught.value))}
    expected = {'F.relu': 'x = F.relu(x)', 'torch.relu': 'x = torch.relu(x) + ', 'torch.nn.functional.relu': 'x = torch.relu(x) + ',
                'self.layers[0](x).relu': 'x = self.layers[0](x).relu()', 'x.relu_': 'x = x.relu_()', 'nn.ReLU': 'nn.ReLU()(x) + leaky'}
    assert {what for _, what in found} == set(expected)
    assert all(expected[what] in source[line - 1] for line, what in found)
    assert isinstance(model[0], nn.ReLU)
    with pytest.raises(ValueError, match=r': leaky_relu\(...\); make it a module'):
        swap(model, nn.LeakyReLU, nn.Tanh)


def test_functions_held_as_attributes_are_pointed_out():
    """As torch's own transformer layers hold theirs."""
    with pytest.raises(ValueError, match='activation is the function relu'):
        swap(nn.Sequential(nn.ReLU(), nn.TransformerEncoderLayer(8, 2)), nn.ReLU, nn.Tanh)


def test_readme_example(tmp_path, monkeypatch):
    """The very text of the README, at most 25 lines, for a network that is not in models.py; it finds a function."""
    section = README.read_text(encoding='utf-8').split('## Your own network')[1].split('\n## ')[0]
    text = re.search(r'```python\n(.*?)```', section, re.S)[1]
    assert len(text.strip().splitlines()) <= 25
    text, count = re.subn(r'steps=\d+', 'steps=30', text)
    assert count == 1 and 'models import swap' in text
    monkeypatch.chdir(tmp_path)  # it writes a file
    namespace = {'__name__': 'example'}
    exec(text, namespace)
    assert not any(isinstance(m, (Site, nn.ReLU)) for m in namespace['model'].modules())
    x, y = next(namespace['batches'](3))
    assert namespace['model'](x).shape == y.shape and 'x' in namespace['found'].formula


NETS = '''
import torch.nn as nn
from neighbour import WIDTH

def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
                         nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10), nn.Identity())

def text_model():
    return nn.Sequential(nn.Embedding(256, 16), nn.ReLU(), nn.Linear(16, 256))

def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.ReLU())
def hundred(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 100), nn.ReLU())
def bare(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
def pair(): return nn.ReLU(), nn.ReLU()
def needs(width): return nn.ReLU()
'''


@pytest.fixture
def nets(tmp_path):
    (tmp_path / 'nets.py').write_text(NETS)
    (tmp_path / 'neighbour.py').write_text('WIDTH = 24\n')
    (tmp_path / 'broken.py').write_text('import torch\n1 / 0\n')
    yield tmp_path
    sys.modules.pop('neighbour', None)


def test_own_model_is_searched_and_evaluated(nets, capsys):
    """--model file.py:function from one end to the other: a run folder with a function, and a table with it."""
    place = f'{nets}/nets.py:make_model'
    assert standard_of(place) == 'gelu'  # the most frequent
    run = nets / 'run'
    search.main(['--model', place, '--steps', '30', '--runoff', '0', '--out', str(run), '--no-plot'])
    out = capsys.readouterr().out
    assert '3 sites' in out and (run / 'activation.py').exists() and not (run / 'search.png').exists()
    evaluate.main([str(run), '--model', place, '--steps', '5', '--seeds', '2', '--baselines', 'none', '--out', str(nets / 'ledger.jsonl')])
    assert re.search(r'\| gelu .* the reference', capsys.readouterr().out)


def test_own_text_model_is_searched(nets, capsys):
    """A text set of data.py, with minigpt's settings."""
    search.main(['--model', f'{nets}/nets.py:text_model', '--data', 'tinystories_sample', '--steps', '30', '--runoff', '0',
                 '--out', str(nets / 'run'), '--no-plot'])
    assert 'validation:  loss' in capsys.readouterr().out


@pytest.mark.parametrize('place, word', [
    ('nets.py', 'name a file and the function'), ('nots.py:make_model', 'there is no file'), ('broken.py:f', 'ZeroDivisionError'),
    ('nets.py:make_modle', 'did you mean make_model'), ('nets.py:pair', 'returns tuple, not an nn.Module'),
    ('nets.py:needs', 'called without arguments, fails: TypeError'), ('nets.py:bare', 'no nn.ReLU or'),
    ('nets.py:wide', r'gives (2, 3, 16, 16), and the network fails: RuntimeError'),
    ('nets.py:hundred', 'asks for logits (2, 10), the network returns (2, 100)')])
def test_wrong_own_models(nets, capsys, place, word):
    """One line: what is wrong and where; nothing is left behind."""
    with pytest.raises(SystemExit) as stopped:
        search.main(['--model', f'{nets}/{place}', '--steps', '30', '--out', str(nets / 'run')])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and word in error and len(error.splitlines()) == 1
    assert not (nets / 'run').exists()

"""figures.py: pictures from a real run, from a run that is still going on, and life without matplotlib."""
import builtins
import json
import math
import re
import shutil
import sys

import pytest
import torch

import evaluate
import figures
import search
from activation import Activation, named
from cell import CHOICES, Cell


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A short search of a planted function, without pictures so far."""
    folder = tmp_path_factory.mktemp('run') / 'toy'
    search.main(['--model', 'toy', '--steps', '40', '--batch-size', '32', '--points', '256', '--out', str(folder), '--no-plot',
                 '--restarts', '2', '--refine', '0', '--target', '0'])
    return folder


@pytest.fixture
def no_matplotlib(monkeypatch):
    """An import of matplotlib fails, as where it was never installed."""
    real = builtins.__import__

    def fails(name, *rest):
        if name.split('.')[0] == 'matplotlib':
            raise ImportError(name)
        return real(name, *rest)
    for name in [name for name in sys.modules if name.split('.')[0] == 'matplotlib']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, '__import__', fails)


def test_pictures_of_a_run(run, capsys):
    """--plot draws a PNG and a GIF of many frames; the last frame differs from the first."""
    pytest.importorskip('matplotlib')
    image = pytest.importorskip('PIL.Image')
    search.main(['--plot', str(run)])
    assert capsys.readouterr().out.split() == [f'{run}/search.png,', f'{run}/search.gif']
    with image.open(run / 'search.png') as png:
        assert png.format == 'PNG' and png.size == (1200, 1100)
    with image.open(run / 'search.gif') as gif:
        frames, first = gif.n_frames, gif.convert('RGB').tobytes()
        gif.seek(frames - 1)
        assert gif.format == 'GIF' and 20 <= frames <= 80 and gif.convert('RGB').tobytes() != first


def test_a_run_that_is_going_on(run, tmp_path):
    """No result yet, and a last line that is half written."""
    pytest.importorskip('matplotlib')
    folder = tmp_path / 'going'
    folder.mkdir()
    shutil.copy(run / 'config.json', folder)
    lines = (run / 'log.jsonl').read_bytes().split(b'\n')
    (folder / 'log.jsonl').write_bytes(b'\n'.join(lines[:20]) + b'\n' + lines[20][:50])
    assert 'search.png' in figures.draw(folder) and (folder / 'search.gif').stat().st_size > 1000
    config, rows, found = figures.history(folder)
    assert len(rows) == 20 and found is None and {row['restart'] for row in rows} == {0}


def test_weights_are_those_of_the_cell(run):
    """From the log as from the cell: mean weights sum to one, a dropped operation has none from then on."""
    config, rows, _ = figures.history(run)
    weights = figures.weights_of(config, rows)
    for at in (0, len(rows) // 2, len(rows) - 1):
        cell = Cell(config['ops'], sampler=config['sampler'], points=64)
        cell.temperature = rows[at]['temperature']
        for row in rows[:at + 1]:
            for dropped in row['dropped']:
                choice, name = dropped.split(':')
                k = CHOICES.index(choice)
                cell.active[k].remove([op.name for op in cell.ops[k]].index(name))
        with torch.no_grad():
            for alpha, logged in zip(cell.alpha, rows[at]['alpha']):
                alpha.copy_(torch.tensor(logged))
        for k, expected in enumerate(cell.weights()):
            drawn = [w[at] for w in weights[k].values() if not math.isnan(w[at])]
            assert drawn == pytest.approx(expected[0].tolist(), abs=1e-5)
    assert rows[-1]['operations'] == 6


@pytest.mark.parametrize('damage, word', [('no folder', 'there is no run'), ('no log', 'log.jsonl'), ('one step', 'fewer than two steps'),
                                          ('config', 'damaged')])
def test_nothing_to_draw(run, tmp_path, capsys, damage, word):
    """One line on stderr that names the folder."""
    pytest.importorskip('matplotlib')
    folder = tmp_path / 'broken'
    if damage != 'no folder':
        shutil.copytree(run, folder)
    if damage == 'no log':
        (folder / 'log.jsonl').unlink()
    if damage == 'one step':
        (folder / 'log.jsonl').write_bytes((run / 'log.jsonl').read_bytes().split(b'\n')[0])
    if damage == 'config':
        (folder / 'config.json').write_text('{')
    with pytest.raises(SystemExit):
        search.main(['--plot', str(folder)])
    error = capsys.readouterr().err
    assert word in error and str(folder) in error and len(error.splitlines()) == 1


def test_without_matplotlib(run, tmp_path, no_matplotlib, capsys):
    """A search ends as always, with the plot in the terminal; one line says what to install."""
    search.main(['--model', 'toy', '--steps', '30', '--batch-size', '16', '--points', '128', '--out', str(tmp_path / 'run'),
                 '--restarts', '1', '--refine', '0'])
    out = capsys.readouterr().out
    assert out.count('pip install matplotlib') == 1 and '* found   . relu' in out
    assert (tmp_path / 'run' / 'activation.json').exists() and not (tmp_path / 'run' / 'search.png').exists()
    assert 'pip install matplotlib' in figures.draw(run)
    assert 'pip install matplotlib' in figures.evaluation([], 'relu', tmp_path / 'figures')


def test_figures_of_an_evaluation(tmp_path):
    """Three figures in two formats, also where a run diverged."""
    pytest.importorskip('matplotlib')
    row = {'expression': 'silu(x)', 'clip': None, 'test_loss': 1.5, 'diverged': False, 'curve': [[1, 2.0], [2, 1.5]]}
    rows = [{**row, 'name': name, 'seed': seed} for name in ('silu', 'other') for seed in range(2)]
    rows.append({**row, 'name': 'bad', 'seed': 0, 'test_loss': None, 'diverged': True, 'curve': []})
    assert 'silu is the reference' in figures.evaluation(rows, 'silu', tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f'{name}.{kind}' for name in ('functions', 'seeds', 'curves') for kind in ('png', 'svg')}
    assert evaluate.figures is figures


def test_text_plot_shows_the_functions():
    """Within 60 columns; each mark stands where the function is, read back from the text."""
    for text in ('abs(x)', 'neg(x)', 'tanh(x)', 'const(1)', 'cube(x)'):
        f = Activation(text)
        lines = figures.text_plot(f, named('relu')).splitlines()
        assert len(lines) == 16 and max(map(len, lines)) <= 60
        high, low = float(lines[0][:5]), float(lines[13][:5])
        for column in range(6, 59):
            rows = [k for k in range(14) if lines[k][column:column + 1] == '*']
            x = -4 + 8 * (column - 6) / 52
            y = f(torch.tensor(x)).item()
            if low < y < high:
                assert len(rows) == 1 and high - rows[0] * (high - low) / 13 == pytest.approx(y, abs=0.6 * (high - low) / 13 + 0.06)
    assert '. relu' in figures.text_plot(named('gelu'), named('relu'))


def test_the_result_of_a_run(run):
    """activation.json has the simplified function and LaTeX beside the one found; activation.py is that function."""
    result = json.loads((run / 'activation.json').read_text())
    found, short = Activation(result['expression'], result['clip']), Activation(result['simplified'], result['clip'])
    assert result['formula'] == short.formula and result['latex'] == short.latex
    namespace = {}
    exec((run / 'activation.py').read_text(), namespace)
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(namespace['Found']()(x), found(x).expand(101), rtol=1e-4, atol=1e-5)
    assert re.search(r'search.py --model toy --data teacher --seed 0', (run / 'activation.py').read_text())

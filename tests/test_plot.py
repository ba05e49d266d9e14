"""plot.py: the picture of a search and of a comparison, and life without matplotlib."""
import json
import struct
import sys

import pytest

import evaluate
import plot
import search
from test_evaluate import rows
from test_search import refused, run

pytest.importorskip('matplotlib', reason='pictures need matplotlib')

def size(path):
    """Width and height of a PNG file that is more than an empty canvas."""
    assert len(content := path.read_bytes()) > 15_000
    return struct.unpack('>II', content[16:24])

def test_picture_of_a_search(tmp_path, capsys):
    """Of a finished run, of one that was killed while it wrote a line, and of one that has not begun."""
    run(tmp_path, '--steps', '4')
    search.main(['--plot', str(tmp_path)])
    picture, log = tmp_path / 'search.png', (tmp_path / 'log.jsonl').read_bytes().splitlines(True)
    assert capsys.readouterr().out.endswith(f'{picture}\n') and size(picture) == (1200, 1100)
    finished = picture.read_bytes()
    (tmp_path / 'activation.json').unlink()
    (tmp_path / 'log.jsonl').write_bytes(b''.join(log[:3]) + log[3][:50])
    assert size(plot.picture(tmp_path)) == (1200, 1100) and picture.read_bytes() != finished
    for damaged in log[0], b'', b'{5}', b'{"a": 1}', b'\xff\xfe{}':
        (tmp_path / 'log.jsonl').write_bytes(damaged)
        assert f'{tmp_path}: log.jsonl is not of a run, or' in refused(['--plot', tmp_path], capsys)

def test_what_a_comparison_draws(tmp_path, monkeypatch):
    """The standard activation, yours although it is the worst, and the best of the others."""
    from matplotlib.axes import Axes
    made, drawn = {'relu': 0.5, 'mine': 0.1} | {f'other {k}': 0.2 + k / 10 for k in range(7)}, []
    monkeypatch.setattr(Axes, 'set_yticks', lambda self, ticks, labels: drawn.extend(labels))
    plot.comparison([rows(name, accuracy)[0] for name, accuracy in made.items()], tmp_path / 'a.png')
    assert drawn == ['relu', 'mine', *(f'other {k}' for k in (6, 5, 4, 3, 2))]

def test_comparison(tmp_path, monkeypatch, capsys):
    """From a ledger, also where runs diverged: a '-' and no dot. One line says how to get matplotlib."""
    ledger, picture, bad = tmp_path / 'ledger', tmp_path / 'comparison.png', rows('bad', None, None)
    ledger.write_text(''.join(json.dumps(row) + '\n' for row in [*rows('relu', 0.5, 0.6), *bad]))
    evaluate.main(['--report', str(ledger), '--plot', str(picture)])
    words = capsys.readouterr().out.splitlines()[-2].replace('|', ' ').split()
    assert size(picture) == (1500, 460) and words == ['bad', '2', '-', '-', '-', '0/0', '-', '-', '2', '2']
    own = [{**row, 'expression': 'own'} for row in rows('own', 0.5)]
    assert size(plot.comparison(own, picture)) == size(plot.comparison(bad, picture)) == (1500, 460)
    for old, new in ('0.1', '"x"'), ('"seed": 0', '"seed": [1]'), ('"name"', '"nome"'), ('e', 'é'):
        row = json.dumps(rows('relu', 0.5)[0]).replace(old, new)
        ledger.write_bytes(row.encode('utf-16' if new == 'é' else 'utf-8'))
        with pytest.raises(SystemExit):
            evaluate.main(['--report', str(ledger)])
        assert ('save it as UTF-8' if new == 'é' else 'line 1 is cut') in capsys.readouterr().err
    ledger.write_text(json.dumps(own[0]))
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    for main, *options in (search.main, tmp_path), (evaluate.main, 'p', '--report', ledger):
        assert 'pip install matplotlib' in refused(['--plot', *options], capsys, main=main)

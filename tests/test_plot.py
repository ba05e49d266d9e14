"""plot.py: the picture of a search and of a comparison, and life without matplotlib."""
import json
import struct
import sys
from pathlib import Path

import pytest

import evaluate
import plot
import search
from test_evaluate import rows
from test_search import refused, run


def size(path) -> tuple[int, int]:
    """Width and height of a PNG file that is more than an empty canvas."""
    content = Path(path).read_bytes()
    assert content[:8] == b'\x89PNG\r\n\x1a\n' and len(content) > 15_000
    return struct.unpack('>II', content[16:24])


def test_picture_of_a_search(tmp_path, capsys):
    """Of a finished run, of one that was killed while it wrote a line, and of one that has not begun."""
    pytest.importorskip('matplotlib', reason='pictures need matplotlib')
    run(tmp_path, '--steps', '4')
    search.main(['--plot', str(tmp_path)])
    picture, log = tmp_path / 'search.png', (tmp_path / 'log.jsonl').read_bytes().splitlines(True)
    assert capsys.readouterr().out.endswith(f'{picture}\n') and size(picture) == (1200, 1100)
    finished = picture.read_bytes()
    (tmp_path / 'activation.json').unlink()
    (tmp_path / 'log.jsonl').write_bytes(b''.join(log[:3]) + log[3][:50])
    assert size(plot.search(tmp_path)) == (1200, 1100) and picture.read_bytes() != finished
    (tmp_path / 'log.jsonl').write_bytes(log[0])
    assert 'no step yet' in refused(['--plot', tmp_path], capsys)


def test_picture_of_a_comparison(tmp_path):
    """From a ledger, also where runs diverged or only a network's own calls were trained."""
    pytest.importorskip('matplotlib', reason='pictures need matplotlib')
    ledger, picture = tmp_path / 'ledger', tmp_path / 'comparison.png'
    for row in [*rows('relu', 0.5, 0.6), *rows('silu', 0.6, None), *rows('bad', None, None)]:
        evaluate.append(ledger, row)
    evaluate.main(['--report', str(ledger), '--plot', str(picture)])
    assert size(picture) == (1500, 460)
    own = [{**row, 'expression': 'own'} for row in rows('own', 0.5, model='nets.py:make')]
    assert size(plot.comparison(own, picture)) == (1500, 460)


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    (tmp_path / 'ledger').write_text(json.dumps(rows('relu', 0.5)[0]))
    for main, *words in (search.main, tmp_path), (evaluate.main, 'p', '--report', tmp_path / 'ledger'):
        assert 'pip install matplotlib' in refused(['--plot', *words], capsys, main=main)

"""The ledger of evaluate.py: nothing twice, nothing lost to a kill, torn lines, joined files, names."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import evaluate
from ledger import read_ledger
from test_evaluate import ROOT, run, without_times


def test_one_function_under_two_names_is_trained_once(tmp_path, monkeypatch):
    """Two searches that found the same function: the second row is the first under its own name and origin."""
    for name in 'a', 'b':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'activation.json').write_text(json.dumps({'expression': 'tanh(abs(x))', 'clip': 10.0, 'model': name, 'data': 'd'}))
    trained, original = [], evaluate.retrain
    monkeypatch.setattr(evaluate, 'retrain', lambda candidate, *rest: trained.append(candidate.name) or original(candidate, *rest))
    rows = run(tmp_path / 'ledger', tmp_path / 'a', tmp_path / 'b', '--seeds', 2)
    assert trained == 2 * ['relu', 'a'] and len(rows) == 6
    for first, second in (rows[1:3], rows[4:6]):
        assert first | {'name': 'b', 'searched': 'b/d'} == second and first['name'] == 'a'


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    """The second time nothing is trained; more seeds or another setting train what is new."""
    ledger = tmp_path / 'ledger'
    before = run(ledger, 'silu')
    text = ledger.read_bytes()
    assert run(ledger, 'silu') == before and ledger.read_bytes() == text
    assert [row['seed'] for row in run(ledger, 'silu', '--seeds', '1:3')] == [0, 0, 1, 1, 2, 2]
    assert len(run(ledger, 'silu', '--seeds', '1', '--lr', '0.5')) == 8


def test_a_resumed_evaluation_gives_the_same_ledger(tmp_path):
    """kill -9 in the middle of a run: started again, the ledger is that of an uninterrupted one, but for the times."""
    words = ['silu', 'tanh', '--steps', 100]
    ledger = tmp_path / 'killed'
    code = f'import test_evaluate; test_evaluate.run({str(ledger)!r}, *{words})'
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL,
                               env={**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads()),
                                    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'})
    deadline = time.monotonic() + 100
    while not (ledger.exists() and ledger.read_bytes().count(b'\n') >= 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= ledger.read_bytes().count(b'\n') < 6, 'killed too late to mean anything'
    rows, whole = run(ledger, *words), run(tmp_path / 'whole', *words)
    assert without_times(rows) == without_times(whole) and len(rows) == 6


def test_torn_lines(tmp_path, capsys):
    """A last line that a kill cut is skipped with a warning that names it; that run is done again, on its own line."""
    ledger = tmp_path / 'ledger'
    before = run(ledger, 'silu')
    ledger.write_bytes(ledger.read_bytes()[:-200])
    capsys.readouterr()
    evaluate.main(['--report', str(ledger)])
    captured = capsys.readouterr()
    assert captured.err.startswith(f'warning: {ledger}, line 4 is cut') and '3 runs' in captured.out
    with pytest.raises(ValueError):  # the torn line is still there, so the ledger is not all JSON
        run(ledger, 'silu')
    capsys.readouterr()
    rows = read_ledger(ledger)
    assert without_times(rows) == without_times(before) and len(capsys.readouterr().err.splitlines()) == 1


def test_report_on_joined_ledgers(tmp_path, capsys):
    """Seeds 0:2 here and 1:4 there, joined by cat or given as two files: four seeds, the shared one counted once."""
    run(tmp_path / 'a', 'silu', '--seeds', '0:2')
    run(tmp_path / 'b', 'silu', '--seeds', '1:4')
    (tmp_path / 'joined').write_bytes((tmp_path / 'b').read_bytes() + (tmp_path / 'a').read_bytes())
    run(tmp_path / 'whole', 'silu', '--seeds', '4')
    capsys.readouterr()
    tables = []
    for files in (['joined'], ['a', 'b'], ['whole']):
        evaluate.main(['--report', *(str(tmp_path / name) for name in files)])
        text = capsys.readouterr().out
        assert '8 runs' in text
        tables.append([line.split('|')[1:9] for line in text.splitlines() if line.startswith('| ')])  # up to the times
    assert tables[0] == tables[1] == tables[2] and {line[1].strip() for line in tables[0][2:]} == {'4'}


def test_report_keeps_settings_apart(tmp_path, capsys):
    """Runs that are not comparable stand in different tables; a name in the ledger is enough for --against."""
    run(tmp_path / 'a', 'silu', '--seeds', 1)
    run(tmp_path / 'a', 'silu', '--seeds', 1, '--lr', 0.1)
    capsys.readouterr()
    evaluate.main(['--report', str(tmp_path / 'a'), '--against', 'silu'])
    text = capsys.readouterr().out
    assert text.count('minus silu') == 2 and 'lr 0.001' in text and 'lr 0.1' in text
    with pytest.raises(SystemExit):
        evaluate.main(['--report', str(tmp_path / 'a'), '--against', 'sil'])
    assert 'did you mean silu' in capsys.readouterr().err


def test_report_tells_functions_of_one_name_apart(tmp_path, run_folder, capsys):
    """Two machines may have called two functions alike; joined, each keeps its own line."""
    ledger = tmp_path / 'ledger'
    run(ledger, run_folder, '--seeds', 1)
    (run_folder / 'activation.json').write_text('{"expression": "tanh(x)", "clip": 5.0}')
    run(ledger, run_folder, '--seeds', 1)
    capsys.readouterr()
    evaluate.main(['--report', str(ledger)])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split('|')[1].strip() for line in lines if line.startswith('| toy-teacher')]
    assert sorted(names) == ['toy-teacher-seed0 (found on toy/teacher)', 'toy-teacher-seed0 = tanh(x) (found on ?/?)']

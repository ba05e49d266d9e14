"""Run folders and command lines: kills that cost nothing, moves, what is printed, one-line errors."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cell
import data
import evaluate
import search
from activation import Activation
from ops import select
from test_search import NETS, ROOT, SMALL, cifar_folder, log, refused, run

# ---- the run folder ----

def test_run_folder(tmp_path, capsys, monkeypatch):
    """What is in it, and what is printed: plain lines into a pipe, one line that changes on a terminal. No
    file that a run writes is overwritten."""
    folder, files = tmp_path / 'run', ['activation.json', 'checkpoint.pt', 'found.py', 'log.jsonl']
    result, out = run(folder, '--steps', '20', '--seed', '3'), capsys.readouterr().out
    keys = 'expression formula scalars model data seed config versions seconds validation'
    assert result.keys() >= set(keys.split()) and sorted(file.name for file in folder.iterdir()) == files
    f, x, names = Activation(result['expression'], 10.0), torch.linspace(-6, 6, 241), {}
    exec((folder / 'found.py').read_text(), names)
    assert torch.equal(names['Found']()(x), f(x)) and result['formula'] == f.formula
    assert [row['step'] for row in log(folder) if 'weights' in row] == list(range(1, 21))
    assert '\r' not in out and f'f(x) = {f.formula}' in out and re.search('^step 20/20 100% ', out, re.M)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    monkeypatch.setattr(os, 'get_terminal_size', lambda *_: os.terminal_size((40, 24)))
    run(tmp_path / 'terminal', '--steps', '20')
    lines = re.findall(r'\r\x1b\[K([^\r\n]*)', capsys.readouterr().out)
    assert len(lines) > 20 and max(map(len, lines)) == 39
    for name in [*files, 'search.png']:
        other = tmp_path / f'other {name}'
        other.mkdir()
        (other / name).write_text('mine')
        assert name in refused([*SMALL, '--out', other], capsys)
        assert [file.read_text() for file in other.iterdir()] == ['mine']

KILLED = '''
import itertools, json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch, search
torch.set_num_threads(1)

def killed(arguments, folder, moment):
    """A search that dies before it opens or renames a file of its folder for the n-th time, or that file."""
    if child := os.fork():
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    clock, count = itertools.count(0, 15), itertools.count(1)
    time.monotonic = lambda: next(clock)    # hours go by: a checkpoint every few steps
    def audit(event, details):
        path = str(details[0]) if event in ('open', 'os.rename') else ''
        if path.startswith(folder + '/') and (next(count) == moment or str(moment) in path):
            if details[1] == 'w' and os.path.exists(path):
                os.truncate(path, 0)    # what is left of a file that was being written
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    search.main(arguments)
    os._exit(0)

for name, options, kills in json.loads(sys.argv[2]):
    search.main([*options, '--out', name])
    for folder, moments in kills.items():
        assert killed([*options, '--out', folder], folder, moments[0]), folder
        assert all(killed(['--resume', folder], folder, moment) for moment in moments[1:]), folder
'''

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no kill -9 on Windows')
def test_killed_at_any_moment(tmp_path, monkeypatch):
    """kill -9 between two writes, for real: in warm start, descent, trials, a checkpoint, twice in a row,
    between the results. Result and log are those of a search never killed, bit for bit: batch statistics,
    dropout, momentum, histograms, samples, temperature, random numbers of Python and NumPy, and buffers that
    grow or that no state_dict has."""
    monkeypatch.chdir(tmp_path)
    Path('nets.py').write_text(NETS)
    toy = [*SMALL, *'--steps 8 --sampler dirichlet --candidates 3'.split()]
    own = [*toy, *'--model nets.py:images --warmstart 0.3'.split()]
    jobs = [('own', own, {'a': [8], 'b': [13, 8], 'c': [26, 6], 'd': ['activation.json']}),
            ('toy', toy, {'e': [11], 'f': [27]}),  # here trials go on from the weights of the descent
            ('softmax', [*own, *'--sampler softmax --shrink none --discretise project'.split()], {'g': [26]})]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, '-c', KILLED, ROOT, json.dumps(jobs)], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for whole, folder in ((whole, folder) for whole, _, kills in jobs for folder in kills):
        with open(f'{folder}/log.jsonl', 'a') as file:
            file.write('{"step": 7, "train')  # a write that the kill cut
        search.main(['--resume', folder])
        results = [json.loads(Path(name, 'activation.json').read_text()) for name in (folder, whole)]
        assert results[0] | {'seconds': 0, 'config': 0} == results[1] | {'seconds': 0, 'config': 0}, folder
        assert log(folder)[1:] == log(whole)[1:], folder

def test_from_one_folder_to_another(tmp_path, monkeypatch, capsys):
    """Own network, own data, relative paths. Ended by Ctrl-C, gone on with in another folder, ended by a full
    disk, gone on with when the data has moved, but not when the network is another. The command printed last
    evaluates it on the same data."""
    home, elsewhere = tmp_path / 'my ü', tmp_path / 'elsewhere'
    cifar_folder(home / 'data')
    elsewhere.mkdir()
    (home / 'nets.py').write_text(NETS)
    monkeypatch.setattr(sys, 'argv', [str(ROOT / 'search.py')])

    def ended(place, name, error, code, *arguments):
        def broken(*_):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            assert re.search('go on with --resume .*run', refused(arguments, capsys, code))
    monkeypatch.chdir(home)
    options = '--model nets.py:images --only gelu --data cifar10 --data-dir data --side 16 --steps 4'
    ended(search.Run, 'after', KeyboardInterrupt(), 130, *SMALL, *options.split(), '--out', 'run')
    monkeypatch.chdir(elsewhere)
    ended(os, 'fsync', OSError(28, 'No space left on device'), 2, '--resume', '../my ü/run')
    (home / 'data').rename('moved')
    with open(home / 'run/log.jsonl', 'a') as other:
        pytest.importorskip('fcntl', reason='there are no such locks on Windows').flock(other, 1)  # shared
        assert 'another process' in refused(['--resume', home / 'run', '--data-dir', 'moved'], capsys)
    for wrong, words in ((), f'{home}/data'), (('--steps', 7), 'steps is 4'), (('--out', 'b'), 'out is'):
        assert words in refused(['--resume', home / 'run', *wrong], capsys)
    (home / 'nets.py').write_text(NETS.replace('0.9 *', '0.8 *'))
    assert 'not those of the run' in refused(['--resume', home / 'run', '--data-dir', 'moved'], capsys)
    (home / 'nets.py').write_text(NETS)
    search.main(['--resume', '../my ü/run', '--steps', '4', '--data-dir', 'moved'])
    command = shlex.split(re.search('^next: +(.*)$', capsys.readouterr().out, re.M)[1])
    assert command[:2] == ['python', str(ROOT / 'evaluate.py')]
    evaluate.main([*command[2:], *'--steps 2 --seeds 1 --baselines none --batch-size 64'.split()])
    own, found = evaluate.read_ledger(Path('results.jsonl'))
    assert own['name'] == 'own' and found['expression'] != 'own'
    assert own['settings'] == found['settings'] == own['settings'] | {'side': 16, 'only': 'gelu'}
    assert 'the search is finished: python evaluate.py' in refused(['--resume', home / 'run'], capsys)

def test_what_is_lost_or_other(tmp_path, monkeypatch, capsys):
    """A log that was cut is said, and begins anew with the settings; an empty one is no run. None goes on
    with other operations, or with more processes, which make larger batches."""
    (tmp_path / 'log.jsonl').touch()
    run(tmp_path, '--steps', '4')
    (tmp_path / 'activation.json').unlink()
    (tmp_path / 'log.jsonl').write_bytes(b'{"con')
    for place, name, other in (data, 'ranks', lambda: 2), (cell, 'select', lambda ops: select(ops + ',sin')):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other)
            assert 'operations or number of processes' in refused(['--resume', tmp_path], capsys)
    search.main(['--resume', str(tmp_path)])
    assert 'log.jsonl has been cut' in capsys.readouterr().err and log(tmp_path)[0]['standard'] == 'abs(x)'

# ---- the command line ----

WRONG = [line.strip().split(' => ') for line in '''
    search --model resnet21 => did you mean resnet
    search --model minigpt --data cifar10_16 => reads text
    search --data-dir nowhere => ignored
    search --ops base,-sinhh => did you mean sinh
    search --steps 1 => from 2 up
    search --device cpu:x => cpu:x
    search --batch-size 9999 => 1 to 3750
    search --model toy --teacher silo => did you mean silu
    search --model toy --teacher const(0.5) => is a constant
    search --model toy --teacher scale(x,3) => or a straight line
    search --ops -sinh => needs a =
    search --lr 1e-3x => invalid number value
    search --data-dir my.txt --model minigpt => --data tinystories
    search --model resnet20 --teacher silu => --teacher
    search --model toy --data cifar10_16 --teacher silu => --teacher
    search --model toy --compile => leave out
    search --model resnet20 --context 17 => --context would be ignored
    search --preset paper --method ours => leave one of
    search --warmstart 30 => from 0 up to 1
    search --model toy --data cifar10_16 --only relu => leave out --only
    search --plot a --resume b => --plot would ignore resume
    search --resume nowhere => nowhere
    search --stpes 3 => --stpes
    evaluate --baselines relu,gulu => did you mean gelu
    evaluate --seeds 5:3 => --seeds
    evaluate --model nowhere.py:make => there is no file
    evaluate --card relu --nearest mish => would ignore
    evaluate --card relu silu => --card would ignore activations
    evaluate runs/none => there is no folder runs/none
    evaluate found.py => there is no folder found.py
    evaluate x*sigmoid(x) => as in add(x, relu(x))
    evaluate --nearest relu --plot a.png => --nearest would ignore plot
    evaluate --plot nowhere/a.png => no folder that exists
    search --model toy --tokens gpt2 => leave out
    evaluate --model toy --out /dev/null => is no ledger
    evaluate --model toy --out . => .'''.strip().splitlines()]

@pytest.mark.parametrize('line, word', WRONG)
def test_wrong_command_lines(line, word, tmp_path, monkeypatch, capsys):
    """One line that says what was wrong and what would be right, exit code 2, nothing is written."""
    monkeypatch.chdir(tmp_path)
    program, *arguments = line.split() + ['--steps', '2'] * ('--steps' not in line)
    assert word in refused(arguments, capsys, main={'search': search, 'evaluate': evaluate}[program].main)
    assert list(tmp_path.iterdir()) == []

def test_help(capsys):
    """Each option has its default, also where that depends on the network."""
    with pytest.raises(SystemExit, match='0'):
        search.main(['--help'])
    assert '(resnet20 150, vit_tiny 120, minigpt 240, toy 600)' in ' '.join(capsys.readouterr().out.split())

"""Resuming is exact: whatever the moment at which a search is ended, it ends in the same result and the same log."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import search

ROOT = Path(__file__).resolve().parent.parent
# Everything that has a state: batch norm, momentum, noise in the cell, histograms of inputs, scalars, two rounds of a
# run-off. 20 steps, then the rounds of the run-off, each with a report before it and one for each candidate and the standard.
OPTIONS = ['--model', 'resnet20', '--steps', '20', '--batch-size', '2', '--device', 'cpu', '--sampler', 'dirichlet',
           '--normalise', 'scale', '--warmstart', '4', '--shrink-from', '6', '--shrink-until', '17', '--runoff', '4',
           '--runoff-steps', '2', '--ops', 'identity,tanh,bias,scale,relu,add,mul,mix', '--points', '64',
           '--no-plot', '--checkpoint-every', '0']


class Killed(BaseException):
    """What kill -9 is to the process: nothing is caught, nothing more is written."""


def result(folder: Path) -> tuple[dict, list[str]]:
    """activation.json without times and places, and the lines of the log."""
    content = json.loads((folder / 'activation.json').read_text())
    for key in ('seconds', 'versions'):
        del content[key]
    for key in ('out', 'checkpoint_every'):
        del content['config'][key]
    return content, (folder / 'log.jsonl').read_text().splitlines()


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """The same search without a checkpoint before its end, and never interrupted."""
    folder = tmp_path_factory.mktemp('reference') / 'run'
    search.main([*OPTIONS[:-1], '1e9', '--out', str(folder)])
    return result(folder)


def run_until(monkeypatch, arguments: list[str], calls: int) -> bool:
    """Run a search, and end it at its `calls`-th report, before or after the report is dealt with. Whether it was."""
    original, seen = search.Run.report, []

    def report(self, row, snapshot):
        seen.append(row)
        if len(seen) == calls and calls % 2:
            raise Killed
        original(self, row, snapshot)
        if len(seen) == calls:
            raise Killed

    monkeypatch.setattr(search.Run, 'report', report)
    try:
        search.main(arguments)
        return False
    except Killed:
        return True
    finally:
        monkeypatch.setattr(search.Run, 'report', original)


@pytest.mark.parametrize('moments', [(1,), (2,), (9, 7), (21,), (24, 2)], ids=str)
def test_ended_at_any_moment(moments, reference, tmp_path, monkeypatch):
    """In the warm start, before the first checkpoint, among the drops and in both rounds of the run-off, several times in
    a row: result and log are those of the search that nobody ended."""
    folder = tmp_path / 'run'
    assert run_until(monkeypatch, [*OPTIONS, '--out', str(folder)], moments[0])
    for calls in moments[1:]:
        assert run_until(monkeypatch, ['--resume', str(folder), '--no-plot'], calls)
    search.main(['--resume', str(folder), '--no-plot'])
    assert result(folder) == reference


# Two searches, each with a descent over neighbours: 20 steps and some rounds, a restart, 20 steps and some rounds.
RESTARTED = ['--model', 'toy', '--steps', '20', '--batch-size', '16', '--device', 'cpu', '--ops', 'identity,tanh,scale,relu,add,mul',
             '--points', '64', '--restarts', '2', '--refine', '1', '--target', '0', '--teacher', 'mul(tanh(x), x)', '--no-plot',
             '--checkpoint-every', '0']


@pytest.mark.parametrize('moments', [(21,), (22, 9), (23, 14)], ids=str)
def test_ended_among_neighbours_and_restarts(moments, tmp_path, monkeypatch):
    """In the first round over neighbours, in the second, at the restart and after it."""
    search.main([*RESTARTED[:-1], '1e9', '--out', str(tmp_path / 'whole')])
    folder = tmp_path / 'run'
    assert run_until(monkeypatch, [*RESTARTED, '--out', str(folder)], moments[0])
    for calls in moments[1:]:
        assert run_until(monkeypatch, ['--resume', str(folder), '--no-plot'], calls)
    search.main(['--resume', str(folder), '--no-plot'])
    assert result(folder) == result(tmp_path / 'whole')
    assert {json.loads(line)['restart'] for line in result(folder)[1] if '"restart"' in line} == {0, 1}


def test_checkpoints_change_nothing(reference, tmp_path, capsys):
    """A checkpoint after every step, and a log line after every step, change neither result nor log; no temporary file is
    left; a finished run says so, and resuming it leaves its files as they are."""
    folder = tmp_path / 'run'
    search.main([*OPTIONS, '--out', str(folder)])
    assert result(folder) == reference
    assert sorted(path.name for path in folder.iterdir()) == ['activation.json', 'activation.py', 'checkpoint.pt', 'config.json',
                                                                  'log.jsonl']
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    capsys.readouterr()
    search.main(['--resume', str(folder), '--no-plot'])
    assert 'is finished' in capsys.readouterr().out
    assert before == [path.read_bytes() for path in sorted(folder.iterdir())]


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / 'search.py'), *arguments, '--no-plot'], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def test_kill_9(tmp_path):
    """Two real kills at moments that nobody chose; the result is that of a process never killed."""
    options = ['--model', 'toy', '--device', 'cpu', '--steps', '80', '--checkpoint-every', '0', '--sampler', 'dirichlet']
    process = start(*options, '--out', str(tmp_path / 'run'))
    checkpoint, then = tmp_path / 'run' / 'checkpoint.pt', 0.0
    for _ in range(2):
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime > then):
            time.sleep(0.01)
        then = checkpoint.stat().st_mtime  # so that the second kill waits for what the second process saves
        process.kill()
        process.communicate()
        process = start('--resume', str(tmp_path / 'run'))
    search.main([*options, '--out', str(tmp_path / 'whole'), '--no-plot'])
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert result(tmp_path / 'run') == result(tmp_path / 'whole')


def test_ctrl_c(reference, tmp_path):
    """Ctrl-C ends the search with 130 and the command that goes on with it, without a traceback; that command does."""
    folder = tmp_path / 'run'
    process = start(*OPTIONS, '--out', str(folder))
    wait_for(folder / 'checkpoint.pt', process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f'--resume {folder}' in err and 'Traceback' not in err
    search.main(['--resume', str(folder), '--no-plot'])
    assert result(folder) == reference


def test_ctrl_c_in_the_runoff(reference, tmp_path, monkeypatch, capsys):
    """Ctrl-C does not wait for the end of the run-off, and a run-off that was stopped is done again, exactly."""
    folder, original = tmp_path / 'run', search.Run.report

    def report(self, row, snapshot):
        if 'candidate' in row:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, row, snapshot)

    monkeypatch.setattr(search.Run, 'report', report)
    with pytest.raises(SystemExit) as ended:
        search.main([*OPTIONS, '--out', str(folder)])
    assert ended.value.code == 130 and '--resume' in capsys.readouterr().err
    assert sum('candidate' in line for line in (folder / 'log.jsonl').read_text().splitlines()) == 1
    monkeypatch.setattr(search.Run, 'report', original)
    search.main(['--resume', str(folder), '--no-plot'])
    assert result(folder) == reference


def test_two_processes_in_one_folder(tmp_path, capsys):
    """A folder in which a search is at work is refused to a second one, new or resumed."""
    pytest.importorskip('fcntl')
    config = search.configure(search.Config, search.PRESETS, {'model': 'toy', 'out': str(tmp_path / 'run'), 'device': 'cpu'})
    run = search.Run(config, search.new_cell(config))
    with pytest.raises(SystemExit):
        search.main(['--resume', str(tmp_path / 'run')])
    assert 'another process' in capsys.readouterr().err
    run.log.close()

"""What goes wrong on the way: lost or foreign checkpoints, full disks, closed pipes, Ctrl-C, numbers that are not finite."""
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import search
import training
from cell import Cell, blame
from ledger import append, read_ledger
from test_robust import PROGRAMS, ROOT, ROW, files, ledger, refused

# -- checkpoints that do not belong to their run

TOY = ['--model', 'toy', '--device', 'cpu', '--steps', '30', '--batch-size', '8', '--points', '64',
       '--restarts', '1', '--refine', '0', '--no-plot', '--checkpoint-every', '0']


def stopped_search(folder: str, monkeypatch, *options: str, steps: int = 3) -> dict:
    """A toy search that Ctrl-C stopped after some steps; its checkpoint."""
    report = search.Run.report

    def stopping(self, row, snapshot):
        self.stop = row.get('step') == steps
        report(self, row, snapshot)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(search.Run, 'report', stopping)
        search.main([*TOY, '--out', folder, *options])
    assert ended.value.code == 130
    return torch.load(Path(folder) / 'checkpoint.pt', weights_only=True)


def test_swapped_checkpoints(tmp_path, monkeypatch, capsys):
    """A checkpoint of another seed would load without a murmur; one of another shape would not. Both are refused."""
    monkeypatch.chdir(tmp_path)
    stopped_search('a', monkeypatch)
    other = stopped_search('b', monkeypatch, '--seed', '1')
    capsys.readouterr()
    torch.save(other, 'a/checkpoint.pt')
    before = files(tmp_path)
    assert 'of different runs' in refused('search', ['--resume', 'a'], capsys)
    for damage in (lambda c: c['model'].update({'last.weight': torch.ones(3)}), lambda c: c['model'].clear(),
                   lambda c: c['weight_opt'].update(param_groups=[]), lambda c: c['state'].update(step='three'),
                   lambda c: c.update(random=torch.zeros(3)), lambda c: c.update(arch_opt=7), lambda c: c.pop('cell')):
        content = torch.load('b/checkpoint.pt', weights_only=True)
        damage(content)
        torch.save(content, 'a/checkpoint.pt')
        (tmp_path / 'a/config.json').write_bytes((tmp_path / 'b/config.json').read_bytes())
        line = refused('search', ['--resume', 'a'], capsys)
        assert '--out' in line and 'checkpoint' in line
    assert files(tmp_path / 'b').items() <= {name[2:]: value for name, value in before.items()}.items()


def test_cut_checkpoints(tmp_path, monkeypatch, capsys):
    """A checkpoint cut anywhere, or with a flipped byte in what describes it, is refused or still right; never a traceback."""
    monkeypatch.chdir(tmp_path)
    stopped_search('a', monkeypatch)
    capsys.readouterr()
    path = tmp_path / 'a/checkpoint.pt'
    whole = path.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[:round(len(whole) * share)])
        assert 'a/checkpoint.pt is damaged' in refused('search', ['--resume', 'a'], capsys)


def test_lost_log(tmp_path, monkeypatch, capsys):
    """A log that was deleted or cut is begun anew, with a note: it does not keep a search from going on."""
    monkeypatch.chdir(tmp_path)
    stopped_search('a', monkeypatch)
    (tmp_path / 'a/log.jsonl').unlink()
    capsys.readouterr()
    search.main(['--resume', 'a', '--no-plot'])
    assert 'a/log.jsonl has lost its end' in capsys.readouterr().err
    assert all(json.loads(line)['step'] > 3 for line in (tmp_path / 'a/log.jsonl').read_text().splitlines())


# -- disks, pipes, memory, Ctrl-C

def test_disk_full_at_a_checkpoint(tmp_path, monkeypatch, capsys):
    """A checkpoint that cannot be written leaves the last one and no temporary file, and the search can go on from it."""
    monkeypatch.chdir(tmp_path)
    stopped_search('a', monkeypatch)
    capsys.readouterr()
    before = files(tmp_path / 'a')['checkpoint.pt']

    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', full)
        line = refused('search', ['--resume', 'a'], capsys)
    assert 'a/checkpoint.pt: No space left on device; make room' in line
    after = files(tmp_path / 'a')
    assert after['checkpoint.pt'] == before and set(after) == {'checkpoint.pt', 'config.json', 'log.jsonl'}
    search.main(['--resume', 'a', '--no-plot'])
    assert (tmp_path / 'a/activation.json').exists()


@pytest.mark.parametrize('program, size, arguments, word', [
    ('search', 100, TOY, 'config.json'), ('search', 3000, [*TOY[:-1], '1e9'], 'log.jsonl'),
    ('search', 20_000, TOY, 'checkpoint.pt'),
    ('evaluate', 50, ['--model', 'toy', '--steps', '2', '--baselines', 'none', '--seeds', '1'], 'results.jsonl')])
def test_writes_that_fail(program, size, arguments, word, tmp_path, monkeypatch, capsys):
    """Files that cannot grow beyond some bytes, as on a full disk: one line that names the file, exit code 2, and no
    temporary file is left."""
    resource = pytest.importorskip('resource')
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        line = refused(program, arguments, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert word in line and 'make room' in line
    assert not list(tmp_path.rglob('*.tmp'))


@pytest.mark.parametrize('command', ['evaluate.py --report l.jsonl | true', 'search.py {toy} | true',
                                     'evaluate.py --card relu > /dev/full'])
def test_closed_pipe(command, tmp_path):
    """A reader that goes away, or an output that is full, ends a program with one line and exit code 2, no traceback."""
    if not Path('/dev/full').exists():
        pytest.skip('needs /dev/full')
    ledger()(tmp_path)
    shell = f'set -o pipefail; {sys.executable} {ROOT}/{command.format(toy=" ".join(TOY))}'
    # the reader is gone before the program, which takes seconds to start, writes its first line
    done = subprocess.run(['bash', '-c', shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith('error: ')


def test_out_of_memory(tmp_path, monkeypatch, capsys):
    """What the estimate did not foresee: torch's own error, on any device, becomes advice; any other mistake in the code
    keeps its traceback."""
    def fails(text):
        def search_that_fails(*_):
            raise RuntimeError(text)
        return search_that_fails
    for k, text in enumerate(["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
                              'CUDA out of memory. Tried to allocate 20.00 MiB', 'DefaultCPUAllocator: not enough memory']):
        monkeypatch.setattr(search, 'search', fails(text))
        assert '--batch-size' in refused('search', [*TOY, '--out', str(tmp_path / str(k))], capsys)
    monkeypatch.setattr(search, 'search', fails('a mistake'))
    with pytest.raises(RuntimeError, match='a mistake'):
        search.main([*TOY, '--out', str(tmp_path / 'last')])


@pytest.mark.parametrize('program', ['search', 'evaluate'])
def test_ctrl_c_anywhere(program, tmp_path, monkeypatch, capsys):
    """Ctrl-C while the data are loaded ends with 130 and one line, and leaves nothing behind."""
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'load', interrupted)
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program](['--model', 'resnet20'])
    err = capsys.readouterr().err
    assert ended.value.code == 130 and len(err.splitlines()) == 1 and err.startswith('stopped')
    assert files(tmp_path) == {}


def test_memory_needed():
    """The estimate follows the batch: a network of known size keeps what it must, and the model stays as it was."""
    config = search.configure(search.Config, search.PRESETS, {'model': 'resnet20', 'device': 'cpu', 'batch_size': 64})
    model, batches, _, loss = search.prepare(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    needed = []
    for config.batch_size in (64, 128, 192):
        needed.append(training.memory_needed(model, batches, loss, config))
    # 19 sites of 16x16x16 floats at the least, kept once before each norm
    assert needed[1] - needed[0] == pytest.approx(needed[2] - needed[1], rel=1e-3)
    assert 64 * (7 * 16 + 6 * 8 + 6 * 4) * 16 * 16 * 4 < needed[1] - needed[0] < 64 * 20e6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and batches.position == 0 and batches.size == 64


# -- numbers that go wrong on the way

class Poisoned:
    """Batches in which some are not finite; with a state, as the real ones."""

    def __init__(self, batches, bad: set[int]):
        self.batches, self.bad, self.k = batches, bad, 0

    def __iter__(self):
        return self

    def __next__(self):
        x, y = next(self.batches)
        self.k += 1
        return (x * math.inf if self.k in self.bad else x), y

    def state_dict(self):
        return self.batches.state_dict()


def poisoned_search(bad_train: set[int], bad_val: set[int], **options):
    """Rows of a short search with batch norm whose batches of these numbers are infinite, and its model."""
    config = search.Config(**{**search.PRESETS['laptop']['resnet20'], 'model': 'resnet20', 'device': 'cpu', 'steps': 20,
                              'batch_size': 2, 'points': 64, 'runoff': 0, 'ops': 'identity,tanh,relu,square,add,mul',
                              'warmstart': 2, **options})
    model, train, val, loss = search.prepare(config)
    cell, rows, states = search.cell_of(model), [], []

    def report(row, snapshot):
        rows.append(row)
        state = [*model.state_dict().values(), *cell.parameters(), cell.seen]
        states.append([t.clone() for t in state if t.is_floating_point()])

    try:
        search.search(model, Poisoned(train, bad_train), Poisoned(val, bad_val), loss, config, report)
    except training.Failed as error:
        rows.append(error)
    return rows, states


def test_a_bad_batch_changes_nothing():
    """After a training batch that is not finite, weights, running statistics and histograms are what they were; the step
    is counted, and said to be the fault of the first site; the search goes on and ends with finite weights."""
    rows, states = poisoned_search({2, 7}, {4}, arch_weight_decay=0.0)
    troubled = {row['step']: row['trouble'] for row in rows if 'trouble' in row}
    assert {step: trouble['skipped'] for step, trouble in troubled.items()} == {2: 'weights', 6: 'architecture', 7: 'weights'}
    assert all(trouble['site'] == 0 and math.isnan(trouble['loss']) for trouble in troubled.values())
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1]))  # step 2: in the warm start, weights only
    assert all(t.isfinite().all() for state in states for t in state)
    assert not all(torch.equal(a, b) for a, b in zip(states[1], states[2]))


def test_too_many_bad_batches_end_it():
    """20 steps in a row that are not finite end the search, with the reason and what to try."""
    rows, _ = poisoned_search(set(range(5, 99)), set(), steps=40)
    assert len(rows) == 4 + search.MAX_SKIPPED + 1
    assert '20 steps in a row' in str(rows[-1]) and 'site 0' in str(rows[-1]) and '--lr' in str(rows[-1])


def test_bad_steps_and_optimisers():
    """A skipped step leaves the optimisers' running moments alone: weight decay and momentum would move the weights."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, math.nan, 1.0])
    assert search.bound([p.grad], 1.0) is False
    p.grad = torch.tensor([3.0, 4.0, 0.0])
    assert search.bound([p.grad], 1.0, torch.tensor(math.inf)) is False and p.grad.tolist() == [3.0, 4.0, 0.0]
    assert search.bound([p.grad], 1.0, torch.tensor(2.0)) is True
    assert p.grad.tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert search.bound([p.grad], 0.0) is True and p.grad.tolist() == pytest.approx([0.6, 0.8, 0.0])


def test_blame():
    """The first site that is not finite is named, with the range of its inputs, and the operation that is largest there."""
    torch.manual_seed(0)
    cell = Cell('identity,exp,tanh,add', clip=None, sampler='mean', points=257)
    model = nn.Sequential(nn.Linear(4, 4), cell.site(), nn.Linear(4, 4), cell.site())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
        model[2].bias.fill_(math.nan)
        cell.draw()
    found = blame(model, cell, torch.tensor([[-3.0, 2.0, 1.0, 0.0]]))
    assert found['site'] == 1
    with torch.no_grad():
        model[2].bias.zero_()
        model[2].weight.zero_()
    found = blame(model, cell, torch.tensor([[-3.0, 2.0, 1.0, 0.0]]))
    assert found['site'] == 0 and found['inputs'] == [-3.0, 2.0] and found['op'] == 'U2:exp'
    assert cell.ops[0][0].function(torch.ones(1)) == 1 and not model[1]._forward_hooks
    # alphas near 0: each mixture at 3 is nearly the mean of 3, exp(3) and tanh(3); U2 sees the sum of two of them
    assert found['output'] == pytest.approx(math.exp(2 / 3 * (3 + math.exp(3) + math.tanh(3))), rel=0.1)


def test_what_a_result_records(tmp_path, capsys):
    """activation.json holds strict JSON: versions, device, threads, settings; and a straight line is said to be one."""
    search.main([*TOY, '--out', str(tmp_path / 'a'), '--ops', 'identity,scale,add', '--normalise', 'none'])
    out = capsys.readouterr().out
    content = json.loads((tmp_path / 'a/activation.json').read_text(), parse_constant=lambda text: pytest.fail(text))
    assert content['versions'].keys() >= {'python', 'torch', 'commit', 'threads'}
    assert content['config']['device'] == 'cpu' and content['versions']['torch'] == torch.__version__
    assert 'straight line' in content['warning'] and 'straight line' in out
    assert 'plan: 30 steps' in out and 'peak memory about' in out and 'minutes to go' in out


def test_ledger_cut_by_a_kill(tmp_path, monkeypatch, capsys):
    """A ledger whose last line a kill cut keeps its good lines; the next run does not write on behind the cut one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'l.jsonl').write_text(json.dumps(ROW) + '\n' + json.dumps(ROW)[:100])
    append(Path('l.jsonl'), {**ROW, 'seed': 1})
    assert [row['seed'] for row in read_ledger(Path('l.jsonl'))] == [0, 1]
    assert 'line 2 is cut' in capsys.readouterr().err


def test_a_runoff_in_which_nothing_trains(tmp_path, monkeypatch, capsys):
    """Candidates whose training is not finite rank last; when that is all of them the result says so, in strict JSON."""
    original = search.runoff

    def poisoned(model, cell, state, train_batches, *rest):
        return original(model, cell, state, Poisoned(train_batches, set(range(1, 999))), *rest)

    monkeypatch.setattr(search, 'runoff', poisoned)
    search.main([*TOY, '--teacher', '', '--data', 'cifar10_16', '--runoff', '3', '--runoff-steps', '2', '--out', str(tmp_path / 'a')])
    out = capsys.readouterr().out
    content = json.loads((tmp_path / 'a/activation.json').read_text(), parse_constant=lambda text: pytest.fail(text))
    assert content['validation']['loss'] is None
    assert 'not finite' in content['warning'] and 'not finite' in out
    for line in (tmp_path / 'a/log.jsonl').read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(text))

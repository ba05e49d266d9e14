"""search.py: the two levels never touch each other, the shrinking ends, and the command line does what it says."""
import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import search as script
from activation import Activation
from cell import Cell
from models import build, teacher_and_student
from training import cross_entropy
from search import Config, search

ROOT = Path(script.__file__).resolve().parent


@pytest.fixture(autouse=True)
def as_it_was():
    """main() takes over Ctrl-C; pytest wants it back."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Strict separation of the two levels, watched in the real loop.

def images(seed):
    """Endless batches of four 8x8 images."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(4, 3, 8, 8, generator=draw), torch.randint(10, (4,), generator=draw)


def tokens(seed):
    """Endless batches of two texts of 12 tokens."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randint(256, (2, 13), generator=draw)
        yield x[:, :-1], x[:, 1:]


def numbers(teacher, seed):
    """Endless batches of what a teacher says to 16 normal numbers."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(32, 16, generator=draw)
        yield x, teacher(x).detach()


class Endless:
    """An endless iterator that a search can ask for its state, as those of data.py."""

    def __init__(self, batches, watch=lambda: None):
        self.batches, self.watch = batches, watch

    def __iter__(self):
        return self

    def __next__(self):
        self.watch()
        return next(self.batches)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def task(name, **cell_options):
    """A cell, a network with its sites, training batches, validation batches, and a loss."""
    torch.manual_seed(0)
    cell = Cell(points=256, **cell_options)
    if name == 'toy':
        teacher, model = teacher_and_student(nn.SiLU, cell.site)
        return cell, model, numbers(teacher, 1), numbers(teacher, 2), F.mse_loss
    if name == 'minigpt':
        return cell, build(name, cell.site, context=12), tokens(1), tokens(2), cross_entropy
    if name == 'norms':  # every kind of layer that keeps statistics
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), cell.site(), nn.Conv2d(4, 4, 3),
                              nn.InstanceNorm2d(4, affine=True, track_running_stats=True), cell.site(), nn.Flatten(),
                              nn.Linear(64, 8), nn.BatchNorm1d(8, momentum=None), cell.site(), nn.Linear(8, 10))
        return cell, model, images(1), images(2), cross_entropy
    return cell, build(name, cell.site), images(1), images(2), cross_entropy


class Watch:
    """Compares one level before and after the other level's step, bit for bit.

    An architecture step lies between a validation batch and the next batch; a weight step between a training batch and
    the next. So what must not change is copied when a batch is handed out, and compared when the next one is asked for.
    """

    def __init__(self, cell, model):
        self.weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.architecture = dict(cell.named_parameters())
        self.kind, self.kept, self.steps, self.changed = None, {}, {'train': 0, 'val': 0}, {'train': 0, 'val': 0}

    @staticmethod
    def copy(level):
        return {name: (t.detach().clone(), None if t.grad is None else t.grad.clone()) for name, t in level.items()}

    @staticmethod
    def differences(level, kept):
        names = []
        for name, t in level.items():
            value, grad = kept[name]
            if not torch.equal(t, value):
                names.append(name)
            if (t.grad is None) != (grad is None) or grad is not None and not torch.equal(t.grad, grad):
                names.append(f'{name}.grad')
        return names

    def levels(self, kind):
        """What a batch of that kind may change, and what it may not."""
        return (self.weights, self.architecture) if kind == 'train' else (self.architecture, self.weights)

    def __call__(self, kind):
        if self.kind:
            mine, other = self.levels(self.kind)
            assert self.differences(other, self.kept['other']) == [], f'touched by a {self.kind} batch'
            self.changed[self.kind] += self.differences(mine, self.kept['mine']) != []
        self.kind = kind
        mine, other = self.levels(kind)
        self.kept = {'mine': self.copy(mine), 'other': self.copy(other)}
        self.steps[kind] += 1


@pytest.mark.parametrize('name, changes, cell_options', [
    ('resnet20', dict(), dict(sampler='dirichlet')),
    ('norms', dict(accumulate=2, warm_alphas=True), dict(normalise='scale')),
    ('norms', dict(optimizer='sgd', weight_decay=0.1), dict(sampler='softmax', normalise='centre')),
    ('toy', dict(accumulate=3), dict(sampler='shared')),
    ('minigpt', dict(warm_alphas=True), dict(sampler='mean', normalise='scale'))])
def test_neither_level_touches_the_other(name, changes, cell_options):
    """After an architecture step every weight, running statistic and .grad of the network is what it was, bit for bit;
    after a weight step every alpha, scalar and their .grad. (The released code of the paper leaks both ways.)"""
    cell, model, train, val, loss = task(name, **cell_options)
    watch = Watch(cell, model)
    config = Config(steps=24, warmstart=4, shrink_from=8, shrink_until=20, runoff=0, lr=0.01, arch_lr=0.02, **changes)
    search(model, Endless(train, lambda: watch('train')), Endless(val, lambda: watch('val')), loss, config)
    # it did watch, and both levels moved: every training batch but the last of a sum changes no weight
    assert watch.steps['train'] == 24 * config.accumulate and watch.steps['val'] >= 16
    assert watch.changed['train'] >= 20 and watch.changed['val'] >= 12


def test_warm_start_uses_the_standard_activation():
    """During it the network is the plain network: the same losses, to the table's precision, and alphas at rest."""
    cell, model, train, val, loss = task('toy', standard='relu')
    torch.manual_seed(0)
    first, rows = [], []
    plain = build('toy', nn.ReLU)
    plain.load_state_dict(model.state_dict())
    plain.first.requires_grad_(False)
    config = Config(steps=40, warmstart=20, shrink_from=30, shrink_until=36, runoff=0, lr=0.01, grad_clip=0.0)

    def report(row, snapshot):
        if 'step' in row and row['step'] <= 20:
            rows.append(float(row['train_loss']))
            first.append([p.detach().clone() for p in cell.parameters()])
            assert all(torch.equal(p, q) for p, q in zip(first[0], first[-1]))
    search(model, Endless(train), Endless(val), loss, config, report)
    expected, optimizer = [], script.weight_optimizer([p for p in plain.parameters() if p.requires_grad], config)
    _, _, train, _, _ = task('toy')
    for x, y in itertools.islice(train, 20):
        result = F.mse_loss(plain(x), y)
        optimizer.zero_grad()
        result.backward()
        optimizer.step()
        expected.append(result.item())
    assert rows == pytest.approx(expected, rel=1e-4)


def test_a_model_without_sites_or_with_two_cells():
    """search() serves people's own networks: a forgotten activation=cell.site is said in words."""
    config = Config(steps=20, runoff=0)
    two = nn.Sequential(Cell(points=64).site(), Cell(points=64).site())
    for model, count in ((build('toy', nn.ReLU), 0), (two, 2)):
        with pytest.raises(ValueError, match=f'sites of {count} cells'):
            search(model, Endless(images(0)), Endless(images(1)), cross_entropy, config)


# ---------------------------------------------------------------------------------------------------------------------
# Shrinking.

class Tiny(nn.Module):
    """The smallest network with a site."""

    def __init__(self, cell):
        super().__init__()
        self.scale, self.act = nn.Parameter(torch.ones(1)), cell.site()

    def forward(self, x):
        return self.act(self.scale * x)


def pairs():
    draw = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(8, generator=draw)
        yield x, F.silu(x)


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_shrinking_ends_for_any_schedule(data):
    """The drops start when told, never go below one operation a choice point, end complete when told, and leave steps
    after the last one, whatever the steps, the pace and the set of operations."""
    steps = data.draw(st.integers(20, 60))
    first = data.draw(st.integers(0, steps - 2))
    last = data.draw(st.integers(first + 1, steps - 1))
    shrink = data.draw(st.sampled_from(['linear', 'log', 'none']))
    cell = Cell(data.draw(st.sampled_from(['base', 'identity,relu,tanh,add,mul', 'tanh,add'])), points=64)
    model, left = Tiny(cell), {}
    config = Config(steps=steps, warmstart=0, shrink_from=max(first, 1), shrink_until=max(last, 2), shrink=shrink,
                    runoff=0)
    if not config.at(config.shrink_from) < config.at(config.shrink_until) < steps:
        return  # what Config.check() refuses
    first, last, total = config.at(config.shrink_from), config.at(config.shrink_until), cell.operations()

    def report(row, snapshot):
        if 'step' in row:
            left[row['step']] = cell.operations()
            assert min(len(active) for active in cell.active) >= 1
    found, _ = search(model, Endless(pairs()), Endless(pairs()), F.mse_loss, config, report)
    counts = [left[k] for k in range(1, steps + 1)]
    assert counts == sorted(counts, reverse=True) and min(counts) == 6
    assert all(left[k] == total for k in range(1, first)) and all(left[k] == 6 for k in range(last, steps + 1))
    if shrink == 'linear':  # halfway through, half of them, to within the steps' grain
        middle = (first + last) // 2
        assert abs((total - left[max(middle, 1)]) - (total - 6) * (middle - first) / (last - first)) <= 1
    if shrink == 'none':
        assert all(left[k] == total for k in range(1, last))
    Activation(found.expression)


@pytest.mark.parametrize('wrong', [
    dict(steps=19), dict(shrink_from=0.9, shrink_until=0.5), dict(shrink_until=100, steps=100),
    dict(warmstart=0.5, shrink_from=0.3), dict(points=40_000), dict(clip=0.0), dict(clip=-1.0), dict(runoff=-1),
    dict(seed=-1), dict(arch_lr=float('nan')), dict(shrink='lin')])
def test_impossible_searches(wrong):
    """Numbers that cannot be are refused before anything is loaded."""
    with pytest.raises(ValueError) as caught:
        Config(data='cifar10_16', **wrong).check()
    assert len(str(caught.value).splitlines()) == 1


def test_the_result_is_what_the_discrete_cell_computes():
    """The activation handed back is the cell that was scored, with its learned scalars, and so is its text."""
    cell, model, train, val, loss = task('toy', ops='scale,bias,tanh,mix,add')
    config = Config(steps=60, warmstart=5, shrink_from=10, shrink_until=40, runoff=0, lr=0.01, arch_lr=0.05)
    found, scores = search(model, Endless(train), Endless(val), loss, config)
    assert cell.operations() == 6 and len(found.scalars) > 0
    x = torch.linspace(-5, 5, 201)
    with torch.no_grad():
        relaxed = cell.evaluate(x, cell.weights()).view(-1)
        assert torch.equal(found(x), relaxed) and torch.equal(Activation(found.expression, found.clip)(x), relaxed)
    assert any(abs(s.item() - start) > 1e-3 for s in found.scalars for start in (0.0, 1.0)), 'the scalars did not learn'
    assert 0 < scores['loss'] < float('inf')


def test_the_run_off_keeps_the_best():
    """Its winner has the lowest validation loss of its last round; the field shrinks from round to round, and the standard
    activation runs along in the last one without ever winning."""
    cell, model, train, val, loss = task('toy')
    candidates = []
    config = Config(steps=60, warmstart=5, shrink_from=10, shrink_until=50, runoff=8, runoff_steps=10, lr=0.01)
    found, scores = search(model, Endless(train), Endless(val), loss, config,
                           lambda row, snapshot: candidates.append(row) if 'candidate' in row else None)
    assert candidates
    rounds = {row['runoff_steps']: [r for r in candidates if r['runoff_steps'] == row['runoff_steps']] for row in candidates}
    *last, standard = list(rounds.values())[-1]
    best = min(last, key=lambda row: row['loss'])
    assert len(rounds) > 1 and [row for row in candidates if row['candidate'] == cell.standard.expression] == [standard]
    assert found.expression != cell.standard.expression and scores['standard_loss'] == standard['loss']
    assert found.expression == best['candidate'] and scores['loss'] == best['loss'] and len(last) < len(candidates)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

SMOKE = {'resnet20': ['--batch-size', '4', '--runoff', '6'], 'vit_tiny': ['--batch-size', '2', '--runoff', '2'],
         'minigpt': ['--batch-size', '2', '--context', '16'], 'toy': ['--restarts', '1', '--refine', '2']}


def run(folder, model, *more):
    """A search of 20 steps, by its command line; the content of activation.json."""
    script.main(['--model', model, '--steps', '20', '--runoff-steps', '2', '--device', 'cpu', '--points', '512',
                 '--no-plot', '--out', str(folder), *SMOKE[model], *more])
    return json.loads((folder / 'activation.json').read_text())


@pytest.mark.parametrize('model', SMOKE)
def test_twenty_steps(model, tmp_path, capsys):
    """A smoke run of each network ends in a valid activation, says it in mathematics, and what to run next."""
    folder = tmp_path / 'run'
    result, printed = run(folder, model, '--seed', '3'), capsys.readouterr().out
    assert {'expression', 'formula', 'scalars', 'model', 'data', 'seed', 'config', 'versions', 'seconds', 'validation',
            'clip'} <= set(result)
    f = Activation(result['expression'], result['clip'])
    assert (result['model'], result['seed']) == (model, 3)
    short, x = Activation(result['simplified'], result['clip']), torch.linspace(-3, 3, 61)
    assert short.formula == result['formula']
    torch.testing.assert_close(short(x), f(x), rtol=1e-4, atol=1e-4)
    assert result['scalars'] == pytest.approx([s.item() for s in f.scalars])
    assert f(torch.linspace(-5, 5, 11)).isfinite().all() and 'loss' in result['validation']
    assert {'steps', 'lr', 'arch_lr'} <= set(result['config']) and result['config']['steps'] == 20
    assert result['versions']['torch'] == torch.__version__

    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    steps = [row for row in rows if 'step' in row]
    assert steps[-1]['step'] == 20 and steps[-1]['operations'] == 6
    assert all({'train_loss', 'expression', 'operations'} <= set(row) for row in steps)
    assert len({name for row in steps for name in row['dropped']}) == 104  # each operation is dropped once, by name
    assert (folder / 'checkpoint.pt').exists() and json.loads((folder / 'config.json').read_text()) == result['config']

    assert f"f(x) = {result['formula']}" in printed and f'{folder}/activation.json' in printed
    command = re.search(r'python evaluate\.py (\S+) --model (\S+)', printed)
    assert command and command[2] == model and Path(command[1]) == folder
    assert re.search(r'step 20/20 100% .* 6 ops left', printed)


@pytest.mark.parametrize('model, more', [('resnet20', ['--sampler', 'dirichlet']), ('minigpt', []), ('toy', [])])
def test_one_seed_one_result(model, more, tmp_path):
    """Two runs with one seed on CPU give the same activation.json but for the times."""
    results = [run(tmp_path / str(k), model, '--runoff', '3', *more, '--seed', '1') for k in range(2)]
    for result in results:
        result.pop('seconds')
        result['config'].pop('out')
    assert results[0] == results[1]


def test_another_seed_another_search(tmp_path):
    results = [run(tmp_path / str(seed), 'toy', '--seed', str(seed)) for seed in (1, 2)]
    assert results[0]['validation'] != results[1]['validation']


def test_paper_preset_in_small(tmp_path):
    """The paper's settings run through in 20 steps as well: drawn weights, most drops early, no run-off."""
    result = run(tmp_path / 'run', 'resnet20', '--preset', 'paper', '--data', 'cifar10_16')
    assert result['config']['sampler'] == 'dirichlet' and result['config']['shrink'] == 'log'
    Activation(result['expression'])


def test_from_a_shell(tmp_path):
    """Piped, in a process of its own: plain lines, exit code 0, nothing on stderr."""
    command = [sys.executable, ROOT / 'search.py', '--model', 'toy', '--steps', '20', '--no-plot',
               '--restarts', '1', '--refine', '2', '--out', tmp_path / 'run']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '') and '\r' not in done.stdout and 'f(x) = ' in done.stdout
    files = {path.name for path in (tmp_path / 'run').iterdir()}
    assert {'activation.json', 'checkpoint.pt', 'config.json', 'log.jsonl'} <= files


def test_a_run_is_not_overwritten(tmp_path, capsys):
    """The second search into the same folder stops before it touches anything."""
    run(tmp_path / 'run', 'toy')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / 'run', 'toy', '--seed', '5')
    assert caught.value.code == 2 and '--resume' in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}


@pytest.mark.parametrize('arguments, words', [
    ('--model resnet2', ['resnet2', 'did you mean resnet20', 'vit_tiny']),
    ('--data cifar', ['cifar', 'did you mean cifar10']),
    ('--preset papers', ['did you mean paper']), ('--ops base,tahn', ['tahn', 'did you mean tanh']),
    ('--sampler dirichlett', ['did you mean dirichlet']), ('--steps 5', ['--steps 5', '20']),
    ('--device cude', ['did you mean cuda']),
    ('--model toy --teacher silo', ['silo', 'did you mean silu']), ('--data-dir nowhere --data cifar10', ['nowhere']),
    ('--model minigpt --data cifar10_16', ['minigpt', 'cifar10_16']), ('--batch-size 9999', ['--batch-size 9999']),
    ('--resume nowhere', ['nowhere', 'config.json']), ('--steps many', ['--steps']), ('--clip 0', ['--clip'])])
def test_wrong_input(arguments, words, tmp_path, capsys, monkeypatch):
    """Exit code 2 and one line that names the value and the nearest valid one; nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        script.main(arguments.split())
    captured = capsys.readouterr()
    message = [line for line in captured.err.splitlines() if 'error: ' in line]
    assert caught.value.code == 2 and len(message) == 1 and captured.out == '' and 'Traceback' not in captured.err
    assert all(word in message[0] for word in words), message
    assert list(tmp_path.iterdir()) == []

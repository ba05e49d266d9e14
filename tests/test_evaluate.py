"""evaluate.py: one training loop, paired runs, a ledger that neither repeats nor loses, tables by hand."""
import itertools
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import search
from activation import NAMED, nonlinearity
from evaluate import Training, append, cross_entropy, learning_rate, read_ledger, resolve, score, train
from plot import compare, report, table
from test_search import cifar_folder, refused

NETS = '''
import torch.nn as nn
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.ACT, nn.Dropout(0.3),
                         nn.Linear(8, 10))
'''

def halves(seed: int):
    """Endless batches of a task that can be learned: are the first or the last numbers larger?"""
    draw = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 5, generator=draw)
        yield x, (x[:, :2].sum(1) > x[:, 3:].sum(1)).long()

def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2), nn.Dropout(0.0))

def rows(name, *accuracies, data='cifar10', model='toy'):
    """Rows of a ledger; None: that run diverged."""
    settings = dict(model=model, data=data, preset='quick', steps=5, batch_size=8, accumulate=2, lr=0.1)
    same = dict(name=name, expression='relu(x)', clip=None, settings=settings, ms_step=2.0)
    return [{**same, 'seed': seed, 'diverged': a is None, 'test_accuracy': a, 'test_loss': a and 2 - a,
             'train_loss': a and 1.0, 'curve': [[1, 2.0], [2, 1.5]]} for seed, a in enumerate(accuracies)]

# ---- training ----

@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_train_against_a_loop_written_out(optimizer):
    """Two batches a step, clipped gradients, warm-up and cosine by hand; AdamW decays matrices alone."""
    config = Training(optimizer=optimizer, steps=4, accumulate=2, lr=0.1, warmup=0.5, lr_end=0.0,
                      grad_clip=0.3, weight_decay=0.2)
    model, plain, batches, curve = small(), small(), halves(0), []
    matrices, vectors = ([p for p in plain.parameters() if (p.dim() > 1) == w] for w in (True, False))
    hand = torch.optim.SGD(plain.parameters(), momentum=0.9, weight_decay=0.2)
    if optimizer == 'adamw':
        groups = [{'params': matrices, 'weight_decay': 0.2}, {'params': vectors, 'weight_decay': 0.0}]
        hand = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for lr in 0.05, 0.0853553, 0.05, 0.0146447:  # 0.1 (1/2, 1, 1, 1) (1 + cos(0, pi/4, pi/2, 3 pi/4)) / 2
        losses = [F.cross_entropy(plain(x), y) for x, y in itertools.islice(batches, 2)]
        hand.zero_grad()
        (sum(losses) / 2).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
        for p in plain.parameters():
            p.grad *= min(1.0, 0.3 / norm)
        for group in hand.param_groups:
            group['lr'] = lr
        hand.step()
        curve.append(sum(losses).item() / 2)
    got = train(model, halves(0), cross_entropy, config)
    assert [step for step, _ in got] == [1, 2, 3, 4] and [v for _, v in got] == pytest.approx(curve, abs=2e-5)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters()))

def test_train_learns():
    """The curve has 20 points, each the mean since the last. A look at the score leaves no trace."""
    model = small()
    curve = train(model, halves(0), cross_entropy, Training(steps=200, lr=0.02, lr_end=0.1))
    assert [step for step, _ in curve] == list(range(10, 201, 10)) and curve[-1][1] < 0.5 * curve[0][1]
    before, batches = [b.clone() for b in model.buffers()], list(itertools.islice(halves(1), 20))
    assert score(model, batches, F.cross_entropy)['accuracy'] > 0.9
    assert model.training and all(map(torch.equal, before, model.buffers()))

@pytest.mark.parametrize('settings, values', [
    (dict(), {0: 2.0, 99: 2.0}), (dict(warmup=0.1), {0: 0.2, 4: 1.0, 9: 2.0, 50: 2.0}),
    (dict(lr_end=0.1), {0: 2.0, 50: 1.1, 100: 0.2}), (dict(lr_end=0.0), {50: 1.0, 25: 1.7071068}),
    (dict(lr_milestones=(0.5, 0.75)), {49: 2.0, 50: 0.2, 75: 0.02})])
def test_learning_rate_by_hand(settings, values):
    """Warm-up, half a cosine, milestones, at lr 2 in 100 steps."""
    config = Training(steps=100, lr=2.0, **settings)
    assert {k: learning_rate(k, config) for k in values} == pytest.approx(values)

HOT = 9 * F.one_hot(torch.tensor([[0, 1, 2, 2], [2, 1, 0, 1]]), 4).float()  # (2, 4, 4) logits
BINARY = torch.tensor([[5.0], [-5.0]])

@pytest.mark.parametrize('logits, target, accuracy', [
    (HOT[0], [0, 1, 2, 0], 0.75), (HOT[:, :2], [[0, 1], [2, 2]], 0.75),
    (HOT, [[0, 1, 2, 2], [2, 1, 1, 0]], 0.75),
    (HOT.movedim(2, 1)[:, :, :, None], [[[0], [1], [2], [2]], [[2], [1], [1], [0]]], 0.75),
    (HOT[:, :, None].expand(2, 4, 4, 4).movedim(3, 1), [[[0] * 4, [1] * 4, [2] * 4, [2] * 4]] * 2, 0.625),
    (BINARY, [[1.0], [0.0]], None), (BINARY, [[1], [0]], None), (BINARY, [1, 0], None),
    (BINARY[:, 0], [1.0, 2.0], None), (HOT[0], [[1, 0, 1, 0]] * 4, None),
    (HOT[0], [0, 1, -100, 255], 1.0), (HOT[:, :2], [[0, 0], [-1, 2]], 1 / 3)])
def test_accuracy_where_it_has_a_meaning(logits, target, accuracy):
    """(n, classes), (n, time, classes), and segmentation (n, classes, height, width), also with as many
    classes as rows; not for binary logits, regression, several labels. The loss is the mean by batch size."""
    target, n = torch.tensor(target), len(target)
    result = score(nn.Identity(), [(logits, target)], lambda output, y: output.sum())
    assert result.get('accuracy') == (accuracy and pytest.approx(accuracy))
    batches = [(logits, target), (logits[:1], target[:1])]
    result = score(nn.Identity(), batches, lambda output, y: torch.tensor(float(len(y))))
    assert result['loss'] == pytest.approx((n * n + 1) / (n + 1)) and result.keys() <= {'loss', 'accuracy'}
    assert score(nn.Identity(), [({'a': 1}, {'b': 2})], lambda *_: torch.ones(())) == {'loss': 1.0}

def test_classes_stand_where_the_loss_has_them():
    """(6, 3, 3) logits could be read both ways."""
    x, y = torch.randn(6, 3, 3), torch.randint(3, (6, 3))
    for loss, dim in (cross_entropy, 2), (F.cross_entropy, 1):
        assert score(nn.Identity(), [(x, y)], loss)['accuracy'] == (x.argmax(dim) == y).float().mean()

# ---- runs ----

@pytest.fixture
def run(tmp_path, monkeypatch):
    """Evaluates a small network of one's own on 80 images, two steps a run; returns the ledger's rows."""
    monkeypatch.chdir(tmp_path)
    cifar_folder(Path('data'))
    Path('nets.py').write_text(NETS.replace('ACT', 'LeakyReLU(0.2)'))
    usual = '--model nets.py:make --data cifar10 --data-dir data --side 16 --steps 2 --baselines none --seeds'

    def go(*words):
        evaluate.main([*usual.split(), '2', '--device', 'cpu', '--out', 'ledger', *words])
        return read_ledger(Path('ledger'))
    return go

def test_one_run_written_out(run):
    """The reference of a network of one's own is its own calls; the row is of the last step."""
    row = run('--seeds', '4:5')[0]
    dataset, names = data.load('cifar10', 'data', side=16), {}
    exec(Path('nets.py').read_text(), names)
    config = evaluate.configure(Training, evaluate.PRESETS, {'model': 'nets.py:make', 'steps': 2})
    evaluate.seed_everything(4)
    model, batches = names['make'](), data.Batches(dataset, dataset.train, config.batch_size, 4, augment=True)
    curve, (mean, std) = train(model, batches, cross_entropy, config), dataset.normal
    output = model.eval()((dataset.test[0] - mean) / std)
    assert row['name'] == row['expression'] == 'own' and row['curve'] == curve
    assert row['test_loss'] == pytest.approx(F.cross_entropy(output, dataset.test[1]).item(), rel=1e-4)

def test_pairs(run, monkeypatch):
    """One function in two spellings has equal losses: seeds, weights, batches and dropout are the same.
    The test set is looked at once a run."""
    looks, real = [], data.test_batches
    monkeypatch.setattr(data, 'test_batches', lambda *words: looks.append(words) or real(*words))
    got = {(row['name'], row['seed']): row for row in run('relu', 'relu(relu(x))', 'silu', '--steps', '5')}
    losses = {key: (row['test_loss'], row['test_accuracy'], row['curve']) for key, row in got.items()}
    for seed in 0, 1:
        assert losses['relu', seed] == losses['relu(relu(x))', seed] != losses['silu', seed]
    assert losses['relu', 0] != losses['relu', 1] and len(looks) == len(got) == 8

def test_every_run_begins_anew(run):
    """A scalar learns in a run and is what was given in the next. Another bound is another run."""
    assert {row['expression'] for row in run('scale(relu(x), 0.5)')} == {'own', 'scale(relu(x), 0.5)'}
    for name, clip in ('a', 10.0), ('b', 3.0):
        Path(name).mkdir()
        content = {'expression': 'square(x)', 'config': {'clip': clip}}
        Path(name, 'activation.json').write_text(json.dumps(content))
    bounds = [row['clip'] for row in run('a', 'b', '--seeds', '1') if row['expression'] == 'square(x)']
    assert bounds == [10, 3]

def test_what_is_compared(monkeypatch):
    """The standard, what is given, the baselines, random functions; each once."""
    got = []
    monkeypatch.setattr(evaluate, 'evaluate', lambda activations, config, seeds: got.append(
        (list(activations), list(seeds))) or rows('gelu', 1.0))
    evaluate.main('silu --model minigpt --random 2 --seeds 3 --device cpu'.split())
    assert got == [('gelu silu relu leaky_relu elu relu2 random_0 random_1'.split(), [0, 1, 2])]

def test_the_ledger_neither_repeats_nor_loses(run, capsys):
    """A finished run is not done again, nor under another name, nor with the data elsewhere. One of a changed
    network or of other data is. Lines that were cut, are no rows, or come from Windows do no harm."""
    before = run('silu')
    assert 'from the ledger' not in capsys.readouterr().out
    assert run('silu(x)', ' silu ( x ) ') == before and len(before) == 4
    assert capsys.readouterr().out.count('from the ledger') == 4
    Path('data').rename('moved')
    cifar_folder(Path('data'), seed=1)
    assert run('silu', '--data-dir', 'moved') == before and len(run('silu')) == 8
    lines = Path('ledger').read_bytes().splitlines()
    other = lines[0].replace(b'"test_loss": ', b'"test_loss": "x", "no": ')
    lines = [b'\xef\xbb\xbf' + lines[0], b'', *lines[1:7], other, lines[7][:-50]]
    Path('ledger').write_bytes(b'\r\n'.join(lines))
    capsys.readouterr()
    assert len(run('silu')) == 8 and len(json.loads(Path('ledger').read_bytes().splitlines()[-1])) > 10
    assert 'ledger, line 9 is' in (err := capsys.readouterr().err) and 'ledger, line 10 is' in err
    Path('nets.py').write_text(NETS.replace('ACT', 'ReLU()'))
    assert len(run('silu')) == 12

def test_lines_of_several_writers(tmp_path):
    """Each line goes out in one write."""
    def write(k):
        for row in 20 * rows('relu', 0.5):
            append(tmp_path / 'ledger', {**row, 'seed': k, 'more': 'b' * 30_000})
    writers = [threading.Thread(target=write, args=[k]) for k in range(4)]
    for step in threading.Thread.start, threading.Thread.join:
        for writer in writers:
            step(writer)
    assert sorted(row['seed'] for row in read_ledger(tmp_path / 'ledger')) == sorted([0, 1, 2, 3] * 20)

def test_a_diverged_run_is_a_row(run, capsys):
    """Without a number that JSON does not know, and counted in the table."""
    got = run('square(x)', '--lr', '1e11')
    assert [(row['diverged'], row['test_loss'], row['train_loss']) for row in got] == [(True, None, None)] * 4
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split('|')[-2].strip() for line in table] == ['2', '2']
    for line in Path('ledger').read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)

def test_names(tmp_path, monkeypatch, capsys):
    """Run folders, known names, expressions, random functions; a wrong one is one line, and no ledger. So are
    two functions of one name."""
    monkeypatch.chdir(tmp_path)
    content = {'expression': 'scale(x, 0.5)', 'config': {'clip': 5.0}, 'model': '/a/b.py:f', 'data': 'svhn'}
    for folder in 'my run', 'b/my run':
        Path(folder).mkdir(parents=True)
        Path(folder, 'activation.json').write_text(json.dumps(content))
        content = {**content, 'expression': 'abs(x)'}
    for text in 'my run', 'my run/activation.json':
        name, f = resolve(text)
        assert (name, f.expression, f.clip) == ('my run', 'scale(x, 0.5)', 5.0)
    assert all(resolve(name)[1].expression == NAMED[name][0] for name in ('silu', 'relu2'))
    drawn = [resolve(f'random_{k}')[1] for k in [0, 1, 2, 3, 0, 1, 2, 3]]  # the same everywhere
    assert [f.expression for f in drawn[:4]] == [f.expression for f in drawn[4:]]
    assert len({f.expression for f in drawn}) == 4 and min(map(nonlinearity, drawn)) > 0
    Path('empty').mkdir()
    for name, text in ('cut', '{"expression": "relu(x'), ('deep', '[' * 99_999), ('lacks', '{}'), \
            ('bad', json.dumps({**content, 'config': {'clip': -3}})):
        Path(f'{name}.json').write_text(text)
    small = ['--model', 'toy', '--steps', '2']
    assert 'two functions' in refused(['my run', 'b/my run', *small], capsys, main=evaluate.main)
    Path('my run').rename('mish')  # a known name, too
    assert resolve('./mish')[1].clip == 5.0
    wrong = 'cut.json deep.json lacks.json bad.json mish gulu no/run empty random_x'.split()
    for text in [*wrong, 'mul(x, y)', '']:
        refused([text, *small], capsys, main=evaluate.main)
    assert not Path('results.jsonl').exists()

def test_card_and_nearest(capsys):
    """Of |x|, whose moments under N(0, 1) are sqrt(2 / pi) and 1; the formulas end at SiLU itself."""
    evaluate.main(['--card', 'abs(x)'])
    text = capsys.readouterr().out
    for words in 'f(x) = abs(x)', ' 0 to 5, not monotone', '-1 to 1', '0.7979, second moment 1\n', ' x relu':
        assert words in text
    evaluate.main(['--nearest', 'silu', '--ops', 'identity,neg,tanh,sigmoid,relu,add,mul'])
    lines = [line.split(None, 3) for line in capsys.readouterr().out.splitlines()[1:]]
    lengths, distances = [int(line[0]) for line in lines], [float(line[1]) for line in lines]
    assert lengths == sorted(set(lengths)) and distances == sorted(set(distances), reverse=True)
    assert len(lines) > 1 and distances[-1] == 0 and 'sigmoid(x)' in lines[-1][3]

# ---- statistics ----

@pytest.mark.parametrize('n, t', [(2, 12.7062), (3, 4.3027), (5, 2.7764), (12, 2.2010)])
def test_compare(n, t):
    """Pairs by seed, not by place; half the width by scipy.stats.t.ppf(0.975, n - 1); of one seed unknown."""
    d = [0.1 * (k % 3) - 0.05 * k for k in range(n)]
    mine, mean = {k: 1.0 + k + d[k] for k in reversed(range(n))}, sum(d) / n
    half = t * math.sqrt(sum((v - mean) ** 2 for v in d) / (n - 1) / n)
    reference = {k: 1.0 + k for k in range(n)} | {77: 5.0}
    assert compare(mine | {99: 5.0}, reference) == pytest.approx((n, mean, half), rel=1e-3)
    assert compare({3: 1.5}, {3: 1.0, 4: 9.0}) == (1, 0.5, math.inf) and compare({1: 2.0}, {2: 2.0})[0] == 0

def test_table_by_hand():
    """Differences 0.1, 0.05, -0.02: mean 0.0433, deviation 0.0603, half 4.303 * 0.0603 / sqrt(3) = 0.1497."""
    ledger = [*rows('bad', None, 0.1, None), *rows('relu', 0.5, 0.6, 0.7), *rows('silu', 0.6, 0.65, 0.68)]
    for metric, sign, mean, interval in ('accuracy', 1, '+0.0433', '-0.1064 to +0.1931'), \
            ('loss', -1, '-0.0433', '-0.1931 to +0.1064'):
        text = table(ledger, 'relu', metric).splitlines()[2:]
        best, reference, bad = ([word.strip() for word in line.split('|')[1:-1]] for line in text)
        assert best[:2] == ['silu', '3'] and best[3:6] == [mean, interval, '2/3'] and best[-1] == '0'
        assert reference[:2] == ['relu', '3'] and reference[3:6] == ['', '', ''] and reference[-1] == '0'
        assert bad[:2] == ['bad', '3'] and bad[3:6] == [f'{-0.5 * sign:+.4f}', '-', '0/1'] and bad[-1] == '2'
        assert '0.6433 +- 0.0404' in best and '0.6000 +- 0.1000' in reference and '0.1000' in bad

def test_report_keeps_settings_apart(tmp_path, capsys):
    """A table for each group of comparable runs, texts by loss; several ledgers as if joined by cat."""
    ledgers = {'a': rows('relu', 0.5) + rows('own', 0.3, model='nets.py:f'), 'b': rows('silu', 0.6),
               'c': rows('gelu', 0.6, model='minigpt', data='tinystories')}
    for name, content in ledgers.items():
        for row in content:
            append(tmp_path / name, row)
    evaluate.main(['--report', *(str(tmp_path / name) for name in 'abc')])
    text = capsys.readouterr().out
    assert report(sum(ledgers.values(), [])) in text and text.count('| activation ') == 3 and '1/1' in text
    assert [text.count(f'minus {name}') for name in ('relu', 'own', 'gelu')] == [1, 1, 1]
    assert '5 steps of 16' in text and '| test loss | minus gelu' in text
    refused(['--report', tmp_path / 'a', tmp_path / 'typo'], capsys, main=evaluate.main)
    again = [row | {'expression': text, 'clip': clip} for text, clip in
             (('abs(x)', None), ('square(x)', 10.0), ('square(x)', 3.0)) for row in rows('found', 0.5)]
    assert report(again).count('found = ') == 3 and 'found = square(x), clip 3.0 ' in report(again)

# ---- half precision, compilers, several processes, waits ----

SMALL = '--model minigpt --batch-size 4 --context 16 --device cpu'.split()
SPEED = [*SMALL, *'--steps 6 --warmstart 0.2 --candidates 1 --discretise shrink --sampler shared'.split()]

def losses(folder) -> list[float]:
    rows = [json.loads(line) for line in (Path(folder) / 'log.jsonl').read_text().splitlines()[1:]]
    return [row[key] for row in rows for key in ('train_loss', 'val_loss', 'loss') if row.get(key)]

@pytest.mark.filterwarnings('ignore')  # of the compiler
@pytest.mark.parametrize('option', ['--dtype bfloat16', pytest.param('--compile', marks=pytest.mark.slow)])
def test_precision_and_compiler_change_little(option, tmp_path, monkeypatch):
    """Same losses to bfloat16's 3 digits; a search goes on with its own settings; trainings, too."""
    monkeypatch.chdir(tmp_path)
    search.main([*SPEED, '--out', 'plain'])
    search.main([*SPEED, *option.split(), '--out', 'other'])
    assert losses('other') == pytest.approx(losses('plain'), rel=0.01) and losses('other') != losses('plain')
    Path('other/activation.json').unlink()
    before = losses('other')
    search.main(['--resume', 'other'])
    assert losses('other') == before
    for words in [], option.split():
        evaluate.main([*SMALL, *words, *'--steps 4 --seeds 1 --baselines none --out ledger'.split()])
    plain, other = (row['test_loss'] for row in read_ledger(Path('ledger')))
    assert other == pytest.approx(plain, rel=0.01) and (other != plain or 'compile' in option)

RANKS = '''
import sys
sys.path.insert(0, sys.argv[1])
import torch, search
from evaluate import configure, is_first
weights, trials = {}, search.trials
def after_the_descent(model, *rest):
    weights.update({name: value.clone() for name, value in model.state_dict().items()})
    return trials(model, *rest)
search.trials = after_the_descent
torch.set_num_threads(1)
given = dict(model='minigpt', steps=6, batch_size=int(sys.argv[2]), context=16, warmstart=0.2, candidates=1,
             discretise='shrink', sampler='shared', normalise='none', device='cpu')
config = configure(search.Config, search.PRESETS, given)
model, cell, *rest = search.prepare(config)
found, validation = search.search(model, cell, *rest, config)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 9
torch.save([weights, list(cell.alpha), cell.seen, found.formula, validation], f'rank{rank}.pt')
'''

def test_two_ranks_are_one_process_with_twice_the_batch(tmp_path, monkeypatch):
    """torchrun: weights and alphas are the same bits on both ranks and, to rounding, those of one process."""
    monkeypatch.chdir(tmp_path)
    Path('job.py').write_text(RANKS)
    root, environment = str(Path(search.__file__).parent), {**os.environ, 'OMP_NUM_THREADS': '1'}
    two = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', 'job.py', root, '4']
    for command in two, [sys.executable, 'job.py', root, '8']:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    first, second, alone = (torch.load(f'rank{k}.pt', weights_only=False) for k in (0, 1, 9))
    for mine, other, one in zip(first[:2], second[:2], alone[:2]):
        for name in mine if isinstance(mine, dict) else range(len(mine)):
            assert torch.equal(mine[name], other[name])
            assert torch.allclose(mine[name], one[name], atol=2e-3), name  # Adam enlarges what is tiny
    assert torch.equal(first[2], second[2])  # a rank's histogram is a sample of its own inputs
    assert first[3:] == second[3:] and first[3] == alone[3]
    assert first[4]['loss'] == pytest.approx(alone[4]['loss'], rel=1e-3)

class Waits(TorchDispatchMode):
    """Counts where a value leaves the device: there a GPU has to wait."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

@pytest.mark.parametrize('sampler', ['softmax', 'dirichlet'])
def test_a_half_step_waits_once(sampler):
    """Twelve steps and six differ by six steps' waits: one for each half, to ask whether all is finite. (And
    one for each parameter of Adam, which counts its steps on the CPU, also for parameters on a GPU.)"""
    counts = []
    for steps in 6, 12:
        given = dict(model='resnet20', steps=steps, batch_size=2, sampler=sampler, device='cpu',
                     shrink='none', warmstart=0.0, candidates=0, discretise='shrink', judge=1)
        config = evaluate.configure(search.Config, search.PRESETS, given)
        setting = search.prepare(config)
        with Waits() as waits:
            search.search(*setting, config)
        counts.append(waits.count)
    assert counts[1] - counts[0] == (2 + len(list(setting[1].parameters()))) * 6

"""search.py: two levels that never touch, a shrinking that ends, proposals, and trials that are fair."""
import copy
import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import data
import evaluate
import search
from activation import Activation, parse
from cell import Cell, blame
from evaluate import cross_entropy
from models import replaced
from search import Config

ROOT, OPS = Path(search.__file__).resolve().parent, 'identity,tanh,scale,relu,add,mul,mix'
SMALL = f'--model toy --device cpu --ops {OPS} --batch-size 16 --candidates 2'.split()
NETS = '''
import numpy, random, torch, torch.nn as nn
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(8), persistent=False)
        self.register_buffer('last', torch.zeros(1, 8), persistent=False)
    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.last = torch.cat([self.last[-50:], x.detach()[:1]])
            x = x * numpy.random.rand()
        return x - self.mean
def images():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), Noisy(),
                         nn.Linear(8, 8), nn.GELU(), nn.Dropout(random.random() / 2), nn.Linear(8, 10))
'''

def run(folder, *options: str) -> dict:
    """A search by its command line; its activation.json, which must be strict JSON."""
    search.main([*SMALL, '--out', str(folder), *options])
    return json.loads(Path(folder, 'activation.json').read_text(), parse_constant=pytest.fail)

def log(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, 'log.jsonl').read_text().splitlines()]

def refused(arguments: list, capsys, code: int = 2, main=search.main) -> str:
    """The one line on standard error with which the program ends."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('note: ')]
    assert ended.value.code == code and len(lines) == 1 and re.match('error: |stopped; ', lines[0]), lines
    return lines[0]

def cifar_folder(folder: Path, seed: int = 0) -> None:
    """CIFAR-10 in its published layout, 16 images a file."""
    folder.mkdir(parents=True)
    for name in (*(f'data_batch_{k}.bin' for k in range(1, 6)), 'test_batch.bin'):
        draw = random.Random(f'{seed} {name}')
        records = (bytes([draw.randrange(10)]) + draw.randbytes(3072) for _ in range(16))
        (folder / name).write_bytes(b''.join(records))

def images(seed: int, bad: tuple = (), shape: tuple = (4, 3, 8, 8)):
    """Endless batches; those of the numbers in `bad` are infinite."""
    draw = torch.Generator().manual_seed(seed)
    for k in itertools.count():
        x, y = torch.randn(shape, generator=draw), torch.randint(10, shape[:1], generator=draw)
        yield x * math.inf if k in bad else x, y

class Counted:
    """Batches with a state, of a user's own: it is kept, but what it has drawn is gone."""
    def __init__(self, batches):
        self.batches, self.count = batches, 0

    def __next__(self):
        self.count += 1
        return next(self.batches)

    def __iter__(self):
        return self

    def state_dict(self):
        return {'count': self.count}

def bits(tensors) -> list:
    """The tensors and their gradients, to compare them bit for bit."""
    return [t if t is None else t.detach().numpy().tobytes() for p in tensors for t in (p, p.grad)]

# ---- the loop ----

@pytest.mark.parametrize('settings, cell', [
    (dict(accumulate=2, warm_alphas=True, discretise='shrink'), dict(sampler='dirichlet', normalise='scale')),
    (dict(optimizer='sgd', weight_decay=0.1), dict(sampler='softmax', normalise='centre'))])
def test_neither_level_touches_the_other(settings, cell):
    """Watched in the real loop, from batch to batch. A validation batch changes no parameter, gradient,
    buffer or input histogram of the network; a training batch no alpha, scalar, their gradients, or dL/df."""
    torch.manual_seed(0)
    cell = Cell(OPS, points=257, **cell)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), cell.site(), nn.Dropout(0.2), nn.Conv2d(4, 4, 3),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), cell.site(), nn.Flatten(),
        nn.Linear(64, 8), nn.BatchNorm1d(8, momentum=None), cell.site(), nn.Linear(8, 10))
    kept, moved, last = {}, Counter(), None

    def watched(kind, batches):
        nonlocal last
        for batch in batches:
            now = {'train': bits([*model.parameters(), *model.buffers(), cell.seen]),
                   'val': bits([*cell.parameters(), cell.gradient])}
            changed = {level for level in now if last and now[level] != kept[level]}
            assert changed <= {last}, f'a {last} batch changed what {changed} batches may change'
            moved.update(changed)
            kept.update(now)
            last = kind
            yield batch

    config = Config(steps=24, warmstart=0.2, lr=0.01, candidates=0, ops=OPS, **settings)
    batches = watched('train', images(1)), watched('val', images(2))
    search.search(model, cell, *batches, cross_entropy, config)
    assert moved['train'] > 20 and moved['val'] > 20  # it did watch, and both levels moved

def test_batches_of_one_step_are_one_batch():
    """Two batches a step, or one of both: the same draws, so the same alphas and weights but for rounding."""
    x, results = torch.randn(20, 16, 3), []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        cell = Cell(OPS, points=257, standard='scale(relu(x), 2)')
        model = nn.Sequential(nn.Linear(3, 4), cell.site(), nn.Linear(4, 2))
        halves = [(half, (half[:, 0] > 0).long()) for half in x.flatten(0, 1).split(16 // accumulate)]
        search.search(model, cell, iter(halves), itertools.chain(halves[:1], halves), cross_entropy,
                      Config(steps=8, accumulate=accumulate, arch_lr=0.1, lr=0.1, candidates=0, judge=2,
                             optimizer='sgd', grad_clip=0.0))
        results.append([p.detach() for p in (*model.parameters(), *cell.parameters())])
    assert all(torch.allclose(a, b, 1e-3, 1e-5) for a, b in zip(*results))
    assert cell.alpha[0].abs().max() > 0.1 and cell.standard.expression == 'scale(relu(x), 2)'

def test_schedules_of_the_loop():
    """Rates of both levels, the temperature, and the weight of the standard with which the cell begins."""
    class Watch(search.Run):
        def after(self, *words):
            rates = (self.parts[name].param_groups[0]['lr'] for name in ('weight_opt', 'arch_opt'))
            seen.append([cell.temperature, *rates, cell.alpha[-1].max().item()])
            super().after(*words)
    cell, seen = Cell('relu,tanh,identity,right,mul', sampler='softmax'), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), cell.site(), nn.Linear(8, 10))
    config = Config(steps=10, warmstart=0.2, warmup=0.5, lr_end=0.1, arch_lr_end=0.1, shrink='none',
                    candidates=0, start=0.9)
    search.search(model, cell, images(1), images(2), cross_entropy, config, Watch(config))
    for k, row in enumerate(seen):
        arch_lr = 0.03 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 10)) / 2)
        lr = evaluate.learning_rate(k, config)
        assert row[:3] == pytest.approx([0.1 ** (max(0, k - 2) / 7), lr, arch_lr])
    assert seen[0][3] == pytest.approx(math.log(9), abs=0.01)

def test_the_slopes_are_those_of_the_loss():
    """Over the grid, what is collected sums to the slope of the loss by a constant added to the standard."""
    cell, got, (x, y) = Cell(OPS), [], next(images(0, shape=(64, 4)))
    first, last = nn.Linear(4, 8), nn.Linear(8, 10)
    before, after = copy.deepcopy(first), copy.deepcopy(last)
    cell.collect = lambda slopes, early: got.append((slopes, early))
    model, batches = nn.Sequential(first, cell.site(), last), itertools.repeat((x, y))
    search.search(model, cell, batches, batches, cross_entropy,
                  Config(steps=40, warmstart=0.8, candidates=0, ops=OPS))
    t = torch.zeros((), requires_grad=True)
    slope, = torch.autograd.grad(cross_entropy(after(torch.relu(before(x)) + t), y), t)
    assert got[0][0].sum().item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)
    assert [early for _, early in got] == [4 <= k <= 8 for k in range(32)]

def test_gradients_are_clipped_together():
    g = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert search.clip_gradients(g, 1.0) and [*g[0].tolist(), g[1].item()] == pytest.approx([0.6, 0.0, 0.8])
    assert search.clip_gradients(g, 2.0) and g[1].item() == pytest.approx(0.8)
    assert not search.clip_gradients(g, 1.0, torch.tensor([math.nan]))

def test_the_levels_see_disjoint_data(monkeypatch):
    """Three quarters train the weights, augmented, the rest the alphas. Each image has a shade of its own."""
    shades = torch.arange(80, dtype=torch.uint8).view(80, 1, 1, 1).expand(80, 3, 16, 16)
    dataset = data.Dataset('shades', 'image', *2 * [(shades, torch.arange(80) % 10)], 10, 3, 16)
    monkeypatch.setattr(data, 'load', lambda *_: dataset)
    given = {'model': 'resnet20', 'batch_size': 20, 'device': 'cpu'}
    _, _, train, val, _ = search.prepare(evaluate.configure(Config, search.PRESETS, given))
    train, val = [next(train)[0] for _ in range(3)], [next(val)[0]]  # an epoch
    shifted = [torch.cat(images)[:, 0].flatten(1).std(1).max() > 0 for images in (train, val)]
    train, val = (set(torch.cat(images)[:, 0, 8, 8].round(decimals=3).tolist()) for images in (train, val))
    assert (len(train), len(val)) == (60, 20) and not train & val and shifted == [True, False]

def test_a_bad_batch_leaves_no_trace():
    """Such a half-step is skipped: weights and running statistics, or alphas and dL/df, stay. Constants are
    no running statistics: masks of -inf and of the lowest float32, a buffer made by expand()."""
    class Masked(nn.Sequential):
        def forward(self, x):
            return super().forward(self.wide * x + (self.mask + self.lowest).clamp(min=-5))

    class Watch(search.Run):
        def after(self, step, train_loss, val_loss, dropped, trouble):
            states.append((bits([*model.parameters(), model[0].running_mean]), bits(cell.parameters())))
            if trouble:
                troubles[step] = trouble['skipped'], trouble['site']
            super().after(step, train_loss, val_loss, dropped, trouble)

    model, cell, states, troubles = Masked(nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 10)), Cell(OPS), [], {}
    model.register_buffer('mask', torch.tensor([0.0, 0.0, 0.0, -math.inf]))
    model.register_buffer('lowest', torch.tensor([0.0, torch.finfo(torch.float32).min, 0.0, 0.0]))
    model.register_buffer('wide', torch.ones(1).expand(4))
    network = replaced(model, cell.site, torch.ones(2, 4))
    config = Config(steps=8, warmstart=0.2, shrink='none', ops=OPS)
    # of the validation batches the first is for a look before the first step
    batches = images(1, bad=(4,), shape=(8, 4)), images(2, bad=(2, 7), shape=(8, 4))
    search.search(network, cell, *batches, cross_entropy, config, Watch(config))
    assert troubles == {2: ('architecture', 0), 5: ('weights', 0), 7: ('architecture', 0)}
    for level, stayed in enumerate(([5], [2, 7])):  # the warm start is steps 1 and 2
        assert [k for k in range(2, 9) if states[k - 2][level] == states[k - 1][level]] == stayed
    assert cell.gradient.isfinite().all()

def test_any_network_by_a_call(monkeypatch):
    """No run folder. In the warm start and in the first trial the network calls its own activations. All
    trials begin with its first weights, and proposals are measured by its most frequent activation."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LeakyReLU(0.2), nn.SiLU(), nn.Linear(8, 10))
    (x, _), cell, plain = next(images(0)), Cell(OPS), []
    network = replaced(model, cell.site, x)

    first, starts, real = bits(model.parameters()), [], search.train

    def watched(function):
        return lambda *words: plain.append(torch.equal(network(x), model(x))) or function(*words)
    monkeypatch.setattr(search, 'train', lambda *rest: starts.append(bits(model.parameters())) or real(*rest))
    monkeypatch.setattr(search.Run, 'after', watched(search.Run.after))
    monkeypatch.setattr(search, 'train', watched(search.train))
    config = Config(steps=5, warmstart=0.4, ops=OPS)
    _, scores = search.search(network, cell, images(1), images(2), cross_entropy, config)
    assert plain[:6] == [True, True, False, False, False, True] and not any(plain[6:])
    assert scores.keys() == {'loss', 'accuracy', 'standard_loss'} and starts == [first] * len(plain[5:])
    assert len(starts) > 1 and cell.standard.expression == 'leaky_relu(x)'

def test_an_activation_that_is_none_of_ours():
    """SELU is measured as itself and called so; of the known ones ELU is like it. ReLU is a proposal, too.
    All calls may share a site."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.GELU(), nn.SELU(), nn.SELU())
    x, _ = next(images(0))
    config = Config(steps=4, ops='identity,relu,elu,gelu,left', trust=2.0, lengths=(2,), around=False)
    cell = Cell(config.ops, sampler='softmax')
    run = search.Run(config)
    shared = cell.site(nn.SELU())
    network = replaced(model, lambda call: shared, x)
    _, scores = search.search(network, cell, images(1), images(2), cross_entropy, config, run)
    assert cell.standard.expression == 'elu(x)' and torch.equal(cell.typical(x), nn.SELU()(x))
    assert {'own', 'relu(x)'} <= run.state['results'].keys()
    assert scores['standard_loss'] == run.state['results']['own']['loss']

class Deeper(nn.Module):
    """A network that goes deeper the more often it is called: its calls are not all known before."""
    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.calls, self.mean = 0, nn.Buffer(torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        x = self.first(x.flatten(1))
        for _ in range(1 + (self.calls > 9) + (self.calls > 30)):
            x = torch.relu(self.block(x))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.last(x - self.mean)

def test_sites_and_buffers_that_come_later(tmp_path):
    """A site that appears in the descent or in a trial, where all sites have the function that is tried.
    A bad batch leaves no trace in a buffer that the network makes anew; a run with such a site goes on."""
    model, cell = Deeper(), Cell(OPS, sampler='softmax')
    network = replaced(model, cell.site, next(images(0))[0])
    config = Config(steps=8, warmstart=0.2, ops=OPS, candidates=2, out=str(tmp_path))
    batches = images(1, bad=(3,)), images(2)
    run = search.Run(config, tmp_path)
    found, scores = search.search(network, cell, *map(Counted, batches), cross_entropy, config, run)
    assert cell.sites == 3 and model.mean.isfinite().all() and math.isfinite(scores['loss'])
    assert len({id(f) for f in cell.functions}) == 1
    again = Cell(OPS, sampler='softmax')
    replaced(Deeper(), again.site, next(images(0))[0])
    again.load_state_dict(torch.load(tmp_path / 'checkpoint.pt', weights_only=True)['parts']['cell'])
    assert again.sites == 1 and torch.equal(again.seen, cell.seen[:1])

def test_several_inputs_and_no_buffer():
    """Batches ((x, z), y) for a network of two inputs, the third not finite: it is skipped."""
    class Two(nn.Bilinear):
        def forward(self, x, z):
            return torch.relu(super().forward(x, z))
    def batches(seed, bad=None):
        return (([x, x + k], y) for k, (x, y) in enumerate(images(seed, bad=(bad,), shape=(8, 4))))
    cell, troubles = Cell(OPS), []
    network = replaced(Two(4, 4, 10), cell.site, tuple(next(batches(0))[0]))
    run = search.Run(config := Config(steps=6, warmstart=0.5, ops=OPS, candidates=1))
    run.after = lambda step, a, b, dropped, trouble: troubles.append(trouble and trouble['skipped'])
    _, scores = search.search(network, cell, batches(1, 2), batches(2), cross_entropy, config, run)
    assert troubles == [None, None, 'weights', None, None, None] and scores['loss'] < 99

def test_numbers_that_stay_infinite(tmp_path, capsys):
    """20 skipped steps end the search with the site, the operation, and what to try."""
    line = refused([*SMALL, '--steps', '60', '--lr', '9e11', '--out', tmp_path / 'a'], capsys)
    assert re.search(r'20 steps .* site 0, operation \S+.* smaller --lr', line)

# 104 drops in the 62 steps from 30 to 92; log, the paper's: the k-th at step 30 + 62^(k / 104)
@pytest.mark.parametrize('settings, left', [
    ({}, {30: 110, 61: 58, 91: 8, 92: 6}), ({'shrink': 'none'}, {1: 110, 100: 110}),
    ({'shrink': 'log'}, {30: 110, 31: 110, 32: 93, 37: 61, 38: 58, 91: 7, 92: 6}),
    (dict(warmstart=0.5, shrink_from=0.1, shrink_until=0.2), {1: 110, 49: 110, 50: 6, 100: 6})])
def test_pace_of_the_shrinking_by_hand(settings, left):
    """Also where the warm start, in which the alphas know nothing, is longer: it drops nothing."""
    config = Config(steps=100, **settings)
    assert {step: config.operations_left(step, 110, 6) for step in left} == left

@pytest.mark.parametrize('shrink', ['linear', 'log'])
@pytest.mark.parametrize('steps, discretise', [(2, 'shrink'), (3, 'shrink'), (7, 'shrink'), (20, 'project')])
def test_shrinking_ends_for_any_number_of_steps(steps, discretise, shrink):
    """One operation a choice point in the last step; so it is in the loop, and this discrete cell, with its
    learned scalars, is what is scored."""
    torch.manual_seed(0)
    ops, kept = 'scale,bias,tanh,add,mix', list(itertools.islice(images(2), 50))
    config = Config(steps=steps, shrink=shrink, candidates=0, discretise=discretise, free_from=0.3, ops=ops,
                    judge=3, lr=0.01)
    cell = Cell(ops, points=1025, sampler='mean')
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), cell.site())
    found, scores = search.search(model, cell, images(1), iter(kept), cross_entropy, config)
    assert [len(active) for active in cell.active] == [1] * 6
    assert any(s not in (0.0, 1.0) for s in found.scalars)
    model[2] = found  # scored on one of the runs of three batches that are left, or two
    parts = (evaluate.score(model, kept[k:k + min(3, steps)], cross_entropy) for k in range(1, 40))
    assert pytest.approx(scores, abs=2e-3) in list(parts)  # by table

@pytest.mark.parametrize('discretise, steps', [('shrink', '2'), ('project', '20'), ('gradient', '20')])
def test_the_best_of_the_functions_tried(discretise, steps, tmp_path, monkeypatch):
    """All train on the same batches from the same weights, no longer than the search, judgement included; the
    best is the result, never the standard."""
    starts, counts, real, batches_of = [], [], search.train, data.repeatable

    def train(model, batches, *rest):
        batches = list(batches)
        starts.append(bits([*model.parameters(), batches[0][0], batches[-1][0]]))
        return real(model, iter(batches), *rest)
    monkeypatch.setattr(search, 'train', train)
    monkeypatch.setattr(data, 'repeatable', lambda b, n: counts.append(n) or batches_of(b, n))
    judged, scored = [], search.score

    def score(model, batches, loss):
        batches = list(batches)
        judged.append(bits([x for x, _ in batches]))
        return scored(model, batches, loss)
    monkeypatch.setattr(search, 'score', score)
    result = run(tmp_path, '--discretise', discretise, '--steps', steps)
    tried = {row['tried']: row['loss'] for row in log(tmp_path) if 'tried' in row}
    assert starts == starts[:1] * len(tried) and len(tried) > 1 and judged[1:] == judged[1:2] * len(tried)
    assert set(counts) == {1, min(10, int(steps)), max(2, round(0.15 * int(steps)))}
    assert result['validation']['standard_loss'] == tried.pop('abs(x)')
    best, x = min(tried, key=tried.get), torch.linspace(-3, 3, 61)
    assert result['validation']['loss'] == tried[best]
    assert torch.allclose(Activation(result['expression'])(x), Activation(best)(x), 1e-4, 1e-5)

def test_a_trial_that_diverges_does_not_win(tmp_path, monkeypatch):
    losses = iter([1.0, 0.5, math.nan, 2.0])  # the first look, the standard, the two functions
    monkeypatch.setattr(search, 'score', lambda *_: {'loss': next(losses)})
    monkeypatch.setattr(search, 'proposals', lambda *_: [Activation('tanh(x)'), Activation('relu(x)')])
    assert run(tmp_path, '--steps', '4')['validation'] == {'loss': 2.0, 'standard_loss': 0.5}

def test_around_means_the_standard_itself(monkeypatch):
    """leaky_relu(x) is not made with ReLU, though its name holds relu(x). A standard activation that these
    operations cannot spell leaves the choice open."""
    texts = 'mul(leaky_relu(x), tanh(x))', 'mul(relu(x), tanh(x))'
    monkeypatch.setattr(search, 'Space', lambda *_: None)
    monkeypatch.setattr(search, 'steepest', lambda *_: [search.Match(0.0, 4, parse(t)) for t in texts])
    for around in (True, False):
        found = [f.expression for f in search.proposals(Cell(), Config(candidates=3, around=around))]
        assert [text in found for text in texts] == [not around, True]
    found = [f.expression for f in search.proposals(Cell(standard='hardswish'), Config(candidates=3))]
    assert set(texts) < set(found)

def test_trials_that_all_diverge(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, 'score', lambda *_: {'loss': math.nan})
    assert 'try a smaller --lr' in refused([*SMALL, '--steps', '4', '--out', tmp_path / 'a'], capsys)

def test_order_of_the_proposals(monkeypatch):
    """The best of each length in turn, of the lengths that are wanted, in the region that is trusted."""
    rows = [(0.3, 3, 'square(relu(x))'), (0.1, 3, 'tanh(relu(x))'), (0.2, 4, 'mul(relu(x), x)'),
            (-1.0, 6, 'exp(relu(x))')]
    monkeypatch.setattr(search, 'Space', lambda *_: None)
    monkeypatch.setattr(search, 'steepest', lambda _, cell, trust: [
        search.Match(score, n, parse(text)) for score, n, text in rows] if trust == 0.3 else [])
    found = [f.expression for f in search.proposals(Cell(), Config(candidates=4, trust=0.3))]
    assert found[-3:] == ['tanh(relu(x))', 'mul(relu(x), x)', 'square(relu(x))']

def test_methods_and_presets():
    """--preset paper is the paper's method with its settings, said twice or once."""
    for model in ('minigpt', 'resnet20'):
        once, twice = (search.new_config(dict(model=model, preset='paper', **more))
                       for more in ({}, {'method': 'paper'}))
        assert once == twice and once.method == 'paper'
    assert once.steps == 14650 and search.new_config({'method': 'paper'}).steps == 150
    assert (once.candidates, once.start, once.warm_alphas) == (0, 0.0, True)
    for preset, model in itertools.product(search.PRESETS, evaluate.STANDARD):
        search.new_config(dict(preset=preset, model=model))
    rates = [search.new_config({'model': 'tinygpt', **given}).lr for given in ({}, {'lr': 3e-3})]
    assert rates == [1e-3, 3e-3]
    options = dict(sampler='shared', normalise='none', shape='core', clip=3.0)
    given = {'cell' if name == 'shape' else name: value for name, value in options.items()}
    _, cell, *_ = search.prepare(search.new_config(dict(model='toy', **given)))
    assert {name: getattr(cell, name) for name in options} == options

QUICK = f'{OPS},neg,abs,sigmoid,max --batch-size 256 --steps 240 --candidates 8'

@pytest.mark.parametrize('teacher, options', [
    ('abs(x)', QUICK), ('mul(sigmoid(x), x)', QUICK),
    *(pytest.param(text, 'base --batch-size 256 --candidates 8', marks=pytest.mark.slow)
      for text in ('sub(tanh(mul(x, exp(x))), erf(x))', 'mul(tanh(softplus(x)), x)'))])
def test_a_planted_function_is_found(teacher, options, tmp_path):
    """Up to scale and shift, to 2 % of its deviation. One that falls needs a warm start that leaves its
    direction open; Mish, a curve that is free."""
    result = run(tmp_path, '--teacher', teacher, '--ops', *options.split())
    x = torch.linspace(-2, 2, 99)
    both = torch.stack([Activation(result['expression'])(x), Activation(teacher)(x)])
    assert result['distance'] < 0.02 and torch.corrcoef(both)[0, 1] ** 2 > 0.999

@pytest.mark.parametrize('options', [
    '--model resnet20', '--model vit_tiny', '--model minigpt --context 12', '--model toy --method paper',
    '--model minigpt --preset paper --data tinystories_sample --tokens bytes --context 12',
    '--model toy --data cifar10_16 --cell deep'])
def test_everything_runs_through(options, tmp_path, capsys):
    """Networks, presets, cell shapes. The paper's procedure is what runs when it is asked for."""
    config = run(tmp_path, *'--steps 2 --batch-size 2 --candidates 0'.split(), *options.split())['config']
    assert bool(config['teacher']) == ('toy' in options and 'cifar' not in options)
    command = capsys.readouterr().out.split('next:')[1]
    assert all(word in command for word in ('--context 12', '--tokens bytes') if word in options)
    names = ('method', 'sampler', 'normalise', 'discretise', 'shrink')
    paper = ['paper', 'dirichlet', 'none', 'shrink', 'log']
    assert 'paper' not in options or [config[name] for name in names] == paper
    usual = 'abs' if config['teacher'] else 'relu' if re.search('resnet|toy', options) else 'gelu'
    assert log(tmp_path)[0]['standard'] == f'{usual}(x)'

def test_memory_that_is_shared():
    """Weights that are views of others stay tied when a state comes back, and a buffer of two modules one."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    everything = search.Everything(model)
    state = everything.state_dict()
    model[0].weight.data.zero_()
    everything.load_state_dict(state)
    model[0].weight.data.add_(1)
    assert torch.equal(model[1].weight, model[0].weight.t()) and model[0].weight.std() > 0
    for layer in model:
        layer.register_buffer('table', state['0.bias'])
    search.Everything(model)
    assert model[0].table is model[1].table is not state['0.bias']

def test_a_trial_begins_where_the_weights_are_used_to():
    """Whatever the scale and shift of a proposal, the trained weights see the curve that they know."""
    torch.manual_seed(0)
    cell = Cell(sampler='softmax', normalise='centre')
    model = nn.Sequential(cell.site())
    x = cell.grid[cell.bins]
    y = cell.fitted(lambda x: 7 - 3 * cell.curve(x))(x)
    assert torch.allclose(y, cell.values[0, cell.bins], atol=1e-4) and y.std() > 0.1
    cell.tabulate(standard=True)  # while dL/df is collected the cell has no part in what goes wrong
    assert blame(model, cell, torch.randn(4, 3))['op'] == 'standard activation'

"""After the descent: proposals and their mutations, tried on trained weights or from scratch."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import runoff
import search as script
from activation import Activation
from cell import Cell
from models import teacher_and_student
from runoff import evolve
from search import Config, search
from training import learning_rate


def distance_to(target: str, cell: Cell):
    """table and trial of an `evolve` that looks for this function: the loss is the distance to it on the grid."""
    goal = Activation(target)(cell.grid).detach()

    def table(chosen):
        values = Activation(cell.expression(chosen))(cell.grid).detach().expand(len(goal))
        return values if values.isfinite().all() else None
    return table, lambda chosen, values: F.mse_loss(values, goal).item()


def test_evolution_climbs():
    """From proposals far off it comes to a function of two stages, which random cells of the same number do not."""
    torch.manual_seed(0)
    cell = Cell(points=257)
    table, trial = distance_to('tanh(abs(x))', cell)
    proposals = [[int(torch.randint(len(ops), ())) for ops in cell.ops] for _ in range(400)]
    ranking = evolve(cell, proposals, 800, 0.5, table, trial, 1e-3)
    assert len(ranking) == 800 and ranking == sorted(ranking, key=lambda entry: entry[0])
    at_random = min(trial(chosen, values) for chosen in proposals if (values := table(chosen)) is not None)
    assert ranking[0][0] < 0.1 * at_random


def test_nothing_is_tried_twice():
    """Two spellings of one function are one, and so are two functions closer than `apart`; what has no table is left out; in a
    space with few functions the search for more ends."""
    torch.manual_seed(0)
    cell = Cell('identity,relu,add,left,right', points=257)
    tried = []
    table, trial = distance_to('relu(x)', cell)
    ranking = evolve(cell, [[0, 0, 0, 0, 0, 0]] * 3, 100, 0.5, lambda chosen: table(chosen) if 'add' in cell.expression(chosen) else None,
                     lambda chosen, values: tried.append(values) or trial(chosen, values), 0.01)
    assert 1 < len(ranking) == len(tried) < 100
    for k, values in enumerate(tried):
        assert all((values - other).norm() > 0.005 * values.norm() for other in tried[:k])
    assert all('add' in cell.expression(chosen) for _, chosen in ranking)


@pytest.mark.parametrize('count, mutants, proposed', [(1, 0.5, 1), (2, 0.5, 1), (7, 0.5, 4), (7, 0.0, 7), (7, 1.0, 0), (4, 0.25, 3)])
def test_so_many_are_proposals(count, mutants, proposed):
    """The first trials take proposals in their order, so that a good start is never crowded out; the others are mutations."""
    torch.manual_seed(0)
    cell = Cell(points=257)
    place = {op.name: k for k, op in enumerate(cell.ops[4])}
    right = [op.name for op in cell.ops[5]].index('right')
    names = ['tanh', 'relu', 'elu', 'square', 'abs', 'exp', 'sqrt', 'cube']
    order = []
    table, trial = distance_to('sinh(x)', cell)
    evolve(cell, [[0, 0, 0, 0, place[name], right] for name in names], count, mutants, table,
           lambda chosen, values: order.append(cell.expression(chosen)) or trial(chosen, values), 1e-3)
    words = [f'{name}(x)' for name in names]
    assert len(order) == count and order[:proposed] == words[:proposed] and words[proposed] not in order[proposed:proposed + 1]


# ---------------------------------------------------------------------------------------------------------------------
# Inside a search.

class Batches:
    """Endless batches of what a teacher says to 16 normal numbers."""

    def __init__(self, teacher, seed):
        self.teacher, self.draw = teacher, torch.Generator().manual_seed(seed)

    def __iter__(self):
        return self

    def __next__(self):
        x = torch.randn(32, 16, generator=self.draw)
        return x, self.teacher(x).detach()

    def state_dict(self):
        return {'draw': self.draw.get_state()}


def searched(monkeypatch=None, ops='base', points=257, **changes):
    """A short search on the toy; its cell, what it returned, what it reported, and the calls of runoff.train."""
    torch.manual_seed(0)
    cell = Cell(ops, points=points, sampler='softmax')
    teacher, model = teacher_and_student(nn.SiLU, cell.site)
    rows, calls, original = [], [], runoff.train

    def train(model, batches, loss, config, rate):
        calls.append(({name: value.clone() for name, value in model.state_dict().items()}, len(batches),
                      [rate(step) for step in range(len(batches))]))
        original(model, batches, loss, config, rate)
    if monkeypatch:
        monkeypatch.setattr(runoff, 'train', train)
    config = Config(**dict(dict(steps=60, warmstart=5, shrink_from=10, shrink_until=50, lr=0.01, lr_end=0.0, warmup=0.3, runoff=8, runoff_steps=3) | changes))
    result = search(model, Batches(teacher, 1), Batches(teacher, 2), F.mse_loss, config, lambda row, snapshot: rows.append(row))
    return cell, result, rows, calls, config


def same_state(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def count_mutations(monkeypatch):
    """A list that grows with every mutation."""
    drawn, original = [], Cell.mutated
    monkeypatch.setattr(Cell, 'mutated', lambda cell, chosen: drawn.append(chosen) or original(cell, chosen))
    return drawn


@pytest.mark.parametrize('mutants', [0.0, 0.5, 1.0])
def test_rounds(mutants, monkeypatch):
    """Everything starts from the same weights; eight cells for 3 steps, of which a share of `mutants` are mutations, the best
    two and the standard activation for 6, the learning rate of each round coming to its end."""
    drawn = count_mutations(monkeypatch)
    cell, _, rows, calls, config = searched(monkeypatch, runoff_mutants=mutants)
    assert len(drawn) >= 8 * mutants and bool(drawn) == bool(mutants)
    assert all(same_state(calls[0][0], call[0]) for call in calls)
    assert [call[1] for call in calls] == 8 * [3] + 3 * [6]
    for _, steps, rates in calls:
        whole = Config(**{**vars(config), 'steps': steps})
        assert rates == [learning_rate(step, whole) for step in range(steps)]
    candidates = [row for row in rows if 'candidate' in row]
    first, second = candidates[:8], candidates[8:]
    ranked = sorted(first, key=lambda row: row['loss'])
    assert [row['candidate'] for row in second] == [*(row['candidate'] for row in ranked[:2]), cell.standard.expression]


@pytest.mark.parametrize('count', [2, 4, 8, 20])
def test_the_time_left_counts_every_round(count, monkeypatch):
    """With a second a weight step, what is left after the descent is as many seconds as the run-off then takes steps."""
    *_, calls, config = searched(monkeypatch, runoff=count)
    run = SimpleNamespace(config=config, pace={True: 1.0, False: 1.0})
    assert script.Run.left(run, config.steps) == sum(steps for _, steps, _ in calls)


def test_what_is_no_candidate():
    """Neither the standard activation under whatever name or times a number, nor a straight line or a constant, as long as there are others."""
    cell, _, rows, _, _ = searched(ops='identity,neg,scale,const,relu,tanh,left,right,max', runoff=12)
    x = torch.linspace(-5, 5, 201)
    standards = [row for row in rows if row.get('candidate') == 'relu(x)']
    others = {row['candidate'] for row in rows if 'candidate' in row} - {'relu(x)'}
    assert len(others) > 3 and len(standards) == 1
    for expression in others:
        y = Activation(expression)(x).detach().expand(len(x))
        scale = (y @ x.relu()) / x.relu().square().sum()
        assert (y - scale * x.relu()).norm() > 3e-3 * y.norm() and y.diff().diff().abs().max() > 1e-4, expression


def test_the_standard_activation_is_known(monkeypatch):
    """By whatever spelling, sign and gain, or with next to nothing added; LeakyReLU, which leaks 1 %, is another function than ReLU."""
    tables, original = [], runoff.evolve
    monkeypatch.setattr(runoff, 'evolve', lambda cell, proposals, count, mutants, table, *rest: tables.append(table) or original(cell, proposals, count, mutants, table, *rest))
    cell, *_ = searched()
    unary, binary = ({op.name: k for k, op in enumerate(cell.ops[k])} for k in (0, 2))

    def out_of_question(u0, b0, u2, u3, b1):
        return tables[0]([unary[u0], unary['identity'], binary[b0], unary[u2], unary[u3], binary[b1]]) is None
    assert out_of_question('relu', 'left', 'identity', 'tanh', 'left') and out_of_question('tanh', 'left', 'tanh', 'relu', 'right')
    assert out_of_question('relu', 'left', 'neg', 'tanh', 'left') and out_of_question('relu', 'add', 'relu', 'relu', 'add')
    assert not out_of_question('leaky_relu', 'left', 'identity', 'tanh', 'left') and not out_of_question('relu', 'left', 'tanh', 'tanh', 'left')


def test_what_is_tried_first(monkeypatch):
    """What the descent ended with, the cells near the standard activation in the order of the alphas, then samples of the alphas."""
    near, queues, original = [], [], runoff.evolve
    monkeypatch.setattr(Cell, 'near', lambda cell, made=Cell.near: near.extend(made(cell)) or list(near))
    monkeypatch.setattr(runoff, 'evolve', lambda cell, proposals, *rest: queues.append(proposals) or original(cell, proposals, *rest))
    cell, *_ = searched()
    queue = queues[0]
    assert len(near) == 22 + 3 * 7 and len(queue) == 1 + len(near) + 45
    assert queue[0] == [cell.preferred(k)[0] for k in range(6)] and queue[1:len(near) + 1] == near


def test_plain_field():
    """Before anything else each operation alone, after what the descent ended with."""
    cell, _, rows, _, _ = searched(runoff=60, runoff_steps=1, runoff_field='plain')
    candidates = [row['candidate'] for row in rows if 'candidate' in row and row['runoff_steps'] == 2]  # at least two
    names = {op.name for op in cell.ops[4]} - {'identity', 'neg', 'scale', 'bias', 'const', 'relu'}  # lines, and the standard
    assert {f'{name}(x)' for name in names} <= set(candidates[:len(names) + 2])


def test_all_descents_meet_in_the_runoff(monkeypatch):
    """With restarts: where each descent ended is tried, the last one first. Resting alphas, so that they end by luck, apart."""
    ends, original = [], script.score
    monkeypatch.setattr(script, 'score', lambda model, *rest: ends.append(script.cell_of(model).expression()) or original(model, *rest))
    _, _, rows, _, _ = searched(monkeypatch, 'relu,tanh,square,abs,sqrt,atan,left,right', runoff=8, restarts=3, arch_lr=0.0)
    first = [row['candidate'] for row in rows if 'candidate' in row and row['runoff_steps'] == 3][:3]
    assert len(set(ends)) == 3 and first == ends[::-1]


def test_refine_compares_like_with_like(monkeypatch):
    """All trials from the weights of the descent, for ten steps at one rate; the cell that is kept is the best of them."""
    rankings, shares, original = [], [], runoff.evolve
    monkeypatch.setattr(runoff, 'evolve', lambda cell, proposals, count, mutants, *rest: shares.append(mutants) or rankings.append(
        original(cell, proposals, count, mutants, *rest)) or rankings[-1])
    cell, (found, _), rows, calls, config = searched(monkeypatch, 'relu,tanh,square,abs,silu,add,mul,max,left,right', runoff=0, refine=40)
    assert shares == [0.5]  # of mutations
    (best, winner), (second, _) = rankings[0][:2]
    assert best < second and found.expression == cell.expression(winner)
    assert len(calls) == 40 and all(same_state(calls[0][0], call[0]) for call in calls)
    assert all(steps == 10 and rates == 10 * [pytest.approx(0.3 * config.lr)] for _, steps, rates in calls)
    assert [row['refine'] for row in rows if 'refine' in row] == [0, 40] and cell.operations() == 6


def test_a_descent_that_fits_is_not_refined(monkeypatch):
    """Below --target there is nothing to try, and no restart; above it both happen, with the proposals of that restart only."""
    _, _, rows, calls, _ = searched(monkeypatch, runoff=0, refine=40, target=math.inf, restarts=2)
    assert calls == [] and {row.get('restart', 0) for row in rows} == {0}
    proposals, original = [], script.refine
    monkeypatch.setattr(script, 'refine', lambda model, cell, proposed, *rest: proposals.append(len(proposed)) or original(model, cell, proposed, *rest))
    _, _, rows, calls, _ = searched(monkeypatch, runoff=0, refine=10, restarts=2)
    assert len(calls) == 20 and proposals == [45, 45]
    assert {row.get('restart', 0) for row in rows} == {0, 1}

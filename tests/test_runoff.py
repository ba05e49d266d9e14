"""After the descent: proposals and their mutations, tried on trained weights or from scratch."""
import pytest
import torch
import torch.nn.functional as F

from activation import Activation
from cell import Cell
from runoff import evolve


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
    ranking = evolve(cell, proposals, 800, table, trial, 1e-3)
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
    ranking = evolve(cell, [[0, 0, 0, 0, 0, 0]] * 3, 100, lambda chosen: table(chosen) if 'add' in cell.expression(chosen) else None,
                     lambda chosen, values: tried.append(values) or trial(chosen, values), 0.01)
    assert 1 < len(ranking) == len(tried) < 100
    for k, values in enumerate(tried):
        assert all((values - other).norm() > 0.005 * values.norm() for other in tried[:k])
    assert all('add' in cell.expression(chosen) for _, chosen in ranking)


@pytest.mark.parametrize('count', [1, 2, 7])
def test_half_of_them_are_proposals(count):
    """The first half of the trials takes proposals in their order, so that a good start is never crowded out."""
    torch.manual_seed(0)
    cell = Cell(points=257)
    place = {op.name: k for k, op in enumerate(cell.ops[4])}
    right = [op.name for op in cell.ops[5]].index('right')
    names = ['tanh', 'relu', 'elu', 'square', 'abs', 'exp', 'sqrt']
    order = []
    table, trial = distance_to('sinh(x)', cell)
    evolve(cell, [[0, 0, 0, 0, place[name], right] for name in names], count, table,
           lambda chosen, values: order.append(cell.expression(chosen)) or trial(chosen, values), 1e-3)
    first = [f'{name}(x)' for name in names[:(count + 1) // 2]]
    assert len(order) == count and order[:len(first)] == first and order[len(first):len(first) + 1] != [f'{names[len(first)]}(x)']

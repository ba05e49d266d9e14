"""After the descent: which discrete cell is it? Short trainings decide (not in the paper).

Gradient descent ends in one discrete cell, and on its way proposes others. But what the alphas like in a mixture need not be
best alone, and what suits weights already trained may be useless from scratch. So cells are tried, the proposals first and
then mutations of the best so far: by `refine` from the weights of the descent, by `runoff` from scratch. The parts are
known: evolution by mutation (Real et al., arXiv 1802.01548) and successive halving (Jamieson and Talwalkar, arXiv 1502.07943).
"""
import copy
import dataclasses
import itertools
import math
from typing import Any, Callable, Iterable, Iterator, Optional

import torch
import torch.nn as nn
from torch import Tensor

from activation import Activation, bend
from cell import Cell
from training import Training, learning_rate, weight_optimizer

Ranking = list[tuple[float, list[int]]]  # loss, cell (an operation a choice point); the best first


@torch.no_grad()
def score(model: nn.Module, batches: Iterable, loss: Callable) -> dict[str, float]:
    """Mean loss (and accuracy, for classes) of the network as it stands over these batches."""
    model.eval()
    losses, hits = [], []
    for x, y in batches:
        output = model(x)
        losses.append(loss(output, y))
        if not y.is_floating_point():
            hits.append((output.argmax(-1) == y).float().mean())
    model.train()
    result = {'loss': torch.stack(losses).mean().item()}
    return result | ({'accuracy': torch.stack(hits).mean().item()} if hits else {})


def train(model: nn.Module, batches: list, loss: Callable, config: Training, rate: Callable[[int], float]) -> None:
    """Train on these batches with a fresh optimiser; rate: step -> learning rate.

    Nothing is checked on the way: what is not finite once stays so, and shows in the score.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = weight_optimizer(weights, config)
    for step, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group['lr'] = rate(step)
        loss(model(x), y).backward()
        if config.grad_clip:
            nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def evolve(cell: Cell, proposals: list[list[int]], count: int, mutants: float, table: Callable[[list[int]], Optional[Tensor]],
           trial: Callable[[list[int], Tensor], float], apart: float) -> Ranking:
    """Try `count` cells: the proposals in their order, but for a share of `mutants` at least: mutations of the best so far.

    table: (points,) values of a cell on the grid; None for a cell that is out of question. trial: its loss. apart: cells
    whose values on [-5, 5] differ by less than this share of their norm are one and the same, and not tried again.
    """
    ranking: Ranking = []
    near = (cell.grid.abs() <= 5).nonzero().flatten()
    near = near[::max(1, len(near) // 100)]
    queue, tried = list(proposals), torch.empty(0, len(near), device=cell.grid.device)
    fruitless = 0  # draws in a row that were nothing new: in a small space there may be less than `count` to find
    while len(tried) < count and fruitless < max(count, 100) + len(proposals):
        if queue and len(tried) < (1 - mutants) * count:
            chosen = queue.pop(0)
        else:
            # the best hundredth, but three at least: enough that not all descend from one
            parents = [chosen for _, chosen in ranking[:max(3, count // 100)]] or proposals
            chosen = cell.mutated(parents[int(torch.randint(len(parents), ()))])
        values = table(chosen)
        if values is None or ((tried - values[near]).norm(dim=1) <= apart * values[near].norm()).any():
            fruitless += 1
            continue
        fruitless = 0
        tried = torch.cat([tried, values[None, near]])
        ranking.append((trial(chosen, values), chosen))
        ranking.sort(key=lambda entry: entry[0])  # stable: of equals the first that was tried
    return ranking


def refine(model: nn.Module, cell: Cell, proposals: list[list[int]], train_batches: Iterator, val_batches: Iterator,
           loss: Callable, config: Training, bilevel: Callable, report: Callable[..., None], snapshot: Callable) -> None:
    """Put the best of `config.refine` cells in the place of the one that the descent ended with, unless that fits already.

    Each is judged on the same validation batches after the same ten weight steps from the weights of the descent. For planted
    functions, which do not care where weights come from; a trial takes some milliseconds.
    """
    rate, here = 0.3 * config.lr, [active[0] for active in cell.active]
    report({'refine': 0, 'formula': cell.activation().formula}, snapshot)
    settle(bilevel, rate)
    batches, judge = list(itertools.islice(train_batches, 10)), list(itertools.islice(val_batches, 4))
    if score(model, judge, loss)['loss'] < config.target:
        return  # among a thousand cells some are as good by luck, and less simple
    kept = copy.deepcopy(model.state_dict())

    @torch.no_grad()
    def table(chosen: list[int]) -> Tensor:
        cell.active = [[j] for j in chosen]
        cell.draw()
        return cell.tables[0]

    def trial(chosen: list[int], values: Tensor) -> float:
        model.load_state_dict(kept)
        train(model, batches, loss, config, lambda step: rate)
        return worth(score(model, judge, loss))

    ranking = evolve(cell, [here, *proposals], config.refine, 0.5, table, trial, 1e-3)
    model.load_state_dict(kept)
    cell.active = [[j] for j in ranking[0][1]]
    report({'refine': len(ranking), 'formula': cell.activation().formula}, None)
    settle(bilevel, rate)


def settle(bilevel: Callable, rate: float) -> None:
    """Some steps of both levels for weights and scalars, with one operation a choice point."""
    for _ in range(40):
        bilevel(rate, warm=False)


def worth(result: dict[str, float]) -> float:
    """The loss to sort by: what is not finite comes last."""
    return result['loss'] if math.isfinite(result['loss']) else math.inf


def runoff(model: nn.Module, cell: Cell, state: dict[str, Any], train_batches: Iterator, val_batches: Iterator, loss: Callable,
           config: Training, report: Callable[..., None], snapshot: Callable) -> tuple[Activation, dict[str, float]]:
    """Which function is best when trained from scratch? `config.runoff` cells are tried; the best quarter goes on to a round
    of twice as many steps, and so on while that leaves two or more. The best one, and how it scored.

    All start from the same initial weights and see the same batches: training batches train, validation batches judge. The
    standard activation runs along in the last round, and the result says how it did; it is no candidate, since what is
    wanted is a new function.
    """
    def values_of(activation: Activation) -> Tensor:
        return activation.to(cell.grid.device)(cell.grid).detach().expand(len(cell.grid))

    def table(chosen: list[int]) -> Optional[Tensor]:
        activation = Activation(cell.expression(chosen), config.clip)
        values = values_of(activation)
        # the standard activation times a number is no new function: the next layer would undo it
        scale = (values @ standard_values) / (standard_values @ standard_values)
        known = (values - scale * standard_values).norm() <= 3e-3 * values.norm()
        return None if known or not values.isfinite().all() or not bend(activation) > 0.01 else values

    def trained(expression: str, values: Tensor) -> dict[str, float]:
        cell.use(values[None])
        model.load_state_dict(state['initial'])
        train(model, batches, loss, config, lambda step: learning_rate(step, schedule))
        result = score(model, judge, loss)
        report({'candidate': expression, 'formula': Activation(expression, config.clip).formula, 'runoff_steps': steps,
                **result}, None)
        results[expression] = result
        return result

    standard = cell.standard.expression
    standard_values = values_of(cell.standard)
    while True:
        steps, field, results = state['runoff']['steps'], state['runoff']['field'], {}
        schedule = dataclasses.replace(config, steps=steps)
        report({'runoff': len(field) or config.runoff, 'runoff_steps': steps}, snapshot)
        batches, judge = list(itertools.islice(train_batches, steps)), list(itertools.islice(val_batches, config.runoff_batches))
        if field:
            ranking = sorted((worth(trained(word, values_of(Activation(word, config.clip)))), word) for word in field)
        else:
            cells = evolve(cell, state['proposals'], config.runoff, config.runoff_mutants, table,
                           lambda chosen, values: worth(trained(cell.expression(chosen), values)), 1e-2)
            ranking = [(value, cell.expression(chosen)) for value, chosen in cells]
        if not ranking:  # nothing but straight lines, as with --ops identity,add: what the descent ended with, then
            return Activation(state['found'][0][1], config.clip), state['found'][0][2]
        best = [expression for _, expression in ranking[:math.ceil(len(ranking) / 4)]]
        if len(best) == 1:
            return Activation(best[0], config.clip), results[best[0]] | {'standard_loss': worth(trained(standard, standard_values))}
        state['runoff'] = {'field': best, 'steps': 2 * steps}

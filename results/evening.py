"""The preset `evening` from end to end: searches, and what they found trained beside known functions.

    python results/evening.py --data-dir FOLDER --workers 2 --minutes 600
    python results/evening.py --report          prints the tables and draws (needs matplotlib)

Everything is done once: a search that was cut is resumed, a finished training is a line of
results/evening.jsonl, so the same command goes on. FOLDER holds CIFAR-10 and TinyStories. In this order:

    tune       the standard activation at three learning rates, seed 90; the best is used for all trainings
    searches   two a network by our default (`ours`), two by the paper's procedure (`--method paper`)
    trainings  what was found, known functions and a random one, seeds 0 to 2
    lengths    seven or more at a quarter and four times (resnet20: a sixteenth) of the steps, seeds 0 to 2
    quick      all of them with the preset quick, seeds 0 to 2: does what wins there win in the evening?
    more       the trainings again with seeds 3 and 4
"""
import argparse
import functools
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean
from typing import Any, Iterator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault('OMP_NUM_THREADS', '1')

LEDGER, RUNS = HERE / 'evening.jsonl', HERE.parent / 'runs'
NETWORKS = {'minigpt': (1e-3, 3e-3, 6e-3), 'vit_tiny': (5e-4, 1e-3, 2e-3), 'resnet20': (0.05, 0.1, 0.2)}
STANDARD = {'minigpt': 'gelu', 'vit_tiny': 'gelu', 'resnet20': 'relu'}
KNOWN = {'minigpt': ['grafs_gpt_1', 'add(relu(x), min0(sub(square(x), sigmoid(x))))'],
         'vit_tiny': ['grafs_vit'], 'resnet20': ['grafs_resnet_1']}
BASELINES = ['relu', 'gelu', 'silu', 'elu', 'relu2']
LENGTHS = {'minigpt': (500, 8000), 'resnet20': (488, 1950)}


def work(connection: Any, data_dir: str, k: int) -> None:
    """A worker: gets jobs (kind, arguments) until there are no more, and says when each is done."""
    sys.stdout = sys.stderr = open(RUNS / f'worker{k}.log', 'a', buffering=1)
    import torch
    import data
    import evaluate
    import search
    torch.set_num_threads(1)
    data.load = functools.cache(data.load)
    for kind, job in iter(connection.recv, None):
        try:
            if kind == 'search':
                network, method, seed = job
                folder = RUNS / f'{network}-{method}-{seed}'
                options = ['--model', network, '--preset', 'evening', '--method', method, '--seed', str(seed)]
                if network == 'minigpt' and method == 'paper':
                    options += ['--arch-lr', '1e-3', '--warmstart', '0.1']
                if network == 'vit_tiny':
                    options += ['--lr', '1e-3']
                again = ['--resume', str(folder), '--data-dir', data_dir]
                new = [*options, '--data-dir', data_dir, '--out', str(folder)]
                search.main(again if (folder / 'checkpoint.pt').exists() else new)
            else:
                network, name, seed, changes = job
                given = dict(model=network, preset='evening', data_dir=data_dir, out=str(LEDGER)) | changes
                if given['preset'] == 'quick':    # its data are built in
                    del given['data_dir']
                config = evaluate.configure(evaluate.Training, evaluate.PRESETS, given)
                evaluate.evaluate(dict([evaluate.resolve(name)]), config, [seed])
        except (Exception, SystemExit):  # the others go on; what happened is in the log
            traceback.print_exc()
        connection.send(job)


def best_rate(network: str, rows: list[dict[str, Any]]) -> float:
    """The standard's best learning rate, by test loss on the seed 90, which is used nowhere else."""
    tuned = [row for row in rows if row['seed'] == 90 and row['settings']['model'] == network]
    return min(tuned, key=lambda row: row['test_loss'] or 99)['settings']['lr']


@functools.cache
def expression(name: str) -> str:
    from evaluate import resolve
    return resolve(name)[1].expression

def once(names: list[str]) -> list[str]:
    """One name for each function: a search may have found a known one."""
    return list({expression(name): name for name in reversed(names)}.values())[::-1]

def jobs(rows: list[dict[str, Any]]) -> Iterator[tuple[str, tuple]]:
    """What can be done now, the most important first; what is in the ledger is included."""
    for network, rates in NETWORKS.items():
        yield from (('train', (network, STANDARD[network], 90, {'lr': rate})) for rate in rates)
    searches = [(network, method, seed) for seed in (0, 1) for network in reversed(NETWORKS)
                for method in ('ours', 'paper')]
    ended = {s: (RUNS / '{}-{}-{}'.format(*s) / 'activation.json').exists() for s in searches}
    yield from (('search', s) for s in searches if not ended[s])
    tuned = {n: sum(row['seed'] == 90 and row['settings']['model'] == n for row in rows) for n in NETWORKS}
    more, quick = [], []
    for network in (n for n in NETWORKS if tuned[n] == len(NETWORKS[n])):
        rate = {'lr': best_rate(network, rows)}
        found = [str(RUNS / '{}-{}-{}'.format(*s)) for s in searches if s[0] == network and ended[s]]
        known = [STANDARD[network], *BASELINES, *KNOWN[network], 'random_0']
        names = once([*found, *known])
        yield from (('train', (network, name, seed, rate)) for seed in range(3) for name in names)
        more += [('train', (network, name, seed, rate)) for seed in (3, 4) for name in names]
        quick += [('train', (network, name, seed, {'preset': 'quick'})) for seed in range(3)
                  for name in names]
        if all(ended[s] for s in searches if s[0] == network):
            few = {expression(name) for name in (found[0], *known)}
            yield from (('train', (network, name, seed, rate | {'steps': steps}))
                        for steps in LENGTHS.get(network, ()) for seed in range(3)
                        for name in names if expression(name) in few)
    yield from quick
    yield from reversed(more)  # resnet20 first, whose differences are small


def master(data_dir: str, workers: int, minutes: float) -> None:
    from evaluate import read_ledger
    RUNS.mkdir(exist_ok=True)
    started, busy, begun = time.monotonic(), {}, set()
    context = multiprocessing.get_context('spawn')
    for k in range(workers):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, data_dir, k), daemon=True).start()
        busy[ours] = False
    while (left := 60 * minutes - (time.monotonic() - started)) > 0:
        todo = [job for job in jobs(read_ledger(LEDGER)) if repr(job) not in begun]
        if not todo and not any(busy.values()):
            break
        for connection, job in zip([c for c in busy if not busy[c]], todo):
            begun.add(repr(job))
            busy[connection] = True
            connection.send(job)
        for connection in wait([c for c in busy if busy[c]], timeout=min(left, 5)):
            print(f'{time.monotonic() - started:5.0f} s', connection.recv(), flush=True)
            busy[connection] = False


def losses(network: str, preset: str = 'evening', by: str = 'name') -> dict[str, dict[int, dict[int, float]]]:
    """Test losses by name (or expression), steps and seed, without those that diverged."""
    from evaluate import read_ledger
    found: dict[str, dict[int, dict[int, float]]] = {}
    for row in read_ledger(LEDGER):
        s = row['settings']
        if (s['model'], s['preset']) == (network, preset) and row['seed'] < 90 and not row['diverged']:
            found.setdefault(row[by], {}).setdefault(s['steps'], {})[row['seed']] = row['test_loss']
    return found

def differences(network: str) -> dict[str, dict[int, tuple[int, float, float]]]:
    """By name and steps: how many seeds, mean test loss minus the standard's, half its 95 % interval."""
    from plot import compare
    base = losses(network).get(STANDARD[network], {})
    return {name: {steps: compare(values, base[steps]) for steps, values in sorted(by_steps.items())
                   if steps in base} for name, by_steps in losses(network).items()}

def rank_correlations(columns: list[list[float]]) -> list[list[float]]:
    """Spearman's, between the columns; no two values of one are equal."""
    import torch
    ranks = torch.tensor(columns).argsort(1).argsort(1).double().corrcoef()
    return [[round(r, 2) for r in row] for row in ranks.tolist()]

def report() -> str:
    """The tables of the trainings, and how the differences to the standard shrink with length."""
    from evaluate import PRESETS, read_ledger
    from plot import report as tables
    rows = [row for row in read_ledger(LEDGER) if row['seed'] < 90]
    text = [tables(rows)]
    for network in LENGTHS:
        table = {name: row for name, row in differences(network).items() if len(row) > 1}
        lengths = sorted({steps for row in table.values() for steps in row})
        text += ['', f'| {network}: test loss minus that of {STANDARD[network]} |' + ''.join(
            f' {steps} steps |' for steps in lengths), '|---' * (len(lengths) + 1) + '|']
        whole = [row for row in table.values() if len(row) == len(lengths)]
        if whole:
            ranks = rank_correlations([[row[steps][1] for row in whole] for steps in lengths])
            text.insert(-2, f'rank correlations of {len(whole)} functions between {lengths} steps: {ranks}')
        for name, row in table.items():
            cells = [f'{mean:+.4f} +- {half:.4f}' if (n := row.get(steps, (0,))[0]) and n > 1 else '-'
                     for steps in lengths for _, mean, half in [row.get(steps, (0, 0.0, 0.0))]]
            text.append(f"| {name} | {' | '.join(cells)} |")
    for network in NETWORKS:
        both = {}  # means over the seeds that all functions have, or a lucky seed moves a rank
        for preset in ('quick', 'evening'):
            steps = PRESETS[preset][network]['steps']
            runs = {name: row[steps] for name, row in losses(network, preset, 'expression').items()
                    if steps in row}
            seeds = set.intersection(*map(set, runs.values())) if runs else set()
            both[preset] = {name: fmean(row[seed] for seed in seeds) for name, row in runs.items() if seeds}
        names = sorted(both['quick'].keys() & both['evening'].keys())
        if len(names) > 2:
            ranks = rank_correlations([[means[name] for name in names] for means in both.values()])
            text.append(f'{network}: rank correlation of {len(names)} functions, quick and evening: '
                        f'{ranks[0][1]}')
        tuned = sorted((row['settings']['lr'], round(row['test_loss'], 4)) for row in read_ledger(LEDGER)
                       if row['seed'] == 90 and row['settings']['model'] == network)
        seconds = sum(row['seconds'] for row in rows if row['settings']['model'] == network)
        text.append(f'{network}: test loss of {STANDARD[network]} by learning rate {tuned}; '
                    f'{seconds / 3600:.1f} h of training')
    return '\n'.join(text)

def draw(network: str) -> Path:
    """The differences against the length of the training: the seven best at the longest, trained at all."""
    from activation import Activation
    from evaluate import read_ledger
    from plot import LOOKS, pyplot
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 6), layout='constrained')
    rows = read_ledger(LEDGER)
    formulas = {row['name']: Activation(row['expression'], row['clip']).formula for row in rows}
    table = differences(network)
    lengths = sorted({steps for row in table.values() for steps in row})
    table = {name: row for name, row in table.items() if len(row) == len(lengths)}
    for k, (name, row) in enumerate(sorted(table.items(), key=lambda item: item[1][lengths[-1]][1])[:7]):
        means, halves = zip(*(row[steps][1:] for steps in row))
        axis.errorbar([steps * 1.03 ** (k - 3) for steps in row], means, halves, capsize=3,
                      label=formulas[name], **LOOKS[k])
    axis.set(xscale='log', xlabel='steps of the training', title=f'{network}, 95 % intervals over seeds',
             ylabel=f'test loss minus that of {STANDARD[network]}')
    axis.minorticks_off()
    axis.set_xticks(lengths, [str(steps) for steps in lengths])
    axis.legend(loc='upper center', bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=10)
    figure.savefig(path := HERE / f'evening-{network}.png', dpi=100)
    return path

if __name__ == '__main__':
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=look)
    parser.add_argument('--data-dir', help='folder with CIFAR-10 and TinyStories')
    parser.add_argument('--workers', type=int, default=2, help='processes, a thread each (2)')
    parser.add_argument('--minutes', type=float, default=600, help='then stop, to go on another time (600)')
    parser.add_argument('--report', action='store_true', help='print the tables and draw, train nothing')
    given = parser.parse_args()
    if given.report:
        print(report())
        print(*map(draw, LENGTHS))
    else:
        master(os.path.abspath(given.data_dir), given.workers, given.minutes)

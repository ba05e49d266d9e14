"""Is an activation any good? `python evaluate.py runs/minigpt-tinystories_sample-seed0 --model minigpt --seeds 5`.

Every activation is trained from scratch under the same settings; for a seed all of them get the same initial weights
and the same batches, so that differences are paired. The last step counts, never the best one, and the test set is
touched once a run. Each finished run is one line in a ledger, so that an evaluation goes on where it was stopped, and
ledgers of several machines are joined by `cat` and read by `--report`.
"""
import dataclasses
import math
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import torch
import torch.nn as nn

import data
import figures
from activation import NAMED, Activation, gallery, named
from cell import random_expression
from ledger import append, identity, nameless, read_ledger, report
from models import STANDARD
from models_own import network, standard_of
from ops import valid
from table import Tabulated
from training import (Parser, Training, bytes_kept, check_memory, configure, cross_entropy, learning_rate, memory_needed,
                      one_line_errors, option, options, read_json, weight_optimizer)


@dataclass
class Config(Training):
    """The options of a retraining."""
    out: str = option('results.jsonl', 'ledger: one line a finished run; a run that is there is not repeated')
    freeze: bool = option(False, 'keep the learned scalars of a function as they are; else they are trained on')
    table: bool = option(False, 'look the activation up in a table instead of computing it op by op')

    def check(self) -> None:
        super().check()
        valid('--data', self.data, data.DATA)


# laptop: about a minute a run on two cores, built-in data. paper: the retraining of the paper's appendix, in steps;
# its TrivialAugment for vit_tiny is left out: crops and mirrors here.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    'laptop': {
        'resnet20': dict(data='cifar10_16', steps=800, batch_size=64, optimizer='sgd', lr=0.1, lr_end=0.0, warmup=0.05,
                         weight_decay=5e-4),
        'vit_tiny': dict(data='cifar10_16', steps=300, batch_size=16, lr=5e-4, lr_end=0.0, warmup=0.1, weight_decay=0.05),
        # lr: the best of 1, 2, 3 and 4 e-3 for GELU by a margin (at 1e-3 the loss hardly leaves the plateau at 2.1)
        'minigpt': dict(data='tinystories_sample', steps=400, batch_size=8, context=64, lr=3e-3, lr_end=0.1, warmup=0.1,
                        weight_decay=0.1),
        'toy': dict(data='cifar10_16', steps=2000, batch_size=64, lr=1e-3, lr_end=0.1),
    },
    'paper': {
        'resnet20': dict(data='cifar10', steps=78_000, batch_size=128, optimizer='sgd', lr=0.1, weight_decay=1e-4,
                         drops='0.5,0.75', grad_clip=0.0),
        'vit_tiny': dict(data='cifar10', steps=48_500, batch_size=512, lr=1e-3, lr_end=0.0, weight_decay=0.0, grad_clip=0.0),
        'minigpt': dict(data='tinystories', steps=10_000, batch_size=64, accumulate=10, context=256, tokens='gpt2', lr=1e-3,
                        lr_end=0.1, warmup=100, weight_decay=0.1, dropout=0.2),
        'toy': dict(data='cifar10', steps=20_000, batch_size=128, lr=1e-3, lr_end=0.1),
    },
}
BASELINES = {'image': 'relu,leaky_relu,elu,silu,gelu', 'text': 'relu,leaky_relu,elu,silu,gelu,relu2'}


# ---------------------------------------------------------------------------------------------------------------------
# Which activations.

class Candidate(NamedTuple):
    """name: as in the table. searched: 'model/data' of the search that found it, or ''."""
    name: str
    activation: Activation
    searched: str = ''


def resolve(text: str) -> Candidate:
    """A run folder, a path to activation.json, a known name or one of the gallery, random_0, random_1 ..., an expression.

    Raises ValueError, one line, for what is none of these.
    """
    path = Path(text)
    # a text of over 1,000 characters is no path, and some systems balk at it
    if text.strip() and text not in NAMED and len(text) < 1000 and (path.is_dir() or path.suffix == '.json' or '/' in text):
        return from_file(path if path.suffix == '.json' else path / 'activation.json')
    if match := re.fullmatch(r'random_(\d{1,9})', text):
        return Candidate(text, Activation(random_expression(torch.Generator().manual_seed(int(match[1])))))
    activation, name = named(text), text.replace(' ', '')
    entry = gallery().get(name) if name not in NAMED and re.fullmatch(r'[\w-]+', name) else None
    return Candidate(name, activation, f'{entry.model}/{entry.data}' if entry else '')


def from_file(path: Path) -> Candidate:
    """The activation that a search wrote."""
    try:
        content = read_json(path)
        expression, clip = content['expression'], content['clip']
        if not isinstance(expression, str) or not (clip is None or isinstance(clip, (int, float)) and 0 < clip < 1e12):
            raise TypeError('expression must be a text, clip a number above 0 or null')
        name = path.resolve().parent.name if path.name == 'activation.json' else path.stem
        return Candidate(name, Activation(expression, clip), f"{content.get('model', '?')}/{content.get('data', '?')}")
    except OSError as error:
        raise ValueError(f'cannot read {path}: {error.strerror}; a finished search leaves it in its run folder') from None
    except (ValueError, KeyError, TypeError) as error:
        what = f'it lacks {error}' if isinstance(error, KeyError) else str(error).split('\n')[0]
        raise ValueError(f'{path} is not an activation.json of a search: {what}') from None


# ---------------------------------------------------------------------------------------------------------------------
# One run.

def retrain(candidate: Candidate, config: Config, dataset: data.Dataset, seed: int) -> dict[str, Any]:
    """Train the network from scratch with this activation; the row of the ledger."""
    torch.manual_seed(seed)
    cuda = config.device.startswith('cuda')
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    activation = Activation(candidate.activation.expression, candidate.activation.clip)
    activation.requires_grad_(not config.freeze)
    module = Tabulated(activation) if config.table else activation
    # One module in all sites: the result is one function, its scalars too. It draws no random numbers, so the weights
    # that follow are the same for all activations of a seed.
    model = network(config, lambda: module, dataset).to(config.device)
    batches = data.Batches(dataset, data.whole(dataset), config.batch_size, seed, augment=True, context=config.context,
                           device=config.device)
    check_memory(memory_needed(model, batches, cross_entropy, config), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = weight_optimizer(parameters, config)
    started, paces, curve, diverged = time.monotonic(), [], [], False
    mark, total, kept = started, torch.zeros((), device=config.device), 0
    every = max(1, config.steps // 20)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, config)
        for _ in range(config.accumulate):
            x, y = next(batches)
            if step == 0:
                kept, loss = bytes_kept(lambda: cross_entropy(model(x), y), model.parameters())
            else:
                loss = cross_entropy(model(x), y)
            (loss / config.accumulate).backward()
            total += loss.detach() / config.accumulate
        if config.grad_clip:
            nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            # The only place where a value leaves the device. The curve is the mean over the steps in between.
            mean, now = total.item() / every, time.monotonic()
            paces.append((now - mark) / every)
            mark, total = now, torch.zeros_like(total)
            if not math.isfinite(mean):
                diverged = True
                break
            curve.append([step + 1, round(mean, 5)])
    metrics = dict(test_loss=math.inf, test_accuracy=0.0) if diverged else test(model, dataset, config)
    # A network that knows nothing scores log(classes): a loss ten times as high is no result either, though finite.
    diverged = diverged or not metrics['test_loss'] <= 10 * math.log(dataset.classes)
    return {'name': candidate.name, 'expression': candidate.activation.expression, 'clip': candidate.activation.clip,
            'searched': candidate.searched, 'seed': seed, 'settings': settings(config),
            **{key: None if not math.isfinite(value) else value for key, value in metrics.items()},
            'train_loss': curve[-1][1] if curve and not diverged else None, 'diverged': diverged,
            'learned': [round(s.item(), 6) for s in activation.scalars], 'curve': curve,
            'seconds': round(time.monotonic() - started, 1), 'ms_step': round(1e3 * statistics.median(paces or [0]), 2),
            'mb_kept': round(kept / 1e6, 2),
            'mb_peak': round(torch.cuda.max_memory_allocated() / 1e6, 2) if cuda else None,
            'python': sys.version.split()[0], 'torch': torch.__version__, 'device': device_name(config.device),
            'threads': torch.get_num_threads()}


@torch.no_grad()
def test(model: nn.Module, dataset: data.Dataset, config: Config) -> dict[str, float]:
    model.eval()
    losses, hits, count = 0.0, 0.0, 0
    for x, y in data.test_batches(dataset, config.batch_size, config.context, config.device):
        output = model(x)
        losses += cross_entropy(output, y).item() * y.numel()
        hits += (output.argmax(-1) == y).sum().item()
        count += y.numel()
    return {'test_loss': losses / count, 'test_accuracy': hits / count}


def settings(config: Config) -> dict[str, Any]:
    """What makes two runs comparable: everything but where files lie and which machine it is."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in ('data_dir', 'out', 'device')}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith('cuda') else device


# ---------------------------------------------------------------------------------------------------------------------
# The cost card.

def card(candidate: Candidate) -> str:
    """What a function is like and what it costs: forward and backward of a million elements against ReLU."""
    f = candidate.activation
    x = (torch.arange(-5000, 5001, dtype=torch.float64) / 1000).requires_grad_()  # 0 is among them, exactly
    f64 = Activation(f.expression, f.clip).double()
    y = f64(x)
    slope, = torch.autograd.grad(y.sum() + 0 * x.sum(), x)  # 0 * x: a constant does not depend on x
    rising, falling = bool((y.diff() >= 0).all()), bool((y.diff() <= 0).all())
    weight = torch.softmax(-x.detach().square() / 2, 0)
    moments = [(weight * y.detach() ** k).sum().item() for k in (1, 2)]
    size = 1 << 20
    sample = torch.randn(size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    contestants = {'op by op': f, 'by table': Tabulated(f), 'relu': torch.relu}
    times: dict[str, list[list[float]]] = {name: [[], []] for name in contestants}
    for _ in range(9):  # interleaved, so that a busy moment of the machine hits all of them
        for name, function in contestants.items():
            begin = time.perf_counter()
            output = function(sample) + 0 * sample if not f.expression.count('x') else function(sample)
            middle = time.perf_counter()
            output.backward(output.detach())
            times[name][0].append(middle - begin)
            times[name][1].append(time.perf_counter() - middle)
    ms = {name: [1e3 * statistics.median(t) for t in both] for name, both in times.items()}
    # of the sum with x, for functions that keep nothing
    kept = {name: bytes_kept(lambda: function(sample), [sample])[0] / size for name, function in contestants.items()}
    lines = [f'expression       {f.expression}', f'formula          {f.formula}',
             f'range            {y.min().item():.4g} to {y.max().item():.4g} on [-5, 5]',
             f'slope            {slope.min().item():.4g} to {slope.max().item():.4g}',
             f"monotone         {'constant' if rising and falling else 'rising' if rising else 'falling' if falling else 'no'}",
             f'under N(0, 1)    mean {moments[0]:.4g}, second moment {moments[1]:.4g}',
             'a million inputs    forward     backward    kept for backward']
    lines += [f'{name:18s}{ms[name][0]:6.2f} ms   {ms[name][1]:6.2f} ms   {kept[name]:5.1f} bytes an element   '
              f"{sum(ms[name]) / sum(ms['relu']):.1f} x relu" for name in contestants]
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def seeds_of(text: str) -> range:
    """'5' is 0 to 4; '10:20' is 10 to 19, so that several machines can share the work."""
    match = re.fullmatch(r'(?:(\d{1,9}):)?(\d{1,9})', text)
    seeds = range(int(match[1] or 0), int(match[2])) if match else range(0)
    if not seeds:
        raise ValueError(f"--seeds '{text}': a number above 0 such as 5, or a range such as 10:20")
    return seeds


def evaluate(candidates: list[Candidate], config: Config, seeds: range, against: str, metric: Optional[str],
             show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train what the ledger lacks, seed by seed so that every moment has a fair table, which is shown after each; the
    rows of this comparison."""
    dataset, ledger = data.load(config.data, config.data_dir, config.tokens), Path(config.out)
    done = {identity(row): row for row in read_ledger(ledger)}
    known = {nameless(row): row for row in done.values()}  # two searches may find one function: it is trained once
    append(ledger, {})
    rows = []
    total, count, spent = len(seeds) * len(candidates), 0, []
    for seed in seeds:
        before = len(spent)
        for candidate in candidates:
            count += 1
            wanted = {'name': candidate.name, 'expression': candidate.activation.expression, 'clip': candidate.activation.clip,
                      'seed': seed, 'settings': settings(config)}
            key, function = identity(wanted), nameless(wanted)
            if key not in done:
                if function not in known:
                    known[function] = retrain(candidate, config, dataset, seed)
                    spent.append(known[function]['seconds'])
                done[key] = known[function] | {field: wanted[field] for field in ('name', 'clip')} | {'searched': candidate.searched}
                append(ledger, done[key])
            row = done[key]
            rows.append(row)
            left = f', {statistics.fmean(spent) * (total - count) / 60:.0f} min left' if spent else ', from the ledger'
            result = 'diverged' if row['diverged'] else f"test loss {row['test_loss']:.4f}  accuracy {row['test_accuracy']:.4f}"
            show(f"{count}/{total}  seed {seed}  {candidate.name:24s} {result}  {row['ms_step']:.0f} ms/step{left}")
        if len(spent) > before and seed != seeds[-1]:
            show(f'\n{report(rows, against, metric)}\n')
    return rows


def main(arguments: Optional[list[str]] = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument('activations', nargs='*', metavar='ACTIVATION', help=resolve.__doc__.split('\n')[0])
    parser.add_argument('--seeds', default='3', help='how many, or a range such as 10:20')
    parser.add_argument('--baselines', help='names with commas between, or none (default: the usual ones)')
    parser.add_argument('--random', type=int, default=0, metavar='N', help='add N random cells: any search must beat them')
    parser.add_argument('--against', help="reference of the differences (default: the model's standard activation)")
    parser.add_argument('--metric', choices=['loss', 'accuracy'], help='(default: loss for text, accuracy for images)')
    parser.add_argument('--report', nargs='+', metavar='LEDGER', help='print the table of these ledgers, train nothing')
    parser.add_argument('--card', metavar='ACTIVATION', help='print what a function is like and costs, train nothing')
    parser.add_argument('--figures', metavar='FOLDER', help='draw functions, seeds and curves there (needs matplotlib)')
    with one_line_errors(lambda: 'the same command goes on where it was'):
        chosen, given = options(Config, parser, arguments)
        config = configure(Config, PRESETS, chosen)
        if given.card is not None:
            print(card(resolve(given.card)))
            return
        if given.report:
            if missing := [path for path in given.report if not Path(path).exists()]:
                raise ValueError(f"cannot read {', '.join(missing)}: no such file; --report takes ledgers that exist")
            rows = [row for path in given.report for row in read_ledger(Path(path))]
            if not rows:
                raise ValueError(f"no runs in {', '.join(given.report)}; a ledger is the file that --out names")
            against = given.against and Path(given.against.replace(' ', '')).name  # a run folder is called by its name
            if against:
                valid('activation in --against', against, dict.fromkeys(row['name'] for row in rows))
            print(report(rows, against, given.metric))
            reference_name = against or STANDARD.get(rows[0]['settings'].get('model'), 'relu')
        else:
            reference = resolve(standard_of(config.model) if given.against is None else given.against)
            reference_name = reference.name
            if not 0 <= given.random <= 10_000:
                raise ValueError(f'--random {given.random}: from 0 to 10,000')
            kind = 'text' if config.data.startswith('tinystories') else 'image'
            names = (given.baselines if given.baselines is not None else BASELINES[kind]).split(',')
            names = [name for name in names if name not in ('none', '')] + [f'random_{k}' for k in range(given.random)]
            candidates: dict[str, Candidate] = {}
            for c in [reference, *map(resolve, [*given.activations, *names])]:
                one = candidates.setdefault(c.name, c)
                if (one.activation.expression, one.activation.clip) != (c.activation.expression, c.activation.clip):
                    raise ValueError(f'two different functions are called {c.name}: rename one of the run folders')
            rows = evaluate(list(candidates.values()), config, seeds_of(given.seeds), reference_name, given.metric,
                            lambda line: print(line, flush=True))
            print('\n' + report(rows, reference_name, given.metric))
            print(f'\nledger: {config.out}   the table again: python evaluate.py --report {config.out}')
        if given.figures is not None:
            print(figures.evaluation(rows, reference_name, Path(given.figures)))


if __name__ == '__main__':
    main()

"""Is an activation any good? `python evaluate.py RUN --model minigpt --seeds 5`.

For a seed all activations get the same initial weights and batches, so that differences are paired. The last
step counts, and the test set is touched once a run. A finished run is a line in a ledger: the same command
goes on where it was stopped, and the ledgers of several machines are joined by `cat`.
"""
import argparse
import copy
import dataclasses
import functools
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional

import torch
import torch.nn as nn
from torch import Tensor

import data
from activation import NAMED, Activation, Tree, evaluate as values, named, nonlinearity
from data import average, cross_entropy, is_first, seed_everything
from models import STANDARD, network
from ops import check_choice
from plot import append, card, comparison, one_line_errors, pyplot, read_ledger, report
from space import Space

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, target) -> scalar

# ---- settings: a dataclass, a line a field; the command line is made from it ----

def option(default: Any, help: str = '', kind: Optional[Callable] = None, **more: Any) -> Any:
    """A setting. With `help` it is an option of the command line; without, presets alone set it."""
    takes = dict(action='store_true') if default is False else dict(type=kind or type(default), **more)
    return dataclasses.field(default=default, metadata=dict(help=help, **takes))

def number(low: float, kind: type = int, high: float = 1e12) -> Callable[[str], Any]:
    """For `option`: text -> a number of that kind, from `low` to `high`."""
    def number(text: str) -> Any:  # argparse prints its name
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f'{text} is out of range: from {low} up to {high:g}')
    return number

@dataclasses.dataclass
class Training:
    """How a network is trained."""
    model: str = option('resnet20', f'{", ".join(STANDARD)}; torchvision:NAME; or FILE.py:FUNCTION, which '
                                    f'returns a network of yours')
    only: str = option('', 'of a network that is not ours: the activations to replace, such as relu,silu')
    data: str = option('', 'data set; default: the built-in sample that suits the network', choices=data.DATA)
    data_dir: str = option('', 'folder with the files of the data set; default: they are downloaded')
    side: int = option(0, 'average images to this side, in pixels; 0: as they are', choices=(0, 16, 32))
    preset: str = option('quick', 'quick: minutes, built-in data; evening: CIFAR-10 at side 16, or '
                         'TinyStories; paper: its data and settings', choices=('quick', 'evening', 'paper'))
    device: str = option('auto', 'auto, cpu or cuda')
    dtype: str = option('float32', 'of the forward pass; weights, alphas and tables stay in float32',
                        choices=('float32', 'bfloat16'))
    compile: bool = option(False, 'torch.compile the network; needs a C++ compiler')
    out: str = option('results.jsonl', 'ledger: one line a finished run; what is there is not repeated')
    steps: int = option(500, 'weight steps; the other lengths are shares of it', number(2))
    batch_size: int = option(64, 'images or text windows in a batch', number(1))
    context: int = option(128, 'length of a text window in tokens', number(1))
    tokens: str = option('bytes', 'of a text; gpt2 needs tiktoken', choices=('bytes', 'gpt2'))
    lr: float = option(1e-3, 'learning rate of the weights, the highest of the schedule', number(0, float))
    lr_end: float = option(1.0)         # share of lr left at the end of the cosine; 1: constant
    warmup: float = option(0.0)         # share of the steps in which lr rises from 0
    lr_milestones: tuple = option(())   # shares of the steps after which lr is divided by 10
    optimizer: str = option('adamw')    # sgd (momentum 0.9) or adamw (betas 0.9 and 0.99)
    weight_decay: float = option(1e-4)
    accumulate: int = option(1)         # batches whose gradients are averaged for one step
    grad_clip: float = option(1.0)      # bound on the norm of the gradient; 0: none
    dropout: float = option(0.0)        # of the GPTs

# quick: a minute a run on two cores. paper: its appendix, with crops and mirrors instead of TrivialAugment.
RESNET = dict(optimizer='sgd', lr=0.1, lr_end=0.0, warmup=0.05, weight_decay=5e-4)
VIT = dict(lr=5e-4, lr_end=0.0, warmup=0.1, weight_decay=0.05)
GPT = dict(lr=3e-3, lr_end=0.1, warmup=0.1, weight_decay=0.1)
PRESETS = {  # name -> network -> settings
    'quick': {
        'resnet20': dict(RESNET, data='cifar10_16', steps=800),
        'vit_tiny': dict(VIT, data='cifar10_16', steps=300, batch_size=16),
        'minigpt': dict(GPT, data='tinystories_sample', steps=400, batch_size=8, context=64),
        'toy': dict(data='cifar10_16', steps=2000, lr_end=0.1),
    },
    'evening': {
        'resnet20': dict(RESNET, data='cifar10', side=16, steps=7800, batch_size=128),
        'vit_tiny': dict(VIT, data='cifar10', side=16, steps=2000, batch_size=128),
        'minigpt': dict(GPT, data='tinystories', steps=2000, batch_size=16),
        'toy': dict(data='cifar10', side=16, steps=2000, lr_end=0.1),
    },
    'paper': {
        'resnet20': dict(data='cifar10', steps=78_000, batch_size=128, optimizer='sgd', lr=0.1,
                         lr_milestones=(0.5, 0.75), grad_clip=0.0),
        'vit_tiny': dict(data='cifar10', steps=48_500, batch_size=512, lr_end=0.0, weight_decay=0.0,
                         grad_clip=0.0),
        'minigpt': dict(data='tinystories', steps=10_000, accumulate=10, context=256, tokens='gpt2',
                        lr_end=0.1, warmup=0.01, weight_decay=0.1, dropout=0.2),
        'toy': dict(data='cifar10', steps=20_000, batch_size=128, lr_end=0.1),
    },
}

class Parser(argparse.ArgumentParser):
    """Options that are not given have no value. Raises ValueError where argparse would print its usage."""
    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def error(self, message: str) -> None:
        hint = 'a value that begins with - needs a =, as --ops=-sinh,base; ' * ('expected one' in message)
        raise ValueError(f'{message[:300]}; {hint}--help lists all options')

    def add_settings(self, kind: type[Training], presets: dict[str, dict]) -> None:
        """An option for every field of `kind` that has a help text, with the defaults of the preset quick."""
        for f in (f for f in dataclasses.fields(kind) if f.metadata['help']):
            values = {model: {**PRESETS['quick'][model], **changes}.get(f.name, f.default)
                      for model, changes in presets['quick'].items()}
            shown = [f'{model} {value}' for model, value in values.items() if value != '']
            shown = shown if len(set(values.values())) > 1 else [str(f.default)]
            text = f.metadata['help'] + f" ({', '.join(shown)})" * any(shown)
            self.add_argument('--' + f.name.replace('_', '-'), **{**f.metadata, 'help': text})

    def given(self, arguments: Optional[list[str]], alone: dict[str, tuple]) -> dict[str, Any]:
        """What was given. alone: option -> the others it takes into account; ValueError for any more."""
        given = vars(self.parse_args(arguments))
        for name in alone.keys() & given.keys():
            if ignored := given.keys() - {name, *alone[name]}:
                raise ValueError(f"--{name} would ignore {', '.join(sorted(ignored))}: leave it out")
        return given

def configure(kind: type[Training], presets: dict[str, dict], given: dict[str, Any]) -> Any:
    """The defaults of `kind`, the network's preset, its changes in `presets`, what is given; absolute paths.
    given: may hold more than the fields of `kind`. Raises ValueError for an unknown network or device."""
    given = {f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given}
    preset, model = given.get('preset', 'quick'), given.get('model', 'resnet20')
    own = ':' in model
    check_choice('--model', model if not own else 'toy', [*STANDARD, 'torchvision:NAME', 'FILE.py:FUNCTION'])
    like = {'res': 'resnet20', 'vit': 'vit_tiny', 'toy': 'toy'}.get(model[:3], 'minigpt')  # has its settings
    if own:
        like = 'minigpt' if given.get('data', '').startswith('tinystories') else 'vit_tiny'
    wide = dict(lr=1e-3) if model in ('tinygpt', 'smallgpt') else {}  # for tinygpt 3e-3 is too high: results/
    config = kind(**{**PRESETS[preset][like], **presets[preset][like], **wide, **given})
    if 'context' in given and not config.data.startswith('tinystories'):
        raise ValueError(f'--context would be ignored: {config.data} is no text; leave the option out')
    if own and config.compile:
        raise ValueError(f'--compile --model {model}: only the networks that have names are compiled')
    if '.py:' in model:
        config.model = os.path.abspath(os.path.expanduser(model))
    config.data_dir = config.data_dir and os.path.abspath(os.path.expanduser(config.data_dir))
    config.device = check_device(config.device)
    return config

def check_device(device: str) -> str:
    """The device, for 'auto' the best there is; under torchrun, whose ranks meet here, the rank's own.
    Raises ValueError when it is not there. Apple's mps is not among them: it has no float64."""
    present = {'cuda': torch.cuda.device_count() * torch.cuda.is_available(), 'cpu': 1}
    device = device if device != 'auto' else next(name for name, count in present.items() if count)
    kind, _, index = device.partition(':')
    if not re.fullmatch(r'[a-z]+(:\d+)?', device) or int(index or 0) >= present.get(kind, 0):
        raise ValueError(f'--device {device} is not there, or not in this PyTorch; choose among '
                         + ', '.join(f'{count} {name}' for name, count in present.items() if count))
    data.meet(device)
    if device.startswith('cuda:'):
        torch.cuda.set_device(device)  # whose random state a checkpoint keeps
    return device

# ---- training ----

def weight_optimizer(weights: list[nn.Parameter], config: Training) -> torch.optim.Optimizer:
    """Biases, norms and learned scalars (fewer than two dimensions) are not decayed by AdamW."""
    if config.optimizer == 'sgd':
        return torch.optim.SGD(weights, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    groups = [dict(params=[p for p in weights if p.dim() >= 2], weight_decay=config.weight_decay),
              dict(params=[p for p in weights if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW([group for group in groups if group['params']], lr=config.lr, betas=(0.9, 0.99))

def cosine(share: float, end: float) -> float:
    """Falls from 1 to `end` as the share of the training done goes from 0 to 1."""
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * share))

def learning_rate(step: int, config: Training) -> float:
    """Linear warm-up, a cosine from lr to lr_end * lr, and a tenth of it after each milestone."""
    rise = min(1.0, (step + 1) / max(round(config.warmup * config.steps), 1))
    tenths = 0.1 ** sum(step >= share * config.steps for share in config.lr_milestones)
    return config.lr * rise * tenths * cosine(step / config.steps, config.lr_end)

def precision(config: Training, model: nn.Module) -> torch.autocast:
    """Around a forward pass of the model: --dtype."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, config.dtype == 'bfloat16')

def call(model: Callable, x: Any) -> Any:
    """The network's output; a tuple or list x is several inputs."""
    return model(*x) if isinstance(x, (tuple, list)) else model(x)

def train(model: nn.Module, batches: Iterator, loss: Loss, config: Training) -> list[list[float]]:
    """Train for config.steps steps. Returns the curve: some 20 times [step, mean loss since the last point].
    A run that diverges ends there, and its curve ends with a loss that is not finite."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = weight_optimizer(weights, config)
    curve, every, total = [], max(1, config.steps // 20), 0.0
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, config)
        for _ in range(config.accumulate):
            x, y = next(batches)
            with precision(config, model):
                batch_loss = loss(call(model, x), y) / config.accumulate
            batch_loss.backward()
            total += batch_loss.detach()
        average(p.grad for p in weights if p.grad is not None)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(weights, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:  # the only place where a value leaves the device
            average([total])
            curve.append([step + 1, round(total.item() / every, 5)])
            total = 0.0
            if not math.isfinite(curve[-1][1]):
                break
    average(b for b in model.buffers() if b.is_floating_point())  # each rank has seen other batches
    return curve

@torch.no_grad()
def score(model: nn.Module, batches: Iterable, loss: Loss) -> dict[str, float]:
    """Mean loss of the network as it stands; accuracy, too, where targets are classes (those that are none,
    as -100, do not count). Classes are the output's last dimension for our `cross_entropy`; else the second,
    as for PyTorch's losses, or the last where only that fits."""
    training, losses, hits, count = model.training, [], [], 0
    model.eval()
    for x, y in batches:
        output, size = call(model, x), len(y) if isinstance(y, Tensor) else 1
        losses.append(loss(output, y) * size)
        count += size
        if isinstance(output, Tensor) and isinstance(y, Tensor) and output.dim() > 1:
            dims = [-1] if loss is cross_entropy else [1, -1] if output.dim() < 4 else [1]
            dims = [dim for dim in dims if output.shape[dim] > 1 and output.select(dim, 0).shape == y.shape]
            for dim in dims[:not y.is_floating_point()]:
                known = (y >= 0) & (y < output.shape[dim])
                hits.append((output.argmax(dim) == y).sum() / known.sum().clamp(min=1) * size)
    model.train(training)
    result = torch.stack([torch.stack(values).sum() / count for values in (losses, hits) if values])
    average([result])  # each rank has its share of validation batches
    return dict(zip(('loss', 'accuracy'), result.tolist()))

# ---- one run ----

space_of = functools.cache(Space)  # by its operations

def random_function(space: Space, seed: int) -> Tree:
    """A control that a search has to beat: two of the distinct functions, joined by any operation; neither
    a constant nor a straight line."""
    joins = [k for k, op in enumerate(space.binary) if op.code not in ('a', 'b')]
    sizes, draw = (len(space.rows.ops), len(space.first.ops), len(joins)), torch.Generator().manual_seed(seed)
    for _ in range(1000 * bool(joins)):
        i, j, k = (int(torch.randint(size, (1,), generator=draw)) for size in sizes)
        tree = space.tree([*space.rows.ops[i], *space.first.ops[j], joins[k]])
        if nonlinearity(lambda x: values(tree, x, space.clip)) > 0.01:  # of a constant: nan
            return tree
    raise ValueError('these operations make nothing but constants and straight lines: take more')

def resolve(text: str) -> tuple[str, Activation]:
    """A run folder, a known name, an expression, or random_0, random_1 ... from the search space."""
    path = Path(text, 'activation.json') if os.path.isdir(text) else Path(text)
    if text in NAMED and path.is_file() and path.name != text:
        raise ValueError(f'{text} is a known function and a run folder: write ./{text}, or rename it')
    if text not in NAMED and path.suffix == '.json':
        try:
            run = json.loads(path.read_bytes())
            expression, clip = run['expression'], run['config']['clip']
            assert clip is None or 0 < clip < math.inf, f'clip is {clip}'
            name = path.absolute().parent.name if path.name == 'activation.json' else path.stem
            return name, Activation(str(expression), clip and float(clip))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, AssertionError) as error:
            raise ValueError(f'{path} is not from a finished search ({error!r}): name its folder, or '
                             'end it by search.py --resume') from None
    if text not in NAMED and re.search(r'[/\\]|\.\w+$', text):
        raise ValueError(f'there is no folder {text}: name that of a finished search')
    if match := re.fullmatch(r'random_(\d{1,9})', text):
        return text, Activation(random_function(space_of('base'), int(match[1])))
    return text.replace(' ', ''), named(text)

def retrain(f: Optional[Activation], config: Training, dataset: data.Dataset, seed: int) -> dict[str, Any]:
    """Train the network from scratch with f (None: its own activations), test it once; part of a row. One
    module stands at all sites, its scalars learn, too. The initial weights are the same for all f."""
    module = copy.deepcopy(f)
    seed_everything(seed)
    model = network(config, lambda call=None: module or call, dataset).to(config.device)
    batches = data.Batches(dataset, data.whole(dataset), config.batch_size, seed, True, config.context,
                           config.device)
    started = time.monotonic()
    curve = train(model, batches, cross_entropy, config)
    seconds, result = time.monotonic() - started, {}
    if math.isfinite(curve[-1][1]):
        test = data.test_batches(dataset, config.batch_size, config.context, config.device)
        result = score(model, test, cross_entropy)
    # a network that knows nothing scores log(classes); a loss ten times as high is no result either
    if diverged := not result.get('loss', math.inf) <= 10 * math.log(dataset.classes):
        result, curve = {}, curve[:-1]
    return {'diverged': diverged, 'test_loss': result.get('loss'), 'test_accuracy': result.get('accuracy'),
            'train_loss': None if diverged else curve[-1][1], 'curve': curve, 'seconds': round(seconds, 1),
            'ms_step': round(1e3 * seconds / config.steps, 2), 'device': config.device,
            'threads': torch.get_num_threads(), 'torch': torch.__version__}

def evaluate(activations: dict[str, Optional[Activation]], config: Training,
             seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Train what the ledger lacks, seed by seed; returns the rows of this comparison. A run is identified by
    expression, clip (where it acts), seed, settings (without folders and machine; under torchrun the batch is
    that of all ranks), checksums of a user's network and of the data."""
    dataset = data.load(config.data, config.data_dir or None, config.tokens, config.side or None)
    own = network(config, lambda call: call, dataset) if ':' in config.model else None
    if own:
        print(f'{config.model}: {own.describe()}')
    settings = {**vars(config), 'model': Path(config.model).name, 'lr_milestones': list(config.lr_milestones),
                'batch_size': config.batch_size * data.ranks(), 'source': own.source if own else '',
                'digest': dataset.digest}
    settings = {name: value for name, value in settings.items() if name not in ('data_dir', 'out', 'device')}

    def identity(row: dict[str, Any]) -> str:
        return json.dumps([row[key] for key in ('expression', 'clip', 'seed', 'settings')], sort_keys=True)
    ledger, rows, todo = Path(config.out), [], [(seed, name) for seed in seeds for name in activations]
    done = {identity(row): row for row in read_ledger(ledger)}
    if ledger.exists() and ledger.stat().st_size and not done:
        raise ValueError(f'--out {ledger} is a file of another kind; choose another ledger')
    ledger.parent.mkdir(parents=True, exist_ok=True)
    open(ledger, 'ab').close()  # better to know now than after the first training
    for k, (seed, name) in enumerate(todo, 1):
        f = activations[name]
        row = {'name': name, 'expression': f.expression if f else 'own', 'seed': seed, 'settings': settings,
               'clip': f.clip if f and 'clip(' in f.formula else None}
        known = (key := identity(row)) in done
        if not known:
            done[key] = retrain(f, config, dataset, seed) | row
            if is_first():
                append(ledger, done[key])
        rows.append(row := done[key] | {'name': name})
        result = 'diverged' if row['diverged'] else 'test loss {test_loss:.4f}, accuracy {test_accuracy:.4f}'
        left = f"{'from the ledger, ' * known}{(len(todo) - k) * row['seconds'] / 60:.0f} min left"
        print(f'seed {seed}  {name[:50]:50s}  {result.format(**row)}  {left}', flush=True)
    return rows

# ---- the command line ----

BASELINES = 'relu,leaky_relu,elu,silu,gelu,relu2'

def seeds_of(text: str) -> range:
    """'5' is 0 to 4; '10:20' is 10 to 19, so that several machines can share the work."""
    match = re.fullmatch(r'(?:(\d{1,9}):)?(\d{1,9})', text)
    if not match or not (seeds := range(int(match[1] or 0), int(match[2]))):
        raise argparse.ArgumentTypeError(f'{text} is neither a number from 1 on nor a rising range as 10:20')
    return seeds

def main(arguments: Optional[list[str]] = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add('activations', nargs='*', metavar='ACTIVATION', help=resolve.__doc__)
    add('--seeds', type=seeds_of, help='how many, or a range such as 10:20 (3)')
    add('--baselines', help=f'names, or none ({BASELINES})')
    add('--random', type=number(0), help='functions drawn from the space: a search must beat them (0)')
    add('--report', nargs='+', metavar='LEDGER', help='print the tables of these ledgers, train nothing')
    add('--plot', metavar='FILE', help='draw the comparison there, as PNG (needs matplotlib)')
    add('--card', metavar='ACTIVATION', help='print shape and running cost of a function, train nothing')
    add('--nearest', metavar='ACTIVATION', help='print the formulas of the search space nearest to it')
    add('--ops', help='of --nearest: base, periodic, swish, no-composites, names (base)')
    parser.add_settings(Training, PRESETS)
    with one_line_errors(lambda: 'the same command goes on where it was'):
        given = parser.given(arguments, {'card': (), 'nearest': ['ops'], 'report': ['plot']})
        if 'card' in given:
            return print(card(resolve(given['card'])[1]))
        if 'nearest' in given:
            front, _ = space_of(given.get('ops', 'base')).nearest(resolve(given['nearest'])[1].double())
            print('length   distance  formula, each better than all shorter ones')
            for match in front:
                print(f'{match.length:6d}  {100 * match.score:9.3f} %  {Activation(match.tree).formula}')
            return
        if 'ops' in given:
            raise ValueError('--ops is of --nearest alone: leave it out')
        if 'report' in given:
            ledgers = {path: read_ledger(Path(path)) for path in given['report']}
            if empty := [path for path, rows in ledgers.items() if not rows]:
                raise ValueError(f"no runs in {', '.join(empty)}: give the file of --out")
            rows = sum(ledgers.values(), [])
        else:
            if 'plot' in given and not Path(given['plot']).absolute().parent.is_dir():
                raise ValueError(f"--plot {given['plot']} is in no folder that exists")
            if 'plot' in given:
                pyplot()  # better to miss it now than after the trainings
            config = configure(Training, PRESETS, given)
            names = [name.strip() for name in given.get('baselines', BASELINES).split(',')]
            names = [*given.get('activations', ()), *(name for name in names if name not in ('', 'none')),
                     *(f'random_{k}' for k in range(given.get('random', 0)))]
            activations = {'own': None} if ':' in config.model else dict([resolve(STANDARD[config.model])])
            for name, f in map(resolve, names):
                known = activations.setdefault(name, f)
                if (str(known), getattr(known, 'clip', None)) != (str(f), f.clip):
                    raise ValueError(f'two functions are called {name}: rename one of the run folders')
            seeds = given.get('seeds', range(3))
            print(f'{config.model} on {config.data}; functions: {len(activations)}, seeds: {len(seeds)}, '
                  f'steps: {config.steps}; what {config.out} holds is not trained again', flush=True)
            rows = evaluate(activations, config, seeds)
        print('\n' + report(rows))
        if 'plot' in given:
            print(comparison(rows, Path(given['plot'])))

if __name__ == '__main__':
    main()

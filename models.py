"""The networks, by hand, and how their weights are trained: what search.py and evaluate.py share.

    build('resnet20', nn.ReLU)            a plain network
    build('resnet20', cell.site)          the same network with the relaxed cell in all of its 19 sites
    swap(model, nn.ReLU, cell.site)       the same for a network from elsewhere

Each network takes `activation`, a callable without arguments that makes one activation module a site.
"""
import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import sys
import textwrap
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional, TypeVar, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ops import nearest, valid

MakeActivation = Callable[[], nn.Module]

# The activation each network is known with: the baseline, and what a search warms up with.
STANDARD = {'resnet20': 'relu', 'vit_tiny': 'gelu', 'minigpt': 'gelu', 'toy': 'relu'}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, activation last (He et al., arXiv 1512.03385, section 4.2)."""

    def __init__(self, activation: MakeActivation, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act2 = activation()
        self.stride, self.new_channels = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.new_channels:
            # Option A: every second pixel, and zeros for the new channels. No parameters.
            shortcut = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.new_channels))
        x = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(x)) + shortcut)


class ResNet20(nn.Module):
    """(n, channels, side, side) images -> (n, classes) logits. 269,722 parameters for 3 channels and 10 classes."""

    def __init__(self, activation: MakeActivation, classes: int = 10, channels: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.act = activation()
        widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Block(activation, *width) for width in widths))
        self.head = nn.Linear(64, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
        # channels_last makes convolutions on a CPU a fifth faster; every layer here keeps the layout it is given
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x.contiguous(memory_format=torch.channels_last))))
        return self.head(self.blocks(x).mean((2, 3)))


class TransformerBlock(nn.Module):
    """Attention, then a multilayer perceptron of four times the width, a layer norm in front of each."""

    def __init__(self, activation: MakeActivation, width: int, heads: int, causal: bool, dropout: float = 0.0,
                 bias: bool = True):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.project = nn.Linear(width, width, bias=bias)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.act = activation()
        self.down = nn.Linear(4 * width, width, bias=bias)

    def attention(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal,           # (n, heads, tokens, width / heads)
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.project(y.transpose(1, 2).reshape(n, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.norm1(x)), self.dropout, self.training)
        return x + F.dropout(self.down(self.act(self.up(self.norm2(x)))), self.dropout, self.training)


class ViTTiny(nn.Module):
    """(n, channels, side, side) images -> (n, classes) logits. ViT-Ti (Touvron et al., arXiv 2012.12877): width 192,
    12 blocks, 3 heads, with patches of 4 pixels for small images; a class token and learned positions.

    Raises ValueError when the side is not a multiple of the patch.
    """

    def __init__(self, activation: MakeActivation, classes: int = 10, channels: int = 3, side: int = 32, patch: int = 4):
        super().__init__()
        if side < patch or side % patch:
            raise ValueError(f'images of side {side} cannot be cut into patches of {patch}: choose a patch that divides it')
        self.side, width = side, 192
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(activation, width, heads=3, causal=False) for _ in range(12)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.side, self.side):
            raise ValueError(f'images of {x.shape[-2]}x{x.shape[-1]} for a vit_tiny built with side={self.side}')
        x = self.patches(x).flatten(2).transpose(1, 2)                               # (n, patches, width)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class MiniGPT(nn.Module):
    """(n, time) token indices -> (n, time, vocabulary) logits; time at most `context`. After nanoGPT: 3 blocks,
    3 heads, width 192, biases in the layer norms only, output weights tied to the embedding, residual projections
    scaled at the start."""

    def __init__(self, activation: MakeActivation, vocabulary: int = 256, context: int = 128, dropout: float = 0.0):
        super().__init__()
        width, depth = 192, 3
        self.context, self.dropout = context, dropout
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(activation, width, heads=3, causal=True, dropout=dropout, bias=False)
                                      for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # two additions to the residual stream a block: without the factor its variance grows with depth
                residual = name.endswith(('project.weight', 'down.weight'))
                nn.init.normal_(p, std=0.02 / (2 * depth) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(f'{time} tokens for a minigpt built with context={self.context}')
        x = self.embedding(tokens) + self.position.weight[:time]
        return self.head(self.norm(self.blocks(F.dropout(x, self.dropout, self.training))))


class Toy(nn.Module):
    """(n, ...) inputs, flattened -> (n, outputs). One hidden layer: for tests, and for planted functions."""

    def __init__(self, activation: MakeActivation, inputs: int = 16, hidden: int = 64, outputs: int = 1):
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.act = activation()
        self.last = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x.flatten(1))))


MODELS: dict[str, Callable[..., nn.Module]] = {'resnet20': ResNet20, 'vit_tiny': ViTTiny, 'minigpt': MiniGPT, 'toy': Toy}


def build(name: str, activation: MakeActivation, **shape: int) -> nn.Module:
    """The network of that name, its sites filled by `activation`. shape: see the class. Raises ValueError."""
    valid('model', name, MODELS)
    return MODELS[name](activation, **shape)


def teacher_and_student(planted: MakeActivation, searched: MakeActivation, inputs: int = 16,
                        hidden: int = 64) -> tuple[Toy, Toy]:
    """A teacher with the planted activation, and a student that shares its first layer, for good, and learns the rest.

    With a free first layer the answer is not unique: a wrong function then fits to a mean squared error of 0.003. The
    first layer has rows of length 1, so that for inputs ~ N(0, 1) the activation sees N(0, 1).
    """
    teacher, student = (Toy(activation, inputs, hidden, outputs=1) for activation in (planted, searched))
    with torch.no_grad():
        teacher.first.weight.copy_(F.normalize(torch.randn(hidden, inputs), dim=1))
        teacher.first.bias.zero_()
        teacher.last.weight.normal_()
        teacher.last.bias.zero_()
        # Targets of mean 0 and variance 1: then one set of learning rates suits all planted functions.
        y = teacher(torch.randn(8192, inputs))
        teacher.last.bias.copy_(-y.mean() / y.std().clamp(min=1e-6))
        teacher.last.weight.div_(y.std().clamp(min=1e-6))
    student.first.load_state_dict(teacher.first.state_dict())
    student.first.requires_grad_(False)
    return teacher.eval().requires_grad_(False), student


# ---------------------------------------------------------------------------------------------------------------------
# Networks of other people.

# The hidden activations that `--model file.py:function` swaps, by the names that expressions use.
SWAPPED: dict[str, type[nn.Module]] = {'relu': nn.ReLU, 'leaky_relu': nn.LeakyReLU, 'elu': nn.ELU, 'silu': nn.SiLU,
                                       'gelu': nn.GELU}


def swap(model: nn.Module, kind: Union[type[nn.Module], tuple[type[nn.Module], ...]], make: MakeActivation) -> int:
    """Replace every activation of that kind (or kinds) inside `model`; returns how many.

        swap(model, nn.ReLU, cell.site)          before a search
        swap(model, nn.ReLU, Found)              with what it found

    Each name gets a new one, also where several names hold one module. A block that stands in two places stays one
    block, and an activation that one forward calls twice stays one activation.
    Raises ValueError, and changes nothing, when there is none, and when the model calls that activation as a function,
    F.relu(x) or x.relu(), which nobody can replace from outside: the message says in which lines.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = ' or '.join(f'nn.{k.__name__}' for k in kinds)
    if isinstance(model, kinds):
        raise ValueError(f'the model is itself {names}: there is no network around it')
    if calls := functional_uses(model, kinds):
        raise ValueError(f'{names} cannot be swapped while the model calls it as a function: {"; ".join(calls)}; '
                         f'make it a module, such as self.act = nn.{kinds[0].__name__}(), and call that')
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items()
              if isinstance(child, kinds)]  # named_children() would name a shared module only once
    if not places:
        there = Counter(type(m).__name__ for m in model.modules() if type(m).__module__ == 'torch.nn.modules.activation')
        raise ValueError(f'the model has no {names} to swap; its activation modules: '
                         f'{", ".join(f"{name} ({count})" for name, count in there.items()) or "none"}')
    for parent, name in places:
        setattr(parent, name, make())
    return len(places)


def functional_uses(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Where the model uses an activation of these kinds as a function: 'resnet.py, line 12: F.relu(...)'.

    Read from the methods of the model's own classes, whatever calls them; helpers outside of a class are not followed.
    """
    def fits(name: str) -> bool:  # leaky_relu and leaky_relu_ for LeakyReLU
        return name.replace('_', '').lower() in {kind.__name__.lower() for kind in kinds}

    def is_use(call: ast.Call, names: dict[str, Any]) -> bool:
        function = call.func
        if isinstance(function, ast.Name):                          # relu(x), after `from ... import relu`
            return fits(function.id) and callable(names.get(function.id))
        if not isinstance(function, ast.Attribute) or not fits(function.attr):
            return False
        root = function.value
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and isinstance(names.get(root.id), types.ModuleType):
            return True                                             # F.relu(x), torch.nn.functional.relu(x), nn.ReLU()(x)
        itself = isinstance(function.value, ast.Name) and function.value.id == 'self'
        return not call.args and not itself                         # x.relu(), but neither self.relu(x) nor block.relu(x)

    uses, seen = [], set()
    for path, module in model.named_modules():
        if isinstance(module, kinds):
            continue
        uses += [f'{path}.{name} is the function {value.__name__}'.lstrip('.') for name, value in vars(module).items()
                 if inspect.isroutine(value) and fits(value.__name__)]
        for cls in type(module).__mro__:
            if cls in seen or cls.__module__.startswith('torch.'):
                continue
            seen.add(cls)
            for method in (m for name, m in vars(cls).items() if inspect.isfunction(m) and name != '__init__'):
                try:
                    lines, first = inspect.getsourcelines(method)
                    tree = ast.parse(textwrap.dedent(''.join(lines)))
                except (OSError, SyntaxError):
                    continue  # typed into a console, or compiled
                file = Path(method.__code__.co_filename).name
                uses += [f'{file}, line {first + node.lineno - 1}: {ast.unparse(node.func)}(...)' for node in ast.walk(tree)
                         if isinstance(node, ast.Call) and is_use(node, method.__globals__)]
    return uses


def is_own(model: str) -> bool:
    """Whether `--model` names a function in a file, 'nets/mine.py:make_model', rather than a network of this file."""
    return '.py' in model


@functools.lru_cache
def own_function(place: str) -> Callable[[], nn.Module]:
    """The function that 'path/to/file.py:function' names. The file is run: it is the user's own code."""
    path, _, name = place.rpartition(':')
    if not path.endswith('.py') or not name:
        raise ValueError(f'--model {place}: name a file and the function in it that makes the network, '
                         f'such as nets.py:make_model')
    if not Path(path).is_file():
        raise ValueError(f'--model {place}: there is no file {path}')
    sys.path.append(str(Path(path).resolve().parent))  # the file may import its neighbours; ours come first
    spec = importlib.util.spec_from_file_location(Path(path).stem + '_own', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f'--model {place}: {path} fails when it is imported: {one_line(error)}') from None
    if not callable(getattr(module, name, None)):
        names = [key for key, value in vars(module).items() if inspect.isroutine(value) and value.__module__ == spec.name]
        raise ValueError(f"--model {place}: {path} has no function {name}{nearest(name, names)}; "
                         f"it has: {', '.join(names) or 'none'}")
    return getattr(module, name)


def own_network(place: str) -> nn.Module:
    """What the function makes, unchanged."""
    make = own_function(place)
    try:
        model = make()
    except Exception as error:
        raise ValueError(f'--model {place}: the function, called without arguments, fails: {one_line(error)}') from None
    if not isinstance(model, nn.Module):
        raise ValueError(f'--model {place}: the function returns {type(model).__name__}, not an nn.Module')
    return model


@torch.no_grad()
def check_fit(model: nn.Module, place: str, dataset: Any, context: int) -> None:
    """Raise ValueError when the network does not turn a batch of the data set into its logits."""
    text = dataset.kind == 'text'
    x = dataset.train[None, :context].long() if text else dataset.train[0][:2].float() / 255
    wanted = (*x.shape, dataset.classes) if text else (2, dataset.classes)
    given = f'{dataset.name} gives {tuple(x.shape)}'
    try:
        output = model.eval()(x)
    except Exception as error:
        raise ValueError(f'--model {place} does not go with --data {dataset.name}: {given}, and the network fails: '
                         f'{one_line(error)}') from None
    model.train()
    if not isinstance(output, Tensor) or output.shape != wanted:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f'--model {place} does not go with --data {dataset.name}: {given} and asks for logits {wanted}, '
                         f'the network returns {what}')


def one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'


def standard_of(model: str) -> str:
    """The name of the activation that the network is known with; of an own network, the most frequent of SWAPPED."""
    if not is_own(model):
        return STANDARD[model]
    modules = list(own_network(model).modules())
    counts = {name: sum(isinstance(m, kind) for m in modules) for name, kind in SWAPPED.items()}
    return max(counts, key=counts.get)


def network(config: 'Training', activation: MakeActivation, dataset: Any) -> nn.Module:
    """The network of that configuration in the shape that a `data.Dataset` asks for.

    Of an own network, --model file.py:function, all ReLU, LeakyReLU, ELU, SiLU and GELU modules are swapped.
    """
    name = config.model
    if is_own(name):
        model = own_network(name)
        check_fit(model, name, dataset, config.context)
        swap(model, tuple(SWAPPED.values()), activation)
        return model
    if (name == 'minigpt') != (dataset.kind == 'text'):
        raise ValueError(f'--model {name} does not go with --data {dataset.name}: minigpt reads text, the others images')
    if name == 'minigpt':
        shape = dict(vocabulary=dataset.classes, context=config.context, dropout=config.dropout)
    elif name == 'toy':
        shape = dict(inputs=dataset.channels * dataset.side ** 2, outputs=dataset.classes)
    else:
        shape = dict(classes=dataset.classes, channels=dataset.channels)
        shape |= dict(side=dataset.side) if name == 'vit_tiny' else {}
    return build(name, activation, **shape)


def choose_device(name: str) -> str:
    """The device called `name`; 'auto' takes cuda, else mps, else cpu. Raises ValueError for one that is not there."""
    present = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(device for device, here in present.items() if here)
    valid('--device', name, ['auto', *present])
    if not present[name]:
        raise ValueError(f'--device {name}: this machine, or this build of PyTorch, has no {name}; use --device cpu')
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Training: settings, optimiser, schedule.

def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={'help': help})


@dataclass
class Training:
    """Every field is an option of the command line: `batch_size` is `--batch-size`. Presets change the defaults."""
    model: str = option('resnet20', f'one of {", ".join(STANDARD)}; or file.py:function, a function of yours that returns a '
                                    f'network (its ReLU, LeakyReLU, ELU, SiLU and GELU modules are swapped)')
    data: str = option('', 'a data set; default: the built-in sample that suits the model')
    data_dir: Optional[str] = option(None, 'folder with the data files, where they are already there')
    preset: str = option('laptop', 'laptop: minutes on two cores, built-in data. paper: its data and settings')
    device: str = option('auto', 'auto, cpu, cuda or mps')
    out: str = option('', '')
    steps: int = option(500, 'training steps')
    batch_size: int = option(64, 'images or text windows in a batch')
    accumulate: int = option(1, 'batches whose gradients are added up for one step')
    context: int = option(128, 'length of a text window, in tokens')
    tokens: str = option('bytes', 'of a text: bytes, or gpt2 (needs tiktoken)')
    optimizer: str = option('adamw', 'of the weights: sgd (momentum 0.9) or adamw (betas 0.9 and 0.99)')
    lr: float = option(1e-3, 'of the weights, the highest of the schedule')
    lr_end: float = option(1.0, 'share of lr left at the end of the cosine schedule; 1: constant')
    warmup: float = option(0.0, 'steps (below 1: share of them) in which lr rises from 0')
    drops: str = option('', "shares of the training after which lr is divided by 10, such as '0.5,0.75'")
    weight_decay: float = option(1e-4, 'of the weights')
    dropout: float = option(0.0, 'of minigpt')
    grad_clip: float = option(1.0, 'bound on the norm of the gradient; 0: none')

    def at(self, value: float) -> int:
        """A step, from a step or a share of all steps; a share below 1 always leaves the last step."""
        return min(round(value * self.steps), self.steps - 1) if value < 1 else int(value)

    def check(self) -> None:
        """Raise ValueError, one line, for a value that cannot be."""
        try:
            if not all(0 < float(word) < 1 for word in self.drops.split(',') if word):
                raise ValueError
        except ValueError:
            raise ValueError(f"--drops '{self.drops}': shares with commas between, such as 0.5,0.75") from None
        if not 0 <= self.dropout < 1:
            raise ValueError(f'--dropout {self.dropout}: it must be a share, 0 up to below 1')
        valid('--optimizer', self.optimizer, ('sgd', 'adamw'))
        valid('--tokens', self.tokens, ('bytes', 'gpt2'))
        within(self, 1, 'batch_size', 'accumulate', 'context', 'steps')
        within(self, 0, 'grad_clip', 'weight_decay', 'lr_end', 'warmup', 'lr')


def within(config: Training, low: float, *names: str) -> None:
    """Raise ValueError where one of these options is below `low`, not a number, or absurdly large."""
    for name in names:
        if not low <= getattr(config, name) < 1e12:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: it must be a number from {low} up")


AnyConfig = TypeVar('AnyConfig', bound=Training)


def number_or_none(text: str) -> Optional[float]:
    return None if text == 'none' else float(text)


class Parser(argparse.ArgumentParser):
    """Raises ValueError, one line, where argparse would print its usage and exit. No option may be abbreviated, so that
    a misspelt one is never taken for another."""

    def __init__(self, description: Optional[str]):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix('argument ')[:200] + '; --help lists all options')


def options(kind: type[Training], parser: argparse.ArgumentParser, arguments: Optional[list[str]],
            ) -> tuple[dict[str, Any], argparse.Namespace]:
    """What the command line says about the fields of `kind`, and about the other arguments of the parser."""
    group = parser.add_argument_group('settings')
    for f in dataclasses.fields(kind):
        name, kwargs = '--' + f.name.replace('_', '-'), dict(default=argparse.SUPPRESS, help=f.metadata['help'])
        if isinstance(f.default, bool):
            group.add_argument(name, action=argparse.BooleanOptionalAction, **kwargs)
        else:
            number = number_or_none if f.type == Optional[float] else str if f.default is None else type(f.default)
            group.add_argument(name, type=number, metavar=f.name.split('_')[-1].upper(), **kwargs)
    known, unknown = parser.parse_known_args(arguments)
    everything = vars(known)
    if unknown:
        names = ['--' + name.replace('_', '-') for name in [*everything, *(f.name for f in dataclasses.fields(kind))]]
        word = unknown[0].split('=')[0][:40]
        raise ValueError(f"unknown option '{word}'{nearest(word, names)}; --help lists all options")
    given = {f.name: everything.pop(f.name) for f in dataclasses.fields(kind) if f.name in everything}
    return given, argparse.Namespace(**everything)


def configure(kind: type[AnyConfig], presets: dict[str, dict[str, dict[str, Any]]], given: dict[str, Any]) -> AnyConfig:
    """The defaults of `kind`, then the preset of the model, then what is given. Raises ValueError (one line)."""
    valid('--preset', preset := given.get('preset', 'laptop'), presets)
    model = like = given.get('model', 'resnet20')
    if is_own(model):  # the settings of a network of ours for the same data
        like = 'minigpt' if given.get('data', '').startswith('tinystories') else 'vit_tiny'
    valid('--model', like, presets[preset])
    config = kind(**{**presets[preset][like], 'model': model, **given})
    config.check()
    config.device = choose_device(config.device)
    return config


def weight_optimizer(parameters: Iterable[nn.Parameter], config: Training) -> torch.optim.Optimizer:
    """Biases, norms and learned scalars (fewer than two dimensions) are not decayed by AdamW."""
    parameters = list(parameters)
    if config.optimizer == 'sgd':
        return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    groups = [dict(params=[p for p in parameters if p.dim() >= 2], weight_decay=config.weight_decay),
              dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW([group for group in groups if group['params']], lr=config.lr, betas=(0.9, 0.99))


def learning_rate(step: int, config: Training) -> float:
    """Linear warm-up, then a cosine from lr to lr_end * lr, and a tenth of it after each of `drops`."""
    warmup = config.at(config.warmup)
    tenths = 0.1 ** sum(step >= float(share) * config.steps for share in config.drops.split(',') if share)
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * tenths * min(1.0, (step + 1) / max(warmup, 1)) * (config.lr_end + (1 - config.lr_end) * cosine)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Of (batch, classes) or (batch, time, vocabulary) logits."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# Memory: how much a run will need, before it needs it.

def bytes_kept(forward: Callable[[], Tensor], besides: Iterable[Tensor] = ()) -> tuple[int, Tensor]:
    """Bytes that autograd keeps for the backward pass of `forward`, each storage once, and what `forward` returned;
    `besides` (weights) not counted."""
    known, kept = {t.untyped_storage().data_ptr() for t in besides}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor  # holding the tensor keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return sum(size for address, (size, _) in kept.items() if address not in known), output


def memory_needed(model: nn.Module, batches: Any, loss: Callable[[Tensor, Tensor], Tensor], config: Training) -> int:
    """Bytes that training will take at its peak, beside those that the process has now.

    What is kept for backward is measured on batches of 2 and 4 and extended to --batch-size. Three quarters of it are
    added for what lives for a moment in the backward pass, and the weights are counted five times: gradient, two moments
    of the optimiser, the initial state of a run-off, a checkpoint; 0.1 GB for tables and libraries. Within a fifth of what
    was measured on a CPU. Leaves the model and the random generator as they were.
    """
    model, batches = copy.deepcopy(model), copy.copy(batches)
    kept = []
    on_gpu = [torch.cuda.current_device()] if config.device.startswith('cuda') else []
    with torch.random.fork_rng(on_gpu):
        for batches.size in (2, 4):
            x, y = next(batches)
            kept.append(bytes_kept(lambda: loss(model(x), y), model.parameters())[0] + x.nbytes + y.nbytes)
    item = (kept[1] - kept[0]) / 2
    batch = kept[0] + item * max(config.batch_size - 2, 0)
    return round(1e8 + 1.75 * batch + 5 * sum(p.nbytes for p in model.parameters()))


def memory_free(device: str) -> Optional[int]:
    """Bytes that are free on the device, or None where that cannot be known."""
    if device.startswith('cuda'):
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path('/proc/meminfo').read_text().splitlines() if device == 'cpu' else []
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable')]
        return free[0] if free else None
    except (OSError, ValueError, IndexError):
        return None


def check_memory(needed: int, config: Training) -> None:
    """Raise ValueError, with advice, when the device has not so many bytes left. Asked before the first step: some
    systems end a process that takes too much without a word."""
    free = memory_free(config.device)
    if free is not None and needed > free:
        raise ValueError(f'--batch-size {config.batch_size} needs about {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are '
                         f'free on {config.device}; {LESS_MEMORY}')


LESS_MEMORY = 'try a smaller --batch-size, with --accumulate to keep the number of samples in a step'


# ---------------------------------------------------------------------------------------------------------------------
# Files and errors.

MAX_JSON = 4_000_000  # bytes; far beyond any file that is written here


class Failed(RuntimeError):
    """The program cannot go on. One line: why, and what to try."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, and ValueError for a file that holds anything else."""
    with open(path, 'rb') as file:
        raw = file.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise ValueError(f'it is larger than {MAX_JSON:,} bytes')
    return parse_json(raw)


def parse_json(raw: bytes) -> dict[str, Any]:
    """One JSON object with finite numbers only. Raises ValueError for anything else."""
    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f'{text[:20]} is not a finite number')
        return value
    try:
        content = json.loads(raw.decode('utf-8'), parse_float=finite, parse_constant=finite)
    except UnicodeDecodeError:
        raise ValueError('it is not UTF-8 text') from None
    except RecursionError:
        raise ValueError('it is nested too deep') from None
    if not isinstance(content, dict):
        raise ValueError('it holds no { } with the settings in it')
    return content


def json_line(content: dict[str, Any], indent: Optional[int] = None) -> bytes:
    """JSON as its standard has it: numbers that are not finite become null."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return (json.dumps(plain(content), indent=indent, allow_nan=False) + '\n').encode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it, down to the disk, then in its place. Raises Failed."""
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Failed(f'cannot write {path}: {error.strerror}; make room or choose another folder with --out') from None


def write_line(file: Any, line: bytes, path: Path) -> None:
    """Append to a file opened without a buffer, which takes a part and says nothing when the disk is full. Raises Failed."""
    try:
        if file.write(line) != len(line):
            raise OSError(0, 'only a part of the line could be written')
    except OSError as error:
        raise Failed(f'cannot write {path}: {error.strerror}; make room or choose another folder with --out') from None


@contextlib.contextmanager
def one_line_errors(to_go_on: Callable[[], str]) -> Iterator[None]:
    """Around a whole program. What a user can mend ends it with one line and exit code 2, Ctrl-C with 130, and a closed
    pipe like either. What is left, a mistake in this code, keeps its traceback. to_go_on: says how to."""
    code = 2
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here and not at exit, where a closed pipe could no longer be told
        return
    except KeyboardInterrupt:
        line, code = f'stopped; {to_go_on()}', 130
    except BrokenPipeError:
        line = f'error: the reader of the output is gone; {to_go_on()}'
    except OSError as error:
        where = error.filename or 'standard output'
        line = f'error: {where}: {error.strerror or error}; make room or choose another place'
    except (ValueError, Failed) as error:
        line = f'error: {error}'
    except (RuntimeError, MemoryError) as error:
        if 'memory' not in str(error) and not isinstance(error, MemoryError):
            raise
        line = f'error: out of memory; {LESS_MEMORY}'
    with contextlib.suppress(OSError):
        print(' '.join(line.split())[:600], file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # else Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)

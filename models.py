"""The networks, by hand, and how their weights are trained: what search.py and evaluate.py share.

    build('resnet20', nn.ReLU)            a plain network
    build('resnet20', cell.site)          the same network with the relaxed cell in all of its 19 sites

Each network takes `activation`, a callable without arguments that makes one activation module a site.
"""
import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Optional, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ops import valid

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
    student.first.load_state_dict(teacher.first.state_dict())
    student.first.requires_grad_(False)
    return teacher.eval().requires_grad_(False), student


def network(config: 'Training', activation: MakeActivation, dataset: Any) -> nn.Module:
    """The network of that configuration in the shape that a `data.Dataset` asks for."""
    name = config.model
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
    model: str = option('resnet20', f'one of {", ".join(STANDARD)}')
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
            [float(word) for word in self.drops.split(',') if word]
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
    everything = vars(parser.parse_args(arguments))
    given = {f.name: everything.pop(f.name) for f in dataclasses.fields(kind) if f.name in everything}
    return given, argparse.Namespace(**everything)


def configure(kind: type[AnyConfig], presets: dict[str, dict[str, dict[str, Any]]], given: dict[str, Any]) -> AnyConfig:
    """The defaults of `kind`, then the preset of the model, then what is given. Raises ValueError (one line)."""
    valid('--preset', preset := given.get('preset', 'laptop'), presets)
    valid('--model', model := given.get('model', 'resnet20'), presets[preset])
    config = kind(**{**presets[preset][model], 'model': model, **given})
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

"""The networks, by hand, and `swap`, which puts sites into a network from elsewhere.

    build('resnet20', nn.ReLU)            a plain network
    build('resnet20', cell.site)          the same network with the relaxed cell in all of its 19 sites
    swap(model, nn.ReLU, cell.site)       the same for a network from elsewhere

Each network takes `activation`, a callable without arguments that makes one activation module a site.
"""
import ast
import inspect
import textwrap
import types
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Union

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

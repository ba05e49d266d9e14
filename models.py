"""Networks: ours by hand, and any other one, untouched, with sites in the place of its activations.

    build('resnet20', nn.ReLU)                         a plain network
    build('resnet20', cell.site)                       the same with the relaxed cell in all of its 19 sites
    replaced(model, lambda call: Found(), example)     any network, with the function that was found
"""
import functools
import hashlib
import importlib
import inspect
import random
import re
import runpy
import sys
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops import check_choice, did_you_mean

Make = Callable[..., nn.Module]    # makes the module of one site
conv3x3 = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
say_once = functools.cache(print)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, activation last (He et al., arXiv 1512.03385, section 4.2)."""
    def __init__(self, activation: Make, inputs: int, outputs: int):
        super().__init__()
        self.stride, self.new_channels = 1 if inputs == outputs else 2, outputs - inputs
        self.body = nn.Sequential(
            conv3x3(inputs, outputs, stride=self.stride), nn.BatchNorm2d(outputs), activation(),
            conv3x3(outputs, outputs), nn.BatchNorm2d(outputs))
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.new_channels:    # option A: every second pixel, and zeros for the new channels; no parameters
            shortcut = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return self.act(self.body(x) + shortcut)


class ResNet(nn.Sequential):
    """(n, channels, side, side) images -> (n, classes) logits. depth = 6 k + 2, with depth - 1 sites."""
    def __init__(self, activation: Make, depth: int = 20, classes: int = 10, channels: int = 3):
        k = (depth - 2) // 6
        widths = [16] * (k + 1) + [32] * k + [64] * k
        super().__init__(conv3x3(channels, 16), nn.BatchNorm2d(16), activation(),
                         *(Block(activation, *pair) for pair in zip(widths, widths[1:])),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
        # channels_last makes convolutions on a CPU a fifth faster; every layer keeps the layout it is given
        self.to(memory_format=torch.channels_last)


class TransformerBlock(nn.Module):
    """Attention, then a perceptron of four times the width, each after a layer norm. (n, tokens, width)."""
    def __init__(self, activation: Make, width: int, heads: int, causal: bool, dropout: float = 0.0,
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

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal,    # each (n, heads, tokens, -1)
                                           dropout_p=self.dropout if self.training else 0.0)
        y = self.project(y.transpose(1, 2).reshape(n, tokens, width))
        x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.down(self.act(self.up(self.norm2(x)))), self.dropout, self.training)


class ViT(nn.Module):
    """(n, channels, side, side) images -> (n, classes) logits. After Touvron et al., arXiv 2012.12877, with
    small patches for small images. Raises ValueError when the patch does not divide the side."""
    def __init__(self, activation: Make, width: int = 192, heads: int = 3, classes: int = 10,
                 channels: int = 3, side: int = 32, patch: int = 4):
        super().__init__()
        if side < patch or side % patch:
            raise ValueError(f'images of side {side} cannot be cut into patches of {patch}; use a multiple')
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(activation, width, heads, False) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)    # (n, patches, width)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """(n, time) tokens -> (n, time, vocabulary) logits; time at most `context`. After nanoGPT: biases in the
    layer norms only, output weights tied to the embedding, residual projections scaled at the start."""
    def __init__(self, activation: Make, depth: int = 3, heads: int = 3, width: int = 192,
                 vocabulary: int = 256, context: int = 128, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(activation, width, heads, True, dropout, bias=False)
                                      for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # a block adds to the residual stream twice: without the factor its variance grows with depth
                residual = name.endswith(('project.weight', 'down.weight'))
                nn.init.normal_(p, std=0.02 / (2 * depth) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[:tokens.shape[1]]
        return self.head(self.norm(self.blocks(F.dropout(x, self.dropout, self.training))))


class RNN(nn.Module):
    """(n, time) tokens -> (n, time, vocabulary) logits. One recurrent layer: Elman's or, `gated`, a GRU (Cho
    et al., arXiv 1406.1078), computed as torch.nn.RNN and torch.nn.GRU do. The site is their tanh."""
    def __init__(self, activation: Make, gated: bool = False, vocabulary: int = 256, width: int = 256):
        super().__init__()
        self.gated, self.width, self.act = gated, width, activation()
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.input, self.hidden = (nn.Linear(width, 3 * width if gated else width) for _ in range(2))
        for weight in self.hidden.weight.data.split(width):
            nn.init.orthogonal_(weight)    # the state keeps its length, also without the bounds of tanh

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.input(self.embedding(tokens))
        h, states = x.new_zeros(len(x), self.width), []
        for a in x.unbind(1):    # (n, width), or three of them side by side: reset, update, new
            b = self.hidden(h)
            if self.gated:
                (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                z = torch.sigmoid(az + bz)
                h = (1 - z) * self.act(an + torch.sigmoid(ar + br) * bn) + z * h
            else:
                h = self.act(a + b)
            states.append(h)
        return self.head(torch.stack(states, 1))


class Toy(nn.Module):
    """(n, ...) inputs, flattened -> (n, outputs). One hidden layer: for tests, and for planted functions."""
    def __init__(self, activation: Make, inputs: int = 16, hidden: int = 64, outputs: int = 1):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x.flatten(1))))


MODELS: dict[str, Make] = {
    **{f'resnet{depth}': functools.partial(ResNet, depth=depth) for depth in (20, 32, 44, 56, 110)},
    **{f'vit_{size}': functools.partial(ViT, width=64 * heads, heads=heads)
       for size, heads in (('tiny', 3), ('small', 6), ('base', 12))},
    **{f'{size}gpt': functools.partial(GPT, depth=heads, heads=heads, width=64 * heads)
       for size, heads in (('mini', 3), ('tiny', 6), ('small', 9))},
    'elman': RNN, 'gru': functools.partial(RNN, gated=True), 'toy': Toy}
# the activation that a network is known with: the baseline, and what a search warms up with
STANDARD = {name: {ViT: 'gelu', GPT: 'gelu', RNN: 'tanh'}.get(getattr(make, 'func', make), 'relu')
            for name, make in MODELS.items()}


def build(name: str, activation: Make, **shape: Any) -> nn.Module:
    """The network of that name, its sites made by `activation`. shape: see the class. Raises ValueError."""
    check_choice('model', name, MODELS)
    return MODELS[name](activation, **shape)


def teacher_and_student(planted: Make, searched: Make, inputs: int = 16, hidden: int = 64) -> tuple[Toy, Toy]:
    """A teacher with the planted activation; a student that keeps its first layer and learns the rest: were
    that layer free, wrong functions would fit, too. Its rows have length 1: N(0, 1) inputs stay N(0, 1)."""
    teacher, student = (Toy(activation, inputs, hidden) for activation in (planted, searched))
    with torch.no_grad():
        teacher.first.weight.copy_(F.normalize(torch.randn(hidden, inputs), dim=1))
        teacher.first.bias.zero_()
        teacher.last.weight.normal_()
        teacher.last.bias.zero_()
        # targets of mean 0 and variance 1: then one set of learning rates suits all planted functions
        y = teacher(torch.randn(8192, inputs))
        teacher.last.bias.copy_(-y.mean() / y.std().clamp(min=1e-6))
        teacher.last.weight.div_(y.std().clamp(min=1e-6))
    student.first.load_state_dict(teacher.first.state_dict())
    student.first.requires_grad_(False)
    return teacher.eval().requires_grad_(False), student


# ---- any other network ----

ACTIVATIONS = ('relu', 'relu6', 'hardtanh', 'gelu', 'silu', 'leaky_relu', 'elu', 'selu', 'celu', 'hardswish',
               'mish', 'softplus', 'softsign', 'threshold', 'hardshrink', 'softshrink', 'tanhshrink')
GATES = ('sigmoid', 'tanh', 'hardsigmoid', 'clamp', 'clamp_min')    # sites only where `only` names them
KNOWN = re.compile('|'.join(ACTIVATIONS + GATES) + '|[pr]relu|glu|log_sigmoid|(log_)?softmax'
                   '|(lstm|gru|rnn_tanh|rnn_relu)(_cell)?')    # the others of these are always left alone
RECOMPUTED = 'torch.utils.checkpoint calls activations again in backward, out of reach: switch it off'
FUSED = re.compile('(?!.*backward).*(elu|silu|swish|mish|activation|encoder_layer)')


@functools.cache
def named(function: Callable) -> tuple[str, bool]:
    """('relu', False) for F.relu, torch.relu, Tensor.relu; True for relu_; '' for what has no activation."""
    raw = getattr(function, '__name__', '').split('.')[0]
    name = raw.strip('_')
    return (name if KNOWN.fullmatch(name) or FUSED.match(name) else ''), raw.endswith('_')


def counted(names: Counter) -> str:
    return ', '.join(f'{count} {name}' for name, count in names.most_common() if count) or 'nothing'


class Function(nn.Module):
    """A function of one tensor as a module."""
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.forward = function


class Catch(TorchFunctionMode):
    """One forward pass of a `Replaced`: every activation call goes to its site, known by the modules around
    it and the number of calls before it there: so a pass may skip a block, or take a new branch."""
    def __init__(self, owner: 'Replaced', record: Optional['Record'] = None):
        super().__init__()
        self.owner, self.record, self.path, self.count = owner, record, [], Counter()

    def enter(self, module: nn.Module, _: Any) -> None:    # the name of one made in `forward` is its class
        self.path.append(self.owner.names.get(module, type(module).__name__))

    def leave(self, *_: Any) -> None:
        self.path.pop()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, in_place = named(function)
        owner, record, kwargs = self.owner, self.record, dict(kwargs or {})
        fused = name and not KNOWN.fullmatch(name)
        if not name or fused or '.' in function.__name__:    # with a dot: a kernel, from a Record
            if record and (fused or name in owner.kinds):
                record.hidden[f"{name} in {''.join(self.path[-1:]) or 'the network'}"] += 1
            return function(*args, **kwargs)
        x, *rest = args or [kwargs.pop('input')]
        if name == 'hardtanh' and (0, 6) in (tuple(rest[:2]), (kwargs.get('min_val'), kwargs.get('max_val'))):
            name = 'relu6'       # nn.ReLU6 arrives like this
        place = (*self.path, name)
        key = (*place, self.count[place])
        self.count[place] += 1
        taken = name in owner.kinds and x.is_floating_point()
        if record and taken and owner.model.training and not torch.is_grad_enabled():
            owner.alone.add(key)    # a frozen part, or the inside of a torch.autograd.Function
        if not taken or key in owner.alone:
            owner.left[name + ' without gradient' * taken] += bool(record and owner.model.training)
            return function(x, *rest, **kwargs)
        # subtle: in place, but on a copy, where the gradient of ELU would differ in the last bit
        copied = in_place or kwargs.get('inplace', False) and name in ('elu', 'selu', 'celu')
        in_place = in_place or kwargs.get('inplace', False)
        kwargs |= {'inplace': False} if in_place and not copied else {}
        if in_place and key not in owner.index and not record:
            owner.written.add(key)
        site = owner.site(key, lambda v: function(v.clone() if copied else v, *rest, **kwargs))
        if key in owner.written:
            return x.copy_(site(x.clone()))
        y = site(x)
        if record and in_place:     # x is kept, lest another tensor gets its address
            record.overwritten[x.untyped_storage().data_ptr()] = key, x
        return y


class Record(TorchDispatchMode):
    """Sees all kernels while the calls are recorded, and hands them to the `Catch`: an activation that came
    by no call (torch.jit, C++) is out of reach. Where a kernel reads again what a call in place should have
    changed, the site of that call has to change it, too."""
    supports_higher_order_operators = True

    def __init__(self, owner: 'Replaced'):
        super().__init__()
        self.owner, self.overwritten, self.hidden = owner, {}, Counter()

    def read(self, values: Any) -> None:
        for x in tree_leaves(values):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                key, _ = self.overwritten.get(x.untyped_storage().data_ptr(), (None, None))
                self.owner.written.update([key] if key else [])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.read((args, kwargs))
        return function(*args, **(kwargs or {}))


class Replaced(nn.Module):
    """Any network, untouched, with a site in the place of every activation that it calls, module or function.

    make:    takes the original call, a function of one tensor, and returns the module or function of its site
    example: an input, or a tuple of them; the calls are recorded with it, in training and in eval mode
    only:    names of activations, with commas between; the others are left alone
    Raises ValueError when there is no such activation, or one that is out of reach.
    """
    def __init__(self, model: nn.Module, make: Callable, example: Any, only: Optional[str] = None):
        super().__init__()
        self.kinds = [name.strip() for name in only.split(',')] if only else ACTIVATIONS
        for name in self.kinds:
            check_choice('activation in only', name, ACTIVATIONS + GATES)
        self.model, self.make, self.sites, self.left = model, Function, nn.ModuleList(), Counter()
        self.index, self.alone, self.written = {}, set(), set()    # by the key of a call, see Catch
        self.names = {m: name for name, m in model.named_modules()}
        record, args = Record(self), example if isinstance(example, tuple) else (example,)
        self.outputs = [self.probe(training, record, args) for training in (True, False)]
        if record.hidden or any(isinstance(m, nn.DataParallel) and m.device_ids[1:] for m in self.names):
            raise ValueError(f'activations in torch.jit, nn.DataParallel or fused operations, out of reach: '
                             f'{counted(record.hidden)}; give the network without it')
        if not self.sites:
            raise ValueError(f"the network calls no activation to replace ({self.describe()}); name one of "
                             f"{', '.join(GATES)} with only to replace it")
        calls, self.make, self.index, self.sites = zip(self.index, self.sites), make, {}, nn.ModuleList()
        for key, recorded in calls:
            self.site(key, recorded.forward)

    def site(self, key: tuple, call: Callable[[Tensor], Tensor]) -> nn.Module:
        """The site of that call, made when it is new."""
        if key not in self.index:
            site, device = self.make(call), next((p.device for p in self.model.parameters()), None)
            site = site if isinstance(site, nn.Module) else Function(site)
            self.index[key] = len(self.sites)
            self.sites.append(site.to(device).train(self.training))
        return self.sites[self.index[key]]

    def probe(self, training: bool, record: Record, args: tuple) -> tuple[int, ...] | str:
        """The shape or type of the network's output. No trace is left in it and in the random numbers."""
        ready = [m for m in self.names if not hasattr(m, 'cls_to_become')]    # lazy modules take their shape
        attributes = {m: dict(vars(m)) for m in ready}
        buffers = {key: b.clone() for key, b in self.model.named_buffers() if not is_lazy(b)}
        cuda = [p.device for p in self.model.parameters() if p.is_cuda][:1]
        python, numpy = random.getstate(), np.random.get_state()
        try:
            with (torch.random.fork_rng(cuda), torch.set_grad_enabled(training), record,
                  torch.autograd.graph.disable_saved_tensors_hooks(RECOMPUTED)):
                self.model.train(training)
                output = self.run(Catch(self, record), torch.func.functional_call, self.model, buffers, args)
                record.read(output)
                return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for m, old in attributes.items():
                vars(m).clear()
                vars(m).update(old)

    def run(self, catch: Catch, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """function(*args) with its calls caught. Meanwhile torch.compile does nothing, and PyTorch leaves the
        fast path of its attention layers, which has an activation of its own, by itself."""
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(catch.enter).remove)
            stack.callback(register_module_forward_hook(catch.leave, always_call=True).remove)
            if 'torch._dynamo' in sys.modules:
                stack.enter_context(torch.compiler.set_stance('force_eager'))
            stack.enter_context(catch)
            return function(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(Catch(self), self.model, *args, **kwargs)

    def describe(self) -> str:
        """'35 sites: 19 hardswish, 16 relu; left alone: 9 hardsigmoid'."""
        n, names = len(self.sites), Counter(name for *_, name, _ in self.index)
        left = f'; left alone: {counted(self.left)}' if any(self.left.values()) else ''
        return f"{n} site{'s' * (n != 1)}: {counted(names)}{left}"


replaced = Replaced


# ---- the network that --model names ----

def own_network(model: str) -> tuple[nn.Module, str]:
    """What 'path/to/file.py:function' returns, and a checksum of that file and those beside it that it uses.

    The file is run: it is the user's own code. A file beside it comes before ours of the same name.
    """
    place, _, name = model.rpartition(':')
    file, here = Path(place).expanduser().resolve(), Path(__file__).resolve().parent
    if not place.endswith('.py') or not file.is_file():
        raise ValueError(f'--model {model}: no such file; write path/to/file.py:function')
    folder = file.parent
    beside = {p.stem for p in folder.iterdir() if p.is_dir() or p.suffix == '.py'}
    modules, path, bytecode, sources = dict(sys.modules), list(sys.path), sys.dont_write_bytecode, {str(file)}
    for key in beside & {p.stem for p in here.glob('*.py') if here != folder}:
        sys.modules.pop(key, None)
    sys.path[:] = [str(folder), *(p for p in path if Path(p).resolve() != here)]
    sys.dont_write_bytecode = True    # else a second change within a second would be overlooked
    importlib.invalidate_caches()
    try:
        functions = runpy.run_path(str(file))
        if not callable(functions.get(name)):
            raise ValueError(f"there is no function '{name}' in it{did_you_mean(name, functions)}")
        network = functions[name]()
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        for key, module in list(sys.modules.items()):
            if key.split('.')[0] in beside and modules.get(key) is not module:    # to be read anew next time
                sources.add(getattr(sys.modules.pop(key), '__file__', None))
        sys.modules.update(modules)
    text = b''.join(Path(source).read_bytes() for source in sorted(filter(None, sources)))
    return network, hashlib.sha256(text).hexdigest()[:8]


def source_digest(model: str) -> str:
    """The checksum of the user's files, by which a ledger tells versions apart; '' for other networks."""
    if model in MODELS or model.startswith('torchvision:'):
        return ''
    with torch.random.fork_rng([]):
        return own_network(model)[1]


def torchvision_network(model: str, dataset: Any) -> nn.Module:
    """'torchvision:name', a classification network, with new weights and the data set's classes."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError):
        raise ValueError('torchvision is missing, or not for this torch; pip install torchvision') from None
    name = model.removeprefix('torchvision:')
    check_choice('network of torchvision', name, models.list_models(module=models))
    say_once(f'note: {name} is made for 224 pixels; its strides leave little of {dataset.side}',
             file=sys.stderr)
    shape = dict(image_size=dataset.side) if name.startswith('vit_') else {}
    if name in ('googlenet', 'inception_v3'):
        shape = dict(aux_logits=False, init_weights=True)
    return models.get_model(name, weights=None, num_classes=dataset.classes, **shape)


def network(config: Any, make: Make, dataset: Any) -> nn.Module:
    """The network of config.model in the shape of the data set (kind, classes, channels, side, train, name).

    Ours, by name, has sites made by make(). 'file.py:function' and 'torchvision:name' go through `replaced`,
    with make(call) and config.only. Raises ValueError when it does not go with the data.
    """
    model, only, text = config.model, getattr(config, 'only', None), dataset.kind == 'text'
    what = f'--model {model} with --data {dataset.name}'
    if model in MODELS:
        takes = inspect.signature(MODELS[model]).parameters
        if ('vocabulary' in takes) != text:
            raise ValueError(f"{what}: this network reads {'images' if text else 'text'}")
        if only:
            raise ValueError(f'{what}: leave out --only {only}, this network has one kind of activation')
        n, shape = dataset.classes, dict(context=config.context, dropout=config.dropout)
        shape |= dict(vocabulary=n) if text else dict(
            classes=n, outputs=n, channels=dataset.channels, side=dataset.side,
            inputs=dataset.channels * dataset.side ** 2)
        return build(model, make, **{key: value for key, value in shape.items() if key in takes})
    own = '.py' in model
    if not own and not model.startswith('torchvision:'):
        check_choice('model', model, [*MODELS, 'torchvision:NAME', 'FILE.py:FUNCTION'])
    x = dataset.train[:config.context].long().repeat(2, 1) if text else dataset.train[0][:2].float() / 255
    wanted = (*x.shape, dataset.classes) if text else (2, dataset.classes)
    try:
        other = replaced(own_network(model)[0] if own else torchvision_network(model, dataset), make, x, only)
        for mode, got in zip(('training', 'eval'), other.outputs):
            if got != wanted:
                raise ValueError(f'given {tuple(x.shape)}, it returns {got} in {mode} mode; wanted: {wanted}')
    except (Exception, SystemExit) as error:
        lines = [f'{Path(f.filename).name}, line {f.lineno}, '
                 for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__
                 and not re.search('<|lib.python|site-packages', f.filename)]    # of the user's code
        kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
        text = (str(error).splitlines() or [''])[0]
        raise ValueError(f"{what}: {''.join(lines[-1:])}{kind}{text}") from error
    return other

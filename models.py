"""Networks: ours by hand, and any other one, untouched, with sites in the place of its activations.

    MODELS['resnet20'](nn.ReLU)                        a plain network
    MODELS['resnet20'](cell.site)                      the same with the relaxed cell in all of its 19 sites
    replaced(model, lambda call: Found(), example)     any network, with the function that was found
"""
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import re
import runpy
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import BaseTorchDispatchMode
from torch.utils._pytree import tree_map_only

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
    def __init__(self, activation: Make, width: int, heads: int, causal: bool, dropout=0.0, bias=True):
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
    small patches for small images; the patch divides the side."""
    def __init__(self, activation: Make, width: int = 192, heads: int = 3, classes: int = 10,
                 channels: int = 3, side: int = 32, patch: int = 4):
        super().__init__()
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
    student.first = teacher.first
    return teacher.eval().requires_grad_(False), student

# ---- any other network ----

ACTIVATIONS = ('relu', 'relu6', 'hardtanh', 'gelu', 'silu', 'leaky_relu', 'elu', 'selu', 'celu', 'hardswish',
               'mish', 'softplus', 'softsign', 'threshold', 'hardshrink', 'softshrink', 'tanhshrink')
GATES = ('sigmoid', 'tanh', 'hardsigmoid', 'clamp', 'clamp_min')    # sites only where `only` names them
KNOWN = {*ACTIVATIONS, *GATES, *('prelu rrelu glu softmax log_sigmoid lstm gru rnn_tanh rnn_relu lstm_cell '
                                 'gru_cell rnn_tanh_cell rnn_relu_cell').split()}
ONE_PASS = threading.RLock()    # at a time: a pass counts its calls, and its hooks and its stance are global
FUSED = re.compile('(?!.*backward).*(elu|silu|swish|mish|activation|encoder_layer)')    # with something else

def counted(names: Iterable[str]) -> str:
    return ', '.join(f'{count} {name}' for name, count in Counter(names).most_common())

class replaced(nn.Module, TorchFunctionMode):
    """Any network, untouched, with a site in the place of every activation that it calls, module or function.
    make:    takes the original call, a function of one tensor, and returns the module or function of its site
    example: an input, or a tuple of them; the calls are recorded with it, in training and in eval mode
    only:    names of activations, with commas between; the others are left alone
    Raises ValueError when there is no such activation, or one that is out of reach."""
    def __init__(self, model: nn.Module, make: Callable, example: Any, only: str | None = None):
        super().__init__()
        self.kinds = re.findall(r'[^\s,]+', only or '') or ACTIVATIONS
        for name in self.kinds:
            check_choice('activation in only', name, ACTIVATIONS + GATES)
        self.model, self.make, self.sites, self.recording = model, make, nn.ModuleList(), True
        self.index, self.left, self.hidden = {}, {}, []    # calls with a site, without one, out of reach
        self.now: dict[tuple, Callable] = {}               # of those with a site: the last call
        self.names = {m: name for name, m in model.named_modules()}
        args, modes = example if isinstance(example, tuple) else (example,), [m.training for m in self.names]
        try:
            self.outputs = [self.probe(training, args) for training in (True, False)]
        finally:
            for m, mode in zip(self.names, modes):
                m.training = mode
        self.recording = False
        if not self.index:
            raise ValueError(f"the network calls no activation to replace ({self.describe()}); leave only "
                             f"out, or name one of {', '.join(GATES)} there")

    def probe(self, training: bool, args: tuple) -> tuple[int, ...] | str:
        """Record the calls. Returns the shape or type of the output. Buffers, torch's random state stay."""
        buffers = {key: b.clone() for key, b in self.named_buffers()}
        weights = [p for p in self.model.parameters() if p.requires_grad]
        cuda = [p.device for p in self.model.parameters() if p.is_cuda][:1]
        self.model.train(training)
        # BaseTorchDispatchMode calls kernels as Python functions: those of torch.jit and C++ are seen
        with torch.random.fork_rng(cuda), torch.set_grad_enabled(training), BaseTorchDispatchMode():
            output = torch.func.functional_call(self, buffers, tree_map_only(Tensor, Tensor.clone, args))
            if self.hidden:
                raise ValueError(f'out of reach: {counted(self.hidden)}, in torch.jit, torch.vmap or a fused '
                                 f'operation; call it from Python')
            if training and weights and getattr(output, 'requires_grad', False):
                torch.autograd.grad(output.sum(), weights, allow_unused=True)    # backward, too
        return tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A pass of the network that catches all calls. Meanwhile torch.compile does nothing, and by itself
        PyTorch leaves the fast path of its attention layers, which has an activation of its own."""
        thread = threading.get_ident()    # the hooks hear of all threads, such as one that makes batches
        def enter(m: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                self.path.append(self.names.get(m, type(m).__name__))    # without a name: made in `forward`
        def leave(*_: Any) -> None:
            if threading.get_ident() == thread:
                self.path.pop()
        with (ONE_PASS, register_module_forward_pre_hook(enter), torch.compiler.set_stance('force_eager'),
              register_module_forward_hook(leave, always_call=True), self):
            self.path, self.count = [], Counter()
            self.graded, self.code = torch.is_grad_enabled(), sys._getframe().f_code
            return self.model(*args, **kwargs)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Every activation call goes to its site, known by the modules around it and the number of calls
        before it there: so a pass may skip a block, or take a new branch."""
        kwargs, text = dict(kwargs or {}), getattr(function, '__name__', '').split('.')[0]
        name = text.strip('_')    # of 'relu', 'relu_', '_threshold'
        # out of reach: kernels that came by no call, and calls inside of torch.vmap, which bears no table
        outside = isinstance(function, torch._ops.OpOverload) or (
            self.recording and torch._C._functorch.peek_interpreter_stack())
        if name not in KNOWN or outside:
            if self.recording and (name in self.kinds or name not in KNOWN and FUSED.match(name)):
                self.hidden.append(name)
            return function(*args, **kwargs)
        if name == 'hardtanh' and (kwargs.get('min_val'), kwargs.get('max_val')) == (0, 6):
            name = 'relu6'    # nn.ReLU6 arrives like this
        place = (*self.path, name)
        key = (*place, self.count[place])
        self.count[place] += 1
        x, *rest = args or [kwargs.pop('input')]
        in_place = text.endswith('_') or kwargs.get('inplace', False)
        taken = name in self.kinds and x.is_floating_point()
        if taken and self.graded and self.checkpointed():
            raise ValueError('torch.utils.checkpoint calls activations twice, out of reach: switch it off')
        frozen = self.model.training and not torch.is_grad_enabled()    # or inside a torch.autograd.Function
        if self.recording and (frozen or not taken):
            self.left.setdefault(key, name + ' without gradient' * taken)
        if not taken or key in self.left:
            return function(x, *rest, **kwargs)
        # the site has the call as it is now: a slope may be drawn anew, or be a buffer
        self.now[key] = call = lambda v: function(v.clone() if in_place else v, *rest, **kwargs)
        if key not in self.index:
            self.index[key] = self.make(lambda v: self.now[key](v))
            if isinstance(self.index[key], nn.Module):
                self.sites.append(self.index[key].to(x.device).train(self.training))
        # the network may write into x later, and what stands here may need it for its gradient
        v = x.clone() if torch.is_grad_enabled() else x
        y = call(v) if self.recording else self.index[key](v)
        return x.copy_(y) if in_place else y

    def checkpointed(self) -> bool:
        """Whether torch.utils.checkpoint stands between this pass and the activation that is called."""
        frame = sys._getframe(2)
        while frame and frame.f_code is not self.code:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                return True
            frame = frame.f_back
        return False

    def describe(self) -> str:
        """'35 sites: 19 hardswish, 16 relu; left alone: 9 hardsigmoid'."""
        n = len(self.index)
        left = f'; left alone: {counted(self.left.values())}' if self.left else ''
        return f"{n} site{'s' * (n != 1)}: {counted(key[-2] for key in self.index)}".removesuffix(': ') + left

# ---- the network that --model names ----

OWN: list[Path] = []       # the user's file, from when it is run until its network has been probed,
READ: set[Path] = set()    # and what Python has opened to read in the meantime
FOLDERS: set[Path] = set()    # of all such files
FOREIGN = re.compile('|'.join(['<', 'site-packages', *map(re.escape, (    # files that are not the user's
    str(Path(runpy.__file__).parent), __file__, check_choice.__code__.co_filename))]))

@sys.addaudithook
def note_reading(event: str, details: tuple) -> None:
    if event == 'open' and OWN and isinstance(details[0], str) and 'r' in (details[1] or ''):
        name = details[0]
        with contextlib.suppress(ValueError):    # of other names: Python's file of 'net.cpython-311.pyc'
            name = importlib.util.source_from_cache(name)
        READ.add(Path(name).resolve())

def own_network(place: str) -> nn.Module:
    """What 'path/to/file.py:function' returns. Files beside it come before ours of the same name."""
    place, _, name = place.rpartition(':')
    file, here, path = Path(place).resolve(), Path(__file__).resolve().parent, list(sys.path)
    if not file.is_file():
        raise ValueError(f'there is no file {file}; write path/to/file.py:function')
    beside = {p.name.removesuffix('.py') for p in file.parent.iterdir()}
    shared = beside & {p.stem for p in here.glob('*.py')}
    ours = {key: sys.modules.pop(key) for key in shared & sys.modules.keys()}
    sys.path[:] = [str(file.parent), *(p for p in path if Path(p).resolve() != here)]
    OWN[:] = [file]
    FOLDERS.add(file.parent)
    READ.clear()
    importlib.invalidate_caches()
    for key, module in list(sys.modules.items()):    # what was imported for networks before is read anew
        parents = Path(getattr(module, '__file__', None) or '').parents
        if key.split('.')[0] in beside and FOLDERS & set(parents):
            del sys.modules[key]
    try:
        seed, functions = torch.initial_seed(), runpy.run_path(str(file))
        if torch.initial_seed() != seed:    # set at the top of the file: all of ours would be one
            torch.manual_seed(seed)
        if not callable(functions.get(name)):
            raise ValueError(f"there is no function '{name}' in it{did_you_mean(name, functions)}")
        if not isinstance(network := functions[name](), nn.Module):
            raise ValueError(f'{name}() returned {type(network).__name__}, no network')
        if torch.initial_seed() != seed:
            say_once(f'note: {name}() seeds torch: all seeds begin with the same weights', file=sys.stderr)
        return network
    finally:
        sys.path[:] = dict.fromkeys([*path, str(file.parent)])    # for imports in forward
        for key in [key for key in sys.modules if key.split('.')[0] in shared]:
            del sys.modules[key]
        sys.modules.update(ours)

def checksum(network: nn.Module) -> str:
    """Of the user's file and all in its folder that was read for the network: it tells versions apart."""
    file = OWN.pop()
    text = b''.join(path.read_bytes() for path in sorted({file, *READ})
                    if file.parent in path.parents and path.is_file() and not FOREIGN.search(str(path)))
    shape = re.sub(' at 0x[0-9a-fA-F]+', '', repr(network))    # what was read elsewhere may show here
    return hashlib.sha256(text + shape.encode()).hexdigest()[:8]

def torchvision_network(model: str, dataset: Any) -> nn.Module:
    """'torchvision:name', a classification network, with new weights and the data set's classes."""
    from torchvision import models    # pip install torchvision
    name = model.removeprefix('torchvision:')
    check_choice('network of torchvision', name, models.list_models(module=models))
    say_once(f'note: {name} is made for 224 pixels; it leaves little of {dataset.side}', file=sys.stderr)
    more = {'vit': dict(image_size=dataset.side), 'googlenet': dict(aux_logits=False, init_weights=True)}
    return models.get_model(name, num_classes=dataset.classes, **more.get(name.split('_')[0], {}))

def network(config: Any, make: Make, dataset: Any) -> nn.Module:
    """The network of config.model in the shape of the data set (kind, classes, channels, side, train, name).
    Ours have sites made by make(); 'file.py:function' and 'torchvision:name' go through `replaced`, with
    make(call) and config.only. Raises ValueError, one line, also for errors in the user's file."""
    model, text, n = config.model, dataset.kind == 'text', dataset.classes
    what = f'--model {model} with --data {dataset.name}'
    if model in MODELS:
        takes = inspect.signature(MODELS[model]).parameters
        if ('vocabulary' in takes) != text:
            raise ValueError(f"{what}: this network reads {'images' if text else 'text'}; change one of them")
        if config.only:
            raise ValueError(f'{what}: leave out --only, this network has one kind of activation')
        shape = vars(dataset) | dict(vocabulary=n, outputs=n, inputs=dataset.channels * dataset.side ** 2,
                                     context=config.context, dropout=config.dropout)
        ours = MODELS[model](make, **{key: value for key, value in shape.items() if key in takes})
        if config.compile:
            torch._dynamo.config.cache_size_limit = 64    # as many blocks of one class get code of their own
            ours.compile()
        return ours
    size, torchvision = config.batch_size, model.startswith('torchvision:')
    # a batch as in the training: a network may fail at another
    x = dataset.train[:config.context].long().repeat(size, 1) if text else dataset.train[0][:size] / 255.0
    wanted = (*x.shape, n) if text else (len(x), n)
    try:
        other = torchvision_network(model, dataset) if torchvision else own_network(model)
        x = x.to(next((p.device for p in other.parameters()), x.device))    # the file may move it to a GPU
        other = replaced(other, make, x, config.only)
        other.source = '' if torchvision else checksum(other.model)
        if other.outputs != [wanted, wanted]:
            raise ValueError(f'given {tuple(x.shape)}, it returns {other.outputs} in training and in '
                             f'eval mode; wanted: {wanted}')
        return other
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == 'torchvision':
            raise  # one_line_errors says how to get it
        users = [f for f in traceback.extract_tb(error.__traceback__) if not FOREIGN.search(f.filename)]
        where = ''.join(f'{Path(f.filename).name}, line {f.lineno}, ' for f in users[-1:])
        kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
        raise ValueError(f'{what}: {where}{kind}' + str(error).partition('\n')[0]) from error

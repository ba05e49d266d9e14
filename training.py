"""What search.py and evaluate.py share: settings and their command line, optimiser and schedule, memory, files, errors."""
import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Optional, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import STANDARD
from models_own import is_own
from ops import nearest, valid


def choose_device(name: str) -> str:
    """The device called `name`; 'auto' takes cuda, else mps, else cpu. Raises ValueError for one that is not there."""
    present = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        return next(device for device, here in present.items() if here)
    valid('--device', name, ['auto', *present])
    if not present[name]:
        raise ValueError(f'--device {name}: this machine, or this build of PyTorch, has no {name}; use --device cpu')
    return name


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


def bound(gradients: list[Tensor], limit: float, *others: Tensor) -> bool:
    """Scale the gradients in place to a common norm of at most `limit` (0: leave them). Returns whether they and the
    `others` (the loss, running statistics) are finite: if not, the step must not be taken.

    Asking for that makes a GPU wait once in a half-step; in return nothing that is not finite gets anywhere, and is seen
    where it happens.
    """
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    finite = bool(torch.stack(torch._foreach_norm([norm, *others])).isfinite().all())
    if finite and limit:
        torch._foreach_mul_(gradients, (limit / norm.clamp(min=1e-12)).clamp(max=1.0))
    return finite


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


class ConfigError(ValueError):
    """An option that cannot be. The message names it, and what can be."""


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

"""Networks of other people by `--model path/to/file.py:function`, and the network that a configuration asks for."""
from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import torch
import torch.nn as nn
from torch import Tensor

from models import STANDARD, MakeActivation, build, swap
from ops import nearest

if TYPE_CHECKING:
    from training import Training  # which imports this file


# The hidden activations that `--model file.py:function` swaps, by the names that expressions use.
SWAPPED: dict[str, type[nn.Module]] = {'relu': nn.ReLU, 'leaky_relu': nn.LeakyReLU, 'elu': nn.ELU, 'silu': nn.SiLU,
                                       'gelu': nn.GELU}


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

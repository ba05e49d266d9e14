"""The run folder of a search: plan and progress on the terminal, log, checkpoints and resuming, and the result at the end.

This room split off from search.py, so that the loop there has the page to itself.
"""
import dataclasses
import io
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Optional, get_type_hints

try:
    import fcntl
    import resource
except ImportError:  # Windows: nothing keeps two processes out of one run folder there
    fcntl = resource = None

import torch
import torch.nn as nn
from torch import Tensor

import figures
from activation import Activation, bend, distance, named
from cell import Cell
from models_own import standard_of
from training import ConfigError, Training, choose_device, json_line, read_json, write_line, write_whole


FILES = ('config.json', 'log.jsonl', 'checkpoint.pt', 'activation.json')
BILEVEL = 2.2  # what a step with both halves costs against one of the warm start, until that is known


def unused(folder: Path) -> None:
    """Raise ConfigError where a new search would write over another."""
    if any((folder / name).exists() and (folder / name).stat().st_size for name in FILES):
        raise ConfigError(f'{folder} holds a run already; go on with it by --resume {folder}, or choose another --seed or '
                          f'--out')


class Run:
    """The run folder and the progress line. `report` is called after every step.

    config.json   the settings, written first
    log.jsonl     one line each 1 % of the steps, for each step that was skipped, and for each candidate of the run-off
    checkpoint.pt everything needed to go on (--resume), replaced every minute
    activation.py     the result as a module of its own
    activation.json   the result; after it only search.png and search.gif
    """

    def __init__(self, config: Training, cell: Cell, resumed: Optional[dict] = None, fresh: bool = True):
        self.config, self.cell, self.folder = config, cell, Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = open(self.folder / 'log.jsonl', 'ab', buffering=0)
        try:
            self.take_folder(resumed['log_size'] if resumed else 0, fresh)
        except BaseException:
            self.log.close()
            raise
        self.started = self.printed = self.saved = self.mark = time.monotonic()
        self.seconds = resumed['seconds'] if resumed else 0.0
        self.dropped: list[str] = resumed['dropped'] if resumed else []
        self.skipped = resumed['state']['skipped'] if resumed else 0
        self.timed = 0  # steps in this process
        self.pace = {True: 0.0, False: 0.0}  # seconds a step, a running mean: in the warm start, and after it
        self.val_loss = math.nan
        self.stop = False  # set by Ctrl-C: save after the step, then stop
        self.terminal = sys.stdout.isatty()

    def take_folder(self, log_size: int, fresh: bool) -> None:
        """Keep other processes out of the run folder; cut the log to where the checkpoint was, or begin with config.json."""
        try:
            if fcntl:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
        except BlockingIOError:
            raise ConfigError(f'{self.folder}: another process is at work there; wait, or choose another --out') from None
        if fresh:
            unused(self.folder)  # once more, now that nobody else can be at it
            write_whole(self.folder / 'config.json', json_line(dataclasses.asdict(self.config), indent=1))
        if (size := self.log.tell()) < log_size:
            print(f'note: {self.folder}/log.jsonl has lost its end; the search itself goes on exactly', file=sys.stderr)
        self.log.truncate(min(size, log_size))  # what was written after the checkpoint is done again
        self.log.seek(0, os.SEEK_END)  # subtle: truncate leaves the position, which `save` asks for, where it was

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def interrupt(self, *_: Any) -> None:
        """Ctrl-C. The first one saves after the step, or the candidate of the run-off, that is under way."""
        if self.stop:
            os._exit(130)
        self.stop = True
        os.write(2, b'\nstopping as soon as this step is done and saved; Ctrl-C again: at once\n')  # print is not safe here

    def report(self, row: dict[str, Any], snapshot: Optional[Callable[[], dict]]) -> None:
        if 'refine' in row:
            if not row['refine']:
                self.save(snapshot)  # before the row is written: who resumes here writes it again
            self.write(row)
            what = f"best of {row['refine']} cells nearby" if row['refine'] else 'the descent ended with'
            self.show(f"{what}: {row['formula']}", True)
        elif 'candidate' in row:
            self.write(row)
            self.show(f"run-off, {row['runoff_steps']} steps each: validation {row['loss']:.4f}  {row['formula']}", True)
            if self.stop:
                raise KeyboardInterrupt  # saved when the round began, which begins again
        elif 'runoff' in row or 'restarting' in row:
            self.save(snapshot)
        else:
            self.dropped += row.get('dropped', [])
            step, steps = row['step'], self.config.steps
            self.clock_in(step)
            if trouble := row.pop('trouble', None):
                self.skipped += 1
                self.write({'step': step, **trouble})
            if step % max(1, steps // 100) == 0 or step == steps:
                self.progress(row)
            if self.stop or time.monotonic() - self.saved > self.config.checkpoint_every or step == steps:
                self.save(snapshot)

    def clock_in(self, step: int) -> None:
        """Keep the pace, and say after ten steps how long it will take."""
        now, warm = time.monotonic(), step <= self.config.at(self.config.warmstart)
        seconds, self.mark, self.timed = now - self.mark, now, self.timed + 1
        if self.timed > 1:  # the first step sets things up
            self.pace[warm] = 0.9 * self.pace[warm] + 0.1 * seconds if self.pace[warm] else seconds
        if self.timed == 10 and step < self.config.steps:
            self.show(f'after ten steps: about {self.left(step) / 60:.1f} minutes to go', True)

    def left(self, step: int) -> float:
        """Seconds that the search will still take: weight steps, bi-level steps, and the rounds of the run-off."""
        config, warm, both = self.config, self.pace[True], self.pace[False]
        warm, both = warm or both / BILEVEL, both or warm * BILEVEL
        cold, field, length = max(config.at(config.warmstart) - step, 0), config.runoff, config.at(config.runoff_steps)
        runoff = 0
        while field:
            runoff, field, length = runoff + (field + (field <= 4)) * length, math.ceil(field / 4) if field > 4 else 0, 2 * length
        return warm * (cold + runoff) + both * (config.steps - max(step, config.at(config.warmstart)))

    def progress(self, row: dict[str, Any]) -> None:
        """The only place where losses leave the device: once in a hundred steps."""
        step, steps = row['step'], self.config.steps
        numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}
        self.val_loss = numbers.get('val_loss', self.val_loss)
        numbers.update(temperature=self.cell.temperature, operations=self.cell.operations(), expression=self.cell.expression(), dropped=self.dropped,
                       bad=self.skipped, alpha=[[round(v, 4) for v in a.tolist()] for a in self.cell.alpha],
                       curve=[round(v, 4) for v in self.cell.curve()])
        self.dropped = []
        self.write(numbers)
        skipped = f' | {self.skipped} steps skipped, not finite: see log.jsonl' if self.skipped else ''
        pace = self.pace[step <= self.config.at(self.config.warmstart)]
        search = f"search {row['restart'] + 1} of up to {self.config.restarts}, " if self.config.restarts > 1 else ''
        val = '-' if math.isnan(self.val_loss) else f'{self.val_loss:.3f}'
        self.show(f"{search}step {step}/{steps} {100 * step // steps:3d}% | train {numbers['train_loss']:.3f} val {val} | "
                  f"{numbers['operations']} ops left | {self.cell.activation().formula}{skipped} | "
                  f"{pace:.2f} s/step | {clock(self.left(step))} left",
                  time.monotonic() - self.printed > 10 or step in (1, steps))

    def save(self, snapshot: Callable[[], dict]) -> None:
        """Replace the checkpoint, atomically: a kill leaves the old one or the new one."""
        state = {**snapshot(), 'seconds': self.elapsed(), 'log_size': self.log.tell(), 'dropped': self.dropped,
                 'config': dataclasses.asdict(self.config), 'versions': versions()}
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(self.folder / 'checkpoint.pt', content.getbuffer())
        self.saved = time.monotonic()
        if self.stop:
            raise KeyboardInterrupt

    def write(self, row: dict[str, Any]) -> None:
        write_line(self.log, json_line(row), self.folder / 'log.jsonl')

    def show(self, line: str, due: bool) -> None:
        """On a terminal one line, rewritten in place; into a pipe a plain line when it is due."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print('\r' + line[:width].ljust(width), end='', flush=True)
        elif due:
            print(line, flush=True)
            self.printed = time.monotonic()

    def finish(self, found: Activation, validation: dict[str, float], plot: bool = True) -> None:
        """Write activation.json and say what was found, where it is, and what to run next. plot: draw it as well."""
        config, folder = self.config, self.folder
        result = {'expression': found.expression, 'clip': found.clip, 'formula': found.formula,
                  'scalars': [s.item() for s in found.scalars], 'model': config.model, 'data': config.data,
                  'seed': config.seed, 'validation': validation, 'seconds': round(self.elapsed(), 1),
                  'skipped': self.skipped, 'config': dataclasses.asdict(config), 'versions': versions()}
        lines, bent = [], bend(found)
        if not bent > 0.01:  # nan for a constant
            result['warning'] = f"the function found is {'constant' if math.isnan(bent) else 'a straight line'}: " \
                                f"a network cannot learn much with it; try another --seed, or a smaller --arch-lr"
            lines.append(f"warning:     {result['warning']}")
        if config.teacher:
            result['planted'] = {'teacher': config.teacher, 'distance': distance(found.double(), named(config.teacher))}
            lines.append(f"planted:     {named(config.teacher).formula}, RMS difference "
                         f"{100 * result['planted']['distance']:.2f} % of its standard deviation")
        if not math.isfinite(validation['loss']):
            result['warning'] = 'its validation loss is not finite: nothing that was tried could be trained; try a smaller ' \
                                '--lr, a smaller --clip, or --normalise scale'
            lines.append(f"warning:     {result['warning']}")
        if self.skipped:
            lines.append(f'skipped:     {self.skipped} steps were not finite; log.jsonl says which, and why')
        short = found.float().simplified()
        result.update(simplified=short.expression, formula=short.formula, latex=short.latex)
        module = write_module(folder, config, short)
        write_whole(folder / 'activation.json', json_line(result, indent=1))
        scores = ', '.join(f'{key} {value:.4f}' for key, value in validation.items() if key != 'standard_loss')
        if 'standard_loss' in validation:
            scores += f" (trained alike, {standard_of(config.model)}: loss {validation['standard_loss']:.4f})"
        clipped = f"   with clip(y) = max(-{found.clip:g}, min({found.clip:g}, y))" if 'clip(' in short.formula else ''
        print('\n' * self.terminal + '\n'.join([
            '', f'    f(x) = {short.formula}{clipped}', '',
            *([figures.text_plot(short, named(standard_of(config.model))), ''] if plot else []),
            f'validation:  {scores}   ({clock(self.elapsed())} in all)', *lines,
            f'files:       {folder}/activation.json, {module}, log.jsonl, checkpoint.pt',
            f'next:        python evaluate.py {folder} --model {config.model}   # retrain it and compare']), flush=True)
        if plot:
            print(f'pictures:    {figures.draw(folder)}')  # last: it takes seconds, and all else is safe by now


def write_module(folder: Path, config: Training, found: Activation) -> str:
    """Write the function as activation.py, a file of its own; its name, or why there is none."""
    clip = 'none' if config.clip is None else f'{config.clip:g}'
    note = (f'Found by search.py --model {config.model} --data {config.data} --seed {config.seed} --steps {config.steps} '
            f'--clip {clip}\nas {found.expression}')
    try:
        write_whole(folder / 'activation.py', found.module(note).encode())
    except ValueError as error:  # an operation that was added without a line in CODE
        return f'no activation.py ({error})'
    return 'activation.py'


def clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def versions() -> dict[str, Any]:
    """What a result depends on besides its settings. commit: where there is git and a repository."""
    try:
        commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True,
                                check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'commit': commit,
            'threads': torch.get_num_threads(), 'machine': platform.machine()}


def read_config(folder: Path, kind: type[Training]) -> Training:
    """The settings of the run in `folder`. Raises ConfigError."""
    path = folder / 'config.json'
    try:
        content = read_json(path)
        types = get_type_hints(kind)
        if difference := types.keys() ^ content.keys():
            raise ValueError(f"{'it lacks' if difference - content.keys() else 'it has an unknown'} {min(difference)}")
        for name, value in content.items():
            kinds = {Optional[float]: (float, int, type(None)), Optional[str]: (str, type(None)), float: (float, int)}
            if isinstance(value, bool) != (types[name] is bool) or not isinstance(value, kinds.get(types[name], types[name])):
                raise ValueError(f'{name} is {str(value)[:40]!r}')
        config = kind(**content)
        config.check()
        return config
    except OSError as error:
        raise ConfigError(f'--resume {folder}: there is no run ({path}: {error.strerror})') from None
    except ValueError as error:
        raise ConfigError(f'{path} is damaged ({error}); put it back as it was, or start the search again') from None


def resume(folder: Path, kind: type[Training], given: dict[str, Any]) -> tuple[Training, Optional[dict[str, Any]]]:
    """The configuration of the run in `folder`, and its checkpoint if it wrote one. Raises ConfigError."""
    config = read_config(folder, kind)
    same = {'device': choose_device, 'out': lambda out: config.out if Path(out).resolve() == folder.resolve() else out}
    contradicted = [f"--{name.replace('_', '-')} {value} (the run has {getattr(config, name)})"
                    for name, value in given.items()
                    if same.get(name, lambda value: value)(value) != getattr(config, name)]
    if contradicted:
        raise ConfigError(f"--resume {folder} goes on with the run's own settings, not with {', '.join(contradicted)}")
    choose_device(config.device)
    path = folder / 'checkpoint.pt'
    begun = dataclasses.asdict(config)
    if Path(config.out).resolve() != folder.resolve():
        config.out = str(folder)  # it was moved
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about files that are something else: that is said below
            checkpoint = torch.load(path, map_location=config.device, weights_only=True)
        kinds = {'state': dict, 'model': dict, 'seconds': float, 'log_size': int, 'dropped': list, 'config': dict,
                 'versions': dict, 'random': Tensor}
        if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint[name], kind) for name, kind in kinds.items()):
            raise TypeError('it is something else')
        checkpoint['state']['step'] + checkpoint['state']['skipped']
    except FileNotFoundError:
        return config, None  # killed before the first checkpoint: from the start, which is exact as well
    except Exception as error:  # torch.load raises a dozen kinds on files that are something else
        raise ConfigError(f'{path} is damaged ({type(error).__name__}); start the search again with another --out') from None
    if {**checkpoint['config'], 'out': ''} != {**begun, 'out': ''}:
        raise ConfigError(f'{path} and {folder}/config.json are of different runs; put the right one back, or start the '
                          f'search again with another --out')
    for name, value in versions().items():
        if (then := checkpoint['versions'].get(name)) != value:
            print(f'note: {name} was {then} and is {value}; the search goes on, perhaps not to the last bit', file=sys.stderr)
    return config, checkpoint


def plan(config: Training, model: nn.Module, cell: Cell, needed: int, resumed: bool) -> str:
    """What is about to happen, in words, before it does."""
    weights, space = sum(p.numel() for p in model.parameters()), math.prod(map(len, cell.ops))
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) if resource else 0
    return (f"{'going on with the search of' if resumed else 'searching'} {space:,} functions for {config.model} ({weights:,} "
            f"weights, {cell.sites} site{'s' * (cell.sites != 1)}) on {config.data}\n"
            f"plan: {config.steps} steps ({config.at(config.warmstart)} of warm start), a run-off of {config.runoff} on "
            f"{config.device}; peak memory about {(now + needed) / 1e9:.1f} GB; run folder {config.out}")

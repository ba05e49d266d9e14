"""Bad input: one clear line that names the file or option and the mend, exit code 2, no traceback, nothing lost."""
import hashlib
import io
import json
import math
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import download
import evaluate
import search

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {'search': search.main, 'evaluate': evaluate.main}


@pytest.fixture
def no_training(monkeypatch):
    """What should be refused fails at once when it is not, rather than train for minutes."""
    def ran(*_):
        raise AssertionError('it was not refused')
    monkeypatch.setattr(search.Run, 'report', ran)
    monkeypatch.setattr(evaluate, 'weight_optimizer', ran)


def files(folder: Path) -> dict[str, str]:
    """What lies in a folder: every path, and a checksum of each file."""
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else 'folder'
            for path in sorted(folder.rglob('*'))}


def refused(program: str, arguments: list[str], capsys, code: int = 2) -> str:
    """Run the program; it must end with this code and one line on standard error. Returns that line."""
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program]([str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(('warning: ', 'note: '))]
    assert ended.value.code == code
    assert len(lines) == 1 and len(lines[0]) < 620 and lines[0].startswith('error: '), lines
    return lines[0]


# -- numbers that cannot be

NUMBERS = {
    'search': 'steps batch-size accumulate context points seed runoff lr lr-end warmup weight-decay dropout grad-clip arch-lr '
              'arch-weight-decay warmstart shrink-from shrink-until clip runoff-steps checkpoint-every drops temperature start '
              'refine restarts target runoff-mutants runoff-batches',
    'evaluate': 'steps batch-size accumulate context lr lr-end warmup weight-decay dropout grad-clip drops random seeds'}


@pytest.mark.parametrize('program, option', [(program, option) for program, names in NUMBERS.items()
                                             for option in names.split()])
def test_impossible_numbers(program, option, no_training, tmp_path, monkeypatch, capsys):
    """Every number of every program refuses what no number of its kind can be, by its name, before anything is written."""
    monkeypatch.chdir(tmp_path)
    for value in ('nan', '-inf', '-1', '1e30', '9' * 400, '1,5', 'ten', ''):
        if option in ('drops', 'random') and value == '':
            continue  # no drops
        assert f'--{option}' in refused(program, [f'--{option}={value}'], capsys), value
    assert files(tmp_path) == {}


@pytest.mark.parametrize('option', ['steps', 'batch-size', 'accumulate', 'context', 'points', 'clip'])
def test_zero(option, no_training, tmp_path, monkeypatch, capsys):
    """0 is refused where there must be at least one."""
    monkeypatch.chdir(tmp_path)
    assert f'--{option}' in refused('search', [f'--{option}', '0'], capsys)


# -- the table: (program, what to put into the folder, arguments, words that the line must hold)

def write(name: str, content) -> callable:
    def build(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return build


def both(*builders) -> callable:
    return lambda folder: [builder(folder) for builder in builders]


def nothing(folder: Path) -> None:
    pass


DEEP = b'[' * 10_000 + b']' * 10_000
DEEP_OBJECT = b'{"expression":' * 10_000 + b'1' + b'}' * 10_000
HUGE = b'{"expression": "' + b'x' * 5_000_000 + b'"}'
LATIN = b'{"expression": "\xe9\xff"}'
CONFIG = json.dumps({**vars(search.configure(search.Config, search.PRESETS, {'model': 'toy', 'device': 'cpu'}))})


def config(**changes) -> callable:
    """A config.json of a toy search with some entries changed; None takes an entry out."""
    content = {key: value for key, value in {**json.loads(CONFIG), **changes}.items() if value != 'take it out'}
    return write('run/config.json', json.dumps(content))


class Code:
    """A pickle that runs a command when it is loaded by pickle.load."""
    def __reduce__(self):
        return os.system, ('touch pwned',)


def checkpoint(content) -> callable:
    def build(folder: Path) -> None:
        config()(folder)
        if isinstance(content, bytes):
            (folder / 'run' / 'checkpoint.pt').write_bytes(content)
        else:
            torch.save(content, folder / 'run' / 'checkpoint.pt')
    return build


def activation(**changes) -> callable:
    return write('a.json', json.dumps({'expression': 'relu(x)', 'clip': 10.0, **changes}))


def cifar(labels: int = 1, label: int = 3, records: int = 5, cut: int = 0) -> bytes:
    raw = (bytes([label] * labels) + bytes(3072)) * records
    return raw[:len(raw) - cut]


def cifar_folder(**odd) -> callable:
    """CIFAR-10 of five images a file, all files good but the odd one."""
    def build(folder: Path) -> None:
        for name in data.CIFAR10_FILES:
            write(f'd/{name}', odd.get(name.split('.')[0], cifar()))(folder)
    return build


def archive(*members: tarfile.TarInfo) -> callable:
    def build(folder: Path) -> None:
        (folder / 'd').mkdir()
        with tarfile.open(folder / 'd' / 'cifar-10-binary.tar.gz', 'w:gz') as tar:
            for member in members:
                tar.addfile(member, io.BytesIO(b'x' * member.size))
    return build


def member(name: str, link: str = '', size: int = 10) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = (tarfile.SYMTYPE, link, 0) if link else (tarfile.REGTYPE, '', size)
    return info


def svhn(x, y) -> callable:
    def build(folder: Path) -> None:
        savemat = pytest.importorskip('scipy.io').savemat
        (folder / 'd').mkdir()
        for part in ('train', 'test'):
            savemat(folder / 'd' / f'{part}_32x32.mat', {'X': x, 'y': y})
    return build


PIXELS = np.zeros((32, 32, 3, 4), np.uint8)
HTML = b'<!DOCTYPE html><html><body>404 Not Found</body></html>'
CIFAR, TEXT, SVHN = (['--model', model, '--data', name, '--data-dir', 'd', '--steps', '20'] for model, name in (
    ('resnet20', 'cifar10'), ('minigpt', 'tinystories'), ('resnet20', 'svhn')))
RESUME = ['--resume', 'run']
NO_LEDGER = ['--report', 'l.jsonl']
ROW = {'name': 'relu', 'expression': 'relu(x)', 'clip': None, 'searched': '', 'seed': 0, 'diverged': False, 'curve': [],
       'ms_step': 1.0, 'mb_kept': 1.0, 'test_loss': 1.0, 'test_accuracy': 0.5, 'train_loss': 1.0,
       'settings': {'model': 'toy', 'data': 'cifar10_16', 'steps': 5, 'batch_size': 2, 'accumulate': 1, 'lr': 0.1}}


def ledger(**changes) -> callable:
    return write('l.jsonl', json.dumps({**ROW, **changes}) + '\n')


TABLE = {
    # options
    'unknown option': ('search', nothing, ['--stpes', '30'], ['--stpes', 'did you mean --steps?']),
    'unknown option of the other program': ('search', nothing, ['--seeds', '3'], ['--seeds', '--seed']),
    'unknown option, evaluate': ('evaluate', nothing, ['relu', '--baseline', 'elu'], ['did you mean --baselines?']),
    'abbreviated option': ('search', nothing, ['--warm', '3'], ["unknown option '--warm'"]),
    'stray word': ('search', nothing, ['resnet20'], ["unknown option 'resnet20'"]),
    'option without its value': ('search', nothing, ['--model'], ['--model', 'expected one argument']),
    'unknown model': ('search', nothing, ['--model', 'resnet21'], ['resnet21', 'did you mean resnet20?']),
    'unknown data': ('search', nothing, ['--data', 'cifar11'], ['cifar11', 'did you mean cifar10']),
    'unknown preset': ('evaluate', nothing, ['--preset', 'papre'], ['did you mean paper?']),
    'unknown device': ('search', nothing, ['--device', 'cdua'], ['did you mean cuda?']),
    'unknown operation': ('search', nothing, ['--ops', 'base,-sinhh'], ['did you mean sinh?']),
    'hostile operation': ('search', nothing, ['--ops', '__import__("os")'], ['--ops', 'sets: base']),
    'no operation': ('search', nothing, ['--ops', ','], ['no unary operation']),
    'unknown sampler': ('search', nothing, ['--sampler', 'men'], ['did you mean mean?']),
    'text model on images': ('search', nothing, ['--model', 'minigpt', '--data', 'cifar10_16'], ['minigpt reads text']),
    'hostile teacher': ('search', nothing, ['--model', 'toy', '--teacher', '__import__("os").system("touch pwned")'],
                        ['unexpected', 'character']),
    'batch beyond the data': ('search', nothing, ['--batch-size', '100000'], ['--batch-size 100000', '3750']),
    'batch beyond memory': ('search', nothing, ['--model', 'minigpt', '--batch-size', '10000000'],
                            ['--batch-size 10000000', 'GB are free', '--accumulate']),
    'batch beyond memory, evaluate': ('evaluate', nothing, ['--model', 'minigpt', '--batch-size', '10000000'],
                                      ['GB are free', '--accumulate']),
    'window beyond the blocks': ('search', nothing, ['--model', 'minigpt', '--context', '5000'], ['--context 5000', '4095']),
    'steps out of order': ('search', nothing, ['--warmstart', '0.9'], ['--warmstart', '--shrink-from', 'order']),
    'no seeds': ('evaluate', nothing, ['--seeds', '5:5'], ["--seeds '5:5'"]),
    'unknown activation': ('evaluate', nothing, ['silo'], ['did you mean silu?']),
    'hostile expression': ('evaluate', nothing, ['__import__("os").system("touch pwned")'], ['unexpected']),
    'deep expression': ('evaluate', nothing, ['tanh(' * 10_000 + 'x' + ')' * 10_000], ['the limit is 10000']),
    'unknown baseline': ('evaluate', nothing, ['--baselines', 'relu,gulu'], ['did you mean gelu?']),
    'unknown reference': ('evaluate', nothing, ['--against', 'gulu'], ['did you mean gelu?']),
    'empty card': ('evaluate', nothing, ['--card', ''], ['expected x or an operation']),
    # where to write
    'run folder below a file': ('search', write('f', 'x'), ['--model', 'toy', '--out', 'f/run'], ['f/run', 'Not a directory']),
    'run folder is a file': ('search', write('f', 'x'), ['--model', 'toy', '--out', 'f'], ['f', 'choose another']),
    'run folder in use': ('search', config(), ['--model', 'toy', '--out', 'run'], ['run holds a run already', '--resume run']),
    'result without its settings': ('search', write('run/activation.json', '{}'), ['--model', 'toy', '--out', 'run'],
                                    ['run holds a run already']),
    'run folder that cannot be': ('search', nothing, ['--model', 'toy', '--out', '/proc/run'], ['/proc/run', 'choose another']),
    'ledger below a file': ('evaluate', write('f', 'x'), ['--out', 'f/l.jsonl', '--model', 'toy'], ['f', '--out']),
    'ledger is a folder': ('evaluate', write('d/x', 'x'), ['--out', 'd', '--model', 'toy'], ['d', 'Is a directory']),
    'figures below a file': ('evaluate', both(write('f', 'x'), ledger()), [*NO_LEDGER, '--figures', 'f/g'], ['f', 'Not a dir']),
    # config.json
    'no run': ('search', nothing, RESUME, ['there is no run', 'run/config.json']),
    'no run named': ('search', nothing, ['--resume', ''], ['there is no run']),
    'config empty': ('search', write('run/config.json', ''), RESUME, ['run/config.json is damaged']),
    'config cut': ('search', write('run/config.json', CONFIG[:200]), RESUME, ['run/config.json is damaged']),
    'config a list': ('search', write('run/config.json', '[1]'), RESUME, ['run/config.json is damaged']),
    'config not UTF-8': ('search', write('run/config.json', LATIN), RESUME, ['run/config.json', 'UTF-8']),
    'config deep': ('search', write('run/config.json', DEEP), RESUME, ['run/config.json', 'nested too deep']),
    'config huge': ('search', write('run/config.json', HUGE), RESUME, ['run/config.json', 'larger than']),
    'config a folder': ('search', write('run/config.json/x', ''), RESUME, ['run/config.json', 'Is a directory']),
    'config with NaN': ('search', write('run/config.json', CONFIG.replace('"lr": 0.03', '"lr": NaN')), RESUME, ['finite']),
    'config with 1e999': ('search', write('run/config.json', CONFIG.replace('"lr": 0.03', '"lr": 1e999')), RESUME, ['finite']),
    'config lacks an entry': ('search', config(steps='take it out'), RESUME, ['it lacks steps']),
    'config of something else': ('search', config(stepz=1), RESUME, ['unknown stepz']),
    'config with a text for a number': ('search', config(steps='many'), RESUME, ["steps is 'many'"]),
    'config with a number for a switch': ('search', config(warm_alphas=1), RESUME, ['warm_alphas']),
    'config with a switch for a number': ('search', config(steps=True), RESUME, ['steps']),
    'config with impossible steps': ('search', config(steps=-5), RESUME, ['--steps -5']),
    'config of another machine': ('search', config(device='cuda'), RESUME, ['no cuda']),
    'config swapped with a result': ('search', both(activation(), lambda f: (f / 'run').mkdir(),
                                                    lambda f: (f / 'a.json').rename(f / 'run/config.json')), RESUME, ['damaged']),
    'options that contradict': ('search', config(), [*RESUME, '--steps', '70', '--seed', '4'], ['--steps 70', '--seed 4']),
    'another folder that contradicts': ('search', config(), [*RESUME, '--out', 'b'], ['--out b']),
    # checkpoint.pt
    'checkpoint empty': ('search', checkpoint(b''), RESUME, ['run/checkpoint.pt is damaged', '--out']),
    'checkpoint text': ('search', checkpoint(b'hello'), RESUME, ['run/checkpoint.pt is damaged']),
    'checkpoint with code': ('search', checkpoint(pickle.dumps(Code())), RESUME, ['run/checkpoint.pt is damaged']),
    'checkpoint zipped with code': ('search', checkpoint({'state': Code()}), RESUME, ['run/checkpoint.pt is damaged']),
    'checkpoint a list': ('search', checkpoint([1, 2]), RESUME, ['run/checkpoint.pt is damaged']),
    'checkpoint a tensor': ('search', checkpoint(torch.ones(3)), RESUME, ['run/checkpoint.pt is damaged']),
    'checkpoint of something else': ('search', checkpoint({'state': {}, 'model': {}}), RESUME, ['damaged (KeyError)']),
    # activation.json
    'result missing': ('evaluate', nothing, ['a.json'], ['cannot read a.json']),
    'result of an unfinished run': ('evaluate', config(), ['run'], ['run/activation.json', 'finished search']),
    'result empty': ('evaluate', write('a.json', ''), ['a.json'], ['a.json is not']),
    'result cut': ('evaluate', write('a.json', '{"expression": "relu(x'), ['a.json'], ['a.json is not']),
    'result a list': ('evaluate', write('a.json', '[]'), ['--card', 'a.json'], ['a.json is not']),
    'result not UTF-8': ('evaluate', write('a.json', LATIN), ['a.json'], ['a.json', 'UTF-8']),
    'result deep': ('evaluate', write('a.json', DEEP_OBJECT), ['a.json'], ['a.json', 'nested too deep']),
    'result huge': ('evaluate', write('a.json', HUGE), ['a.json'], ['a.json', 'larger than']),
    'result with NaN': ('evaluate', write('a.json', '{"expression": "x", "clip": NaN}'), ['a.json'], ['a.json', 'finite']),
    'result without an expression': ('evaluate', write('a.json', '{"clip": 1}'), ['a.json'], ["lacks 'expression'"]),
    'result without a clip': ('evaluate', write('a.json', '{"expression": "x"}'), ['a.json'], ["lacks 'clip'"]),
    'result with a number': ('evaluate', activation(expression=7), ['a.json'], ['a.json', 'must be a text']),
    'result with code': ('evaluate', activation(expression='__import__("os").system("touch pwned")'), ['a.json'],
                         ['unexpected']),
    'result with a deep expression': ('evaluate', activation(expression='tanh(' * 99 + 'x' + ')' * 99), ['a.json'],
                                      ['too large']),
    'result with a negative clip': ('evaluate', activation(clip=-1), ['a.json'], ['a.json', 'clip']),
    'result with a text for a clip': ('evaluate', activation(clip='ten'), ['a.json'], ['a.json', 'clip']),
    'result swapped with a ledger': ('evaluate', both(ledger(), lambda f: (f / 'l.jsonl').rename(f / 'a.json'),
                                                      lambda f: write('a.json', (f / 'a.json').read_bytes() * 2)(f)), ['a.json'],
                                     ['a.json is not']),
    # ledgers
    'ledger missing': ('evaluate', nothing, NO_LEDGER, ['cannot read l.jsonl']),
    'ledger empty': ('evaluate', write('l.jsonl', ''), NO_LEDGER, ['no runs in l.jsonl']),
    'ledger not UTF-8': ('evaluate', write('l.jsonl', b'\xff\xfe\n' * 5), NO_LEDGER, ['no runs in l.jsonl']),
    'ledger deep': ('evaluate', write('l.jsonl', DEEP), NO_LEDGER, ['no runs in l.jsonl']),
    'ledger with NaN': ('evaluate', ledger(test_loss=math.nan), NO_LEDGER, ['no runs in l.jsonl']),
    'ledger with infinity': ('evaluate', write('l.jsonl', json.dumps(ROW).replace('"test_loss": 1.0', '"test_loss": 1e999')),
                             NO_LEDGER, ['no runs in l.jsonl']),
    'ledger without settings': ('evaluate', ledger(settings={}), NO_LEDGER, ['no runs in l.jsonl']),
    'ledger with texts for numbers': ('evaluate', ledger(test_loss='low'), NO_LEDGER, ['no runs in l.jsonl']),
    'ledger with a list for a name': ('evaluate', ledger(name=[1]), NO_LEDGER, ['no runs in l.jsonl']),
    'ledger that writes on the terminal': ('evaluate', ledger(name='\x1b[2Jrelu'), NO_LEDGER, ['no runs in l.jsonl']),
    'ledger swapped with a log': ('evaluate', write('l.jsonl', '{"step": 1, "train_loss": 2.0}\n'), NO_LEDGER, ['no runs in']),
    # data
    'no data folder': ('search', nothing, CIFAR, ['--data-dir d', 'no such folder']),
    'data folder a file': ('search', write('d', 'x'), CIFAR, ['--data-dir d', 'no such folder']),
    'data folder empty': ('evaluate', write('d/x', ''), CIFAR, ['d holds neither', 'cifar-10-binary.tar.gz']),
    'images cut': ('search', cifar_folder(data_batch_3=cifar(cut=100)), CIFAR, ['data_batch_3.bin', 'truncated']),
    'images empty': ('search', cifar_folder(test_batch=b''), CIFAR, ['test_batch.bin', 'truncated']),
    'images of another set': ('search', cifar_folder(data_batch_1=cifar(labels=2)), CIFAR, ['data_batch_1.bin']),
    'label out of range': ('search', cifar_folder(data_batch_2=cifar(label=200)), CIFAR, ['data_batch_2.bin', 'label 200']),
    'file full of zeros': ('search', cifar_folder(data_batch_5=cifar(label=0, records=1000)), CIFAR, ['data_batch_5.bin', 'all']),
    'HTML for images': ('evaluate', cifar_folder(data_batch_1=HTML), CIFAR, ['data_batch_1.bin']),
    'a batch missing': ('search', both(cifar_folder(), lambda f: (f / 'd/data_batch_4.bin').unlink()), CIFAR,
                        ['lacks data_batch_4.bin']),
    'archive that is none': ('search', write('d/cifar-10-binary.tar.gz', HTML), CIFAR, ['cifar-10-binary.tar.gz', 'checksum']),
    'stories empty': ('search', write('d/TinyStories.txt', ''), TEXT, ['d/TinyStories.txt', 'fetch it again']),
    'stories that are HTML': ('evaluate', write('d/TinyStories.txt', HTML), TEXT, ['d/TinyStories.txt', 'fetch it again']),
    'stories too short': ('search', write('d/TinyStories.txt', f'One.\n{data.END}\n' * 9), TEXT, ['d/TinyStories.txt', 'too few']),
    'one story': ('search', write('d/TinyStories.txt', 'a' * 9000 + data.END), TEXT, ['d/TinyStories.txt', 'one story']),
    'no stories': ('search', write('d/x', ''), TEXT, ['d lacks TinyStoriesV2']),
    'half the stories': ('search', write('d/TinyStoriesV2-GPT4-train.txt', f'a\n{data.END}\n'), TEXT, ['GPT4-valid.txt']),
    'matrix that is HTML': ('search', write('d/train_32x32.mat', HTML), SVHN, ['train_32x32.mat is not']),
    'matrix empty': ('evaluate', write('d/train_32x32.mat', ''), SVHN, ['train_32x32.mat is not']),
    'matrix missing': ('search', write('d/x', ''), SVHN, ['cannot read d/train_32x32.mat']),
    'matrix of another shape': ('search', svhn(PIXELS[:16], np.ones((4, 1), np.uint8)), SVHN, ['train_32x32.mat', '32 x 32']),
    'matrix with label 0': ('search', svhn(PIXELS, np.array([0, 1, 2, 3], np.uint8)), SVHN, ['labels from 1 to 10']),
    'matrix with NaN labels': ('search', svhn(PIXELS, np.array([1, math.nan, 2, 3])), SVHN, ['train_32x32.mat']),
}


@pytest.mark.parametrize('case', TABLE)
def test_bad_input(case, no_training, tmp_path, monkeypatch, capsys):
    """One line that says what is wrong and where, exit code 2, and what was there stays as it was: no file more or less."""
    if case.startswith('figures'):
        pytest.importorskip('matplotlib')  # without it there is nothing to write
    program, build, arguments, words = TABLE[case]
    if '.mat' in ' '.join(words):
        pytest.importorskip('scipy')
    monkeypatch.chdir(tmp_path)
    build(Path())
    before = files(tmp_path)
    line = refused(program, arguments, capsys)
    for word in words:
        assert word in line
    assert files(tmp_path) == before


@pytest.mark.parametrize('members', [
    [member('../../pwned'), member('/tmp/pwned-by-tar')],
    [member(f'cifar-10-batches-bin/{name}', link='/etc/passwd') for name in data.CIFAR10_FILES],
    [member(f'cifar-10-batches-bin/{name}', link='../../../secret') for name in data.CIFAR10_FILES],
    []], ids=['traversal', 'absolute links', 'relative links', 'empty'])
def test_hostile_archive(members, no_training, tmp_path, monkeypatch, capsys):
    """An archive, even one with the right checksum, is read member by member: no path or link in it leads anywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'secret').write_bytes(cifar())
    archive(*members)(tmp_path)
    path = tmp_path / 'd' / 'cifar-10-binary.tar.gz'
    monkeypatch.setitem(data.SOURCES, 'cifar10', [(data.SOURCES['cifar10'][0][0], download.md5_of(path))])
    before = files(tmp_path)
    assert 'cifar-10-binary.tar.gz is damaged' in refused('search', CIFAR, capsys)
    assert files(tmp_path) == before and not Path('/tmp/pwned-by-tar').exists()

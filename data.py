"""The data sets, from the publishers' files to batches.

    load('cifar10', 'folder', side=16)             from files that are there; without a folder: downloaded
    python data.py make-samples --data-dir FOLDER  makes the built-in samples/ out of the full sets

A data set lives in memory as tensors; a batch is an index into them: there are no worker processes.
"""
import argparse
import hashlib
import io
import os
import sys
import tarfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Union

import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch import Tensor

from ops import check_choice

SAMPLES, DOWNLOADS = (Path(__file__).resolve().parent / folder for folder in ('samples', 'downloads'))
END = b'<|endoftext|>'  # between two stories; in the tensors it is one byte 0, or GPT-2's token 50256
BLOCK = 4096            # a text is shuffled in blocks of so many tokens; no window spans two of them
Part = Union[tuple[Tensor, Tensor], Tensor]


class Source(NamedTuple):
    """What is published. layouts: names of training files and test file; the first complete one is read."""
    kind: str
    layouts: tuple[tuple[str, ...], ...]
    addresses: dict[str, Optional[str]] = {}  # and the MD5 of what is there; no address: built in
    classes: int = 10
    labels: int = 1                           # bytes of label before each image, of which the last counts
    side: int = 32
    mirror: bool = True                       # whether an image may be mirrored: a digit may not
    images: int = 60_000


CIFAR, SVHN = 'https://www.cs.toronto.edu/~kriz/cifar-', 'http://ufldl.stanford.edu/housenumbers/'
STORIES = 'https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-'
SOURCES = {
    'cifar10_16': Source('image', (('cifar10_16_train.bin', 'cifar10_16_test.bin'),), side=16, images=6_000),
    'tinystories_sample': Source('text', (('tinystories_sample_train.txt', 'tinystories_sample_test.txt'),)),
    'cifar10': Source('image', ((*(f'data_batch_{k}.bin' for k in range(1, 6)), 'test_batch.bin'),), {
        CIFAR + '10-binary.tar.gz': 'c32a1d4ab5d03f1284b67883e8d87530'}),
    'cifar100': Source('image', (('train.bin', 'test.bin'),), {
        CIFAR + '100-binary.tar.gz': '03b5dce01913d631647c71ecec9e9cb8'}, classes=100, labels=2),
    'svhn': Source('image', (('train_32x32.mat', 'test_32x32.mat'),), {
        SVHN + 'train_32x32.mat': 'e26dedcc434d2e4c54c9b2d4a06d8373',
        SVHN + 'test_32x32.mat': 'eb5a983be6a315427106f1b164d9cef3'}, mirror=False, images=99_289),
    'tinystories': Source('text', (('TinyStoriesV2-GPT4-train.txt', 'TinyStoriesV2-GPT4-valid.txt'),
                                   ('TinyStories.txt',), ('TinyStories-train.txt', 'TinyStories-valid.txt')),
                          {STORIES + 'train.txt': None, STORIES + 'valid.txt': None}),
}
DATA, KIND = tuple(SOURCES), {name: source.kind for name, source in SOURCES.items()}


@dataclass
class Dataset:
    """kind 'image': train and test are (pixels uint8 (n, channels, side, side), labels int64 (n,)).
    kind 'text': train and test are integer tokens (length,), classes is the size of the vocabulary."""
    name: str
    kind: str
    train: Part
    test: Part
    classes: int
    channels: int = 0
    side: int = 0
    mirror: bool = False

    @cached_property
    def digest(self) -> str:
        """CRC-32 of the training and test data: the same for the same data, in whatever files it came."""
        crc = 0
        for tensor in (*self.train, *self.test) if self.kind == 'image' else (self.train, self.test):
            crc = zlib.crc32(tensor.contiguous().numpy(), crc)
        return f'{crc:08x}'

    @cached_property
    def normal(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by channel of the training pixels (0 to 255), each (channels, 1, 1)."""
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.train[0].unbind(1)])
        share, level = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double()
        mean = share @ level
        std = (share @ level.square() - mean.square()).clamp(min=1.0).sqrt()
        return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def load(name: str, data_dir: Optional[str] = None, tokens: str = 'bytes',
         side: Optional[int] = None) -> Dataset:
    """The data set `name`, one of DATA. ValueError for options that do not fit and data that cannot be read.

    data_dir: the folder of its files or its archive, or the path of one; None: built in, or downloaded.
    tokens: of a text, 'bytes' (vocabulary 256) or 'gpt2' (needs the package tiktoken).
    side: of images, 16 averages 32x32 pixels 2x2.
    """
    check_choice('--data', name, DATA)
    check_choice('--tokens', tokens, ('bytes', 'gpt2'))
    source, text = SOURCES[name], KIND[name] == 'text'
    if side is not None and (text or side not in (16, source.side)):
        has = 'is a text' if text else f'has images of side {source.side}' + ' or 16' * (source.side == 32)
        raise ValueError(f'--side {side}: {name} {has}; leave the option out')
    if tokens != 'bytes' and not text:
        raise ValueError(f'--tokens {tokens}: {name} has images; leave the option out')
    if data_dir is not None and not source.addresses:
        full = '--data tinystories' if text else '--data cifar10 --side 16'
        raise ValueError(f'--data-dir {data_dir} would be ignored: {name} is built in; the full set: {full}')
    try:
        files = find(name, data_dir)
    except OSError as error:
        raise ValueError(f'cannot read {error.filename or data_dir}: {error.strerror or error}') from None
    if text:
        return text_dataset(name, files, tokens)
    parts = [svhn(*file) if name == 'svhn' else images(*file, source) for file in files]
    if (n := sum(len(y) for _, y in parts)) != source.images:
        print(f'note: {files[0][0]}: {n:,} of the {source.images:,} images of {name}', file=sys.stderr)
    if side == 16 != source.side:
        parts = [(F.avg_pool2d(x.float(), 2).round().byte(), y) for x, y in parts]
    train = tuple(torch.cat(tensors) for tensors in zip(*parts[:-1]))
    return Dataset(name, 'image', train, parts[-1], source.classes, 3, side or source.side, source.mirror)


def download(address: str, path: Path, md5: Optional[str]) -> None:
    """Fetch `address` to `path` unless it is there; ValueError when it does not arrive whole. subtle: it is
    written under a name of its own, checked, and renamed, so that two processes may do it at once."""
    if path.exists():
        return
    part = path.with_name(f'{path.name}.{os.urandom(4).hex()}.part')
    got, digest, plain = 0, hashlib.md5(usedforsecurity=False), {'Accept-Encoding': 'identity'}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with requests.get(address, stream=True, timeout=30, headers=plain) as answer, part.open('wb') as file:
            answer.raise_for_status()
            for chunk in answer.iter_content(1 << 20):
                got += file.write(chunk)
                digest.update(chunk)
                if sys.stderr.isatty():
                    print(f'\rdownloading {path.name}: {got / 1e6:.0f} MB ', end='', file=sys.stderr)
        if md5 not in (None, digest.hexdigest()):
            raise OSError(f'wrong checksum, expected {md5}, got {digest.hexdigest()}')
        os.replace(part, path)
    except OSError as error:  # the errors of requests are OSErrors too
        broken = isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError))
        why = f'no connection, or it broke after {got} bytes' if broken else error
        raise ValueError(f'cannot fetch {address} into {path.parent}: {why}; try again, or get it elsewhere '
                         f'for --data-dir; cifar10_16 and tinystories_sample are built in') from None
    finally:
        part.unlink(missing_ok=True)


def find(name: str, data_dir: Optional[str]) -> list[tuple[str, bytes]]:
    """(path, contents) of the training files and the test file, in a folder, a subfolder, or an archive."""
    source, place = SOURCES[name], SAMPLES
    if data_dir is not None:
        place = Path(os.path.expanduser(data_dir))
        if not place.exists():
            raise ValueError(f'--data-dir {data_dir}: there is no such folder or file')
    elif source.addresses:
        place = DOWNLOADS
        for address, md5 in source.addresses.items():
            download(address, place / address.rsplit('/', 1)[1], md5)
    if place.is_file() and source.kind == 'text':
        return [(str(place), place.read_bytes())]
    place = place.parent if place.is_file() else place
    paths = [*sorted(place.glob('*/*')), *sorted(place.iterdir())]
    files = {path.name.lower(): path for path in paths}  # copies differ in upper and lower case
    found = [layout for layout in source.layouts if all(file.lower() in files for file in layout)]
    if len(found) > 1:
        print(f"note: {place} has {len(found)} versions; {' and '.join(found[0])} used", file=sys.stderr)
    if found:
        return [(str(files[file.lower()]), files[file.lower()].read_bytes()) for file in found[0]]
    address = ' and '.join(source.addresses) or 'a fresh copy of this program'
    archive = address.rsplit('/', 1)[-1] if address.endswith('.gz') else ''
    if archive in files:
        path, md5, raw = files[archive], source.addresses[address], files[archive].read_bytes()
        if (got := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != md5:
            raise ValueError(f'{path}: wrong checksum, expected {md5}, got {got}; fetch {address}')
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:  # nothing is unpacked: names in it can do no harm
            members = {member.name.rsplit('/', 1)[-1]: member for member in tar}
            return [(f'{path}/{file}', tar.extractfile(members[file]).read()) for file in source.layouts[0]]
    lacks = ', '.join(file for file in source.layouts[0] if file.lower() not in files)
    others = [' and '.join(layout) for layout in source.layouts[1:]] + [archive] * bool(archive)
    if archive and any('-py' in file or file.endswith('meta') for file in (place.name, *files)):
        others[-1] += ' (the python version is in pickles, which can run any code and are never read)'
    raise ValueError(f"{place} lacks {', or '.join([lacks, *others])}; get {name} from {address}")


def images(what: str, raw: bytes, source: Source) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a file of records: label bytes, then pixel bytes, colour by colour."""
    size = source.labels + 3 * source.side ** 2
    if not raw or len(raw) % size:
        raise ValueError(f'{what}: {len(raw)} bytes are not records of {size}: truncated, or another file')
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, size)
    y = records[:, source.labels - 1].long()
    if y.max() >= source.classes or len(y) >= 1000 and y.min() == y.max():
        raise ValueError(f'{what}: labels {y.min()} to {y.max()} of {source.classes}: damaged, or another')
    return records[:, source.labels:].reshape(-1, 3, source.side, source.side), y


def svhn(what: str, raw: bytes) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a .mat file: X is (row, column, colour, image), label 10 is the digit 0."""
    try:
        from scipy.io import loadmat
        content = loadmat(io.BytesIO(raw), variable_names=['X', 'y'])
        x, y = content['X'].transpose(3, 2, 0, 1), content['y'].reshape(-1).astype(np.int64)
        if x.dtype != np.uint8 or x.shape != (len(y), 3, 32, 32) or not 1 <= y.min() <= y.max() <= 10:
            raise ValueError('X must be 32 x 32 x 3 x n bytes, and y n labels from 1 to 10')
    except ImportError:
        raise ValueError('--data svhn comes in .mat files: pip install scipy to read them') from None
    except Exception as error:  # loadmat raises a dozen kinds for other and damaged files
        why = str(error).partition('\n')[0]
        raise ValueError(f'{what} is no .mat file of SVHN, or damaged ({why}); get it again') from None
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y % 10)


def stories(raw: bytes) -> list[bytes]:
    """The stories of a text: the same for all line ends, byte order marks, and blanks around separators."""
    raw = raw.decode('utf-16', 'replace').encode() if raw[:2] in (b'\xff\xfe', b'\xfe\xff') else raw
    raw = raw.removeprefix(b'\xef\xbb\xbf').replace(b'\r\n', b'\n').replace(b'\r', b'\n').rstrip()
    return [s.strip(b' \t').removeprefix(b'\n').removesuffix(b'\n') for s in raw.split(END) if s.strip()]


def text_dataset(name: str, files: list[tuple[str, bytes]], tokens: str) -> Dataset:
    """From a training and a test file; of a single file the last twentieth is the test text."""
    texts, classes = [stories(raw) for _, raw in files], 256
    if len(texts) == 1:
        lines = b''.join(story + b'\n' + END + b'\n' for story in texts[0])
        cut = lines.count(END, 0, len(lines) * 19 // 20)
        texts = [texts[0][:cut], texts[0][cut:]]
    if tokens == 'bytes':
        parts = [torch.frombuffer(bytearray(b'\0'.join(text) + b'\0'), dtype=torch.uint8) for text in texts]
    else:
        try:
            import tiktoken
            encoding = tiktoken.get_encoding('gpt2')  # fetches its vocabulary the first time
        except (ImportError, OSError) as error:
            raise ValueError(f'--tokens gpt2 needs the package tiktoken, and a network the first time '
                             f'({type(error).__name__}); or use --tokens bytes') from None
        classes, parts = encoding.n_vocab, []
        for text in texts:
            coded = encoding.encode_ordinary_batch([story.decode('utf-8', 'replace') for story in text])
            ended = [np.array([*story, encoding.eot_token], np.int32) for story in coded]
            parts.append(torch.from_numpy(np.concatenate(ended or [np.zeros(0, np.int32)])))
    if min(map(len, texts)) < 2 or len(parts[0]) < 4 * BLOCK or len(parts[1]) < BLOCK:
        raise ValueError(f'{files[0][0]}: {len(parts[0])} training and {len(parts[1])} test tokens in '
                         f'{sum(map(len, texts))} stories are too few; is {END.decode()} between them?')
    return Dataset(name, 'text', *parts, classes)


def whole(dataset: Dataset) -> Part:
    """All of the training set: (pixels, labels), or a text in blocks (n, BLOCK), without a last short one."""
    n = len(dataset.train) // BLOCK
    return dataset.train if dataset.kind == 'image' else dataset.train[:n * BLOCK].view(n, BLOCK)


def split(dataset: Dataset, seed: int, share: float = 0.75) -> tuple[Part, Part]:
    """Train and validation, disjoint, from the training set shuffled by `seed`: images, or blocks of text."""
    part, text = whole(dataset), dataset.kind == 'text'
    order = torch.randperm(len(part if text else part[0]), generator=generator('split', seed, 0))
    halves = order.tensor_split([round(len(order) * share)])
    return tuple(part[half] if text else (part[0][half], part[1][half]) for half in halves)


def generator(stream: str, seed: int, k: int) -> torch.Generator:
    """Random numbers that depend on these three alone, so that a resumed run draws the same."""
    low, high = zlib.crc32(f'{stream} {seed} {k}'.encode()), zlib.crc32(f'{k} {seed}'.encode())
    return torch.Generator().manual_seed(low + (high << 31))


def moved(tensor: Tensor, device: Union[str, torch.device]) -> Tensor:
    """The tensor on `device`. subtle: for a copy from unpinned memory the CPU would wait for the GPU."""
    cuda = torch.device(device).type == 'cuda'
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)


class Batches:
    """Endless batches (x, y) of one part. The k-th is a pure function of (seed, k), and state_dict() is k.
    Raises ValueError when the part is smaller than a batch, or a window longer than a block.

    images: x float32 (size, channels, side, side), normalised; y int64 (size,). Each epoch is a permutation.
        augment: random crop after padding by an eighth of the side; mirrored half the time where it may be.
    text: x int64 (size, context), windows at random places; y the same, one token on.
    """

    def __init__(self, dataset: Dataset, part: Part, size: int, seed: int, augment: bool = False,
                 context: int = 128, device: str = 'cpu') -> None:
        self.size, self.seed, self.augment, self.context, self.device = size, seed, augment, context, device
        self.text, self.mirror, self.position, self.epoch = dataset.kind == 'text', dataset.mirror, 0, -1
        if self.text and not (1 <= context < BLOCK and len(part)):
            raise ValueError(f'--context {context}: 1 to {BLOCK - 1} fit, in {len(part)} blocks of the text')
        if not self.text and not 1 <= size <= len(part[0]):
            raise ValueError(f'--batch-size {size}: 1 to {len(part[0])} fit, the images in this part')
        self.tensors = [t.to(device) for t in ([part] if self.text else [*part, *dataset.normal])]

    def __iter__(self) -> 'Batches':
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        k, self.position = self.position, self.position + 1
        if self.text:
            blocks, draw = self.tensors[0], generator('text', self.seed, k)
            start = torch.randint(len(blocks), (self.size, 1), generator=draw) * BLOCK
            start += torch.randint(BLOCK - self.context, (self.size, 1), generator=draw)
            index = moved(start, self.device) + torch.arange(self.context + 1, device=self.device)
            window = blocks.view(-1)[index].long()  # (size, context + 1)
            return window[:, :-1], window[:, 1:]
        x, y, mean, std = self.tensors
        epoch, position = divmod(k, len(x) // self.size)
        if self.epoch != epoch:
            order = torch.randperm(len(x), generator=generator('order', self.seed, epoch))
            self.epoch, self.order = epoch, moved(order, self.device)
        index = self.order[position * self.size:(position + 1) * self.size]
        x = augmented(x[index], self.mirror, generator('augment', self.seed, k)) if self.augment else x[index]
        return (x - mean) / std, y[index]

    def state_dict(self) -> dict[str, int]:
        return {'position': self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state['position']


class TeacherBatches(Batches):
    """Endless (x, y): x ~ N(0, 1) of (size, inputs), y what the teacher network makes of it."""

    def __init__(self, teacher: torch.nn.Module, size: int, seed: int, device: str = 'cpu') -> None:
        self.teacher, self.size, self.seed, self.device, self.position = teacher, size, seed, device, 0

    @torch.no_grad()
    def __next__(self) -> tuple[Tensor, Tensor]:
        draw, self.position = generator('teacher', self.seed, self.position), self.position + 1
        x = moved(torch.randn(self.size, self.teacher.first.in_features, generator=draw), self.device)
        return x, self.teacher(x)


def augmented(x: Tensor, mirror: bool, draw: torch.Generator) -> Tensor:
    """Pixels (n, channels, side, side), each image shifted and mirrored: one gather from the padded batch."""
    n, channels, side, _ = x.shape
    pad, row = side // 8, torch.arange(side, device=x.device)
    shift = moved(torch.randint(2 * pad + 1, (2, n, 1), generator=draw), x.device)
    flip = moved(torch.randint(2, (n, 1), generator=draw) * mirror, x.device)
    column = torch.where(flip == 1, side - 1 - row, row) + shift[1]                 # (n, side)
    pixel = (row + shift[0])[:, :, None] * (side + 2 * pad) + column[:, None, :]    # (n, side, side)
    pixel = pixel.view(n, 1, -1).expand(-1, channels, -1)
    return F.pad(x, (pad, pad, pad, pad)).flatten(2).gather(2, pixel).view(x.shape)


def test_batches(dataset: Dataset, size: int, context: int = 128, device: str = 'cpu') -> Iterator:
    """(x, y) of the test set, once, in order, the last batch smaller: images as they are, text in windows."""
    if dataset.kind == 'image':
        x, y, mean, std = (tensor.to(device) for tensor in (*dataset.test, *dataset.normal))
        return (((some - mean) / std, labels) for some, labels in zip(x.split(size), y.split(size)))
    text, n = dataset.test.to(device), (len(dataset.test) - 1) // context
    x, y = (text[k:k + n * context].view(n, context).split(size) for k in (0, 1))
    return ((some.long(), target.long()) for some, target in zip(x, y))


def make_samples(data_dir: str) -> None:
    """Write samples/: of CIFAR-10, averaged 2x2, the 500 training and 100 test images a class that have the
    smallest checksums, so that the order of the files does not matter; and 1 MB of TinyStories."""
    full, small = load('cifar10', data_dir), load('cifar10', data_dir, side=16)
    text = iter(stories(find('tinystories', data_dir)[0][1]))
    for part, each, size in ('train', 500, 950_000), ('test', 100, 100_000):
        (x, y), (pixels, _) = getattr(full, part), getattr(small, part)
        rank = torch.tensor([zlib.crc32(image) for image in x.numpy()]).argsort()
        nth = F.one_hot(y[rank]).cumsum(0).gather(1, y[rank, None])[:, 0]  # 1: the first image of its class
        chosen = rank[nth <= each]
        records = torch.cat([y[chosen, None].byte(), pixels[chosen].flatten(1)], 1)
        (SAMPLES / f'cifar10_16_{part}.bin').write_bytes(records.numpy().tobytes())
        with open(SAMPLES / f'tinystories_sample_{part}.txt', 'wb') as file:
            for story in text:
                if file.write(story + b'\n' + END + b'\n') and file.tell() >= size:
                    break


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('command', choices=['make-samples'])
    parser.add_argument('--data-dir', required=True, help='folder with CIFAR-10 and TinyStories as published')
    try:
        make_samples(parser.parse_args().data_dir)
    except (ValueError, OSError) as problem:
        parser.error(str(problem))

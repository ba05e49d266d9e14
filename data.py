"""Data: the built-in samples, and the full sets: downloaded and verified (download.py), parsed, cut into batches.

    load('cifar10_16')                       a Dataset, at once and offline, from samples/
    load('cifar10', data_dir='folder')       from files that are already there; without data_dir: downloaded, once
    python data.py make-samples --data-dir FOLDER      makes the built-in samples from the full data again

Whole data sets live in memory as tensors; a batch is an index and a few vectorised operations. No worker processes.
Search uses `split` (train and validation, both from the training set). Only evaluate.py touches `Dataset.test`.
"""
import argparse
import io
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional, Union

import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch import Tensor

from download import DataError, download, members, read
from ops import valid

HERE = Path(__file__).resolve().parent
SAMPLES, DOWNLOADS = HERE / 'samples', HERE / 'downloads'
DATA = ('cifar10_16', 'tinystories_sample', 'cifar10', 'cifar100', 'svhn', 'tinystories')

# address, md5 (None: none is published)
SOURCES: dict[str, list[tuple[str, Optional[str]]]] = {
    'cifar10': [('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz', 'c32a1d4ab5d03f1284b67883e8d87530')],
    'cifar100': [('https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz', '03b5dce01913d631647c71ecec9e9cb8')],
    'svhn': [('http://ufldl.stanford.edu/housenumbers/train_32x32.mat', 'e26dedcc434d2e4c54c9b2d4a06d8373'),
             ('http://ufldl.stanford.edu/housenumbers/test_32x32.mat', 'eb5a983be6a315427106f1b164d9cef3')],
    'tinystories': [(f'https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{part}.txt',
                     None) for part in ('train', 'valid')],
}
CIFAR10_FILES = [f'data_batch_{k}.bin' for k in range(1, 6)] + ['test_batch.bin']
END = '<|endoftext|>'  # the line between two stories; one byte 0, or GPT-2's token 50256, in the tensors
BLOCK = 4096           # a text is shuffled in blocks of so many tokens; no window spans two of them

Part = Union[tuple[Tensor, Tensor], Tensor]


@dataclass
class Dataset:
    """kind 'image': train and test are (pixels uint8 (n, channels, side, side), labels int64 (n,)), classes labels.
    kind 'text': train and test are (length,) integer tokens, classes is the size of the vocabulary."""
    name: str
    kind: str
    train: Part
    test: Part
    classes: int
    channels: int = 0
    side: int = 0
    mirror: bool = False  # whether an image may be mirrored: a 2 may not


def load(name: str, data_dir: Optional[str] = None, tokens: str = 'bytes') -> Dataset:
    """The data set of that name, one of DATA.

    data_dir: folder with the publisher's files (or archive); without it they are downloaded into downloads/, once.
    tokens: of a text, 'bytes' (vocabulary 256) or 'gpt2' (needs the package tiktoken).
    Raises ValueError for an unknown name and DataError for data that is not as it should be.
    """
    valid('--data', name, DATA)
    if name == 'cifar10_16':
        paths = [SAMPLES / f'cifar10_16_{part}.bin' for part in ('train', 'test')]
        parts = [images(read(path), 1, 16, 10, str(path)) for path in paths]
        return Dataset(name, 'image', *parts, classes=10, channels=3, side=16, mirror=True)
    if name == 'tinystories_sample':
        return text_dataset(name, [SAMPLES / f'{name}_{part}.txt' for part in ('train', 'test')], tokens)
    folder = DOWNLOADS if data_dir is None else Path(data_dir)
    if data_dir is None:
        for address, md5 in SOURCES[name]:
            download(address, folder / address.rsplit('/', 1)[1], md5)
    elif not folder.is_dir():
        raise DataError(f'--data-dir {folder}: there is no such folder')
    if name == 'tinystories':
        return text_dataset(name, stories(folder), tokens)
    if name == 'svhn':
        parts = [svhn(folder / f'{part}_32x32.mat') for part in ('train', 'test')]
        return Dataset(name, 'image', *parts, classes=10, channels=3, side=32, mirror=False)
    inner, files, classes, labels = ('cifar-10-batches-bin', CIFAR10_FILES, 10, 1) if name == 'cifar10' else \
        ('cifar-100-binary', ['train.bin', 'test.bin'], 100, 2)  # two labels: a coarse one, then the fine one, which counts
    raw = members(folder, inner, files, SOURCES[name][0])
    *train, test = [images(part, labels, 32, classes, f'{folder}: {file}') for part, file in zip(raw, files)]
    train = tuple(torch.cat(tensors) for tensors in zip(*train))
    for part, published in (train, 50_000), (test, 10_000):
        if len(part[1]) != published:
            print(f'note: {folder} holds {len(part[1]):,} of the {published:,} published images of {name}', file=sys.stderr)
    return Dataset(name, 'image', train, test, classes=classes, channels=3, side=32, mirror=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is in the files.

def images(raw: bytes, labels: int, side: int, classes: int, what: str) -> tuple[Tensor, Tensor]:
    """Records of `labels` label bytes (the last counts) and 3 * side * side pixel bytes, colour by colour."""
    size = labels + 3 * side * side
    if not raw or len(raw) % size:
        raise DataError(f'{what}: {len(raw)} bytes are not a number of records of {size} bytes; the file is truncated or '
                        f'another one; fetch it again')
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, size)
    y = records[:, labels - 1].long()
    if int(y.max()) >= classes:
        raise DataError(f'{what}: label {int(y.max())} in a set of {classes} classes; the file is damaged or another one')
    if len(y) >= 1000 and int(y.min()) == int(y.max()):
        raise DataError(f'{what}: {len(y)} images that all have label {int(y.max())}; the file is damaged, fetch it again')
    return records[:, labels:].reshape(-1, 3, side, side), y


def svhn(path: Path) -> tuple[Tensor, Tensor]:
    """One .mat file of SVHN's cropped digits. Label 10 stands for the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError('SVHN comes in .mat files: pip install scipy to read them') from None
    raw = read(path)
    try:
        content = loadmat(io.BytesIO(raw), variable_names=['X', 'y'])
        pixels, labels = content['X'], content['y'].reshape(-1)
        if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, len(labels)) or labels.dtype.kind not in 'ui' \
                or not 1 <= labels.min() <= labels.max() <= 10:
            raise ValueError('X must be 32 x 32 x 3 x n bytes and y n labels from 1 to 10')
    except Exception as error:  # loadmat raises a dozen kinds on files that are something else
        reason = str(error).split('\n')[0]
        raise DataError(f'{path} is not a .mat file of SVHN ({reason}); delete it and fetch it again') from None
    return (torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))),
            torch.from_numpy(labels.astype(np.int64) % 10))


def stories(folder: Path) -> list[Path]:
    """The training and test text in `folder`: the publisher's two files, or one TinyStories.txt."""
    pair = [folder / address.rsplit('/', 1)[1] for address, _ in SOURCES['tinystories']]
    if (folder / 'TinyStories.txt').exists() and not pair[0].exists():
        return [folder / 'TinyStories.txt']
    for path in pair:
        if not path.exists():
            raise DataError(f'{folder} lacks {path.name} (or a TinyStories.txt that holds all stories)')
    return pair


def text_dataset(name: str, paths: list[Path], tokens: str) -> Dataset:
    """Of a training and a test file; of a single file the last twentieth is the test text."""
    valid('--tokens', tokens, ('bytes', 'gpt2'))
    texts = [read(path) for path in paths]
    for path, text in zip(paths, texts):
        if END.encode() not in text:
            raise DataError(f'{path} holds no line {END}: it is not a file of TinyStories; delete it and fetch it again')
    if len(texts) == 1:
        cut = texts[0].rfind(END.encode(), 0, len(texts[0]) * 19 // 20) + len(END)
        if cut < len(END):
            raise DataError(f'{paths[0]}: all but the end of the text is one story; it is damaged, fetch it again')
        texts = [texts[0][:cut], texts[0][cut:].lstrip()]
    texts = [text.rstrip() + b'\n' for text in texts]  # or a marker at the very end would stay in the text
    if tokens == 'bytes':
        parts = [torch.frombuffer(bytearray(text.replace(f'\n{END}\n'.encode(), b'\0')), dtype=torch.uint8)
                 for text in texts]
        enough(parts, paths)
        return Dataset(name, 'text', *parts, classes=256)
    try:
        import tiktoken
    except ImportError:
        raise DataError('--tokens gpt2: pip install tiktoken for it, or use --tokens bytes') from None
    try:
        encoding = tiktoken.get_encoding('gpt2')  # fetches its vocabulary the first time
    except (requests.RequestException, OSError) as error:
        raise DataError(f'tiktoken cannot fetch the vocabulary of GPT-2 ({type(error).__name__}); use --tokens bytes') from None
    encoded = [encoding.encode_ordinary_batch(text.decode('utf-8', 'replace').split(f'\n{END}\n')) for text in texts]
    parts = [torch.from_numpy(np.concatenate([np.array(story + [encoding.eot_token], np.int32) for story in part]))
             for part in encoded]
    enough(parts, paths)
    return Dataset(name, 'text', *parts, classes=encoding.n_vocab)


def enough(parts: list[Tensor], paths: list[Path]) -> None:
    """Raise DataError where a text is too short to be split, or to test on."""
    for part, need, path in zip(parts, (4 * BLOCK, BLOCK), (paths[0], paths[-1])):
        if len(part) < need:
            raise DataError(f'{path}: {len(part)} tokens of text are too few, {need} at least; is the file whole?')


# ---------------------------------------------------------------------------------------------------------------------
# Parts and batches.

def blocks(tokens: Tensor) -> Tensor:
    """(length,) tokens -> (n, BLOCK); what is left over at the end is not used."""
    if len(tokens) < BLOCK:
        raise DataError(f'a text of {len(tokens)} tokens is too short: {BLOCK} at least')
    return tokens[:len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)


def whole(dataset: Dataset) -> Part:
    """All of the training set as one part: what evaluate.py trains on."""
    return dataset.train if dataset.kind == 'image' else blocks(dataset.train)


def split(dataset: Dataset, seed: int, share: float = 0.75) -> tuple[Part, Part]:
    """Train and validation, disjoint, from the training set shuffled by `seed`: images, or blocks of text."""
    part = whole(dataset)
    n = len(part[0]) if dataset.kind == 'image' else len(part)
    order = torch.randperm(n, generator=generator('split', seed, 0))
    halves = order[:round(n * share)], order[round(n * share):]
    if dataset.kind == 'image':
        return tuple((part[0][half], part[1][half]) for half in halves)
    return part[halves[0]], part[halves[1]]


def generator(stream: str, seed: int, k: int) -> torch.Generator:
    """Random numbers that depend on these three and nothing else, so that a batch can be drawn again after a resume."""
    return torch.Generator().manual_seed(zlib.crc32(f'{stream} {seed} {k}'.encode()) + (zlib.crc32(f'{k} {seed}'.encode()) << 31))


def normal(dataset: Dataset, device: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the training pixels by channel, each (channels, 1, 1), for pixels of 0 to 255."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in dataset.train[0].unbind(1)])
    share, level = counts.double() / counts.sum(1, keepdim=True), torch.arange(256).double()
    mean = share @ level
    std = (share @ level.square() - mean.square()).clamp(min=1.0).sqrt()
    return mean.float().view(-1, 1, 1).to(device), std.float().view(-1, 1, 1).to(device)


class Batches:
    """Endless (x, y) batches of one part, on `device`.

    images: x float32 (size, channels, side, side), normalised; y int64 (size,). Every epoch is a new permutation.
        augment: random crop after padding by an eighth of the side, and mirrored half the time where that is allowed.
    text:   x int64 (size, context), windows at random places; y the same, one token on.
    The k-th batch is a pure function of (seed, k): state_dict() is that k, and a resumed search goes on exactly.
    """

    def __init__(self, dataset: Dataset, part: Part, size: int, seed: int, augment: bool = False, context: int = 128,
                 device: str = 'cpu'):
        self.size, self.seed, self.augment, self.context = size, seed, augment, context
        self.device, self.mirror, self.position = device, dataset.mirror, 0
        self.order = (-1, torch.empty(0))  # of which epoch, and the permutation
        if dataset.kind == 'image':
            self.x, self.y = (tensor.to(device) for tensor in part)
            self.mean, self.std = normal(dataset, device)
            if size > len(self.x):
                raise DataError(f'--batch-size {size} is larger than the part it draws from ({len(self.x)} images)')
        else:
            self.text = part.to(device)
            if context >= BLOCK:
                raise DataError(f'--context {context} is too long: {BLOCK - 1} at most')

    def __iter__(self) -> 'Batches':
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        k, self.position = self.position, self.position + 1
        return self.windows(k) if hasattr(self, 'text') else self.pictures(k)

    def windows(self, k: int) -> tuple[Tensor, Tensor]:
        draw = generator('text', self.seed, k)
        start = (torch.randint(len(self.text), (self.size,), generator=draw) * BLOCK
                 + torch.randint(BLOCK - self.context, (self.size,), generator=draw)).to(self.device)
        window = start[:, None] + torch.arange(self.context + 1, device=self.device)    # (size, context + 1)
        window = self.text.view(-1)[window].long()
        return window[:, :-1], window[:, 1:]

    def pictures(self, k: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(k, len(self.x) // self.size)
        if self.order[0] != epoch:
            order = torch.randperm(len(self.x), generator=generator('order', self.seed, epoch))
            self.order = epoch, order.to(self.device)
        index = self.order[1][position * self.size:(position + 1) * self.size]
        x = self.x[index]
        if self.augment:
            x = augmented(x, self.mirror, generator('augment', self.seed, k))
        return (x - self.mean) / self.std, self.y[index]

    def state_dict(self) -> dict[str, int]:
        return {'position': self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state['position']


def augmented(x: Tensor, mirror: bool, draw: torch.Generator) -> Tensor:
    """(n, channels, side, side) pixels -> the same, each image shifted by up to an eighth and perhaps mirrored: one
    gather out of the padded batch, no loop over images."""
    n, channels, side, _ = x.shape
    pad = side // 8
    shift = torch.randint(2 * pad + 1, (2, n, 1), generator=draw).to(x.device)
    flip = (torch.randint(2, (n, 1), generator=draw) * mirror).to(x.device)
    row = torch.arange(side, device=x.device)
    column = torch.where(flip == 1, side - 1 - row, row) + shift[1]                     # (n, side)
    row = row + shift[0]                                                                # (n, side)
    wide = side + 2 * pad
    pixel = row[:, :, None] * wide + column[:, None, :]                                 # (n, side, side)
    padded = F.pad(x, (pad, pad, pad, pad)).view(n, channels, wide * wide)
    return padded.gather(2, pixel.view(n, 1, -1).expand(-1, channels, -1)).view(n, channels, side, side)


def test_batches(dataset: Dataset, size: int, context: int = 128, device: str = 'cpu') -> Iterator[tuple[Tensor, Tensor]]:
    """The test set, once, in order, the last batch smaller: images as they are; text in windows side by side."""
    if dataset.kind == 'image':
        mean, std = normal(dataset, device)
        for x, y in zip(dataset.test[0].split(size), dataset.test[1].split(size)):
            yield (x.to(device) - mean) / std, y.to(device)
    else:
        n = (len(dataset.test) - 1) // context
        x, y = (dataset.test[k:k + n * context].view(n, context) for k in (0, 1))
        for x, y in zip(x.split(size), y.split(size)):
            yield x.long().to(device), y.long().to(device)


class TeacherBatches:
    """Endless (x, y): x ~ N(0, 1) of (size, inputs), y what the teacher network makes of it. The k-th batch is a pure
    function of (seed, k), as in Batches."""

    def __init__(self, teacher: torch.nn.Module, size: int, seed: int, device: str = 'cpu'):
        self.teacher, self.size, self.seed, self.device, self.position = teacher, size, seed, device, 0

    def __iter__(self) -> 'TeacherBatches':
        return self

    @torch.no_grad()
    def __next__(self) -> tuple[Tensor, Tensor]:
        draw = generator('teacher', self.seed, self.position)
        self.position += 1
        x = torch.randn(self.size, self.teacher.first.in_features, generator=draw).to(self.device)
        return x, self.teacher(x)

    state_dict, load_state_dict = Batches.state_dict, Batches.load_state_dict


# ---------------------------------------------------------------------------------------------------------------------
# The built-in samples.

def make_samples(data_dir: str) -> None:
    """Write samples/: CIFAR-10 cut to 500 training and 100 test images a class, averaged 2x2; 1 MB of TinyStories.

    The images are those with the smallest checksums, so that the order of the files does not matter.
    """
    SAMPLES.mkdir(exist_ok=True)
    cifar = load('cifar10', data_dir)
    for what, (x, y), each in ('train', cifar.train, 500), ('test', cifar.test, 100):
        checksum = np.array([zlib.crc32(image) for image in x.numpy()])
        rank = np.argsort(checksum)
        chosen = np.concatenate([rank[y.numpy()[rank] == label][:each] for label in range(10)])
        chosen = torch.from_numpy(chosen[np.argsort(checksum[chosen])])
        small = F.avg_pool2d(x[chosen].float(), 2).round().byte()
        records = torch.cat([y[chosen, None].byte(), small.flatten(1)], 1)
        (SAMPLES / f'cifar10_16_{what}.bin').write_bytes(records.numpy().tobytes())
    text = read(stories(Path(data_dir))[0])[:6_000_000]
    end, start = f'\n{END}\n'.encode(), 0
    for what, size in ('train', 950_000), ('test', 100_000):
        stop = text.index(end, start + size) + len(end)
        (SAMPLES / f'tinystories_sample_{what}.txt').write_bytes(text[start:stop])
        start = stop


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=['make-samples'])
    parser.add_argument('--data-dir', required=True, help='folder with CIFAR-10 and TinyStories as published')
    given = parser.parse_args()
    try:
        make_samples(given.data_dir)
    except (DataError, OSError) as problem:
        print(f'error: {problem}', file=sys.stderr)
        sys.exit(2)

"""The data sets, from the publishers' files to tensors in memory; a batch is an index into them."""
import bisect
import copy
import functools
import hashlib
import itertools
import os
import random
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ops import check_choice

SAMPLES, DOWNLOADS = (Path(__file__).resolve().parent / folder for folder in ('samples', 'downloads'))
CIFAR, SVHN = 'https://www.cs.toronto.edu/~kriz/', 'http://ufldl.stanford.edu/housenumbers/'
STORIES = 'https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/'
SOURCES = {  # training and test files, of which the first complete layout is read; where from; names and MD5
    'cifar10_16': (['cifar10_16_train.bin cifar10_16_test.bin'], '', {}),
    'tinystories_sample': (['tinystories_sample_train.txt tinystories_sample_test.txt'], '', {}),
    'cifar10': ([' '.join(f'data_batch_{k}.bin' for k in range(1, 6)) + ' test_batch.bin'], CIFAR,
                {'cifar-10-binary.tar.gz': 'c32a1d4ab5d03f1284b67883e8d87530'}),
    'cifar100': (['train.bin test.bin'], CIFAR,
                 {'cifar-100-binary.tar.gz': '03b5dce01913d631647c71ecec9e9cb8'}),
    'svhn': (['train_32x32.mat test_32x32.mat'], SVHN, {'train_32x32.mat': 'e26dedcc434d2e4c54c9b2d4a06d8373',
                                                       'test_32x32.mat': 'eb5a983be6a315427106f1b164d9cef3'}),
    'tinystories': (['TinyStoriesV2-GPT4-train.txt TinyStoriesV2-GPT4-valid.txt', 'TinyStories.txt',
                     'TinyStories-train.txt TinyStories-valid.txt'], STORIES,
                    {'TinyStoriesV2-GPT4-train.txt': '', 'TinyStoriesV2-GPT4-valid.txt': ''}),
}
DATA = tuple(SOURCES)
END = b'<|endoftext|>'     # between two stories; in the tensors it is one byte 0, or GPT-2's token 50256
BLOCK = 4096               # a text is shuffled in blocks of so many tokens; no window spans two of them
Part = tuple[Tensor, ...]  # what batches are drawn from: images (pixels, labels), or a text (blocks,)

@dataclass
class Dataset:
    """kind 'image': train and test are (pixels uint8 (n, channels, side, side), labels int64 (n,)).
    kind 'text': train and test are integer tokens (length,), classes is the size of the vocabulary."""
    name: str
    kind: str
    train: Part | Tensor
    test: Part | Tensor
    classes: int
    channels: int = 0
    side: int = 0
    mirror: bool = False  # whether an image may be mirrored

    @functools.cached_property
    def digest(self) -> str:
        """CRC-32 of the training and test data: the same for the same data, in whatever files it came."""
        tensors = (*self.train, *self.test) if self.kind == 'image' else (self.train, self.test)
        crc = 0
        for tensor in tensors:
            crc = zlib.crc32(tensor.contiguous().numpy(), crc)
        return f'{crc:08x}'

    @functools.cached_property
    def normal(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by channel of the training pixels (0 to 255), each (channels, 1, 1)."""
        std, mean = torch.std_mean(self.train[0].double(), (0, 2, 3), correction=0, keepdim=True)
        return mean[0].float(), std[0].clamp(min=1.0).float()

def load(name: str, data_dir: str | None = None, tokens: str = 'bytes', side: int | None = None) -> Dataset:
    """The data set `name`. data_dir: folder of its files, its parent, or a file; None: built in or fetched.
    tokens: of a text, 'bytes' or 'gpt2' (needs tiktoken). side: of images, 16 averages 32x32 pixels 2x2."""
    check_choice('--data', name, DATA)
    check_choice('--tokens', tokens, ('bytes', 'gpt2'))
    text, own_side = 'stories' in name, 16 if name == 'cifar10_16' else 32
    if side and (text or side not in (16, own_side)):
        raise ValueError(f'--side {side} does not fit {name}: only images of side 32 can be averaged, to 16')
    if tokens != 'bytes' and not text:
        raise ValueError(f'--tokens {tokens} would be ignored: {name} has images; leave the option out')
    if data_dir and not SOURCES[name][1]:
        raise ValueError(f'--data-dir {data_dir} would be ignored: {name} is built in; say what it holds, '
                         f"--data {'tinystories' if text else 'cifar10 or another'}, or leave the option out")
    files = find(name, data_dir)
    if text:
        return Dataset(name, 'text', *text_parts(files, tokens), 256 if tokens == 'bytes' else 50257)
    parts = [images(name, path, raw, own_side) for path, raw in files]
    if side == 16 != own_side:
        parts = [(F.avg_pool2d(x.float(), 2).round().byte(), y) for x, y in parts]
    train, classes = tuple(map(torch.cat, zip(*parts[:-1]))), 100 if name == 'cifar100' else 10
    mirror = name != 'svhn'  # a mirrored digit is no digit
    return Dataset(name, 'image', train, parts[-1], classes, 3, side or own_side, mirror)

def download(address: str, path: Path) -> None:
    """Fetch `address` to `path`; ValueError when it does not arrive."""
    print(f'note: downloading {address}', file=sys.stderr)
    try:
        answer = requests.get(address, timeout=30)
        answer.raise_for_status()
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f'.{os.getpid()}')  # renamed when whole: two processes may do this at once
        part.write_bytes(answer.content)
        part.replace(path)
    except OSError as error:  # the errors of requests are OSErrors too
        raise ValueError(f'cannot fetch {address}: {error}; get it elsewhere for --data-dir') from None

def find(name: str, data_dir: str | None) -> list[tuple[str, bytes]]:
    """(path, contents) of the training files and the test file, in a folder, a subfolder, or an archive.
    Upper and lower case in their names do not count."""
    layouts, base, downloads = SOURCES[name]
    place = Path(data_dir).expanduser() if data_dir else DOWNLOADS if base else SAMPLES
    if place.is_file() and 'stories' in name:
        return [(str(place), place.read_bytes())]
    for file in downloads:
        if not data_dir and not (place / file).exists():
            download(base + file, place / file)
    folder = place.parent if place.is_file() else place
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    for folder in [folder, *(path for path in inside if os.access(path, os.R_OK | os.X_OK))]:
        there = {path.name.lower(): path for path in sorted(folder.iterdir())}
        for path, md5 in ((there[file], md5) for file, md5 in downloads.items() if md5 and file in there):
            if hashlib.md5(path.read_bytes()).hexdigest() != md5:
                raise ValueError(f'{path}: wrong checksum, expected {md5}; delete it and get it from {base}')
            if path.suffix == '.gz':
                with tarfile.open(path) as tar:  # nothing is unpacked: no name in it can do harm
                    members = {member.name.rsplit('/', 1)[-1]: member for member in tar}
                    return [(file, tar.extractfile(members[file]).read()) for file in layouts[0].split()]
        for layout in layouts:
            if all(paths := [there.get(file.lower()) for file in layout.split()]):
                return [(str(path), path.read_bytes()) for path in paths]
    raise ValueError(f"{place} has not all of {', or '.join(layouts)}; get {' and '.join(downloads)} from "
                     f'{base} (other layouts, such as pickles, which can run any code, are never read)')

def images(name: str, path: str, raw: bytes, side: int) -> Part:
    """Pixels and labels of one file. CIFAR: records of label bytes, then pixels, colour by colour."""
    if name == 'svhn':  # a .mat file; X is (row, column, colour, image), label 10 is the digit 0
        from scipy.io import loadmat  # pip install scipy
        x, y = map(torch.from_numpy, map(loadmat(path).get, 'Xy'))
        return x.permute(3, 2, 0, 1).contiguous(), y.flatten().long() % 10
    labels = 2 if name == 'cifar100' else 1  # bytes of label, of which the last counts
    size = labels + 3 * side ** 2
    if not raw or len(raw) % size:
        raise ValueError(f'{path}: {len(raw)} bytes are no records of {size}, it is truncated: get it again')
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, size)
    return records[:, labels:].reshape(-1, 3, side, side), records[:, labels - 1].long()

def stories(path: str, raw: bytes) -> Iterator[bytes]:
    """The stories of a UTF-8 or UTF-16 text with any line ends, one at a time."""
    if raw.startswith((b'\xff\xfe', b'\xfe\xff')):
        raw = raw.decode('utf-16', 'replace').encode()
    if b'\0' in raw:
        raise ValueError(f'{path} holds bytes of value 0, as no text does; save it as UTF-8')
    raw = raw.removeprefix(b'\xef\xbb\xbf').replace(b'\r\n', b'\n').replace(b'\r', b'\n').rstrip()
    start = end = 0  # no split: its list would be one more copy
    while end >= 0:
        end = raw.find(END, start)
        story = raw[start:end] if end >= 0 else raw[start:]
        start = end + len(END)
        if story.strip():
            yield story.strip(b' \t').removeprefix(b'\n').removesuffix(b'\n')

def text_parts(files: list[tuple[str, bytes]], tokens: str) -> list[Tensor]:
    """Training and test tokens. The test text is the last file, or the last twentieth of a single one.
    Takes the files out of the list: of 2 GB a laptop holds two copies, not seven."""
    first, alone, mark = files[0][0], len(files) == 1, END if tokens == 'gpt2' else b'\0'
    text, ends, cut = bytearray(), [0], 0  # ends: of the stories, each with a mark behind it
    while files:
        cut = len(ends) - 1  # the first story for the test
        for story in stories(*files.pop(0)):
            text += story + mark
            ends.append(len(text))
    if alone:  # END in lines of its own counts too: results/ was cut so
        sizes = [end + k * (len(END) + 2 - len(mark)) for k, end in enumerate(ends)]
        cut = bisect.bisect(sizes, sizes[-1] * 19 // 20 + 1) - 1
    if tokens == 'gpt2':
        from tiktoken import get_encoding  # pip install tiktoken; it fetches its vocabulary the first time
        encode = functools.partial(get_encoding('gpt2').encode, allowed_special='all')
        def tokens_of(ends: list[int]) -> Tensor:  # of a few stories at a time: Python's integers are large
            some = itertools.pairwise([*ends[:-1:10_000], ends[-1]])
            made = (encode(str(text[a:b], 'utf-8', 'replace')) for a, b in some)
            return torch.cat([torch.tensor(t, dtype=torch.int32) for t in ([], *made)])
        parts = [tokens_of(ends[:cut + 1]), tokens_of(ends[cut:])]
    else:
        parts = torch.from_numpy(np.asarray(text)).split([ends[cut], len(text) - ends[cut]])
    if min(cut, len(ends) - 1 - cut) < 2 or len(parts[0]) < 4 * BLOCK or len(parts[1]) < BLOCK:
        raise ValueError(f'{first}: too few tokens; {END.decode()} should stand between its stories, and '
                         f'{4 * BLOCK} tokens are needed to train, {BLOCK} to test')
    return parts

# ---- several processes, as torchrun starts them ----

def meet(device: str) -> None:
    """Under torchrun: wait for the other ranks. Only the first of them speaks and writes."""
    if 'TORCHELASTIC_RUN_ID' in os.environ and not dist.is_initialized():
        if device == 'cuda':
            if (rank := int(os.environ['LOCAL_RANK'])) >= torch.cuda.device_count():
                raise ValueError(f'process {rank} has no GPU: a smaller --nproc-per-node, or --device cpu')
            torch.cuda.set_device(rank)
        dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
        if not is_first():
            sys.stdout = open(os.devnull, 'w')

def is_first() -> bool:
    """Whether this process writes and speaks: alone, or the first of torchrun's ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0

def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1

def average(tensors: Iterable[Tensor]) -> None:
    """Under torchrun: each becomes its mean over the ranks, the same bits on all of them. Alone: nothing."""
    if dist.is_initialized() and (tensors := list(tensors)):
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / ranks()  # no sum overflows
        dist.all_reduce(flat)
        means = flat.split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))

# ---- batches ----

def whole(dataset: Dataset) -> Part:
    """All of the training set: (pixels, labels), or a text in blocks (n, BLOCK), without a last short one."""
    n = len(dataset.train) // BLOCK
    return dataset.train if dataset.kind == 'image' else (dataset.train[:n * BLOCK].view(n, BLOCK),)

def split(dataset: Dataset, seed: int) -> tuple[Part, Part]:
    """75 % to train, 25 % to validate: disjoint parts of the training set (images, or blocks of text)."""
    part = whole(dataset)
    order = torch.randperm(len(part[0]), generator=generator('split', seed, 0))
    cut = round(len(order) * 0.75)
    return tuple(t[order[:cut]] for t in part), tuple(t[order[cut:]] for t in part)

def seed_everything(seed: int) -> None:
    """Seed every generator that a network may draw from, Python's own too."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)

def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of (batch, classes) or (batch, time, vocabulary) logits."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())

def generator(stream: str, seed: int, k: int) -> torch.Generator:
    """Random numbers fixed by these three alone (a 64-bit seed), so that a resumed run draws the same."""
    low, high = zlib.crc32(f'{stream} {seed} {k}'.encode()), zlib.crc32(f'{k} {seed}'.encode())
    return torch.Generator().manual_seed(low + (high << 31))

class Batches(Iterator):
    """Endless batches (x, y) of one part. The k-th is a pure function of (seed, k), and state_dict() is k.
    images: x float32 (size, channels, side, side), normalised; y int64 (size,). Each epoch is a permutation.
    text: x int64 (size, context), windows at random places; y the same, one token on.
    Under torchrun: a rank's share of a batch that all ranks draw, `ranks` times as large."""
    def __init__(self, dataset: Dataset, part: Part, size: int, seed: int, augment: bool = False,
                 context: int = 128, device: str = 'cpu') -> None:
        self.start(size, seed, device)
        self.text, self.mirror, self.epoch = dataset.kind == 'text', dataset.mirror, -1
        self.augment, self.context = augment, context
        if self.text and not (1 <= context < BLOCK and len(part[0])):
            raise ValueError(f'--context {context}: 1 to {BLOCK - 1} fit, in {len(part[0])} blocks of text')
        if not self.text and not 1 <= self.size <= len(part[0]):
            raise ValueError(f'--batch-size {self.size}: 1 to {len(part[0])} fit, the images in this part')
        self.tensors = [t.to(device) for t in (part if self.text else [*part, *dataset.normal])]

    def start(self, size: int, seed: int, device: str) -> None:
        self.rank, self.ranks = dist.get_rank() if dist.is_initialized() else 0, ranks()
        self.size, self.seed, self.device, self.position = size * self.ranks, seed, device, 0

    def __next__(self) -> tuple[Tensor, Tensor]:
        x, y = self.draw(self.position)
        self.position += 1
        return x[self.rank::self.ranks], y[self.rank::self.ranks]

    def draw(self, k: int) -> tuple[Tensor, Tensor]:
        if self.text:
            blocks, draw = self.tensors[0], generator('text', self.seed, k)
            start = torch.randint(len(blocks), (self.size, 1), generator=draw) * BLOCK
            start += torch.randint(BLOCK - self.context, (self.size, 1), generator=draw)
            index = (start + torch.arange(self.context + 1)).to(self.device, non_blocking=True)
            window = blocks.view(-1)[index].long()  # (size, context + 1)
            return window[:, :-1], window[:, 1:]
        x, y, mean, std = self.tensors
        epoch, position = divmod(k, len(x) // self.size)
        if self.epoch != epoch:
            order = torch.randperm(len(x), generator=generator('order', self.seed, epoch))
            self.epoch, self.order = epoch, order.to(self.device)
        index = self.order[position * self.size:(position + 1) * self.size]
        x = augmented(x[index], self.mirror, generator('augment', self.seed, k)) if self.augment else x[index]
        return (x - mean) / std, y[index]

    def state_dict(self) -> dict[str, int]:
        return {'position': self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state['position']

def repeatable(batches: Iterator, count: int) -> Callable[[], Iterator]:
    """The next `count` batches, as often as wanted. Ours are made again; others are kept, up to 1 GB, and go
    round. Those with load_state_dict are left as they were."""
    if isinstance(batches, Batches):
        start = copy.copy(batches)
        return lambda: itertools.islice(copy.copy(start), count)
    state, kept, size = getattr(batches, 'state_dict', lambda: None)(), [], 0
    for batch in itertools.islice(batches, count):
        kept.append(batch)
        size += sum(t.nbytes for t in tree_leaves(batch) if isinstance(t, Tensor))
        if size > 2 ** 30:
            break
    if not kept:
        raise ValueError('the batches have ended: give an iterator without end')
    if state is not None and hasattr(batches, 'load_state_dict'):
        batches.load_state_dict(state)
    return lambda: itertools.islice(itertools.cycle(kept), count)

class TeacherBatches(Batches):
    """Endless (x, y): x ~ N(0, 1) of (size, inputs), y what the teacher network makes of it."""
    def __init__(self, teacher: torch.nn.Module, size: int, seed: int, device: str = 'cpu') -> None:
        self.start(size, seed, device)
        self.teacher = teacher

    @torch.no_grad()
    def draw(self, k: int) -> tuple[Tensor, Tensor]:
        draw = generator('teacher', self.seed, k)
        x = torch.randn(self.size, self.teacher.first.in_features, generator=draw).to(self.device)
        return x, self.teacher(x)

def augmented(x: Tensor, mirror: bool, draw: torch.Generator) -> Tensor:
    """Pixels (n, channels, side, side): random crops after padding by side / 8, and half of them mirrored."""
    n, channels, side, _ = x.shape
    pad, row = side // 8, torch.arange(side)
    shift = torch.randint(2 * pad + 1, (2, n, 1), generator=draw)
    flip = torch.randint(2, (n, 1), generator=draw) * mirror
    column = torch.where(flip == 1, side - 1 - row, row) + shift[1]                 # (n, side)
    pixel = (row + shift[0])[:, :, None] * (side + 2 * pad) + column[:, None, :]    # (n, side, side)
    pixel = pixel.view(n, 1, -1).to(x.device, non_blocking=True).expand(-1, channels, -1)
    return F.pad(x, (pad, pad, pad, pad)).flatten(2).gather(2, pixel).view(x.shape)

def test_batches(dataset: Dataset, size: int, context: int = 128, device: str = 'cpu') -> Iterator:
    """(x, y) of the test set, once, in order, the last batch smaller: images as they are, text in windows."""
    if dataset.kind == 'image':
        x, y, mean, std = (tensor.to(device) for tensor in (*dataset.test, *dataset.normal))
        return (((some - mean) / std, labels) for some, labels in zip(x.split(size), y.split(size)))
    text, n = dataset.test.to(device), (len(dataset.test) - 1) // context
    x, y = (text[k:k + n * context].view(n, context).split(size) for k in (0, 1))
    return ((some.long(), target.long()) for some, target in zip(x, y))

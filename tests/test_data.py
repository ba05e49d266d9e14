"""data.py: parsers on files in the publishers' layouts, the built-in samples, parts and batches."""
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import BLOCK, END, Batches, DataError, Dataset, blocks, load, split

ROOT = Path(data.__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Parsers. The files are written here, byte by byte as their publishers describe them.

def pixel(k: int, colour: int, row: int, column: int) -> int:
    """Of image k: a different number almost everywhere, so that a wrong order of bytes shows."""
    return (37 * k + 101 * colour + 7 * row + 3 * column) % 256


def record(k: int, labels: list[int], side: int = 32) -> bytes:
    """Label bytes, then all of red, all of green, all of blue, row by row."""
    return bytes(labels) + bytes(pixel(k, c, i, j) for c in range(3) for i in range(side) for j in range(side))


def cifar10_files(folder: Path) -> dict[str, bytes]:
    """Two records a file, labels 0 to 9, then the test file."""
    files = {f'data_batch_{k + 1}.bin': record(2 * k, [2 * k]) + record(2 * k + 1, [2 * k + 1]) for k in range(5)}
    files['test_batch.bin'] = record(10, [3]) + record(11, [9])
    return {f'{folder}/{name}': content for name, content in files.items()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def check_cifar10(dataset: Dataset) -> None:
    assert (dataset.kind, dataset.classes, dataset.channels, dataset.side, dataset.mirror) == ('image', 10, 3, 32, True)
    (x, y), (test_x, test_y) = dataset.train, dataset.test
    assert x.shape == (10, 3, 32, 32) and x.dtype == torch.uint8
    assert y.tolist() == list(range(10)) and test_y.tolist() == [3, 9]
    for k, c, i, j in (0, 0, 0, 0), (0, 2, 31, 31), (3, 1, 0, 31), (9, 0, 31, 0), (7, 2, 5, 11):
        assert x[k, c, i, j] == pixel(k, c, i, j)
    assert test_x[1, 1, 2, 3] == pixel(11, 1, 2, 3)


@pytest.mark.parametrize('inner', ['cifar-10-batches-bin', '.'])
def test_cifar10_from_files(tmp_path, inner):
    """In the publisher's folder or directly in --data-dir."""
    write(tmp_path, cifar10_files(Path(inner)))
    check_cifar10(load('cifar10', str(tmp_path)))


def test_cifar10_from_its_archive(tmp_path, monkeypatch):
    """Read without unpacking: nothing is written beside it, not even what a hostile member asks for."""
    content = archive_of({**cifar10_files(Path('cifar-10-batches-bin')), '../outside.txt': b'!'})
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/cifar-10-binary.tar.gz').write_bytes(content)
    address = data.SOURCES['cifar10'][0][0]
    monkeypatch.setitem(data.SOURCES, 'cifar10', [(address, hashlib.md5(content).hexdigest())])
    check_cifar10(load('cifar10', str(tmp_path / 'in')))
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['cifar-10-binary.tar.gz', 'in']


def test_cifar10_archive_with_another_checksum(tmp_path):
    """A user's own file is not removed: the message says what was expected and what is there."""
    path = tmp_path / 'cifar-10-binary.tar.gz'
    path.write_bytes(content := archive_of(cifar10_files(Path('cifar-10-batches-bin'))))
    with pytest.raises(DataError) as caught:
        load('cifar10', str(tmp_path))
    for word in str(path), 'c32a1d4ab5d03f1284b67883e8d87530', hashlib.md5(content).hexdigest():
        assert word in str(caught.value)


def test_cifar100_takes_the_fine_label(tmp_path):
    """The first of its two label bytes is the coarse one."""
    train, test = record(0, [11, 99]) + record(1, [3, 0]), record(2, [19, 42])
    write(tmp_path / 'cifar-100-binary', {'train.bin': train, 'test.bin': test})
    dataset = load('cifar100', str(tmp_path))
    assert dataset.classes == 100 and dataset.train[1].tolist() == [99, 0] and dataset.test[1].tolist() == [42]
    assert dataset.train[0][1, 2, 30, 4] == pixel(1, 2, 30, 4) and dataset.mirror


def test_svhn(tmp_path):
    """Pixels lie as (row, column, colour, image); label 10 is the digit 0; digits are never mirrored."""
    scipy_io = pytest.importorskip('scipy.io')
    for part, n in ('train', 3), ('test', 2):
        x = [[[[pixel(k, c, i, j) for k in range(n)] for c in range(3)] for j in range(32)] for i in range(32)]
        y = [[10], [1], [9]][:n]
        scipy_io.savemat(tmp_path / f'{part}_32x32.mat', {'X': np.array(x, np.uint8), 'y': np.array(y, np.uint8)})
    dataset = load('svhn', str(tmp_path))
    assert dataset.train[1].tolist() == [0, 1, 9] and dataset.train[0].shape == (3, 3, 32, 32) and not dataset.mirror
    for k, c, i, j in (0, 0, 1, 2), (2, 1, 31, 0), (1, 2, 4, 30):
        assert dataset.train[0][k, c, i, j] == pixel(k, c, i, j)


STORIES = [f'Once upon a time, number {k} of the cats sat.\n\nThe end.' for k in range(2000)]


def text_of(stories: list[str]) -> bytes:
    return ''.join(f'{story}\n{END}\n' for story in stories).encode()


def decoded(tokens: torch.Tensor) -> list[str]:
    return bytes(tokens.tolist()).decode().rstrip('\0').split('\0')


def test_tinystories_in_two_files(tmp_path):
    """The publisher's pair; a byte 0 stands between stories, and nothing else is changed."""
    for part, n in ('train', 2000), ('valid', 100):
        (tmp_path / f'TinyStoriesV2-GPT4-{part}.txt').write_bytes(text_of(STORIES[:n]))
    dataset = load('tinystories', str(tmp_path))
    assert (dataset.kind, dataset.classes, dataset.mirror) == ('text', 256, False)
    assert decoded(dataset.train) == STORIES and decoded(dataset.test) == STORIES[:100]


def test_tinystories_in_one_file(tmp_path):
    """The last twentieth is the test text, cut between two stories: none is lost or in both, no marker is left."""
    (tmp_path / 'TinyStories.txt').write_bytes(text_of(STORIES))
    dataset = load('tinystories', str(tmp_path))
    train, test = decoded(dataset.train), decoded(dataset.test)
    assert train + test == STORIES and 95 <= len(test) <= 105


def test_tinystories_whose_last_line_is_not_ended(tmp_path):
    """A marker at the very end, without a newline, is a marker all the same."""
    for part in 'train', 'valid':
        (tmp_path / f'TinyStoriesV2-GPT4-{part}.txt').write_bytes(text_of(STORIES).rstrip())
    assert decoded(load('tinystories', str(tmp_path)).train) == STORIES


@pytest.mark.parametrize('name, files, words', [
    ('cifar10', {}, ['cifar-10-binary.tar.gz', 'https://']),
    ('cifar10', {'cifar-10-batches-bin/data_batch_2.bin': b''}, ['lacks', 'data_batch_1.bin', 'test_batch.bin']),
    ('cifar100', {'cifar-100-binary/train.bin': record(0, [1, 2])}, ['lacks', 'test.bin']),
    ('cifar100', {'train.bin': record(0, [1, 2])[:-1], 'test.bin': record(0, [1, 2])}, ['train', '3073', 'truncated']),
    ('cifar100', {'train.bin': record(0, [1, 100]), 'test.bin': record(0, [1, 2])}, ['label 100']),
    ('tinystories', {}, ['TinyStoriesV2-GPT4-train.txt', 'TinyStories.txt']),
    ('tinystories', {'TinyStories.txt': b'<html>not found</html>'}, ['TinyStories.txt', END]),
    ('svhn', {}, ['train_32x32.mat'])])
def test_incomplete_folders(tmp_path, name, files, words):
    """One line that names the file and what it should be."""
    if name == 'svhn':
        pytest.importorskip('scipy')
    write(tmp_path, files)
    with pytest.raises(DataError) as caught:
        load(name, str(tmp_path))
    assert all(word in str(caught.value) for word in words) and len(str(caught.value).splitlines()) == 1


def test_missing_folder_and_unknown_name(tmp_path):
    with pytest.raises(DataError, match='no such folder'):
        load('cifar10', str(tmp_path / 'nowhere'))
    with pytest.raises(ValueError, match='did you mean cifar100'):
        load('cifar1000')


# ---------------------------------------------------------------------------------------------------------------------
# The built-in samples.

def test_built_in_samples():
    """As samples/README.md says: counts by class, sizes, and no image of the test set in the training set."""
    dataset = load('cifar10_16')
    counts = [torch.bincount(part[1]).tolist() for part in (dataset.train, dataset.test)]
    assert counts == [[500] * 10, [100] * 10]
    assert dataset.train[0].shape == (5000, 3, 16, 16) and dataset.test[0].shape == (1000, 3, 16, 16)
    train, test = ({image.numpy().tobytes() for image in part[0]} for part in (dataset.train, dataset.test))
    assert not train & test
    text = load('tinystories_sample')
    assert 900_000 < len(text.train) < 1_100_000 and 90_000 < len(text.test) < 110_000 and text.classes == 256
    assert not set(decoded(text.train)) & set(decoded(text.test)) and END.encode() not in bytes(text.train.tolist())
    assert sum(path.stat().st_size for path in (ROOT / 'samples').iterdir()) <= 6e6


@pytest.fixture(scope='session')
def real_data(tmp_path_factory):
    """The folder named by NANOGRAFS_DATA, else one that ../shared/data/unpack.py writes."""
    if folder := os.environ.get('NANOGRAFS_DATA'):
        return folder
    script = ROOT.parent / 'shared/data/unpack.py'
    if not script.exists():
        pytest.skip('no real data: NANOGRAFS_DATA is not set')
    folder = tmp_path_factory.mktemp('real')
    subprocess.run([sys.executable, script, folder], check=True)
    return str(folder)


@pytest.mark.slow
def test_samples_can_be_made_again(real_data, tmp_path, monkeypatch):
    """Bit for bit, from the full sets."""
    monkeypatch.setattr(data, 'SAMPLES', tmp_path)
    data.make_samples(real_data)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert len(made) == 4
    for name in made:
        assert (tmp_path / name).read_bytes() == (ROOT / 'samples' / name).read_bytes(), name


@pytest.mark.slow
def test_real_sets(real_data):
    """CIFAR-10: 5,000 and 1,000 images a class, and the pixel statistics everyone knows. CIFAR-100 and TinyStories."""
    cifar = load('cifar10', real_data)
    assert [torch.bincount(part[1]).tolist() for part in (cifar.train, cifar.test)] == [[5000] * 10, [1000] * 10]
    mean, std = data.normal(cifar, 'cpu')
    torch.testing.assert_close(mean.flatten() / 255, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)
    torch.testing.assert_close(std.flatten() / 255, torch.tensor([0.2470, 0.2435, 0.2616]), atol=1e-4, rtol=0)
    labels = load('cifar100', real_data).train[1]
    assert labels.unique().tolist() == list(range(100))
    text = load('tinystories', real_data)
    assert 10e6 < len(text.train) < 14e6 and 0.04 < len(text.test) / len(text.train) < 0.06
    assert b'Once upon a time' in bytes(text.test[:100_000].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Parts and batches.

def numbered(n: int, side: int = 8, mirror: bool = True) -> Dataset:
    """Images of noise with their own index as label, so that a batch tells which images are in it."""
    x = torch.randint(256, (n, 3, side, side), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    return Dataset('numbered', 'image', (x, torch.arange(n)), (x[:5], torch.arange(5)), n, 3, side, mirror)


def numbered_text(n: int) -> Dataset:
    """n blocks, each of one token: its own index; the last block of test is cut."""
    tokens = torch.arange(n).repeat_interleave(BLOCK)
    return Dataset('numbered', 'text', tokens, torch.arange(1000), n)


def test_split_of_images():
    """75 and 25 %, disjoint, complete, shuffled by the seed alone; images keep their labels."""
    dataset = numbered(103)
    (x, y), (val_x, val_y) = split(dataset, seed=3)
    assert (len(y), len(val_y)) == (77, 26) and sorted(torch.cat([y, val_y]).tolist()) == list(range(103))
    assert torch.equal(x, dataset.train[0][y]) and torch.equal(val_x, dataset.train[0][val_y])
    assert torch.equal(split(dataset, 3)[0][1], y) and not torch.equal(split(dataset, 4)[0][1], y)
    assert y.tolist() != sorted(y.tolist())


def test_split_of_text():
    """Whole blocks go to one part or the other."""
    train, val = split(numbered_text(16), seed=0)
    assert train.shape == (12, BLOCK) and val.shape == (4, BLOCK)
    owners = [block.unique().tolist() for block in torch.cat([train, val])]
    assert sorted(owners) == [[k] for k in range(16)]
    assert torch.equal(split(numbered_text(16), 0)[0], train) and not torch.equal(split(numbered_text(16), 1)[0], train)


@pytest.mark.parametrize('size', [5, 7, 20])
def test_epochs_are_permutations(size):
    """No image twice in an epoch, every epoch in another order, and over some epochs every image is seen."""
    dataset = numbered(20)
    batches = Batches(dataset, dataset.train, size, seed=1)
    epochs = [[label for _ in range(20 // size) for label in next(batches)[1].tolist()] for _ in range(12)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 20 // size * size
    assert len({tuple(epoch) for epoch in epochs}) == 12 and set(sum(epochs, [])) == set(range(20))


@pytest.mark.parametrize('kind', ['image', 'text', 'teacher'])
def test_a_batch_is_a_function_of_seed_and_number(kind):
    """Whatever else draws random numbers, and when a search that was interrupted goes on."""
    def fresh(seed):
        if kind == 'teacher':
            torch.manual_seed(0)
            return data.TeacherBatches(data_teacher(), 4, seed)
        if kind == 'text':
            return Batches(load('tinystories_sample'), split(load('tinystories_sample'), 0)[0], 4, seed, context=16)
        dataset = numbered(20)
        return Batches(dataset, dataset.train, 6, seed, augment=True)
    batches = fresh(7)
    sequence = [next(batches) for _ in range(8)]
    torch.rand(5)
    again = fresh(7)
    for k in (5, 2, 7, 0):
        again.load_state_dict({'position': k})
        assert all(torch.equal(a, b) for a, b in zip(next(again), sequence[k])), k
        assert again.state_dict() == {'position': k + 1}
    assert not torch.equal(next(fresh(8))[0], sequence[0][0])
    assert len({x.float().sum().item() for x, _ in sequence}) == 8


def data_teacher():
    from models import teacher_and_student
    return teacher_and_student(torch.nn.SiLU, torch.nn.SiLU)[0]


def test_validation_is_never_augmented():
    """Without augment=True a batch holds the images as they are, but for the normalisation, worked by hand here."""
    dataset = numbered(20)
    x, y = next(Batches(dataset, dataset.train, 20, seed=0))
    pixels = dataset.train[0].double()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    expected = (pixels[y] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(x.double(), expected, atol=1e-5, rtol=0)


def variants(image: torch.Tensor, mirror: bool) -> dict[tuple[int, int, bool], bytes]:
    """All that augmentation may make of one image, by loops: shifts up to an eighth, zeros outside, mirrored or not."""
    channels, side, _ = image.shape
    pad, found = side // 8, {}
    for down in range(-pad, pad + 1):
        for right in range(-pad, pad + 1):
            for flip in (False, True)[:1 + mirror]:
                out = torch.zeros_like(image)
                for i in range(side):
                    for j in range(side):
                        source = side - 1 - j if flip else j
                        if 0 <= i + down < side and 0 <= source + right < side:
                            out[:, i, j] = image[:, i + down, source + right]
                found[down, right, flip] = out.numpy().tobytes()
    return found


@pytest.mark.parametrize('mirror', [False, True])
def test_augmentation_against_loops(mirror):
    """Every augmented image is one of those, all of those occur, about equally often; digits are never mirrored."""
    image = torch.randint(1, 256, (3, 8, 8), dtype=torch.uint8)
    names = {content: name for name, content in variants(image, mirror).items()}
    assert len(names) == 9 * (1 + mirror)
    out = data.augmented(image.expand(3600, -1, -1, -1), mirror, torch.Generator().manual_seed(0))
    counts: dict = {}
    for one in out:
        name = names[one.numpy().tobytes()]  # KeyError: no shift or mirror makes this
        counts[name] = counts.get(name, 0) + 1
    assert len(counts) == len(names)
    expected = 3600 / len(names)
    assert all(abs(count - expected) < 5 * expected ** 0.5 for count in counts.values())


def test_training_images_are_augmented_each_in_its_own_way():
    """Through Batches: the same image differs between epochs, labels stay right, SVHN's digits are not mirrored."""
    for mirror in True, False:
        dataset = numbered(6, mirror=mirror)
        mean, std = data.normal(dataset, 'cpu')
        batches = Batches(dataset, dataset.train, 6, seed=0, augment=True)
        possible = [set(variants(image, mirror).values()) for image in dataset.train[0]]
        seen = set()
        for _ in range(6):
            x, y = next(batches)
            for image, label in zip((x * std + mean).round().byte(), y.tolist()):
                assert image.numpy().tobytes() in possible[label]
                seen.add((label, image.numpy().tobytes()))
        assert len(seen) > 20


def test_windows_of_text():
    """The target is the input one token on; no window spans two blocks; every block is drawn from."""
    text = load('tinystories_sample')
    x, y = next(Batches(text, split(text, 0)[0], 8, seed=0, context=32))
    assert x.shape == y.shape == (8, 32) and x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    whole = bytes(text.train.tolist())
    for window, target in zip(x.tolist(), y.tolist()):
        assert bytes([*window, target[-1]]) in whole
    batches = Batches(numbered_text(5), blocks(numbered_text(5).train), 64, seed=0, context=BLOCK - 1)
    drawn = set()
    for _ in range(5):
        x, y = next(batches)
        assert (x == x[:, :1]).all() and (y == x[:, :1]).all()
        drawn |= set(x[:, 0].tolist())
    assert drawn == set(range(5))


def test_windows_start_everywhere():
    """The first and the last tokens of a block are reached as well."""
    part = torch.arange(2 * BLOCK).view(2, BLOCK)
    dataset = Dataset('t', 'text', part.flatten(), part.flatten(), 2 * BLOCK)
    x, y = next(Batches(dataset, part, 300, seed=0, context=BLOCK - 3))
    assert set((x[:, 0] % BLOCK).tolist()) == {0, 1, 2}
    assert set((y[:, -1] % BLOCK).tolist()) == {BLOCK - 3, BLOCK - 2, BLOCK - 1}


def test_test_batches_cover_each_sample_once():
    """Images in order and as they are; of text every token but the first is predicted once, up to the last window."""
    dataset = load('cifar10_16')
    seen = list(data.test_batches(dataset, 300))
    assert [len(y) for _, y in seen] == [300, 300, 300, 100]
    assert torch.equal(torch.cat([y for _, y in seen]), dataset.test[1])
    mean, std = data.normal(dataset, 'cpu')
    assert torch.equal((torch.cat([x for x, _ in seen]) * std + mean).round().byte(), dataset.test[0])
    seen = list(data.test_batches(numbered_text(2), 4, context=30))  # its test text is 0, 1, ... 999
    x, y = (torch.cat([pair[k] for pair in seen]) for k in (0, 1))
    assert x.flatten().tolist() == list(range(990)) and y.flatten().tolist() == list(range(1, 991))


def test_parts_that_are_too_small():
    """A batch larger than its part, a context longer than a block, a text shorter than a block: errors in words."""
    dataset = numbered(10)
    with pytest.raises(DataError, match='--batch-size 11 is larger'):
        Batches(dataset, dataset.train, 11, 0)
    with pytest.raises(DataError, match=f'{BLOCK - 1} at most'):
        Batches(numbered_text(2), blocks(numbered_text(2).train), 1, 0, context=BLOCK)
    with pytest.raises(DataError, match='too short'):
        blocks(torch.zeros(100))


@pytest.mark.skipif(importlib.util.find_spec('tiktoken') is not None, reason='tiktoken is installed')
def test_gpt2_tokens_need_tiktoken():
    with pytest.raises(DataError, match='pip install tiktoken'):
        load('tinystories_sample', tokens='gpt2')

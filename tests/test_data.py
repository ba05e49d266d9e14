"""data.py: files in the publishers' layouts, made byte by byte; batches against loops and known values."""
import contextlib
import hashlib
import io
import tarfile
import zlib

import numpy as np
import pytest
import requests
import torch

import data
from data import BLOCK, Batches, Dataset, load, split

RECORDS = [bytes([k % 10]) + bytes((k + 7 * i * i + i // 1024) % 256 for i in range(3072)) for k in range(12)]
CIFAR10 = {f'data_batch_{k + 1}.bin': RECORDS[2 * k] + RECORDS[2 * k + 1] for k in range(5)}
CIFAR10['test_batch.bin'] = RECORDS[10] + RECORDS[11]
UPPER = {name.upper(): content for name, content in CIFAR10.items()}
STORIES = [f'Once upon a time, number {k} of the cats sat.\n\nThe end.'.encode() for k in range(2000)]
SEPARATOR = b'\n<|endoftext|>\n'
TEXT = SEPARATOR.join(STORIES) + SEPARATOR

def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder

with tarfile.open(fileobj=(file := io.BytesIO()), mode='w:gz') as tar:
    for member, content in {**CIFAR10, '../../outside': b'!'}.items():
        (info := tarfile.TarInfo(f'cifar-10-batches-bin/{member}')).size = len(content)
        tar.addfile(info, io.BytesIO(content))
ARCHIVE, MD5 = file.getvalue(), hashlib.md5(file.getvalue()).hexdigest()

@pytest.mark.parametrize('files, given', [
    (CIFAR10, '.'), (CIFAR10, '..'), (CIFAR10, 'data_batch_1.bin'), (UPPER, '.'),
    ({(name := 'cifar-10-binary.tar.gz'): ARCHIVE}, '.'), ({name: ARCHIVE}, name)])
def test_layouts(tmp_path, monkeypatch, capsys, files, given):
    """The publisher's folder, its parent, a file in it, other case, the archive, of which no member reaches
    the disk. A part of the set is noted."""
    monkeypatch.setitem(data.SOURCES['cifar10'][1], data.CIFAR + '10-binary.tar.gz', MD5)
    dataset = load('cifar10', folder := str(write(tmp_path / 'a/b', files) / given))
    assert 'cifar10: 10 images to train and 2 to test, of 60,000' in capsys.readouterr().err
    x, y = (torch.cat(tensors) for tensors in zip(dataset.train, dataset.test))
    assert b''.join(bytes([k]) + image.numpy().tobytes() for k, image in zip(y, x)) == b''.join(RECORDS)
    small = load('cifar10', folder, side=16).test[0].double()
    assert torch.equal(small, dataset.test[0].double().view(2, 3, 16, 2, 16, 2).mean((3, 5)).round())
    assert not list(tmp_path.rglob('outside')) and dataset.mirror and dataset.classes == 10

def test_cifar100_and_svhn(tmp_path, monkeypatch):
    """CIFAR-100's second label byte is the fine one; SVHN's label 10 is digit 0, and none is mirrored."""
    files = dict.fromkeys(['train.bin', 'test.bin'], b'\3' + b'\x63' * 3073)
    dataset = load('cifar100', str(write(tmp_path, files)))
    assert dataset.classes == 100 and dataset.train[1].tolist() == [99]
    x = np.random.default_rng(0).integers(256, size=(32, 32, 3, 2), dtype=np.uint8)
    for name in 'train_32x32.mat', 'test_32x32.mat':
        monkeypatch.setitem(data.SOURCES['svhn'][1], data.SVHN + name, '')
        pytest.importorskip('scipy.io').savemat(tmp_path / name, {'X': x, 'y': [[10], [9]]})
    pixels, labels = load('svhn', str(tmp_path)).train
    assert labels.tolist() == [0, 9] and pixels[1, 2, 5, 11] == x[5, 11, 2, 1]

@pytest.mark.parametrize('old, new, encoding', [
    (b'', b'', 'utf-8-sig'), (b'', b'', 'utf-16'), (b'\n', b'\r\n', 'utf-8'), (b'\n', b'\r', 'utf-8'),
    (SEPARATOR, b'\r\n \t<|endoftext|>  \n', 'utf-8'), (SEPARATOR, SEPARATOR * 2, 'utf-8')])
def test_text_variants(tmp_path, capsys, old, new, encoding):
    """A byte 0 behind each story, all else unchanged. Of a single file the last twentieth is for the test."""
    text = (TEXT.replace(old, new) if old else TEXT) + b'\n \n'
    file = write(tmp_path, {'a.txt': text.decode().encode(encoding)}) / 'a.txt'
    dataset = load('tinystories', str(file))
    train, test = (bytes(part.tolist()) for part in (dataset.train, dataset.test))
    assert train + test == b'\0'.join(STORIES) + b'\0' and 99 <= test.count(b'\0') <= 101
    assert f'{train.count(0):,} stories to train' in capsys.readouterr().err

@pytest.mark.parametrize('name, files, options, words', [
    ('cifar10', {'data_batch_1': b'(lp0'}, {}, 'data_batch_1.bin.*binary.tar.gz.*pickles.*never read'),
    ('cifar100', {'train.bin': b'x', 'test.bin': b''}, {}, 'train.bin.*3074.*truncated'),
    ('cifar10', {}, {'side': 8}, '--side 8'), ('cifar10', {}, {'tokens': 'gpt2'}, '--tokens.*ignored'),
    ('cifar10_16', {}, {}, '--data-dir.*ignored.*built in'), ('cifar1000', {}, {}, 'did you mean cifar100'),
    ('svhn', {'train_32x32.mat': b'<html>', 'test_32x32.mat': b''}, {}, 'train_32x32.mat: wrong checksum'),
    ('tinystories', {'TinyStories.txt': b'<html>' * 9000}, {}, r'TinyStories.txt.*too few.*endoftext'),
    ('tinystories', {'TinyStories.txt': TEXT.decode().encode('utf-16-le')}, {}, 'TinyStories.txt.*as UTF-8')])
def test_error_lines(tmp_path, name, files, options, words):
    """Missing, truncated, of another format, options that do not fit: one line that says what and where."""
    with pytest.raises(ValueError, match=words) as caught:
        load(name, str(write(tmp_path, files)), **options)
    assert '\n' not in str(caught.value)

@pytest.mark.parametrize('status, size, words', [(200, None, ''), (200, 1000, 'checksum'), (404, 0, '404')])
def test_download(tmp_path, monkeypatch, status, size, words):
    """From nothing to a data set; what does not arrive whole is a ValueError with the reason."""
    answer = requests.Response()
    answer.status_code, answer._content = status, ARCHIVE[:size]
    monkeypatch.setattr(requests, 'get', lambda address, timeout: answer)
    monkeypatch.setattr(data, 'DOWNLOADS', tmp_path / 'downloads')
    monkeypatch.setitem(data.SOURCES['cifar10'][1], data.CIFAR + '10-binary.tar.gz', MD5)
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        assert len(load('cifar10').train[1]) == 10

X = torch.randint(1, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = Dataset('numbered', 'image', (X, torch.arange(20)), (X[:5], torch.arange(5)), 20, 3, 8, True)
COUNT = Dataset('text', 'text', torch.arange(5 * BLOCK + 7), torch.arange(1000), 5 * BLOCK + 7)

@pytest.mark.parametrize('name, digest, sums', [
    ('cifar10_16', '195d5f24', ['d60a0a5c', '4ffb1101', 'b1b2eea7', 'f2018ad8']),
    ('tinystories_sample', 'af1c0edc', ['01b7eba4', '9e475ab3', '79b0a4ef', '0a85f27b'])])
def test_batches_are_those_of_the_results(name, digest, sums):
    """Checksums of two batches: the tables in results/ were made with these, and a seed keeps its meaning."""
    dataset = load(name)
    batches = Batches(dataset, split(dataset, 3)[0], 32, seed=5, augment=True, context=64)
    mean, std = dataset.normal if dataset.kind == 'image' else (0, 1)
    found = [t for x, y in (next(batches), next(batches)) for t in ((x * std + mean).round().byte(), y)]
    assert [f'{zlib.crc32(t.contiguous().numpy()):08x}' for t in found] == sums and dataset.digest == digest

@pytest.mark.parametrize('dataset', [IMAGES, COUNT], ids=['images', 'text'])
def test_split_resume_and_device(dataset):
    """Parts are disjoint; batches resume; on 'meta' a read of a value, for which a GPU would wait, raises."""
    parts = [part[-1].flatten() for part in split(dataset, 3)]
    assert torch.equal(torch.cat(parts).sort()[0], torch.arange(sum(map(len, parts))))
    arguments = dataset, data.whole(dataset), 6, 7, True, 16
    batches, again = Batches(*arguments), Batches(*arguments)
    earlier = [next(batches) for _ in range(5)]
    again.load_state_dict(batches.state_dict())
    assert all(map(torch.equal, next(again), new := next(batches))) and not new[0].equal(earlier[0][0])
    assert [t.device.type for t in next(Batches(*arguments, device='meta'))] == ['meta'] * 2
    with pytest.raises(ValueError, match='--batch-size 21: 1 to 20|--context 4096: 1 to 4095'):
        Batches(dataset, data.whole(dataset), 21, 0, context=BLOCK)

def test_augmentation_against_loops():
    """Every image becomes one of its 18 shifted and mirrored variants, by loops; epochs are permutations."""
    seen, padded = set(), np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1)))
    variants = {(k, padded[k, :, i:i + 8, j:j + 8][:, :, ::flip].tobytes()): (i, j, flip)
                for k in range(20) for i in range(3) for j in range(3) for flip in (1, -1)}
    (mean, std), batches = IMAGES.normal, Batches(IMAGES, IMAGES.train, 20, seed=0, augment=True)
    for x, y in (next(batches) for _ in range(20)):
        assert sorted(y.tolist()) == list(range(20))
        seen |= {variants[k, i.round().byte().numpy().tobytes()] for k, i in zip(y.tolist(), x * std + mean)}
    assert len(seen) == 18

def test_windows_and_test_batches():
    """The target is one token on, within a block; the test set comes once, in order."""
    x, y = next(Batches(COUNT, data.whole(COUNT), 300, seed=0, context=BLOCK - 3))
    assert torch.equal(y, x + 1) and torch.equal(x[:, 0] // BLOCK, y[:, -1] // BLOCK)
    x, y = (torch.cat(tensors) for tensors in zip(*data.test_batches(COUNT, 4, context=30)))
    assert x.flatten().tolist() == list(range(990)) and torch.equal(y, x + 1)
    assert torch.cat([y for _, y in data.test_batches(IMAGES, 2)]).tolist() == list(range(5))

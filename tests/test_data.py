"""data.py: files in the publishers' layouts, made byte by byte; batches against loops and known values."""
import hashlib
import itertools
import re
import sys
import tarfile
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch

import data
from data import BLOCK, Batches, Dataset, load, split

RECORDS = [bytes([k % 10]) + bytes((k + 7 * i * i + i // 1024) % 256 for i in range(3072)) for k in range(12)]
CIFAR10 = {f'data_batch_{k + 1}.bin': RECORDS[2 * k] + RECORDS[2 * k + 1] for k in range(5)}
CIFAR10['test_batch.bin'] = RECORDS[10] + RECORDS[11]
STORIES = [f'Once upon a time, number {k} of the cats sat.\n\nThe end.'.encode() for k in range(2000)]
SEPARATOR = b'\n<|endoftext|>\n'
TEXT = SEPARATOR.join(STORIES) + SEPARATOR

def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder

def check_records(dataset):
    x, y = (torch.cat(tensors) for tensors in zip(dataset.train, dataset.test))
    assert b''.join(bytes([k]) + image.numpy().tobytes() for k, image in zip(y, x)) == b''.join(RECORDS)

def test_layouts(tmp_path):
    """The publisher's folder, its parent, a file in it, other case."""
    write(tmp_path / 'a/b', CIFAR10)
    write(tmp_path / 'upper', {name.upper(): content for name, content in CIFAR10.items()})
    for place in 'a/b', 'a', 'a/b/data_batch_1.bin', 'upper':
        check_records(dataset := load('cifar10', str(tmp_path / place)))
    small = load('cifar10', str(tmp_path / 'a'), side=16).test[0].double()
    assert torch.equal(small, dataset.test[0].double().view(2, 3, 16, 2, 16, 2).mean((3, 5)).round())
    assert dataset.mirror and dataset.classes == 10

def test_download(tmp_path, monkeypatch):
    """What does not arrive whole is a ValueError with the reason; of the archive nothing is unpacked."""
    with tarfile.open(tmp_path / 'made', 'w:gz') as tar:
        tar.add(write(tmp_path / 'files', CIFAR10), 'cifar-10-batches-bin')
    archive, answer, name = (tmp_path / 'made').read_bytes(), requests.Response(), 'cifar-10-binary.tar.gz'
    monkeypatch.setitem(data.SOURCES['cifar10'][2], name, hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(requests, 'get', lambda address, timeout: answer)
    monkeypatch.setattr(data, 'DOWNLOADS', tmp_path / 'new')
    for answer.status_code, answer._content, words in (404, b'', '404'), (200, archive[:99], 'checksum'):
        with pytest.raises(ValueError, match=words):
            load('cifar10')
    (tmp_path / 'new' / name).unlink()
    answer._content = archive
    check_records(load('cifar10'))
    assert [path.name for path in (tmp_path / 'new').iterdir()] == [name]

def test_cifar100_and_svhn(tmp_path, monkeypatch):
    """CIFAR-100's second label byte is the fine one; SVHN's label 10 is digit 0, and none is mirrored."""
    x = np.random.default_rng(0).integers(256, size=(32, 32, 3, 2), dtype=np.uint8)
    record = b'\3' + b'\x63' * 3073
    dataset = load('cifar100', str(write(tmp_path / 'a', {'train.bin': record, 'test.bin': record})))
    assert dataset.classes == 100 and dataset.train[1].tolist() == [99]
    for name in data.SOURCES['svhn'][2]:
        monkeypatch.setitem(data.SOURCES['svhn'][2], name, '')
        pytest.importorskip('scipy.io').savemat(tmp_path / name, {'X': x, 'y': [[10], [9]]})
    dataset = load('svhn', str(tmp_path))
    assert not dataset.mirror and dataset.train[1].tolist() == [0, 9]
    assert dataset.train[0][1, 2, 5, 11] == x[5, 11, 2, 1]

@pytest.mark.parametrize('old, new, encoding', [
    (b'', b'', 'utf-8-sig'), (b'', b'', 'utf-16'), (b'\n', b'\r\n', 'utf-8'), (b'\n', b'\r', 'utf-8'),
    (SEPARATOR, b'\r\n \t<|endoftext|>  \n', 'utf-8'), (SEPARATOR, SEPARATOR * 2, 'utf-8')])
def test_text_variants(tmp_path, old, new, encoding):
    """A byte 0 behind each story, all else unchanged. Of a single file the last twentieth is for the test."""
    text = (TEXT.replace(old, new) if old else TEXT) + b'\n \n'
    file = write(tmp_path / 'a', {'a.txt': text.decode().encode(encoding)}) / 'a.txt'
    dataset = load('tinystories', str(file))
    train, test = (bytes(part.tolist()) for part in (dataset.train, dataset.test))
    assert train + test == b'\0'.join(STORIES) + b'\0' and 99 <= test.count(b'\0') <= 101

def test_text_is_in_memory_twice(tmp_path):
    """As a file and as tokens: the published one has 2 GB, and many laptops have 8."""
    file = write(tmp_path / 'a', {'a.txt': (b'A story of a few words. ' * 50 + SEPARATOR) * 2000}) / 'a.txt'
    tracemalloc.start()
    load('tinystories', str(file)).digest
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.3 * file.stat().st_size

def test_gpt2_tokens(tmp_path, monkeypatch):
    """Encoded some stories at a time, which changes nothing; END is one token."""
    def encode(text, allowed_special):  # a word is its length
        assert allowed_special == 'all'
        return [50256 if word == '<|endoftext|>' else len(word) for word in re.findall(r'<.*?>|\w+', text)]
    given = []
    encoding = SimpleNamespace(encode=lambda text, **more: given.append(text) or encode(text, **more))
    monkeypatch.setitem(sys.modules, 'tiktoken', SimpleNamespace(get_encoding={'gpt2': encoding}.get))
    file = write(tmp_path / 'a', {'a.txt': TEXT * 11}) / 'a.txt'
    dataset = load('tinystories', str(file), 'gpt2')
    assert dataset.classes == 50257 and len(given) == 4
    assert torch.cat([dataset.train, dataset.test]).tolist() == encode(TEXT.decode() * 11, 'all')

def test_batches_that_are_kept(monkeypatch):
    """An iterator of a user's is asked once, and left where it was if it can be. 1 GB goes round."""
    class Numbers(itertools.count):
        place = 0
        state_dict = lambda self: {'place': self.place}

        def __next__(self):
            self.place += 1
            return torch.full((1,), self.place), [torch.zeros(1).expand(2 ** 26)]  # 256 MB, as nbytes counts

        def load_state_dict(self, state):
            self.place = state['place']
    numbers = Numbers()
    again = data.repeatable(numbers, 7)
    assert [[int(x) for x, _ in again()] for _ in range(2)] == [[1, 2, 3, 4, 1, 2, 3]] * 2
    assert numbers.place == 0
    del Numbers.load_state_dict
    assert [int(x) for x, _ in data.repeatable(numbers, 3)()] == [1, 2, 3] and numbers.place == 3
    with pytest.raises(ValueError, match='without end'):
        data.repeatable(iter([]), 3)

@pytest.mark.parametrize('name, files, options, words', [
    ('cifar10', {'data_batch_1': b'(lp0'}, {}, 'data_batch_1.bin.*binary.tar.gz.*pickles.*never read'),
    ('cifar100', {'train.bin': b'x', 'test.bin': b''}, {}, 'train.bin.*3074.*truncated'),
    ('cifar10', {}, {'side': 8}, '--side 8'), ('cifar10', {}, {'tokens': 'gpt2'}, '--tokens.*ignored'),
    ('cifar10_16', {}, {}, '--data-dir.*ignored.*built in'),
    ('svhn', {'train_32x32.mat': b'<html>', 'test_32x32.mat': b''}, {}, 'train_32x32.mat: wrong checksum'),
    ('tinystories', {'TinyStories.txt': b'<html>' * 9000}, {}, r'TinyStories.txt.*too few.*endoftext'),
    ('tinystories', {'TinyStories.txt': TEXT.decode().encode('utf-16-le')}, {}, 'TinyStories.txt.*as UTF-8')])
def test_error_lines(tmp_path, name, files, options, words):
    """Missing, truncated, of another format, options that do not fit: one line that says what and where."""
    with pytest.raises(ValueError, match=f'^.*{words}.*$') as caught:
        load(name, str(write(tmp_path / 'a', files)), **options)
    assert '\n' not in str(caught.value)

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

X = torch.randint(1, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = Dataset('numbered', 'image', (X, torch.arange(20)), (X[:5], torch.arange(5)), 20, 3, 8, True)
COUNT = Dataset('text', 'text', torch.arange(5 * BLOCK + 7), torch.arange(1000), 5 * BLOCK + 7)

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
    assert not torch.equal(earlier[0][1], earlier[3][1])  # images: the second epoch has another order
    assert [t.device.type for t in next(Batches(*arguments, device='meta'))] == ['meta'] * 2
    with pytest.raises(ValueError, match='--batch-size 21: 1 to 20|--context 4096: 1 to 4095'):
        Batches(dataset, data.whole(dataset), 21, 0, context=BLOCK)

def test_augmentation_against_loops():
    """Every image becomes one of its 18 shifted and mirrored variants, by loops; epochs are permutations."""
    padded = np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1)))
    variants = {padded[k, :, i:i + 8, j:j + 8][:, :, ::flip].tobytes(): (k, (i, j, flip))
                for k in range(20) for i in range(3) for j in range(3) for flip in (1, -1)}
    (mean, std), batches, seen = IMAGES.normal, Batches(IMAGES, IMAGES.train, 20, 0, augment=True), set()
    for x, y in itertools.islice(batches, 20):
        labels, ways = zip(*(variants[i.round().byte().numpy().tobytes()] for i in x * std + mean))
        assert list(labels) == y.tolist() and sorted(labels) == list(range(20))
        seen.update(ways)
    assert len(seen) == 18
    still = data.augmented(X, False, data.generator('augment', 0, 0))  # digits are not mirrored
    assert all(variants[i.numpy().tobytes()][1][2] == 1 for i in still)

def test_windows_and_test_batches():
    """The target is one token on, within a block; the test set comes once, in order; pixels are N(0, 1)."""
    x, y = next(Batches(COUNT, data.whole(COUNT), 300, seed=0, context=BLOCK - 3))
    assert torch.equal(y, x + 1) and torch.equal(x[:, 0] // BLOCK, y[:, -1] // BLOCK)
    x, y = (torch.cat(tensors) for tensors in zip(*data.test_batches(COUNT, 4, context=30)))
    assert x.flatten().tolist() == list(range(990)) and torch.equal(y, x + 1)
    assert torch.cat([y for _, y in data.test_batches(IMAGES, 2)]).tolist() == list(range(5))
    std, mean = torch.std_mean(next(Batches(IMAGES, IMAGES.train, 20, 0))[0], (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(3), atol=1e-5) and torch.allclose(std, torch.ones(3), atol=1e-5)

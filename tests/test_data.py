"""data.py: files in the publishers' layouts, made byte by byte; batches against loops and known values."""
import hashlib
import http.server
import io
import os
import sys
import tarfile
import threading
import types
import zlib

import numpy as np
import pytest
import torch

import data
from data import BLOCK, Batches, Dataset, load, split

SEPARATOR = b'\n<|endoftext|>\n'
STORIES = [f'Once upon a time, number {k} of the cats sat.\n\nThe end.'.encode() for k in range(2000)]
TEXT = SEPARATOR.join(STORIES) + SEPARATOR


def pixel(k, colour, row, column):
    """Of image k: a different number almost everywhere, so that a wrong order of the bytes shows."""
    return (37 * k + 101 * colour + 7 * row + row * row + 3 * column) % 256


def record(k, *labels):
    """Label bytes, then all of red, all of green, all of blue, row by row."""
    return bytes(labels) + bytes(pixel(k, c, i, j) for c in range(3) for i in range(32) for j in range(32))


def mat(n, **changes):
    """SVHN: pixels lie as (row, column, colour, image)."""
    x = [[[[pixel(k, c, i, j) for k in range(n)] for c in range(3)] for j in range(32)] for i in range(32)]
    content = {'X': np.array(x, np.uint8), 'y': [[10], [1], [9]][:n]} | changes
    pytest.importorskip('scipy.io', reason='scipy is optional').savemat(file := io.BytesIO(), content)
    return file.getvalue()


CIFAR10 = {f'data_batch_{k + 1}.bin': record(2 * k, 2 * k) + record(2 * k + 1, 2 * k + 1) for k in range(5)}
CIFAR10['test_batch.bin'] = record(10, 3) + record(11, 9)
CIFAR100 = {'train.bin': record(0, 11, 99) + record(1, 3, 0), 'test.bin': record(2, 19, 42)}


def write(folder, files, inner='.'):
    for name, content in files.items():
        (folder / inner / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / inner / name).write_bytes(content)
    return folder


def archive(monkeypatch, address='http://x'):
    """An archive with a hostile member, at `address`, whose checksum data.py takes for the published one."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode='w:gz') as tar:
        for name, content in {**CIFAR10, '../../outside': b'!'}.items():
            info = tarfile.TarInfo(f'cifar-10-batches-bin/{name}')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    addresses = {f'{address}/cifar-10-binary.tar.gz': hashlib.md5(file.getvalue()).hexdigest()}
    monkeypatch.setitem(data.SOURCES, 'cifar10', data.SOURCES['cifar10']._replace(addresses=addresses))
    return file.getvalue()


def check(part, labels, first=0):
    """The part has these labels and the images pixel(first), pixel(first + 1), ..."""
    assert part[0].dtype == torch.uint8 and part[0].shape[1:] == (3, 32, 32) and part[1].tolist() == labels
    for k, image in enumerate(part[0]):
        for c, i, j in (0, 0, 0), (2, 31, 31), (1, 0, 31), (0, 31, 0), (2, 5, 11):
            assert image[c, i, j] == pixel(first + k, c, i, j)


@pytest.mark.parametrize('inner, given', [
    ('cifar-10-batches-bin', '.'), ('cifar-10-batches-bin', 'cifar-10-batches-bin'), ('.', '.'),
    ('CIFAR-10-Batches-Bin', '.'), ('.', 'data_batch_1.bin'), ('Größe 10/x', 'Größe 10')])
def test_cifar10_where_people_have_it(tmp_path, inner, given, capsys):
    """The publisher's folder, its parent, a file in it, another name or case. A note says what is missing."""
    files = {name.upper() if 'CIFAR' in inner else name: content for name, content in CIFAR10.items()}
    dataset = load('cifar10', str(write(tmp_path, files, inner) / given))
    check(dataset.train, list(range(10)))
    check(dataset.test, [3, 9], first=10)
    assert (dataset.kind, dataset.classes, dataset.channels, dataset.side) == ('image', 10, 3, 32)
    assert dataset.mirror and '12 of the 60,000' in capsys.readouterr().err


@pytest.mark.parametrize('given', ['in/here', 'in/here/cifar-10-binary.tar.gz', '~/here'])
def test_cifar10_from_its_archive(tmp_path, monkeypatch, given):
    """No member, not even a hostile one, is written. A ~ is the home folder; links are followed."""
    write(tmp_path, {'cifar-10-binary.tar.gz': archive(monkeypatch)}, 'in/here')
    (tmp_path / 'home').symlink_to(tmp_path / 'in')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    check(load('cifar10', given if given[0] == '~' else str(tmp_path / given)).train, list(range(10)))
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['cifar-10-binary.tar.gz', 'here', 'home', 'in']


def test_cifar100_and_svhn(tmp_path):
    """CIFAR-100's second label byte is the fine one; SVHN's label 10 is digit 0, and none is mirrored."""
    dataset = load('cifar100', str(write(tmp_path, CIFAR100, 'cifar-100-binary')))
    check(dataset.train, [99, 0])
    check(dataset.test, [42], first=2)
    assert dataset.classes == 100 and dataset.mirror
    dataset = load('svhn', str(write(tmp_path, {'train_32x32.mat': mat(3), 'test_32x32.mat': mat(2)})))
    check(dataset.train, [0, 1, 9])
    check(dataset.test, [0, 1])
    assert dataset.classes == 10 and not dataset.mirror


def test_side_and_digest(tmp_path):
    """side=16: a pixel is the rounded mean of four. digest: CRC-32 of all data, so each byte changes it."""
    full, small = (load('cifar100', str(write(tmp_path, CIFAR100)), side=side) for side in (32, 16))
    assert (full.side, small.side) == (32, 16) and small.train[0].shape == (2, 3, 16, 16)
    means = full.test[0][0].double().view(3, 16, 2, 16, 2).mean((2, 4))
    assert torch.equal(small.test[0][0].double(), means.round()) and (means.floor() != means.round()).any()
    whole = b''.join(tensor.numpy().tobytes() for tensor in (*full.train, *full.test))
    assert full.digest == f'{zlib.crc32(whole):08x}'
    digests = {full.digest, small.digest}
    for name, at in ('train.bin', 1), ('train.bin', 3000), ('test.bin', 1), ('test.bin', 3073):
        changed = bytearray(CIFAR100[name])
        changed[at] ^= 1
        digests.add(load('cifar100', str(write(tmp_path, CIFAR100 | {name: changed}))).digest)
    assert len(digests) == 6


@pytest.mark.parametrize('change', {
    'LF': lambda text: text, 'CRLF': lambda text: text.replace(b'\n', b'\r\n'),
    'CR': lambda text: text.replace(b'\n', b'\r'), 'mark': lambda text: b'\xef\xbb\xbf' + text,
    'blanks': lambda text: text.replace(SEPARATOR, b'\r\n \t<|endoftext|>  \n'),
    'no last': lambda text: text.removesuffix(SEPARATOR) + b'\n \n', 'more': lambda text: text + b'\n\n',
    'first': lambda text: SEPARATOR + text, 'inline': lambda text: text.replace(SEPARATOR, b'<|endoftext|>'),
    'twice': lambda text: text.replace(SEPARATOR, SEPARATOR + SEPARATOR[1:]),
    'UTF-16': lambda text: text.decode().encode('utf-16')}.items(), ids=lambda item: item[0])
def test_any_text(tmp_path, change):
    """From any system: a byte 0 behind each story, all else unchanged. The last twentieth is for the test."""
    dataset = load('tinystories', str(write(tmp_path, {'a.txt': change[1](TEXT)}) / 'a.txt'))
    train, test = (bytes(part.tolist()) for part in (dataset.train, dataset.test))
    assert train + test == b'\0'.join(STORIES) + b'\0' and 99 <= test.count(b'\0') <= 101 and train[-1] == 0
    assert (dataset.kind, dataset.classes, dataset.mirror) == ('text', 256, False)


@pytest.mark.parametrize('names, note', [
    (['TinyStories-Train.txt', 'tinystories-valid.TXT'], ''),
    (['x/TinyStoriesV2-GPT4-train.txt', 'x/TinyStoriesV2-GPT4-valid.txt'], ''),
    (['TinyStoriesV2-GPT4-train.txt', 'TinyStoriesV2-GPT4-valid.txt', 'TinyStories.txt'], 'V2-GPT4')])
def test_story_files(tmp_path, names, note, capsys):
    """Both versions' two files, under the publisher's names; of several versions the one used is named."""
    dataset = load('tinystories', str(write(tmp_path, dict(zip(names, [TEXT, TEXT[-9000:], b''])))))
    assert bytes(dataset.train.tolist()).split(b'\0')[:-1] == STORIES and 5000 < len(dataset.test) < 9000
    assert note in (error := capsys.readouterr().err) and bool(note) == bool(error)


def test_gpt2_tokens(tmp_path, monkeypatch):
    """A token 50256 behind each story, with a stand-in for tiktoken; without the package one line says so."""
    folder = str(write(tmp_path, {'TinyStories.txt': TEXT}))
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(ValueError, match='tiktoken.*--tokens bytes'):
        load('tinystories', folder, tokens='gpt2')
    encoding = types.SimpleNamespace(n_vocab=50257, eot_token=50256, encode_ordinary_batch=lambda texts: [
        [ord(letter) + 1000 for letter in text] for text in texts])
    monkeypatch.setitem(sys.modules, 'tiktoken', types.SimpleNamespace(get_encoding={'gpt2': encoding}.get))
    dataset = load('tinystories', folder, tokens='gpt2')
    expected = [token for story in STORIES for token in [*(byte + 1000 for byte in story), 50256]]
    assert torch.cat([dataset.train, dataset.test]).tolist() == expected and dataset.classes == 50257


def test_built_in_samples():
    """As samples/README.md says; no test image or story is in the training set; to git they are binary."""
    images, text = load('cifar10_16', side=16), load('tinystories_sample')
    assert [torch.bincount(y).tolist() for _, y in (images.train, images.test)] == [[500] * 10, [100] * 10]
    train, test = ({image.numpy().tobytes() for image in part[0]} for part in (images.train, images.test))
    assert images.side == 16 and not train & test
    train, test = (set(bytes(part.tolist()).split(b'\0')) for part in (text.train, text.test))
    assert train & test == {b''} and b'endoftext' not in b''.join(train | test)
    assert (images.digest, text.digest) == ('195d5f24', 'af1c0edc')
    attributes = (data.SAMPLES.parent / '.gitattributes').read_text().splitlines()
    assert {'samples/*.txt binary', 'samples/*.bin binary'} <= set(attributes)


PICKLES = {'cifar-10-batches-py/data_batch_1': b'(lp0'}
PAGE = {f'TinyStories-{part}.txt': b'<html>' * 9000 for part in ('train', 'valid')}


@pytest.mark.parametrize('name, files, options, words', [
    ('cifar10', {}, {}, ['data_batch_1.bin', 'or cifar-10-binary.tar.gz', 'https://']),
    ('cifar10', {'cifar-10-batches-bin/data_batch_2.bin': b''}, {}, ['lacks data_batch_1.bin, data_batch_3']),
    ('cifar10', PICKLES, {}, ['pickles', 'never read', 'data_batch_1.bin', 'https://']),
    ('cifar10', PICKLES, {'data_dir': 'cifar-10-batches-py'}, ['pickles']),
    ('cifar10', {'data_batch_1': b'(lp0', 'batches.meta': b''}, {}, ['pickles']),
    ('cifar10', {'cifar-10-python.tar.gz': b'x'}, {'data_dir': 'cifar-10-python.tar.gz'}, ['pickles']),
    ('cifar10', {'cifar-10-binary.tar.gz': b'x'}, {}, ['binary.tar.gz', 'c32a1d4ab5d03f1284b67883e8d87530']),
    ('cifar10', {name: bytes(3073 * 1000) for name in CIFAR10}, {}, ['data_batch_1.bin', 'labels 0 to 0']),
    ('cifar100', CIFAR100 | {'train.bin': record(0, 1, 2)[:-1]}, {}, ['train.bin', '3073', 'truncated']),
    ('cifar100', CIFAR100 | {'test.bin': b''}, {}, ['test.bin', 'truncated']),
    ('cifar100', CIFAR100 | {'test.bin': record(0, 1, 100)}, {}, ['test.bin', 'labels 100 to 100']),
    ('cifar100', CIFAR100, {'side': 8}, ['--side 8', '32 or 16']),
    ('cifar10_16', {}, {'data_dir': None, 'side': 32}, ['--side 32', 'side 16']),
    ('tinystories_sample', {}, {'data_dir': None, 'side': 16}, ['--side 16', 'text']),
    ('cifar10_16', {}, {}, ['built in', 'ignored', '--data cifar10 --side 16']),
    ('tinystories_sample', {}, {}, ['built in', 'ignored', '--data tinystories']),
    ('cifar10', CIFAR10, {'tokens': 'gpt2'}, ['--tokens gpt2', 'images']),
    ('tinystories_sample', {}, {'data_dir': None, 'tokens': 'gpt'}, ['did you mean gpt2']),
    ('svhn', {'train_32x32.mat': b''}, {}, ['lacks test_32x32.mat', 'http://']),
    ('svhn', {'train_32x32.mat': b'<html>', 'test_32x32.mat': b''}, {}, ['train_32x32.mat', 'no .mat file']),
    ('tinystories', {}, {}, ['TinyStoriesV2-GPT4-train.txt', 'or TinyStories.txt', 'https://']),
    ('tinystories', {'TinyStoriesV2-GPT4-train.txt': TEXT}, {}, ['lacks TinyStoriesV2-GPT4-valid.txt']),
    ('tinystories', PAGE, {}, ['TinyStories-train.txt', '2 stories', '<|endoftext|>']),
    ('tinystories', PAGE, {'data_dir': 'TinyStories-train.txt'}, ['1 stories', '<|endoftext|>']),
    ('tinystories', {'TinyStories.txt': TEXT[:40_000]}, {}, ['TinyStories.txt', 'too few']),
    ('tinystories', dict(zip(PAGE, [TEXT[:9000], TEXT])), {}, ['TinyStories-train.txt', 'too few']),
    ('tinystories', {'TinyStories.txt/x': b''}, {}, ['cannot read', 'TinyStories.txt']),
    ('cifar10', {}, {'data_dir': 'nowhere'}, ['nowhere', 'no such folder']),
    ('cifar1000', {}, {}, ['did you mean cifar100'])])
def test_errors(tmp_path, name, files, options, words):
    """Missing, truncated, of another format, options that do not fit: one line that says what and where."""
    given = options.get('data_dir', '.')
    with pytest.raises(ValueError) as caught:
        load(name, **options | {'data_dir': given and str(write(tmp_path, files) / given)})
    assert all(word in str(caught.value) for word in words) and len(str(caught.value).splitlines()) == 1


def test_other_mat_files(monkeypatch):
    """Labels and shapes that are not SVHN's; and no scipy."""
    for changes in {'y': [[11], [1], [2]]}, {'y': [[0], [1], [2]]}, {'X': np.zeros((32, 32, 3, 2), np.uint8)}:
        with pytest.raises(ValueError, match='x.mat.*32 x 32 x 3 x n'):
            data.svhn('x.mat', mat(3, **changes))
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    with pytest.raises(ValueError, match='pip install scipy'):
        data.svhn('x.mat', b'')


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends server.content; /cut: half of it; /slow: when two have asked; /missing: 404."""

    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path == '/missing':
            return self.send_error(404)
        self.send_response(200)
        self.send_header('Content-Length', str(len(self.server.content)))
        self.end_headers()
        if self.path == '/slow':
            self.server.two.wait(20)
        self.wfile.write(self.server.content[:len(self.server.content) // (2 if self.path == '/cut' else 1)])

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    """On the loopback address; its 3 MB are more than one chunk of a download."""
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.daemon_threads, server.requests, server.two = True, [], threading.Barrier(2)
        server.content, server.address = bytes(range(256)) * 12_000, f'http://127.0.0.1:{server.server_port}'
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_load_downloads_once(server, tmp_path, monkeypatch):
    """From nothing to a data set through an archive; the second time without a request."""
    server.content = archive(monkeypatch, server.address)
    monkeypatch.setattr(data, 'DOWNLOADS', tmp_path / 'new/downloads')
    for _ in range(2):
        check(load('cifar10').train, list(range(10)))
    assert server.requests == ['/cifar-10-binary.tar.gz']


@pytest.mark.parametrize('path, md5, words', [
    ('/whole', 'f' * 32, f"wrong checksum, expected {'f' * 32}, got"), ('/cut', None, 'broke after'),
    ('/missing', None, '404'), (':1/', None, 'no connection'), ('/full', None, 'No space left')])
def test_downloads_that_fail(server, tmp_path, monkeypatch, path, md5, words):
    """One line with address, reason and what to do; nothing is left behind."""
    if path == '/full':
        monkeypatch.setattr(data.os, 'replace', lambda *_: os.write(full.fileno(), b'x'))
    address = 'http://127.0.0.1' + path if path[0] == ':' else server.address + path
    with open('/dev/full', 'wb') as full, pytest.raises(ValueError) as caught:
        data.download(address, tmp_path / 'file', md5)
    assert not list(tmp_path.iterdir()) and len(str(caught.value).splitlines()) == 1
    assert all(word in str(caught.value) for word in (words, address, '--data-dir', 'built in'))


def test_two_downloads_at_once(server, tmp_path):
    """Two that want the same file write at the same time: both succeed, and one whole file is there."""
    wanted = f'{server.address}/slow', tmp_path / 'file', None
    other = threading.Thread(target=data.download, args=wanted)
    other.start()
    data.download(*wanted)
    other.join()
    assert server.requests == ['/slow'] * 2 and [path.name for path in tmp_path.iterdir()] == ['file']
    assert (tmp_path / 'file').read_bytes() == server.content


def numbered(n, mirror=True):
    """Images of noise with their own index as label, so that a batch tells which images are in it."""
    x = torch.randint(1, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    return Dataset('numbered', 'image', (x, torch.arange(n)), (x[:5], torch.arange(5)), n, 3, 8, mirror)


def text_of(n):
    """n blocks of the tokens 0, 1, 2, ...: a token tells its place."""
    return Dataset('text', 'text', torch.arange(n * BLOCK + 7), torch.arange(1000), n * BLOCK + 7)


def test_split():
    """75 and 25 %, disjoint, complete, shuffled by the seed alone; images keep labels, blocks stay whole."""
    dataset = numbered(103)
    (x, y), (val_x, val_y) = split(dataset, seed=3)
    assert (len(y), len(val_y)) == (77, 26) and sorted(torch.cat([y, val_y]).tolist()) == list(range(103))
    assert torch.equal(x, dataset.train[0][y]) and torch.equal(val_x, dataset.train[0][val_y])
    assert torch.equal(split(dataset, 3)[0][1], y) and not torch.equal(split(dataset, 4)[0][1], y)
    train, val = split(text_of(16), seed=0)
    assert (train.shape, val.shape) == ((12, BLOCK), (4, BLOCK)) and (train.diff() == 1).all()
    assert torch.equal(torch.cat([train, val]).flatten().sort()[0], torch.arange(16 * BLOCK))


@pytest.mark.parametrize('size', [5, 7, 20])
def test_epochs_are_permutations(size):
    """No image twice in an epoch, every epoch in another order."""
    batches = Batches(numbered(20), numbered(20).train, size, seed=1)
    epochs = [tuple(k for _ in range(20 // size) for k in next(batches)[1].tolist()) for _ in range(12)]
    assert all(len(set(epoch)) == 20 // size * size for epoch in epochs) and len(set(epochs)) == 12
    assert set(sum(epochs, ())) == set(range(20))


@pytest.mark.parametrize('kind', ['image', 'text', 'teacher'])
def test_a_batch_is_a_function_of_seed_and_number(kind):
    """A run that was interrupted goes on with the same batches, whatever else draws random numbers."""
    def fresh(seed):
        if kind == 'teacher':
            teacher = torch.nn.Sequential()
            teacher.first = torch.nn.Linear(3, 2)
            torch.nn.init.ones_(teacher.first.weight), torch.nn.init.zeros_(teacher.first.bias)
            return data.TeacherBatches(teacher, 4, seed)
        dataset = numbered(20) if kind == 'image' else text_of(5)
        return Batches(dataset, data.whole(dataset), 6, seed, augment=True, context=16)
    batches, again = fresh(7), fresh(7)
    sequence = [next(batches) for _ in range(8)]
    for k in (5, 2, 7, 0):
        torch.rand(5)
        again.load_state_dict({'position': k})
        assert all(torch.equal(a, b) for a, b in zip(next(again), sequence[k]))
        assert again.state_dict() == {'position': k + 1}
    assert len({x.sum().item() for x, _ in [*sequence, next(fresh(8))]}) == 9
    if kind == 'teacher':
        x, y = sequence[0]
        torch.testing.assert_close(y, x.sum(1, keepdim=True).expand(4, 2))


@pytest.mark.parametrize('name, sums', [
    ('cifar10_16', ['d60a0a5c', '4ffb1101', 'b1b2eea7', 'f2018ad8']),
    ('tinystories_sample', ['01b7eba4', '9e475ab3', '79b0a4ef', '0a85f27b'])])
def test_batches_are_those_of_the_results(name, sums):
    """Checksums of two batches: the tables in results/ were made with these, and a seed keeps its meaning."""
    dataset = load(name)
    batches = Batches(dataset, split(dataset, 3)[0], 32, seed=5, augment=True, context=64)
    mean, std = dataset.normal if dataset.kind == 'image' else (0, 1)
    found = [t for x, y in (next(batches), next(batches)) for t in ((x * std + mean).round().byte(), y)]
    assert [f'{zlib.crc32(tensor.contiguous().numpy()):08x}' for tensor in found] == sums


def variants(image, mirror):
    """All that augmentation may make of an image, by loops: shifted by up to an eighth, mirrored."""
    found = {}
    for down, right, flip in [(d, r, f) for d in (-1, 0, 1) for r in (-1, 0, 1) for f in range(1 + mirror)]:
        out = torch.zeros_like(image)
        for i, j in [(i, j) for i in range(8) for j in range(8)]:
            column = (7 - j if flip else j) + right
            if 0 <= i + down < 8 and 0 <= column < 8:
                out[:, i, j] = image[:, i + down, column]
        found[out.numpy().tobytes()] = down, right, flip
    return found


@pytest.mark.parametrize('mirror', [False, True])
def test_augmentation_against_loops(mirror):
    """Each image becomes one of its variants, all about equally often; validation images stay as they are."""
    dataset = numbered(30, mirror)
    pixels = dataset.train[0].double()
    mean, std = pixels.mean((0, 2, 3)).view(-1, 1, 1), pixels.std((0, 2, 3), correction=0).view(-1, 1, 1)
    allowed, counts = [variants(image, mirror) for image in dataset.train[0]], {}
    batches = Batches(dataset, dataset.train, 30, seed=0, augment=True)
    for x, y in (next(batches) for _ in range(40)):
        for image, label in zip((x.double() * std + mean).round().byte(), y.tolist()):
            variant = allowed[label][image.numpy().tobytes()]  # KeyError: no shift or mirror makes this
            counts[variant] = counts.get(variant, 0) + 1
    expected = 1200 / (9 * (1 + mirror))
    assert len(counts) == 9 * (1 + mirror)
    assert all(abs(count - expected) < 5 * expected ** 0.5 for count in counts.values())
    x, y = next(Batches(dataset, dataset.train, 30, seed=0))
    torch.testing.assert_close(x.double(), (pixels[y] - mean) / std, atol=1e-5, rtol=0)


def test_windows_of_text():
    """The target is one token on; no window spans two blocks; both ends of every block are reached."""
    dataset = text_of(3)
    x, y = next(Batches(dataset, data.whole(dataset), 300, seed=0, context=BLOCK - 3))
    assert x.dtype == torch.int64 and torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(BLOCK - 3))
    assert torch.equal(x[:, 0] // BLOCK, y[:, -1] // BLOCK)
    assert set(x[:, 0].tolist()) == {block * BLOCK + start for block in range(3) for start in range(3)}


def test_test_batches():
    """Each image once, in order; of a text each token but the first is a target once, up to the rest."""
    dataset = load('cifar10_16')
    seen = list(data.test_batches(dataset, 300))
    mean, std = dataset.normal
    assert [len(y) for _, y in seen] == [300, 300, 300, 100]
    assert torch.equal(torch.cat([y for _, y in seen]), dataset.test[1])
    assert torch.equal((torch.cat([x for x, _ in seen]) * std + mean).round().byte(), dataset.test[0])
    x, y = (torch.cat(tensors) for tensors in zip(*data.test_batches(text_of(2), 4, context=30)))
    assert x.flatten().tolist() == list(range(990)) and torch.equal(y, x + 1)


def test_no_batch_waits_for_the_device():
    """The device 'meta' has no values: reading one, as .item() does, raises. On a GPU it would wait."""
    for dataset in numbered(20), text_of(5):
        batches = Batches(dataset, data.whole(dataset), 6, 0, augment=True, context=16, device='meta')
        assert [tensor.device.type for _ in range(5) for tensor in next(batches)] == ['meta'] * 10


@pytest.mark.parametrize('dataset, size, context, words', [
    (numbered(10), 11, 1, '--batch-size 11: 1 to 10'), (numbered(10), 0, 1, '--batch-size 0: 1 to 10'),
    (text_of(2), 1, BLOCK, f'--context {BLOCK}: 1 to {BLOCK - 1}'), (text_of(0), 1, 16, '0 blocks')])
def test_parts_that_are_too_small(dataset, size, context, words):
    """A batch larger than its part, a window longer than a block, a text without one: one line, at once."""
    with pytest.raises(ValueError, match=words):
        Batches(dataset, data.whole(dataset), size, 0, context=context)

"""download.download against a server on loopback: good files, and all that goes wrong on the way."""
import gzip
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import data
from data import load
from download import DataError, download
from test_data import ROOT, archive_of, check_cifar10, cifar10_files

CONTENT = bytes(range(256)) * 24_000  # 6 MB: half of it is more than a chunk of the download
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """What the path says: good, truncated, missing, slow (until the test says go on), or compressed on the way."""

    def do_GET(self):
        self.server.requests.append(self.path)
        name = self.path.strip('/').split('.')[0]
        if name == 'missing':
            return self.send_error(404)
        content, headers = CONTENT, {}
        if name == 'compressed' and 'gzip' in self.headers.get('Accept-Encoding', ''):
            content, headers = gzip.compress(CONTENT, 1), {'Content-Encoding': 'gzip'}
        self.send_response(200)
        for key, value in {'Content-Length': str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        sent = content[:len(content) // 2] if name in ('truncated', 'slow') else content
        self.wfile.write(sent)
        if name == 'slow':
            self.wfile.flush()
            self.server.go_on.wait(20)
            self.wfile.write(content[len(sent):])

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    """Its address; `requests` and `go_on` are on server.http."""
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as http_server:
        http_server.daemon_threads = True
        http_server.requests, http_server.go_on = [], threading.Event()
        http_server.address = f'http://127.0.0.1:{http_server.server_port}'
        thread = threading.Thread(target=http_server.serve_forever, args=(0.05,))
        thread.start()
        yield http_server
        http_server.go_on.set()
        http_server.shutdown()
        thread.join()


def test_download(server, tmp_path):
    """A good file arrives whole, alone in its (new) folder, and is not fetched again."""
    path = tmp_path / 'new/file.bin'
    for _ in range(2):
        download(f'{server.address}/good.bin', path, MD5)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ['file.bin'] and len(server.requests) == 1
    download(f'{server.address}/good.bin', tmp_path / 'unchecked', None)
    assert (tmp_path / 'unchecked').read_bytes() == CONTENT


def test_download_that_is_compressed_on_the_way(server, tmp_path):
    """The count of bytes and the checksum are those of the file, whatever the server would like to send."""
    download(f'{server.address}/compressed.txt', tmp_path / 'file', MD5)
    assert (tmp_path / 'file').read_bytes() == CONTENT


def failure(address: str, path: Path, md5: str) -> str:
    """The message of a download that must fail; nothing is left behind."""
    with pytest.raises(DataError) as caught:
        download(address, path, md5)
    message = str(caught.value)
    assert os.listdir(path.parent) == [] and len(message.splitlines()) == 1
    for word in address, '--data-dir', 'cifar10_16', 'tinystories_sample':
        assert word in message
    return message


def test_download_truncated(server, tmp_path):
    """A connection that breaks in the middle does not leave half a file."""
    assert 'broke' in failure(f'{server.address}/truncated.bin', tmp_path / 'file', MD5)
    failure(f'{server.address}/truncated.bin', tmp_path / 'file', None)


def test_download_with_wrong_checksum(server, tmp_path):
    """Both checksums are named and the bad file is removed."""
    message = failure(f'{server.address}/good.bin', tmp_path / 'file', 'f' * 32)
    assert f"expected {'f' * 32}, got {MD5}" in message


def test_download_of_what_is_not_there(server, tmp_path):
    assert 'the server answered 404' in failure(f'{server.address}/missing.bin', tmp_path / 'file', MD5)


def test_download_without_network(tmp_path, monkeypatch):
    """Connection refused: nobody listens on a port that was just given back."""
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    with http.server.HTTPServer(('127.0.0.1', 0), Handler) as closed:
        port = closed.server_port
    assert 'no connection' in failure(f'http://127.0.0.1:{port}/file', tmp_path / 'file', MD5)


def child(address: str, path: Path) -> subprocess.Popen:
    code = f'import download, pathlib; download.download({address!r}, pathlib.Path({str(path)!r}), {MD5!r})'
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(0.02)


def test_download_interrupted_and_started_again(server, tmp_path):
    """kill -9 in the middle: no file under its final name, and the next attempt gets all of it."""
    path = tmp_path / 'file'
    process = child(f'{server.address}/slow.bin', path)
    wait_for(lambda: any(p.stat().st_size for p in tmp_path.iterdir()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    server.go_on.set()
    download(f'{server.address}/slow.bin', path, MD5)
    assert path.read_bytes() == CONTENT


def test_two_downloads_at_once(server, tmp_path):
    """Two processes that want the same file do each other no harm."""
    path = tmp_path / 'file'
    processes = [child(f'{server.address}/slow.bin', path) for _ in range(2)]
    wait_for(lambda: len(server.requests) == 2)
    server.go_on.set()
    assert [process.wait(30) for process in processes] == [0, 0]
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ['file']


def test_load_downloads_checks_and_reads(server, tmp_path, monkeypatch):
    """From nothing to a data set, through an archive; the second time without a request."""
    content = archive_of(cifar10_files(Path('cifar-10-batches-bin')))
    monkeypatch.setattr(sys.modules[__name__], 'CONTENT', content)
    monkeypatch.setattr(data, 'DOWNLOADS', tmp_path / 'downloads')
    address = f'{server.address}/cifar-10-binary.tar.gz'
    monkeypatch.setitem(data.SOURCES, 'cifar10', [(address, hashlib.md5(content).hexdigest())])
    for _ in range(2):
        check_cifar10(load('cifar10'))
    assert server.requests == ['/cifar-10-binary.tar.gz']

"""The files of a data set, as their publishers have them: fetched, checked, read.

Split off from data.py, which knows what is in them.
"""
import contextlib
import hashlib
import os
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Optional

import requests


class DataError(ValueError):
    """Data that is missing, damaged or cannot be fetched. One line: the file or address, what is wrong, the mend."""


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f'cannot read {path}: {error.strerror}') from None


def md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(path, 'rb') as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f'cannot read {path}: {error.strerror}') from None
    return digest.hexdigest()


def download(address: str, path: Path, md5: Optional[str]) -> None:
    """Fetch `address` to `path` unless it is there. It is written under a temporary name of this process, checked and
    then renamed, so that what stands at `path` is whole, and two processes that download at once do no harm."""
    if path.exists():
        return
    temporary = path.with_name(f'{path.name}.{os.getpid()}.part')
    get = dict(stream=True, timeout=30, headers={'Accept-Encoding': 'identity'})  # else the sizes would not compare
    elsewhere = 'or fetch it by other means and give its folder with --data-dir; the built-in samples (--data ' \
                'cifar10_16, tinystories_sample) need no network'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f'{path.name}.*.part'):  # of a process that was killed
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        with requests.get(address, **get) as answer, open(temporary, 'wb') as file:
            answer.raise_for_status()
            length, got = answer.headers.get('Content-Length', ''), 0
            size = int(length) if length.isdecimal() else 0
            for chunk in answer.iter_content(1 << 20):
                got += len(chunk)
                file.write(chunk)
                if sys.stderr.isatty():
                    print(f'\rdownloading {path.name}: {got / 1e6:.0f} of {size / 1e6:.0f} MB', end='', file=sys.stderr)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        if size and got != size:
            raise DataError(f'{address}: the connection broke after {got} of {size} bytes; try again, {elsewhere}')
        if md5 and (found := md5_of(temporary)) != md5:
            raise DataError(f'{address}: wrong checksum, expected {md5}, got {found}; the file was removed; try again, '
                            f'{elsewhere}')
        os.replace(temporary, path)
    except requests.RequestException as error:
        status = getattr(error.response, 'status_code', None)
        why = f'the server answered {status}' if status else f'no connection, or it broke ({type(error).__name__})'
        raise DataError(f'{address}: {why}; try again, {elsewhere}') from None
    except OSError as error:
        raise DataError(f'cannot write {temporary}: {error.strerror}; make room, {elsewhere}') from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def members(folder: Path, inner: str, names: list[str], source: tuple[str, Optional[str]]) -> list[bytes]:
    """The contents of the named files: from `folder/inner`, else from `folder`, else out of the publisher's archive
    in `folder`. The archive is read member by member and never unpacked, so its file names cannot do harm."""
    for place in folder / inner, folder:
        if any((place / name).exists() for name in names):
            missing = [name for name in names if not (place / name).exists()]
            if missing:
                raise DataError(f'{place} lacks {", ".join(missing)}; it should hold {", ".join(names)}')
            return [read(place / name) for name in names]
    archive = folder / source[0].rsplit('/', 1)[1]
    if not archive.exists():
        raise DataError(f'{folder} holds neither {inner}/{names[0]} nor {archive.name}; the latter is at {source[0]}')
    if (found := md5_of(archive)) != source[1]:
        raise DataError(f'{archive}: wrong checksum, expected {source[1]}, got {found}; delete it and fetch it again')
    try:
        with tarfile.open(archive) as tar:
            return [tar.extractfile(f'{inner}/{name}').read() for name in names]
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error, AttributeError) as error:
        raise DataError(f'{archive} is damaged ({error}); delete it and fetch it again') from None

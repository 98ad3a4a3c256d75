"""DeepMind's public parameter files, fetched by their published addresses.

`dm:F1` is `https://storage.googleapis.com/dm-nfnets/F1_haiku.npz`; NFZOO_DM_URL names a mirror of the folder instead. A
file is kept in the Hub's cache folder (`$HF_HOME/nfzoo`), and a download that was cut goes on where it stopped.

Source: the table of the code released with arXiv 2102.06171.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from tqdm import tqdm

from nfzoo.errors import ConversionError

PUBLISHED = "https://storage.googleapis.com/dm-nfnets"
MODELS = tuple(f"F{n}" for n in range(7))
ATTEMPTS = 5
PATIENCE = 30.0  # seconds without a byte
FIRST_PAUSE = 1.0  # seconds; doubled after each failure
CHUNK = 1 << 20


class _Version(NamedTuple):
    """Which content an address has now; parts of different ones do not belong together."""

    etag: str | None
    length: int
    md5: str | None


class _RetryError(Exception):
    """Worth another attempt."""


def published_url(name: str, base: str | None = None) -> str:
    """The address of `dm:F1`, `dm:f1`, … below `base`, by default the mirror's or else DeepMind's.

    Raises:
        ConversionError: if DeepMind published no such file.
    """
    match = re.fullmatch(r"dm:([Ff][0-6])", name)
    if match is None:
        raise ConversionError(f"{name!r} names no published file; there are {', '.join('dm:' + m for m in MODELS)}")
    base = base or os.environ.get("NFZOO_DM_URL") or PUBLISHED
    return f"{base.rstrip('/')}/{match[1].upper()}_haiku.npz"


def fetch(name: str, *, progress: bool = False) -> Path:
    """The file of `dm:F0` … `dm:F6`, from the cache or else from the network; whole, or not at all.

    Its length is checked, and its MD5 where the server tells it (Google's does). Only one process downloads a file at a
    time; the others wait for it.

    Raises:
        ConversionError: if there is no such file, or it cannot be had, with the reason.
    """
    url = published_url(name)
    folder = Path(constants.HF_HOME) / "nfzoo" / hashlib.sha256(url.encode()).hexdigest()[:8]
    target = folder / url.rpartition("/")[2]
    if target.is_file():
        return target
    if constants.HF_HUB_OFFLINE:
        raise ConversionError(f"{url} is not in the cache, {folder}, and HF_HUB_OFFLINE forbids to fetch it")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".partial")) as partial:
        if not target.is_file():  # another process may have been faster
            _download(url, partial, progress=progress)
            os.replace(partial.name, target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[io.BufferedRandom]:
    """The file, open for reading and writing by this process alone, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows, where a file open twice cannot be renamed, so that nothing broken is taken for whole
        fcntl = None
    while True:
        with path.open("ab+") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock before may have moved the file away: then this one is no longer what `path` names.
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                continue
            yield file
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                path.unlink()
            return


def _download(url: str, partial: io.BufferedRandom, *, progress: bool) -> None:
    """Fill `partial` with what the address has, going on from what is in it if that is of the same content."""
    note = Path(f"{partial.name}.json")
    pause = FIRST_PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        try:
            version = _attempt(url, partial, note, progress=progress)
            _check(partial, version)
            note.unlink(missing_ok=True)
            return
        except _RetryError as error:
            if attempt == ATTEMPTS:
                kept = "; what has come is kept" if os.fstat(partial.fileno()).st_size else ""
                raise ConversionError(
                    f"{_shown(url)} could not be fetched in {ATTEMPTS} attempts: {error}. Check the connection and try "
                    f"again{kept}"
                ) from error
            time.sleep(pause)
            pause *= 2


def _attempt(url: str, partial: io.BufferedRandom, note: Path, *, progress: bool) -> _Version:
    size = partial.seek(0, os.SEEK_END)
    known = _noted(note)
    if size and known is not None and known.etag and size < known.length:
        response = _open(url, {"Range": f"bytes={size}-", "If-Range": known.etag})
    else:
        response = _open(url, {})
    with response:
        if response.status == 206 and known is not None:
            wanted = f"bytes {size}-{known.length - 1}/{known.length}"
            if response.headers.get("Content-Range") != wanted:
                partial.truncate(0)
                raise _RetryError(f"the server sent {response.headers.get('Content-Range')} for {wanted}")
            version = known
        else:
            partial.truncate(0)
            size = 0
            version = _version(url, response)
            note.write_text(json.dumps(version), encoding="utf-8")
        title = url.rpartition("/")[2]
        with tqdm(
            desc=title, initial=size, total=version.length, unit="B", unit_scale=True, disable=not progress
        ) as bar:
            while size < version.length:
                try:
                    chunk = response.read(min(CHUNK, version.length - size))
                except (OSError, http.client.HTTPException) as error:
                    raise _RetryError(
                        f"the connection broke after {size} of {version.length} bytes ({error})"
                    ) from error
                if not chunk:
                    raise _RetryError(f"the connection ended after {size} of {version.length} bytes")
                partial.write(chunk)
                size += len(chunk)
                bar.update(len(chunk))
        partial.flush()
    return version


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (408, 416, 429) or error.code >= 500:
            raise _RetryError(f"the server answered {error.code} {error.reason}") from error
        raise ConversionError(
            f"{_shown(url)} cannot be fetched: the server answered {error.code} {error.reason}"
        ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, socket.gaierror | ConnectionRefusedError):  # no use in asking again at once
            raise ConversionError(
                f"{_shown(url)} cannot be reached: {error.reason}; check the connection, or name a mirror in "
                "NFZOO_DM_URL"
            ) from error
        raise _RetryError(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _RetryError(str(error) or type(error).__name__) from error
    except ValueError as error:
        raise ConversionError(f"{_shown(url)} cannot be fetched: {error}; look at NFZOO_DM_URL") from error


def _shown(url: str) -> str:
    """An address without the name and password that may stand in it."""
    return re.sub(r"//[^/@]*@", "//", url)


def _version(url: str, response: http.client.HTTPResponse) -> _Version:
    headers = response.headers
    length = headers.get("Content-Length")
    if length is None or not length.isdigit():
        raise ConversionError(f"{url} is sent without its length, so that it cannot be checked; look at NFZOO_DM_URL")
    hashes = ",".join(headers.get_all("x-goog-hash", []))
    match = re.search(r"md5=([A-Za-z0-9+/]{22}==)", hashes)
    md5 = base64.b64decode(match[1]).hex() if match else None
    return _Version(headers.get("ETag"), int(length), md5)


def _noted(note: Path) -> _Version | None:
    """What the file being downloaded is a part of, if that is known."""
    try:
        etag, length, md5 = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
    return _Version(etag, length, md5) if isinstance(length, int) else None


def _check(partial: io.BufferedRandom, version: _Version) -> None:
    if version.md5 is None:
        return
    partial.seek(0)
    found = hashlib.file_digest(partial, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != version.md5:
        partial.truncate(0)
        raise _RetryError(f"what came has the MD5 {found}, not {version.md5}")

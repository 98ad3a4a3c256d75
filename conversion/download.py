"""Download DeepMind's public parameter files from their published addresses.

`dm:F1` is `https://storage.googleapis.com/dm-nfnets/F1_haiku.npz`; NFZOO_DM_URL names a mirror of the folder instead. A
file is kept in the Hub's cache folder (`$HF_HOME/nfzoo`), and a download that was cut is resumed.

Source: the table of the code released with arXiv 2102.06171.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import logging
import os
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants
from tqdm import tqdm

from nfzoo.checkpoint.atomic import replaced
from nfzoo.checkpoint.lock import locked
from nfzoo.errors import ConversionError, without_credentials
from nfzoo.files import open_regular

logger = logging.getLogger("nfzoo")

PUBLISHED = "https://storage.googleapis.com/dm-nfnets"
MODELS = tuple(f"F{n}" for n in range(7))
ATTEMPTS = 5
TIMEOUT = 30.0  # seconds without a byte
FIRST_PAUSE = 1.0  # seconds; doubled after each failure
CHUNK = 1 << 20


def published_url(name: str, base: str | None = None) -> str:
    """Return the address of `dm:F1`, `dm:f1`, … below `base`, by default the mirror's or else DeepMind's.

    Raises:
        ConversionError: if DeepMind published no such file.
    """
    match = re.fullmatch(r"dm:([Ff][0-6])", name)
    if match is None:
        raise ConversionError(f"{name!r} names no published file; there are {', '.join('dm:' + m for m in MODELS)}")
    base = base or os.environ.get("NFZOO_DM_URL") or PUBLISHED
    return f"{base.rstrip('/')}/{match[1].upper()}_haiku.npz"


def fetch(
    name: str,
    *,
    progress: bool = False,
    require_hash: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    attempts: int = ATTEMPTS,
) -> Path:
    """Return the file of `dm:F0` … `dm:F6` from the cache, downloading it first if it is not there.

    The length is checked, and the MD5 where the server states it (Google's does); where it does not, a warning says so.
    Processes that ask at the same time wait for one download.

    Args:
        progress: show a bar on standard error.
        require_hash: ask the server for the MD5 of a file from the cache too, and refuse one that it states none of.
        cache_dir: where downloads are kept, in the folder `nfzoo`; the Hub's by default.
        local_files_only: raise an error rather than download.
        attempts: how often to try.

    Raises:
        ConversionError: if there is no such file, or it cannot be downloaded, with the reason.
    """
    url = published_url(name)
    shown = without_credentials(url)
    folder = Path(cache_dir or constants.HF_HOME) / "nfzoo" / hashlib.sha256(url.encode()).hexdigest()[:8]
    target = folder / url.rpartition("/")[2]
    if target.is_file():
        if require_hash:
            _check_again(url, target)
        return target
    if constants.HF_HUB_OFFLINE or local_files_only:
        reason = "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "local_files_only"
        raise ConversionError(f"{shown} is not in the cache, {folder}, and {reason} forbids to fetch it")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(target, wait=True):
        for attempt in range(1, attempts + 1):
            if target.is_file():  # downloaded by another process while this one waited
                break
            try:
                _download(url, target, progress=progress, require_hash=require_hash)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, ConversionError):
                    raise
                if attempt == attempts or not _may_pass(error):
                    raise ConversionError(
                        f"{shown} could not be fetched (attempt {attempt} of {attempts}): "
                        f"{str(error) or type(error).__name__}. Check the connection, or name a mirror in "
                        "NFZOO_DM_URL; another call resumes the download"
                    ) from error
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
    return target


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt can succeed: not for a wrong address, a refused connection or most 4xx answers."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (408, 416, 429) or error.code >= 500
    reason = getattr(error, "reason", None)
    return not isinstance(error, ValueError) and not isinstance(reason, socket.gaierror | ConnectionRefusedError)


def _check_again(url: str, target: Path) -> None:
    """Compare a file of the cache with the MD5 that the server states; raise a `ConversionError` if that fails."""
    try:
        _check(target, *_stated(url, require_hash=True)[:2])
    except (OSError, http.client.HTTPException) as error:
        raise ConversionError(
            f"{target} could not be checked ({str(error) or type(error).__name__}); remove it to download it again, or "
            "leave out --require-hash to take it as it is"
        ) from error


def _stated(url: str, *, require_hash: bool) -> tuple[int, str | None, str | None]:
    """Return length, MD5 and ETag that the server states; the MD5 is in Google's header, `crc32c=…,md5=…`."""
    with _open(url, method="HEAD") as response:
        headers = response.headers
    if not headers.get("Content-Length", "").isdigit():
        raise ConversionError(f"{url} is sent without its length, so that it cannot be checked; look at NFZOO_DM_URL")
    stated = re.search(r"md5=([A-Za-z0-9+/]{22}==)", ",".join(headers.get_all("x-goog-hash", [])))
    if stated is None and require_hash:
        raise ConversionError(
            f"{url} is sent without its MD5, so that it cannot be checked; look at NFZOO_DM_URL, or leave out "
            "--require-hash to take it as it is"
        )
    return int(headers["Content-Length"]), stated and base64.b64decode(stated[1]).hex(), headers.get("ETag")


def _download(url: str, target: Path, *, progress: bool, require_hash: bool) -> None:
    """Download `url` to `target`, resuming from the bytes that an earlier attempt got of the same content."""
    length, md5, etag = _stated(url, require_hash=require_hash)
    # The name of the partial file tells the content, so that parts of different contents are never joined.
    partial = target.with_suffix(f".{hashlib.sha256(f'{etag} {length}'.encode()).hexdigest()[:8]}.partial")
    size = partial.stat().st_size if etag and partial.exists() else 0
    if size == 0 or size < length:
        resume = {"Range": f"bytes={size}-", "If-Range": etag} if etag and size else {}
        with _open(url, headers=resume) as response, partial.open("ab") as file:
            if response.status != 206:
                size = 0
                file.truncate(0)
            elif response.headers.get("Content-Range") != f"bytes {size}-{length - 1}/{length}":
                file.truncate(0)
                raise OSError(f"the server sent {response.headers.get('Content-Range')}, not the bytes from {size} on")
            with tqdm(
                desc=target.name, initial=size, total=length, unit="B", unit_scale=True, disable=not progress
            ) as bar:
                while chunk := response.read(CHUNK):
                    size += file.write(chunk)
                    bar.update(len(chunk))
        if size < length:
            raise OSError(f"the connection ended after {size} of {length} bytes")
    try:
        _check(partial, length, md5)
    except OSError:
        partial.unlink()
        raise
    if md5 is None:
        logger.warning(
            "of %s nothing but the length was checked: the server states no MD5, as a mirror may; --require-hash "
            "refuses such a file",
            target.name,
        )
    with replaced(target) as scratch:
        os.replace(partial, scratch)
    for leftover in target.parent.glob(f"{target.stem}.*partial*"):
        leftover.unlink()


def _open(url: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}, method=method), timeout=TIMEOUT)


def _check(path: Path, length: int, md5: str | None) -> None:
    """Raise an `OSError` unless the file has this length, and the MD5 if it is known."""
    if path.stat().st_size != length:
        raise OSError(f"{path.stat().st_size} bytes came instead of {length}")
    if md5 is not None:
        with open_regular(path) as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != md5:
            raise OSError(f"what came has the MD5 {found}, not {md5}")

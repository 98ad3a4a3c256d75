"""Files and folders that appear whole or not at all.

They are written under a hidden name on the target's own file system, flushed to the disk, and renamed. A process that
dies leaves the target unchanged, and at most one hidden file or folder. `sweep` removes such folders of processes that
have ended.

File systems that do not flush folders or change permissions (network shares, mounted buckets) do without: a warning
says so once.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nfzoo.checkpoint.lock import flush, new_parents, release, try_lock

logger = logging.getLogger("nfzoo")

# What a file system answers to an operation that it does not have; an error of the disk is none of these.
_UNSUPPORTED = frozenset(
    [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR]
)

PARTIAL = ".partial"
"""Suffix of hidden folders that are being written or removed."""


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield an empty file beside `path`. It replaces `path` when the block ends, and is removed if the block fails.

    The hidden file has the suffix of `path`, and the permissions that a plain `open` would give it.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with new_parents(path):
        try:
            scratch.touch(exist_ok=False)
            yield scratch
            _sync(scratch)
            os.replace(scratch, path)
            _sync(path.parent)
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: str | Path, *, subfolders: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder. Its files go to `folder` when the block ends, and are removed if the block fails.

    A new folder appears by one rename, or file by file where the file system renames no folders. In an existing folder,
    which may be a mount point, the files are replaced one by one, in the reverse order of their names
    (`model.safetensors` before `config.json`); other files stay.

    Args:
        subfolders: names of folders whose content is made from the files. Those in `folder` are removed before a file
            is replaced, and new ones come after the files, so that none is ever beside files of which it was not made.

    Raises:
        FileExistsError: if `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder")
    # In a folder that exists: what lies beside it may be another file system, or not writable.
    parent = folder if folder.exists() else folder.parent
    with new_parents(folder), scratch_folder(parent, folder.name) as scratch:
        yield scratch
        mode = scratch.stat().st_mode & 0o666
        for path in sorted(scratch.rglob("*"), reverse=True):  # a folder after its files
            if not path.is_dir():
                _if_supported("change permissions", functools.partial(path.chmod, mode))  # safetensors writes 0600
            _sync(path)
        _sync(scratch)
        if not folder.exists():
            try:
                os.replace(scratch, folder)
                _sync(folder.parent)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            folder.mkdir()
        for name in subfolders:
            sweep(folder, re.escape(name))
            _remove(folder / name)
        made = [path for path in scratch.iterdir() if path.name in subfolders]
        if subfolders:
            _sync(folder)
        for path in sorted({*scratch.iterdir()} - {*made}, reverse=True):
            os.replace(path, folder / path.name)
        _sync(folder)
        for path in made:
            _move(path, folder / path.name)
            _sync(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, if it is there, or the link to one."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        try:
            remove_folder(folder)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            shutil.rmtree(folder)


def _move(folder: Path, target: Path) -> None:
    """Rename a folder, or its files one by one where the file system renames no folders."""
    try:
        os.replace(folder, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        target.mkdir()
        for path in sorted(folder.iterdir()):
            os.replace(path, target / path.name)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new hidden folder, which is removed when the block ends; until then `sweep` leaves it alone."""
    scratch, descriptor = _new_scratch(parent, name)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if descriptor is not None:
            release(descriptor)


def _new_scratch(parent: Path, name: str) -> tuple[Path, int | None]:
    """Make a hidden folder; return it with the descriptor of its lock, which is `None` on a system without."""
    while True:
        scratch = parent / f".{name}.{secrets.token_hex(4)}{PARTIAL}"
        scratch.mkdir()
        try:
            descriptor = _locked(scratch)
        except OSError:
            return scratch, None
        if descriptor is not None:
            return scratch, descriptor


def _locked(folder: Path) -> int | None:
    """Lock a folder, and return its descriptor; `None` if another process holds it, or has removed the folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if try_lock(descriptor):
            if folder.exists():
                return descriptor
            release(descriptor)
            return None
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def remove_folder(folder: Path) -> None:
    """Rename a folder to a hidden name, then remove it, so that no partial folder keeps its name."""
    hidden = folder.with_name(f".{folder.name}{PARTIAL}")
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(parent: Path, names: str) -> None:
    """Remove the hidden folders that processes left in `parent` when they were killed in a write or removal.

    Args:
        names: regular expression of the names of the folders that were to be written or removed.
    """
    ours = re.compile(rf"\.(?:{names})(\.[0-9a-f]{{8}})?{re.escape(PARTIAL)}")
    for path in parent.iterdir() if parent.is_dir() else ():
        if ours.fullmatch(path.name):
            with suppress(OSError):  # a link or a file, or a system without locks of folders
                descriptor = _locked(path)
                if descriptor is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    release(descriptor)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    _if_supported("flush folders" if path.is_dir() else "flush files", functools.partial(flush, path))


def _if_supported(what: str, operation: Callable[[], object]) -> None:
    """Run an operation that makes a file safer, and do without it where the file system does not have it."""
    try:
        operation()
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _warn_once(what)


@functools.cache
def _warn_once(what: str) -> None:
    logger.warning("a file system here does not %s: what is written there is less safe from a loss of power", what)

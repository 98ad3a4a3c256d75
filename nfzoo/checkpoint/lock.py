"""Keep two programs out of one folder, on one machine or on several that share it.

A lock is a lock of the system on a hidden file beside the folder, `.NAME.nfzoo-lock`, and on another within the folder
if it exists: what lies beside it may be another file system, or not writable. The system ends a lock with its process,
so one that is killed keeps nobody out. It leaves the files, which the next one takes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from nfzoo.errors import ConfigError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("nfzoo")

LOCK = ".nfzoo-lock"
"""Name of the lock within a folder, and the ending of its name beside one."""

_ATTEMPTS = 100  # more in a row do not fail because of other programs
_HOLDER = re.compile(r"process \d{1,10} on [\w.-]{1,80}", re.ASCII)
_NOT_WRITABLE = frozenset([errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR])

_held: set[int] = set()  # descriptors, of which a forked process, such as a loader's, keeps none


def _close_all() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)


@contextlib.contextmanager
def locked(target: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other programs that lock `target`, a folder or a file, out of it while the block runs.

    Missing parents of `target` are made, and are removed at the end if they are empty. Where a file system has no
    locks, a warning says so, and the block runs without.

    Args:
        wait: wait for a program that holds the lock, instead of raising.

    Raises:
        ConfigError: if another program holds the lock, with its process and machine; or if what lies in the lock's
            place is a link or somebody's file.
    """
    target = Path(target).resolve()
    places = [target.parent / f".{target.name}{LOCK}", *([target / LOCK] if os.path.isdir(target) else [])]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # which the write meets again, and reports
            stack.enter_context(new_parents(target, keep=False))
        for place in places:
            try:
                descriptor = _lock(place, target, wait)
            except OSError as error:
                if error.errno not in _NOT_WRITABLE:
                    _warn_once(str(error))
                continue
            stack.callback(_unlock, place, descriptor)
        yield


def try_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file or folder until the descriptor is closed; return whether nobody else holds its lock.

    Raises:
        OSError: if the file system has no locks.
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOSYS, "this system has no flock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    _held.add(descriptor)
    return True


def release(descriptor: int) -> None:
    """Close what `try_lock` locked; a forked process has closed it before."""
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def new_parents(path: Path, *, keep: bool = True) -> Iterator[None]:
    """Make the missing parents of `path`. If the block fails, or without `keep`, remove those that are empty.

    Their own names are flushed, so that a loss of power takes no file with them that was flushed later.
    """
    missing = [parent for parent in path.parents if not os.path.lexists(parent)]
    done = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # a file system that does not flush folders; `atomic` warns of it
            for parent in missing:
                flush(parent.parent)
        yield
        done = keep
    finally:
        with contextlib.suppress(OSError):
            for parent in [] if done else missing:
                parent.rmdir()


def flush(path: Path) -> None:
    """Write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(place: Path, target: Path, wait: bool) -> int:
    """Return the descriptor of a locked file; an `OSError` if none can be had there."""
    while True:
        descriptor = _open(place)
        found = os.fstat(descriptor)
        try:
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise ConfigError(f"{str(place)!r} is no lock of nfzoo; remove it, or choose another output")
            if not try_lock(descriptor, wait=wait):
                holder = _HOLDER.match(os.pread(descriptor, 200, 0).decode("ascii", "replace"))
                raise ConfigError(
                    f"another run is writing into {str(target)!r}{f' ({holder[0]})' if holder else ''}; wait for its "
                    "end, or choose another output"
                )
        except BaseException as error:
            if isinstance(error, OSError) and not found.st_size:  # new, and of no use
                place.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        with contextlib.suppress(OSError):
            if os.path.samestat(found, place.lstat()):
                break
        release(descriptor)  # the one who held it has removed it
    with contextlib.suppress(OSError):  # another user's file, which can be locked but not written
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _open(place: Path) -> int:
    """Open a file without following a link or waiting for a pipe; make it if there is none."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    for _ in range(_ATTEMPTS):
        try:
            return os.open(place, os.O_RDWR | flags)
        except FileNotFoundError:
            place.parent.mkdir(parents=True, exist_ok=True)
            # In between another program may have made the file, or have removed the folder that it had made.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                return os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                with contextlib.suppress(PermissionError):
                    return os.open(place, os.O_RDONLY | flags)
            if error.errno == errno.EROFS or not os.path.lexists(place):
                raise
            raise ConfigError(
                f"the lock {str(place)!r} cannot be opened ({error.strerror}), so that nothing would keep a second run "
                "out; remove it, or choose another output"
            ) from error
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))  # as in /proc


def _unlock(place: Path, descriptor: int) -> None:
    """Remove a lock's file, if it is still the one that was locked, before the lock goes with the descriptor."""
    if descriptor in _held:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), place.lstat()):
                place.unlink()
        release(descriptor)


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("the output cannot be locked (%s): nothing keeps a second run out of it", reason)

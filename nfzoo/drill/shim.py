"""Inject faults into system calls, and record them, through a library that is loaded before the C library."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from enum import IntEnum
from importlib import resources
from pathlib import Path
from typing import NamedTuple


class Operation(IntEnum):
    """A call on a file or folder; the numbers are those of `shim.c`."""

    OPEN = 0
    CREATE = 1  # is logged as OPEN
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    RENAME = 5
    MKDIR = 6
    UNLINK = 7
    RMDIR = 8
    CHMOD = 9
    LINK = 10


class Action(IntEnum):
    """What happens at a call; the numbers are those of `shim.c`."""

    NONE = 0
    KILL = 1
    TEAR = 2  # a write does half of its work, then the process is killed
    FAIL_ONCE = 3
    FAIL_ON = 4  # at this call and all later ones
    SHORTEN = 5  # this write and all later ones do half of their work


class Fault(NamedTuple):
    """A fault, and the call below the watched folder at which it happens, counted from 1."""

    action: Action = Action.NONE
    call: int = 0
    error: int = 0
    """`errno` of a call that fails. `errno.ENOSPC` fails only calls that take space."""
    clock_offset: int = 0
    """Seconds that are added to the time of day."""


class Call(NamedTuple):
    """A call that was made; `number` is its place among the calls of all processes, `own` among those of its own."""

    operation: Operation
    descriptor: int
    number: int
    offset: int
    path: str
    data: bytes
    target: str
    process: int
    own: int


_RECORD = struct.Struct("=iiqqiiq")
_COMPILERS = ("cc", "gcc", "clang")


class NoLibraryError(Exception):
    """Why the library cannot be made here."""


def build(folder: Path) -> Path:
    """Compile the library into `folder`, and return its path; raise `NoLibraryError` where that is impossible."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if not sys.platform.startswith("linux"):
        raise NoLibraryError("they need Linux")
    if compiler is None:
        raise NoLibraryError(f"they need a C compiler, and there is none of {', '.join(_COMPILERS)} on the PATH")
    if {":", ";"} & set(str(folder)):
        raise NoLibraryError(
            f"the loader finds no library in {str(folder)!r}; set TMPDIR to a folder without ':' and ';'"
        )
    library = folder / "nfzoo_drill_shim.so"
    with resources.as_file(resources.files("nfzoo.drill") / "shim.c") as source:
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"]
        done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise NoLibraryError(f"{compiler} fails: {said[-1] if said else f'exit status {done.returncode}'}")
    return library


def preloaded(library: Path) -> dict[str, str]:
    """Return the environment variables with which a program loads the library.

    They name it and its folder apart, as `LD_PRELOAD` is divided at spaces. What they named before stays.
    """
    before, folders = os.environ.get("LD_PRELOAD"), os.environ.get("LD_LIBRARY_PATH")
    return {
        "LD_PRELOAD": library.name + (f":{before}" if before else ""),
        "LD_LIBRARY_PATH": str(library.parent) + (f":{folders}" if folders else ""),
    }


def arm(folder: Path, fault: Fault, log: int = -1, process: int = 0) -> None:
    """Watch a folder in this process, which was started with the library.

    Args:
        folder: the folder.
        fault: what happens, and at which call.
        log: a descriptor that takes the calls, opened by this process to append.
        process: the number of this process in the log.
    """
    ctypes.CDLL(None).nfzoo_drill_arm(
        ctypes.c_char_p(str(folder).encode()),
        ctypes.c_int(fault.action),
        ctypes.c_int64(fault.call),
        ctypes.c_int(fault.error or errno.EIO),
        ctypes.c_int(log),
        ctypes.c_int64(fault.clock_offset),
        ctypes.c_int64(process),
    )


def read_log(path: Path) -> list[Call]:
    """Read the calls of a log that processes wrote through the library, up to one that is cut off."""
    content, calls, position = path.read_bytes(), [], 0
    counts: Counter[int] = Counter()
    while position + _RECORD.size <= len(content):
        operation, descriptor, own, offset, first, second, process = _RECORD.unpack_from(content, position)
        start = position + _RECORD.size
        position = start + first + second
        if position > len(content):
            break
        body, target = content[start : start + first], content[start + first : position].decode()
        operation = Operation(operation)
        path_, data = ("", body) if operation in (Operation.WRITE, Operation.SYNC) else (body.decode(), b"")
        counts[process] = own
        calls.append(Call(operation, descriptor, counts.total(), offset, path_, data, target, process, own))
    return calls

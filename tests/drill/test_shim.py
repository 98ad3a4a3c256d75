"""Faults in system calls: each happens at its call, and the log accounts for what was done."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nfzoo.drill.shim import Action, Fault, NoLibraryError, Operation, build, preloaded, read_log

PROGRAM = """
import os, sys
from pathlib import Path
from nfzoo.drill.shim import Action, Fault, arm
folder, action, call, error, offset, log = sys.argv[1:]
log = os.open(log, os.O_WRONLY | os.O_CREAT)
arm(Path(folder), Fault(Action(int(action)), int(call), int(error), int(offset)), log)
Path("elsewhere").write_text("is not counted")
Path(folder, "a").mkdir()
with open(Path(folder, "a", "b"), "wb", buffering=0) as file:
    left = b"content"
    while left:
        left = left[file.write(left):]
    os.fsync(file.fileno())
os.replace(Path(folder, "a", "b"), Path(folder, "a", "c"))
import ctypes, time
now, started = time.time(), time.monotonic()
until = (ctypes.c_long * 2)(int(now), int((now % 1) * 1e9) + 500_000_000)
if until[1] >= 1_000_000_000:
    until[:] = until[0] + 1, until[1] - 1_000_000_000
lock, condition = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)  # of zeros: as initialised
ctypes.CDLL(None).pthread_mutex_lock(lock)
status = ctypes.CDLL(None).pthread_cond_timedwait(condition, lock, until)
print(int(now), status, time.monotonic() - started)
"""
# The file is opened to be truncated, which is one call.
CALLS = [Operation.MKDIR, Operation.OPEN, Operation.TRUNCATE, Operation.WRITE, Operation.SYNC, Operation.RENAME]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("a library"))  # with a space, at which LD_PRELOAD is divided


def run(library: Path, tmp_path: Path, fault: Fault) -> tuple[int, str, str]:
    (tmp_path / "watched").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "watched"), *map(str, map(int, fault)), str(tmp_path / "log")],
        env={**os.environ, **preloaded(library), "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_calls_are_counted_and_logged(library: Path, tmp_path: Path) -> None:
    status, _, error = run(library, tmp_path, Fault())
    assert status == 0, error
    calls = read_log(tmp_path / "log")
    assert [call.operation for call in calls] == CALLS
    assert [call.number for call in calls] == [1, 2, 2, 3, 4, 5]
    assert calls[3].data == calls[4].data == b"content"
    assert (calls[5].path, calls[5].target) == (str(tmp_path / "watched/a/b"), str(tmp_path / "watched/a/c"))


@pytest.mark.parametrize(
    ("call", "left"), [(1, []), (2, ["a"]), (3, ["a", "a/b"]), (5, ["a", "a/b"]), (6, ["a", "a/c"])]
)
def test_killed_before_a_call(library: Path, tmp_path: Path, call: int, left: list[str]) -> None:
    status, _, _ = run(library, tmp_path, Fault(Action.KILL, call))
    assert status == (-9 if call <= 5 else 0)
    found = sorted(str(path.relative_to(tmp_path / "watched")) for path in (tmp_path / "watched").rglob("*"))
    assert found == left


def test_a_torn_write_does_half(library: Path, tmp_path: Path) -> None:
    assert run(library, tmp_path, Fault(Action.TEAR, 3))[0] == -9
    assert (tmp_path / "watched/a/b").read_bytes() == b"con"


def test_short_writes_go_on(library: Path, tmp_path: Path) -> None:
    assert run(library, tmp_path, Fault(Action.SHORTEN, 1))[0] == 0
    assert (tmp_path / "watched/a/c").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (Fault(Action.FAIL_ONCE, 4, errno.EIO), ["a", "b"]),
        (Fault(Action.FAIL_ON, 3, errno.ENOSPC), ["a", "b"]),
        (Fault(Action.FAIL_ON, 4, errno.ENOSPC), ["a", "c"]),  # flushing and renaming take no space
        (Fault(Action.FAIL_ON, 5, errno.EROFS), ["a", "b"]),
    ],
    ids=["io", "full", "full-later", "read-only"],
)
def test_a_call_that_fails(library: Path, tmp_path: Path, fault: Fault, names: list[str]) -> None:
    status, _, error = run(library, tmp_path, fault)
    assert sorted(path.name for path in (tmp_path / "watched").rglob("*")) == names
    assert status == (0 if "c" in names else 1)
    assert ("c" in names) or os.strerror(fault.error) in error


@pytest.mark.parametrize("offset", [0, -1_000_000, -300_000_000])
def test_the_clock(library: Path, tmp_path: Path, offset: int) -> None:
    """Waits last as long as without the library: the kernel, which ends them, knows the true time."""
    _, printed, error = run(library, tmp_path, Fault(clock_offset=offset))
    assert error == ""
    now, status, waited = printed.split()
    assert abs(int(now) - (time.time() + offset)) < 1000
    assert int(status) == errno.ETIMEDOUT
    assert float(waited) > 0.45


def test_without_a_compiler_there_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoLibraryError, match="a C compiler, and there is none of cc, gcc, clang"):
        build(tmp_path)
    (tmp_path / "cc").write_text("#!/bin/sh\necho no header >&2; exit 1\n")
    (tmp_path / "cc").chmod(0o700)
    with pytest.raises(NoLibraryError, match="cc fails: no header"):
        build(tmp_path)


def test_a_folder_that_the_loader_does_not_find(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    with pytest.raises(NoLibraryError, match="set TMPDIR"):
        build(tmp_path / "a:b")


def test_what_is_preloaded_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    found = preloaded(Path("/a b/shim.so"))
    assert found == {"LD_PRELOAD": "shim.so:other.so", "LD_LIBRARY_PATH": "/a b"}

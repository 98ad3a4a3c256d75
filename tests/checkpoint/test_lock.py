"""Locks: one holder at a time, whatever its TMPDIR; what lies in the way is neither followed nor written to."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nfzoo.checkpoint import lock
from nfzoo.checkpoint.lock import locked
from nfzoo.errors import ConfigError
from tests.support.loops import each

HOLDER = """
import sys
from nfzoo.checkpoint.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
COUNTER = """
import sys
from pathlib import Path
from nfzoo.checkpoint.lock import locked
counter = Path(sys.argv[1])
for _ in range(100):
    with locked(sys.argv[2], wait=True):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def hold(target: Path, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target)],
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_another_process_is_kept_out_until_the_holder_ends(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "run"
    (tmp_path / "link").symlink_to(output)
    with hold(output, tmp_path / "tmp") as other:
        try:
            for name in (output, tmp_path / "link", tmp_path / "deep" / ".." / "deep" / "run"):
                with pytest.raises(ConfigError, match=rf"another run .*/deep/run' \(process {other.pid} on [\w.-]+\)"):
                    locked(name).__enter__()
            with locked(tmp_path / "deep" / "other"):
                pass
            output.mkdir()  # as the holder makes it with its first checkpoint
            with pytest.raises(ConfigError, match=str(other.pid)):
                locked(output).__enter__()
        finally:
            other.kill()
            other.communicate()
    with locked(output):  # the system ended the lock with the process
        pass
    assert everything(tmp_path / "deep") == [output]


def test_one_process_does_not_hold_a_lock_twice(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            locked(tmp_path / "run").__enter__()
        assert lock._held  # the attempt has not ended the lock
        with pytest.raises(ConfigError):
            locked(tmp_path / "run").__enter__()


@each("exists", [False, True])
def test_nothing_is_left(tmp_path: Path, exists: bool) -> None:
    output = tmp_path / str(exists) / "run"
    if exists:
        output.mkdir(parents=True)
    before = everything(tmp_path)
    with locked(output):
        assert everything(tmp_path) != before
    with pytest.raises(ZeroDivisionError), locked(output):
        raise ZeroDivisionError
    assert everything(tmp_path) == before
    assert not lock._held


def test_what_the_block_made_stays(tmp_path: Path) -> None:
    with locked(tmp_path / "deep" / "run"):
        (tmp_path / "deep" / "run").mkdir()
    assert everything(tmp_path) == [tmp_path / "deep", tmp_path / "deep" / "run"]


def test_locks_exclude_each_other_though_their_files_come_and_go(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNTER, str(counter), str(tmp_path / "deep" / "run")]
    started = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert counter.read_text() == "300"


@each("output", ["/proc/nowhere/run", "/proc/self/run", "/dev/null/run"])
def test_where_nothing_can_be_written_the_error_is_that_of_the_write(
    output: str, caplog: pytest.LogCaptureFixture
) -> None:
    with locked(output):
        pass
    assert not caplog.text


def plant(kind: str, place: Path, precious: Path) -> None:
    precious.write_text("precious")
    match kind:
        case "link":
            place.symlink_to(precious)
        case "link to nothing":
            place.symlink_to(precious.with_name("absent"))
        case "hard link":
            place.hardlink_to(precious)
        case "pipe":
            os.mkfifo(place)
        case "folder":
            place.mkdir()


@each("kind", ["link", "link to nothing", "hard link", "pipe", "folder"])
@each("inside", [False, True])
def test_what_was_planted_is_refused_and_not_touched(tmp_path: Path, kind: str, inside: bool) -> None:
    folder = tmp_path / f"{kind}, {inside}"
    output = folder / "run"
    output.mkdir(parents=True)
    place = output / ".nfzoo-lock" if inside else folder / ".run.nfzoo-lock"
    plant(kind, place, folder / "precious")
    before = everything(folder)
    with pytest.raises(ConfigError, match="remove it, or choose another output"):
        locked(output).__enter__()
    assert everything(folder) == before
    assert (folder / "precious").read_text() == "precious"


def refuse(monkeypatch: pytest.MonkeyPatch, number: int, place: Path) -> None:
    opened = os.open

    def refusing(path: Path, *rest: int) -> int:
        if path == place:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refusing)


@each("number", [errno.EACCES, errno.EROFS])
def test_a_folder_whose_parent_takes_no_files_is_locked_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    output = tmp_path / str(number) / "run"
    output.mkdir(parents=True)
    refuse(monkeypatch, number, output.parent / ".run.nfzoo-lock")
    with locked(output):
        assert everything(output.parent) == [output, output / ".nfzoo-lock"]
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            locked(output).__enter__()


def test_a_lock_that_another_user_closed_to_us_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / ".run.nfzoo-lock"
    place.touch()
    refuse(monkeypatch, errno.EACCES, place)
    with pytest.raises(ConfigError, match=r"\.run\.nfzoo-lock' cannot be opened \(Permission denied\)"):
        locked(tmp_path / "run").__enter__()
    assert place.exists()


def test_a_lock_that_can_only_be_read_still_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, opened = tmp_path / ".run.nfzoo-lock", os.open
    place.touch()

    def for_reading(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", for_reading)
    with locked(tmp_path / "run"), pytest.raises(ConfigError, match="another run is writing"):
        locked(tmp_path / "run").__enter__()


@pytest.mark.skipif(sys.platform == "win32", reason="has no flock")
def test_file_systems_without_locks_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    lock._warn_once.cache_clear()
    (tmp_path / "run").mkdir()
    for _ in range(2):
        with locked(tmp_path / "run"):
            pass
    assert caplog.text.count("nothing keeps a second run out of it") == 1
    assert "No locks available" in caplog.text
    assert everything(tmp_path) == [tmp_path / "run"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_neither_keeps_nor_ends_the_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with locked(tmp_path / "run"):
        child = os.fork()
        if not child:  # lives on, as a loader that is stuck, and leaves the block
            try:
                lock._unlock(tmp_path / ".run.nfzoo-lock", next(iter(lock._held), -1))
                os.close(writer)
                os.read(reader, 1)
            finally:
                os._exit(0)
        with pytest.raises(ConfigError):
            locked(tmp_path / "run").__enter__()
    with locked(tmp_path / "run"):
        pass
    os.close(writer)
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0

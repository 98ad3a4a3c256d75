"""Atomic writing: every byte is on the disk before a name changes, and names change in the stated order."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nfzoo
from nfzoo.checkpoint import atomic
from nfzoo.checkpoint.atomic import replaced, replaced_folder, sweep
from nfzoo.checkpoint.model_folder import Description, save_checkpoint
from nfzoo.checkpoint.run_state import save_state
from nfzoo.config import Preprocessing
from tests.support.helpers import SMALL, random_params

CFG = SMALL["nfnet"].replace(depths=(1, 1, 1, 1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record each `os.fsync` and `os.replace` with the inode that it concerns."""
    log: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.append(("fsync", os.fstat(descriptor).st_ino))

    def recorded_replace(source: Path, target: Path) -> None:
        log.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return log


def write_file(path: Path) -> None:
    with replaced(path) as scratch:
        scratch.write_text("content")


def write_folder(path: Path) -> None:
    with replaced_folder(path) as scratch:
        (scratch / "config.json").write_text("{}")
        (scratch / "model.safetensors").write_bytes(b"weights")


def write_model(path: Path) -> None:
    save_checkpoint(path, Description(CFG, Preprocessing(train_size=24, test_size=32)), random_params(CFG))


def write_state(path: Path) -> None:
    save_state(path.parent, 1, {"model": {"a": torch.zeros(3)}, "optimizer": {"b": torch.zeros(2)}}, {})


@pytest.mark.parametrize("write", [write_file, write_folder, write_model, write_state])
def test_files_are_flushed_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, write: Callable[[Path], None], calls: list[tuple[str, int]]
) -> None:
    target = tmp_path / "step_00000001"
    write(target)
    replaces = [k for k, (kind, _) in enumerate(calls) if kind == "replace"]
    assert len(replaces) == 1
    before, after = calls[: replaces[0]], calls[replaces[0] + 1 :]
    written = [target] if target.is_file() else [target, *target.iterdir()]
    for path in written:
        assert ("fsync", path.stat().st_ino) in before, path.name
    assert after == [("fsync", tmp_path.stat().st_ino)]


def test_an_interruption_leaves_no_subfolder_beside_files_that_it_was_not_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = os.replace, 0

    def failing(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, "the disk fails")
        replace(source, target)

    def write(folder: Path, text: str) -> None:
        with replaced_folder(folder, subfolders=("made",)) as scratch:
            for name in ("config.json", "model.safetensors"):
                (scratch / name).write_text(text)
            (scratch / "made").mkdir()
            (scratch / "made/program").write_text(text)

    monkeypatch.setattr(os, "replace", failing)
    for count in range(6):
        folder, left = tmp_path / str(count), 100
        write(folder, "old")
        (folder / "kept").write_text("old")
        left = count
        if count < 4:  # the subfolder away, two files, the new subfolder
            with pytest.raises(OSError, match="the disk fails"):
                write(folder, "new")
        else:
            write(folder, "new")
        files = {p.read_text() for p in folder.glob("*.*") if p.is_file()}
        made = {p.read_text() for p in folder.glob("made/*")}
        assert made == (set() if 0 < count < 4 else files), count
        assert files == ({"old"} if count < 2 else {"old", "new"} if count == 2 else {"new"}), count
        assert sorted(p.name for p in folder.iterdir() if p.name[0] != ".") == (
            ["config.json", "kept", *(["made"] if made else []), "model.safetensors"]
        )
        left = 100
        write(folder, "last")
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "kept", "made", "model.safetensors"]
        assert {p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != "kept"} == {"last"}

    folder = tmp_path / "5"
    (folder / "made/program").unlink()
    (folder / "made").rmdir()
    (folder / "made").symlink_to(tmp_path / "0/made")
    write(folder, "new")
    assert (tmp_path / "0/made/program").read_text() == "last"


@pytest.mark.parametrize("write", [write_folder, write_model])
def test_in_a_folder_that_exists_weights_are_replaced_before_config_json(
    tmp_path: Path, write: Callable[[Path], None], calls: list[tuple[str, int]]
) -> None:
    folder = tmp_path / "model"
    write(folder)
    calls.clear()
    write(folder)
    inodes = {path.stat().st_ino: path.name for path in folder.iterdir()}
    replaced = [inodes[i] for kind, i in calls if kind == "replace"]
    assert replaced == sorted(inodes.values(), reverse=True)
    assert replaced[-2:] == ["model.safetensors", "config.json"]
    assert {inodes.get(i) for kind, i in calls[: len(inodes)] if kind == "fsync"} == set(inodes.values())
    assert calls[-1] == ("fsync", folder.stat().st_ino)


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_permissions_are_those_of_the_umask(tmp_path: Path, write: Callable[[Path], None]) -> None:
    previous = os.umask(0o027)
    try:
        write(tmp_path / "x")
    finally:
        os.umask(previous)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("writer", [replaced, replaced_folder])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, writer: Callable) -> None:
    for target in (tmp_path / "x", tmp_path / "new" / "parents" / "x"):
        with pytest.raises(ZeroDivisionError), writer(target):
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())


WRITER = """
import sys
from pathlib import Path
from nfzoo.checkpoint.atomic import replaced_folder
with replaced_folder(Path(sys.argv[1])) as scratch:
    (scratch / "model.safetensors").write_bytes(b"weights")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("exists", [False, True])
def test_the_folder_of_a_write_is_swept_once_its_process_was_killed(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "run"
    if exists:
        target.mkdir()
    parent = target if exists else tmp_path
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        sweep(parent, "run")
        (left,) = parent.iterdir()
        assert [path.name for path in left.iterdir()] == ["model.safetensors"]
        process.kill()
    sweep(parent, "other")
    assert list(parent.iterdir()) == [left]
    sweep(parent, "run")
    assert not list(parent.iterdir())


def test_nothing_else_is_swept(tmp_path: Path) -> None:
    for name in (
        "run",
        ".run.0123abcd",
        ".run.partial.d",
        ".run2.01234567.partial",
        ".run.0123456.partial",
        "run.partial",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "kept").mkdir(parents=True)
    (tmp_path / ".run.01234567.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".run.01234568.partial").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path, "run")
    sweep(tmp_path / "absent", "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_whose_neighbours_are_on_another_file_system(tmp_path: Path) -> None:
    """As where a volume is mounted: what lies beside the folder cannot be renamed into it."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as elsewhere:
        target = tmp_path / "model"
        target.symlink_to(elsewhere)
        write_model(target)
        assert {path.name for path in Path(elsewhere).iterdir()} >= {"config.json", "model.safetensors"}
        with replaced_folder(target) as scratch:
            assert scratch.parent == target
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("write", [write_file, write_folder, write_model, write_state])
def test_file_systems_without_flushing_and_permissions_take_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*args: object, **options: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    monkeypatch.setattr(os, "chmod", unsupported)
    monkeypatch.setattr(Path, "chmod", unsupported)
    atomic._warn_once.cache_clear()
    for name in ("step_00000001", "other"):
        write(tmp_path / name)
    assert caplog.text.count("does not flush folders") == 1
    assert (tmp_path / "step_00000001").exists()
    assert not list(tmp_path.glob(".*"))


def test_file_systems_that_rename_no_folders_get_file_after_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def files_alone(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            raise OSError(errno.ENOTSUP, "Operation not supported")
        replace(source, target)

    monkeypatch.setattr(os, "replace", files_alone)
    write_model(tmp_path / "model")
    assert nfzoo.from_pretrained(tmp_path / "model").config == CFG
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    for text in ("old", "new"):
        with replaced_folder(tmp_path / "model", subfolders=("made",)) as scratch:
            (scratch / "made").mkdir()
            (scratch / "made" / text).write_text(text)
        assert [path.name for path in (tmp_path / "model/made").iterdir()] == [text]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())

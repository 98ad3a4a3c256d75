"""Files and folders that appear whole or not at all.

They are written under a hidden name beside the target, flushed to the disk, and renamed. A process that dies leaves the
target unchanged, and at most one hidden file or folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of hidden folders that are being written or removed."""


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield an empty file beside `path`. It replaces `path` when the block ends, and is removed if the block fails.

    The hidden file has the suffix of `path`, and the permissions that a plain `open` would give it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        scratch.touch(exist_ok=False)
        yield scratch
        _sync(scratch)
        os.replace(scratch, path)
        _sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`. Its files go to `folder` when the block ends, and are removed if it fails.

    A new folder appears by one rename. In an existing folder, the files are replaced one by one, in the reverse order
    of their names (`model.safetensors` before `config.json`); other files stay.

    Raises:
        FileExistsError: if `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        scratch.mkdir()
        yield scratch
        mode = scratch.stat().st_mode & 0o666
        files = sorted(scratch.iterdir(), reverse=True)
        for path in files:
            path.chmod(mode)  # safetensors writes 0600
            _sync(path)
        _sync(scratch)
        if folder.exists():
            for path in files:
                os.replace(path, folder / path.name)
            _sync(folder)
        else:
            os.replace(scratch, folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Rename a folder to a hidden name, then remove it, so that no partial folder keeps its name."""
    hidden = folder.with_name(f".{folder.name}{PARTIAL}")
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the hidden folders that an interrupted write or removal left in `parent`."""
    for path in parent.glob(f".*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

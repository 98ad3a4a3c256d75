"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A scratch file beside `path` that takes its place when the block ends, and vanishes if the block fails.

    The scratch file has the suffix of `path`, and the permissions that a plain `open` would give it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    scratch = Path(name)
    scratch.unlink()
    try:
        scratch.touch()
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """A scratch folder beside `folder` whose files take their place when the block ends, and vanish if it fails.

    A new folder appears by one rename. In a folder that exists the files are replaced one by one, in the order of their
    names backwards (`model.safetensors` before `config.json`); other files stay.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as outer:
        scratch = Path(outer) / "files"
        scratch.mkdir()  # unlike the one around it, with the mode that the umask gives
        yield scratch
        mode = scratch.stat().st_mode & 0o666
        files = sorted(scratch.iterdir(), reverse=True)
        for path in files:
            path.chmod(mode)  # safetensors writes 0600
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            for path in files:
                os.replace(path, folder / path.name)
        else:
            os.replace(scratch, folder)

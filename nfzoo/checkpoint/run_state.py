"""Checkpoints from which a run resumes: written whole or not at all, rotated, and searched for the newest.

A checkpoint is a folder `step_00000123` of safetensors files and `state.json`, which is written last and lists every
file with its size and checksum. It is built under a hidden name, flushed to the disk and renamed, so a process that
dies at any moment leaves complete checkpoints and at most one hidden folder, which the next save sweeps away.
"""

from __future__ import annotations

import json
import logging
import random
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nfzoo.checkpoint.atomic import remove_folder, replaced_folder, sweep
from nfzoo.checkpoint.weight_files import save_tensors
from nfzoo.errors import CheckpointError

logger = logging.getLogger("nfzoo")

STATE_FILE = "state.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")


class Saved(NamedTuple):
    """A checkpoint: its folder, and the content of `state.json`."""

    folder: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of steps taken before the checkpoint."""
        return int(self.facts["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of one file, such as `"model"`; raise `CheckpointError` if it is damaged."""
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove {self.folder} to use an earlier one") from error


def save_state(
    root: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write the checkpoint of a step, then remove all but the newest `keep`. Only one process may call this.

    Args:
        root: the folder of the run's checkpoints.
        step: steps taken so far; a complete checkpoint of the same step is kept instead.
        tensors: file name without suffix -> tensors on the CPU.
        facts: further fields of `state.json`, ready for JSON.

    Raises:
        OSError: if writing fails; earlier checkpoints then stay.
    """
    root = Path(root)
    folder = root / f"step_{step:08d}"
    sweep(root)
    if _read(folder) is not None:
        return folder
    if folder.is_dir():
        remove_folder(folder)
    with replaced_folder(folder) as scratch:
        for name, content in tensors.items():
            save_tensors(scratch / f"{name}.safetensors", content)
        files = sorted(scratch.iterdir())
        sizes = {path.name: path.stat().st_size for path in files}
        sums = {path.name: _checksum(path) for path in files}
        manifest = {"format": FORMAT, **facts, "step": step, "files": sizes, "crc32": sums}
        with (scratch / STATE_FILE).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, allow_nan=True)
    for old in _folders(root)[keep:]:
        if old != folder:
            remove_folder(old)
    return folder


def latest_state(root: str | Path) -> Saved | None:
    """Return the newest intact checkpoint, or `None`. A warning names each incomplete or damaged one."""
    for folder in _folders(Path(root)):
        facts = _read(folder)
        if facts is None:
            logger.warning("%s is not complete, and is skipped", folder)
        elif any(_checksum(folder / name) != value for name, value in facts.get("crc32", {}).items()):
            logger.warning("%s is damaged, and is skipped", folder)
        else:
            return Saved(folder, facts)
    return None


def _folders(root: Path) -> list[Path]:
    """List the folders of checkpoints in `root`, the newest first."""
    if not root.is_dir():
        return []
    numbered = [(int(m[1]), path) for path in root.iterdir() if (m := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def _read(folder: Path) -> dict[str, Any] | None:
    """Read `state.json`; return `None` if it is damaged, or if a file is missing or of another size."""
    try:
        facts = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        complete = all((folder / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {facts.get('format')!r}; this nfzoo reads {FORMAT}: upgrade nfzoo")
    return facts if complete else None


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file, which reveals accidental damage, not manipulation."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def rng_state() -> dict[str, Any]:
    """Return the states of this process's random number generators, ready for JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the states that `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8))

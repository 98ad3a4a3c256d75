"""Checkpoints from which a run resumes: written whole or not at all, rotated, and searched for the newest.

A checkpoint is a folder `step_00000123` of safetensors files and of `state.json`, which is written last. There is one
file for each kind of tensors or, where parameters are sharded, for each process. `state.json` has a digest of itself,
and lists every file with its size and checksum. A checkpoint is built under a hidden name, flushed to the disk and
renamed. So a process that dies at any moment leaves complete checkpoints and at most one hidden folder, which the next
save sweeps away.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import zlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nfzoo.checkpoint.atomic import remove_folder, replaced_folder, sweep
from nfzoo.checkpoint.shards import load_full, save_shards, shard_names
from nfzoo.checkpoint.weight_files import save_tensors
from nfzoo.errors import CheckpointError
from nfzoo.files import check_regular, open_regular, read_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("nfzoo")

STATE_FILE = "state.json"
FORMAT = 2
_BEFORE = 1  # without a digest
STEP_FOLDER = re.compile(r"step_(\d{8,18})")
"""Names of the folders of checkpoints."""

# Fields of `state.json` and the types of their values, as a training run writes them.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "consumed": int,
    "skipped": int,
    "seconds": (int, float),
    "meters": list,
    "rows": list,
    "broken": list,
    "rng": list,
    "pretrained": bool,
    "data": dict,
    "config": dict,
    "description": dict,
}


class Saved(NamedTuple):
    """A checkpoint: its folder, and the content of `state.json`."""

    folder: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of steps taken before the checkpoint."""
        return int(self.facts["step"])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read the full tensors of one kind, such as `"model"`; raise `CheckpointError` if a file is damaged."""
        if shards := shard_names(self.facts["files"]):  # and no others, which may be another run's
            return load_full([self.folder / shard for shard in shards], f"{name}/")
        path = self.folder / f"{name}.safetensors"
        try:
            check_regular(path)
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove {self.folder} to use an earlier one") from error


def save_state(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    *,
    keep: int = 2,
    also: Collection[int] = (),
    group: ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of a step, then remove all but the newest `keep` and those of the steps `also`.

    One process alone calls this, or all of `group` together.

    Args:
        root: the folder of the run's checkpoints.
        step: steps taken so far; a complete checkpoint of the same step is kept instead.
        tensors: kind, such as `"model"` -> tensors on the CPU.
        facts: further fields of `state.json`, ready for JSON; those of the first process count.
        group: processes that write a file each, with what they hold of each tensor; by default one file for each kind.

    Raises:
        OSError: if writing fails; earlier checkpoints then stay.
    """
    root = Path(root)
    folder = root / step_folder(step)
    parts = {f"{kind}/{name}": tensor for kind, content in tensors.items() for name, tensor in content.items()}
    if group is not None and group.rank() != 0:
        save_shards(None, parts, group)
        return folder
    with ExitStack() as others:
        if group is not None:  # which wait for the name of the folder
            others.callback(save_shards, None, parts, group)
        sweep(root, STEP_FOLDER.pattern)
        if folder.is_dir():
            try:
                _read(folder)
                return folder
            except CheckpointError:
                remove_folder(folder)
        with replaced_folder(folder) as scratch:
            if group is None:
                for kind, content in tensors.items():
                    save_tensors(scratch / f"{kind}.safetensors", content, with_checksum=False)
            else:
                others.pop_all()
                save_shards(scratch, parts, group)
            _write_manifest(scratch, {"format": FORMAT, **facts, "step": step})
    # Those of later steps are of a run that went back behind them, as they were damaged: they do not count.
    for number, old in [(n, path) for n, path in _folders(root) if n <= step][keep:]:
        if number != step and number not in also:
            remove_folder(old)
    return folder


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write `state.json` with the sizes and checksums of all other files."""
    files = sorted(folder.iterdir())
    facts["files"] = {path.name: path.stat().st_size for path in files}
    facts["crc32"] = {path.name: _checksum(path) for path in files}
    (folder / STATE_FILE).write_text(json.dumps({**facts, "sha256": _digest(facts)}), encoding="utf-8")


def step_folder(step: int) -> str:
    """Return the name of the checkpoint's folder after so many steps."""
    return f"step_{step:08d}"


def latest_state(root: str | Path) -> Saved | None:
    """Return the newest intact checkpoint, or `None`. A warning names each incomplete or damaged one."""
    for _, folder in _folders(Path(root)):
        try:
            return Saved(folder, _read(folder))
        except CheckpointError as error:
            logger.warning("%s is skipped: %s", folder, error)
    return None


def newest_options(root: str | Path) -> dict[str, Any] | None:
    """Return the options of the run that the newest readable `state.json` notes, without a look at the other files."""
    for _, folder in _folders(Path(root)):
        try:
            options = read_json(folder / STATE_FILE)["config"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(options, dict):
            return options
    return None


def open_state(folder: str | Path) -> Saved:
    """Return the checkpoint in a folder; raise `CheckpointError` if it is incomplete or damaged."""
    folder = Path(folder)
    try:
        return Saved(folder, _read(folder))
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {folder} cannot be used: {error}") from error


def remove_later(root: str | Path, step: int) -> None:
    """Remove the checkpoints of later steps than `step`, the newest first."""
    for number, folder in _folders(Path(root)):
        if number > step:
            remove_folder(folder)


def _folders(root: Path) -> list[tuple[int, Path]]:
    """List the folders of checkpoints in `root` with their steps, the newest first."""
    if not root.is_dir():
        return []
    numbered = [
        (int(m[1]), path) for path in root.iterdir() if (m := STEP_FOLDER.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(numbered, reverse=True)


def _read(folder: Path) -> dict[str, Any]:
    """Read `state.json` and check every file that it lists.

    Raises:
        CheckpointError: if anything is missing or damaged.
    """
    try:
        facts = read_json(folder / STATE_FILE)
        version, claimed = facts["format"], facts.pop("sha256", None)
        if version not in (_BEFORE, FORMAT):
            raise CheckpointError(
                f"it has format {version!r}, and this nfzoo reads {_BEFORE} and {FORMAT}: upgrade nfzoo"
            )
        whole = _digest(facts) == claimed if version == FORMAT else _has_fields(facts)
        if not whole:
            raise CheckpointError(f"{STATE_FILE} is damaged")
        if step_folder(facts["step"]) != folder.name:
            raise CheckpointError(f"it is of step {facts['step']}, so its folder must be {step_folder(facts['step'])}")
        for name, size in facts["files"].items():
            if (folder / name).stat().st_size != size or _checksum(folder / name) != facts["crc32"][name]:
                raise CheckpointError(f"{name} is damaged")
    except CheckpointError:  # a ValueError
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error})") from error
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{STATE_FILE} is damaged ({type(error).__name__})") from error
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of `state.json`, which does not depend on its order or white space."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _has_fields(facts: Mapping[str, Any]) -> bool:
    return isinstance(facts["step"], int) and all(isinstance(facts[name], kind) for name, kind in _FIELDS.items())


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file, which reveals accidental damage, not manipulation."""
    value = 0
    with open_regular(path) as file:
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

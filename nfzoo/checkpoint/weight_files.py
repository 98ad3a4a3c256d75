"""Safetensors files: written so that equal tensors are equal files, and read with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nfzoo.errors import CheckpointError

FRAMEWORK = {"format": "pt"}
"""Metadata that accelerate and transformers require of a file of torch's tensors."""

_LENGTH = 8  # bytes before the header, which state its length


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with `FRAMEWORK` in its metadata.

    Raises:
        OSError: if writing fails.
    """
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={**FRAMEWORK, **(metadata or {})})
    except SafetensorError as error:
        raise OSError(f"could not write {path.name}: {error}") from error
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header, which safetensors orders at random: equal tensors should be equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "safetensors writes the same compact JSON"
        file.seek(_LENGTH)
        file.write(text.ljust(length))


def open_weights(path: Path, device: str = "cpu") -> Any:
    """Open a safetensors file; raise a `CheckpointError` if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt", device=device)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); fetch or save it again"
        ) from error

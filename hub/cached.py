"""Files in the Hub's cache: the hash that their name states, and the one that they have."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import HfFileMetadata

from nfzoo.files import open_regular


def as_hash(name: str | None) -> str | None:
    """Return `name` if it is a sha256 (64 hexadecimal digits) or git's sha1 (40); `None` for others."""
    return name if name is not None and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def stated_hash(path: Path) -> str | None:
    """Return the hash that the cache states for a file of a snapshot: the name of the blob that it links to."""
    return as_hash(Path(os.readlink(path)).name) if path.is_symlink() else None


def other_file(stated: HfFileMetadata, size: int | None, sha256: str | None) -> str | None:
    """Return how what the Hub states of a file contradicts what is known of it; `None` if it does not."""
    if size is not None and stated.size not in (None, size):
        return f"the server states {stated.size:,} bytes, not {size:,}"
    etag = as_hash(stated.etag) or ""
    if sha256 is not None and len(etag) == 64 and etag != sha256:
        return f"the server states the sha256 {etag}, not {sha256}"
    return None


def file_hash(path: Path, like: str) -> str:
    """Return the sha256 of a file, or git's hash of it: the sha1 of a header and the content."""
    with open_regular(path) as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def remove(path: Path) -> None:
    """Remove a file of a snapshot, and the blob that it links to."""
    blob = path.parent / os.readlink(path) if path.is_symlink() else None
    path.unlink(missing_ok=True)
    if blob is not None:
        blob.unlink(missing_ok=True)

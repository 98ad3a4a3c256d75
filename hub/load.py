"""`from_pretrained`: a zoo name, a Hub repository, a folder or a file becomes a model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nfzoo.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from nfzoo.config import nearest
from nfzoo.errors import CheckpointError, UnknownModelError
from nfzoo.module import NFNet, load
from nfzoo.variants import VARIANTS

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> NFNet:
    """A pretrained model, in evaluation mode.

    Args:
        source: a zoo name, a Hub repository id (`org/name`), a checkpoint folder or a `.safetensors` file. What exists
            on disk comes before what a name could mean.
        num_classes: another number of classes than the checkpoint's draws a fresh classifier, and says so.
        revision: branch, tag or commit of a Hub repository.
        cache_dir: where downloads are kept; the Hub's own cache by default.
        device, dtype: of the parameters; as saved, on the CPU, by default.

    Raises:
        UnknownModelError: for a name that is neither in the zoo nor a repository, with the nearest names.
        CheckpointError: for a missing, damaged or unfitting checkpoint.
    """
    path = _locate(source, revision=revision, cache_dir=cache_dir)
    return load(path, num_classes=num_classes, device=device, dtype=dtype)


def _locate(source: str | os.PathLike[str], *, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    path = Path(source)
    if path.exists():
        return path
    name = os.fspath(source)
    if name in VARIANTS:
        raise CheckpointError(
            f"no weights are published for {name!r} yet; nfzoo.create({name!r}) gives the model with random weights, "
            f"and `python -m nfzoo.train --model {name} --data FOLDER --output FOLDER` trains it"
        )
    looks_local = name.endswith(".safetensors") or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local:
        raise CheckpointError(f"there is no file or folder {name!r}")
    if not _REPOSITORY.fullmatch(name):
        raise UnknownModelError(
            f"{name!r} is no folder, no file, no Hub repository (org/name) and no zoo model{nearest(name, VARIANTS)}; "
            "`nfzoo list` shows the zoo"
        )
    return _download(name, revision, cache_dir)


def _download(repository: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    where = f"the Hub repository {repository!r}" + (f" at revision {revision!r}" if revision else "")
    cache = None if cache_dir is None else os.fspath(cache_dir)
    try:
        config = hf_hub_download(repository, CONFIG_FILE, revision=revision, cache_dir=cache)
        hf_hub_download(repository, WEIGHTS_FILE, revision=revision, cache_dir=cache)
    except GatedRepoError as error:
        raise CheckpointError(f"{where} asks for consent: accept its terms on its page, then log in") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{where} does not exist, or is private: check its name, or log in (there is also no such folder here)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{where} cannot be reached and is not in the cache: check the connection") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{where} lacks {CONFIG_FILE} or {WEIGHTS_FILE}: it holds no nfzoo model") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{where} could not be read: {error}") from error
    return Path(config).parent

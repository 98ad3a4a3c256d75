"""Load a pretrained model by a zoo name, from a Hub repository, a folder or a file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from nfzoo.checkpoint.model_folder import CONFIG_FILE
from nfzoo.conversion.timm import read_timm
from nfzoo.conversion.timm_config import is_timm
from nfzoo.data.labels import imagenet
from nfzoo.errors import CheckpointError, ConversionError, UnknownModelError, nearest, shown
from nfzoo.files import nearest_path, read_json
from nfzoo.hub.download import Source
from nfzoo.hub.registry import PUBLIC, Repository
from nfzoo.nn import NFNet, assemble, check_changes, load
from nfzoo.variants import VARIANTS

HUB = "hub:"
"""Prefix of a repository id, for one that looks like a path here."""

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".pkl", ".json")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    require_hash: bool = False,
    allow_pickle: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> NFNet:
    """Return a pretrained model in evaluation mode.

    A model that was downloaded before comes from the cache, without a request to the network. If its branch has moved
    on the Hub since, `force_download=True` or another `revision` brings the update. Downloads are checked against the
    hashes that the Hub states; where a mirror states none, a warning says that they could not be checked.
    `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as everywhere.

    Args:
        source: a zoo name, a Hub repository id (`org/name`), a checkpoint folder or a `.safetensors` file; repositories
            and folders may be in timm's layout as well. What exists on disk comes before what a name could mean, and
            `org/name` is a path if there is a folder `org`; `hub:org/name` is never one.
        num_classes: another number of classes than the checkpoint's draws a fresh classifier, and says so.
        in_channels: another number of image channels than the checkpoint's adapts the first convolution, and mean and
            deviation of the preprocessing: see `nfzoo.model.adapt_input`.
        revision: branch, tag or commit of the Hub repository; of a zoo name the one in the zoo's table by default.
        cache_dir: where downloads are kept; the Hub's own cache by default.
        token: for private repositories: a token, `True` for the saved one, `False` for none.
        local_files_only: raise an error rather than download.
        force_download: ask the Hub for the newest commit of the revision, fetch what has changed, check all again.
        require_hash: raise an error rather than load a downloaded file that the server states no hash of.
        allow_pickle: also read weights in a pickle of torch's, such as `pytorch_model.bin`, if there are none in
            safetensors, by torch's reader of weights alone, from torch 2.10 on.
        device, dtype: of the parameters; as saved, on the CPU, by default.

    Raises:
        UnknownModelError: for a name that is neither in the zoo nor a repository, with the nearest names.
        CheckpointError: for a missing, damaged or unfitting checkpoint.
    """
    check_changes(num_classes, in_channels)
    if local_files_only and force_download:
        raise CheckpointError("local_files_only and force_download contradict each other; choose one")
    try:
        name = os.fspath(source)
    except TypeError as error:
        raise UnknownModelError(
            f"weights are loaded from a name, a folder or a file, not from {shown(source)}; nfzoo.create makes a model "
            "with random weights, of a configuration too"
        ) from error
    if os.path.exists(name):  # unlike Path.exists, False for a name too long for the disk
        path, sha256, origin = Path(name), None, {}
    else:
        repository = repository_of(name)
        if revision is not None and revision != repository.revision:
            repository = repository._replace(revision=revision, sha256=None)
        hub = Source(
            repository,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            require_hash=require_hash,
            allow_pickle=allow_pickle,
            instead=nearest_path(name),
        )
        path, sha256 = hub.fetch()
        origin = {"repository": repository.repo_id, "revision": path.name}
    if not _in_timms_layout(path):
        return load(
            path, num_classes=num_classes, in_channels=in_channels, device=device, dtype=dtype, hashed=bool(origin)
        )
    try:
        # A zoo name means one architecture, whatever the repository holds.
        known = name if origin and name in PUBLIC else None
        description, params = read_timm(path, model=known, sha256=sha256, allow_pickle=allow_pickle)
    except ConversionError as error:
        raise CheckpointError(f"{name}: {error}") from error
    description = description._replace(provenance={**(description.provenance or {}), **origin})
    if origin and name in PUBLIC and description.labels is None and description.config.num_classes == 1000:
        description = description._replace(labels=imagenet())  # all of the table were trained on it
    params = {key: value.to(device=device) for key, value in params.items()} if device is not None else params
    return assemble(description, params, num_classes=num_classes, in_channels=in_channels, dtype=dtype, source=name)


def _in_timms_layout(path: Path) -> bool:
    try:
        return path.is_dir() and is_timm(read_json(path / CONFIG_FILE))
    except (OSError, ValueError):
        return False  # `load` says what is wrong


def repository_of(name: str) -> Repository:
    """Return the repository of a zoo name or a repository id, for a name that does not exist on disk.

    Raises:
        UnknownModelError: for what is neither.
        CheckpointError: for what looks like a path, and for a zoo name without public weights.
    """
    if name.startswith(HUB):
        name = name.removeprefix(HUB)
        if not _REPOSITORY.fullmatch(name):
            raise UnknownModelError(f"{HUB + name!r} names no repository of the Hub; write {HUB}ORG/NAME")
        return Repository(name)
    if name in PUBLIC:
        return PUBLIC[name]
    if name in VARIANTS:
        raise CheckpointError(
            f"no weights are published for {name!r}; nfzoo.create({name!r}) gives the model with random weights, "
            f"`nfzoo train --model {name} --data FOLDER --output FOLDER` trains it, and `nfzoo convert` reads weights "
            "of DeepMind's or timm's code"
        )
    path = Path(name)
    in_a_folder = "/" in name and os.path.isdir(path.parts[0])
    if in_a_folder or is_file_name(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        hub = f" ({HUB}{name} would be a repository of the Hub)" if _REPOSITORY.fullmatch(name) else ""
        raise CheckpointError(f"there is no file or folder {name!r}{hub}{nearest_path(name)}")
    if not _REPOSITORY.fullmatch(name):
        raise UnknownModelError(
            f"{name!r} is no folder, no file, no Hub repository (org/name) and no zoo model"
            f"{nearest(name, VARIANTS) or nearest_path(name)}; `nfzoo list` shows the zoo"
        )
    return Repository(name)


def is_file_name(name: str) -> bool:
    """Return whether a name ends as those of weight files do."""
    return Path(name).suffix in _SUFFIXES

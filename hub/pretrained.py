"""Load a pretrained model by a zoo name, from a Hub repository, a folder or a file."""

from __future__ import annotations

import os

import torch

from nfzoo.errors import CheckpointError, ConversionError, UnknownModelError, shown
from nfzoo.hub.registry import Layout
from nfzoo.hub.sources import Options, locate, read_foreign
from nfzoo.nn import NFNet, assemble, check_changes, load


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    layout: Layout | None = None,
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
        layout: whose files to read: `"nfzoo"`, `"timm"`, or `"haiku"` for DeepMind's pickle, which is `model.npz` in a
            repository, and which a reader of nfzoo's own reads without executing anything. By default `config.json`
            tells, and a repository without one may hold DeepMind's file. For a zoo name, timm's copy is taken; where
            that cannot be had, DeepMind's file is, with a warning.
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
    found = locate(
        name,
        Options(
            layout=layout,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            require_hash=require_hash,
            allow_pickle=allow_pickle,
        ),
    )
    if found.layout == "nfzoo":
        hashed = bool(found.origin)
        return load(
            found.path, num_classes=num_classes, in_channels=in_channels, device=device, dtype=dtype, hashed=hashed
        )
    try:
        description, params, _ = read_foreign(found, allow_pickle=allow_pickle)
    except ConversionError as error:
        raise CheckpointError(f"{name}: {error}") from error
    params = {key: value.to(device=device) for key, value in params.items()} if device is not None else params
    return assemble(description, params, num_classes=num_classes, in_channels=in_channels, dtype=dtype, source=name)

"""Normalizer-Free networks: exact, functional, compiled.

    import nfzoo

    model = nfzoo.from_pretrained("runs/digits")  # a folder, a file, or a Hub repository
    model = nfzoo.create("nfnet-f0", num_classes=10)
    logits = model(images)

The functional form is in `nfzoo.model`: `init`, `apply`, `features`, `sample_noise` over plain dictionaries.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from nfzoo.config import ModelConfig, NFNetConfig, NFRegNetConfig, NFResNetConfig, Preprocessing
from nfzoo.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    HubError,
    NfzooError,
    UnknownModelError,
)
from nfzoo.nn import NFNet, create
from nfzoo.optim.agc_sgd import AGCSGD, param_groups
from nfzoo.optim.clipping import agc, agc_, unitwise_norm, with_agc
from nfzoo.variants import VARIANTS, variant

if TYPE_CHECKING:
    import torch

try:
    __version__ = version("nfzoo")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

__all__ = [
    "AGCSGD",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "DataError",
    "HubError",
    "ModelConfig",
    "NFNet",
    "NFNetConfig",
    "NFRegNetConfig",
    "NFResNetConfig",
    "NfzooError",
    "Preprocessing",
    "UnknownModelError",
    "__version__",
    "agc",
    "agc_",
    "create",
    "from_pretrained",
    "list_models",
    "param_groups",
    "unitwise_norm",
    "variant",
    "with_agc",
]


def list_models(*, pretrained: bool = False) -> list[str]:
    """All names of the zoo in the order of its table, or those alone that have public weights."""
    if not pretrained:
        return list(VARIANTS)
    from nfzoo.hub.registry import PUBLIC

    return [name for name in VARIANTS if name in PUBLIC]


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> NFNet:
    """A pretrained model, in evaluation mode: see `nfzoo.hub.from_pretrained`."""
    from nfzoo.hub import from_pretrained as load

    return load(
        source,
        num_classes=num_classes,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        force_download=force_download,
        device=device,
        dtype=dtype,
    )

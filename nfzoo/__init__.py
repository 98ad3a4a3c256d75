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

from .adapter import AGCSGD, param_groups
from .agc import agc, agc_, unitwise_norm, with_agc
from .config import ModelConfig, NFNetConfig, NFRegNetConfig, NFResNetConfig, Preprocessing
from .errors import CheckpointError, ConfigError, ConversionError, DataError, NfzooError, UnknownModelError
from .module import NFNet, create
from .variants import list_models, variant

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


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> NFNet:
    """A pretrained model, in evaluation mode: see `nfzoo.hub.from_pretrained`."""
    from nfzoo.hub import from_pretrained as load

    return load(source, num_classes=num_classes, revision=revision, cache_dir=cache_dir, device=device, dtype=dtype)

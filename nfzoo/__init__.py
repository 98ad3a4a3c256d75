"""Normalizer-Free networks: exact, functional, compiled.

    import nfzoo

    model = nfzoo.from_pretrained("runs/digits")  # a folder, a file, or a Hub repository
    model = nfzoo.create("nfnet-f0", num_classes=10)
    logits = model(images)
    result = nfzoo.fit(model, data_set, output="runs/pets", epochs=5)  # as `nfzoo train` does

The functional form is in `nfzoo.model`: `init`, `apply`, `features`, `sample_noise` over plain dictionaries.
"""

from __future__ import annotations

import fnmatch
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

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
from nfzoo.runtime.cpu import is_program, wait_briefly
from nfzoo.runtime.output import escape_log
from nfzoo.variants import VARIANTS, variant

if TYPE_CHECKING:
    from nfzoo.hub.pretrained import from_pretrained
    from nfzoo.nn import NFNet, create, register_activation
    from nfzoo.optim.agc_sgd import AGCSGD, param_groups
    from nfzoo.optim.clipping import agc, agc_, clip_grad_agc_, unitwise_norm, with_agc
    from nfzoo.train.python.callbacks import Callback, State
    from nfzoo.train.python.fit import fit

# What imports torch or the Hub's client is imported on its first use: `nfzoo list` needs neither.
_LAZY = {
    **dict.fromkeys(["NFNet", "create", "register_activation"], "nfzoo.nn"),
    **dict.fromkeys(["AGCSGD", "param_groups"], "nfzoo.optim.agc_sgd"),
    **dict.fromkeys(["agc", "agc_", "clip_grad_agc_", "unitwise_norm", "with_agc"], "nfzoo.optim.clipping"),
    **dict.fromkeys(["Callback", "State"], "nfzoo.train.python.callbacks"),
    "fit": "nfzoo.train.python.fit",
    "from_pretrained": "nfzoo.hub.pretrained",
}

escape_log()
if is_program(__name__):  # such as `python -m nfzoo.train`, which imports torch before it comes to `__main__`
    wait_briefly()

try:
    __version__ = version("nfzoo")
except PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

__all__ = [
    "AGCSGD",
    "Callback",
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
    "State",
    "UnknownModelError",
    "__version__",
    "agc",
    "agc_",
    "clip_grad_agc_",
    "create",
    "fit",
    "from_pretrained",
    "list_models",
    "param_groups",
    "register_activation",
    "unitwise_norm",
    "variant",
    "with_agc",
]


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """List the names of the zoo in the order of its table.

    Args:
        pattern: of names, such as `"nfnet-f*"`; see `fnmatch`.
        pretrained: list only models with public weights.
    """
    names = [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]
    if not pretrained:
        return names
    from nfzoo.hub.registry import PUBLIC

    return [name for name in names if name in PUBLIC]


def __dir__() -> list[str]:
    """List the public names alone."""
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public name, or a module such as `nfzoo.model`, on its first use."""
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value

"""The models of nfzoo for `torch.hub`, from a clone of this repository or from GitHub; nothing needs to be installed.

model = torch.hub.load("path/to/nfzoo", "nfnet_f0", source="local", pretrained=True)
model = torch.hub.load("path/to/nfzoo", "from_pretrained", "runs/digits", source="local")
"""

from __future__ import annotations

from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

import nfzoo as _nfzoo

_ROOT = _Path(__file__).resolve().parent
if _Path(_nfzoo.__path__[0]).resolve() == _ROOT / "nfzoo" and str(_ROOT) not in _nfzoo.__path__:
    # In this folder nfzoo.hub, nfzoo.conversion and nfzoo.recipes lie beside nfzoo/; an installation maps them into it.
    _nfzoo.__path__.append(str(_ROOT))

dependencies = ["accelerate", "huggingface_hub", "numpy", "PIL", "psutil", "safetensors", "torch", "tqdm", "yaml"]


def from_pretrained(source: str, **options: _Any) -> _nfzoo.NFNet:
    """Return a pretrained model in evaluation mode: see `nfzoo.from_pretrained`, which has the same options."""
    return _nfzoo.from_pretrained(source, **options)


def _entrypoint(name: str) -> _Callable[..., _nfzoo.NFNet]:
    def load(pretrained: bool = False, **options: _Any) -> _nfzoo.NFNet:
        if not isinstance(pretrained, bool):
            raise _nfzoo.ConfigError(
                f"pretrained must be true or false, not {pretrained!r}; for files: from_pretrained"
            )
        return _nfzoo.from_pretrained(name, **options) if pretrained else _nfzoo.create(name, **options)

    load.__name__ = load.__qualname__ = name.replace("-", "_")
    load.__doc__ = f"""Return {name} with random weights in training mode, or pretrained in evaluation mode.

    Args:
        pretrained: load the public weights of the name.
        options: those of `nfzoo.from_pretrained`, or of `nfzoo.create` for random weights.
    """
    return load


globals().update({_name.replace("-", "_"): _entrypoint(_name) for _name in _nfzoo.list_models()})

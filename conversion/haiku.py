"""DeepMind's parameter trees: `{haiku module: {parameter: array}}`, kernels HWIO, linears (in, out).

Source: the modules of the code released with arXiv 2102.06171 (`NFNet`, `NF_ResNet`, `NF_RegNet`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from nfzoo.config import ModelConfig
from nfzoo.errors import ConversionError
from nfzoo.model import specs
from nfzoo.types import Params

Tree = Mapping[str, Mapping[str, NDArray]]

_ROOT = {"nfnet": "NFNet", "nf_resnet": "NF_ResNet", "nf_regnet": "NF_RegNet"}
_BLOCK = {"nfnet": "nf_block", "nf_resnet": "nf_res_block", "nf_regnet": "nf_block"}
_SQUEEZE_EXCITE = {"se.fc0": "squeeze_excite/~/linear", "se.fc1": "squeeze_excite/~/linear_1"}


def haiku_names(cfg: ModelConfig) -> dict[str, tuple[str, str]]:
    """nfzoo key -> (Haiku module, parameter), for every parameter of a model under DeepMind's rules."""
    if cfg.rules != "deepmind":
        raise ConversionError(f"a model under {cfg.rules!r} rules has no Haiku form; only 'deepmind' rules do")
    root = f"{_ROOT[cfg.family]}/~/"
    blocks: dict[str, str] = {}
    names = {}
    for key in specs(cfg):
        parts = key.split(".")
        leaf = parts[-1]
        if parts[0] == "stages":
            site = ".".join(parts[:3])
            index = len(blocks)
            module = blocks.setdefault(site, root + _BLOCK[cfg.family] + (f"_{index}" if index else ""))
            layer = ".".join(parts[3:-1])
            if layer:
                layer = {"shortcut": "conv_shortcut", **_SQUEEZE_EXCITE}.get(layer, layer)
                module = f"{module}/~/{layer}"
            linear = parts[3] == "se"
        else:
            layer = ".".join(parts[:-1])
            module = root + {"stem.conv": "initial_conv", "head": "linear"}.get(layer, layer.replace(".", "_"))
            linear = layer == "head"
        names[key] = (module, {"weight": "w", "bias": "b" if linear else "bias"}.get(leaf, leaf))
    return names


def from_haiku(cfg: ModelConfig, tree: Tree) -> Params:
    """Parameters of `cfg` from a Haiku tree. A missing, unexpected or misshaped array is a `ConversionError`."""
    names = haiku_names(cfg)
    wanted = set(names.values())
    unexpected = [f"{m}:{n}" for m, leaves in tree.items() for n in leaves if (m, n) not in wanted]
    if unexpected:
        raise ConversionError(f"the tree has {len(unexpected)} arrays that the model lacks, such as {unexpected[0]}")
    params = {}
    for key, (shape, _) in specs(cfg).items():
        module, name = names[key]
        if module not in tree or name not in tree[module]:
            raise ConversionError(f"the tree lacks {module}:{name}, the model's {key}")
        array = np.asarray(tree[module][name])
        value = torch.from_numpy(np.ascontiguousarray(_to_torch(array)))
        if key.endswith("skip_gain"):
            value = value.reshape(-1)
        if tuple(value.shape) != shape:
            raise ConversionError(f"{module}:{name} has shape {array.shape}, which does not fit {key} of shape {shape}")
        params[key] = value.clone()
    return params


def to_haiku(cfg: ModelConfig, params: Mapping[str, torch.Tensor]) -> dict[str, dict[str, NDArray]]:
    """The Haiku tree of a model's parameters: the inverse of `from_haiku`, bit for bit."""
    tree: dict[str, dict[str, NDArray]] = {}
    for key, (module, name) in haiku_names(cfg).items():
        array = params[key].detach().cpu().numpy()
        array = array.reshape(()) if key.endswith("skip_gain") else _from_torch(array)
        tree.setdefault(module, {})[name] = np.ascontiguousarray(array) if array.ndim else array.copy()
    return tree


def _to_torch(array: NDArray) -> NDArray:
    """HWIO -> OIHW, (in, out) -> (out, in), the rest as it is."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(array: NDArray) -> NDArray:
    """OIHW -> HWIO, (out, in) -> (in, out), the rest as it is."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T

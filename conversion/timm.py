"""timm's state dicts of NF-networks, read and written.

Source: the parameter names of timm 1.0, models/nfnet.py; gains there are `(out, 1, 1, 1)`, squeeze-excite is made of
1x1 convolutions and the skip gain is 0-dimensional.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nfzoo.config import ModelConfig
from nfzoo.errors import ConversionError
from nfzoo.model import specs
from nfzoo.types import Params

_LAYER = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "shortcut": "downsample.conv",
}


def timm_names(cfg: ModelConfig) -> dict[str, str]:
    """nfzoo key -> timm key, for every parameter."""
    attention = "attn" if cfg.family == "nf_regnet" else "attn_last"
    names = {}
    for key in specs(cfg):
        parts = key.split(".")
        if parts[0] == "stages":
            layer, leaf = parts[3], parts[-1]
            if layer == "skip_gain":
                local = "skipinit_gain"
            elif layer == "se":
                local = f"{attention}.fc{int(parts[4][2:]) + 1}.{leaf}"
            elif layer == "eca":
                local = f"{attention}.conv.{leaf}"
            else:
                local = f"{_LAYER[layer]}.{leaf}"
            names[key] = ".".join((*parts[:3], local))
        elif key.startswith("stem.conv") and parts[1] != "conv":
            names[key] = f"stem.conv{int(parts[1][4:]) + 1}.{parts[2]}"
        else:
            names[key] = key.replace("head.", "head.fc.") if parts[0] == "head" else key
    return names


def from_timm(cfg: ModelConfig, state: Mapping[str, Tensor]) -> Params:
    """Parameters of `cfg` from a timm state dict. Strict: anything missing, unexpected or misshaped is an error."""
    names = timm_names(cfg)
    unexpected = sorted(set(state) - set(names.values()))
    if unexpected:
        raise ConversionError(f"the file has {len(unexpected)} tensors that the model lacks, such as {unexpected[0]}")
    params = {}
    for key, (shape, _) in specs(cfg).items():
        if names[key] not in state:
            raise ConversionError(f"the file lacks {names[key]}, the model's {key}")
        value = state[names[key]]
        if tuple(value.shape) != _timm_shape(key, shape):
            raise ConversionError(
                f"{names[key]} has shape {tuple(value.shape)}, which does not fit {key} of shape {shape}"
            )
        params[key] = value.reshape(shape).clone()
    return params


def to_timm(cfg: ModelConfig, params: Mapping[str, Tensor]) -> Params:
    """The timm state dict of a model's parameters: the inverse of `from_timm`, bit for bit."""
    return {
        name: params[key].detach().reshape(_timm_shape(key, tuple(params[key].shape))).clone()
        for key, name in timm_names(cfg).items()
    }


def _timm_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if key.endswith(".gain"):
        return (*shape, 1, 1, 1)
    if key.endswith(".skip_gain"):
        return ()
    if ".se." in key and len(shape) == 2:
        return (*shape, 1, 1)
    return shape

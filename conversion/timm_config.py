"""Read and write timm's `config.json`; refuse entries that would change the arithmetic.

Source: timm 1.0, models/_hub.py (`save_config_for_hf`) and data/config.py (`resolve_data_config`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfzoo.checkpoint.model_folder import Description
from nfzoo.config import MAX_SIDE, ModelConfig, Preprocessing, is_int
from nfzoo.errors import ConfigError, ConversionError
from nfzoo.files import read_json
from nfzoo.model import specs
from nfzoo.runtime.timm_interface import pretrained_cfg as interface_cfg
from nfzoo.runtime.timm_interface import timm_name
from nfzoo.variants import VARIANTS

DEEPMIND_TAG = "dm_in1k"
"""timm's tag of DeepMind's own weights."""

# Arguments of timm's create_model, stored in config.json, that leave the arithmetic as it is or that are read here.
_INERT_ARGUMENTS = {"num_classes", "in_chans", "img_size", "drop_rate", "drop_path_rate"}

ARCHITECTURES: dict[str, str] = {
    **{f"dm_nfnet_f{n}": f"nfnet-f{n}" for n in range(7)},
    **{f"nfnet_f{n}": f"timm-nfnet-f{n}" for n in range(8)},
    "nfnet_l0": "nfnet-l0",
    **{f"eca_nfnet_l{n}": f"eca-nfnet-l{n}" for n in range(4)},
    **{f"nf_{kind}resnet{n}": f"timm-nf-{kind}resnet-{n}" for kind in ("", "se", "eca") for n in (26, 50, 101)},
    **{f"nf_regnet_b{n}": f"timm-nf-regnet-b{n}" for n in range(6)},
}
"""timm's architecture -> the variant of the zoo. The `dm_` weights are DeepMind's own and run under their rules."""

REGISTERED = {timm_name(name): name for name in VARIANTS}
"""The names of `nfzoo.integrations.timm`, under which timm saves a model of nfzoo's with its own parameters' names."""


def is_timm(fields: object) -> bool:
    """Return whether the content of a `config.json` is of timm's form: its `architecture` is a name."""
    return isinstance(fields, dict) and isinstance(fields.get("architecture"), str)


def read_config(path: Path) -> dict[str, Any]:
    """Read the content of timm's `config.json`."""
    try:
        fields = read_json(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not is_timm(fields):
        raise ConversionError(f"{path} is not timm's: it lacks an 'architecture' such as \"dm_nfnet_f0\"")
    return fields


def pretrained_cfg(fields: Mapping[str, Any], source: Path) -> Mapping[str, Any]:
    """Return the part about the weights: their tag, the images they are for."""
    cfg = fields.get("pretrained_cfg", fields)  # before timm 0.9 everything stood at the top
    if not isinstance(cfg, dict):
        raise ConversionError(f"{source}: 'pretrained_cfg' must be a JSON object, not {cfg!r}")
    if cfg.get("label_offset"):
        raise ConversionError(f"{source}: a label_offset of {cfg['label_offset']!r} is not supported")
    return cfg


def apply_arguments(
    config: ModelConfig, fields: Mapping[str, Any], source: Path, *, exact: bool = False
) -> ModelConfig:
    """Return `config` with the drop rates and the output stride of `model_args`.

    Another network than the weights' is an error. So is an output stride under DeepMind's rules, whose maps differ from
    those that timm computes, unless nfzoo computed them (`exact`).
    """
    arguments = fields.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise ConversionError(f"{source}: 'model_args' must be a JSON object, not {arguments!r}")
    if fields.get("global_pool", "avg") not in ("avg", "", None) or arguments.get("global_pool", "avg") != "avg":
        raise ConversionError(f"{source}: only average pooling (global_pool 'avg') is supported")
    stride = arguments.get("output_stride") or 32
    if stride != 32 and config.rules != "timm" and not exact:
        raise ConversionError(
            f"{source}: at output_stride {stride!r} timm computes other maps than DeepMind's rules; leave it out, and "
            "set the model's own after loading"
        )
    foreign = sorted(set(arguments) - _INERT_ARGUMENTS - {"global_pool", "output_stride"})
    if foreign:
        raise ConversionError(
            f"{source}: model_args change the network in a way that nfzoo lacks: {', '.join(foreign)}"
        )
    for where, key, value in (
        (fields, "num_classes", config.num_classes),
        (arguments, "num_classes", config.num_classes),
        (arguments, "in_chans", config.in_channels),
    ):
        if where.get(key) not in (None, value):
            raise ConversionError(f"{source} says {key} {where[key]!r}, the weights have {value}")
    changes = {
        "drop_rate": arguments.get("drop_rate"),
        "stochastic_depth": arguments.get("drop_path_rate"),
        "output_stride": stride,
    }
    try:
        return config.replace(**{key: value for key, value in changes.items() if value is not None})
    except ConfigError as error:
        raise ConversionError(f"{source}: {error}") from error


def read_preprocessing(
    arch: str, known: Preprocessing, cfg: Mapping[str, Any], config: ModelConfig, source: Path
) -> Preprocessing:
    """Return what `pretrained_cfg` says, by timm's rule for evaluation at the test size.

    DeepMind's own weights at their own sizes get DeepMind's preprocessing, which timm approximates by `squash`; weights
    that were trained on from there have the margin that their `crop_pct` says.
    """
    deepmind = known.resize == "deepmind"
    mode, interpolation = cfg.get("crop_mode") or "center", cfg.get("interpolation", "bicubic")
    if interpolation != "bicubic":
        raise ConversionError(f"{source}: interpolation {interpolation!r} is not supported, only 'bicubic'")
    if mode not in (("center", "squash") if deepmind else ("center",)):
        raise ConversionError(f"{source}: crop_mode {mode!r} is not supported for {arch}, only 'center'")
    default = known.for_channels(config.in_channels)
    train = _side(cfg, "input_size", config.in_channels, source)
    if train is None:
        raise ConversionError(f"{source} lacks input_size in its 'pretrained_cfg'")
    test = _side(cfg, "test_input_size", config.in_channels, source) or train
    crop = cfg.get("test_crop_pct") or cfg.get("crop_pct") or 0.875  # timm's default
    try:
        if not isinstance(crop, int | float) or not 1 / MAX_SIDE <= crop <= 1:
            raise ConfigError(f"crop_pct must be from 1 / {MAX_SIDE} to 1, not {crop!r}")
        for side in (train, test):
            if not is_int(side, 1, MAX_SIDE):
                raise ConfigError(f"the sides of images must be from 1 to {MAX_SIDE} pixels, not {side!r}")
        preprocessing = dataclasses.replace(
            default,
            train_size=train,
            test_size=test,
            resize="deepmind" if mode == "squash" else "shortest-edge",
            margin=math.floor(test / crop) - test if mode == "squash" else known.margin,
            crop=known.crop if mode == "squash" else float(crop),
            mean=cfg.get("mean", default.mean),
            std=cfg.get("std", default.std),
        )
        if len(preprocessing.mean) != config.in_channels:
            raise ConfigError(f"mean has {len(preprocessing.mean)} numbers for images of {config.in_channels} channels")
    except (ConfigError, TypeError) as error:
        raise ConversionError(f"{source}: {error}") from error
    same = (
        dataclasses.replace(known, resize=preprocessing.resize, margin=preprocessing.margin, crop=preprocessing.crop)
        == preprocessing
    )
    return known if deepmind and same and cfg.get("tag") == DEEPMIND_TAG else preprocessing


def _side(cfg: Mapping[str, Any], key: str, channels: int, source: Path) -> int | None:
    size = cfg.get(key)
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 3 or size[0] != channels or size[1] != size[2]:
        raise ConversionError(f"{source}: {key} must be [{channels}, side, side], not {size!r}")
    return size[1]


def read_labels(value: object, config: ModelConfig, source: Path) -> tuple[str, ...] | None:
    """Return timm's `label_names`: a list, or an object from index to name."""
    if not value:
        return None
    if isinstance(value, dict):
        value = [value.get(str(index)) for index in range(max(len(value), config.num_classes))]
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(names) != len(value):
        raise ConversionError(f"{source}: label_names must name every class from 0 on")
    if len(names) != config.num_classes:
        raise ConversionError(f"{source}: {len(names)} label_names for {config.num_classes} classes")
    return tuple(names)


def described_by(
    fields: Mapping[str, Any], description: Description, known: Preprocessing, source: Path
) -> Description:
    """Return the description of a model of nfzoo's with what timm wrote of it: rates, stride, preprocessing, labels."""
    cfg = pretrained_cfg(fields, source)
    config = apply_arguments(description.config, fields, source, exact=True)
    preprocessing = read_preprocessing(fields["architecture"], known, cfg, config, source)
    labels = read_labels(fields.get("label_names", cfg.get("label_names")), config, source)
    return description._replace(config=config, preprocessing=preprocessing, labels=labels)


def timm_config(arch: str, description: Description) -> dict[str, Any]:
    """Return the content of `config.json` for timm."""
    config = description.config
    own = interface_cfg(config.replace(output_stride=32), description.preprocessing)
    tag = (description.provenance or {}).get("tag")
    cfg: dict[str, Any] = {
        **({"tag": tag} if tag else {}),
        "custom_load": False,
        **{key: list(v) if isinstance(v, tuple) else v for key, v in own.items()},
        "first_conv": "stem.conv1" if config.family == "nfnet" else "stem.conv",
        "classifier": "head.fc",
    }
    arguments = {"in_chans": config.in_channels} if config.in_channels != 3 else {}
    if config.output_stride != 32:
        arguments["output_stride"] = config.output_stride
    return {
        "architecture": arch,
        "num_classes": config.num_classes,
        "num_features": specs(config)["head.weight"][0][1],
        "global_pool": "avg",
        **({"label_names": list(description.labels)} if description.labels else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": cfg,
    }

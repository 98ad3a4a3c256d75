"""Small models, reference weights and distances that several test modules share."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nfzoo import model
from nfzoo.config import ModelConfig, NFNetConfig, NFRegNetConfig, NFResNetConfig
from nfzoo.conversion.haiku import from_haiku
from nfzoo.types import Params
from nfzoo.variants import VARIANTS
from tests.reference.refweights import unit_noise, weights

REFERENCE = Path(__file__).resolve().parents[1] / "reference"

# A few thousand parameters each. Between them: every family, both sets of rules, each attention, a stage of two blocks.
_NFNET: dict[str, Any] = {
    "depths": (1, 2, 1, 1),
    "widths": (16, 24, 32, 32),
    "group_width": 4,
    "stem_width": 16,
    "num_classes": 5,
}
_RESNET: dict[str, Any] = {"depths": (1, 2, 1, 1), "widths": (16, 24, 32, 40), "stem_width": 8, "num_classes": 5}
_REGNET: dict[str, Any] = {"depths": (1, 2, 1, 1), "widths": (16, 24, 32, 40), "group_width": 4, "num_classes": 5}
SMALL: dict[str, ModelConfig] = {
    "nfnet": NFNetConfig(**_NFNET),
    "nfnet-plain": NFNetConfig(**_NFNET, attention="none"),
    "nfnet-timm-eca": NFNetConfig(**_NFNET, attention="eca", rules="timm", activation="silu"),
    "nfnet-timm-plain": NFNetConfig(**_NFNET, attention="none", rules="timm", activation="gelu"),
    "nf-resnet": NFResNetConfig(**_RESNET),
    "nf-resnet-se": NFResNetConfig(**_RESNET, attention="se"),
    "nf-resnet-timm": NFResNetConfig(**_RESNET, rules="timm"),
    "nf-resnet-timm-eca": NFResNetConfig(**_RESNET, rules="timm", attention="eca"),
    "nf-regnet": NFRegNetConfig(**_REGNET),
    "nf-regnet-timm": NFRegNetConfig(**_REGNET, rules="timm"),
}
FAMILIES = ("nfnet", "nf-resnet", "nf-regnet")
"""One of each family, where the rules do not matter."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(cfg: ModelConfig, batch: int = 2, height: int = 32, width: int | None = None, seed: int = 1) -> Tensor:
    return torch.randn((batch, cfg.in_channels, height, width or height), generator=generator(seed))


def random_params(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Parameters in which nothing is 0, so that no branch is silent: skip gains and classifiers start at 0."""
    g = generator(seed)
    params = {}
    for key, (shape, kind) in model.specs(cfg).items():
        noise = torch.randn(shape, generator=g, dtype=dtype)
        if kind in ("weight", "head"):
            params[key] = noise / max(1, int(np.prod(shape[1:]))) ** 0.5
        elif kind == "gain":
            params[key] = 1 + 0.1 * noise
        elif kind == "skip_gain":
            params[key] = 0.5 + 0.2 * noise
        else:
            params[key] = 0.1 * noise
    return params


def relative(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    """`|a - b| / |b|` in float64, of the whole arrays."""
    x, y = (np.asarray(v.detach() if isinstance(v, Tensor) else v, np.float64) for v in (a, b))
    assert x.shape == y.shape
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """The same keys, dtypes and bits."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


# ---------------------------------------------------------------- the reference data

REFERENCE_MODELS = {
    "nfnet_F0": VARIANTS["nfnet-f0"].config,
    "nf_resnet_ResNet50": VARIANTS["nf-resnet-50"].config,
    "nf_regnet_B0": VARIANTS["nf-regnet-b0"].config,
}


@functools.cache
def reference_tree(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The Haiku tree that DeepMind's code was run on. Not to be changed."""
    return weights(json.loads((REFERENCE / f"{name}_1000.shapes.json").read_text()))


def reference_params(name: str) -> Params:
    """The same weights under nfzoo's keys, a copy each time."""
    return from_haiku(REFERENCE_MODELS[name], reference_tree(name))


def reference_input(height: int, width: int) -> Tensor:
    noise = unit_noise((2, height, width, 3), f"input:{height}x{width}")
    return torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2)))


def reference_array(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: file[key] for key in file}


@functools.cache
def timm_golden() -> dict[str, Any]:
    return json.loads((REFERENCE / "timm_golden.json").read_text())


def timm_architecture(name: str) -> str | None:
    """timm's name of a variant of the zoo, `None` if timm has no such model."""
    if name.startswith("timm-nf-regnet"):
        return name.removeprefix("timm-").replace("-", "_")
    if name.startswith("timm-nf-"):
        kind, depth = name.removeprefix("timm-nf-").split("-")
        return f"nf_{kind}{depth}"
    if name.startswith("timm-"):
        return name.removeprefix("timm-").replace("-", "_")
    if name.startswith(("nfnet-l", "eca-nfnet-")):
        return name.replace("-", "_")
    if name in {f"nfnet-f{n}" for n in range(7)}:
        return "dm_" + name.replace("-", "_")
    return None


TIMM = {arch: name for name in VARIANTS if (arch := timm_architecture(name)) is not None}
"""timm's architecture -> the variant of the zoo."""


def deepmind_variant(name: str) -> str:
    """The zoo's name of a network of deepmind_counts.json, such as "nfnet F0+" or "nf_resnet ResNet50-SE"."""
    family, size = name.split()
    return f"{family.replace('_', '-')}-{size.removeprefix('ResNet').lower().replace('+', '-plus')}"


DEEPMIND_COUNTS: dict[str, dict[str, Any]] = {
    deepmind_variant(name): counts
    for name, counts in json.loads((REFERENCE / "deepmind_counts.json").read_text()).items()
}
"""Variant of the zoo -> `parameters`, `arrays` and shapes of the `stem`'s kernels (HWIO) in DeepMind's code."""


def plus_shapes() -> dict[str, dict[str, list[int]]]:
    """The Haiku tree of DeepMind's NFNet-F0+: F0's with wider stages; deepmind_counts.json has its sums.

    Stages have 384, 768, 2048 and 2048 channels instead of 256, 512, 1536 and 1536, the stem half the first, the head
    twice the last. 3x3 convolutions are half as wide, rounded down to groups of 128: in stage 1 still 128.
    """
    wider = {128: 192, 256: 384, 512: 768, 768: 1024, 1536: 2048, 3072: 4096}
    first = "NFNet/~/nf_block/~/conv"
    kept = {(first + "0", 3), (first + "1", 3), (first + "1b", 3), (first + "2", 2)}  # the width 128 of stage 1

    def widened(module: str, shape: list[int]) -> list[int]:
        axes = range(4 - len(shape), 4)  # of a kernel, HWIO; a gain and a bias have its last
        group = "nf_block" in module and shape[:2] == [3, 3]
        fixed = {axis for axis in axes if (module, axis) in kept or (group and axis == 2)}
        return [n if axis in fixed else wider.get(n, n) for axis, n in zip(axes, shape, strict=True)]

    base = json.loads((REFERENCE / "nfnet_F0_1000.shapes.json").read_text())
    return {m: {name: widened(m, shape) for name, shape in arrays.items()} for m, arrays in base.items()}

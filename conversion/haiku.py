"""DeepMind's parameter trees: `{haiku module: {parameter: array}}`, kernels HWIO, linears (in, out).

Source: the modules of the code released with arXiv 2102.06171 (`NFNet`, `NF_ResNet`, `NF_RegNet`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nfzoo.config import ModelConfig
from nfzoo.conversion.arrays import LazyArray
from nfzoo.errors import ConfigError, ConversionError
from nfzoo.model import specs
from nfzoo.types import Params
from nfzoo.variants import VARIANTS, Variant, variant

Tree = Mapping[str, Mapping[str, ArrayLike]]
Shapes = Mapping[str, tuple[int, ...]]
"""Canonical name -> shape; see `canonical`."""

_ROOT = {"nfnet": "NFNet", "nf_resnet": "NF_ResNet", "nf_regnet": "NF_RegNet"}
_BLOCK = {"nfnet": "nf_block", "nf_resnet": "nf_res_block", "nf_regnet": "nf_block"}
_SQUEEZE_EXCITE = {"se.fc0": "squeeze_excite/~/linear", "se.fc1": "squeeze_excite/~/linear_1"}


def haiku_names(cfg: ModelConfig) -> dict[str, tuple[str, str]]:
    """Return nfzoo key -> (Haiku module, parameter), for every parameter of a model under DeepMind's rules."""
    if cfg.rules != "deepmind":
        raise ConversionError(f"a model under {cfg.rules!r} rules has no Haiku form; only 'deepmind' rules do")
    if not cfg.num_classes:
        raise ConversionError("a model without classifier (num_classes 0) has no Haiku form; DeepMind's have one")
    root = f"{_ROOT[cfg.family]}/~/"
    blocks: dict[str, str] = {}
    names = {}
    for key in specs(cfg):
        parts = key.split(".")
        if parts[0] == "stages":
            index = len(blocks)
            module = blocks.setdefault(".".join(parts[:3]), root + _BLOCK[cfg.family] + (f"_{index}" if index else ""))
            layer = ".".join(parts[3:-1])
            if layer:
                layer = {"shortcut": "conv_shortcut", **_SQUEEZE_EXCITE}.get(layer, layer)
                module = f"{module}/~/{layer}"
            linear = parts[3] == "se"
        else:
            layer = ".".join(parts[:-1])
            module = root + {"stem.conv": "initial_conv", "head": "linear"}.get(layer, layer.replace(".", "_"))
            linear = layer == "head"
        names[key] = (module, {"weight": "w", "bias": "b" if linear else "bias"}.get(parts[-1], parts[-1]))
    return names


def haiku_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that Haiku gives parameter `key`: kernels HWIO, linears (in, out), scalars ()."""
    if key.endswith("skip_gain"):
        return ()
    return (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape[::-1]


def from_haiku(cfg: ModelConfig, tree: Tree) -> Params:
    """Return the parameters of `cfg` from a Haiku tree: see `from_arrays`."""
    return from_arrays(
        cfg, {canonical(module, name): a for module, arrays in tree.items() for name, a in arrays.items()}
    )


def from_arrays(
    cfg: ModelConfig, arrays: Mapping[str, ArrayLike | LazyArray], *, on_read: Callable[[int], object] | None = None
) -> Params:
    """Return the parameters of `cfg` from Haiku's arrays, as float32, or as float64 if one of them is.

    bfloat16 and float16 become float32, which holds their values exactly. Each array is read or copied once, in turn.

    Args:
        arrays: under canonical names: see `canonical`.
        on_read: called with the number of bytes of each array after it was read.

    Raises:
        ConversionError: for a missing, unexpected or misshaped array, and for numbers that are not finite.
    """
    names = haiku_names(cfg)
    expected = {canonical(*name) for name in names.values()}
    unexpected = [path for path in arrays if path not in expected]
    if unexpected:
        raise ConversionError(f"the tree has {len(unexpected)} arrays that the model lacks, such as {unexpected[0]}")
    sources: dict[str, NDArray | LazyArray] = {}
    for key, (shape, _) in specs(cfg).items():
        path, shown = canonical(*names[key]), ":".join(names[key])
        if path not in arrays:
            raise ConversionError(f"the tree lacks {shown}, the model's {key}")
        value = arrays[path]
        source = sources[key] = value if isinstance(value, LazyArray) else np.asarray(value)
        if source.dtype.newbyteorder("=") not in (np.float16, np.float32, np.float64):
            raise ConversionError(f"{shown} is of type {source.dtype}, not float16, float32 or float64")
        if source.shape != haiku_shape(key, shape):
            raise ConversionError(f"{shown} has shape {source.shape}, which does not fit {key} of shape {shape}")
    dtype = np.result_type(np.float32, *{source.dtype for source in sources.values()})
    params = {}
    for key, (shape, _) in specs(cfg).items():
        source = sources.pop(key)
        array = source.read() if isinstance(source, LazyArray) else source
        if on_read is not None:
            on_read(array.nbytes)
        if not np.isfinite(array).all():
            shown = ":".join(names[key])
            raise ConversionError(f"{shown} holds numbers that are not finite: its training had diverged")
        array = np.array(_to_torch(array), dtype, order="C", copy=True).reshape(shape)
        params[key] = torch.from_numpy(array)
    return params


def to_haiku(cfg: ModelConfig, params: Mapping[str, torch.Tensor]) -> dict[str, dict[str, NDArray]]:
    """Return the Haiku tree of a model's parameters: `from_haiku` inverted exactly; bfloat16 becomes float32."""
    tree: dict[str, dict[str, NDArray]] = {}
    for key, (module, name) in haiku_names(cfg).items():
        tree.setdefault(module, {})[name] = haiku_array(key, params[key])
    return tree


def haiku_array(key: str, value: torch.Tensor) -> NDArray:
    """Return one array of `to_haiku`."""
    value = value.detach().cpu()
    array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    array = array.reshape(()) if key.endswith("skip_gain") else _from_torch(array)
    return array.copy(order="C")


def _to_torch(array: NDArray) -> NDArray:
    """Transpose HWIO to OIHW and (in, out) to (out, in); return others as they are."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(array: NDArray) -> NDArray:
    """Transpose OIHW to HWIO and (out, in) to (in, out); return others as they are."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


# ---------------------------------------------------------------- which model a tree is of


def canonical(*path: str) -> str:
    """Return the one name of a parameter however its path is written: `NFNet.nf_block_1.conv0.w`.

    Spellings are `module, name`, `module/name`, `module:name`, and the dotted one of `flatten_haiku_tree` in the code
    released with arXiv 2102.06171. The dotted one is returned.
    """
    return ".".join(path).replace("/~/", ".").replace("/", ".").replace(":", ".")


def recognize(shapes: Shapes, model: str | None = None) -> tuple[Variant, ModelConfig]:
    """Return the variant of the zoo whose Haiku tree has these names and shapes, and its configuration.

    The numbers of classes and of input channels are read off. `model` names the variant where several fit, or
    where none does; then `from_arrays` names what differs.

    Raises:
        ConversionError: if no variant fits or several do, with the nearest; and if another than `model` fits.
    """
    roots = {path.partition(".")[0] for path in shapes}
    families = {root: family for family, root in _ROOT.items()}
    rows = []
    if len(roots) == 1 and roots <= families.keys():
        family = families[next(iter(roots))]
        rows = [row for row in VARIANTS.values() if row.config.rules == "deepmind" and row.config.family == family]
    differences = [(*_differences(_sized(row.config, shapes), shapes), row) for row in rows]
    fitting = [row for count, _, row in differences if not count]
    if model is not None:
        row = variant(model)
        if fitting and row not in fitting:
            names = " or ".join(other.name for other in fitting)
            raise ConversionError(f"the tree is of {names}, not of {model}: give that name, or another file")
        return row, _sized(row.config, shapes)
    if not rows:
        modules = ", ".join(sorted(roots)[:5]) or "nothing"
        raise ConversionError(f"the tree is of {modules}, not of one of DeepMind's modules {', '.join(families)}")
    if len(fitting) == 1:
        return fitting[0], _sized(fitting[0].config, shapes)
    if fitting:
        names = ", ".join(row.name for row in fitting)
        raise ConversionError(f"the tree fits {names} alike: say which with --model")
    near = sorted(differences, key=lambda found: found[0])[:3]
    told = "; ".join(f"{row.name} differs in {count} arrays, such as {first}" for count, first, row in near)
    raise ConversionError(f"the tree of {len(shapes)} arrays is of no model of the zoo. The nearest: {told}")


def haiku_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return canonical name -> shape in Haiku, for every parameter."""
    names = haiku_names(cfg)
    return {canonical(*names[key]): haiku_shape(key, shape) for key, (shape, _) in specs(cfg).items()}


def _sized(cfg: ModelConfig, shapes: Shapes) -> ModelConfig:
    """Return `cfg` with the tree's numbers of classes and of input channels, as far as it tells them."""
    root = _ROOT[cfg.family]
    changes = {}
    for field, layer, axis in (
        ("num_classes", "linear", -1),
        ("in_channels", "stem_conv0" if cfg.family == "nfnet" else "initial_conv", -2),
    ):
        shape = shapes.get(f"{root}.{layer}.w", ())
        if len(shape) >= 2 and shape[axis]:
            changes[field] = shape[axis]
    try:
        return cfg.replace(**changes)
    except ConfigError:  # more than any model has
        return cfg


def _differences(cfg: ModelConfig, shapes: Shapes) -> tuple[int, str]:
    """Count what distinguishes a model's tree from these names and shapes, and describe the first."""
    expected = haiku_shapes(cfg)
    missing = [path for path in expected if path not in shapes]
    unknown = [path for path in shapes if path not in expected]
    others = [path for path, shape in expected.items() if shapes.get(path, shape) != shape]
    first = ""
    if missing:
        first = f"{missing[0]}, which is missing"
    elif unknown:
        first = f"{unknown[0]}, which it does not have"
    elif others:
        first = f"{others[0]}, there {shapes[others[0]]} and here {expected[others[0]]}"
    return len(missing) + len(unknown) + len(others), first

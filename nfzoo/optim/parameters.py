"""Find the parameters that a caller means, and what each is to the optimizer, in wrapped models too."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from nfzoo.types import Kind

Parameters: TypeAlias = nn.Module | Tensor | Mapping[str, Tensor] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
"""A module, one tensor, tensors, or named tensors such as `model.named_parameters()`."""

Excluded: TypeAlias = (
    Tensor | nn.Module | str | Mapping[str, Tensor] | Iterable[Tensor | nn.Module | str | tuple[str, Tensor]]
)
"""A tensor, a module, the name of a parameter, or several of these."""

Names: TypeAlias = dict[str, set[Tensor]]
"""The parameters of each name; one in a module, several if the named parameters of modules are chained."""


def kinds_by_parameter(module: nn.Module) -> dict[Tensor, Kind]:
    """Return the kind of each parameter of a module, in the order of `parameters()`, shared parameters once.

    Zoo models are found wherever they are inside: `DistributedDataParallel`, `torch.compile`, `AveragedModel`,
    `fully_shard` and modules that hold a model as their backbone change the names of parameters, but not what they are.
    A parameter that no zoo model names is a `"weight"` if it has two dimensions or more, else a `"bias"`. One in what
    replaced a zoo model's classifier is a `"head"` if it has two dimensions or more.

    Raises:
        ConfigError: if a model is folded for inference.
        ValueError: for a `FullyShardedDataParallel`, which flattens its parameters.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"param_groups needs a module, not {_brief(module)}; pass the model itself")
    _check_not_flattened(module)
    kinds: dict[Tensor, Kind] = {}
    for model in module.modules():
        # Asked of the class, as wrappers such as that of torch.compile pass on the attributes of what they wrap.
        if not hasattr(type(model), "parameter_kinds"):
            continue
        known: dict[str, Kind] = model.parameter_kinds()  # type: ignore[operator]
        # That of a model without classes has no parameters of its own.
        heads = ("head.", *(name.rpartition(".")[0] + "." for name, kind in known.items() if kind == "head"))
        for name, p in model.named_parameters(remove_duplicate=False):
            kind = known.get(name)
            if kind is None and name.startswith(heads) and p.ndim > 1:
                kind = "head"
            if kind is not None and kinds.get(p) != "head":  # a shared classifier's weight stays one
                kinds[p] = kind
    return {p: kinds.get(p, "weight" if p.ndim > 1 else "bias") for p in module.parameters()}


def select(parameters: Parameters, exclude: Excluded = ()) -> list[Tensor]:
    """Return the parameters to clip, each once: all but `exclude`, and but the classifiers' weights of zoo models.

    Args:
        parameters: zoo models are found in a module alone, not in tensors.
        exclude: see `find_excluded`.

    Raises:
        TypeError: for anything else, such as optimizer groups.
        ValueError: see `find_excluded` and `kinds_by_parameter`.
    """
    names: Names = {}
    if isinstance(parameters, nn.Module):
        kinds = kinds_by_parameter(parameters)
        among, selected = list(kinds), [p for p, kind in kinds.items() if kind != "head"]
        for name, p in parameters.named_parameters(remove_duplicate=False):
            names.setdefault(name, set()).add(p)
    else:
        among = []
        for item in _items("parameters", parameters):
            name, p = item if _is_named(item) else (None, item)
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"parameters must be a module, a tensor, tensors or model.named_parameters(), not {_brief(item)}"
                )
            among.append(p)
            if name is not None:
                names.setdefault(name, set()).add(p)
        among = selected = list(dict.fromkeys(among))
    excluded = find_excluded(exclude, among, names)
    return [p for p in selected if p not in excluded]


def find_excluded(exclude: Excluded, among: Iterable[Tensor], names: Names) -> set[Tensor]:
    """Return the tensors that `exclude` means.

    Args:
        exclude: a tensor, a module (all of its parameters), a name, or several of these.
        among: the parameters that may be excluded.
        names: their names; empty if they have none.

    Raises:
        TypeError: for anything else.
        ValueError: for a tensor or a name that is not among the parameters, and for names of unnamed parameters.
    """
    known, excluded = set(among), set()
    for item in _items("exclude", exclude):
        if isinstance(item, str):
            excluded |= _named(item, names)
            continue
        found = list(item.parameters()) if isinstance(item, nn.Module) else [item[1] if _is_named(item) else item]
        if not found:
            raise ValueError(f"exclude has a {type(item).__name__} without parameters; leave it out")
        for p in found:
            if not isinstance(p, Tensor):
                raise TypeError(f"exclude must be tensors, modules or names of parameters, not {_brief(item)}")
            if p not in known:
                raise ValueError(
                    f"exclude has a tensor of shape {tuple(p.shape)} that is not among the parameters; "
                    "pass the parameter itself, as it is after wrapping or sharding, not a copy, a view or its .data"
                )
            excluded.add(p)
    return excluded


def _named(name: str, names: Names) -> set[Tensor]:
    if not names:
        raise ValueError(
            f"exclude has the name {name!r}, but these parameters have no names; "
            "exclude the tensor, or pass a module or model.named_parameters()"
        )
    if name not in names:
        inside = [known for known in names if known.endswith(f".{name}") or known.startswith(f"{name}.")]
        near = inside[:3] or difflib.get_close_matches(name, names) or list(names)[:3]
        raise ValueError(
            f"exclude has the name {name!r}, which no parameter has; did you mean {' or '.join(map(repr, near))}?"
        )
    if len(names[name]) > 1:
        raise ValueError(f"exclude has the name {name!r}, which {len(names[name])} parameters have; exclude tensors")
    return names[name]


def _items(argument: str, value: Any) -> list[Any]:
    """List what an argument consists of: one tensor, module or name, or several; named tensors as pairs."""
    if isinstance(value, Tensor | nn.Module | str):
        return [value]
    if isinstance(value, Mapping):
        return list(value.items())
    if not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be tensors, not {_brief(value)}")
    items = list(value)
    if not items and isinstance(value, Iterator):
        warnings.warn(f"{argument} is an empty or exhausted iterator; pass a list to use it twice", stacklevel=5)
    return items


def _is_named(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:57]}... ({type(value).__name__})" if len(text) > 60 else f"{text} ({type(value).__name__})"


def _check_not_flattened(module: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a module of its classes exists only if it was imported
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in module.modules()):
        raise ValueError(
            "FullyShardedDataParallel flattens its parameters, which AGC needs in their shapes; "
            "shard with torch.distributed.fsdp.fully_shard instead"
        )

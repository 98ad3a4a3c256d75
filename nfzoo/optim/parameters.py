"""Find out what each parameter of a module is to the optimizer: wrapped models, and models within other modules."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from nfzoo.types import Kind


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
    _check_not_flattened(module)
    kinds: dict[Tensor, Kind] = {}
    for model in module.modules():
        # Asked of the class, as wrappers such as that of torch.compile pass on the attributes of what they wrap.
        if not hasattr(type(model), "parameter_kinds"):
            continue
        known: dict[str, Kind] = model.parameter_kinds()  # type: ignore[operator]
        heads = tuple(name.rpartition(".")[0] + "." for name, kind in known.items() if kind == "head")
        for name, p in model.named_parameters(remove_duplicate=False):
            kind = known.get(name)
            if kind is None and name.startswith(heads) and p.ndim > 1:
                kind = "head"
            if kind is not None and kinds.get(p) != "head":  # a shared classifier's weight stays one
                kinds[p] = kind
    return {p: kinds.get(p, "weight" if p.ndim > 1 else "bias") for p in module.parameters()}


def _check_not_flattened(module: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a module of its classes exists only if it was imported
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in module.modules()):
        raise ValueError(
            "FullyShardedDataParallel flattens its parameters, which AGC needs in their shapes; "
            "shard with torch.distributed.fsdp.fully_shard instead"
        )

"""Every private name of torch that the library uses, behind functions with telling names.

Any release of torch may drop one of them. `tests/core/test_torch_internals.py` then fails and names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

_C: Any = torch._C
_forward_ad: Any = forward_ad

tree_leaves: Any = _pytree.tree_leaves
"""Return all leaves of nested tuples, lists and dictionaries in one list."""

tree_map: Any = _pytree.tree_map
"""Return nested tuples, lists and dictionaries with a function applied to each leaf."""

foreach: Any = torch
"""The namespace of the `_foreach_*` and `_fused_*` functions, which compute with many tensors in one kernel."""


def fused_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    """Take a step of SGD with momentum by one kernel, which leaves the gradients as they are."""
    foreach._fused_sgd_(
        params,
        grads,
        momenta,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        dampening=0.0,
        maximize=False,
        is_first_step=False,
    )


def storage_number(tensor: Tensor) -> int:
    """Return a number that tensors have in common if they share memory, on the meta device too."""
    storage: Any = tensor.untyped_storage()
    return storage._cdata


def in_functorch() -> bool:
    """Return whether a transform of `torch.func` is active."""
    return _C._functorch.maybe_current_level() is not None


def in_functionalization() -> bool:
    """Return whether `torch.func.functionalize` is active, at any level."""
    if not in_functorch():
        return False
    functionalize = _C._functorch.TransformType.Functionalize
    return any(level.key() == functionalize for level in _C._functorch.get_interpreter_stack())


def in_forward_ad() -> bool:
    """Return whether forward-mode differentiation is active."""
    return _forward_ad._current_level >= 0


def in_dispatch_mode() -> bool:
    """Return whether a `TorchDispatchMode` is active, which counts or records operators, or makes tensors fake."""
    return _C._len_torch_dispatch_stack() > 0


def in_jit_trace() -> bool:
    """Return whether `torch.jit.trace` is recording."""
    return _C._is_tracing()


def only_computes(*tensors: Tensor, alone: bool) -> bool:
    """Return whether an operator without derivatives, and unknown to transforms and tracers, may take these tensors.

    Under autocast it may not. While a graph is compiled, a transform around it cannot be seen from within: `alone`
    asserts that there is none.
    """
    if any(t.dtype != tensors[0].dtype for t in tensors):  # refused by torch's own operators, with their own messages
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    if torch.is_autocast_enabled(tensors[0].device.type):
        return False
    if torch.compiler.is_compiling():
        return alone and not torch.compiler.is_exporting()
    return not (in_dispatch_mode() or in_functorch() or in_jit_trace() or in_forward_ad())


def addmm_activation(bias: Tensor, x: Tensor, weight: Tensor, *, gelu: bool) -> Tensor:
    """Return the tanh GELU, or else the ReLU, of `bias + x @ weight`; on CUDA in one kernel of cuBLASLt."""
    return torch.ops.aten._addmm_activation(bias, x, weight, use_gelu=gelu)


def under_ddp() -> bool:
    """Return whether the forward pass of a `DistributedDataParallel` module is running."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module() is not None


def allow_recompilations(limit: int) -> None:
    """Let Dynamo compile at least `limit` graphs of one function before it gives up."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)


def without_ddp_graph_cuts() -> contextlib.AbstractContextManager[Any]:
    """Keep Dynamo from ending graphs where DDP's buckets end."""
    config: Any = torch._dynamo.config
    return config.patch(optimize_ddp=False)


def sizes_of_one_are_general() -> contextlib.AbstractContextManager[Any]:
    """Let `torch.export` treat a dynamic size of 1 like any other size, instead of excluding it."""
    config: Any = torch.fx.experimental._config  # type: ignore[attr-defined]
    return config.patch(backed_size_oblivious=True)


def frozen_graphs() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which inductor takes parameters for constants, as int8 kernels need it."""
    import torch._inductor.config

    return torch._inductor.config.patch(freezing=True)


def onednn_convolution_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes that `onednn_convolution` supports; none if torch was built without oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return ()
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


def onednn_convolution_weight(
    weight: Tensor, images: torch.Size, *, padding: int, stride: int, dilation: int, groups: int
) -> Tensor:
    """Lay out a kernel `(out, in / groups, h, w)` for oneDNN's convolution of `images` `(N, in, H, W)`."""
    geometry = ([padding] * 2, [stride] * 2, [dilation] * 2)
    return _C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, groups, list(images))


def onednn_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    padding: int,
    stride: int,
    dilation: int,
    groups: int,
    activation: Sequence[str],
) -> Tensor:
    """Convolve `x` `(N, in, H, W)` and apply `activation`, oneDNN's (name, variant), in one kernel."""
    name, variant = activation
    geometry = ([padding] * 2, [stride] * 2, [dilation] * 2)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, groups, name, [], variant)

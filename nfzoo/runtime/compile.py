"""Compilation of a plan: one graph for each distinct block, so that the time to compile does not grow with depth.

Blocks of one shape differ in `beta` alone, which compiled code takes as a tensor. For training on a CPU, one more pair
of graphs standardises the weights of all blocks. Nothing falls back to eager: a graph break is an error, and so are
more recompilations than the limit.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nfzoo import torch_internals
from nfzoo.models.folded import chained
from nfzoo.models.layers import Standardizing
from nfzoo.models.weight_standardization import PLAIN_ROWS, RowKernels
from nfzoo.runtime.device import backend as device_backend
from nfzoo.types import Block, BlockFn

RECOMPILE_LIMIT = 64
"""Limit of graphs for one block shape, which has one for each image size, batch, dtype and mode. torch's own is 8."""


INDUCTOR = "inductor"
STANDARDIZED_APART: set[str | Callable[..., Any]] = {INDUCTOR}
"""Backends for which `CompiledBlock` standardises weights in graphs of their own."""


class CompileOptions(NamedTuple):
    """Arguments of `torch.compile`. `options` are sorted pairs, so that equal ones share their graphs."""

    backend: str | Callable[..., Any] = INDUCTOR
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    dynamic: bool | None = False


class CompiledBlock:
    """A compiled block function. `graph_of` returns the same object for equal blocks, copied and unpickled ones too.

    For training on a CPU with inductor, one pair of graphs standardises the kernels of all blocks, apart from the
    blocks' own graphs. That computes and compiles faster. In inference it would be slower.
    """

    def __init__(self, fn: BlockFn, shapes: tuple[tuple[int, ...], ...], options: CompileOptions) -> None:
        self.fn, self.shapes, self.options = fn, shapes, options
        self._compiled = _compiled_function(fn, options)
        apart = options.backend in STANDARDIZED_APART
        self._standardizing = fn if apart and isinstance(fn, Standardizing) else None
        if self._standardizing is not None:
            self._ready = _compiled_function(self._standardizing.made_ready(), options)

    def __call__(self, params: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():  # inside the graph of a whole model, or an export
            return self.fn(params, x, beta, keep)
        first = x[0] if isinstance(x, tuple) else x
        number = beta
        if not isinstance(beta, Tensor):
            beta = _scalar(beta, first.device, torch.float64 if first.dtype == torch.float64 else torch.float32)
        with _whole_under_ddp():
            if self._standardizing is None or first.device.type != "cpu" or not torch.is_grad_enabled():
                return self._compiled(params, x, beta, keep)
            # Outside of graphs beta can be a number, so that it is rounded as in eager mode.
            params = self._standardizing.standardized(params, number, compiled_rows(self.options))
            if self.options.dynamic is not False:  # sizes are constants for parameters only, not for results
                for value in params.values():
                    if value.ndim == 4:
                        torch._dynamo.mark_static(value)
            return self._ready(params, x, beta, keep)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledBlock:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return graph_of, (self.fn, self.shapes, self.options)


@functools.cache
def graph_of(fn: BlockFn, shapes: tuple[tuple[int, ...], ...], options: CompileOptions) -> CompiledBlock:
    """Return the compiled form that equal block functions with parameters of equal shapes share in this process."""
    return CompiledBlock(fn, shapes, options)


def _compiled_function(fn: BlockFn, options: CompileOptions) -> Callable[..., Tensor]:
    inner: Any = fn.by_itself() if hasattr(fn, "by_itself") else fn  # type: ignore[attr-defined]

    def block(params: Mapping[str, Tensor], x: Tensor, beta: float | Tensor, keep: Tensor | None) -> Tensor:
        return inner(params, x, beta, keep)

    return compile_alone(block, options)


def compiled_rows(options: CompileOptions) -> RowKernels:
    """Return the two passes of weight standardisation, compiled once for kernels of every shape."""
    return _compiled_rows(options._replace(mode=None, dynamic=True))  # no mode has anything to tune here


@functools.cache
def _compiled_rows(options: CompileOptions) -> RowKernels:
    return RowKernels(*(compile_of_any_shape(fn, options) for fn in PLAIN_ROWS))


def compile_of_any_shape(fn: Callable[..., Any], options: CompileOptions | None = None) -> Callable[..., Any]:
    """Compile a function as `compile_alone` does, in one graph for tensors of every size.

    Autograd neither differentiates the call nor notices what it writes to. Another graph follows for sizes of 0 or 1,
    and where sizes that were equal in the first call differ. Under a `TorchDispatchMode`, `fn` runs uncompiled, as
    Dynamo compiles nothing there.
    """
    options = options or CompileOptions()
    own = dict(options.options)
    if options.backend == INDUCTOR:  # otherwise the sizes of the first call decide on multithreading for all
        own.setdefault("cpp.dynamic_threads", True)
    compiled_fn = compile_alone(fn, options._replace(dynamic=True, options=tuple(sorted(own.items()))))

    def call(*args: Any) -> Any:
        if torch_internals.in_dispatch_mode():
            return fn(*args)
        # Dynamo also guards the sizes of a view's base. `.data` is no view, so another base causes no new graph.
        return compiled_fn(*(arg.data if isinstance(arg, Tensor) else arg for arg in args))

    return call


def compile_alone(fn: Callable[..., Any], options: CompileOptions | None = None) -> Callable[..., Any]:
    """Return `torch.compile(fn, fullgraph=True)` with `fn`'s own count of recompilations; past the limit it raises."""
    options = options or CompileOptions()
    torch_internals.allow_recompilations(RECOMPILE_LIMIT)
    assert isinstance(fn, types.FunctionType)
    # Dynamo keeps and counts graphs by code object, so each function gets a copy of its own.
    own = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    return torch.compile(
        own,
        fullgraph=True,
        dynamic=options.dynamic,
        backend=options.backend,
        mode=options.mode,
        options=dict(options.options) or None,
    )


def compiled(block: Block, options: CompileOptions) -> CompiledBlock:
    """Return the compiled function of a block, which all equal blocks share."""
    return graph_of(block.fn, tuple(spec.shape for spec in block.specs.values()), options)


def compile_options(
    backend: str | Callable[..., Any] = INDUCTOR,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = False,
) -> CompileOptions:
    """Return `CompileOptions` for arguments of `torch.compile`."""
    return CompileOptions(backend, mode, tuple(sorted((options or {}).items())), dynamic)


def compile_blocks(module: nn.Module, options: CompileOptions | None) -> int:
    """Let each block module of a model run its compiled function, or its plain one for `options=None`.

    A block module has an attribute `block`, of a plan, and calls its attribute `fn`. Compilation waits for the first
    call. `state_dict` does not change. The residual blocks of a folded model then pass pairs: see `folded.chained`.

    Returns:
        The number of distinct functions. Each has one graph for each image size, batch, dtype and mode.

    Raises:
        ValueError: if the module has no blocks.
    """
    modules = [m for m in module.modules() if isinstance(getattr(m, "block", None), Block)]
    if not modules:
        raise ValueError(f"{type(module).__name__} has no blocks of a plan; use torch.compile on the whole module")
    blocks: list[Block] = [m.block for m in modules]  # type: ignore[misc]
    chain = chained([block.fn for block in blocks])
    for m, block, fn in zip(modules, blocks, chain, strict=True):
        m.fn = block.fn if options is None else compiled(block._replace(fn=fn), options)  # type: ignore[assignment]
    return len({id(m.fn) for m in modules})


def checkpointed(fn: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return `fn(*args)`, and recompute its activations in the backward pass; `args[0]` is a tensor."""
    return device_backend(args[0].device).checkpoint(fn, *args)


@functools.cache
def _scalar(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the tensor is shared by all modes, and autograd cannot save an inference tensor
        return torch.full((), value, device=device, dtype=dtype)


def _whole_under_ddp() -> contextlib.AbstractContextManager[Any]:
    """Keep Dynamo from cutting a block's graph at DDP's buckets; gradients of a block arrive early enough."""
    return torch_internals.without_ddp_graph_cuts() if torch_internals.under_ddp() else contextlib.nullcontext()

"""Compile a model for a TPU that is not here, as the process that `nfzoo.export.tpu_compile` starts.

torchax shows the functional step to jax, jax lowers it to StableHLO, and libtpu, which needs no TPU for that, compiles
it for the chips of a described topology. Nothing is executed. This is the only module that imports torchax.

One request comes as a line of JSON on standard input, which the parent then holds open. The answer leaves as a line of
JSON on standard output. Everything else that is printed here, libtpu's log included, goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, TextIO
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nfzoo.config import ModelConfig
from nfzoo.export.tpu_chips import CHIPS, Dtype, Request
from nfzoo.model import apply, init, sample_noise
from nfzoo.step import Metrics, StepConfig, TrainState, init_state, train_step

ENVIRONMENT: dict[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the network for a metadata server, and wait for it
    "JAX_PLATFORMS": "cpu",  # jax itself computes on the CPU; the TPU exists as a description alone
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # libtpu wants one to start; the topology says what is compiled for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is held, so several checks may run at a time
}
"""What libtpu has to find in the environment when it is loaded."""

REQUIRED = ("jax", "jaxlib", "libtpu", "torchax")
"""The packages of the extra `tpu-aot`."""

_QUICKEST = {"exec_time_optimization_effort": -1.0}  # less search for fast code: minutes instead of hours


# ---------------------------------------------------------------- the step as a function of jax


class LowPrecision(TorchFunctionMode):
    """Convolutions and linear layers compute in `dtype`, as under `torch.autocast`; what they hand on stays in it.

    torch's own autocast acts below the functions of torch, where torchax has already taken over.
    """

    _CAST = (torch.conv1d, torch.conv2d, F.linear)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._CAST:
            args, kwargs = ([self._cast(a) for a in args], {k: self._cast(a) for k, a in (kwargs or {}).items()})
        return func(*args, **(kwargs or {}))

    def _cast(self, value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value


class _MeanInDtype(TorchFunctionMode):
    """`x.mean(..., dtype=d)` as `x.to(d).mean(...)`, which is the same; torchax knows no `dtype` there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.mean and kwargs.get("dtype") is not None:
            args = (args[0].to(kwargs.pop("dtype")), *args[1:])
        return func(*args, **kwargs)


def _grad_and_value(function: Callable[..., Any], *, has_aux: bool) -> Callable[..., Any]:
    """Do what `torch.func.grad_and_value` does by jax: torch's own autograd does not see the values of jax."""
    import jax  # pyright: ignore[reportMissingImports]
    from torchax import interop  # pyright: ignore[reportMissingImports]

    def both(params: Mapping[str, Tensor], *rest: Any) -> Any:
        view = jax.value_and_grad(interop.jax_view(function), has_aux=has_aux)
        found, grads = view(interop.jax_view(params), *interop.jax_view(rest))
        return interop.torch_view((grads, found))

    return both


def low_precision(dtype: Dtype) -> AbstractContextManager[Any]:
    """Return the mode in which activations are of `dtype`."""
    return nullcontext() if dtype == "float32" else LowPrecision(getattr(torch, dtype))


def jax_step(cfg: ModelConfig, dtype: Dtype, *, config: StepConfig | None = None) -> Callable[..., Any]:
    """Return `nfzoo.step.train_step` as a function of jax: `(state, images, labels, noise, lr) -> (state, metrics)`.

    It is the very function, run on jax's values; only where it asks torch for a gradient, jax answers.
    """
    from torchax import interop  # pyright: ignore[reportMissingImports]

    def step(state: TrainState, images: Tensor, labels: Tensor, noise: Mapping[str, Tensor], lr: Tensor) -> Any:
        with patch.object(torch.func, "grad_and_value", _grad_and_value), low_precision(dtype), _MeanInDtype():
            return train_step(cfg, state, (images, labels), noise, lr, config=config)

    return interop.jax_view(step)


def jax_forward(cfg: ModelConfig, dtype: Dtype) -> Callable[..., Any]:
    """Return `nfzoo.model.apply` as a function of jax: `(params, images) -> logits`."""
    from torchax import interop  # pyright: ignore[reportMissingImports]

    def forward(params: Mapping[str, Tensor], images: Tensor) -> Tensor:
        with low_precision(dtype), _MeanInDtype():
            return apply(cfg, params, images)

    return interop.jax_view(forward)


# ---------------------------------------------------------------- compiling


def devices(request: Request) -> list[Any]:
    """Return the described chips."""
    from jax.experimental import topologies  # pyright: ignore[reportMissingImports]

    sides = (*request.shape, *(1,) * (3 - len(request.shape)))
    # A host has 2 x 2 chips, or what there is of them.
    bounds = [2 - side % 2 for side in sides[:2]] + [1]
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=request.topology, chips_per_host_bounds=bounds, **CHIPS[request.chip].options
    )
    if len(described.devices) != request.chips:
        raise RuntimeError(f"libtpu makes {len(described.devices)} devices of {request.topology}")
    return list(described.devices)


def traced(request: Request) -> Any:
    """Trace the step or the forward pass on shapes alone: parameters on every chip, the batch divided among them."""
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec  # pyright: ignore[reportMissingImports]

    mesh = Mesh(np.array(devices(request)), ("batch",))
    whole, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))

    def like(value: Tensor, sharding: Any) -> Any:
        dtype = jnp.float32 if value.is_floating_point() else jnp.int32
        return jax.ShapeDtypeStruct(tuple(value.shape), dtype, sharding=sharding)

    def shape(*sides: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sides, dtype=dtype, device="meta")

    cfg = request.config
    params = init(cfg, device="meta")
    images = like(shape(request.batch, cfg.in_channels, request.size, request.size), divided)
    if not request.train:
        function = jax.jit(jax_forward(cfg, request.dtype), out_shardings=divided)
        return function.trace({k: like(p, whole) for k, p in params.items()}, images)
    state = jax.tree.map(lambda value: like(value, whole), init_state(params))
    labels = like(shape(request.batch, dtype=torch.int32), divided)
    noise = {k: like(mask, divided) for k, mask in sample_noise(cfg, request.batch, device="meta").items()}
    function = jax.jit(
        jax_step(cfg, request.dtype),
        donate_argnums=(0,),  # the new state takes the place of the old one
        out_shardings=(whole, Metrics(whole, divided)),
    )
    return function.trace(state, images, labels, noise, like(shape(), whole))


_ITEM = re.compile(r"\b(pred|[a-z]+[0-9]+)\[([0-9,]*)\]")
_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (\(?.*?\)?) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(-start)?\(",
    re.MULTILINE,
)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Count the collectives of a compiled module's text: name -> how many there are, and the bytes of their results."""
    found: dict[str, dict[str, int]] = {}
    for result, name, start in _COLLECTIVE.findall(hlo):
        sizes = [_size(dtype, sides) for dtype, sides in _ITEM.findall(result)]
        if start and name != "all-reduce":
            sizes = sizes[len(sizes) // 2 :]  # the first half are the operands
        row = found.setdefault(name, {"count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += sum(sizes)
    return found


def _size(dtype: str, sides: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub("[a-z]", "", dtype))
    return math.prod(int(n) for n in sides.split(",") if n) * bits // 8


_SCALE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TOO_BIG = (
    re.compile(r"\(([0-9.]+)([KMGT]?)\) exceeds available HBM \(([0-9.]+)([KMGT]?)\)"),
    re.compile(r"Used ([0-9.]+)([KMGT]?) of ([0-9.]+)([KMGT]?) hbm"),
)


def too_big(message: str) -> tuple[int, int] | None:
    """Read the bytes needed and available from the compiler's message that a program does not fit into HBM."""
    for pattern in _TOO_BIG:
        if "RESOURCE_EXHAUSTED" in message and (match := pattern.search(message)):
            needed, unit, available, other = match.groups()
            return int(float(needed) * _SCALE[unit]), int(float(available) * _SCALE[other])
    return None


def compile_for_tpu(request: Request) -> dict[str, Any]:
    """Compile; return the fields of a `tpu_compile.Check`."""
    import jax  # pyright: ignore[reportMissingImports]
    import torchax  # pyright: ignore[reportMissingImports]  # noqa: F401

    versions = {name: version(name) for name in ("torch", *REQUIRED)}
    seconds: dict[str, float] = {}
    try:
        start = time.monotonic()
        lowered = traced(request).lower(lowering_platforms=("tpu",))
        seconds["trace"] = round(time.monotonic() - start, 1)
        start = time.monotonic()
        compiled = lowered.compile(compiler_options=_QUICKEST)
        seconds["compile"] = round(time.monotonic() - start, 1)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        base = {"seconds": seconds, "versions": versions, "reason": message.splitlines()[0]}
        if (sizes := too_big(message)) is not None:
            return {"outcome": "too big", "needed": sizes[0], "available": sizes[1], **base}
        return {"outcome": "refused", **base}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "outcome": "compiles",
        "seconds": seconds,
        "versions": versions,
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "flops": cost["flops"],
        "collectives": collectives(compiled.as_text()) if request.chips > 1 else {},
    }


# ---------------------------------------------------------------- the process


def _end_with_the_parent() -> None:
    """End this process when the parent ends, however that came about: standard input ends with it."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _open_channel() -> TextIO:
    """Return standard output for the answer alone; what else is printed goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def main() -> int:
    """Serve the one request of standard input."""
    os.environ.update(ENVIRONMENT)  # before jax is imported, whoever started this
    channel = _open_channel()
    # Unbuffered, so that the thread sees the end of the input and not what a buffer has taken of it.
    with os.fdopen(os.dup(0), "rb", buffering=0) as stdin:
        request = Request.from_json(stdin.readline().decode())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    channel.write(json.dumps(compile_for_tpu(request)) + "\n")
    channel.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

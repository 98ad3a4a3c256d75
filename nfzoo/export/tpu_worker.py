"""Compile a model for a TPU that is not here, as the process that `nfzoo.export.tpu_check` starts.

torchax shows the functional step to jax, jax lowers it to StableHLO, and libtpu, which needs no TPU for that, compiles
it for the chips of a described topology. Nothing is executed. This is the only module that imports torchax.

The request is JSON on standard input. The answer is one line of JSON on standard output. Everything else that is
printed here, libtpu's log included, goes to standard error.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nfzoo.config import ModelConfig, config_from_dict
from nfzoo.model import apply, init, sample_noise
from nfzoo.step import Metrics, StepConfig, TrainState, init_state, train_step

Dtype = Literal["bfloat16", "float32"]

ENVIRONMENT: dict[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the network for a metadata server, and wait for it
    "JAX_PLATFORMS": "cpu",  # jax itself computes on the CPU; the TPU exists as a description alone
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # libtpu wants one to start; the topology says what is compiled for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is held, so several checks may run at a time
}
"""Environment variables that libtpu reads when it is loaded."""

REQUIRED = ("jax", "jaxlib", "libtpu", "torchax")
"""Packages of the extra `tpu-aot`."""


class Chip(NamedTuple):
    """Describe a generation of TPU chips.

    Attributes:
        hbm: bytes of a chip that the compiler hands out, as it says itself when a program is too big.
        peak: published bfloat16 floating-point operations per second of a chip.
        sides: number of sides of a topology.
        options: options of libtpu that make a chip one device.
    """

    hbm: int
    peak: float
    sides: int
    options: Mapping[str, str] = {}


_GIB = 1 << 30

# Memory: libtpu 0.0.42. Peak rates: Google Cloud's TPU documentation, the page of each generation.
CHIPS: dict[str, Chip] = {
    "v4": Chip(int(30.75 * _GIB), 275e12, 3, {"chip_config_name": "megacore"}),
    "v5e": Chip(int(15.75 * _GIB), 197e12, 2),
    "v5p": Chip(int(95.74 * _GIB), 459e12, 3),
    "v6e": Chip(int(31.25 * _GIB), 918e12, 2),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Describe what to compile.

    Attributes:
        config: the model.
        chip: a key of `CHIPS`.
        shape: chips along each side of the topology.
        batch: images over all chips together.
        size: side of the square images in pixels.
        train: the training step, else the forward pass.
        dtype: of the activations; parameters and optimizer are float32.
    """

    config: ModelConfig
    chip: str
    shape: tuple[int, ...]
    batch: int
    size: int
    train: bool
    dtype: Dtype

    @property
    def chips(self) -> int:
        """Return the number of chips."""
        return math.prod(self.shape)

    @property
    def topology(self) -> str:
        """Return the name of the topology, such as `v5e:2x2`."""
        return f"{self.chip}:{'x'.join(map(str, self.shape))}"

    def describe(self) -> dict[str, Any]:
        """Return the request's part of a report."""
        fields = {"topology": self.topology, "chips": self.chips, "step": "train" if self.train else "forward"}
        return {**fields, "batch": self.batch, "size": self.size, "dtype": self.dtype}

    def to_json(self) -> str:
        """Return the request as one line of JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({**fields, "config": self.config.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read what `to_json` returned."""
        fields = json.loads(text)
        return cls(**fields | {"config": config_from_dict(fields["config"]), "shape": tuple(fields["shape"])})


# ---------------------------------------------------------------- the step as a function of jax


class Autocast(TorchFunctionMode):
    """Cast the inputs of convolutions and linear layers to `dtype`, as `torch.autocast` does.

    torch's own autocast acts below the functions of torch, where torchax has already taken over.
    `x.mean(..., dtype=d)` becomes the equal `x.to(d).mean(...)`: torchax knows no `dtype` there.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.conv1d, torch.conv2d, F.linear):
            args, kwargs = [self._cast(a) for a in args], {k: self._cast(a) for k, a in kwargs.items()}
        elif func is Tensor.mean and kwargs.get("dtype") is not None:
            args = (args[0].to(kwargs.pop("dtype")), *args[1:])
        return func(*args, **kwargs)

    def _cast(self, value: object) -> object:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _grad_and_value(function: Callable[..., Any], *, has_aux: bool) -> Callable[..., Any]:
    """Compute `torch.func.grad_and_value` by jax: torch's autograd does not see the values of jax."""
    import jax  # pyright: ignore[reportMissingImports]
    from torchax import interop  # pyright: ignore[reportMissingImports]

    def both(params: Mapping[str, Tensor], *rest: Any) -> Any:
        view = jax.value_and_grad(interop.jax_view(function), has_aux=has_aux)
        value, grads = view(interop.jax_view(params), *interop.jax_view(rest))
        return interop.torch_view((grads, value))

    return both


def jax_step(cfg: ModelConfig, dtype: Dtype, *, config: StepConfig | None = None) -> Callable[..., Any]:
    """Return `nfzoo.step.train_step` as a function of jax: `(state, images, labels, noise, lr) -> (state, metrics)`.

    The function itself runs, on jax's values; jax computes the gradient.
    """
    from torchax import interop  # pyright: ignore[reportMissingImports]

    def step(state: TrainState, images: Tensor, labels: Tensor, noise: Mapping[str, Tensor], lr: Tensor) -> Any:
        with patch.object(torch.func, "grad_and_value", _grad_and_value), Autocast(getattr(torch, dtype)):
            return train_step(cfg, state, (images, labels), noise, lr, config=config)

    return interop.jax_view(step)


def jax_forward(cfg: ModelConfig, dtype: Dtype) -> Callable[..., Any]:
    """Return `nfzoo.model.apply` as a function of jax: `(params, images) -> logits`."""
    from torchax import interop  # pyright: ignore[reportMissingImports]

    def forward(params: Mapping[str, Tensor], images: Tensor) -> Tensor:
        with Autocast(getattr(torch, dtype)):
            return apply(cfg, params, images)

    return interop.jax_view(forward)


# ---------------------------------------------------------------- compiling


def devices(request: Request) -> list[Any]:
    """Return the described chips as devices of jax."""
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
    replicated, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))

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
        return function.trace({k: like(p, replicated) for k, p in params.items()}, images)
    state = jax.tree.map(lambda value: like(value, replicated), init_state(params))
    labels = like(shape(request.batch, dtype=torch.int32), divided)
    noise = {k: like(mask, divided) for k, mask in sample_noise(cfg, request.batch, device="meta").items()}
    function = jax.jit(
        jax_step(cfg, request.dtype),
        donate_argnums=(0,),  # the new state takes the place of the old one
        out_shardings=(replicated, Metrics(replicated, divided)),
    )
    return function.trace(state, images, labels, noise, like(shape(), replicated))


_ITEM = re.compile(r"\b(pred|[a-z]+[0-9]+)\[([0-9,]*)\]")
_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (\(?.*?\)?) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(-start)?\(",
    re.MULTILINE,
)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Read the collectives in a compiled module's text: name -> their `count`, and the `bytes` of their results."""
    totals: dict[str, dict[str, int]] = {}
    for result, name, start in _COLLECTIVE.findall(hlo):
        sizes = [_size(dtype, sides) for dtype, sides in _ITEM.findall(result)]
        if start and name != "all-reduce":
            sizes = sizes[len(sizes) // 2 :]  # the first half are the operands
        row = totals.setdefault(name, {"count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += sum(sizes)
    return totals


def _size(dtype: str, sides: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub("[a-z]", "", dtype))
    return math.prod(int(n) for n in sides.split(",") if n) * bits // 8


_SCALE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TOO_BIG = (
    re.compile(r"\(([0-9.]+)([KMGT]?)\) exceeds available HBM \(([0-9.]+)([KMGT]?)\)"),
    re.compile(r"Used ([0-9.]+)([KMGT]?) of ([0-9.]+)([KMGT]?) hbm"),
)


def too_big(message: str) -> tuple[int, int] | None:
    """Read the bytes needed and available in a compiler's message that a program does not fit into HBM, else `None`."""
    for pattern in _TOO_BIG:
        if "RESOURCE_EXHAUSTED" in message and (match := pattern.search(message)):
            needed, unit, available, other = match.groups()
            return int(float(needed) * _SCALE[unit]), int(float(available) * _SCALE[other])
    return None


def compile_for_tpu(request: Request) -> dict[str, Any]:
    """Compile a request and return the compiler's answer.

    Returns:
        `outcome`, `versions`, and `seconds` of tracing and compiling as far as it came. If it compiles, also `peak`
        (most memory at a time), `arguments` (parameters, optimizer state, the chip's part of the batch), `temporaries`
        (activations and what else lives within a step), `code`, `flops` (of one chip and step, counted in the compiled
        program), `collectives`, `hbm` and `shortest_step`. Else `reason`, and if it is too big `needed` and
        `available`. Sizes are bytes of one chip.
    """
    import jax  # pyright: ignore[reportMissingImports]
    import torchax  # pyright: ignore[reportMissingImports]  # noqa: F401

    answer: dict[str, Any] = {"versions": {name: version(name) for name in ("torch", *REQUIRED)}}
    seconds: dict[str, float] = {}
    try:
        start = time.monotonic()
        lowered = traced(request).lower(lowering_platforms=("tpu",))
        seconds["trace"] = round(time.monotonic() - start, 1)
        answer["seconds"] = seconds
        start = time.monotonic()
        # With less search for fast code: minutes instead of hours.
        compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": -1.0})
        seconds["compile"] = round(time.monotonic() - start, 1)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        answer["reason"] = message.splitlines()[0]
        if (sizes := too_big(message)) is not None:
            return {**answer, "outcome": "too big", "needed": sizes[0], "available": sizes[1]}
        return {**answer, "outcome": "refused"}
    chip, memory, flops = CHIPS[request.chip], compiled.memory_analysis(), compiled.cost_analysis()["flops"]
    return {
        **answer,
        "outcome": "compiles",
        "peak": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "flops": flops,
        "collectives": collectives(compiled.as_text()) if request.chips > 1 else {},
        "hbm": chip.hbm,
        "shortest_step": flops / chip.peak,
    }


# ---------------------------------------------------------------- the process


def main(argv: list[str] | None = None) -> int:
    """Answer the request of standard input for the parent whose process id is the one argument."""
    (parent,) = sys.argv[1:] if argv is None else argv
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL
    )  # PR_SET_PDEATHSIG: killed when the parent ends, however that comes about
    if os.getppid() != int(parent):
        return 1  # it ended before that
    os.environ.update(ENVIRONMENT)  # before jax is imported, whoever started this
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        answer = compile_for_tpu(Request.from_json(sys.stdin.read()))
        channel.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

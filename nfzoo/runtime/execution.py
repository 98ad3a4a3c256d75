"""The fastest way to run a folded model on this processor, chosen by measurement: see `NFNet.optimize`."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nfzoo import torch_internals
from nfzoo.config import is_int
from nfzoo.errors import ConfigError, shown
from nfzoo.runtime import program
from nfzoo.runtime.block_module import BlockModule, is_hooked
from nfzoo.runtime.compile import compile_alone

logger = logging.getLogger("nfzoo")

BACKENDS = ("torch", "openvino", "any")
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest |logits - model's| / |model's| of a way to compute in a dtype."""

_ROUNDS = (3, 20)  # calls of each that are timed: at least, and at most while there is time left
_SECONDS = 1.0
_HOPELESS = 1.25  # times the best time, beyond which one is timed no more after the first rounds

MANY = 64
"""Images from which on it pays to fold a model and lay out its weights: see `for_many`."""


Model = Any
"""An `NFNet`, whose module imports this one."""

Outputs = tuple[Tensor, Tensor]
"""Pooled features `(N, F)` and logits `(N, classes)`."""


class Program:
    """A whole network for inputs of one shape, with its weights as constants.

    Args:
        run: returns the outputs of images `(N, C, H, W)`.
        state: see `weights_state`, of the weights that the program holds.
    """

    def __init__(self, run: Callable[[Tensor], Outputs], state: tuple[Any, ...]) -> None:
        self.run, self.state = run, state
        self._stale = False

    def is_current(self, blocks: Sequence[Any]) -> bool:
        """Return whether these blocks still are what the program computes; of changed weights a warning tells once."""
        if not all(isinstance(block, BlockModule) and not is_hooked(block) for block in blocks):
            return False
        current = weights_state(blocks) == self.state
        if not current and not self._stale:
            self._stale = True
            logger.warning("the weights have changed since optimize(), so the blocks compute: call optimize() again")
        return current


def weights_state(blocks: Sequence[BlockModule]) -> tuple[Any, ...]:
    """Return what changes when a block's weights do: their addresses and versions."""
    params = [p for block in blocks for p in block.parameter_dict().values()]
    return tuple((p.data_ptr(), None if p.is_inference() else p._version) for p in params)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How an optimised model computes, and what was measured for that choice.

    Attributes:
        form: `folded`, `prepacked`, `compiled` (block by block), `frozen` (compiled whole) or `openvino`.
        channels_last: whether images are laid out channels last.
        shape: `(N, C, H, W)` of the images that were measured. Others are computed too; a `frozen` or `openvino` model
            computes them block by block.
        dtype: of the parameters.
        threads: processor threads.
        milliseconds: name of each candidate -> the shortest time of a batch.
        distances: name of each candidate -> |logits - model's| / |model's|.
        left_out: name of each candidate that failed or was too inexact -> why.
    """

    form: str
    channels_last: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    threads: int
    milliseconds: Mapping[str, float]
    distances: Mapping[str, float]
    left_out: Mapping[str, str]
    program: Program | None = dataclasses.field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {ms:.4g}" for name, ms in sorted(self.milliseconds.items(), key=lambda item: item[1])
        )
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        out = "".join(f"; without {name}: {why}" for name, why in self.left_out.items())
        return f"{self.form} for {shape} in {dtype} on {self.threads} thread(s); ms: {times}{out}"

    def images(self, x: Tensor) -> Tensor:
        """Lay out images as they were measured."""
        if not torch_internals.only_computes(x, alone=False):
            return x
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def outputs(self, x: Tensor, blocks: Sequence[Any]) -> Outputs | None:
        """Return what the program computes of images, or `None` where the blocks have to."""
        program = self.program
        if program is None or not torch_internals.only_computes(x, alone=False):
            return None
        if tuple(x.shape) != self.shape or x.dtype != self.dtype or x.device.type != "cpu":
            return None
        return program.run(self.images(x)) if program.is_current(blocks) else None


class Candidate(NamedTuple):
    """A way to compute.

    Attributes:
        form: see `Execution`.
        make: returns the program, or `None` if the blocks of the model compute, which it may change.
    """

    form: str
    channels_last: bool
    make: Callable[[Model, Tensor], Callable[[Tensor], Outputs] | None]

    @property
    def name(self) -> str:
        return f"{self.form}, channels last" if self.form == "folded" and self.channels_last else self.form


def _plain(model: Model, x: Tensor) -> None:
    return None


def _prepacked(model: Model, x: Tensor) -> None:
    model.prepack()


def _compiled(model: Model, x: Tensor) -> None:
    model.compile_blocks()


def _frozen(model: Model, x: Tensor) -> Callable[[Tensor], Outputs]:
    own = copy.copy(model)

    def call(x: Tensor) -> Outputs:
        pooled = own.embed(x)
        return pooled, own.head(pooled)

    made = compile_alone(call)

    def run(x: Tensor) -> Outputs:
        with torch.inference_mode(False), torch.no_grad(), torch_internals.frozen_graphs():
            return made(x.clone() if x.is_inference() else x)  # which would be compiled once more

    return run


class _TwoOutputs(nn.Module):
    def __init__(self, tree: nn.Sequential) -> None:
        super().__init__()
        *layers, self.head = tree.children()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Outputs:
        pooled = self.body(x)
        return pooled, self.head(pooled)


def _openvino(model: Model, x: Tensor) -> Callable[[Tensor], Outputs]:
    import openvino  # pyright: ignore[reportMissingImports]

    net = _TwoOutputs(model.as_modules().float()).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters, about themselves
        converted = openvino.convert_model(torch.export.export(net, (x.float().contiguous(),)))
    converted.reshape(list(x.shape))
    request = openvino_request(converted, bf16=x.dtype == torch.bfloat16, threads=torch.get_num_threads())
    lock = threading.Lock()  # a request computes one input at a time

    def run(x: Tensor) -> Outputs:
        with lock:
            found = request.infer({0: x.detach().float().contiguous().numpy()}, share_inputs=True)
            pooled, logits = (torch.tensor(found[i]) for i in range(2))  # copies
        return pooled.to(x.dtype), logits.to(x.dtype)

    return run


def openvino_request(model: Any, *, bf16: bool, threads: int) -> Any:
    """Compile a model of OpenVINO's, or that of a file, and return a request, which computes one input at a time."""
    import openvino  # pyright: ignore[reportMissingImports]

    # Left to itself it would compute float32 programs in bf16 where the processor can.
    options = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
    options |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return openvino.Core().compile_model(model, "CPU", options).create_infer_request()


def candidates(backend: str, *, compile: bool, dtype: torch.dtype) -> list[Candidate]:
    """Return the ways to compute that are to be measured.

    Raises:
        ConfigError: for a backend that is not known, not installed or without the dtype.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"there is no backend {shown(backend)}; there are {', '.join(BACKENDS)}")
    found: list[Candidate] = []
    if backend != "openvino":
        found = [
            Candidate("folded", False, _plain),
            Candidate("folded", True, _plain),
            Candidate("prepacked", True, _prepacked),
        ]
        if compile:
            found += [Candidate("compiled", True, _compiled), Candidate("frozen", True, _frozen)]
    installed = importlib.util.find_spec("openvino") is not None
    supported = dtype in DTYPES.values()
    if backend == "openvino":
        program.check_packages("the backend 'openvino'", ("openvino",), "openvino")
    if backend == "openvino" and not supported:
        raise ConfigError(f"OpenVINO computes in {' and '.join(DTYPES)}, not in {dtype}; give dtype=")
    if backend != "torch" and installed and supported:
        found.append(Candidate("openvino", True, _openvino))
    return found


def dtype_of(dtype: torch.dtype | str | None, own: torch.dtype) -> torch.dtype:
    """Return the dtype that `optimize` was given, by default the model's own."""
    given = own if dtype is None else DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if given not in TOLERANCES:
        raise ConfigError(f"the dtype is {', '.join(DTYPES)} or a torch.dtype of floating point, not {shown(dtype)}")
    return given  # pyright: ignore[reportReturnType]


def example(batch: int, channels: int, size: int) -> Tensor:
    """Return random images `(N, C, size, size)`, the same in every call.

    Raises:
        ConfigError: for numbers that are no positive integers.
    """
    for name, value in (("batch", batch), ("size", size)):
        if not is_int(value, 1):
            raise ConfigError(f"{name} must be a positive integer, not {shown(value)}")
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


class _Entrant(NamedTuple):
    candidate: Candidate
    model: Any


@torch.no_grad()
def fastest(
    new: Callable[[], Any], reference: Tensor, x: Tensor, found: Sequence[Candidate], *, tolerance: float | None
) -> Any:
    """Return the model of the candidate with the shortest time, with its `execution`.

    In each round every candidate computes once, and those that are far behind are dropped.

    Args:
        new: returns a model in evaluation mode, with the parameters in the dtype to compute in.
        reference: the logits of `x`, which a candidate has to agree with.
        x: images of the dtype to compute in.
        tolerance: largest |logits - reference| / |reference|; by default that of `TOLERANCES`.

    Raises:
        ConfigError: if no candidate is left, with what is wrong with each.
    """
    limit = TOLERANCES[x.dtype] if tolerance is None else tolerance
    distances: dict[str, float] = {}
    left_out: dict[str, str] = {}
    entrants: list[_Entrant] = []
    for candidate in found:
        try:
            entrant = _made(candidate, new(), x)
            distances[candidate.name] = _distance(entrant.model(x), reference)
        except Exception as error:  # of whatever compiler or runtime
            left_out[candidate.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if distances[candidate.name] <= limit:
            entrants.append(entrant)
        else:
            left_out[candidate.name] = f"its logits differ by {distances[candidate.name]:.1e}, more than {limit:.1e}"
    if not entrants:
        raise ConfigError("; ".join(f"{name}: {why}" for name, why in left_out.items()))
    times = {entrant.candidate.name: math.inf for entrant in entrants}
    begun, turn = time.perf_counter(), 0
    while turn < _ROUNDS[0] or (turn < _ROUNDS[1] and time.perf_counter() - begun < _SECONDS):
        for entrant in entrants:
            start = time.perf_counter()
            entrant.model(x)
            name = entrant.candidate.name
            times[name] = min(times[name], 1000 * (time.perf_counter() - start))
        turn += 1
        if turn >= _ROUNDS[0]:
            worst = _HOPELESS * min(times.values())
            entrants = [entrant for entrant in entrants if times[entrant.candidate.name] <= worst]
    chosen = min(entrants, key=lambda entrant: times[entrant.candidate.name])
    measured = {"milliseconds": times, "distances": distances, "left_out": left_out}
    model = chosen.model
    model.execution = dataclasses.replace(model.execution, **measured)
    logger.info("%s: %s", model.name or "model", model.execution)
    return model


def _made(candidate: Candidate, model: Any, x: Tensor) -> _Entrant:
    run = candidate.make(model, x)
    program = None if run is None else Program(run, weights_state(model._blocks()))
    threads = torch.get_num_threads()
    about = candidate.form, candidate.channels_last, tuple(x.shape), x.dtype, threads
    model.execution = Execution(*about, {}, {}, {}, program)
    return _Entrant(candidate, model)


def _distance(logits: Tensor, reference: Tensor) -> float:
    difference = float((logits.double() - reference.double()).norm())
    if not math.isfinite(difference):
        raise ArithmeticError("its outputs are not finite")
    return difference / max(float(reference.double().norm()), torch.finfo(torch.float32).tiny) if difference else 0.0


def for_many(model: Any, images: int, device: torch.device) -> Any:
    """Return a model folded and with its weights laid out, where that pays for so many images; else the model itself.

    That is on a CPU, from `MANY` on. Logits differ by less than 1e-5 of their norm, and are the same in every run. A
    model with hooks, and one that cannot be folded, is returned as it is.
    """
    if device.type != "cpu" or images < MANY or model.config.folded or any(map(is_hooked, model.modules())):
        return model
    try:
        return model.for_inference().prepack()
    except ConfigError:  # another head, a pruned weight or a subclass with a `forward` of its own
        return model

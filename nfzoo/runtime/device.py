"""Where to compute: devices, what differs between them, and the processes that share them.

A `Backend` is all that a training loop has to know about its device. There are three: torch's own devices (CPU, CUDA,
MPS), XLA through torch-xla, and TPUs through torch-tpu. No other module imports torch-xla.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nfzoo.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

AUTOCAST: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of mixed precisions, as Accelerate has them -> what `Backend.autocast` takes."""


@dataclass(frozen=True)
class Backend:
    """Torch's own devices, and the base of the others: `backend(device)` gives the right one.

    Parameters stay float32 everywhere; low precision is a matter of `autocast` alone.
    """

    device: torch.device

    def start(self) -> None:
        """Bring the device up. Call it once, before the first tensor and the first backward pass."""

    def images(self, batch: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`(N, C, H, W)` on the device, in the layout in which it computes fastest, as measured.

        That is channels last on a CPU (`benchmarks/results`); elsewhere the batch's own.
        """
        last = self.device.type == "cpu" and batch.dim() == 4
        layout = torch.channels_last if last else torch.preserve_format
        return batch.to(self.device, dtype, non_blocking=True, memory_format=layout)

    def autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        """Convolutions and linears in `dtype`, sums and losses in float32; nothing for `None`."""
        if dtype is None:
            return contextlib.nullcontext()
        if dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"mixed precision is torch.bfloat16 or torch.float16, not {dtype}; None turns it off")
        return torch.autocast(self.device.type, dtype=dtype)

    def scalar(self, value: float) -> float | Tensor:
        """A number that changes from step to step, such as a learning rate, so that its value compiles nothing."""
        return value

    def step_mark(self) -> None:
        """End of a training step. Lazy devices compile and run here what the step recorded."""

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Make each process's gradients the mean over all processes, in place. AGC has to come after it.

        Nothing is left to do here: `DistributedDataParallel` has averaged while `backward` ran.
        """

    def to_cpu(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in the CPU's memory, detached, to be saved; what is there already is not copied."""
        return {name: t.detach().cpu() for name, t in tensors.items()}

    def checkpoint(self, fn: Callable[..., Tensor], *args: Any) -> Tensor:
        """`fn(*args)`, whose activations are computed again in the backward pass and not kept until then.

        `fn` must not draw random numbers. Differentiate with `backward()`; `torch.func` does not know checkpoints.
        """
        from torch.utils.checkpoint import checkpoint

        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def launch_hint(self) -> str:
        """A command that starts several processes on such devices."""
        if self.device.type == "cpu":
            return "ACCELERATE_USE_CPU=true accelerate launch --cpu --num_processes 2 -m nfzoo.train ..."
        if self.device.type == "mps":
            return "one process uses the whole GPU: accelerate launch --num_processes 1 -m nfzoo.train ..."
        return f"accelerate launch --multi_gpu --num_processes {torch.accelerator.device_count()} -m nfzoo.train ..."


@dataclass(frozen=True)
class XlaBackend(Backend):
    """XLA devices through torch-xla: TPUs, or the CPU with `PJRT_DEVICE=CPU`. Steps are recorded, compiled, run."""

    def start(self) -> None:
        _import("torch_xla", "xla").device()  # a backward pass before it finds no device to run its threads for

    def autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        if dtype is torch.float16:
            raise ConfigError("XLA devices have no mixed precision 'fp16'; take 'bf16'")
        return super().autocast(dtype)

    def scalar(self, value: float) -> float | Tensor:
        # Moved here without a dimension it would compile anew where it is 0 or 1, which are written into the program,
        # or equal to another number of the program, with which it then shares a buffer.
        return torch.tensor([value], dtype=torch.float32).to(self.device).reshape(())

    def step_mark(self) -> None:
        import torch_xla  # pyright: ignore[reportMissingImports]

        torch_xla.sync()

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Make each process's gradients the mean over all processes, in place. AGC has to come after it.

        No wrapper averages gradients here. Under SPMD there is one process, and the compiler adds the reduction.
        """
        import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]
        import torch_xla.runtime as xr  # pyright: ignore[reportMissingImports]

        xm.all_reduce(xm.REDUCE_SUM, list(tensors), scale=1.0 / xr.world_size())

    def to_cpu(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.step_mark()  # one program for all that is pending, not one for each tensor
        return super().to_cpu(tensors)

    def checkpoint(self, fn: Callable[..., Tensor], *args: Any) -> Tensor:
        from torch_xla.utils.checkpoint import checkpoint  # pyright: ignore[reportMissingImports]

        # Torch's own does not work here. This one gives what `fn` closes over no gradient, without a word, unless an
        # argument wants one.
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        result = checkpoint(lambda _, *rest: fn(*rest), anchor, *args, preserve_rng_state=False)
        assert isinstance(result, Tensor)
        return result

    def synchronize(self) -> None:
        import torch_xla  # pyright: ignore[reportMissingImports]

        torch_xla.sync(wait=True)

    def launch_hint(self) -> str:
        return "PJRT_DEVICE=TPU accelerate launch --tpu --num_processes 8 -m nfzoo.train ..."


@dataclass(frozen=True)
class TpuBackend(Backend):
    """TPUs through torch-tpu (torch >= 2.11, Python >= 3.12), which makes `tpu` a device of torch's own kind.

    Unverified on hardware: written to the documentation of torch-tpu 0.2.0, and never run on a TPU. Accelerate does not
    know this device, so that training with `nfzoo.train` reaches TPUs through torch-xla; here stands what a loop of
    one's own over `torch.distributed` (backend `tpu_dist`) and DistributedDataParallel needs.
    """

    def start(self) -> None:
        _import("torch_tpu", "tpu")  # loads itself with torch already unless TORCH_DEVICE_BACKEND_AUTOLOAD=0

    def launch_hint(self) -> str:
        return (
            "call torch.tpu.distributed.set_tpu_launch_env(nproc_per_node=8), then torch.multiprocessing.spawn or "
            "torchrun, and init_process_group('tpu_dist') in each process"
        )


def backend(device: torch.device | str) -> Backend:
    """What computes on a device, by its type: `cpu`, `cuda`, `mps` and the like, `xla`, or `tpu`.

    Starts nothing; see `Backend.start`. A `ConfigError` for a device of no known type.
    """
    if str(device).partition(":")[0] == "tpu" and not hasattr(torch, "tpu"):
        _import("torch_tpu", "tpu")  # until then torch does not know the word
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise _unusable(device, error) from error
    return {"xla": XlaBackend, "tpu": TpuBackend}.get(known.type, Backend)(known)


def usable_device(device: torch.device | str) -> torch.device:
    """The device, tried out; a `ConfigError` for one that is not here."""
    chosen = backend(device)
    try:
        chosen.start()
        torch.zeros(1, device=chosen.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable(device, error) from error
    return chosen.device


def accelerator(mixed_precision: str | None = None, **options: Any) -> Accelerator:
    """Accelerate's view of the processes and their devices.

    Accelerate takes XLA wherever torch-xla can be imported; here it does if `PJRT_DEVICE` is set (or `USE_TORCH_XLA`,
    its own switch). It has to decide before its first import, so that a program which imports `accelerate` before it
    calls this has to set `USE_TORCH_XLA=0` itself.

    Args:
        mixed_precision: a key of `AUTOCAST`, by default that which Accelerate is configured with. Accelerate itself
            only learns of `"fp16"`, whose gradients it scales. Its `"bf16"` would make the parameters on a TPU bf16;
            use `Backend.autocast` around the forward pass.
        options: further arguments of `Accelerator`, such as a tracker.
    """
    choose_xla()
    from accelerate import Accelerator

    return Accelerator(mixed_precision="fp16" if precision(mixed_precision) == "fp16" else "no", **options)


def choose_xla() -> None:
    """Keep Accelerate from taking XLA unless `PJRT_DEVICE` or `USE_TORCH_XLA` asks for it: before it is imported."""
    os.environ.setdefault("USE_TORCH_XLA", "1" if os.environ.get("PJRT_DEVICE") else "0")


def precision(mixed_precision: str | None = None) -> str:
    """The mixed precision itself or, for `None`, that of `accelerate launch`; a `ConfigError` for an unknown one."""
    name = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if name not in AUTOCAST:
        raise ConfigError(f"mixed_precision must be one of {', '.join(AUTOCAST)}, not {name!r}")
    return name


def processes(*, cpu: bool, patience: datetime.timedelta | None = None) -> PartialState:
    """The processes that share a work without gradients, as Accelerate sees them; see `accelerator` on XLA.

    Args:
        cpu: compute on the CPU, whatever else there is.
        patience: how long a process waits for the others, by default as long as torch's backend does.

    Raises:
        ConfigError: see `check_processes`.
    """
    choose_xla()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    options = {} if patience is None else {"timeout": patience}
    state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), **options)  # as Accelerator reads it
    check_processes(state.num_processes)
    return state


def share_of(state: PartialState, device: torch.device | str | None) -> torch.device:
    """Where this process computes: on the device asked for, which one of several processes cannot choose.

    A `ConfigError` for a device that is not here, or not this process's.
    """
    given = state.device
    assert given is not None  # it is before the state is made, says Accelerate's annotation
    if device is None:
        return given
    wanted = usable_device(device)
    if state.num_processes > 1 and (wanted.type != given.type or wanted.index not in (None, given.index)):
        raise ConfigError(
            f"several processes compute on the devices that `accelerate launch` gives them, here {given}; "
            "leave --device out"
        )
    return given if state.num_processes > 1 else wanted


def check_processes(found: int) -> None:
    """Raise a `ConfigError` if more processes were launched than the `found` that share the work.

    Accelerate gives each of several processes without an accelerator of its own the whole work, unless told otherwise.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != str(found):
        raise ConfigError(
            f"{launched} processes were launched and do not find each other, for lack of as many accelerators; "
            "to let them share the CPU, set ACCELERATE_USE_CPU=true"
        )


def default_workers(processes: int) -> int:
    """Loader processes of each of several processes on this machine: one per processor, up to 8."""
    return min(8, max(1, (os.cpu_count() or 1) // processes))


def _import(module: str, extra: str) -> Any:
    """A device's own package, whose extra has the device's name."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _unusable(extra, error, f"pip install 'nfzoo[{extra}]': ") from error


def _unusable(device: torch.device | str, error: Exception, remedy: str = "") -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(f"the device {str(device)!r} cannot be used here: {remedy}{reason}")

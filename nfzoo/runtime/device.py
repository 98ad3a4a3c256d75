"""Devices behind one interface, and the processes that share them.

A `Backend` hides the differences between devices from a training loop. There are three: torch's own devices (CPU, CUDA,
MPS), XLA through torch-xla, and TPUs through torch-tpu. No other module imports torch-xla.

The module is long because the three are to be seen side by side.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nfzoo.errors import ConfigError
from nfzoo.runtime.distributed import group_options

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

AUTOCAST: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Accelerate's names of mixed precisions -> the argument of `Backend.autocast`."""


@dataclass(frozen=True)
class Backend:
    """torch's own devices, and the base class of the others; `backend(device)` returns the one for a device.

    Parameters stay float32 everywhere; only `autocast` lowers the precision.
    """

    device: torch.device

    def start(self) -> None:
        """Initialise the device. Call it once, before the first tensor and the first backward pass."""

    def images(self, batch: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Move `(N, C, H, W)` to the device, in the fastest layout that was measured there.

        That is channels last on a CPU and on a GPU (`benchmarks/results`). Elsewhere nothing was measured, and the
        layout stays.
        """
        last = self.device.type in ("cpu", "cuda") and batch.dim() == 4
        layout = torch.channels_last if last else torch.preserve_format
        return batch.to(self.device, dtype, non_blocking=True, memory_format=layout)

    @property
    def weights_last(self) -> bool:
        """Return whether kernels are to be in memory format channels last as well, as cuDNN wants them."""
        return self.device.type == "cuda"

    def autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        """Compute convolutions and linears in `dtype`, sums and losses in float32; `None` changes nothing."""
        if dtype is None:
            return contextlib.nullcontext()
        if dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"mixed precision is torch.bfloat16 or torch.float16, not {dtype}; None turns it off")
        return torch.autocast(self.device.type, dtype=dtype)

    def scalar(self, value: float) -> float | Tensor:
        """Wrap a number that changes in each step, such as a learning rate, so that no new value is compiled anew."""
        return value

    def number(self) -> Callable[[float], float | Tensor]:
        """Return a function like `scalar`. On a GPU it returns one tensor each time, which a CUDA graph can read."""
        if self.device.type != "cuda":
            return self.scalar
        tensor = torch.zeros((), device=self.device)
        return tensor.fill_

    def read_later(self, flag: Tensor) -> Callable[[], bool]:
        """Return a function that returns the value of a 0-dimensional tensor, and waits for it if it is not there yet.

        On a GPU the value that the tensor has now starts on its way to the host.
        """
        if self.device.type != "cuda":
            return functools.partial(bool, flag)
        value, copied = flag.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()

        def read() -> bool:
            copied.synchronize()
            return bool(value)

        return read

    @property
    def reads_late(self) -> bool:
        """Return whether the host should look at a step's results only after the launch of the next step."""
        return self.device.type == "cuda"

    def step_mark(self) -> None:
        """End a training step. Lazy devices compile and run the recorded step here."""

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Average the gradients over all processes, in place; AGC has to come after it.

        Here `DistributedDataParallel` has averaged them during `backward`, so this does nothing.
        """

    def to_cpu(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return detached tensors in the CPU's memory, to be saved; those already there are not copied."""
        return {name: t.detach().cpu() for name, t in tensors.items()}

    def copy_to_cpu(self, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the CPU's memory, which no later change of theirs reaches.

        Args:
            tensors: on the device, by name.
            buffers: what an earlier call returned. Its memory is used again where type and layout are the same.
        """
        copies = {}
        for name, t in tensors.items():
            buffer = buffers.get(name)
            if buffer is None or (buffer.dtype, buffer.shape, buffer.stride()) != (t.dtype, t.shape, t.stride()):
                buffer = torch.empty_like(t, device="cpu", requires_grad=False, pin_memory=t.device.type == "cuda")
            copies[name] = buffer.copy_(t.detach(), non_blocking=True)
        self.synchronize()
        return copies

    def checkpoint(self, fn: Callable[..., Tensor], *args: Any) -> Tensor:
        """Return `fn(*args)`, and recompute its activations in the backward pass instead of keeping them.

        `fn` must not draw random numbers. Differentiate with `backward()`; `torch.func` does not support checkpoints.
        """
        from torch.utils.checkpoint import checkpoint

        return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@dataclass(frozen=True)
class XlaBackend(Backend):
    """XLA devices through torch-xla: TPUs, or the CPU with `PJRT_DEVICE=CPU`. Steps are recorded, compiled, run."""

    def start(self) -> None:
        _import("torch_xla", "xla").device()  # a backward pass before this finds no device for its threads

    def autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        if dtype is torch.float16:
            raise ConfigError("XLA devices have no mixed precision 'fp16'; take 'bf16'")
        return super().autocast(dtype)

    def scalar(self, value: float) -> float | Tensor:
        # A tensor that has no dimension when it is moved would compile anew for 0 and 1, which become constants of the
        # program, and for a value equal to another number of the program, with which it would share a buffer.
        return torch.tensor([value], dtype=torch.float32).to(self.device).reshape(())

    def step_mark(self) -> None:
        import torch_xla  # pyright: ignore[reportMissingImports]

        torch_xla.sync()

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Average the gradients over all processes, in place; AGC has to come after it.

        Under SPMD there is one process, and the compiler adds the reduction.
        """
        import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]
        import torch_xla.runtime as xr  # pyright: ignore[reportMissingImports]

        xm.all_reduce(xm.REDUCE_SUM, list(tensors), scale=1.0 / xr.world_size())

    def to_cpu(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.step_mark()  # runs everything pending as one program, instead of one for each tensor
        return super().to_cpu(tensors)

    def copy_to_cpu(self, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.to_cpu(tensors)  # which copies, as no tensor of this device lies in the CPU's memory

    def checkpoint(self, fn: Callable[..., Tensor], *args: Any) -> Tensor:
        from torch_xla.utils.checkpoint import checkpoint  # pyright: ignore[reportMissingImports]

        # torch's own checkpoint does not work here. This one silently gives no gradient to tensors that `fn` closes
        # over, unless some argument requires a gradient.
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        result = checkpoint(lambda _, *rest: fn(*rest), anchor, *args, preserve_rng_state=False)
        assert isinstance(result, Tensor)
        return result

    def synchronize(self) -> None:
        import torch_xla  # pyright: ignore[reportMissingImports]

        torch_xla.sync(wait=True)


@dataclass(frozen=True)
class TpuBackend(Backend):
    """TPUs through torch-tpu (torch >= 2.11, Python >= 3.12), which makes `tpu` a device of torch's own kind.

    Unverified on hardware: written to the documentation of torch-tpu 0.2.0, and never run on a TPU. Accelerate does not
    support this device, so `nfzoo.train` reaches TPUs through torch-xla. This class serves your own loops over
    `torch.distributed` (backend `tpu_dist`) and DistributedDataParallel: call
    `torch.tpu.distributed.set_tpu_launch_env(nproc_per_node=8)`, then `torch.multiprocessing.spawn` or torchrun, and
    `init_process_group("tpu_dist")` in each process.
    """

    def start(self) -> None:
        _import("torch_tpu", "tpu")  # torch loads it itself unless TORCH_DEVICE_BACKEND_AUTOLOAD=0


def backend(device: torch.device | str) -> Backend:
    """Return the backend of a device, by its type: `cpu`, `cuda`, `mps` and the like, `xla`, or `tpu`.

    It is not started: see `Backend.start`.

    Raises:
        ConfigError: for a device of unknown type.
    """
    if str(device).partition(":")[0] == "tpu" and not hasattr(torch, "tpu"):
        _import("torch_tpu", "tpu")  # before this import torch does not know the type
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise _unusable(device, error) from error
    return {"xla": XlaBackend, "tpu": TpuBackend}.get(known.type, Backend)(known)


def usable_device(device: torch.device | str) -> torch.device:
    """Return the device after a trial computation; raise a `ConfigError` if it is not available."""
    chosen = backend(device)
    try:
        chosen.start()
        torch.zeros(1, device=chosen.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable(device, error) from error
    return chosen.device


def accelerator(mixed_precision: str | None = None, **options: Any) -> Accelerator:
    """Return the `Accelerator` of the launched processes; see `choose_xla` for when it uses XLA.

    Args:
        mixed_precision: a key of `AUTOCAST`; by default that of Accelerate's configuration. `"fp16"` is passed on to
            Accelerate, which scales the gradients. `"bf16"` is not, as Accelerate would make the parameters on a TPU
            bf16: wrap the forward pass in `Backend.autocast`.
        options: further arguments of `Accelerator`, such as a tracker.

    Raises:
        ConfigError: if Accelerate's launcher or configuration asks for what nfzoo does by options of its own.
    """
    choose_xla()
    _refuse_launch_options()
    from accelerate import Accelerator, InitProcessGroupKwargs

    if group := group_options():
        options["kwargs_handlers"] = [InitProcessGroupKwargs(**group)]
    return Accelerator(mixed_precision="fp16" if precision(mixed_precision) == "fp16" else "no", **options)


# Accelerate's variable -> what to do instead of setting it.
_LAUNCH_OPTIONS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "pass --accumulation to nfzoo.train",
    "ACCELERATE_GRADIENT_CLIPPING": "pass --optim.clip-norm to nfzoo.train",
    "ACCELERATE_DYNAMO_BACKEND": "pass --compile true to nfzoo.train",
    "ACCELERATE_USE_FSDP": "pass --sharding fsdp2 to nfzoo.train",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "pass --sharding fsdp2 to nfzoo.train",
    "ACCELERATE_DOWNCAST_BF16": "pass --mixed-precision bf16 to nfzoo.train",
    "ACCELERATE_USE_DEEPSPEED": "nfzoo does not support it",
    "ACCELERATE_USE_MEGATRON_LM": "nfzoo does not support it",
}


def _refuse_launch_options() -> None:
    """Raise a `ConfigError` for a variable of Accelerate's that would change a run behind nfzoo's own options."""
    for name, remedy in _LAUNCH_OPTIONS.items():
        off = ("", "0", "no", "none", "false") + (("1",) if name.endswith("_STEPS") else ())
        value = os.environ.get(name, "")
        if value.strip().lower() not in off:
            raise ConfigError(
                f"{name}={value!r}, from accelerate launch or its configuration, cannot be used here; "
                f"{remedy}, and leave it out there"
            )


def choose_xla() -> None:
    """Let Accelerate use XLA only if `PJRT_DEVICE` or its own `USE_TORCH_XLA` is set, not whenever torch-xla is there.

    Accelerate decides at its first import. A program that imports it earlier has to set `USE_TORCH_XLA=0` itself.
    """
    os.environ.setdefault("USE_TORCH_XLA", "1" if os.environ.get("PJRT_DEVICE") else "0")


def precision(mixed_precision: str | None = None) -> str:
    """Return the mixed precision, for `None` that of `accelerate launch`; raise a `ConfigError` for an unknown one."""
    name = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if name not in AUTOCAST:
        raise ConfigError(f"mixed_precision must be one of {', '.join(AUTOCAST)}, not {name!r}")
    return name


def processes(*, cpu: bool, patience: datetime.timedelta | None = None) -> PartialState:
    """Return Accelerate's state of the processes that share work without gradients; see `choose_xla` for XLA.

    Args:
        cpu: compute on the CPU, even if there is an accelerator.
        patience: time that a process waits for the others; by default that of torch's backend.

    Raises:
        ConfigError: see `check_processes`.
    """
    choose_xla()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    options = group_options() | ({} if patience is None else {"timeout": patience})
    state = PartialState(cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), **options)  # as Accelerator reads it
    check_processes(state.num_processes)
    return state


def share_of(state: PartialState, device: torch.device | str | None) -> torch.device:
    """Return the device of this process: `device`, or Accelerate's choice for `None` and for several processes.

    Raises:
        ConfigError: if `device` is not available, or is not that of this one of several processes.
    """
    assigned = state.device
    assert assigned is not None  # Accelerate's annotation allows None before the state is set up
    if device is None:
        return assigned
    chosen = usable_device(device)
    if state.num_processes > 1 and (chosen.type != assigned.type or chosen.index not in (None, assigned.index)):
        raise ConfigError(
            f"several processes compute on the devices that `accelerate launch` gives them, here {assigned}; "
            "leave --device out"
        )
    return assigned if state.num_processes > 1 else chosen


def check_processes(count: int) -> None:
    """Raise a `ConfigError` unless `count`, the number of processes that share the work, is the number launched.

    By default Accelerate lets each process without an accelerator of its own do all of the work.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != str(count):
        raise ConfigError(
            f"{launched} processes were launched and do not find each other, for lack of as many accelerators; "
            "to let them share the CPU, set ACCELERATE_USE_CPU=true"
        )


def default_workers(processes: int) -> int:
    """Return the number of loader processes for each process on this machine: its share of the processors, up to 8."""
    return min(8, max(1, (os.cpu_count() or 1) // processes))


def _import(module: str, extra: str) -> Any:
    """Import the package of a device; the extra that installs it has the device's name."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _unusable(extra, error, f"pip install 'nfzoo[{extra}]': ") from error


def _unusable(device: torch.device | str, error: Exception, remedy: str = "") -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(f"the device {str(device)!r} cannot be used here: {remedy}{reason}")

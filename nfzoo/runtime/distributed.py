"""Several processes: sharded parameters and their full tensors, gathering, and agreement on when to stop."""

from __future__ import annotations

import os
import platform
import secrets
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

STOPPING = (signal.SIGTERM, signal.SIGINT)
READING = 5.0
"""Seconds that a process which was asked to stop goes on waiting for data."""


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether the tensor is a `DTensor`, of which this process holds a shard."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a `DTensor`, or the tensor itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


Model = TypeVar("Model", bound=nn.Module)


def shard(model: Model, device: torch.device) -> Model:
    """Shard parameters along dimension 0 over all processes with FSDP2: residual blocks one by one, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for name, module in model.named_modules():
        if name.startswith("stages.") and hasattr(module, "block"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full_tensors(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached full tensors under the same keys."""
    return {name: full_tensor(p.detach()) for name, p in params.items()}


def local_tensor(tensor: Tensor) -> Tensor:
    """Return what this process holds of a `DTensor`, or the tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def sum_over(value: Tensor, mesh: Any, dimensions: Sequence[bool]) -> Tensor:
    """Return the sum of each process's `value` over those dimensions of a mesh that are chosen; all call this."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not any(dimensions):
        return value
    placements = [Partial() if chosen else Replicate() for chosen in dimensions]
    return DTensor.from_local(value, mesh, placements, run_check=False).full_tensor()


def with_local(tensor: Tensor, local: Tensor, mesh: Any) -> Tensor:
    """Return `local`; if `tensor` is a `DTensor`, return one of its shape of which this process holds `local`.

    Args:
        mesh: a `DeviceMesh` of the device of `local`, over the processes of the tensor's own.
    """
    if not is_dtensor(tensor):
        return local
    from torch.distributed.tensor import DTensor

    placements = tensor.placements  # type: ignore[attr-defined]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@torch.no_grad()
def copy_(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into `target`, which may be a `DTensor`."""
    if is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        device = target.to_local().device  # type: ignore[attr-defined]
        value = distribute_tensor(
            value.to(device, target.dtype),
            target.device_mesh,  # type: ignore[attr-defined]
            target.placements,  # type: ignore[attr-defined]
        )
    target.copy_(value)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return the optimizer's state, detached, under keys `"parameter::entry"`."""
    tensors = {}
    for p, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{names[p]}::{key}"] = value.detach()
    return tensors


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Load full tensors of what `optimizer_tensors` returned; those of a parameter's shape are sharded as it is."""
    params = {name: p for p, name in names.items()}
    for full_key, value in tensors.items():
        name, _, key = full_key.partition("::")
        p = params[name]
        if value.shape == p.shape and value.ndim:
            entry = torch.zeros_like(p)
            copy_(entry, value)
        else:
            entry = value.clone()  # such as Adam's step, which stays on the CPU
        optimizer.state[p][key] = entry


T = TypeVar("T")


def gather(items: list[T]) -> list[T]:
    """Return the items of all processes, in their order. All processes have to call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    gathered: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


class Interrupted(BaseException):  # no Exception, which code that reads images may catch
    """A process that was asked to stop still waited for data."""


class Agreement:
    """Agreement of all processes on whether any of them was asked to stop.

    The first SIGTERM or Ctrl-C asks to stop. The second ends the process as usual. The end of the parent process
    `accelerate launch` asks too, as the launcher passes no SIGTERM on to a single process.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._process, self._reading, self._timed = os.getpid(), False, False
        self._launcher = _launcher()
        self._before: dict[int, Any] = {}
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # Exchanged on the CPU, so that reading the flags does not wait for the accelerator.
        self._group = dist.new_group(backend="gloo") if several else None

    def __enter__(self) -> Agreement:
        try:
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # only the main thread may set handlers
            self._before.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()
        if self._timed:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._restore_handlers()
        if sys.platform != "win32" and os.getpid() == self._process:  # not one that loads images for it
            self._timed = True
            signal.signal(signal.SIGALRM, self._wake)
            signal.setitimer(signal.ITIMER_REAL, READING, 1)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        if self._reading:
            self._reading = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Interrupted

    def reading(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items of an iterable that may wait without end, as for a server that is gone.

        Raises:
            Interrupted: if this process was asked to stop and the next item has not come after some seconds.
        """
        iterator = iter(items)
        while True:
            self._reading = True
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._reading = False
            yield item

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def reached(self, *counts: int) -> tuple[int | None, list[int]]:
        """Return the signal by which any process was asked to stop, and the sum of each count over all processes.

        All processes have to call this.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self.asked = self.asked or signal.SIGTERM
        if self._group is None:
            return self.asked, list(counts)
        flags = torch.tensor([*(int(self.asked == number) for number in STOPPING), *counts])
        dist.all_reduce(flags, group=self._group)
        asked, sums = flags[: len(STOPPING)].tolist(), flags[len(STOPPING) :].tolist()
        return next((int(number) for number, times in zip(STOPPING, asked, strict=True) if times), None), sums


def _launcher() -> int | None:
    """Return the id of the parent process, if it is Accelerate's launcher."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:  # no Linux
        return None
    names = {os.path.basename(word) for word in words[:4]}
    return parent if names & {b"accelerate", b"accelerate.commands.launch"} else None


def elastic_launcher() -> str | None:
    """Identify the `torchrun`, or `accelerate launch` of several processes, that started this process.

    It may start it anew. Its run id identifies it, which all machines know; where none was given, its process on this
    machine does. Return `None` without such a launcher.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run not in ("", "none"):  # "none" is torchrun's default
        return run
    import psutil

    parent = psutil.Process(os.getppid())
    return f"{platform.node()} {parent.pid} {parent.create_time()}"


def group_options() -> dict[str, Any]:
    """Return the options of `init_process_group` for processes that meet in the store of `torchrun`.

    That store outlives them, and still holds where the processes of earlier attempts listened. Later ones would now and
    then connect to those, and wait for half an hour. They therefore meet under a prefix that no others know.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return {"init_method": f"{_OWN_PREFIX}://"} if shared else {}


def agree_on_prefix(store: Any, rank: int, world: int) -> str:
    """Return a text that these processes agree on and no earlier ones did, whatever those left in the `dist.Store`.

    Each process asks with a text of its own. Process 0 answers every text that it finds, also those of the dead, until
    all others have taken its answer. The number of the attempt would not do: on several machines it can differ.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"nfzoo/asked/{rank}", own)
        prefix = store.get(f"nfzoo/answer/{own}").decode()  # waits for it
        store.set(f"nfzoo/taken/{prefix}/{rank}", "")
        return prefix
    missing, answered = set(range(1, world)), set()
    while missing:
        for other in missing:
            if store.check([f"nfzoo/asked/{other}"]) and (asked := store.get(f"nfzoo/asked/{other}")) not in answered:
                store.set(f"nfzoo/answer/{asked.decode()}", own)
                answered.add(asked)
        missing = {other for other in missing if not store.check([f"nfzoo/taken/{own}/{other}"])}
        time.sleep(0.01)
    return own


def _rendezvous(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
    from torch.distributed.rendezvous import rendezvous

    for store, rank, world in rendezvous("env://", **options):
        prefix = agree_on_prefix(store, rank, world)
        yield dist.PrefixStore(prefix, store), rank, world  # pyright: ignore[reportPrivateImportUsage]


_OWN_PREFIX = "nfzoo-own-prefix"
if dist.is_available():
    from torch.distributed.rendezvous import register_rendezvous_handler

    register_rendezvous_handler(_OWN_PREFIX, _rendezvous)


def gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of the parameters that have one."""
    return [p.grad for p in params if p.grad is not None]

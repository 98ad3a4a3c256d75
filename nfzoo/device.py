"""Where to compute: devices, and the processes that share them."""

from __future__ import annotations

import os

import torch

from .errors import ConfigError


def usable_device(device: torch.device | str) -> torch.device:
    """The device, tried out; a `ConfigError` for one that is not here."""
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"the device {str(device)!r} cannot be used here: {reason}") from error
    return usable


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

"""How the C library handles memory that a training step on a CPU frees."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt(3), and what they are set to.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NAMES = ("trim_threshold", "top_pad", "mmap_threshold")  # by which a user sets them in the environment
KEPT = 2**31 - 1
"""Bytes of free memory at the end of the heap that are kept; the most that mallopt can be told."""
FROM_HEAP = 1 << 30
"""Bytes of the largest block that comes from the heap; larger ones are mapped and unmapped one by one."""
STEP = 1 << 26
"""Bytes by which the heap grows."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step of a training run, unless the user has set its limits.

    By default glibc gives large blocks back to the system as they are freed. A training step on a CPU frees and
    allocates the same blocks again and again, and the system clears every page anew: thousands in a step of a small
    network.

    Returns:
        Whether it was done; `False` with another C library, or where the environment sets one of them, such as
            `MALLOC_TRIM_THRESHOLD_`.

    Source: `benchmarks/systems/freed_memory.py`.
    """
    if not sys.platform.startswith("linux") or _is_tuned():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl's mallopt does nothing
        return False
    wanted = {_MMAP_THRESHOLD: FROM_HEAP, _TRIM_THRESHOLD: KEPT, _TOP_PAD: STEP}
    taken = [library.mallopt(parameter, value) for parameter, value in wanted.items()]
    return all(taken)


def _is_tuned() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables for name in _NAMES)

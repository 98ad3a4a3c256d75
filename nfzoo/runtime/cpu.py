"""Tell OpenMP how threads wait on a CPU, and the C library what happens to freed memory."""

from __future__ import annotations

import os
import sys

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says how OpenMP's threads wait."""

SPINS = "10000"
"""Turns of the loop in which a thread of libgomp waits before it sleeps; libgomp's own number is 300,000."""


# Parameters of glibc's mallopt(3), and what they are set to.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_NAMES = ("trim_threshold", "top_pad", "mmap_threshold")  # by which a user sets them in the environment
ALL = -1
"""The limit of free memory at the end of the heap, above which it is given back: none."""
FROM_HEAP = 1 << 30
"""Bytes of the largest block that comes from the heap; larger ones are mapped and unmapped one by one."""
STEP = 1 << 26
"""Bytes by which the heap grows."""


def wait_briefly() -> None:
    """Let OpenMP's threads spin for a short time alone before they sleep, unless the user has said how they wait.

    By default they spin for milliseconds. Beside another busy process they then keep the processor from the very
    threads that they wait for. OpenMP reads its variables when torch is imported: after that nothing is changed.

    Source: `benchmarks/systems/wait_policy.py`.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def is_program(package: str) -> bool:
    """Return whether Python was started as `python -m PACKAGE` or `python -m PACKAGE.MODULE`, and is importing that."""
    arguments = getattr(sys, "argv", [])
    if arguments[:1] != ["-m"]:  # Python's sign until it has found the module
        return False
    module = sys.orig_argv[len(sys.orig_argv) - len(arguments)].removeprefix("-m")
    return module == package or module.startswith(f"{package}.")


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
    import ctypes  # here, as commands that do not train start without it

    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl's mallopt does nothing
        return False
    wanted = {_MMAP_THRESHOLD: FROM_HEAP, _TRIM_THRESHOLD: ALL, _TOP_PAD: STEP}
    taken = [library.mallopt(parameter, value) for parameter, value in wanted.items()]
    return all(taken)


def _is_tuned() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables for name in _NAMES)

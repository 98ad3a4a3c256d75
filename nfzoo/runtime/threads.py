"""How the threads of nfzoo's own programs wait for one another on a CPU."""

from __future__ import annotations

import os
import sys

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says how OpenMP's threads wait."""

SPINS = "10000"
"""Turns of the loop in which a thread of libgomp waits before it sleeps; libgomp's own number is 300,000."""


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

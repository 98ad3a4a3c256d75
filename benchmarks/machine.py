"""What a result was measured on, for the pages in `benchmarks/results/`."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """One line: processor, threads, system, versions."""
    return (
        f"{processor()}, {os.cpu_count()} cores visible, {torch.get_num_threads()} used; {platform.system()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def processor() -> str:
    """The processor's own name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""All suites one after another, each in a process of its own, so that one which fails or hangs costs only itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

RUN = Path(__file__).resolve().parent / "run.py"


class Job(NamedTuple):
    """One process: a suite, perhaps of one model alone, whose name its page then bears."""

    suite: str
    model: str | None = None

    def arguments(self) -> list[str]:
        model = [] if self.model is None else ["--models", self.model, "--label", self.model]
        return [self.suite, *model]


def jobs(models: Sequence[str]) -> list[Job]:
    """What matters most comes first, as the time may not do for all of it."""
    small, rest = models[0], models[1:]
    return [
        Job("training", small),
        Job("optimizer"),
        Job("inference", small),
        Job("grouped"),
        Job("profile", small),
        Job("layout", small),
        Job("memory"),
        Job("headline"),
        *(Job("training", m) for m in rest),
        Job("compile"),
        Job("shell"),
        Job("boundary", small),
        Job("optimize"),
        *(Job("inference", m) for m in rest),
    ]


def run(models: Sequence[str], options: Sequence[str], *, budget: float | None) -> int:
    """Run all jobs with the same further options of the command line; 1 if any failed or had no time, else 0.

    Args:
        budget: seconds for all of them together; what still runs then is ended.
    """
    end = None if budget is None else time.monotonic() + budget
    failed = 0
    for job in jobs(models):
        left = None if end is None else end - time.monotonic()
        name = " ".join(filter(None, job))
        began = time.monotonic()
        if left is not None and left < 1:
            result = "no time left"
        else:
            try:
                command = [sys.executable, str(RUN), *job.arguments(), *options]
                status = subprocess.run(command, timeout=left, check=False).returncode
                result = "done" if status == 0 else f"failed with status {status}"
            except subprocess.TimeoutExpired:
                result = "ended: no time left"
        failed += result != "done"
        print(f"benchmarks/run.py: {name}: {result}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return min(1, failed)

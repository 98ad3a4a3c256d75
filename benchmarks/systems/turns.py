"""Let processes take turns: in a round each works for a second while the others sleep.

A benchmark whose sides differ in what a process reads once, such as an environment variable, has a process for each.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

SECONDS = 1.0  # of a turn


class Turn(NamedTuple):
    """Report what a process did in its turn.

    Attributes:
        seconds: of a call, wall clock.
        faults: pages that the system mapped for a call.
        peak: bytes of memory that the process has held at most since it began.
    """

    seconds: float
    faults: float
    peak: float


class Worker:
    """Run a process that works when it is asked to."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start `python -m ARGUMENTS`, which calls `serve`, with this environment and no other."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", *arguments]
        self.process = subprocess.Popen(command, env=dict(environment), **pipes)  # type: ignore[call-overload]

    def _stream(self, stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def ready(self) -> None:
        """Wait until it has prepared its task."""
        line = self._stream(self.process.stdout).readline()
        if line != "ready\n":
            raise RuntimeError(f"a worker said {line!r}")

    def turn(self) -> Turn:
        """Let it work for a turn."""
        stdin = self._stream(self.process.stdin)
        stdin.write("go\n")
        stdin.flush()
        return Turn(*map(float, self._stream(self.process.stdout).readline().split()))

    def prefer(self, wanted: bool) -> None:
        """Let its threads run before all other programs on the machine, or no longer."""
        policy, priority = (os.SCHED_FIFO, 1) if wanted else (os.SCHED_OTHER, 0)
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    def close(self) -> None:
        """End the process."""
        self._stream(self.process.stdin).close()
        self.process.wait()


def serve(prepare: Callable[[], Callable[[], object]]) -> None:
    """Prepare a call; for each line of standard input repeat it for a turn, and print what `Turn` holds."""
    with contextlib.redirect_stdout(sys.stderr):
        call = prepare()
        for _ in range(3):
            call()
    print("ready", flush=True)
    for _ in sys.stdin:
        start, calls, faults = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        while (spent := time.perf_counter() - start) < SECONDS:
            call()
            calls += 1
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(spent / calls, (used.ru_minflt - faults) / calls, 1024 * used.ru_maxrss, flush=True)


def take_turns(workers: Mapping[str, Worker], count: int) -> dict[str, list[Turn]]:
    """Return the turns of all workers; every second round goes through them backwards."""
    turns: dict[str, list[Turn]] = {name: [] for name in workers}
    for number in range(count):
        for name in list(workers) if number % 2 == 0 else reversed(list(workers)):
            turns[name].append(workers[name].turn())
    return turns

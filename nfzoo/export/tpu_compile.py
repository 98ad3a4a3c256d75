"""Run the TPU compiler in a process of its own, and search for the largest batch with it.

Its figures are estimates: nothing has run on the chip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from nfzoo.config import MAX_SIZE
from nfzoo.errors import ConfigError
from nfzoo.export.tpu_chips import CHIPS, Request
from nfzoo.export.tpu_worker import ENVIRONMENT, REQUIRED

Outcome = Literal["compiles", "too big", "refused", "crashed", "timed out"]

TIMEOUT = 30.0  # minutes; NFNet-F6's training step takes its time on a few cores
WORKER = (sys.executable, "-m", "nfzoo.export.tpu_worker")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Answer of the compiler to one request. Sizes are bytes of one chip, estimated by the compiler.

    Attributes:
        outcome: `too big` is for the chip's memory; `refused` is any other error of the compiler.
        reason: of an outcome other than `compiles`, in one line.
        seconds: of tracing and compiling.
        peak: most memory at a time: arguments, results, temporaries.
        needed, available: if it is too big; arguments may come on top of what is needed.
        arguments: parameters, optimizer state and the chip's part of the batch.
        temporaries: activations and what else lives within a step.
        flops: floating-point operations of one chip in one step, counted in the compiled program.
        collectives: name -> `count` and `bytes` of the results.
        versions: of torch and the packages of the extra.
    """

    request: Request
    outcome: Outcome
    reason: str | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    peak: int | None = None
    needed: int | None = None
    available: int | None = None
    arguments: int | None = None
    temporaries: int | None = None
    code: int | None = None
    flops: float | None = None
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shortest_step(self) -> float | None:
        """Return the seconds that one step takes at least: FLOPs over the chip's published peak rate."""
        return None if self.flops is None else self.flops / CHIPS[self.request.chip].peak

    def to_dict(self) -> dict[str, Any]:
        """Return what is known, ready for JSON."""
        request = self.request
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "request"}
        known = {k: v for k, v in fields.items() if v is not None and v != {}}
        if self.outcome == "compiles":
            known |= {"hbm": CHIPS[request.chip].hbm, "shortest_step": self.shortest_step}
            known["collectives"] = self.collectives
        return {
            "topology": request.topology,
            "chips": request.chips,
            "step": "train" if request.train else "forward",
            "batch": request.batch,
            "size": request.size,
            "dtype": request.dtype,
            **known,
        }


# ---------------------------------------------------------------- the compiler's process


def check_installed() -> None:
    """Raise a `ConfigError` with the remedy if a package of the extra is missing."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"this needs {', '.join(missing)}: pip install 'nfzoo[tpu-aot]'")


def compile_apart(
    request: Request, *, timeout: float = TIMEOUT, log: Path | None = None, worker: Sequence[str] | None = None
) -> Check:
    """Compile one request in a process of its own, which is gone when this returns, however it returns.

    Args:
        timeout: minutes for the whole of it.
        log: file to append what the compiler prints to.
        worker: the command of the process, `WORKER` by default.
    """
    read, write = os.pipe()
    with (
        open(read, "rb") as theirs,
        open(write, "wb", buffering=0) as ours,  # open as long as this process lives; the worker ends with its input
        tempfile.TemporaryFile() if log is None else log.open("a+b") as errors,
    ):
        begin = errors.seek(0, os.SEEK_END)
        ours.write(request.to_json().encode() + b"\n")
        process = subprocess.Popen(
            worker or WORKER,
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the group
        )
        theirs.close()
        try:
            output = process.communicate(timeout=60 * timeout)[0]
        except subprocess.TimeoutExpired:
            reason = f"not done after {timeout:g} minutes; allow more with --timeout"
            return Check(request=request, outcome="timed out", reason=reason)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        try:
            return Check(request=request, **json.loads(output.splitlines()[-1]))
        except (IndexError, ValueError):  # what was written last is cut off if the process dies
            reason = f"{_ending(process.returncode)}{_last_line(errors, begin)}"
            return Check(request=request, outcome="crashed", reason=reason)


def _ending(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the compiler was killed, as when the memory of this machine gives out"
    if status < 0:
        return f"the compiler crashed ({signal.Signals(-status).name})"
    return f"the compiler's process ended with status {status}"


def _last_line(errors: IO[bytes], since: int) -> str:
    errors.seek(since)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    # The last line of a traceback of jax is an advertisement of a switch, after a rule.
    said = [line for line in lines if line and not line.startswith(("---", "For simplicity, JAX"))]
    return f": {said[-1]}" if said else ""


# ---------------------------------------------------------------- the largest batch


class _Undecided(Exception):
    """A check that says nothing about memory."""


def largest_batch(
    check: Callable[[int], Check], start: int, *, multiple: int | None = None, chips: int = 1
) -> list[Check]:
    """Bracket the largest batch that fits; return the checks in the order in which they were made.

    `start` is doubled until a batch is too big, or halved until one fits. With `multiple` the gap is then bisected down
    to neighbouring multiples of it; without, the answer is that of the doubling. The search ends early at an outcome
    that says nothing about memory.

    Args:
        check: compiles one batch.
        start: the first batch, a multiple of `chips`.
        multiple: a multiple of `chips`.
        chips: every batch is a multiple of it.
    """
    made: list[Check] = []

    def fits(batch: int) -> bool:
        made.append(check(batch))
        if made[-1].outcome not in ("compiles", "too big"):
            raise _Undecided
        return made[-1].outcome == "compiles"

    with contextlib.suppress(_Undecided):
        good, batch = 0, start
        while batch <= MAX_SIZE and fits(batch):
            good, batch = batch, 2 * batch
        bad = batch
        while not good and bad > chips:
            batch = bad // 2 // chips * chips
            good, bad = (batch, bad) if fits(batch) else (good, batch)
        while multiple and good:
            first, last = good // multiple + 1, (bad - 1) // multiple
            if first > last or good >= MAX_SIZE:
                break
            batch = (first + last) // 2 * multiple
            good, bad = (batch, bad) if fits(batch) else (good, batch)
    return made


def best(checks: Sequence[Check]) -> Check | None:
    """Return the check of the largest batch that compiles, `None` if none does."""
    return max((c for c in checks if c.outcome == "compiles"), key=lambda c: c.request.batch, default=None)

"""Measure what a program keeps of the memory, in a process of its own: `python -m nfzoo.benchmark.memory`."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from nfzoo.benchmark.contenders import CONTENDERS, Contender, Task
from nfzoo.export.run import FORMATS
from nfzoo.export.runtimes import LIBRARIES, muted
from nfzoo.nn import load

CALIBRATION = "calibration.safetensors"
_CALLS = 3
_CLEAR_PEAK = "5"  # Linux, proc_pid_clear_refs(5): the peak of the resident memory becomes what it is now


def prepare(task: Task) -> None:
    """Write what `resident` needs besides the exported programs into the task's folder."""
    task.model.save_pretrained(task.folder / "trained")
    task.folded.save_pretrained(task.folder / "folded")
    tensors = {str(i): part.contiguous() for i, part in enumerate(task.calibration)}
    save_file(tensors, task.folder / CALIBRATION)


def resident(contender: Contender, task: Task) -> float:
    """Return the peak of resident memory over three calls, in MB of 2^20 bytes, above that of a process without model.

    The other process has imported torch and the contender's runtime, and made no tensor. It then makes the program, of
    the exported file where there is one, and forgets all else. What was needed on the way there is not counted, but
    what it leaves behind is, and so is what libraries load only with a program.

    Args:
        task: after `prepare`, and after the contender has been built, so that its file is there.

    Raises:
        RuntimeError: if the process fails; with its last line.
    """
    given = {
        "folder": str(task.folder),
        "channels": task.model.config.in_channels,
        "format": contender.format,
        "precision": contender.precision,
        "batch": task.batch,
        "size": task.size,
        "threads": task.threads,
    }
    command = [sys.executable, "-m", "nfzoo.benchmark.memory", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"its memory: {said[-1] if said else f'exit status {done.returncode}'}")
    return float(lines[-1])


def main() -> None:
    """Measure one contender, and print the result."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    (contender,) = (c for c in CONTENDERS if (c.format, c.precision) == (given["format"], given["precision"]))
    if contender.format in LIBRARIES:
        with muted():
            importlib.import_module(LIBRARIES[contender.format])
    folder = Path(given["folder"])
    gc.collect()
    before = psutil.Process().memory_info().rss
    # What was exported is in a file already, and needs neither the model nor images.
    made = contender.format in FORMATS
    model: Any = None if made else load(folder / ("trained" if contender.format == "eager" else "folded")).eval()
    quantised = contender.precision == "int8" and not made
    calibration = list(load_file(folder / CALIBRATION).values()) if quantised else []
    task = Task(model, model, given["batch"], given["size"], given["threads"], calibration, folder)
    program = contender.build(task, contender.precision)
    x = torch.zeros(given["batch"], given["channels"], given["size"], given["size"])
    del task, model, calibration
    gc.collect()
    clear_peak()
    for _ in range(_CALLS):
        program.run(x)
    print((peak() - before) / 2**20)


def clear_peak() -> None:
    """Let the peak of this process's resident memory begin anew, where the system can."""
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text(_CLEAR_PEAK, encoding="ascii")


def peak() -> int:
    """Return the peak of this process's resident memory in bytes; where the system keeps none, what it is now."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()

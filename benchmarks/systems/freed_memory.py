"""Measure what it gains on a CPU that the C library keeps memory which a training step has freed.

    OMP_NUM_THREADS=1 python -m benchmarks.systems.freed_memory --output benchmarks/results    # about six minutes

Each way has a process of its own, and the processes take turns: in a round each works for a second while the others
sleep. Ratios are medians over the rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import timing
from benchmarks.report import Table, machine, publish
from benchmarks.systems.turns import SECONDS, Worker, serve, take_turns

OWN, KEPT = "glibc's own", "kept"
HUGE = "GLIBC_TUNABLES"
# Name -> whether nfzoo's function is called, and the tunables of glibc.
WAYS: dict[str, tuple[bool, str]] = {
    OWN: (False, ""),
    KEPT: (True, ""),
    "huge pages": (False, "glibc.malloc.hugetlb=1"),
    "kept, huge pages": (True, "glibc.malloc.hugetlb=1"),
}
EAGER, COMPILED, PREPACKED = "training", "compiled training", "prepacked"
# Name -> what is done, variant, images, pixels, type.
TASKS: dict[str, tuple[str, str, int, int, str]] = {
    "training nfnet-s0, 128 of 48 px": (EAGER, "nfnet-s0", 128, 48, "float32"),
    "training nfnet-s0, 128 of 48 px, bf16": (EAGER, "nfnet-s0", 128, 48, "bfloat16"),
    "training nfnet-f0, 8 of 64 px": (EAGER, "nfnet-f0", 8, 64, "float32"),
    "training nfnet-f0, 8 of 64 px, compiled": (COMPILED, "nfnet-f0", 8, 64, "float32"),
    "training nfnet-f0, 8 of 192 px": (EAGER, "nfnet-f0", 8, 192, "float32"),
    "training nfnet-f0, 8 of 192 px, bf16": (EAGER, "nfnet-f0", 8, 192, "bfloat16"),
    "prepacked nfnet-f0, 1 of 256 px": (PREPACKED, "nfnet-f0", 1, 256, "float32"),
    "prepacked nfnet-f0, 16 of 256 px": (PREPACKED, "nfnet-f0", 16, 256, "float32"),
}


def prepared(task: str, *, kept: bool) -> Callable[[], object]:
    """Return the call of a task, in a process that keeps freed memory or does not."""
    import torch

    from benchmarks.contenders import Work, network, train_nfzoo
    from nfzoo.runtime.cpu import keep_freed_memory
    from nfzoo.train import run

    if not kept:
        run.keep_freed_memory = lambda: False  # which a training on a CPU calls
    elif not keep_freed_memory():
        raise RuntimeError("nothing to measure: this C library is not glibc, or its limits are set in the environment")
    what, variant, batch, size, dtype = TASKS[task]
    work = Work(torch.device("cpu"), getattr(torch, dtype))
    if what != PREPACKED:
        return train_nfzoo(variant, work, batch=batch, size=size, compiled=what == COMPILED).step
    net, images = network(variant, work, training=False).for_inference().prepack(), work.images(batch, size)

    @torch.no_grad()
    def call() -> object:
        return net(images)

    return call


def page(tasks: Sequence[str], count: int, command: str) -> str:
    """Measure all tasks, and return the page."""
    rows = []
    for task in tasks:
        workers = {}
        for name, (kept, tunables) in WAYS.items():
            arguments = ["benchmarks.systems.freed_memory", "--work", task, *(["--kept"] if kept else [])]
            workers[name] = Worker(arguments, {**os.environ, HUGE: tunables})
        for worker in workers.values():
            worker.ready()
        turns = take_turns(workers, count)
        for worker in workers.values():
            worker.close()
        print(f"{task}: {turns}", file=sys.stderr, flush=True)
        times = {name: [1e3 * turn.seconds for turn in own] for name, own in turns.items()}
        for name, own in turns.items():
            faults, peak = timing.median([turn.faults for turn in own]), max(turn.peak for turn in own)
            ratio = timing.ratio(times[OWN], times[name])
            figures = [f"{timing.median(times[name]):.1f}", f"{ratio:.2f}", f"{faults:,.0f}", f"{peak / 1e6:,.0f}"]
            rows.append([task, name, *figures])
    head = ["task", "freed memory", "ms", f"{OWN} / it", "page faults a call", "peak memory, MB"]
    table = Table("Milliseconds per step or batch", head, rows)
    note = (
        "Steps are those of `nfzoo.train`. *Kept* is what it does on a CPU: limits of `mallopt` let the C library keep "
        "what a step frees. *Huge pages* are asked for by `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, which a "
        "program cannot do for itself once it runs. Each way has a process, and the processes take turns of "
        f"{SECONDS:g} s, in {count} rounds; wall-clock medians. Peak memory is that of the whole process."
    )
    title = "# Memory that a training step frees"
    return f"{title}\n\n{datetime.date.today()}, {machine()}.\n\n    {command}\n\n{note}\n\n{table.markdown()}\n"


def main(argv: list[str] | None = None) -> int:
    """Print the page; write it where asked."""
    prog = "python -m benchmarks.systems.freed_memory"
    parser = argparse.ArgumentParser(prog=prog, description="Memory that a training step frees.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of each way (default: 9)")
    text = "; ".join(TASKS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=text)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the page there")
    parser.add_argument("--work", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        serve(lambda: prepared(options.work, kept=options.kept))
        return 0
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    command = shlex.join(["python", "-m", "benchmarks.systems.freed_memory", *(argv or sys.argv[1:])])
    text = page(options.tasks, options.rounds, command)
    publish(text, options.output, f"{datetime.date.today()}-cpu-freed-memory.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

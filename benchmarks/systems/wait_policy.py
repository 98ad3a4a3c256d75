"""Measure how OpenMP's threads should wait while nfzoo trains or answers on a CPU: alone, and beside a busy process.

    python -m benchmarks.systems.wait_policy --output benchmarks/results     # about three minutes, on an idle machine

Each policy has a process of its own, since OpenMP reads its variables once. The processes take turns: in a round each
works for a second while the others sleep. The busy process is a loop of Python. Ratios are medians over the rounds of
ratios within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import timing
from benchmarks.report import Table, machine, publish
from benchmarks.systems.turns import SECONDS, Worker, serve, take_turns

POLICIES: dict[str, dict[str, str]] = {
    "OpenMP's own": {},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
TASKS = ("training nfnet-test", "training nfnet-s0", "training nfnet-f0", "one image, nfnet-f0")


def worker(environment: dict[str, str], task: str) -> Worker:
    """Start a process under one policy."""
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return Worker(["benchmarks.systems.wait_policy", "--work", task], {**own, **environment})


def prepared(task: str) -> Callable[[], object]:
    """Return the call that a task repeats."""
    import torch

    from benchmarks.contenders import Work, network, train_nfzoo

    work = Work(torch.device("cpu"), torch.float32)
    if task == "training nfnet-test":
        return train_nfzoo("nfnet-test", work, batch=32, size=32, compiled=False).step
    if task == "training nfnet-s0":
        bf16 = work._replace(dtype=torch.bfloat16)
        return train_nfzoo("nfnet-s0", bf16, batch=128, size=48, compiled=False).step
    if task == "training nfnet-f0":
        return train_nfzoo("nfnet-f0", work, batch=8, size=64, compiled=False).step
    net, image = network("nfnet-f0", work, training=False).for_inference().prepack(), work.images(1, 192)

    @torch.no_grad()
    def call() -> object:
        return net(image)

    return call


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes busy in the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measured(task: str, rounds: int, beside: Sequence[int], *, preferred: bool) -> dict[int, dict[str, list[float]]]:
    """Return milliseconds per call of each policy in each round, alone (0) and beside one busy process (1)."""
    workers = {name: worker(environment, task) for name, environment in POLICIES.items()}
    times: dict[int, dict[str, list[float]]] = {}
    for process in workers.values():
        if preferred:
            process.prefer(True)
        process.ready()
    for others in beside:
        if preferred:
            for process in workers.values():
                process.prefer(not others)
        with busy(others):
            turns = take_turns(workers, rounds)
        times[others] = {name: [1e3 * turn.seconds for turn in own] for name, own in turns.items()}
        print(f"{task} beside {others}: {times[others]}", file=sys.stderr, flush=True)
    for process in workers.values():
        process.close()
    return times


def page(tasks: Sequence[str], rounds: int, beside: Sequence[int], command: str, *, preferred: bool) -> str:
    """Measure all tasks, and return the page."""
    own = next(iter(POLICIES))
    rows = []
    for task in tasks:
        for others, times in measured(task, rounds, beside, preferred=preferred).items():
            for name, spent in times.items():
                middle, ratio = timing.median(spent), timing.ratio(times[own], spent)
                company = {0: "", 1: "one busy process"}.get(others, f"{others} busy processes")
                rows.append([task, company, name, f"{middle:.1f}", f"{ratio:.2f}"])
    table = Table("Milliseconds per step or image", ["task", "beside", "policy", "ms", "OpenMP's own / it"], rows)
    note = (
        "Training is the step of `nfzoo.train`, eager: nfnet-test on 32 images of 32 x 32, nfnet-s0 on 128 of 48 x 48 "
        "in bfloat16, nfnet-f0 on 8 of 64 x 64. "
        "One image is of 192 x 192, by the folded and prepacked network. Each policy has a process, and the processes "
        f"take turns of {SECONDS:g} s, in {rounds} rounds; wall-clock medians."
    )
    head = f"# How threads wait\n\n{datetime.date.today()}, {machine()}.\n\n    {command}\n\n{note}\n"
    return f"{head}\n{table.markdown()}\n"


def main(argv: list[str] | None = None) -> int:
    """Print the page; write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems.wait_policy", description="How threads wait.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each policy (default: 5)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="; ".join(TASKS))
    text = "measure alone in the real-time class, so that other programs on the machine matter less; needs root"
    parser.add_argument("--real-time", action="store_true", help=text)
    text = "busy processes beside the measured one (default: 0 1)"
    parser.add_argument("--beside", type=int, nargs="+", default=(0, 1), metavar="N", help=text)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write the page there")
    parser.add_argument("--work", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work:
        serve(lambda: prepared(options.work))
        return 0
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    given = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "benchmarks.systems.wait_policy", *given])
    text = page(options.tasks, options.rounds, options.beside, command, preferred=options.real_time)
    publish(text, options.output, f"{datetime.date.today()}-cpu-wait-policy.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())

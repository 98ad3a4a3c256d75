"""Measure what a training step takes of a CPU's memory, beside what `nfzoo.train.memory` estimates.

Each case is a process of its own, which trains two steps, while a thread reads how much memory it has.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.report import Table, machine, publish

PAGE = "training-memory.md"
MIB = 1 << 20


class Case(NamedTuple):
    """Hold a training: model, images a step, their side in pixels, and what is trained."""

    model: str
    batch: int
    size: int
    tune: str = "all"


CASES = (
    Case("nfnet-f0", 2, 128),
    Case("nfnet-f0", 8, 128),
    Case("nfnet-f0", 16, 128),
    Case("nfnet-f0", 6, 192),
    Case("nfnet-f0", 8, 192, "stages:1"),
    Case("nfnet-f0", 8, 192, "head"),
    Case("nf-resnet-50", 16, 128),
    Case("nf-regnet-b0", 16, 128),
    Case("nfnet-f1", 4, 128),
)
QUICK = (Case("nfnet-test", 16, 32),)


def measure(case: Case) -> dict[str, float]:
    """Return the most memory of two steps and the estimate, in MiB, in a process without another purpose."""
    from nfzoo.train.config import TrainConfig
    from nfzoo.train.memory import step_bytes
    from nfzoo.train.run import prepared

    process, most, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], process.memory_info().rss)

    with tempfile.TemporaryDirectory() as scratch:
        config = TrainConfig(
            model=case.model,
            data="digits",
            output=f"{scratch}/run",
            pretrained=False,
            batch_size=case.batch,
            accumulation=1,
            train_size=case.size,
            tune=case.tune,
            workers=0,
            mixed_precision="no",
        )
        with prepared(config) as trainer:
            batches = trainer.pipeline.batches(0, 0)
            loaded = [next(batches) for _ in range(2)]
            trainer.learner.model.train()
            before = process.memory_info().rss
            if trainer.learner.averages is not None:  # momenta and averages, made with the trainer
                trained = 4 * sum(p.numel() for p in trainer.learner.trainable)
                before -= 2 * trained
            watching = threading.Thread(target=watch)
            watching.start()
            for batch in loaded:
                trainer.train_step([batch])
            done.set()
            watching.join()
            each, fixed = step_bytes(trainer.cfg, config, case.size)
    return {"measured": (most[0] - before) / MIB, "estimated": (case.batch * each + fixed) / MIB}


def page(cases: tuple[Case, ...], command: str) -> str:
    """Measure each case in a process, and return the page."""
    rows = []
    for case in cases:
        child = [sys.executable, "-m", "benchmarks.systems.training_memory", "--case", json.dumps(case)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(child, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["estimated"] / found["measured"]
        sides = f"{case.batch} x {case.size}"
        rows.append([case.model, sides, case.tune, *(f"{found[k]:,.0f}" for k in found), f"{ratio:.2f}"])
    header = ["model", "images x pixels", "tune", "measured, MiB", "estimated, MiB", "estimated / measured"]
    table = Table("A training step in float32, besides the parameters", header, rows)
    head = f"# Memory of a training step\n\n{datetime.date.today()}, {machine()}.\n\n    {command}\n"
    note = (
        "Measured is the most resident memory while two steps run, above that before them without momenta and\n"
        "averages. Estimated is `step_bytes` of `nfzoo.train.memory`, which does not count some tens of MiB that a\n"
        "process needs anyway. Of the memory that is free a step may take 0.7."
    )
    return f"{head}\n{note}\n\n{table.markdown()}\n"


def main(argv: list[str] | None = None) -> int:
    """Print the page; write it where asked."""
    prog = "python -m benchmarks.systems.training_memory"
    parser = argparse.ArgumentParser(prog=prog, description="What a training step takes of the memory.")
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write {PAGE} there")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.case is not None:
        print(json.dumps(measure(Case(*options.case))))
        return 0
    given = sys.argv[1:] if argv is None else argv
    publish(page(QUICK if options.quick else CASES, " ".join([prog, *given])), options.output, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

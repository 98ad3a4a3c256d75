"""Measure how long a checkpoint holds a training step up, waited for or written while training goes on.

    python -m benchmarks.systems.saving --output benchmarks/results     # two minutes

The trainer of `nfzoo train` saves to the folder given, in turn with and without `async_save`. Timed is what a step
waits.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import timing
from benchmarks.report import Table, machine, publish
from nfzoo.train.config import TrainConfig
from nfzoo.train.run import prepared

PAGE = "saving.md"
WAYS = {"waited for": False, "while training goes on": True}


def seconds(model: str, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Return what each way holds a step up, round by round, and the bytes of a checkpoint."""
    config = TrainConfig(
        model=model, data="digits", output=str(folder / "run"), pretrained=False, batch_size=8, keep_checkpoints=1
    )
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with prepared(config) as trainer:
        batches = trainer.pipeline.batches(0, 0)
        for turn in range(rounds + 1):
            for way, async_save in WAYS.items():
                trainer.train_step([next(batches)])
                trainer.saver.config = dataclasses.replace(config, async_save=async_save)
                start = time.perf_counter()
                trainer.save_state()
                held_up = time.perf_counter() - start
                trainer.saver.finish()
                if turn:  # the first round allocates the copy
                    times[way].append(held_up)
        states = folder / "run" / "checkpoints"
        return times, sum(path.stat().st_size for path in states.rglob("*") if path.is_file())


def page(model: str, folder: Path, rounds: int, command: str) -> str:
    """Time both ways in turn, and return the page."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        times, size = seconds(model, Path(scratch), rounds)
    waited = times["waited for"]
    rows = [
        [way, f"{timing.median(values):.3f}", f"{100 / timing.ratio(waited, values):.1f} %"]
        for way, values in times.items()
    ]
    title = f"What a checkpoint of {model} holds a step up ({size / 1e6:,.0f} MB)"
    table = Table(title, ["written", "s", "of waiting"], rows)
    head = f"# Saving while training goes on\n\n{datetime.date.today()}, {machine()}.\n\n    {command}\n"
    return f"{head}\nMedians of {rounds} rounds, in turn; shares are medians of ratios.\n\n{table.markdown()}\n"


def main(argv: list[str] | None = None) -> int:
    """Print the page; write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems.saving", description="What a save holds up.")
    parser.add_argument("--model", default="nfnet-f0", metavar="NAME", help="a zoo name (default: nfnet-f0)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds, after one more (default: 9)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), metavar="FOLDER", help="on the disk to save to (default: here)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write {PAGE} there")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    given = sys.argv[1:] if argv is None else argv
    text = page(
        options.model, options.folder, options.rounds, " ".join(["python -m benchmarks.systems.saving", *given])
    )
    publish(text, options.output, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

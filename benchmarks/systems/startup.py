"""Measure what a command costs that needs no torch, beside the import of torch.

    python -m benchmarks.systems.startup --output benchmarks/results     # about a minute

Each command runs in a process of its own, in turn, in several rounds. Timed are the seconds that the processor worked
for it. Ratios are medians over the rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks import timing
from benchmarks.report import Table, machine, publish

PAGE = "startup.md"
TORCH = "import torch"
COMMANDS = {
    TORCH: ["-c", "import torch"],
    "import nfzoo": ["-c", "import nfzoo"],
    "nfzoo --version": ["-m", "nfzoo", "--version"],
    "nfzoo list": ["-m", "nfzoo", "list"],
    "nfzoo info nfnet-f0": ["-m", "nfzoo", "info", "nfnet-f0"],
}


def processor_seconds(arguments: list[str]) -> float:
    """Run Python with these arguments, and return the processor time of that process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def page(rounds: int, command: str) -> str:
    """Time all commands in turn, and return the page."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            seconds = processor_seconds(arguments)
            if turn:  # the first round fills the caches
                times[name].append(seconds)
    rows = [
        [name, f"{timing.median(seconds):.2f}", f"{timing.ratio(times[TORCH], seconds):.1f}"]
        for name, seconds in times.items()
    ]
    table = Table("Processor seconds", ["command", "s", "`import torch` / it"], rows)
    head = f"# Commands that need no torch\n\n{datetime.date.today()}, {machine()}.\n\n    {command}\n"
    return f"{head}\nMedians of {rounds} rounds, in turn.\n\n{table.markdown()}\n"


def main(argv: list[str] | None = None) -> int:
    """Print the page; write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems.startup", description="What a command costs.")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds, after one more (default: 9)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write {PAGE} there")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    given = sys.argv[1:] if argv is None else argv
    text = page(options.rounds, " ".join(["python -m benchmarks.systems.startup", *given]))
    publish(text, options.output, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

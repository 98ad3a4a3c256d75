"""Whether the batch size and the epochs that `nfzoo train` chooses for small data sets train better than constants.

    python -m benchmarks.claims.run_lengths --output benchmarks/results

A small NFNet is trained from random weights on three small data sets: with batches of 32 and 15 epochs, and with what
`nfzoo.train.config.defaults` chooses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.claims.fine_tuning import COUNTS, run, write, write_digits, write_patches
from benchmarks.report import machine

CONSTANT = ["--batch-size", "32", "--epochs", "15"]
PAGE = """# Batch size and epochs for small data sets

`nfzoo train` takes the largest batch of 32, 16 and 8 images with which an epoch has 20 steps, and 15 epochs or as many
as take 500 steps. On small data sets this is compared with batches of 32 for 15 epochs, which was the default before.

- data: *few*, 100 images of the digits 5 to 9; *unbalanced*, 233 images of them, 120 to 8 of each; *patches*, 180 and
  60 crops of two photographs. Held out are 40 of each digit and 50 crops of each photograph.
- model: `nfnet-test` from random weights, images of 16 x 16 pixels, one seed. Rate and threshold are the defaults, so
  that the rate is in proportion to the batch. Figures are those of the averaged weights at the end, which are saved.
- on: {machine}
- command: `{command}`

| data | batch | epochs | steps | held-out loss | accuracy | processor time |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

{reading}
"""
READING = "(to be written)"


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.run_lengths", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/run-lengths"), metavar="FOLDER")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("few", "unbalanced"):
            write_digits(folder / name, COUNTS[name], 40)
        write_patches(folder / "patches", COUNTS["patches"], 50)
        for data in COUNTS:
            for options in (CONSTANT, []):
                began = time.process_time()
                settings = ["--model", "nfnet-test", "--data", str(folder / data), "--overwrite", "true"]
                last = run([*settings, *options], folder / "run")[-1]
                seconds = time.process_time() - began
                batch = options[1] if options else _chosen(folder / "run")
                figures = f"{last['ema_loss']:.3f} | {last['ema_accuracy']:.1%} | {seconds:.0f} s"
                lines.append(f"| {data} | {batch} | {last['epoch']} | {last['step']} | {figures} |")
                print(lines[-1], json.dumps(last), flush=True)
    command = f"python -m benchmarks.claims.run_lengths --output {arguments.output}"
    text = PAGE.format(machine=machine(), command=command, table="\n".join(lines), reading=READING)
    write(arguments.output, "run-lengths", text)
    return 0


def _chosen(folder: Path) -> str:
    lines = (folder / "train.yaml").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("batch_size:"))


if __name__ == "__main__":
    sys.exit(main())

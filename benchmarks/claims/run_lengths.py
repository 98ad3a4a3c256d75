"""Whether the batch size and the epochs that `nfzoo train` chooses for small data sets train better than constants.

    python -m benchmarks.claims.run_lengths --output benchmarks/results

A small NFNet is trained from random weights on three small data sets: with batches of 32 and 15 epochs, and with what
`nfzoo.train.config.defaults` chooses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.claims.fine_tuning import COUNTS, run, write, write_digits, write_patches
from benchmarks.report import machine
from nfzoo.train.config import strict_yaml

SEEDS = (0, 1, 2)
CONSTANT = ["--batch-size", "32", "--epochs", "15"]
PAGE = """# Batch size and epochs for small data sets

`nfzoo train` takes the largest batch of 32, 16 and 8 images with which an epoch has 20 steps, and 15 epochs or as many
as take 500 steps. On small data sets this is compared with batches of 32 for 15 epochs, which was the default before.

- data: *few*, 100 images of the digits 5 to 9; *unbalanced*, 233 images of them, 120 to 8 of each; *patches*, 180 and
  60 crops of two photographs. Held out are 40 of each digit and 50 crops of each photograph.
- model: `nfnet-test` from random weights, images of 16 x 16 pixels. Rate and threshold are the defaults, so that the
  rate is in proportion to the batch. Figures are means over seeds, whose losses stand in brackets. They are those of
  the averaged weights at the end, which are saved.
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
    record = arguments.output / "run-lengths.jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("few", "unbalanced"):
            write_digits(folder / name, COUNTS[name], 40)
        write_patches(folder / "patches", COUNTS["patches"], 50)
        done = {(row["data"], row["chosen"], row["seed"]) for row in _read(record)}
        for seed, data, chosen in itertools.product(SEEDS, COUNTS, (False, True)):
            if (data, chosen, seed) not in done:
                row = {"data": data, "chosen": chosen, "seed": seed, **_trained(folder, data, chosen, seed)}
                with record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    command = f"python -m benchmarks.claims.run_lengths --output {arguments.output}"
    write(arguments.output, "run-lengths", page(_read(record), command))
    return 0


def _trained(folder: Path, data: str, chosen: bool, seed: int) -> dict[str, Any]:
    began = time.process_time()
    settings = ["--model", "nfnet-test", "--data", str(folder / data), "--seed", str(seed), "--overwrite", "true"]
    last = run([*settings, *([] if chosen else CONSTANT)], folder / "run")[-1]
    seconds = time.process_time() - began
    figures = {"epochs": last["epoch"], "steps": last["step"], "loss": last["ema_loss"]}
    batch = strict_yaml.load((folder / "run/train.yaml").read_text(encoding="utf-8"))["batch_size"]
    return {"batch": batch, **figures, "accuracy": last["ema_accuracy"], "seconds": seconds}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def page(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """Return the result as Markdown."""
    lines = []
    for data, chosen in itertools.product(COUNTS, (False, True)):
        some = [row for row in rows if (row["data"], row["chosen"]) == (data, chosen)]
        losses = [row["loss"] for row in some]
        accuracy, seconds = (float(np.mean([row[key] for row in some])) for key in ("accuracy", "seconds"))
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        first = some[0]
        lines.append(
            f"| {data} | {first['batch']} | {first['epochs']} | {first['steps']} | {np.mean(losses):.3f} ({each}) | "
            f"{accuracy:.1%} | {seconds:.0f} s |"
        )
    return PAGE.format(machine=machine(), command=command, table="\n".join(lines), reading=READING)


if __name__ == "__main__":
    sys.exit(main())

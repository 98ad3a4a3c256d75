"""Whether a range test finds the learning rate and the AGC threshold of short trainings.

    python -m benchmarks.claims.learning_rates measure --output benchmarks/results
    python -m benchmarks.claims.learning_rates page    --output benchmarks/results

A small NFNet is trained from random weights at a grid of rates and thresholds, on three small data sets. Range tests of
the same runs then suggest a rate by several rules. The regret of a suggestion is by how much the held-out loss of a
training at it is above that of the best of the grid. `measure` appends to `find-lr.jsonl` what it lacks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.fine_tuning import COMMON, COUNTS, run, write_digits, write_patches
from nfzoo.train.config import recipes
from nfzoo.tuner import find_rates

RATES = (0.063, 0.16, 0.4, 0.025, 1.0)  # in the order of their interest
CLIPS = (0.01, 0.1, None, 0.04)
TESTED = (0.01, 0.02, 0.04, 0.08, 0.1, 0.16, None)
SEEDS = (0,)
DATA: dict[str, list[str]] = {
    "digits": ["--epochs", "3", "--batch-size", "32"],
    "unbalanced": ["--epochs", "8", "--batch-size", "16"],
    "patches": ["--epochs", "12", "--batch-size", "32"],
}


def write_data(folder: Path) -> None:
    """Write the data sets that are not embedded."""
    write_digits(folder / "unbalanced", COUNTS["unbalanced"], 40)
    write_patches(folder / "patches", COUNTS["patches"], 50)


def options(folder: Path, data: str, seed: int) -> list[str]:
    source = "digits" if data == "digits" else str(folder / data)
    common = ["--model", "nfnet-test", "--data", source, "--seed", str(seed), "--optim.ema-decay", "null"]
    return [*common, *DATA[data]]


def trained(folder: Path, data: str, seed: int, lr: float, clip: float | None) -> dict[str, Any]:
    """Train at a rate and a threshold; return the figures of the last epoch."""
    settings = ["--optim.lr", str(lr), "--optim.clip", "null" if clip is None else str(clip)]
    try:
        rows = run([*options(folder, data, seed), *settings, "--overwrite", "true"], folder / "run")
    except RuntimeError:  # not finite
        return {"loss": None, "accuracy": None}
    return {key: rows[-1][key] for key in ("loss", "accuracy")}


def measure(folder: Path, output: Path) -> None:
    """Append what is missing: range tests of all thresholds, then trainings."""
    rows = read(output)
    done = {(row["kind"], row["data"], row["seed"], row["clip"], row.get("lr")) for row in rows}

    def keep(row: dict[str, Any]) -> None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({key: value for key, value in row.items() if key not in ("rates", "losses")}, flush=True)

    for seed in SEEDS:
        for data in DATA:
            if ("test", data, seed, None, None) not in done:
                config = recipes.parse([*options(folder, data, seed), *COMMON, "--output", "unused"])
                for curve in find_rates(config, TESTED, start=5e-5, end=5.0):
                    losses = [None if loss != loss else loss for loss in curve.losses]
                    keep(
                        {
                            "kind": "test",
                            "data": data,
                            "seed": seed,
                            "clip": curve.clip,
                            "rates": curve.rates,
                            "losses": losses,
                        }
                    )
        for clip, lr, data in itertools.product(CLIPS, RATES, DATA):
            if ("run", data, seed, clip, lr) not in done:
                figures = trained(folder, data, seed, lr, clip)
                keep({"kind": "run", "data": data, "seed": seed, "clip": clip, "lr": lr, **figures})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.learning_rates", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/find-lr"), metavar="FOLDER")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder)
        measure(folder, arguments.output / "find-lr.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())

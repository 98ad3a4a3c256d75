"""Train in bf16 on a CPU: its curves beside those of float32 on the digits, and the time of a step.

    python -m benchmarks.claims.mixed_precision --output benchmarks/results

`nfnet-test` is trained for six epochs in float32 and with `--mixed-precision bf16`, with three seeds each. The runs
take turns, and processor time of one thread is counted, as other programs share the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.contenders import Work, train_nfzoo
from benchmarks.report import Table, machine, publish
from nfzoo.analysis.style import BLUE, ORANGE
from nfzoo.checkpoint.atomic import replaced
from nfzoo.train.config import recipes
from nfzoo.train.run import train

PAGE = "cpu-bf16"
SEEDS = (0, 1, 2)
EPOCHS = 6
PRECISIONS = {"no": "float32", "bf16": "bf16"}
STEPS = (("nfnet-test", 32, 128), ("nfnet-f0", 64, 8), ("nfnet-f0", 192, 8))  # model, pixels, batch


def runs(folder: Path, *, epochs: int = EPOCHS, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """Train in both precisions with every seed, and return the figures of every epoch."""
    found = []
    for seed in seeds:
        for precision in PRECISIONS:
            output = folder / f"{precision}-{seed}"
            options = ["--model", "nfnet-test", "--data", "digits", "--epochs", str(epochs), "--seed", str(seed)]
            options += ["--mixed-precision", precision, "--workers", "0", "--output", str(output)]
            with mock.patch("nfzoo.train.run_folder.training_curves"), contextlib.redirect_stdout(io.StringIO()):
                train(recipes.parse(options))
            rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            loss, held_out, accuracy = ([row[key] for row in rows] for key in ("train_loss", "loss", "accuracy"))
            found.append({"precision": precision, "seed": seed, "train": loss, "loss": held_out, "accuracy": accuracy})
            print(json.dumps({"precision": precision, "seed": seed, **rows[-1]}), file=sys.stderr, flush=True)
    return found


def step_times(steps: Sequence[tuple[str, int, int]] = STEPS, *, rounds: int = 7) -> list[list[str]]:
    """Return rows of processor milliseconds of an eager step in both precisions, taken in turn in one process."""
    timing.count_processor_time()
    device = torch.device("cpu")
    rows = []
    for model, size, batch in steps:
        calls = {
            name: train_nfzoo(model, Work(device, dtype), batch=batch, size=size, compiled=False).step
            for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
        }
        times = timing.interleave(calls, device, rounds=rounds)
        middle = [f"{1e3 * timing.median(times[name]):.0f}" for name in calls]
        rows.append([model, str(size), str(batch), *middle, f"{timing.ratio(times['float32'], times['bf16']):.2f}"])
    return rows


def curves_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Return the figures of each seed's last epoch, in float32 and bf16."""
    rows = []
    for seed in sorted({row["seed"] for row in found}):
        pair = {row["precision"]: row for row in found if row["seed"] == seed}
        cells = [f"{pair[p][key][-1]:.3f}" for key in ("train", "loss") for p in PRECISIONS]
        accuracies = [f"{100 * pair[p]['accuracy'][-1]:.2f} %" for p in PRECISIONS]
        apart = max(abs(a - b) for a, b in zip(*(pair[p]["train"] for p in PRECISIONS), strict=True))
        rows.append([str(seed), *cells, *accuracies, f"{apart:.3f}"])
    names = ("training loss", "held-out loss", "held-out accuracy")
    header = [f"{name}, {precision}" for name in names for precision in PRECISIONS.values()]
    return Table("The last epoch", ["seed", *header, "training losses apart in an epoch, at most"], rows)


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the training losses over the epochs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.8), dpi=150, layout="constrained")
    for row in found:
        bf16 = row["precision"] == "bf16"
        label = PRECISIONS[row["precision"]] if row["seed"] == min(r["seed"] for r in found) else None
        style = {"color": ORANGE if bf16 else BLUE, "ls": "--" if bf16 else "-", "label": label, "lw": 1.2}
        axes.plot(range(1, len(row["train"]) + 1), row["train"], **style)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with replaced(path) as scratch:
        figure.savefig(scratch, format="png")
    plt.close(figure)


def page(found: Sequence[Mapping[str, Any]], steps: Sequence[Sequence[str]], command: str) -> str:
    """Return the result as Markdown."""
    header = ["model", "pixels", "batch", "float32, ms", "bf16, ms", "float32 / bf16"]
    note = "Processor time of the eager step of `nfzoo.train` on one thread, in turn; medians over the rounds."
    times = Table("A training step", header, steps, note)
    epochs = len(found[0]["train"])
    head = (
        f"# Training in bf16 on a CPU\n\n{machine()}; other programs ran on the same cores.\n\n    {command}\n\n"
        f"`nfnet-test` on the 1,438 digits for training, {epochs} epochs. Parameters, AGC, momentum and "
        f"moving average are float32 in both.\n\n![Training losses over the epochs]({PAGE}.png)\n"
    )
    return f"{head}\n{curves_table(found).markdown()}\n\n{times.markdown()}\n"


def main(argv: list[str] | None = None) -> int:
    """Run all, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"write {PAGE}.md and {PAGE}.png there")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of each run (default: {EPOCHS})")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = runs(Path(scratch), epochs=options.epochs)
    steps = step_times()
    arguments = " ".join(sys.argv[1:] if argv is None else argv)
    if options.output is not None:
        draw(found, options.output / f"{PAGE}.png")
    publish(
        page(found, steps, f"python -m benchmarks.claims.mixed_precision {arguments}"), options.output, f"{PAGE}.md"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

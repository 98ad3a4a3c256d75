"""Tabulate peak memory and largest batch of the NFNets on TPU chips, as the TPU's own compiler estimates them.

    python -m benchmarks.systems.tpu_table --models nfnet-f0 nfnet-f1 --chips v5e v6e
    python -m benchmarks.systems.tpu_table --render     # the table alone, of what has been compiled so far

Needs `pip install 'nfzoo[tpu-aot]'`, no TPU. Every compilation is kept in `results/tpu_table.json` as soon as it is
done, and one that is kept is not repeated, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import processor
from nfzoo.checkpoint.atomic import replaced
from nfzoo.export.tpu_check import Check, compile_in_process, largest_batch
from nfzoo.export.tpu_worker import CHIPS, Request
from nfzoo.variants import variant

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODELS = tuple(f"nfnet-f{n}" for n in range(7))
GIB = 1 << 30

# Where the search begins: near its end, since a compilation takes minutes. The result does not depend on it.
START = {
    "nfnet-f0": 512,
    "nfnet-f1": 256,
    "nfnet-f2": 128,
    "nfnet-f3": 64,
    "nfnet-f4": 32,
    "nfnet-f5": 16,
    "nfnet-f6": 16,
}
"""First batch of the training step on v5e."""


def compile_missing(models: list[str], chips: list[str], steps: list[str], timeout: float) -> None:
    """Run the searches whose compilations are not all there."""
    for model in models:
        for step in steps:
            for chip in chips:
                # v6e has twice the memory of v5e, and a forward pass keeps no activations.
                start = START[model] * (4 if chip == "v6e" else 1) * (4 if step == "forward" else 1)
                largest_batch(lambda batch: one(model, chip, step, batch, timeout), start)  # noqa: B023 - used at once


def one(model: str, chip: str, step: str, batch: int, timeout: float) -> Check:
    """Compile one batch, or read its check from the file."""
    row = variant(model)
    sizes = row.preprocessing
    request = Request(
        config=row.config,
        chip=chip,
        shape=(1,) * CHIPS[chip].sides,
        batch=batch,
        size=sizes.train_size if step == "train" else sizes.test_size,
        train=step == "train",
        dtype="bfloat16",
    )
    kept = load()
    for fields in kept:
        if (fields["model"], fields["topology"], fields["step"], fields["batch"]) == (
            model,
            request.topology,
            step,
            batch,
        ):
            return fields
    start = time.monotonic()
    found = compile_in_process(request, timeout=timeout)
    print(
        f"{model} {step} {request.topology} {batch}: {found['outcome']}, {time.monotonic() - start:.0f} s", flush=True
    )
    if found["outcome"] in ("compiles", "too big"):
        save([*kept, {"model": model, **found}])
    else:
        print(found["reason"], file=sys.stderr, flush=True)
    return found


def load() -> list[dict[str, Any]]:
    path = RESULTS / "tpu_table.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def save(rows: list[dict[str, Any]]) -> None:
    with replaced(RESULTS / "tpu_table.json") as scratch:
        scratch.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def render(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown, for each model and chip, the largest batch that fits and what came before and after it."""
    lines = [
        "# Memory of the NFNets on TPU chips",
        "",
        "Estimates of libtpu, which compiled each program ahead of time for one chip; nothing ran on a TPU. Training",
        "is the whole step (forward, backward, AGC, Nesterov momentum, moving average; no SAM) at the paper's training",
        "size, forward is at its test size; bfloat16 activations, float32 parameters. Batches were tried in powers of",
        "two; near the limit the compiler recomputes activations, so memory does not grow in proportion to the batch.",
        "FLOPs are those of the compiled program, recomputation included; the step time is FLOPs over the published",
        "peak rate, which no program reaches. Models, chips and steps without a row, and batches `or more`, wait for",
        "more compilations.",
        "",
    ]
    for step in ("train", "forward"):
        table = [cells for model in MODELS for chip in CHIPS if (cells := cell(rows, model, chip, step)) is not None]
        if table:
            head = ("model", "size", "chip", "memory", "largest batch", "peak memory", "twice the batch needs at least")
            head = (*head, "FLOPs a step", "step at least", "compilation")
            lines += [f"## {'Training step' if step == 'train' else 'Forward pass'}", ""]
            lines += ["| " + " | ".join(c) + " |" for c in (head, ("---",) * len(head), *table)] + [""]
    versions = rows[-1]["versions"] if rows else {}
    lines += [
        "Every compilation is in `tpu_table.json`. Compilation times are of a busy machine and no measurement.",
        "",
        "- Command: `python -m benchmarks.systems.tpu_table`",
        f"- Machine that compiled: {processor()}, {os.cpu_count()} threads; Python {platform.python_version()}",
        f"- Versions: {', '.join(f'{k} {v}' for k, v in versions.items())}",
        "",
    ]
    return "\n".join(lines)


def cell(rows: list[dict[str, Any]], model: str, chip: str, step: str) -> tuple[str, ...] | None:
    """Return a line of the table, `None` if no batch compiles."""
    mine = [r for r in rows if (r["model"], r["topology"].split(":")[0], r["step"]) == (model, chip, step)]
    good = max((r for r in mine if r["outcome"] == "compiles"), key=lambda r: r["batch"], default=None)
    if good is None:
        return None
    bad = next((r for r in mine if r["outcome"] == "too big" and r["batch"] == 2 * good["batch"]), None)
    return (
        model,
        str(good["size"]),
        chip,
        f"{good['hbm'] / GIB:.2f} GiB",
        str(good["batch"]) if bad else f"{good['batch']} or more",
        f"{good['peak'] / GIB:.2f} GiB",
        f"{bad['needed'] / GIB:.2f} GiB" if bad else "not tried",
        f"{good['flops'] / 1e12:.3g} T",
        f"{1e3 * good['shortest_step']:.1f} ms",
        f"{sum(good['seconds'].values()):.0f} s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--chips", nargs="+", choices=("v5e", "v6e"), default=["v5e", "v6e"])
    parser.add_argument("--steps", nargs="+", choices=("train", "forward"), default=["train"])
    parser.add_argument("--timeout", type=float, default=120.0, help="minutes for each compilation")
    parser.add_argument("--render", action="store_true", help="compile nothing")
    options = parser.parse_args()
    if not options.render:
        compile_missing(options.models, options.chips, options.steps, options.timeout)
    with replaced(RESULTS / "tpu_table.md") as scratch:
        scratch.write_text(render(load()), encoding="utf-8")


if __name__ == "__main__":
    main()

"""XLA: each block of a stage written out, or one block in a loop over stacked parameters (torch-xla's `scan`)?

    python -m benchmarks.xla_scan --output benchmarks/results     # in .venv-xla; an hour; `--cases 0` is short

The equal blocks of a stage differ in parameters and `beta` alone, so a loop can hold one of them and run it with each
block's slice of the stacked parameters and betas. For every case, in a process of its own, in turns:

- *operations*: of the StableHLO program; *MB*: its text;
- *trace*: processor seconds in Python until the program stands;
- *compile*: processor seconds of XLA's compiler, and *ratio* the median of written out over looped, of each turn;
- *run*: seconds of the compiled program, and its ratio;
- *distance*: relative, of the loss and the largest of any gradient, from the program written out.

Training is the loss and its gradient. Parameters are separate tensors, as everywhere in nfzoo, and stacked within the
program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import processor
from nfzoo.checkpoint.atomic import replaced
from nfzoo.model import apply, init, plan, run_block
from nfzoo.runtime.device import backend
from nfzoo.step import cross_entropy
from nfzoo.variants import VARIANTS

CASES = (("nfnet-f1", 8), ("nfnet-f6", 8), ("nfnet-f6", 1))  # model, and by what its widths are divided
IMAGE, BATCH = 64, 2


def scanned_apply(cfg: Any, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """`nfzoo.model.apply` without noise, equal blocks that follow each other in one loop."""
    from torch_xla.experimental.scan import scan  # pyright: ignore[reportMissingImports]

    def kind(block: Any) -> Any:
        return block.fn, tuple(spec.shape for spec in block.specs.values())

    for _, group in itertools.groupby(plan(cfg), kind):
        blocks = list(group)
        if len(blocks) == 1:
            x = run_block(blocks[0], params, x)
            continue
        first = blocks[0]
        stacked = {k: torch.stack([params[f"{b.name}.{k}"] for b in blocks]) for k in first.specs}
        betas = torch.tensor([b.beta for b in blocks]).to(x.device)

        def step(carry: Tensor, each: Any, fn: Any = first.fn) -> tuple[Tensor, tuple[()]]:
            local, beta = each
            return fn(local, carry, beta, None), ()

        x, _ = scan(step, x, (stacked, betas), is_fn_pure=True)
    return x


def measure(name: str, narrower: int, training: bool, scanned: bool, keep: Path | None) -> dict[str, Any]:
    """One case in this process; its gradients go to `keep`, or are compared with those that lie there."""
    chosen = backend("xla")
    chosen.start()
    import torch_xla.core.xla_model as xm  # pyright: ignore[reportMissingImports]
    import torch_xla.debug.metrics as metrics  # pyright: ignore[reportMissingImports]

    cfg: Any = VARIANTS[name].config
    cfg = cfg.replace(
        widths=tuple(w // narrower for w in cfg.widths),
        group_width=cfg.group_width // narrower,
        stem_width=cfg.stem_width // narrower,
        num_classes=10,
    )
    g = torch.Generator().manual_seed(0)
    params = {
        # Skip gains and classifier start at 0, where most gradients are 0 too.
        key: (0.1 * torch.ones_like(p) if key.endswith("skip_gain") else p).to(chosen.device).requires_grad_(training)
        for key, p in init(cfg, generator=g).items()
    }
    with torch.no_grad():
        params["head.weight"].copy_(0.1 * torch.randn(params["head.weight"].shape, generator=g))
    x = torch.randn((BATCH, 3, IMAGE, IMAGE), generator=g).to(chosen.device)
    labels = (torch.arange(BATCH) % 10).to(chosen.device)
    forward = scanned_apply if scanned else apply

    def program() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            loss = cross_entropy(forward(cfg, params, x), labels)
        return [loss.detach(), *(torch.autograd.grad(loss, list(params.values())) if training else ())]

    def compiled() -> tuple[int, float]:
        data = metrics.metric_data("CompileTime")
        return (0, 0.0) if data is None else (data[0], data[1] / 1e9)

    chosen.synchronize()
    start = processor_seconds()
    outputs = program()
    traced = processor_seconds() - start
    text = xm.get_stablehlo(outputs)
    before, start = compiled(), processor_seconds()
    chosen.synchronize()
    first_run = processor_seconds() - start
    programs = compiled()[0] - before[0]
    runs, used = [], []
    for _ in range(3):
        again = program()
        begin, start = time.perf_counter(), processor_seconds()
        chosen.synchronize()
        runs.append(time.perf_counter() - begin)
        used.append(processor_seconds() - start)
        del again
    found = [t.cpu() for t in outputs]
    distance = None
    if keep is not None and keep.exists():
        expected = torch.load(keep)
        distance = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, expected, strict=True))
    elif keep is not None:
        torch.save(found, keep)
    return {
        "operations": sum(" = " in line for line in text.splitlines()),
        "bytes": len(text),
        "trace": traced,
        "compile": first_run - statistics.median(used),
        "programs": programs,
        "run": statistics.median(runs),
        "distance": distance,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def processor_seconds() -> float:
    """Of this process, all threads, so that other work on the machine counts less."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def turn(case: tuple[str, int, bool], scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Written out, then looped, each in a process of its own."""
    name, narrower, training = case
    keep = scratch / f"{name}-{narrower}-{training}.pt"
    keep.unlink(missing_ok=True)
    found = []
    for scanned in (False, True):
        command = [sys.executable, "-m", "benchmarks.xla_scan", "--one", name, str(narrower), "--keep", str(keep)]
        command += ["--training"] * training + ["--scanned"] * scanned
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PJRT_DEVICE": "CPU"})
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(" ".join(command[3:]), found[-1], file=sys.stderr, flush=True)
    keep.unlink()
    return found[0], found[1]


def row(case: tuple[str, int, bool], turns: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Two lines of the table: written out, looped."""
    name, narrower, training = case
    label = f"{name}{f', width / {narrower}' if narrower > 1 else ''}, {'training' if training else 'forward'}"
    lines = []
    for i, way in enumerate(("written out", "loop")):
        every = [pair[i] for pair in turns]
        middle = {key: statistics.median(e[key] for e in every) for key in ("trace", "compile", "run")}
        ratio = {key: statistics.median(a[key] / b[key] for a, b in turns) for key in ("compile", "run")}
        lines.append(
            f"| {label} | {way} | {every[0]['operations']:,} | {every[0]['bytes'] / 1e6:.2f} | {middle['trace']:.1f} | "
            f"{middle['compile']:.1f} | {'' if i == 0 else format(ratio['compile'], '.2f')} | {middle['run']:.2f} | "
            f"{'' if i == 0 else format(ratio['run'], '.2f')} | "
            f"{'' if every[0]['distance'] is None else format(max(e['distance'] for e in every), '.0e')} |"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xla_scan", description=description)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cases", type=int, nargs="*", default=list(range(len(CASES))), help="which rows of CASES")
    parser.add_argument("--output", type=Path, help="a folder for xla_scan.md")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "NARROWER"), help=argparse.SUPPRESS)
    for option in ("--training", "--scanned"):
        parser.add_argument(option, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.training, args.scanned, args.keep)))
        return 0
    import tempfile

    import torch_xla  # pyright: ignore[reportMissingImports]

    cases = [(*CASES[i], training) for i in args.cases for training in (False, True)]
    turns: dict[Any, list[Any]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.turns):
            for case in cases:
                turns[case].append(turn(case, Path(scratch)))
    page = [
        f"# {description}",
        "",
        *(__doc__ or "").split("\n\n", 2)[2].rstrip().splitlines(),
        "",
        f"- images: {BATCH} of {IMAGE} pixels; medians of {args.turns} turns",
        f"- on: {processor()}, {os.cpu_count()} cores visible; {platform.system()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, torch-xla {torch_xla.__version__} on the CPU, "
        f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}",
        f"- command: `python -m benchmarks.xla_scan {' '.join(argv if argv is not None else sys.argv[1:])}`",
        "",
        "| case | | operations | MB | trace, s | compile, s | ratio | run, s | ratio | distance |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(line for case in cases for line in row(case, turns[case])),
        "",
    ]
    print("\n".join(page))
    if args.output:
        with replaced(args.output / "xla_scan.md") as path:
            path.write_text("\n".join(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

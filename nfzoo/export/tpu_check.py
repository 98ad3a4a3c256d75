"""Compile a model for a TPU that is not here, and report its memory there and the largest batch that fits.

Each compilation runs in a process of its own, `nfzoo.export.tpu_worker`, with the compiler of a real TPU. The figures
are that compiler's estimates: nothing has run on the chip. Needs `pip install 'nfzoo[tpu-aot]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nfzoo import __version__
from nfzoo.checkpoint.model_folder import CONFIG_FILE, read_description
from nfzoo.config import MAX_SIZE, ModelConfig, Preprocessing
from nfzoo.errors import CheckpointError, ConfigError
from nfzoo.export.tpu_worker import CHIPS, ENVIRONMENT, REQUIRED, Request
from nfzoo.model import parameter_count
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped
from nfzoo.variants import variant

TIMEOUT = 30.0  # minutes; NFNet-F6's training step takes its time on a few cores
WORKER = (sys.executable, "-m", "nfzoo.export.tpu_worker")

_GIB = 1 << 30

Check = dict[str, Any]
"""A request and the compiler's answer, with the keys that `--json` writes.

The request's are `topology`, `chips`, `step`, `batch`, `size`, `dtype`. `outcome` is `compiles`, `too big` for the
chip's memory, `refused` for any other error of the compiler, `crashed` or `timed out`. `reason` is one line, of every
outcome but `compiles`. The other keys are those of `tpu_worker.compile_for_tpu`.
"""


# ---------------------------------------------------------------- one compilation


def check_installed() -> None:
    """Raise a `ConfigError` with the remedy if a package of the extra is missing."""
    program.check_packages("this", REQUIRED, "tpu-aot")


def compile_in_process(request: Request, *, timeout: float = TIMEOUT, log: Path | None = None) -> Check:
    """Compile one request in a process of its own, which has ended when this returns or raises.

    Args:
        timeout: minutes for the whole of it.
        log: file to append to what the compiler prints.
    """
    with tempfile.TemporaryFile() if log is None else log.open("a+b") as errors:
        begin = errors.seek(0, os.SEEK_END)
        command, environment = [*WORKER, str(os.getpid())], {**os.environ, **ENVIRONMENT}
        pipe = subprocess.PIPE
        # In a group of its own, which ends with it: what the compiler may have started too.
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, env=environment, start_new_session=True
        ) as process:
            try:
                output = process.communicate(request.to_json().encode(), timeout=60 * timeout)[0]
            except subprocess.TimeoutExpired:
                reason = f"not done after {timeout:g} minutes; allow more with --timeout"
                return {**request.describe(), "outcome": "timed out", "reason": reason}
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        try:
            answer = json.loads(output)
        except ValueError:  # nothing, or what a dying process had written of it
            errors.seek(begin)
            printed = errors.read().decode(errors="replace")
            answer = {"outcome": "crashed", "reason": _ending(process.returncode) + _last_line(printed)}
    return {**request.describe(), **answer}


def _ending(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the compiler was killed, as when the memory of this machine gives out"
    if status < 0:
        return f"the compiler crashed ({signal.Signals(-status).name})"
    return f"the compiler's process ended with status {status}"


def _last_line(printed: str) -> str:
    # The last line of a traceback of jax is an advertisement of a switch, after a rule.
    lines = [line.strip() for line in printed.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("---", "For simplicity, JAX"))]
    return f": {kept[-1]}" if kept else ""


# ---------------------------------------------------------------- the largest batch


def next_batch(fits: dict[int, bool], start: int, *, multiple: int | None = None, chips: int = 1) -> int | None:
    """Return the batch to try next in the search for the largest that fits, `None` at the search's end.

    `start` is doubled until a batch is too big, or halved until one fits. With `multiple` the gap is then bisected down
    to neighbouring multiples of it.

    Args:
        fits: batch -> whether it fits, of all batches tried so far.
        start: the first batch, a multiple of `chips`.
        multiple: a multiple of `chips`.
        chips: every batch is a multiple of it.
    """
    good = max((batch for batch, fit in fits.items() if fit), default=0)
    bad = min((batch for batch, fit in fits.items() if not fit), default=MAX_SIZE + 1)
    if bad > MAX_SIZE and 2 * good <= MAX_SIZE:
        return 2 * good or start
    if not good:
        return bad // 2 // chips * chips or None
    if multiple is None:
        return None
    first, last = good // multiple + 1, (bad - 1) // multiple
    return (first + last) // 2 * multiple if first <= last else None


def largest_batch(
    check: Callable[[int], Check], start: int, *, multiple: int | None = None, chips: int = 1
) -> list[Check]:
    """Check batches in the order of `next_batch`, up to an outcome that says nothing about memory."""
    tried: list[Check] = []
    while True:
        fits = {c["batch"]: c["outcome"] == "compiles" for c in tried}
        batch = next_batch(fits, start, multiple=multiple, chips=chips)
        if batch is None or (tried and tried[-1]["outcome"] not in ("compiles", "too big")):
            return tried
        tried.append(check(batch))


def best(checks: Sequence[Check]) -> Check | None:
    """Return the check of the largest batch that compiles, `None` if none does."""
    return max((c for c in checks if c["outcome"] == "compiles"), key=lambda c: c["batch"], default=None)


# ---------------------------------------------------------------- the report


def report(check: Check, *, name: str, parameters: int, tried: Sequence[Check] = ()) -> str:
    """Return a check as lines of text, followed by those that the search for the largest batch tried."""
    chip = CHIPS[check["topology"].partition(":")[0]]
    kind = "training step" if check["step"] == "train" else "forward pass"
    compiles = check["outcome"] == "compiles"
    rows = [
        ("model", f"{name}, {parameters / 1e6:.1f} M parameters"),
        ("step", f"{kind}, {check['batch']:,} images of {check['size']} x {check['size']} pixels"),
        ("numbers", f"{check['dtype']} activations, float32 parameters"),
        ("topology", f"{check['topology']}, {_many(check['chips'], 'chip')} with {_gib(chip.hbm)} for programs"),
        ("result", "compiles" if compiles else _result(check)),
    ]
    if compiles:
        rate = float(f"{check['batch'] / check['shortest_step']:.3g}")
        listed = [f"{_many(c['count'], n)} of {c['bytes'] / 1e6:,.1f} MB" for n, c in check["collectives"].items()]
        least = 1e3 * check["shortest_step"]
        rows += [
            ("peak memory", f"{_gib(check['peak'])} a chip, {check['peak'] / chip.hbm:.0%} (estimate)"),
            ("", f"{_gib(check['arguments'])} arguments, up to {_gib(check['temporaries'])} temporaries"),
            ("FLOPs", f"{check['flops'] / 1e12:.3g} T a chip and step"),
            ("step time", f"at least {least:.3g} ms at the published {chip.peak / 1e12:g} TFLOP/s"),
            ("", f"of bfloat16, which is at most {rate:,.0f} images/s (estimate)"),
            ("collectives", ", ".join(listed) or "none"),
        ]
    if seconds := check.get("seconds"):
        rows.append(("compilation", ", ".join(f"{v:.0f} s to {k}" for k, v in seconds.items())))
    if versions := check.get("versions"):
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
    if tried:
        largest = best(tried)
        rows.append(("largest", "none fits" if largest is None else f"{largest['batch']:,} images (estimate)"))
        rows += [("", f"{c['batch']:,}: {_result(c)}") for c in tried]
    return "\n".join(f"{key + ':' if key else '':<13}{escaped(value)}" for key, value in rows)


def _result(check: Check) -> str:
    if check["outcome"] == "compiles":
        return f"compiles, {_gib(check['peak'])}"
    if check["outcome"] == "too big":
        return f"too big: needs at least {_gib(check['needed'])} a chip, which has {_gib(check['available'])}"
    return f"{check['outcome']}: {check['reason']}"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / (1 << 20):.1f} MiB"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


# ---------------------------------------------------------------- the command


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(
        prog="nfzoo tpu-check",
        description="Compile a model for a TPU, with no TPU, and say what memory it would take there.\n"
        "The compiler is the real one; its figures are estimates.\n\n"
        "examples:\n"
        "  nfzoo tpu-check nfnet-f1 --topology v5e:1x1 --batch 128 --train\n"
        "  nfzoo tpu-check nf-resnet-50 --topology v4:2x2x1 --batch 1024 --train --largest",
        epilog="exit status: 0 it compiles, 1 it does not or the compiler came to no end, 2 bad input",
    )
    text = "a name from `nfzoo list`, a checkpoint folder or its weight file"
    parser.add_argument("model", metavar="MODEL", help=text)
    parser.add_argument(
        "--topology",
        required=True,
        type=_topology,
        metavar="CHIP:SHAPE",
        help="the chips, such as v5e:1x1, v6e:2x2, v4:2x2x1, v5p:2x2x2; the batch is divided among them",
    )
    parser.add_argument(
        "--batch", required=True, type=program.positive_int, metavar="N", help="images in a step, over all chips"
    )
    parser.add_argument("--train", action="store_true", help="the whole training step, not the forward pass alone")
    parser.add_argument(
        "--size",
        type=program.positive_int,
        metavar="N",
        help="side of the input in pixels (default: the model's, for --train or not)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the activations (default: bfloat16)"
    )
    parser.add_argument(
        "--largest", action="store_true", help="look for the largest batch that fits, from --batch on by factors of two"
    )
    text = "with --largest: to the nearest multiple of N"
    parser.add_argument("--multiple", type=program.positive_int, metavar="N", help=text)
    text = f"for each compilation (default: {TIMEOUT:g})"
    parser.add_argument("--timeout", type=_minutes, default=TIMEOUT, metavar="MINUTES", help=text)
    parser.add_argument("--log", type=Path, metavar="PATH", help="write there what the compiler prints")
    program.add_output_options(parser, word_is_file=True)
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes")
    return value


def _topology(text: str) -> tuple[str, tuple[int, ...]]:
    """Read `v5e:2x2` as `("v5e", (2, 2))`."""
    chip, _, shape = text.partition(":")
    if chip not in CHIPS:
        raise argparse.ArgumentTypeError(f"{text!r}: no chip is called {chip!r}; known: {', '.join(CHIPS)}")
    sides = CHIPS[chip].sides
    example = f"{chip}:{'x'.join('221'[:sides])}"
    if not re.fullmatch(rf"[0-9]{{1,3}}(x[0-9]{{1,3}}){{{sides - 1}}}", shape):
        raise argparse.ArgumentTypeError(f"{text!r} does not give {sides} sides, as in {example}")
    lengths = tuple(map(int, shape.split("x")))
    if any(side == 0 or (side % 2 and side > 1) for side in lengths):
        raise argparse.ArgumentTypeError(f"{text!r}: a side is 1 or even, as in {example}")
    return chip, lengths


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 if it compiles, 1 if it does not or time or disk ran out, 2 for bad input."""
    return program.run_parsed(_parser(), argv, _main)


def _main(options: argparse.Namespace) -> int:
    chip, shape = options.topology
    name, config, preprocessing = _model(options.model)
    default = preprocessing.train_size if options.train else preprocessing.test_size
    request = Request(
        config=config,
        chip=chip,
        shape=shape,
        batch=options.batch,
        size=options.size or default,
        train=options.train,
        dtype=options.dtype,
    )
    _check_division(request, options)
    for path in (options.log, None if options.json in (None, "-") else Path(options.json)):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise ConfigError(f"{str(path)!r} cannot be written: it is a folder, or its folder does not exist")
    check_installed()

    def check(batch: int) -> Check:
        title = f"{escaped(name)}, {'train' if request.train else 'forward'}, batch {batch}, {request.topology}"
        if not options.quiet:
            print(f"{title}: compiling", file=sys.stderr, flush=True)
        answer = compile_in_process(dataclasses.replace(request, batch=batch), timeout=options.timeout, log=options.log)
        if options.largest and not options.quiet:
            print(f"{title}: {_result(answer)}", file=sys.stderr, flush=True)
        return answer

    if options.largest:
        tried = largest_batch(check, request.batch, multiple=options.multiple, chips=request.chips)
    else:
        tried = [check(request.batch)]
    largest = best(tried)
    chosen = largest or tried[-1]
    fields = {"model": name, "nfzoo": __version__, "estimate": True, **chosen}
    if options.largest:
        fields |= {"largest": largest and largest["batch"], "tried": tried}
    searched = tried if options.largest else ()
    text = report(chosen, name=name, parameters=parameter_count(config), tried=searched)
    program.write_result(options, fields, text)
    return 0 if largest and all(c["outcome"] in ("compiles", "too big") for c in tried) else 1


def _check_division(request: Request, options: argparse.Namespace) -> None:
    if options.multiple is not None and not options.largest:
        raise ConfigError("--multiple goes with --largest")
    for option, value in (("--batch", request.batch), ("--multiple", options.multiple)):
        if value is not None and value % request.chips:
            raise ConfigError(
                f"{option} {value} cannot be divided among {request.chips} chips; give a multiple of that"
            )


def _model(source: str) -> tuple[str, ModelConfig, Preprocessing]:
    """Read a zoo name or a checkpoint; what exists on disk comes first."""
    path = Path(source)
    if not path.exists():
        row = variant(source)
        return row.name, row.config, row.preprocessing
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        raise CheckpointError(f"{path} is neither a checkpoint folder nor a .safetensors file")
    described = read_description(path / CONFIG_FILE if path.is_dir() else path)
    return described.name or path.resolve().name, described.config, described.preprocessing


if __name__ == "__main__":
    sys.exit(main())

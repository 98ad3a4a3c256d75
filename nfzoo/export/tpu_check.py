"""Compile a model for a TPU that is not here: report the memory it takes there, and the largest batch that fits.

The compiler is the one of a real TPU; it runs in a process of its own, see `nfzoo.export.tpu_compile`. Its figures are
estimates: nothing has run on the chip. Needs `pip install 'nfzoo[tpu-aot]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nfzoo import __version__
from nfzoo.checkpoint.model_folder import CONFIG_FILE, read_description
from nfzoo.config import ModelConfig, Preprocessing
from nfzoo.errors import CheckpointError, ConfigError, printable
from nfzoo.export.tpu_chips import CHIPS, Request
from nfzoo.export.tpu_compile import TIMEOUT, Check, best, check_installed, compile_apart, largest_batch
from nfzoo.model import parameter_count
from nfzoo.runtime import program
from nfzoo.variants import variant

_GIB = 1 << 30


# ---------------------------------------------------------------- the report


def report(check: Check, *, name: str, tried: Sequence[Check] = ()) -> str:
    """Return a check as lines of text; `tried` are those of the search for the largest batch."""
    request = check.request
    chip = CHIPS[request.chip]
    kind = "training step" if request.train else "forward pass"
    rows = [
        ("model", f"{name}, {parameter_count(request.config) / 1e6:.1f} M parameters"),
        ("step", f"{kind}, {request.batch:,} images of {request.size} x {request.size} pixels"),
        ("numbers", f"{request.dtype} activations, float32 parameters"),
        ("topology", f"{request.topology}, {_many(request.chips, 'chip')} with {_gib(chip.hbm)} for programs"),
        ("result", "compiles" if check.outcome == "compiles" else _result(check)),
    ]
    if check.outcome == "compiles":
        assert check.peak is not None
        assert check.arguments is not None
        assert check.temporaries is not None
        assert check.flops is not None
        assert check.shortest_step is not None
        rate = float(f"{request.batch / check.shortest_step:.3g}")
        listed = [f"{_many(c['count'], n)} of {c['bytes'] / 1e6:,.1f} MB" for n, c in check.collectives.items()]
        rows += [
            ("peak memory", f"{_gib(check.peak)} a chip, {check.peak / chip.hbm:.0%} (estimate)"),
            ("", f"{_gib(check.arguments)} arguments, up to {_gib(check.temporaries)} temporaries"),
            ("FLOPs", f"{check.flops / 1e12:.3g} T a chip and step"),
            ("step time", f"at least {1e3 * check.shortest_step:.3g} ms at the published {chip.peak / 1e12:g} TFLOP/s"),
            ("", f"of bfloat16, which is at most {rate:,.0f} images/s (estimate)"),
            ("collectives", ", ".join(listed) or "none"),
        ]
    if check.seconds:
        rows.append(("compilation", ", ".join(f"{v:.0f} s to {k}" for k, v in check.seconds.items())))
    if check.versions:
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in check.versions.items())))
    if tried:
        found = best(tried)
        rows.append(("largest", "none fits" if found is None else f"{found.request.batch:,} images (estimate)"))
        rows += [("", f"{c.request.batch:,}: {_result(c)}") for c in tried]
    return "\n".join(f"{key + ':' if key else '':<13}{printable(value)}" for key, value in rows)


def _result(check: Check) -> str:
    if check.outcome == "compiles":
        return f"compiles, {_gib(check.peak or 0)}"
    if check.outcome == "too big":
        return f"too big: needs at least {_gib(check.needed or 0)} a chip, which has {_gib(check.available or 0)}"
    return f"{check.outcome}: {check.reason}"


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
    parser.add_argument(
        "model", metavar="MODEL", help="a name from `nfzoo list`, a checkpoint folder or its weight file"
    )
    parser.add_argument(
        "--topology",
        required=True,
        type=_topology,
        metavar="CHIP:SHAPE",
        help="the chips, such as v5e:1x1, v6e:2x2, v4:2x2x1, v5p:2x2x2; the batch is divided among them",
    )
    parser.add_argument(
        "--batch",
        required=True,
        type=program.positive_int,
        metavar="N",
        help="images in a step, over all chips together",
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
    parser.add_argument(
        "--multiple", type=program.positive_int, metavar="N", help="with --largest: to the nearest multiple of N"
    )
    parser.add_argument(
        "--timeout",
        type=_minutes,
        default=TIMEOUT,
        metavar="MINUTES",
        help=f"for each compilation (default: {TIMEOUT:g})",
    )
    parser.add_argument("--json", metavar="PATH", help="write the result there as JSON too; - prints it instead")
    parser.add_argument("--log", type=Path, metavar="PATH", help="write there what the compiler prints")
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
    """Read a topology: `v5e:2x2` is `("v5e", (2, 2))`."""
    chip, _, shape = text.partition(":")
    if chip not in CHIPS:
        raise argparse.ArgumentTypeError(f"{text!r}: no chip is called {chip!r}; known: {', '.join(CHIPS)}")
    sides = CHIPS[chip].sides
    example = f"{chip}:{'x'.join('221'[:sides])}"
    if not re.fullmatch(rf"[0-9]{{1,3}}(x[0-9]{{1,3}}){{{sides - 1}}}", shape):
        raise argparse.ArgumentTypeError(f"{text!r} does not give {sides} sides, as in {example}")
    found = tuple(map(int, shape.split("x")))
    if any(side == 0 or (side % 2 and side > 1) for side in found):
        raise argparse.ArgumentTypeError(f"{text!r}: a side is 1 or even, as in {example}")
    return chip, found


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 when it compiles, 1 when it does not, or ran out of time or disk, 2 for bad input."""
    return program.run("nfzoo tpu-check", lambda: _main(_parser().parse_args(argv)))


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
        asked = dataclasses.replace(request, batch=batch)
        title = f"{name}, {'train' if asked.train else 'forward'}, batch {batch}, {asked.topology}"
        print(f"{title}: compiling, which takes minutes", file=sys.stderr, flush=True)
        found = compile_apart(asked, timeout=options.timeout, log=options.log)
        if options.largest:
            print(f"{title}: {_result(found)}", file=sys.stderr, flush=True)
        return found

    tried: list[Check] = []
    if options.largest:
        tried = largest_batch(check, request.batch, multiple=options.multiple, chips=request.chips)
        found = best(tried) or tried[-1]
    else:
        found = check(request.batch)
    _print(options.json, found, name=name, tried=tried)
    undecided = any(c.outcome not in ("compiles", "too big") for c in tried)
    return 0 if found.outcome == "compiles" and not undecided else 1


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
    found = read_description(path / CONFIG_FILE if path.is_dir() else path)
    return found.name or path.resolve().name, found.config, found.preprocessing


def _print(target: str | None, found: Check, *, name: str, tried: Sequence[Check]) -> None:
    fields: dict[str, Any] = {"model": name, "nfzoo": __version__, "estimate": True, **found.to_dict()}
    if tried:
        largest = best(tried)
        fields["largest"] = None if largest is None else largest.request.batch
        fields["tried"] = [c.to_dict() for c in tried]
    program.write_result(target, fields, report(found, name=name, tried=tried))


if __name__ == "__main__":
    sys.exit(main())

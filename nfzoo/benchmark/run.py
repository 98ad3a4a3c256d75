"""`nfzoo benchmark`: all ways to run a model on this machine's processor, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nfzoo import from_pretrained
from nfzoo.analysis.figures import new_figure
from nfzoo.analysis.style import check_png
from nfzoo.benchmark.contenders import CONTENDERS, PRECISIONS, chosen
from nfzoo.benchmark.figures import times_figure
from nfzoo.benchmark.images import images_of, random_images
from nfzoo.benchmark.measure import Result, compare, facts
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped, table

FORMATS = tuple(dict.fromkeys(contender.format for contender in CONTENDERS))
_RANDOM = 8  # images


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the ways to run a model: `nfzoo benchmark`."""
    parser = program.Parser(
        prog="nfzoo benchmark",
        description="Run a model on the CPU in every way that is installed, and compare time, accuracy and size.\n\n"
        "formats, each in float32 and, where it has them, in bf16 and int8:\n"
        "  eager      the model as it was trained; its float32 is what the others are compared with\n"
        "  folded     for_inference(), plain convolutions\n"
        "  prepacked  folded, with weights laid out for the processor: what bulk uses\n"
        "  compiled   folded, with compile_blocks()\n"
        "  aoti       compiled by torch's AOTInductor to a file\n"
        "  torch      a program of torch.export\n"
        "  onnx       an ONNX file, by ONNX Runtime; needs nfzoo[export]\n"
        "  openvino   a file of OpenVINO; needs nfzoo[openvino,export]\n"
        "  litert     a file of LiteRT; needs nfzoo[litert]\n"
        "  executorch a file of ExecuTorch, by XNNPACK; needs nfzoo[executorch]\n"
        "  optimized  what optimize() chooses here\n\n"
        "example: nfzoo benchmark runs/digits --data digits --formats eager,folded,prepacked",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a zoo name, a Hub repository, a checkpoint folder or its weights"
    )
    text = "images for accuracy and distances, as `nfzoo evaluate` takes them, and for the ranges of int8 (default: "
    parser.add_argument("--data", metavar="DATA", help=f"{text}{_RANDOM} of random pixels, and no int8)")
    text = "most images of --data (default: 256)"
    parser.add_argument("--images", type=program.positive_int, default=256, metavar="N", help=text)
    text = f"some of {','.join(FORMATS)} (default: all)"
    parser.add_argument("--formats", type=lambda text: text.split(","), metavar="A,B", help=text)
    text = f"some of {','.join(PRECISIONS)} (default: all)"
    parser.add_argument("--precisions", type=lambda text: text.split(","), metavar="A,B", help=text)
    text = "images of a call (default: 1)"
    parser.add_argument("--batch-size", type=program.positive_int, default=1, metavar="N", help=text)
    text = "calls of each that are timed (default: 20)"
    parser.add_argument("--rounds", type=program.positive_int, default=20, metavar="N", help=text)
    text = "processor threads of each (default: torch's choice)"
    parser.add_argument("--threads", type=program.positive_int, metavar="N", help=text)
    text = "measure memory too: each way is made once more, in a process of its own"
    parser.add_argument("--memory", action="store_true", help=text)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the times; needs matplotlib")
    program.add_source_options(parser)
    program.add_output_options(parser, word_is_file=True)
    return program.run_parsed(parser, argv, _main, failures=(OSError, RuntimeError))


def _main(options: argparse.Namespace) -> None:
    if options.plot is not None:
        check_png(options.plot)
        program.check_writable(options.plot)
        new_figure(1, 1)
    contenders = chosen(options.formats, options.precisions)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = from_pretrained(options.model, **program.source_options(options)).float()
    data = random_images(model, _RANDOM) if options.data is None else images_of(model, options.data, options.images)

    def say(text: str) -> None:
        if not options.quiet:
            print(f"… {text}", file=sys.stderr, flush=True)

    run = {"batch": options.batch_size, "rounds": options.rounds}
    results = compare(model, contenders, data, **run, memory=options.memory, said=say)
    name = escaped(model.name or "a model without name")
    title = (
        f"{name}, {data.images.shape[-1]} pixels, batches of {options.batch_size}, {torch.get_num_threads()} thread(s)"
    )
    about = f"{title}; {len(data.images):,} images: {escaped(data.about)}"
    program.write_result(options, facts(model, data, **run, results=results), f"{about}\n{report(results)}")
    if options.plot is not None:
        times_figure(results, title, options.plot)
        print(f"wrote {escaped(str(options.plot))}")


def report(results: Sequence[Result]) -> str:
    """Return a table of what was measured, the fastest first, and a line for each way that was not."""
    measured = sorted((r for r in results if r.milliseconds is not None), key=lambda r: r.milliseconds or 0.0)
    names = ("way", "", "ms/image", "quartiles", "accuracy", "agreement", "distance", "MB", "ready in s", "load s")
    rows = [names, *map(_cells, measured)]
    if any(r.memory_megabytes is not None for r in measured):
        memory = ["MB used", *(_cell(r.memory_megabytes, ".0f") for r in measured)]
        rows = [(*row, cell) for row, cell in zip(rows, memory, strict=True)]
    rest = [f"{r.format} {r.precision} {_NOT[r.status]}: {escaped(r.reason)}" for r in results if r.reason]
    return "\n".join([table(rows, "<<>>>>>>>>>"[: len(rows[0])]), *rest])


_NOT = {"missing": "is left out", "failed": "failed", "measured": "was measured but for a part"}


def _cell(value: float | None, format: str) -> str:
    return "" if value is None else f"{value:{format}}"


def _cells(r: Result) -> tuple[str, ...]:
    return (
        r.format,
        r.precision,
        _cell(r.milliseconds, ".3f"),
        f"{r.low:.3f} to {r.high:.3f}",
        _cell(r.accuracy, ".2%"),
        _cell(r.agreement, ".2%"),
        _cell(r.distance, ".1e"),
        _cell(r.megabytes, ".1f"),
        _cell(r.make_seconds, ".1f"),
        _cell(r.load_seconds, ".2f"),
    )

"""The command `nfzoo evaluate`, also as `accelerate launch -m nfzoo.evaluate MODEL --data FOLDER`."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from nfzoo.evaluate.accuracy import evaluate, table
from nfzoo.runtime import program
from nfzoo.runtime.device import processes


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(
        prog="nfzoo evaluate",
        description="Top-1 and top-5 accuracy of a model on a folder of images.\n\n"
        "examples:\n"
        "  nfzoo evaluate nfnet-f0 --data imagenet/val --json evaluation.json\n"
        "  accelerate launch -m nfzoo.evaluate runs/pets --data pets/val",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a zoo name, a Hub repository, a checkpoint folder or its weight file")
    add(
        "--data",
        required=True,
        metavar="FOLDER",
        help="one subfolder of images per class, named as the model's labels (ImageNet's: or by WordNet id); or with "
        "such folders in train/ and val/, of which val/ is taken; or tar shards, parquet files, hub:ORG/NAME; or "
        "'digits', those that training holds out",
    )
    add("--size", type=program.positive_int, metavar="N", help="side of the input in pixels (default: the model's)")
    images = "images at a time per process (default: 32)"
    add("--batch-size", type=program.positive_int, default=32, metavar="N", help=images)
    workers = "loader processes per process (default: the processors, up to 8)"
    add("--workers", type=program.nonnegative_int, metavar="N", help=workers)
    add("--device", help="where to compute: cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add("--json", metavar="PATH", help="write the result there as JSON too; - prints it instead")
    add("--skip-broken", action="store_true", help="leave images out that cannot be read, and name and count them")
    program.add_source_options(parser)
    add("--date", type=_date, metavar="YYYY-MM-DD", help="the day to note in the result (default: none)")
    return parser


def _date(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date such as 2026-01-31") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 for a result, 2 for bad input, 1 for a disk error."""
    return program.run("nfzoo evaluate", lambda: _main(_parser().parse_args(argv)))


def _main(options: argparse.Namespace) -> None:
    from nfzoo import from_pretrained

    if options.json not in (None, "-"):
        program.check_writable(Path(options.json))
    model = from_pretrained(options.model, **program.source_options(options))
    evaluation = evaluate(
        model,
        options.data,
        name=model.name or Path(options.model).resolve().name,
        size=options.size,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        skip_broken=options.skip_broken,
        date=options.date,
    )
    if processes(cpu=options.device == "cpu").is_main_process:
        program.write_result(options.json, evaluation.to_dict(), table(evaluation))

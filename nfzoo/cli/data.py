"""`nfzoo data check`: what a data set holds, and what is wrong with it, before a network is trained on it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nfzoo.check.report import PICTURES, check, write_sheets
from nfzoo.data.images import DIGITS
from nfzoo.data.label_files import label_files
from nfzoo.errors import DataError, LostError
from nfzoo.runtime import program
from nfzoo.runtime.device import default_workers
from nfzoo.runtime.output import escaped


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(prog="nfzoo data", description="Look at data before a network is trained on them.")
    commands = parser.add_subparsers(dest="command", metavar="VERB", required=True)
    sub = commands.add_parser(
        "check",
        help="what a data set holds, and what is wrong with it",
        description="Read every image once. Tell layout, images of each part and class, sizes and modes, and find\n"
        "images that cannot be read, copies within and across parts and classes (by their bytes), classes of fewer\n"
        "than ten images, and classes that one part alone has.\n\n"
        "Exit status: 0 if nothing was found, 1 for findings, 2 if the data cannot be read.\n\n"
        "examples:\n"
        "  nfzoo data check photos --sheet sheets\n"
        "  nfzoo data check 'shards/{000..146}.tar' --json findings.json",
    )
    add = sub.add_argument
    add("data", metavar="PATH", help="what --data of `nfzoo train` takes: a folder, tar or parquet files, hub:ORG/NAME")
    program.add_label_options(sub)
    text = "multi-label: the table gives each image a set of labels, as for nfzoo train (default: single-label)"
    add("--task", choices=("single-label", "multi-label"), default="single-label", help=text)
    add("--validation-labels", metavar="FILE", help="another such file, of the images that are held out")
    add("--sheet", type=Path, metavar="DIR", help=f"write a PNG there for each class, with up to {PICTURES} images")
    add(
        "--workers",
        type=program.nonnegative_int,
        metavar="N",
        help="processes that read (default: the processors, up to 8)",
    )
    program.add_output_options(sub, word_is_file=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 if nothing was found, 1 for findings, 2 if the data cannot be read or a result written."""
    return program.run_parsed(_parser(), argv, _check)


def _check(options: argparse.Namespace) -> int:
    if options.sheet is not None:
        program.check_writable(options.sheet, folder=True)
    workers = options.workers
    if workers is None:
        workers = 0 if options.data == DIGITS else default_workers(1)
    multi_label = options.task == "multi-label"
    files = label_files(options.labels, options.validation_labels, options.class_names, multi_label=multi_label)
    try:
        report = check(options.data, workers=workers, labels=files)
        sheets = 0 if options.sheet is None else write_sheets(report, options.sheet, workers=workers)
        program.write_result(options, report.to_dict(), report.text())
    except BrokenPipeError:
        raise
    except (OSError, LostError) as error:  # whose status would be that of findings
        raise DataError(f"the check came to no end: {error}") from error
    if options.sheet is not None:
        print(f"wrote {sheets:,} sheets to {escaped(str(options.sheet))}")
    return 1 if report.findings() else 0


if __name__ == "__main__":
    sys.exit(main())

"""`nfzoo data check`: what a data set holds, and what is wrong with it; `nfzoo data card`: its card for the Hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nfzoo.check.card import data_card
from nfzoo.check.report import PICTURES, Report, check, write_sheets
from nfzoo.checkpoint.atomic import replaced
from nfzoo.data.digits import DIGITS
from nfzoo.data.label_files import label_files
from nfzoo.errors import ConfigError, DataError, LostError
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
    _add_data(sub)
    text = f"write a PNG there for each class, with up to {PICTURES} images"
    sub.add_argument("--sheet", type=Path, metavar="DIR", help=text)
    program.add_output_options(sub, word_is_file=True)
    card = commands.add_parser(
        "card",
        help="the card of a data set for the Hub",
        description="Read every image once, and write README.md for a data set of the Hub: task, size, labels, splits\n"
        "and numbers of images. The licence is yours to say.\n\n"
        "example: nfzoo data card photos --output photos/README.md --license cc-by-4.0",
    )
    _add_data(card)
    card.add_argument("--output", type=Path, metavar="FILE", help="where to write it (default: print it)")
    card.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    card.add_argument("--name", metavar="TEXT", help="of the data (default: the folder's)")
    card.add_argument("--license", metavar="ID", help="the Hub's identifier of the licence, such as cc-by-4.0")
    program.add_output_options(card)
    return parser


def _add_data(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("data", metavar="PATH", help="what --data of `nfzoo train` takes: a folder, tar or parquet files, hub:ORG/NAME")
    program.add_label_options(sub)
    text = "multi-label: the table gives each image a set of labels, as for nfzoo train (default: single-label)"
    add("--task", choices=("single-label", "multi-label"), default="single-label", help=text)
    add("--validation-labels", metavar="FILE", help="another such file, of the images that are held out")
    text = "processes that read (default: the processors, up to 8)"
    add("--workers", type=program.nonnegative_int, metavar="N", help=text)


def main(argv: list[str] | None = None) -> int:
    """Run the command: 0 if nothing was found, 1 for findings, 2 if the data cannot be read or a result written."""
    return program.run_parsed(_parser(), argv, _main)


def _main(options: argparse.Namespace) -> int | None:
    return _check(options) if options.command == "check" else _card(options)


def _check(options: argparse.Namespace) -> int:
    if options.sheet is not None:
        program.check_writable(options.sheet, folder=True)
    workers = _workers(options)
    try:
        report = _report(options)
        sheets = 0 if options.sheet is None else write_sheets(report, options.sheet, workers=workers)
        program.write_result(options, report.to_dict(), report.text())
    except BrokenPipeError:
        raise
    except (OSError, LostError) as error:  # whose status would be that of findings
        raise DataError(f"the check came to no end: {error}") from error
    if options.sheet is not None:
        print(f"wrote {sheets:,} sheets to {escaped(str(options.sheet))}")
    return 1 if report.findings() else 0


def _card(options: argparse.Namespace) -> None:
    for what, text in (("name", options.name), ("licence", options.license)):
        if text is not None and not (text.strip() and text.isprintable()):
            raise ConfigError(f"the {what} must be one line of text, not {text!r}")
    output = options.output
    if output is not None:
        program.check_writable(output)
        if output.exists() and not options.overwrite:
            raise ConfigError(f"{output} is there already; --overwrite replaces it")
    report = _report(options)
    card = data_card(report, name=options.name, license=options.license)
    if output is not None:
        with replaced(output) as scratch:
            scratch.write_text(card, encoding="utf-8")
        print(f"wrote {escaped(str(output))}")
    text = card.removesuffix("\n") if output is None else None
    program.write_result(options, {"card": card, "output": None if output is None else str(output)}, text)
    if report.findings():
        print("`nfzoo data check` finds faults in these data", file=sys.stderr)


def _report(options: argparse.Namespace) -> Report:
    multi_label = options.task == "multi-label"
    files = label_files(options.labels, options.validation_labels, options.class_names, multi_label=multi_label)
    return check(options.data, workers=_workers(options), labels=files)


def _workers(options: argparse.Namespace) -> int:
    if options.workers is not None:
        return options.workers
    return 0 if options.data == DIGITS else default_workers(1)


if __name__ == "__main__":
    sys.exit(main())

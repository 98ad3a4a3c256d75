"""The command `nfzoo list`, which imports no torch."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files

from nfzoo.runtime import program
from nfzoo.runtime.output import millions, table
from nfzoo.variants import VARIANTS

COUNTS = "assets/parameter_counts.json"
"""`nfzoo.model.parameter_count` of every variant, written down since it takes a plan, and a plan takes torch."""


def list_models(argv: list[str] | None = None) -> int:
    """List the models of the zoo: `nfzoo list`."""
    parser = program.Parser(
        prog="nfzoo list",
        description="List the models of the zoo: parameters, side of the square input in pixels when trained and when\n"
        "tested, the ImageNet top-1 accuracy in percent that the source reports, and the source.",
    )
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _list)


def _list(options: argparse.Namespace) -> None:
    counts = json.loads(files("nfzoo").joinpath(COUNTS).read_text(encoding="utf-8"))
    rows = [
        {
            "name": v.name,
            "family": v.config.family,
            "parameters": counts[v.name],
            "train_size": v.preprocessing.train_size,
            "test_size": v.preprocessing.test_size,
            "top1": v.top1,
            "source": v.source,
        }
        for v in VARIANTS.values()
    ]
    header = ("name", "family", "parameters", "train", "test", "top-1", "source")
    cells = [
        (
            row["name"],
            row["family"],
            millions(row["parameters"]),
            str(row["train_size"]),
            str(row["test_size"]),
            "" if row["top1"] is None else f"{row['top1']:.1f}",
            row["source"],
        )
        for row in rows
    ]
    program.write_result(options, rows, table([header, *cells], "<<>>>><"))

"""Commands that publish models: `nfzoo push`, `nfzoo space`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nfzoo.cli.tables import print_table
from nfzoo.errors import ConfigError
from nfzoo.hub import publish
from nfzoo.hub.space import app
from nfzoo.model import parameter_count
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped
from nfzoo.variants import VARIANTS


def push(argv: list[str] | None = None) -> int:
    """Publish a model on the Hub."""
    parser = program.Parser(
        prog="nfzoo push",
        description="Publish a model with a model card as one commit of a Hub repository, which is made if need be.\n"
        "What training and evaluation left in the folder goes with it: curves.png, metrics.jsonl, train.yaml,\n"
        "evaluation.json, and onnx/. A README.md in the folder is taken as the card. Log in first, with\n"
        "`hf auth login` or HF_TOKEN.\n\n"
        "examples:\n"
        "  nfzoo push runs/pets me/pets --dry-run     what would be published\n"
        "  nfzoo push runs/pets me/pets --private\n"
        "  nfzoo push --all-deepmind me               DeepMind's F0 to F6, fetched and converted, as me/nfnet-f0 …",
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="a checkpoint folder")
    parser.add_argument("repository", metavar="ORG/NAME", nargs="?", help="the repository to publish to")
    parser.add_argument("--private", action="store_const", const=True, help="make a new repository private")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the files, their sizes and the card; nothing is sent or fetched"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to commit to (default: the main one)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--message", metavar="TEXT", help="the commit message")
    parser.add_argument(
        "--license", default="apache-2.0", metavar="ID", help="the licence of the weights (default: apache-2.0)"
    )
    parser.add_argument(
        "--with-onnx",
        action="store_true",
        help="also publish onnx/model.onnx, made anew, for transformers.js and others; needs nfzoo[export]",
    )
    parser.add_argument("--all-deepmind", metavar="ORG", help="publish DeepMind's F0 to F6 there instead of a folder")
    return program.run(parser.prog, lambda: _push(parser.parse_args(argv)))


def _push(options: argparse.Namespace) -> None:
    present = [options.folder is not None, options.repository is not None, options.all_deepmind is not None]
    if present not in ([True, True, False], [False, False, True]):
        raise ConfigError("nfzoo push needs either FOLDER and ORG/NAME, or --all-deepmind ORG alone")
    send = {
        "private": options.private,
        "revision": options.revision,
        "create_pr": options.create_pr,
        "commit_message": options.message,
        "license": options.license,
        "with_onnx": options.with_onnx,
    }
    if options.all_deepmind is not None:
        if options.dry_run:
            print_table(
                [
                    ("source", "repository", "parameters"),
                    *(
                        (source, repo_id, f"{parameter_count(VARIANTS[name].config):,}")
                        for source, name, repo_id in publish.deepmind_repositories(options.all_deepmind)
                    ),
                ],
                "<<>",
            )
            return
        for url in publish.push_deepmind(options.all_deepmind, **send):
            print(f"published {escaped(url)}", flush=True)
    elif options.dry_run:
        content = {"license": options.license, "with_onnx": options.with_onnx}
        with publish.collected(options.folder, options.repository, **content) as files:
            print_table([("file", "bytes"), *((n, f"{size:,}") for n, size in files.sizes().items())], "<>")
            print(f"\n{files.card}", end="")
    else:
        print(f"published {escaped(publish.push(options.folder, options.repository, **send))}")


def space(argv: list[str] | None = None) -> int:
    """Serve the web page."""
    parser = program.Parser(
        prog="nfzoo space",
        description="Serve a web page on this machine: a picture in, the five most probable labels of a model out.\n\n"
        "example: nfzoo space --model runs/digits --model nfnet-f0",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a zoo name, a checkpoint folder, a folder of such, or a Hub repository; may be given again (default: "
        "$NFZOO_SPACE_MODELS, with commas between, or the zoo's models with public weights)",
    )
    program.add_source_options(parser)
    parser.add_argument("--port", type=_port, metavar="P", help="port (default: the first free one from 7860 on)")
    return program.run(parser.prog, lambda: _space(parser.parse_args(argv)))


def _space(options: argparse.Namespace) -> None:
    app.main(options.model, port=options.port, **program.source_options(options))


def _port(text: str) -> int:
    if program.positive_int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is greater than 65535")
    return int(text)

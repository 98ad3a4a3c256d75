"""Commands that publish models: `nfzoo push`, `nfzoo space`, `nfzoo space deploy`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nfzoo.errors import ConfigError
from nfzoo.hub import publish
from nfzoo.hub.space import app, deploy
from nfzoo.model import parameter_count
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped, table
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
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _push)


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
            planned = [
                {"source": source, "repository": repo_id, "parameters": parameter_count(VARIANTS[name].config)}
                for source, name, repo_id in publish.deepmind_repositories(options.all_deepmind)
            ]
            rows = [(str(row["source"]), str(row["repository"]), f"{row['parameters']:,}") for row in planned]
            text = table([("source", "repository", "parameters"), *rows], "<<>")
            program.write_result(options, {"repositories": planned}, text)
            return
        published = []
        for url in publish.push_deepmind(options.all_deepmind, **send):
            published.append(url)
            print(f"published {escaped(url)}", flush=True)
        program.write_result(options, {"published": published})
    elif options.dry_run:
        content = {"license": options.license, "with_onnx": options.with_onnx}
        with publish.collected(options.folder, options.repository, **content) as files:
            text = table([("file", "bytes"), *((n, f"{size:,}") for n, size in files.sizes().items())], "<>")
            fields = {"repository": options.repository, "files": files.sizes(), "card": files.card}
        program.write_result(options, fields, f"{text}\n\n{files.card.removesuffix(chr(10))}")
    else:
        url = publish.push(options.folder, options.repository, **send)
        print(f"published {escaped(url)}")
        program.write_result(options, {"published": [url]})


def space(argv: list[str] | None = None) -> int:
    """Serve the web page, or deploy it."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["deploy"]:
        return _deploy_command(arguments[1:])
    parser = program.Parser(
        prog="nfzoo space",
        description="Serve a web page on this machine: a picture in, the five most probable labels of a model out.\n"
        "`nfzoo space deploy` puts such a page on the Hub.\n\n"
        "examples:\n"
        "  nfzoo space --model runs/digits --model nfnet-f0\n"
        "  nfzoo space deploy me/digits --model me/nfnet-digits --dry-run",
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
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _space)


def _space(options: argparse.Namespace) -> None:
    def write(url: str, models: list[str]) -> None:
        program.write_result(options, {"url": url, "models": models})

    on_start = None if options.json is None else write
    app.main(options.model, port=options.port, on_start=on_start, **program.source_options(options))


def _deploy_command(argv: list[str]) -> int:
    parser = program.Parser(
        prog="nfzoo space deploy",
        description="Create or update a Space of the Hub, on which models label pictures, as one commit. The models\n"
        "are the zoo's or repositories of the Hub; `nfzoo push` publishes one. nfzoo's own source files go with it.\n"
        "Log in first, with `hf auth login` or HF_TOKEN.\n\n"
        "example: nfzoo space deploy me/digits --model me/nfnet-digits --private",
    )
    add = parser.add_argument
    add("repository", metavar="ORG/NAME", help="the Space")
    add(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a zoo name or a Hub repository; may be given again (default: as of nfzoo space)",
    )
    add("--title", metavar="TEXT", help="of the page (default: NAME)")
    text = "what pip installs as nfzoo in the Space, such as nfzoo==1.0 (default: the files of this nfzoo are sent)"
    add("--package", metavar="SPEC", help=text)
    add("--private", action="store_const", const=True, help="make a new Space private")
    add("--overwrite", action="store_true", help="take a Space that holds files of others")
    add("--message", metavar="TEXT", help="the commit message")
    add("--dry-run", action="store_true", help="print the files, their sizes and the card; nothing is sent")
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _deploy)


def _deploy(options: argparse.Namespace) -> None:
    models = options.model or app.offered(os.environ.get(app.MODELS_VARIABLE))
    page = {"title": options.title, "package": options.package}
    if options.dry_run:
        files = deploy.space_files(options.repository, models, **page)
        texts = {}
        for name in (publish.CARD_FILE, "requirements.txt"):
            content = files.files[name]
            assert isinstance(content, bytes)
            texts[name] = content.decode()
        rows = table([("file", "bytes"), *((n, f"{size:,}") for n, size in files.sizes().items())], "<>")
        card, requirements = texts.values()
        fields = {"repository": options.repository, "files": files.sizes(), "card": card, "requirements": requirements}
        program.write_result(options, fields, f"{rows}\n\n{card}\n{requirements.removesuffix(chr(10))}")
        return
    url = deploy.deploy(
        options.repository,
        models,
        **page,
        private=options.private,
        overwrite=options.overwrite,
        commit_message=options.message,
    )
    print(f"deployed {escaped(url)}")
    program.write_result(options, {"deployed": url})


def _port(text: str) -> int:
    if program.positive_int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is greater than 65535")
    return int(text)

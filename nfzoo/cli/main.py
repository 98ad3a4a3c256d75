"""The `nfzoo` command: the zoo, what a model costs, predictions, training, conversion of weights.

Exit status: 0 done; 2 for bad input, with one line on standard error; 130 after Ctrl-C; 141 when the reader of the
output went away.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nfzoo import __version__, from_pretrained
from nfzoo.checkpoint.model_folder import CONFIG_FILE, read_description
from nfzoo.config import ModelConfig, Preprocessing
from nfzoo.errors import CheckpointError, ConfigError, NfzooError, printable
from nfzoo.model import BlockCost, costs, parameter_count
from nfzoo.predict import Prediction, image_files, predict
from nfzoo.runtime import program
from nfzoo.variants import VARIANTS, variant

_EPILOG = """\
examples:
  nfzoo list                                 the models of the zoo
  nfzoo info nfnet-f0                        what one of them costs, stage by stage
  nfzoo train --model nfnet-test --data digits --output runs/digits
  nfzoo predict runs/digits photos/          what a trained model sees in a folder of images
  nfzoo evaluate runs/pets --data pets/val   how often it is right
  nfzoo convert dm:F1 models/f1              DeepMind's weights, fetched and converted
  nfzoo push runs/pets me/pets               the model and its card onto the Hugging Face Hub
  nfzoo export runs/pets --format onnx --output pets-onnx

`nfzoo COMMAND --help` says more about each.
"""


# Commands that are programs of their own, with their own options. They are imported when called.
_PROGRAMS = {
    "train": "nfzoo.train",
    "evaluate": "nfzoo.evaluate",
    "export": "nfzoo.export.run",
    "plot": "nfzoo.cli.plot",
    "predict --data": "nfzoo.bulk",
    "tpu-check": "nfzoo.export.tpu_check",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and give its exit status; see the module."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits; that must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (NfzooError, OSError) as error:
        text = printable(" ".join(str(error).split())) or type(error).__name__
        print(f"nfzoo: error: {text}", file=sys.stderr)
        return 2
    return status


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command == "predict" and any(a == "--data" or a.startswith("--data=") for a in arguments):
        command = "predict --data"
    if command in _PROGRAMS:
        return importlib.import_module(_PROGRAMS[command]).main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nfzoo",
        description="Normalizer-Free networks in PyTorch: NFNet, NF-ResNet and NF-RegNet.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nfzoo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def add(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    sub = add(
        "list",
        "the models of the zoo",
        "List the models of the zoo: parameters, side of the square input in pixels when trained and when tested, the\n"
        "ImageNet top-1 accuracy in percent that the source reports, and the source.",
    )
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sub.set_defaults(run=_list)

    sub = add(
        "info",
        "what a model costs, stage by stage",
        "Show what a model is and costs: parameters, multiply-accumulates of one image, and a table of its stages.\n\n"
        "example: nfzoo info nfnet-f0",
    )
    sub.add_argument("model", metavar="MODEL", help="a name from `nfzoo list`, a checkpoint folder or its weight file")
    sub.add_argument("--json", action="store_true", help="print JSON instead of text")
    sub.set_defaults(run=_info)

    sub = add(
        "predict",
        "what a model sees in images",
        "Print the most probable labels of images; --sheet draws them with the images.\n"
        "For very many images, with files as the result: nfzoo predict MODEL --data SOURCE --output FOLDER;\n"
        "`nfzoo predict MODEL --data x --help` shows the options of that.\n\n"
        "example: nfzoo predict runs/digits cat.jpg photos/ --topk 3 --sheet cats.png",
    )
    sub.add_argument("model", metavar="MODEL", help="a checkpoint folder, its weight file, or a Hub repository")
    sub.add_argument("images", metavar="IMAGE", nargs="+", help="an image, or a folder of images")
    sub.add_argument("--topk", type=program.positive, default=5, metavar="K", help="labels per image (default: 5)")
    sub.add_argument(
        "--sheet",
        type=Path,
        metavar="PNG",
        help="draw the images with their labels; replaces what is there",
    )
    sub.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, mps (default: cpu)")
    sub.add_argument(
        "--batch-size", type=program.positive, default=32, metavar="N", help="images at a time (default: 32)"
    )
    sub.add_argument("--json", action="store_true", help="print JSON instead of text")
    sub.set_defaults(run=_predict)

    sub = add(
        "convert",
        "weights of other frameworks to nfzoo's, and back",
        "Convert weights between DeepMind's JAX code, timm and nfzoo. The model is recognised by names and shapes.\n"
        "Nothing in a pickle is executed. What is written appears whole or not at all.\n\n"
        "examples:\n"
        "  nfzoo convert F1_haiku.npz models/f1           DeepMind's file, which is a pickle\n"
        "  nfzoo convert dm:F1 models/f1                  the same, fetched from DeepMind's server (dm:F0 to dm:F6)\n"
        "  nfzoo convert dm_nfnet_f1/ models/f1           a folder of timm's, or its weight file\n"
        "  nfzoo convert --to haiku models/f1 F1.npz      a pickle for DeepMind's code\n"
        "  nfzoo convert --to timm models/f1 timm_f1/     a folder for timm",
    )
    sub.add_argument(
        "source",
        metavar="SOURCE",
        help="a Haiku pickle or .npz archive; dm:F0 to dm:F6; a folder or weight file of timm's or nfzoo's; a Hub "
        "repository",
    )
    sub.add_argument("target", type=Path, metavar="OUT", help="the folder to write, or with --to haiku the file")
    sub.add_argument("--to", choices=("nfzoo", "haiku", "timm"), default="nfzoo", help="what to write (default: nfzoo)")
    sub.add_argument("--model", metavar="NAME", help="the model that the weights are of, if they do not tell")
    sub.add_argument("--overwrite", action="store_true", help="replace a model that is at OUT")
    sub.set_defaults(run=_convert)

    sub = add(
        "push",
        "a trained model onto the Hugging Face Hub",
        "Publish a model with a model card as one commit of a Hub repository, which is made if need be. What training\n"
        "and evaluation left in the folder goes with it: curves.png, metrics.jsonl, train.yaml, evaluation.json. A\n"
        "README.md in the folder is taken as the card. Log in first, with `hf auth login` or HF_TOKEN.\n\n"
        "examples:\n"
        "  nfzoo push runs/pets me/pets --dry-run     what would be published\n"
        "  nfzoo push runs/pets me/pets --private\n"
        "  nfzoo push --all-deepmind me               DeepMind's F0 to F6, fetched and converted, as me/nfnet-f0 …",
    )
    sub.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="a checkpoint folder")
    sub.add_argument("repository", metavar="ORG/NAME", nargs="?", help="the repository to publish to")
    sub.add_argument("--private", action="store_const", const=True, help="make a new repository private")
    sub.add_argument(
        "--dry-run", action="store_true", help="print the files, their sizes and the card; nothing is sent or fetched"
    )
    sub.add_argument("--revision", metavar="BRANCH", help="the branch to commit to (default: the main one)")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    sub.add_argument("--message", metavar="TEXT", help="the commit message")
    sub.add_argument(
        "--license", default="apache-2.0", metavar="ID", help="the licence of the weights (default: apache-2.0)"
    )
    sub.add_argument("--all-deepmind", metavar="ORG", help="publish DeepMind's F0 to F6 there instead of a folder")
    sub.set_defaults(run=_push)

    sub = add(
        "space",
        "a web page on which models label pictures",
        "Serve a web page on this machine: a picture in, the five most probable labels out, of a model to choose.\n\n"
        "example: nfzoo space --model runs/digits --model nfnet-f0",
    )
    sub.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a zoo name, a checkpoint folder, a folder of such, or a Hub repository; may be given again (default: "
        "$NFZOO_SPACE_MODELS, with commas between, or the zoo's models with public weights)",
    )
    sub.add_argument("--port", type=_port, metavar="P", help="port (default: the first free one from 7860 on)")
    sub.set_defaults(run=_space)

    # For the help alone: _run hands these on.
    add("evaluate", "top-1 and top-5 accuracy on a folder of images", "")
    add("train", "train or fine-tune a model", "")
    add("export", "a model for other runtimes: ONNX, AOTInductor, torch.export, StableHLO", "")
    add("plot", "the signal-propagation plot of a model, the curves of a run", "")
    add("tpu-check", "whether a model compiles for a TPU and fits it, without one", "")
    return parser


def _port(text: str) -> int:
    if program.positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is greater than 65535")
    return int(text)


def _list(options: argparse.Namespace) -> None:
    rows = [
        {
            "name": v.name,
            "family": v.config.family,
            "parameters": parameter_count(v.config),
            "train_size": v.preprocessing.train_size,
            "test_size": v.preprocessing.test_size,
            "top1": v.top1,
            "source": v.source,
        }
        for v in VARIANTS.values()
    ]
    if options.json:
        _print_json(rows)
        return
    header = ("name", "family", "parameters", "train", "test", "top-1", "source")
    cells = [
        (
            row["name"],
            row["family"],
            _millions(row["parameters"]),
            str(row["train_size"]),
            str(row["test_size"]),
            "" if row["top1"] is None else f"{row['top1']:.1f}",
            row["source"],
        )
        for row in rows
    ]
    _print_table([header, *cells], "<<>>>><")


def _info(options: argparse.Namespace) -> None:
    config, preprocessing, facts = _lookup(options.model)
    size = preprocessing.test_size
    table = costs(config, size)
    train_macs = sum(c.macs for c in costs(config, preprocessing.train_size))
    stages = _stages(table)
    macs = sum(c.macs for c in table)
    parameters = sum(c.parameters for c in table)
    if options.json:
        _print_json(
            {
                **facts,
                "parameters": parameters,
                "macs": {"train": train_macs, "test": macs},
                "architecture": config.to_dict(),
                "preprocessing": preprocessing.to_dict(),
                "stages": [
                    {"name": n, "blocks": b, "output": list(c.output), "parameters": c.parameters, "macs": c.macs}
                    for n, b, c in stages
                ],
            }
        )
        return
    for key, value in facts.items():
        if value is not None:
            print(f"{key + ':':<22}{printable(_in_words(value))}")
    resize = f"{preprocessing.resize}, margin {preprocessing.margin} pixels"
    if preprocessing.resize == "shortest-edge":
        resize = f"{preprocessing.resize}, crop {preprocessing.crop:g}"
    print(f"{'family:':<22}{config.family}, {config.activation}, {config.rules} rules")
    print(f"{'classes:':<22}{config.num_classes}")
    print(f"{'parameters:':<22}{parameters:,}")
    for use, side, count in (
        ("train", preprocessing.train_size, train_macs),
        ("test", size, macs),
    ):
        print(f"{use + ' input:':<22}{side} x {side} pixels, {_giga(count)} multiply-accumulates")
    print(f"{'evaluation resize:':<22}{resize}")
    print()
    total = ("total", str(sum(b for _, b, _ in stages)), "", f"{parameters:,}", _giga(macs))
    cells = [(n, str(b), " x ".join(map(str, c.output)), f"{c.parameters:,}", _giga(c.macs)) for n, b, c in stages]
    _print_table([("stage", "blocks", f"output at {size}", "parameters", "MACs"), *cells, total], "<>>>>")


def _lookup(source: str) -> tuple[ModelConfig, Preprocessing, dict[str, Any]]:
    """A zoo name or a checkpoint; what exists on disk comes first, as in `from_pretrained`."""
    path = Path(source)
    if not path.exists() and "/" not in source:
        row = variant(source)
        top1 = None if row.top1 is None else f"{row.top1:.1f} % on ImageNet, as the source reports"
        return row.config, row.preprocessing, {"name": row.name, "source": row.source, "top-1": top1}
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        raise CheckpointError(f"{path} is neither a checkpoint folder nor a .safetensors file")
    if path.exists() and not (path.is_dir() and _is_foreign(path)):
        found = read_description(path / CONFIG_FILE if path.is_dir() else path)
    else:
        found = from_pretrained(source).description  # a Hub repository, or a folder in timm's layout
    labels = None
    if found.labels is not None:
        more = ", …" if len(found.labels) > 8 else ""
        labels = ", ".join(found.labels[:8]) + more
    provenance = None if found.provenance is None else dict(found.provenance)
    return found.config, found.preprocessing, {"name": found.name, "provenance": provenance, "labels": labels}


def _in_words(value: Any) -> str:
    """A fact in one line; of a mapping, its entries that are not empty."""
    if not isinstance(value, Mapping):
        return str(value)
    parts = ((k, f"({_in_words(v)})" if isinstance(v, Mapping) else v) for k, v in value.items() if v is not None)
    return ", ".join(f"{k} {v}" for k, v in parts)


def _is_foreign(folder: Path) -> bool:
    try:
        return "library_name" not in json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False  # `read_description` says what is wrong


def _stages(table: Sequence[BlockCost]) -> list[tuple[str, int, BlockCost]]:
    """(name, number of blocks, costs) of the stem, each stage, the final convolution and the head with its pooling."""
    groups: dict[str, list[BlockCost]] = {}
    for cost in table:
        parts = cost.name.split(".")
        name = ".".join(parts[:2]) if parts[0] == "stages" else "head" if parts[0] == "pool" else parts[0]
        groups.setdefault(name, []).append(cost)
    return [
        (name, len(g), BlockCost(name, g[-1].output, sum(c.parameters for c in g), sum(c.macs for c in g)))
        for name, g in groups.items()
    ]


def _predict(options: argparse.Namespace) -> None:
    files = image_files(options.images, without=options.sheet)
    model = from_pretrained(options.model)
    found = predict(
        model,
        files,
        topk=options.topk,
        sheet=options.sheet,
        batch_size=options.batch_size,
        device=options.device,
    )
    if options.json:
        _print_json([_as_json(p) for p in found])
    else:
        width = max(len(printable(label)) for p in found for label, _ in p.top)
        for prediction in found:
            print(printable(str(prediction.path)))
            for label, probability in prediction.top:
                bar = "#" * round(30 * probability)
                print(f"  {100 * probability:5.1f} %  {printable(label):<{min(width, 40)}}  {bar}".rstrip())
    if options.sheet is not None:
        print(f"wrote {printable(str(options.sheet))}", file=sys.stderr if options.json else sys.stdout)


def _convert(options: argparse.Namespace) -> None:
    from nfzoo.conversion.convert import convert

    weights = convert(
        options.source,
        options.target,
        to=options.to,
        model=options.model,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    found = weights.description
    what = f"{found.name or found.config.family}, {found.config.num_classes} classes, "
    what += f"{_millions(parameter_count(found.config))} parameters, read as {weights.form}"
    print(f"wrote {printable(str(options.target))}: {printable(what)}")


def _push(options: argparse.Namespace) -> None:
    from nfzoo.hub.publish import bundle, deepmind_repositories, push, push_deepmind

    given = [options.folder is not None, options.repository is not None, options.all_deepmind is not None]
    if given not in ([True, True, False], [False, False, True]):
        raise ConfigError("nfzoo push needs either FOLDER and ORG/NAME, or --all-deepmind ORG alone")
    send = {
        "private": options.private,
        "revision": options.revision,
        "create_pr": options.create_pr,
        "commit_message": options.message,
        "license": options.license,
    }
    if options.all_deepmind is not None:
        if options.dry_run:
            _print_table(
                [
                    ("source", "repository", "parameters"),
                    *(
                        (source, repo_id, f"{parameter_count(VARIANTS[name].config):,}")
                        for source, name, repo_id in deepmind_repositories(options.all_deepmind)
                    ),
                ],
                "<<>",
            )
            return
        for url in push_deepmind(options.all_deepmind, **send):
            print(f"published {printable(url)}", flush=True)
    elif options.dry_run:
        found = bundle(options.folder, options.repository, license=options.license)
        _print_table([("file", "bytes"), *((n, f"{size:,}") for n, size in found.sizes().items())], "<>")
        print("\n" + "\n".join(map(printable, found.card.splitlines())))
    else:
        print(f"published {printable(push(options.folder, options.repository, **send))}")


def _space(options: argparse.Namespace) -> None:
    from nfzoo.hub.space.app import main as space

    space(options.model, port=options.port)


def _as_json(prediction: Prediction) -> dict[str, Any]:
    top = [{"label": label, "probability": probability} for label, probability in prediction.top]
    return {"path": str(prediction.path), "predictions": top}


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _print_table(rows: Sequence[Sequence[str]], alignment: str) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(alignment))]
    for row in rows:
        print("  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, alignment, widths, strict=True)).rstrip())


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _giga(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e8 else f"{count / 1e6:.2f} M"


if __name__ == "__main__":
    sys.exit(main())

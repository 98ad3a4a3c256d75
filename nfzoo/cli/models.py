"""Commands about models and their weights: `nfzoo info`, `nfzoo convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nfzoo import from_pretrained
from nfzoo.checkpoint.model_folder import CONFIG_FILE, load_checkpoint, read_description
from nfzoo.config import ModelConfig, Preprocessing
from nfzoo.conversion import convert as conversion
from nfzoo.errors import CheckpointError, ConversionError
from nfzoo.files import read_json
from nfzoo.hub.registry import is_file_name
from nfzoo.hub.sources import Options, locate, read_foreign
from nfzoo.model import BlockCost, costs, parameter_count
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped, giga, millions, table
from nfzoo.variants import variant


def info(argv: list[str] | None = None) -> int:
    """Show what a model is and costs."""
    parser = program.Parser(
        prog="nfzoo info",
        description="Show what a model is and costs: parameters, multiply-accumulates of one image, and its stages.\n\n"
        "example: nfzoo info nfnet-f0",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a name from `nfzoo list`, a checkpoint folder or its weight file"
    )
    program.add_source_options(parser)
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _info)


def _info(options: argparse.Namespace) -> None:
    config, preprocessing, facts = _lookup(options.model, **program.source_options(options))
    size = preprocessing.test_size
    blocks = costs(config, size)
    train_macs = sum(c.macs for c in costs(config, preprocessing.train_size))
    stages = _stages(blocks)
    macs = sum(c.macs for c in blocks)
    parameters = sum(c.parameters for c in blocks)
    fields = {
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
    path = Path(options.model)
    unread = " (weights not read)" if path.exists() and not _is_foreign(path) else ""
    lines = [f"{key + ':':<22}{escaped(_in_words(value))}" for key, value in facts.items() if value is not None]
    resize = f"{preprocessing.resize}, margin {preprocessing.margin} pixels"
    if preprocessing.resize == "shortest-edge":
        resize = f"{preprocessing.resize}, crop {preprocessing.crop:g}"
    lines.append(f"{'family:':<22}{config.family}, {config.activation}, {config.rules} rules")
    lines.append(f"{'classes:':<22}{config.num_classes}")
    lines.append(f"{'parameters:':<22}{parameters:,}{unread}")
    for use, side, count in (
        ("train", preprocessing.train_size, train_macs),
        ("test", size, macs),
    ):
        lines.append(f"{use + ' input:':<22}{side} x {side} pixels, {giga(count)} multiply-accumulates")
    lines.append(f"{'evaluation resize:':<22}{resize}")
    total = ("total", str(sum(b for _, b, _ in stages)), "", f"{parameters:,}", giga(macs))
    cells = [(n, str(b), " x ".join(map(str, c.output)), f"{c.parameters:,}", giga(c.macs)) for n, b, c in stages]
    rows = [("stage", "blocks", f"output at {size}", "parameters", "MACs"), *cells, total]
    program.write_result(options, fields, "\n".join([*lines, "", table(rows, "<>>>>")]))


def _lookup(source: str, **options: Any) -> tuple[ModelConfig, Preprocessing, dict[str, Any]]:
    """Return configuration, preprocessing and facts of a zoo name or a checkpoint. A file comes before a name."""
    path = Path(source)
    if not path.exists() and "/" not in source and not is_file_name(source):
        row = variant(source)
        top1 = None if row.top1 is None else f"{row.top1:.1f} % on ImageNet, as the source reports"
        return row.config, row.preprocessing, {"name": row.name, "source": row.source, "top-1": top1}
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        raise CheckpointError(f"{path} is neither a checkpoint folder nor a .safetensors file")
    if path.exists() and not (path.is_dir() and _is_foreign(path)):
        description = read_description(path / CONFIG_FILE if path.is_dir() else path)
    else:
        # A Hub repository, or a folder in timm's layout.
        description = from_pretrained(source, **options).description
    labels = None
    if description.labels is not None:
        more = ", …" if len(description.labels) > 8 else ""
        labels = ", ".join(description.labels[:8]) + more
    provenance = None if description.provenance is None else dict(description.provenance)
    return (
        description.config,
        description.preprocessing,
        {
            "name": description.name,
            "provenance": provenance,
            "labels": labels,
            "temperature": description.temperature,
            "problem type": description.problem_type,
        },
    )


def _in_words(value: Any) -> str:
    """Return a fact in one line; of a mapping, the entries that are not `None`."""
    if not isinstance(value, Mapping):
        return str(value)
    parts = ((k, f"({_in_words(v)})" if isinstance(v, Mapping) else v) for k, v in value.items() if v is not None)
    return ", ".join(f"{k} {v}" for k, v in parts)


def _is_foreign(folder: Path) -> bool:
    try:
        return "library_name" not in read_json(folder / CONFIG_FILE)
    except (OSError, ValueError, TypeError):
        return False  # `read_description` says what is wrong


def _stages(blocks: Sequence[BlockCost]) -> list[tuple[str, int, BlockCost]]:
    """Return (name, number of blocks, costs) of stem, stages, final convolution, and head with pooling."""
    groups: dict[str, list[BlockCost]] = {}
    for cost in blocks:
        parts = cost.name.split(".")
        name = ".".join(parts[:2]) if parts[0] == "stages" else "head" if parts[0] == "pool" else parts[0]
        groups.setdefault(name, []).append(cost)
    return [
        (name, len(g), BlockCost(name, g[-1].output, sum(c.parameters for c in g), sum(c.macs for c in g)))
        for name, g in groups.items()
    ]


def convert(argv: list[str] | None = None) -> int:
    """Convert weights of DeepMind, timm and nfzoo."""
    parser = program.Parser(
        prog="nfzoo convert",
        description="Convert weights between DeepMind's JAX code, timm and nfzoo. The model is recognised by names\n"
        "and shapes. Nothing in a pickle is executed. What is written appears whole or not at all.\n\n"
        "examples:\n"
        "  nfzoo convert F1_haiku.npz models/f1           DeepMind's file, which is a pickle\n"
        "  nfzoo convert dm:F1 models/f1                  the same, fetched from DeepMind's server (dm:F0 to dm:F6)\n"
        "  nfzoo convert hub:ethanluoyc/dm-nfnet-f3-in1k models/f3    the same file on the Hub, as model.npz\n"
        "  nfzoo convert dm_nfnet_f1/ models/f1           a folder of timm's, or its weight file\n"
        "  nfzoo convert --to haiku models/f1 F1.npz      a pickle for DeepMind's code\n"
        "  nfzoo convert --to timm models/f1 timm_f1/     a folder for timm",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a Haiku pickle or .npz archive; dm:F0 to dm:F6; a folder or weight file of timm's or nfzoo's; a Hub "
        "repository",
    )
    parser.add_argument("target", type=Path, metavar="OUT", help="the folder to write, or with --to haiku the file")
    parser.add_argument(
        "--to", choices=("nfzoo", "haiku", "timm"), default="nfzoo", help="what to write (default: nfzoo)"
    )
    parser.add_argument("--model", metavar="NAME", help="the model that the weights are of, if they do not tell")
    program.add_source_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is at OUT")
    parser.add_argument(
        "--with-onnx",
        action="store_true",
        help="also write onnx/model.onnx, for transformers.js and others; SOURCE may be nfzoo's; needs nfzoo[export]",
    )
    program.add_output_options(parser)
    return program.run_parsed(parser, argv, _convert)


def _convert(options: argparse.Namespace) -> None:
    source = options.source
    if conversion.is_name(source):
        source = _from_hub(source, options.model, **program.source_options(options))
    weights = conversion.convert(
        source,
        options.target,
        to=options.to,
        model=options.model,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
        with_onnx=options.with_onnx,
        **program.source_options(options),
    )
    description = weights.description
    parameters = parameter_count(description.config)
    summary = f"{description.name or description.config.family}, {description.config.num_classes} classes, "
    summary += f"{millions(parameters)} parameters, read as {weights.form}"
    print(f"wrote {escaped(str(options.target))}: {escaped(summary)}")
    fields = {
        "output": str(options.target),
        "to": options.to,
        "name": description.name,
        "family": description.config.family,
        "classes": description.config.num_classes,
        "parameters": parameters,
        "read_as": weights.form,
    }
    program.write_result(options, fields)


def _from_hub(name: str, model: str | None, **options: Any) -> conversion.Weights:
    """Load a zoo name or a Hub repository, which says itself what model it is."""
    if model is not None:
        raise ConversionError(f"{name} says itself what model it is; leave out --model")
    found = locate(name, Options(**options))
    if found.layout == "nfzoo":
        return conversion.Weights(*load_checkpoint(found.path, hashed=True), found.layout)
    try:
        return read_foreign(found, allow_pickle=options["allow_pickle"])
    except ConversionError as error:
        raise CheckpointError(f"{name}: {error}") from error

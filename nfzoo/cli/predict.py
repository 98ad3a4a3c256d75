"""`nfzoo predict`: labels of a few images, printed and drawn."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nfzoo import from_pretrained
from nfzoo.analysis.explanations import METHODS
from nfzoo.errors import ConfigError
from nfzoo.predict import Prediction, image_files, predict
from nfzoo.runtime import program
from nfzoo.runtime.device import usable_device
from nfzoo.runtime.execution import for_many
from nfzoo.runtime.output import escaped


def main(argv: list[str] | None = None) -> int:
    """Print the labels of a few images: `nfzoo predict`."""
    parser = program.Parser(
        prog="nfzoo predict",
        description="Print the most probable labels of images; --sheet draws them with the images.\n"
        "For very many images, with files as the result, use `nfzoo bulk`.\n\n"
        "example: nfzoo predict runs/digits cat.jpg photos/ --topk 3 --sheet cats.png",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, its weight file, or a Hub repository")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image, or a folder of images")
    parser.add_argument(
        "--topk",
        type=program.positive_int,
        metavar="K",
        help="labels per image (default: 5; of a multi-label model all that reach their thresholds)",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="PNG",
        help="draw the images with their labels; replaces what is there",
    )
    parser.add_argument(
        "--explain",
        choices=METHODS,
        help="show in the sheet, in orange, where the model finds the first label: gradcam by gradients at the last "
        "feature map, occlusion by 225 more predictions of each image, with a part of it covered",
    )
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument(
        "--batch-size", type=program.positive_int, default=32, metavar="N", help="images at a time (default: 32)"
    )
    program.add_source_options(parser)
    program.add_output_options(parser)
    parser.add_argument("--data", action=_UseBulk, help=argparse.SUPPRESS)
    return program.run_parsed(parser, argv, _predict)


class _UseBulk(argparse.Action):
    def __call__(self, *_: Any) -> None:
        raise ConfigError("--data is no option of predict; use `nfzoo bulk MODEL --data SOURCE --output FOLDER`")


def _predict(options: argparse.Namespace) -> None:
    if options.explain is not None and options.sheet is None:
        raise ConfigError("--explain draws into the sheet; add --sheet PNG")
    if options.sheet is not None:
        program.check_writable(options.sheet)
    files = image_files(options.images, without=options.sheet)
    model = from_pretrained(options.model, **program.source_options(options))
    if options.explain is None:  # which takes gradients
        model = for_many(model, len(files), usable_device(options.device))
    predictions = predict(
        model,
        files,
        topk=options.topk,
        sheet=options.sheet,
        explain=options.explain,
        batch_size=options.batch_size,
        device=options.device,
    )
    program.write_result(options, [_as_json(p) for p in predictions], "\n".join(_lines(predictions)))
    for line in () if model.multi_label else _of_classes(options, predictions, model.labels or ()):
        print(line)
    if options.sheet is not None:
        print(f"wrote {escaped(str(options.sheet))}")


def _lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    width = max((len(escaped(label)) for p in predictions for label, _ in p.top), default=0)
    for prediction in predictions:
        yield escaped(str(prediction.path))
        for label, probability in prediction.top:
            bar = "#" * round(30 * probability)
            yield f"  {100 * probability:5.1f} %  {escaped(label):<{min(width, 40)}}  {bar}".rstrip()
        if not prediction.top:
            yield "  no label"


def _of_classes(options: argparse.Namespace, predictions: list[Prediction], labels: Sequence[str]) -> Iterator[str]:
    """Say for each folder of classes how many of its images have the label that their folder names."""
    for folder in map(Path, options.images):
        inside = [p for p in predictions if folder.is_dir() and p.path.parent.parent == folder]
        if not inside:
            continue
        remedy = f"`nfzoo evaluate {options.model} --data {folder}` measures the accuracy"
        known = [p for p in inside if p.path.parent.name in labels]
        right = sum(p.top[0][0] == p.path.parent.name for p in known)
        told = f"no folder of {folder} is called as a label of the model"
        if known:
            share = f"{right} of {len(known)} images of {folder}"
            told = f"{share} have their folder's name as label ({right / len(known):.1%})"
        yield escaped(f"{told}; {remedy}")


def _as_json(prediction: Prediction) -> dict[str, Any]:
    top = [{"label": label, "probability": probability} for label, probability in prediction.top]
    return {"path": str(prediction.path), "predictions": top}

"""The command `nfzoo evaluate`, also as `accelerate launch -m nfzoo.evaluate MODEL --data FOLDER`."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from nfzoo.analysis.classification_figures import corruption_figure
from nfzoo.analysis.figures import new_figure
from nfzoo.analysis.style import check_png
from nfzoo.checkpoint.lock import locked
from nfzoo.checkpoint.model_folder import CONFIG_FILE, WEIGHTS_FILE, read_description
from nfzoo.checkpoint.weight_files import stated_checksum
from nfzoo.data.label_files import label_files
from nfzoo.errors import ConfigError, DataError
from nfzoo.evaluate.accuracy import Evaluator, Outputs
from nfzoo.evaluate.multi_label import evaluate_sets, set_table
from nfzoo.evaluate.multi_label_report import write_set_report
from nfzoo.evaluate.report import PAGE_FILE, check_folder, measure, write_report
from nfzoo.evaluate.robustness import robustness, robustness_table
from nfzoo.evaluate.scores import table
from nfzoo.runtime import program
from nfzoo.runtime.output import escaped
from nfzoo.transforms.corruptions import KINDS


def _parser() -> argparse.ArgumentParser:
    parser = program.Parser(
        prog="nfzoo evaluate",
        description="Top-1 and top-5 accuracy of a model on a folder of images, and with --report all that can be\n"
        "measured of its predictions. Of a multi-label model, on a table of labels: average precisions and F1.\n\n"
        "examples:\n"
        "  nfzoo evaluate nfnet-f0 --data imagenet/val --json evaluation.json\n"
        "  nfzoo evaluate runs/pets --data pets/val --report pets-report\n"
        "  accelerate launch -m nfzoo.evaluate runs/pets --data pets/val",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a zoo name, a Hub repository, a checkpoint folder or its weight file")
    add(
        "--data",
        required=True,
        metavar="FOLDER",
        help="one subfolder of images per class, named as the model's labels (ImageNet's: or by WordNet id); or with "
        "such folders in train/ and val/, of which val/ is taken; or tar shards, parquet or IDX files, "
        "hub:ORG/NAME, fashion-mnist; or 'digits', those that training holds out",
    )
    program.add_label_options(parser)
    add("--size", type=program.positive_int, metavar="N", help="side of the input in pixels (default: the model's)")
    images = "images at a time per process (default: 32)"
    add("--batch-size", type=program.positive_int, default=32, metavar="N", help=images)
    workers = "loader processes per process (default: the processors, up to 8)"
    add("--workers", type=program.nonnegative_int, metavar="N", help=workers)
    add("--device", help="where to compute: cpu, cuda, cuda:1, mps (default: an accelerator if there is one)")
    add(
        "--report",
        type=Path,
        metavar="DIR",
        help="write a report there: report.html, which opens without a network, report.json, confusion_matrix.csv and "
        "pictures; needs matplotlib",
    )
    add(
        "--corruptions",
        nargs="*",
        choices=KINDS,
        metavar="NAME",
        help="also measure accuracy under corruptions of the images, at five severities each, which takes five times "
        f"as long for each: {', '.join(KINDS)} (default: all); with --report, it is part of the report",
    )
    add(
        "--corruption-seed",
        type=program.nonnegative_int,
        metavar="N",
        help="of what corruptions draw at random (default: 0)",
    )
    add("--curves", type=Path, metavar="PNG", help="draw accuracy over the severity of the corruptions")
    add(
        "--save-temperature",
        type=Path,
        metavar="DIR",
        help="fit a temperature to these images, and save the model with it: `nfzoo predict` and `bulk` then divide "
        "the logits by it; DIR is new, or MODEL's folder",
    )
    add("--skip-broken", action="store_true", help="leave images out that cannot be read, and name and count them")
    program.add_source_options(parser)
    add("--date", type=_date, metavar="YYYY-MM-DD", help="the day to note in the result (default: none)")
    program.add_output_options(parser, word_is_file=True)
    return parser


def _checksum(model: str) -> str | None:
    """Return the checksum that the weights of a local folder state, by which `nfzoo push` knows them again."""
    file = Path(model) / WEIGHTS_FILE
    return stated_checksum(file) if file.is_file() else None


def _date(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date such as 2026-01-31") from error


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 for a result, 2 for bad input, 1 for a disk error."""
    return program.run_parsed(_parser(), argv, _main)


def _main(options: argparse.Namespace) -> None:
    from nfzoo import from_pretrained

    if options.report is not None:
        check_folder(options.report, options.data)
    if options.curves is not None:
        if options.corruptions is None:
            raise ConfigError("--curves draws accuracy under corruptions; add --corruptions")
        check_png(options.curves)
        program.check_writable(options.curves)
        new_figure(1, 1)
    if options.corruption_seed is not None and options.corruptions is None:
        raise ConfigError("--corruption-seed is of what corruptions draw; add --corruptions")
    if options.save_temperature is not None:
        _check_model_folder(options.save_temperature, options.model)
    model = from_pretrained(options.model, **program.source_options(options))
    if model.multi_label:
        _check_sets(options)
    evaluator = Evaluator.prepare(
        model,
        options.data,
        name=model.name or Path(options.model).resolve().name,
        size=options.size,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        skip_broken=options.skip_broken,
        date=options.date,
        labels=label_files(options.labels, None, options.class_names, multi_label=model.multi_label),
        weights=_checksum(options.model),
    )
    if model.multi_label:
        _sets(options, evaluator)
        return
    outputs: Outputs | None = None
    if options.report is None and options.save_temperature is None:
        evaluation = evaluator.evaluation()
    else:
        evaluation, outputs = evaluator.outputs()
    corruptions = None
    if options.corruptions is not None:
        names = options.corruptions or list(KINDS)
        corruptions = robustness(evaluator, evaluation, names, seed=options.corruption_seed or 0)
    if not evaluator.state.is_main_process:
        return
    found = None if outputs is None else measure(outputs, model.temperature)
    if options.report is not None and outputs is not None and found is not None:
        write_report(options.report, evaluator, evaluation, outputs, found, data=options.data, corruptions=corruptions)
    fields, text = evaluation.to_dict(), table(evaluation)
    if model.temperature is not None:
        text += f", without the model's temperature of {model.temperature:.4f}"
        text += "" if options.report is not None else "; with it: --report"
    if corruptions is not None:
        fields["corruptions"] = corruptions
        text += f"\n\n{robustness_table(corruptions)}"
        if options.curves is not None:
            corruption_figure(corruptions, options.curves)
    program.write_result(options, fields, text)
    if options.curves is not None:
        print(f"wrote {escaped(str(options.curves))}")
    if options.report is not None:
        print(f"wrote {escaped(str(options.report / PAGE_FILE))}")
    if options.save_temperature is not None and found is not None:
        if found.temperature is None:
            raise DataError(
                "no temperature fits these images, so none is saved: all predictions are right, or they are no better "
                "than chance; give more images"
            )
        model.temperature = found.temperature
        with locked(options.save_temperature):
            model.save_pretrained(options.save_temperature)
        print(f"wrote {escaped(str(options.save_temperature))}, with temperature {model.temperature:.4f}")


def _check_sets(options: argparse.Namespace) -> None:
    """Raise a `ConfigError` for options that a multi-label model has no use for."""
    if options.corruptions is not None:
        raise ConfigError(
            f"--corruptions measures top-1 accuracy, which {options.model!r}, a multi-label model, has not"
        )
    if options.save_temperature is not None:
        raise ConfigError("--save-temperature is of a softmax, which a multi-label model has not")


def _sets(options: argparse.Namespace, evaluator: Evaluator) -> None:
    """Evaluate a multi-label model."""
    evaluation, outputs = evaluate_sets(evaluator)
    if not evaluator.state.is_main_process:
        return
    if options.report is not None:
        write_set_report(options.report, evaluator, evaluation, outputs, data=options.data)
    program.write_result(options, evaluation.to_dict(), set_table(evaluation))
    if options.report is not None:
        print(f"wrote {escaped(str(options.report / PAGE_FILE))}")


def _check_model_folder(folder: Path, source: str) -> None:
    """Raise a `ConfigError` unless a folder is new, is empty, or holds the model of `source` as nfzoo saves it."""
    program.check_writable(folder, folder=True)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    own = Path(source).is_dir() and Path(source).resolve() == folder.resolve()
    if not own:
        raise ConfigError(f"{str(folder)!r} is not empty, nor {source!r} itself; give a new folder")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ConfigError(f"{source!r} has its weights in shards; give a new folder for the model with its temperature")
    read_description(folder / CONFIG_FILE)

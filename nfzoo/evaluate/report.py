"""The report of an evaluation, `nfzoo evaluate --report DIR`: figures for machines, pictures, and a page.

The page is one file, which shows everything without a network. `report.json` has all figures but the confusion
matrix, which is a table of its own.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nfzoo.analysis import classification as measures
from nfzoo.analysis.classification import Calibration, ImageScores
from nfzoo.analysis.classification_figures import confusion_figure, corruption_figure, reliability_figure
from nfzoo.analysis.figures import new_figure
from nfzoo.analysis.sheets import SheetEntry, prediction_sheet, thumbnail
from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.errors import CheckpointError, ConfigError
from nfzoo.evaluate.accuracy import Evaluator, Outputs
from nfzoo.evaluate.page import page
from nfzoo.evaluate.scores import Evaluation
from nfzoo.files import read_json
from nfzoo.runtime import program
from nfzoo.runtime.output import csv_cell, json_text
from nfzoo.transforms.decode import open_image

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
TABLE_FILE, MATRIX_FILE = "confusion_matrix.csv", "confusion_matrix.png"
RELIABILITY_FILE, MISTAKES_FILE, CORRUPTIONS_FILE = "reliability.png", "mistakes.png", "corruptions.png"
CLASSES_FILE = "classes.csv"  # of multi-label models, see `multi_label_report`
FILES = (
    PAGE_FILE,
    REPORT_FILE,
    TABLE_FILE,
    MATRIX_FILE,
    RELIABILITY_FILE,
    MISTAKES_FILE,
    CORRUPTIONS_FILE,
    CLASSES_FILE,
)

KIND = "nfzoo evaluation report"
_SEED = 0  # of the bootstrap and of the halves
_MISTAKES, _PAIRS = 24, 20


def check_folder(folder: Path, data: str) -> None:
    """Check that a report can be written; call it before long work.

    Raises:
        ConfigError: for a folder among the data, for one with other files than an earlier report's, and for a file.
        MissingPlotsError: without matplotlib.
    """
    program.check_writable(folder, folder=True)
    new_figure(1, 1)
    if Path(data).is_dir() and folder.resolve().is_relative_to(Path(data).resolve()):
        raise ConfigError(f"the report would lie in {str(folder)!r}, among the data; give a folder elsewhere")
    others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others and not _is_report(folder):
        raise ConfigError(
            f"{str(folder)!r} holds other files than a report's, such as {others[0]!r}; give a new folder"
        )


def _is_report(folder: Path) -> bool:
    try:
        fields = read_json(folder / REPORT_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("kind") == KIND


@dataclass(frozen=True)
class Measured:
    """What the report measures of a model's outputs.

    Attributes:
        scores: of each image, with the probabilities that the model gives.
        confusion: see `classification.confusion_matrix`.
        calibration: of these probabilities.
        temperature: the one that fits all images, `None` if none does: see `classification.fit_temperature`.
        halves: the temperatures of the two halves of the images: see `classification.cross_fitted_temperatures`.
        calibrated: the calibration where each half is measured with the temperature that fits the other.
    """

    scores: ImageScores
    confusion: np.ndarray
    calibration: Calibration
    temperature: float | None
    halves: tuple[float, ...]
    calibrated: Calibration | None


def measure(outputs: Outputs, temperature: float | None) -> Measured:
    """Measure the outputs of a model whose logits are divided by `temperature`, `None` for 1.

    Raises:
        CheckpointError: if a logit is not finite.
    """
    _, labels, logits = outputs
    if not np.isfinite(logits).all():
        raise CheckpointError("the model's outputs are not finite; its weights are damaged, or overflow")
    scores = measures.image_scores(logits, labels, temperature or 1.0)
    confusion = measures.confusion_matrix(labels, scores.prediction, logits.shape[1])
    each = measures.cross_fitted_temperatures(logits, labels, seed=_SEED)
    return Measured(
        scores,
        confusion,
        measures.calibration(scores),
        measures.fit_temperature(logits, labels),
        () if each is None else tuple(sorted({*each.tolist()})),
        None if each is None else measures.calibration(measures.image_scores(logits, labels, each)),
    )


def write_report(
    folder: Path,
    evaluator: Evaluator,
    evaluation: Evaluation,
    outputs: Outputs,
    found: Measured,
    *,
    data: str,
    corruptions: Mapping[str, Any] | None = None,
) -> None:
    """Write the report into a folder that `check_folder` accepts; one process does this.

    An earlier report is replaced file by file, and files of it that the new one lacks are removed.

    Args:
        folder: where to write.
        evaluator, evaluation, outputs, found: the evaluation and what was measured.
        data: the source of the images, which their names in the report leave out.
        corruptions: what `nfzoo.evaluate.robustness` returns, if it was measured.

    Raises:
        DataError: if an image cannot be read any more.
        OSError: if it cannot be written; an earlier report then stays, at least in part.
    """
    labels = class_names(evaluator)
    shown = np.flatnonzero(found.confusion.sum(0) + found.confusion.sum(1))
    confusion, names = found.confusion[np.ix_(shown, shown)], [labels[i] for i in shown.tolist()]
    worst = _worst(evaluator, outputs, found, labels, data)
    fields = _fields(evaluator, evaluation, outputs, found, labels, worst)
    with replaced_folder(folder) as scratch:
        with (scratch / TABLE_FILE).open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            cells = [csv_cell(name) for name in names]
            rows.writerow(["class \\ predicted", *cells])
            rows.writerows([name, *row] for name, row in zip(cells, confusion.tolist(), strict=True))
        confusion_figure(confusion, names, scratch / MATRIX_FILE)
        given = "as the model gives them"
        panels = [(f"Probabilities {given}", found.calibration)]
        if found.calibrated is not None:
            panels.append(("With the other half's temperature", found.calibrated))
        reliability_figure(panels, scratch / RELIABILITY_FILE)
        if worst:
            _sheet(evaluator, worst, scratch / MISTAKES_FILE)
        if corruptions is not None:
            fields["corruptions"] = corruptions
            corruption_figure(corruptions, scratch / CORRUPTIONS_FILE)
        (scratch / REPORT_FILE).write_text(json_text(fields), encoding="utf-8")
        drawn = {path.name: path.read_bytes() for path in sorted(scratch.glob("*.png"))}
        (scratch / PAGE_FILE).write_text(page(fields, drawn), encoding="utf-8")
        written = {path.name for path in scratch.iterdir()}
    for name in {*FILES} - written:
        (folder / name).unlink(missing_ok=True)


def class_names(evaluator: Evaluator) -> Sequence[str]:
    """Return the names of the model's outputs, `class 0` and so on where it has none."""
    model = evaluator.model
    return model.labels or [f"class {i}" for i in range(model.config.num_classes)]


def _worst(
    evaluator: Evaluator, outputs: Outputs, found: Measured, labels: Sequence[str], data: str
) -> list[dict[str, Any]]:
    """Return the mistakes of the greatest loss."""
    scores = found.scores
    wrong = np.flatnonzero(scores.rank > 0)
    rows = wrong[np.argsort(-scores.nll[wrong], kind="stable")][:_MISTAKES].tolist()
    return [
        {
            "index": int(outputs.indices[i]),
            "image": within(evaluator.labelled.images.name(int(outputs.indices[i])), data),
            "label": labels[int(outputs.labels[i])],
            "probability": float(np.exp(-scores.nll[i])),
            "predicted": labels[int(scores.prediction[i])],
            "confidence": float(scores.confidence[i]),
            "loss": float(scores.nll[i]),
        }
        for i in rows
    ]


def within(name: str, data: str) -> str:
    """Return an image's name without the folder of the data, which may be private."""
    path, folder = Path(name), Path(data)
    return path.relative_to(folder).as_posix() if folder.is_dir() and path.is_relative_to(folder) else name


def _sheet(evaluator: Evaluator, worst: Sequence[Mapping[str, Any]], output: Path) -> None:
    entries = []
    for row in worst:
        source, _ = evaluator.labelled.images[row["index"]]
        image = thumbnail(open_image(source, channels=evaluator.model.config.in_channels))
        top = [(row["predicted"], row["confidence"]), (f"right: {row['label']}", row["probability"])]
        entries.append(SheetEntry(image, row["image"], top))
    prediction_sheet(entries, output, title="The worst mistakes, by their loss")


def _fields(
    evaluator: Evaluator,
    evaluation: Evaluation,
    outputs: Outputs,
    found: Measured,
    labels: Sequence[str],
    worst: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    classes = len(labels)
    value = measures.summarize(found.scores, outputs.labels, classes)
    low, high = measures.bootstrap(found.scores, outputs.labels, classes, seed=_SEED)
    by_class, predicted = measures.class_scores(found.confusion), found.confusion.sum(0)
    rows = zip(*(column.tolist() for column in by_class), predicted.tolist(), strict=True)
    names = ("precision", "recall", "f1", "support", "predicted")
    temperature = evaluator.model.temperature
    return {
        "kind": KIND,
        "format": 1,
        "evaluation": evaluation.to_dict(),
        "metrics": {
            name: {"value": v, "low": a, "high": b}
            for name, v, a, b in zip(value._fields, value, low, high, strict=True)
        },
        "bootstrap": {"resamples": measures.RESAMPLES, "level": measures.LEVEL, "seed": _SEED},
        "classes": [
            {"index": i, "label": labels[i], **dict(zip(names, row, strict=True))}
            for i, row in enumerate(rows)
            if row[3] or row[4]
        ],
        "confusions": [
            {"label": labels[a], "predicted": labels[b], "images": count}
            for a, b, count in measures.confusions(found.confusion, _PAIRS)
        ],
        "calibration": {
            "as_given": {"temperature": temperature or 1.0, **_calibration(found.calibration)},
            "cross_fitted": found.calibrated and {"temperatures": found.halves, **_calibration(found.calibrated)},
            "temperature": found.temperature,
        },
        "mistakes": [{key: value for key, value in row.items() if key != "index"} for row in worst],
    }


def _calibration(found: Calibration) -> dict[str, Any]:
    columns = zip(found.counts.tolist(), found.confidence.tolist(), found.accuracy.tolist(), strict=True)
    bins = [
        {"images": n, "confidence": confidence if n else None, "accuracy": accuracy if n else None}
        for n, confidence, accuracy in columns
    ]
    return {"ece": found.ece, "mce": found.mce, "nll": found.nll, "brier": found.brier, "bins": bins}

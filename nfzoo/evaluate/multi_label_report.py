"""The report of a multi-label model, `nfzoo evaluate --report DIR`: figures, a table, a sheet and a page."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nfzoo.analysis import multi_label as measures
from nfzoo.analysis.classification import LEVEL, RESAMPLES
from nfzoo.analysis.sheets import SheetEntry, prediction_sheet, thumbnail
from nfzoo.checkpoint.atomic import replaced_folder
from nfzoo.evaluate.accuracy import Evaluator, Outputs
from nfzoo.evaluate.multi_label import SetEvaluation, evaluate_sets, thresholds_of
from nfzoo.evaluate.page import document, in_html, measured_how, picture, section, table
from nfzoo.evaluate.report import CLASSES_FILE, FILES, KIND, MISTAKES_FILE, PAGE_FILE, REPORT_FILE, class_names, within
from nfzoo.runtime.output import csv_cell, json_text
from nfzoo.transforms.decode import open_image

__all__ = ["evaluate_sets", "write_set_report"]

_SEED = 0  # of the bootstrap
_MISTAKES, _SHOWN, _LOWEST = 24, 30, 20
_CELLS = 1 << 20  # images times classes, beyond which the bootstrap has fewer resamples

_MEASURES = {
    "map": "mean average precision (mAP)",
    "f1": "F1, mean over classes (macro)",
    "micro_f1": "F1 of all pairs of image and label (micro)",
    "loss": "binary cross-entropy",
}
_COLUMNS = {
    "average_precision": "average precision",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "threshold": "threshold",
    "support": "images",
    "predicted": "predicted",
}


def write_set_report(
    folder: Path, evaluator: Evaluator, evaluation: SetEvaluation, outputs: Outputs, *, data: str
) -> None:
    """Write the report into a folder that `report.check_folder` accepts; one process does this.

    Args:
        folder: where to write; an earlier report is replaced.
        evaluator, evaluation, outputs: what `evaluate_sets` took and returned.
        data: the source of the images, which their names in the report leave out.

    Raises:
        DataError: if an image cannot be read any more.
        OSError: if it cannot be written; an earlier report then stays, at least in part.
    """
    fields, worst = _fields(evaluator, evaluation, outputs, data)
    with replaced_folder(folder) as scratch:
        with (scratch / CLASSES_FILE).open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["class", *_COLUMNS])
            rows.writerows([csv_cell(row["label"]), *(row[key] for key in _COLUMNS)] for row in evaluation.per_class)
        if worst:
            _sheet(evaluator, worst, scratch / MISTAKES_FILE)
        (scratch / REPORT_FILE).write_text(json_text(fields), encoding="utf-8")
        drawn = {path.name: path.read_bytes() for path in sorted(scratch.glob("*.png"))}
        (scratch / PAGE_FILE).write_text(set_page(fields, drawn), encoding="utf-8")
        written = {path.name for path in scratch.iterdir()}
    for name in {*FILES} - written:
        (folder / name).unlink(missing_ok=True)


def _fields(
    evaluator: Evaluator, evaluation: SetEvaluation, outputs: Outputs, data: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the content of `report.json`, and the mistakes of the greatest loss with their indices."""
    thresholds = thresholds_of(evaluator)
    resamples = RESAMPLES if outputs.logits.size <= _CELLS else RESAMPLES // 10
    value = measures.summarize_sets(outputs.logits, outputs.labels, thresholds)
    low, high = measures.bootstrap_sets(outputs.logits, outputs.labels, thresholds, resamples=resamples, seed=_SEED)
    worst = _worst(evaluator, outputs, thresholds, data)
    about = evaluation.to_dict()
    return {
        "kind": KIND,
        "format": 1,
        "problem_type": about["problem_type"],
        "evaluation": {key: part for key, part in about.items() if key != "per_class"},
        "metrics": {
            name: {"value": v, "low": a, "high": b}
            for name, v, a, b in zip(value._fields, value, low, high, strict=True)
        },
        "bootstrap": {"resamples": resamples, "level": LEVEL, "seed": _SEED},
        "classes": list(evaluation.per_class),
        "mistakes": [{key: part for key, part in row.items() if key != "index"} for row in worst],
    }, worst


def _worst(evaluator: Evaluator, outputs: Outputs, thresholds: np.ndarray, data: str) -> list[dict[str, Any]]:
    """Return the images of the greatest loss among those whose labels are not all right."""
    names, probabilities = class_names(evaluator), measures.sigmoid(outputs.logits).astype(np.float32)
    found = probabilities >= thresholds.astype(np.float32)
    losses = measures.image_losses(outputs.logits, outputs.labels)
    wrong = np.flatnonzero((found != outputs.labels).any(1))
    rows = wrong[np.argsort(-losses[wrong], kind="stable")][:_MISTAKES].tolist()

    def listed(row: int, chosen: np.ndarray) -> list[dict[str, Any]]:
        order = np.flatnonzero(chosen)
        order = order[np.argsort(-probabilities[row, order], kind="stable")].tolist()
        return [{"label": names[c], "probability": float(probabilities[row, c])} for c in order]

    return [
        {
            "index": int(outputs.indices[i]),
            "image": within(evaluator.labelled.images.name(int(outputs.indices[i])), data),
            "missed": listed(i, outputs.labels[i] & ~found[i]),
            "wrong": listed(i, found[i] & ~outputs.labels[i]),
            "right": listed(i, found[i] & outputs.labels[i]),
            "loss": float(losses[i]),
        }
        for i in rows
    ]


def _sheet(evaluator: Evaluator, worst: Sequence[Mapping[str, Any]], output: Path) -> None:
    entries = []
    for row in worst:
        source, _ = evaluator.labelled.images[row["index"]]
        image = thumbnail(open_image(source, channels=evaluator.model.config.in_channels))
        top = [(f"{kind}: {one['label']}", one["probability"]) for kind in ("missed", "wrong") for one in row[kind]]
        entries.append(SheetEntry(image, row["image"], top))
    prediction_sheet(entries, output, title="The worst mistakes, by their loss")


def set_page(fields: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Return the page of a report: see `page.page`."""
    about = fields["evaluation"]
    data = about["dataset"] + (f", {about['split']}" if "split" in about else "")
    return document(
        f"{about['model']} on {data}",
        [
            _summary(fields),
            section("Classes", _classes(fields["classes"])),
            section("The worst mistakes", _mistakes(fields["mistakes"], pictures)),
            section("How it was measured", measured_how(about)),
        ],
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _summary(fields: Mapping[str, Any]) -> str:
    about, metrics, drawn = fields["evaluation"], fields["metrics"], fields["bootstrap"]
    skipped = f", {about['skipped']:,} more cannot be read" if about["skipped"] else ""
    large = [
        (_percent(metrics["map"]["value"]), "mean average precision"),
        (_percent(metrics["f1"]["value"]), "macro F1"),
        (_percent(metrics["micro_f1"]["value"]), "micro F1"),
        (f"{about['images']:,}", f"images of {about['classes']:,} classes{skipped}"),
    ]
    figures = "".join(f"<div><b>{value}</b>{in_html(name)}</div>" for value, name in large)
    rows = []
    for name, words in _MEASURES.items():
        numbers = (metrics[name][key] for key in ("value", "low", "high"))
        value, low, high = (f"{v:.4f}" if name == "loss" else _percent(v) for v in numbers)
        rows.append((in_html(words), value, f"{low} to {high}"))
    note = (
        "An image has the labels whose probabilities, the sigmoids of the logits, reach the thresholds of their "
        "classes; average precisions and the loss depend on no threshold. If the thresholds were fitted to these very "
        "images, precision, recall and F1 are optimistic. The intervals are those of the percentile bootstrap, "
        f"{drawn['resamples']:,} resamples of the images."
    )
    head = ("measure", "value", f"{drawn['level']:.0%} interval")
    return (
        f'<section>\n<div class="figures">{figures}</div>\n{table(head, rows, 1)}\n'
        f'<p class="quiet">{note}</p>\n</section>\n'
    )


def _classes(rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) <= _SHOWN:
        return _class_table(rows)
    known = [row for row in rows if row["average_precision"] is not None]
    lowest = sorted(known, key=lambda row: row["average_precision"])[:_LOWEST]
    return (
        f"<p>The {len(lowest)} of the lowest average precision:</p>\n{_class_table(lowest)}\n"
        f"<details><summary>All {len(rows):,} classes</summary>\n{_class_table(rows)}\n</details>"
    )


def _class_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in rows:
        ap = row["average_precision"]
        bar = "" if ap is None else f'<span class="bar"><i style="width:{100 * ap:.1f}%"></i></span>'
        precision = _percent(row["precision"] if row["predicted"] else None)
        recall, f1 = (_percent(row[key] if row["support"] else None) for key in ("recall", "f1"))
        counts = (f"{row[key]:,}" for key in ("support", "predicted"))
        cells.append(
            (in_html(row["label"]), bar, _percent(ap), precision, recall, f1, f"{row['threshold']:.3f}", *counts)
        )
    return table(("class", "", *_COLUMNS.values()), cells, 2)


def _mistakes(rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> str:
    if not rows:
        return "<p>There are none: all labels of all images are right.</p>"
    cells = [
        (
            in_html(row["image"]),
            *(
                ", ".join(f"{in_html(one['label'])} {one['probability']:.1%}" for one in row[kind]) or "–"
                for kind in ("missed", "wrong", "right")
            ),
            f"{row['loss']:.3f}",
        )
        for row in rows
    ]
    return (
        f"<p>The {len(rows)} images of the greatest loss among those with a label too few or too many.</p>\n"
        f"{picture(pictures, MISTAKES_FILE, 'Images of the worst mistakes', 'sheet')}\n"
        f"<details><summary>As a table</summary>\n"
        f"{table(('image', 'missed', 'wrong', 'right', 'loss'), cells, 4)}\n</details>"
    )

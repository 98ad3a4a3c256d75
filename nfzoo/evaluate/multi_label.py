"""Scores of multi-label classifiers: in training, and of a saved model on a table of sets of labels.

Every image counts once with any number of processes, and no figure depends on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfzoo.analysis import multi_label as measures
from nfzoo.checkpoint.model_folder import MULTI_LABEL
from nfzoo.errors import CheckpointError
from nfzoo.evaluate.accuracy import Evaluator, Outputs
from nfzoo.evaluate.scores import lines_of
from nfzoo.runtime.device import backend
from nfzoo.runtime.distributed import gather
from nfzoo.runtime.output import escaped


class SetScore(NamedTuple):
    """Hold the scores of a function from images to logits on multi-label data.

    Attributes:
        images: number of images.
        loss: binary cross-entropy, the mean over images and classes.
        map: mean average precision, over the classes that an image has.
        f1, micro_f1: macro and micro F1 with thresholds of 0.5.
        thresholds: those that maximise the F1 of each class on these images; `None` if a logit is not finite.
    """

    images: int
    loss: float
    map: float
    f1: float
    micro_f1: float
    thresholds: tuple[float, ...] | None


@torch.no_grad()
def set_scores(
    functions: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
) -> list[SetScore]:
    """Score several functions from images to logits `(N, classes)`, over the batches of all processes together.

    Every process holds the logits of all images in its memory. If one is not finite, loss and mean average precision
    are NaN.

    Args:
        batches: images and, bool `(N, classes)`, whether they have each label.
    """
    kept: list[list[np.ndarray]] = [[] for _ in functions]
    known: list[np.ndarray] = []
    target = backend(device)
    for images, labels in batches:
        images = target.images(images)
        known.append(labels.cpu().numpy())
        for logits, own in zip(functions, kept, strict=True):
            own.append(logits(images).float().cpu().numpy())
    parts = gather([(known, kept)])
    targets = np.concatenate([batch for own, _ in parts for batch in own] or [np.zeros((0, 1), bool)])
    return [
        _score(np.concatenate([batch for _, own in parts for batch in own[k]] or [np.zeros((0, 1))]), targets)
        for k in range(len(functions))
    ]


def _score(logits: np.ndarray, targets: np.ndarray) -> SetScore:
    if not np.isfinite(logits).all():
        nan = float("nan")
        return SetScore(len(logits), nan, nan, nan, nan, None)
    at_half = measures.label_scores(logits, targets, np.full(logits.shape[1], 0.5))
    return SetScore(
        len(logits),
        measures.mean_loss(measures.image_losses(logits, targets)),
        measures.mean_over_known(measures.average_precisions(logits, targets)),
        at_half.macro_f1(),
        at_half.micro_f1(),
        measures.fit_thresholds(logits, targets),
    )


# -- a saved model


class SetEvaluation(NamedTuple):
    """The score of a multi-label model on a data set, ready for a model card.

    A class that the data do not have counts as one that no image has.

    Attributes:
        model, dataset, split, matched_by, classes, images, skipped: see `Evaluation`.
        size, resize, nfzoo, torch, date, trained_on, weights: see `Evaluation`.
        map: mean average precision, over the classes that an image has.
        f1, micro_f1: macro F1, over the classes that occur among labels or predictions, and micro F1, both at the
            thresholds.
        loss: binary cross-entropy, the mean over images and classes.
        per_class: a row for each class that occurs: `index`, `label`, `average_precision` (`None` if no image has it),
            `precision`, `recall`, `f1`, `threshold`, `support` and `predicted`, which are numbers of images.
    """

    model: str
    dataset: str
    split: str | None
    matched_by: str
    classes: int
    images: int
    skipped: int
    map: float
    f1: float
    micro_f1: float
    loss: float
    size: int
    resize: str
    nfzoo: str
    torch: str
    per_class: Sequence[dict[str, Any]]
    date: str | None = None
    trained_on: bool | None = None
    weights: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`, without fields that are `None`."""
        fields = {key: value for key, value in self._asdict().items() if value is not None}
        return {"problem_type": MULTI_LABEL, **fields, "per_class": list(self.per_class)}


def evaluate_sets(evaluator: Evaluator) -> tuple[SetEvaluation, Outputs]:
    """Score a multi-label model on images with sets of labels, and return the logits as well.

    Raises:
        DataError: if the images cannot be read.
        CheckpointError: if the outputs are not finite.
    """
    model = evaluator.model
    outputs, skipped = evaluator.logits()
    logits, targets = outputs.logits, outputs.labels
    if not np.isfinite(logits).all():
        raise CheckpointError("the model's outputs are not finite; its weights are damaged, or overflow")
    limits = thresholds_of(evaluator)
    found = measures.summarize_sets(logits, targets, limits)
    names = model.labels or [f"class {i}" for i in range(model.config.num_classes)]
    return SetEvaluation(
        **evaluator.facts(),
        images=len(logits),
        skipped=skipped,
        map=found.map,
        f1=found.f1,
        micro_f1=found.micro_f1,
        loss=found.loss,
        per_class=_per_class(logits, targets, limits, names),
    ), outputs


def thresholds_of(evaluator: Evaluator) -> np.ndarray:
    """Return the thresholds of the model's probabilities, `(classes,)`."""
    model = evaluator.model
    return np.array(model.thresholds or [0.5] * model.config.num_classes)


def _per_class(
    logits: np.ndarray, targets: np.ndarray, thresholds: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    precisions, found = measures.average_precisions(logits, targets), measures.label_scores(logits, targets, thresholds)
    return [
        {
            "index": c,
            "label": names[c],
            "average_precision": None if np.isnan(precisions[c]) else float(precisions[c]),
            "precision": float(found.precision[c]),
            "recall": float(found.recall[c]),
            "f1": float(found.f1[c]),
            "threshold": float(thresholds[c]),
            "support": int(found.support[c]),
            "predicted": int(found.predicted[c]),
        }
        for c in range(len(names))
        if found.support[c] or found.predicted[c]
    ]


def set_table(result: SetEvaluation) -> str:
    """Return an evaluation as lines of text, with a row for each class."""
    scores = {"mAP": result.map, "macro F1": result.f1, "micro F1": result.micro_f1}
    lines = lines_of(result, {name: f"{value:7.2%}" for name, value in scores.items()})
    shown = [escaped(row["label"]) for row in result.per_class]
    width = min(max(map(len, [*shown, "class"])), 40)
    lines += ["", f"{'class':<{width}}      AP  precision  recall      F1  threshold  images"]
    for name, row in zip(shown, result.per_class, strict=True):
        ap = "      -" if row["average_precision"] is None else f"{row['average_precision']:7.2%}"
        lines.append(
            f"{name:<{width}} {ap}    {row['precision']:7.2%} {row['recall']:7.2%} {row['f1']:7.2%}  "
            f"{row['threshold']:9.4f} {row['support']:7,}"
        )
    return "\n".join(lines)

"""Accuracy under corruptions: `nfzoo evaluate --corruptions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nfzoo.evaluate.accuracy import Evaluator
from nfzoo.evaluate.scores import Evaluation
from nfzoo.transforms.corruptions import KINDS, SEVERITIES, Corruption


def robustness(evaluator: Evaluator, clean: Evaluation, names: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Score a model under corruptions of its inputs, at five severities each; all processes return the same.

    An input is corrupted after resizing and cropping, as ImageNet-C is.

    Args:
        evaluator: the model and its images.
        clean: their evaluation without corruption.
        names: of `nfzoo.transforms.corruptions.KINDS`.
        seed: with the index of an image, of what is drawn at random.

    Returns:
        JSON-ready fields: the `seed`, the `clean` scores, a row for each corruption and severity, `means` of top-1
        accuracy over the severities, and the `mean` of these.
    """
    rows = []
    for name in names:
        for severity in SEVERITIES:
            corruption = Corruption(name, severity, seed)
            found = evaluator.evaluation(corruption)
            rows.append({"corruption": name, "severity": severity, "strength": corruption.strength, **_scores(found)})
    means = {
        name: sum(row["top1"] for row in rows if row["corruption"] == name) / len(SEVERITIES)
        for name in dict.fromkeys(names)
    }
    return {
        "seed": seed,
        "clean": _scores(clean),
        "meaning": {name: KINDS[name].meaning for name in means},
        "rows": rows,
        "means": means,
        "mean": sum(means.values()) / len(means),
    }


def _scores(found: Evaluation) -> dict[str, Any]:
    return {"top1": found.top1, "top5": found.top5, "loss": found.loss}


def robustness_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the top-1 accuracies as cells of a table, whose first row is its head."""
    clean = f"{found['clean']['top1']:.2%}"
    rows = [("top-1", "clean", *map(str, SEVERITIES), "mean")]
    for name, mean in found["means"].items():
        each = (f"{row['top1']:.2%}" for row in found["rows"] if row["corruption"] == name)
        rows.append((name.replace("_", " "), clean, *each, f"{mean:.2%}"))
    if len(found["means"]) > 1:
        rows.append(("mean", clean, *("" for _ in SEVERITIES), f"{found['mean']:.2%}"))
    return rows


def robustness_table(found: Mapping[str, Any]) -> str:
    """Return the top-1 accuracies as lines of text."""
    rows = robustness_rows(found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)

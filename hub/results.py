"""Results of a model as the Hub reads them: the model index of a card, `.eval_results/*.yaml`, and carbon emissions."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult

from nfzoo.checkpoint.model_folder import Description
from nfzoo.data.labels import imagenet
from nfzoo.data.source import HUB, split_options
from nfzoo.errors import CheckpointError
from nfzoo.evaluate import EVALUATION_FILE
from nfzoo.evaluate.scores import tells_top5
from nfzoo.files import read_text
from nfzoo.hub.registry import is_repository

logger = logging.getLogger("nfzoo")

IMAGENET = "imagenet-1k"
BENCHMARK = "ILSVRC/imagenet-1k"  # where the Hub keeps it
VALIDATION_IMAGES = 50_000  # of ImageNet

EVAL_FOLDER = ".eval_results"
EMISSIONS_FILE = "emissions.csv"
LONGEST_PLACE = 200
MOST_EMISSIONS = 1 << 20  # bytes; a run adds a row of some 500

_METRICS = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("accuracy", "top-5 accuracy")}
_SET_METRICS = {
    "map": ("mean_average_precision", "mean average precision"),
    "f1": ("f1", "macro F1"),
    "micro_f1": ("f1", "micro F1"),
}


def measured(description: Description, evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """Return the results of `nfzoo evaluate --json` for the model index.

    Raises:
        CheckpointError: for fields that are missing or of another type.
    """
    metrics = _METRICS if description.problem_type is None else _SET_METRICS
    kinds = {"dataset": str, "images": int, **dict.fromkeys(metrics, float | int), "size": int}
    for key, kind in (kinds | ({"classes": int} if "classes" in evaluation else {})).items():
        if not isinstance(evaluation.get(key), kind):
            raise CheckpointError(
                f"{EVALUATION_FILE} lacks {key!r}, or it is of another type; write it with `nfzoo evaluate --json`"
            )
    whole = description.labels == imagenet() and evaluation.get("classes") == 1000
    dataset, config = _on_hub(evaluation["dataset"])
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset or (IMAGENET if whole else "imagefolder"),
            dataset_name=evaluation["dataset"],
            dataset_config=config,
            dataset_split="train" if evaluation.get("trained_on") else evaluation.get("split"),
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(evaluation[key]), 6),
        )
        for key, (kind, name) in metrics.items()
        if key != "top5" or tells_top5(evaluation.get("classes", 1000))
    ]


def trained(description: Description) -> list[EvalResult]:
    """Return the accuracy, or mean average precision, on held-out images that `nfzoo train` notes in the provenance."""
    provenance = description.provenance or {}
    kind, name = ("accuracy", "top-1 accuracy") if description.problem_type is None else _SET_METRICS["map"]
    accuracy, data = provenance.get("accuracy" if description.problem_type is None else "map"), provenance.get("data")
    if not isinstance(accuracy, float) or not isinstance(data, str):
        return []
    dataset = training_data(description)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset or "imagefolder",
            dataset_name=dataset or PurePath(data).name or data,
            dataset_split="validation",
            metric_type=kind,
            metric_name=name,
            metric_value=round(accuracy, 6),
        )
    ]


def training_data(description: Description) -> str | None:
    """Return the data set of the Hub that a model was trained on, as its provenance says; `None` for other data."""
    data = (description.provenance or {}).get("data")
    if not isinstance(data, str) or not data.startswith(HUB):
        return None
    return _on_hub(split_options(data)[0].removeprefix(HUB))[0]


def _on_hub(dataset: str) -> tuple[str | None, str | None]:
    """Return repository and configuration of `ORG/NAME:CONFIG`; `None` for the name of a folder, which has no slash."""
    repository, _, config = dataset.partition(":")
    return (repository, config or None) if is_repository(repository) else (None, None)


def eval_results(repo_id: str, description: Description, evaluation: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the file of `.eval_results/` of an evaluation, by its name: none if its data are no data set of the Hub.

    The Hub shows the result with the data set's leaderboard if the data set is a benchmark there, and has the task
    `default`, or one named as the configuration. Of a folder, ImageNet's 50,000 validation images alone are known.

    Source: https://huggingface.co/docs/hub/eval-results
    """
    first, *_ = measured(description, evaluation)
    dataset, config = _on_hub(evaluation["dataset"])
    if first.dataset_type == IMAGENET and evaluation["images"] == VALIDATION_IMAGES:
        dataset = BENCHMARK
    if dataset is None or evaluation.get("trained_on"):
        return {}
    side = f"{evaluation['size']} x {evaluation['size']} pixels"
    date = evaluation.get("date")
    entry = {
        "dataset": {"id": dataset, "task_id": config or "default"},
        "value": first.metric_value,
        **({"date": date} if isinstance(date, str) else {}),
        "source": {
            "url": f"https://huggingface.co/{repo_id}/blob/main/{EVALUATION_FILE}",
            "name": "nfzoo evaluate",
        },
        "notes": f"{first.metric_name} on {evaluation['images']:,} images at {side}",
    }
    name = f"{EVAL_FOLDER}/{dataset.rpartition('/')[2]}.yaml"
    return {name: yaml.safe_dump([entry], sort_keys=False, allow_unicode=True).encode()}


def emissions(folder: Path, description: Description) -> dict[str, Any] | None:
    """Return the card's `co2_eq_emissions` from the `emissions.csv` that CodeCarbon wrote into a run's folder.

    Grams of CO2 equivalents, summed over the rows; place and hardware are those of the last. `None` without the file,
    and, with a warning, for one of another form.

    Source: https://huggingface.co/docs/hub/model-cards-co2; CodeCarbon's output has kilograms.
    """
    path = folder / EMISSIONS_FILE
    if not path.is_file():
        return None
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, MOST_EMISSIONS))))
        grams = 1000 * math.fsum(float(row["emissions"]) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        rows, grams = [], math.nan
    if not rows or not (math.isfinite(grams) and grams >= 0):
        logger.warning("%s is left out of the card: it is no file that CodeCarbon writes", path)
        return None
    texts = {key: value for key, value in rows[-1].items() if isinstance(key, str) and isinstance(value, str)}
    last = {key: " ".join(value.split())[:LONGEST_PLACE] for key, value in texts.items()}
    provenance = description.provenance or {}
    started = provenance.get("trained_from")
    count = re.sub(r"\.0+$", "", last.get("gpu_count", ""))
    hardware = last.get("gpu_model") or last.get("cpu_model")
    known = {
        "emissions": float(f"{grams:.4g}"),
        "source": "CodeCarbon",
        "training_type": None if started is None else "pre-training" if started == "random weights" else "fine-tuning",
        "geographical_location": ", ".join(filter(None, (last.get("region"), last.get("country_name")))),
        "hardware_used": f"{count} x {hardware}" if hardware == last.get("gpu_model") and count else hardware,
    }
    return {key: value for key, value in known.items() if value not in (None, "")}

"""The folder that a training run leaves: the model with its provenance, the epochs' figures and curves, the recipe."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nfzoo.analysis.figures import training_curves
from nfzoo.checkpoint.atomic import replaced
from nfzoo.checkpoint.model_folder import Description, save_checkpoint
from nfzoo.data.source import has_held_out
from nfzoo.train.config import TrainConfig

logger = logging.getLogger("nfzoo")

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
RUN_FILE = "train.yaml"


def write_run(
    config: TrainConfig,
    description: Description,
    params: Mapping[str, Tensor],
    rows: Sequence[Mapping[str, Any]],
    *,
    pretrained: bool,
) -> None:
    """Write the run's output folder as it is after an epoch; an `OSError` where the disk does not take it.

    Args:
        params: on the CPU, the moving average if the recipe has one.
        rows: figures of all epochs so far, the last of which is this one's.
        pretrained: whether the run began with somebody's weights.
    """
    output, row, averaged = Path(config.output), rows[-1], config.optim.ema_decay is not None
    provenance = {
        "trained_from": _public(config.model) if pretrained else "random weights",
        "data": _public(config.data),
        "epochs": row["epoch"],
        "weights": "ema" if averaged else "live",
        "accuracy": row["ema_accuracy"] if averaged else row["accuracy"],
    }
    if not has_held_out(config.data):
        provenance["validation_fraction"] = config.validation_fraction
    save_checkpoint(output, description._replace(provenance=provenance), params)
    with replaced(output / METRICS_FILE) as scratch:
        lines = [{k: None if v != v else v for k, v in row.items()} for row in rows]  # JSON has no NaN
        scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with replaced(output / RUN_FILE) as scratch:
        scratch.write_text(config.to_yaml(), encoding="utf-8")
    try:
        training_curves(output / METRICS_FILE, output / CURVES_FILE)
    except ModuleNotFoundError:
        logger.info("no %s: the plots need matplotlib (pip install 'nfzoo[plots]')", CURVES_FILE)


def _public(source: str) -> str:
    """Return a name as it is, and of a path its last part: a shared checkpoint must not tell private folders."""
    return Path(source).resolve().name if Path(source).exists() else source

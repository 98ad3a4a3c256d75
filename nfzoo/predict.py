"""From image files to labels with probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nfzoo.analysis.figures import SHEET_LIMIT, SheetEntry, check_png, prediction_sheet, thumbnail
from nfzoo.config import is_int
from nfzoo.errors import CheckpointError, ConfigError, DataError
from nfzoo.nn import NFNet
from nfzoo.runtime.device import backend, usable_device
from nfzoo.transforms.decode import IMAGE_SUFFIXES, open_image
from nfzoo.transforms.preprocess import evaluation_transform

_BLANK = Image.new("RGB", (1, 1))


class Prediction(NamedTuple):
    """What a model sees in an image: (label, probability) pairs, the most probable first."""

    path: Path
    top: list[tuple[str, float]]


def classify(
    model: NFNet, images: Sequence[Tensor], *, batch_size: int = 32, topk: int = 5
) -> list[list[tuple[str, float]]]:
    """The `topk` most probable labels of each image `(C, H, W)`, with their softmax probabilities.

    Computes without noise whatever mode the model is in, on the device of its parameters. Images of one batch have one
    size. A model without labels has "class 0", "class 1", …; one with fewer classes than `topk` gives them all.

    Raises:
        CheckpointError: if the logits are not finite.
    """
    _check_counts(batch_size=batch_size, topk=topk)
    p = next(model.parameters())
    where = backend(p.device)
    results: list[list[tuple[str, float]]] = []
    for start in range(0, len(images), batch_size):
        x = where.images(torch.stack(list(images[start : start + batch_size])), p.dtype)
        with torch.inference_mode():
            logits = model(x, None if model.config.folded else {}).float()  # no noise
            if not logits.isfinite().all():
                raise CheckpointError("the model's outputs are not finite; its weights are damaged, or overflow")
            top = logits.softmax(1).topk(min(topk, logits.shape[1]), dim=1)
        for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            results.append([(_label(model, i), value) for i, value in zip(indices, values, strict=True)])
    return results


def predict(
    model: NFNet,
    paths: Sequence[str | Path],
    *,
    topk: int = 5,
    sheet: str | Path | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> list[Prediction]:
    """What `model` sees in image files, prepared by its own evaluation rule.

    Args:
        sheet: a PNG file to write, which shows the images with their labels (of many, the first `SHEET_LIMIT`).
        device: where to compute, and where the model then stays; by default where it is.

    Raises:
        DataError: for a file that is no readable image; nothing is written then.
        ConfigError: for a device that is not there.
    """
    _check_counts(batch_size=batch_size, topk=topk)
    files = [Path(path) for path in paths]
    if not files:
        raise DataError("there are no images to look at; give at least one")
    if sheet is not None:
        sheet = Path(sheet)
        check_png(sheet)
        if sheet.resolve() in {path.resolve() for path in files}:
            raise DataError(f"the sheet {str(sheet)!r} would overwrite one of the images; give it another name")
    if device is not None:
        model = model.to(usable_device(device))
    predictions: list[Prediction] = []
    entries: list[SheetEntry] = []
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        inputs: list[Tensor] = []
        thumbs = []
        for path in batch:
            image = open_image(path, channels=model.config.in_channels)
            inputs.append(evaluation_transform(image, model.preprocessing))
            thumbs.append(thumbnail(image) if sheet is not None and start + len(thumbs) < SHEET_LIMIT else _BLANK)
        for path, thumb, top in zip(
            batch, thumbs, classify(model, inputs, batch_size=batch_size, topk=topk), strict=True
        ):
            predictions.append(Prediction(path, top))
            entries.append(SheetEntry(thumb, path.name, top))
    if sheet is not None:
        count = f"{len(files)} image{'s' if len(files) > 1 else ''}"
        prediction_sheet(entries, sheet, title=f"{model.name or 'model'}: {count}")
    return predictions


def image_files(sources: Sequence[str | Path], *, without: str | Path | None = None) -> list[Path]:
    """The files meant by paths of images and of folders; a folder stands for the images directly inside, sorted.

    Args:
        without: a file to pass over in folders, such as the sheet of an earlier run.

    Raises:
        DataError: for a path that does not exist, or a folder without images.
    """
    skipped = None if without is None else Path(without).resolve()
    found: list[Path] = []
    for source in map(Path, sources):
        if not source.is_dir():
            if not source.exists():
                raise DataError(f"{source} does not exist; give an image or a folder of images")
            found.append(source)
            continue
        inside = sorted(
            path
            for path in source.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not path.name.startswith(".")
            and path.is_file()
            and path.resolve() != skipped
        )
        if not inside:
            raise DataError(f"the folder {source} holds no images (folders inside it are not searched)")
        found += inside
    return found


def _label(model: NFNet, index: int) -> str:
    return f"class {index}" if model.labels is None else model.labels[index]


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not is_int(value, 1):
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")

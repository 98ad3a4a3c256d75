"""Most probable labels of image files, and the outputs of a model for large data sets (see `nfzoo.bulk`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nfzoo.analysis import explanations
from nfzoo.analysis.explanations import METHODS
from nfzoo.analysis.sheets import SHEET_LIMIT, SheetEntry, prediction_sheet, thumbnail
from nfzoo.analysis.style import check_png
from nfzoo.config import is_int
from nfzoo.errors import CheckpointError, ConfigError, DataError
from nfzoo.files import nearest_path
from nfzoo.nn import NFNet
from nfzoo.runtime.device import AUTOCAST, backend, usable_device
from nfzoo.transforms.decode import IMAGE_SUFFIXES, open_image
from nfzoo.transforms.preprocess import evaluation_transform

_BLANK = Image.new("RGB", (1, 1))


TOPK = 5
"""The labels that are given of an image where no other number is asked for."""


class Prediction(NamedTuple):
    """(label, probability) pairs for an image, the most probable first; of a multi-label model perhaps none."""

    path: Path
    top: list[tuple[str, float]]


def classify(
    model: NFNet, images: Sequence[Tensor], *, batch_size: int = 32, topk: int | None = None
) -> list[list[tuple[str, float]]]:
    """Return the `topk` most probable labels of each image `(C, H, W)`, with their probabilities; `TOPK` by default.

    The probabilities are the softmax of the logits, divided by `model.temperature` if the model has one. Of a
    multi-label model they are sigmoids, and an image has all labels whose sigmoids reach their `thresholds`, but at
    most `topk` if that is given.

    There is no noise, even in training mode. The device is that of the parameters. Images of one batch must have one
    size. Without labels the classes are called "class 0", "class 1", …; a model with fewer classes than `topk` returns
    all of them.

    Raises:
        CheckpointError: if the logits are not finite.
        ConfigError: for a model without classifier.
    """
    _check_counts(batch_size=batch_size, topk=TOPK if topk is None else topk)
    model.config.check_classifier()
    p = next(model.parameters())
    target = backend(p.device)
    results: list[list[tuple[str, float]]] = []
    for start in range(0, len(images), batch_size):
        x = target.images(torch.stack(list(images[start : start + batch_size])), p.dtype)
        with torch.inference_mode():
            logits = model(x, None if model.config.folded else {}).float()  # no noise
            if not logits.isfinite().all():
                raise CheckpointError("the model's outputs are not finite; its weights are damaged, or overflow")
        results += top_labels(model, logits, topk)
    return results


def top_labels(model: NFNet, logits: Tensor, topk: int | None = None) -> list[list[tuple[str, float]]]:
    """Return the labels of each image, with probabilities, from its logits `(n, classes)`: see `classify`."""
    classes, probabilities = _answers(model, logits, topk)
    return [
        [(_label(model, i), value) for i, value in zip(indices, values, strict=True)]
        for indices, values in zip(classes, probabilities, strict=True)
    ]


def _answers(model: NFNet, logits: Tensor, topk: int | None) -> tuple[list[list[int]], list[list[float]]]:
    """Return numbers and probabilities of the labels of each image."""
    if model.multi_label:
        return label_sets(logits, thresholds(model), topk)
    top = (logits / (model.temperature or 1.0)).softmax(1).topk(min(topk or TOPK, logits.shape[1]), dim=1)
    return top.indices.tolist(), top.values.tolist()


def thresholds(model: NFNet) -> Tensor:
    """Return the thresholds of a multi-label model's probabilities, float32 `(classes,)`."""
    return torch.tensor(model.thresholds or [0.5] * model.config.num_classes, dtype=torch.float32)


def label_sets(
    logits: Tensor, thresholds: Tensor, topk: int | None = None
) -> tuple[list[list[int]], list[list[float]]]:
    """Return numbers and probabilities of the labels whose sigmoids reach the thresholds, the most probable first.

    Args:
        logits: `(n, classes)`.
        thresholds: `(classes,)`.
        topk: the most labels that an image gets.
    """
    found = logits.sigmoid().cpu().sort(dim=1, descending=True, stable=True)
    reached = found.values >= thresholds[found.indices]
    rows = zip(found.indices, found.values, reached, strict=True)
    chosen = [(index[there][:topk].tolist(), value[there][:topk].tolist()) for index, value, there in rows]
    return [classes for classes, _ in chosen], [values for _, values in chosen]


def predict(
    model: NFNet,
    paths: Sequence[str | Path],
    *,
    topk: int | None = None,
    sheet: str | Path | None = None,
    explain: str | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> list[Prediction]:
    """Return the labels of image files, as `classify` does, after the model's own preprocessing.

    Args:
        sheet: a PNG file to write, with the images (at most `SHEET_LIMIT`) and their labels.
        explain: show in the sheet where the model finds the most probable label, by `gradcam` or `occlusion`: see
            `nfzoo.analysis.explanations`. The images are then drawn as the model gets them.
        device: device to which the model is moved; by default it stays where it is.

    Raises:
        DataError: for an unreadable image; nothing is written then.
        ConfigError: for a device that is not available, and for explanations without a sheet or of another kind.
    """
    _check_counts(batch_size=batch_size, topk=TOPK if topk is None else topk)
    if explain is not None and (sheet is None or explain not in METHODS):
        raise ConfigError(f"{explain!r} is to be {' or '.join(METHODS)}, and drawn into a sheet: give one, too")
    files = [Path(path) for path in paths]
    if not files:
        raise DataError("there are no images to classify; give at least one")
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
        if explain is not None and start < SHEET_LIMIT:
            shown = inputs[: SHEET_LIMIT - start]
            thumbs = [*_explained(model, shown, explain, batch_size), *thumbs[len(shown) :]]
        for path, thumb, top in zip(
            batch, thumbs, classify(model, inputs, batch_size=batch_size, topk=topk), strict=True
        ):
            predictions.append(Prediction(path, top))
            entries.append(SheetEntry(thumb, path.name, top))
    if sheet is not None:
        count = f"{len(files)} image{'s' if len(files) > 1 else ''}"
        of = "the most probable label" if model.multi_label else "the first label"
        kind = "" if explain is None else f", {explain} of {of}"
        prediction_sheet(entries, sheet, title=f"{model.name or 'model'}: {count}{kind}")
    return predictions


def _explained(model: NFNet, inputs: Sequence[Tensor], method: str, batch_size: int) -> list[Image.Image]:
    """Return pictures of where the model finds the most probable label of each image."""
    p = next(model.parameters())
    x = backend(p.device).images(torch.stack(list(inputs)), p.dtype)
    heat = explanations.explain(model.config, dict(model.named_parameters()), x, method, batch_size=batch_size)
    return [
        thumbnail(explanations.overlay(image, map_, model.preprocessing))
        for image, map_ in zip(inputs, heat, strict=True)
    ]


def predict_images(model: NFNet, images: Any, *, topk: int | None = None, batch_size: int = 32) -> Any:
    """Return the labels of one image, of a folder or of a list: see `NFNet.predict`."""
    _check_counts(batch_size=batch_size, topk=TOPK if topk is None else topk)
    model.config.check_classifier()
    if isinstance(images, str | Path) and Path(images).is_dir():
        files = image_files([images])
        return dict(zip(files, predict_images(model, files, topk=topk, batch_size=batch_size), strict=True))
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        return predict_images(model, [images], topk=topk, batch_size=batch_size)[0]
    results: list[list[tuple[str, float]]] = []
    for start in range(0, len(images), batch_size):  # so that no more images than these are decoded at once
        inputs = [model.preprocess(image) for image in images[start : start + batch_size]]
        results += classify(model, inputs, batch_size=batch_size, topk=topk)
    return results


def image_files(sources: Sequence[str | Path], *, without: str | Path | None = None) -> list[Path]:
    """List image files; a folder gives the images directly in it, sorted, or else those in its folders, as of classes.

    Args:
        without: a file to skip in folders, such as the sheet of an earlier run.

    Raises:
        DataError: for a path that does not exist, or a folder without images.
    """
    skipped = None if without is None else Path(without).resolve()
    files: list[Path] = []
    for source in map(Path, sources):
        if not source.is_dir():
            if not source.exists():
                near = nearest_path(source) or "; give an image or a folder of images"
                raise DataError(f"{source} does not exist{near}")
            files.append(source)
            continue
        inside = _images_in(source, skipped)
        if not inside:
            classes = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
            inside = [path for folder in classes for path in _images_in(folder, skipped)]
        if not inside:
            raise DataError(f"the folder {source} holds no images, nor do the folders in it; name one that does")
        files += inside
    return files


def _images_in(folder: Path, skipped: Path | None) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
        and path.resolve() != skipped
    )


def _label(model: NFNet, index: int) -> str:
    return f"class {index}" if model.labels is None else model.labels[index]


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not is_int(value, 1):
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")


# -- very many images, see `nfzoo.bulk`


@torch.inference_mode()
def compute(model: NFNet, pixels: Tensor, device: torch.device, precision: str, *, embeddings: bool) -> Tensor:
    """Return float32 pooled features or logits of a batch, on the device, without waiting for the computation."""
    target = backend(device)
    x = target.images(pixels, next(model.parameters()).dtype)
    with target.autocast(AUTOCAST[precision]):
        outputs = model.embed(x) if embeddings else model(x)
    target.step_mark()
    return outputs.float()


def embedding_columns(features: Tensor, dtype: str) -> dict[str, Any]:
    """Return the columns of a result file for pooled features `(n, F)`."""
    values = features.cpu().numpy()
    with np.errstate(over="ignore"):
        embeddings = values.astype(dtype)
    if not np.isfinite(embeddings).all():
        raise ConfigError(f"embeddings up to {np.abs(values).max():.3g} do not fit into {dtype}; take --dtype float32")
    return {"embeddings": embeddings}


@torch.inference_mode()
def label_columns(logits: Tensor, topk: int, labels: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a result file for logits `(n, classes)`; the most probable label comes first."""
    top = logits.softmax(1).topk(topk, dim=1)
    classes = top.indices.cpu().numpy()
    names = [[labels[i] for i in row] for row in classes.tolist()]
    return {"classes": classes, "labels": names, "probabilities": top.values.cpu().numpy()}


@torch.inference_mode()
def set_columns(logits: Tensor, thresholds: Tensor, topk: int | None, labels: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a result file for logits `(n, classes)` of a multi-label model: see `label_sets`."""
    classes, probabilities = label_sets(logits, thresholds, topk)
    return {
        "classes": [np.array(row, np.int64) for row in classes],
        "labels": [[labels[i] for i in row] for row in classes],
        "probabilities": [np.array(row, np.float32) for row in probabilities],
    }


def check_finite(outputs: Tensor, names: Sequence[str]) -> Tensor:
    """Return the outputs `(n, F)` of the images `names`; raise a `CheckpointError` if one is not finite."""
    wrong = outputs.isfinite().all(1).logical_not().nonzero()
    if len(wrong):
        name = names[int(wrong[0])]
        raise CheckpointError(f"the outputs for {name!r} are not finite; the model's weights are damaged, or overflow")
    return outputs


def weights_hash(model: NFNet) -> str:
    """Return the SHA-256 of the weights, the architecture, the preprocessing and the labels."""
    about = model.description._replace(name=None, provenance=None, foreign=None).to_dict()
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

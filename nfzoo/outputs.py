"""What a model makes of batches of images, ready to be written: labels with probabilities, or embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from nfzoo.config import Preprocessing
from nfzoo.data.unlabelled import Pictures
from nfzoo.errors import CheckpointError, ConfigError, DataError
from nfzoo.nn import NFNet
from nfzoo.runtime.device import AUTOCAST, backend
from nfzoo.transforms.decode import open_image
from nfzoo.transforms.preprocess import evaluation_transform


class Wanted(NamedTuple):
    """What to write of each image.

    Attributes:
        embeddings: the pooled features, as `dtype`, and not the `topk` most probable labels.
        labels: the name of each class.
    """

    embeddings: bool
    topk: int
    dtype: str
    labels: Sequence[str]


@torch.inference_mode()
def compute(model: NFNet, pixels: Tensor, place: torch.device, low: str, *, embeddings: bool) -> Tensor:
    """Pooled features or logits of a batch, float32, on the device, which need not have finished."""
    where = backend(place)
    x = where.images(pixels, next(model.parameters()).dtype)
    with where.autocast(AUTOCAST[low]):
        found = model.embed(x) if embeddings else model(x)
    where.step_mark()
    return found.float()


@torch.inference_mode()
def columns(found: Tensor, names: Sequence[str], wanted: Wanted) -> dict[str, Any]:
    """What is written of the outputs `(n, F)` of images with these names."""
    fine = found.isfinite().all(1)
    if not fine.all():
        name = names[int(fine.logical_not().nonzero()[0])]
        raise CheckpointError(f"the outputs for {name!r} are not finite; the model's weights are damaged, or overflow")
    if wanted.embeddings:
        features = found.cpu().numpy()
        with np.errstate(over="ignore"):
            result = features.astype(wanted.dtype)
        if not np.isfinite(result).all():
            raise ConfigError(
                f"embeddings up to {np.abs(features).max():.3g} do not fit into {wanted.dtype}; take --dtype float32"
            )
        return {"embeddings": result}
    top = found.softmax(1).topk(wanted.topk, dim=1)
    classes = top.indices.cpu().numpy()
    labels = [[wanted.labels[i] for i in row] for row in classes.tolist()]
    return {"classes": classes, "labels": labels, "probabilities": top.values.cpu().numpy()}


class _Samples(TorchDataset["Tensor | str"]):
    """Model inputs, or what is wrong with the image."""

    def __init__(self, pictures: Pictures, preprocessing: Preprocessing, size: int) -> None:
        self.pictures, self.preprocessing, self.size = pictures, preprocessing, size

    def __getitem__(self, index: int) -> Tensor | str:  # type: ignore[override]
        try:
            image = open_image(self.pictures[index], channels=len(self.preprocessing.mean))
            return evaluation_transform(image, self.preprocessing, size=self.size)
        except DataError as error:
            return str(error)

    def collate(self, samples: list[Tensor | str]) -> tuple[Tensor, list[tuple[int, str]]]:
        """The batch, with zeros for what cannot be read, so that the others do not come to stand elsewhere."""
        blank = torch.zeros(len(self.preprocessing.mean), self.size, self.size)
        pixels = torch.stack([blank if isinstance(sample, str) else sample for sample in samples])
        return pixels, [(i, sample) for i, sample in enumerate(samples) if isinstance(sample, str)]


def load_batches(
    pictures: Pictures, preprocessing: Preprocessing, size: int, batches: list[range], workers: int
) -> Iterator[tuple[Tensor, list[tuple[int, str]]]]:
    """Model inputs `(n, C, size, size)` of these images, and (place in the batch, problem) of each unreadable one."""
    samples = _Samples(pictures, preprocessing, size)
    return iter(
        DataLoader(
            samples,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers if batches else 0,
            collate_fn=samples.collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
        )
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def weights_hash(model: NFNet) -> str:
    """SHA-256 of the weights, the architecture, the preprocessing and the labels."""
    about = {**model.description.to_dict(), "name": None, "provenance": None}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

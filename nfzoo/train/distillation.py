"""Knowledge distillation: a trained model, the teacher, answers for each training image, and the student learns that.

Both see the same pixels: the crop, RandAugment, MixUp and CutMix of the student's own batch.

Source: Hinton et al. 2015, arXiv 1503.02531; for the same pixels Beyer et al. 2021, arXiv 2106.05237.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nfzoo.checkpoint.run_state import Saved
from nfzoo.config import Preprocessing
from nfzoo.data.labels import match_classes
from nfzoo.errors import CheckpointError, ConfigError, DataError
from nfzoo.nn import NFNet
from nfzoo.runtime.device import backend
from nfzoo.train.config import TrainConfig
from nfzoo.train.run_folder import public_model

logger = logging.getLogger("nfzoo")

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a grey level. Source: ITU-R BT.601, as Pillow's mode L."""


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the student's answers from the teacher's, in float32 at least.

        T^2 / N  sum_i KL(softmax(t_i / T) || softmax(s_i / T))

    Here s and t are the logits of student and teacher, and T is the temperature. By the factor T^2 the gradient keeps
    its size whatever the temperature.

    Args:
        logits, teacher_logits: `(N, classes)`.
        temperature: above 0.

    Source: arXiv 1503.02531, section 2.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    student, teacher = (F.log_softmax(z.to(wide) / temperature, dim=1) for z in (logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class Teacher:
    """A trained model that answers for a student's images. It is folded, in evaluation mode, and never changes.

    The images get the teacher's own normalisation, its number of channels, and the size that it was trained at: a
    network expects objects of the size that they had in training (arXiv 1906.06423), and training crops show them
    larger than test images do. Convolutions and linears compute in the mixed precision of the run, the classifier in
    float32. A temperature that the model itself has is left out, as another stands in its place.

    Args:
        model: the teacher.
        outputs: its output for each class of the data.
        student: preprocessing of the images that it gets.
        size: side in pixels of the images that it is to see, by default its own `train_size`.

    Attributes:
        digest: SHA-256 of weights, outputs, normalisation and size, on which the answers depend.
    """

    def __init__(
        self, model: NFNet, outputs: Sequence[int], student: Preprocessing, *, size: int | None = None
    ) -> None:
        own = model.preprocessing
        self.size = size or own.train_size
        params = {name: p.detach() for name, p in model.named_parameters()}
        self.digest = _digest(params, [list(outputs), list(own.mean), list(own.std), self.size])
        self._model = model if model.config.folded else model.for_inference()
        self._weight, self._bias = (params[name][list(outputs)].float() for name in ("head.weight", "head.bias"))
        channels = len(own.mean)
        self._same = (student.mean, student.std) == (own.mean, own.std)
        self._mixer = torch.eye(channels)  # (the teacher's channels, the student's)
        if channels != len(student.mean):
            self._mixer = torch.ones(channels, 1) if channels == 3 else torch.tensor([LUMA])
        self._norms = [torch.tensor(v).view(-1, 1, 1) for v in (student.std, student.mean, own.mean, own.std)]

    def prepare(self, device: torch.device, *, compiled: bool) -> Teacher:
        """Move the teacher to a device, compile it or lay out its weights there, and return it."""
        self._model.to(device)
        if backend(device).weights_last:
            self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            self._model.compile_blocks()
        elif device.type == "cpu":
            self._model.prepack()
        self._weight, self._bias, self._mixer = (t.to(device) for t in (self._weight, self._bias, self._mixer))
        self._norms = [t.to(device) for t in self._norms]
        return self

    @torch.no_grad()
    def logits(self, images: Tensor, autocast: Callable[[], AbstractContextManager[Any]]) -> Tensor:
        """Return float32 logits `(N, classes)`, in the order of the data's classes, of the student's input.

        Args:
            images: `(N, C, S, S)`, normalised for the student.
            autocast: makes the context of the run's mixed precision.
        """
        images = self.images(images)
        with autocast():
            features = self._model.embed(images)
        return F.linear(features.float(), self._weight, self._bias)

    def images(self, images: Tensor) -> Tensor:
        """Return the teacher's input of the student's: the same pixels in its normalisation, channels and size."""
        if not self._same:
            std, mean, own_mean, own_std = self._norms
            pixels = torch.einsum("oc,nchw->nohw", self._mixer, images * std + mean)
            images = (pixels - own_mean) / own_std
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return backend(images.device).images(images)


def _digest(params: Mapping[str, Tensor], facts: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, value in sorted(params.items()):
        digest.update(f"\0{name}\0{tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_taught(config: TrainConfig, saved: Saved) -> None:
    """Raise a `ConfigError` unless a run and the checkpoint to resume from both have a teacher, or neither has."""
    before: dict[str, str] | None = saved.facts.get("teacher")  # older checkpoints lack the key
    if before is None and config.teacher is not None:
        raise ConfigError(f"{saved.folder} is of a run without a teacher; leave {config.teacher!r} out")
    if before is not None and config.teacher is None:
        raise ConfigError(f"{saved.folder} is of a run with the teacher {before['name']!r}; name it with --teacher")


def open_teacher(config: TrainConfig, student: NFNet, classes: Sequence[str], saved: Saved | None) -> Teacher | None:
    """Load the teacher of a run, `None` if it has none; in a resumed run it has to be the one of the checkpoint.

    Raises:
        CheckpointError: for a model that cannot be loaded, or holds numbers that are not finite.
        ConfigError: for one that cannot answer for the student's images, or is not the one of the checkpoint.
        DataError: if its labels are not those of the data.
    """
    if config.teacher is None:
        return None
    teacher = _load(config, config.teacher, student.preprocessing, classes)
    if saved is not None and teacher.digest != (before := saved.facts["teacher"])["sha256"]:
        raise ConfigError(
            f"the teacher {config.teacher!r} is not the {before['name']!r} of {saved.folder}: its weights, labels or "
            "preprocessing differ; name the same model, or choose another output"
        )
    return teacher


def _load(config: TrainConfig, source: str, student: Preprocessing, classes: Sequence[str]) -> Teacher:
    from nfzoo import from_pretrained

    if Path(source).resolve() == Path(config.output).resolve():
        raise ConfigError(f"the output {config.output!r} would replace the teacher; choose another output")
    try:
        model = from_pretrained(
            source, dtype=torch.float32, require_hash=config.require_hash, allow_pickle=config.allow_pickle
        )
    except CheckpointError as error:
        raise CheckpointError(f"the teacher: {error}") from error
    wrong = next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if wrong is not None:
        raise CheckpointError(f"the teacher {source!r} has numbers in {wrong!r} that are not finite; take another")
    if model.multi_label:
        raise ConfigError(f"the teacher {source!r} gives sets of labels; take one that gives one label an image")
    if not model.config.num_classes:
        raise ConfigError(f"the teacher {source!r} has no classifier; take one with the classes of the data")
    channels, own = len(student.mean), model.config.in_channels
    if channels != own and {channels, own} != {1, 3}:
        raise ConfigError(f"the teacher {source!r} takes images of {own} channels, and the model of {channels}")
    try:
        outputs, matched_by = match_classes(classes, model.config.num_classes, model.labels, source="the data")
    except DataError as error:
        raise DataError(f"the teacher {source!r} does not know the classes of the data: {error}") from error
    if matched_by == "sorted order":
        logger.warning("the teacher %r has no labels: its outputs are taken for the classes in sorted order", source)
    return Teacher(model, outputs, student, size=None if config.distillation is None else config.distillation.size)


def teacher_facts(config: TrainConfig, teacher: Teacher | None) -> dict[str, str] | None:
    """Return what a checkpoint notes of a run's teacher: its name for others, and its digest."""
    if config.teacher is None or teacher is None:
        return None
    return {"name": public_model(config.teacher), "sha256": teacher.digest}

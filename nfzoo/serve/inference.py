"""The model of a server: images to inputs, and batches of inputs to answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo.errors import CheckpointError, DataError
from nfzoo.nn import NFNet
from nfzoo.predict import compute, top_labels
from nfzoo.runtime.device import usable_device


class Question(NamedTuple):
    """What is asked of one image.

    Attributes:
        pixels: the input `(C, size, size)`.
        embed: whether the pooled features are asked for, and not the labels.
        topk: the most labels that are given: see `nfzoo.predict.classify`.
    """

    pixels: Tensor
    embed: bool = False
    topk: int | None = None


class Inference:
    """A folded copy of a model, which several threads may give images, and one of them batches.

    On a CPU a second form of it has its weights laid out for one image at a time, which is faster for single images.
    (One form for all sizes of batches would lay them out anew for each.) Both share their parameters.

    Raises:
        ConfigError: for a device that is not available.
        CheckpointError: if the logits of a black image are not finite.
    """

    def __init__(self, model: NFNet, device: torch.device | str = "cpu") -> None:
        self.device = usable_device(device)
        lean = model if model.config.folded else model.for_inference()
        self.model = NFNet.from_params(lean.description, dict(lean.named_parameters())).to(self.device).eval()
        self._single = self.model
        if self.device.type == "cpu":
            self._single = NFNet.from_params(lean.description, dict(self.model.named_parameters())).eval().prepack()
        size = self.model.preprocessing.test_size
        black = torch.zeros(self.model.config.in_channels, size, size)
        for answer in self.answer([Question(black, embed=True)]):  # also lays out the weights
            if isinstance(answer, Exception):
                raise answer

    def describe(self) -> dict[str, Any]:
        """Return what a client may want to know of the model."""
        return {
            "model": self.model.name,
            "classes": self.model.config.num_classes,
            "multi_label": self.model.multi_label,
            "image_size": self.model.preprocessing.test_size,
        }

    def read(self, content: bytes) -> Tensor:
        """Return the input `(C, size, size)` of an image file's content.

        Raises:
            DataError: as `nfzoo.transforms.decode.open_image`; its message calls the file "the image".
        """
        if not content:
            raise DataError("the image is empty; send the bytes of an image file")
        return self.model.preprocess(io.BytesIO(content))

    def answer(self, questions: Sequence[Question]) -> list[Any]:
        """Return for each question its labels `[{"label": …, "probability": …}, …]` or its features `[float, …]`.

        Images are independent of one another. Where the outputs of one are not finite, its answer is a
        `CheckpointError`.
        """
        answers: list[Any] = [None] * len(questions)
        for embed in (False, True):
            asked = [i for i, question in enumerate(questions) if question.embed is embed]
            if asked:
                outputs = self._outputs([questions[i].pixels for i in asked], embed)
                for i, row in zip(asked, outputs, strict=True):
                    answers[i] = self._answer(row, questions[i])
        return answers

    def _outputs(self, pixels: list[Tensor], embed: bool) -> Tensor:
        """Return features or logits `(n, F)` on the CPU."""
        model = self._single if len(pixels) == 1 else self.model
        return compute(model, torch.stack(pixels), self.device, "no", embeddings=embed).cpu()

    def _answer(self, row: Tensor, question: Question) -> Any:
        if not row.isfinite().all():
            return CheckpointError("the model's outputs are not finite; its weights are damaged, or overflow")
        if question.embed:
            return row.tolist()
        (top,) = top_labels(self.model, row[None], question.topk)
        return [{"label": label, "probability": probability} for label, probability in top]

"""Top-1 and top-5 accuracy on labelled images, and the logits of all of them.

Every image counts once with any number of processes: their integer counts are added before the division.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nfzoo.config import Preprocessing
from nfzoo.data.digits import DIGITS, Digits
from nfzoo.data.label_files import LabelFiles
from nfzoo.data.loader import BrokenImageError, evaluation_batches
from nfzoo.data.source import HELD_OUT, source_text
from nfzoo.errors import CheckpointError, ConfigError, DataError
from nfzoo.evaluate.labelled import Labelled, open_labelled
from nfzoo.evaluate.scores import Evaluation, score
from nfzoo.model import apply
from nfzoo.nn import NFNet
from nfzoo.runtime.device import backend, default_workers, processes, share_of
from nfzoo.runtime.distributed import gather
from nfzoo.runtime.execution import for_many
from nfzoo.transforms.corruptions import Corruption

if TYPE_CHECKING:
    from accelerate import PartialState  # at run time, only after `choose_xla`

logger = logging.getLogger("nfzoo")

EVALUATION_FILE = "evaluation.json"


class Outputs(NamedTuple):
    """The logits of all readable images, in the order of the data.

    Attributes:
        indices: of the images in the data, int64 `(n,)`.
        labels: indices of the model's outputs, int64 `(n,)`; of multi-label data bool `(n, classes)`.
        logits: float32 `(n, classes)`.
    """

    indices: np.ndarray
    labels: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Evaluator:
    """A model on its device, and labelled images of which several processes (of Accelerate) take equal shares.

    The model computes in its trained form, which gives the same bits as in training. For many images on a CPU, its
    folded form computes the same to within 1e-5 of the logits' norm in less time: see `for_many`.

    Attributes:
        model, name: the model, and its name in the result.
        labelled: see `open_labelled`.
        state: this process among the others.
        device: this process's.
        size, batch_size, workers, skip_broken, date: see `evaluate`.
        trained_on, weights: see `Evaluation`.
    """

    model: NFNet
    name: str
    labelled: Labelled
    state: PartialState
    device: torch.device
    size: int
    batch_size: int
    workers: int
    skip_broken: bool
    date: str | None
    trained_on: bool
    weights: str | None

    @classmethod
    def prepare(
        cls,
        model: NFNet,
        data: str,
        *,
        name: str | None = None,
        size: int | None = None,
        batch_size: int = 32,
        workers: int | None = None,
        device: torch.device | str | None = None,
        skip_broken: bool = False,
        date: str | None = None,
        labels: LabelFiles | None = None,
        weights: str | None = None,
    ) -> Self:
        """Open the images and move the model to its device: see `evaluate`, which has the same arguments."""
        model.config.check_classifier()
        data = source_text(data)
        state = processes(cpu=str(device) == "cpu")
        target = share_of(state, device)
        trained = model.provenance or {}
        held_out = trained.get("validation_fraction") if trained.get("data") == Path(data).name else None
        classes, names = model.config.num_classes, model.labels
        if model.multi_label != (labels is not None and labels.multi_label):
            raise ConfigError(
                "a multi-label model, and no other, is measured on a table of sets of labels; give LabelFiles(LABELS, "
                f"multi_label={model.multi_label})"
            )
        labelled = open_labelled(data, classes, names, held_out=held_out or HELD_OUT, files=labels)
        trained_on = bool(held_out) and data != DIGITS and labelled.split is None
        if trained_on and state.is_main_process:
            what = "these are no held-out figures" if model.multi_label else "this is no held-out accuracy"
            logger.warning(
                "%s was trained on most of the images of %s, if these are the same: %s",
                *(name or model.name, labelled.dataset, what),
            )
        if workers is None:
            workers = 0 if isinstance(labelled.images, Digits) else default_workers(state.num_processes)
        shown, side = name or model.name or "model", size or model.preprocessing.test_size
        options = batch_size, workers, skip_broken, date
        return cls(model.to(target), shown, labelled, state, target, side, *options, trained_on, weights)

    def evaluation(self, corruption: Corruption | None = None) -> Evaluation:
        """Score the model, with inputs that are corrupted if asked; all processes return the same."""
        return self._run(corruption=corruption)

    def outputs(self) -> tuple[Evaluation, Outputs]:
        """Score the model, and return the logits of all processes as well, which each of them holds in memory."""
        kept: list[Tensor] = []
        indices: list[int] = []
        evaluation = self._run(kept=kept, indices=indices)
        return evaluation, self._gathered(kept, indices)

    def logits(self) -> tuple[Outputs, int]:
        """Return the logits of all processes, which each of them holds in memory, and the number of images left out.

        Raises:
            DataError: if no image can be read, or one cannot be and is not to be left out.
        """
        kept: list[Tensor] = []
        indices: list[int] = []
        broken: list[str] = []
        target, compute = backend(self.device), self._function(kept)
        with torch.no_grad(), self._unbroken():
            for images, _ in _with_bar(self._batches(broken, indices), len(self.labelled.images), self.state):
                compute(target.images(images))
        outputs = self._gathered(kept, indices)
        return outputs, len(self._left_out(broken, len(outputs.indices), say=True))

    def _gathered(self, kept: list[Tensor], indices: list[int]) -> Outputs:
        logits = torch.cat(kept).numpy() if kept else np.zeros((0, self.model.config.num_classes), np.float32)
        parts = gather([(np.asarray(indices, np.int64), logits)])
        rows = np.concatenate([part[0] for part in parts])
        order = rows.argsort()
        rows = rows[order]
        return Outputs(rows, self.labelled.images.labels[rows], np.concatenate([part[1] for part in parts])[order])

    def _run(
        self,
        *,
        kept: list[Tensor] | None = None,
        indices: list[int] | None = None,
        corruption: Corruption | None = None,
    ) -> Evaluation:

        images, model = self.labelled.images, self.model
        if model.multi_label:
            raise ConfigError("a multi-label model has no accuracy; nfzoo.evaluate.evaluate_sets measures it")
        broken: list[str] = []
        with self._unbroken():
            shown = _with_bar(self._batches(broken, indices, corruption), len(images), self.state)
            result = score(self._function(kept), shown, device=self.device)
        problems = self._left_out(broken, result.images, say=corruption is None)
        if not np.isfinite(result.loss):
            raise CheckpointError("the model's outputs are not finite; its weights are damaged, or overflow")
        return Evaluation(
            **self.facts(),
            images=result.images,
            skipped=len(problems),
            top1=result.top1,
            top5=result.top5,
            loss=result.loss,
        )

    def facts(self) -> dict[str, Any]:
        """Return what every evaluation says of its model, data and input."""
        from nfzoo import __version__

        return {
            "model": self.name,
            "dataset": self.labelled.dataset,
            "split": self.labelled.split,
            "matched_by": self.labelled.matched_by,
            "classes": len(self.labelled.images.classes),
            "size": self.size,
            "resize": resize_rule(self.model.preprocessing),
            "nfzoo": __version__,
            "torch": str(torch.__version__),
            "date": self.date,
            "trained_on": self.trained_on or None,
            "weights": self.weights,
        }

    def _batches(
        self, broken: list[str], indices: list[int] | None = None, corruption: Corruption | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return this process's share of the images."""
        return evaluation_batches(
            self.labelled.images,
            self.model.preprocessing,
            batch_size=self.batch_size,
            rank=self.state.process_index,
            world=self.state.num_processes,
            size=self.size,
            workers=self.workers,
            broken=broken if self.skip_broken else None,
            indices=indices,
            corruption=corruption,
        )

    @functools.cached_property
    def _lean(self) -> NFNet:
        """The form of the model that computes: see `for_many`."""
        return for_many(self.model, len(self.labelled.images), self.device)

    def _function(self, kept: list[Tensor] | None) -> Callable[[Tensor], Tensor]:
        """Return the function from images to logits, which it keeps on the CPU if asked."""
        model, lean = self.model, self._lean
        params, dtype = dict(model.named_parameters()), next(model.parameters()).dtype

        def logits(x: Tensor) -> Tensor:
            outputs = apply(model.config, params, x.to(dtype)) if lean is model else lean(x.to(dtype))
            if kept is not None:
                kept.append(outputs.float().cpu())
            return outputs

        return logits

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """Name the remedy for an image that cannot be read."""
        try:
            yield
        except BrokenImageError as error:
            raise BrokenImageError(f"{error}; leave such images out with --skip-broken") from error

    def _left_out(self, broken: list[str], read: int, *, say: bool) -> list[str]:
        """Return the messages of all processes about unreadable images, and log them if asked; raise if all are."""
        problems = sorted(gather(broken))
        if self.state.is_main_process and say:
            for problem in problems:
                logger.warning("left out: %s", problem)
        if not read:
            raise DataError(f"none of the {len(self.labelled.images)} images can be read, such as: {problems[0]}")
        return problems


def evaluate(
    model: NFNet,
    data: str,
    *,
    name: str | None = None,
    size: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: torch.device | str | None = None,
    skip_broken: bool = False,
    date: str | None = None,
    labels: LabelFiles | None = None,
) -> Evaluation:
    """Score a model on labelled images. Several processes (of Accelerate) share the images and return one result.

    Args:
        data: see `open_labelled`.
        name: name of the model in the result; by default its own.
        size: side of the input in pixels; by default the model's test size.
        batch_size: batch size of each process.
        workers: loader processes per process; by default as many as there are processors, up to 8.
        device: device to which the model is moved; by default an accelerator if there is one.
        skip_broken: leave out unreadable images and log their names, instead of stopping.
        labels: tables of the labels, see `open_labelled`.

    Raises:
        DataError: for data that are unreadable or do not fit the model.
        CheckpointError: if the outputs are not finite.
        ConfigError: for a device that is not available, and for a multi-label model, see `evaluate_sets`.
    """
    return Evaluator.prepare(
        model,
        data,
        name=name,
        size=size,
        batch_size=batch_size,
        workers=workers,
        device=device,
        skip_broken=skip_broken,
        date=date,
        labels=labels,
    ).evaluation()


def resize_rule(preprocessing: Preprocessing) -> str:
    """Describe the evaluation resize."""
    if preprocessing.resize == "deepmind":
        return f"deepmind, margin {preprocessing.margin} pixels"
    return f"{preprocessing.resize}, crop {preprocessing.crop:g}"


def _with_bar(
    batches: Iterator[tuple[Tensor, Tensor]], total: int, state: PartialState
) -> Iterator[tuple[Tensor, Tensor]]:
    hidden = not (state.is_main_process and sys.stderr.isatty())
    with tqdm(desc="evaluate", total=total, unit="image", leave=False, disable=hidden) as bar:
        for images, labels in batches:
            yield images, labels
            bar.update(min(len(labels) * state.num_processes, total - bar.n))

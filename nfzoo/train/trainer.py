"""Run the steps and epochs of a training run, save its checkpoints, and stop it.

Every random choice depends on the seed, the epoch, the step and the image alone, and the position in the data is
counted in samples over all processes. An interrupted run therefore resumes with the same result, on any number of
processes.

The module is long because the loop, its figures and its checkpoints share the state of the run.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nfzoo.analysis.nonfinite import bad_gradient, first_not_finite
from nfzoo.analysis.sheets import augmentation_sheet
from nfzoo.checkpoint.run_state import Saved, rng_state, set_rng_state
from nfzoo.data.labels import class_counts, class_weights, few_images, histogram, positive_weights
from nfzoo.data.loader import BrokenImageError, TrainingBatch
from nfzoo.data.source import Split
from nfzoo.errors import DataError, Stopped, TrainingError
from nfzoo.evaluate.multi_label import SetScore, set_scores
from nfzoo.evaluate.scores import scores
from nfzoo.model import apply
from nfzoo.nn import NFNet, load
from nfzoo.optim.sgd import warmup_cosine
from nfzoo.runtime.cuda_graph import CudaGraph
from nfzoo.runtime.device import backend
from nfzoo.runtime.distributed import Agreement, Interrupted, elastic_launcher, full_tensors, gather
from nfzoo.train.batches import InputPipeline, Inputs, epoch_size
from nfzoo.train.config import TrainConfig, default_lr
from nfzoo.train.config.defaults import reasons
from nfzoo.train.distillation import Teacher, teacher_facts
from nfzoo.train.learner import Learner, uses_cuda_graph
from nfzoo.train.metrics import THRESHOLDS, Confusion, Metrics, UnreadableImages, best_rule, without_thresholds
from nfzoo.train.progress import Progress
from nfzoo.train.python.callbacks import Callbacks
from nfzoo.train.run_folder import Saver

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up

logger = logging.getLogger("nfzoo")

LOG_STEPS = 10
CHECKED = 1000  # held-out images, up to which all are read before training
MOST_DRAWN = 50  # classes, up to which a tracker gets a confusion matrix
SKIPS_IN_A_ROW = 20  # more mean damaged weights, not a bad batch


@dataclass(frozen=True)
class Result:
    """Result of a run: the folder, held-out accuracies in [0, 1] of live and averaged weights, time spent training.

    The accuracies are those of the epoch that the folder keeps. A run of task multi-label has NaN and `None` there, and
    mean average precisions instead.

    Attributes:
        model: the model of the folder, in evaluation mode, loaded when it is first asked for.
    """

    folder: Path
    accuracy: float
    ema_accuracy: float | None
    training_seconds: float
    map: float | None = None
    ema_map: float | None = None

    @cached_property
    def model(self) -> NFNet:
        return load(self.folder)


class InitialState(NamedTuple):
    """Initial state of a run.

    Attributes:
        model: the network with its initial weights.
        pretrained: whether the weights are pretrained, not random.
        data: the identity of the run's data, as `split_identity` returns it.
        saved: the checkpoint to resume from, or `None`.
        callbacks: look at the run, and may end it.
        teacher: the model whose answers are learned, or `None`.
        choices: a line about each option that was chosen by the data.
    """

    model: NFNet
    pretrained: bool
    data: dict[str, Any]
    saved: Saved | None = None
    callbacks: Sequence[object] = ()
    teacher: Teacher | None = None
    choices: tuple[str, ...] = ()


def split_identity(split: Split) -> dict[str, Any]:
    """Return the identity of a run's data: classes, number, hashes of names and labels, of sizes, and of times.

    No image is read. Times are those at which files were changed, in seconds, which a copy to another disk may lose.
    """
    digest, sizes, times = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for images in split:
        digest.update(np.ascontiguousarray(images.labels).tobytes())
        for i in range(len(images)):
            digest.update(Path(images.name(i)).name.encode("utf-8", "surrogatepass") + b"\0")
        sizes.update(images.stamp().encode() + b"\0")
        for file in images.files():
            try:
                status = os.stat(file)
            except OSError:  # reading it will say what is wrong
                continue
            sizes.update(b"%d " % status.st_size)
            times.update(b"%d " % status.st_mtime)
    identity = {"images": len(split.train), "classes": list(split.train.classes), "digest": digest.hexdigest()}
    return {**identity, "sizes": sizes.hexdigest(), "times": times.hexdigest()}


def loss_weights(config: TrainConfig, split: Split, counts: Mapping[str, int]) -> Sequence[float] | None:
    """Return the weight of each class in the loss of a run, see `TrainConfig`; `None` without; raise as they do."""
    if config.multi_label:
        return positive_weights(config.class_weights, counts, len(split.train))
    return class_weights(config.class_weights, counts)


def _figures(results: Sequence[SetScore]) -> dict[str, Any]:
    """Return the figures of multi-label data, with the thresholds for the weights that are saved."""
    row: dict[str, Any] = {}
    for prefix, result in zip(("", "ema_"), results, strict=False):
        values = result.loss, result.map, result.f1, result.micro_f1
        row |= {f"{prefix}{name}": value for name, value in zip(("loss", "map", "f1", "micro_f1"), values, strict=True)}
    return {**row, THRESHOLDS: results[-1].thresholds}


class Trainer:
    """Train a model for the epochs of a recipe, from its beginning or from a checkpoint."""

    def __init__(self, config: TrainConfig, split: Split, accelerator: Accelerator, start: InitialState) -> None:
        self.config, self.split, self.accelerator = config, split, accelerator
        self.rank = accelerator.process_index
        self.backend = backend(accelerator.device)
        self.backend.start()
        self.pretrained, model = start.pretrained, start.model
        self.cfg, self.preprocessing, self.description = model.config, model.preprocessing, model.description
        self.steps_per_epoch = len(split.train) // config.batch_size
        self.peak_lr = config.optim.lr or default_lr(config.batch_size, start.pretrained, config.optim.name)
        self.pipeline = InputPipeline(config, split, model, accelerator)
        counts = class_counts(split.train)
        weights = loss_weights(config, split, counts)
        self.learner = Learner(
            config, model, accelerator, peak_lr=self.peak_lr, class_weights=weights, teacher=start.teacher
        )
        self.epoch = self.consumed = self.step = self.skipped = self.in_a_row = 0
        self.size = 0  # pixels of this epoch's images
        self.seconds = 0.0  # of this epoch's training
        self.rows: list[dict[str, Any]] = []
        self.best = best_rule(config)
        self.metrics = Metrics(accelerator.device, self.learner.updater.kinds, multi_label=config.multi_label)
        self._compute: Callable[[Sequence[Inputs]], Tensor | None] = self._update
        if uses_cuda_graph(config, accelerator):
            self._compute = CudaGraph(self._update)
        self._unread: deque[tuple[int, Callable[[], bool], Sequence[Inputs]]] = deque()
        stops_late = config.nonfinite == "stop" and self.backend.reads_late
        self._sound = torch.ones((), dtype=torch.bool, device=accelerator.device) if stops_late else None
        self.unreadable = UnreadableImages(config.max_broken)
        self.saver = Saver(config, accelerator, None if start.saved is None else start.saved.folder)
        self._data, self.choices = start.data, start.choices
        if start.saved is not None:
            self._restore(start.saved)
        self.callbacks = Callbacks(start.callbacks, is_main=accelerator.is_main_process, weights=self._weights)
        self.backend.step_mark()  # keeps the preparation out of the first step's program
        facts: dict[str, Any] = {"steps_per_epoch": self.steps_per_epoch, "classes": split.train.classes}
        self.progress = Progress(config, accelerator, self.learner, **facts)
        self._announce(counts, resumed=start.saved is not None)

    def _announce(self, counts: Mapping[str, int], *, resumed: bool) -> None:
        """Print what is trained, on what and where; warn of what rarely goes well."""
        config, split, say = self.config, self.split, self.progress.say
        origin = f"step {self.step}'s" if resumed else "pretrained" if self.pretrained else "random"
        parameters = f"{sum(p.numel() for p in self.learner.live.values()):,} parameters"
        if config.tune != "all":
            parameters += f" ({sum(p.numel() for p in self.learner.trainable):,} of them trained)"
        sizes, held_out = self.pipeline.sizes, self.preprocessing.test_size
        pixels = (
            ", ".join(map(str, sizes)) + " pixels" + (f" (held out at {held_out})" if held_out != sizes[-1] else "")
        )
        say(
            f"{config.model}: {parameters}, {origin} weights; "
            f"{len(split.train):,} images to train on, {len(split.validation):,} held out, "
            f"{len(split.train.classes)} classes, {pixels}; "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}, "
            f"peak learning rate {self.peak_lr:g}"
        )
        for line in self.choices if resumed else (*self.choices, *reasons(config, self.pretrained)):
            say(line)
        bare = split.train.multi_label and int((~split.train.labels.any(1)).sum())
        say(f"images to train on: {histogram(counts)}{f'; {bare:,} without a label' if bare else ''}")
        if (teacher := self.learner.teacher) is not None and (how := config.distillation) is not None:
            options = f"alpha {how.alpha:g}, temperature {how.temperature:g}"
            say(f"teacher {config.teacher}, which sees them in {teacher.size} pixels; {options}")
        if split.validation.multi_label and not split.validation.labels.any():
            problem = "no held-out image has a label, so that there is no mean average precision; hold others out"
            if config.keep_best == "map":
                raise DataError(problem)
            if self.accelerator.is_main_process:
                logger.warning("%s", problem)
        if (few := few_images(counts)) and self.accelerator.is_main_process:
            logger.warning("%s", few)
        if config.tune != "all" and origin == "random" and self.accelerator.is_main_process:
            logger.warning(
                "tune %s leaves the other weights as they were drawn at random; name a trained model, or tune all",
                config.tune,
            )

    # ------------------------------------------------------------ the run

    def fit(self) -> Result:
        """Train the remaining epochs. Evaluate and save the model after each."""
        config = self.config
        seconds = 0.0
        row: dict[str, Any] = self.rows[-1] if self.rows else {}
        with Agreement() as self.agreement:
            self._check_held_out()
            self._preview()
            if self.epoch == config.epochs:  # whatever became of the model since
                self.save_state()
                self.saver.save_model(self.description, self.rows, pretrained=self.pretrained)
            for epoch in range(self.epoch, config.epochs):
                if self._is_patient_no_more():
                    break
                # Train.
                self._choose_size(epoch)
                self.learner.model.train()
                parts: list[TrainingBatch] = []
                last = time.perf_counter()
                with self.progress.bar(epoch, self.consumed) as bar:
                    for batch in self._batches(epoch):
                        parts.append(batch)
                        if len(parts) < config.accumulation:
                            continue
                        self._stop_if_asked()
                        if self.callbacks.ends:
                            break
                        self.train_step(parts)
                        parts = []
                        self.seconds, last = self.seconds + time.perf_counter() - last, time.perf_counter()
                        self.consumed += config.batch_size
                        self._after_step(bar)
                self.check_steps()
                row = self._row(epoch)
                self.save_state()
                # Evaluate.
                row["images_per_second"] = self.consumed / self.seconds
                seconds += self.seconds
                row |= self._evaluate()
                # Save the model, and begin the next epoch.
                self.rows = without_thresholds([*self.rows, row], self.best)
                self.saver.save_model(self.description, self.rows, pretrained=self.pretrained)
                self.epoch, self.consumed, self.seconds = epoch + 1, 0, 0.0
                self.metrics.clear()
                self.progress.epoch(row, best=self.best is not None and self.best.row(self.rows) is row)
                if self.callbacks and not self.callbacks.ends:
                    self.callbacks.epoch(self.epoch, self.step, row)
                    self._stop_if_asked()
                if self.callbacks.ends:
                    self.progress.say(f"a callback ended the run after step {self.step}")
                    break
            self.saver.finish()
        if self.best is not None:
            row = dict(self.best.row(self.rows) or {})
        self.progress.finish(self.best, row)
        self.accelerator.wait_for_everyone()
        accuracy, average = row.get("accuracy", math.nan), row.get("ema_accuracy")
        return Result(Path(config.output), accuracy, average, seconds, row.get("map"), row.get("ema_map"))

    def _is_patient_no_more(self) -> bool:
        """Return whether the best epoch is so long ago that the run is to end, as the main process sees it."""
        if self.best is None or self.config.patience is None:
            return False
        ends = gather([self.best.waited(self.rows) >= self.config.patience])[0]
        if ends:
            waited = self.best.waited(self.rows)
            self.progress.say(f"no better {self.best.metric} for {waited} epoch{'s' * (waited > 1)}; the run ends")
        return ends

    def _choose_size(self, epoch: int) -> None:
        """Take the size of an epoch's images, which keep it to the end of the epoch, and no size after a larger one."""
        size = self.size
        if not self.consumed:
            size = max(size, epoch_size(self.pipeline.sizes, epoch, self.config.epochs))
        if self.size not in (0, size) and isinstance(self._compute, CudaGraph):
            self._compute = CudaGraph(self._update)  # a graph has one size; the old one gives its memory back
        self.size = size

    def _batches(self, epoch: int) -> Iterator[TrainingBatch]:
        """Yield what is left of an epoch; where it does not come, let all processes agree to stop as before a step."""
        try:
            yield from self.agreement.reading(self.pipeline.batches(epoch, self.consumed, self.size))
        except Interrupted:
            self._stop_if_asked()

    def _held_out(self, broken: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the held-out images; where they do not come, stop by itself, as other processes may be ahead."""
        try:
            yield from self.agreement.reading(self.pipeline.held_out(broken))
        except Interrupted:
            name = signal.Signals(number := self.agreement.asked or signal.SIGTERM).name
            where = f"stopped by {name} while it waited for held-out images"
            raise Stopped(f"{where}; {self.saver.last_checkpoint()}", number) from None

    def _after_step(self, bar: tqdm[Any]) -> None:
        """Report a step, and save if due. After the last step of an epoch, `fit` does this."""
        bar.update()
        if self.step % LOG_STEPS == 0:
            self.progress.step(bar, self.metrics, self.step, self._learning_rate(self.step - 1))
        self.callbacks.step(self.epoch + 1, self.step, self._of_step)
        goes_on = self.consumed + self.config.batch_size <= len(self.split.train)
        if goes_on and self.config.save_steps is not None and self.step % self.config.save_steps == 0:
            self.save_state()

    # ------------------------------------------------------------ one step

    def train_step(self, parts: Sequence[TrainingBatch]) -> None:
        """Take one step: batch, forward, backward, clip, update, average.

        Args:
            parts: this process's share of the global batch, in the pieces over which gradients accumulate.
        """
        # Batch: images, targets and masks on the device, augmented there.
        noise = self.pipeline.noise(self.step)
        for part in parts:
            self.unreadable.replace(part.broken)
        inputs = [self.pipeline.inputs(part, self.epoch, noise) for part in parts]
        self.learner.updater.begin(self.step, self._learning_rate(self.step))
        finite = self._compute(inputs)
        self.backend.step_mark()
        # Only now does the host wait for the device: on a GPU for the step before, so that it always has work.
        if finite is not None:
            self._unread.append((self.step, self.backend.read_later(finite), inputs))
        self.check_steps(unread=1 if self.backend.reads_late else 0)
        self.learner.optimizer.zero_grad()
        self.step += 1

    def _update(self, inputs: Sequence[Inputs]) -> Tensor | None:
        """Compute what a step does on the device; return whether the gradient is finite, see `Learner.clip`."""
        learner = self.learner
        for i, part in enumerate(inputs):
            answers = learner.answers(part.images)  # of the teacher, if there is one
            with learner.part(part, answers, last=i + 1 == len(inputs)):
                # Forward, and backward: gradients add up over the parts.
                with learner.autocast():
                    logits = learner.model(part.images, part.noise)
                loss = learner.loss(logits, part.targets, answers)
                learner.backward(loss / len(inputs))
            self.metrics.add(loss, logits, part.targets)
        # Clip by the norm of the whole gradient, where the recipe asks for that.
        norm, finite = learner.clip()
        # Clip each unit by AGC, update, average: in one pass. If the gradient is not finite, nothing changes.
        learner.updater.step(self._gate(finite))
        self.metrics.add_update(norm, learner.updater.clipped, learner.updater.clipped_kinds)
        return finite

    def _gate(self, finite: Tensor | None) -> Tensor | None:
        """Return whether the step may change the weights; once it may not, none may if the run is about to stop."""
        if finite is None or self._sound is None:
            return finite
        return self._sound.logical_and_(finite)

    def check_steps(self, *, unread: int = 0) -> None:
        """Look whether the gradients of the last steps were finite, but for the last `unread` steps.

        Raises:
            TrainingError: if one was not, and the run does not skip such steps, or has skipped too many in a row.
        """
        while len(self._unread) > unread:
            step, finite, inputs = self._unread.popleft()
            if finite():
                self.in_a_row = 0
            else:
                self._not_finite(step, inputs)

    def _learning_rate(self, step: int) -> float:
        optim = self.config.optim
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        total = self.config.epochs * self.steps_per_epoch
        return warmup_cosine(step, peak=self.peak_lr, warmup=warmup, total=total, minimum=optim.min_lr)

    def _not_finite(self, step: int, inputs: Sequence[Inputs]) -> None:
        learner = self.learner
        layer = ""
        for part in inputs:
            layer = layer or first_not_finite(self.cfg, learner.live, *part, autocast=learner.autocast)
        where = next(filter(None, gather([layer])), "") or bad_gradient(learner.live)
        self.in_a_row += 1
        if self.config.nonfinite == "skip" and self.in_a_row < SKIPS_IN_A_ROW:
            self.skipped += 1
            self.progress.say(f"step {step + 1} skipped: {where} is not finite ({self.skipped} so far)")
            return
        row = f", the {self.in_a_row}th time in a row" if self.in_a_row > 1 else ""
        raise TrainingError(
            f"{where} is not finite{row}, at step {step + 1} (epoch {self.epoch + 1}), learning rate "
            f"{self._learning_rate(step):g}; {self.saver.last_checkpoint()}; lower optim.lr or "
            "optim.clip, or pass --nonfinite skip"
        )

    def _stop_if_asked(self) -> None:
        """Stop if any process was asked to, or if all processes together met too many unreadable images."""
        callbacks = self.callbacks
        counts = self.unreadable.unknown(), self.saver.failed(), callbacks.asked, callbacks.failure is not None
        number, (broken, failed, ends, raised) = self.agreement.reached(*counts)
        self.unreadable.check(broken)
        if failed:
            self.saver.finish()
        if raised:
            self.save_state()
            where, error = callbacks.failure or ("of another process", None)
            reason = f"failed after step {self.step}" + (f" ({type(error).__name__}: {error})" if error else "")
            raise TrainingError(f"the callback {where} {reason}; {self.saver.last_checkpoint()}") from error
        callbacks.ends = ends > 0
        if number is not None:
            self.save_state()
            name = signal.Signals(number).name
            raise Stopped(f"stopped by {name} after step {self.step}; {self.saver.last_checkpoint()}", number)

    # ------------------------------------------------------------ figures

    def _row(self, epoch: int) -> dict[str, Any]:
        loss, correct, seen = self._sum(self.metrics.sums())
        seen = seen or math.nan  # if every step was skipped
        steps = max(1, self.consumed // self.config.batch_size)  # fewer than in an epoch where a callback ended it
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self._learning_rate(max(self.step - 1, 0)),
            "train_loss": loss / seen,
            **({} if self.config.multi_label else {"train_accuracy": correct / seen}),
            "clipped": float(self.metrics.clipped) / steps,
            **self.metrics.clipped_by_kind(steps),
        }
        if self.config.progressive_sizes is not None:
            row["train_size"] = self.size
        if self.skipped:
            row["skipped"] = self.skipped
        return row

    def _evaluate(self) -> dict[str, Any]:
        """Score the live and the averaged weights in one pass over the held-out images."""
        broken: list[str] = []
        weights = [self.learner.live] if self.learner.averages is None else [self.learner.live, self.learner.averages]
        functions = [self._logits(full_tensors(params)) for params in weights]
        batches, device = self._held_out(broken), self.accelerator.device
        drawn = self.progress.tracker.takes_pictures and self.cfg.num_classes <= MOST_DRAWN
        confusion = Confusion(self.cfg.num_classes) if drawn and not self.config.multi_label else None
        if confusion is not None:  # of the weights that are saved
            batches, functions[-1] = confusion.batches(batches), confusion.of(functions[-1])
        if self.config.multi_label:
            row = _figures(set_scores(functions, batches, device=device))
        else:
            live, *averaged = scores(functions, batches, device=device, classes=self.cfg.num_classes)
            row = {"loss": live.loss, "accuracy": live.top1, "f1": live.f1}
            for result in averaged:
                row |= {"ema_loss": result.loss, "ema_accuracy": result.top1, "ema_f1": result.f1}
        try:
            self.unreadable.leave_out(broken)
        except BrokenImageError as error:
            raise BrokenImageError(f"{error}; {self.saver.last_checkpoint()}") from error
        if confusion is not None:
            counts: Any = self.accelerator.reduce(confusion.counts.to(device), reduction="sum")
            self.progress.confusion(counts.cpu().numpy().reshape(confusion.classes, -1), self.step)
        self.unreadable.share()
        if self.unreadable.known:  # those among the held-out images as well
            row["broken"] = len(self.unreadable.known)
        return row

    def _of_step(self) -> dict[str, float]:
        loss, norm = float(self.metrics.loss), float(self.metrics.norm)
        return {"loss": loss, "lr": self._learning_rate(self.step - 1), "gradient_norm": norm}

    def _weights(self) -> dict[str, Tensor]:
        return {name: t.to("cpu", copy=True) for name, t in full_tensors(self.learner.live).items()}

    def _logits(self, params: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def logits(images: Tensor) -> Tensor:
            with self.learner.autocast():
                return apply(self.cfg, params, images)

        return logits

    def _sum(self, values: Tensor) -> list[float]:
        reduced = self.accelerator.reduce(values, reduction="sum")
        return reduced.tolist()  # type: ignore[union-attr]

    def _check_held_out(self) -> None:
        """Read the held-out images before training if they are few: one that is broken would end it after an epoch."""
        if self.step or len(self.split.validation) > CHECKED:
            return
        broken: list[str] = []
        for _ in self._held_out(broken):
            pass
        self.unreadable.leave_out(broken)

    def _preview(self) -> None:
        wanted, tracker = self.config.augmented_sheet, self.progress.tracker
        if not self.accelerator.is_main_process or self.step or (wanted is None and not tracker.takes_pictures):
            return
        first = next(self.pipeline.batches(0, 0, self.pipeline.sizes[0]))
        images, targets, _ = self.pipeline.inputs(first, 0, {})

        def draw(file: Path) -> None:
            shown: dict[str, Any] = {"preprocessing": self.preprocessing, "classes": self.split.train.classes}
            augmentation_sheet(images.cpu(), file, targets=targets.cpu(), **shown)

        if wanted is not None:
            draw(Path(wanted))
        tracker.picture("augmented batch", draw, self.step)

    # ------------------------------------------------------------ files

    def save_state(self) -> None:
        """Save a checkpoint to resume from; all processes call this together."""
        self.check_steps()
        tensors = self.learner.tensors()
        shares = gather([self.metrics.sums().tolist()])
        facts = {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "size": self.size,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "meters": [
                *map(sum, zip(*shares, strict=True)),
                float(self.metrics.clipped),
                *self.metrics.clipped_kinds.tolist(),
            ],
            "shares": shares,  # of `meters`, for each process: an epoch's sums are added as without an interruption
            "rows": list(self.rows),
            "broken": self.unreadable.gathered(),
            "rng": gather([rng_state()]),
            "pretrained": self.pretrained,
            "data": self._data,
            "config": self.config.to_dict(),
            "teacher": teacher_facts(self.config, self.learner.teacher),
            "launcher": elastic_launcher(),
            "description": self.description.to_dict(),
        }
        self.saver.save_state(self.step, tensors, facts)

    def _restore(self, saved: Saved) -> None:
        facts = saved.facts
        self.learner.restore(saved)
        self.epoch, self.consumed, self.step = facts["epoch"], facts["consumed"], saved.step
        self.skipped, self.rows, self.unreadable.known = facts["skipped"], facts["rows"], set(facts["broken"])
        self.seconds, self.size = facts["seconds"], facts.get("size", self.preprocessing.train_size)
        loss, correct, seen, clipped, *kinds = facts["meters"]
        shares = facts.get("shares", [])  # which older checkpoints do not have
        if len(shares) != self.accelerator.num_processes:
            shares = [[loss, correct, seen]]
        self.metrics.restore(shares[self.rank] if self.rank < len(shares) else [0.0] * 3, clipped, kinds)
        if self.rank < len(facts["rng"]):
            set_rng_state(facts["rng"][self.rank])

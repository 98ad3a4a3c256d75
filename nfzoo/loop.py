"""The Accelerate loop of a training run: steps, epochs, checkpoints, and what stops them.

Every random choice depends on the seed, the epoch, the step and the image alone, and the position in the data is
counted in samples over all processes. So a run that was interrupted goes on as if it had not been, with any number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .adapter import AGCSGD
from .agc import agc_, whole
from .augment import GENTLE, Augment, augment_batch, draw
from .checkpoint import save_checkpoint
from .data import (
    DIGITS,
    BrokenImageError,
    Split,
    TrainingBatch,
    evaluation_batches,
    has_held_out,
    training_batches,
)
from .device import AUTOCAST, backend, default_workers, precision
from .diagnosis import bad_gradient, first_not_finite
from .errors import DataError, NfzooError
from .evaluate import Score, score
from .files import replaced
from .meters import Meters
from .model import apply, sample_noise
from .module import NFNet
from .optim import ema_, warmup_cosine
from .optimizers import make_optimizer
from .parallel import (
    Agreement,
    gather,
    gradients,
    optimizer_tensors,
    restore_optimizer,
    shard,
    take,
    whole_params,
)
from .plots import augmentation_sheet, training_curves
from .recipe import TrainConfig, default_lr
from .sam import ascent_rows, restore_, sam_ascent_
from .state import Saved, rng_state, save_state, set_rng_state
from .step import cross_entropy
from .types import Params

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up

logger = logging.getLogger("nfzoo")

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
RUN_FILE = "train.yaml"
STATES = "checkpoints"
LOGS = "logs"
LOG_STEPS = 10
SKIPS_IN_A_ROW = 20  # then it is the weights that are ruined, and not a batch

# What a resumed run may change without becoming another run.
FREE = frozenset(
    [
        "output",
        "data",  # compared by what it holds
        "accumulation",
        "workers",
        "compile",
        "activation_checkpointing",
        "sharding",
        "resume",
        "save_steps",
        "keep_checkpoints",
        "tracker",
        "overwrite",
        "augmented_sheet",
        "max_broken",
        "nonfinite",
    ]
)


class TrainingError(NfzooError, RuntimeError):
    """Training that cannot go on, such as a loss that is no longer a number."""


class LostError(TrainingError):
    """Another process of the run is gone."""


class Stopped(NfzooError):
    """A run that was asked to stop, and has saved where it was."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Result(NamedTuple):
    """What a run gave: the folder, held-out accuracies in [0, 1] of live and averaged weights, time spent training."""

    folder: Path
    accuracy: float
    ema_accuracy: float | None
    training_seconds: float


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        model: the network, its weights those to begin with.
        pretrained: whether they are somebody's, and not random.
        saved: the checkpoint to go on from.
    """

    model: NFNet
    pretrained: bool
    saved: Saved | None = None


def identity(split: Split) -> dict[str, Any]:
    """What the data of a run are, to notice others: classes, number, and a hash of all names and labels."""
    digest = hashlib.sha256()
    for images in split:
        digest.update(np.ascontiguousarray(images.labels).tobytes())
        for i in range(len(images)):
            digest.update(Path(images.name(i)).name.encode("utf-8", "surrogatepass") + b"\0")
    return {"images": len(split.train), "classes": list(split.train.classes), "digest": digest.hexdigest()}


class Run:
    """One training run: what its epochs share."""

    def __init__(self, config: TrainConfig, split: Split, accelerator: Accelerator, start: Start) -> None:
        self.config, self.split, self.accelerator = config, split, accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.backend = backend(accelerator.device)
        self.backend.start()
        self.dtype = AUTOCAST[precision(config.mixed_precision)]
        self.pretrained = start.pretrained
        model = start.model
        self.cfg, self.preprocessing, self.description = model.config, model.preprocessing, model.description
        self.augment = config.augment or (GENTLE if config.data == DIGITS else Augment())
        self.workers = _workers(config, self.world)
        self.steps_per_epoch = len(split.train) // config.batch_size
        self.peak_lr = config.optim.lr or default_lr(config.batch_size, start.pretrained, config.optim.name)
        if config.tune == "head":
            for name, p in model.named_parameters():
                p.requires_grad_(name.startswith("head."))
        if config.activation_checkpointing:
            model.checkpoint_blocks()
        if config.sharding == "fsdp2":
            self.model: Any = shard(model.to(accelerator.device), accelerator.device)
        else:
            model = model.to(accelerator.device)
        if config.compile:
            model.compile_blocks()
        self.bare = model
        self.live: Params = dict(model.named_parameters())
        self.names = {p: name for name, p in self.live.items()}
        self.trainable = [p for p in self.live.values() if p.requires_grad]
        self.inner = make_optimizer(config.optim, model, self.peak_lr)
        if isinstance(self.inner, AGCSGD):  # before the first step, which a lazy device would else compile for itself
            for p in self.trainable:
                self.inner.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if config.sharding == "fsdp2":
            self.optimizer: Any = self.inner
        else:
            self.model, self.optimizer = accelerator.prepare(model, self.inner)
        self.average: Params | None = None
        if config.optim.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.live.items()}
        self.epoch = self.consumed = self.step = self.skipped = self.in_a_row = 0
        self.seconds = 0.0  # of this epoch's training
        self.rows: list[dict[str, Any]] = []
        self.meters = Meters(accelerator.device)
        self.broken: set[str] = set()  # known to all processes
        self.own_broken: set[str] = set()  # met by this one since
        self.last_saved: Path | None = None
        self._data = identity(split)
        if start.saved is not None:
            self._restore(start.saved)
        self.backend.step_mark()  # what was prepared is no part of the first step
        self._start_tracker()
        origin = "pretrained" if self.pretrained else "random"
        if start.saved is not None:
            origin = f"step {self.step}'s"
        self._say(
            f"{config.model}: {sum(p.numel() for p in self.live.values()):,} parameters, {origin} weights; "
            f"{len(split.train):,} images to train on, {len(split.validation):,} held out, "
            f"{len(split.train.classes)} classes; {self.world} process(es) on {accelerator.device.type}, "
            f"peak learning rate {self.peak_lr:g}"
        )

    # ------------------------------------------------------------ the run

    def to_end(self) -> Result:
        seconds = 0.0
        row: dict[str, Any] = self.rows[-1] if self.rows else {}
        with Agreement() as self.agreement:
            self._preview()
            for epoch in range(self.epoch, self.config.epochs):
                row = self._epoch(epoch)
                row["images_per_second"] = self.consumed / self.seconds
                seconds += self.seconds
                row |= self._evaluate()
                self.rows.append(row)
                self._save_model(row)
                self.epoch, self.consumed, self.seconds = epoch + 1, 0, 0.0
                self.meters.clear()
                self._report(row)
                if epoch + 1 < self.config.epochs:
                    self._heed()
        self._say(f"saved to {self.config.output}")
        # Not `end_training`, which leaves the group of processes: torch's reducer can hang if it goes after the group.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()
        return Result(Path(self.config.output), row["accuracy"], row.get("ema_accuracy"), seconds)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        config = self.config
        parts: list[TrainingBatch] = []
        last = time.perf_counter()
        self.model.train()
        with self._bar(epoch) as bar:
            for batch in self._batches(epoch):
                parts.append(batch)
                if len(parts) < config.accumulation:
                    continue
                self._step(parts)
                parts = []
                self.seconds, last = self.seconds + time.perf_counter() - last, time.perf_counter()
                self.consumed += config.batch_size
                bar.update()
                if self.step % LOG_STEPS == 0:
                    self._log(bar)
                if self.consumed + config.batch_size <= len(self.split.train):  # the last step's follows the epoch
                    if config.save_steps is not None and self.step % config.save_steps == 0:
                        self._save_state()
                    self._heed()
        row = self._row(epoch)
        self._save_state()
        return row

    def _batches(self, epoch: int) -> Iterator[TrainingBatch]:
        remaining = len(self.split.train) - self.consumed
        if remaining < self.config.batch_size:  # resumed between the last step and the evaluation
            return iter(())
        return training_batches(
            self.split.train,
            self.preprocessing,
            epoch=epoch,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            rank=self.rank,
            world=self.world,
            accumulation=self.config.accumulation,
            start=self.consumed,
            augment=self.augment,
            workers=self.workers,
        )

    # ------------------------------------------------------------ one step

    def _step(self, parts: list[TrainingBatch]) -> None:
        optim = self.config.optim
        lr: float | Tensor = self._learning_rate(self.step)
        if isinstance(self.inner, AGCSGD):
            lr = self.backend.scalar(lr)
        for group in self.inner.param_groups:
            group["lr"] = lr
        noise = self._noise()
        last: tuple[Tensor, Tensor, dict[str, Tensor] | None] | None = None
        for i, part in enumerate(parts):
            self._count_broken(part)
            images, targets = self._inputs(part)
            rows = slice(part.offset, part.offset + len(part.labels))
            masks = {name: mask[rows].to(images.device) for name, mask in noise.items()} if noise else None
            last = images, targets, masks
            before = self._ascend(*last) if optim.sam_rho is not None else None
            with self._unsynced() if i + 1 < len(parts) else nullcontext():
                with self.backend.autocast(self.dtype):
                    logits = self.model(images, masks or {})
                loss = cross_entropy(logits, targets, optim.label_smoothing)
                self.accelerator.backward(loss / len(parts))
            if before is not None:
                restore_(self.trainable, before)
            self.meters.add(loss, logits, targets)
        self.backend.all_reduce_mean(gradients(self.trainable))
        assert last is not None
        finite = self._finite()
        # AGCSGD keeps its hands off by itself, so that the host need not wait between the gradient and the update.
        gated = isinstance(self.inner, AGCSGD)
        if gated or finite is None or bool(finite):
            self._update(finite if gated else None)
        self.backend.step_mark()
        if finite is not None and not bool(finite):
            self._not_finite(last)
        else:
            self.in_a_row = 0
        self.inner.zero_grad()
        self.step += 1

    def _update(self, gate: Tensor | None) -> None:
        optim = self.config.optim
        if isinstance(self.inner, AGCSGD):
            self.inner.gate = gate
        elif optim.clip is not None:
            heads = [p for name, p in self.live.items() if name == "head.weight"]
            agc_(self.trainable, clip=optim.clip, exclude=heads)
        self.optimizer.step()
        if isinstance(self.inner, AGCSGD) and self.inner.clipped_fraction is not None:
            self.meters.clipped = self.meters.clipped + whole(self.inner.clipped_fraction)
        if self.average is not None and optim.ema_decay is not None:
            ema_(self.average, self.live, self.backend.scalar(self.step), decay=optim.ema_decay, gate=gate)

    def _learning_rate(self, step: int) -> float:
        optim = self.config.optim
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        total = self.config.epochs * self.steps_per_epoch
        return warmup_cosine(step, peak=self.peak_lr, warmup=warmup, total=total, minimum=optim.min_lr)

    def _inputs(self, part: TrainingBatch) -> tuple[Tensor, Tensor]:
        """Mixed, varied and normalised images, and their labels, on the device."""
        draws = draw(
            self.augment,
            seed=self.config.seed,
            epoch=self.epoch,
            indices=part.indices.numpy(),
            offset=part.offset,
            size=part.pixels.shape[-1],
        )
        device = self.accelerator.device
        # A lazy device would compile anew for each grouping of images by operation.
        place = torch.device("cpu") if device.type == "xla" else device
        images, targets = augment_batch(
            part.pixels.to(place, non_blocking=True),
            part.labels.to(place, non_blocking=True),
            draws,
            self.augment,
            num_classes=self.cfg.num_classes,
            preprocessing=self.preprocessing,
        )
        return images.to(device), targets.to(device)

    def _noise(self) -> dict[str, Tensor]:
        """The global batch's masks, of which each process takes its rows."""
        seed = int(np.random.SeedSequence([self.config.seed, self.step]).generate_state(1, np.uint64)[0] >> 1)
        return sample_noise(self.cfg, self.config.batch_size, generator=torch.Generator().manual_seed(seed))

    def _unsynced(self) -> Any:
        if self.config.sharding == "fsdp2":
            return _NoReduction(self.model)
        return self.accelerator.no_sync(self.model)

    def _ascend(self, images: Tensor, targets: Tensor, masks: Mapping[str, Tensor] | None) -> list[Tensor]:
        """Move the weights up the loss of this process's first images; the weights as they were."""
        optim = self.config.optim
        rows = ascent_rows(len(images), optim.sam_fraction)
        noise = {name: mask[:rows] for name, mask in masks.items()} if masks else {}
        with self.backend.autocast(self.dtype):
            logits = self.bare(images[:rows], noise)
        loss = cross_entropy(logits, targets[:rows], optim.label_smoothing)
        grads = torch.autograd.grad(loss, self.trainable)
        assert optim.sam_rho is not None
        return sam_ascent_(self.trainable, grads, rho=optim.sam_rho)

    # ------------------------------------------------------------ what goes wrong

    def _finite(self) -> Tensor | None:
        """Whether the gradient is, on the device; `None` under a loss scaler, which judges by itself.

        Clips the gradient's norm on the way, if asked.
        """
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.get_total_norm(gradients(self.trainable))
        self.meters.norm = whole(norm)
        if self.config.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.config.optim.clip_norm, norm)
        return None if self.accelerator.scaler is not None else self.meters.norm.isfinite()

    def _not_finite(self, last: tuple[Tensor, Tensor, dict[str, Tensor] | None]) -> None:
        found = first_not_finite(self.cfg, self.live, *last, autocast=lambda: self.backend.autocast(self.dtype))
        where = next(filter(None, gather([found])), "") or bad_gradient(self.live)
        self.in_a_row += 1
        if self.config.nonfinite == "skip" and self.in_a_row < SKIPS_IN_A_ROW:
            self.skipped += 1
            self._say(f"step {self.step + 1} skipped: {where} is not finite ({self.skipped} so far)")
            return
        row = f", the {self.in_a_row}th time in a row" if self.in_a_row > 1 else ""
        raise TrainingError(
            f"{where} is not finite{row}, at step {self.step + 1} (epoch {self.epoch + 1}), learning rate "
            f"{self._learning_rate(self.step):g}; {self.whereabouts()}; lower optim.lr or "
            "optim.clip, or pass --nonfinite skip"
        )

    def _count_broken(self, part: TrainingBatch) -> None:
        for message in part.broken:
            if message in self.broken | self.own_broken:
                continue
            self.own_broken.add(message)
            if len(self.broken | self.own_broken) > self.config.max_broken:
                raise BrokenImageError(self._broken_text(len(self.broken | self.own_broken)))
            logger.warning("not readable, and replaced: %s", message)

    def _broken_text(self, count: int) -> str:
        names = "; ".join(sorted(self.broken | self.own_broken)[-3:])
        if self.config.max_broken == 0:
            return f"{names}; --max_broken N lets training go on with up to N such images"
        return f"{count} images cannot be read, and max_broken is {self.config.max_broken}; such as: {names}"

    def _heed(self) -> None:
        """Stop where any process was asked to, or where all of them together met too many broken images."""
        number, broken = self.agreement.reached(len(self.own_broken - self.broken))
        if len(self.broken) + broken > self.config.max_broken:
            raise DataError(self._broken_text(len(self.broken) + broken))
        if number is not None:
            self._save_state()
            name = signal.Signals(number).name
            raise Stopped(f"stopped by {name} after step {self.step}; {self.whereabouts()}", number)

    def whereabouts(self) -> str:
        if self.last_saved is None:
            return "nothing was saved"
        return f"{self.last_saved} holds the last checkpoint; to go on from it, pass --resume true"

    # ------------------------------------------------------------ figures

    def _row(self, epoch: int) -> dict[str, Any]:
        loss, correct, seen = self._sum(self.meters.sums())
        seen = seen or math.nan  # if every step was skipped
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self._learning_rate(max(self.step - 1, 0)),
            "train_loss": loss / seen,
            "train_accuracy": correct / seen,
            "clipped": float(self.meters.clipped) / self.steps_per_epoch,
        }
        if self.skipped:
            row["skipped"] = self.skipped
        self.broken |= set(gather(sorted(self.own_broken)))
        self.own_broken.clear()
        if self.broken:
            row["broken"] = len(self.broken)
        return row

    def _evaluate(self) -> dict[str, float]:
        live = self._score(self.live)
        row = {"loss": live.loss, "accuracy": live.top1}
        if self.average is not None:
            averaged = self._score(self.average)
            row |= {"ema_loss": averaged.loss, "ema_accuracy": averaged.top1}
        return row

    def _score(self, params: Mapping[str, Tensor]) -> Score:
        whole_ones = whole_params(params)
        broken: list[str] = []
        batches = evaluation_batches(
            self.split.validation,
            self.preprocessing,
            batch_size=max(1, self.config.batch_size // self.world),
            rank=self.rank,
            world=self.world,
            workers=self.workers,
            broken=broken if self.config.max_broken else None,
        )

        def logits(images: Tensor) -> Tensor:
            with self.backend.autocast(self.dtype):
                return apply(self.cfg, whole_ones, images)

        found = score(logits, batches, device=self.accelerator.device)
        for message in broken:
            if message not in self.broken | self.own_broken:
                logger.warning("left out: %s", message)
                self.own_broken.add(message)
        if len(self.broken | self.own_broken) > self.config.max_broken:
            raise BrokenImageError(self._broken_text(len(self.broken | self.own_broken)))
        return found

    def _sum(self, values: Tensor) -> list[float]:
        reduced = self.accelerator.reduce(values, reduction="sum")
        return reduced.tolist()  # type: ignore[union-attr]

    def _log(self, bar: tqdm[Any]) -> None:
        loss, correct, seen = self.meters.sums().tolist()
        clipped = getattr(self.inner, "clipped_fraction", None)
        if seen:
            bar.set_postfix_str(f"loss {loss / seen:.3f}, accuracy {correct / seen:.1%}")
        if self.config.tracker is not None:
            values = {"train/loss": float(self.meters.loss), "train/lr": self._learning_rate(self.step - 1)}
            values["train/gradient_norm"] = float(self.meters.norm)
            if clipped is not None:
                values["train/clipped"] = float(whole(clipped))
            self.accelerator.log(values, step=self.step)

    def _report(self, row: Mapping[str, Any]) -> None:
        ema = "" if self.average is None else f", {row['ema_accuracy']:.2%} averaged"
        clipped = f"  clipped {row['clipped']:.1%}" if isinstance(self.inner, AGCSGD) else ""
        skipped = f"  skipped {self.skipped}" if self.skipped else ""
        broken = f"  broken images {len(self.broken)}" if self.broken else ""
        self._say(
            f"epoch {row['epoch']:>3}/{self.config.epochs}  train loss {row['train_loss']:.3f}  held-out accuracy "
            f"{row['accuracy']:.2%} live{ema}{clipped}{skipped}{broken}  {row['images_per_second']:.0f} images/s"
        )
        if self.config.tracker is not None:
            values = {f"epoch/{key}": value for key, value in row.items() if isinstance(value, float)}
            self.accelerator.log(values, step=self.step)

    def _start_tracker(self) -> None:
        if self.config.tracker is None:
            return
        flat = {k: v for k, v in self.config.to_dict().items() if isinstance(v, bool | int | float | str)}
        flat |= {
            f"optim.{k}": v for k, v in self.config.to_dict()["optim"].items() if isinstance(v, bool | int | float)
        }
        self.accelerator.init_trackers("nfzoo", config=flat)

    def _preview(self) -> None:
        if self.config.augmented_sheet is None or not self.accelerator.is_main_process or self.step:
            return
        first = next(self._batches(0))
        images, targets = self._inputs(first)
        augmentation_sheet(
            images.cpu(),
            Path(self.config.augmented_sheet),
            preprocessing=self.preprocessing,
            targets=targets.cpu(),
            classes=self.split.train.classes,
        )

    # ------------------------------------------------------------ files

    def _save_model(self, row: Mapping[str, Any]) -> None:
        params = whole_params(self.live if self.average is None else self.average)
        self._main_writes(lambda: self._write_model(row, params))

    def _write_model(self, row: Mapping[str, Any], params: Params) -> None:
        config, output = self.config, Path(self.config.output)
        provenance = {
            "trained_from": _public(config.model) if self.pretrained else "random weights",
            "data": _public(config.data),
            "epochs": row["epoch"],
            "weights": "live" if self.average is None else "ema",
            "accuracy": row["accuracy"] if self.average is None else row["ema_accuracy"],
        }
        if not has_held_out(config.data):
            provenance["validation_fraction"] = config.validation_fraction
        save_checkpoint(output, self.description._replace(provenance=provenance), self.backend.to_cpu(params))
        with replaced(output / METRICS_FILE) as scratch:
            lines = [{k: None if v != v else v for k, v in row.items()} for row in self.rows]  # JSON has no NaN
            scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        with replaced(output / RUN_FILE) as scratch:
            scratch.write_text(config.to_yaml(), encoding="utf-8")
        try:
            training_curves(output / METRICS_FILE, output / CURVES_FILE)
        except ModuleNotFoundError:
            logger.info("no %s: the plots need matplotlib (pip install 'nfzoo[plots]')", CURVES_FILE)

    def _save_state(self) -> None:
        """A checkpoint to resume from; all processes call this together."""
        tensors = {"model": whole_params(self.live), "optimizer": optimizer_tensors(self.inner, self.names)}
        if self.average is not None:
            tensors["average"] = whole_params(self.average)
        sums = self._sum(self.meters.sums())
        facts = {
            "epoch": self.epoch,
            "consumed": self.consumed,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "meters": [*sums, float(self.meters.clipped)],
            "rows": self.rows,
            "broken": sorted(self.broken.union(gather(sorted(self.own_broken)))),
            "rng": gather([rng_state()]),
            "pretrained": self.pretrained,
            "data": self._data,
            "config": self.config.to_dict(),
            "description": self.description.to_dict(),
        }
        root = Path(self.config.output) / STATES
        on_cpu = {name: self.backend.to_cpu(content) for name, content in tensors.items()}

        def write() -> None:
            save_state(root, self.step, on_cpu, facts, keep=self.config.keep_checkpoints)

        self._main_writes(write)
        self.last_saved = root / f"step_{self.step:08d}"

    def _main_writes(self, write: Any) -> None:
        """Let the main process write; what the disk says to it, all processes hear."""
        failure: list[str] = []
        if self.accelerator.is_main_process:
            try:
                write()
            except OSError as error:
                failure = [str(error)]
        failure = gather(failure)
        if failure:
            raise TrainingError(f"could not save after step {self.step}: {failure[0]}; {self.whereabouts()}")

    def _restore(self, saved: Saved) -> None:
        facts = saved.facts
        for name, value in saved.tensors("model").items():
            take(self.live[name], value)
        restore_optimizer(self.inner, self.names, saved.tensors("optimizer"))
        if self.average is not None:
            for name, value in saved.tensors("average").items():
                take(self.average[name], value)
        self.epoch, self.consumed, self.step = facts["epoch"], facts["consumed"], saved.step
        self.skipped, self.rows, self.broken = facts["skipped"], facts["rows"], set(facts["broken"])
        self.seconds = facts["seconds"]
        *sums, clipped = facts["meters"]
        self.meters.restore(sums if self.rank == 0 else [0.0] * len(sums), clipped)
        if self.rank < len(facts["rng"]):
            set_rng_state(facts["rng"][self.rank])
        self.last_saved = saved.folder

    # ------------------------------------------------------------ the terminal

    def _bar(self, epoch: int) -> tqdm[Any]:
        hidden = not (self.accelerator.is_main_process and sys.stderr.isatty())
        return tqdm(
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            total=self.steps_per_epoch,
            initial=self.consumed // self.config.batch_size,
            unit="step",
            leave=False,
            disable=hidden,
        )

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)


class _NoReduction:
    """FSDP2's form of DDP's `no_sync`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self.model.set_requires_gradient_sync(True)


def _workers(config: TrainConfig, processes: int) -> int:
    if config.workers is not None:
        return config.workers
    if config.data == DIGITS:
        return 0
    return default_workers(processes)


def _public(source: str) -> str:
    """A name as it is, of a path the last part: a shared checkpoint should not tell where its maker works."""
    return Path(source).resolve().name if Path(source).exists() else source

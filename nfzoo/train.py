"""Training and fine-tuning with Accelerate: `accelerate launch -m nfzoo.train --model … --data … --output …`.

The batch size is global and every random choice depends on the seed, the epoch, the step and the image alone, so that
one process and several train the same model.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from .adapter import AGCSGD, param_groups
from .checkpoint import CONFIG_FILE, Description, save_checkpoint
from .config import ModelConfig, Preprocessing
from .data import (
    DIGITS,
    GENTLE,
    Augment,
    BrokenImageError,
    Split,
    evaluation_batches,
    held_out_folder,
    open_split,
    training_batches,
)
from .device import check_processes, default_workers
from .errors import CheckpointError, ConfigError, DataError, NfzooError
from .evaluate import Score, score
from .files import replaced
from .model import apply, sample_noise
from .module import NFNet, create
from .optim import ema_, warmup_cosine
from .plots import training_curves
from .recipe import TrainConfig, default_lr, parse
from .step import cross_entropy
from .types import Params
from .variants import VARIANTS

logger = logging.getLogger("nfzoo")

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
RUN_FILE = "train.yaml"


class TrainingError(NfzooError, RuntimeError):
    """Training that cannot go on, such as a loss that is no longer a number."""


class Result(NamedTuple):
    """What a run gave: the folder, held-out accuracies in [0, 1] of live and averaged weights, time spent training."""

    folder: Path
    accuracy: float
    ema_accuracy: float | None
    training_seconds: float


def train(config: TrainConfig) -> Result:
    """Run a training to its end and save the model after each epoch.

    Nothing is written before the first epoch is through.

    Raises:
        NfzooError: for bad input; see `nfzoo.errors`.
        TrainingError: if the loss stops being a number.
    """
    output = Path(config.output)
    if (output / CONFIG_FILE).exists() and not config.overwrite:
        raise ConfigError(f"{config.output!r} holds a model already; choose another output, or pass --overwrite true")
    _check_writable(output)
    torch.manual_seed(config.seed)  # draws the classifier of a fine-tuned model
    split = _open_data(config)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    check_processes(accelerator.num_processes)
    if config.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size {config.batch_size} does not divide among {accelerator.num_processes} processes; "
            "make it a multiple"
        )
    if len(split.train) < config.batch_size:
        raise DataError(
            f"{len(split.train)} training images do not fill a batch of {config.batch_size}; pass a smaller one"
        )
    run = _Run(config, split, accelerator)
    accelerator.wait_for_everyone()
    return run.to_end()


def _check_writable(output: Path) -> None:
    """Raise a `ConfigError` now where saving would fail after the first epoch."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{str(output)!r} is a file; the output must be a folder")
    existing = output.resolve()
    while not existing.exists():
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{str(existing)!r} is a file")
        with tempfile.TemporaryDirectory(prefix=".nfzoo-", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"the output {str(output)!r} cannot be written: {error}") from error


class _Run:
    """One training run: what its epochs share."""

    def __init__(self, config: TrainConfig, split: Split, accelerator: Accelerator) -> None:
        self.config, self.split, self.accelerator = config, split, accelerator
        optim = config.optim
        model, pretrained = _open_model(config, split.train.classes)
        self.pretrained = pretrained
        self.cfg: ModelConfig = model.config
        self.preprocessing = model.preprocessing
        self.description = model.description
        self.augment = config.augment or (GENTLE if config.data == DIGITS else Augment())
        self.workers = _workers(config, accelerator.num_processes)
        self.steps_per_epoch = len(split.train) // config.batch_size
        self.peak_lr = optim.lr or default_lr(config.batch_size, pretrained)
        groups = param_groups(model, weight_decay=optim.weight_decay, clip=optim.clip)
        self.sgd = AGCSGD(
            groups, self.peak_lr, momentum=optim.momentum, nesterov=optim.nesterov, weight_decay=0.0, clip=None
        )
        self.model, self.optimizer = accelerator.prepare(model, self.sgd)
        self.live: Params = dict(accelerator.unwrap_model(self.model).named_parameters())
        self.average: Params | None = None
        if optim.ema_decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.live.items()}
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self._say(
            f"{config.model}: {sum(p.numel() for p in self.live.values()):,} parameters, "
            f"{'pretrained' if pretrained else 'random'} weights; {len(split.train):,} images to train on, "
            f"{len(split.validation):,} held out, {len(split.train.classes)} classes; "
            f"{accelerator.num_processes} process(es) on {accelerator.device.type}, peak learning rate {self.peak_lr:g}"
        )

    def to_end(self) -> Result:
        seconds = 0.0
        row: dict[str, Any] = {}
        for epoch in range(self.config.epochs):
            start = time.perf_counter()
            row = self._epoch(epoch)
            row["images_per_second"] = self.steps_per_epoch * self.config.batch_size / (time.perf_counter() - start)
            seconds += time.perf_counter() - start
            row |= self._evaluate()
            self.rows.append(row)
            self._save(row)
            ema = "" if self.average is None else f", {row['ema_accuracy']:.2%} averaged"
            self._say(
                f"epoch {epoch + 1:>3}/{self.config.epochs}  train loss {row['train_loss']:.3f}  held-out accuracy "
                f"{row['accuracy']:.2%} live{ema}  clipped {row['clipped']:.1%}  "
                f"{row['images_per_second']:.0f} images/s"
            )
        self._say(f"saved to {self.config.output}")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return Result(Path(self.config.output), row["accuracy"], row.get("ema_accuracy"), seconds)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        config, accelerator, optim = self.config, self.accelerator, self.config.optim
        warmup = round(optim.warmup_epochs * self.steps_per_epoch)
        total = config.epochs * self.steps_per_epoch
        batches = training_batches(
            self.split.train,
            self.preprocessing,
            epoch=epoch,
            seed=config.seed,
            batch_size=config.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            augment=self.augment,
            workers=self.workers,
        )
        self.model.train()
        loss_sum = correct = clipped = torch.zeros((), device=accelerator.device)
        seen, lr = 0, 0.0
        start = time.perf_counter()
        with self._bar(batches, f"epoch {epoch + 1}/{config.epochs}") as bar:
            for images, labels in bar:
                images, labels = images.to(accelerator.device), labels.to(accelerator.device)
                lr = warmup_cosine(self.step, peak=self.peak_lr, warmup=warmup, total=total, minimum=optim.min_lr)
                for group in self.sgd.param_groups:
                    group["lr"] = lr
                logits = self.model(images, self._noise())
                loss = cross_entropy(logits, labels, optim.label_smoothing)
                accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.average is not None and optim.ema_decay is not None:
                    ema_(self.average, self.live, self.step, decay=optim.ema_decay)
                self.step += 1
                seen += len(labels)
                loss_sum = loss_sum + loss.detach() * len(labels)
                correct = correct + (logits.detach().argmax(1) == labels).sum()
                if self.sgd.clipped_fraction is not None:
                    clipped = clipped + self.sgd.clipped_fraction
                if self.step % 10 == 0 or self.step % self.steps_per_epoch == 0:
                    mean_loss = float(loss_sum) / seen
                    if not math.isfinite(mean_loss):
                        saved = f"{config.output} holds the epoch before" if epoch else "nothing was saved"
                        raise TrainingError(
                            f"the loss is {mean_loss} at step {self.step} (epoch {epoch + 1}), learning rate {lr:g}; "
                            f"{saved}; lower optim.lr or optim.clip"
                        )
                    rate = seen * accelerator.num_processes / (time.perf_counter() - start)
                    bar.set_postfix_str(
                        f"loss {mean_loss:.3f}, accuracy {float(correct) / seen:.1%}, "
                        f"clipped {float(self.sgd.clipped_fraction or 0):.1%}, {rate:.0f} images/s"
                    )
        totals = torch.stack([loss_sum, correct, torch.tensor(float(seen), device=accelerator.device)])
        loss_total, correct_total, seen_total = self._sum(totals)
        return {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": lr,
            "train_loss": loss_total / seen_total,
            "train_accuracy": correct_total / seen_total,
            "clipped": float(clipped) / self.steps_per_epoch,
        }

    def _noise(self) -> dict[str, Tensor] | None:
        """This process's rows of the global batch's masks."""
        seed = int(np.random.SeedSequence([self.config.seed, self.step]).generate_state(1, np.uint64)[0] >> 1)
        noise = sample_noise(self.cfg, self.config.batch_size, generator=torch.Generator().manual_seed(seed))
        part = self.config.batch_size // self.accelerator.num_processes
        rows = slice(self.accelerator.process_index * part, (self.accelerator.process_index + 1) * part)
        return {name: mask[rows].to(self.accelerator.device) for name, mask in noise.items()}

    def _evaluate(self) -> dict[str, float]:
        live = self._score(self.live)
        row = {"loss": live.loss, "accuracy": live.top1}
        if self.average is not None:
            averaged = self._score(self.average)
            row |= {"ema_loss": averaged.loss, "ema_accuracy": averaged.top1}
        return row

    def _score(self, params: Mapping[str, Tensor]) -> Score:
        batches = evaluation_batches(
            self.split.validation,
            self.preprocessing,
            batch_size=max(1, self.config.batch_size // self.accelerator.num_processes),
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.workers,
        )

        def logits(images: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return apply(self.cfg, params, images)

        return score(logits, batches, device=self.accelerator.device)

    def _sum(self, values: Tensor) -> list[float]:
        reduced = self.accelerator.reduce(values, reduction="sum")
        return reduced.tolist()  # type: ignore[union-attr]

    def _save(self, row: Mapping[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        config, output = self.config, Path(self.config.output)
        provenance = {
            "trained_from": _public(config.model) if self.pretrained else "random weights",
            "data": _public(config.data),
            "epochs": row["epoch"],
            "weights": "live" if self.average is None else "ema",
            "accuracy": row["accuracy"] if self.average is None else row["ema_accuracy"],
        }
        if held_out_folder(Path(config.data)) is None:
            provenance["validation_fraction"] = config.validation_fraction
        description = self.description._replace(provenance=provenance)
        save_checkpoint(output, description, self.live if self.average is None else self.average)
        with replaced(output / METRICS_FILE) as scratch:
            scratch.write_text("".join(json.dumps(r) + "\n" for r in self.rows), encoding="utf-8")
        with replaced(output / RUN_FILE) as scratch:
            scratch.write_text(config.to_yaml(), encoding="utf-8")
        try:
            training_curves(output / METRICS_FILE, output / CURVES_FILE)
        except ModuleNotFoundError:
            logger.info("no %s: the plots need matplotlib (pip install 'nfzoo[plots]')", CURVES_FILE)

    def _bar(self, batches: Iterator[tuple[Tensor, Tensor]], title: str) -> tqdm[tuple[Tensor, Tensor]]:
        hidden = not (self.accelerator.is_main_process and sys.stderr.isatty())
        return tqdm(batches, desc=title, total=self.steps_per_epoch, unit="step", leave=False, disable=hidden)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)


def _open_data(config: TrainConfig) -> Split:
    # The same images are held out whatever the seed of the run, so that runs compare and `evaluate` finds them again.
    split = open_split(config.data, validation_fraction=config.validation_fraction)
    if len(split.train.classes) < 2:
        raise DataError(f"{config.data!r} has one class alone; there is nothing to tell apart")
    if not config.skip_broken or config.data == DIGITS:
        return split
    parts = []
    for part in split:
        kept, problems = part.without_broken()  # type: ignore[union-attr]
        for problem in problems:
            logger.warning("left out: %s", problem)
        emptied = set(range(len(part.classes))) - set(kept.labels)
        if emptied:
            raise DataError(f"no readable image is left in class {part.classes[min(emptied)]!r}")
        parts.append(kept)
    return Split(*parts)


def _open_model(config: TrainConfig, classes: tuple[str, ...]) -> tuple[NFNet, bool]:
    from . import from_pretrained, list_models

    in_zoo = config.model in VARIANTS and not Path(config.model).exists()
    if config.pretrained is False and not in_zoo:
        raise ConfigError(f"--pretrained false needs a zoo name, not {config.model!r}")
    if not in_zoo or config.pretrained or (config.pretrained is None and config.model in list_models(pretrained=True)):
        try:
            model = from_pretrained(config.model, num_classes=len(classes))
        except CheckpointError as error:
            hint = "; to start from random weights, pass --pretrained false" if in_zoo else ""
            raise CheckpointError(f"{error}{hint}") from error
        pretrained = True
    else:
        generator = torch.Generator().manual_seed(config.seed)
        model = create(config.model, num_classes=len(classes), generator=generator)
        pretrained = False
    changes = {n: getattr(config, n) for n in ("drop_rate", "stochastic_depth") if getattr(config, n) is not None}
    sizes = {n: getattr(config, n) for n in ("train_size", "test_size") if getattr(config, n) is not None}
    preprocessing = Preprocessing.from_dict({**model.preprocessing.to_dict(), **sizes})
    description = Description(model.config.replace(**changes), preprocessing, model.name, classes)
    return NFNet.from_params(description, {n: p.detach() for n, p in model.named_parameters()}), pretrained


def _workers(config: TrainConfig, processes: int) -> int:
    if config.workers is not None:
        return config.workers
    if config.data == DIGITS:
        return 0
    return default_workers(processes)


def _public(source: str) -> str:
    """A name as it is, of a path the last part: a shared checkpoint should not tell where its maker works."""
    return Path(source).resolve().name if Path(source).exists() else source


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when the model is trained, 2 for bad input, 1 when training or the disk gave out."""
    try:
        train(parse(argv))
    except TrainingError as error:
        return _fail(error, 1)
    except NfzooError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(error: Exception, status: int) -> int:
    if os.environ.get("RANK", "0") == "0" or isinstance(error, BrokenImageError):
        print(f"nfzoo train: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

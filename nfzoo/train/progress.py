"""Say how a training run goes: on the terminal, in a bar, and to a tracker."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nfzoo.runtime.output import escaped
from nfzoo.train.config import TrainConfig
from nfzoo.train.learner import Learner
from nfzoo.train.metrics import Best, Metrics
from nfzoo.train.run_folder import public_data, public_model

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up

logger = logging.getLogger("nfzoo")

_LOCAL = ("output", "augmented_sheet", "labels", "validation_labels", "class_names")
"""Options with paths, which a tracker on the other side of the world does not get."""


class Progress:
    """Report a run by its main process: lines, a bar on a terminal, figures to the tracker.

    Args:
        learner: says how many units AGC clipped.
        steps_per_epoch: length of the bar.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, learner: Learner, *, steps_per_epoch: int
    ) -> None:
        self.config, self.learner, self.steps_per_epoch = config, learner, steps_per_epoch
        self.is_main = accelerator.is_main_process
        options = config.to_dict()
        shown = {k: v for k, v in options.items() if isinstance(v, bool | int | float | str) and k not in _LOCAL}
        shown |= {"model": public_model(config.model), "data": public_data(config.data)}
        if config.teacher is not None:
            shown |= {"teacher": public_model(config.teacher)}
            shown |= {f"distillation.{k}": v for k, v in options["distillation"].items() if v is not None}
        shown |= {f"optim.{k}": v for k, v in options["optim"].items() if isinstance(v, bool | int | float)}
        self.tracker = Tracker(accelerator, config.tracker, shown)

    def say(self, text: str) -> None:
        """Print a line."""
        if self.is_main:
            print(escaped(text), flush=True)

    def bar(self, epoch: int, consumed: int) -> tqdm[Any]:
        """Return the bar of an epoch of which `consumed` images are done; only a terminal shows it."""
        return tqdm(
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            total=self.steps_per_epoch,
            initial=consumed // self.config.batch_size,
            unit="step",
            leave=False,
            disable=not (self.is_main and sys.stderr.isatty()),
        )

    def step(self, bar: tqdm[Any], metrics: Metrics, step: int, lr: float) -> None:
        """Show the figures of the epoch so far in the bar, and send those of the last step to the tracker."""
        loss, correct, seen = metrics.sums().tolist()
        if seen:
            bar.set_postfix_str(f"loss {loss / seen:.3f}, accuracy {correct / seen:.1%}")
        if self.config.tracker is None:
            return
        updater = self.learner.updater
        values = {"train/loss": float(metrics.loss), "train/lr": lr, "train/gradient_norm": float(metrics.norm)}
        if updater.clipped is not None:
            values["train/clipped"] = float(updater.clipped)
        if updater.clipped_kinds is not None:
            names = (f"train/clipped_{kind}" for kind in updater.kinds)
            values |= zip(names, updater.clipped_kinds.tolist(), strict=True)
        self.tracker.log(values, step)

    def epoch(self, row: Mapping[str, Any], *, best: bool) -> None:
        """Print the figures of an epoch, and send them to the tracker.

        Args:
            best: whether the run keeps its best epoch, and this is the best so far.
        """
        ema = "" if self.learner.averages is None else f", {row['ema_accuracy']:.2%} averaged"
        clipped = f"  clipped {row['clipped']:.1%}" if self.learner.updater.clipped is not None else ""
        if clipped and self.config.tune == "head":
            clipped += " of the bias"
        skipped = f"  skipped {row['skipped']}" if row.get("skipped") else ""
        broken = f"  broken images {row['broken']}" if row.get("broken") else ""
        epoch = f"epoch {row['epoch']:>3}/{self.config.epochs}"
        if "train_size" in row:
            epoch += f"  {row['train_size']} pixels"
        self.say(
            f"{epoch}  train loss {row['train_loss']:.3f}  held-out accuracy "
            f"{row['accuracy']:.2%} live{ema}{clipped}{skipped}{broken}{'  best so far' if best else ''}  "
            f"{row['images_per_second']:.0f} images/s"
        )
        self.tracker.log({f"epoch/{k}": v for k, v in row.items() if isinstance(v, float)}, row["step"])

    def finish(self, rule: Best | None, kept: Mapping[str, Any]) -> None:
        """Say what the folder keeps, and close the tracker.

        Args:
            rule: that by which the run keeps its best epoch, if it does.
            kept: the figures of the epoch that is kept.
        """
        text = f"saved to {self.config.output}"
        if rule is not None:
            which = "averaged" if rule.averaged else "live"
            value = f"{rule.value(kept):.4f} {which}"
            text += f": epoch {kept['epoch']}, the best by {rule.metric} ({value}), and the last as a checkpoint"
        self.say(text)
        self.tracker.finish()


class Tracker:
    """Send figures to the tracker that the accelerator was made with, if to any.

    One that fails costs a warning, the first time, and never the run. That holds for the threads that it starts too.

    Args:
        accelerator: its main process sends.
        name: the tracker's, or `None`.
        options: what the tracker shows of the run.
    """

    def __init__(
        self, accelerator: Accelerator, name: str | None, options: Mapping[str, bool | int | float | str]
    ) -> None:
        self._accelerator, self._name, self._failed = accelerator, name, False
        self._threads: set[threading.Thread] = set()
        self._others: set[threading.Thread] | None = None
        self._hook_before = threading.excepthook
        if name is not None:
            threading.excepthook = self._ended
        self._try(lambda: accelerator.init_trackers("nfzoo", config=dict(options)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self._accelerator.log(dict(values), step=step))

    def finish(self) -> None:
        # Not `end_training`, which leaves the group of processes: torch's reducer can hang if it is destroyed after it.
        for tracker in self._accelerator.trackers:
            self._try(tracker.finish)
        if threading.excepthook == self._ended:
            threading.excepthook = self._hook_before

    def _try(self, call: Callable[[], object]) -> None:
        if self._name is None:
            return
        self._others = set(threading.enumerate()) - self._threads
        try:
            call()
        except Exception as error:
            self._fail(error)
        self._threads = set(threading.enumerate()) - self._others
        self._others = None

    def _ended(self, how: threading.ExceptHookArgs) -> None:
        """Take the error that ended a thread."""
        new = self._others is not None and how.thread not in self._others  # one that the present call started
        if (new or how.thread in self._threads) and isinstance(how.exc_value, Exception):
            self._fail(how.exc_value)
        else:
            self._hook_before(how)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(
                "the tracker %r failed (%s); training goes on, and metrics.jsonl has its figures", self._name, reason
            )

"""Say how a training run goes: on the terminal, in a bar, and to a tracker."""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from nfzoo.analysis.classification_figures import confusion_figure
from nfzoo.analysis.figures import MissingPlotsError
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
        classes: names of the classes.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        learner: Learner,
        *,
        steps_per_epoch: int,
        classes: Sequence[str],
    ) -> None:
        self.config, self.learner, self.steps_per_epoch, self.classes = config, learner, steps_per_epoch, classes
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
        """Return the bar of an epoch of which `consumed` images are done; only a terminal or a notebook shows it."""
        notebook = _in_notebook()
        return (_notebook_bar() if notebook else tqdm)(
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            total=self.steps_per_epoch,
            initial=consumed // self.config.batch_size,
            unit="step",
            leave=False,
            disable=not (self.is_main and (notebook or sys.stderr.isatty())),
        )

    def step(self, bar: tqdm[Any], metrics: Metrics, step: int, lr: float) -> None:
        """Show the figures of the epoch so far in the bar, and send those of the last step to the tracker."""
        loss, correct, seen = metrics.sums().tolist()
        if seen:
            accuracy = "" if metrics.multi_label else f", accuracy {correct / seen:.1%}"
            bar.set_postfix_str(f"loss {loss / seen:.3f}{accuracy}")
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
        key, metric = self.config.metric, "mAP" if self.config.multi_label else "accuracy"
        ema = "" if self.learner.averages is None else f", {row[f'ema_{key}']:.2%} averaged"
        clipped = f"  clipped {row['clipped']:.1%}" if self.learner.updater.clipped is not None else ""
        if clipped and self.config.tune == "head":
            clipped += " of the bias"
        skipped = f"  skipped {row['skipped']}" if row.get("skipped") else ""
        broken = f"  broken images {row['broken']}" if row.get("broken") else ""
        epoch = f"epoch {row['epoch']:>3}/{self.config.epochs}"
        if "train_size" in row:
            epoch += f"  {row['train_size']} pixels"
        self.say(
            f"{epoch}  train loss {row['train_loss']:.3f}  held-out {metric} "
            f"{row[key]:.2%} live{ema}{clipped}{skipped}{broken}{'  best so far' if best else ''}  "
            f"{row['images_per_second']:.0f} images/s"
        )
        self.tracker.log({f"epoch/{k}": v for k, v in row.items() if isinstance(v, float)}, row["step"])

    def confusion(self, counts: np.ndarray, step: int) -> None:
        """Send the confusion matrix `(classes, classes)` of an epoch to the tracker, as a picture."""
        try:
            self.tracker.picture("confusion matrix", lambda file: confusion_figure(counts, self.classes, file), step)
        except MissingPlotsError:
            logger.info("the tracker gets no confusion matrix: the plots need matplotlib (pip install 'nfzoo[plots]')")

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


def _in_notebook() -> bool:
    """Return whether this is the kernel of a notebook, whose output is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _notebook_bar() -> type[tqdm[Any]]:
    """Return the bar of tqdm for this notebook: a widget where ipywidgets is installed, or else text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no widgets
        from tqdm.auto import tqdm as bar
    return bar


def _to_tensorboard(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")


def _to_wandb(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    tracker.log_images({name: [image]}, step=step)


def _to_trackio(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    trackio = importlib.import_module("trackio")
    tracker.log({name: trackio.Image(image, caption=name)}, step=step)


def _to_mlflow(tracker: Any, name: str, image: Image.Image, step: int) -> None:
    importlib.import_module("mlflow").log_image(image, key=name, step=step)  # into the active run


_SENDERS: dict[str | None, Callable[[Any, str, Image.Image, int], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "mlflow": _to_mlflow,
}


class Tracker:
    """Send figures and pictures to the tracker that the accelerator was made with, if to any.

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

    @property
    def takes_pictures(self) -> bool:
        """Whether pictures are sent to this tracker; the same in all processes."""
        return self._name in _SENDERS

    def picture(self, name: str, draw: Callable[[Path], object], step: int) -> None:
        """Send a picture, if the tracker takes any.

        Args:
            name: what it shows.
            draw: writes it to a PNG file.

        Raises:
            MissingPlotsError: if `draw` needs matplotlib, and it is not installed.
        """
        if not self.takes_pictures or self._failed or not self._accelerator.is_main_process:
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                draw(file := Path(folder) / "picture.png")
                with Image.open(file) as opened:
                    image = opened.convert("RGB")
        except MissingPlotsError:
            raise
        except Exception as error:
            self._fail(error)
            return
        self._try(lambda: _SENDERS[str(self._name)](self._accelerator.get_tracker(str(self._name)), name, image, step))

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

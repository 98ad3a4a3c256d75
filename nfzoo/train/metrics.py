"""Add up what an epoch reports (loss, right answers, clipped units, images that cannot be read), and send it on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nfzoo.data.loader import BrokenImageError
from nfzoo.errors import DataError
from nfzoo.runtime.distributed import gather

if TYPE_CHECKING:
    from accelerate import Accelerator  # at run time, only once `device.accelerator` has set it up

logger = logging.getLogger("nfzoo")


class Metrics:
    """Sum over an epoch's steps, on the device, so that the host waits only where it reads the sums.

    The tensors stay the same, and are written in place, as a CUDA graph needs it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loss_sum, self.correct, self.seen, self.clipped, self.loss, self.norm = (self._scalar() for _ in range(6))

    def _scalar(self, value: float = 0.0) -> Tensor:
        # A lazy device writes a 0-dimensional tensor from the host into its program as a constant, and compiles anew
        # for each value. So each is moved with a dimension, and is a tensor of its own.
        return torch.tensor([value]).to(self.device).reshape(())

    def clear(self) -> None:
        for total in (self.loss_sum, self.correct, self.seen, self.clipped, self.loss, self.norm):
            total.copy_(self._scalar())

    def restore(self, sums: list[float], clipped: float) -> None:
        for total, value in zip((self.loss_sum, self.correct, self.seen, self.clipped), (*sums, clipped), strict=True):
            total.copy_(self._scalar(value))

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        usable = loss.detach().isfinite()
        self.loss.copy_(loss.detach())
        self.loss_sum.add_(torch.where(usable, self.loss, 0), alpha=len(labels))
        self.correct.add_(usable * (logits.detach().argmax(1) == labels).sum())
        self.seen.add_(usable, alpha=len(labels))

    def add_update(self, norm: Tensor, clipped: Tensor | None) -> None:
        """Take the gradient's norm, and add the fraction of units that AGC clipped; `None` where it is not counted."""
        self.norm.copy_(norm)
        if clipped is not None:
            self.clipped.add_(clipped)

    def sums(self) -> Tensor:
        """Return loss times images, right answers, and images, of this process."""
        return torch.stack([self.loss_sum, self.correct, self.seen])


class UnreadableImages:
    """Count a run's images that cannot be read, over all processes, by messages that name them.

    More than `limit` end the run.

    Attributes:
        known: messages that all processes have.
        own: messages of this process since the last `share`, some of which may be known.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.known: set[str] = set()
        self.own: set[str] = set()

    def replace(self, messages: Iterable[str]) -> None:
        """Count images of a training batch that others took the place of; beyond the limit a `BrokenImageError`."""
        for message in messages:
            if message in self.known | self.own:
                continue
            self.own.add(message)
            self._check()
            logger.warning("not readable, and replaced: %s", message)

    def leave_out(self, messages: Iterable[str]) -> None:
        """Count images that an evaluation left out; beyond the limit a `BrokenImageError`."""
        for message in messages:
            if message not in self.known | self.own:
                logger.warning("left out: %s", message)
                self.own.add(message)
        self._check()

    def unknown(self) -> int:
        """Return how many of this process's messages are not known to all."""
        return len(self.own - self.known)

    def check(self, unknown: int) -> None:
        """Raise a `DataError` where known messages and the sum of all processes' `unknown` are beyond the limit."""
        if len(self.known) + unknown > self.limit:
            raise DataError(self._text(len(self.known) + unknown))

    def gathered(self) -> list[str]:
        """Return the messages of all processes, sorted; all of them call this together."""
        return sorted(self.known.union(gather(sorted(self.own))))

    def share(self) -> None:
        """Make all messages known to all processes, which call this together."""
        self.known = set(self.gathered())
        self.own.clear()

    def _check(self) -> None:
        if len(self.known | self.own) > self.limit:
            raise BrokenImageError(self._text(len(self.known | self.own)))

    def _text(self, count: int) -> str:
        names = "; ".join(sorted(self.known | self.own)[-3:])
        if self.limit == 0:
            return f"{names}; --max-broken N lets training go on with up to N such images"
        return f"{count} images cannot be read, and max_broken is {self.limit}; such as: {names}"


class Tracker:
    """Send figures to the tracker that the accelerator was made with, if to any.

    One that fails costs a warning, the first time, and never the run.

    Args:
        accelerator: its main process sends.
        name: the tracker's, or `None`.
        options: what the tracker shows of the run.
    """

    def __init__(
        self, accelerator: Accelerator, name: str | None, options: Mapping[str, bool | int | float | str]
    ) -> None:
        self._accelerator, self._name, self._failed = accelerator, name, False
        self._try(lambda: accelerator.init_trackers("nfzoo", config=dict(options)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self._accelerator.log(dict(values), step=step))

    def finish(self) -> None:
        # Not `end_training`, which leaves the group of processes: torch's reducer can hang if it is destroyed after it.
        for tracker in self._accelerator.trackers:
            self._try(tracker.finish)

    def _try(self, call: Callable[[], object]) -> None:
        if self._name is None:
            return
        try:
            call()
        except Exception as error:
            if not self._failed:
                reason = " ".join(str(error).split()) or type(error).__name__
                logger.warning(
                    "the tracker %r failed (%s); training goes on, and metrics.jsonl has its figures",
                    self._name,
                    reason,
                )
            self._failed = True

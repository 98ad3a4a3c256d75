"""Callbacks of a training run: what they see of it, and how they end it."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfzoo.errors import ConfigError, shown

_METHODS = ("on_step", "on_epoch")


@dataclass(frozen=True)
class State:
    """A training run as a callback sees it.

    Attributes:
        epoch: the number of the epoch, from 1 on.
        step: the number of steps so far, in all epochs.
        figures: after a step `loss` (of this process's last part of the batch), `lr` and `gradient_norm`; after an
            epoch its row of `metrics.jsonl`, which is the same in all processes.
        is_main: whether this is the first process, which alone should print and write.
    """

    epoch: int
    step: int
    figures: Mapping[str, Any]
    is_main: bool
    _run: Callbacks = field(repr=False)

    def stop(self) -> None:
        """End the run in all processes before its next step. The model is evaluated and saved as after an epoch."""
        self._run.asked = True

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the live weights, on the CPU; with sharded parameters, all processes call this together."""
        return self._run.weights()


class Callback:
    """A look at a training run after each step and each epoch, in every process: override one method or both.

    A callback changes no bit of the result: it gets copies, and random numbers that it draws are drawn again after it.
    One that raises an error ends the run with a `TrainingError`, after a checkpoint was saved.
    """

    def on_step(self, state: State) -> None:
        """Look at the run after a step. On a GPU this makes each step wait for its figures."""

    def on_epoch(self, state: State) -> None:
        """Look at the run after an epoch, which is evaluated, and whose model is being saved."""


class Failure(NamedTuple):
    """An error of a callback.

    Attributes:
        where: the method, such as `Plot.on_step`.
    """

    where: str
    error: Exception


class Callbacks:
    """Call the callbacks of a run, and keep what they ask for until all processes know of it.

    Args:
        callbacks: objects with the methods of `Callback`, or one of them.
        is_main: whether this is the first process.
        weights: returns a copy of the live weights.

    Raises:
        ConfigError: for what is no list of such objects.

    Attributes:
        asked: whether one of this process's callbacks asked to end the run.
        failure: the error that one of this process's callbacks raised.
        ends: whether all processes know that the run is to end.
    """

    def __init__(self, callbacks: Sequence[object], *, is_main: bool, weights: Callable[[], dict[str, Tensor]]) -> None:
        self.asked = self.ends = False
        self.failure: Failure | None = None
        self.is_main, self.weights = is_main, weights
        check_callbacks(callbacks)
        found = [(name, getattr(callback, name, None)) for callback in callbacks for name in _METHODS]
        empty = {getattr(Callback, name) for name in _METHODS}
        own = [(name, method) for name, method in found if method and getattr(method, "__func__", None) not in empty]
        self._of_step, self._of_epoch = ([method for name, method in own if name == wanted] for wanted in _METHODS)

    def __bool__(self) -> bool:
        return bool(self._of_step or self._of_epoch)

    def step(self, epoch: int, step: int, figures: Callable[[], Mapping[str, Any]]) -> None:
        """Call those that look at steps; `figures` is called if there are any."""
        if self._of_step:
            self._call(self._of_step, epoch, step, figures())

    def epoch(self, epoch: int, step: int, row: Mapping[str, Any]) -> None:
        """Call those that look at epochs."""
        self._call(self._of_epoch, epoch, step, row)

    def _call(self, methods: Sequence[Callable[[State], Any]], epoch: int, step: int, row: Mapping[str, Any]) -> None:
        if not methods or self.failure is not None:
            return
        state = State(epoch, step, MappingProxyType(dict(row)), self.is_main, self)
        with _random_states_kept():
            for method in methods:
                try:
                    method(state)
                except Exception as error:
                    self.failure = Failure(getattr(method, "__qualname__", repr(method)), error)
                    break


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put this process's random number generators back to where they were before the block."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


def check_callbacks(callbacks: object) -> None:
    """Raise a `ConfigError` for what is no list of callbacks."""
    if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks must be a list of nfzoo.Callback objects, not {shown(callbacks)}")
    for callback in callbacks:
        if inspect.isclass(callback):
            raise ConfigError(
                f"the callback {callback.__name__} is a class; make an object of it: {callback.__name__}()"
            )
        if not any(callable(getattr(callback, name, None)) for name in _METHODS):
            raise ConfigError(
                f"a callback has a method on_step or on_epoch, as nfzoo.Callback; {shown(callback)} has not"
            )

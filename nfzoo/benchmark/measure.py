"""Measure the ways to run a model: time in interleaved rounds, and the distance from the model itself."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfzoo.benchmark.contenders import Contender, Program, Task
from nfzoo.benchmark.images import Data
from nfzoo.benchmark.memory import prepare, resident
from nfzoo.config import is_int
from nfzoo.errors import ConfigError
from nfzoo.nn import NFNet
from nfzoo.predict import thresholds

_WARM = 2  # calls before the first round


class Result(NamedTuple):
    """What was measured of a contender. Without measurement all but the first four fields are `None`.

    Attributes:
        format, precision: of the contender.
        status: `"measured"`, `"missing"` (something is not installed) or `"failed"`.
        reason: why it, or its memory, was not measured, in one line.
        milliseconds, low, high: median and quartiles over the rounds, for one image.
        accuracy: share of the labelled images with the right label.
        agreement: share of the images for which its decision is that of the reference: the most probable label, or of
            a multi-label model the set of labels.
        distance: |logits - reference| / |reference| over all images.
        megabytes: its file, or its weights, in MB of 2^20 bytes.
        make_seconds: time until its first answer, with export, compilation and loading.
        load_seconds: time to read its file.
        memory_megabytes: resident memory that it takes while it computes, without libraries, in MB of 2^20 bytes.
    """

    format: str
    precision: str
    status: str
    reason: str | None = None
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    distance: float | None = None
    megabytes: float | None = None
    make_seconds: float | None = None
    load_seconds: float | None = None
    memory_megabytes: float | None = None


def compare(
    model: NFNet,
    contenders: Sequence[Contender],
    data: Data,
    *,
    batch: int = 1,
    rounds: int = 20,
    memory: bool = False,
    said: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Return the result of each contender, of which the first is the reference of the others.

    Every contender is made, and computes the logits of all images. In each round every one then computes one batch, in
    an order that turns around from round to round, so that a disturbance of the machine meets all.

    Args:
        model: on the CPU, with float32 parameters; it is left as it is.
        batch: images of each call.
        memory: measure memory as well, for which each is made once more in a process of its own.
        said: called with what is done next.

    Raises:
        ConfigError: for a model of another precision, device or without classifier, and numbers out of range.
        Exception: of the reference.
    """
    for name, value in (("batch", batch), ("rounds", rounds)):
        if not is_int(value, 1):
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")
    model.config.check_classifier()
    p = next(model.parameters())
    if p.dtype != torch.float32 or p.device.type != "cpu":
        raise ConfigError(
            f"the model is compared in float32 on the CPU; this one has {p.dtype} on {p.device}: .float().cpu()"
        )
    own = NFNet.from_params(model.description, {name: p.detach() for name, p in model.named_parameters()}).eval()
    calibration = [] if data.calibration is None else list(data.calibration.split(32))
    with tempfile.TemporaryDirectory(prefix="nfzoo-benchmark-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of compilers and exporters, about themselves
        folded = own if own.config.folded else own.for_inference()
        size = int(data.images.shape[-1])
        task = Task(own, folded.eval(), batch, size, torch.get_num_threads(), calibration, Path(folder))
        results: dict[Contender, Result] = {}
        programs: dict[Contender, Program] = {}
        reference: Tensor | None = None
        if memory:
            prepare(task)
        for contender in contenders:
            said(f"{contender.format} {contender.precision}")
            try:
                results[contender], program, logits = _made(contender, task, data, reference)
            except Exception as error:  # of whatever compiler or runtime
                if reference is None:
                    raise
                results[contender] = _failed(contender, error)
                continue
            if program is not None and logits is not None:
                programs[contender] = program
                reference = logits if reference is None else reference
                if memory:
                    said(f"{contender.format} {contender.precision}: memory")
                    results[contender] = _with_memory(results[contender], contender, task)
        said(f"{rounds} rounds")
        times = _rounds(programs, next(_batches(data.images, batch))[0], rounds, results)
    for contender, seconds in times.items():
        low, middle, high = (1000 / batch * np.quantile(seconds, (0.25, 0.5, 0.75))).tolist()
        results[contender] = results[contender]._replace(milliseconds=middle, low=low, high=high)
    return [results[contender] for contender in contenders]


def _failed(contender: Contender, error: Exception) -> Result:
    text = " ".join(str(error).split())[:200]
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Result(contender.format, contender.precision, "failed", reason)


def _with_memory(result: Result, contender: Contender, task: Task) -> Result:
    try:
        return result._replace(memory_megabytes=resident(contender, task))
    except RuntimeError as error:
        return result._replace(reason=str(error))


def _made(
    contender: Contender, task: Task, data: Data, reference: Tensor | None
) -> tuple[Result, Program | None, Tensor | None]:
    """Make the program, and measure all but its time; the program and its logits are `None` if it cannot be made."""
    blank = Result(contender.format, contender.precision, "missing", contender.missing)
    if blank.reason is not None:
        return blank, None, None
    if contender.precision == "int8" and not task.calibration:
        return blank._replace(reason="needs images to take ranges from: give --data"), None, None
    begun = time.perf_counter()
    program = contender.build(task, contender.precision)
    program.run(next(_batches(data.images, task.batch))[0])
    seconds = time.perf_counter() - begun
    logits = torch.cat([program.run(x)[:count] for x, count in _batches(data.images, task.batch)]).double()
    if not logits.isfinite().all():
        raise ArithmeticError("its outputs are not finite")
    against = logits if reference is None else reference
    same = _decisions(task.model, logits) == _decisions(task.model, against)
    return (
        blank._replace(
            status="measured",
            accuracy=None if data.labels is None else float((logits.argmax(1) == data.labels).double().mean()),
            agreement=float(same.flatten(1).all(1).double().mean()),
            distance=float((logits - against).norm() / against.norm()),
            megabytes=program.size / 2**20,
            make_seconds=seconds,
            load_seconds=program.load_seconds,
        ),
        program,
        logits,
    )


def _decisions(model: NFNet, logits: Tensor) -> Tensor:
    """Return the most probable class `(n, 1)` or, of a multi-label model, whether it has each label `(n, classes)`."""
    return logits.sigmoid() >= thresholds(model) if model.multi_label else logits.argmax(1, keepdim=True)


def _batches(images: Tensor, batch: int) -> Iterator[tuple[Tensor, int]]:
    """Yield batches of one size, the last of which is filled up, with the number of images that count."""
    for part in images.split(batch):
        fill = part.new_zeros((batch - len(part), *part.shape[1:]))
        yield torch.cat([part, fill]), len(part)


def _rounds(
    programs: dict[Contender, Program], x: Tensor, rounds: int, results: dict[Contender, Result]
) -> dict[Contender, list[float]]:
    """Return the seconds of each program in each round; one that fails gets a result that says so."""
    times: dict[Contender, list[float]] = {contender: [] for contender in programs}
    for turn in range(-_WARM, rounds):
        for contender in list(times) if turn % 2 == 0 else list(reversed(times)):
            begun = time.perf_counter()
            try:
                programs[contender].run(x)
            except Exception as error:
                results[contender] = _failed(contender, error)
                del times[contender]
                continue
            if turn >= 0:
                times[contender].append(time.perf_counter() - begun)
    return times


def facts(model: NFNet, data: Data, *, batch: int, rounds: int, results: Sequence[Result]) -> dict[str, Any]:
    """Return all that is known of a comparison, for JSON."""
    from nfzoo import __version__

    return {
        "model": model.name,
        "size": int(data.images.shape[-1]),
        "images": len(data.images),
        "data": data.about,
        "batch": batch,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "nfzoo": __version__,
        "torch": str(torch.__version__),
        "results": [result._asdict() for result in results],
    }

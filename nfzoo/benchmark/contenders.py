"""The ways to run a model on a CPU, each in the precisions that it has."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nfzoo import torch_internals
from nfzoo.errors import ConfigError
from nfzoo.export.quantize import quantize_torch
from nfzoo.export.run import FORMATS, SHEET, export
from nfzoo.export.runtimes import LOADERS, Run, load_openvino
from nfzoo.nn import NFNet
from nfzoo.predict import compute
from nfzoo.runtime.compile import compile_alone
from nfzoo.runtime.device import backend

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = (*DTYPES, "int8")


class Program(NamedTuple):
    """A model that is ready to run.

    Attributes:
        run: returns float32 logits `(N, classes)` of float32 images `(N, C, H, W)`, of which there are `Task.batch`.
        size: bytes of its file, or of its weights where it has no file of its own.
        load_seconds: time to read the file, or `None`.
    """

    run: Callable[[Tensor], Tensor]
    size: int
    load_seconds: float | None = None


class Task(NamedTuple):
    """What all ways are made from.

    Attributes:
        model: the float32 model as it was trained, in evaluation mode.
        folded: the same, folded for inference.
        batch: images of each call.
        size: side of the images in pixels.
        threads: processor threads.
        calibration: batches of prepared images for int8, or none.
        folder: where programs are written.
    """

    model: NFNet
    folded: NFNet
    batch: int
    size: int
    threads: int
    calibration: Sequence[Tensor]
    folder: Path


class Contender(NamedTuple):
    """A way to run a model.

    Attributes:
        format: its name, an option of `nfzoo benchmark --formats`.
        precision: one of `PRECISIONS`.
        build: makes the program; it may take minutes.
        extra: the extra of nfzoo that brings what it needs besides nfzoo itself.
        needs: the modules of that.
    """

    format: str
    precision: str
    build: Callable[[Task, str], Program]
    extra: str | None = None
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """Return what has to be installed, in words, or `None`."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(absent)}: pip install 'nfzoo[{self.extra}]'" if absent else None


def _weights(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _cast(model: NFNet, precision: str) -> NFNet:
    """Return a model of its own with parameters of a precision, in evaluation mode."""
    params = {name: p.detach().to(DTYPES[precision], copy=True) for name, p in model.named_parameters()}
    return NFNet.from_params(model.description, params).eval()


def _called(model: NFNet) -> Program:
    return Program(lambda x: compute(model, x, CPU, "no", embeddings=False), _weights(model))


def _eager(task: Task, precision: str) -> Program:
    autocast = {"float32": "no", "bf16": "bf16"}[precision]
    return Program(lambda x: compute(task.model, x, CPU, autocast, embeddings=False), _weights(task.model))


def _folded(task: Task, precision: str) -> Program:
    return _called(_cast(task.folded, precision))


def _prepacked(task: Task, precision: str) -> Program:
    return _called(_cast(task.folded, precision).prepack())


def _optimized(task: Task, precision: str) -> Program:
    return _called(task.folded.optimize(batch=task.batch, size=task.size, dtype=precision))


def _compiled(task: Task, precision: str) -> Program:
    return _called(_cast(task.folded, precision).compile_blocks())


def _compiled_int8(task: Task, _: str) -> Program:
    batches = [torch.cat(list(task.calibration)).contiguous()]  # of several images, as one would be specialised on
    net = quantize_torch(task.folded, [part for part in batches[0].split(32) if len(part) > 1])

    def call(x: Tensor) -> Tensor:
        return net(x)

    made = compile_alone(call)
    images = backend(CPU).images
    with torch_internals.frozen_graphs(), torch.no_grad():
        made(images(batches[0].new_zeros((task.batch, *batches[0].shape[1:])), torch.float32))

    def run(x: Tensor) -> Tensor:
        with torch_internals.frozen_graphs(), torch.no_grad():
            return made(images(x, torch.float32)).float()

    return Program(run, _weights(task.folded) // 4)


def _exported(task: Task, format: str, precision: str) -> Path:
    """Return the file that `nfzoo export` writes; one that is there already is not written again."""
    path = task.folder / f"{format}-{precision}" / FORMATS[format].file
    if not path.exists():
        int8 = precision == "int8"
        model = task.folded if int8 else _cast(task.folded, precision)
        # With a fixed number of images, as a program for a known use would have.
        batches = torch.cat(list(task.calibration)).split(task.batch) if int8 else None
        whole = None if batches is None else [part for part in batches if len(part) == task.batch]
        export(model, path.parent, format=format, size=task.size, batch=task.batch, int8=whole)
    return path


def _loaded(path: Path, load: Callable[[Path], Run]) -> Program:
    begun = time.perf_counter()
    run = load(path)
    return Program(run, _bytes(path), time.perf_counter() - begun)


def _bytes(path: Path) -> int:
    """Return the bytes of a program, and of the files beside it that may hold its weights."""
    return sum(file.stat().st_size for file in path.parent.iterdir() if file.name != SHEET)


def _of_torch(precision: str, load: Callable[[str], Any]) -> Callable[[Path], Run]:
    def loader(path: Path) -> Run:
        loaded = load(str(path))

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return loaded(x.to(DTYPES[precision]).contiguous()).float()

        return run

    return loader


def _aoti(task: Task, precision: str) -> Program:
    from torch._inductor import aoti_load_package

    return _loaded(_exported(task, "aoti", precision), _of_torch(precision, aoti_load_package))


def _torch_export(task: Task, precision: str) -> Program:
    loader = _of_torch(precision, lambda path: torch.export.load(path).module())
    return _loaded(_exported(task, "torch", precision), loader)


def _openvino(task: Task, precision: str) -> Program:
    path = _exported(task, "openvino", "int8" if precision == "int8" else "float32")
    return _loaded(path, lambda path: load_openvino(path, task.threads, bf16=precision == "bf16"))


def _runtime(format: str) -> Callable[[Task, str], Program]:
    """Return what builds an exported program that its runtime loads."""

    def build(task: Task, precision: str) -> Program:
        return _loaded(_exported(task, format, precision), lambda path: LOADERS[format](path, task.threads))

    return build


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_LITERT = ("litert_torch", "ai_edge_litert")

CONTENDERS: tuple[Contender, ...] = (
    Contender("eager", "float32", _eager),
    Contender("eager", "bf16", _eager),
    Contender("folded", "float32", _folded),
    Contender("folded", "bf16", _folded),
    Contender("prepacked", "float32", _prepacked),
    Contender("prepacked", "bf16", _prepacked),
    Contender("compiled", "float32", _compiled),
    Contender("compiled", "bf16", _compiled),
    Contender("compiled", "int8", _compiled_int8, "int8", ("torchao",)),
    Contender("aoti", "float32", _aoti),
    Contender("aoti", "bf16", _aoti),
    Contender("torch", "float32", _torch_export),
    Contender("torch", "bf16", _torch_export),
    Contender("onnx", "float32", _runtime("onnx"), "export", _ONNX),
    Contender("onnx", "int8", _runtime("onnx"), "export", _ONNX),
    Contender("litert", "float32", _runtime("litert"), "litert", _LITERT),
    Contender("litert", "int8", _runtime("litert"), "litert", _LITERT),
    Contender("executorch", "float32", _runtime("executorch"), "executorch", ("executorch",)),
    Contender("executorch", "int8", _runtime("executorch"), "executorch", ("executorch",)),
    Contender("openvino", "float32", _openvino, "openvino,export", ("openvino", *_ONNX)),
    Contender("openvino", "bf16", _openvino, "openvino,export", ("openvino", *_ONNX)),
    Contender("openvino", "int8", _openvino, "openvino,export", ("openvino", *_ONNX)),
    Contender("optimized", "float32", _optimized),
    Contender("optimized", "bf16", _optimized),
)
"""All ways, the first of which the others are compared with."""


def chosen(formats: Sequence[str] | None, precisions: Sequence[str] | None) -> list[Contender]:
    """Return the contenders of these formats and precisions; `None` stands for all, and the first is always there.

    Raises:
        ConfigError: for a name that is not known, or if none is left.
    """
    for kind, given, known in (
        ("format", formats, list(dict.fromkeys(c.format for c in CONTENDERS))),
        ("precision", precisions, list(PRECISIONS)),
    ):
        for name in given or ():
            if name not in known:
                raise ConfigError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
    left = [
        c
        for c in CONTENDERS
        if (formats is None or c.format in formats) and (precisions is None or c.precision in precisions)
    ]
    if not left:
        raise ConfigError(f"{', '.join(formats or ())} cannot compute in {', '.join(precisions or ())}")
    return left if left[0] == CONTENDERS[0] else [CONTENDERS[0], *left]

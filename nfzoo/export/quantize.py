"""Quantise a folded model to int8 weights and activations, through onnxruntime or torchao.

Both take the range of every activation from a few batches of typical images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from nfzoo.config import MAX_SIZE
from nfzoo.data.loader import evaluation_batches
from nfzoo.data.source import open_split
from nfzoo.errors import ConfigError, DataError
from nfzoo.evaluate import open_labelled
from nfzoo.export.onnx_program import onnx_to_openvino, write_onnx
from nfzoo.export.runtimes import LOADERS, Run, muted
from nfzoo.nn import NFNet
from nfzoo.runtime.program import check_packages

_CALIBRATION = 256  # images; more change the ranges little


def calibration_batches(model: NFNet, source: str, size: int | None = None, batch: int | None = None) -> list[Tensor]:
    """Return prepared images that training sees, in batches of 32 or `batch`, for the ranges of int8.

    They are spread evenly over the training split, as the first images of sorted data are all of one class.
    """
    images = open_split(source).train
    some = images.subset(np.linspace(0, len(images) - 1, min(_CALIBRATION, len(images))).astype(np.int64))
    batches = evaluation_batches(some, model.preprocessing, batch_size=batch or 32, size=size)
    return [x for x, _ in batches if batch is None or len(x) == batch]


def quantize_onnx(source: str | Path, target: str | Path, batches: Iterable[Tensor]) -> None:
    """Quantise a float32 ONNX model to int8: weights per channel, activations per tensor, in QDQ pairs.

    Args:
        source: a model of one input, as `nfzoo export` writes it.
        target: the file to write; an older one is replaced.
        batches: prepared images `(N, C, H, W)` to calibrate with.

    Raises:
        ConfigError: without a batch, or without onnxruntime.
    """
    check_packages("int8", ("onnxruntime",), "export")
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    name = onnx.load(str(source), load_external_data=False).graph.input[0].name
    arrays = calibration_arrays(batches)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.remaining = iter(arrays)

        def get_next(self) -> dict[str, np.ndarray]:
            batch = next(self.remaining, None)
            return None if batch is None else {name: batch}  # type: ignore[return-value] # `None` is the end, by its documentation

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises a pass over the graph which the exporter has made already
    try:
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # seven bits: without VNNI, sums of eight-bit products overflow
        )
    finally:
        logging.root.setLevel(level)


def write_onnx_int8(model: NFNet, images: Tensor, batch: int | None, path: Path, batches: Iterable[Tensor]) -> None:
    """Write an ONNX model in int8."""
    single = path.with_name(f"float-{path.name}")
    write_onnx(model, images, batch, single)
    quantize_onnx(single, path, batches)
    for file in (single, single.with_name(f"{single.name}.data")):
        file.unlink(missing_ok=True)


def write_openvino_int8(model: NFNet, images: Tensor, batch: int | None, path: Path, batches: Iterable[Tensor]) -> None:
    """Write an OpenVINO model in int8, which is the ONNX model of `write_onnx_int8`."""
    program = path.with_suffix(".onnx")
    write_onnx_int8(model, images, batch, program, batches)
    onnx_to_openvino(program, path)


def accuracies(model: NFNet, run: Run, images: Tensor, labels: Tensor, *, batch: int = 32) -> tuple[float, float]:
    """Return the top-1 accuracies of a folded model and of a program on prepared images `(N, C, H, W)`."""
    right = [0, 0]
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        with torch.inference_mode():
            outputs = (model(x).argmax(1), run(x).argmax(1))
        right = [count + int((found == y).sum()) for count, found in zip(right, outputs, strict=True)]
    return right[0] / len(labels), right[1] / len(labels)


def accuracy_of_int8(
    model: NFNet, path: Path, source: str, size: int | None, batch: int | None, *, format: str = "onnx"
) -> str:
    """Return how many held-out images the model and its quantised program read, of a thousand at most."""
    if model.multi_label:
        return "the accuracy was not measured: a multi-label model has none"
    try:
        images = open_labelled(source, model.config.num_classes, model.labels).images
        count = min(len(images), 1000) // (batch or 1) * (batch or 1)
        if not count:
            return f"the accuracy was not measured: {len(images)} held-out images are no batch of {batch}"
        some = images.subset(np.linspace(0, len(images) - 1, count).astype(np.int64))
        batches = evaluation_batches(some, model.preprocessing, batch_size=32, rank=0, world=1, size=size, workers=0)
        x, labels = map(torch.cat, zip(*batches, strict=True))
    except DataError as error:  # the program is written by now
        return f"the accuracy was not measured: {error}"
    lean = model if model.config.folded else model.for_inference()
    run = LOADERS[format](path, torch.get_num_threads())
    before, after = accuracies(lean.float(), run, x, labels, batch=batch or 32)
    return f"accuracy on {count:,} held-out images: {before:.2%} before, {after:.2%} in int8"


def quantize_torch(model: NFNet, batches: Iterable[Tensor]) -> nn.Module:
    """Quantise a folded model on the CPU to int8, through torchao's quantiser for inductor on x86.

    The result emulates int8 arithmetic slowly. `torch.compile` with `freezing` turns it into int8 kernels.

    Args:
        batches: prepared images `(N, C, H, W)` to calibrate with.

    Raises:
        ConfigError: for a model that is not folded, without a batch, or without torchao.
    """
    if not model.config.folded:
        raise ConfigError("quantisation needs the folded model: model.for_inference()")
    check_packages("int8", ("torchao",), "int8")
    with muted():  # torchao's notes on kernels for absent GPUs, among others
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        quantizer: Any = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        return pt2e(model, quantizer, batches)


def pt2e(model: NFNet, quantizer: Any, batches: Iterable[Tensor], *, batch: int | None = None) -> nn.Module:
    """Return a folded model with quantised weights and activations, as one of torchao's quantisers places them.

    Args:
        batches: prepared images `(N, C, H, W)` to calibrate with.
        batch: a fixed number of images, which all batches have; by default any number.

    Raises:
        ConfigError: without a batch.
    """
    batches = list(batches)
    _check_batches(batches)
    with muted(), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        shapes = None if batch else ({0: Dim("batch", min=1, max=MAX_SIZE)},)
        # The quantiser finds convolutions by the names that only a strict export keeps.
        graph = torch.export.export(model, (batches[0],), dynamic_shapes=shapes, strict=True).module()
        prepared = prepare_pt2e(graph, quantizer)  # type: ignore[arg-type]
        for part in batches:
            prepared(part)
        return convert_pt2e(prepared)


def calibration_arrays(batches: Iterable[Tensor]) -> list[np.ndarray]:
    """Return batches of images as arrays; raise a `ConfigError` if there is none."""
    arrays = [batch.detach().cpu().numpy() for batch in batches]
    _check_batches(arrays)
    return arrays


def _check_batches(batches: list[Any]) -> None:
    if not batches:
        raise ConfigError("calibration needs at least one batch of images")

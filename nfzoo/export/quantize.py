"""Quantise a folded model to int8 weights and activations, through onnxruntime or torchao.

Both take the range of every activation from a few batches of typical images.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from nfzoo.config import MAX_SIZE
from nfzoo.data.loader import evaluation_batches
from nfzoo.errors import ConfigError, DataError
from nfzoo.evaluate import open_labelled
from nfzoo.nn import NFNet
from nfzoo.runtime.program import check_packages


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
    arrays = [batch.detach().cpu().numpy() for batch in batches]
    _check_batches(arrays)

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


def accuracies(model: NFNet, program: Path, images: Tensor, labels: Tensor, *, batch: int = 32) -> tuple[float, float]:
    """Return the top-1 accuracies of a folded model and of an ONNX program on prepared images `(N, C, H, W)`."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(program), providers=["CPUExecutionProvider"])
    right = [0, 0]
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.inference_mode():
            outputs = (model(x).argmax(1), torch.from_numpy(np.asarray(logits)).argmax(1))
        right = [count + int((found == y).sum()) for count, found in zip(right, outputs, strict=True)]
    return right[0] / len(labels), right[1] / len(labels)


def accuracy_of_int8(model: NFNet, path: Path, source: str, size: int | None, batch: int | None) -> str:
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
    before, after = accuracies(lean.float(), path, x, labels, batch=batch or 32)
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
    batches = list(batches)
    _check_batches(batches)
    with _quiet(), torch.no_grad():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        shapes = ({0: Dim("batch", min=1, max=MAX_SIZE)},)
        # The quantiser finds convolutions by the names that only a strict export keeps.
        graph = torch.export.export(model, (batches[0],), dynamic_shapes=shapes, strict=True).module()
        quantizer: Any = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)  # type: ignore[arg-type]
        for batch in batches:
            prepared(batch)
        return convert_pt2e(prepared)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torchao's notes on kernels for absent GPUs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is", DeprecationWarning, r"torch\.jit\._script")
        yield


def _check_batches(batches: list[Any]) -> None:
    if not batches:
        raise ConfigError("calibration needs at least one batch of images")

"""Trace a model for other runtimes, and write it as ONNX or as OpenVINO's representation of that."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from nfzoo import torch_internals
from nfzoo.config import MAX_SIZE
from nfzoo.errors import CheckpointError
from nfzoo.nn import NFNet

INPUT, OUTPUT = "images", "logits"
PACKAGES = ("onnx", "onnxscript")
"""What `write_onnx` imports, of the extra `export`."""
OPENVINO_PACKAGES = ("openvino", *PACKAGES)
"""What `write_openvino` imports, of the extras `openvino` and `export`."""


def check_finite(model: NFNet) -> None:
    """Raise a `CheckpointError` for a weight that is not finite."""
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise CheckpointError(f"the weight {name} is not finite; the model is damaged, or its training diverged")


def exported_program(
    model: NFNet, images: Tensor, *, batch: int | None = None, step: int | None = None
) -> ExportedProgram:
    """Return the graph of a model in evaluation mode.

    Args:
        images: example `(N, C, H, W)`.
        batch: a fixed number of images; by default any number.
        step: make height and width dynamic, in multiples of this many pixels; by default they are those of `images`.
    """
    shape: dict[int, Any] = {} if batch else {0: Dim("batch", min=1, max=MAX_SIZE)}
    if step:
        for axis, name in ((2, "height"), (3, "width")):
            shape[axis] = Dim(name, min=1, max=MAX_SIZE) * step if step > 1 else Dim(name)
    # The context admits sizes for which some map shrinks to one pixel. The deferred asserts admit sizes that are not a
    # multiple of the network's stride.
    with torch_internals.sizes_of_one_are_general():
        return torch.export.export(
            model, (images,), dynamic_shapes=(shape,), prefer_deferred_runtime_asserts_over_guards=True
        )


def write_onnx(model: NFNet, images: Tensor, batch: int | None, path: Path, *, input_name: str = INPUT) -> None:
    """Write an ONNX model with output `logits`."""
    graph = exported_program(model, images, batch=batch)
    onnx_program = torch.onnx.export(graph, input_names=[input_name], output_names=[OUTPUT], dynamo=True, verbose=False)
    assert onnx_program is not None
    onnx_program.save(path)
    if batch is None:
        _name_batch(path)


def write_openvino(model: NFNet, images: Tensor, batch: int | None, path: Path) -> None:
    """Write an OpenVINO model, `.xml` with its weights in `.bin` beside it, for `openvino.compile_model(path)`."""
    program = path.with_suffix(".onnx")
    write_onnx(model, images, batch, program)
    onnx_to_openvino(program, path)


def onnx_to_openvino(source: Path, path: Path) -> None:
    """Move an ONNX model, float32 or quantised, into an OpenVINO model `.xml`; its numbers keep their types."""
    import openvino  # pyright: ignore[reportMissingImports]

    # By default the weights would be halved to float16.
    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)
    for file in (source, source.with_name(f"{source.name}.data")):
        file.unlink(missing_ok=True)


def _name_batch(path: Path) -> None:
    """Call the first axis of images and logits `batch`, whatever symbol torch.export has for it."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dimension.dim_param)
    onnx.save(model, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings about torchvision's operators, which no model has, and about torch 2.13's own code."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning, "copyreg")
            yield
    finally:
        registry.setLevel(level)

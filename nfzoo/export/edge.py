"""Write a folded model for runtimes of phones and other small devices: LiteRT and ExecuTorch.

A program is for a fixed number of images. Its names are those of the other formats, `images` and `logits`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

from nfzoo.export.onnx_program import INPUT, OUTPUT
from nfzoo.export.quantize import calibration_arrays, pt2e
from nfzoo.export.runtimes import muted
from nfzoo.nn import NFNet

LITERT_PACKAGES = ("litert_torch",)
"""What `write_litert` imports, of the extra `litert`."""
EXECUTORCH_PACKAGES = ("executorch",)
"""What `write_executorch` imports, of the extra `executorch`."""


class _Named(nn.Module):
    """Give a program's input and output their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {OUTPUT: self.model(images)}


def write_litert(model: NFNet, images: Tensor, batch: int | None, path: Path) -> None:
    """Write a LiteRT model (TensorFlow Lite's flatbuffer) in float32, for images of `(N, C, H, W)`."""
    with muted():
        import litert_torch  # pyright: ignore[reportMissingImports]

        made = litert_torch.convert(_Named(model).eval(), sample_kwargs={INPUT: images})
        made.export(str(path))


def write_litert_int8(model: NFNet, images: Tensor, batch: int | None, path: Path, batches: Iterable[Tensor]) -> None:
    """Write a LiteRT model in int8: weights per channel, activations per tensor; images and logits stay float32."""
    arrays = calibration_arrays(batches)
    single = path.with_name(f"float-{path.name}")
    write_litert(model, images, batch, single)
    with muted():
        from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]
        from ai_edge_quantizer import qtyping, quantizer, recipe  # pyright: ignore[reportMissingImports]
        from ai_edge_quantizer.algorithm_manager import AlgorithmName  # pyright: ignore[reportMissingImports]

        (signature,) = Interpreter(model_path=str(single)).get_signature_list()
        made = quantizer.Quantizer(str(single), recipe.static_wi8_ai8())
        for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            made.update_quantization_recipe(".*", end, algorithm_key=AlgorithmName.NO_QUANTIZE)
        ranges = made.calibrate({signature: [{INPUT: x} for x in arrays]}, num_threads=torch.get_num_threads())
        path.write_bytes(made.quantize(ranges).quantized_model)
    single.unlink()


def write_executorch(model: NFNet, images: Tensor, batch: int | None, path: Path) -> None:
    """Write an ExecuTorch program whose float32 arithmetic XNNPACK does; its method is `forward(images)`."""
    with muted():
        graph: Any = torch.export.export(model, (images,)).module()
        _lower(graph, images, path)


def write_executorch_int8(
    model: NFNet, images: Tensor, batch: int | None, path: Path, batches: Iterable[Tensor]
) -> None:
    """Write an ExecuTorch program in int8: weights per channel, activations per tensor; both ends stay float32."""
    with muted():
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (  # pyright: ignore[reportMissingImports]
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        _lower(pt2e(model, quantizer, batches, batch=len(images)), images, path)


def _lower(graph: Any, images: Tensor, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # pyright: ignore[reportMissingImports]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]

    _suit_xnnpack(graph, images)
    program = torch.export.export(graph, (images,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with path.open("wb") as file:
        lowered.write_to_file(file)


def _suit_xnnpack(graph: Any, images: Tensor) -> None:
    """Rewrite what ExecuTorch 1.5 does not give to XNNPACK, or gives to it as another function.

    - GELU with tanh would be computed as that with erf, up to 5e-4 away (mended for later versions in its pull request
      22851). As `x sigmoid(2 sqrt(2/π) (x + 0.044715 x³))` it is the same function.
    - A mean over pixels needs `keepdim`, and a pool that its windows cover no edge.
    """
    ShapeProp(graph).propagate(images)
    aten = torch.ops.aten
    scale = 2 * math.sqrt(2 / math.pi)
    for node in list(graph.graph.nodes):
        with graph.graph.inserting_before(node):

            def call(target: Any, *arguments: Any) -> Any:
                return graph.graph.call_function(target, arguments)

            if node.target == aten.gelu.default and node.kwargs.get("approximate") == "tanh":
                x = node.args[0]
                cubic = call(
                    aten.add.Tensor, call(aten.mul.Tensor, call(aten.mul.Tensor, x, x), 0.044715 * scale), scale
                )
                new = call(aten.mul.Tensor, x, call(aten.sigmoid.default, call(aten.mul.Tensor, x, cubic)))
            elif node.target == aten.mean.dim and len(_shape(node)) == 2 and len(node.args) == 2:
                new = call(aten.flatten.using_ints, call(aten.mean.dim, *node.args, True), 1)
            elif node.target == aten.avg_pool2d.default and _covers(node):
                new = call(aten.avg_pool2d.default, *node.args[:3])
            else:
                continue
        new.meta["tensor_meta"] = node.meta["tensor_meta"]
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _covers(node: Any) -> bool:
    """Return whether windows of 2 by 2 pixels cover a map with none over its edge."""
    x, window, stride, *_ = node.args
    return list(window) == list(stride) == [2, 2] and not any(side % 2 for side in _shape(x)[-2:])


def _shape(node: Any) -> Sequence[int]:
    return node.meta["tensor_meta"].shape

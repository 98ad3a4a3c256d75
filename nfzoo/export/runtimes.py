"""Run exported programs on the processor, each by its own runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nfzoo.export.onnx_program import INPUT, OUTPUT
from nfzoo.runtime.execution import openvino_request

Run = Callable[[Tensor], Tensor]
"""Returns the float32 logits `(N, classes)` of float32 images `(N, C, H, W)`."""


def load_onnx(path: Path, threads: int) -> Run:
    """Load an ONNX program by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # into the time of what runs next
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: x.contiguous().numpy()})
        return torch.as_tensor(logits)

    return run


def load_openvino(path: Path, threads: int, *, bf16: bool = False) -> Run:
    """Load an OpenVINO program; `bf16` computes in bfloat16."""
    request = openvino_request(str(path), bf16=bf16, threads=threads)

    def run(x: Tensor) -> Tensor:
        found = request.infer({0: x.contiguous().numpy()}, share_inputs=True)
        return torch.tensor(found[0]).float()

    return run


def load_litert(path: Path, threads: int) -> Run:
    """Load a LiteRT program, whose arithmetic XNNPACK does."""
    with muted():
        from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
        program = interpreter.get_signature_runner()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(program(**{INPUT: x.contiguous().numpy()})[OUTPUT])

    return run


def load_executorch(path: Path, threads: int) -> Run:
    """Load an ExecuTorch program. The number of threads is that of the process."""
    with muted():
        from executorch.extension.pybindings.portable_lib import (  # pyright: ignore[reportMissingImports]
            _threadpool_get_thread_count,
            _unsafe_reset_threadpool,
        )
        from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

        if _threadpool_get_thread_count() != threads:
            _unsafe_reset_threadpool(threads)
        program = Runtime.get().load_program(path)
        method = program.load_method("forward")

    def run(x: Tensor) -> Tensor:
        _ = program  # lives as long as its method
        (logits,) = method.execute([x.contiguous()])
        return logits

    return run


LOADERS: dict[str, Callable[[Path, int], Run]] = {
    "onnx": load_onnx,
    "openvino": load_openvino,
    "litert": load_litert,
    "executorch": load_executorch,
}
"""Formats that can be quantised when they are exported."""
LIBRARIES = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "litert": "ai_edge_litert.interpreter",
    "executorch": "executorch.runtime",
    "torch": "torch.export",
    "aoti": "torch._inductor",
}
"""What runs a format, as it is imported."""


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Discard what converters and runtimes print of themselves, also from C++, such as progress and absent drivers."""
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        sink = stack.enter_context(tempfile.TemporaryFile())
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(sink.fileno(), number)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        logging.disable(logging.WARNING)
        stack.callback(logging.disable, disabled)
        yield

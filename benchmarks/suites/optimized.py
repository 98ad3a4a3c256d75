"""Time the fastest ways to run a network on a CPU: what `NFNet.optimize` chooses, beside timm and other runtimes."""

from __future__ import annotations

import functools
import gc
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders, peer, timing
from benchmarks.contenders import Work
from benchmarks.report import Options, Page, Table, number
from nfzoo.nn import NFNet
from nfzoo.runtime import execution

BATCHES = (1, 16)
COMPILED = 1  # images, beyond which nothing is compiled: it would take longer than all the rest


def optimized(options: Options) -> Page:
    """Measure batches of one image and of several, the latter in a third of the rounds."""
    work = options.work
    rate = timing.matmul_rate(work.device, work.dtype, size=512 if options.quick else None)
    tables = []
    for batch in options.batches or BATCHES:
        rows = []
        for variant in options.models or ["nfnet-f0"]:
            size = options.size or (64 if options.quick else contenders.sizes(variant)[1])
            calls = _calls(variant, work, batch, size, compiled=options.compiled and batch <= COMPILED)
            rounds = options.rounds if batch == 1 else max(3, options.rounds // 3)
            times = timing.interleave(calls, work.device, rounds=rounds, warm=1)
            floor = contenders.macs(variant, size) / rate
            for name, values in times.items():
                seconds = timing.median(values) / batch
                against = timing.ratio(times["nfzoo prepacked"], values)
                rows.append([variant, str(size), name, number(1e3 * seconds), number(against), number(seconds / floor)])
            rows.append([variant, str(size), "floor", number(1e3 * floor), "", ""])
            calls.clear()
            gc.collect()
        precision = str(work.dtype).removeprefix("torch.")
        title = f"Inference, batch {batch}, {precision}, {torch.get_num_threads()} thread(s)"
        header = ["model", "pixels", "contender", "ms an image", "prepacked / it", "it / floor"]
        note = f"The floor is the multiply-accumulates at {rate / 1e12:.3g} T a second, the rate of a large product."
        tables.append(Table(title, header, rows, note))
        print(tables[-1].markdown(), file=sys.stderr, flush=True)  # it takes minutes
    return "The fastest ways on a CPU", tables, []


def _calls(variant: str, work: Work, batch: int, size: int, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    model = contenders.network(variant, work, training=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("skip_gain"):  # of random weights 0, so that logits would tell nothing of the blocks
                p.fill_(0.5)
    lean = model.for_inference()
    x = work.images(batch, size).to(work.dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, net: Callable[[Tensor], Any], images: Tensor) -> None:
        calls[name] = torch.inference_mode()(functools.partial(net, images))

    own = {name: p.detach().to(work.dtype) for name, p in lean.named_parameters()}
    add("nfzoo folded", NFNet.from_params(lean.description, own), last)
    add("nfzoo prepacked", NFNet.from_params(lean.description, own).prepack(), last)
    chosen = lean.optimize(batch=batch, size=size, dtype=work.dtype)
    assert chosen.execution is not None
    add(f"nfzoo optimize(): {chosen.execution.form}", chosen, x)
    if compiled:
        make = functools.partial(NFNet.from_params, lean.description, own)
        (frozen,) = (c for c in execution.candidates("torch", compile=True, dtype=work.dtype) if c.form == "frozen")
        with torch.no_grad():
            reference = lean(x.float())
        add("nfzoo optimize(compile=True): frozen", execution.fastest(make, reference, x, [frozen], tolerance=None), x)
        if peer.timm() is not None:
            theirs: Any = peer.model(peer.name_of(variant), work.device, training=False).to(work.dtype)
            made = contenders._frozen(theirs, last)
            calls["timm compiled, frozen"] = torch.no_grad()(functools.partial(made, last))
    if importlib.util.find_spec("openvino"):
        runs = lean.optimize(batch=batch, size=size, dtype=work.dtype, backend="openvino")
        add('nfzoo optimize(backend="openvino")', runs, x)
    if importlib.util.find_spec("onnxruntime") and work.dtype == torch.float32:
        calls["ONNX Runtime, nfzoo's export"] = _onnx(lean, x)
    return calls


def _onnx(lean: NFNet, x: Tensor) -> Callable[[], Any]:
    """Return a run of the ONNX file by ONNX Runtime, which has no bfloat16 on a CPU."""
    import onnxruntime

    from nfzoo.export.run import INPUT, export

    with tempfile.TemporaryDirectory() as folder:
        path = export(lean, Path(folder) / "onnx", format="onnx", size=x.shape[-1], batch=len(x))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # into the time of the next contender
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    images = {INPUT: x.contiguous().numpy()}
    return lambda: session.run(None, images)

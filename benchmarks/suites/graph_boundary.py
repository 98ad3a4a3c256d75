"""What it costs that a compiled graph ends with each block, against three ways not to let it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import contenders, timing
from benchmarks.report import Options, Page, Table, number
from nfzoo.model import plan
from nfzoo.models import functional as nf
from nfzoo.models.layers import Standardizing, attention_gate
from nfzoo.models.nfnet import FBlock
from nfzoo.runtime.compile import compile_alone, compile_options, compiled_rows
from nfzoo.types import Block, Plan

Net = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def beginning_after_the_sum(
    fn: FBlock, p: Mapping[str, Tensor], x: Tensor, activated: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """An NFNet block that receives and hands on the stream together with its activation."""
    act, conv = fn.layers.act, fn.conv
    shortcut = conv(p, "shortcut.", fn.pooled(activated), beta) if fn.geometry.transition else x
    out = conv(p, "conv0.", activated, beta)
    out = conv(p, "conv1.", act(out), **fn.strided)
    out = conv(p, "conv1b.", act(out), dilation=fn.geometry.out_dilation, groups=fn.groups)
    out = conv(p, "conv2.", act(out))
    gate = attention_gate(fn.attention, p, out)
    factor = p["skip_gain"] * fn.alpha if gate is None else p["skip_gain"] * fn.alpha * gate
    total = torch.addcmul(shortcut, out, factor.to(out.dtype))
    return total, act(total)


def _local(block: Block, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    keys = ((k, f"{block.name}.{k}") for k in block.specs)
    return {k: params[key] for k, key in keys if key in params}


def _ready(block: Block) -> Block:
    """The block whose kernels come standardised."""
    return block._replace(fn=block.fn.made_ready()) if isinstance(block.fn, Standardizing) else block


def networks(cfg: Any, device: torch.device, *, training: bool) -> dict[str, Net]:
    """The same network, compiled in four ways; and its blocks with weights standardised where the others have it not.

    Blocks have it as `CompiledBlock` does: apart when they are trained on a CPU, else in their graphs.
    """
    kernels = compiled_rows(compile_options())
    trained = plan(cfg)
    ready = tuple(_ready(b) for b in trained)

    def apart(net: Net) -> Net:
        def run(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
            standardized = {}
            for block in trained:
                fn, local = block.fn, _local(block, params)
                if isinstance(fn, Standardizing):
                    local = fn.standardized(local, block.beta, kernels)
                standardized.update({f"{block.name}.{k}": v for k, v in local.items()})
            return net(standardized, x)

        return run

    if device.type == "cpu" and training:
        made = {name: apart(net) for name, net in _networks(ready, cfg.activation, device).items()}
        return {**made, "a graph a block, standardised in it": _blockwise(trained, device)}
    made = _networks(trained, cfg.activation, device)
    return {**made, "a graph a block, standardised apart": apart(_blockwise(ready, device))}


def _blockwise(blocks: Plan, device: torch.device) -> Net:
    betas = {b.name: torch.full((), b.beta, device=device) for b in blocks}
    fns: dict[Any, Any] = {b.fn: compile_alone(_plain(b.fn)) for b in blocks}

    def blockwise(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        for b in blocks:
            x = fns[b.fn](_local(b, params), x, betas[b.name])
        return x

    return blockwise


def _networks(blocks: Plan, activation_name: str, device: torch.device) -> dict[str, Net]:
    betas = {b.name: torch.full((), b.beta, device=device) for b in blocks}
    ends: dict[Any, Any] = {b.fn: compile_alone(_plain(b.fn)) for b in blocks if not isinstance(b.fn, FBlock)}
    shared: dict[Any, Callable[..., Any]] = {}

    def region(fn: FBlock) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(p: Mapping[str, Tensor], x: Tensor, activated: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
            return beginning_after_the_sum(fn, p, x, activated, beta)

        return compile_alone(run)

    for b in blocks:
        if isinstance(b.fn, FBlock) and b.fn not in shared:
            shared[b.fn] = region(b.fn)

    def activated_input(x: Tensor) -> Tensor:
        return nf.activate(x, activation_name)

    activation = compile_alone(activated_input)

    def shifted(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        activated = None
        for b in blocks:
            local = _local(b, params)
            if isinstance(b.fn, FBlock):
                activated = activation(x) if activated is None else activated
                x, activated = shared[b.fn](local, x, activated, betas[b.name])
            else:
                x = ends[b.fn](local, x, betas[b.name])
        return x

    # All regions are one function's closures to the compiler, which takes 8 of them unless told otherwise.
    marked: Any = torch.compiler.nested_compile_region
    more = {"max_reuse_entries": 64} if "max_reuse_entries" in inspect.signature(marked).parameters else {}
    nested_fns: dict[Any, Any] = {b.fn: marked(_plain(b.fn), **more) for b in blocks}

    def nested(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        for b in blocks:
            x = nested_fns[b.fn](_local(b, params), x, betas[b.name])
        return x

    def whole(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        for b in blocks:
            x = b.fn(_local(b, params), x, b.beta, None)
        return x

    return {
        "a graph a block": _blockwise(blocks, device),
        "sum and activation together": shifted,
        "nested_compile_region": compile_alone(nested),
        "whole model": compile_alone(whole),
    }


def _plain(fn: Any) -> Callable[..., Tensor]:
    def run(p: dict[str, Tensor], x: Tensor, beta: Tensor) -> Tensor:
        return fn(p, x, beta, None)

    return run


def page(options: Options) -> Page:
    work, rows, notes = options.work, [], []
    for variant in options.models or ["nfnet-f0"]:
        net = contenders.network(variant, work, training=True)
        params = dict(net.named_parameters())
        for task in ("inference", "training"):
            train, test = contenders.sizes(variant)
            size = options.size or (64 if options.quick or not options.gpu else train if task == "training" else test)
            batch = (options.batches or [32 if options.gpu else 8])[0]
            x = work.images(batch, size)
            calls: dict[str, Callable[[], Any]] = {}
            first = {}
            torch.compiler.reset()
            for name, made in networks(net.config, work.device, training=task == "training").items():
                call = _training(made, params, x, work) if task == "training" else _inference(made, params, x, work)
                try:
                    first[name] = timing.seconds(call, work.device)
                except Exception as error:
                    notes.append(f"{variant}, {task}: {name} does not compile: {str(error).splitlines()[0]}")
                    continue
                calls[name] = call
            times = timing.interleave(calls, work.device, rounds=options.rounds)
            base = times["a graph a block"]
            for name, values in times.items():
                rows.append(
                    [
                        variant,
                        task,
                        f"{batch} x {size}",
                        name,
                        number(1e3 * timing.median(values)),
                        number(timing.ratio(base, values)),
                        number(first[name]),
                    ]
                )
    header = ["model", "task", "input", "regions", "ms", "a graph a block / it", "s first call"]
    note = "Training is forward, loss and backward. Compilation in one process, with warm caches of earlier contenders."
    return "Where graphs end", [Table("Where graphs end", header, rows, note)], notes


def _inference(made: Net, params: Mapping[str, Tensor], x: Tensor, work: contenders.Work) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Tensor:
        with work.autocast():
            return made(params, x)

    return call


def _training(made: Net, params: Mapping[str, Tensor], x: Tensor, work: contenders.Work) -> Callable[[], Any]:
    def call() -> None:
        with work.autocast():
            loss = made(params, x).float().square().mean()
        torch.autograd.grad(loss, list(params.values()))

    return call

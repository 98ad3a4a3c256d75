"""The measurements, each a function from options to a titled page of tables."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nfzoo
from benchmarks import contenders, peer, report, timing
from benchmarks.contenders import Work
from benchmarks.report import Options, Page, Table, number
from benchmarks.suites import graph_boundary, grouped_conv, optimized, profiles
from nfzoo.model import apply, specs
from nfzoo.optim.agc_sgd import AGCSGD
from nfzoo.optim.sgd import CLIPPED, DECAYED
from nfzoo.variants import VARIANTS

WARM = 6  # calls before a training step is timed: nfzoo captures its CUDA graph in the fourth
FEW = 64  # images, beyond which memory has room for the fastest contenders alone


def inference(options: Options) -> Page:
    work = options.work
    models = options.models or ([f"nfnet-f{n}" for n in range(7)] if options.gpu else ["nfnet-f0"])
    rate = timing.matmul_rate(work.device, work.dtype, size=512 if options.quick else None)
    tables, points = [], []
    for batch in options.batches or ([1, 256] if options.gpu and not options.quick else [1]):
        rows = []
        for variant in models:
            size = options.size or (64 if options.quick else contenders.sizes(variant)[1])
            calls = contenders.inference(variant, work, batch=batch, size=size, compiled=options.compiled)
            times = timing.interleave(calls, work.device, rounds=options.rounds, least=0.0 if not options.gpu else 0.2)
            base = times.get("timm compiled", times.get("timm eager"))
            floor = batch * contenders.macs(variant, size) / rate
            for name, values in times.items():
                rows.append(_row(variant, size, name, values, base, floor))
            rows.append([variant, str(size), "floor", number(1e3 * floor), "", ""])
            for series, start in (("nfzoo NFNet", "nfzoo"), ("timm NFNet", "timm")):
                found = [timing.median(v) for n, v in times.items() if n.startswith(start)]
                if found and batch == 1:
                    points.append(
                        report.Point(series, variant.split("-")[1].upper(), min(found), contenders.ACCURACY[variant])
                    )
            _forget(calls)
        against = "timm compiled" if options.compiled else "timm eager"
        tables.append(
            Table(
                f"Inference, batch {batch}, {_dtype(work)}",
                ["model", "pixels", "contender", "ms", f"{against} / it", "it / floor"],
                rows,
                f"The floor is the multiply-accumulates of convolutions and linears at {rate / 1e12:.3g} T a second, "
                "the measured rate of a large matrix product in this precision.",
            )
        )
    if peer.timm() is not None and points and (options.quick or len(models) > 1):
        points += _efficientnets(options)
    if options.plot is not None and points:
        made = report.plot(
            points,
            options.plot / f"accuracy-latency-{'gpu' if options.gpu else 'cpu'}{'-quick' if options.quick else ''}.png",
            xlabel=f"seconds an image, batch 1, {_dtype(work)}, "
            + ("the faster of eager and compiled" if options.compiled else "eager"),
        )
        if made is None:
            print("no plot: it needs matplotlib", file=sys.stderr)
    return "Inference", tables, []


def _efficientnets(options: Options) -> list[report.Point]:
    work, points = options.work, []
    for name, (accuracy, size) in list(contenders.EFFICIENTNETS.items())[: 2 if options.quick else None]:
        net: Any = peer.model(name, work.device, training=False).to(work.dtype)
        net = net.to(memory_format=work.layout)
        x = work.images(1, 64 if options.quick else size, dtype=work.dtype)
        calls: dict[str, Callable[[], Any]] = {"eager": torch.no_grad()(functools.partial(net, x))}
        if options.compiled and not options.quick:
            calls["compiled"] = torch.no_grad()(functools.partial(torch.compile(net, dynamic=False), x))
            if work.device.type == "cuda":
                with torch.no_grad():
                    calls["graph"] = timing.captured(calls["compiled"])
        times = timing.interleave(calls, work.device, rounds=options.rounds)
        best = min(timing.median(v) for v in times.values())
        points.append(report.Point("timm EfficientNet", name.split("_")[-1].upper(), best, accuracy))
    return points


def training(options: Options) -> Page:
    work = options.work
    if options.gpu:
        models, batches = options.models or [f"nfnet-f{n}" for n in (0, 1, 3, 5)], options.batches or [32, 0]
    else:
        models, batches = options.models or ["nfnet-f0"], options.batches or [8]
    rate = timing.matmul_rate(work.device, work.dtype, size=512 if options.quick else None)
    rows, profiled = [], []
    for variant in models:
        size = options.size or (64 if options.quick or not options.gpu else contenders.sizes(variant)[0])
        for wanted in batches:
            batch = wanted or _largest_batch(options, variant, size)
            sides = _training_sides(options, variant, batch, size)
            times = timing.interleave(
                {name: side.step for name, side in sides.items()},
                work.device,
                rounds=options.rounds,
                least=0.3 if options.gpu and not options.quick else 0.0,
                warm=WARM,
            )
            floor = 3 * batch * contenders.macs(variant, size) / rate
            best = min((v for n, v in times.items() if n.startswith("timm")), key=timing.median, default=None)
            for name, values in times.items():
                rows.append(
                    [
                        *_row(variant, size, name, values, best, floor),
                        str(batch),
                        number(batch / timing.median(values), 4),
                    ]
                )
            rows.append(
                [variant, str(size), "floor", number(1e3 * floor), "", "", str(batch), number(batch / floor, 4)]
            )
            if options.gpu:
                for name in ("nfzoo compiled", "timm compiled, CUDA graph"):
                    if name in sides:
                        profiled.append(_profile(name, sides[name], variant, size, batch, work))
            _forget(sides)
    header = ["model", "pixels", "contender", "ms", "timm's best / it", "it / floor", "batch", "images/s"]
    note = (
        "Forward, cross-entropy, backward, AGC, Nesterov SGD with weight decay, moving average; no dropout or "
        "stochastic depth on either side. nfzoo's is the step of `nfzoo.train` itself, which also normalises the "
        "images, checks that the gradient is finite and sums up the metrics. The floor is three times the forward "
        "multiply-accumulates at "
        f"{rate / 1e12:.3g} T a second, so the reciprocal of the last ratio is the model FLOP utilisation "
        "against the measured matmul rate."
    )
    if options.gpu:
        note += " Both sides compute channels last; nfzoo launches each step as one CUDA graph, as it does by default."
    return "Training step", [Table(f"Training step, {_dtype(work)}", header, rows, note), *profiled], []


def _training_sides(options: Options, variant: str, batch: int, size: int) -> dict[str, contenders.Training]:
    """Return the contenders. On a GPU timm has what makes it fastest, and large batches leave room for few of them."""
    sides = {}
    work, theirs = options.work, options.work._replace(channels_last=options.gpu)
    few = options.gpu and batch > FEW and options.compiled
    for compiled in (False, True) if options.compiled else (False,):
        if few and not compiled:
            continue
        mode = "compiled" if compiled else "eager"
        kw = {"batch": batch, "size": size, "compiled": compiled}
        sides[f"nfzoo {mode}"] = contenders.train_nfzoo(variant, work, **kw)
        if peer.timm() is None:
            continue
        name = peer.name_of(variant)
        if not few:
            sides[f"timm {mode}"] = contenders.train_timm(name, theirs, **kw)
        if work.device.type == "cuda":
            sides[f"timm {mode}, CUDA graph"] = contenders.train_timm(name, theirs, **kw, cuda_graph=True)
    return sides


def _largest_batch(options: Options, variant: str, size: int, *, checkpointed: bool = False) -> int:
    """The largest power of two at which an eager step fits twice, so that the contenders can take turns."""

    def fits(batch: int) -> bool:
        if batch > contenders.MAX_BATCH:
            return False
        side = contenders.train_nfzoo(
            variant, options.work, batch=batch, size=size, compiled=False, checkpointed=checkpointed
        )
        return timing.runs_in_memory(side.step, options.work.device)

    found = timing.largest_power_of_two(fits, 4096 if options.gpu else 4)
    _forget({})
    return max(1, found // 2)


def compile_times(options: Options) -> Page:
    models = options.models or ["nfnet-f0", "nfnet-f6"]
    size = options.size or 64
    rows = []
    for task in ("forward", "training"):
        seconds: dict[tuple[str, str], float] = {}
        spent: dict[tuple[str, str], float] = {}
        for side in ("nfzoo", "nfzoo folded", "timm"):
            if (side == "nfzoo folded" and task == "training") or (side == "timm" and peer.timm() is None):
                continue
            for variant in models:
                found = _cold(options, side, task, variant, size)
                seconds[side, variant] = found["first"] - found["second"]
                spent[side, variant] = found["processor"]
                growth = spent[side, variant] / spent[side, models[0]]
                rows.append(
                    [task, side, variant, number(seconds[side, variant]), number(found["processor"]), f"{growth:.2f}"]
                )
    header = ["task", "contender", "model", "s to compile", "processor s", f"processor s / those of {models[0]}"]
    note = (
        f"A fresh process with all caches off, {size}x{size} pixels, batch 2: first call less second call. nfzoo "
        "compiles block by block, timm as a whole. Training is forward, backward and update."
    )
    return "Cold compilation", [Table("Cold compilation", header, rows, note)], []


def _cold(options: Options, side: str, task: str, variant: str, size: int) -> dict[str, float]:
    code = (
        "import json, sys; sys.argv = ['run.py']; sys.path.insert(0, {root!r}); "
        "from benchmarks import run; from benchmarks.suites.against_timm import cold; print(json.dumps(cold({args!r})))"
    ).format(
        root=str(Path(__file__).resolve().parents[2]),
        args=(side, task, variant, size, str(options.work.device), str(options.work.dtype).split(".")[1]),
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{side} {task} {variant} did not compile:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def cold(args: tuple[str, str, str, int, str, str]) -> dict[str, float]:
    """Seconds of the first and the second call of one contender, in a fresh process."""
    side, task, variant, size, device, dtype = args
    work = Work(torch.device(device), timing.DTYPES[dtype])
    if task == "training":
        make = (
            functools.partial(contenders.train_timm, peer.name_of(variant))
            if side == "timm"
            else functools.partial(contenders.train_nfzoo, variant)
        )
        call: Callable[[], Any] = make(work, batch=2, size=size, compiled=True).step
    else:
        x = work.images(2, size, dtype=work.dtype)
        if side == "timm":
            theirs = peer.model(peer.name_of(variant), work.device, training=False).to(work.dtype)
            net: Any = torch.compile(theirs, dynamic=False)
        else:
            ours = contenders.network(variant, work, training=False).to(work.dtype)
            net = (ours.for_inference() if "folded" in side else ours).compile_blocks()
        call = torch.no_grad()(functools.partial(net, x))
    before = _processor_seconds()
    first = timing.seconds(call, work.device)
    spent = _processor_seconds() - before
    before = _processor_seconds()
    second = timing.seconds(call, work.device)
    return {"first": first, "second": second, "processor": spent - (_processor_seconds() - before)}


def _processor_seconds() -> float:
    """Of this process and of the compilers that it started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def optimizer(options: Options) -> Page:
    work, rows = options.work, []
    rate = timing.memory_rate(work.device, megabytes=16 if options.quick else None)
    for variant in options.models or ["nfnet-f0", "nfnet-f6"]:
        cfg = VARIANTS[variant].config
        if options.quick:
            cfg = cfg.replace(widths=(16, 24, 32, 32), group_width=4, stem_width=16)
        params, groups, head = [], [], []
        for shape, kind in specs(cfg).values():
            p = torch.nn.Parameter(torch.randn(shape, device=work.device).mul_(0.05))
            p.grad = torch.randn_like(p)
            params.append(p)
            groups.append((kind in DECAYED, kind in CLIPPED))
            if kind == "head":
                head.append(p)

        def ours(compiled: bool, params: list[Any] = params, groups: list[Any] = groups) -> AGCSGD:
            chosen = [
                {
                    "params": [p for p, g in zip(params, groups, strict=True) if g == key],
                    "weight_decay": 2e-5 if key[0] else 0.0,
                    "clip": 0.01 if key[1] else None,
                }
                for key in dict.fromkeys(groups)
            ]
            return AGCSGD(chosen, lr=1e-4, ema_decay=0.99999, compiled=compiled)

        calls: dict[str, Callable[[], Any]] = {"nfzoo eager": ours(False).step}
        if options.compiled:
            calls["nfzoo compiled"] = ours(True).step
        if peer.timm() is not None:
            calls["timm, torch SGD foreach"] = peer.Update(params, head)
        count = sum(p.numel() for p in params)
        first = {name: timing.seconds(call, work.device) for name, call in calls.items()}
        times = timing.interleave(calls, work.device, rounds=options.rounds)
        floor = 4 * 9 * count / rate
        base = times.get("timm, torch SGD foreach")
        for name, values in times.items():
            row = _row(variant, len(params), name, values, base, floor)
            rows.append([*row, number(first[name]) if "compiled" in name else ""])
        rows.append([variant, str(len(params)), "floor", number(1e3 * floor), "", "", ""])
        _forget(calls)
    header = ["model", "parameters", "contender", "ms", "timm / it", "it / floor", "s first call"]
    note = (
        "The floor is nine passes over the parameters (gradient and weight read for the norms; weight, gradient, "
        f"momentum and average read, three of them written) at {rate / 1e9:.3g} GB a second, the rate of a copy."
    )
    return "AGC, SGD and moving average", [Table("Update of all parameters, float32", header, rows, note)], []


def memory(options: Options) -> Page:
    work, rows = options.work, []
    unit = "peak GB" if work.device.type == "cuda" else "GB kept for backward"
    for variant in options.models or (["nfnet-f0", "nfnet-f6"] if options.gpu else ["nfnet-f0"]):
        size = options.size or (64 if options.quick else contenders.sizes(variant)[0])
        for batch in options.batches or [32 if options.gpu else 2]:
            for checkpointed in (False, True):
                for compiled in (False, True) if options.compiled else (False,):
                    for side in ("nfzoo", "timm") if peer.timm() is not None else ("nfzoo",):
                        if side == "timm" and compiled and checkpointed and not options.gpu:
                            continue
                        make = (
                            functools.partial(contenders.train_nfzoo, variant)
                            if side == "nfzoo"
                            else functools.partial(contenders.train_timm, peer.name_of(variant))
                        )
                        made = make(work, batch=batch, size=size, compiled=compiled, checkpointed=checkpointed)
                        if work.device.type == "cuda":
                            fitted = timing.runs_in_memory(made.step, work.device)
                            amount = timing.peak_bytes(made.step, work.device) if fitted else float("nan")
                        else:
                            amount = timing.saved_bytes(made.forward, list(made.net.parameters()))
                        rows.append(
                            [
                                variant,
                                str(size),
                                str(batch),
                                side,
                                "compiled" if compiled else "eager",
                                "yes" if checkpointed else "no",
                                number(amount / 1e9),
                            ]
                        )
                        del made
                        _forget({})
    tables = [
        Table("Memory of a training step", ["model", "pixels", "batch", "side", "mode", "checkpointed", unit], rows)
    ]
    if work.device.type == "cuda" or options.quick:
        variant, size = ("nfnet-f0", 64) if options.quick else ("nfnet-f6", 448)
        found = [
            [variant, str(size), "yes" if c else "no", str(2 * _largest_batch(options, variant, size, checkpointed=c))]
            for c in (False, True)
        ]
        tables.append(
            Table(
                "Largest batch",
                ["model", "pixels", "checkpointed", "largest power of two"],
                found,
                "Sought up to 4 on a CPU, which says nothing." if not options.gpu else "",
            )
        )
    return "Memory", tables, []


def headline(options: Options) -> Page:
    """Time NFNet-F1 at 224 pixels against EfficientNet-B7 at 600, per image."""
    work = options.work._replace(channels_last=False)
    theirs = work._replace(channels_last=options.gpu)
    batch = (options.batches or [32 if options.gpu else 2])[0]
    small, large = (64, 96) if options.quick else (224, 600)
    compiled = options.compiled and not (options.quick and not options.gpu)
    ours = "nfzoo NFNet-F1"
    sides = {ours: contenders.train_nfzoo("nfnet-f1", work, batch=batch, size=small, compiled=compiled)}
    count = {ours: batch}
    if peer.timm() is not None:
        name = "tf_efficientnet_b0" if options.quick else "tf_efficientnet_b7"
        graph = work.device.type == "cuda"
        fewer, made = batch, None
        while made is None and fewer:
            try:
                made = contenders.train_timm(
                    name, theirs, batch=fewer, size=large, compiled=compiled, agc=False, cuda_graph=graph
                )
            except torch.OutOfMemoryError:
                fewer //= 2
            _forget({})  # after the error, which holds the memory
        if made is not None:
            sides[f"timm {name}"], count[f"timm {name}"] = made, fewer
    times = timing.interleave({n: s.step for n, s in sides.items()}, work.device, rounds=options.rounds, warm=WARM)
    each = {n: [value / count[n] for value in values] for n, values in times.items()}
    rows = [
        [
            n,
            str(small if n == ours else large),
            str(count[n]),
            number(1e3 * timing.median(v)),
            number(1e3 * timing.median(each[n])),
            number(timing.ratio(each[n], each[ours])),
        ]
        for n, v in times.items()
    ]
    note = (
        "The paper reports 8.7 for this ratio, on TPUv3 at batch 32 (arXiv 2102.06171, figure 1). A batch that does "
        "not fit in memory is halved."
    )
    header = ["contender", "pixels", "batch", "ms", "ms an image", "it / NFNet-F1"]
    mode = "compiled" if compiled else "eager"
    return "NFNet-F1 against EfficientNet-B7", [Table(f"Training step, {_dtype(work)}, {mode}", header, rows, note)], []


def layout(options: Options) -> Page:
    rows = []
    for variant in options.models or ["nfnet-f0"]:
        test = options.size or (64 if options.quick else contenders.sizes(variant)[1])
        train = options.size or (64 if options.quick or not options.gpu else contenders.sizes(variant)[0])
        for task in ("inference", "forward and backward"):
            calls: dict[str, Callable[[], Any]] = {}
            for last in (False, True):
                work = options.work._replace(channels_last=last)
                name = "channels last" if last else "NCHW"
                if task == "inference":
                    made = contenders.inference(variant, work, batch=1, size=test, compiled=options.compiled)
                    calls |= {f"{n}, {name}": c for n, c in made.items() if n.startswith("nfzoo folded")}
                else:
                    for compiled in (False, True) if options.compiled else (False,):
                        batch = 32 if options.gpu else 8
                        call = contenders.backward_nfzoo(variant, work, batch=batch, size=train, compiled=compiled)
                        calls[f"nfzoo {'compiled' if compiled else 'eager'}, {name}"] = call
            times = timing.interleave(calls, options.work.device, rounds=options.rounds)
            for n, v in times.items():
                base = times[n.replace("channels last", "NCHW")]
                rows.append([task, variant, n, number(1e3 * timing.median(v)), number(timing.ratio(base, v))])
            _forget(calls)
    header = ["task", "model", "contender", "ms", "NCHW / it"]
    return "Memory layout", [Table(f"Memory layout, {_dtype(options.work)}", header, rows)], []


def shell(options: Options) -> Page:
    """Time what `NFNet.forward` adds to `nfzoo.model.apply` on the same parameters."""
    work, rows = options.work, []
    for variant in options.models or ["nfnet-test"]:
        model = nfzoo.create(variant).to(work.device, work.dtype).eval()
        cfg, params = model.config, dict(model.named_parameters())
        side = options.size or model.preprocessing.test_size
        x = torch.randn(1, cfg.in_channels, side, side, device=work.device, dtype=work.dtype)
        with torch.inference_mode():
            calls = {"nfzoo.model.apply": lambda: apply(cfg, params, x), "NFNet.forward": lambda: model(x)}  # noqa: B023
            times = timing.interleave(calls, work.device, rounds=max(options.rounds, 9 if options.quick else 400))
        base = times["nfzoo.model.apply"]
        for name, values in times.items():
            rows.append(
                [variant, str(side), name, number(1e3 * timing.median(values)), number(timing.ratio(values, base))]
            )
    header = ["model", "side", "contender", "ms", "it / apply"]
    return "The nn.Module over the pure function", [Table("One image", header, rows)], []


def boundary(options: Options) -> Page:
    return graph_boundary.page(options)


def profile(options: Options) -> Page:
    work, tables = options.work, []
    for variant in options.models or ["nfnet-f0"]:
        size = options.size or (64 if options.quick or not options.gpu else contenders.sizes(variant)[0])
        batch = (options.batches or [32 if options.gpu else 8])[0]
        for name, side in _training_sides(options, variant, batch, size).items():
            tables.append(_profile(name, side, variant, size, batch, work))
    return "Where a training step spends its time", tables, []


def _profile(name: str, side: contenders.Training, variant: str, size: int, batch: int, work: Work) -> Table:
    rows = profiles.by_class(side.step, work.device)
    return Table(f"{name}, {variant}, {size} pixels, batch {batch}", ["class", "ms", "share", "kernels"], rows)


def _row(variant: str, size: int, name: str, values: list[float], base: list[float] | None, floor: float) -> list[str]:
    middle = timing.median(values)
    against = "" if base is None else number(timing.ratio(base, values))
    return [variant, str(size), name, number(1e3 * middle), against, number(middle / floor)]


def _dtype(work: Work) -> str:
    return str(work.dtype).split(".")[1] + (", channels last" if work.channels_last else "")


def _forget(calls: dict[str, Any]) -> None:
    calls.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SUITES: dict[str, Callable[[Options], Page]] = {
    "inference": inference,
    "training": training,
    "compile": compile_times,
    "optimizer": optimizer,
    "memory": memory,
    "headline": headline,
    "layout": layout,
    "shell": shell,
    "boundary": boundary,
    "grouped": grouped_conv.page,
    "profile": profile,
    "optimize": optimized.optimized,
}

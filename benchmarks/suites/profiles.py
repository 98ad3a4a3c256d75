"""A training step's time by class of kernel."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.report import number

# The first pattern that a kernel's or operator's name holds decides.
CLASSES = (
    ("transposes", r"nchwToNhwc|nhwcToNchw|tensorTransform"),
    ("update of all parameters", r"_update_tiles|foreach|multi_tensor|lerp"),
    ("Triton reductions", r"triton_(per|red)_"),
    ("Triton element-wise", r"triton_poi_"),
    ("copies", r"memcpy|memset|copy_|contiguous"),
    ("convolutions", r"conv|implicit|xmma|cudnn|dgrad|wgrad|fprop|winograd"),
    ("matrix products", r"gemm|cutlass|addmm|aten::mm|bmm|cublas|nvjet"),
    (
        "standardisation and norms",
        r"norm|reduce_kernel|aten::mean|aten::sum|native_batch|var_mean",
    ),
    ("fused element-wise", r"cpp_fused|graph_"),
    ("pooling", r"pool"),
    ("element-wise", r"elementwise|gelu|aten::mul|aten::add|aten::where|aten::sub|sigmoid|aten::"),
)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def by_class(step: Callable[[], object], device: torch.device) -> list[list[str]]:
    """`[class, ms, share, kernels]` of one step, largest first; self time, on the device where there is one."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(6):
        step()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if device.type == "cuda" and event.device_type != DeviceType.CUDA:
            continue
        totals[kind_of(event.key)] += spent
        counts[kind_of(event.key)] += event.count
    whole = sum(totals.values()) or 1.0
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return [[kind, number(spent / 1e3), f"{spent / whole:.1%}", str(counts[kind])] for kind, spent in ranked]

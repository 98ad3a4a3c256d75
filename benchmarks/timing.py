"""Time contenders in turn, and measure what the machine itself can do."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


clock = time.perf_counter


def count_processor_time() -> None:
    """From now on measure the processor time of this process: other programs on the machine then matter less."""
    global clock
    clock = time.process_time


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, the mean over `repeats` in a row."""
    synchronize(device)
    start = clock()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (clock() - start) / repeats


def interleave(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, least: float = 0.0, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; a round runs all of them, so that a disturbance meets all.

    Args:
        least: repeat a contender within a round until it took about so many seconds.
        warm: calls before the first round, which compile and allocate.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(warm):
            call()
        once = seconds(call, device)
        repeats[name] = max(1, int(least / max(once, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(seconds(calls[name], device, repeats[name]))
    return times


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds of one contender's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """Multiply-accumulates a second of a large square matrix product, the best of several.

    On a CPU by oneDNN as well: the library behind `torch.mm` runs at half the rate on processors of another maker.
    """
    n = size or (8192 if device.type != "cpu" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    for product in products:
        product()
    best = min(seconds(product, device, 3) for _ in range(5) for product in products)
    return n**3 / best


def memory_rate(device: torch.device, *, megabytes: int | None = None) -> float:
    """Bytes a second, read and written, of copying a large array; the best of several."""
    count = (megabytes or (1024 if device.type != "cpu" else 256)) * 2**20 // 4
    a, b = (torch.zeros(count, device=device) for _ in range(2))
    b.copy_(a)
    return 2 * 4 * count / min(seconds(lambda: b.copy_(a), device, 2) for _ in range(5))


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The CUDA graph of a call whose tensors stay where they are, ready to be replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    # With the call live the tensors that the graph reads: nobody else may hold a model that is only replayed.
    return functools.partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Callable[[], object]) -> None:
    graph.replay()


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most device memory allocated while a call runs, what it found included."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def saved_bytes(forward: Callable[[], torch.Tensor], weights: Sequence[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights not counted: what there is to say on a CPU."""
    known = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    total = sum(kept.values())
    del loss
    return total


def largest_power_of_two(fits: Callable[[int], bool], limit: int) -> int:
    """The largest power of two up to `limit` for which `fits` holds; 0 if 1 does not."""
    best, batch = 0, 1
    while batch <= limit and fits(batch):
        best, batch = batch, 2 * batch
    return best


def runs_in_memory(call: Callable[[], object], device: torch.device) -> bool:
    """Whether a call gets through without running out of device memory."""
    try:
        call()
        synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True

"""The whole update of many parameters in a few Triton kernels: AGC, weight decay, Nesterov momentum, moving average.

What `agc` and `sgd` state as formulas, here in one pass over memory: parameters, gradients, momenta and averages are
read once and written once, whatever their number, where one operation after another would take some twenty passes.
A kernel finds its tensors through a table of addresses, so that all parameters of a similar row length share a launch.

Imported by `nfzoo.optim.agc_sgd` where there is Triton, and only for CUDA devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from nfzoo.optim.clipping import unit_shape

LONGEST = 4096  # numbers of a row that are kept between norm and update; what a program holds of it
TILE = 2048  # numbers in a tile of several shorter rows
SHORTEST = 32  # rows are padded to at least so many numbers
VECTOR = 16  # bytes that one load takes, where addresses allow it


@triton.jit
def _update_tiles(
    tiles,
    table,
    counts,
    lr_ptr,
    weight_ptr,
    gate_ptr,
    clip,
    eps,
    momentum,
    decay,
    CLIPPED: tl.constexpr,
    NESTEROV: tl.constexpr,
    AVERAGED: tl.constexpr,
    GATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one tile of `ROWS` rows of one parameter, twice over where rows are longer than `BLOCK` (`LONG`)."""
    tile = tl.program_id(0)
    entry = table + tl.load(tiles + 2 * tile) * 6
    first = tl.load(tiles + 2 * tile + 1)
    p_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    g_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    a_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    rows = tl.load(entry + 4)
    length = tl.load(entry + 5)
    if ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        a_ptr = tl.multiple_of(a_ptr, 16)
        length = tl.multiple_of(length, 16)
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = row < rows
    start = row * length
    lr = tl.load(lr_ptr)
    weight = tl.load(weight_ptr) if AVERAGED else 0.0
    writes = inside
    if GATED:
        writes = inside & (tl.load(gate_ptr) != 0)

    factor = tl.full((ROWS, 1), 1.0, tl.float32)
    if CLIPPED and LONG:
        squares_p = tl.zeros((ROWS, BLOCK), tl.float32)
        squares_g = tl.zeros((ROWS, BLOCK), tl.float32)
        for begin in range(0, length, BLOCK):
            mask = inside & (begin + column < length)
            at = start + begin + column
            p = tl.load(p_ptr + at, mask=mask, other=0.0)
            g = tl.load(g_ptr + at, mask=mask, other=0.0)
            squares_p += p * p
            squares_g += g * g
        norm_p = tl.sqrt(tl.sum(squares_p, axis=1, keep_dims=True))
        norm_g = tl.sqrt(tl.sum(squares_g, axis=1, keep_dims=True))
        limit = clip * tl.maximum(norm_p, eps)
        over = norm_g > limit
        factor = tl.where(over, limit / tl.maximum(norm_g, 1e-6), 1.0)
        tl.store(counts + tile, tl.sum((over & inside).to(tl.int32)))

    end = length if LONG else 1
    for begin in range(0, end, BLOCK):
        mask = inside & (begin + column < length)
        keep = writes & (begin + column < length)
        at = start + begin + column
        p = tl.load(p_ptr + at, mask=mask, other=0.0)
        g = tl.load(g_ptr + at, mask=mask, other=0.0)
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        if CLIPPED and not LONG:
            norm_p = tl.sqrt(tl.sum(p * p, axis=1, keep_dims=True))
            norm_g = tl.sqrt(tl.sum(g * g, axis=1, keep_dims=True))
            limit = clip * tl.maximum(norm_p, eps)
            over = norm_g > limit
            factor = tl.where(over, limit / tl.maximum(norm_g, 1e-6), 1.0)
            tl.store(counts + tile, tl.sum((over & inside).to(tl.int32)))
        d = g * factor + decay * p
        m = momentum * m + d
        step = d + momentum * m if NESTEROV else m
        p = p - lr * step
        tl.store(p_ptr + at, p, mask=keep)
        tl.store(m_ptr + at, m, mask=keep)
        if AVERAGED:
            a = tl.load(a_ptr + at, mask=mask, other=0.0)
            tl.store(a_ptr + at, a + weight * (p - a), mask=keep)


@dataclasses.dataclass(frozen=True)
class Launch:
    """The parameters whose rows fill the same block.

    Attributes:
        members: their places in the list.
        block, rows, long: see `_update_tiles`.
        aligned: whether each row begins at a multiple of `VECTOR` if the first one does.
        tiles: `(tiles, 2)` int32 on the device: place of the parameter in the list, first row.
    """

    members: tuple[int, ...]
    block: int
    rows: int
    long: bool
    aligned: bool
    tiles: Tensor


class FusedUpdate:
    """The update of one list of parameters, whose shapes do not change: in place, without waiting for the device.

    Args:
        params: float32 tensors of one device, each dense, its rows one after another (contiguous or channels last).
            Rows are the units of `nfzoo.optim.clipping.unit_shape`.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.shapes = [unit_shape(p.shape) for p in params]
        self.device = params[0].device
        self.units = sum(rows for rows, _ in self.shapes)
        self._kept: tuple[list[tuple[int, ...]], Tensor] | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._launches: list[Launch] = []
        self.owners: list[tuple[int, int]] = []
        buckets: dict[tuple[int, bool, bool], list[int]] = {}
        for i, (_, length) in enumerate(self.shapes):
            aligned = length % VECTOR == 0
            longest = LONGEST if aligned else TILE  # single loads need an address each
            block = min(longest, max(SHORTEST, triton.next_power_of_2(length)))
            buckets.setdefault((block, length > longest, aligned), []).append(i)
        for (block, long, aligned), members in sorted(buckets.items()):
            rows = max(1, TILE // block)
            tiles = [(i, row) for i in members for row in range(0, self.shapes[i][0], rows)]
            on_device = torch.tensor(tiles, dtype=torch.int32).to(self.device)
            self.owners += [(i, -(-self.shapes[i][0] // rows)) for i in members]
            self._launches.append(Launch(tuple(members), block, rows, long, aligned, on_device))

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor],
        averages: Sequence[Tensor] | None,
        *,
        lr: Tensor,
        weight: Tensor | None,
        clip: float | None,
        eps: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        gate: Tensor | None = None,
    ) -> Tensor | None:
        """Take one step; return the number of clipped units of each tile, `(tiles,)`, or `None` without clipping.

        Tiles are in the order of `owners`: the place of a parameter in the list, and the number of its tiles.

        Args:
            averages, weight: moving averages, and the share of the new parameters in them.
            lr, weight, gate: 0-dimensional tensors on the device. Where the gate is false, nothing is written.
        """
        addresses, table = self._addressed(params, grads, momenta, averages)
        clipped: list[Tensor] = []
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with here:  # Triton launches on the current device
            for launch in self._launches:
                count = len(launch.tiles)
                counts = torch.empty(count, dtype=torch.int32, device=self.device)
                kernel: Any = _update_tiles
                kernel[(count,)](
                    launch.tiles,
                    table,
                    counts,
                    lr,
                    lr if weight is None else weight,
                    lr if gate is None else gate.view(torch.uint8),
                    1.0 if clip is None else clip,
                    eps,
                    momentum,
                    weight_decay,
                    CLIPPED=clip is not None,
                    NESTEROV=nesterov,
                    AVERAGED=averages is not None,
                    GATED=gate is not None,
                    ALIGNED=launch.aligned and _aligned(launch, addresses),
                    LONG=launch.long,
                    ROWS=launch.rows,
                    BLOCK=launch.block,
                    num_warps=8,
                )
                clipped.append(counts)
        # Autograd does not see writes through addresses.
        torch.autograd.graph.increment_version([*params, *momenta, *(averages or ())])
        return None if clip is None else torch.cat(clipped)

    def _addressed(self, *lists: Sequence[Tensor] | None) -> tuple[list[tuple[int, ...]], Tensor]:
        """Return the addresses, and their table on the device, which is copied there only if an address changed."""
        places = range(len(self.shapes))
        addresses = [tuple(0 if tensors is None else tensors[i].data_ptr() for tensors in lists) for i in places]
        if self._kept is not None and self._kept[0] == addresses:
            return self._kept
        rows = [[*pointers, *shape] for pointers, shape in zip(addresses, self.shapes, strict=True)]
        host = torch.tensor(rows, dtype=torch.int64)
        if self.device.type == "cuda":
            host = host.pin_memory()
        table = host.to(self.device, non_blocking=True)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append((host, table))  # each replay of the graph copies again, and none has yet
        else:
            self._kept = addresses, table
        return addresses, table


def _aligned(launch: Launch, addresses: Sequence[tuple[int, ...]]) -> bool:
    return all(address % VECTOR == 0 for i in launch.members for address in addresses[i])

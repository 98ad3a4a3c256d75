"""A grouped 3x3 convolution as an implicit matrix product in Triton, and its derivatives: a candidate.

Each group's kernel is a matrix of (9 * in) x out; the image's patches are never written out. Images are channels last.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TAPS = 9


@triton.jit
def _forward(
    x,
    weight,
    out,
    height,
    width,
    rows,
    columns,
    pixels,
    stride,
    front,
    groups,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`PIXELS` output pixels of one group: `out[m, :] = sum over taps of x[m moved, :] @ weight[tap]`."""
    group = tl.program_id(1)
    m = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    image = m // (rows * columns)
    row = (m // columns) % rows
    column = m % columns
    k = tl.arange(0, DEPTH)
    n = tl.arange(0, OUT)
    total = tl.zeros((PIXELS, OUT), tl.float32)
    for tap in range(9):
        y = row * stride + tap // 3 - front
        z = column * stride + tap % 3 - front
        inside = (m < pixels) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        start = ((image * height + y) * width + z) * (groups * CHANNELS) + group * CHANNELS
        for depth in tl.static_range(0, CHANNELS, DEPTH):
            a = tl.load(x + start[:, None] + depth + k[None, :], mask=inside[:, None], other=0.0)
            b = tl.load(weight + ((group * 9 + tap) * CHANNELS + depth + k[:, None]) * OUT + n[None, :])
            total = tl.dot(a, b, total, input_precision="ieee")
    at = m[:, None] * (groups * OUT) + group * OUT + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < pixels)[:, None])


@triton.jit
def _weight_gradient(
    x,
    grad,
    partial,
    height,
    width,
    rows,
    columns,
    pixels,
    stride,
    front,
    groups,
    share,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One tap of one group over a share of the pixels: `partial[share, group, tap] = x moved.T @ grad`."""
    tap = tl.program_id(0)
    group = tl.program_id(1)
    part = tl.program_id(2)
    c = tl.arange(0, CHANNELS)
    n = tl.arange(0, OUT)
    total = tl.zeros((CHANNELS, OUT), tl.float32)
    for begin in range(0, share, PIXELS):
        m = part * share + begin + tl.arange(0, PIXELS)
        image = m // (rows * columns)
        y = (m // columns) % rows * stride + tap // 3 - front
        z = m % columns * stride + tap % 3 - front
        known = (m < pixels) & (begin + tl.arange(0, PIXELS) < share)
        inside = known & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        start = ((image * height + y) * width + z) * (groups * CHANNELS) + group * CHANNELS
        a = tl.load(x + start[:, None] + c[None, :], mask=inside[:, None], other=0.0)
        at = m[:, None] * (groups * OUT) + group * OUT + n[None, :]
        b = tl.load(grad + at, mask=known[:, None], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    at = ((part * groups + group) * 9 + tap) * CHANNELS * OUT
    tl.store(partial + at + c[:, None] * OUT + n[None, :], total)


def forward(x: Tensor, taps: Tensor, *, stride: int, front: int, size: tuple[int, int]) -> Tensor:
    """`(N, C, H, W)` channels last by `taps` `(groups, 9, in, out)` -> `(N, groups * out, *size)` channels last."""
    count, _, height, width = x.shape
    groups, _, channels, outputs = taps.shape
    rows, columns = size
    out = torch.empty((count, groups * outputs, rows, columns), dtype=x.dtype, device=x.device)
    out = out.to(memory_format=torch.channels_last)
    pixels = count * rows * columns
    block = 128 if pixels >= 128 else 16
    kernel: Any = _forward
    kernel[(triton.cdiv(pixels, block), groups)](
        x, taps, out, height, width, rows, columns, pixels, stride, front, groups,
        CHANNELS=channels, OUT=outputs, PIXELS=block, DEPTH=min(64, channels), num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def weight_gradient(x: Tensor, grad: Tensor, groups: int, *, stride: int, front: int) -> Tensor:
    """The gradient of `taps`, float32."""
    count, channels, height, width = x.shape
    rows, columns = grad.shape[2:]
    channels, outputs = channels // groups, grad.shape[1] // groups
    pixels, block = count * rows * columns, 64
    parts = min(triton.cdiv(pixels, 8 * block), triton.cdiv(512, TAPS * groups))
    share = triton.cdiv(triton.cdiv(pixels, parts), block) * block
    partial = torch.empty((parts, groups, TAPS, channels, outputs), dtype=torch.float32, device=x.device)
    kernel: Any = _weight_gradient
    kernel[(TAPS, groups, parts)](
        x, grad, partial, height, width, rows, columns, pixels, stride, front, groups, share,
        CHANNELS=channels, OUT=outputs, PIXELS=block, num_warps=8, num_stages=3,
    )  # fmt: skip
    return partial.sum(0)


class GroupedConv(torch.autograd.Function):
    """`conv2d(x, weight, groups=groups)` of 3x3 kernels, padding 1, stride 1 and as many outputs as inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        outputs, channels = weight.shape[:2]
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        taps = weight.view(groups, outputs // groups, channels, TAPS).permute(0, 3, 2, 1).contiguous()
        return forward(x, taps, stride=1, front=1, size=(x.shape[2], x.shape[3]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        groups, (outputs, channels) = ctx.groups, weight.shape[:2]
        grad = grad.contiguous(memory_format=torch.channels_last)
        # The gradient of the image is the same convolution with inputs and outputs exchanged and taps in reverse.
        taps = weight.view(groups, outputs // groups, channels, TAPS).flip(3).permute(0, 3, 1, 2).contiguous()
        image = forward(grad, taps, stride=1, front=1, size=(x.shape[2], x.shape[3]))
        kernel = weight_gradient(x, grad, groups, stride=1, front=1)
        return image, kernel.permute(0, 3, 2, 1).reshape(weight.shape).to(weight.dtype), None


def grouped_conv(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    return GroupedConv.apply(x.contiguous(memory_format=torch.channels_last), weight, groups)  # type: ignore[return-value]

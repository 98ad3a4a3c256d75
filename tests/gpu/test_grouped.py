"""The Triton candidate for grouped convolutions: torch's numbers, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.suites.grouped_conv_triton import forward, grouped_conv
from tests.support.helpers import relative as relative_on_cpu

# The interpreter reads numbers out of arrays of one element, which numpy will not like one day.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def relative(a: Tensor, b: Tensor) -> float:
    return relative_on_cpu(a.cpu(), b.cpu())


@pytest.mark.parametrize(("groups", "channels", "size", "batch"), [(1, 16, 7, 1), (3, 16, 9, 2), (2, 32, 12, 2)])
def test_it_is_torchs_convolution(groups, channels, size, batch):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, groups * channels, size, size + 1, generator=g)
    weight = torch.randn(groups * channels, channels, 3, 3, generator=g)
    towards = torch.randn(x.shape, generator=g)
    results = []
    for conv in (lambda a, w: torch.conv2d(a, w, padding=1, groups=groups), lambda a, w: grouped_conv(a, w, groups)):
        a, w = (t.to(DEVICE, copy=True).requires_grad_() for t in (x, weight))
        y = conv(a, w)
        y.backward(towards.to(DEVICE))
        assert a.grad is not None
        assert w.grad is not None
        results.append((y.detach(), a.grad, w.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert relative(ours, theirs) < 1e-6


def test_a_stride():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 32, 10, 8, generator=g), torch.randn(32, 16, 3, 3, generator=g)
    taps = weight.view(2, 16, 16, 9).permute(0, 3, 2, 1).contiguous()
    # SAME padding of an even size at stride 2 is (0, 1).
    ours = forward(x.to(DEVICE, memory_format=torch.channels_last), taps.to(DEVICE), stride=2, front=0, size=(5, 4))
    theirs = torch.conv2d(torch.nn.functional.pad(x, (0, 1, 0, 1)), weight, stride=2, groups=2)
    assert relative(ours, theirs) < 1e-6

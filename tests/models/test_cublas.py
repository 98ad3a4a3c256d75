"""A 1x1 convolution as a linear layer of pixels; the kernels themselves are tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from nfzoo.models import cublas, functional
from tests.support.helpers import generator, relative


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_it_is_a_convolution(activation):
    g = generator()
    x = torch.randn(2, 6, 5, 3, generator=g).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 6, 1, 1, generator=g), torch.randn(4, generator=g)
    wanted = torch.conv2d(x, weight, bias)
    if activation is not None:
        wanted = functional.activate(wanted, activation)
    made = cublas.conv1x1(x, weight, bias, activation)
    assert relative(made, wanted) < 1e-6
    assert made.stride() == wanted.stride()


@pytest.mark.parametrize(
    ("kernel", "options", "linear"),
    [
        (1, {}, True),
        (3, {}, False),
        (1, {"stride": 2}, False),
        (1, {"layout": torch.contiguous_format}, False),
    ],
)
def test_what_is_a_linear_layer_of_pixels(kernel, options, linear):
    x = torch.zeros(2, 6, 5, 3).contiguous(memory_format=options.pop("layout", torch.channels_last))
    weight = torch.zeros(4, 6, kernel, kernel)
    assert cublas.is_linear(x, weight, **{"stride": 1, **options}) == linear


def test_other_devices_do_without_it():
    assert not cublas.supports(torch.zeros(2, 3, dtype=torch.bfloat16))

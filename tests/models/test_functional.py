"""The arithmetic, against restatements of it in plain float64 loops."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import nfzoo
from nfzoo import CheckpointError, ConfigError, NFNet, config
from nfzoo.models import functional as nf
from nfzoo.models.nf_resnet import MaxPool
from tests.support.helpers import generator, random_params, relative
from tests.support.loops import each

FLOAT64 = 1e-12  # rounding of a few hundred float64 operations
FLOAT32 = 1e-6  # rounding of a few hundred float32 operations
MONTE_CARLO = 5e-3  # five standard errors of a variance from four million samples, of kurtosis up to ten

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13]


def conv2d(x, weight, bias, *, stride=1, dilation=1, groups=1, same=True, skipped_stride=1):
    x, padding = nf.conv_input(
        x, weight.shape[-1], stride=stride, dilation=dilation, same=same, skipped_stride=skipped_stride
    )
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def same_window(size: int, kernel: int, stride: int, dilation: int = 1) -> list[list[int | None]]:
    """For every output of a SAME window along one axis, the input positions it covers; `None` is padding.

    As TensorFlow documents it: `pad = max(window - (size % stride or stride), 0)`, the smaller half first.
    """
    window = (kernel - 1) * dilation + 1
    front = max(window - (size % stride or stride), 0) // 2
    starts = range(-front, -front + math.ceil(size / stride) * stride, stride)
    return [[p if 0 <= (p := s + k * dilation) < size else None for k in range(kernel)] for s in starts]


def conv_by_loops(x, weight, bias, stride, groups, dilation=1):
    n, _, h, w = x.shape
    out, each, kernel, _ = weight.shape
    rows, columns = same_window(h, kernel, stride, dilation), same_window(w, kernel, stride, dilation)
    y = np.zeros((n, out, len(rows), len(columns)))
    for o in range(out):
        first = o // (out // groups) * each
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                total = np.full(n, bias[o])
                for a, r in enumerate(row):
                    for b, c in enumerate(column):
                        if r is not None and c is not None:
                            total = total + x[:, first : first + each, r, c] @ weight[o, :, a, b]
                y[:, o, i, j] = total
    return y


# ---------------------------------------------------------------- convolution


@each("groups", [1, 2])
@each("stride", [1, 2])
@each("kernel", [1, 3, 7])
@each("size", [(1, 1), (2, 3), (5, 4), (7, 9), (8, 8)])
def test_conv_is_same_padded_as_tensorflow_does_it(size, kernel, stride, groups):
    x, weight, bias = draw(2, 4, *size), draw(4, 4 // groups, kernel, kernel, seed=1), draw(4, seed=2)
    expected = conv_by_loops(x.numpy(), weight.numpy(), bias.numpy(), stride, groups)
    got = conv2d(x, weight, bias, stride=stride, groups=groups)
    assert got.shape[-2:] == tuple(-(-n // stride) for n in size)
    assert relative(got, expected) < FLOAT64


@each("size", [(5, 4), (7, 9), (8, 8)])
def test_dilated_conv_keeps_the_size(size):
    x, weight, bias = draw(1, 2, *size), draw(2, 2, 3, 3, seed=1), draw(2, seed=2)
    expected = conv_by_loops(x.numpy(), weight.numpy(), bias.numpy(), 1, 1, dilation=2)
    assert relative(conv2d(x, weight, bias, dilation=2), expected) < FLOAT64


@each("stride", [1, 2])
@each("kernel", [1, 3, 7])
def test_conv_without_same_is_symmetric(kernel, stride):
    x, weight, bias = draw(1, 2, 7, 10), draw(3, 2, kernel, kernel, seed=1), draw(3, seed=2)
    expected = F.conv2d(x, weight, bias, stride, kernel // 2)
    assert torch.equal(conv2d(x, weight, bias, stride=stride, same=False), expected)


def test_same_differs_from_symmetric_where_it_should():
    x, weight, bias = draw(1, 1, 8, 8), draw(1, 1, 3, 3, seed=1), draw(1, seed=2)
    same, symmetric = (conv2d(x, weight, bias, stride=2, same=s) for s in (True, False))
    assert relative(same, symmetric) > 0.1
    odd = x[..., :7, :7]  # of an odd size the padding is symmetric anyway
    assert relative(*(conv2d(odd, weight, bias, stride=2, same=s) for s in (True, False))) < FLOAT64


@each("size", SIZES)
@each("kernel", [1, 2, 3, 7])
@each("stride", [1, 2, 3])
def test_same_padding_counts(size, kernel, stride):
    before, after = nf.same_padding(size, kernel, stride)
    outputs = (size + before + after - kernel) // stride + 1
    assert outputs == -(-size // stride)
    assert 0 <= after - before <= 1
    assert before == same_window(size, kernel, stride)[0].index(0)


@each("same", [True, False])
@each("kernel", [3, 7])
@each("size", SIZES)
@each("dilation", [1, 2, 4])
def test_a_skipped_stride_fills_in_between_the_strided_outputs(size, kernel, dilation, same):
    """`dilation` interleaved copies of one axis: on the first of them the strided convolution's outputs come back."""
    coarse, weight, bias = draw(1, 2, size, size + 1), draw(2, 2, kernel, kernel, seed=1), draw(2, seed=2)
    strided = conv2d(coarse, weight, bias, stride=2, same=same)
    fine = draw(1, 2, size * dilation, (size + 1) * dilation, seed=3)
    fine[..., ::dilation, ::dilation] = coarse
    dense = conv2d(fine, weight, bias, dilation=dilation, skipped_stride=2, same=same)
    assert dense.shape[-2:] == fine.shape[-2:]
    assert relative(dense[..., :: 2 * dilation, :: 2 * dilation], strided) < FLOAT64


# ---------------------------------------------------------------- pooling


def pool_by_loops(x, kernel, combine):
    n, c, h, w = x.shape
    rows, columns = same_window(h, kernel, 2), same_window(w, kernel, 2)
    y = np.zeros((n, c, len(rows), len(columns)))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            seen = [x[:, :, r, s] for r in row for s in column if r is not None and s is not None]
            y[:, :, i, j] = combine(np.stack(seen), axis=0)
    return y


@each("height", SIZES)
@each("width", [1, 4, 7])
def test_shortcut_pool_does_not_count_padding(height, width):
    x = draw(2, 3, height, width)
    assert relative(nf.shortcut_pool(x, stride=2), pool_by_loops(x.numpy(), 2, np.mean)) < FLOAT64


@each("size", SIZES)
@each("dilation", [1, 2, 4])
def test_the_dense_pool_fills_in_between_the_strided_outputs(size, dilation):
    coarse = draw(1, 2, size, size + 1)
    fine = draw(1, 2, size * dilation, (size + 1) * dilation, seed=3)
    fine[..., ::dilation, ::dilation] = coarse
    dense = nf.shortcut_pool(fine, stride=1, dilation=dilation)
    assert dense.shape == fine.shape
    strided = nf.shortcut_pool(coarse, stride=2)
    assert relative(dense[..., :: 2 * dilation, :: 2 * dilation], strided) < FLOAT64


@each("dilation", [1, 2, 4])
def test_the_pool_of_neighbours_counts_zeros_behind_the_border(dilation):
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    expected = torch.tensor([[8.0, 12.0, 7.0], [7.0, 9.0, 5.0]]) / 4
    assert torch.equal(nf.shortcut_pool(x, stride=1, dilation=dilation, neighbours=True)[0, 0], expected)


@each("height", SIZES)
@each("width", [1, 4, 7])
def test_max_pool_is_same_padded(height, width):
    x = draw(2, 3, height, width) - 10  # all negative: padding with 0 would show
    got = MaxPool(same=True)({}, x, 1.0, None)
    assert np.array_equal(got.numpy(), pool_by_loops(x.numpy(), 3, np.max))


def test_max_pool_without_same_is_symmetric():
    x = draw(1, 2, 8, 9)
    assert torch.equal(MaxPool(same=False)({}, x, 1.0, None), F.max_pool2d(x, 3, 2, 1))


# ---------------------------------------------------------------- weight standardisation


def standardized(weight, gain, floor=True, scale=1.0):
    """Equation 5 of arXiv 2101.08692, an output channel at a time."""
    rows = []
    for w, g in zip(np.asarray(weight, np.float64), np.asarray(gain, np.float64), strict=True):
        fan_in = w.size
        var = np.mean((w - np.mean(w)) ** 2)
        root = max(var * fan_in, 1e-4) if floor else (var + 1e-5) * fan_in
        rows.append((w - np.mean(w)) * g * scale / np.sqrt(root))
    return np.stack(rows)


@each("floor", [True, False])
@each("shape", [(4, 3, 3, 3), (5, 8, 1, 1), (2, 3, 7, 7), (3, 1, 3, 3)])
@each("spread", [1.0, 1e-2, 1e-4])
def test_standardize_weight_is_equation_5(shape, spread, floor):
    weight, gain = 0.3 + spread * draw(*shape), draw(shape[0], seed=1)
    got = nf.standardize_weight(weight, gain, floor=floor, scale=1.7)
    assert relative(got, standardized(weight, gain, floor, 1.7)) < FLOAT64
    single = nf.standardize_weight(weight.float(), gain.float(), floor=floor, scale=1.7)
    # A spread of 1e-4 about 0.3 leaves float32 three digits of the weight itself, hence the exact input here.
    assert relative(single, standardized(weight.float(), gain.float(), floor, 1.7)) < FLOAT32 / spread


def low_rows(dtype=torch.float64):
    """A kernel and its gains; the rows are usual, below the floor, far below, zero and constant."""
    weight = draw(5, 4, 3, 3).to(dtype)
    for row, scale in ((1, 1e-3), (2, 1e-7), (3, 0.0)):
        weight[row] *= scale
    weight[4] = 0.5
    return weight, draw(5, seed=1).to(dtype)


def formula(weight, gain, floor):
    """What `standardize_weight` computes, for autograd to differentiate."""
    centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    total = centred.square().sum(dim=(1, 2, 3), keepdim=True)
    root = (total.clamp(min=1e-4) if floor else total + 1e-5 * weight[0].numel()).sqrt()
    return centred / root * (1.7 * gain)[:, None, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("route", ["autograd", "transform"])
@pytest.mark.parametrize("floor", [True, False])
def test_gradients_of_standardisation_are_those_of_the_formula_below_the_floor_too(dtype, route, floor):
    weight, gain = low_rows(dtype)
    upstream = draw(*weight.shape, seed=2).to(dtype)
    exact = [t.double().requires_grad_() for t in (weight, gain)]
    expected = formula(exact[0], exact[1], floor)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    if route == "autograd":
        leaves = [t.clone().requires_grad_() for t in (weight, gain)]
        out = nf.standardize_weight(*leaves, floor=floor, scale=1.7)
        grads = torch.autograd.grad(out, leaves, upstream)
    else:
        out, pull, *_ = torch.func.vjp(lambda w, g: nf.standardize_weight(w, g, floor=floor, scale=1.7), weight, gain)
        grads = pull(upstream)
    tight = 1e-6 if dtype == torch.float32 else FLOAT64
    for a, b in zip((out, *grads), (expected, *wanted), strict=True):
        for row_a, row_b in zip(a, b, strict=True):  # gradients of low rows are a hundred times larger
            scale = row_b.detach().abs().max().clamp(min=1.0)
            torch.testing.assert_close(row_a.double() / scale, row_b / scale, rtol=tight, atol=tight)


@pytest.mark.parametrize("floor", [True, False])
def test_standardisation_keeps_no_copy_of_the_weights_for_the_backward_pass(floor):
    weight, gain = (t.requires_grad_() for t in low_rows())
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf.standardize_weight(weight, gain, floor=floor)
    copies = [t for t in kept if t.numel() == weight.numel() and t.data_ptr() != weight.data_ptr()]
    assert kept
    assert not copies


@pytest.mark.parametrize("rows", [(0,), (1, 2)], ids=["above", "below"])
@pytest.mark.parametrize("floor", [True, False])
def test_first_and_second_derivatives_of_standardisation(rows, floor):
    weight, gain = low_rows()
    chosen = [t[list(rows)].clone().requires_grad_() for t in (weight[:, :2, :2, :1], gain)]
    rule = functools.partial(nf.standardize_weight, floor=floor)
    assert torch.autograd.gradcheck(rule, chosen)
    assert torch.autograd.gradgradcheck(rule, chosen)


# Torch scripts its own formulas for forward derivatives of this kind, on first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("floor", [True, False])
def test_forward_derivatives_of_standardisation(floor):
    weight, gain = low_rows()
    rule = functools.partial(nf.standardize_weight, floor=floor)
    along = draw(*weight.shape, seed=2), draw(5, seed=3)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(t, d) for t, d in zip((weight, gain), along, strict=True)]
        tangent = forward_ad.unpack_dual(rule(*dual)).tangent
    _, expected, *_ = torch.func.jvp(rule, (weight, gain), along)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("floor", [True, False])
def test_forward_derivatives_of_the_gradient_of_standardisation(floor):
    weight, gain = low_rows()
    along = draw(*weight.shape, seed=2)

    leaf = weight.clone().requires_grad_()
    first = torch.autograd.grad(
        nf.standardize_weight(leaf, gain, floor=floor).square().square().sum(), leaf, create_graph=True
    )[0]
    expected = torch.autograd.grad(first, leaf, along)[0]  # the matrix of second derivatives is symmetric
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight.clone().requires_grad_(), along)
        out = nf.standardize_weight(dual, gain, floor=floor).square().square().sum()
        found = forward_ad.unpack_dual(torch.autograd.grad(out, dual)[0]).tangent
    assert found is not None
    for row_a, row_b in zip(found, expected, strict=True):
        torch.testing.assert_close(row_a, row_b, rtol=1e-9, atol=1e-9 * float(row_b.abs().max()))


@pytest.mark.parametrize("floor", [True, False])
def test_gradients_of_standardisation_map_over_what_comes_from_above(floor):
    weight, gain = low_rows()
    upstream = draw(3, *weight.shape, seed=2)
    _, pull, *_ = torch.func.vjp(lambda w, g: nf.standardize_weight(w, g, floor=floor), weight, gain)
    with torch.no_grad():
        together = torch.func.vmap(pull)(upstream)
    for i, g in enumerate(upstream):
        for mapped, single in zip(together, pull(g), strict=True):
            torch.testing.assert_close(mapped[i], single)


def test_the_variance_floor_is_active_below_its_limit_and_only_there():
    pattern = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).reshape(1, 4, 1, 1)  # var * fan_in = 4 s²
    gain = torch.ones(1, dtype=torch.float64)
    for s in (1e-3, 4.9e-3):  # 4 s² < 1e-4: divided by 0.01 whatever the spread
        torch.testing.assert_close(nf.standardize_weight(s * pattern, gain), s * pattern / 1e-2)
    for s in (5.1e-3, 1.0):
        torch.testing.assert_close(nf.standardize_weight(s * pattern, gain), pattern / 2)


@pytest.mark.parametrize("floor", [True, False])
def test_a_constant_kernel_becomes_zero_and_has_finite_gradients(floor):
    weight = torch.full((2, 4, 3, 3), 0.7, requires_grad=True)
    out = nf.standardize_weight(weight, torch.ones(2), floor=floor)
    (out * draw(2, 4, 3, 3, dtype=torch.float32)).sum().backward()
    assert out.abs().max() < FLOAT32 * 100  # the floor multiplies the mean's rounding error by 100
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_the_offset_rule():
    """`(var + 1e-5) * fan_in`: the offset grows with the fan-in, which the floor does not."""
    pattern = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64).reshape(1, 16, 1, 1)
    got = nf.standardize_weight(pattern * 1e-3, torch.ones(1), floor=False)
    torch.testing.assert_close(got, pattern * 1e-3 / math.sqrt((1e-6 + 1e-5) * 16))


def test_standardized_rows_have_mean_0_and_fan_in_scaled_variance():
    gain = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    rows = nf.standardize_weight(3 + draw(3, 8, 3, 3), gain).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(3, dtype=torch.float64), atol=FLOAT64, rtol=0)
    torch.testing.assert_close(rows.square().sum(1), gain**2)


@pytest.mark.parametrize("floor", [True, False])
def test_standardisation_ignores_a_shift(floor):
    weight, gain = draw(4, 3, 3, 3), draw(4, seed=1)
    got = (nf.standardize_weight(weight + shift, gain, floor=floor) for shift in (0.0, 5.0))
    assert relative(*got) < FLOAT64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_standardised_in_float32(dtype):
    weight, gain = (0.5 + 0.02 * draw(4, 3, 3, 3)).to(dtype), draw(4, seed=1).to(dtype)
    got = nf.standardize_weight(weight, gain)
    assert got.dtype == dtype
    assert torch.equal(got, nf.standardize_weight(weight.float(), gain.float()).to(dtype))


def test_under_autocast_standardisation_is_computed_in_float32_and_rounded_once():
    weight = (0.5 + draw(6, 32, 3, 3, dtype=torch.float32)).requires_grad_()
    gain = draw(6, dtype=torch.float32, seed=1).requires_grad_()
    g = draw(6, 32, 3, 3, dtype=torch.float32, seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nf.standardize_weight(weight, gain)
        double = nf.standardize_weight(weight.double(), gain.double())
    outside = nf.standardize_weight(weight, gain)
    assert double.dtype == torch.float64  # as torch's own autocast leaves it
    assert torch.equal(inside, outside.bfloat16())
    got = torch.autograd.grad(inside, (weight, gain), g)
    for value, expected in zip(got, torch.autograd.grad(outside, (weight, gain), g.float()), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)


def test_standardize_weight_passes_gradcheck():
    weight, gain = draw(2, 2, 3, 3).requires_grad_(), draw(2, seed=1).requires_grad_()
    for floor in (True, False):
        assert torch.autograd.gradcheck(
            lambda w, g, floor=floor: nf.standardize_weight(w, g, floor=floor), (weight, gain)
        )


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("name", sorted(nf.GAMMA))
def test_gamma_gives_unit_variance(name):
    z = draw(4_000_000)
    assert (nf.activate(z, name) * nf.GAMMA[name]).var().item() == pytest.approx(1, abs=MONTE_CARLO)


def test_activations_are_what_they_are_called():
    z = draw(1000).numpy()
    tanh = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in z])
    for name, expected in {
        "gelu_tanh": tanh,
        "gelu": erf,
        "relu": np.maximum(z, 0),
        "silu": z / (1 + np.exp(-z)),
    }.items():
        assert relative(nf.activate(torch.from_numpy(z), name), expected) < FLOAT64


# ---------------------------------------------------------------- attention and means


def test_squeeze_excite_by_hand():
    x = draw(2, 4, 3, 5)
    p = {"se.fc0.weight": draw(3, 4), "se.fc0.bias": draw(3), "se.fc1.weight": draw(4, 3), "se.fc1.bias": draw(4)}
    a = {k: v.numpy() for k, v in p.items()}
    pooled = x.numpy().mean((2, 3))
    hidden = np.maximum(pooled @ a["se.fc0.weight"].T + a["se.fc0.bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ a["se.fc1.weight"].T + a["se.fc1.bias"])))
    assert relative(nf.squeeze_excite(p, x), gate[:, :, None, None]) < FLOAT64


def test_efficient_channel_attention_by_hand():
    x, weight = draw(2, 6, 3, 5), draw(1, 1, 3)
    pooled = np.pad(x.numpy().mean((2, 3)), ((0, 0), (1, 1)))
    taps = weight.numpy()[0, 0]
    gate = 1 / (1 + np.exp(-sum(taps[k] * pooled[:, k : k + 6] for k in range(3))))
    assert relative(nf.efficient_channel_attention({"eca.weight": weight}, x), gate[:, :, None, None]) < FLOAT64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_mean_is_no_map_in_another_layout(dtype):
    x = draw(2, 8, 5, 3, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = draw(2, 8, dtype=dtype, seed=1)
    (g,) = torch.autograd.grad((nf.global_mean(x) * weight).sum(), x)
    assert g.stride()[2:] == (0, 0) or g.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(g, (weight.float() / 15).to(dtype)[:, :, None, None].expand(x.shape))


@pytest.mark.parametrize("pixels", [2, 8, 9])
def test_a_1x1_convolution_over_few_pixels_is_the_convolution(pixels):
    x = draw(3, 16, pixels, pixels).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = draw(24, 16, 1, 1, seed=1).requires_grad_(), draw(24, seed=2).requires_grad_()
    assert nf.is_product(x, weight, 1, 0, 1) == (pixels <= 8)
    got = nf.conv1x1(x, weight, bias)
    expected = F.conv2d(x, weight, bias)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    g = draw(*expected.shape, seed=3)
    inputs = (x, weight, bias)
    found, known = (torch.autograd.grad(y, inputs, g) for y in (got, expected))
    torch.testing.assert_close(found, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "given",
    [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"weight": (24, 16, 3, 3)}, {"device": "meta"}, {"last": False}],
)
def test_other_convolutions_are_no_products(given):
    x = draw(3, 16, 4, 4).to(given.get("device", "cpu"))
    if given.get("last", True):
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.empty(given.get("weight", (24, 16, 1, 1)), device="meta")
    geometry = (given.get("stride", 1), given.get("padding", 0), given.get("groups", 1))
    assert not nf.is_product(x, weight, *geometry)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_global_mean_accumulates_in_float32(dtype, layout):
    x = torch.full((2, 16, 64, 64), 20.0)  # whose sum float16 cannot hold
    x[..., :32, :] = 60  # an accumulator of 16 bits would stall long before 4096 summands
    x = x.to(dtype).contiguous(memory_format=layout)
    assert nf.global_mean(x).dtype == dtype
    assert torch.equal(nf.global_mean(x), torch.full((2, 16), 40, dtype=dtype))
    x = (
        (draw(2, 16, 64, 63) + 1).to(dtype).contiguous(memory_format=layout)
    )  # 4032 pixels: sum and quotient are rounded
    torch.testing.assert_close(nf.global_mean(x).double(), x.double().mean((2, 3)), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_gelu_is_that_of_torch(dtype):
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([0.0, 1e-30, 1e4, -1e4])]).to(dtype).requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(nf.activate, fullgraph=True)(x, "gelu_tanh")
    (g,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    known = F.gelu(wide, approximate="tanh")
    (slope,) = torch.autograd.grad(known.sum(), wide)
    eps = torch.finfo(dtype).eps
    assert y.dtype == g.dtype == dtype
    torch.testing.assert_close(y.double(), known, rtol=eps, atol=1e-6)
    torch.testing.assert_close(g.double(), slope, rtol=2 * eps, atol=4e-6)  # 1 - s, of a sigmoid s near 1


def test_an_export_keeps_the_gelu_as_one_operator():
    class Activation(torch.nn.Module):
        def forward(self, x):
            return nf.activate(x, "gelu_tanh")

    program = torch.export.export(Activation(), (torch.ones(3),))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.gelu.default"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf, "GAMMA", dict(nf.GAMMA))
    monkeypatch.setattr(nf, "_ACTIVATION", dict(nf._ACTIVATION))
    monkeypatch.setattr(nf, "ACTIVATIONS", names := list(config.ACTIVATIONS))
    monkeypatch.setattr(config, "ACTIVATIONS", names)


def test_an_activation_of_ones_own(registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gamma is 1 / std, and all forms of a model compute the same with it."""
    with pytest.raises(ConfigError, match=r"nfzoo\.register_activation"):
        nfzoo.create("nfnet-test", activation="mish")
    # Var relu(z) = 1/2 - 1/(2 pi)
    assert nfzoo.register_activation("half", torch.relu) == pytest.approx((0.5 - 0.5 / math.pi) ** -0.5, rel=1e-4)
    assert nfzoo.register_activation("same", lambda x: 3 * x + 1) == pytest.approx(1 / 3, rel=1e-6)
    assert nfzoo.register_activation("chosen", torch.tanh, gamma=1.5) == 1.5
    nfzoo.register_activation("mish", torch.nn.functional.mish)
    drawn = nfzoo.create("nfnet-test", activation="mish", num_classes=3)
    model = NFNet.from_params(drawn.description, random_params(drawn.config)).eval()
    x = torch.randn(2, 3, 32, 32)
    lean = model.for_inference()
    with torch.inference_mode():
        logits = model(x)
        for other in (lean, lean.prepack(), lean.as_modules(), model.as_modules()):
            torch.testing.assert_close(other(x), logits, rtol=1e-4, atol=1e-4)
    folder = model.save_pretrained(tmp_path / "m")
    assert torch.equal(nfzoo.from_pretrained(folder)(x), model(x))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(config, "ACTIVATIONS", ["relu"])
        with pytest.raises(CheckpointError, match=r"'mish' is not known.*nfzoo\.register_activation"):
            nfzoo.from_pretrained(folder)
    refused: dict[str, tuple[str, Any]] = {
        "there is an activation": ("gelu", torch.tanh),
        "must be a word": ("a b", torch.tanh),
        "has no variance": ("flat", torch.ones_like),
        "does not take": ("three", 3),
        "one finite number": ("log", torch.log),
    }
    for said, (name, function) in refused.items():
        with pytest.raises(ConfigError, match=said):
            nfzoo.register_activation(name, function)

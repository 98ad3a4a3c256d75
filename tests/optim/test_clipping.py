"""Adaptive gradient clipping: its laws, a restatement in loops, and AGC in front of torch's optimizers."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import FileStore, HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import nfzoo
from nfzoo import AGCSGD, NFNet, agc, agc_, clip_grad_agc_, unitwise_norm, with_agc
from nfzoo.optim.clipping import (
    EPS,
    GRADIENT_FLOOR,
    _split_dimension,
    clip_all,
    clip_grads_,
    clip_unitwise,
    clipped_fraction,
    unit_shape,
)
from nfzoo.optim.sgd import CLIPPED
from nfzoo.runtime.distributed import full_tensor
from tests.support.helpers import SMALL, assert_same, generator, images, random_params
from tests.support.processes import in_processes

FLOAT64 = 1e-12
FLOAT32 = 1e-6
SHAPES = {"conv": (6, 4, 3, 3), "linear": (5, 7), "gain": (8,), "scalar": (1,), "zero-dim": (), "eca": (1, 1, 3)}


def tensors(scale: float, seed: int) -> dict[str, torch.Tensor]:
    g = generator(seed)
    return {k: scale * torch.randn(s, generator=g, dtype=torch.float64) for k, s in SHAPES.items()}


def clipped_by_loops(grad, param, clip, eps):
    """Equation 3 of arXiv 2102.06171, unit by unit."""
    units = [...] if grad.ndim < 2 else list(range(len(grad)))
    out = grad.clone()
    for u in units:
        g, p = math.sqrt((grad[u] ** 2).sum()), math.sqrt((param[u] ** 2).sum())
        limit = clip * max(p, eps)
        if g > limit:
            out[u] = grad[u] * limit / max(g, 1e-6)
    return out


@pytest.mark.parametrize("clip", [1e-3, 0.01, 0.5, 2.0])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e6])
def test_agc_is_equation_3(clip, scale):
    params, grads = tensors(1.0, 0), tensors(scale, 1)
    params["linear"][2] = 0  # eps is the floor of its norm
    got = agc(grads, params, clip=clip)
    assert got.keys() == grads.keys()
    for key in grads:
        torch.testing.assert_close(
            got[key], clipped_by_loops(grads[key], params[key], clip, 1e-3), rtol=FLOAT64, atol=0
        )


def test_the_unit_is_the_output():
    for name, expected in {
        "conv": (6, 1, 1, 1),
        "linear": (5, 1),
        "gain": (),
        "scalar": (),
        "zero-dim": (),
        "eca": (1, 1, 1),
    }.items():
        x = tensors(1.0, 0)[name]
        norm = unitwise_norm(x)
        assert norm.shape == expected, name
        assert norm.square().sum().item() == pytest.approx(x.square().sum().item())


def test_one_loud_output_does_not_touch_the_others():
    param, grad = torch.ones(4, 9), torch.full((4, 9), 1e-3)
    grad[2] = 100
    out = agc({"w": grad}, {"w": param})["w"]
    assert torch.equal(out[[0, 1, 3]], grad[[0, 1, 3]])
    assert out[2].norm().item() == pytest.approx(0.01 * 3)


def test_agc_is_idempotent():
    params = tensors(1.0, 0)
    once = agc(tensors(10.0, 1), params)
    twice = agc(once, params)
    for key in once:
        torch.testing.assert_close(twice[key], once[key], rtol=FLOAT64, atol=0)


def test_agc_is_nothing_below_the_limit():
    params = tensors(1.0, 0)
    grads = {k: 1e-4 * p for k, p in params.items()}
    assert_same(agc(grads, params), grads)
    assert clipped_fraction(grads, params) == 0


def test_agc_limits_every_unit():
    params = tensors(1.0, 0)
    for key, grad in agc(tensors(1e3, 1), params).items():
        assert (unitwise_norm(grad) <= 0.01 * unitwise_norm(params[key]) * (1 + FLOAT64)).all()


def test_scaling_both_scales_the_result():
    params, grads = tensors(1.0, 0), tensors(0.1, 1)
    plain = agc(grads, params)
    scaled = agc({k: 8 * g for k, g in grads.items()}, {k: 8 * p for k, p in params.items()})
    for key in plain:
        torch.testing.assert_close(scaled[key], 8 * plain[key], rtol=FLOAT64, atol=0)


def test_above_the_limit_only_the_direction_counts():
    params, grads = tensors(1.0, 0), tensors(10.0, 1)
    louder = agc({k: 1000 * g for k, g in grads.items()}, params)
    for key, value in agc(grads, params).items():
        torch.testing.assert_close(louder[key], value, rtol=1e-9, atol=0)


def test_zero_parameters_can_move_and_zero_gradients_stay():
    out = agc({"skip": torch.ones(1)}, {"skip": torch.zeros(1)}, clip=0.01, eps=1e-3)["skip"]
    assert out.item() == pytest.approx(1e-5)
    assert agc({"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)})["w"].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["agc", "foreach", "one by one", "with_agc", "AGCSGD"])
def test_norms_of_half_precision_are_in_float32(dtype, way):
    """The square of 2000 is infinite in float16; the gradient then became 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 4, 3, 3), (7,), (6, 8), (1,)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    grads = [(2000 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    before = [p.detach().clone() for p in params]
    expected = [clipped_by_loops(g.double(), p.double(), 0.1, 1e-3) for g, p in zip(grads, before, strict=True)]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    if way == "agc":
        found = list(
            agc(dict(zip("abcd", grads, strict=True)), dict(zip("abcd", params, strict=True)), clip=0.1).values()
        )
    elif way in ("foreach", "one by one"):
        assert clip_grad_agc_(params, 0.1, foreach=way == "foreach") == 1
        found = [p.grad for p in params if p.grad is not None]
    else:
        sgd = torch.optim.SGD(params, lr=1.0)
        optimizer = with_agc(sgd, clip=0.1) if way == "with_agc" else AGCSGD(params, lr=1.0, momentum=0.0, clip=0.1)
        optimizer.step()
        found = [b - p.detach() for b, p in zip(before, params, strict=True)]
    for f, e, b in zip(found, expected, before, strict=True):
        assert f.dtype == dtype
        size = e.abs() + (b.double().abs() if way in ("with_agc", "AGCSGD") else 0)  # a step rounds the weight too
        digit = torch.finfo(dtype).eps * size
        assert ((f.double() - e).abs() <= digit + 1e-7).all()


def test_the_gradient_floor():
    """Norms between the limit and 1e-6 are divided by 1e-6, as DeepMind does."""
    out = agc({"w": torch.tensor([5e-7])}, {"w": torch.zeros(1)}, clip=1e-4, eps=1e-3)["w"]
    assert out.item() == pytest.approx(5e-7 * 1e-7 / GRADIENT_FLOOR)


def test_where_chooses():
    params, grads = tensors(1.0, 0), tensors(10.0, 1)
    got = agc(grads, params, where=lambda name: name != "linear")
    assert torch.equal(got["linear"], grads["linear"])
    assert not torch.equal(got["conv"], grads["conv"])
    assert_same(agc(grads, params, where=lambda name: False), grads)


def test_clipped_fraction_counts_units():
    params = {"a": torch.ones(4, 2), "b": torch.ones(3)}
    grads = {"a": torch.tensor([[1.0], [1.0], [0.001], [1.0]]).expand(4, 2), "b": torch.zeros(3)}
    assert clipped_fraction(grads, params).item() == pytest.approx(3 / 5)
    assert clipped_fraction(grads, params, where=lambda n: n == "b").item() == 0
    assert clipped_fraction(grads, params, where=lambda n: False).item() == 0


@pytest.mark.parametrize("bad", [{"clip": 0}, {"clip": -1.0}, {"clip": math.nan}, {"eps": 0.0}, {"eps": -1e-3}])
def test_bad_limits_are_refused(bad):
    params = {"w": torch.ones(2, 2)}
    leaf = nn.Parameter(torch.ones(2, 2))
    for call in (
        lambda: agc(params, params, **bad),
        lambda: clipped_fraction(params, params, **bad),
        lambda: agc_([leaf], **bad),
        lambda: with_agc(torch.optim.SGD([leaf], lr=0.1), **bad),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be positive"):
            call()


# ---------------------------------------------------------------- in place


def shell_with_gradients(scale: float = 1.0) -> NFNet:
    cfg = SMALL["nfnet"]
    shell = NFNet(cfg, generator=generator())
    shell.load_state_dict(random_params(cfg))
    (scale * shell(images(cfg)).square().sum()).backward()
    return shell


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None}


def test_agc_in_place_equals_agc_and_leaves_the_classifier():
    shell = shell_with_gradients()
    before, storage = gradients(shell), {k: p.grad for k, p in shell.named_parameters()}
    kinds = shell.parameter_kinds()
    expected = agc(before, dict(shell.named_parameters()), where=lambda n: kinds[n] in CLIPPED)
    agc_(shell)
    assert_same(gradients(shell), {k: v.detach() for k, v in expected.items()})
    assert all(p.grad is storage[k] for k, p in shell.named_parameters())
    assert torch.equal(gradients(shell)["head.weight"], before["head.weight"])
    assert not torch.equal(gradients(shell)["head.bias"], before["head.bias"])


def test_agc_in_place_on_parameters_takes_them_all_but_the_excluded():
    shell = shell_with_gradients()
    before = gradients(shell)
    agc_(list(shell.parameters()), exclude=[shell.get_parameter("stem.conv0.weight")])
    after = gradients(shell)
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert torch.equal(after["stem.conv0.weight"], before["stem.conv0.weight"])


def test_agc_in_place_skips_what_has_no_gradient():
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    a.grad = torch.ones(2, 2)
    agc_(iter([a, b]))
    assert a.grad.norm(dim=1).max().item() == pytest.approx(0.01 * 2**0.5)
    assert b.grad is None


def test_agc_in_place_serves_any_module():
    linear = nn.Linear(3, 2)
    linear(torch.ones(1, 3)).sum().backward()
    agc_(linear)
    assert linear.weight.grad is not None
    assert (
        linear.weight.grad.norm(dim=1) <= 0.01 * linear.weight.detach().norm(dim=1).clamp(min=1e-3) * (1 + FLOAT32)
    ).all()


# ---------------------------------------------------------------- in front of torch's optimizers

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def leaves(seed: int = 0) -> list[nn.Parameter]:
    g = generator(seed)
    return [nn.Parameter(torch.randn(s, generator=g)) for s in SHAPES.values()]


def give_gradients(parameters, step: int, scale: float = 1.0) -> None:
    g = generator(100 + step)
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_agc_is_agc_then_step(name):
    a, b = leaves(), leaves()
    first, second = with_agc(OPTIMIZERS[name](a), exclude=[a[1]]), OPTIMIZERS[name](b)
    for step in range(3):
        give_gradients(a, step)
        give_gradients(b, step)
        agc_(b, exclude=[b[1]])
        first.step()
        second.step()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_with_agc_returns_the_optimizer_and_clips_less_in_a_group():
    a, b, c = (nn.Parameter(torch.ones(1, 4)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "clip": None}, {"params": [c], "clip": 0.5}], lr=1.0)
    assert with_agc(optimizer, clip=0.01) is optimizer
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, change in ((a, 0.01), (b, 1.0), (c, 0.5)):
        torch.testing.assert_close(p.detach(), torch.full((1, 4), 1 - change))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_agc_under_a_grad_scaler(name):
    """Scaled by a power of two, the gradients unscale to the same bits, so the steps agree exactly."""
    a, b = leaves(), leaves()
    first, second = with_agc(OPTIMIZERS[name](a)), with_agc(OPTIMIZERS[name](b))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        scaler.scale(torch.zeros(()))  # a scaler makes its scale on first use
        give_gradients(a, step, scale=scaler.get_scale())
        give_gradients(b, step)
        scaler.step(first)
        scaler.update()
        second.step()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adamw-fused"])
def test_an_overflow_is_skipped_with_agc_in_front(name):
    parameters = leaves()
    optimizer = with_agc(OPTIMIZERS[name](parameters))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))
    give_gradients(parameters, 0)
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = math.inf
    before = [p.detach().clone() for p in parameters]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(x, y) for x, y in zip(before, parameters, strict=True))
    assert scaler.get_scale() == 2.0**9


def test_a_simulated_grad_scale_is_undone_once():
    (p,) = [nn.Parameter(torch.ones(1, 4))]
    optimizer = with_agc(torch.optim.SGD([p], lr=1.0))
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    p.grad = torch.full((1, 4), 4 * 1e-3)  # 1e-3 after unscaling: below the limit, so nothing is clipped
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((1, 4), 1 - 1e-3))
    assert optimizer.grad_scale is None  # type: ignore[attr-defined]


def test_clip_unitwise_says_what_it_clipped():
    clipped, mask = clip_unitwise(torch.tensor([[1.0, 0.0], [1e-4, 0.0]]), torch.full((2, 2), 0.5**0.5), clip=0.01)
    assert mask.flatten().tolist() == [True, False]
    torch.testing.assert_close(clipped[:, 0], torch.tensor([0.01, 1e-4]))
    assert nfzoo.agc is agc  # the function, though a module has the name too


@contextlib.contextmanager
def one_process() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- other people's numbers

GOLDEN = np.load(Path(__file__).parents[1] / "reference" / "agc_golden.npz")
CASES = sorted({name.partition(":")[2] for name in GOLDEN if name.startswith("param:")})
LIMITS = [(0.01, 1e-3), (0.1, 1e-3), (0.01, 0.5)]


def golden(kind: str) -> list[torch.Tensor]:
    return [torch.from_numpy(GOLDEN[f"{kind}:{case}"]) for case in CASES]


def golden_clipped(clip: float, eps: float) -> list[torch.Tensor]:
    return [torch.from_numpy(GOLDEN[f"clipped:{case}:{clip}:{eps}"]) for case in CASES]


def golden_parameters() -> list[nn.Parameter]:
    parameters = [nn.Parameter(p) for p in golden("param")]
    for p, grad in zip(parameters, golden("grad"), strict=True):
        p.grad = grad
    return parameters


def by_agc(clip: float, eps: float) -> list[torch.Tensor]:
    grads, params = (dict(zip(CASES, golden(kind), strict=True)) for kind in ("grad", "param"))
    return list(agc(grads, params, clip=clip, eps=eps).values())


def by_agc_(clip: float, eps: float) -> list[torch.Tensor]:
    parameters = golden_parameters()
    agc_(parameters, clip=clip, eps=eps)
    return [p.grad for p in parameters if p.grad is not None]


def by_clip_grad_agc_(clip: float, eps: float, foreach: bool | None = None) -> list[torch.Tensor]:
    parameters = golden_parameters()
    clip_grad_agc_(parameters, clip, eps=eps, foreach=foreach)
    return [p.grad for p in parameters if p.grad is not None]


def by_foreach(clip: float, eps: float) -> list[torch.Tensor]:
    return by_clip_grad_agc_(clip, eps, foreach=True)


def one_by_one(clip: float, eps: float) -> list[torch.Tensor]:
    return by_clip_grad_agc_(clip, eps, foreach=False)


def by_dtensors(clip: float, eps: float) -> list[torch.Tensor]:
    with one_process() as mesh:
        parameters = []
        for p, grad in zip(golden("param"), golden("grad"), strict=True):
            placement = [Shard(0) if p.ndim else Replicate()]
            parameters.append(nn.Parameter(distribute_tensor(p, mesh, placement)))
            parameters[-1].grad = distribute_tensor(grad, mesh, placement)
        clip_grad_agc_(parameters, clip, eps=eps)
        return [full_tensor(p.grad) for p in parameters if p.grad is not None]


def by_clip_all(clip: float, eps: float) -> list[torch.Tensor]:
    return clip_all(golden("grad"), golden("param"), clip=clip, eps=eps)[0]


def by_step(optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[torch.Tensor]:
    """How far a step of plain SGD from zero momentum goes."""
    parameters = golden_parameters()
    optimizer_of(parameters).step()
    return [p - q.detach() for p, q in zip(golden("param"), parameters, strict=True)]


def by_with_agc(clip: float, eps: float) -> list[torch.Tensor]:
    return by_step(lambda p: with_agc(torch.optim.SGD(p, lr=1.0), clip=clip, eps=eps))


def by_agcsgd(clip: float, eps: float, compiled: bool = False) -> list[torch.Tensor]:
    return by_step(lambda p: AGCSGD(p, 1.0, momentum=0.0, nesterov=False, clip=clip, eps=eps, compiled=compiled))


def by_compiled_agcsgd(clip: float, eps: float) -> list[torch.Tensor]:
    return by_agcsgd(clip, eps, compiled=True)


WAYS = [by_agc, by_agc_, by_clip_grad_agc_, by_foreach, one_by_one, by_dtensors, by_clip_all, by_with_agc, by_agcsgd]
WAYS.append(pytest.param(by_compiled_agcsgd, marks=pytest.mark.slow))  # type: ignore[arg-type]


@pytest.mark.parametrize(("clip", "eps"), LIMITS)
@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_of_optax_and_deepmind(way, clip, eps):
    stepped = way in (by_with_agc, by_agcsgd, by_compiled_agcsgd)  # the difference of parameters of order one
    for case, found, expected in zip(CASES, way(clip, eps), golden_clipped(clip, eps), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(
            found, expected, rtol=FLOAT32, atol=FLOAT32 if stepped else 0, msg=lambda text, case=case: f"{case}: {text}"
        )


def test_units_are_counted_as_they_are_clipped():
    sizes = {(6, 4, 3, 3): (6, 36), (6, 1, 3, 3): (6, 9), (1, 4, 3, 3): (1, 36), (5, 7): (5, 7), (8,): (1, 8)}
    vectors = {(6, 1): (1, 6), (7, 1, 1, 1): (1, 7), (1, 7): (1, 7), (1, 1): (1, 1), (): (1, 1), (1, 1, 3): (1, 3)}
    for shape, expected in (sizes | vectors | {(0, 3): (0, 3), (0,): (1, 0), (3, 0): (3, 0)}).items():
        assert unit_shape(shape) == expected, shape
        x = torch.ones(shape)
        assert unitwise_norm(x).numel() == expected[0], shape
        assert clip_all([x], [x], clip=0.01)[1].numel() == expected[0]


# ---------------------------------------------------------------- in the form of torch's clip_grad_norm_

FOREACH = pytest.mark.parametrize("foreach", [None, False, True])


def by_hand(parameters: list[nn.Parameter], clip: float = 0.01) -> tuple[list[torch.Tensor], float]:
    """The clipped gradients and the fraction of units that were clipped, by the pure functions."""
    named = {str(i): p.detach() for i, p in enumerate(parameters)}
    grads = {str(i): p.grad for i, p in enumerate(parameters) if p.grad is not None}
    return list(agc(grads, named, clip=clip).values()), clipped_fraction(grads, named, clip=clip).item()


@FOREACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_clips_in_place_and_returns_the_fraction_of_clipped_units(foreach, dtype):
    parameters = [nn.Parameter(p.to(dtype)) for p in leaves()]
    for p in parameters:
        ratio = torch.linspace(0.02, 0.001, unit_shape(p.shape)[0], dtype=dtype)  # of gradient to parameter
        p.grad = p.detach() * ratio.view(-1, *[1] * (p.ndim - 1)) if len(ratio) > 1 else p.detach() * 0.02
    expected, fraction = by_hand(parameters)
    storage = [p.grad for p in parameters]
    found = clip_grad_agc_(parameters, foreach=foreach)
    assert (found.dtype, found.ndim) == (torch.float32, 0)
    assert found.item() == pytest.approx(fraction)
    assert 0 < fraction < 1
    for p, grad, same in zip(parameters, expected, storage, strict=True):
        assert p.grad is same
        torch.testing.assert_close(p.grad, grad, rtol=FLOAT32, atol=0)
    assert clip_grad_agc_(parameters, 0.0101, foreach=foreach) == 0


@FOREACH
@pytest.mark.parametrize("name", ["sgd", "sgd-foreach", "adamw", "adamw-fused"])
def test_it_serves_any_optimizer(name, foreach):
    a, b = leaves(), leaves()
    first, second = OPTIMIZERS[name](a), OPTIMIZERS[name](b)
    for step in range(3):
        give_gradients(a, step)
        give_gradients(b, step)
        clip_grad_agc_(a, 0.1, foreach=foreach)
        first.step()
        for p, grad in zip(b, by_hand(b, 0.1)[0], strict=True):
            p.grad = grad
        second.step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=FLOAT32, atol=FLOAT32)


@FOREACH
def test_dtypes_and_layouts_may_be_mixed(foreach):
    parameters = [nn.Parameter(p.to(dtype)) for p in leaves() for dtype in (torch.float32, torch.float64)]
    parameters.append(nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)))
    for p in parameters:
        p.grad = torch.ones_like(p)
    expected, fraction = by_hand(parameters)
    assert clip_grad_agc_(parameters, foreach=foreach).item() == pytest.approx(fraction)
    for p, grad in zip(parameters, expected, strict=True):
        assert p.grad is not None
        assert p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad, grad, rtol=FLOAT32, atol=0)


@FOREACH
@pytest.mark.parametrize(
    "parameters", [[], [nn.Parameter(torch.ones(2, 2))], nn.ReLU()], ids=["none", "list", "module"]
)
def test_without_gradients_nothing_is_clipped(parameters, foreach):
    found = clip_grad_agc_(parameters, foreach=foreach)
    assert (found.item(), found.dtype, found.ndim) == (0, torch.float32, 0)


@FOREACH
def test_units_without_numbers_are_no_trouble(foreach):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((0, 3), (0,), (3, 0))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert clip_grad_agc_(parameters[:1], foreach=foreach) == 0
    assert clip_grad_agc_(parameters, foreach=foreach) == 0


@pytest.mark.parametrize("bad", [{"clip": 0}, {"clip": math.nan}, {"eps": 0.0}, {"clip": None}, {"eps": "0.1"}])
def test_bad_limits_are_refused_here_too(bad):
    with pytest.raises(ValueError, match="must be positive"):
        clip_grad_agc_(leaves(), **bad)


@FOREACH
def test_the_classifier_and_exceptions_are_left_out_of_the_fraction(foreach):
    shell: Any = shell_with_gradients()
    for p in shell.parameters():
        p.grad = torch.full_like(p, 1e3)
    shell.head.weight.grad.zero_()  # would not be clipped
    shell.stem.conv0.weight.grad.zero_()
    assert clip_grad_agc_(shell, exclude="stem.conv0.weight", foreach=foreach) == 1


def test_it_takes_the_place_of_torchs_in_a_step_of_adamw():
    """The README's lines, with a scaler."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]
    scaler.scale(model(torch.ones(2, 3)).square().sum()).backward()
    scaler.unscale_(optimizers[0])
    fraction = clip_grad_agc_(model, 0.01, exclude="2.weight")
    scaler.step(optimizers[0])
    twin(torch.ones(2, 3)).square().sum().backward()
    agc_(twin, exclude=twin[2].weight)
    optimizers[1].step()
    assert 0 < fraction <= 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


# ---------------------------------------------------------------- sharded parameters


def sharded_pair() -> tuple[nn.Module, nn.Module]:
    """Linears of many shapes, of fan-in 1 too, and a twin that is to be sharded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1), nn.Linear(1, 5), nn.Linear(5, 3), nn.LayerNorm(3))
    return model, copy.deepcopy(model)


def clip_sharded(rows: slice) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients and fraction of plain parameters, and of those that are sharded over the processes."""
    model, twin = sharded_pair()
    fully_shard(twin)
    x = torch.linspace(-1, 1, 40).view(8, 5)
    model(x).square().mean().backward()
    twin(x[rows]).square().mean().backward()
    results = []
    for module in (model, twin):
        fraction = clip_grad_agc_(module, 0.2)
        assert type(fraction) is torch.Tensor
        results.append([*(full_tensor(p.grad) for p in module.parameters() if p.grad is not None), fraction])
    return results[0], results[1]


def test_dtensors_are_clipped_as_plain_tensors_are():
    with one_process():
        plain, sharded = clip_sharded(slice(None))
    assert 0 < plain[-1] < 1
    for a, b in zip(plain, sharded, strict=True):
        torch.testing.assert_close(a, b, rtol=FLOAT32, atol=1e-8)


def clip_along(dimension: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results for plain parameters and for those sharded along a dimension, by `clip_grad_agc_` and by `AGCSGD`."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    g = generator()
    shapes = ((1, 6), (5, 1), (3, 4), (1, 1, 5), (1, 2, 3, 3), (7, 2, 3, 3))
    values = [torch.randn(shape, generator=g) for shape in shapes]
    grads = [0.02 * torch.randn(value.shape, generator=g) for value in values]
    results = []
    for split in (lambda x: x, lambda x: distribute_tensor(x, mesh, [Shard(dimension)])):
        parameters = [nn.Parameter(split(value.clone())) for value in values]
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = split(grad.clone())
        optimizer = AGCSGD(parameters, 0.1)
        optimizer.step()
        fraction = clip_grad_agc_(parameters, 0.02)
        tensors = [x for p in parameters for x in (p.detach(), p.grad) if x is not None]
        results.append([*map(full_tensor, tensors), fraction, optimizer.clipped_fraction])
    return results[0], results[1]


def clip_partial() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results for plain parameters, and for those of which each process has a part of the gradient's sum."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    value, grad = torch.randn(2, 4, 3, generator=generator())
    results = []
    for sharded in (False, True):
        p = nn.Parameter(distribute_tensor(value.clone(), mesh, [Replicate()]) if sharded else value.clone())
        share = grad * (0.25 + 0.5 * mesh.get_rank())
        p.grad = DTensor.from_local(share, mesh, [Partial()]) if sharded else grad.clone()
        optimizer = AGCSGD([p], 0.1)
        optimizer.step()
        fraction = clip_grad_agc_([p], 0.02)
        assert p.grad is not None
        results.append([full_tensor(p.detach()), full_tensor(p.grad), fraction, optimizer.clipped_fraction])
    return results[0], results[1]


def clip_tensor_parallel() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of plain layers, and of those that FSDP2 shards over tensor parallelism, where it splits rows twice."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 7))
    sharded = copy.deepcopy(plain)
    parallelize_module(sharded, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(sharded, mesh=mesh["data"])
    results = []
    for module in (plain, sharded):
        module(torch.linspace(-1, 1, 24).view(4, 6)).square().sum().backward()
        fraction = clip_grad_agc_(module, 0.02)
        results.append([*(full_tensor(p.grad) for p in module.parameters() if p.grad is not None), fraction])
    return results[0], results[1]


def clip_after_backward() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of plain and of sharded parameters, clipped where autograd is on, as by `TorchUpdater`."""
    model, twin = sharded_pair()
    fully_shard(twin)
    for module in (model, twin):
        module(torch.linspace(-1, 1, 40).view(8, 5)).square().mean().backward()
        clip_grads_(list(module.parameters()), clip=0.2, eps=EPS)
    a, b = ([full_tensor(p.grad) for p in module.parameters() if p.grad is not None] for module in (model, twin))
    return a, b


def test_sharded_gradients_are_clipped_where_autograd_is_on() -> None:
    with one_process():
        plain, sharded = clip_after_backward()
    for a, b in zip(plain, sharded, strict=True):
        torch.testing.assert_close(a, b, rtol=FLOAT32, atol=1e-8)


def _sharded_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    results = [clip_sharded(slice(4 * rank, 4 * rank + 4)), clip_along(0), clip_along(1), clip_partial()]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _tensor_parallel_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=FileStore(f"{folder}/store", 4), rank=rank, world_size=4)
    torch.save(clip_tensor_parallel(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_fsdp_over_tensor_parallelism_clips_what_one_process_does(tmp_path):
    in_processes(_tensor_parallel_rank, (str(tmp_path),), 4, tmp_path, 300)
    for rank in range(4):
        plain, sharded = torch.load(tmp_path / f"{rank}.pt")
        assert plain[-1] > 0
        for a, b in zip(plain, sharded, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_unknown_placements_are_refused():
    """As that of ragged shards, which have several dimensions."""
    with pytest.raises(TypeError, match="placement"):
        _split_dimension(SimpleNamespace(is_replicate=lambda: False, dims=(0, 1)), 2)


@pytest.mark.slow
def test_two_processes_clip_what_one_does(tmp_path):
    """Parameters with less rows than there are processes, and units that lie across processes, are among them."""
    in_processes(_sharded_rank, (str(tmp_path),), 2, tmp_path, 300)
    for rank in range(2):  # each has the full count
        for plain, sharded in torch.load(tmp_path / f"{rank}.pt"):
            for a, b in zip(plain, sharded, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("keyword", [False, True])
def test_gradients_that_a_closure_computes_are_clipped(keyword):
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = with_agc(torch.optim.SGD([p], lr=1.0), clip=0.01)

    def closure():
        optimizer.zero_grad()
        loss = (100 * p).sum()
        loss.backward()
        return loss

    step: Any = optimizer.step
    loss = step(closure=closure) if keyword else step(closure)
    assert loss == 400
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 0.99))


@pytest.mark.parametrize("bad", [-1, 0, float("nan"), "0.1", True])
def test_a_groups_own_clip_is_checked(bad):
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = with_agc(torch.optim.SGD([{"params": [p], "clip": bad}], lr=1.0))
    p.grad = torch.full((2, 2), 100.0)
    with pytest.raises(ValueError, match="clip must be positive"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(
    "options", [{"clip": -1}, {"clip": 0}, {"clip": "a"}, {"weight_decay": -1}, {"weight_decay": float("nan")}]
)
def test_param_groups_check_their_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        nfzoo.param_groups(nfzoo.create("nfnet-test"), **options)


def test_a_classifier_given_to_a_model_without_one_is_a_classifier():
    model = nfzoo.create("nfnet-test", num_classes=0)
    model.head = torch.nn.Linear(256, 5)
    clipped = next(group for group in nfzoo.param_groups(model) if group["clip"] is None)["params"]
    assert [p.shape for p in clipped] == [(5, 256)]
